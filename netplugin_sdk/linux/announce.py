"""Announcements of addresses that are new on a link.

Receivers update their tables: a neighbour learns the MAC address of the IP address, a bridge the port and a VXLAN the
host behind which that MAC address is. Engines before 28 announce nothing when a container starts; later ones announce
before the container's link is a port of its bridge.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Mapping
from ipaddress import IPv6Address

from netplugin_sdk.errors import NotFound
from netplugin_sdk.linux.links import LinkError
from netplugin_sdk.values import IPAddress, MacAddress

_BROADCAST = b"\xff" * 6
_ALL_NODES = IPv6Address("ff02::1")
_ALL_NODES_MAC = bytes.fromhex("333300000001")  # RFC 2464, 7
_ARP, _IPV6, _ICMPV6 = 0x0806, 0x86DD, 58
_OVERRIDE = 1 << 29  # RFC 4861, 4.4


def announce(interface: str, owners: Mapping[IPAddress, MacAddress]) -> None:
    """Announce, on an interface of the caller's network namespace, the MAC address of each of these addresses.

    For IPv4 that is an ARP announcement (RFC 5227, 2.3), for IPv6 an unsolicited neighbour advertisement (RFC 4861,
    7.2.6); either is a broadcast from that MAC address. Nobody acknowledges it. It takes 10 ms, the time that the
    kernel needs to close a packet socket (net/packet/af_packet.c, packet_release).

    Raises `NotFound` if there is no such interface, `LinkError` if it cannot send.
    """
    try:
        # Protocol 0: the socket receives nothing.
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as sender:
            for address, mac in owners.items():
                sender.sendto(frame(mac, address), (interface, 0))
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENXIO):
            raise NotFound(f"there is no interface {interface} to announce an address by") from error
        reason = OSError(error.errno, os.strerror(error.errno or 0))
        raise LinkError(f"interface {interface}: cannot announce an address", reason) from error


def announce_to(
    peer: IPAddress, owners: Mapping[IPAddress, MacAddress], *, vni: int, local: IPAddress, port: int = 4789
) -> None:
    """Announce the same to one host only, in a VXLAN (RFC 7348) of this identifier: one datagram per address.

    `local` is the address of this host that the VXLAN sends from, `port` its UDP port. The receivers there learn the
    same as from `announce`; no other host gets anything.

    Raises `LinkError` if it cannot send.
    """
    header = struct.pack("!BxxxI", 0x08, vni << 8)
    family = socket.AF_INET if peer.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.bind((str(local), 0))
            for address, mac in owners.items():
                sender.sendto(header + frame(mac, address), (str(peer), port))
    except OSError as error:
        reason = OSError(error.errno, os.strerror(error.errno or 0))
        raise LinkError(f"cannot announce addresses to {peer}", reason) from error


def frame(mac: MacAddress, address: IPAddress) -> bytes:
    """The Ethernet frame that says that `address` is at `mac`."""
    if address.version == 4:
        sender = mac.packed + address.packed
        # A request, with the sender as the target: RFC 5227, 3, prefers it to an answer.
        arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + sender + bytes(6) + address.packed
        return _BROADCAST + mac.packed + struct.pack("!H", _ARP) + arp
    option = struct.pack("!BB", 2, 1) + mac.packed  # Target Link-Layer Address
    body = struct.pack("!I", _OVERRIDE) + address.packed + option
    pseudo = address.packed + _ALL_NODES.packed + struct.pack("!II", 4 + len(body), _ICMPV6)
    checksum = _checksum(pseudo + struct.pack("!BBH", 136, 0, 0) + body)
    message = struct.pack("!BBH", 136, 0, checksum) + body
    header = struct.pack("!IHBB", 6 << 28, len(message), _ICMPV6, 255) + address.packed + _ALL_NODES.packed
    return _ALL_NODES_MAC + mac.packed + struct.pack("!H", _IPV6) + header + message


def _checksum(data: bytes) -> int:
    """RFC 1071; the length is even."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
