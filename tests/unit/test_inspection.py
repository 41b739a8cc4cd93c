"""A plugin's state, the kernel's interfaces and Docker's lists, compared with each other with none of them there."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from ipaddress import IPv4Address, ip_address, ip_interface, ip_network
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from netplugin_sdk import MacAddress, NotFound, Plugin, TransportProtocol, Unavailable
from netplugin_sdk.core.store import StoredNetwork
from netplugin_sdk.inspection import disk, looking
from netplugin_sdk.inspection.comparing import compare
from netplugin_sdk.inspection.engine import Engine, EngineEndpoint, EngineNetwork
from netplugin_sdk.inspection.kernel import Host, Interface, Listener, NamespaceView
from netplugin_sdk.inspection.model import Snapshot
from netplugin_sdk.linux.ports import Published
from netplugin_sdk.protocol.messages import encode

from .lab import (
    ENDPOINT,
    MAC,
    NETWORK,
    OTHER_ENDPOINT,
    OTHER_NETWORK,
    Docker,
    Publisher,
    copy_state,
    create_endpoint,
    create_network,
    joining,
    publishing,
)

BRIDGE, OUTER = f"br-{NETWORK[:12]}", f"ve-{ENDPOINT[:12]}"
TCP = TransportProtocol.TCP


# ------------------------------------------------------------------------------------------------------- the three


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Plugin]:
    """One network, and a container on it with a published port."""
    with Plugin(Publisher(), state=tmp_path / "state", docker=None) as plugin:
        docker = Docker(plugin)
        docker("CreateNetwork", create_network())
        docker.run()
        docker("ProgramExternalConnectivity", publishing())
        yield plugin


def networks(plugin: Plugin, tmp_path: Path) -> Mapping[str, StoredNetwork]:
    return disk.read(tmp_path / "state")


def interface(name: str, **fields: Any) -> Interface:
    given = {"kind": "veth", "mtu": 1500, "mac": None, "up": True, "master": None, "link": None, "addresses": ()}
    return Interface(**{"name": name, "index": 7, **given, **fields})


def bridge(name: str = BRIDGE, **fields: Any) -> Interface:
    return interface(name, **{"kind": "bridge", "addresses": (ip_interface("172.18.0.1/16"),), **fields})


INNER = interface("eth0", index=9, mac=str(MAC), addresses=(ip_interface("172.18.0.2/16"),))
SEEN = NamespaceView({"eth0": INNER}, (ip_address("172.18.0.1"),))
LISTENER = Listener(TCP, ip_address("0.0.0.0"), 18080)


def host(*interfaces: Interface, listeners: tuple[Listener, ...] = (LISTENER,), rules: Any = None) -> Host:
    there = interfaces or (bridge(), interface(OUTER, link=9, master=BRIDGE))
    return Host(NamespaceView({each.name: each for each in there}), frozenset(listeners), rules)


LISTED = EngineEndpoint(
    id=ENDPOINT, name="web", container="c" * 64, mac=str(MAC), addresses=(ip_interface("172.18.0.2/16"),)
)
RED = EngineNetwork(
    id=NETWORK,
    name="red",
    internal=False,
    subnets=(ip_network("172.18.0.0/16"),),
    gateways=(ip_address("172.18.0.1"),),
    endpoints={ENDPOINT: LISTED},
)


def engine(*networks: EngineNetwork) -> Engine:
    return Engine("26.1", {network.id: network for network in networks or (RED,)}, None)


def texts(made: Snapshot) -> list[str]:
    return [difference.text for difference in made.differences]


# --------------------------------------------------------------------------------------------------------- compare


def test_all_agree(plugin: Plugin, tmp_path: Path) -> None:
    made = compare("p", networks(plugin, tmp_path), engine(), host(), {ENDPOINT: SEEN})
    assert texts(made) == []
    (network,) = made.networks
    assert (network.name, [each.name for each in network.interfaces]) == ("red", [BRIDGE])
    (endpoint,) = network.endpoints
    assert (endpoint.name, endpoint.joined, endpoint.inside, list(map(str, endpoint.ports))) == (
        "web",
        True,
        INNER,
        ["0.0.0.0:18080 → 80/tcp"],
    )
    address = next(fact for fact in endpoint.facts if fact.name == "IPv4")
    assert (address.state, address.kernel, address.docker) == ("172.18.0.2/16",) * 3


def changed(**fields: Any) -> dict[str, Any]:
    return fields


def listed(**fields: Any) -> Engine:
    return engine(msgspec.structs.replace(RED, endpoints={ENDPOINT: msgspec.structs.replace(LISTED, **fields)}))


OTHER = msgspec.structs.replace(RED, id=OTHER_NETWORK, name="blue", endpoints={})
CASES = {
    "Docker has lost the endpoint": (
        changed(found=engine(msgspec.structs.replace(RED, endpoints={}))),
        ["Docker does not know it"],
    ),
    "Docker has lost the network": (
        changed(found=engine(OTHER)),
        ["the plugin does not know it", "Docker does not know it"],
    ),
    "the plugin has lost a network": (changed(found=engine(RED, OTHER)), ["the plugin does not know it"]),
    "the plugin has lost an endpoint": (
        changed(
            found=engine(
                msgspec.structs.replace(
                    RED,
                    endpoints={ENDPOINT: LISTED, OTHER_ENDPOINT: msgspec.structs.replace(LISTED, id=OTHER_ENDPOINT)},
                )
            )
        ),
        ["the plugin does not know it"],
    ),
    "another address in Docker": (
        changed(found=listed(addresses=(ip_interface("172.18.0.9/16"),))),
        ["IPv4: state has 172.18.0.2/16, kernel has 172.18.0.2/16, Docker has 172.18.0.9/16"],
    ),
    "another address in the container": (
        changed(seen=NamespaceView({"eth0": msgspec.structs.replace(INNER, addresses=())}, SEEN.gateways)),
        ["IPv4: state has 172.18.0.2/16, kernel has none, Docker has 172.18.0.2/16"],
    ),
    "another MAC address": (
        changed(seen=NamespaceView({"eth0": msgspec.structs.replace(INNER, mac="02:00:00:00:00:01")}, SEEN.gateways)),
        [f"MAC: state has {MAC}, kernel has 02:00:00:00:00:01, Docker has {MAC}"],
    ),
    "another route": (
        changed(seen=NamespaceView(SEEN.interfaces, (ip_address("172.18.0.7"),))),
        ["route: state has 172.18.0.1, kernel has 172.18.0.7"],
    ),
    "no interface in the container": (changed(seen=NamespaceView({})), ["its container has no interface for it"]),
    "no sandbox": (changed(seen=None), ["its sandbox is gone"]),
    "no bridge, and rules for it": (
        changed(here=host(interface(OUTER, link=9), rules={BRIDGE: NETWORK[:12]})),
        [f"its bridge {BRIDGE} is not there"],
    ),
    "the bridge is down": (
        changed(here=host(bridge(up=False), interface(OUTER, link=9, master=BRIDGE))),
        [f"{BRIDGE} is down"],
    ),
    "the bridge has lost its address": (
        changed(here=host(bridge(addresses=()), interface(OUTER, link=9, master=BRIDGE))),
        ["gateway: state has 172.18.0.1, kernel has none, Docker has 172.18.0.1"],
    ),
    "the pair is off its bridge": (
        changed(here=host(bridge(), interface(OUTER, link=9))),
        [f"{OUTER} is on no bridge"],
    ),
    "the pair is down": (
        changed(here=host(bridge(), interface(OUTER, link=9, master=BRIDGE, up=False))),
        [f"{OUTER} is down"],
    ),
    "a port of nobody's": (
        changed(
            here=host(bridge(), interface(OUTER, link=9, master=BRIDGE), interface("ve-aaaaaaaaaaaa", master=BRIDGE))
        ),
        [f"ve-aaaaaaaaaaaa is on {BRIDGE} and belongs to no endpoint"],
    ),
    "nobody listens": (changed(here=host(listeners=())), ["nobody listens on 0.0.0.0:18080"]),
    "somebody listens elsewhere": (
        changed(here=host(listeners=(Listener(TCP, ip_address("127.0.0.1"), 18080),))),
        ["nobody listens on 0.0.0.0:18080"],
    ),
    "somebody listens on all of IPv6": (changed(here=host(listeners=(Listener(TCP, ip_address("::"), 18080),))), []),
    "not internal in Docker": (
        changed(found=engine(msgspec.structs.replace(RED, internal=True))),
        ["internal: state has no, Docker has yes"],
    ),
    "another subnet in Docker": (
        changed(found=engine(msgspec.structs.replace(RED, subnets=(ip_network("10.0.0.0/8"),)))),
        ["subnets: state has 172.18.0.0/16, Docker has 10.0.0.0/8"],
    ),
    "Docker is not asked": (changed(found=None), []),
}


@pytest.mark.parametrize(("changes", "said"), CASES.values(), ids=list(CASES))
def test_what_differs_is_said(plugin: Plugin, tmp_path: Path, changes: dict[str, Any], said: list[str]) -> None:
    three = {"found": engine(), "here": host(), "seen": SEEN, **changes}
    sandboxes = {ENDPOINT: three["seen"]}
    made = compare("p", networks(plugin, tmp_path), three["found"], three["here"], sandboxes)
    assert sorted(texts(made)) == sorted(said)


def test_what_cannot_be_looked_at_is_not_compared(plugin: Plugin, tmp_path: Path) -> None:
    made = compare("p", networks(plugin, tmp_path), engine(), host(), {})
    assert texts(made) == []
    assert "inside" not in [fact.name for fact in made.networks[0].endpoints[0].facts]


def test_a_plugin_without_state_has_what_docker_and_the_kernel_tell() -> None:
    made = compare("p", None, engine(), host(), {ENDPOINT: SEEN})
    assert texts(made) == []
    (network,) = made.networks
    assert [each.name for each in network.interfaces] == [BRIDGE]
    assert network.endpoints[0].inside == INNER
    assert {fact.state for fact in (*network.facts, *network.endpoints[0].facts)} == {None}
    wrong = compare("p", None, listed(addresses=(ip_interface("172.18.0.9/16"),)), host(), {ENDPOINT: SEEN})
    assert texts(wrong) == ["IPv4: kernel has 172.18.0.2/16, Docker has 172.18.0.9/16"]


def test_a_missing_bridge_is_seen_by_those_of_the_others(plugin: Plugin, tmp_path: Path) -> None:
    docker = Docker(plugin)
    docker("CreateNetwork", create_network(OTHER_NETWORK))
    made = compare("p", networks(plugin, tmp_path), None, host(), {ENDPOINT: SEEN})
    assert texts(made) == [f"its bridge br-{OTHER_NETWORK[:12]} is not there"]


def test_a_bridge_of_another_name_is_found_by_its_ports(plugin: Plugin, tmp_path: Path) -> None:
    here = host(bridge("own"), interface(OUTER, link=9, master="own"))
    made = compare("p", networks(plugin, tmp_path), engine(), here, {ENDPOINT: SEEN})
    assert texts(made) == []
    assert [each.name for each in made.networks[0].interfaces] == ["own"]


def test_the_ports_are_those_that_the_driver_has_attached(plugin: Plugin, tmp_path: Path) -> None:
    store = disk.read(tmp_path / "state")
    endpoint = store[NETWORK].endpoints[ENDPOINT]
    published = Published(
        protocol=TCP, host_address=IPv4Address("127.0.0.1"), host_port=40000, address=IPv4Address("172.18.0.2"), port=80
    )
    data = {"Ports": {"published": [published]}}
    endpoint.row = msgspec.structs.replace(endpoint.row, data=encode(data))
    made = compare("p", store, engine(), host(listeners=()), {ENDPOINT: SEEN})
    assert texts(made) == ["nobody listens on 127.0.0.1:40000"]


def test_what_is_half_done_is_said(tmp_path: Path) -> None:
    driver = Publisher()
    with Plugin(driver, state=tmp_path / "state", docker=None) as plugin:
        driver.hooks["create_network"] = lambda _: copy_state(tmp_path / "state", tmp_path / "killed")
        Docker(plugin)("CreateNetwork", create_network())
    made = compare("p", disk.read(tmp_path / "killed"), None, host(bridge()), {})
    assert texts(made) == ["CreateNetwork was begun and is not finished"]


def test_what_passes_is_no_difference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Containers come and go while it looks: what is wrong only once is not."""
    looks = iter([listed(mac="02:00:00:00:00:09"), engine()])
    monkeypatch.setattr(looking, "_look", lambda *_: compare("p", None, next(looks), host(), {ENDPOINT: SEEN}))
    assert texts(looking.take("p", tmp_path, look_again_after=0.0)) == []


def test_what_stays_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = listed(mac="02:00:00:00:00:09")
    monkeypatch.setattr(looking, "_look", lambda *_: compare("p", None, found, host(), {ENDPOINT: SEEN}))
    made = looking.take("p", tmp_path, look_again_after=0.0)
    assert len(made.differences) == 1
    assert [fact.name for fact in made.networks[0].endpoints[0].facts if fact.wrong] == ["MAC"]


# ------------------------------------------------------------------------------------------------------- remembered


def test_the_state_of_a_plugin_that_runs_can_be_read(plugin: Plugin, tmp_path: Path) -> None:
    network = networks(plugin, tmp_path)[NETWORK]
    endpoint = network.endpoints[ENDPOINT]
    assert endpoint.mac_address == MacAddress(MAC)
    assert endpoint.sandbox is not None
    assert endpoint.external is not None
    Docker(plugin)("Leave", {"NetworkID": NETWORK, "EndpointID": ENDPOINT})
    assert networks(plugin, tmp_path)[NETWORK].endpoints[ENDPOINT].sandbox is None


def test_names_are_in_order_with_numbers_by_value() -> None:
    named = [
        msgspec.structs.replace(OTHER, id=f"{n:064x}", name=name) for n, name in enumerate(("n10", "n9", "a", "n"))
    ]
    made = compare("p", None, engine(*named), host(), {})
    assert [network.name for network in made.networks] == ["a", "n", "n9", "n10"]


def test_a_pair_is_found_whatever_its_name() -> None:
    """As of plugins in other languages."""
    inner = msgspec.structs.replace(INNER, link=5)
    here = host(bridge("docker7"), interface("veth1a2b", index=5, link=9, master="docker7"))
    made = compare("p", None, engine(), here, {ENDPOINT: NamespaceView({"eth0": inner})})
    assert texts(made) == []
    (network,) = made.networks
    assert [each.name for each in network.interfaces] == ["docker7"]
    assert network.endpoints[0].outside == here.sight.interfaces["veth1a2b"]


class TooQuick(Exception):
    """It was written all the time."""


def read_soon(folder: Path) -> Mapping[str, StoredNetwork]:
    try:
        return disk.read(folder)
    except Unavailable as error:
        raise TooQuick if "changes too quickly" in str(error) else error from None


def test_a_copy_is_of_one_moment_however_much_is_written(
    plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two networks get the same number in one transaction; the log is moved into the file all the time."""
    Docker(plugin)("CreateNetwork", create_network(OTHER_NETWORK))
    folder = tmp_path / "other"
    folder.mkdir()
    disk._copy(tmp_path / "state", folder)
    done = threading.Event()

    def write() -> None:
        with closing(sqlite3.connect(folder / "state.db", isolation_level=None)) as file:
            file.execute("PRAGMA locking_mode = EXCLUSIVE")
            file.execute("PRAGMA journal_mode = WAL")
            file.execute("PRAGMA synchronous = OFF")
            file.execute("PRAGMA wal_autocheckpoint = 6")
            for number in range(1_000_000):
                if done.is_set():
                    return
                file.execute("UPDATE networks SET data = ?", (json.dumps({"n": number, "pad": "x" * 900}),))
                time.sleep(0.001)

    def slowly(path: Path) -> bytes:
        content = read_bytes(path)
        time.sleep(random.uniform(0, 0.004))
        return content

    random, read_bytes = Random(7), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", slowly)
    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    try:
        while not (folder / "state.db-wal").exists():
            pass
        for _ in range(25):
            with suppress(TooQuick):  # and nothing else may go wrong
                numbers = {json.loads(network.row.data).get("n") for network in read_soon(folder).values()}
                assert len(numbers) == 1
                seen |= numbers
    finally:
        done.set()
        writer.join()
    assert len(seen) > 5, "it was written meanwhile, and read"


def test_no_state_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"there is no .*state\.db"):
        disk.read(tmp_path)


def test_a_damaged_file_is_named_by_its_own_path(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"nonsense" * 200)
    with pytest.raises(Unavailable, match=str(tmp_path / "state.db")):
        disk.read(tmp_path)


def test_the_holder_is_who_has_the_lock_open(plugin: Plugin, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    assert disk.holder(folder) == os.getpid()
    (folder / "lock").write_text("pid 1")  # in a PID namespace of its own
    assert disk.holder(folder) == os.getpid()


def test_a_pid_that_was_left_behind_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(f"pid {os.getpid()}")
    assert disk.holder(tmp_path) is None


def test_endpoints_that_were_not_joined_are_expected_nowhere(tmp_path: Path) -> None:
    with Plugin(Publisher(), state=tmp_path / "state", docker=None) as plugin:
        docker = Docker(plugin)
        docker("CreateNetwork", create_network())
        docker("CreateEndpoint", create_endpoint())
        made = compare("p", networks(plugin, tmp_path), None, host(bridge()), {})
        assert texts(made) == []
        assert not made.networks[0].endpoints[0].joined
        docker("Join", joining())
        assert compare("p", networks(plugin, tmp_path), None, host(bridge()), {}).networks[0].endpoints[0].joined
