"""A server in a thread of the test or in a process of its own, clients that speak raw HTTP, and who forgot what."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import select
import socket
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from netplugin_sdk import AllocateNetwork, DriverError, Endpoint, Join, Network, NetworkDriver, Plugin, Sandbox, Scope
from netplugin_sdk.serving.http import Limits
from netplugin_sdk.serving.loop import Server
from netplugin_sdk.testing.engine import wait_until

from ..patience import PATIENCE

MOMENT = 0.3
"""How long to look at something that must not happen."""

NETWORK = "0123456789abcdef" * 4
METHOD = "NetworkDriver.AllocateNetwork"


def wait_for(condition: Callable[[], object], what: str) -> None:
    try:
        wait_until(lambda: bool(condition()), PATIENCE, every=0.01)
    except TimeoutError:
        raise AssertionError(f"waited {PATIENCE} s in vain for {what}") from None


# ------------------------------------------------------------------------------------------------------ the driver


class Gate:
    """Where a call of the driver waits until the test lets it go on."""

    def __init__(self) -> None:
        self._entered = threading.Event()
        self._opened = threading.Event()
        self._left = threading.Event()

    def pass_through(self) -> None:
        self._entered.set()
        assert self._opened.wait(2 * PATIENCE), "the test never opened the gate"
        self._left.set()

    def wait_entered(self) -> None:
        assert self._entered.wait(PATIENCE), "the call never reached the driver"

    def wait_left(self) -> None:
        assert self._left.wait(PATIENCE), "the call never ended"

    def open(self) -> None:
        self._opened.set()


class Echo(NetworkDriver):
    """Answers AllocateNetwork with its own options. Of these `gate` makes it wait, `size` adds bytes, `fail` raises."""

    scope = Scope.GLOBAL

    def __init__(self) -> None:
        self.calls = 0
        self._gates: dict[str, Gate] = {}

    def gate(self, name: str = "gate") -> Gate:
        return self._gates.setdefault(name, Gate())

    def open_gates(self) -> None:
        for gate in self._gates.values():
            gate.open()

    def allocate_network(self, request: AllocateNetwork) -> Mapping[str, str]:
        self.calls += 1
        options = request.options
        if "gate" in options:
            self._gates[options["gate"]].pass_through()
        if "fail" in options:
            raise DriverError(options["fail"])
        return {**options, "large": "x" * int(options["size"])} if "size" in options else options

    def create_network(self, network: Network) -> None:
        pass

    def delete_network(self, network: Network) -> None:
        pass

    def create_endpoint(self, network: Network, endpoint: Endpoint) -> None:
        pass

    def delete_endpoint(self, network: Network, endpoint: Endpoint) -> None:
        pass

    def join(self, network: Network, endpoint: Endpoint, sandbox: Sandbox) -> Join:
        return Join()

    def leave(self, network: Network, endpoint: Endpoint) -> None:
        pass


# ------------------------------------------------------------------------------------------------------- the client


def body(options: Mapping[str, str], network: str = NETWORK) -> bytes:
    return json.dumps({"NetworkID": network, "Options": dict(options)}).encode()


def post(content: bytes, *headers: str, method: str = METHOD, version: str = "1.1") -> bytes:
    """A request as the engine sends it, with further headers."""
    lines = (f"POST /{method} HTTP/{version}", "Host: ", *headers, f"Content-Length: {len(content)}", "", "")
    return "\r\n".join(lines).encode() + content


def echo(*, network: str = NETWORK, **options: str) -> bytes:
    """A request that `Echo` answers with these options."""
    return post(body(options, network))


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def options(self) -> dict[str, str]:
        """What `Echo` answered."""
        assert self.status == 200, self
        options: dict[str, str] = json.loads(self.body)["Options"]
        return options

    @property
    def error(self) -> str:
        text: str = json.loads(self.body)["Err"]
        return text

    @property
    def closes(self) -> bool:
        return self.headers.get("connection", "").lower() == "close"


class Client:
    """One connection. Whatever it waits for, it gives up after `PATIENCE`."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(PATIENCE)
        self.socket = connected
        self._received = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def echo(self, *, network: str = NETWORK, **options: str) -> dict[str, str]:
        """One call and its answer."""
        self.send(echo(network=network, **options))
        return self.receive().options

    def wait_read(self) -> None:
        """Until the server has taken in all that was sent."""
        until = time.monotonic() + PATIENCE
        while fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)) != bytes(4):
            assert time.monotonic() < until, "the server does not read"
            os.sched_yield()

    def receive(self) -> Reply:
        """The next answer. Raises EOFError where the connection ends before its end."""
        while b"\r\n\r\n" not in self._received:
            self._more()
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", "0"))
        chunks, missing = [self._received], length - len(self._received)
        while missing > 0:
            chunks.append(self._read())
            missing -= len(chunks[-1])
        data = b"".join(chunks)
        self._received = data[length:]
        assert first.startswith("HTTP/1.1 "), first
        return Reply(int(first.split()[1]), headers, data[:length])

    def last(self) -> Reply:
        """The last answer of this connection, which ends behind it."""
        reply = self.receive()
        assert reply.closes, reply
        self.expect_end()
        return reply

    def expect_end(self) -> None:
        """The server ends the connection and has sent nothing more."""
        assert self._received == b""
        with suppress(ConnectionResetError):
            assert self.socket.recv(65536) == b""

    def expect_silence(self) -> None:
        """The server sends nothing for a moment, nor does it end the connection."""
        assert self._received == b""
        assert not self.readable(MOMENT)

    def readable(self, within: float = 0.0) -> bool:
        return bool(select.select([self.socket], [], [], within)[0])

    def wait_cut(self) -> None:
        """The server closes the connection, whether or not there is something unread."""
        poll = select.poll()
        poll.register(self.socket, 0)
        assert poll.poll(PATIENCE * 1000), "the connection was never cut"

    def _more(self) -> None:
        self._received += self._read()

    def _read(self) -> bytes:
        data = self.socket.recv(1 << 20)
        if not data:
            raise EOFError(f"the connection ended behind {self._received[:200]!r}")
        return data

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect_unix(path: Path) -> Client:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.settimeout(PATIENCE)
    try:
        connected.connect(str(path))
    except BaseException:
        connected.close()
        raise
    return Client(connected)


def connect_tcp(port: int, host: str = "127.0.0.1") -> Client:
    return Client(socket.create_connection((host, port), timeout=PATIENCE))


# ------------------------------------------------------------------------------------------ a server in this process


class Served:
    """A server that runs, its driver, and where it listens."""

    def __init__(self, server: Server, driver: Echo, thread: threading.Thread, path: Path, port: int) -> None:
        self.server = server
        self.driver = driver
        self.path = path
        self.port = port
        self._thread = thread
        self._clients: list[Client] = []

    def connect(self) -> Client:
        """A connection that ends with the test."""
        client = connect_tcp(self.port) if self.port else connect_unix(self.path)
        self._clients.append(client)
        return client

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait_stopped(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "run() does not return"

    def close(self) -> None:
        self.driver.open_gates()
        for client in self._clients:
            client.close()
        self.server.stop()
        self.wait_stopped()


@contextmanager
def serving(listen: Callable[[Server], Path | int], limits: Limits | None = None) -> Iterator[Served]:
    """A server that `listen` tells where to listen. Behind it no thread and no descriptor is left."""
    with nothing_left():
        driver, failed = Echo(), list[BaseException]()
        with Plugin(driver) as plugin, Server(plugin, limits) as server:
            where = listen(server)

            def run() -> None:
                try:
                    server.run()
                except BaseException as error:
                    failed.append(error)
                    raise

            thread = threading.Thread(target=run, name="server under test", daemon=True)
            path, port = (Path(), where) if isinstance(where, int) else (where, 0)
            served = Served(server, driver, thread, path, port)
            thread.start()
            try:
                yield served
            finally:
                served.close()
        assert not failed, failed


def serving_unix(folder: Path, limits: Limits | None = None) -> AbstractContextManager[Served]:
    """`serving` on a unix socket in this folder."""

    def listen(server: Server) -> Path:
        server.listen_unix(folder / "s.sock")
        return folder / "s.sock"

    return serving(listen, limits)


@contextmanager
def nothing_left() -> Iterator[None]:
    """Whatever happens inside, afterwards this process has no further thread and no further descriptor."""
    threads, descriptors = len(tasks()), open_files()  # as many threads, but others: a server's leader may change
    yield

    more: dict[str, Callable[[], object]] = {
        "threads": lambda: max(0, len(tasks()) - threads),
        "descriptors": lambda: open_files() - descriptors,
    }

    def left() -> dict[str, object]:
        return {name: found for name, look in more.items() if (found := look())}

    if left():
        gc.collect()  # only then: in a process with many tests behind it, it takes a tenth of a second
    until = time.monotonic() + PATIENCE
    while (found := left()) and time.monotonic() < until:
        time.sleep(0.01)
        gc.collect()
    assert not found, f"left over: {found}; threads: {threading.enumerate()}"


def tasks(pid: int | str = "self") -> set[str]:
    """The threads of a process."""
    return set(os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208  # a number or "self", not a path


def open_files(pid: int | str = "self") -> Counter[str]:
    """What the descriptors of a process are open on."""
    found: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that the folder is read with
            found[str(entry.readlink())] += 1
    return found


# ------------------------------------------------------------------------------------------- a server in its process

DRIVER = """
import json, os, sys, time
from pathlib import Path
from netplugin_sdk import DriverError, Join, NetworkDriver, Scope, serve
from netplugin_sdk.serving.http import Limits

class Echo(NetworkDriver):
    scope = Scope.GLOBAL
    def allocate_network(self, request):
        options = dict(request.options)
        if "started" in options:  # wait until the test lets it go on
            Path(options["started"]).touch()
            until = time.monotonic() + 60
            while Path(options["started"]).exists() and time.monotonic() < until:
                time.sleep(0.01)
        if "fail" in options:
            raise DriverError(options["fail"])
        if "bug" in options:
            raise KeyError(options["bug"])
        if "environment" in options:
            return {name: value for name, value in os.environ.items() if name.startswith(options["environment"])}
        if "inheritable" in options:
            return {"inheritable": str(os.get_inheritable(int(options["inheritable"])))}
        return options
    def create_network(self, network): pass
    def delete_network(self, network): pass
    def create_endpoint(self, network, endpoint): pass
    def delete_endpoint(self, network, endpoint): pass
    def join(self, network, endpoint, sandbox): return Join()
    def leave(self, network, endpoint): pass
    def gw_alloc_check(self, options, request): raise DriverError("the driver says no")

arguments = json.loads(sys.argv[1])
limits = arguments.pop("limits", None)
serve(Echo(), limits=limits and Limits(**limits), **arguments)
"""


class Process:
    """A plugin in a process of its own: `DRIVER`, with these arguments of `serve`."""

    def __init__(self, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.popen = popen
        self._log = log

    @property
    def pid(self) -> int:
        return self.popen.pid

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def wait(self) -> int:
        """Its exit status."""
        return self.popen.wait(PATIENCE)

    @property
    def log(self) -> list[str]:
        """What it has written to standard error so far, line by line."""
        return self._log.read_text().splitlines()

    def wait_serving(self, path: Path) -> None:
        def connects() -> bool:
            assert self.popen.poll() is None, "\n".join(self.log)
            try:
                connect_unix(path).close()
            except OSError:
                return False
            return True

        wait_for(connects, "the plugin to serve")


@contextmanager
def process(
    folder: Path,
    *,
    environment: Mapping[str, str] | None = None,
    launcher: tuple[str, ...] = (),
    pass_fds: tuple[int, ...] = (),
    **arguments: Any,
) -> Iterator[Process]:
    """Start `DRIVER`, by default with everything it makes in `folder`; kill it in the end if it is still there.

    `launcher` is a program that executes the rest of its command line.
    """
    script, log = folder / "driver.py", folder / f"log-{time.monotonic_ns()}"
    script.write_text(DRIVER)
    arguments = {"name": "echo", "state": str(folder / "state"), "socket_path": str(folder / "s.sock"), **arguments}
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID")
    }
    with log.open("wb") as stderr:
        popen = subprocess.Popen(
            (*launcher, sys.executable, str(script), json.dumps(arguments)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=inherited | dict(environment or {}),
            pass_fds=pass_fds,
        )
    try:
        yield Process(popen, log)
    finally:
        if popen.poll() is None:
            popen.kill()
            popen.wait(PATIENCE)
