"""What a driver must not forget: networks, endpoints, and the data that its author attaches to them.

They are this host's. What a swarm told stands apart: what its networks are allocated, and which nodes it has.

One SQLite file per plugin. A row is written *before* the author's method runs, with the operation's name in its column
``intent``, and again when the method has returned, before the answer goes out, with ``intent`` NULL. So after a crash
at any point the rows with an intent are exactly what was half done.

The file is read once, when it is opened; from then on the objects in memory are asked and the file is only written.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Generic, Literal, TypeAlias

import msgspec
from typing_extensions import TypeVar

from netplugin_sdk import messages
from netplugin_sdk.addresses import IPInterface, IPNetwork, MacAddress
from netplugin_sdk.database import Database
from netplugin_sdk.docker import Container
from netplugin_sdk.errors import InvalidRequest, NotFound, Unavailable
from netplugin_sdk.messages import EndpointInterface, EndpointOptions, IpamData
from netplugin_sdk.options import DriverOptions, from_text

OptionsT = TypeVar("OptionsT", bound=DriverOptions, default=DriverOptions)
DataT = TypeVar("DataT")

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
_MIGRATIONS = (_SCHEMA, _SWARM)


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


class JoinRow(msgspec.Struct, frozen=True):
    """A join on disk, under the key of its endpoint.

    A row of its own, since a row that grows costs SQLite twice what a new one does.
    """

    key: int | None
    request: bytes
    answer: bytes


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


RowT = TypeVar("RowT", NetworkRow, EndpointRow)


class _Record(Generic[RowT]):
    """What networks and endpoints share: an id, a row, attached data."""

    def __init__(self, row: RowT, attach: Callable[..., None]) -> None:
        self.row: RowT = row
        """What is on disk. The SDK's own; it changes through `Store.save`."""
        self._attach = attach

    @property
    def id(self) -> str:
        """Docker's id of it."""
        return self.row.id

    def interface_name(self, prefix: str) -> str:
        """A name for a link of this object: ``prefix-`` and 12 characters of the id.

        It follows from the id alone, so that what was made is found again. Raises ValueError where it would be longer
        than the kernel's 15 bytes (IFNAMSIZ), that is for a prefix of more than two characters.
        """
        if not 1 <= len(prefix) <= 2:
            raise ValueError(f"the prefix of an interface name has 1 or 2 characters, not {prefix!r}")
        return f"{prefix}-{self.id[:12]}"

    @property
    def interface_group(self) -> int:
        """A number for a group of links of this object (``ip link set group``); it follows from the id, too."""
        return 0x70000000 | zlib.crc32(self.id.encode()) >> 4  # not what others take: their numbers are small

    def attach(self, data: object) -> None:
        """Keep `data` with this object; it is on disk when this returns and replaces what was attached of its class.

        `data` is an instance of a dataclass or msgspec Struct of yours, whose fields have a JSON form or are
        `ipaddress` objects (`IPAddress`, `IPInterface` or `IPNetwork` where they may be of either version),
        `MacAddress` or `PortMapping`. It goes when the object goes. May be called from any thread.

        Raises:
            TypeError: a field can have no JSON form.
            NotFound: the object has been deleted.
            Unavailable: it cannot be written.
        """
        self._attach(self, _name(type(data)), data)

    def attached(self, kind: type[DataT]) -> DataT | None:
        """What was last attached of class `kind`; None if nothing was.

        Raises msgspec.ValidationError if the class has changed so that what is kept does not fit any more.
        """
        kept = _kept(self.row).get(_name(kind))
        return None if kept is None else msgspec.json.decode(kept, type=kind, dec_hook=from_text)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id[:12]}>"


def _name(kind: type) -> str:
    return kind.__qualname__  # not the module: run as a program it has another name


def _kept(row: NetworkRow | EndpointRow) -> dict[str, msgspec.Raw]:
    return msgspec.json.decode(row.data, type=dict[str, msgspec.Raw])


class Endpoint(_Record[EndpointRow]):
    """A container's attachment to a network, from ``CreateEndpoint`` to ``DeleteEndpoint``."""

    def __init__(self, row: EndpointRow, request: messages.CreateEndpoint, attach: Callable[..., None]) -> None:
        super().__init__(row, attach)
        self._request = request
        self._answer: bytes | None = None  # of which `_interface` is a part
        self._interface = request.interface
        self.join: JoinRow | None = None
        """While it is in a sandbox. The SDK's own, as `row`."""
        self.may_be_joined = row.key is not None
        """Whether there may be something for `leave` to undo: a join, or half of one, as always after a restart."""

    @property
    def network_id(self) -> str:
        """The id of its network."""
        return self.row.network_id

    @property
    def requested(self) -> EndpointInterface:
        """The addresses that the engine gave it: what `create_endpoint` may not fill in."""
        return self._request.interface

    @property
    def interface(self) -> EndpointInterface:
        """Its addresses: what the engine gave, completed by what `create_endpoint` filled in."""
        if self.row.answer is not None and self.row.answer is not self._answer:
            self._answer = self.row.answer
            asked = self._request.interface
            filled = messages.decode(messages.CreateEndpointAnswer, self._answer).interface
            self._interface = EndpointInterface(
                address=asked.address or filled.address,
                address_ipv6=asked.address_ipv6 or filled.address_ipv6,
                mac_address=asked.mac_address or filled.mac_address,
            )
        return self._interface

    @property
    def addresses(self) -> tuple[IPInterface, ...]:
        """Its IPv4 and IPv6 address with their prefix lengths, as far as it has them."""
        interface = self.interface
        return tuple(a for a in (interface.address, interface.address_ipv6) if a is not None)

    @property
    def mac_address(self) -> MacAddress | None:
        """Its MAC address; None if neither the engine nor the driver gave one."""
        return self.interface.mac_address

    @property
    def options(self) -> EndpointOptions:
        """``Options`` of ``CreateEndpoint``: ports, and what ``--driver-opt`` gave."""
        return self._request.options

    @property
    def sandbox(self) -> Sandbox | None:
        """The container's sandbox, from `join` to `leave`."""
        return None if self.join is None else Sandbox.of(messages.decode(messages.JoinRequest, self.join.request))

    @property
    def container(self) -> Container | None:
        """The container that it is in, as far as Docker has told; see `NetworkDriver.container_attached`."""
        return self.attached(Container)

    @property
    def external(self) -> EndpointOptions | None:
        """``Options`` of ``ProgramExternalConnectivity``, while it carries its container's default route."""
        if self.row.external_request is None:
            return None
        return messages.decode(messages.ProgramExternalConnectivity, self.row.external_request).options


class Sandbox(msgspec.Struct, frozen=True):
    """A container's network namespace as ``Join`` names it.

    `key` is its path. Newer engines have made it when they call; Engine 20.10 makes it after `join`.
    """

    key: str
    options: EndpointOptions

    @classmethod
    def of(cls, request: messages.JoinRequest) -> Sandbox:
        """The sandbox of a ``Join``."""
        return cls(request.sandbox_key, request.options)


class Network(_Record[NetworkRow], Generic[OptionsT]):
    """A Docker network, from ``CreateNetwork`` to ``DeleteNetwork``."""

    def __init__(
        self,
        row: NetworkRow,
        request: messages.CreateNetwork,
        options_type: type[OptionsT],
        attach: Callable[..., None],
    ) -> None:
        super().__init__(row, attach)
        self._request = request
        self._options_type = options_type
        self._endpoints: dict[str, Endpoint] = {}

    @cached_property
    def options(self) -> OptionsT:
        """The driver's own ``-o`` options, checked before `create_network` is called."""
        return self._options_type.parse(self.raw_options.generic)

    @property
    def raw_options(self) -> messages.NetworkOptions:
        """``Options`` of ``CreateNetwork`` as they came."""
        return self._request.options

    @property
    def internal(self) -> bool:
        """``--internal``: no traffic to or from outside of the network."""
        return self.raw_options.internal

    @cached_property
    def ipam(self) -> tuple[IpamData, ...]:
        """The address pools, one for each subnet, IPv4 before IPv6."""
        return (*self._request.ipv4_data, *self._request.ipv6_data)

    @cached_property
    def subnets(self) -> tuple[IPNetwork, ...]:
        """The subnets; none for the null IPAM driver's ``0.0.0.0/0``."""
        return tuple(data.pool for data in self.ipam if data.pool.prefixlen)

    @cached_property
    def gateways(self) -> tuple[IPInterface, ...]:
        """The gateway addresses with the prefix lengths of their subnets, as far as IPAM gave any."""
        return tuple(data.gateway for data in self.ipam if data.gateway is not None)

    @property
    def endpoints(self) -> Mapping[str, Endpoint]:
        """The endpoints by id."""
        return MappingProxyType(self._endpoints)


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
