"""The units of examples/myplugin/systemd, as they are, under a real systemd beside Docker's own units."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from netplugin_sdk.testing.engine import ENGINE_ADDRESS, OUTSIDE_ADDRESS, wait_until

from ..patience import PATIENCE
from .systemd_lab import ENGINE_ADDRESS6, SYSTEMD, Host

pytestmark = pytest.mark.one_engine


@pytest.fixture(scope="module")
def host(version: str) -> Iterator[Host]:
    """It has run before: both units were enabled, and there is a container that is always to run."""
    if not SYSTEMD.exists():
        pytest.skip("needs systemd, not as the init of this machine: apt-get install systemd")
    host = Host(version)
    try:
        host.boot()
        host.import_busybox()
        host.run("systemctl", "enable", "--now", "myplugin.socket", "myplugin.service")
        subnets = ("--ipv6", "--subnet=10.77.0.0/24", "--subnet=fd00:77::/64")
        host.docker("network", "create", "--driver=myplugin", *subnets, "mynet")
        echo = ("--restart=always", "--stop-timeout=1", "busybox", "nc", "-ll", "-p", "80", "-e", "echo", "hello")
        host.docker("run", "--detach", "--name=web", "--network=mynet", "--publish=80:80", *echo)
        yield host
    finally:
        host.close()


def is_reached(host: Host) -> None:
    """Outside by both addresses (the firewall), on the host itself (the relay); and the container reaches outside."""
    wait_until(lambda: host.says(ENGINE_ADDRESS, 80) == "hello", PATIENCE)
    assert host.says(ENGINE_ADDRESS6, 80) == "hello"
    assert host.says("127.0.0.1", 80, outside=False) == "hello"
    assert "1 packets received" in host.docker("exec", "web", "ping", "-c1", "-W2", OUTSIDE_ADDRESS)


def no_call_failed(host: Host, since: float | None = None) -> None:
    said = host.journal("myplugin.service", since=since)
    assert "method=" in said
    assert " status=200" in said
    assert [line for line in said.splitlines() if "method=" in line and " status=200" not in line] == []


def plugin(host: Host) -> int:
    pid = int(host.show("myplugin.service", "MainPID"))
    assert pid > 0  # no process, and for kill everybody
    return pid


def test_systemd_finds_nothing_wrong_with_them(host: Host) -> None:
    assert host.run("systemd-analyze", "verify", "myplugin.service", "myplugin.socket") == ""


@pytest.mark.each_engine
def test_all_works_with_what_the_unit_leaves_to_root(host: Host) -> None:
    is_reached(host)
    status = host.run("cat", f"/proc/{plugin(host)}/status")
    can = [line.split()[1] for line in status.splitlines() if line.startswith(("CapEff", "CapBnd"))]
    assert {int(mask, 16) for mask in can} == {1 << 10 | 1 << 12 | 1 << 13}, "NET_BIND_SERVICE, NET_ADMIN, NET_RAW"
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    no_call_failed(host)


def test_mounts_of_the_machine_below_are_not_seen(host: Host) -> None:
    """systemd would unmount them; when it cannot, it is never switched off. It cannot, for one, below its own /run."""
    seen, below = host.mount_points()
    others = {"/etc/passwd", "/home", "/mnt", "/mnt/with\\040blank", "/run/netns/somebodys", "/run/user/0"}
    assert others <= below
    assert not others & seen


@pytest.mark.each_engine
def test_a_reboot(host: Host) -> None:
    booted = host.booted
    host.power_off()
    host.boot()
    is_reached(host)
    no_call_failed(host, booted)
    said = host.journal("docker.service", "myplugin.service", since=booted)
    before, after = said.split("Daemon shutdown complete")
    assert "method=NetworkDriver.Leave" in before
    assert "myplugin stopped" in after, "stopped when Docker needed it no more"
    assert "ordering cycle" not in host.journal()


@pytest.mark.each_engine
def test_a_power_cut(host: Host) -> None:
    host.cut_power()
    host.boot()
    is_reached(host)
    no_call_failed(host)
    host.docker("network", "create", "--driver=myplugin", "other")
    host.docker("network", "rm", "other")


def test_a_restart_under_load_loses_no_call(host: Host) -> None:
    enough, began = threading.Event(), time.time()

    def run_containers(_: int) -> int:
        count = 0
        while not enough.is_set():
            host.docker("run", "--rm", "--network=mynet", "busybox", "true")
            count += 1
        return count

    with ThreadPoolExecutor(4) as users:
        counts = users.map(run_containers, range(4))
        try:
            for _ in range(5):
                host.run("sleep", "1")
                host.run("systemctl", "restart", "myplugin.service")
        finally:
            enough.set()
        assert sum(counts) > 5
    is_reached(host)
    no_call_failed(host, began)
    assert host.journal("myplugin.service", since=began).count("myplugin stopped") == 5


def test_a_call_starts_a_stopped_plugin(host: Host) -> None:
    host.run("systemctl", "stop", "myplugin.service")
    assert host.show("myplugin.socket", "ActiveState") == "active"
    host.docker("network", "create", "--driver=myplugin", "other")
    assert host.show("myplugin.service", "ActiveState") == "active"
    host.docker("network", "rm", "other")
    is_reached(host)


def test_a_killed_plugin_comes_back_and_its_relay_does_not_stay(host: Host) -> None:
    before = plugin(host)
    host.run("sh", "-c", f"kill -KILL {before}")
    host.docker("network", "create", "--driver=myplugin", "other")
    host.docker("network", "rm", "other")
    assert plugin(host) != before
    is_reached(host)
    group = "/sys/fs/cgroup" + host.show("myplugin.service", "ControlGroup")
    # Besides the plugin and one relay: an nft or iptables that works for a moment.
    wait_until(lambda: len(host.run("cat", f"{group}/cgroup.procs").split()) == 2, PATIENCE)


def test_docker_that_was_stopped_is_not_started_by_what_the_plugin_asks_it(host: Host) -> None:
    host.run("systemctl", "stop", "docker.service")
    host.run("systemctl", "restart", "myplugin.service")  # at its start it wants to know what Docker has
    host.run("sleep", "3")
    assert host.show("docker.service", "ActiveState") == "inactive"
    host.run("systemctl", "start", "docker.service")
    is_reached(host)


def test_a_plugin_that_cannot_start_does_not_keep_docker_down(host: Host) -> None:
    program = host.folder / "opt/myplugin/bin/myplugin"
    whole = program.read_text()
    host.docker("run", "--detach", "--name=other", "--restart=always", "busybox", "sleep", "1000")
    program.write_text("#!/bin/sh\nexit 1\n")
    host.cut_power()
    try:
        host.boot()
        wait_until(lambda: "other" in host.docker("ps", "--format={{.Names}}"), PATIENCE)
    finally:
        program.write_text(whole)
    host.docker("rm", "--force", "other")
    host.run("systemctl", "reset-failed", "myplugin.service")
    host.run("systemctl", "restart", "myplugin.socket", "docker.service")
    is_reached(host)


def test_a_stopped_plugin_leaves_no_process(host: Host) -> None:
    host.run("systemctl", "stop", "myplugin.socket", "myplugin.service")
    assert host.show("myplugin.service", "Result") == "success"
    assert "myplugin" not in host.run("ls", "/run/docker/plugins"), "Docker would wait for an answer there"
    processes = host.run("sh", "-c", "cat /proc/[0-9]*/cmdline", check=False)
    assert "systemd" in processes
    assert "relay.py" not in processes
    assert "-m\0myplugin" not in processes
    host.run("systemctl", "start", "myplugin.service")
    is_reached(host)
