"""myplugin as a managed plugin, made by `netplugin bundle`: it loses no more than a service does.

docs/managed.md explains what the engine and the SDK guarantee, and the engine's bugs.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from netplugin_sdk.testing.engine import ENGINE_ADDRESS, EngineError, PrivateEngine, wait_until

from ..patience import PATIENCE
from .conftest import remove_all, state_of
from .crash_lab import KILL, LOST, MISSING, Box, Reached, Users, agree, cut_power, docker_knows, is_soon, shorter

pytestmark = pytest.mark.one_engine

PROJECT = Path(__file__).parents[2] / "examples/myplugin"
NETPLUGIN = Path(sys.executable).with_name("netplugin")
DRIVER = "myplugin:latest"
"""The engine registers a managed plugin under its name with the tag, and knows no other."""

NETWORKS = ("red", "six")
BOXES = (Box("web", "red", 8080, True), Box("peer", "red", always=True), Box("six", "six", 8081, True))
IMPATIENT = f"import netplugin_sdk; {shorter(f'missing_grace={MISSING}, engine_grace={MISSING / 2}')}\n"


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for ``docker plugin create``, with a plugin that is quicker to remove what Docker does not know."""
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip("needs root and debootstrap")
    folder = tmp_path_factory.mktemp("managed") / "myplugin"
    made = subprocess.run(
        [NETPLUGIN, "bundle", PROJECT, "--output", folder, "--ipam"], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    assert f"docker plugin create myplugin {folder}" in made.stdout
    site = next(folder.glob("rootfs/usr/local/lib/python3*/dist-packages"))
    (site / "impatient.pth").write_text(IMPATIENT)
    return folder


class Managed:
    """An engine with the plugin, two networks and three containers that are always to run."""

    def __init__(self, engine: PrivateEngine, bundled: Path) -> None:
        self.engine = engine
        subprocess.run(["cp", "--archive", bundled, engine.folder / "data/bundle"], check=True)
        self.create()
        self.docker("plugin", "enable", "myplugin")
        ipam = ("--ipam-driver", DRIVER, "--subnet", "10.77.0.0/24")
        self.docker("network", "create", "--driver", DRIVER, *ipam, "red")
        self.docker("network", "create", "--driver", DRIVER, "--ipv6", "--subnet", "fd00:77::/64", "six")
        for box in BOXES:
            box.run(engine)

    def docker(self, *arguments: str) -> str:
        return self.engine.docker(*arguments)

    def create(self) -> None:
        """``docker plugin create``."""
        self.docker("plugin", "create", "myplugin", "/var/lib/docker/bundle")
        self.id = self.docker("plugin", "inspect", "--format={{.Id}}", "myplugin")

    @property
    def state(self) -> Path:
        """The folder of ``propagatedMount`` on the host."""
        return self.engine.folder / "data/plugins" / self.id / "propagated-mount"

    @property
    def pid(self) -> int:
        """Of the process that listens at the plugin's socket."""
        with socket.socket(socket.AF_UNIX) as client:
            # Its path is too long for a socket's.
            with open_folder(self.engine.plugin_folder / self.id) as fd:
                client.connect(f"/proc/self/fd/{fd}/myplugin.sock")
            return int(struct.unpack("iII", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])

    def said(self, since: int = 0) -> list[str]:
        """The plugin's lines in the engine's log."""
        with self.engine.log.open() as log:
            log.seek(since)
            return [line for line in log if "plugin=" in line]

    @property
    def now(self) -> int:
        """For `said`."""
        return self.engine.log.stat().st_size

    def works(self, since: int | None = None) -> None:
        """All are reached, soon; Docker, the plugin and the kernel agree; and no call failed since then."""
        is_soon(lambda: set(self.docker("ps", "--format={{.Names}}").split()), {box.name for box in BOXES})
        Reached(self.engine, BOXES).soon()
        for family, port in ((ENGINE_ADDRESS, 8080), ("2001:db8:51::1", 8081)):
            said = self.engine.run_outside(
                ["timeout", "20", "bash", "-c", f"exec 3<>/dev/tcp/{family}/{port} && cat <&3"]
            )
            assert said.stdout == ("web" if port == 8080 else "six")
        agree(self.engine, 4 * MISSING, driver=DRIVER, state=self.state / "myplugin")
        if since is not None:
            assert [line for line in self.said(since) if "method=" in line and "status=200" not in line] == []

    def is_started_again(self, since: int) -> None:
        """The engine has started it again since then, and knows what it can.

        One that dies before that is away for up to 45 s: the engine asks on, and hears of its end afterwards.
        """
        wait_until(lambda: any("method=IpamDriver.GetCapabilities" in line for line in self.said(since)), PATIENCE)


@contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    fd = os.open(folder, os.O_PATH)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def managed_on(engine: PrivateEngine, bundled: Path) -> Iterator[Managed]:
    """At the end all is removed through Docker, and nothing is left."""
    before = state_of(engine)
    managed = Managed(engine, bundled)
    managed.works(0)
    yield managed
    remove_all(engine)
    engine.docker("plugin", "disable", "myplugin")
    engine.docker("plugin", "rm", "myplugin")
    is_soon(lambda: state_of(engine), before)
    assert list(engine.plugin_folder.iterdir()) == []
    assert not managed.state.exists()


@pytest.fixture(scope="module")
def managed(version: str, bundled: Path) -> Iterator[Managed]:
    """Each test leaves all running."""
    with PrivateEngine(version) as engine, managed_on(engine, bundled) as managed:
        yield managed


def test_it_may_do_little_and_that_is_enough(managed: Managed) -> None:
    """Docker gives each plugin 14 capabilities (moby, oci.DefaultSpec); ours adds NET_ADMIN alone."""
    status = Path(f"/proc/{managed.pid}/status").read_text()
    (effective,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff"))
    assert effective & 1 << 12, "NET_ADMIN"
    assert not effective & (1 << 21 | 1 << 16 | 1 << 19), "SYS_ADMIN, SYS_MODULE, SYS_PTRACE"
    assert effective.bit_count() == 15
    assert managed.engine.run(["cat", "/proc/sys/net/ipv6/conf/all/forwarding"]).stdout == "1\n", "by a sysctl of ours"


def test_disabled_and_enabled(managed: Managed) -> None:
    """The kernel goes on forwarding; a `docker run` meanwhile waits, for 15 s at most."""
    engine, reached, since = managed.engine, Reached(managed.engine, BOXES), managed.now
    refused = engine.run_docker("plugin", "disable", "myplugin")
    assert "in use" in refused.stderr
    managed.docker("plugin", "disable", "--force", "myplugin")
    assert not reached.missing(relay=False)
    with ThreadPoolExecutor(1) as user:
        run = user.submit(engine.docker, "run", "--rm", "--network=red", "busybox", "echo", "hello")
        time.sleep(1)
        managed.docker("plugin", "enable", "myplugin")
        assert run.result() == "hello"
    managed.works(since)


def test_killed_again_and_again(managed: Managed) -> None:
    """The engine starts it again at once."""
    known = docker_knows(managed.engine, DRIVER).networks
    reached = Reached(managed.engine, BOXES)
    with Users(managed.engine, NETWORKS) as users:
        for _ in range(3):
            time.sleep(1)
            since = managed.now
            os.kill(managed.pid, signal.SIGKILL)
            assert not reached.missing(relay=False), "what is in the kernel stays there"
            managed.is_started_again(since)
        done = users.done
        wait_until(lambda: users.done > done + 2, PATIENCE)
    assert [said for said in users.failed if LOST not in said] == []
    assert len(users.failed) <= 6, "each of the two has one request at a time"
    if left := managed.docker("ps", "--all", "--quiet", "--filter=name=user").split():
        managed.docker("rm", "--force", *left)
    assert docker_knows(managed.engine, DRIVER).networks == known
    managed.works()


def test_the_engine_is_restarted(managed: Managed) -> None:
    since, before = managed.now, managed.pid
    managed.engine.stop()
    assert not Path(f"/proc/{before}").exists()
    said = "".join(managed.said(since))
    assert said.rindex("method=NetworkDriver.Leave") < said.rindex("myplugin stopped"), "Docker needs it to the end"
    managed.engine.start()
    managed.works(since)


def test_the_engine_is_killed(managed: Managed) -> None:
    """The plugin goes on without it; the next engine ends it, and starts it before any network."""
    since, before = managed.now, managed.pid
    managed.engine.kill()
    assert Path(f"/proc/{before}").exists()
    managed.engine.start()
    assert not Path(f"/proc/{before}").exists()
    managed.works(since)


def test_the_power_is_cut(managed: Managed) -> None:
    since = managed.now
    cut_power(managed.engine)
    managed.engine.start()
    managed.works(since)
    assert any("2 of 2 networks are restored" in line for line in managed.said(since))


def test_a_plugin_that_cannot_start_does_not_keep_docker_down(managed: Managed) -> None:
    """The engine disables it, and it is to be enabled when it is repaired."""
    program = managed.engine.folder / "data/plugins" / managed.id / "rootfs/usr/local/bin/myplugin"
    whole = program.read_text()
    managed.docker("run", "--detach", "--name=other", "--restart=always", *KILL, "busybox", "sleep", "1000")
    program.write_text("#!/bin/sh\nexit 1\n")
    managed.engine.kill()
    with suppress(EngineError):  # the engine looks for it for 9.5 s, and `docker version` has 10
        managed.engine.start()
    assert managed.engine.run_docker("version", timeout=60).returncode == 0
    wait_until(lambda: "other" in managed.docker("ps", "--format={{.Names}}"), PATIENCE)
    assert managed.docker("plugin", "inspect", "--format={{.Enabled}}", "myplugin") == "false"
    managed.docker("rm", "--force", "other")
    program.write_text(whole)
    managed.docker("plugin", "enable", "myplugin")
    managed.docker("start", *(box.name for box in BOXES))
    managed.works()


def test_another_version_without_a_registry(managed: Managed) -> None:
    """Remove, create, and the old state in between; the engine's networks find the new one by its name."""
    since, kept, reached = managed.now, managed.engine.folder / "kept", Reached(managed.engine, BOXES)
    managed.docker("plugin", "disable", "--force", "myplugin")
    managed.state.rename(kept)
    managed.docker("plugin", "rm", "--force", "myplugin")
    managed.create()
    kept.rename(managed.state)
    assert not reached.missing(relay=False)
    managed.docker("plugin", "enable", "myplugin")
    assert not reached.missing()
    managed.docker("run", "--rm", "--network=red", "busybox", "true")
    managed.works(since)


def test_from_a_dockerfile(managed: Managed, bundled: Path, tmp_path: Path) -> None:
    """A registry cannot be reached, so the image that it starts from is imported."""
    engine = managed.engine
    without = "tar -C /var/lib/docker/bundle/rootfs -c --exclude='dist-packages/myplugin*' . | docker import - base"
    engine._in_engine(["sh", "-c", without], timeout=120)
    project = tmp_path / "project"
    shutil.copytree(PROJECT, project)
    (project / "managed").mkdir()
    (project / "managed/Dockerfile").write_text(
        "ARG BASE\nFROM $BASE\nCOPY wheels /wheels\n"
        "WORKDIR /usr/local/lib/python3.13/dist-packages\n"
        "RUN python3 -m zipfile -e /wheels/myplugin-*.whl .\n"
    )
    client = tmp_path / "bin/docker"
    client.parent.mkdir()
    client.write_text(f'#!/bin/sh\nexec {" ".join(engine._engine_prefix())} docker "$@"\n')
    client.chmod(0o755)
    output = engine.folder / "data/built"
    made = subprocess.run(
        [NETPLUGIN, "bundle", project, "--output", output, "--name=other", "--build-arg=BASE=base"],
        env={**os.environ, "PATH": f"{client.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert "image of managed/Dockerfile" in made.stderr
    managed.docker("plugin", "create", "other", "/var/lib/docker/built")
    managed.docker("plugin", "enable", "other")
    managed.docker("network", "create", "--driver=other:latest", "built")
    assert "1 packets received" in managed.docker(
        "run", "--rm", "--network=built", "busybox", "ping", "-c1", ENGINE_ADDRESS
    )
    managed.docker("network", "rm", "built")
    managed.docker("plugin", "disable", "other")
    managed.docker("plugin", "rm", "other")
    assert managed.docker("ps", "--all", "--quiet", "--filter=ancestor=base") == "", "nothing is left of the build"


def test_live_restore(managed: Managed) -> None:
    """The plugin goes on without the engine, as containers do; one that is killed meanwhile is started with it."""
    engine = managed.engine
    engine.stop()
    engine._arguments = ["--live-restore"]
    engine.start()
    managed.works()
    reached = Reached(engine, BOXES)
    for plugin_too in (False, True):
        since, before = managed.now, managed.pid
        engine.kill()
        if plugin_too:
            os.kill(before, signal.SIGKILL)
        assert not reached.missing(relay=not plugin_too)
        engine.start()
        assert (managed.pid == before) is not plugin_too
        assert not reached.missing()
        assert Reached(engine, BOXES).pids == reached.pids
        managed.docker("run", "--rm", "--network=red", "busybox", "true")
        managed.works(since)
