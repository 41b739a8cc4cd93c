"""Values that the protocol, the kernel and Docker share: addresses, transport protocols, containers, pools."""

from __future__ import annotations

import enum
import os
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from typing import TYPE_CHECKING, Self, TypeAlias

if TYPE_CHECKING:
    IPAddress: TypeAlias = IPv4Address | IPv6Address
    IPInterface: TypeAlias = IPv4Interface | IPv6Interface
    IPNetwork: TypeAlias = IPv4Network | IPv6Network
else:
    # At run time a class each, since msgspec decodes no unions of classes that are not its own. So a field of a
    # driver's options, or of data that is attached, can be an address of either version.

    class IPAddress(ABC):  # noqa: B024
        """An `ipaddress.IPv4Address` or `ipaddress.IPv6Address`."""

        parse = staticmethod(ip_address)

    class IPInterface(ABC):  # noqa: B024
        """An `ipaddress.IPv4Interface` or `ipaddress.IPv6Interface`: an address with its prefix length."""

        parse = staticmethod(ip_interface)

    class IPNetwork(ABC):  # noqa: B024
        """An `ipaddress.IPv4Network` or `ipaddress.IPv6Network`."""

        parse = staticmethod(ip_network)

    IPAddress.register(IPv4Address)
    IPAddress.register(IPv6Address)
    IPInterface.register(IPv4Interface)
    IPInterface.register(IPv6Interface)
    IPNetwork.register(IPv4Network)
    IPNetwork.register(IPv6Network)


class TransportProtocol(enum.IntEnum):
    """The protocol of a port, by its IANA number."""

    TCP = 6
    UDP = 17
    SCTP = 132

    def __str__(self) -> str:
        """As in ``80/tcp`` and in the rules of a firewall."""
        return self.name.lower()


class MacAddress(str):
    """An Ethernet hardware address, always written ``02:42:ac:11:00:02``. It is a string and compares as one."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        """Raises ValueError unless `text` is six octets in hexadecimal, separated by ``:`` or ``-``."""
        octets = text.replace("-", ":").split(":")
        if len(octets) != 6 or not all(len(o) in (1, 2) and set(o) <= _HEX for o in octets):
            raise ValueError(f"{text!r} is not a MAC address")
        return super().__new__(cls, ":".join(f"{int(o, 16):02x}" for o in octets))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The same as the class itself; lets a driver option be a MAC address."""
        return cls(text)

    @classmethod
    def from_bytes(cls, octets: bytes) -> Self:
        """The address of these 6 octets."""
        return cls(octets.hex(":"))

    @classmethod
    def random(cls) -> Self:
        """A new locally administered unicast address (IEEE 802: bit 1 of the first octet set, bit 0 clear)."""
        octets = bytearray(os.urandom(6))
        octets[0] = octets[0] & 0xFE | 0x02
        return cls.from_bytes(bytes(octets))

    @classmethod
    def of(cls, address: IPv4Address) -> Self:
        """The one that goes with an IPv4 address, ``02:42`` and its octets, as in Docker's drivers before Engine 28.

        A container that gets an address again has the MAC address that the neighbours remember: older engines do not
        announce a new one.
        """
        return cls.from_bytes(b"\x02\x42" + address.packed)

    @property
    def packed(self) -> bytes:
        """The 6 octets."""
        return bytes.fromhex(self.replace(":", ""))


@dataclass(frozen=True)
class Container:
    """A container as users know it."""

    id: str
    name: str
    """Without the slash that the API puts before it."""
    image: str
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def compose_project(self) -> str | None:
        """The project of Docker Compose that it belongs to."""
        return self.labels.get("com.docker.compose.project")

    @property
    def compose_service(self) -> str | None:
        """The service of Docker Compose that it belongs to."""
        return self.labels.get("com.docker.compose.service")


@dataclass(frozen=True)
class UsedPool:
    """An address pool that a network of an engine has."""

    network: IPNetwork
    part: IPNetwork | None
    """``--ip-range``."""
    addresses: frozenset[IPAddress]
    """Of the network's endpoints, of both IP versions."""


_HEX = frozenset("0123456789abcdefABCDEF")
