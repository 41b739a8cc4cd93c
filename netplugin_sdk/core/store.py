"""The state that a plugin must not forget: networks, endpoints, the author's data, and the swarm's nodes and numbers.

One SQLite file per plugin. A row is written *before* the author's method runs, with the operation's name in its column
``intent``, and again when the method has returned, before the answer goes out, with ``intent`` NULL. So after a crash
at any point the rows with an intent are exactly the half-done operations.

    intend      a row with an intent: it is new, or something is about to be done to it
    done        no intent: the operation is done. One that fails and cannot be undone keeps its intent: half done
    going       gone for everybody, but still in the file, since work is left to do
    gone        out of the file

`Store` is the only writer, and each of these transitions is one method of it. The file is read once, when
it is opened; from then on the objects in memory are asked and the file is only written.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Literal, TypeAlias

import msgspec
from typing_extensions import override

from netplugin_sdk.database import Database
from netplugin_sdk.errors import InvalidRequest, NotFound, Unavailable
from netplugin_sdk.network import Endpoint, Network, OptionsT, Sandbox
from netplugin_sdk.protocol import messages
from netplugin_sdk.protocol.messages import EndpointInterface, EndpointOptions
from netplugin_sdk.values import Container

_log = logging.getLogger("netplugin_sdk")

Operation: TypeAlias = Literal[
    "CreateNetwork",
    "DeleteNetwork",
    "CreateEndpoint",
    "DeleteEndpoint",
    "Join",
    "Leave",
    "ProgramExternalConnectivity",
    "RevokeExternalConnectivity",
]

_SCHEMA = """
CREATE TABLE networks (
    key INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    request BLOB NOT NULL,
    intent TEXT,
    data BLOB NOT NULL
);
CREATE TABLE endpoints (
    key INTEGER PRIMARY KEY,
    network_id TEXT NOT NULL,
    id TEXT NOT NULL,
    request BLOB NOT NULL,
    intent TEXT,
    answer BLOB,
    external_request BLOB,
    data BLOB NOT NULL
);
CREATE TABLE joins (
    key INTEGER PRIMARY KEY,
    request BLOB NOT NULL,
    answer BLOB NOT NULL
);
"""
_SWARM = """
CREATE TABLE allocations (
    network_id TEXT PRIMARY KEY,
    request BLOB NOT NULL,
    answer BLOB NOT NULL
);
CREATE TABLE nodes (
    address TEXT PRIMARY KEY,
    request BLOB NOT NULL
);
"""
# Facts from Docker stood among the author's data, under names that an author's classes may have, too.
_DOCKER = """
ALTER TABLE networks ADD COLUMN engine TEXT;
ALTER TABLE endpoints ADD COLUMN container BLOB;
UPDATE networks
    SET engine = json_extract(CAST(data AS TEXT), '$.Listed.engine'),
        data = CAST(json_remove(CAST(data AS TEXT), '$.Listed') AS BLOB)
    WHERE json_extract(CAST(data AS TEXT), '$.Listed.engine') IS NOT NULL;
UPDATE endpoints
    SET container = CAST(json_extract(CAST(data AS TEXT), '$.Container') AS BLOB),
        data = CAST(json_remove(CAST(data AS TEXT), '$.Container') AS BLOB)
    WHERE json_extract(CAST(data AS TEXT), '$.Container.image') IS NOT NULL;
"""
_MIGRATIONS = (_SCHEMA, _SWARM, _DOCKER)

_NOT_READ = b""  # is no answer


class NetworkRow(msgspec.Struct, frozen=True):
    """A network on disk: requests and answers as they crossed the wire."""

    table: ClassVar[str] = "networks"
    # Networks outlive a power cut; endpoints end with the containers that it kills.
    synced: ClassVar[bool] = True

    key: int | None  # SQLite gives it
    id: str
    request: bytes
    intent: Operation | None = None
    data: bytes = b"{}"
    engine: str | None = None


class EndpointRow(msgspec.Struct, frozen=True):
    """An endpoint on disk. It is external while it has an `external_request`."""

    table: ClassVar[str] = "endpoints"
    synced: ClassVar[bool] = False

    key: int | None  # SQLite gives it
    network_id: str
    id: str
    request: bytes
    intent: Operation | None = None
    answer: bytes | None = None
    external_request: bytes | None = None
    data: bytes = b"{}"
    container: bytes | None = None


class JoinRow(msgspec.Struct, frozen=True):
    """A join on disk, under the key of its endpoint.

    A row of its own, since a row that grows costs SQLite twice as much as a new one.
    """

    key: int | None
    request: bytes
    answer: bytes


class AllocationRow(msgspec.Struct, frozen=True):
    """The options that a network of the swarm is allocated, on disk on the managers that were asked.

    It is no `NetworkRow`: a manager need not run the network, a node that runs it need not be a manager, and the two
    end by different calls.
    """

    network_id: str
    request: bytes
    answer: bytes


class NodeRow(msgspec.Struct, frozen=True):
    """A node of the swarm on disk, this one or another."""

    address: str
    request: bytes


class StoredNetwork(Network[OptionsT]):
    """A network with its row. `Store` alone changes it."""

    def __init__(
        self, store: Store[OptionsT], row: NetworkRow, request: messages.CreateNetwork, options_type: type[OptionsT]
    ) -> None:
        self.row = row
        """The columns on disk."""
        self.going: set[StoredEndpoint] = set()
        """Endpoints that only the file still has."""
        self.is_gone = False
        """Whether its row waits for those of the endpoints that are going, and goes with the last of them."""
        super().__init__(request, options_type)
        self._store = store
        self._endpoints: Mapping[str, StoredEndpoint] = MappingProxyType({})

    @property
    @override
    def endpoints(self) -> Mapping[str, StoredEndpoint]:
        return self._endpoints

    def show(self, endpoint: StoredEndpoint, *, listed: bool) -> None:
        """Put the endpoint into the list, or take it out. A mapping that was read before does not change."""
        endpoints = {**self._endpoints}
        if listed:
            endpoints[endpoint.id] = endpoint
        else:
            del endpoints[endpoint.id]
        self._endpoints = MappingProxyType(endpoints)

    @override
    def _keep(self, name: str, data: object) -> None:
        self._store.attach(self, name, data)

    @override
    def _kept(self, name: str) -> msgspec.Raw | None:
        return attached(self.row).get(name)


class StoredEndpoint(Endpoint):
    """An endpoint with its rows. `Store` alone changes it."""

    def __init__(
        self, store: Store[Any], network: StoredNetwork[Any], row: EndpointRow, request: messages.CreateEndpoint
    ) -> None:
        self.row = row
        """The columns on disk."""
        self.join: JoinRow | None = None
        """While it is in a sandbox."""
        self.may_be_joined = row.key is not None
        """Whether there may be something for `leave` to undo: a join, or half of one, as always after a restart."""
        self.network: StoredNetwork[Any] = network
        super().__init__(request)
        self._store = store
        self._answer: bytes | None = _NOT_READ  # of which `_interface` is made
        self._interface = request.interface

    @property
    @override
    def interface(self) -> EndpointInterface:
        if self.row.answer is not None and self.row.answer is not self._answer:
            self._answer = self.row.answer
            asked = self.requested
            filled = messages.decode(messages.CreateEndpointAnswer, self._answer).interface
            self._interface = EndpointInterface(
                address=asked.address or filled.address,
                address_ipv6=asked.address_ipv6 or filled.address_ipv6,
                mac_address=asked.mac_address or filled.mac_address,
            )
        return self._interface

    @property
    @override
    def sandbox(self) -> Sandbox | None:
        if self.join is None:
            return None
        request = messages.decode(messages.JoinRequest, self.join.request)
        return Sandbox(request.sandbox_key, request.options)

    @property
    @override
    def container(self) -> Container | None:
        return None if self.row.container is None else msgspec.json.decode(self.row.container, type=Container)

    @property
    @override
    def external(self) -> EndpointOptions | None:
        if self.row.external_request is None:
            return None
        return messages.decode(messages.ProgramExternalConnectivity, self.row.external_request).options

    @override
    def _keep(self, name: str, data: object) -> None:
        self._store.attach(self, name, data)

    @override
    def _kept(self, name: str) -> msgspec.Raw | None:
        return attached(self.row).get(name)


def attached(row: NetworkRow | EndpointRow) -> dict[str, msgspec.Raw]:
    """The author's attached data: JSON by the name of its class."""
    return msgspec.json.decode(row.data, type=dict[str, msgspec.Raw])


class Store(Generic[OptionsT]):
    """The networks of one plugin and the file that they are kept in. For any thread.

    `folder` None keeps them in memory only; otherwise this process holds it. `options_type` is the class of
    `Network.options`. Every change is written to the file before it is made in memory.

    Raises `Unavailable` if the file cannot be used; the text says why. So do all methods that write: nothing has
    changed then.
    """

    def __init__(self, folder: Path | None, options_type: type[OptionsT]) -> None:
        self.networks: Mapping[str, StoredNetwork[OptionsT]] = MappingProxyType({})
        """By id, as they are now: a mapping that was read does not change."""
        self.allocations: dict[str, AllocationRow] = {}
        """By the id of the network."""
        self.nodes: dict[str, NodeRow] = {}
        """By address."""
        self._options_type = options_type
        self._lock = threading.Lock()
        self._database = Database(None if folder is None else folder / "state.db", _MIGRATIONS)
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        try:
            networks: dict[str, StoredNetwork[OptionsT]] = {}
            for values in self._database.read("SELECT * FROM networks ORDER BY key"):
                row = NetworkRow(*values)
                request = messages.decode(messages.CreateNetwork, row.request)
                # Of two with one id, the older was going when a swarm's network was made again; the newer replaces it.
                networks[row.id] = StoredNetwork(self, row, request, self._options_type)
            self.networks = MappingProxyType(networks)
            listed: dict[int | None, StoredEndpoint] = {}
            for values in self._database.read("SELECT * FROM endpoints"):
                endpoint = EndpointRow(*values)
                asked = messages.decode(messages.CreateEndpoint, endpoint.request)
                if (network := networks.get(endpoint.network_id)) is None:
                    _log.warning(
                        "the state file %s has endpoint %s, and not its network %s: ignored",
                        self._database.name,
                        endpoint.id[:12],
                        endpoint.network_id[:12],
                    )
                    continue
                listed[endpoint.key] = StoredEndpoint(self, network, endpoint, asked)
            for at in listed.values():
                at.network.show(at, listed=True)
            for values in self._database.read("SELECT * FROM joins"):
                join = JoinRow(*values)
                if (joined := listed.get(join.key)) is not None:
                    joined.join = join
            for values in self._database.read("SELECT * FROM allocations"):
                allocation = AllocationRow(*values)
                self.allocations[allocation.network_id] = allocation
            for values in self._database.read("SELECT * FROM nodes"):
                node = NodeRow(*values)
                self.nodes[node.address] = node
        except InvalidRequest as error:
            file = self._database.name
            raise Unavailable(f"the state file {file} is damaged, and left as it is: {error}") from error

    def new_network(self, request: messages.CreateNetwork, body: bytes) -> StoredNetwork[OptionsT]:
        """A network that is neither saved nor listed yet. `body` is the request as it came."""
        return StoredNetwork(self, NetworkRow(None, request.network_id, body), request, self._options_type)

    def new_endpoint(
        self, network: StoredNetwork[OptionsT], request: messages.CreateEndpoint, body: bytes
    ) -> StoredEndpoint:
        """An endpoint that is neither saved nor listed yet. `body` is the request as it came."""
        return StoredEndpoint(self, network, EndpointRow(None, network.id, request.endpoint_id, body), request)

    # ----------------------------------------------------------------------------------------------- transitions

    def intend(
        self, record: StoredNetwork[Any] | StoredEndpoint, operation: Operation, **columns: bytes | None
    ) -> None:
        """Write down which operation is about to run, and these columns of the row; list the record if it is new."""
        with self._lock:
            self._write(record, intent=operation, **columns)

    def done(self, record: StoredNetwork[Any] | StoredEndpoint, **columns: bytes | None) -> None:
        """Write down that the intended operation is done, and these columns of the row."""
        with self._lock:
            self._write(record, intent=None, **columns)

    def joined(self, endpoint: StoredEndpoint, request: bytes, answer: bytes) -> None:
        """Write down that the endpoint is in a sandbox."""
        join = JoinRow(endpoint.row.key, request, answer)
        with self._lock:
            self._database.write("INSERT OR REPLACE INTO joins VALUES (?, ?, ?)", msgspec.structs.astuple(join))
            endpoint.join = join

    def left(self, endpoint: StoredEndpoint) -> None:
        """Write down that the endpoint is in no sandbox."""
        with self._lock:
            self._database.write("DELETE FROM joins WHERE key = ?", (endpoint.row.key,))
            endpoint.join, endpoint.may_be_joined = None, False

    def going(self, record: StoredNetwork[Any] | StoredEndpoint) -> None:
        """Take the record from the list: for everybody it is gone, and only the file still has it."""
        with self._lock:
            if isinstance(record, StoredEndpoint):
                record.network.going.add(record)
            self._unlist(record)

    def gone(self, record: StoredNetwork[Any] | StoredEndpoint) -> None:
        """Delete the record from the list and from the file.

        A network's row goes after those of its endpoints: where one of them could not be deleted, the next start finds
        both.
        """
        with self._lock:
            if isinstance(record, StoredEndpoint):
                self._delete(record)
                record.network.going.discard(record)
                if record.network.is_gone and not record.network.going:
                    self._delete(record.network)
            elif record.going:
                record.is_gone = True
            else:
                self._delete(record)
            self._unlist(record)

    def seen_by(self, network: StoredNetwork[Any], engine: str) -> None:
        """Write down that an engine has listed the network. Nothing, if it has been deleted."""
        with self._lock:
            if self.lists(network):
                self._write(network, engine=engine)

    def is_in(self, endpoint: StoredEndpoint, container: Container) -> None:
        """Write down which container the endpoint is in. Nothing, if it has been deleted."""
        with self._lock:
            if self.lists(endpoint):
                self._write(endpoint, container=msgspec.json.encode(container))

    def attach(self, record: StoredNetwork[Any] | StoredEndpoint, name: str, data: object) -> None:
        """Write attached data down. Raises `NotFound` if the record has been deleted."""
        with self._lock:
            if not self.lists(record):
                raise NotFound(f"{record!r} is deleted")
            self._write(record, data=messages.encode({**attached(record.row), name: data}))

    def _write(self, record: StoredNetwork[Any] | StoredEndpoint, **columns: bytes | str | None) -> None:
        before: NetworkRow | EndpointRow = record.row
        row = msgspec.structs.replace(before, **columns)
        # An intent may be lost with the power; its completion syncs everything before it in the log.
        synced = row.synced and row.intent is None
        if row.key is not None:
            assignments = ", ".join([f"{column} = ?" for column in columns])
            self._database.write(
                f"UPDATE {row.table} SET {assignments} WHERE key = ?", (*columns.values(), row.key), synced=synced
            )
        else:
            values = msgspec.structs.astuple(row)
            places = ", ".join("?" * len(values))
            key = self._database.write(f"INSERT INTO {row.table} VALUES ({places})", values, synced=synced)
            row = msgspec.structs.replace(row, key=key)
        record.row = row
        if before.key is None:
            self._list(record)

    def _list(self, record: StoredNetwork[Any] | StoredEndpoint) -> None:
        if isinstance(record, StoredEndpoint):
            record.network.show(record, listed=True)
        else:
            self.networks = MappingProxyType({**self.networks, record.id: record})

    def _unlist(self, record: StoredNetwork[Any] | StoredEndpoint) -> None:
        if not self.lists(record):
            return  # another one may have its id by now
        if isinstance(record, StoredEndpoint):
            record.network.show(record, listed=False)
        else:
            self.networks = MappingProxyType({id_: n for id_, n in self.networks.items() if n is not record})

    def lists(self, record: StoredNetwork[Any] | StoredEndpoint) -> bool:
        """Whether the record is there: neither deleted nor going."""
        if isinstance(record, StoredEndpoint):
            return record.network.endpoints.get(record.id) is record
        return self.networks.get(record.id) is record

    def _delete(self, record: StoredNetwork[Any] | StoredEndpoint) -> None:
        row: NetworkRow | EndpointRow = record.row
        self._database.write(f"DELETE FROM {row.table} WHERE key = ?", (row.key,), synced=row.synced)

    # ----------------------------------------------------------------------------------------------------- swarm

    def save_allocation(self, network_id: str, request: bytes, answer: bytes) -> None:
        """Write down the options that a network is allocated."""
        row = AllocationRow(network_id, request, answer)
        with self._lock:
            statement = "INSERT OR REPLACE INTO allocations VALUES (?, ?, ?)"
            self._database.write(statement, msgspec.structs.astuple(row), synced=True)
            self.allocations[network_id] = row

    def forget_allocation(self, network_id: str) -> None:
        """Write down that it is allocated nothing."""
        with self._lock:
            self._database.write("DELETE FROM allocations WHERE network_id = ?", (network_id,), synced=True)
            self.allocations.pop(network_id, None)

    def save_node(self, address: str, request: bytes) -> None:
        """Write down that there is a node."""
        row = NodeRow(address, request)
        with self._lock:
            self._database.write("INSERT OR REPLACE INTO nodes VALUES (?, ?)", msgspec.structs.astuple(row))
            self.nodes[address] = row

    def forget_node(self, address: str) -> None:
        """Write down that it is gone."""
        with self._lock:
            self._database.write("DELETE FROM nodes WHERE address = ?", (address,))
            del self.nodes[address]

    def close(self) -> None:
        """Close the file. The store cannot be used afterwards."""
        with self._lock:
            self._database.close()
