"""Forwarding entries of VXLANs and bridges (bridge(8), fdb)."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError

from netplugin_sdk.linux.links.netlink import LinkError, check_name, kernel, operation, required_index
from netplugin_sdk.values import IPAddress

# linux/neighbour.h, linux/netlink.h, linux/rtnetlink.h
_NUD_NOARP, _NUD_PERMANENT, _NTF_SELF, _NTF_MASTER, _NDA_DST, _NDA_LLADDR = 0x40, 0x80, 0x02, 0x04, 1, 2
_REQUEST, _ACKNOWLEDGE, _CREATE, _APPEND, _RTM_NEWNEIGH = 0x1, 0x4, 0x400, 0x800, 28
_MANY = 100  # requests in one message: the kernel's answers to them fit into the socket's buffer
_ANY = "00:00:00:00:00:00"  # of a VXLAN's entries for destinations that it has no other for (drivers/net/vxlan)


@operation
def set_flood_destinations(name: str, peers: Iterable[IPAddress]) -> None:
    """Have a VXLAN send broadcasts, and frames to unknown MAC addresses, to exactly these hosts: one copy to each.

    That is head-end replication. Raises `LinkError` if there is no VXLAN of this name or the kernel refuses, as it does
    for an address of another IP version than the VXLAN's own.
    """
    check_name(name)
    wanted = frozenset(map(str, peers))
    there = {entry.get("dst") for entry in _entries(name) if entry.get("lladdr") == _ANY}
    _append(name, *sorted(wanted - there))
    for peer in there - wanted:
        _delete(name, peer)


@operation
def add_flood_destination(name: str, peer: IPAddress) -> None:
    """Have a VXLAN send such copies to this host too. Raises as `set_flood_destinations`."""
    check_name(name)
    _append(name, str(peer))


@operation
def delete_flood_destination(name: str, peer: IPAddress) -> None:
    """Have a VXLAN send no copies to this host any more, and forget the MAC addresses that it has learned there.

    Raises as `set_flood_destinations`.
    """
    check_name(name)
    _delete(name, str(peer))


@operation
def ensure_fdb_entry(mac: str, port: str) -> None:
    """Add a forwarding entry: the bridge of `port` sends frames for this MAC address there, before it has learned it.

    Raises `LinkError` if there is no such interface, it is not a port of a bridge, or the kernel refuses.
    """
    check_name(port)
    cannot = f"interface {port}: cannot add the forwarding entry of {mac}"
    try:
        kernel().fdb("replace", ifindex=required_index(cannot, port), lladdr=mac, state=_NUD_NOARP, flags=_NTF_MASTER)
    except NetlinkError as error:
        raise LinkError(cannot, error) from error


def _append(name: str, *peers: str) -> None:
    """Add entries, many in one message to the kernel: a thousand take 5 ms, and 0.3 s one by one with pyroute2."""
    cannot = f"vxlan {name}: cannot add the entry {_ANY} → "
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
        for first in range(0, len(peers), _MANY):
            some = peers[first : first + _MANY]
            index = required_index(cannot + some[0], name)
            last = len(some) - 1
            sock.send(b"".join(_flood_request(index, peer, n, n == last) for n, peer in enumerate(some)))
            number = -1
            while number < last:  # the kernel answers refused requests, and always the last one
                number, error = struct.unpack_from("=8xI4xi", sock.recv(4096))
                if error:
                    raise LinkError(cannot + some[number], OSError(-error, os.strerror(-error)))


def _flood_request(index: int, peer: str, number: int, acknowledge: bool) -> bytes:
    """``bridge fdb append`` (linux/netlink.h, linux/neighbour.h)."""
    destination = ip_address(peer).packed
    body = struct.pack("=BxxxiHBx", socket.AF_BRIDGE, index, _NUD_PERMANENT | _NUD_NOARP, _NTF_SELF)
    body += struct.pack("=HH", 4 + len(destination), _NDA_DST) + destination
    body += struct.pack("=HH6xxx", 4 + 6, _NDA_LLADDR)
    flags = _REQUEST | _CREATE | _APPEND | (_ACKNOWLEDGE if acknowledge else 0)
    return struct.pack("=IHHII", 16 + len(body), _RTM_NEWNEIGH, flags, number, 0) + body


def _delete(name: str, peer: str) -> None:
    for entry in _entries(name):
        if entry.get("dst") == peer:
            mac = entry.get("lladdr")
            try:
                kernel().fdb("del", ifindex=entry["ifindex"], lladdr=mac, dst=peer)
            except NetlinkError as error:
                if error.code != errno.ENOENT:
                    raise LinkError(f"vxlan {name}: cannot delete the entry {mac} → {peer}", error) from error


def _entries(name: str) -> Any:
    cannot = f"vxlan {name}: cannot read its entries"
    index = required_index(cannot, name)
    try:
        # The kernel filters; see `addresses.addresses_of`.
        return [entry for entry in kernel().fdb("dump", ifindex=index, dump_filter=None) if entry["ifindex"] == index]
    except NetlinkError as error:
        raise LinkError(cannot, error) from error
