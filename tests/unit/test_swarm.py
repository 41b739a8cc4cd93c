"""Networks of a swarm and its nodes: what is allocated, who is there, and what of it survives."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from netplugin_sdk import AllocateNetwork, Network, Node, Plugin, Scope, Timings, Unavailable
from netplugin_sdk.core import swarm
from netplugin_sdk.core.store import Store
from tests.patience import PATIENCE
from tests.unit.lab import (
    NETWORK,
    OTHER_NETWORK,
    Docker,
    Everything,
    Options,
    Recorder,
    copy_state,
    create_network,
    joining,
    of,
)

SWARM_NETWORKS = ["8l5mkgx5w0sjr6vmvtn2sgz1m", "s6g8rhb5u4lewuqs6qnjzs8gc", "7fc7024v37vsjf2puelwok8gj"]
ONE, TWO, THREE = SWARM_NETWORKS


class Overlay(Everything):
    """Numbers of the whole swarm, few of them."""

    scope = Scope.GLOBAL
    cluster_numbers = {"vni": range(100, 104)}  # noqa: RUF012

    def allocate_network(self, request: AllocateNetwork) -> Mapping[str, str]:
        self.called("allocate_network", request)
        return {"colour": "red"}


def allocate(network: str = ONE, **options: str) -> dict[str, Any]:
    pool = {"AddressSpace": "", "Gateway": "10.0.1.1/24", "Pool": "10.0.1.0/24"}
    return {"NetworkID": network, "Options": options, "IPv4Data": [pool], "IPv6Data": None}


Manager = Callable[..., Docker]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """Starts the plugin of a manager, by its folder's name; one that runs there already has been killed."""
    plugins: dict[str, Plugin] = {}

    def start(driver: Recorder, name: str = "a", *, node_lost: float = 0.0) -> Docker:
        if name in plugins:
            plugins.pop(name).close()
        timings = Timings(node_lost=node_lost)
        plugin = plugins[name] = Plugin(driver, state=tmp_path / name, docker=None, timings=timings)
        docker = Docker(plugin)
        docker("GetCapabilities")
        return docker

    yield start
    for plugin in plugins.values():
        plugin.close()


def vni(answer: Mapping[str, Any]) -> str:
    return str(answer["Options"]["vni"])


# What is allocated


def test_a_network_gets_a_number_beside_its_options(manager: Manager) -> None:
    driver = Overlay()
    docker = manager(driver)
    asked: list[AllocateNetwork] = []
    driver.hooks = {"allocate_network": asked.append}
    answer = docker("AllocateNetwork", allocate(mtu="1400"))
    assert answer == {"Options": {"mtu": "1400", "vni": vni(answer), "colour": "red"}}
    assert int(vni(answer)) in range(100, 104)
    assert asked[0].options == {"mtu": "1400", "vni": vni(answer)}
    assert driver.allocations == {ONE: answer["Options"]}
    assert not driver.networks  # a manager need not run it


def test_a_repeated_request_is_answered_from_memory(manager: Manager) -> None:
    driver = Overlay()
    docker = manager(driver)
    answer = docker("AllocateNetwork", allocate())
    assert docker("AllocateNetwork", allocate()) == answer
    assert driver.since() == ["allocate_network"]
    again = Overlay()
    docker = manager(again)
    assert again.allocations == {ONE: answer["Options"]}
    assert docker("AllocateNetwork", allocate()) == answer
    assert again.calls == []


def test_what_others_have_is_known_before_the_first_call(tmp_path: Path) -> None:
    numbers: list[str] = []
    for number in range(4):
        with Plugin(Overlay(), state=tmp_path) as plugin:
            numbers.append(vni(Docker(plugin)("AllocateNetwork", allocate(f"network{number:05}"))))
    assert sorted(numbers) == ["100", "101", "102", "103"]


@pytest.mark.parametrize("number", ["100", "103"])
def test_the_first_and_the_last_number_are_known_after_a_restart_too(manager: Manager, number: str) -> None:
    manager(Overlay())("AllocateNetwork", allocate(ONE, vni=number))
    driver = Overlay()
    docker = manager(driver)
    for other in (f"network{n:05}" for n in range(20)):  # some would have it by their hash
        assert vni(docker("AllocateNetwork", allocate(other))) != number
        docker("FreeNetwork", of(other))
    assert ONE in driver.allocations


def test_networks_that_are_allocated_at_a_time_get_different_numbers(manager: Manager) -> None:
    class Many(Overlay):
        cluster_numbers = {"vni": range(20), "port": range(4000, 4020)}  # noqa: RUF012

    driver = Many()
    docker = manager(driver)
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(docker("AllocateNetwork", allocate(f"network{n:05}"))))
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        docker("GetCapabilities")
    assert len(driver.allocations) == 20
    assert {vni(answer) for answer in answers} == {str(n) for n in range(20)}
    assert {answer["Options"]["port"] for answer in answers} == {str(n) for n in range(4000, 4020)}


def test_what_is_freed_is_given_out_again(manager: Manager) -> None:
    driver = Overlay()
    docker = manager(driver)
    numbers = [vni(docker("AllocateNetwork", allocate(f"network{n:05}"))) for n in range(4)]
    assert sorted(numbers) == ["100", "101", "102", "103"]
    assert docker.refused("AllocateNetwork", allocate()) == (503, "all numbers from 100 to 103 are in use")
    assert ONE not in driver.allocations
    driver.since()
    for _ in range(2):  # the second finds nothing to free
        assert docker("FreeNetwork", of("network00002")) == {}
    assert driver.since() == ["free_network network00002"]
    assert "network00002" not in driver.allocations
    assert vni(docker("AllocateNetwork", allocate())) == numbers[2]


def test_a_manager_that_never_allocated_it_frees_it(manager: Manager) -> None:
    driver = Overlay()
    docker = manager(driver)
    assert docker("FreeNetwork", of(ONE)) == {}
    assert driver.calls == []


def test_a_number_can_be_asked_for(manager: Manager) -> None:
    driver = Overlay()
    docker = manager(driver)
    assert vni(docker("AllocateNetwork", allocate(vni="102"))) == "102"
    status, text = docker.refused("AllocateNetwork", allocate(TWO, vni="102"))
    assert (status, text) == (409, "vni cannot be had: 102 is in use")
    assert docker.refused("AllocateNetwork", allocate(TWO, vni="99")) == (
        400,
        "vni cannot be had: 99 is not from 100 to 103",
    )
    for text in ("-1", "", "1.5", "\u0661", "9" * 5000):
        refused = docker.refused("AllocateNetwork", allocate(TWO, vni=text))
        assert refused == (400, f"vni must be a whole number, got {text[:80]!r}")
    assert driver.allocations.keys() == {ONE}
    assert {vni(docker("AllocateNetwork", allocate(f"network{n:05}"))) for n in range(3)} == {"100", "101", "103"}


def test_a_driver_does_not_change_a_number(manager: Manager) -> None:
    class Wrong(Overlay):
        def allocate_network(self, request: AllocateNetwork) -> Mapping[str, str]:
            return {"vni": "none", "port": "1"}

    answer = manager(Wrong())("AllocateNetwork", allocate())
    assert answer["Options"] == {"vni": vni(answer), "port": "1"}
    assert int(vni(answer)) in range(100, 104)


def test_what_an_older_version_of_the_driver_allocated_is_kept(manager: Manager) -> None:
    class Older(Overlay):
        cluster_numbers = {"other": range(200)}  # noqa: RUF012

        def allocate_network(self, request: AllocateNetwork) -> Mapping[str, str]:
            return {"vni": "none" if request.network_id == ONE else "7"}

    docker = manager(Older())
    docker("AllocateNetwork", allocate(ONE))
    docker("AllocateNetwork", allocate(TWO))
    driver = Overlay()
    docker = manager(driver)
    assert {network: options["vni"] for network, options in driver.allocations.items()} == {ONE: "none", TWO: "7"}
    assert int(vni(docker("AllocateNetwork", allocate(THREE)))) in range(100, 104)


def test_an_allocation_that_fails_leaves_nothing(manager: Manager) -> None:
    driver = Overlay()
    docker = manager(driver)
    driver.fails = {"allocate_network": Unavailable("not today")}
    assert docker.refused("AllocateNetwork", allocate(vni="101")) == (503, "not today")
    assert driver.calls == ["allocate_network", f"free_network {ONE}"]
    assert not driver.allocations
    driver.fails = {}
    assert vni(docker("AllocateNetwork", allocate(TWO, vni="101"))) == "101"


def test_an_allocation_that_cannot_be_undone_says_why_it_failed(
    manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Overlay()
    driver.fails = {"allocate_network": Unavailable("not today"), f"free_network {ONE}": Unavailable("nor tomorrow")}
    assert manager(driver).refused("AllocateNetwork", allocate()) == (503, "not today")
    assert "nor tomorrow" in caplog.text


def test_a_network_in_use_keeps_what_it_has_if_it_cannot_be_allocated_again(manager: Manager) -> None:
    driver = Overlay()
    docker = manager(driver)
    answer = docker("AllocateNetwork", allocate(vni="101"))
    driver.since()
    driver.fails = {"allocate_network": Unavailable("not today")}
    docker("GetCapabilities")
    docker.refused("AllocateNetwork", allocate(**answer["Options"]))
    assert driver.calls == ["allocate_network"]
    assert driver.allocations == {ONE: answer["Options"]}
    assert docker.refused("AllocateNetwork", allocate(TWO, vni="101"))[1] == "vni cannot be had: 101 is in use"
    driver.fails = {}
    assert docker("AllocateNetwork", allocate(**answer["Options"])) == answer
    assert docker.refused("AllocateNetwork", allocate(TWO, vni="101"))[0] == 409


@pytest.mark.parametrize("method", ["allocate_network", "free_network"])
def test_a_manager_that_is_killed_in_the_driver(manager: Manager, tmp_path: Path, method: str) -> None:
    class Dies(Overlay):
        def free_network(self, network_id: str) -> None:
            self.called("free_network")

    driver = Dies()
    docker = manager(driver)
    number = vni(docker("AllocateNetwork", allocate()))
    docker("FreeNetwork", of(ONE))
    if method == "free_network":
        docker("AllocateNetwork", allocate())
    driver.hooks = {method: lambda _: copy_state(tmp_path / "a", tmp_path / "killed")}
    docker(*(("FreeNetwork", of(ONE)) if method == "free_network" else ("AllocateNetwork", allocate())))
    driver = Dies()
    docker = manager(driver, "killed")
    assert driver.allocations.keys() == ({ONE} if method == "free_network" else set())
    if method == "free_network":
        docker("FreeNetwork", of(ONE))
        assert driver.calls == ["free_network"]
    # By its id: it would get the same from a manager that never knew it.
    assert vni(docker("AllocateNetwork", allocate())) == number
    assert vni(manager(Dies(), "b")("AllocateNetwork", allocate())) == number


def test_an_answer_that_was_lost_with_the_manager_is_given_again(manager: Manager) -> None:
    manager(Overlay())("AllocateNetwork", allocate())
    driver = Overlay()
    docker = manager(driver)
    assert docker("AllocateNetwork", allocate()) == {"Options": driver.allocations[ONE]}
    assert driver.calls == []


# Another manager leads


def test_the_next_leader_keeps_what_the_last_one_allocated(manager: Manager) -> None:
    answer = manager(Overlay(), "a")("AllocateNetwork", allocate(mtu="1400"))
    other = next(str(n) for n in range(100, 104) if str(n) != vni(answer))
    b = manager(Overlay(), "b")
    assert b("AllocateNetwork", allocate(**{**answer["Options"], "vni": other}))["Options"]["vni"] == other
    assert b.refused("AllocateNetwork", allocate(TWO, vni=other))[0] == 409


@pytest.mark.parametrize("leads_again", [False, True])
def test_the_swarm_is_right_where_a_manager_remembers_something_else(manager: Manager, leads_again: bool) -> None:
    """It was killed before its answer was kept, and another manager allocated the network then."""
    driver = Overlay()
    docker = manager(driver)
    before = vni(docker("AllocateNetwork", allocate()))
    now = next(str(n) for n in range(100, 104) if str(n) != before)
    if leads_again:
        docker("GetCapabilities")
    assert docker("AllocateNetwork", allocate(vni=now))["Options"]["vni"] == now
    assert driver.allocations[ONE]["vni"] == now
    assert vni(docker("AllocateNetwork", allocate(TWO, vni=before))) == before
    assert docker.refused("AllocateNetwork", allocate(THREE, vni=now))[0] == 409


@pytest.mark.parametrize("restarted", [False, True])
def test_what_was_freed_elsewhere_is_given_out_last(
    manager: Manager, caplog: pytest.LogCaptureFixture, restarted: bool
) -> None:
    driver = Overlay()
    docker = manager(driver)
    numbers = {ONE: vni(docker("AllocateNetwork", allocate(ONE))), TWO: vni(docker("AllocateNetwork", allocate(TWO)))}
    if restarted:
        driver = Overlay()
        docker = manager(driver)
    docker("GetCapabilities")  # it leads again, and of the two only the second one is left
    docker("AllocateNetwork", allocate(TWO, vni=numbers[TWO], colour="red"))
    given = [vni(docker("AllocateNetwork", allocate(f"network{n:05}"))) for n in range(3)]
    assert set(given[:2]) == {"100", "101", "102", "103"} - set(numbers.values())
    assert given[2] == numbers[ONE]
    assert f"network network00002 has it now, instead of {ONE[:12]}" in caplog.text
    assert driver.allocations.keys() == {TWO, *(f"network{n:05}" for n in range(3))}
    assert docker.refused("AllocateNetwork", allocate(THREE))[0] == 503
    docker("FreeNetwork", of(ONE))
    assert docker.refused("AllocateNetwork", allocate(THREE))[0] == 503


class TwoNumbers(Overlay):
    cluster_numbers = {"vni": range(100, 104), "port": range(4000, 4003)}  # noqa: RUF012


@pytest.mark.parametrize("freed", [True, False], ids=["freed", "lost its number"])
def test_the_numbers_of_what_is_gone_go_before_those_of_what_may_be_there(manager: Manager, freed: bool) -> None:
    driver = TwoNumbers()
    docker = manager(driver)
    docker("AllocateNetwork", allocate(ONE, vni="102", port="4002"))
    docker("AllocateNetwork", allocate(TWO, vni="100", port="4000"))
    docker("GetCapabilities")  # it leads again, and has not been asked for either
    if freed:
        docker("FreeNetwork", of(ONE))
    docker("AllocateNetwork", allocate(THREE, vni="102", port="4001"))
    assert docker("AllocateNetwork", allocate("network00001"))["Options"]["port"] == "4002"
    assert TWO in driver.allocations


def test_what_was_freed_elsewhere_can_be_another_networks_by_now(manager: Manager) -> None:
    driver = Overlay()
    docker = manager(driver)
    docker("AllocateNetwork", allocate(ONE, vni="101"))
    docker("GetCapabilities")
    docker("AllocateNetwork", allocate(TWO, vni="101"))
    assert driver.allocations.keys() == {TWO}
    driver = Overlay()
    docker = manager(driver)
    assert driver.allocations.keys() == {TWO}
    assert docker.refused("AllocateNetwork", allocate(ONE, vni="99"))[0] == 400


class LocalNumbers(Recorder):
    cluster_numbers = {"vni": range(10)}  # noqa: RUF012


class Gaps(Overlay):
    cluster_numbers = {"vni": range(0, 10, 2)}  # noqa: RUF012


@pytest.mark.parametrize(
    ("driver_type", "text"),
    [(LocalNumbers, "has cluster_numbers, and its scope is not global"), (Gaps, "the cluster_numbers vni have gaps")],
)
def test_numbers_that_cannot_be(driver_type: type[Recorder], text: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=text):
        Plugin(driver_type(), state=tmp_path)
    Plugin(Recorder(), state=tmp_path).close()  # the folder is free again


def test_a_file_from_before_swarms_is_brought_up_to_date(tmp_path: Path, manager: Manager) -> None:
    docker = manager(Recorder())
    docker("CreateNetwork", create_network())
    docker.plugin.close()
    with closing(sqlite3.connect(tmp_path / "a" / "state.db")) as db, db:
        db.executescript(
            "DROP TABLE allocations; DROP TABLE nodes; ALTER TABLE networks DROP COLUMN engine;"
            "ALTER TABLE endpoints DROP COLUMN container; PRAGMA user_version = 1"
        )
    driver = Overlay()
    docker = manager(driver)
    assert set(driver.networks) == {NETWORK}
    assert docker("AllocateNetwork", allocate())["Options"].keys() == {"vni", "colour"}
    with closing(sqlite3.connect(tmp_path / "a" / "state.db.version-1")) as kept:
        assert kept.execute("SELECT name FROM sqlite_schema WHERE name IN ('allocations', 'nodes')").fetchall() == []


# The nodes


class Meshed(Everything):
    scope = Scope.GLOBAL

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[str]] = []
        """What peers `create_network` found."""

    def create_network(self, network: Network[Options]) -> None:
        self.seen.append([str(address) for address in self.peers])
        super().create_network(network)


def node(address: str, *, this: bool = False, bound: bool | None = None) -> dict[str, Any]:
    """As the engine tells of this node when its agent starts, else as its gossip tells of any."""
    bind = address if (this if bound is None else bound) else ""
    return {"DiscoveryType": 1, "DiscoveryData": {"Address": address, "BindAddress": bind, "Self": this}}


class Timers:
    """Those of `swarm`, which end when the test says so."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._waiting: list[Callable[[], None]] = []

    def make(self, seconds: float, function: Callable[[], None]) -> SimpleNamespace:
        self.seconds.append(seconds)
        start = partial(self._waiting.append, function)
        return SimpleNamespace(start=start, cancel=partial(self._cancel, function))

    def _cancel(self, function: Callable[[], None]) -> None:
        if function in self._waiting:
            self._waiting.remove(function)

    def end(self) -> None:
        """Whoever was lost has been lost for long."""
        waiting, self._waiting = self._waiting, []
        for function in waiting:
            function()


@pytest.fixture(autouse=True)
def timers(monkeypatch: pytest.MonkeyPatch) -> Timers:
    made = Timers()
    monkeypatch.setattr(swarm, "threading", SimpleNamespace(Lock=threading.Lock, Timer=made.make))
    return made


class Clock:
    """Passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """That of `swarm`."""
    made = Clock()
    monkeypatch.setattr(swarm, "time", made)
    return made


def peers(driver: Recorder) -> list[str]:
    return sorted(str(address) for address in driver.peers)


def wait_for(condition: Callable[[], object], what: str) -> None:
    done = threading.Event()
    for _ in range(int(PATIENCE / 0.02)):
        if condition():
            return
        done.wait(0.02)
    raise AssertionError(f"{what} did not come")


def test_each_network_is_told_of_each_node_once(manager: Manager, timers: Timers) -> None:
    driver = Meshed()
    docker = manager(driver)
    docker("DiscoverNew", node("10.0.0.2"))
    docker("CreateNetwork", create_network())
    docker("CreateNetwork", create_network(OTHER_NETWORK))
    assert driver.seen == [["10.0.0.2"], ["10.0.0.2"]]
    driver.since()
    docker("DiscoverNew", node("fd00::3"))
    docker("DiscoverNew", node("10.0.0.2"))
    assert driver.since() == [f"peer_joined {network[:4]} fd00::3" for network in (NETWORK, OTHER_NETWORK)]
    assert driver.peers[ip_address("fd00::3")] == Node(address=ip_address("fd00::3"))
    docker("DiscoverDelete", node("fd00::3"))
    docker("DiscoverDelete", node("fd00::3"))
    docker("DiscoverDelete", node("10.0.0.9"))
    assert driver.since() == []
    assert peers(driver) == ["10.0.0.2", "fd00::3"]
    timers.end()
    assert driver.since() == [f"peer_left {network[:4]} fd00::3" for network in (NETWORK, OTHER_NETWORK)]
    assert peers(driver) == ["10.0.0.2"]


def test_what_is_not_a_node_is_answered_and_ignored(manager: Manager) -> None:
    driver = Meshed()
    docker = manager(driver)
    for method in ("DiscoverNew", "DiscoverDelete"):
        assert docker(method, {"DiscoveryType": 3, "DiscoveryData": "keys"}) == {}
    assert not driver.peers


def test_a_driver_of_local_scope_can_have_peers(manager: Manager) -> None:
    driver = Everything()
    docker = manager(driver)
    docker("CreateNetwork", create_network())
    docker("DiscoverNew", node("10.0.0.2"))
    assert driver.calls[-1] == f"peer_joined {NETWORK[:4]} 10.0.0.2"
    assert peers(driver) == ["10.0.0.2"]


def test_nodes_are_known_after_a_restart_before_networks_are_made_again(manager: Manager, timers: Timers) -> None:
    driver = Meshed()
    docker = manager(driver)
    docker("DiscoverNew", node("10.0.0.1", this=True))
    for address in ("10.0.0.2", "10.0.0.3", "10.0.0.4"):
        docker("DiscoverNew", node(address))
    docker("DiscoverDelete", node("10.0.0.3"))
    timers.end()
    docker("CreateNetwork", create_network())
    again = Meshed()
    docker = manager(again)
    assert again.seen == [["10.0.0.2", "10.0.0.4"]]
    assert again.calls == ["create_network"]
    assert again.this_node == driver.this_node
    for _ in range(2):  # a plugin that is enabled again is told of this node only; the second is a repetition
        docker("DiscoverNew", node("10.0.0.1", this=True))
    assert peers(again) == ["10.0.0.2", "10.0.0.4"]
    docker("DiscoverDelete", node("10.0.0.4"))
    timers.end()
    assert again.since() == ["create_network", f"peer_left {NETWORK[:4]} 10.0.0.4"]


def test_this_node_is_none_of_the_peers(manager: Manager) -> None:
    driver = Meshed()
    docker = manager(driver)
    docker("DiscoverNew", node("10.0.0.1", this=True))
    docker("DiscoverNew", node("192.0.2.1", this=True, bound=False))  # by its --advertise-addr
    docker("DiscoverNew", node("10.0.0.1"))
    docker("DiscoverDelete", node("192.0.2.1", this=True, bound=False))
    address = ip_address("10.0.0.1")
    assert driver.this_node == Node(address=address, bind_address=address, is_self=True)
    assert peers(driver) == []


def test_a_node_whose_address_changes(manager: Manager) -> None:
    driver = Meshed()
    docker = manager(driver)
    docker("DiscoverNew", node("10.0.0.1", this=True))
    docker("DiscoverNew", node("10.0.0.2"))
    docker("CreateNetwork", create_network())
    driver.since()
    docker("DiscoverNew", node("10.0.0.2", this=True))  # what a node had that is gone
    assert driver.this_node is not None
    assert str(driver.this_node.address) == "10.0.0.2"
    assert peers(driver) == []
    wait_for(lambda: "create_network" in driver.calls, "the network with the new address")
    assert driver.calls[0] == f"peer_left {NETWORK[:4]} 10.0.0.2"
    again = Meshed()
    manager(again)
    assert again.this_node == driver.this_node


def test_a_node_is_there_until_the_last_of_its_address_has_left(manager: Manager, timers: Timers) -> None:
    """An engine that is killed and back at once joins as another node, and only then is the first one given up."""
    driver = Meshed()
    docker = manager(driver)
    docker("DiscoverNew", node("10.0.0.1", this=True))
    docker("DiscoverNew", node("10.0.0.2"))
    docker("DiscoverNew", node("10.0.0.2"))
    docker("DiscoverDelete", node("10.0.0.2"))
    timers.end()
    assert peers(driver) == ["10.0.0.2"]
    docker("DiscoverDelete", node("10.0.0.2"))
    timers.end()
    assert peers(driver) == []


def test_who_is_told_anew_after_the_engine_restarted_is_counted_once(manager: Manager, timers: Timers) -> None:
    driver = Meshed()
    for _ in range(3):
        docker = manager(driver)
        docker("DiscoverNew", node("10.0.0.1", this=True))
        docker("DiscoverNew", node("10.0.0.2"))
    docker("DiscoverDelete", node("10.0.0.2"))
    timers.end()
    assert peers(driver) == []


def test_a_node_that_joins_another_swarm_forgets_those_of_the_last_one(
    manager: Manager, clock: Clock, timers: Timers
) -> None:
    driver = Meshed()
    docker = manager(driver)
    this = node("10.0.0.1", this=True)
    docker("DiscoverNew", this)
    docker("DiscoverNew", node("10.0.0.2"))
    docker("DiscoverNew", node("10.0.0.3"))
    clock.now += 10
    docker("DiscoverNew", this)  # a repetition
    assert peers(driver) == ["10.0.0.2", "10.0.0.3"]
    clock.now += 1000
    docker("DiscoverNew", node("10.0.0.3"))  # of the new swarm: the gossip may be faster than the engine
    docker("DiscoverNew", node("10.0.0.4"))
    docker("DiscoverNew", this)
    assert peers(driver) == ["10.0.0.3", "10.0.0.4"]
    docker("DiscoverDelete", node("10.0.0.3"))
    timers.end()
    assert peers(driver) == ["10.0.0.4"]


def test_a_network_that_cannot_be_told_is_brought_in_line(manager: Manager, caplog: pytest.LogCaptureFixture) -> None:
    driver = Meshed()
    docker = manager(driver)
    docker("CreateNetwork", create_network())
    docker("CreateNetwork", create_network(OTHER_NETWORK))
    driver.since()
    driver.fails = {f"peer_joined {NETWORK[:4]} 10.0.0.2": Unavailable("no such device")}
    docker("DiscoverNew", node("10.0.0.2"))
    assert driver.calls[:2] == [f"peer_joined {network[:4]} 10.0.0.2" for network in (NETWORK, OTHER_NETWORK)]
    assert "no such device" in caplog.text
    wait_for(lambda: len(driver.seen) == 4, "create_network of both")
    assert driver.seen[2:] == [["10.0.0.2"], ["10.0.0.2"]]


def test_a_driver_that_wants_to_hear_of_those_that_join_only(manager: Manager, timers: Timers) -> None:
    class Joining(Recorder):
        def peer_joined(self, network: Network[Options], peer: Node) -> None:
            self.called(f"peer_joined {peer.address}")

    driver = Joining()
    docker = manager(driver)
    docker("CreateNetwork", create_network())
    driver.since()
    docker("DiscoverNew", node("10.0.0.2"))
    assert driver.since() == ["peer_joined 10.0.0.2"]
    docker("DiscoverDelete", node("10.0.0.2"))
    timers.end()
    assert (driver.since(), peers(driver)) == ([], [])


def test_a_network_that_is_half_deleted_is_told_of_nobody(manager: Manager) -> None:
    driver = Meshed()
    docker = manager(driver)
    docker("CreateNetwork", create_network())
    driver.fails = {"delete_network": Unavailable("busy")}
    docker.refused("DeleteNetwork", {"NetworkID": NETWORK})
    driver.since()
    docker("DiscoverNew", node("10.0.0.2"))
    assert driver.since() == []
    assert peers(driver) == ["10.0.0.2"]


@pytest.mark.parametrize(("method", "left"), [("New", ["10.0.0.2"]), ("Delete", [])])
def test_a_plugin_that_is_killed_while_it_tells(
    manager: Manager, timers: Timers, tmp_path: Path, method: str, left: list[str]
) -> None:
    event = "joined" if method == "New" else "left"
    driver = Meshed()
    docker = manager(driver)
    docker("CreateNetwork", create_network())
    if method == "Delete":
        docker("DiscoverNew", node("10.0.0.2"))
    died = f"peer_{event} {NETWORK[:4]} 10.0.0.2"
    driver.hooks = {died: lambda _: copy_state(tmp_path / "a", tmp_path / "killed")}
    docker(f"Discover{method}", node("10.0.0.2"))
    timers.end()
    again = Meshed()
    docker = manager(again, "killed")
    assert again.seen == [left]
    docker(f"Discover{method}", node("10.0.0.2"))  # the engine's retry
    assert again.calls == ["create_network"]


def test_a_lost_node_that_is_back_is_told_of_again(manager: Manager, timers: Timers) -> None:
    """What was sent to it meanwhile it did not get; and who is back does not leave."""
    driver = Meshed()
    docker = manager(driver)
    docker("CreateNetwork", create_network())
    for address in ("10.0.0.2", "10.0.0.3"):
        docker("DiscoverNew", node(address))
    driver.since()
    for address in ("10.0.0.2", "10.0.0.3"):
        docker("DiscoverDelete", node(address))
    docker("DiscoverNew", node("10.0.0.2"))
    assert driver.since() == [f"peer_joined {NETWORK[:4]} 10.0.0.2"]
    timers.end()
    assert driver.since() == [f"peer_left {NETWORK[:4]} 10.0.0.3"]
    docker("DiscoverDelete", node("10.0.0.2"))
    timers.end()
    assert driver.since() == [f"peer_left {NETWORK[:4]} 10.0.0.2"]
    assert peers(driver) == []


def test_a_lost_node_leaves_when_it_has_been_lost_for_two_minutes(
    manager: Manager, clock: Clock, timers: Timers
) -> None:
    driver = Meshed()
    docker = manager(driver, node_lost=120.0)
    for address in ("10.0.0.2", "10.0.0.3"):
        docker("DiscoverNew", node(address))
        docker("DiscoverDelete", node(address))
        clock.now += 50
    clock.now = 1119.0
    timers.end()
    assert peers(driver) == ["10.0.0.2", "10.0.0.3"]
    clock.now = 1120.0
    timers.end()
    assert peers(driver) == ["10.0.0.3"]
    clock.now = 1170.0
    timers.end()
    assert peers(driver) == []
    assert timers.seconds == [120.0, 1.0, 50.0], "one at a time, for who is next"


def test_nodes_that_are_lost_one_after_the_other(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the timers of the library: one at a time."""
    monkeypatch.setattr(swarm, "threading", threading)
    driver = Meshed()
    docker = manager(driver, node_lost=0.1)
    for number in range(2, 20):
        docker("DiscoverNew", node(f"10.0.0.{number}"))
        docker("DiscoverDelete", node(f"10.0.0.{number}"))
        threading.Event().wait(0.01)
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert len(timers) <= 2, "one ends, another begins"
    assert all(timer.daemon for timer in timers), "a process that ends does not wait for who may have left"
    wait_for(lambda: not driver.peers, "the end of them")
    docker = manager(driver, node_lost=1.0)
    docker("DiscoverNew", node("10.0.0.2"))
    docker("DiscoverDelete", node("10.0.0.2"))
    manager(Meshed())  # the end of that one
    threading.Event().wait(1.1)
    assert peers(driver) == ["10.0.0.2"]


def test_a_node_that_cannot_be_forgotten(
    manager: Manager, clock: Clock, timers: Timers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Meshed()
    docker = manager(driver, node_lost=120.0)
    docker("DiscoverNew", node("10.0.0.2"))
    docker("DiscoverDelete", node("10.0.0.2"))
    clock.now += 120
    with monkeypatch.context() as patch:
        patch.setattr(Store, "forget_node", lambda *_: 1 / 0)
        timers.end()
    assert "cannot be forgotten" in caplog.text
    clock.now += 120
    timers.end()
    assert peers(driver) == []
    assert timers.seconds == [120.0, 120.0], "it is not tried again at once"


def test_a_network_that_is_being_made_is_told_afterwards(manager: Manager) -> None:
    """It may have looked at the peers before."""
    driver = Meshed()
    docker = manager(driver)
    looked, go_on = threading.Event(), threading.Event()

    def wait(_: object) -> None:
        looked.set()
        assert go_on.wait(PATIENCE)

    driver.hooks = {"create_network": wait}
    making = threading.Thread(target=docker, args=("CreateNetwork", create_network()))
    making.start()
    assert looked.wait(PATIENCE)
    telling = threading.Thread(target=docker, args=("DiscoverNew", node("10.0.0.2")))
    telling.start()
    wait_for(lambda: driver.peers, "the peer")
    assert driver.seen == [[]]
    go_on.set()
    making.join(PATIENCE)
    telling.join(PATIENCE)
    assert driver.calls == ["create_network", f"peer_joined {NETWORK[:4]} 10.0.0.2"]


def test_peers_that_were_read_do_not_change(manager: Manager) -> None:
    driver = Meshed()
    docker = manager(driver)
    docker("DiscoverNew", node("10.0.0.2"))
    for number, _ in enumerate(driver.peers):
        docker("DiscoverNew", node(f"10.0.1.{number}"))
    assert len(driver.peers) == 2


# On the nodes


def test_a_swarms_network_that_comes_with_another_request_is_made_again(manager: Manager) -> None:
    """An engine that was killed forgets it, and after an upgrade says more of it."""
    driver = Meshed()
    docker = manager(driver)
    docker("CreateNetwork", create_network())
    docker.run()
    driver.since()
    later = create_network()
    later["Options"]["com.docker.network.enable_ipv4"] = True
    docker("CreateNetwork", later)
    assert driver.since() == ["leave", "delete_endpoint", "delete_network", "create_network"]
    assert not driver.networks[NETWORK].endpoints
    docker("CreateNetwork", later)
    assert driver.since() == []
    docker.refused("Join", joining())


def test_what_is_allocated_is_an_option_on_the_nodes(manager: Manager) -> None:
    """What a manager allocates and what a node runs do not touch each other."""
    driver = Meshed()
    docker = manager(driver)
    docker("AllocateNetwork", allocate(NETWORK))
    docker("CreateNetwork", create_network(mtu="1400"))
    docker("FreeNetwork", of(NETWORK))
    assert set(driver.networks) == {NETWORK}
    docker("AllocateNetwork", allocate(NETWORK))
    docker("DeleteNetwork", of(NETWORK))
    assert set(driver.allocations) == {NETWORK}
    again = Meshed()
    manager(again)
    assert (set(again.networks), set(again.allocations)) == (set(), {NETWORK})
