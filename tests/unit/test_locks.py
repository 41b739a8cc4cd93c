"""Whatever has to do with a network or a pool holds its lock: to look, to ask the driver, and to write.

Nobody waits here: who would have to is refused at once. So no threads are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from netplugin_sdk import Container, Endpoint, Network, Plugin, Scope, Timings
from netplugin_sdk.core import networks, pools
from netplugin_sdk.core.store import Store
from netplugin_sdk.core.workers import Locks
from netplugin_sdk.database import Database
from netplugin_sdk.ipam import PoolIpamDriver
from netplugin_sdk.ipam.number_pool import NumberPool

from .lab import (
    ENDPOINT,
    NETWORK,
    Docker,
    Everything,
    ListingEngine,
    Options,
    create_endpoint,
    create_network,
    joining,
    of,
    publishing,
)

POOL = "LocalDefault/10.1.0.0/24"
WHICH_POOLS = ""  # there are: a lock of its own
NODE = {"DiscoveryType": 1, "DiscoveryData": {"Address": "192.0.2.7", "BindAddress": "192.0.2.7", "Self": False}}

LIFE: dict[str, tuple[dict[str, Any], set[str]]] = {
    "NetworkDriver.AllocateNetwork": (of(), {NETWORK}),
    "NetworkDriver.CreateNetwork": (create_network(), {NETWORK}),
    "NetworkDriver.CreateEndpoint": (create_endpoint(), {NETWORK}),
    "NetworkDriver.EndpointOperInfo": (of(endpoint=ENDPOINT), {NETWORK}),
    "NetworkDriver.Join": (joining(), {NETWORK}),
    "NetworkDriver.ProgramExternalConnectivity": (publishing(), {NETWORK}),
    "NetworkDriver.RevokeExternalConnectivity": (of(endpoint=ENDPOINT), {NETWORK}),
    "NetworkDriver.Leave": (of(endpoint=ENDPOINT), {NETWORK}),
    "NetworkDriver.DeleteEndpoint": (of(endpoint=ENDPOINT), {NETWORK}),
    "NetworkDriver.DeleteNetwork": (of(), {NETWORK}),
    "NetworkDriver.FreeNetwork": (of(), {NETWORK}),
    "IpamDriver.RequestPool": ({"AddressSpace": "LocalDefault", "Pool": "10.1.0.0/24"}, {WHICH_POOLS}),
    "IpamDriver.RequestAddress": ({"PoolID": POOL, "Address": "10.1.0.9", "Options": {}}, {POOL}),
    "IpamDriver.ReleaseAddress": ({"PoolID": POOL, "Address": "10.1.0.9"}, {POOL}),
    "IpamDriver.ReleasePool": ({"PoolID": POOL}, {POOL, WHICH_POOLS}),
}
"""Calls in an order in which each has something to do; and the locks that each holds."""

NO_LOCK = {
    "Plugin.Activate",  # locks each network that it looks after, as do the next two
    "NetworkDriver.DiscoverNew",
    "NetworkDriver.DiscoverDelete",
    "NetworkDriver.GetCapabilities",
    "NetworkDriver.GwAllocCheck",  # there is no network yet
    "IpamDriver.GetCapabilities",
    "IpamDriver.GetDefaultAddressSpaces",
}


@dataclass
class Data:
    number: int


class Lab:
    """The locks of all, and what was done while which of them were held."""

    def __init__(self) -> None:
        self.locks = Locks(0.0)
        self.done: list[tuple[str, set[str]]] = []

    def note(self, what: str) -> None:
        self.done.append((what, set(self.locks._locks)))

    def told(self) -> list[tuple[str, set[str]]]:
        """What the driver was asked for."""
        return [(what, held) for what, held in self.done if what.islower()]  # a statement has capitals

    def start(self, folder: Path | None = None, timings: Timings | None = None) -> Docker:
        return Docker(Plugin(Noting(self), PoolIpamDriver(local=()), state=folder, timings=timings))

    def keeps_away(self, docker: Docker, method: str) -> bool:
        """Whether nothing happens while somebody else holds one of the method's locks."""
        request, keys = LIFE[method]
        self.done.clear()
        answers = []
        for key in keys:
            with self.locks.hold(key):
                answers.append(docker.ask(method, request)[0])
        return set(answers) == {503} and not self.done


class Noting(Everything):
    scope = Scope.GLOBAL
    cluster_numbers = {"vni": range(100, 200)}  # noqa: RUF012

    def __init__(self, lab: Lab) -> None:
        super().__init__()
        self._note = lab.note

    def called(self, method: str, of: object = None) -> None:
        self._note(method.split(maxsplit=1)[0])

    def restore_endpoint(self, network: Network[Options], endpoint: Endpoint) -> None:
        self._note("restore_endpoint")

    def container_attached(self, network: Network[Options], endpoint: Endpoint, container: Container) -> None:
        self._note("container_attached")

    def endpoint_is_gone(self, network: Network[Options], endpoint: Endpoint) -> bool:
        self._note("endpoint_is_gone")
        return False


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    lab = Lab()
    hold, write = Locks.hold, Database.write

    def noted(self: Database, statement: str, *values: Any, **options: Any) -> int | None:
        lab.note(statement)
        return write(self, statement, *values, **options)

    def hold_at_once(self: Locks, key: str, wait: float | None = None) -> Any:
        return hold(self, key, 0.0)

    monkeypatch.setattr(Locks, "hold", hold_at_once)
    for module in (networks, pools):
        monkeypatch.setattr(module, "Locks", lambda _: lab.locks)
    monkeypatch.setattr(Database, "write", noted)
    return lab


def test_every_method_is_here(lab: Lab) -> None:
    assert lab.start().plugin.methods == LIFE.keys() | NO_LOCK


@pytest.mark.parametrize("method", LIFE)
def test_a_method_that_finds_nothing_has_looked_with_the_lock(lab: Lab, method: str) -> None:
    assert lab.keeps_away(lab.start(), method)


def test_all_that_a_method_does_is_done_with_the_lock(lab: Lab) -> None:
    docker = lab.start()
    for method, (request, keys) in LIFE.items():
        assert lab.keeps_away(docker, method), method
        docker(method, request)
        assert lab.done, method
        assert [what for what, held in lab.done if held != keys] == [], method
        assert lab.keeps_away(docker, method), f"{method} once more"


def test_what_is_known_is_changed_by_one_thread_at_a_time(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    docker = lab.start()
    plugin: Any = docker.plugin
    half, driver = plugin._networks, plugin._halves[1]._driver
    store, numbers = half._store, half._allocations._pools["vni"]
    seen, bare = set(), []

    def watch(owner: type, name: str, lock_of: Callable[[object], Any]) -> None:
        method = getattr(owner, name)

        def watched(self: object, *values: Any, **options: Any) -> Any:
            seen.add(name)
            if not lock_of(self).locked():
                bare.append((name, values))
            return method(self, *values, **options)

        monkeypatch.setattr(owner, name, watched)

    guard, peers = half._allocations._guard, half._peers
    watch(Database, "write", lambda it: store._lock if it is store._database else driver._lock)
    for name in ("take", "allocate", "hold", "release"):
        watch(NumberPool, name, lambda it: guard if it is numbers else driver._lock)
    for name in ("save_node", "forget_node"):
        watch(Store, name, lambda _: peers._lock)
    for address in ("192.0.2.1", "192.0.2.2"):  # of this node
        this = {"Address": address, "BindAddress": address, "Self": True}
        docker("DiscoverNew", {"DiscoveryType": 1, "DiscoveryData": this})
    for method, (request, _) in LIFE.items():
        docker(method, request)
        docker("GetCapabilities")
        for network in docker.plugin.networks.values():
            network.attach(Data(1))
    assert seen == {"write", "take", "allocate", "hold", "release", "save_node", "forget_node"}
    assert bare == []


def test_what_nobody_called_for_is_done_with_the_lock_too(lab: Lab, tmp_path: Path) -> None:
    docker = lab.start(tmp_path)
    for method in ("CreateNetwork", "CreateEndpoint", "Join", "ProgramExternalConnectivity"):
        docker(method, LIFE[f"NetworkDriver.{method}"][0])
    lab.done.clear()
    docker("DiscoverNew", NODE)
    docker("Plugin.Activate")
    docker.plugin.close()
    docker = lab.start(tmp_path)
    docker.plugin.close()
    told = lab.told()
    assert {what for what, _ in told} == {
        "peer_joined",
        "endpoint_is_gone",
        "create_network",
        "restore_endpoint",
        "program",
    }
    assert [what for what, held in told if held != {NETWORK}] == []


def test_what_docker_tells_is_acted_on_with_the_lock(lab: Lab) -> None:
    docker, engine = lab.start(timings=Timings(missing_grace=0.0)), ListingEngine()
    for method in ("CreateNetwork", "CreateEndpoint", "Join"):
        docker(method, LIFE[f"NetworkDriver.{method}"][0])
    (network,) = docker.plugin.networks.values()
    plugin: Any = docker.plugin
    comparison = plugin._networks._comparison
    lab.done.clear()
    comparison._ask_for_container(network.endpoints[ENDPOINT], engine)
    comparison._compare(engine)
    engine.listed[NETWORK] = {}
    comparison._compare(engine)
    engine.listed = {}
    comparison._compare(engine)
    told = lab.told()
    assert [what for what, _ in told] == ["container_attached", "leave", "delete_endpoint", "delete_network"]
    assert [what for what, held in told if held != {NETWORK}] == []
