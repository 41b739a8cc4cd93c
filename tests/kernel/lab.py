"""Network namespaces for tests."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from netplugin_sdk.linux import namespaces
from netplugin_sdk.linux.namespaces import unshare

T = TypeVar("T")

SYSCTLS = Path("/proc/sys/net")


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
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY)

        with ThreadPoolExecutor(1) as thread:  # a namespace belongs to a thread
            self.fd = thread.submit(make).result()
        self.path = f"/proc/{os.getpid()}/fd/{self.fd}"
        self.run("ip", "link", "set", "lo", "up")

    def call(self, function: Callable[[], T]) -> T:
        """Run it in a thread inside. A socket that it makes stays inside."""
        return namespaces.Namespace(self.path).call(function)

    def run(self, *argv: str) -> str:
        return run("nsenter", f"--net={self.path}", *argv)

    def adopt(self, link: str, *addresses: str, gateway: str | None = None) -> None:
        """Move an interface in here from the test's namespace and configure it, as the engine does with a Join's."""
        run("ip", "link", "set", link, "netns", self.path)
        self.adopt_addresses(link, *addresses)
        if gateway is not None:
            self.run("ip", "route", "add", "default", "via", gateway)

    def adopt_addresses(self, link: str, *addresses: str) -> None:
        """Configure an interface that is in here."""
        for address in addresses:
            self.run("ip", "address", "add", address, "dev", link, *(("nodad",) if ":" in address else ()))
        self.run("ip", "link", "set", link, "up")

    def answering(self, *addresses: str, within: float = 0.2) -> set[str]:
        """Those of the addresses that answer a ping from here within so many seconds; all are tried at once."""
        ping = ("nsenter", f"--net={self.path}", "ping", "-q", "-n", "-c1", f"-W{within}")
        tries = {address: subprocess.Popen((*ping, address), stdout=subprocess.DEVNULL) for address in addresses}
        return {address for address, process in tries.items() if process.wait() == 0}

    def udp(self) -> socket.socket:
        return self.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))

    def close(self) -> None:
        os.close(self.fd)
