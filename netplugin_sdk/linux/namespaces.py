"""Network namespaces: makes them, keeps them by a file, and configures them as an engine does for a container.

Threads enter and leave them, never the process: "here" is the namespace of the calling thread.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from netplugin_sdk.errors import Conflict, DriverError
from netplugin_sdk.linux import links
from netplugin_sdk.linux.announce import announce
from netplugin_sdk.linux.links import LinkError
from netplugin_sdk.values import IPAddress, IPInterface, IPNetwork, MacAddress

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_MS_BIND, _MNT_DETACH = 4096, 2  # sys/mount.h
_IFA_F_NODAD = 0x02  # linux/if_addr.h
_SIOCGIFFLAGS, _IFF_RUNNING = 0x8913, 0x40  # linux/sockios.h, linux/if.h
_ANNOUNCE_PAUSES = 0.0, 1.0, 1.0  # seconds before each announcement: three, as engines do, since one may be lost
_CARRIER_TIMEOUT = 1.0  # seconds in which an interface that is set up has its carrier
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Route:
    """A route of a sandbox to a network: `via` a next hop, or on the link of `interface`."""

    destination: IPNetwork
    via: IPAddress | None = None
    interface: str | None = None


def unshare() -> None:
    """Give this thread a network namespace of its own, until it ends. (os.unshare is new in Python 3.12.)"""
    _check(_libc.unshare(_CLONE_NEWNET))


def enter(path: Path | str) -> None:
    """Put this thread into the namespace that the file keeps."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(fd, _CLONE_NEWNET))
    finally:
        os.close(fd)


def up(name: str) -> None:
    """Set an interface of this thread's namespace up, such as the loopback of a new one."""
    with IPRoute() as ipr, _refused(f"set {name} up"):
        ipr.link("set", index=ipr.link_lookup(ifname=name)[0], state="up")


def _check(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Namespace:
    """The network namespace that a file keeps, such as a sandbox key of Docker's (``/run/docker/netns/…``)."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: Path | str, *, fresh: bool = True) -> Namespace:
        """Keep a namespace by a new file: a new one with its loopback up or, not `fresh`, that of the calling thread.

        Raises `Conflict` if there is such a file.
        """
        namespace = cls(path)
        namespace.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            namespace.path.touch(mode=0o600, exist_ok=False)
        except FileExistsError:
            raise Conflict(f"{path} exists already") from None

        def make() -> None:
            if fresh:
                unshare()
                up("lo")
            _check(_libc.mount(b"/proc/thread-self/ns/net", os.fsencode(path), None, _MS_BIND, None))

        try:
            _in_thread(make)
        except BaseException:
            namespace.path.unlink()
            raise
        return namespace

    @property
    def exists(self) -> bool:
        """Whether the file keeps a namespace: after a reboot it is an empty file, or none."""
        with suppress(OSError):
            return self.path.stat().st_dev == Path("/proc/self/ns/net").stat().st_dev
        return False

    def remove(self) -> None:
        """Remove the file, and with it the namespace, unless a process is in it. It may be gone already."""
        _libc.umount2(os.fsencode(self.path), _MNT_DETACH)
        self.path.unlink(missing_ok=True)

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in a thread inside. Its sockets stay inside."""

        def inside() -> T:
            enter(self.path)
            return function()

        return _in_thread(inside)

    def run(self, *command: str, hosts: Path | None = None, timeout: float | None = None) -> str:
        """Run a program inside, with `hosts` as its ``/etc/hosts``. Returns its output.

        `timeout` is in seconds. Raises `DriverError` with the program's own words if it fails.
        """
        enter = ["nsenter", f"--net={self.path}", "--"]
        if hosts is not None:
            enter += ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(hosts)]
        done = subprocess.run([*enter, *command], capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode:
            said = done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}"
            raise DriverError(f"{' '.join(command)}: {said}")
        return done.stdout

    def take(
        self,
        link: str,
        name: str,
        addresses: Iterable[IPInterface],
        *,
        mac: str | None = None,
        routes: Iterable[Route] = (),
    ) -> None:
        """Move a link from here inside under a new name, add its addresses and routes, set it up, and announce it.

        The addresses are announced by gratuitous ARP and unsolicited advertisements: a neighbour that knew another MAC
        address learns the new one (RFC 5227 section 3, RFC 4861 section 7.2.6).

        If that fails the link is moved back, under its own name. Raises `NotFound` if there is no such link here,
        `LinkError` if the kernel refuses.
        """
        with self.path.open() as there:
            try:
                links.move(link, there.fileno(), name)
            except LinkError:
                self.move_out(link, link)  # it may have been moved and not renamed
                raise
        addresses, routes = tuple(addresses), tuple(routes)
        try:
            own = self.call(lambda: _configure(name, addresses, mac, routes))
        except BaseException:
            with suppress(DriverError):
                self.move_out(name, link)
            raise
        if len(own) == 6:  # else it is not Ethernet
            # Not waited for: the kernel takes 10 ms to close a packet socket (packet_release).
            owners = dict.fromkeys((address.ip for address in addresses), MacAddress.from_bytes(own))
            telling = partial(self._announce, name, owners)
            threading.Thread(target=telling, name="announcement", daemon=True).start()

    def _announce(self, name: str, owners: Mapping[IPAddress, MacAddress]) -> None:
        def tell() -> None:
            _wait_for_carrier(name)
            announce(name, owners)

        for pause in _ANNOUNCE_PAUSES:
            time.sleep(pause)  # outside: a process that is inside keeps the namespace
            try:
                self.call(tell)
            except (OSError, DriverError):
                return  # it is gone again

    def move_out(self, name: str, link: str) -> bool:
        """Move a link from inside to here, under the name `link`, without addresses. False if there is none inside."""

        def leave() -> bool:
            with IPRoute() as ipr:
                found = ipr.link_lookup(ifname=name)
                if not found:
                    return False
                with _refused(f"move interface {name} out of the sandbox"):
                    ipr.link("set", index=found[0], state="down")
                    ipr.link("set", index=found[0], net_ns_fd=here, ifname=link)
                return True

        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return self.call(leave)
        finally:
            os.close(here)

    def change_routes(self, remove: Iterable[Route], add: Iterable[Route]) -> None:
        """Remove those of the routes that exist, and add others. Raises `LinkError` if the kernel refuses."""
        remove, add = tuple(remove), tuple(add)
        if remove or add:
            self.call(lambda: _change_routes(remove, add))


def _in_thread(function: Callable[[], T]) -> T:
    """Run a function in a thread of its own: its namespace ends with it, and no other thread gets into a wrong one."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except (NetlinkError, OSError) as error:
        raise LinkError(f"cannot {what}", error) from error


def _configure(name: str, addresses: tuple[IPInterface, ...], mac: str | None, routes: tuple[Route, ...]) -> bytes:
    """Configure a link inside. Returns its hardware address."""
    with IPRoute() as ipr:
        (index,) = ipr.link_lookup(ifname=name)
        with _refused(f"set the MAC address of {name} to {mac}"):
            if mac is not None:
                ipr.link("set", index=index, address=mac)
        for address in addresses:
            with _refused(f"give {address} to {name}"):
                nodad: dict[str, Any] = {"flags": _IFA_F_NODAD} if address.version == 6 else {}
                ipr.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen, **nodad)
        with _refused(f"set {name} up"):
            ipr.link("set", index=index, state="up")
        _add_routes(ipr, routes)
        (link,) = ipr.link("get", index=index)
    return bytes.fromhex((link.get_attr("IFLA_ADDRESS") or "").replace(":", ""))


def _change_routes(remove: tuple[Route, ...], add: tuple[Route, ...]) -> None:
    with IPRoute() as ipr:
        for route in remove:
            with suppress(NetlinkError, OSError, IndexError):  # it went with its interface
                ipr.route("del", **_described(ipr, route))
        _add_routes(ipr, add)


def _add_routes(ipr: Any, routes: tuple[Route, ...]) -> None:
    for route in routes:
        via = f" via {route.via}" if route.via else ""
        with _refused(f"add the route to {route.destination}{via}"):
            ipr.route("add", **_described(ipr, route))


def _described(ipr: Any, route: Route) -> dict[str, Any]:
    described: dict[str, Any] = {"dst": str(route.destination), "family": _family(route.destination)}
    if route.via is not None:
        described["gateway"] = str(route.via)
    if route.interface is not None:
        described["oif"] = ipr.link_lookup(ifname=route.interface)[0]
        if route.via is None:
            described["scope"] = "link"
    return described


def _family(of: IPNetwork | IPAddress) -> int:
    return socket.AF_INET if of.version == 4 else socket.AF_INET6


DEFAULT = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}
"""The destination of a default route, by IP version."""


def _wait_for_carrier(name: str) -> None:
    """Wait, as frames that are sent earlier are lost. Not for ever: the carrier may never come."""
    until = time.monotonic() + _CARRIER_TIMEOUT
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        while time.monotonic() < until:
            found = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack("16sH22x", name.encode(), 0))
            if struct.unpack_from("16xH", found)[0] & _IFF_RUNNING:
                return
            time.sleep(0.002)
