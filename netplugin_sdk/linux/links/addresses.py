"""Addresses of interfaces, and routes of this host."""

from __future__ import annotations

import errno
import socket
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network, ip_interface, ip_network
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError

from netplugin_sdk.errors import Conflict
from netplugin_sdk.linux.links.netlink import LinkError, check_name, given, index_of, kernel, operation, required_index

_IFA_F_NODAD = 0x02  # linux/if_addr.h
_OF_THE_KERNEL = (2, 3, 4, 5)  # linux/rtnetlink.h: RTN_LOCAL, RTN_BROADCAST, RTN_ANYCAST, RTN_MULTICAST
# linux/rtnetlink.h: RT_TABLE_MAIN, RTN_UNREACHABLE, RT_SCOPE_LINK
_MAIN, _UNREACHABLE, _ON_LINK = 254, 7, 253


def addresses_of(name: str, index: int) -> tuple[IPv4Interface | IPv6Interface, ...]:
    """The addresses of an interface. Read them before the link: the kernel deletes a link first, its addresses then."""
    try:
        return tuple(
            # IFA_ADDRESS is the far end of a point-to-point link; IFA_LOCAL, where there is one, is ours.
            ip_interface(f"{found.get('local') or found.get('address')}/{found['prefixlen']}")
            # With the socket's strict check the kernel filters by index. Without `dump_filter` pyroute2 would do it,
            # after having decoded the addresses of all interfaces.
            for found in kernel().addr("dump", index=index, dump_filter=None)
        )
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return ()
        raise LinkError(f"interface {name}: cannot read its addresses", error) from error


def add_address(cannot: str, index: int | None, address: IPv4Interface | IPv6Interface) -> None:
    """Give an interface an address. Raises `LinkError`, with `cannot` as the start of its text."""
    nodad = _IFA_F_NODAD if address.version == 6 else None
    try:
        kernel().addr(
            "add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen, **given(flags=nodad)
        )
    except NetlinkError as error:
        raise LinkError(f"{cannot} add address {address}", error) from error


@operation
def ensure_route(destination: IPv4Network | IPv6Network, interface: str | None = None) -> None:
    """Add a route of this host to `destination`, on the link of `interface`, unless it exists.

    Without an interface, the destination is unreachable, except parts of it with a route of their own. The routes of an
    interface go when it goes down. Raises `Conflict` if there is another route to the same destination,
    `LinkError` if there is no such interface or the kernel refuses.
    """
    if interface is not None:
        check_name(interface)
    cannot = f"{_route_in_words(destination, interface)}: cannot add"
    route = _route(cannot, destination, interface)
    try:
        kernel().route("add", **route)
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise LinkError(cannot, error) from error
        # Without `dump_filter` pyroute2 would look through all routes; see `addresses_of`.
        same = {name: route[name] for name in ("family", "type", "oif") if name in route}
        for found in kernel().route("dump", table=_MAIN, dump_filter=None, **same):
            if (found.get("dst"), found["dst_len"]) == (str(destination.network_address), destination.prefixlen):
                return
        raise Conflict(f"{cannot}: there is another route to it") from None


@operation
def delete_route(destination: IPv4Network | IPv6Network, interface: str | None = None) -> bool:
    """Remove a route of `ensure_route`. False if there is none. Raises `LinkError` if the kernel refuses."""
    if interface is not None:
        check_name(interface)
    if interface is not None and index_of(interface) is None:
        return False
    cannot = f"{_route_in_words(destination, interface)}: cannot delete"
    try:
        kernel().route("del", **_route(cannot, destination, interface))
    except NetlinkError as error:
        if error.code in (errno.ESRCH, errno.ENODEV):
            return False
        raise LinkError(cannot, error) from error
    return True


@operation
def occupied() -> tuple[IPv4Network | IPv6Network, ...]:
    """The networks that this host has addresses in or routes to, without the default route.

    Raises `LinkError` if the kernel refuses.
    """
    found: set[IPv4Network | IPv6Network] = set()
    try:
        for address in kernel().addr("dump"):
            text = address.get("local") or address.get("address")
            found.add(ip_interface(f"{text}/{address['prefixlen']}").network)
        for family in (socket.AF_INET, socket.AF_INET6):
            for route in kernel().route("dump", family=family):
                if (destination := route.get("dst")) is not None and route["type"] not in _OF_THE_KERNEL:
                    found.add(ip_network(f"{destination}/{route['dst_len']}", strict=False))
    except NetlinkError as error:
        raise LinkError("cannot read the host's addresses and routes", error) from error
    return tuple(found)


def _route_in_words(destination: IPv4Network | IPv6Network, interface: str | None) -> str:
    return f"route to {destination}" + (f" on {interface}" if interface else "")


def _route(cannot: str, destination: IPv4Network | IPv6Network, interface: str | None) -> dict[str, Any]:
    family = socket.AF_INET if destination.version == 4 else socket.AF_INET6
    described = {"dst": str(destination), "family": family}
    if interface is not None:
        return described | {"oif": required_index(cannot, interface), "scope": _ON_LINK}
    if destination.version == 4:
        return described | {"type": _UNREACHABLE}
    # It is the loopback's. The kernel finds it by that when it is deleted, not by its type (ip6_route_del).
    return described | {"type": _UNREACHABLE, "oif": required_index(cannot, "lo")}
