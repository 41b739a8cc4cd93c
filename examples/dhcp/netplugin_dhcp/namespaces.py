"""Network namespaces of containers, entered by threads that end there."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from netplugin_sdk import MacAddress

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_SIOCGIFHWADDR = 0x8927  # linux/sockios.h
_libc = ctypes.CDLL(None, use_errno=True)


def within(namespace: str | None, function: Callable[[], T]) -> T:
    """What `function` returns or raises in the network namespace of this path; None is the caller's own.

    A socket that it opens stays in there. Raises OSError if the namespace is gone or may not be entered.
    """
    if namespace is None:
        return function()

    def inside() -> T:
        file = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(file, _CLONE_NEWNET):  # os.setns is new in Python 3.12
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), namespace)
        finally:
            os.close(file)
        return function()

    with ThreadPoolExecutor(1) as thread:  # one of its own: it never comes back
        return thread.submit(inside).result()


def interface_of(mac: MacAddress) -> str:
    """The name of the interface with this MAC address, in the caller's namespace. Raises OSError if there is none.

    Inside a container it is the engine that names it, and the container that may name it anew.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(any_socket, _SIOCGIFHWADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # it has gone
            if found[18:24] == mac.packed:
                return name
    raise OSError(errno.ENODEV, f"no interface has the MAC address {mac}")
