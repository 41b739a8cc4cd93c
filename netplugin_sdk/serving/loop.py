"""The server: one thread leads, others follow; stopping and draining."""

from __future__ import annotations

import errno
import logging
import math
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from netplugin_sdk.core.calls import Call
from netplugin_sdk.core.plugin import Answer, Plugin
from netplugin_sdk.errors import Unavailable
from netplugin_sdk.serving import systemd
from netplugin_sdk.serving.http import WARN_FRACTION, Connection, Limits, Request
from netplugin_sdk.serving.sockets import (
    BACKLOG,
    SPEC_FOLDER,
    AllowedPeers,
    TLSFiles,
    refuse_beyond_loopback,
    tcp_socket,
    tls_context,
    unix_socket,
)

if TYPE_CHECKING:
    import ssl
    from typing import TypeAlias

    _Listener: TypeAlias = "tuple[socket.socket, ssl.SSLContext | None, AllowedPeers | None]"

_log = logging.getLogger("netplugin_sdk")

_UNLOGGED = 64  # calls whose lines may wait while others are served
_SLOW_THRESHOLD = 3  # slow calls that make a method a slow one


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
        self._connections: dict[int, Connection] = {}
        self._cleanup = ExitStack()
        self._lock = threading.Lock()  # of the fields below and of what epoll is told
        self._epoll = select.epoll()
        self._waker = os.eventfd(0)
        self._epoll.register(self._waker, select.EPOLLIN)
        self._accepting = False
        self._leader: threading.Thread | None = None
        self._lacks_threads = False  # and has said so
        self._served: Connection | None = None  # by the leader, now
        self._begun = 0  # how many times it began to serve one
        self._answered: deque[Answer] = deque()  # to be logged, when there is nothing more urgent
        self._slow: dict[str, int] = {}  # method → how many more of its calls were slow than fast, lately
        self._watch_active = True  # the watch looks by itself; else its event wakes it
        self._watch_event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._watch_poll = select.poll()
        self._watch_poll.register(self._watch_event, select.POLLIN)

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
            plain: without TLS although `host` is not a loopback address: anyone who can connect to it controls the
                host's network.
            folder: of the discovery file.

        Returns:
            The port.

        Raises:
            Unavailable: it cannot listen, read `tls` or write the file; or it would be plain TCP beyond the host.
        """
        try:
            context = None if tls is None else tls_context(tls)
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
        listeners = systemd.handed_over()
        for listener in listeners:  # all of them first, so that they are closed whatever happens
            if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):  # systemd's listen already
                listener.listen(BACKLOG)
            self._add(listener)
        tcp = [listener for listener in listeners if listener.family != socket.AF_UNIX]
        if tls is None:
            for listener in () if plain else tcp:
                refuse_beyond_loopback(listener.getsockname()[0])
        elif tcp:
            try:
                context = tls_context(tls)
            except OSError as error:
                raise Unavailable(f"cannot use the TLS files: {error}") from error
            for listener in tcp:
                self._add(listener, context)
        return bool(listeners)

    def _add(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        listener.setblocking(False)
        peers = AllowedPeers.of(listener) if listener.family == socket.AF_UNIX else None
        self._listeners[listener.fileno()] = (listener, tls, peers)

    def run(self) -> None:
        """Serve until `stop` is called; then answer the calls that run, for `Limits.drain_time` at most."""
        with self._lock:
            self._accept_more(True)
            self._start_leader()
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
        self._wake_watch()

    # ------------------------------------------------------------------------------------------------- leading

    def _start_leader(self) -> None:
        leader, before = threading.Thread(target=self._lead, name="server", daemon=True), self._leader
        self._leader, self._served = leader, None
        try:
            leader.start()
        except RuntimeError:  # the process has its limit of threads
            self._leader = before
            raise

    def _lead(self) -> None:
        """Serve the connections that have sent something, until another thread leads."""
        me = threading.current_thread()
        while self._leader is me:
            try:
                self._lead_once(me)
            except Exception:  # no other thread would go on
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
                systemd.notify("WATCHDOG=1")
            if self._leader is not me:
                return  # the next leader gets the remaining events again

    def _log_answered(self) -> None:
        try:
            while True:
                self.plugin.log(self._answered.popleft())
        except IndexError:
            pass
        except Exception:  # also in a thread that no longer leads, which would end silently
            _log.exception("a bug in the server")

    def _serve(self, connection: Connection, me: threading.Thread) -> None:
        self._served = connection
        self._begun += 1
        if not self._watch_active:
            self._watch_active = True
            self._wake_watch()
        goes_on = connection.receive()
        with self._lock:
            leads = self._leader is me
            if leads:
                self._served = None
            if not goes_on:
                self._end(connection, registered=leads)
            elif not leads:
                self._epoll.register(connection, select.EPOLLIN)

    def _end(self, connection: Connection, *, registered: bool) -> None:
        fd = connection.fileno()
        if registered:
            self._epoll.unregister(fd)  # not left to close(2): a program being started may hold the socket too
        del self._connections[fd]
        connection.close()
        if self.stopping:
            self._wake_watch()
        elif not self._accepting:
            self._accept_more(True)

    def _accept(self, listener: socket.socket, tls: ssl.SSLContext | None, peers: AllowedPeers | None) -> None:
        try:
            with self._lock:
                if self._accepting:  # else those that wait are for the next server at this socket
                    client, _ = listener.accept()
                    self._welcome(client, tls, peers)
        except OSError as error:  # else: gone already
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                _log.error("cannot accept a connection: %s", error)
                time.sleep(0.1)

    def _welcome(self, client: socket.socket, tls: ssl.SSLContext | None, peers: AllowedPeers | None) -> None:
        try:
            if peers is not None and (reason := peers.reject_reason(client)):
                _log.warning("refused a connection by %s", reason)
                client.close()
                return
            connection = Connection(client, self.limits, answer=self._answer, stopping=lambda: self.stopping, tls=tls)
        except OSError as error:
            _log.debug("connection ended: %s", error)
            client.close()
            return
        self._connections[connection.fileno()] = connection
        self._epoll.register(connection, select.EPOLLIN)
        if len(self._connections) >= self.limits.connections:
            self._accept_more(False)  # the backlog holds the others until one ends

    def _accept_more(self, accepting: bool) -> None:
        if accepting is not self._accepting:
            self._accepting = accepting
            for fd in self._listeners:
                if accepting:
                    self._epoll.register(fd, select.EPOLLIN)
                else:
                    self._epoll.unregister(fd)

    def _answer(self, connection: Connection, request: Request, call: Call) -> Answer:
        path = request.target.partition(b"?")[0].decode("latin-1")
        if request.method != b"POST":
            answer = self.plugin.refuse_method(request.method.decode("latin-1"), path)
        else:
            self._hand_over_if_slow(connection, path)
            answer = self.plugin.handle(path, request.body, call)
            self._record_duration(path, answer)
        self._answered.append(answer)
        return answer

    # ------------------------------------------------------------------------------------------ letting another lead

    def _hand_over_if_slow(self, connection: Connection, path: str) -> None:
        """A call begins: where its method was slow before, another thread leads from now on."""
        if self._slow.get(path, 0) >= _SLOW_THRESHOLD:
            self._hand_over(connection)

    def _record_duration(self, path: str, answer: Answer) -> None:
        """A call has ended: was its method slow? Once does not count, since a disk has its moments."""
        seconds = answer.call.get("ms", 0.0) / 1000
        if seconds > self.limits.hand_over_time:
            self._slow[path] = min(self._slow.get(path, 0) + 1, 2 * _SLOW_THRESHOLD)
        elif path in self._slow:
            self._slow[path] = max(self._slow[path] - 1, 0)

    def _hand_over(self, connection: Connection) -> None:
        with self._lock:
            if self._served is not connection:
                return  # a thread serves it that no longer leads
            self._epoll.unregister(connection)
            try:
                self._start_leader()
                self._lacks_threads = False
            except RuntimeError as error:
                self._served = connection
                self._epoll.register(connection, select.EPOLLIN)
                if not self._lacks_threads:  # it is tried again every 2 ms
                    self._lacks_threads = True
                    _log.error("calls wait for each other: %s", error)

    def _watch(self, done: Callable[[], bool], until: float = math.inf) -> None:
        """Until it is done: let another thread lead when a call holds up the leader, and end what is overdue."""
        seen, look, heartbeat = -1, 0.0, systemd.watchdog_interval()
        while not done() and (now := time.monotonic()) < until:
            if now >= look:
                look = min(self._end_overdue(now), now + heartbeat)
                if heartbeat < math.inf:
                    os.eventfd_write(self._waker, 1)  # the leader tells systemd
            connection, begun = self._served, self._begun
            if connection is None and begun == seen:
                self._watch_active = False
                if self._begun == begun:
                    self._wait_for_event(min(look, until) - now)
                self._watch_active = True
            else:
                self._wait_for_event(self.limits.hand_over_time)
                if connection is not None and self._served is connection and self._begun == begun:
                    self._hand_over(connection)
            seen = begun

    def _wait_for_event(self, seconds: float) -> None:
        # Not by a queue with a timeout: CPython's SimpleQueue.get can miss its own deadline, and wait for ever.
        milliseconds = None if seconds == math.inf else max(0, math.ceil(seconds * 1000))
        if self._watch_poll.poll(milliseconds):
            os.eventfd_read(self._watch_event)

    def _wake_watch(self) -> None:
        with suppress(OSError, ValueError):  # it is over
            os.eventfd_write(self._watch_event, 1)

    def _end_overdue(self, now: float) -> float:
        """When to look again: no deadline set from now on is earlier."""
        with self._lock:
            connections = list(self._connections.values())
        for connection in connections:
            if connection.deadline <= now:
                connection.expire()
        limits = self.limits
        soonest = min((c.deadline for c in connections if c.deadline > now), default=math.inf)
        times = (limits.request_time, limits.idle_time, limits.call_time * WARN_FRACTION)
        return min(soonest, *(now + seconds for seconds in times))

    def _drain(self) -> None:
        until = time.monotonic() + self.limits.drain_time
        with self._lock:
            for connection in self._connections.values():
                if not connection.awaited:
                    connection.stop_reading()
        # An engine that finds its new connection ended does not try another one at once.
        self._watch(lambda: not self._connections, min(until, time.monotonic() + self.limits.first_request_time))
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
        """Stop listening, and remove what says that we do."""
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
        os.close(self._watch_event)
        self._watch_event = -1
