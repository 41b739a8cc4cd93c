"""See what an engine and a running plugin, in any language, say to each other; neither of them is restarted.

    with Tap(Path("/run/docker/plugins/x.sock")) as tap:
        for entry in tap:
            print(entry)

The path of the plugin's socket leads to ours for that time, in one step and back in one step (see `forwarder`, which
stands there: a process of its own, so that nothing which happens in this one holds up a call). Connections that the
engine keeps from before would go past it, so they are ended, too: the plugin reads the end of them, answers what it was
asked, and closes; the engine sees that at once and connects again. (A Go handler that has a call just then sees its
request's context cancelled, as if the engine had gone; its answer still arrives.)
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httptools

from netplugin_sdk.errors import Conflict, Unavailable
from netplugin_sdk.testing import forwarder
from netplugin_sdk.testing.recording import Entry, Exchange, Mark, short

_FORWARDER = str(Path(forwarder.__file__))
_CHUNK = 1 << 20
_KEPT = (0.3, 1.0)  # seconds after which kept connections are looked for: a new one has been used by then
_AGAIN = 0.5  # and between the looks while some of them are in use
_RETURN_TIMEOUT = 5.0  # seconds for the forwarder to give the socket back, which takes milliseconds
_PIDFD_GETFD = 438  # the same on every architecture
_ESTABLISHED = 1  # TCP_ESTABLISHED, as unix_diag has it
_SHOW = 2 | 4 | 16  # linux/unix_diag.h: UDIAG_SHOW_VFS, _PEER, _RQLEN
_WHO = {
    "plugin": "the plugin closed the connection",
    "engine": "the engine closed the connection",
    "nobody": "the plugin did not return",
}


class Tap:
    """Stands between the engine and the plugin at this socket, and tells of each call; a context manager.

    Iterating waits for the next call that is over, or a `Mark` of what else happened, until `stop`. If this process is
    killed, the path leads to the plugin again at once; if all of it is killed, the next `Tap` or `restore` makes it so.

    Args:
        path: of the socket.
        slow: seconds without an answer that are worth a `Mark`.

    Raises:
        Conflict: another one stands there.
        Unavailable: nobody listens there, or it cannot be done; the text says why.
    """

    def __init__(self, path: Path, *, slow: float = 5.0) -> None:
        self._slow = slow
        self._place = _held(path)
        self.restored = self._place.give_back()
        """Whether an earlier one was killed, and the plugin was cut off until now."""
        self._conversations: dict[int, _Conversation] = {}
        self._entries: deque[Entry] = deque()
        self._looks: list[float] = []  # when to look for kept connections
        self._unix = time.time_ns() - time.monotonic_ns()
        self._received = b""
        self.stopping = False
        """Whether it was told to stop."""
        self._records, records = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", _FORWARDER, str(self._place.path), str(self._place.held), str(records)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(self._place.held, records),
                start_new_session=True,  # Ctrl-C is for this process, which ends it in order
            )
        except BaseException:
            os.close(self._records)
            self._place.release()
            raise
        finally:
            os.close(records)
        try:
            while not self._entries and self._receive(None):
                pass
        except BaseException:
            self.close()
            raise

    @property
    def pending(self) -> int:
        """How many calls are under way."""
        return sum(conversation.pending for conversation in self._conversations.values())

    def stop(self) -> None:
        """Let the path lead to the plugin again; the iteration ends when the calls under way have. For any thread."""
        if not self.stopping:
            self.stopping = True
            assert self._process.stdin is not None
            self._process.stdin.close()

    def close(self) -> None:
        """As `stop`, without waiting: calls under way end unseen."""
        if self._records < 0:
            return
        self.stop()
        os.close(self._records)
        self._records = -1
        until = time.monotonic() + _RETURN_TIMEOUT
        while self._process.poll() is None and self._place.taken and time.monotonic() < until:
            time.sleep(0.005)
        if self._process.poll() is not None:
            self._place.give_back()
        self._place.release()

    def __iter__(self) -> Iterator[Entry]:
        while True:
            while self._entries:
                yield self._entries.popleft()
            if self._records < 0:
                return
            now = time.monotonic()
            if self._looks and self._looks[0] <= now:
                self._look_for_kept()
            self._tell_slow()
            if self._entries:
                continue
            if not self._receive(min([*self._looks, *([now + self._slow / 4] if self.pending else [])], default=None)):
                for conversation in self._conversations.values():
                    self._entries += conversation.end("the trace ended")
                self.close()

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self, until: float | None) -> bool:
        """Wait for more, and take it in; False if there is no more."""
        poll = select.poll()
        poll.register(self._records, select.POLLIN)
        patience = None if until is None else max(0.0, until - time.monotonic()) * 1000
        if not poll.poll(patience):
            return True
        data = os.read(self._records, _CHUNK)
        if not data:
            self._forwarder_ended()
            return False
        self._received += data
        size, at = forwarder.HEADER.size, 0
        while len(self._received) - at >= size:
            kind, number, now, length = forwarder.HEADER.unpack_from(self._received, at)
            if len(self._received) - at < size + length:
                break
            self._take(kind, number, now, self._received[at + size : at + size + length])
            at += size + length
        self._received = self._received[at:]
        return True

    def _forwarder_ended(self) -> None:
        status = self._process.wait()
        cut_off = self._place.give_back()
        if status or cut_off:
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            raise Unavailable(f"the trace's forwarder ended ({how}); the plugin is reached without it again")

    def _take(self, kind: bytes, number: int, now: int, data: bytes) -> None:
        seconds = (self._unix + now) / 1e9
        if kind == forwarder.FAILED:
            self._process.wait()
            raise Unavailable(data.decode())
        if kind == forwarder.IN_FRONT:
            self._entries.append(Mark(f"in front of the plugin, pid {data.decode()}", seconds))
            self._looks = [time.monotonic() + seconds for seconds in _KEPT]
        elif kind == forwarder.NOTE:
            self._entries.append(Mark(data.decode(), seconds))
        elif kind == forwarder.CLOSED:
            if (conversation := self._conversations.pop(number, None)) is not None:
                self._entries += conversation.end(_WHO.get(data.decode(), "the trace ended"))
        else:
            conversation = self._conversations.setdefault(number, _Conversation())
            self._entries += conversation.feed(data, seconds, is_request=kind == forwarder.REQUEST)

    def _tell_slow(self) -> None:
        latest = (self._unix + time.monotonic_ns()) / 1e9 - self._slow
        for conversation in self._conversations.values():
            if (request := conversation.slow(latest)) is not None:
                text = f"{request.method} has no answer for {self._slow:g} s: {short(bytes(request.body))}"
                self._entries.append(Mark(text, latest + self._slow))

    def _look_for_kept(self) -> None:
        self._looks.pop(0)
        if self.stopping:
            return
        try:
            count, left = _end_kept(self._place.plugin, self._process.pid)
        except Unavailable as error:
            self._looks = []
            self._entries.append(Mark(f"calls on kept connections go past the trace: {error}", time.time()))
        else:
            if count:
                text = f"{count} kept connection{'s' * (count > 1)} ended, to be made again through the trace"
                self._entries.append(Mark(text, time.time()))
            if left and not self._looks:
                self._looks = [time.monotonic() + _AGAIN]


def restore(path: Path) -> bool:
    """Let a path lead to its plugin again, if a `Tap` and its forwarder were killed both; return whether they were.

    Raises `Conflict` if there is a `Tap` now.
    """
    place = _held(path)
    try:
        return place.give_back()
    finally:
        place.release()


def _held(path: Path) -> forwarder.Place:
    place = forwarder.Place(Path(os.path.realpath(path)))
    try:
        held = place.hold()
    except OSError as error:
        raise Unavailable(f"cannot make {place.folder}: {error.strerror}") from error
    if not held:
        raise Conflict(f"{place.path} is traced already")
    return place


# ----------------------------------------------------------------------------------------------------- one connection


@dataclass
class _Message:
    """A request or an answer, as far as it has come."""

    verb: str = ""
    target: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    status: int = 0
    time: float = 0.0
    slow: bool = False
    """It was told that this takes long."""

    @property
    def method(self) -> str:
        """Of the protocol."""
        path = self.target.decode("latin-1").removeprefix("/")
        return path if self.verb == "POST" else f"{self.verb} /{path}"

    @property
    def lasts(self) -> bool:
        """Whether only the end of the connection is its end."""
        return bool(self.status) and not {"content-length", "transfer-encoding"} & {
            name.lower() for name in self.headers
        }


class _Direction:
    """Bytes in, complete messages out; httptools calls the ``on_`` methods."""

    def __init__(self, kind: type[httptools.HttpRequestParser] | type[httptools.HttpResponseParser]) -> None:
        self.complete: deque[_Message] = deque()
        self.current: _Message | None = None
        self._message = _Message()
        self._parser = kind(self)

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.current = self._message = _Message()

    def on_url(self, url: bytes) -> None:
        self._message.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._message.headers[name.decode("latin-1")] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if isinstance(self._parser, httptools.HttpRequestParser):
            self._message.verb = self._parser.get_method().decode("latin-1")
        else:
            self._message.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._message.body += body

    def on_message_complete(self) -> None:
        self.current = None
        if not 100 <= self._message.status < 200:
            self.complete.append(self._message)


class _Conversation:
    """The two directions of one connection."""

    def __init__(self) -> None:
        self._requests = _Direction(httptools.HttpRequestParser)
        self._answers = _Direction(httptools.HttpResponseParser)
        self._is_http = True

    @property
    def pending(self) -> int:
        """How many requests are not answered."""
        return len(self._requests.complete) + (self._requests.current is not None)

    def slow(self, latest: float) -> _Message | None:
        """The request that waits for an answer and came before that; once."""
        if not self._requests.complete or (request := self._requests.complete[0]).slow or request.time > latest:
            return None
        request.slow = True
        return request

    def feed(self, data: bytes, seconds: float, *, is_request: bool) -> list[Entry]:
        """The exchanges that end with these bytes."""
        if not self._is_http:
            return []
        try:
            (self._requests if is_request else self._answers).feed(data)
        except httptools.HttpParserError as error:
            self._is_http = False
            return [*self.end(f"not HTTP: {error}"), Mark(f"a connection that is passed on unseen: {error}", seconds)]
        for request in (*self._requests.complete, self._requests.current):
            if request is not None:
                request.time = request.time or seconds
        if is_request and self._requests.complete:
            self._requests.complete[-1].time = seconds
        answers = list(self._answers.complete)
        self._answers.complete.clear()
        return [exchange for answer in answers if (exchange := self._answered(answer, seconds)) is not None]

    def end(self, why: str) -> list[Entry]:
        """The exchanges that end with the connection."""
        entries: list[Entry] = []
        if (answer := self._answers.current) is not None and answer.lasts:
            entries += filter(None, [self._answered(answer, 0.0)])
        elif answer is not None:
            why += " in the middle of the answer"
        while (request := self._next()) is not None:
            entries.append(_exchange(request, _Message(), None, why))
        return entries

    def _answered(self, answer: _Message, seconds: float) -> Exchange | None:
        request = self._next()
        if request is None:  # nothing was asked
            return None
        return _exchange(request, answer, (seconds - request.time) * 1000 if seconds else None)

    def _next(self) -> _Message | None:
        if self._requests.complete:
            return self._requests.complete.popleft()
        request, self._requests.current = self._requests.current, None
        return request


def _exchange(request: _Message, answer: _Message, ms: float | None, why: str = "") -> Exchange:
    return Exchange(
        request.method,
        bytes(request.body),
        answer.status,
        bytes(answer.body),
        headers=request.headers,
        time=request.time,
        ms=ms,
        no_answer=why,
    )


# ------------------------------------------------------------------------------------------------- kept connections


def _end_kept(path: Path, forwarder_pid: int) -> tuple[int, int]:
    """Let the plugin read the end of connections that do not come from the forwarder.

    These are its accepted sockets, found by sock_diag(7) and ``/proc/PID/fd``. With a copy of each (pidfd_getfd(2)) it
    is told that nothing more comes (shutdown(2), SHUT_RD), which leaves it to answer. Where something is unread it is
    left alone: it is no idle connection.

    Returns how many there were, and how many more were left alone. Raises `Unavailable` if that cannot be done here.
    """
    try:
        made = path.stat()
    except FileNotFoundError:  # it has just ended
        return 0, 0
    idle, used = _accepted(made, ours := _sockets_of(forwarder_pid))
    ended = set()
    for inode, pid, fd in _holders(idle) if idle else ():
        if inode not in ended:
            with socket.socket(fileno=_copy_of(pid, fd)) as copy:
                with suppress(OSError):  # it ends by itself
                    copy.shutdown(socket.SHUT_RD)
                ended.add(inode)
    if idle and not ended and idle & _accepted(made, ours)[0]:
        raise Unavailable("the plugin's descriptors cannot be seen (that takes root with CAP_SYS_PTRACE)")
    return len(ended), len(used)


def _accepted(made: os.stat_result, not_from: set[int]) -> tuple[set[int], set[int]]:
    """The inodes of sockets that a listener at a socket file accepted: with nothing unread, and the others."""
    from pyroute2 import DiagSocket  # noqa: PLC0415  # 60 ms

    device = os.major(made.st_dev) << 20 | os.minor(made.st_dev)  # as the kernel has it
    idle, used = set[int](), set[int]()
    try:
        with DiagSocket() as diag:
            diag.bind()
            for each in diag.get_sock_stats(family=socket.AF_UNIX, states=1 << _ESTABLISHED, show=_SHOW):
                file, queue = each.get_attr("UNIX_DIAG_VFS"), each.get_attr("UNIX_DIAG_RQLEN")
                if (
                    file is not None
                    and (file["udiag_vfs_ino"], file["udiag_vfs_dev"]) == (made.st_ino & 0xFFFFFFFF, device)
                    and each.get_attr("UNIX_DIAG_PEER") not in not_from
                    and not each.get_attr("UNIX_DIAG_SHUTDOWN")  # else it has been told, or ends by itself
                ):
                    inode = int(each["udiag_ino"])  # 0 of one that is not accepted yet
                    (idle if inode and not (queue and queue["udiag_rqueue"]) else used).add(inode)
    except Exception as error:
        raise Unavailable(f"the kernel does not list unix sockets (unix_diag): {error}") from error
    return idle, used


def _sockets_of(pid: int) -> set[int]:
    return {inode for inode, *_ in _sockets((pid,))}


def _holders(inodes: set[int]) -> Iterator[tuple[int, int, int]]:
    """Socket, process, descriptor."""
    pids = (int(name) for name in os.listdir("/proc") if name.isdecimal())  # noqa: PTH208
    return (found for found in _sockets(pids) if found[0] in inodes)


def _sockets(pids: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    for pid in pids:
        with suppress(OSError):  # it has ended, or is another user's
            for fd in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
                with suppress(OSError):
                    kind, _, inode = os.readlink(f"/proc/{pid}/fd/{fd}").partition(":")  # noqa: PTH115
                    if kind == "socket":
                        yield int(inode.strip("[]")), pid, int(fd)


def _copy_of(pid: int, fd: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        copy = int(libc.syscall(_PIDFD_GETFD, pidfd, fd, 0))
        if copy < 0:
            number = ctypes.get_errno()
            why = "the kernel is older than 5.6" if number == errno.ENOSYS else os.strerror(number)
            raise Unavailable(f"pidfd_getfd: {why}")
        return copy
    finally:
        os.close(pidfd)
