"""The file of a plugin's networks and endpoints, and of what a swarm told.

One SQLite file per plugin. A row is written *before* the author's method runs, with the operation's name in its column
``intent``, and again when the method has returned, before the answer goes out, with ``intent`` NULL. So after a crash
at any point the rows with an intent are exactly what was half done.

The file is read once, when it is opened; from then on the objects in memory are asked and the file is only written.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Generic

import msgspec

from netplugin_sdk.database import Database
from netplugin_sdk.errors import InvalidRequest, NotFound, Unavailable
from netplugin_sdk.network import Endpoint, EndpointRow, JoinRow, Network, NetworkRow, OptionsT, RowT, _kept, _Record
from netplugin_sdk.protocol import messages

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
_MIGRATIONS = (_SCHEMA, _SWARM)


class AllocationRow(msgspec.Struct, frozen=True):
    """What a network of the swarm is allocated, on disk on the managers that were asked. It is no `NetworkRow`.

    A manager need not run the network, a node that runs it need not be a manager, and their ends are told apart.
    """

    network_id: str
    request: bytes
    answer: bytes


class NodeRow(msgspec.Struct, frozen=True):
    """A node of the swarm on disk, this one or another."""

    address: str
    request: bytes


class Store(Generic[OptionsT]):
    """The networks of one plugin and the file that they are kept in.

    `folder` None keeps them in memory only; otherwise this process holds it. `options_type` is the class of
    `Network.options`.

    Raises `Unavailable` if the file cannot be used; the text says why.
    """

    def __init__(self, folder: Path | None, options_type: type[OptionsT]) -> None:
        self.networks: dict[str, Network[OptionsT]] = {}
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
            for values in self._database.read("SELECT * FROM networks"):
                network = NetworkRow(*values)
                request = messages.decode(messages.CreateNetwork, network.request)
                self.networks[network.id] = Network(network, request, self._options_type, self._attach)
            listed: dict[int | None, Endpoint] = {}
            for values in self._database.read("SELECT * FROM endpoints"):
                endpoint = EndpointRow(*values)
                asked = messages.decode(messages.CreateEndpoint, endpoint.request)
                listed[endpoint.key] = Endpoint(endpoint, asked, self._attach)
                self.networks[endpoint.network_id]._endpoints[endpoint.id] = listed[endpoint.key]
            for values in self._database.read("SELECT * FROM joins"):
                join = JoinRow(*values)
                listed[join.key].join = join
            for values in self._database.read("SELECT * FROM allocations"):
                allocation = AllocationRow(*values)
                self.allocations[allocation.network_id] = allocation
            for values in self._database.read("SELECT * FROM nodes"):
                node = NodeRow(*values)
                self.nodes[node.address] = node
        except (InvalidRequest, KeyError) as error:
            file = self._database.name
            raise Unavailable(f"the state file {file} is damaged, and left as it is: {error}") from error

    def new_network(self, request: messages.CreateNetwork, body: bytes) -> Network[OptionsT]:
        """A network that is neither saved nor listed yet. `body` is the request as it came."""
        return Network(NetworkRow(None, request.network_id, body), request, self._options_type, self._attach)

    def new_endpoint(self, request: messages.CreateEndpoint, body: bytes) -> Endpoint:
        """An endpoint that is neither saved nor listed yet. `body` is the request as it came."""
        return Endpoint(EndpointRow(None, request.network_id, request.endpoint_id, body), request, self._attach)

    def save(self, record: _Record[RowT], **changes: bytes | str | None) -> None:
        """Write the record down with these columns of its row changed, then show it so, and list it if it is new.

        Raises:
            Unavailable: it cannot be written; nothing has changed.
        """
        with self._lock:
            self._save(record, **changes)

    def _attach(self, record: _Record[RowT], name: str, data: object) -> None:
        with self._lock:
            if not self._lists(record):
                raise NotFound(f"{record!r} is deleted")
            self._save(record, data=messages.encode({**_kept(record.row), name: data}))

    def _save(self, record: _Record[RowT], **changes: bytes | str | None) -> None:
        row: RowT = msgspec.structs.replace(record.row, **changes)
        # What is half done ends with the power, and its completion syncs what is before it in the log.
        synced = row.synced and row.intent is None
        if row.key is not None:
            columns = ", ".join([f"{column} = ?" for column in changes])
            self._database.write(
                f"UPDATE {row.table} SET {columns} WHERE key = ?", (*changes.values(), row.key), synced=synced
            )
        else:
            values = msgspec.structs.astuple(row)
            places = ", ".join("?" * len(values))
            key = self._database.write(f"INSERT INTO {row.table} VALUES ({places})", values, synced=synced)
            row = msgspec.structs.replace(row, key=key)
        record.row = row
        if isinstance(record, Network):
            self.networks[record.id] = record
        elif isinstance(record, Endpoint):
            self.networks[record.network_id]._endpoints[record.id] = record

    def save_join(self, endpoint: Endpoint, request: bytes, answer: bytes) -> None:
        """Write down that the endpoint is in a sandbox. Raises `Unavailable` if it cannot be written."""
        join = JoinRow(endpoint.row.key, request, answer)
        with self._lock:
            self._database.write("INSERT OR REPLACE INTO joins VALUES (?, ?, ?)", msgspec.structs.astuple(join))
            endpoint.join = join

    def forget_join(self, endpoint: Endpoint) -> None:
        """Write down that it is in none. Raises `Unavailable` if it cannot be written."""
        with self._lock:
            self._database.write("DELETE FROM joins WHERE key = ?", (endpoint.row.key,))
            endpoint.join, endpoint.may_be_joined = None, False

    def forget(self, record: Network[OptionsT] | Endpoint) -> None:
        """Delete the record from the file and from the list. Raises `Unavailable` if it cannot be."""
        with self._lock:
            statement = f"DELETE FROM {record.row.table} WHERE key = ?"
            self._database.write(statement, (record.row.key,), synced=record.row.synced)
            self._unlist(record)

    def unlist(self, record: Network[OptionsT] | Endpoint) -> None:
        """Take the record from the list: for everybody it is gone, and only the file still has it."""
        with self._lock:
            self._unlist(record)

    def _unlist(self, record: Network[OptionsT] | Endpoint) -> None:
        if not self._lists(record):
            return  # another one may have its id by now
        if isinstance(record, Network):
            del self.networks[record.id]
        else:
            del self.networks[record.network_id]._endpoints[record.id]

    def _lists(self, record: object) -> bool:
        if isinstance(record, Endpoint):
            network = self.networks.get(record.network_id)
            return network is not None and network.endpoints.get(record.id) is record
        return isinstance(record, Network) and self.networks.get(record.id) is record

    # ----------------------------------------------------------------------------------------------------- swarm

    def save_allocation(self, network_id: str, request: bytes, answer: bytes) -> None:
        """Write down what a network is allocated. Raises `Unavailable` if it cannot be written."""
        row = AllocationRow(network_id, request, answer)
        with self._lock:
            statement = "INSERT OR REPLACE INTO allocations VALUES (?, ?, ?)"
            self._database.write(statement, msgspec.structs.astuple(row), synced=True)
            self.allocations[network_id] = row

    def forget_allocation(self, network_id: str) -> None:
        """Write down that it is allocated nothing. Raises `Unavailable` if it cannot be written."""
        with self._lock:
            self._database.write("DELETE FROM allocations WHERE network_id = ?", (network_id,), synced=True)
            self.allocations.pop(network_id, None)

    def save_node(self, address: str, request: bytes) -> None:
        """Write down that there is a node. Raises `Unavailable` if it cannot be written."""
        row = NodeRow(address, request)
        with self._lock:
            self._database.write("INSERT OR REPLACE INTO nodes VALUES (?, ?)", msgspec.structs.astuple(row))
            self.nodes[address] = row

    def forget_node(self, address: str) -> None:
        """Write down that it is gone. Raises `Unavailable` if it cannot be written."""
        with self._lock:
            self._database.write("DELETE FROM nodes WHERE address = ?", (address,))
            del self.nodes[address]

    def close(self) -> None:
        """Close the file. The store cannot be used afterwards."""
        with self._lock:
            self._database.close()
