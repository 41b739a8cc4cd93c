"""The tap in front of a plugin: every byte, every end, and every way in which it may be begun and ended."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from random import Random

import pytest

from netplugin_sdk import Conflict, DriverError, Unavailable
from netplugin_sdk.cnm.remote import Address, Patience, RemotePlugin
from netplugin_sdk.testing.recording import Entry, Exchange, Mark
from netplugin_sdk.testing.tap import Tap, restore

from ..patience import PATIENCE
from ..volume import volume
from .serving import METHOD, NETWORK, connect_unix, echo, nothing_left, process, serving_unix, wait_for

NETPLUGIN = str(Path(sys.executable).with_name("netplugin"))


class Watched:
    """A tap that is read by a thread."""

    def __init__(self, path: Path, *, slow: float = 5.0) -> None:
        self.tap = Tap(path, slow=slow)
        self.entries: list[Entry] = []
        self.failed: Exception | None = None
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            self.entries.extend(self.tap)  # an entry at a time
        except Exception as error:
            self.failed = error

    @property
    def calls(self) -> list[Exchange]:
        return [entry for entry in list(self.entries) if isinstance(entry, Exchange)]

    @property
    def marks(self) -> list[str]:
        return [entry.text for entry in list(self.entries) if isinstance(entry, Mark)]

    def wait_for(self, mark: str, times: int = 1) -> None:
        wait_for(lambda: sum(mark in text for text in self.marks) >= times, f"{mark!r} in {self.marks}")

    def close(self) -> None:
        self.tap.stop()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self.tap.close()


@contextmanager
def watched(path: Path, *, slow: float = 5.0) -> Iterator[Watched]:
    with closing(Watched(path, slow=slow)) as tap:
        yield tap
    assert tap.failed is None, tap.failed


def file_of(path: Path) -> tuple[int, int]:
    return (found := path.stat()).st_dev, found.st_ino


# --------------------------------------------------------------------------------------------------------------- bytes


class Raw:
    """A plugin that says what the test wants: each connection that it is given is the test's."""

    def __init__(self, path: Path, backlog: int = 100) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.settimeout(PATIENCE)
        self.listener.bind(str(path))
        self.listener.listen(backlog)

    def accept(self) -> socket.socket:
        """The next connection on which something is said, or that stays."""
        while True:
            accepted, _ = self.listener.accept()
            accepted.settimeout(0.05)
            with suppress(TimeoutError):
                if not accepted.recv(1, socket.MSG_PEEK):
                    accepted.close()  # the look whether somebody listens
                    continue
            accepted.settimeout(PATIENCE)
            return accepted

    def close(self) -> None:
        self.listener.close()


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[Raw]:
    with closing(Raw(tmp_path / "raw.sock")) as plugin:
        yield plugin


def exactly(sock: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        data = sock.recv(1 << 20)
        assert data, f"{len(received)} of {size} bytes"
        received += data
    return bytes(received)


def speak(sock: socket.socket, data: bytes, random: Random) -> threading.Thread:
    """Send it in pieces, in the background."""

    def send() -> None:
        at = 0
        while at < len(data):
            size = random.choice((1, 10, 5000, 300_000))
            sock.sendall(data[at : at + size])
            at += size

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_whatever_is_said_arrives_as_it_was_said(raw: Raw) -> None:
    random = Random(1)
    with nothing_left(), watched(raw.path) as tap, connect_unix(raw.path) as client, raw.accept() as plugin:
        chunked = b"POST /A.B HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
            b"%x\r\n%s\r\n" % (size, random.randbytes(size)) for size in (1, 70_000, 1000, 0)
        )
        large = b"POST /C.D HTTP/1.1\r\nContent-Length: 5000000\r\nhost:  odd \r\n\r\n" + random.randbytes(5_000_000)
        short, long = (
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
            large.replace(b"POST /C.D HTTP/1.1", b"HTTP/1.1 200 OK"),
        )
        engine = client.socket
        for said, by, to in (
            (chunked, engine, plugin),
            (short, plugin, engine),
            (large, engine, plugin),
            (long, plugin, engine),
        ):
            speaking = speak(by, said, random)
            assert exactly(to, len(said)) == said
            speaking.join()
        wait_for(lambda: len(tap.calls) == 2, "both calls")
        one, other = tap.calls
        assert (one.method, len(one.request), one.answer) == ("A.B", 71_001, b"{}")
        assert (other.method, other.request, other.answer) == ("C.D", large[-5_000_000:], large[-5_000_000:])


def test_several_requests_at_once_are_several_calls(raw: Raw) -> None:
    with watched(raw.path) as tap, connect_unix(raw.path) as client, raw.accept() as plugin:
        asked = echo(a="1") + echo(a="2")
        client.send(asked)
        assert exactly(plugin, len(asked)) == asked
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n"
        plugin.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" + answer + b"1" + answer + b"2")
        exactly(client.socket, 25 + 2 * len(answer) + 2)
        wait_for(lambda: len(tap.calls) == 2, "both calls")
        assert [call.answer for call in tap.calls] == [b"1", b"2"]


def test_what_is_no_http_is_passed_on(raw: Raw) -> None:
    with watched(raw.path) as tap, connect_unix(raw.path) as client, raw.accept() as plugin:
        client.send(b"\x16\x03\x01 hello\r\n\r\n")
        assert exactly(plugin, 12) == b"\x16\x03\x01 hello\r\n\r\n"
        plugin.sendall(b"\x00" * 1000)
        assert exactly(client.socket, 1000) == b"\x00" * 1000
        tap.wait_for("passed on unseen")


@pytest.mark.parametrize("by_plugin", [False, True])
def test_a_closed_connection_is_closed(raw: Raw, by_plugin: bool) -> None:
    with watched(raw.path) as tap, connect_unix(raw.path) as client, raw.accept() as plugin:
        client.send(echo(a="1"))
        exactly(plugin, len(echo(a="1")))
        if by_plugin:
            plugin.close()
            assert client.socket.recv(1) == b""
        else:
            client.close()
            assert plugin.recv(1) == b""
        wait_for(lambda: tap.calls, "the call")
        (call,) = tap.calls
        assert (call.status, call.error) == (0, f"the {'plugin' if by_plugin else 'engine'} closed the connection")


def test_a_call_that_takes_long_is_told_while_it_does(raw: Raw) -> None:
    with watched(raw.path, slow=0.2) as tap, connect_unix(raw.path) as client, raw.accept() as plugin:
        client.send(echo(a="1"))
        tap.wait_for(f"{METHOD} has no answer for 0.2 s")
        plugin.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        wait_for(lambda: tap.calls, "the call")
        assert sum("no answer" in mark for mark in tap.marks) == 1


def test_half_closed_is_half_closed(raw: Raw) -> None:
    with watched(raw.path), connect_unix(raw.path) as client, raw.accept() as plugin:
        client.send(echo(a="1"))
        client.socket.shutdown(socket.SHUT_WR)
        exactly(plugin, len(echo(a="1")))
        assert plugin.recv(1) == b""
        plugin.sendall(b"HTTP/1.0 200 OK\r\n\r\nto the end")
        plugin.shutdown(socket.SHUT_WR)
        assert exactly(client.socket, 29) == b"HTTP/1.0 200 OK\r\n\r\nto the end"
        assert client.socket.recv(1) == b""


def test_an_answer_that_ends_with_its_connection(raw: Raw) -> None:
    with watched(raw.path) as tap, connect_unix(raw.path) as client, raw.accept() as plugin:
        client.send(echo(a="1"))
        plugin.sendall(b"HTTP/1.0 200 OK\r\n\r\n{}")
        plugin.close()
        assert exactly(client.socket, 21) == b"HTTP/1.0 200 OK\r\n\r\n{}"
        wait_for(lambda: tap.calls, "the call")
        assert (tap.calls[0].status, tap.calls[0].answer) == (200, b"{}")


def test_a_client_that_does_not_read_holds_up_nobody(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served, watched(served.path):
        lazy, other = served.connect(), served.connect()
        lazy.send(echo(size="3000000"))
        for number in range(20):
            assert other.echo(n=str(number)) == {"n": str(number)}
        assert len(lazy.receive().options["large"]) == 3_000_000


def test_who_does_not_iterate_holds_up_nobody(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served, Tap(served.path) as tap:
        client = served.connect()
        for number in range(500):
            client.echo(n=str(number), more="x" * 1000)
        tap.stop()
        assert sum(isinstance(entry, Exchange) for entry in tap) == 500


# --------------------------------------------------------------------------------------------------- begin and end


def test_owner_and_mode_are_the_plugins(raw: Raw) -> None:
    raw.path.chmod(0o624)
    if os.geteuid() == 0:
        os.chown(raw.path, 12, 34)
    made = raw.path.stat()
    with watched(raw.path):
        now = raw.path.stat()
        assert now.st_ino != made.st_ino
        assert (stat.S_IMODE(now.st_mode), now.st_uid, now.st_gid) == (0o624, made.st_uid, made.st_gid)
    assert os.path.samestat(raw.path.stat(), made)
    assert list(raw.path.parent.iterdir()) == [raw.path]


def test_a_path_as_long_as_it_may_be(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * (107 - len(str(tmp_path)) - 1 - len("/s.sock")))
    folder.mkdir()
    with serving_unix(folder) as served, watched(served.path):
        assert served.connect().echo(a="1") == {"a": "1"}


def test_only_one_at_a_time(raw: Raw) -> None:
    with watched(raw.path):
        with pytest.raises(Conflict, match=r"raw\.sock is traced already"):
            Tap(raw.path)
        with pytest.raises(Conflict):
            restore(raw.path)


def test_nobody_listens(tmp_path: Path) -> None:
    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(dead))
    with nothing_left(), pytest.raises(Unavailable, match=f"nobody listens at {dead}"):
        Tap(dead)
    assert list(tmp_path.iterdir()) == [dead]
    with pytest.raises(Unavailable, match="cannot make"):
        Tap(tmp_path / "nowhere" / "x.sock")


def test_kept_connections_come_through_it(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        idle, busy = served.connect(), served.connect()
        for client in (idle, busy):
            client.echo(a="1")
        gate = served.driver.gate()
        busy.send(echo(gate="gate"))
        gate.wait_entered()
        with watched(served.path) as tap:
            tap.wait_for("2 kept connections ended")
            idle.expect_end()
            gate.open()
            assert busy.receive().options == {"gate": "gate"}
            busy.expect_end()
            assert not tap.calls
            assert served.connect().echo(a="2") == {"a": "2"}
            wait_for(lambda: tap.calls, "the call")


def test_a_call_under_way_is_answered_at_the_end(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        with ExitStack() as closing_:
            tap = closing_.enter_context(watched(served.path))
            busy, idle, unused = served.connect(), served.connect(), served.connect()
            idle.echo(a="1")
            gate = served.driver.gate()
            busy.send(echo(gate="gate"))
            gate.wait_entered()
            tap.tap.stop()
            idle.expect_end()
            assert unused.echo(network="f" * 64, a="2") == {"a": "2"}  # it had connected; only then is it ended, too
            unused.expect_end()
            gate.open()
            assert busy.receive().options == {"gate": "gate"}
            busy.expect_end()
        assert [call.status for call in tap.calls] == [200, 200, 200]


class Callers:
    """Threads that call as an engine does, but never try a call twice. `failed` is what went wrong."""

    def __init__(self, path: Path, threads: int) -> None:
        self.made = count()
        self.done = 0
        self.failed: list[str] = []
        self._over = threading.Event()
        self._plugin = RemotePlugin(Address("x", f"unix://{path}"), timeout=PATIENCE, patience=Patience(total=0))
        self._threads = [threading.Thread(target=self._call) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _call(self) -> None:
        while not self._over.is_set():
            options = {"n": str(next(self.made))}
            try:
                answer = self._plugin.call(METHOD, {"NetworkID": NETWORK, "Options": options})
                assert answer == {"Options": options}
            except (DriverError, AssertionError) as error:
                self.failed.append(f"{options}: {error}")
            self.done += 1

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        self._plugin.close()


def test_no_call_fails_however_often_it_begins_and_ends(tmp_path: Path) -> None:
    """Eight callers share two kept connections and make many short ones, as an engine does."""
    with serving_unix(tmp_path) as served, closing(Callers(served.path, 8)) as callers:
        for number in range(volume(5, 12)):
            with watched(served.path) as tap:
                if number % 4 == 0:
                    wait_for(lambda: len(tap.calls) > 50, "calls through the tap")
            assert all(call.status == 200 for call in tap.calls)
        wait_for(lambda: callers.done > volume(300, 1000), "further calls")
    assert callers.failed == []


# ------------------------------------------------------------------------------------------------- who is killed


@contextmanager
def tracing(path: Path) -> Iterator[subprocess.Popen[str]]:
    """``netplugin trace``, which stands in front."""
    with subprocess.Popen([NETPLUGIN, "trace", str(path)], stdout=subprocess.PIPE, text=True) as popen:
        try:
            assert popen.stdout is not None
            assert "in front" in popen.stdout.readline()
            yield popen
        finally:
            popen.kill()


def child_of(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def test_a_killed_trace_leaves_nothing_and_cuts_no_call(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        made = file_of(served.path)
        with tracing(served.path) as trace:
            busy, idle = served.connect(), served.connect()
            idle.echo(a="1")
            gate = served.driver.gate()
            busy.send(echo(gate="gate"))
            gate.wait_entered()
            forwarder = child_of(trace.pid)
            trace.kill()
            wait_for(lambda: file_of(served.path) == made, "the plugin's own socket")
            idle.expect_end()
            gate.open()
            assert busy.receive().options == {"gate": "gate"}
            wait_for(lambda: not Path(f"/proc/{forwarder}").exists() or is_zombie(forwarder), "the forwarder's end")
        wait_for(lambda: list(tmp_path.glob(".*")) == [], "the folder's end")


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_killed_forwarder_is_told_and_mended(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        made = file_of(served.path)
        tap = Watched(served.path)
        tap.wait_for("in front")
        os.kill(tap.tap._process.pid, signal.SIGKILL)
        wait_for(lambda: tap.failed, "the error")
        assert "forwarder ended (SIGKILL)" in str(tap.failed)
        assert file_of(served.path) == made
        tap.close()
        assert list(tmp_path.glob(".*")) == []


def kill_both(path: Path) -> None:
    with tracing(path) as trace:
        forwarder = child_of(trace.pid)
        os.kill(trace.pid, signal.SIGSTOP)
        os.kill(forwarder, signal.SIGKILL)
        wait_for(lambda: is_zombie(forwarder), "the forwarder's end")
        trace.kill()
    with pytest.raises(ConnectionRefusedError):
        connect_unix(path)


def test_the_next_trace_mends_what_two_killed_processes_left(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        made = file_of(served.path)
        kill_both(served.path)
        done = subprocess.run(
            [NETPLUGIN, "trace", "--restore", str(served.path)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, f"{served.path} leads to its plugin again\n")
        assert file_of(served.path) == made
        assert not restore(served.path)

        kill_both(served.path)
        with watched(served.path) as tap:
            assert tap.tap.restored
            assert served.connect().echo(a="1") == {"a": "1"}
        assert file_of(served.path) == made
        assert list(tmp_path.iterdir()) == [served.path]


# ---------------------------------------------------------------------------------------------- the plugin restarts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_plugin_that_starts_again_is_traced_again(tmp_path: Path, number: int) -> None:
    path = tmp_path / "s.sock"
    with ExitStack() as tapping:
        with process(tmp_path) as first:
            first.wait_serving(path)
            tap = tapping.enter_context(watched(path))
            with connect_unix(path) as client:
                assert client.echo(a="1") == {"a": "1"}
                first.signal(number)
                client.expect_end()
            first.wait()
        tap.wait_for("the plugin has ended")
        with process(tmp_path) as second:
            second.wait_serving(path)
            tap.wait_for("in front", 2)
            with connect_unix(path) as client:
                assert client.echo(a="2") == {"a": "2"}
            wait_for(lambda: len(tap.calls) == 2, "the second call")
            made = file_of(path)
            tap.tap.stop()
            wait_for(lambda: file_of(path) != made, "the second plugin's socket")
            with connect_unix(path) as client:
                assert client.echo(a="3") == {"a": "3"}
            second.signal(signal.SIGTERM)
            second.wait()
    assert list(tmp_path.glob("*.sock")) == list(tmp_path.glob(".*")) == []


def test_a_plugin_that_just_takes_the_path_is_traced(raw: Raw) -> None:
    with watched(raw.path) as tap:
        raw.path.unlink()
        with closing(Raw(raw.path)) as other:
            tap.wait_for("another socket")
            tap.wait_for("in front", 2)
            with connect_unix(raw.path) as client, other.accept() as plugin:
                client.send(echo(a="1"))
                assert exactly(plugin, 10) == echo(a="1")
    assert raw.path.is_socket()


def test_a_call_that_meets_the_end_of_the_plugin_waits_for_its_return(raw: Raw) -> None:
    with watched(raw.path) as tap:
        raw.listener.close()  # and the process goes on, so that only the next call finds out
        with connect_unix(raw.path) as client:
            client.send(echo(a="1"))
            tap.wait_for("the plugin has ended")
            raw.path.unlink()
            with closing(Raw(raw.path)) as other, other.accept() as plugin:
                assert exactly(plugin, len(echo(a="1"))) == echo(a="1")


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_RDWR])
def test_a_request_that_meets_the_end_of_an_idle_connection_is_not_lost(raw: Raw, how: int) -> None:
    """The engine has sent it before it could see that end."""
    with watched(raw.path) as tap, connect_unix(raw.path) as client, raw.accept() as plugin:
        client.send(echo(a="1"))
        exactly(plugin, len(echo(a="1")))
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
        plugin.sendall(answer)
        exactly(client.socket, len(answer))
        os.kill(tap.tap._process.pid, signal.SIGSTOP)
        client.send(echo(a="2"))
        plugin.shutdown(how)
        os.kill(tap.tap._process.pid, signal.SIGCONT)
        with raw.accept() as other:
            assert exactly(other, len(echo(a="2"))) == echo(a="2")
            other.sendall(answer)
            assert exactly(client.socket, len(answer)) == answer
            wait_for(lambda: [call.status for call in tap.calls] == [200, 200], "both calls")


def test_a_listener_that_systemd_keeps(tmp_path: Path) -> None:
    """The service is killed and started again; the socket stays, and so does the trace."""
    from .test_serve import systemd

    with socket.socket(socket.AF_UNIX) as listener:
        path = tmp_path / "s.sock"
        listener.bind(str(path))
        listener.listen()
        with ExitStack() as tapping:
            for number in (1, 2):
                with process(tmp_path, **systemd(listener)) as service:
                    service.wait_serving(path)
                    if number == 1:
                        tap = tapping.enter_context(watched(path))
                    with connect_unix(path) as client:
                        assert client.echo(n=str(number)) == {"n": str(number)}
            assert sum("in front" in mark for mark in tap.marks) == 1
            wait_for(lambda: len(tap.calls) == 2, "both calls")
