"""What a driver must not forget: networks, endpoints, and the data that its author attaches to them.

They are this host's. What a swarm told stands apart: what its networks are allocated, and which nodes it has.

One SQLite file per plugin. A row is written *before* the author's method runs, with the operation's name in its column
``intent``, and again when the method has returned, before the answer goes out, with ``intent`` NULL. So after a crash
at any point the rows with an intent are exactly what was half done.

The file is read once, when it is opened; from then on the objects in memory are asked and the file is only written.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar, Generic, Literal, TypeAlias

import msgspec
from typing_extensions import TypeVar

from netplugin_sdk.protocol import messages
from netplugin_sdk.protocol.messages import EndpointInterface, EndpointOptions, IpamData
from netplugin_sdk.protocol.options import DriverOptions, from_text
from netplugin_sdk.values import Container, IPInterface, IPNetwork, MacAddress

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
