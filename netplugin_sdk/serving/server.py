"""Listen, serve, drain, stop: a small threaded HTTP/1.1 server for the engine's calls.

Keep-alive, llhttp (httptools) for the parsing, limits on size and time. The engine keeps two idle connections and
opens short-lived ones under load; a listen backlog that is full costs it a second of sleep.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import http
import ipaddress
import logging
import math
import os
import pwd
import re
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import httptools
import msgspec

from netplugin_sdk.core.calls import Call
from netplugin_sdk.core.engine_api import SOCKET
from netplugin_sdk.core.plugin import CONTENT_TYPE, Answer, Plugin, refusal
from netplugin_sdk.core.timings import Timings
from netplugin_sdk.driver import IpamDriver, NetworkDriver
from netplugin_sdk.errors import Conflict, DriverError, Unavailable
from netplugin_sdk.serving.tracing import trace_calls

if TYPE_CHECKING:
    import ssl
    from typing import TypeAlias

    _Listener: TypeAlias = "tuple[socket.socket, ssl.SSLContext | None, _Peers | None]"

PLUGIN_FOLDER = Path("/run/docker/plugins")
"""Where Docker looks for plugin sockets first."""

SPEC_FOLDER = Path("/etc/docker/plugins")
"""Where Docker looks for ``NAME.spec`` and ``NAME.json``."""

STATE_FOLDER = Path("/var/lib/netplugin")
"""Where plugins keep what they must not forget, in a folder of their name."""

_log = logging.getLogger("netplugin_sdk")

_BACKLOG = 4096  # the kernel caps it at net.core.somaxconn
_CHUNK = 64 * 1024
_PATIENCE = 0.002  # seconds that one call may hold up others; a change of threads costs a twentieth
_COURTESY = 0.2  # seconds for a client that has connected and not called yet, when the server stops
_LOOK = 0.4  # of the time for a call, after which the log says where it is
_UNLOGGED = 64  # calls whose lines may wait while others are served
_OFTEN = 3  # slow calls that make a method a slow one
_FIRST_SYSTEMD_FD = 3
_CREDENTIALS = struct.Struct("iII")  # struct ucred
_SO_PEERGROUPS = 59  # asm-generic/socket.h
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one client may cost: sizes in bytes, times in seconds."""

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
    """For the driver's method. Then the engine is told that it took too long, and what the method creates is undone;
    before, the log says where it hangs."""
    drain_time: float = 10.0
    """For the calls that run when the server stops."""


class TLSFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The PEM files of a TLS listener and of the engines that call it.

    `certificate` and `key` are the plugin's; clients must show a certificate of `client_ca`. The other three are paths
    on the engine's host and go into ``NAME.json``: the CA of the plugin's certificate and the engine's own pair.
    """

    certificate: Path
    key: Path
    client_ca: Path
    engine_ca: Path
    engine_certificate: Path
    engine_key: Path


# ------------------------------------------------------------------------------------------------- one connection


class _Refused(Exception):
    """The client's bytes are no request that is served; the connection ends with this answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Request(msgspec.Struct):
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
        self._requests: list[_Request] = []
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

    def feed(self, data: bytes) -> list[_Request]:
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
            _Request(parser.get_method(), self._target, b"".join(self._body), bool(parser.should_keep_alive()))
        )
        self._in_head, self._fed = True, 0


class _Connection:
    """One client. Whoever leads the server's loop calls `receive` when something has arrived."""

    def __init__(self, client: socket.socket, server: Server, tls: ssl.SSLContext | None) -> None:
        limits = server.limits
        client.setblocking(False)
        self._server = server
        self._socket = client
        self._not_yet: tuple[type[OSError], ...] = (BlockingIOError,)
        self._reader = _RequestReader(limits, lambda: self._send(b"HTTP/1.1 100 Continue\r\n\r\n"))
        self._lingers = False  # only waits for the client to read why it was refused
        self._overdue = False
        self._call: Call | None = None  # that runs
        self.deadline = time.monotonic() + limits.idle_time
        """Until when it must have said more; while a call runs, until when that is looked at."""
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
        """Its deadline is over: end it, or while a call runs, look at that. Called by the watch."""
        if (call := self._call) is not None:
            self._hurry(call)
        else:
            self._overdue = True  # `receive` is called, and ends it
            self.stop_reading()

    def _hurry(self, call: Call) -> None:
        seconds, patience = time.monotonic() - call.began, self._server.limits.call_time
        if seconds < patience:
            _log.warning("%s has been running for %.0f s:\n%s", call.method, seconds, _stack(call.thread))
            self.deadline = call.began + patience
        elif call.expire():
            self.deadline = math.inf
            _log.error("%s took over %g s: the engine waits no more\n%s", call.method, patience, _stack(call.thread))
            answer = refusal(503, f"{call.method} took over {patience:g} seconds")
            with suppress(OSError):
                self._send(_head(answer, keep_alive=False) + answer.body)
            self.abort()

    @property
    def awaited(self) -> bool:
        """Whether a request of its client is on its way, as far as one can tell."""
        return self._reader.expected

    def stop_reading(self) -> None:
        """Let the client send nothing more. What was received is still answered."""
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
            self.deadline = time.monotonic() + self._server.limits.idle_time
        elif not began or self.deadline == math.inf:
            self.deadline = time.monotonic() + self._server.limits.request_time
        return bool(data) and not self._overdue

    def _answer_all(self, data: bytes) -> bool:
        """Answer the requests that `data` completes; False when the client wants no more."""
        for request in self._reader.feed(data):
            call = self._call = Call()
            self.deadline = call.began + self._server.limits.call_time * _LOOK
            answer = self._answer(request, call)
            self._server._answered.append(answer)
            self._call = None
            if not call.commit():
                return False  # the watch has answered
            self.deadline = math.inf
            keep_alive = request.keep_alive and not self._server.stopping
            self._send(_head(answer, keep_alive) + answer.body)
            if not keep_alive:
                return False
        return True

    def _answer(self, request: _Request, call: Call) -> Answer:
        path = request.target.partition(b"?")[0].decode("latin-1")
        if request.method != b"POST":
            return self._server.plugin.refuse_method(request.method.decode("latin-1"), path)
        self._server._expect(self, path)
        answer = self._server.plugin.handle(path, request.body, call)
        self._server._learn(path, answer)
        return answer

    def _send(self, data: bytes) -> None:
        try:
            sent = self._socket.send(data)
        except self._not_yet:
            sent = 0
        if sent < len(data):  # a client that does not read; it holds up this thread, and the watch sees that
            self._socket.settimeout(self._server.limits.request_time)
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
        self.deadline = time.monotonic() + self._server.limits.request_time
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


# ----------------------------------------------------------------------------------------------------- the server


class Server:
    """Serves a `Plugin` on the sockets that it is told to listen on, until `stop`.

    It is a context manager: leaving it closes the sockets and removes what `listen_unix` and `listen_tcp` made.

    One thread leads: it waits for all sockets, reads, and answers. A call that takes long keeps its thread, and
    another one leads on: at once if the method was slow before, else as soon as the watch (the thread in `run`)
    notices. So fast calls cost no change of threads and no contention for the GIL, and slow ones hold nobody up.
    """

    def __init__(self, plugin: Plugin, limits: Limits | None = None) -> None:
        self.plugin = plugin
        self.limits = limits or Limits()
        self.stopping = False
        self._listeners: dict[int, _Listener] = {}
        self._connections: dict[int, _Connection] = {}
        self._cleanup = ExitStack()
        self._lock = threading.Lock()  # of the fields below and of what epoll is told
        self._epoll = select.epoll()
        self._waker = os.eventfd(0)
        self._epoll.register(self._waker, select.EPOLLIN)
        self._accepting = False
        self._leader: threading.Thread | None = None
        self._lacks_threads = False  # and has said so
        self._served: _Connection | None = None  # by the leader, now
        self._begun = 0  # how many times it began to serve one
        self._answered: deque[Answer] = deque()  # to be logged, when there is nothing more urgent
        self._slow: dict[str, int] = {}  # method → how many more of its calls were slow than fast, lately
        self._awake = True  # the watch looks by itself; else the bell wakes it
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._hearing = select.poll()
        self._hearing.register(self._bell, select.POLLIN)

    def listen_unix(
        self, path: Path, *, mode: int = 0o600, owner: int | str | None = None, group: int | str | None = None
    ) -> None:
        """Listen on a unix socket; a stale one of that path is replaced.

        Args:
            path: of the socket, usually `PLUGIN_FOLDER` / ``NAME.sock``; its folder is made where it is missing.
            mode: permission bits of the socket.
            owner: user name or id that owns it, else the process's own.
            group: group name or id that owns it, else the process's own.

        Raises:
            Conflict: another process serves it, or something that is not a socket is there.
            Unavailable: it cannot be made; the text says why.
        """
        self._add(self._cleanup.enter_context(unix_socket(path, mode=mode, owner=owner, group=group)))

    def listen_tcp(
        self,
        host: str,
        port: int,
        *,
        name: str,
        tls: TLSFiles | None = None,
        plain: bool = False,
        folder: Path = SPEC_FOLDER,
    ) -> int:
        """Listen on TCP, and tell engines of this host where by a discovery file, ``NAME.json`` or ``NAME.spec``.

        Args:
            host: the address to bind, and the one that the file names.
            port: the port; 0 lets the kernel choose.
            name: the plugin's name.
            tls: the files for TLS with client certificates.
            plain: without TLS although `host` is not a loopback address: whoever reaches it owns the host's network.
            folder: of the discovery file.

        Returns:
            The port.

        Raises:
            Unavailable: it cannot listen, read `tls` or write the file; or it would be plain TCP beyond the host.
        """
        try:
            context = None if tls is None else _tls_context(tls)
        except OSError as error:
            raise Unavailable(f"cannot listen on {host} port {port}: {error}") from error
        made = tcp_socket(host, port, name=name, tls=tls, plain=plain, folder=folder)
        listener = self._cleanup.enter_context(made)
        self._add(listener, context)
        return int(listener.getsockname()[1])

    def listen_systemd(self, *, tls: TLSFiles | None = None, plain: bool = False) -> bool:
        """Take over the sockets of a systemd ``.socket`` unit (``LISTEN_FDS``, sd_listen_fds(3)), if there are any.

        `tls` and `plain` are for TCP sockets, as in `listen_tcp`; the discovery file is the administrator's then.

        Raises:
            Unavailable: it cannot read `tls`; or it would be plain TCP beyond the host.
        """
        if os.environ.get("LISTEN_PID") != str(os.getpid()):
            return False
        count = int(os.environ.get("LISTEN_FDS", "0"))
        for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):  # not for child processes
            os.environ.pop(name, None)
        listeners = [socket.socket(fileno=fd) for fd in range(_FIRST_SYSTEMD_FD, _FIRST_SYSTEMD_FD + count)]
        for listener in listeners:  # all of them first, so that they are closed whatever happens
            listener.set_inheritable(False)
            if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):  # systemd's do already
                listener.listen(_BACKLOG)
            self._add(listener)
        tcp = [listener for listener in listeners if listener.family != socket.AF_UNIX]
        if tls is None:
            for listener in () if plain else tcp:
                _refuse_beyond_loopback(listener.getsockname()[0])
        elif tcp:
            try:
                context = _tls_context(tls)
            except OSError as error:
                raise Unavailable(f"cannot use the TLS files: {error}") from error
            for listener in tcp:
                self._add(listener, context)
        return count > 0

    def _add(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        listener.setblocking(False)
        peers = _Peers.of(listener) if listener.family == socket.AF_UNIX else None
        self._listeners[listener.fileno()] = (listener, tls, peers)

    def run(self) -> None:
        """Serve until `stop` is called; then answer the calls that run, for `Limits.drain_time` at most."""
        with self._lock:
            self._accept_more(True)
            self._lead_anew()
        try:
            self._watch(lambda: self.stopping)
        finally:
            self.stopping = True
            with self._lock:
                self._accept_more(False)
            self._withdraw()
            self._drain()

    def stop(self) -> None:
        """Make `run` stop. May be called from any thread and from a signal handler."""
        self.stopping = True
        self._ring()

    # ------------------------------------------------------------------------------------------------- leading

    def _lead_anew(self) -> None:
        leader, before = threading.Thread(target=self._lead, name="server", daemon=True), self._leader
        self._leader, self._served = leader, None
        try:
            leader.start()
        except RuntimeError:  # the process has its limit of threads
            self._leader = before
            raise

    def _lead(self) -> None:
        """Serve whoever has something to say, until another thread leads."""
        me = threading.current_thread()
        while self._leader is me:
            try:
                self._lead_once(me)
            except Exception:  # nobody else would go on
                _log.exception("a bug in the server")
        self._log_answered()

    def _lead_once(self, me: threading.Thread) -> None:
        events = self._epoll.poll(0 if self._answered else None)
        if not events or len(self._answered) > _UNLOGGED:
            self._log_answered()
        for fd, _ in events:
            connection = self._connections.get(fd)
            if connection is not None:
                self._serve(connection, me)
            elif (listening := self._listeners.get(fd)) is not None:
                self._accept(*listening)
            elif fd == self._waker:
                os.eventfd_read(fd)
                _notify_systemd("WATCHDOG=1")
            if self._leader is not me:
                return  # what is left of the events comes again to the next leader

    def _log_answered(self) -> None:
        try:
            while True:
                self.plugin.log(self._answered.popleft())
        except IndexError:
            pass
        except Exception:  # also of a thread that leads no more, which would end unheard
            _log.exception("a bug in the server")

    def _serve(self, connection: _Connection, me: threading.Thread) -> None:
        self._served = connection
        self._begun += 1
        if not self._awake:
            self._awake = True
            self._ring()
        goes_on = connection.receive()
        with self._lock:
            leads = self._leader is me
            if leads:
                self._served = None
            if not goes_on:
                self._end(connection, registered=leads)
            elif not leads:
                self._epoll.register(connection, select.EPOLLIN)

    def _end(self, connection: _Connection, *, registered: bool) -> None:
        fd = connection.fileno()
        if registered:
            self._epoll.unregister(fd)  # not left to close(2): a program being started may hold the socket too
        del self._connections[fd]
        connection.close()
        if self.stopping:
            self._ring()
        elif not self._accepting:
            self._accept_more(True)

    def _accept(self, listener: socket.socket, tls: ssl.SSLContext | None, peers: _Peers | None) -> None:
        try:
            with self._lock:
                if self._accepting:  # else who waits is for the next server at this socket
                    client, _ = listener.accept()
                    self._welcome(client, tls, peers)
        except OSError as error:  # else: gone already
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                _log.error("cannot accept a connection: %s", error)
                time.sleep(0.1)

    def _welcome(self, client: socket.socket, tls: ssl.SSLContext | None, peers: _Peers | None) -> None:
        try:
            if peers is not None and (stranger := peers.stranger(client)):
                _log.warning("refused a connection by %s", stranger)
                client.close()
                return
            connection = _Connection(client, self, tls)
        except OSError as error:
            _log.debug("connection ended: %s", error)
            client.close()
            return
        self._connections[connection.fileno()] = connection
        self._epoll.register(connection, select.EPOLLIN)
        if len(self._connections) >= self.limits.connections:
            self._accept_more(False)  # the backlog holds the others until somebody leaves

    def _accept_more(self, accepting: bool) -> None:
        if accepting is not self._accepting:
            self._accepting = accepting
            for fd in self._listeners:
                if accepting:
                    self._epoll.register(fd, select.EPOLLIN)
                else:
                    self._epoll.unregister(fd)

    # ------------------------------------------------------------------------------------------ letting another lead

    def _expect(self, connection: _Connection, path: str) -> None:
        """A call begins: where its method was slow before, another thread leads from now on."""
        if self._slow.get(path, 0) >= _OFTEN:
            self._hand_over(connection)

    def _learn(self, path: str, answer: Answer) -> None:
        """A call has ended: was its method slow? Once is not enough: the disk has its moments."""
        seconds = answer.call.get("ms", 0.0) / 1000
        if seconds > _PATIENCE:
            self._slow[path] = min(self._slow.get(path, 0) + 1, 2 * _OFTEN)
        elif path in self._slow:
            self._slow[path] = max(self._slow[path] - 1, 0)

    def _hand_over(self, connection: _Connection) -> None:
        with self._lock:
            if self._served is not connection:
                return  # it is served by a thread that leads no more
            self._epoll.unregister(connection)
            try:
                self._lead_anew()
                self._lacks_threads = False
            except RuntimeError as error:
                self._served = connection
                self._epoll.register(connection, select.EPOLLIN)
                if not self._lacks_threads:  # it is tried again every 2 ms
                    self._lacks_threads = True
                    _log.error("calls wait for each other: %s", error)

    def _watch(self, done: Callable[[], bool], until: float = math.inf) -> None:
        """Until it is done: let another thread lead when a call holds up the leader, and end what is overdue."""
        seen, look, heartbeat = -1, 0.0, _heartbeat()
        while not done() and (now := time.monotonic()) < until:
            if now >= look:
                look = min(self._end_overdue(now), now + heartbeat)
                if heartbeat < math.inf:
                    os.eventfd_write(self._waker, 1)  # whoever leads tells systemd
            connection, begun = self._served, self._begun
            if connection is None and begun == seen:
                self._awake = False
                if self._begun == begun:
                    self._wait_for_bell(min(look, until) - now)
                self._awake = True
            else:
                self._wait_for_bell(_PATIENCE)
                if connection is not None and self._served is connection and self._begun == begun:
                    self._hand_over(connection)
            seen = begun

    def _wait_for_bell(self, seconds: float) -> None:
        # Not by a queue with a timeout: CPython's SimpleQueue.get can miss its own deadline, and wait for ever.
        milliseconds = None if seconds == math.inf else max(0, math.ceil(seconds * 1000))
        if self._hearing.poll(milliseconds):
            os.eventfd_read(self._bell)

    def _ring(self) -> None:
        with suppress(OSError, ValueError):  # it is over
            os.eventfd_write(self._bell, 1)

    def _end_overdue(self, now: float) -> float:
        """When to look again: no deadline set from now on is earlier."""
        with self._lock:
            connections = list(self._connections.values())
        for connection in connections:
            if connection.deadline <= now:
                connection.expire()
        limits = self.limits
        soonest = min((c.deadline for c in connections if c.deadline > now), default=math.inf)
        return min(soonest, *(now + time for time in (limits.request_time, limits.idle_time, limits.call_time * _LOOK)))

    def _drain(self) -> None:
        until = time.monotonic() + self.limits.drain_time
        with self._lock:
            for connection in self._connections.values():
                if not connection.awaited:
                    connection.stop_reading()
        # An engine that finds its new connection ended does not try another one at once.
        self._watch(lambda: not self._connections, min(until, time.monotonic() + _COURTESY))
        with self._lock:
            for connection in self._connections.values():
                connection.stop_reading()
        self._watch(lambda: not self._connections, until)
        with self._lock:
            left = list(self._connections.values())
            for connection in left:
                connection.abort()
        if left:
            _log.error("stopped with %d calls still running", len(left))
            self._watch(lambda: not self._connections, time.monotonic() + 0.5)
        leader, self._leader = self._leader, None
        os.eventfd_write(self._waker, 1)
        if leader is not None:
            leader.join(0.5)  # it may be in one of the calls that are left
        self._log_answered()

    def _withdraw(self) -> None:
        """Listen no more, and remove what says that we do."""
        self._cleanup.close()
        for listener, *_ in self._listeners.values():
            listener.close()
        self._listeners.clear()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._withdraw()
        self._epoll.close()
        os.close(self._waker)
        os.close(self._bell)
        self._bell = -1


@contextmanager
def unix_socket(
    path: Path, *, mode: int = 0o600, owner: int | str | None = None, group: int | str | None = None
) -> Iterator[socket.socket]:
    """A unix socket that listens, for who hands it on; afterwards it and its file are gone.

    Arguments and errors are those of `Server.listen_unix`.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, ExitStack() as removing:
        try:
            owner_id, group_id = _user_id(owner), _group_id(group)
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.parent):
                _remove_stale(path)
                os.fchmod(listener.fileno(), mode)  # before it has a name, so that it is never wider open
                listener.bind(str(path))
                removing.callback(_remove_own, path, path.lstat())
                os.chown(path, owner_id, group_id)
                path.chmod(mode)
                listener.listen(_BACKLOG)
        except (OSError, KeyError) as error:
            raise Unavailable(f"cannot listen on {path}: {error}") from error
        yield listener


@contextmanager
def tcp_socket(
    host: str, port: int, *, name: str, tls: TLSFiles | None = None, plain: bool = False, folder: Path = SPEC_FOLDER
) -> Iterator[socket.socket]:
    """A TCP socket that listens, for who hands it on; afterwards it and the discovery file are gone.

    Arguments and errors are those of `Server.listen_tcp`; `tls` is for the discovery file only.
    """
    if tls is None and not plain:
        _refuse_beyond_loopback(host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise Unavailable(f"cannot listen on {host} port {port}: {error}") from error
    with listener, ExitStack() as removing:
        port = listener.getsockname()[1]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        file, content = _discovery(name, address, tls, folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".{file.name}.{os.getpid()}")
            temporary.write_bytes(content)
            temporary.rename(file)
            removing.callback(_remove_own, file, file.stat())
        except OSError as error:
            raise Unavailable(f"cannot write {file}: {error}") from error
        yield listener


class _Peers(msgspec.Struct, frozen=True):
    """Who may call at a unix socket: root, this process's user, the socket's owner, and its group if that may write.

    Looked at for each connection (SO_PEERCRED, unix(7)), since a mode can be wider than it was meant, or changed.
    """

    users: frozenset[int]
    groups: frozenset[int]

    @classmethod
    def of(cls, listener: socket.socket) -> _Peers:
        users, groups = {0, os.geteuid()}, set()
        name = listener.getsockname()
        if isinstance(name, str) and name:  # neither abstract nor without a name
            with suppress(OSError):
                made = Path(name).stat()
                users.add(made.st_uid)
                if made.st_mode & stat.S_IWGRP:
                    groups.add(made.st_gid)
        return cls(frozenset(users), frozenset(groups))

    def stranger(self, client: socket.socket) -> str | None:
        """Who it is, in words, if it may not."""
        pid, user, group = _CREDENTIALS.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user in self.users or group in self.groups:
            return None
        if self.groups:
            with suppress(OSError):  # over 256 groups
                others = client.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
                if self.groups.intersection(struct.unpack(f"{len(others) // 4}I", others)):
                    return None
        return f"process {pid} of user {user}, group {group}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder, so that of two starting plugins one sees the other's socket."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise Conflict(f"{path} exists and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            raise Conflict(f"{path} is already served by a busy process") from None
        pid, *_ = _CREDENTIALS.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        raise Conflict(f"{path} is already served by pid {pid}")


def _remove_own(path: Path, made: os.stat_result) -> None:
    with suppress(OSError):
        found = path.lstat()
        if (found.st_dev, found.st_ino) == (made.st_dev, made.st_ino):
            path.unlink()


def _user_id(user: int | str | None) -> int:
    return pwd.getpwnam(user).pw_uid if isinstance(user, str) else -1 if user is None else user


def _group_id(group: int | str | None) -> int:
    return grp.getgrnam(group).gr_gid if isinstance(group, str) else -1 if group is None else group


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refuse_beyond_loopback(host: str) -> None:
    if not _is_loopback(host):
        raise Unavailable(f"refusing to serve plain TCP on {host}: give TLS files, or insist on plain TCP")


def _tls_context(files: TLSFiles) -> ssl.SSLContext:
    import ssl  # noqa: PLC0415  # 10 ms that only TLS needs

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(files.certificate, files.key)
    context.load_verify_locations(files.client_ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF  # a client that goes without goodbye is no error to alert it of
    return context


def _discovery(name: str, address: str, tls: TLSFiles | None, folder: Path) -> tuple[Path, bytes]:
    if tls is None:
        return folder / f"{name}.spec", f"tcp://{address}".encode()
    content = {
        "Name": name,
        "Addr": f"https://{address}",
        "TLSConfig": {
            "InsecureSkipVerify": False,
            "CAFile": str(tls.engine_ca),
            "CertFile": str(tls.engine_certificate),
            "KeyFile": str(tls.engine_key),
        },
    }
    return folder / f"{name}.json", msgspec.json.format(msgspec.json.encode(content))


# ------------------------------------------------------------------------------------------------------- the process


def serve(
    *drivers: NetworkDriver[Any] | IpamDriver,
    name: str,
    socket_path: Path | str | None = None,
    socket_mode: int = 0o600,
    socket_owner: int | str | None = None,
    socket_group: int | str | None = None,
    tcp: tuple[str, int] | None = None,
    tls: TLSFiles | None = None,
    plain_tcp: bool = False,
    state: Path | str | None = None,
    docker: Path | str | None = SOCKET,
    limits: Limits | None = None,
    timings: Timings | None = None,
    metrics: tuple[str, int] | None = None,
    log_format: Literal["text", "json"] = "text",
    log_level: str = "INFO",
) -> None:
    """Serve drivers to the Docker Engine of this host until SIGTERM or SIGINT: the whole of a plugin's ``main``.

    It listens on the sockets that systemd hands over, else on `tcp` if that is given, else on a unix socket. It tells
    systemd when it is ready, that it lives and when it stops (sd_notify(3)), and logs one line a call to standard
    error. SIGHUP makes it hold what it knows against the kernel and Docker (`Plugin.reconcile`). Where the process has
    an OpenTelemetry tracer provider by now, each call is a span (`netplugin_sdk.serving.tracing`).

    Args:
        *drivers: a `NetworkDriver`, an `IpamDriver`, or one of each.
        name: the plugin's name, as in ``docker network create --driver NAME``.
        socket_path: the unix socket, else ``/run/docker/plugins/NAME.sock``.
        socket_mode: its permission bits.
        socket_owner: its owner, by name or id.
        socket_group: its group, by name or id.
        tcp: address and port to listen on instead; engines find it by a file in ``/etc/docker/plugins``.
        tls: files for TLS with client certificates on `tcp`, or on a TCP socket of systemd's.
        plain_tcp: insist on TCP without `tls` beyond the loopback addresses.
        state: the folder of what is remembered, else ``/var/lib/netplugin/NAME``.
        docker: the engine's own socket, to ask it in the background what it has; None asks nobody.
        limits: what one client may cost.
        timings: how long the SDK waits.
        metrics: address and port where Prometheus finds ``/metrics`` (`netplugin_sdk.serving.metrics`); it needs the
            extra ``netplugin-sdk[metrics]``, and anybody who reaches it may read.
        log_format: ``text``, or ``json`` for one object a line.
        log_level: of the standard library's `logging`; DEBUG shows each connection.

    Raises:
        ValueError: `name` cannot be a plugin's name.
        Conflict, Unavailable: it cannot start; the text says why.
    """
    check_name(name)
    _configure_logging(log_format, log_level)
    with (
        Plugin(
            *drivers, state=STATE_FOLDER / name if state is None else state, docker=docker, timings=timings
        ) as plugin,
        Server(plugin, limits) as server,
        _signals(server),  # before anybody can see that it listens
        nullcontext() if metrics is None else _exporting(plugin, name, metrics),
    ):
        trace_calls(plugin)
        if server.listen_systemd(tls=tls, plain=plain_tcp):
            where = "the sockets that it was given"
        elif tcp is not None:
            port = server.listen_tcp(*tcp, name=name, tls=tls, plain=plain_tcp)
            where = f"{tcp[0]} port {port}"
        else:
            path = PLUGIN_FOLDER / f"{name}.sock" if socket_path is None else Path(socket_path)
            server.listen_unix(path, mode=socket_mode, owner=socket_owner, group=socket_group)
            where = str(path)
        _notify_systemd("READY=1")
        _log.info("%s serves %s on %s", name, " and ".join(type(driver).__name__ for driver in drivers), where)
        server.run()
    _log.info("%s stopped", name)


def run(
    *drivers: Callable[[], NetworkDriver[Any] | IpamDriver], name: str, program: str | None = None, description: str
) -> None:
    """The command line of a plugin: ``--name``, ``--log-format`` and ``--help``, and then `serve`.

    What keeps it from starting is one line on standard error, and exit status 1; a wrong argument is status 2.

    Args:
        *drivers: a class, or a function without arguments, for each driver that `serve` shall have.
        name: the plugin's name, unless the command line gives another.
        program: what the command is called, else as `name`.
        description: of the driver, for ``--help``: a sentence.
    """
    import argparse  # noqa: PLC0415  # 6 ms that only programs need

    parser = argparse.ArgumentParser(prog=program or name, description=description)
    parser.add_argument("--name", default=name, help="name of the driver for docker (default: %(default)s)")
    parser.add_argument("--log-format", choices=["text", "json"], default="text", help="form of the log on stderr")
    arguments = parser.parse_args()
    try:
        serve(*(make() for make in drivers), name=arguments.name, log_format=arguments.log_format)
    except (DriverError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


def check_name(name: str) -> None:
    """Raise ValueError if `name` cannot be a plugin's: it is a part of file names, and of Docker's references."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot be a plugin's name: letters, digits, and _ . - after the first")


def _exporting(plugin: Plugin, name: str, address: tuple[str, int]) -> AbstractContextManager[None]:
    try:
        from netplugin_sdk.serving.metrics import exporting  # noqa: PLC0415  # 60 ms that only metrics need
    except ModuleNotFoundError as error:
        raise Unavailable(f"metrics need the package {error.name}: pip install 'netplugin-sdk[metrics]'") from error
    return exporting(plugin, name, *address)


@contextmanager
def _signals(server: Server) -> Iterator[None]:
    def stop(*_: object) -> None:
        _notify_systemd("STOPPING=1")
        server.stop()

    def reconcile(*_: object) -> None:
        server.plugin.reconcile()

    handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: reconcile}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _notify_systemd(state: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, suppress(OSError):
        notify.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def _heartbeat() -> float:
    """Seconds until systemd wants to hear of us again; half of what it allows, if it does (sd_watchdog_enabled(3))."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return math.inf
    return int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6 or math.inf


def _configure_logging(form: Literal["text", "json"], level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(_TextFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Neither form shows them ("Optimization" in the documentation of `logging`).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


class _TextFormatter(logging.Formatter):
    """The standard library's, but the time is put into words once a second and not for every line."""

    _second = 0
    _text = ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002
        second = int(record.created)
        if second != self._second:  # the handler's lock is held
            self._second, self._text = second, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        return f"{self._text},{int(record.msecs):03d}"


class _JsonFormatter(logging.Formatter):
    """One JSON object a line: time (Unix seconds), level, message, and a call's fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {"time": round(record.created, 6), "level": record.levelname}
        fields |= getattr(record, "call", None) or {"message": record.getMessage()}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()
