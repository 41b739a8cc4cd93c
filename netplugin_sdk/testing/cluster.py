"""Several hosts with a Docker Engine each, on one link: a swarm on one machine.

    with Cluster(3) as cluster:
        cluster.install_plugin("overlay-example", folder)
        cluster.start_swarm()
        manager, *workers = cluster.hosts
        manager.engine.docker("network", "create", "--driver", "overlay-example:latest", "--scope", "swarm", "mynet")

Each host is a `PrivateEngine` with a name and addresses of its own on the common link:

    node-1  eth1 ═ port-1 ┐
    node-2  eth1 ═ port-2 ┼ bridge, in a further network namespace
    node-3  eth1 ═ port-3 ┘
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from netplugin_sdk.testing.engine import EngineError, PrivateEngine, wait_until

S = TypeVar("S")
T = TypeVar("T")

_SWITCH = "switch"  # the namespace's name on the first host, with which it ends
_READY = 60.0


@dataclass(frozen=True)
class Host:
    """One host of a cluster."""

    number: int
    """From 1."""
    engine: PrivateEngine
    switch: Path
    """The network namespace with the common link's bridge."""

    @property
    def name(self) -> str:
        """As ``docker node ls`` shows it."""
        return self.engine.hostname

    @property
    def address(self) -> str:
        """Its IPv4 address (RFC 5737) on the common link."""
        return f"192.0.2.{self.number}"

    @property
    def address_ipv6(self) -> str:
        """Its IPv6 address (RFC 3849) there."""
        return f"2001:db8:2::{self.number}"

    def connect(self) -> None:
        """Join it to the common link."""
        port = f"port-{self.number}"
        inside = self.engine.network_namespace
        _ip(inside, "link", "add", "name", "eth1", "type", "veth", "peer", "name", port, "netns", str(self.switch))
        _ip(self.switch, "link", "set", port, "master", "bridge", "up")
        _ip(inside, "address", "add", f"{self.address}/24", "dev", "eth1")
        _ip(inside, "address", "add", f"{self.address_ipv6}/64", "dev", "eth1", "nodad")
        _ip(inside, "link", "set", "eth1", "up")
        # There is no registry and no resolver. An engine asks them for the image of each task of a service, and is to
        # hear at once that it cannot: without an answer it waits for 20 s, and then takes the image that it has.
        for version in ("-4", "-6"):
            _ip(inside, version, "route", "delete", "default")

    def cut(self) -> None:
        """Take it off the common link, as if the cable were cut."""
        _ip(self.switch, "link", "set", f"port-{self.number}", "down")

    def heal(self) -> None:
        """Undo `cut`."""
        _ip(self.switch, "link", "set", f"port-{self.number}", "up")


class Cluster:
    """Hosts on a common link; a context manager.

    Args:
        size: how many hosts.
        version: of their engines, one of `netplugin_sdk.testing.engine.VERSIONS`.

    Raises:
        EngineUnavailable: they cannot be had here.
        EngineError: an engine did not start.
    """

    def __init__(self, size: int = 3, version: str = "26.1") -> None:
        self._version = version
        self._closing = ExitStack()
        # Until the end: processes of a thread may be told to die with it (prctl(2), PR_SET_PDEATHSIG).
        self._pool = self._closing.enter_context(ThreadPoolExecutor(size))
        try:
            engines = self._each(self._start, range(1, size + 1))
            switch = _make_switch(engines[0])
            self.hosts: Sequence[Host] = tuple(Host(n, engine, switch) for n, engine in enumerate(engines, start=1))
            """The first is the manager of the swarm."""
            for host in self.hosts:
                host.connect()
        except BaseException:
            self.close()
            raise

    def _start(self, number: int) -> PrivateEngine:
        engine = PrivateEngine(self._version, hostname=f"node-{number}")
        self._closing.callback(engine.close)
        return engine

    def _each(self, function: Callable[[S], T], of: Iterable[S]) -> list[T]:
        """Side by side. All are done before the first error is raised."""
        running = [self._pool.submit(function, each) for each in of]
        wait(running)
        return [each.result() for each in running]

    def start_swarm(self) -> None:
        """Make the first host the manager, and all others workers, and wait until they are ready.

        The data path is on the common link. Raises `EngineError` if they are not ready within a minute.
        """
        manager, *workers = self.hosts
        manager.engine.docker("swarm", "init", "--advertise-addr", manager.address)
        token = manager.engine.docker("swarm", "join-token", "--quiet", "worker")

        def join(host: Host) -> None:
            host.engine.docker(
                "swarm", "join", "--advertise-addr", host.address, "--token", token, f"{manager.address}:2377"
            )

        self._each(join, workers)
        try:
            wait_until(lambda: set(self.nodes().values()) == {"Ready"} and len(self.nodes()) == len(self.hosts), _READY)
        except TimeoutError:
            raise EngineError(f"the swarm's nodes are not ready: {self.nodes()}") from None

    def nodes(self) -> dict[str, str]:
        """The status of each node that the manager knows, by the name of its host: ``Ready``, ``Down`` …"""
        listed = self.hosts[0].engine.docker("node", "ls", "--format", "{{.Hostname}} {{.Status}}")
        # A node that has only just joined has no name yet.
        return {name: status for name, _, status in (line.rpartition(" ") for line in listed.splitlines())}

    def install_plugin(self, name: str, folder: Path) -> None:
        """``docker plugin create`` and ``enable`` on each host, of a folder that `netplugin bundle` made.

        Raises `EngineError` if it is no such folder, or Docker refuses it.
        """
        if not (folder / "config.json").is_file():
            raise EngineError(f"{folder} has no config.json: it is no folder of `netplugin bundle`")

        def install(host: Host) -> None:
            copy = host.engine.folder / "data" / name
            subprocess.run(["cp", "--archive", folder, copy], check=True)
            host.engine.docker("plugin", "create", name, f"/var/lib/docker/{name}")
            shutil.rmtree(copy)
            host.engine.docker("plugin", "enable", name)

        self._each(install, self.hosts)

    def close(self) -> None:
        """End all of it and remove its traces. May be called again."""
        self._closing.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _make_switch(engine: PrivateEngine) -> Path:
    for command in (
        ("netns", "add", _SWITCH),
        ("-n", _SWITCH, "link", "add", "name", "bridge", "up", "type", "bridge"),
    ):
        done = engine.run(["ip", *command])
        if done.returncode != 0:
            raise EngineError(f"ip {' '.join(command)}: {done.stderr.strip()}")
    return engine.run_folder / "netns" / _SWITCH


def _ip(namespace: Path, *arguments: str) -> None:
    command = ["nsenter", f"--net={namespace}", "ip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EngineError(f"{' '.join(command)}: {done.stderr.strip()}")
