"""Bridges, veth pairs, macvlans, VLANs and routes in the plugin's own network namespace, over netlink.

Every function makes it so if it is not, so it can be run again after a crash at any point. A name that the kernel
would not take raises `InvalidRequest` before the kernel is asked; whatever the kernel refuses raises `LinkError`.
All functions may be called from any number of threads.

What somebody else takes away from an interface that was made here is told to `netplugin_sdk.losses`.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network, ip_address, ip_interface, ip_network
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Concatenate, Literal, ParamSpec, TypeAlias, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from netplugin_sdk.errors import Conflict, DriverError, InvalidRequest, NotFound
from netplugin_sdk.linux.watch import Made, Watch
from netplugin_sdk.values import IPAddress

P = ParamSpec("P")
T = TypeVar("T")

_IFF_UP = 0x1  # linux/if.h
_IFA_F_NODAD = 0x02  # linux/if_addr.h
_OF_THE_KERNEL = (2, 3, 4, 5)  # linux/rtnetlink.h: RTN_LOCAL, RTN_BROADCAST, RTN_ANYCAST, RTN_MULTICAST
# linux/rtnetlink.h: RT_TABLE_MAIN, RTN_UNREACHABLE, RT_SCOPE_LINK
_MAIN, _UNREACHABLE, _ON_LINK = 254, 7, 253
# linux/neighbour.h, linux/netlink.h, linux/rtnetlink.h
_NUD_NOARP, _NUD_PERMANENT, _NTF_SELF, _NTF_MASTER, _NDA_DST, _NDA_LLADDR = 0x40, 0x80, 0x02, 0x04, 1, 2
_REQUEST, _ACKNOWLEDGE, _CREATE, _APPEND, _RTM_NEWNEIGH = 0x1, 0x4, 0x400, 0x800, 28
_MANY = 100  # requests in one message: what is told of them fits into the socket's buffer
_ANY = "00:00:00:00:00:00"  # of the entries of a VXLAN for what it knows no other of (drivers/net/vxlan)
_IPVLAN_MODES = {"l2": 0, "l3": 1, "l3s": 2}  # linux/if_link.h
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE)


class LinkError(DriverError):
    """The kernel refused to make, change or remove an interface: which one, what was tried, and the kernel's reason."""

    def __init__(self, what: str, error: NetlinkError | OSError) -> None:
        code, text = error.args[:2]
        reason = os.strerror(code)
        # The kernel often says more than the number does (NETLINK_EXT_ACK): "mtu less than device minimum".
        super().__init__(f"{what}: {reason}" if text == reason else f"{what}: {reason} ({text})")


@dataclass(frozen=True, slots=True)
class Link:
    """An interface, as the kernel describes it."""

    name: str
    kind: str | None
    """``bridge``, ``veth``, ``vxlan`` …; None for hardware and the loopback."""
    mtu: int
    """In bytes."""
    mac: str | None
    """Such as ``02:42:ac:11:00:02``; None where the kind of link has no hardware address."""
    up: bool
    master: str | None
    """Name of the bridge (or bond, …) that it is a port of."""
    addresses: tuple[IPv4Interface | IPv6Interface, ...]


def ensure_bridge(
    name: str,
    *,
    addresses: Iterable[IPv4Interface | IPv6Interface] = (),
    mtu: int | None = None,
    group: int | None = None,
) -> None:
    """A bridge of this name that is up and has at least these `addresses`; an existing bridge is adopted.

    `mtu` is in bytes; without it a bridge takes the smallest MTU of its ports. `group` is that of a new bridge (``ip
    link set group``). IPv6 addresses skip duplicate address detection, so they can be used at once. A bridge that was
    made here and could not be completed is removed again.

    Raises `Conflict` if an interface of another kind has the name, `LinkError` if the kernel refuses.
    """
    _check_name(name)
    _netlink.run(_ensure_bridge, name, tuple(addresses), mtu, group)


def ensure_veth(
    host: str, inside: str, *, master: str | None = None, mtu: int | None = None, mac: str | None = None
) -> None:
    """A pair of interfaces `host` and `inside`, both here: what enters one leaves the other. `host` is up.

    `master` is the bridge that `host` becomes a port of, `mtu` (bytes) is set on both ends, `mac` on `inside`; what is
    None is the kernel's choice for a new pair and left as it is on an existing one. `inside` is for the engine to move
    into the container's sandbox. If `host` exists and its other end is not here any more, a new pair replaces it.

    Raises `Conflict` if either name belongs to something else, `LinkError` if there is no `master` or the kernel
    refuses.
    """
    _check_name(host)
    _check_name(inside)
    if master is not None:
        _check_name(master)
    if mac is not None and not _MAC.fullmatch(mac):
        raise InvalidRequest(f"veth {host}: {mac!r} is not a MAC address")
    _netlink.run(_ensure_veth, host, inside, master=master, mtu=mtu, mac=mac)


def ensure_macvlan(
    name: str,
    parent: str,
    *,
    mode: Literal["bridge", "private", "vepa", "passthru"] = "bridge",
    mac: str | None = None,
) -> None:
    """An interface with a MAC address of its own on the network of `parent`, here, for the engine to move (macvlan).

    In mode bridge those of one parent reach each other; nobody on them reaches the host itself. `mac` is as for
    `ensure_veth`; its MTU is the parent's.

    Raises `Conflict` if the name belongs to something else, `LinkError` if there is no `parent` or the kernel refuses.
    """
    _check_name(name)
    _check_name(parent)
    if mac is not None and not _MAC.fullmatch(mac):
        raise InvalidRequest(f"macvlan {name}: {mac!r} is not a MAC address")
    _netlink.run(_ensure_upon, "macvlan", name, parent, mac, macvlan_mode=mode)


def ensure_ipvlan(name: str, parent: str, *, mode: Literal["l2", "l3", "l3s"] = "l2") -> None:
    """An interface with the MAC address of `parent`, here, for the engine to move (ipvlan).

    Raises `Conflict` if the name belongs to something else, `LinkError` if there is no `parent` or the kernel refuses:
    not every kernel has it.
    """
    _check_name(name)
    _check_name(parent)
    _netlink.run(_ensure_upon, "ipvlan", name, parent, None, ipvlan_mode=_IPVLAN_MODES[mode])


def ensure_vlan(name: str, parent: str, number: int) -> None:
    """An interface for the frames of `parent` that have this VLAN number (IEEE 802.1Q, 1 to 4094), up.

    Raises `Conflict` if the name belongs to something else, `LinkError` if there is no `parent` or the kernel refuses:
    not every kernel has it.
    """
    _check_name(name)
    _check_name(parent)
    if not 1 <= number <= 4094:
        raise InvalidRequest(f"vlan {name}: {number} is no VLAN number: that is 1 to 4094")
    _netlink.run(_ensure_vlan, name, parent, number)


def ensure_vxlan(
    name: str,
    vni: int,
    *,
    master: str | None = None,
    local: IPAddress | None = None,
    port: int = 4789,
    mtu: int | None = None,
) -> None:
    """A VXLAN (RFC 7348) of this network identifier, up: what enters it is sent to other hosts in UDP.

    It learns which host a MAC address is on from what comes from there; whom it sends to before it knows is told by
    `ensure_flood`. `master` is the bridge that it becomes a port of, `local` this host's address that it sends from,
    `port` the UDP port of all hosts, `mtu` is in bytes, of what is inside. Around that come 50 bytes, with IPv6 70.
    If it exists with another `local` address or `port`, a new one replaces it.

    Raises `Conflict` if the name belongs to something else, `LinkError` if there is no `master` or the kernel refuses,
    as where this identifier is in use.
    """
    _check_name(name)
    if not 0 < vni < 1 << 24:
        raise InvalidRequest(f"vxlan {name}: {vni} is no network identifier")
    if master is not None:
        _check_name(master)
    _netlink.run(_ensure_vxlan, name, vni, master=master, local=local, port=port, mtu=mtu)


def ensure_flood(name: str, peers: Iterable[IPAddress]) -> None:
    """Have a VXLAN send to exactly these hosts what it does not know the host of, and broadcasts: a copy to each.

    That is head-end replication. Raises `LinkError` if there is no VXLAN of this name or the kernel refuses, as it does
    for an address of another IP version than the VXLAN's own.
    """
    _check_name(name)
    _netlink.run(_ensure_flood, name, frozenset(map(str, peers)))


def add_flood(name: str, peer: IPAddress) -> None:
    """Have a VXLAN send such copies to this host, too. Raises as `ensure_flood`."""
    _check_name(name)
    _netlink.run(_add_flood, name, str(peer))


def delete_flood(name: str, peer: IPAddress) -> None:
    """Have a VXLAN send no copies to this host any more; what it has learned to be there it forgets.

    Raises as `ensure_flood`.
    """
    _check_name(name)
    _netlink.run(_delete_flood, name, str(peer))


def ensure_station(mac: str, port: str) -> None:
    """Have a bridge know that this MAC address is behind its port, before a frame has come from there.

    Raises `LinkError` if there is no such interface, it is no port of a bridge, or the kernel refuses.
    """
    _check_name(port)
    _netlink.run(_ensure_station, mac, port)


def attach(name: str, master: str) -> bool:
    """Make an interface a port of the bridge `master` and set it up, if it is here. False if there is none of its name.

    Raises `LinkError` if there is no `master` or the kernel refuses.
    """
    _check_name(name)
    _check_name(master)
    return _netlink.run(_attach, name, master)


def set_up(name: str, *, addresses: Iterable[IPv4Interface | IPv6Interface] = (), group: int | None = None) -> bool:
    """Set an interface up with at least these `addresses`, if it is here. False if there is none of its name.

    `group` is a number that firewall rules know it by (``ip link set group``). IPv6 addresses skip duplicate address
    detection. It is watched from now on as if it had been made here. Raises `LinkError` if the kernel refuses.
    """
    _check_name(name)
    return _netlink.run(_set_up, name, tuple(addresses), group)


def ensure_route(destination: IPv4Network | IPv6Network, interface: str | None = None) -> None:
    """A route of this host to `destination`, on the link of `interface`.

    Without one, who sends there is told that it is unreachable, unless a route to a part of it says better. The routes
    of an interface go when it goes down. Raises `Conflict` if there is another route to the same destination,
    `LinkError` if there is no such interface or the kernel refuses.
    """
    if interface is not None:
        _check_name(interface)
    _netlink.run(_ensure_route, destination, interface)


def delete_route(destination: IPv4Network | IPv6Network, interface: str | None = None) -> bool:
    """Remove what `ensure_route` made. False if it is not there. Raises `LinkError` if the kernel refuses."""
    if interface is not None:
        _check_name(interface)
    return _netlink.run(_delete_route, destination, interface)


def move(name: str, namespace: int, new_name: str) -> None:
    """Move an interface into the network namespace that a descriptor is open on, under another name there.

    Raises `NotFound` if there is none of its name, `LinkError` if the kernel refuses.
    """
    _check_name(name)
    _check_name(new_name)
    _netlink.run(_move, name, namespace, new_name)


def give_back(name: str, *, mtu: int, up: bool, without: Iterable[IPv4Interface | IPv6Interface] = ()) -> None:
    """Leave an interface that was adopted as it was: with this MTU in bytes, up or down, `without` these addresses.

    What is gone already is no error. Raises `LinkError` if the kernel refuses.
    """
    _check_name(name)
    _netlink.run(_give_back, name, mtu, up, tuple(without))


def delete(name: str) -> bool:
    """Remove an interface and, of a veth pair, the other end wherever it is. False if there is none of this name.

    The kernel takes 16 ms for a veth and 36 ms for a bridge. Raises `LinkError` if it refuses.
    """
    _check_name(name)
    return _netlink.run(_delete, name)


def exists(name: str) -> bool:
    """Whether there is an interface of this name."""
    _check_name(name)
    return _netlink.run(lambda _: _index(name) is not None)


def names() -> frozenset[str]:
    """Those of all interfaces here."""
    return frozenset(name for _, name in socket.if_nameindex())


def describe(name: str) -> Link:
    """What the kernel knows of this interface. Raises `NotFound` if there is none of this name."""
    _check_name(name)
    return _netlink.run(_describe, name)


def with_address(address: IPAddress) -> Link:
    """The interface that has this address. Raises `NotFound` if none has it."""
    return _netlink.run(_with_address, address)


def occupied() -> tuple[IPv4Network | IPv6Network, ...]:
    """The networks that this host has addresses in or routes to; not the default route.

    Raises `LinkError` if the kernel does not tell.
    """
    return _netlink.run(_occupied)


def close() -> None:
    """Wait for the operations under way, then end the worker threads and close their sockets; the next use starts anew.

    Done by itself when the interpreter exits. A worker stays in the network namespace of the thread whose call
    started it: a process that changes its namespace closes first. What was made is watched no more.
    """
    _watch.close()
    _netlink.close()


_Job: TypeAlias = "tuple[Future[Any], Callable[[Any], Any]]"


class _Workers:
    """A few threads with a netlink socket each, which the first operations start.

    Threads of our own, because an IPRoute keeps an event loop and a socket for every thread that ever used it, and
    only close() in that same thread frees them: the callers' threads are many and short-lived. More than one,
    because the kernel holds a thread for 16 to 36 ms while it deletes a link. A whole operation is one job, since
    each change of threads costs a quarter of a netlink request.
    """

    _MAX = 4

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def run(self, operation: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``operation(ipr, *args)`` returns or raises."""
        future: Future[T] = Future()
        with self._lock:  # never a job behind close()'s end marks
            self._jobs.put((future, lambda ipr: operation(ipr, *args, **kwargs)))
            if len(self._threads) < self._MAX:
                thread = threading.Thread(
                    target=_work, args=(self._jobs,), name=f"netlink-{len(self._threads)}", daemon=True
                )
                thread.start()
                self._threads.append(thread)
        return future.result()

    def close(self) -> None:
        with self._lock:
            jobs, self._jobs = self._jobs, SimpleQueue()
            threads, self._threads = self._threads, []
        for _ in threads:
            jobs.put(None)
        for thread in threads:
            thread.join()


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    ipr = None
    while (job := jobs.get()) is not None:
        future, operation = job
        try:
            ipr = ipr or IPRoute(ext_ack=True, strict_check=True)
            future.set_result(operation(ipr))
        except DriverError as error:
            future.set_exception(error)
        except Exception as error:
            # Not the kernel's answer but a failure to get one: the socket is not to be trusted any more.
            if ipr is not None:
                ipr.close()
                ipr = None
            future.set_exception(LinkError("netlink socket", error) if isinstance(error, OSError) else error)
        del job, future, operation  # an idle worker keeps nothing alive
    if ipr is not None:
        ipr.close()


_netlink = _Workers()
_watch = Watch(lambda name, made: _netlink.run(_what_is_wrong, name, made))
atexit.register(close)


def _ensure_bridge(
    ipr: Any, name: str, addresses: tuple[IPv4Interface | IPv6Interface, ...], mtu: int | None, group: int | None
) -> None:
    cannot = f"bridge {name}: cannot"
    try:
        # A bridge without an address of its own takes the lowest of its ports' and changes it as they come and go,
        # and the containers' neighbour entries for their gateway go stale. One that was set stays (br_stp_if.c,
        # br_stp_recalculate_bridge_id).
        ipr.link("add", kind="bridge", ifname=name, address=_mac_of(name), **_given(group=group))
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise LinkError(f"{cannot} create", error) from error
        link = _describe(ipr, name)
        if link.kind != "bridge":
            raise Conflict(f"{cannot} create: {_a(link.kind)} interface has this name") from error
        created, present = False, link.addresses
    else:
        created, present = True, ()
    try:
        index = _index(name)
        try:
            # MTU not at creation: only a change of an existing bridge's makes it stay, else it follows the ports
            # (br_device.c, br_change_mtu).
            ipr.link("set", index=index, state="up", **_given(mtu=mtu))
        except NetlinkError as error:
            raise LinkError(f"{cannot} {'set up' if mtu is None else f'set up with MTU {mtu}'}", error) from error
        for address in addresses:
            if address not in present:
                _add_address(ipr, cannot, index, address)
        if index is not None:
            _watch.expect(name, Made(index, addresses=addresses))
    except BaseException:
        if created:
            with suppress(LinkError):
                _delete(ipr, name)
        raise


def _add_address(ipr: Any, cannot: str, index: int | None, address: IPv4Interface | IPv6Interface) -> None:
    nodad = _IFA_F_NODAD if address.version == 6 else None
    try:
        ipr.addr(
            "add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen, **_given(flags=nodad)
        )
    except NetlinkError as error:
        raise LinkError(f"{cannot} add address {address}", error) from error


def _move(ipr: Any, name: str, namespace: int, new_name: str) -> None:
    if (index := _index(name)) is None:
        raise NotFound(f"there is no interface {name} to move into the sandbox")
    try:
        ipr.link("set", index=index, net_ns_fd=namespace, ifname=new_name)
    except (NetlinkError, OSError) as error:
        raise LinkError(f"cannot move interface {name} to another namespace", error) from error


def _give_back(ipr: Any, name: str, mtu: int, up: bool, addresses: tuple[IPv4Interface | IPv6Interface, ...]) -> None:
    _watch.expect_no_more(name)
    if (index := _index(name)) is None:
        return
    try:
        for address in addresses:
            try:
                ipr.addr("del", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
            except NetlinkError as error:
                if error.code not in (errno.EADDRNOTAVAIL, errno.ENODEV):
                    raise
        ipr.link("set", index=index, mtu=mtu, state="up" if up else "down")
    except NetlinkError as error:
        if error.code != errno.ENODEV:
            raise LinkError(f"interface {name}: cannot be given back", error) from error


def _ensure_veth(ipr: Any, host: str, inside: str, *, master: str | None, mtu: int | None, mac: str | None) -> None:
    cannot = f"veth {host}: cannot"
    master_index = None if master is None else _master(f"{cannot} attach to {master}", master)
    outer = _given(master=master_index, mtu=mtu)
    inner = _given(mtu=mtu, address=mac)

    def create() -> None:  # both ends with everything they need, in one request
        # A bridge whose own MAC nobody has set takes the lowest of its ports', and would change it with each container
        # (see _ensure_bridge). This one is the lowest of none.
        high = bytes((0xFE, *os.urandom(5))).hex(":")
        ipr.link("add", kind="veth", ifname=host, state="up", address=high, peer={"ifname": inside, **inner}, **outer)

    try:
        try:
            create()
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise
            there, here = _get(ipr, host), _get(ipr, inside)
            if there is not None and _kind(there) != "veth":
                raise Conflict(f"{cannot} create: {_a(_kind(there))} interface has this name") from None
            if here is not None and not (there is not None and _are_pair(there, here)):
                raise Conflict(f"{cannot} create: {inside} exists and is not its other end") from None
            if there is not None and here is not None:
                ipr.link("set", index=there["index"], state="up", **outer)
                if inner:
                    ipr.link("set", index=here["index"], **inner)
            else:
                _delete(ipr, host)
                create()
    except NetlinkError as error:
        raise LinkError(f"{cannot} create with {inside}", error) from error
    if (index := _index(host)) is not None:
        _watch.expect(host, Made(index, master=master_index))


def _ensure_upon(ipr: Any, /, kind: str, name: str, parent: str, mac: str | None, **attributes: object) -> None:
    cannot = f"{kind} {name}: cannot create on {parent}"
    index = _master(cannot, parent)
    try:
        there = _add(ipr, cannot, kind, name, {"link": index}, link=index, **attributes, **_given(address=mac))
        if there is not None and mac is not None and there.get("address") != mac.lower():
            ipr.link("set", index=there["index"], address=mac)
    except NetlinkError as error:
        raise LinkError(cannot, error) from error


def _ensure_vlan(ipr: Any, name: str, parent: str, number: int) -> None:
    cannot = f"vlan {name}: cannot create with number {number} on {parent}"
    index = _master(cannot, parent)
    try:
        same = {"link": index, ("linkinfo", "data", "vlan_id"): number}
        _add(ipr, cannot, "vlan", name, same, link=index, vlan_id=number)
        ipr.link("set", index=_index(name), state="up")
    except NetlinkError as error:
        raise LinkError(cannot, error) from error


def _ensure_vxlan(
    ipr: Any, name: str, vni: int, *, master: str | None, local: IPAddress | None, port: int, mtu: int | None
) -> None:
    cannot = f"vxlan {name}: cannot create with identifier {vni}"
    port_of = None if master is None else _master(cannot, master)
    version = "" if local is None or local.version == 4 else "6"
    own = {} if local is None else {f"vxlan_local{version}": str(local)}
    create = partial(_add, ipr, cannot, "vxlan", name, {("linkinfo", "data", "vxlan_id"): vni})
    attributes = {"vxlan_id": vni, "vxlan_port": port, **own, **_given(mtu=mtu)}
    try:
        there = create(**attributes)
        if there is not None and any(
            there.get(("linkinfo", "data", key)) != value for key, value in {"vxlan_port": port, **own}.items()
        ):
            _delete(ipr, name)
            there = create(**attributes)
        index = _index(name)
        ipr.link("set", index=index, state="up", **_given(master=port_of, mtu=mtu if there else None))
    except NetlinkError as error:
        raise LinkError(cannot, error) from error
    if index is not None:
        _watch.expect(name, Made(index, master=port_of))


def _ensure_flood(ipr: Any, name: str, peers: frozenset[str]) -> None:
    there = {entry.get("dst") for entry in _entries(ipr, name) if entry.get("lladdr") == _ANY}
    _add_flood(ipr, name, *sorted(peers - there))
    for peer in there - peers:
        _delete_flood(ipr, name, peer)


def _add_flood(_: Any, name: str, *peers: str) -> None:
    """Many requests in one message to the kernel: by pyroute2, one by one, a thousand peers take 0.3 s, here 5 ms."""
    cannot = f"vxlan {name}: cannot add the entry {_ANY} → "
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
        for first in range(0, len(peers), _MANY):
            some = peers[first : first + _MANY]
            index = _master(cannot + some[0], name)
            last = len(some) - 1
            kernel.send(b"".join(_flood_request(index, peer, n, n == last) for n, peer in enumerate(some)))
            number = -1
            while number < last:  # what is refused is told, and the last one always
                number, error = struct.unpack_from("=8xI4xi", kernel.recv(4096))
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


def _delete_flood(ipr: Any, name: str, peer: str) -> None:
    for entry in _entries(ipr, name):
        if entry.get("dst") == peer:
            mac = entry.get("lladdr")
            try:
                ipr.fdb("del", ifindex=entry["ifindex"], lladdr=mac, dst=peer)
            except NetlinkError as error:
                if error.code != errno.ENOENT:
                    raise LinkError(f"vxlan {name}: cannot delete the entry {mac} → {peer}", error) from error


def _entries(ipr: Any, name: str) -> Any:
    cannot = f"vxlan {name}: cannot read its entries"
    index = _master(cannot, name)
    try:
        # The kernel filters, as for addresses; see _describe.
        return [entry for entry in ipr.fdb("dump", ifindex=index, dump_filter=None) if entry["ifindex"] == index]
    except NetlinkError as error:
        raise LinkError(cannot, error) from error


def _ensure_station(ipr: Any, mac: str, port: str) -> None:
    cannot = f"interface {port}: cannot be known as the port of {mac}"
    try:
        ipr.fdb("replace", ifindex=_master(cannot, port), lladdr=mac, state=_NUD_NOARP, flags=_NTF_MASTER)
    except NetlinkError as error:
        raise LinkError(cannot, error) from error


def _with_address(ipr: Any, address: IPAddress) -> Link:
    try:
        for found in ipr.addr("dump", family=socket.AF_INET if address.version == 4 else socket.AF_INET6):
            has_it = (found.get("local") or found.get("address")) == str(address)
            if has_it and (name := _name(found["index"])) is not None:
                return _describe(ipr, name)
    except NetlinkError as error:
        raise LinkError("cannot read the host's addresses", error) from error
    raise NotFound(f"no interface of this host has the address {address}")


def _add(
    ipr: Any, cannot: str, kind: str, name: str, same: Mapping[Any, object], /, **attributes: object
) -> Any | None:
    """None if it is new; else what is there, if it is of this kind and what tells one from another is the same."""
    try:
        ipr.link("add", kind=kind, ifname=name, **attributes)
    except NetlinkError as error:
        if error.code != errno.EEXIST or (there := _get(ipr, name)) is None:
            raise
        if _kind(there) != kind or any(there.get(attribute) != value for attribute, value in same.items()):
            raise Conflict(f"{cannot}: {_a(_kind(there))} interface has this name") from None
        return there
    return None


def _attach(ipr: Any, name: str, master: str) -> bool:
    cannot = f"interface {name}: cannot attach to {master}"
    if (index := _index(name)) is None:
        return False
    master_index = _master(cannot, master)
    try:
        ipr.link("set", index=index, master=master_index, state="up")
    except NetlinkError as error:
        if error.code == errno.ENODEV and _index(name) is None:
            return False
        raise LinkError(cannot, error) from error
    _watch.expect(name, Made(index, master=master_index))
    return True


def _set_up(ipr: Any, name: str, addresses: tuple[IPv4Interface | IPv6Interface, ...], group: int | None) -> bool:
    if (index := _index(name)) is None:
        return False
    cannot = f"interface {name}: cannot"
    try:
        ipr.link("set", index=index, state="up", **_given(group=group))
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return False
        raise LinkError(f"{cannot} set up", error) from error
    try:
        present = _describe(ipr, name).addresses if addresses else ()
    except NotFound:
        return False
    for address in addresses:
        if address not in present:
            _add_address(ipr, cannot, index, address)
    _watch.expect(name, Made(index, addresses=addresses))
    return True


def _ensure_route(ipr: Any, destination: IPv4Network | IPv6Network, interface: str | None) -> None:
    cannot = f"{_route_in_words(destination, interface)}: cannot add"
    route = _route(cannot, destination, interface)
    try:
        ipr.route("add", **route)
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise LinkError(cannot, error) from error
        # Without `dump_filter` pyroute2 would look through all routes; see _describe.
        same = {name: route[name] for name in ("family", "type", "oif") if name in route}
        for found in ipr.route("dump", table=_MAIN, dump_filter=None, **same):
            if (found.get("dst"), found["dst_len"]) == (str(destination.network_address), destination.prefixlen):
                return
        raise Conflict(f"{cannot}: there is another route to it") from None


def _delete_route(ipr: Any, destination: IPv4Network | IPv6Network, interface: str | None) -> bool:
    if interface is not None and _index(interface) is None:
        return False
    cannot = f"{_route_in_words(destination, interface)}: cannot delete"
    try:
        ipr.route("del", **_route(cannot, destination, interface))
    except NetlinkError as error:
        if error.code in (errno.ESRCH, errno.ENODEV):
            return False
        raise LinkError(cannot, error) from error
    return True


def _route_in_words(destination: IPv4Network | IPv6Network, interface: str | None) -> str:
    return f"route to {destination}" + (f" by {interface}" if interface else "")


def _route(cannot: str, destination: IPv4Network | IPv6Network, interface: str | None) -> dict[str, Any]:
    family = socket.AF_INET if destination.version == 4 else socket.AF_INET6
    described = {"dst": str(destination), "family": family}
    if interface is not None:
        return described | {"oif": _master(cannot, interface), "scope": _ON_LINK}
    if destination.version == 4:
        return described | {"type": _UNREACHABLE}
    # It is the loopback's, which tells it from others when it is deleted: the type does not (ip6_route_del).
    return described | {"type": _UNREACHABLE, "oif": _master(cannot, "lo")}


def _master(cannot: str, master: str) -> int:
    if (index := _index(master)) is None:
        raise LinkError(cannot, OSError(errno.ENODEV, os.strerror(errno.ENODEV)))
    return index


def _are_pair(one: Any, other: Any) -> bool:
    # IFLA_LINK is the other end's index in the other end's own namespace, which is named if it is not this one.
    return bool(
        _kind(other) == "veth"
        and one.get("link_netnsid") is None
        and one.get("link") == other["index"]
        and other.get("link") == one["index"]
    )


def _delete(ipr: Any, name: str) -> bool:
    _watch.expect_no_more(name)
    try:
        ipr.link("del", ifname=name)
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return False
        raise LinkError(f"interface {name}: cannot delete", error) from error
    return True


def _what_is_wrong(ipr: Any, name: str, made: Made) -> str | None:
    """With an interface that was made here, if anything is."""
    present = _addresses(ipr, name, made.index) if made.addresses else ()
    message = _get(ipr, name)
    if message is None or message["index"] != made.index:
        return "is gone"
    if not message["flags"] & _IFF_UP:
        return "is down"
    if made.master is not None and message.get("master") != made.master:
        return "is no port of its bridge any more"
    if lost := [str(address) for address in made.addresses if address not in present]:
        return f"has lost {', '.join(lost)}"
    return None


def _describe(ipr: Any, name: str) -> Link:
    index = _index(name)
    addresses = () if index is None else _addresses(ipr, name, index)
    message = _get(ipr, name)
    if message is None or message["index"] != index:
        raise NotFound(f"there is no interface {name}")
    master = message.get("master")
    return Link(
        name=message.get("ifname"),
        kind=_kind(message),
        mtu=message.get("mtu"),
        mac=message.get("address"),
        up=bool(message["flags"] & _IFF_UP),
        master=None if master is None else _name(master),
        addresses=addresses,
    )


def _addresses(ipr: Any, name: str, index: int) -> tuple[IPv4Interface | IPv6Interface, ...]:
    """To be asked before the link is: the kernel takes a link from its list, and then the link's addresses away."""
    try:
        return tuple(
            # IFA_ADDRESS is the far end of a point-to-point link; IFA_LOCAL, where there is one, is ours.
            ip_interface(f"{found.get('local') or found.get('address')}/{found['prefixlen']}")
            # With the socket's strict check the kernel filters by index. Without `dump_filter` pyroute2 would do it,
            # after having decoded the addresses of all interfaces.
            for found in ipr.addr("dump", index=index, dump_filter=None)
        )
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return ()
        raise LinkError(f"interface {name}: cannot read its addresses", error) from error


def _occupied(ipr: Any) -> tuple[IPv4Network | IPv6Network, ...]:
    found: set[IPv4Network | IPv6Network] = set()
    try:
        for address in ipr.addr("dump"):
            text = address.get("local") or address.get("address")
            found.add(ip_interface(f"{text}/{address['prefixlen']}").network)
        for family in (socket.AF_INET, socket.AF_INET6):
            for route in ipr.route("dump", family=family):
                if (destination := route.get("dst")) is not None and route["type"] not in _OF_THE_KERNEL:
                    found.add(ip_network(f"{destination}/{route['dst_len']}", strict=False))
    except NetlinkError as error:
        raise LinkError("cannot read the host's addresses and routes", error) from error
    return tuple(found)


def _get(ipr: Any, name: str) -> Any | None:
    """The kernel's RTM_NEWLINK message of this interface, if there is one."""
    try:
        return ipr.link("get", ifname=name)[0]
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise LinkError(f"interface {name}: cannot read", error) from error


def _index(name: str) -> int | None:
    """By ioctl: 5 µs, where a netlink request takes 250."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def _name(index: int) -> str | None:
    try:
        return socket.if_indextoname(index)
    except OSError:  # gone meanwhile
        return None


def _kind(message: Any) -> str | None:
    kind: str | None = message.get(("linkinfo", "kind"))
    return kind


def _a(kind: str | None) -> str:
    return f"a {kind}" if kind else "a physical or loopback"


def _given(**attributes: object) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


def _mac_of(name: str) -> str:
    """Of a bridge that is made here and now; the same one if it has to be made again, since containers remember it.

    And another one elsewhere, since a bridge of this name may stand on the same segment. Locally administered, unicast.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    namespace = Path("/proc/thread-self/ns/net").stat().st_ino
    digest = hashlib.blake2b(f"{boot}{namespace} {name}".encode(), digest_size=5).digest()
    return bytes((0x02, *digest)).hex(":")


def _check_name(name: str) -> None:
    """What the kernel demands (net/core/dev.c, dev_valid_name), and no ``%``, which makes it pick a number."""
    if (
        not name.isprintable()  # first: neither control characters nor lone surrogates reach encode()
        or set(name) & set(" /:%")
        or name in (".", "..")
        or not 1 <= len(name.encode()) <= 15
    ):
        raise InvalidRequest(
            f"{name!r} cannot be the name of an interface: that is 1 to 15 bytes without white space, '/', ':' or '%'"
        )
