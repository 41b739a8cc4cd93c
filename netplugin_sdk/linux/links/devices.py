"""Interfaces: bridges, veth pairs, macvlans, VLANs, VXLANs. Makes, changes, describes and removes them."""

from __future__ import annotations

import atexit
import errno
import hashlib
import os
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Interface, IPv6Interface
from pathlib import Path
from typing import Any, Literal

from pyroute2.netlink.exceptions import NetlinkError

from netplugin_sdk.errors import Conflict, InvalidRequest, NotFound
from netplugin_sdk.linux.links import netlink
from netplugin_sdk.linux.links.addresses import add_address, addresses_of
from netplugin_sdk.linux.links.diagnosis import watch
from netplugin_sdk.linux.links.netlink import (
    IFF_UP,
    LinkError,
    a_kind,
    add,
    check_name,
    given,
    index_of,
    kernel,
    kind_of,
    message_of,
    name_of,
    operation,
    required_index,
)
from netplugin_sdk.linux.watch import Made
from netplugin_sdk.values import IPAddress

_IPVLAN_MODES = {"l2": 0, "l3": 1, "l3s": 2}  # linux/if_link.h
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE)


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


@operation
def ensure_bridge(
    name: str,
    *,
    addresses: Iterable[IPv4Interface | IPv6Interface] = (),
    mtu: int | None = None,
    group: int | None = None,
) -> None:
    """Make a bridge that is up and has at least these `addresses`; an existing bridge of this name is adopted.

    `mtu` is in bytes; without it a bridge takes the smallest MTU of its ports. `group` is that of a new bridge (``ip
    link set group``). IPv6 addresses skip duplicate address detection, so they can be used at once. A bridge that was
    made here and could not be completed is removed again.

    Raises `Conflict` if an interface of another kind has the name, `LinkError` if the kernel refuses.
    """
    check_name(name)
    wanted = tuple(addresses)
    cannot = f"bridge {name}: cannot"
    try:
        # A bridge without an address of its own takes the lowest of its ports' and changes it as they come and go,
        # and the containers' neighbour entries for their gateway go stale. One that was set stays (br_stp_if.c,
        # br_stp_recalculate_bridge_id).
        kernel().link("add", kind="bridge", ifname=name, address=_mac_of(name), **given(group=group))
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise LinkError(f"{cannot} create", error) from error
        link = describe(name)
        if link.kind != "bridge":
            raise Conflict(f"{cannot} create: {a_kind(link.kind)} interface has this name") from error
        created, present = False, link.addresses
    else:
        created, present = True, ()
    try:
        index = index_of(name)
        try:
            # MTU not at creation: only a change of an existing bridge's makes it stay, else it follows the ports
            # (br_device.c, br_change_mtu).
            kernel().link("set", index=index, state="up", **given(mtu=mtu))
        except NetlinkError as error:
            raise LinkError(f"{cannot} {'set up' if mtu is None else f'set up with MTU {mtu}'}", error) from error
        for address in wanted:
            if address not in present:
                add_address(cannot, index, address)
        if index is not None:
            watch.watch(name, Made(index, addresses=wanted))
    except BaseException:
        if created:
            with suppress(LinkError):
                delete(name)
        raise


@operation
def ensure_veth(
    host: str, inside: str, *, master: str | None = None, mtu: int | None = None, mac: str | None = None
) -> None:
    """Make a pair of interfaces `host` and `inside`, both here: frames that enter one leave the other. `host` is up.

    `master` is the bridge that `host` becomes a port of, `mtu` (bytes) is set on both ends, `mac` on `inside`; for
    None, the kernel chooses on a new pair, and an existing one stays as it is. `inside` is for the engine to move into
    the container's sandbox. If `host` exists and its other end is not here any more, a new pair replaces it.

    Raises `Conflict` if either name belongs to something else, `LinkError` if there is no `master` or the kernel
    refuses.
    """
    check_name(host)
    check_name(inside)
    if master is not None:
        check_name(master)
    if mac is not None and not _MAC.fullmatch(mac):
        raise InvalidRequest(f"veth {host}: {mac!r} is not a MAC address")
    cannot = f"veth {host}: cannot"
    master_index = None if master is None else required_index(f"{cannot} attach to {master}", master)
    outer = given(master=master_index, mtu=mtu)
    inner = given(mtu=mtu, address=mac)

    def create() -> None:  # both ends with everything they need, in one request
        # A bridge without a MAC address of its own takes the lowest of its ports', and would change it with each
        # container (see ensure_bridge). This one is so high that it never is the lowest.
        high = bytes((0xFE, *os.urandom(5))).hex(":")
        kernel().link(
            "add", kind="veth", ifname=host, state="up", address=high, peer={"ifname": inside, **inner}, **outer
        )

    try:
        try:
            create()
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise
            there, here = message_of(host), message_of(inside)
            if there is not None and kind_of(there) != "veth":
                raise Conflict(f"{cannot} create: {a_kind(kind_of(there))} interface has this name") from None
            if here is not None and not (there is not None and _are_pair(there, here)):
                raise Conflict(f"{cannot} create: {inside} exists and is not its other end") from None
            if there is not None and here is not None:
                kernel().link("set", index=there["index"], state="up", **outer)
                if inner:
                    kernel().link("set", index=here["index"], **inner)
            else:
                delete(host)
                create()
    except NetlinkError as error:
        raise LinkError(f"{cannot} create with {inside}", error) from error
    if (index := index_of(host)) is not None:
        watch.watch(host, Made(index, master=master_index))


@operation
def ensure_macvlan(
    name: str,
    parent: str,
    *,
    mode: Literal["bridge", "private", "vepa", "passthru"] = "bridge",
    mac: str | None = None,
) -> None:
    """Make a macvlan here, for the engine to move: an interface with its own MAC address on the network of `parent`.

    In mode bridge, the macvlans of one parent reach each other; none of them reaches the host itself. `mac` is as for
    `ensure_veth`; its MTU is the parent's.

    Raises `Conflict` if the name belongs to something else, `LinkError` if there is no `parent` or the kernel refuses.
    """
    check_name(name)
    check_name(parent)
    if mac is not None and not _MAC.fullmatch(mac):
        raise InvalidRequest(f"macvlan {name}: {mac!r} is not a MAC address")
    _ensure_upon("macvlan", name, parent, mac, macvlan_mode=mode)


@operation
def ensure_ipvlan(name: str, parent: str, *, mode: Literal["l2", "l3", "l3s"] = "l2") -> None:
    """Make an ipvlan here, for the engine to move: an interface with the MAC address of `parent`.

    Raises `Conflict` if the name belongs to something else, `LinkError` if there is no `parent` or the kernel refuses:
    not every kernel has it.
    """
    check_name(name)
    check_name(parent)
    _ensure_upon("ipvlan", name, parent, None, ipvlan_mode=_IPVLAN_MODES[mode])


@operation
def ensure_vlan(name: str, parent: str, number: int) -> None:
    """Make an interface that is up, for the frames of `parent` with this VLAN number (IEEE 802.1Q, 1 to 4094).

    Raises `Conflict` if the name belongs to something else, `LinkError` if there is no `parent` or the kernel refuses:
    not every kernel has it.
    """
    check_name(name)
    check_name(parent)
    if not 1 <= number <= 4094:
        raise InvalidRequest(f"vlan {name}: {number} is not a VLAN number: that is 1 to 4094")
    cannot = f"vlan {name}: cannot create with number {number} on {parent}"
    index = required_index(cannot, parent)
    try:
        same = {"link": index, ("linkinfo", "data", "vlan_id"): number}
        add(cannot, "vlan", name, same, link=index, vlan_id=number)
        kernel().link("set", index=index_of(name), state="up")
    except NetlinkError as error:
        raise LinkError(cannot, error) from error


@operation
def ensure_vxlan(
    name: str,
    vni: int,
    *,
    master: str | None = None,
    local: IPAddress | None = None,
    port: int = 4789,
    mtu: int | None = None,
) -> None:
    """Make a VXLAN (RFC 7348) of this network identifier that is up: it sends its frames to other hosts in UDP.

    It learns the host of a MAC address from the frames that come from there; `set_flood_destinations` says where it
    sends before that. `master` is the bridge that it becomes a port of, `local` this host's address that it sends from,
    `port` the UDP port of all hosts, `mtu` is in bytes, of the frames inside. UDP adds 50, with IPv6 70. If it exists
    with another `local` address or `port`, a new one replaces it.

    Raises `Conflict` if the name belongs to something else, `LinkError` if there is no `master` or the kernel refuses,
    for example because this identifier is in use.
    """
    check_name(name)
    if not 0 < vni < 1 << 24:
        raise InvalidRequest(f"vxlan {name}: {vni} is not a network identifier")
    if master is not None:
        check_name(master)
    cannot = f"vxlan {name}: cannot create with identifier {vni}"
    port_of = None if master is None else required_index(cannot, master)
    version = "" if local is None or local.version == 4 else "6"
    own = {} if local is None else {f"vxlan_local{version}": str(local)}
    create = partial(add, cannot, "vxlan", name, {("linkinfo", "data", "vxlan_id"): vni})
    attributes = {"vxlan_id": vni, "vxlan_port": port, **own, **given(mtu=mtu)}
    try:
        there = create(**attributes)
        if there is not None and any(
            there.get(("linkinfo", "data", key)) != value for key, value in {"vxlan_port": port, **own}.items()
        ):
            delete(name)
            there = create(**attributes)
        index = index_of(name)
        kernel().link("set", index=index, state="up", **given(master=port_of, mtu=mtu if there else None))
    except NetlinkError as error:
        raise LinkError(cannot, error) from error
    if index is not None:
        watch.watch(name, Made(index, master=port_of))


@operation
def attach(name: str, master: str) -> bool:
    """Make an interface a port of the bridge `master` and set it up. False if there is no such interface here.

    Raises `LinkError` if there is no `master` or the kernel refuses.
    """
    check_name(name)
    check_name(master)
    cannot = f"interface {name}: cannot attach to {master}"
    if (index := index_of(name)) is None:
        return False
    master_index = required_index(cannot, master)
    try:
        kernel().link("set", index=index, master=master_index, state="up")
    except NetlinkError as error:
        if error.code == errno.ENODEV and index_of(name) is None:
            return False
        raise LinkError(cannot, error) from error
    watch.watch(name, Made(index, master=master_index))
    return True


@operation
def set_up(name: str, *, addresses: Iterable[IPv4Interface | IPv6Interface] = (), group: int | None = None) -> bool:
    """Set an interface up with at least these `addresses`. False if there is no such interface here.

    `group` is a number for it in firewall rules (``ip link set group``). IPv6 addresses skip duplicate address
    detection. It is watched from now on as if it had been made here. Raises `LinkError` if the kernel refuses.
    """
    check_name(name)
    wanted = tuple(addresses)
    if (index := index_of(name)) is None:
        return False
    cannot = f"interface {name}: cannot"
    try:
        kernel().link("set", index=index, state="up", **given(group=group))
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return False
        raise LinkError(f"{cannot} set up", error) from error
    try:
        present = describe(name).addresses if wanted else ()
    except NotFound:
        return False
    for address in wanted:
        if address not in present:
            add_address(cannot, index, address)
    watch.watch(name, Made(index, addresses=wanted))
    return True


@operation
def move(name: str, namespace: int, new_name: str) -> None:
    """Move an interface, under a new name, into the network namespace that `namespace`, a descriptor, is open on.

    Raises `NotFound` if there is no such interface, `LinkError` if the kernel refuses.
    """
    check_name(name)
    check_name(new_name)
    if (index := index_of(name)) is None:
        raise NotFound(f"there is no interface {name} to move into the sandbox")
    try:
        kernel().link("set", index=index, net_ns_fd=namespace, ifname=new_name)
    except (NetlinkError, OSError) as error:
        raise LinkError(f"cannot move interface {name} to another namespace", error) from error


@operation
def restore_link(name: str, *, mtu: int, up: bool, without: Iterable[IPv4Interface | IPv6Interface] = ()) -> None:
    """Restore an adopted interface: with this MTU in bytes, up or down, `without` these addresses.

    It is no error if the interface or an address is gone already. Raises `LinkError` if the kernel refuses.
    """
    check_name(name)
    watch.unwatch(name)
    if (index := index_of(name)) is None:
        return
    try:
        for address in without:
            try:
                kernel().addr("del", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
            except NetlinkError as error:
                if error.code not in (errno.EADDRNOTAVAIL, errno.ENODEV):
                    raise
        kernel().link("set", index=index, mtu=mtu, state="up" if up else "down")
    except NetlinkError as error:
        if error.code != errno.ENODEV:
            raise LinkError(f"interface {name}: cannot be restored", error) from error


@operation
def delete(name: str) -> bool:
    """Remove an interface and, of a veth pair, the other end wherever it is. False if there is no such interface.

    The kernel takes 16 ms for a veth and 36 ms for a bridge. Raises `LinkError` if it refuses.
    """
    check_name(name)
    watch.unwatch(name)
    try:
        kernel().link("del", ifname=name)
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return False
        raise LinkError(f"interface {name}: cannot delete", error) from error
    return True


@operation
def exists(name: str) -> bool:
    """Whether there is an interface of this name."""
    check_name(name)
    return index_of(name) is not None


def names() -> frozenset[str]:
    """The names of all interfaces here."""
    return frozenset(name for _, name in socket.if_nameindex())


@operation
def describe(name: str) -> Link:
    """The state of an interface. Raises `NotFound` if there is none of this name, `LinkError` if the kernel refuses."""
    check_name(name)
    index = index_of(name)
    addresses = () if index is None else addresses_of(name, index)
    message = message_of(name)
    if message is None or message["index"] != index:
        raise NotFound(f"there is no interface {name}")
    master = message.get("master")
    return Link(
        name=message.get("ifname"),
        kind=kind_of(message),
        mtu=message.get("mtu"),
        mac=message.get("address"),
        up=bool(message["flags"] & IFF_UP),
        master=None if master is None else name_of(master),
        addresses=addresses,
    )


@operation
def with_address(address: IPAddress) -> Link:
    """The interface with this address. Raises `NotFound` if there is none, `LinkError` if the kernel refuses."""
    try:
        for found in kernel().addr("dump", family=socket.AF_INET if address.version == 4 else socket.AF_INET6):
            has_it = (found.get("local") or found.get("address")) == str(address)
            if has_it and (name := name_of(found["index"])) is not None:
                return describe(name)
    except NetlinkError as error:
        raise LinkError("cannot read the host's addresses", error) from error
    raise NotFound(f"no interface of this host has the address {address}")


def close() -> None:
    """Wait for the operations under way, then end the worker threads and close their sockets; the next use starts them.

    Called automatically when the interpreter exits. A worker stays in the network namespace of the thread whose call
    started it: a process that changes its namespace closes first. Interfaces are no longer watched.
    """
    watch.close()
    netlink.close()


def _ensure_upon(kind: str, name: str, parent: str, mac: str | None, **attributes: object) -> None:
    cannot = f"{kind} {name}: cannot create on {parent}"
    index = required_index(cannot, parent)
    try:
        there = add(cannot, kind, name, {"link": index}, link=index, **attributes, **given(address=mac))
        if there is not None and mac is not None and there.get("address") != mac.lower():
            kernel().link("set", index=there["index"], address=mac)
    except NetlinkError as error:
        raise LinkError(cannot, error) from error


def _are_pair(one: Any, other: Any) -> bool:
    # IFLA_LINK is the other end's index in the other end's own namespace, which is named if it is not this one.
    return bool(
        kind_of(other) == "veth"
        and one.get("link_netnsid") is None
        and one.get("link") == other["index"]
        and other.get("link") == one["index"]
    )


def _mac_of(name: str) -> str:
    """The MAC address for a new bridge: the same if it is made again, since containers remember it.

    Other hosts and namespaces get another one, since they may have a bridge of this name on the same segment. Locally
    administered, unicast.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    namespace = Path("/proc/thread-self/ns/net").stat().st_ino
    digest = hashlib.blake2b(f"{boot}{namespace} {name}".encode(), digest_size=5).digest()
    return bytes((0x02, *digest)).hex(":")


atexit.register(close)
