"""Something done inside a container's network namespace."""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
from collections.abc import Callable
from typing import TypeVar

from netplugin_sdk import MacAddress
from netplugin_sdk.linux.namespaces import Namespace

T = TypeVar("T")

_SIOCGIFHWADDR = 0x8927  # linux/sockios.h


def within(namespace: str | None, function: Callable[[], T]) -> T:
    """Run `function` in the network namespace of this path; None is the caller's own.

    A socket that it opens stays in there. Raises OSError if the namespace is gone or may not be entered.
    """
    return function() if namespace is None else Namespace(namespace).call(function)


def interface_of(mac: MacAddress) -> str:
    """The name of the interface with this MAC address, in the caller's namespace. Raises OSError if there is none.

    Inside a container it is the engine that names it, and the container that may name it again.
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
