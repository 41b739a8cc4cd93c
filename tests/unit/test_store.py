from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from contextlib import closing, suppress
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from pathlib import Path
from typing import Any

import msgspec
import pytest

from netplugin_sdk import (
    Conflict,
    Container,
    Endpoint,
    EndpointInterface,
    MacAddress,
    Network,
    NotFound,
    Plugin,
    PortMapping,
    TransportProtocol,
    Unavailable,
)
from netplugin_sdk.core import store as store_module
from netplugin_sdk.core.store import Store, StoredEndpoint, StoredNetwork
from netplugin_sdk.database import Folder
from netplugin_sdk.protocol import messages as m
from netplugin_sdk.values import IPInterface

from ..patience import PATIENCE
from .lab import (
    ENDPOINT,
    MAC,
    NETWORK,
    OTHER_NETWORK,
    SANDBOX,
    Docker,
    Options,
    Publisher,
    Recorder,
    create_endpoint,
    create_network,
    joining,
    of,
    publishing,
)


def new_network(store: Store[Options], network: str = NETWORK, **options: str) -> StoredNetwork[Options]:
    body = json.dumps(create_network(network, internal=False, **options)).encode()
    made = store.new_network(m.decode(m.CreateNetwork, body), body)
    store.done(made)
    return made


def new_endpoint(store: Store[Options], network: str = NETWORK, endpoint: str = ENDPOINT) -> StoredEndpoint:
    body = json.dumps(create_endpoint(network, endpoint)).encode()
    made = store.new_endpoint(store.networks[network], m.decode(m.CreateEndpoint, body), body)
    store.done(made)
    return made


def rows(folder: Path, table: str, columns: str = "*") -> list[Any]:
    with sqlite3.connect(folder / "state.db") as db:
        found = db.execute(f"SELECT {columns} FROM {table} ORDER BY id").fetchall()
    db.close()
    return found


# What is remembered


def test_networks_and_endpoints_survive_reopening(tmp_path: Path) -> None:
    with Plugin(Publisher(), state=tmp_path) as plugin:
        docker = Docker(plugin)
        docker("CreateNetwork", create_network(mtu="1400", parent="eth0"))
        docker("CreateNetwork", create_network(OTHER_NETWORK))
        docker.run()
        docker("ProgramExternalConnectivity", publishing())
    store = Store(tmp_path, Options)
    assert set(store.networks) == {NETWORK, OTHER_NETWORK}
    network = store.networks[NETWORK]
    assert network.options == Options(mtu=1400, parent="eth0")
    assert network.gateways == (ip_interface("172.18.0.1/16"),)
    assert network.subnets == (ip_network("172.18.0.0/16"),)
    assert network.internal is False
    endpoint = network.endpoints[ENDPOINT]
    assert endpoint.network_id == NETWORK
    assert endpoint.addresses == (ip_interface("172.18.0.2/16"),)
    assert (endpoint.requested.mac_address, endpoint.mac_address) == (None, MAC)
    assert endpoint.sandbox is not None
    assert endpoint.sandbox.key == SANDBOX
    assert endpoint.external is not None
    assert [mapping.host_port for mapping in endpoint.external.port_map] == [18080]
    assert store.networks[OTHER_NETWORK].endpoints == {}
    store.close()


def test_an_address_that_the_driver_filled_in_is_the_endpoints(tmp_path: Path) -> None:
    """Of the other IP version than the engine's; and after a restart."""

    class Filling(Recorder):
        def create_endpoint(self, network: Network[Options], endpoint: Endpoint) -> EndpointInterface:
            return EndpointInterface(address_ipv6=IPv6Interface("fd00::2/64"))

    for _ in range(2):
        driver = Filling()
        with Plugin(driver, state=tmp_path) as plugin:
            Docker(plugin)("CreateNetwork", create_network())
            Docker(plugin)("CreateEndpoint", create_endpoint())
            endpoint = driver.networks[NETWORK].endpoints[ENDPOINT]
            assert endpoint.addresses == (ip_interface("172.18.0.2/16"), ip_interface("fd00::2/64"))


def test_what_was_deleted_stays_deleted(tmp_path: Path) -> None:
    with Plugin(Recorder(), state=tmp_path) as plugin:
        docker = Docker(plugin)
        for network in (NETWORK, OTHER_NETWORK):
            docker("CreateNetwork", create_network(network))
        docker.run()
        docker("Leave", of(NETWORK, ENDPOINT))
        docker("DeleteEndpoint", of(NETWORK, ENDPOINT))
        docker("DeleteNetwork", of(OTHER_NETWORK))
    store = Store(tmp_path, Options)
    assert {id_: set(network.endpoints) for id_, network in store.networks.items()} == {NETWORK: set()}
    store.close()


def test_the_list_of_endpoints_is_for_reading() -> None:
    network = new_network(Store(None, Options))
    with pytest.raises(TypeError):
        network.endpoints[ENDPOINT] = None  # type: ignore[index]


def test_the_null_ipam_driver_gives_no_subnet() -> None:
    store = Store(None, Options)
    body = json.dumps({"NetworkID": NETWORK, "IPv4Data": [{"AddressSpace": "null", "Pool": "0.0.0.0/0"}]}).encode()
    network = store.new_network(m.decode(m.CreateNetwork, body), body)
    assert (network.subnets, network.gateways, len(network.ipam)) == ((), (), 1)


@pytest.mark.parametrize("prefix", ["", "abc", "veth"])
def test_an_interface_name_must_fit_the_kernel(prefix: str) -> None:
    network = new_network(Store(None, Options))
    with pytest.raises(ValueError, match="1 or 2 characters"):
        network.interface_name(prefix)


def test_an_interface_name_follows_from_the_id() -> None:
    store = Store(None, Options)
    network = new_network(store)
    assert network.interface_name("br") == f"br-{NETWORK[:12]}"
    assert new_endpoint(store).interface_name("v") == f"v-{ENDPOINT[:12]}"
    assert len(network.interface_name("br")) == 15


def test_the_next_version_finds_the_interfaces_of_this_one() -> None:
    store = Store(None, Options)
    network, endpoint = new_network(store), new_endpoint(store)
    assert (network.interface_name("br"), network.interface_group) == ("br-ca75b6ab4104", 0x714ABA76)
    assert (endpoint.interface_name("v"), endpoint.interface_group) == ("v-a8de4ba19c93", 0x77A9389E)


def test_while_it_is_made_an_endpoint_has_the_addresses_that_the_engine_gave() -> None:
    store = Store(None, Options)
    new_network(store)
    endpoint = new_endpoint(store)
    assert endpoint.interface == endpoint.requested
    assert endpoint.addresses == (ip_interface("172.18.0.2/16"),)


def test_a_group_of_interfaces_follows_from_the_id_whatever_that_is() -> None:
    store = Store(None, Options)
    network, endpoint = new_network(store), new_endpoint(store)
    assert network.interface_group == new_network(Store(None, Options)).interface_group
    assert network.interface_group != endpoint.interface_group
    for each in (network, endpoint):
        assert 0x70000000 <= each.interface_group < 0x80000000, "the kernel's are signed"


def test_nodes_that_are_forgotten_are_known_no_more(tmp_path: Path) -> None:
    store = Store(tmp_path, Options)
    for address in ("10.0.0.2", "10.0.0.3"):
        store.save_node(address, b"{}")
    store.forget_node("10.0.0.2")
    assert set(store.nodes) == {"10.0.0.3"}
    store.close()
    store = Store(tmp_path, Options)
    assert set(store.nodes) == {"10.0.0.3"}
    store.close()


# Attached data


@dataclass
class Leases:
    given: dict[str, IPv4Address] = field(default_factory=dict)
    subnet: IPv4Network | None = None
    mac: MacAddress | None = None


class Tunnel(msgspec.Struct):
    vni: int
    remote: IPv4Interface
    subnets: tuple[IPv6Network, ...] = ()


@dataclass
class Nested:
    leases: Leases
    protocol: TransportProtocol


LEASES = Leases({"a": IPv4Address("10.0.0.2")}, IPv4Network("10.0.0.0/8"), MAC)
TUNNEL = Tunnel(7, IPv4Interface("192.0.2.1/24"), (IPv6Network("fd00::/64"),))


def test_attached_data_survives_reopening(tmp_path: Path) -> None:
    store = Store(tmp_path, Options)
    network, endpoint = new_network(store), new_endpoint(store)
    network.attach(LEASES)
    network.attach(TUNNEL)
    endpoint.attach(Nested(LEASES, TransportProtocol.UDP))
    store.close()
    store = Store(tmp_path, Options)
    network = store.networks[NETWORK]
    assert network.attached(Leases) == LEASES
    assert network.attached(Tunnel) == TUNNEL
    assert network.attached(Nested) is None
    assert network.endpoints[ENDPOINT].attached(Nested) == Nested(LEASES, TransportProtocol.UDP)
    store.close()


def test_attaching_replaces_what_was_attached_of_its_class() -> None:
    network = new_network(Store(None, Options))
    network.attach(TUNNEL)
    network.attach(LEASES)
    network.attach(Leases())
    assert network.attached(Leases) == Leases()
    assert network.attached(Tunnel) == TUNNEL


@dataclass
class EitherVersion:
    gateways: tuple[IPInterface, ...]


@dataclass
class Mappings:
    ports: tuple[PortMapping, ...]


@dataclass
class ByNumber:
    names: dict[int, str]


MAPPING = PortMapping(protocol=TransportProtocol.TCP, container_port=80, host_address=ip_address("127.0.0.1"))


@pytest.mark.parametrize(
    "data",
    [
        EitherVersion((ip_interface("172.18.0.1/16"), ip_interface("fd00::1/64"))),
        Mappings((MAPPING,)),
        ByNumber({4097: "blue"}),
    ],
    ids=lambda data: type(data).__name__,
)
def test_what_can_be_attached_can_be_read_again(data: object) -> None:
    network = new_network(Store(None, Options))
    network.attach(data)
    assert network.attached(type(data)) == data


@dataclass
class Unfit:
    thing: object


def test_what_has_no_json_form_cannot_be_attached() -> None:
    network = new_network(Store(None, Options))
    with pytest.raises(TypeError, match="an answer cannot hold"):
        network.attach(Unfit(object()))
    assert network.attached(Unfit) is None


def test_attaching_to_what_is_deleted_does_not_bring_it_back(tmp_path: Path) -> None:
    store = Store(tmp_path, Options)
    network, endpoint = new_network(store), new_endpoint(store)
    store.gone(endpoint)
    with pytest.raises(NotFound):
        endpoint.attach(LEASES)
    store.gone(network)
    with pytest.raises(NotFound):
        network.attach(LEASES)
    assert store.networks == {}
    store.close()
    assert (rows(tmp_path, "networks"), rows(tmp_path, "endpoints")) == ([], [])


def test_what_is_deleted_cannot_write_into_what_came_after_it(tmp_path: Path) -> None:
    # SQLite gives the number of a deleted row to the next one.
    store = Store(tmp_path, Options)
    gone = new_network(store)
    store.gone(gone)
    new_network(store, OTHER_NETWORK).attach(LEASES)
    with suppress(NotFound):
        gone.attach(TUNNEL)
    store.close()
    store = Store(tmp_path, Options)
    (network,) = store.networks.values()
    assert (network.id, network.attached(Leases), network.attached(Tunnel)) == (OTHER_NETWORK, LEASES, None)
    store.close()


def test_attaching_from_a_thread_of_the_author_loses_nothing_of_a_call(tmp_path: Path) -> None:
    store = Store(tmp_path, Options)
    network = new_network(store)
    rounds, meet = 300, threading.Barrier(2)
    failures: list[BaseException] = []

    def attach() -> None:
        try:
            for number in range(rounds):
                meet.wait(PATIENCE)
                network.attach(Tunnel(number, TUNNEL.remote))
        except BaseException as error:
            failures.append(error)
            meet.abort()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    author = threading.Thread(target=attach)
    author.start()
    try:
        for number in range(rounds):
            meet.wait(PATIENCE)
            if number % 2:
                store.intend(network, "CreateNetwork")
            else:
                store.done(network)
    finally:
        author.join(PATIENCE)
        sys.setswitchinterval(interval)
    assert not failures
    tunnel = network.attached(Tunnel)
    assert tunnel is not None
    assert tunnel.vni == rounds - 1
    store.close()
    assert rows(tmp_path, "networks", "intent, data") == [(network.row.intent, network.row.data)]


# The folder


def test_the_folder_is_made_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "var" / "l2"
    Folder(folder).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "lock").stat().st_mode) == 0o600


def test_a_second_holder_is_told_who_has_the_folder(tmp_path: Path) -> None:
    first = Folder(tmp_path)
    with pytest.raises(Conflict, match=f"is in use by pid {os.getpid()}$"):
        Folder(tmp_path)
    first.close()
    first.close()
    Folder(tmp_path).close()


def test_another_process_that_holds_the_folder_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from netplugin_sdk.database import Folder; "
        "folder = Folder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(Conflict, match=f"is in use by pid {holder.pid}$"):
            Folder(tmp_path)
    Folder(tmp_path).close()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match=r"cannot use the state folder .*/file/l2: Not a directory"):
        Folder(tmp_path / "file" / "l2")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc, which nobody can write to")
def test_a_folder_that_cannot_be_written() -> None:
    # root may write anywhere else
    with pytest.raises(Unavailable, match="cannot use the state folder /proc/self"):
        Folder(Path("/proc/self"))


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"something else, " * 100)
    with pytest.raises(Unavailable, match=r"cannot use the state file .*state.db: file is not a database"):
        Store(tmp_path, Options)
    assert (tmp_path / "state.db").read_bytes() == b"something else, " * 100
    (tmp_path / "state.db").unlink()
    Store(tmp_path, Options).close()


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "state.db").mkdir()
    with pytest.raises(Unavailable, match="unable to open database file"):
        Store(tmp_path, Options)


def test_another_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "state.db") as db:
        db.execute("CREATE TABLE networks (later TEXT)")
        db.execute("PRAGMA user_version = 4")
    db.close()
    before = (tmp_path / "state.db").read_bytes()
    with pytest.raises(Unavailable, match="has version 4 and this SDK knows versions up to 3; it is left as it is"):
        Store(tmp_path, Options)
    assert {path.name for path in tmp_path.iterdir()} == {"state.db"}
    assert (tmp_path / "state.db").read_bytes() == before


RENAMED = "ALTER TABLE networks RENAME COLUMN data TO extra;"


def test_an_older_file_is_brought_up_to_date_and_kept_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, Options)
    network = new_network(store)
    network.attach(TUNNEL)
    store.close()
    monkeypatch.setattr(store_module, "_MIGRATIONS", (*store_module._MIGRATIONS, RENAMED, "CREATE TABLE later (a);"))
    store = Store(tmp_path, Options)
    assert store.networks[network.id].attached(Tunnel) == TUNNEL
    store.close()
    assert rows(tmp_path, "networks", "id, extra") == [(network.id, network.row.data)]
    with closing(sqlite3.connect(tmp_path / "state.db.version-3")) as kept:
        assert kept.execute("PRAGMA user_version").fetchone() == (3,)
        assert kept.execute("SELECT id, data FROM networks").fetchall() == [(network.id, network.row.data)]
    Store(tmp_path, Options).close()
    monkeypatch.undo()
    with pytest.raises(Unavailable, match="has version 5 and this SDK knows versions up to 3; it is left as it is"):
        Store(tmp_path, Options)


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, Options)
    network = new_network(store)
    store.close()
    with monkeypatch.context() as patched:
        patched.setattr(
            store_module, "_MIGRATIONS", (*store_module._MIGRATIONS, f"{RENAMED} INSERT INTO missing VALUES (1);")
        )
        with pytest.raises(Unavailable, match=r"cannot use the state file .*state.db: no such table: missing"):
            Store(tmp_path, Options)
    store = Store(tmp_path, Options)
    assert set(store.networks) == {network.id}
    store.close()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE networks SET request = '{'",
        "UPDATE endpoints SET request = X'FF'",
    ],
)
def test_a_damaged_file_is_unavailable_by_its_name(damage: str, tmp_path: Path) -> None:
    store = Store(tmp_path, Options)
    new_network(store)
    new_endpoint(store)
    store.close()
    with sqlite3.connect(tmp_path / "state.db") as db:
        db.execute(damage)
    db.close()
    with pytest.raises(Unavailable, match=r"state\.db"):
        Store(tmp_path, Options)


def test_an_endpoint_without_its_network_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No order of failures makes such a file; one of an older version must not keep the plugin from starting."""
    store = Store(tmp_path, Options)
    new_network(store)
    new_network(store, OTHER_NETWORK)
    store.joined(new_endpoint(store), b"{}", b"{}")
    store.close()
    with closing(sqlite3.connect(tmp_path / "state.db")) as db, db:
        db.execute("DELETE FROM networks WHERE id = ?", (NETWORK,))
    store = Store(tmp_path, Options)
    assert set(store.networks) == {OTHER_NETWORK}
    assert f"has endpoint {ENDPOINT[:12]}, and not its network {NETWORK[:12]}: ignored" in caplog.text
    new_network(store)
    store.close()


def test_a_networks_row_goes_after_those_of_its_endpoints(tmp_path: Path) -> None:
    """Whatever fails, and in whatever order they go."""
    for first_gone in ("network", "endpoint"):
        (tmp_path / first_gone).mkdir()
        store = Store(tmp_path / first_gone, Options)
        network, endpoint = new_network(store), new_endpoint(store)
        store.going(endpoint)
        store.going(network)
        assert store.networks == {}
        if first_gone == "network":
            store.gone(network)
            store.close()
            assert [len(rows(tmp_path / first_gone, table)) for table in ("networks", "endpoints")] == [1, 1]
            store = Store(tmp_path / first_gone, Options)  # the next start finds both
            network, endpoint = store.networks[NETWORK], store.networks[NETWORK].endpoints[ENDPOINT]
            store.going(endpoint)
            store.gone(network)
            store.gone(endpoint)
        else:
            store.gone(endpoint)
            store.gone(network)
        store.close()
        assert [rows(tmp_path / first_gone, table) for table in ("networks", "endpoints")] == [[], []]


def test_what_docker_told_is_no_data_of_the_authors(tmp_path: Path) -> None:
    """An older file has it there, under names that an author's classes may have."""
    store = Store(tmp_path, Options)
    new_network(store).attach(TUNNEL)
    new_endpoint(store)
    store.close()
    container: dict[str, Any] = {"id": "c" * 64, "name": "web", "image": "busybox", "labels": {"a": "b"}}
    with closing(sqlite3.connect(tmp_path / "state.db")) as db, db:
        for table, column in (("networks", "engine"), ("endpoints", "container")):
            db.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        db.execute("UPDATE networks SET data = json_set(data, '$.Listed', json(?))", (json.dumps({"engine": "e1"}),))
        data = json.dumps({"Container": container, "Port": {"number": 80}}).encode()
        db.execute("UPDATE endpoints SET data = ?", (data,))
        db.execute("PRAGMA user_version = 2")
    store = Store(tmp_path, Options)
    network = store.networks[NETWORK]
    assert (network.row.engine, network.attached(Tunnel)) == ("e1", TUNNEL)
    endpoint = network.endpoints[ENDPOINT]
    assert endpoint.container == Container(**container)
    store.close()
    assert rows(tmp_path, "endpoints", "data") == [(b'{"Port":{"number":80}}',)]


def test_a_closed_store_cannot_be_written(tmp_path: Path) -> None:
    store = Store(tmp_path, Options)
    network = new_network(store)
    store.close()
    store.close()
    with pytest.raises(Unavailable, match="cannot write the plugin's state"):
        network.attach(TUNNEL)
    assert network.attached(Tunnel) is None


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path, Options)
    store.close()
    with pytest.raises(Unavailable):
        new_network(store)
    assert store.networks == {}


def test_in_memory_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Plugin(Recorder()) as plugin, Plugin(Recorder()) as another:
        Docker(plugin)("CreateNetwork", create_network())
        Docker(plugin).run()
        assert Docker(another).refused("CreateEndpoint", create_endpoint())[0] == 422
    assert list(tmp_path.iterdir()) == []


# A process that is killed

STEPS = {
    "create_network": [("CreateNetwork", create_network())],
    "create_endpoint": [("CreateNetwork", create_network()), ("CreateEndpoint", create_endpoint())],
    "join": [
        ("CreateNetwork", create_network()),
        ("CreateEndpoint", create_endpoint()),
        ("Join", joining()),
    ],
    "leave": [
        ("CreateNetwork", create_network()),
        ("CreateEndpoint", create_endpoint()),
        ("Join", joining()),
        ("Leave", of(NETWORK, ENDPOINT)),
    ],
    "delete_endpoint": [
        ("CreateNetwork", create_network()),
        ("CreateEndpoint", create_endpoint()),
        ("DeleteEndpoint", of(NETWORK, ENDPOINT)),
    ],
    "delete_network": [("CreateNetwork", create_network()), ("DeleteNetwork", of(NETWORK))],
}

VICTIM = """
import json, sys
from netplugin_sdk import Join, NetworkDriver, Plugin

folder, dies_in, steps = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])


def method(name):
    def run(self, *_):
        if name == dies_in:
            print("inside", flush=True)
            sys.stdin.read()
        return Join() if name == "join" else None
    return run


names = ("create_network", "delete_network", "create_endpoint", "delete_endpoint", "join", "leave")
driver = type("Victim", (NetworkDriver,), {name: method(name) for name in names})()
plugin = Plugin(driver, state=folder)
for name, request in steps:
    answer = plugin.handle(f"/NetworkDriver.{name}", json.dumps(request).encode())
    assert answer.status == 200, answer
print("done", flush=True)
sys.stdin.read()
"""


def kill_victim(folder: Path, dies_in: str, steps: list[tuple[str, dict[str, Any]]], *, when: bytes) -> None:
    """Run `VICTIM`, and kill it when it says this."""
    with subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(folder), dies_in, json.dumps(steps)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == when
        victim.send_signal(signal.SIGKILL)
        assert victim.wait(PATIENCE) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("dies_in", "networks", "endpoints"),
    [
        ("create_network", [(NETWORK, "CreateNetwork")], []),
        ("create_endpoint", [(NETWORK, None)], [(ENDPOINT, "CreateEndpoint", 0)]),
        ("leave", [(NETWORK, None)], [(ENDPOINT, "Leave", 1)]),
        ("delete_endpoint", [(NETWORK, None)], [(ENDPOINT, "DeleteEndpoint", 0)]),
        ("delete_network", [(NETWORK, "DeleteNetwork")], []),
    ],
)
def test_a_killed_process_leaves_what_it_was_at(
    dies_in: str, networks: list[Any], endpoints: list[Any], tmp_path: Path
) -> None:
    kill_victim(tmp_path, dies_in, STEPS[dies_in], when=b"inside\n")
    Store(tmp_path, Options).close()
    assert rows(tmp_path, "networks", "id, intent") == networks
    joined = "EXISTS (SELECT 1 FROM joins WHERE joins.key = endpoints.key)"
    assert rows(tmp_path, "endpoints", f"id, intent, {joined}") == endpoints


def test_what_was_answered_is_on_disk_when_the_process_is_killed(tmp_path: Path) -> None:
    kill_victim(tmp_path, "", STEPS["join"], when=b"done\n")
    store = Store(tmp_path, Options)
    endpoint = store.networks[NETWORK].endpoints[ENDPOINT]
    assert (endpoint.row.intent, store.networks[NETWORK].row.intent) == (None, None)
    assert endpoint.sandbox is not None
    store.close()
