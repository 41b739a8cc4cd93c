"""`make demo`, `make demo-swarm`: their steps work, and they leave this machine as it was, however they end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from netplugin_sdk.testing.engine import PrivateEngine

from .conftest import remove_all, state_of

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
SWARM = DEMO.with_name("demo_swarm.py")
LABS = Path(os.environ.get("NETPLUGIN_CACHE", "/var/cache/netplugin-sdk")) / "labs"


def host() -> dict[str, str]:
    """What the demo must not change."""

    def run(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def names(folder: str) -> str:
        return " ".join(sorted(path.name for path in Path(folder).glob("*")))

    rules = "".join(run(f"{command}-save") for command in ("iptables", "ip6tables"))
    return {
        "links": run("ip", "-brief", "link"),
        "routes": run("ip", "route"),
        "rules": "\n".join(line.split(" [")[0] for line in rules.splitlines() if not line.startswith("#")),
        "forwarding": Path("/proc/sys/net/ipv4/ip_forward").read_text(),
        "mounts": run("findmnt", "--list", "--noheadings", "--output", "TARGET"),
        "namespaces": names("/run/netns"),
        "sockets": names("/run/docker/plugins"),
        "state": names("/var/lib/netplugin"),
        "labs": names(str(LABS)),
        "processes": run("sh", "-c", "ps -eo comm | grep -cE '^(dockerd|containerd)' || true"),
    }


@contextlib.contextmanager
def unchanged_host() -> Iterator[None]:
    before = host()
    yield
    assert host() == before


def in_order(text: str, *parts: str) -> None:
    """Each part stands in the text behind the one before."""
    place = 0
    for part in parts:
        found = text.find(part, place)
        assert found >= 0, f"{part!r} is missing behind character {place} of:\n{text}"
        place = found + len(part)


STEPS = (
    "$ ls -l /run/docker/plugins",
    "srw------- 1 root root",
    "myplugin.sock",
    "$ docker network create --driver myplugin {}mynet",
    "$ docker network ls",
    "{}mynet",
    "myplugin   local",
    "$ docker run --detach --name {}web --network {}mynet --publish ",
    "$ docker run --detach --name {}client --network {}mynet busybox",
    "$ docker network inspect {}mynet",
    '"Driver": "myplugin"',
    "$ docker exec {}client ping -c 3 {}web",
    "3 packets transmitted, 3 packets received, 0% packet loss",
    "$ wget -qO- http://",
    "hello from web",
)


def test_on_a_private_engine(version: str) -> None:
    with unchanged_host():
        done = subprocess.run(
            [sys.executable, DEMO, "--engine", version], capture_output=True, text=True, timeout=300, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    in_order(
        done.stdout,
        *(step.replace("{}", "") for step in STEPS),
        "I see you as 198.51.100.1",
        "$ docker rm --force web client",
        "$ docker network rm mynet",
        "$ ip -brief link",
        "docker0",
        "method=NetworkDriver.CreateNetwork network=",
        "myplugin stopped",
        "Done.",
    )
    assert "br-" not in done.stdout.partition("$ ip -brief link")[2].partition("# What the plugin logged")[0]


@pytest.mark.parametrize(
    "until", ["Starting a private Docker Engine", "docker run --detach", "docker exec client ping"]
)
def test_ctrl_c_ends_it_clean(until: str) -> None:
    with (
        unchanged_host(),
        subprocess.Popen(
            # What a shell starts in the background ignores Ctrl-C, and the tests may have been started so.
            ["env", "--default-signal=INT", sys.executable, DEMO],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as demo,
    ):
        assert demo.stdout is not None
        assert demo.stderr is not None
        for line in demo.stdout:
            if until in line:
                break
        else:
            pytest.fail(f"{until!r} was never printed: {demo.stderr.read()}")
        time.sleep(0.5)  # into the midst of it
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does: everyone in the session gets it
        _, errors = demo.communicate(timeout=60)
        assert demo.returncode == 128 + signal.SIGINT, errors
        assert "Interrupted" in errors
        assert "Traceback" not in errors


def test_on_the_hosts_own_docker(engine: PrivateEngine, tmp_path: Path) -> None:
    """The engine's host plays the user's machine; its `docker` is the engine's own."""
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\nexec nsenter --target="$(cat /run/engine.pid)" --mount docker "$@"\n')
    docker.chmod(0o755)
    before = state_of(engine)
    command = ["env", f"PATH={tmp_path}:{os.environ['PATH']}", sys.executable, str(DEMO), "--engine", "host"]
    done = engine.run(command, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    prefix = "netplugin-demo-"
    in_order(
        done.stdout,
        *(step.replace("{}", prefix) for step in STEPS),
        "2 packets transmitted, 2 packets received, 0% packet loss",
        f"$ docker network rm {prefix}mynet",
        "method=NetworkDriver.DeleteNetwork",
        "Done.",
    )
    assert state_of(engine) == before

    # A step that fails: the demo says which, and still cleans up.
    engine.docker("network", "create", f"{prefix}mynet")
    try:
        done = engine.run(command, timeout=120)
        assert done.returncode == 1
        in_order(done.stderr, f"`docker network create --driver myplugin {prefix}mynet` failed", "already exists")
    finally:
        remove_all(engine)
    assert state_of(engine) == before


def test_without_docker() -> None:
    began = time.monotonic()
    with unchanged_host():
        command = [sys.executable, str(DEMO), "--engine", "none"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    in_order(
        done.stdout,
        "/run/docker/plugins/myplugin.sock",
        "10.1.0.1/24",
        "web.connect(lan)",
        "10.1.0.2/24",
        "2 packets transmitted, 2 received",
        "com.docker.network.portmap",
        "# Clean up:",
        "method=NetworkDriver.CreateNetwork network=",
        "myplugin stopped",
        "Done.",
    )
    assert time.monotonic() - began < 30


def test_without_a_docker_of_ones_own(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, DEMO, "--engine", "host"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "The demo stopped: there is no `docker` command here" in done.stderr


def test_on_a_swarm() -> None:
    """Each step is held against what it is to show by the demo itself."""
    with unchanged_host():
        done = subprocess.run([sys.executable, SWARM], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    asked = ("nslookup web", "version 2 of replica-")
    in_order(
        done.stdout,
        "$ netplugin bundle ",
        "node-1$ docker network create --driver overlay-example:latest --scope swarm --attachable mynet",
        "node-1$ docker service create",
        "00:00:00:00:00:00 dev vx-",
        *("nslookup web", "version 1 of replica-", "3 packets received"),
        *("node-3$ docker run", "3 packets received"),
        *("node-1$ docker service update", *asked),
        *("docker service scale --detach web=9", *asked),
        *("docker service scale --detach web=3", *asked),
        *("docker network rm mynet", "node-3$ ip -brief link", "docker_gwbridge", "Done."),
    )
    assert "vx-" not in done.stdout.partition("# Nothing is left")[2]


def test_a_swarms_step_that_fails(tmp_path: Path) -> None:
    """The first one, here: there is no debootstrap. The one that is asked before is: this engine can be had."""
    environment = {**os.environ, "PATH": f"{tmp_path}"}
    for program in ("unshare", "nsenter", "ip"):
        found = shutil.which(program)
        assert found is not None
        (tmp_path / program).symlink_to(found)
    with unchanged_host():
        done = subprocess.run([sys.executable, SWARM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("The demo stopped: `netplugin bundle")
    assert "apt-get install debootstrap" in line
