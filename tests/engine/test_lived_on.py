"""Our own tests and the demo on a host that others have used before: they pass there, and leave it unchanged."""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path

import pytest

from netplugin_sdk.testing import engine as engines

from ..volume import FULL
from .lived_on import CLIENT, LivedOnHost
from .snapshot import difference

pytestmark = pytest.mark.one_engine(always=True)

SOCKET = "/run/docker/plugins/left.sock"
BIND = f"import socket; socket.socket(socket.AF_UNIX).bind('{SOCKET}')"
ELEMENT = "element inet somebodys blocked '{ 192.0.2.9 }'"
NONLOCAL = "/proc/sys/net/ipv4/ip_nonlocal_bind"

# A test's change, how it shows, and how it is undone. (Docker asks each socket of a plugin for volumes.)
UNTIDY = (
    (f"{CLIENT}/docker create --name left busybox", "+container", f"{CLIENT}/docker rm left"),
    ("ip link add left type bridge", "+left flags=", "ip link delete left"),
    ("ip address add 10.9.9.9/32 dev lo", "'local': '10.9.9.9'", "ip address delete 10.9.9.9/32 dev lo"),
    ("ip route delete 10.66.0.0/16", "-10.66.0.0/16 via", "ip route add 10.66.0.0/16 via 192.168.122.2"),
    ("ip rule add fwmark 9 lookup 9", "fwmark 0x9 lookup 9", "ip rule delete fwmark 9 lookup 9"),
    ("iptables-nft -A INPUT -d 192.0.2.9", "+-A INPUT -d 192.0.2.9/32", "iptables-nft -D INPUT -d 192.0.2.9"),
    ("ip6tables-nft -N left", "+:left -", "ip6tables-nft -X left"),
    ("iptables-legacy -P OUTPUT DROP", "+:OUTPUT DROP", "iptables-legacy -P OUTPUT ACCEPT"),
    ("nft add table inet left", "+table inet left", "nft delete table inet left"),
    (f"nft add {ELEMENT}", "192.0.2.9", f"nft delete {ELEMENT}"),
    (f"echo 0 > {NONLOCAL}", f"-{NONLOCAL} 1", f"echo 1 > {NONLOCAL}"),
    ("ip netns add left", "+/run/netns/left ", "ip netns delete left"),
    ("ip -n somebodys link set lo mtu 9000", "+lo mtu=9000", "ip -n somebodys link set lo mtu 65536"),
    ("mount --bind /run/netns /mnt", "+/mnt /netns", "umount /mnt"),
    ("sleep 99999 & echo $! > /run/left", "'sleep 99999'", "kill $(cat /run/left); rm /run/left"),
    ("mkdir /tmp/left", "+/tmp/left drwx", "rmdir /tmp/left"),
    ("mkdir /var/lib/netplugin/left", "+/var/lib/netplugin/left drwx", "rmdir /var/lib/netplugin/left"),
    (f'{sys.executable} -c "{BIND}"', f"+{SOCKET} srwx", f"rm {SOCKET}"),
)


def test_whatever_is_left_is_seen(lived_on: LivedOnHost) -> None:
    with lived_on.unchanged():
        before = lived_on.snapshot()
        for do, _, _ in UNTIDY:
            lived_on.run("bash", "-c", f"({do}) > /dev/null 2>&1")
        seen = difference(before, lived_on.snapshot())
        for _, _, undo in UNTIDY:
            lived_on.run("bash", "-c", f"({undo}) > /dev/null")
    assert [line for _, line, _ in UNTIDY if line not in seen] == [], seen


def run_tests(host: LivedOnHost, *arguments: str) -> None:
    """pytest's own folder is not left."""
    folder = "/tmp/pytest"
    pytest_ = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--quiet", f"--basetemp={folder}", *arguments)
    with host.unchanged():
        done = host.try_to_run(*pytest_, timeout=3600)
        assert done.returncode == 0, done.stdout + done.stderr
        host.run("rm", "--recursive", "--force", "--one-file-system", folder)


# Minutes, in which the plugin is killed at every point.
SAMPLE = ("--sample=1", "--ignore=tests/kernel/test_faults.py")


def test_the_kernel_tests(lived_on: LivedOnHost) -> None:
    """One of each module, or with NETPLUGIN_FULL all, each with its usual number of cases."""
    run_tests(lived_on, "tests/kernel", *(("-n", "4") if FULL else SAMPLE))


def test_other_engines_beside_its_own(lived_on: LivedOnHost) -> None:
    """One in the same network namespaces within it, and a systemd that is switched off."""
    tests = ("test_minimal.py::test_create_run_inspect_rm", "test_kit.py", "test_systemd.py::test_a_reboot")
    run_tests(lived_on, f"--engine={lived_on.engine.version}", *(f"tests/engine/{test}" for test in tests))


def test_the_demo_with_its_docker(lived_on: LivedOnHost) -> None:
    demo = (sys.executable, "examples/demo.py", "--engine", "host")
    with lived_on.unchanged():
        done = lived_on.try_to_run("env", f"PATH={CLIENT}:{os.environ['PATH']}", *demo, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hello from web" in done.stdout


def test_groups_of_managed_plugins_end_with_a_lab(tmp_path: Path) -> None:
    """They are not below that of the lab."""
    plugin = f"{uuid.uuid4().hex}{uuid.uuid4().hex}"
    (tmp_path / "lab/data/plugins" / plugin).mkdir(parents=True)
    root = next(at for at, _, files in os.walk("/sys/fs/cgroup") if "cgroup.procs" in files)
    group = Path(root, plugin)
    (group / "below").mkdir(parents=True)
    engines._remove_lab(tmp_path / "lab")
    assert not group.exists()
    assert not (tmp_path / "lab").exists()
