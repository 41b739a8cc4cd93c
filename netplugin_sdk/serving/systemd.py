"""systemd's side of a service: readiness, the watchdog, and sockets that it hands over."""

from __future__ import annotations

import math
import os
import socket
from contextlib import suppress

FIRST_SYSTEMD_FD = 3
"""SD_LISTEN_FDS_START, sd_listen_fds(3)."""


def notify(state: str) -> None:
    """Tell systemd, if it wants to know (sd_notify(3)): ``READY=1``, ``STOPPING=1``, ``WATCHDOG=1``."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, suppress(OSError):
        notify.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def watchdog_interval() -> float:
    """Seconds between signs of life: half of what systemd allows; infinite if it has no watchdog.

    See sd_watchdog_enabled(3).
    """
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return math.inf
    return int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6 or math.inf


def handed_over() -> list[socket.socket]:
    """The sockets of a ``.socket`` unit, taken over once (``LISTEN_FDS``, sd_listen_fds(3)); none without one."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):  # not for child processes
        os.environ.pop(name, None)
    listeners = [socket.socket(fileno=fd) for fd in range(FIRST_SYSTEMD_FD, FIRST_SYSTEMD_FD + count)]
    for listener in listeners:
        listener.set_inheritable(False)
    return listeners
