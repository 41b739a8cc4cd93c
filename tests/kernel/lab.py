"""Network namespaces for tests, and what they leave."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from netplugin_sdk.errors import DriverError
from netplugin_sdk.linux import namespaces
from netplugin_sdk.linux.namespaces import unshare
from netplugin_sdk.testing.engine import wait_until

from ..patience import PATIENCE
from ..unit.serving import open_files, tasks

T = TypeVar("T")

SYSCTLS = Path("/proc/sys/net")


def run(*argv: str) -> str:
    """What the command prints; raises with what it complained of."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
    return done.stdout


class Machine(Protocol):
    """Where programs run: a sandbox, or another network namespace."""

    def run(self, *command: str) -> str: ...


def reaches(machine: Machine, target: object, *options: str) -> bool:
    """Whether a ping is answered within a second: for what must not be, behind something that was."""
    with suppress(DriverError):
        machine.run("ping", "-c1", "-W1", *options, str(target))
        return True
    return False


def soon_reaches(machine: Machine, *targets: object) -> bool:
    """Whether all answer in the end.

    A link that is new carries nothing before the kernel has heard of its carrier, a second later and more.
    """
    with suppress(TimeoutError):
        for target in targets:
            wait_until(partial(reaches, machine, target), PATIENCE)
        return True
    return False


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

    def reaches(self, *addresses: str) -> bool:
        """Whether all answer a ping in the end, see `soon_reaches`."""
        with suppress(TimeoutError):
            wait_until(lambda: self.answering(*addresses, within=1) == set(addresses), PATIENCE)
            return True
        return False

    def answering(self, *addresses: str, within: float = 0.2) -> set[str]:
        """Those of the addresses that answer a ping from here within so many seconds; all are tried at once."""
        ping = ("nsenter", f"--net={self.path}", "ping", "-q", "-n", "-c1", f"-W{within}")
        tries = {address: subprocess.Popen((*ping, address), stdout=subprocess.DEVNULL) for address in addresses}
        return {address for address, process in tries.items() if process.wait() == 0}

    def udp(self) -> socket.socket:
        return self.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))

    def close(self) -> None:
        os.close(self.fd)


def things(folder: Path) -> dict[str, Counter[str]]:
    """What a test may leave: of this process and its network namespace, in this folder, and mounted beside it."""
    # The SDK tells a sandbox's neighbours of its addresses twice more within two seconds, though it be gone by then.
    announcing = {str(thread.native_id) for thread in threading.enumerate() if thread.name == "announcement"}
    mounts = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return {
        "threads": Counter(thread=len(tasks() - announcing)),
        "descriptors": open_files(),
        "processes": Counter(_children()),
        "mounts": Counter(mount for mount in mounts if Path(mount).is_relative_to(folder.parent)),
        "files": Counter(file.name for file in folder.iterdir()),
        "namespaces": Counter([str(Path("/proc/thread-self/ns/net").readlink())]),
        "interfaces": Counter(name for _, name in socket.if_nameindex()),
    }


def _children() -> Iterator[str]:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return  # there is none, not even one that nobody has waited for
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            name, _, rest = (process / "stat").read_text().rpartition(")")
            if int(rest.split()[1]) == os.getpid():
                yield name
