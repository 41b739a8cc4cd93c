"""The kernel's view: interfaces here and in sandboxes, ports with a listener, bridges with rules."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import Any

import msgspec
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from netplugin_sdk.errors import Unavailable
from netplugin_sdk.linux import firewall
from netplugin_sdk.linux.namespaces import Namespace
from netplugin_sdk.values import IPAddress, IPInterface, TransportProtocol

_IFF_UP = 0x1  # linux/if.h
_TCP_LISTEN, _UDP_UNCONNECTED = "0A", "07"  # net/tcp_states.h


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """An interface as the kernel describes it."""

    name: str
    index: int
    kind: str | None
    """``bridge``, ``veth``, ``macvlan`` …; None for hardware and the loopback."""
    mtu: int
    """In bytes."""
    mac: str | None
    up: bool
    master: str | None
    """Name of the bridge that it is a port of."""
    link: int | None
    """Index of a veth's other end, in the namespace where that is; of a macvlan's parent."""
    addresses: tuple[IPInterface, ...]
    """Without those that the kernel gives (``fe80::``)."""

    def __str__(self) -> str:
        """Such as ``ve-a8de4ba19c93 up on br-ca75b6ab4104, MTU 1500``."""
        on = f" on {self.master}" if self.master else ""
        return f"{self.name} {'up' if self.up else 'DOWN'}{on}, MTU {self.mtu}"


class NamespaceView(msgspec.Struct, frozen=True):
    """The view of one network namespace."""

    interfaces: Mapping[str, Interface] = {}
    gateways: tuple[IPAddress, ...] = ()
    """Next hops of default routes."""


class Listener(msgspec.Struct, frozen=True):
    """A socket that takes what comes to a port."""

    protocol: TransportProtocol
    address: IPAddress
    port: int


class Host(msgspec.Struct, frozen=True):
    """The view of the caller's namespace."""

    sight: NamespaceView
    listeners: frozenset[Listener]
    bridges: Mapping[str, str] | None
    """Those that have rules of the SDK, each with the first characters of its network's id; None: cannot be seen."""

    def takes(self, protocol: TransportProtocol, address: IPAddress, port: int) -> bool:
        """Whether somebody listens on this port of this address of the host."""
        return any(
            (one.protocol, one.port) == (protocol, port)
            and (one.address == address or (int(one.address) == 0 and one.address.version >= address.version))
            for one in self.listeners
        )


def host() -> Host:
    """Look around here. Raises `Unavailable` if netlink does not answer."""
    return Host(_look(), _listeners(), firewall.bridges() if os.geteuid() == 0 else None)


def inside(path: Path) -> NamespaceView | None:
    """Look into the network namespace of this file; None if it is none, or no more. Raises PermissionError."""
    namespace = Namespace(path)
    if not namespace.exists:
        return None
    try:
        return namespace.call(_look)
    except PermissionError:
        raise
    except OSError:
        return None  # it has just ended


def _look() -> NamespaceView:
    try:
        with IPRoute() as ipr:
            addresses: dict[int, list[IPInterface]] = {}
            for found in ipr.addr("dump"):
                address = ip_interface(f"{found.get('local') or found.get('address')}/{found['prefixlen']}")
                if not address.is_link_local or address.version == 4:
                    addresses.setdefault(found["index"], []).append(address)
            messages = list(ipr.link("dump"))
            routes = [*ipr.route("dump", family=2), *ipr.route("dump", family=10)]
    except NetlinkError as error:
        raise Unavailable(f"the kernel does not tell of its interfaces: {error}") from error
    names = {message["index"]: message.get("ifname") for message in messages}
    found = [_interface(message, names, tuple(addresses.get(message["index"], ()))) for message in messages]
    gateways = {
        ip_address(route.get("gateway"))
        for route in routes
        if route["dst_len"] == 0 and route.get("gateway") and route.get("table") == 254  # RT_TABLE_MAIN
    }
    return NamespaceView(
        {each.name: each for each in found}, tuple(sorted(gateways, key=lambda one: (one.version, one)))
    )


def _interface(message: Any, names: Mapping[int, str], addresses: tuple[IPInterface, ...]) -> Interface:
    return Interface(
        name=message.get("ifname"),
        index=message["index"],
        kind=message.get(("linkinfo", "kind")),
        mtu=message.get("mtu"),
        mac=message.get("address"),
        up=bool(message["flags"] & _IFF_UP),
        master=names.get(message.get("master")),
        link=message.get("link"),
        addresses=addresses,
    )


def _listeners() -> frozenset[Listener]:
    """From proc(5), which needs no root."""
    found: set[Listener] = set()
    for name, protocol, state in (
        ("tcp", TransportProtocol.TCP, _TCP_LISTEN),
        ("udp", TransportProtocol.UDP, _UDP_UNCONNECTED),
    ):
        for file in (name, f"{name}6"):
            for fields in _lines(file):
                if fields[3] == state:
                    address, _, port = fields[1].partition(":")
                    found.add(Listener(protocol, _address(address), int(port, 16)))
    for fields in _lines("sctp/eps"):
        found |= {Listener(TransportProtocol.SCTP, ip_address(text), int(fields[5])) for text in fields[8:]}
    return frozenset(found)


def _lines(file: str) -> list[list[str]]:
    with suppress(OSError):  # without IPv6, or SCTP
        return [line.split() for line in Path(f"/proc/thread-self/net/{file}").read_text().splitlines()[1:]]
    return []


def _address(text: str) -> IPAddress:
    """In words of 4 bytes in the host's order."""
    words = [int(text[place : place + 8], 16) for place in range(0, len(text), 8)]
    return ip_address(struct.pack(f"={len(words)}I", *words))
