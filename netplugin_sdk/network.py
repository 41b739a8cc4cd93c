"""`Network`, `Endpoint` and `Sandbox`: the arguments of a driver's methods.

The objects are the SDK's: an author reads them, and attaches data of their own to them. `netplugin_sdk.core.store` has
the classes that keep them on disk.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Final, Generic

import msgspec
from typing_extensions import TypeVar

from netplugin_sdk.protocol.messages import (
    CreateEndpoint,
    CreateNetwork,
    EndpointInterface,
    EndpointOptions,
    IpamData,
    NetworkOptions,
)
from netplugin_sdk.protocol.options import DriverOptions, from_text

if TYPE_CHECKING:
    from netplugin_sdk.values import Container, IPInterface, IPNetwork, MacAddress

OptionsT = TypeVar("OptionsT", bound=DriverOptions, default=DriverOptions)
DataT = TypeVar("DataT")


class _Identified(ABC):
    """The common part of networks and endpoints: an id, and attached data."""

    def __init__(self, id_: str) -> None:
        self.id: Final[str] = id_
        """Docker's id of it."""

    def interface_name(self, prefix: str) -> str:
        """A name for a link of this object: ``prefix-`` and 12 characters of the id.

        It follows from the id alone, so that the link is found again. Raises ValueError where it would be longer
        than the kernel's 15 bytes (IFNAMSIZ), that is for a prefix of more than two characters.
        """
        if not 1 <= len(prefix) <= 2:
            raise ValueError(f"the prefix of an interface name has 1 or 2 characters, not {prefix!r}")
        return f"{prefix}-{self.id[:12]}"

    @property
    def interface_group(self) -> int:
        """A number for a group of links of this object (``ip link set group``); it follows from the id, too."""
        return 0x70000000 | zlib.crc32(self.id.encode()) >> 4  # others use small numbers

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
        self._keep(_name(type(data)), data)

    def attached(self, kind: type[DataT]) -> DataT | None:
        """The data of class `kind` that was last attached; None if there is none.

        Raises msgspec.ValidationError if the class has changed so that the kept data does not fit any more.
        """
        kept = self._kept(_name(kind))
        return None if kept is None else msgspec.json.decode(kept, type=kind, dec_hook=from_text)

    @abstractmethod
    def _keep(self, name: str, data: object) -> None:
        """Write attached data down under the name of its class."""

    @abstractmethod
    def _kept(self, name: str) -> bytes | msgspec.Raw | None:
        """Attached data as JSON."""


def _name(kind: type) -> str:
    return kind.__qualname__  # not the module: run as a program it has another name


class Endpoint(_Identified):
    """A container's attachment to a network, from ``CreateEndpoint`` to ``DeleteEndpoint``."""

    def __init__(self, request: CreateEndpoint) -> None:
        super().__init__(request.endpoint_id)
        self.network_id: Final[str] = request.network_id
        """The id of its network."""
        self.requested: Final[EndpointInterface] = request.interface
        """The addresses that the engine gave it, which `create_endpoint` must not change."""
        self.options: Final[EndpointOptions] = request.options
        """``Options`` of ``CreateEndpoint``: ports, and what ``--driver-opt`` gave."""

    @property
    @abstractmethod
    def interface(self) -> EndpointInterface:
        """Its addresses: what the engine gave, completed by what `create_endpoint` filled in."""

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
    @abstractmethod
    def sandbox(self) -> Sandbox | None:
        """The container's sandbox, from `join` to `leave`."""

    @property
    @abstractmethod
    def container(self) -> Container | None:
        """The container that it is in, as far as Docker has told; see `NetworkDriver.container_attached`."""

    @property
    @abstractmethod
    def external(self) -> EndpointOptions | None:
        """``Options`` of ``ProgramExternalConnectivity``, while it carries its container's default route."""

    def __repr__(self) -> str:
        return f"<Endpoint {self.id[:12]}>"


class Sandbox(msgspec.Struct, frozen=True):
    """A container's network namespace as ``Join`` names it.

    `key` is its path. Newer engines have made it when they call; Engine 20.10 makes it after `join`.
    """

    key: str
    options: EndpointOptions


class Network(_Identified, Generic[OptionsT]):
    """A Docker network, from ``CreateNetwork`` to ``DeleteNetwork``."""

    def __init__(self, request: CreateNetwork, options_type: type[OptionsT]) -> None:
        super().__init__(request.network_id)
        self._options_type = options_type
        self.raw_options: Final[NetworkOptions] = request.options
        """``Options`` of ``CreateNetwork`` as they came."""
        self.internal: Final[bool] = request.options.internal
        """``--internal``: no traffic to or from outside of the network."""
        self.ipam: Final[tuple[IpamData, ...]] = (*request.ipv4_data, *request.ipv6_data)
        """The address pools, one for each subnet, IPv4 before IPv6."""
        self.subnets: Final[tuple[IPNetwork, ...]] = tuple(data.pool for data in self.ipam if data.pool.prefixlen)
        """The subnets; none for the null IPAM driver's ``0.0.0.0/0``."""
        self.gateways: Final[tuple[IPInterface, ...]] = tuple(
            data.gateway for data in self.ipam if data.gateway is not None
        )
        """The gateway addresses with the prefix lengths of their subnets, as far as IPAM gave any."""

    @cached_property
    def options(self) -> OptionsT:
        """The driver's own ``-o`` options, checked before `create_network` is called."""
        return self._options_type.parse(self.raw_options.generic)

    @property
    @abstractmethod
    def endpoints(self) -> Mapping[str, Endpoint]:
        """The endpoints by id, as they are now: a mapping that was read does not change."""

    def __repr__(self) -> str:
        return f"<Network {self.id[:12]}>"
