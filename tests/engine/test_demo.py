"""`make demo` and `make demo-swarm`: their steps work, and they leave the host unchanged, however they end.

The host is in namespaces, so that parallel tests do not interfere (`lived_on`).
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from netplugin_sdk.testing import debian
from netplugin_sdk.testing.engine import PrivateEngine, wait_until

from .conftest import remove_all, state_of
from .lived_on import REPOSITORY, LivedOnHost

DEMO = str(REPOSITORY / "examples" / "demo.py")
SWARM = str(REPOSITORY / "examples" / "demo_swarm.py")


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


def test_on_a_private_engine(lived_on: LivedOnHost, version: str) -> None:
    with lived_on.unchanged():
        done = lived_on.try_to_run(sys.executable, DEMO, "--engine", version, timeout=300)
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
def test_ctrl_c_ends_it_clean(lived_on: LivedOnHost, until: str) -> None:
    with (
        lived_on.unchanged(),
        # A shell's background processes ignore Ctrl-C, and the tests may be one of them.
        lived_on.spawn("demo", "env", "--default-signal=INT", sys.executable, DEMO) as demo,
    ):
        wait_until(lambda: not demo.running or until in demo.log.read_text(), 300)
        assert demo.running, demo.log.read_text()
        time.sleep(0.5)  # into the midst of it
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does: everyone in the session gets it
        wait_until(lambda: not demo.running, 60)
    errors = demo.log.read_text()
    demo.log.unlink()
    assert demo.stop() == 128 + signal.SIGINT, errors
    assert "Interrupted" in errors
    assert "Traceback" not in errors


def test_on_the_hosts_own_docker(engine: PrivateEngine, tmp_path: Path) -> None:
    """The engine's host plays the user's machine; its `docker` is the engine's own."""
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\nexec nsenter --target="$(cat /run/engine.pid)" --mount docker "$@"\n')
    docker.chmod(0o755)
    before = state_of(engine)
    command = ["env", f"PATH={tmp_path}:{os.environ['PATH']}", sys.executable, DEMO, "--engine", "host"]
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


def test_without_docker(lived_on: LivedOnHost) -> None:
    with lived_on.unchanged():
        done = lived_on.try_to_run(sys.executable, DEMO, "--engine", "none", timeout=300)
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


def test_without_a_docker_of_ones_own(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, DEMO, "--engine", "host"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "The demo stopped: there is no `docker` command here" in done.stderr


@pytest.fixture
def wheels() -> Iterator[Path]:
    """The packages that `netplugin bundle` gets from PyPI, since that host cannot reach it."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    python = "--python-version=3.13", "--implementation=cp", "--abi=cp313", "--abi=abi3", "--abi=none"  # trixie's
    built = "--only-binary=:all:", f"--platform=manylinux2014_{platform.machine()}"
    needed = (*project["project"]["dependencies"], *project["build-system"]["requires"])
    with tempfile.TemporaryDirectory(prefix="wheels-", dir=debian.cache()) as folder:
        command = (sys.executable, "-m", "pip", "--quiet", "download", "--dest", folder, *python, *built, *needed)
        subprocess.run(command, check=True)
        yield Path(folder)


@pytest.mark.release
def test_on_a_swarm(lived_on: LivedOnHost, wheels: Path) -> None:
    """Each step is compared with what it is to show by the demo itself."""
    pip = ("env", "PIP_NO_INDEX=1", f"PIP_FIND_LINKS={wheels}")
    with lived_on.unchanged():
        done = lived_on.try_to_run(*pip, sys.executable, SWARM, timeout=900)
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


def test_a_swarms_step_that_fails(lived_on: LivedOnHost) -> None:
    """The first one, here: there is no debootstrap. The one that is asked before is: this engine can be had."""
    found = [shutil.which(program) for program in ("unshare", "nsenter", "ip")]
    with lived_on.unchanged():
        lived_on.run("bash", "-c", 'mkdir /tmp/some; ln -s "$@" /tmp/some', "link", *filter(None, found))
        done = lived_on.try_to_run("env", "PATH=/tmp/some", sys.executable, SWARM)
        lived_on.run("rm", "-r", "/tmp/some")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("The demo stopped: `netplugin bundle")
    assert "apt-get install debootstrap" in line
