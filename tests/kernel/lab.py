"""Network namespaces for tests."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

SYSCTLS = Path("/proc/sys/net")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def unshare() -> None:
    """Give this thread a network namespace of its own (os.unshare is new in Python 3.12)."""
    if _libc.unshare(_CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def setns(fd: int) -> None:
    """Put this thread into the network namespace that `fd` is open on."""
    if _libc.setns(fd, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def current() -> int:
    """A descriptor of this thread's network namespace."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def run(*argv: str) -> str:
    """What the command prints; raises with what it complained of."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
    return done.stdout


class Namespace:
    """A further network namespace: a container, or the world outside. Lives as long as its descriptor."""

    def __init__(self) -> None:
        def make() -> int:
            unshare()
            return current()

        self.fd = _in_thread(make)
        self.path = f"/proc/{os.getpid()}/fd/{self.fd}"
        self.run("ip", "link", "set", "lo", "up")

    def call(self, function: Callable[[], T]) -> T:
        """Run it in a thread inside. A socket that it makes stays inside."""

        def inside() -> T:
            setns(self.fd)
            return function()

        return _in_thread(inside)

    def run(self, *argv: str) -> str:
        return run("nsenter", f"--net={self.path}", *argv)

    def adopt(self, link: str, *addresses: str, gateway: str | None = None) -> None:
        """Move an interface in here from the test's namespace and configure it, as the engine does with a Join's."""
        run("ip", "link", "set", link, "netns", self.path)
        for address in addresses:
            self.run("ip", "address", "add", address, "dev", link, *(("nodad",) if ":" in address else ()))
        self.run("ip", "link", "set", link, "up")
        if gateway is not None:
            self.run("ip", "route", "add", "default", "via", gateway)

    def answering(self, *addresses: str, within: float = 0.2) -> set[str]:
        """Those of the addresses that answer a ping from here within so many seconds; all are tried at once."""
        ping = ("nsenter", f"--net={self.path}", "ping", "-q", "-n", "-c1", f"-W{within}")
        tries = {address: subprocess.Popen((*ping, address), stdout=subprocess.DEVNULL) for address in addresses}
        return {address for address, process in tries.items() if process.wait() == 0}

    def udp(self) -> socket.socket:
        return self.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))

    def close(self) -> None:
        os.close(self.fd)


def _in_thread(function: Callable[[], T]) -> T:
    """In a thread of its own, since a namespace belongs to a thread."""
    results: list[T] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
