"""Watches interfaces that were made here, and publishes changes by others to `netplugin_sdk.losses`."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface

from netplugin_sdk import losses

_log = logging.getLogger("netplugin_sdk")

_BUFFER = 1 << 20  # bytes: a thousand containers' changes

# linux/netlink.h, linux/rtnetlink.h, linux/if_link.h
_HEADER = struct.Struct("=IHHII")
_GROUPS = 0x1 | 0x10 | 0x100  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_NEWLINK, _DELLINK, _DELADDR = 16, 17, 21
_LINK, _ADDRESS, _ATTRIBUTE = struct.Struct("=BxHiII"), struct.Struct("=BBBBI"), struct.Struct("=HH")
_IFF_UP = 0x1
_IFLA_IFNAME, _IFLA_MASTER = 3, 10


@dataclass(frozen=True, slots=True)
class Made:
    """An interface as made here: up, a port of the bridge with index `master`, and with at least these `addresses`."""

    index: int
    master: int | None = None
    addresses: tuple[IPv4Interface | IPv6Interface, ...] = ()


class Watch:
    """One thread, while there are interfaces to watch. `look` says how an interface differs from `Made`; None if not.

    It looks `quiet` seconds after a change: changes come in bursts, and most of them are the SDK's own.
    """

    def __init__(self, look: Callable[[str, Made], str | None], *, quiet: float = 0.2) -> None:
        self.quiet = quiet
        """Seconds from a change to a look."""
        self._look = look
        self._lock = threading.Lock()
        self._made: dict[str, Made] = {}
        self._thread: threading.Thread | None = None
        self._waker = -1

    def watch(self, name: str, made: Made) -> None:
        """Publish a loss once the interface differs from `made`. The thread starts in the caller's namespace."""
        with self._lock:
            self._made[name] = made
            if self._thread is None:
                listener = _listener()  # here, so that nothing is missed from now on
                self._waker = os.eventfd(0)
                self._thread = threading.Thread(
                    target=self._run, args=(listener, self._waker), name="links", daemon=True
                )
                self._thread.start()

    def unwatch(self, name: str) -> None:
        """Stop watching an interface, before it is removed or changed here."""
        self._made.pop(name, None)

    def close(self) -> None:
        """Stop watching all interfaces, and end the thread."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._made.clear()
            if thread is not None:
                os.eventfd_write(self._waker, 1)
        if thread is not None:
            thread.join()

    def _run(self, listener: socket.socket, waker: int) -> None:
        changes = select.poll()
        changes.register(listener, select.POLLIN)
        changes.register(waker, select.POLLIN)
        closing = select.poll()
        closing.register(waker, select.POLLIN)
        with listener:
            while changes.poll() and not closing.poll(self.quiet * 1000):
                for name in self.suspects(listener):
                    self._verify(name)
        os.close(waker)

    def suspects(self, listener: socket.socket) -> set[str]:
        """Read all changes; the names of the interfaces that may have lost something by them."""
        names = {made.index: (name, made) for name, made in tuple(self._made.items())}
        suspects: set[str] = set()
        while True:
            try:
                data = listener.recv(_BUFFER)
            except BlockingIOError:
                return suspects
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                suspects.update(self._made)  # the kernel has dropped some messages
                continue
            for kind, body in _messages(data):
                index = (_ADDRESS if kind == _DELADDR else _LINK).unpack_from(body)[-1 if kind == _DELADDR else 2]
                if (found := names.get(index)) is not None and (kind != _NEWLINK or not _matches(body, *found)):
                    suspects.add(found[0])

    def _verify(self, name: str) -> None:
        made = self._made.get(name)
        try:
            if made is None or (wrong := self._look(name, made)) is None:
                return
        except Exception:
            _log.exception("cannot check interface %s", name)
            return
        with self._lock:
            if self._made.get(name) is not made:
                return  # removed or made again since
            del self._made[name]  # published once
        losses.publish(f"interface {name} {wrong}")


def _listener() -> socket.socket:
    listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    listener.bind((0, _GROUPS))
    return listener


def _messages(data: bytes) -> Iterator[tuple[int, memoryview]]:
    """Type and body of the messages that matter."""
    view, offset = memoryview(data), 0
    while offset + _HEADER.size <= len(view):
        length, kind, *_ = _HEADER.unpack_from(view, offset)
        if length < _HEADER.size:
            return
        body = view[offset + _HEADER.size : offset + length]
        if kind == _DELADDR or (kind in (_NEWLINK, _DELLINK) and body[0] == socket.AF_UNSPEC):  # AF_BRIDGE: of ports
            yield kind, body
        offset += (length + 3) & ~3


def _matches(body: memoryview, name: str, made: Made) -> bool:
    """Whether an RTM_NEWLINK message shows a link that is up, with this name and master: a link can be renamed."""
    *_, flags, _change = _LINK.unpack_from(body)
    wanted = {_IFLA_IFNAME: name.encode() + b"\0"}
    if made.master is not None:
        wanted[_IFLA_MASTER] = struct.pack("=I", made.master)
    offset = _LINK.size
    while wanted and offset + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        if kind in wanted and body[offset + _ATTRIBUTE.size : offset + length] != wanted.pop(kind):
            return False
        offset += max((length + 3) & ~3, _ATTRIBUTE.size)
    return bool(flags & _IFF_UP) and not wanted
