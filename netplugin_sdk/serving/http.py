"""From bytes to requests and back: HTTP/1.1 on one connection, with limits on size and time.

Keep-alive, and llhttp (httptools) for the parsing. The engine keeps two idle connections and opens short-lived ones
under load.
"""

from __future__ import annotations

import http
import logging
import math
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

import httptools
import msgspec

from netplugin_sdk.core.calls import Call
from netplugin_sdk.core.plugin import CONTENT_TYPE, Answer, refusal

if TYPE_CHECKING:
    import ssl

_log = logging.getLogger("netplugin_sdk")

_CHUNK = 64 * 1024
WARN_FRACTION = 0.4
"""Of the time for a call, after which the log says where it is."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one client: sizes in bytes, times in seconds."""

    head: int = 64 * 1024
    """Request line and headers."""
    body: int = 16 * 1024 * 1024
    """Body as sent. 65 535 published ports make about 7 MB."""
    connections: int = 1024
    """Connections at a time; more wait in the backlog."""
    request_time: float = 10.0
    """From a request's first byte to its last, and for sending an answer."""
    idle_time: float = 600.0
    """Between two requests of a connection."""
    call_time: float = 25.0
    """For the driver's method. Then the engine is told that it took too long, and the method's work is undone;
    before, the log says where it hangs."""
    drain_time: float = 10.0
    """For the calls that run when the server stops."""
    first_request_time: float = 0.2
    """For a client that has connected and not called yet, when the server stops."""
    hand_over_time: float = 0.002
    """One call may hold up others for so long; then another thread serves them. A change of threads costs 0.1 ms."""


class _Refused(Exception):
    """The client's bytes are no request that is served; the connection ends with this answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Request(msgspec.Struct):
    """A complete request."""

    method: bytes
    target: bytes
    body: bytes
    keep_alive: bool


class _RequestReader:
    """Bytes in, complete requests out; httptools calls the ``on_`` methods.

    `refused` is why nothing more can be read, once that is so.
    """

    def __init__(self, limits: Limits, send_continue: Callable[[], None]) -> None:
        self._limits = limits
        self._send_continue = send_continue
        self._parser = httptools.HttpRequestParser(self)
        self._requests: list[Request] = []
        self.refused: _Refused | None = None
        self._fed = 0  # bytes of data that held some of the unfinished request
        self._in_head = True
        self._head_size = self._body_size = 0
        self._target = b""
        self._body: list[bytes] = []
        self._wants_continue = False

    @property
    def midway(self) -> bool:
        """Whether a request has begun and is not complete."""
        return self._fed > 0

    @property
    def expected(self) -> bool:
        """Whether a request is on its way: it has begun, or would be the first of its connection."""
        return self._fed > 0 or not self._target

    def feed(self, data: bytes) -> list[Request]:
        """The requests that `data` completes; look at `refused` after them."""
        self._requests = []
        self._fed += len(data)
        try:
            self._parser.feed_data(data)
            if self._in_head:
                self._check_head(self._fed)  # one endless line, or several
        except _Refused as refused:
            self.refused = refused
        except httptools.HttpParserUpgrade:
            self.refused = _Refused(400, "the connection cannot be upgraded")
        except httptools.HttpParserError as error:
            raised = error.__context__  # by one of the methods below
            self.refused = raised if isinstance(raised, _Refused) else _Refused(400, f"not an HTTP request: {error}")
        return self._requests

    def _check_head(self, size: int) -> None:
        if size > self._limits.head:
            raise _Refused(431, f"the head of the request has more than {self._limits.head} bytes")

    def _check_body(self, size: int) -> None:
        if size > self._limits.body:
            raise _Refused(413, f"the body of the request has more than {self._limits.body} bytes")

    def on_message_begin(self) -> None:
        self._fed = self._fed or 1  # it may begin behind another in the same data
        self._target, self._body = b"", []
        self._head_size = self._body_size = 0
        self._wants_continue = False

    def on_url(self, url: bytes) -> None:
        self._target += url
        self._head_size += len(url)
        self._check_head(self._head_size)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value) + len(b": \r\n")
        self._check_head(self._head_size)
        name = name.lower()
        if name == b"content-length":
            self._check_body(int(value))
        if name == b"expect" and value.lower() == b"100-continue":
            self._wants_continue = True

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._wants_continue:
            self._send_continue()

    def on_body(self, body: bytes) -> None:
        self._body_size += len(body)
        self._check_body(self._body_size)
        self._body.append(body)

    def on_message_complete(self) -> None:
        parser = self._parser
        self._requests.append(
            Request(parser.get_method(), self._target, b"".join(self._body), bool(parser.should_keep_alive()))
        )
        self._in_head, self._fed = True, 0


class Connection:
    """One client. The leader of the server's loop calls `receive` when something has arrived.

    Args:
        client: its socket.
        limits: sizes and times.
        answer: takes this connection, a complete request and the call that it is, and gives the answer.
        stopping: whether no more requests are wanted.
        tls: for a TLS listener.
    """

    def __init__(
        self,
        client: socket.socket,
        limits: Limits,
        *,
        answer: Callable[[Connection, Request, Call], Answer],
        stopping: Callable[[], bool],
        tls: ssl.SSLContext | None,
    ) -> None:
        client.setblocking(False)
        self._limits, self._answer, self._stopping = limits, answer, stopping
        self._socket = client
        self._not_yet: tuple[type[OSError], ...] = (BlockingIOError,)
        self._reader = _RequestReader(limits, lambda: self._send(b"HTTP/1.1 100 Continue\r\n\r\n"))
        self._lingers = False  # only waits for the client to read why it was refused
        self._overdue = False
        self._call: Call | None = None  # that runs
        self.deadline = time.monotonic() + limits.idle_time
        """When it must have sent more; while a call runs, when that call is checked."""
        if tls is not None:
            import ssl  # noqa: PLC0415  # 10 ms that only TLS needs

            # The handshake is a part of the first reads.
            self._socket = tls.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
            self._not_yet = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
            self.deadline = time.monotonic() + limits.request_time

    def fileno(self) -> int:
        """Its descriptor."""
        return self._socket.fileno()

    def receive(self) -> bool:
        """Read once and answer every request that is complete; False when the connection is over."""
        try:
            return self._receive()
        except OSError as error:  # the client went away, or TLS failed
            _log.debug("connection ended: %s", error)
        except Exception:
            _log.exception("connection ended by a bug")
        return False

    def close(self) -> None:
        """Close it."""
        if not self._lingers:
            self._end_tls()
        self._socket.close()

    def expire(self) -> None:
        """Its deadline is over: end it, or check the call that runs. Called by the watch."""
        if (call := self._call) is not None:
            self._check_call_deadline(call)
        else:
            self._overdue = True  # `receive` is called, and ends it
            self.stop_reading()

    def _check_call_deadline(self, call: Call) -> None:
        seconds, allowed = time.monotonic() - call.began, self._limits.call_time
        if seconds < allowed:
            _log.warning("%s has been running for %.0f s:\n%s", call.method, seconds, _stack(call.thread))
            self.deadline = call.began + allowed
        elif call.expire():
            self.deadline = math.inf
            _log.error("%s took over %g s: the engine no longer waits\n%s", call.method, allowed, _stack(call.thread))
            answer = refusal(503, f"{call.method} took over {allowed:g} seconds")
            with suppress(OSError):
                self._send(_head(answer, keep_alive=False) + answer.body)
            self.abort()

    @property
    def awaited(self) -> bool:
        """Whether a request of its client is on its way, as far as one can tell."""
        return self._reader.expected

    def stop_reading(self) -> None:
        """Let the client send nothing more. Received requests are still answered."""
        # Not SSLSocket's shutdown, which would go on in plain text.
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RD)

    def abort(self) -> None:
        """End it now."""
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _receive(self) -> bool:
        if self._lingers:
            return bool(socket.socket.recv(self._socket, _CHUNK)) and not self._overdue
        try:
            # A TLS record is smaller than this, so that none of it waits where epoll does not see it.
            data = self._socket.recv(_CHUNK)
        except self._not_yet:
            return not self._overdue
        began = self._reader.midway
        if data and not self._answer_all(data):
            return False
        if self._reader.refused is not None:
            return self._refuse(self._reader.refused)
        if self._overdue and self._reader.midway:
            return self._refuse(_Refused(408, "the request took too long to arrive"))
        if not self._reader.midway:
            self.deadline = time.monotonic() + self._limits.idle_time
        elif not began or self.deadline == math.inf:
            self.deadline = time.monotonic() + self._limits.request_time
        return bool(data) and not self._overdue

    def _answer_all(self, data: bytes) -> bool:
        """Answer the requests that `data` completes; False when the client wants no more."""
        for request in self._reader.feed(data):
            call = self._call = Call()
            self.deadline = call.began + self._limits.call_time * WARN_FRACTION
            answer = self._answer(self, request, call)
            self._call = None
            if not call.commit():
                return False  # the watch has answered
            self.deadline = math.inf
            keep_alive = request.keep_alive and not self._stopping()
            self._send(_head(answer, keep_alive) + answer.body)
            if not keep_alive:
                return False
        return True

    def _send(self, data: bytes) -> None:
        try:
            sent = self._socket.send(data)
        except self._not_yet:
            sent = 0
        if sent < len(data):  # a client that does not read; it holds up this thread, which the watch sees
            self._socket.settimeout(self._limits.request_time)
            try:
                self._socket.sendall(data[sent:])
            finally:
                self._socket.setblocking(False)

    def _end_tls(self) -> None:
        unwrap = getattr(self._socket, "unwrap", None)
        if unwrap is not None:
            with suppress(OSError, ValueError):  # it says goodbye (close_notify) and need not wait for theirs
                unwrap()

    def _refuse(self, refused: _Refused) -> bool:
        _log.warning("refused a request: %s", refused)
        answer = refusal(refused.status, str(refused))
        self._send(_head(answer, keep_alive=False) + answer.body)
        # Closing with bytes unread would reset the connection, and the client might not see the answer.
        self._end_tls()
        socket.socket.shutdown(self._socket, socket.SHUT_WR)
        self._lingers = True
        self.deadline = time.monotonic() + self._limits.request_time
        return True


def _head(answer: Answer, keep_alive: bool) -> bytes:
    head = b"%sContent-Length: %d\r\n" % (_status_line(answer.status), len(answer.body))
    return head + (b"\r\n" if keep_alive else b"Connection: close\r\n\r\n")


def _stack(thread: int) -> str:
    """Where a thread is now."""
    frame = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame)).rstrip() if frame else "(it has ended)"


@cache
def _status_line(status: int) -> bytes:
    return f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nContent-Type: {CONTENT_TYPE}\r\n".encode()
