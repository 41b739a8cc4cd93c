"""Shared by the tests of crashes and losses: containers that send their names, and users that do not wait."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from netplugin_sdk.testing.engine import ENGINE_ADDRESS, OUTSIDE_ADDRESS, EngineError, PrivateEngine, wait_until

from ..patience import PATIENCE
from .conftest import state_of

NETWORKS = ("red", "green", "blue")
KILL = ("--stop-signal", "KILL")
"""Options of ``docker run``: a dockerd that starts gives leftover containers 10 s, and a shell ignores SIGTERM."""

MISSING = 2.0
"""Seconds that Docker must not know something before `IMPATIENT` removes it."""


def impatient(missing: float) -> tuple[str, ...]:
    """The program that serves myplugin's driver, and removes what Docker does not know for so many seconds."""
    timings = f"missing_grace={missing}, engine_grace={missing / 2}, compare_every={missing / 2}"
    return (sys.executable, "-c", f"{shorter(timings)}; from myplugin.__main__ import main; main()")


def shorter(timings: str) -> str:
    """A line of Python after which plugins in this process wait so long, in place of the defaults."""
    imports = "from functools import partial; from netplugin_sdk.core import plugin"
    return f"{imports}; plugin.Timings = partial(plugin.Timings, {timings})"


IMPATIENT = impatient(MISSING)

LOST = "the request body is empty"
"""The plugin was killed with a request that it had read. The engine's retry comes without its content
(docs/protocol.md, Transport): no plugin could know what it was."""

# Each line: the asking namespace, the expected answer, and the question; unanswered questions are printed.
_ASK = """
ask() {
    where=$1 wanted=$2
    shift 2
    [ "$(nsenter --net="$where" timeout 2 bash -c "$*" 2>&1)" = "$wanted" ] || echo "$where: $*"
}
connect() { exec 3<>/dev/tcp/$1/$2 && cat <&3; }
export -f connect
"""


# ------------------------------------------------------------------------------------------------------- containers


@dataclass(frozen=True)
class Box:
    """A container that answers each connection to its port 80 with its name."""

    name: str
    network: str
    port: int = 0
    """Where it is published, if it is."""
    always: bool = False
    """Whether it is always restarted."""

    def run(self, engine: PrivateEngine) -> None:
        """``docker run`` it."""
        options = ["--name", self.name, "--network", self.network, *KILL]
        options += ["-p", f"{self.port}:80"] if self.port else []
        options += ["--restart", "always"] if self.always else []
        engine.docker("run", "--detach", *options, "busybox", "nc", "-ll", "-p", "80", "-e", "printf", self.name)


TEN = tuple(
    Box(f"box{number}", NETWORKS[number % 3], 8080 + number if number < 5 else 0, number % 2 == 0)
    for number in range(10)
)


def make(engine: PrivateEngine, boxes: Sequence[Box] = TEN) -> None:
    """Run them, and make their networks."""
    for network in {box.network: None for box in boxes}:
        engine.docker("network", "create", "--driver", "myplugin", network)
    with ThreadPoolExecutor(4) as users:
        list(users.map(lambda box: box.run(engine), boxes))


class Reached:
    """Facts that were looked up once, so that they can be checked repeatedly without an engine."""

    def __init__(self, engine: PrivateEngine, boxes: Sequence[Box] = TEN) -> None:
        self._engine = engine
        self.pids: dict[str, int] = {}
        """As the engine sees them."""
        addresses = {}
        for found in json.loads(engine.docker("inspect", *(box.name for box in boxes))):
            name, (seen,) = found["Name"][1:], found["NetworkSettings"]["Networks"].values()
            self.pids[name], addresses[name] = found["State"]["Pid"], seen["IPAddress"]
        questions, relayed = [], []
        for box in boxes:
            inside = f"/proc/{self.pids[box.name]}/ns/net"
            questions.append((inside, "0", f"ping -c1 -W1 {OUTSIDE_ADDRESS} >/dev/null; echo $?"))
            for other in boxes:
                if other is not box and other.network == box.network:
                    questions.append((inside, "0", f"ping -c1 -W1 {addresses[other.name]} >/dev/null; echo $?"))
                    questions.append((inside, other.name, f"connect {addresses[other.name]} 80"))
            if box.port:
                questions.append(("/run/netns/outside", box.name, f"connect {ENGINE_ADDRESS} {box.port}"))
                relayed.append(("/proc/self/ns/net", box.name, f"connect 127.0.0.1 {box.port}"))
        self._kernel, self._relay = (
            "".join(f"ask {shlex.join(question)} &\n" for question in each) for each in (questions, relayed)
        )

    def missing(self, *, relay: bool = True) -> str:
        """The questions without an answer. With `relay` false, it leaves out those that the plugin's relay carries."""
        script = _ASK + self._kernel + (self._relay if relay else "") + "wait\n"
        done = self._engine.run(["bash", "-c", script])
        assert done.returncode == 0, done.stderr
        return done.stdout

    def soon(self, seconds: float = PATIENCE) -> None:
        """Raises AssertionError unless all are reached in time."""
        said = ""

        def all_reached() -> bool:
            nonlocal said
            said = self.missing()
            return not said

        try:
            wait_until(all_reached, seconds)
        except TimeoutError:
            raise AssertionError(f"not reached:\n{said}") from None


def running(engine: PrivateEngine) -> set[str]:
    """Their names."""
    return set(engine.docker("ps", "--format", "{{.Names}}").split())


# ------------------------------------------------------------------------------------------------------------ state


@dataclass(frozen=True)
class Known:
    """The plugin's state on disk: the networks, and the endpoints with their intents."""

    networks: frozenset[str] = frozenset()
    endpoints: frozenset[tuple[str, str | None]] = frozenset()

    @classmethod
    def of(cls, engine: PrivateEngine, plugin: str = "myplugin") -> Known:
        """Read from a copy, since the plugin writes; as docs/architecture.md says."""
        return cls.read(engine.run_folder.parent / "var/lib/netplugin" / plugin)

    @classmethod
    def read(cls, folder: Path) -> Known:
        """The same, of a plugin that keeps its state there."""
        if not folder.exists():
            return cls()
        with tempfile.TemporaryDirectory() as copy:
            for file in folder.glob("state.db*"):
                if not file.name.endswith("-shm"):
                    shutil.copy(file, copy)
            with contextlib.closing(sqlite3.connect(f"{copy}/state.db")) as file_:
                networks = file_.execute("SELECT id FROM networks").fetchall()
                endpoints = file_.execute("SELECT id, intent FROM endpoints").fetchall()
        return cls(frozenset(id_ for (id_,) in networks), frozenset(endpoints))


def docker_knows(engine: PrivateEngine, driver: str = "myplugin") -> Known:
    """The same, as Docker has it."""
    with engine.api() as docker:
        networks = [id_ for id_, network in docker.networks().items() if network["Driver"] == driver]
        endpoints = [endpoint for network in networks for endpoint in docker.endpoints(network)]
    return Known(frozenset(networks), frozenset((endpoint, None) for endpoint in endpoints))


def veths(engine: PrivateEngine) -> set[str]:
    """The outer ends, by 12 characters of their endpoints."""
    lines = engine.run(["ip", "-brief", "link", "show", "type", "veth"]).stdout.splitlines()
    return {line.split("@")[0][3:] for line in lines if line.startswith("ve-")}


def bridges(engine: PrivateEngine) -> dict[str, list[str]]:
    """With their addresses, but for those that the kernel gives."""
    shown = engine.run(["ip", "-brief", "address", "show", "type", "bridge"]).stdout.splitlines()
    return {
        name: [address for address in addresses if not address.startswith("fe80:")]
        for name, _, *addresses in map(str.split, shown)
        if name.startswith("br-")
    }


def agree(
    engine: PrivateEngine, seconds: float = PATIENCE, *, driver: str = "myplugin", state: Path | None = None
) -> None:
    """Docker, the plugin's file and the kernel have the same networks and endpoints, soon."""
    seen: tuple[object, ...] = ()

    def same() -> bool:
        nonlocal seen
        plugin = Known.of(engine, driver) if state is None else Known.read(state)
        docker, kernel = docker_knows(engine, driver), veths(engine)
        seen = docker, plugin, kernel
        return docker == plugin and kernel == {endpoint[:12] for endpoint, _ in docker.endpoints}

    try:
        wait_until(same, seconds, every=0.1)
    except TimeoutError:
        docker, plugin, kernel = seen
        raise AssertionError(f"Docker: {docker}\nplugin: {plugin}\nkernel: {kernel}") from None


def cut_power(engine: PrivateEngine) -> None:
    """All processes end, and the kernel's state is gone: namespaces, /run. What is on disk stays."""
    assert engine._first is not None
    os.kill(engine._first_pid, signal.SIGKILL)
    engine._first.wait(30)
    engine._daemon.wait(30)
    engine._start_namespaces()


def everything(engine: PrivateEngine) -> str:
    """Interfaces, rules, sockets that listen, and the plugin's state."""
    listening = engine.run(["ss", "-Hltun"]).stdout
    ports = sorted({line.split()[4] for line in listening.splitlines()})
    return "\n".join((state_of(engine), *ports, str(Known.of(engine))))


def is_soon(look: Callable[[], object], wanted: object, seconds: float = PATIENCE) -> None:
    """Raises AssertionError, with both, unless it is so in time."""
    seen = None

    def same() -> bool:
        nonlocal seen
        seen = look()
        return seen == wanted

    with contextlib.suppress(TimeoutError):
        wait_until(same, seconds, every=0.1)
    assert seen == wanted


# ------------------------------------------------------------------------------------------------------------ users


class Users:
    """Two of them run and remove containers on these networks, until the end of the context."""

    def __init__(self, engine: PrivateEngine, networks: Sequence[str] = NETWORKS) -> None:
        self._engine = engine
        self._networks = networks
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._use, args=(number,)) for number in (1, 2)]
        self.done = 0
        """Commands that did what they were told."""
        self.failed: list[str] = []
        """The output of the others."""

    def _use(self, number: int) -> None:
        name = f"user{number}"
        for turn in range(1_000_000):
            if self._ending.is_set():
                return
            network = ("--network", self._networks[turn % len(self._networks)])
            if turn % 2:
                self._docker("run", "--rm", *network, "busybox", "true")
            else:
                self._docker("run", "--detach", "--name", name, *network, *KILL, "busybox", "sleep", "600")
                self._docker("rm", "--force", name)

    def _docker(self, *arguments: str) -> None:
        try:
            done = self._engine.run_docker(*arguments, timeout=60)
        except EngineError as error:
            self.failed.append(str(error))
            return
        if done.returncode:
            self.failed.append(f"docker {shlex.join(arguments)}: {done.stderr.strip()}")
        else:
            self.done += 1

    def __enter__(self) -> Users:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()
