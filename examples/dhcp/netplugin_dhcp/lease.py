"""The lease that a DHCP server grants: values only, no network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any, Self

from netplugin_sdk import MacAddress

_EVERYTHING = IPv4Network("0.0.0.0/0")
_T1, _T2 = 0.5, 0.875  # of the lease's time, where the server says nothing (RFC 2131, 4.4.5)


@dataclass(frozen=True)
class Route:
    """A route to `destination` by `next_hop`, or on the link itself where it is None."""

    destination: IPv4Network
    next_hop: IPv4Address | None


@dataclass(frozen=True)
class Lease:
    """An address for a time, as one server granted it. Times are Unix times, so that they outlive this process."""

    address: IPv4Interface
    server: IPv4Address
    server_mac: MacAddress
    """Of the sender of the answer: the server, or a relay that leads to it."""
    gateway: IPv4Address | None
    routes: tuple[Route, ...]
    renewal: float
    """T1: from now on this server is asked for more time."""
    rebinding: float
    """T2: from now on any server is."""
    expiry: float

    @classmethod
    def granted(cls, address: str, options: Mapping[str, Any], server_mac: str, asked: float) -> Self:
        """The lease of an offer or acknowledgement, with its options as pyroute2 names them.

        `asked` is when the request was sent, from which times count (RFC 2131, 4.4.1). Raises ValueError if it grants
        nothing that can be used.
        """
        try:
            seconds = _seconds(options["lease_time"])
            interface = IPv4Interface(f"{address}/{options['subnet_mask']}")
            server = IPv4Address(options["server_id"])
        except KeyError as missing:
            raise ValueError(f"the DHCP server does not say its {missing.args[0]}") from None
        if interface.ip.is_unspecified or interface.ip.is_multicast or interface.ip.is_loopback:
            raise ValueError(f"{interface.ip} cannot be an interface's address")
        rebinding = min(_seconds(options.get("rebinding_time", seconds * _T2)), seconds)
        renewal = min(_seconds(options.get("renewal_time", seconds * _T1)), rebinding)
        gateway, routes = _routing(options)
        return cls(
            address=interface,
            server=server,
            server_mac=MacAddress(server_mac),
            gateway=gateway,
            routes=routes,
            renewal=asked + renewal,
            rebinding=asked + rebinding,
            expiry=asked + seconds,
        )


def classless_routes(option: Sequence[int]) -> Iterator[Route]:
    """The routes in option 121 (RFC 3442): a prefix length, its significant octets, a router; again and again.

    Raises ValueError if the option is no such list.
    """
    octets = bytes(option)
    while octets:
        length, significant = octets[0], (octets[0] + 7) // 8
        destination, router = octets[1 : 1 + significant], octets[1 + significant : 5 + significant]
        if length > 32 or len(router) < 4:
            raise ValueError(f"option 121 is not a list of routes: {bytes(option).hex()}")
        next_hop = IPv4Address(router)
        yield Route(
            # Bits beyond the prefix are to be ignored.
            IPv4Network((destination.ljust(4, b"\0"), length), strict=False),
            None if next_hop.is_unspecified else next_hop,
        )
        octets = octets[5 + significant :]


def host_name(container: str) -> str:
    """A container's name as a host name (RFC 1123): a label of letters, digits and hyphens."""
    return re.sub(r"[^A-Za-z0-9]+", "-", container)[:63].strip("-")


def _routing(options: Mapping[str, Any]) -> tuple[IPv4Address | None, tuple[Route, ...]]:
    """The default gateway, and the other routes. With option 121 the routers of option 3 do not count (RFC 3442)."""
    if given := options.get("classless_static_route"):
        routes = tuple(classless_routes(given))
        defaults = [route.next_hop for route in routes if route.destination == _EVERYTHING]
        return next(iter(defaults), None), tuple(route for route in routes if route.destination != _EVERYTHING)
    routers = options.get("router")
    return IPv4Address(routers[0]) if routers else None, ()


def _seconds(number: float) -> float:
    """For ever is 2³² - 1 seconds, which pyroute2 reads as -1; 136 years will do."""
    return number if number >= 0 else number + 2**32
