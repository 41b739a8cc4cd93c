"""Listen, serve, drain, stop: a small threaded HTTP/1.1 server for the engine's calls.

A thread per connection, keep-alive, llhttp (httptools) for the parsing, limits on size and time. The engine keeps two
idle connections and opens short-lived ones under load; a listen backlog that is full costs it a second of sleep.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import http
import ipaddress
import logging
import os
import pwd
import re
import selectors
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import httptools
import msgspec

from netplugin_sdk.driver import IpamDriver, NetworkDriver
from netplugin_sdk.errors import Conflict, Unavailable
from netplugin_sdk.plugin import CONTENT_TYPE, Answer, Plugin, refusal

if TYPE_CHECKING:
    import ssl

PLUGIN_FOLDER = Path("/run/docker/plugins")
"""Where Docker looks for plugin sockets first."""

SPEC_FOLDER = Path("/etc/docker/plugins")
"""Where Docker looks for ``NAME.spec`` and ``NAME.json``."""

STATE_FOLDER = Path("/var/lib/netplugin")
"""Where plugins keep what they must not forget, in a folder of their name."""

_log = logging.getLogger("netplugin_sdk")

_BACKLOG = 4096  # the kernel caps it at net.core.somaxconn
_CHUNK = 64 * 1024
_FIRST_SYSTEMD_FD = 3
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


class _Call(msgspec.Struct):
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
        self._calls: list[_Call] = []
        self.refused: _Refused | None = None
        self._size = 0  # of the unfinished request so far
        self._in_head = True
        self._target = b""
        self._body: list[bytes] = []
        self._wants_continue = False

    @property
    def midway(self) -> bool:
        """Whether a request has begun and is not complete."""
        return self._size > 0

    def feed(self, data: bytes) -> list[_Call]:
        """The requests that `data` completes; look at `refused` after them."""
        self._calls = []
        self._size += len(data)
        try:
            self._parser.feed_data(data)
            if self._in_head and self._size > self._limits.head:
                raise _Refused(431, f"the head of the request has more than {self._limits.head} bytes")
            if self._size > self._limits.head + self._limits.body:
                raise self._too_large()
        except _Refused as refused:
            self.refused = refused
        except httptools.HttpParserUpgrade:
            self.refused = _Refused(400, "the connection cannot be upgraded")
        except httptools.HttpParserError as error:
            raised = error.__context__  # by one of the methods below
            self.refused = raised if isinstance(raised, _Refused) else _Refused(400, f"not an HTTP request: {error}")
        return self._calls

    def _too_large(self) -> _Refused:
        return _Refused(413, f"the body of the request has more than {self._limits.body} bytes")

    def on_message_begin(self) -> None:
        self._size = self._size or 1  # it may begin behind another in the same data
        self._target, self._body = b"", []
        self._wants_continue = False

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-length" and int(value) > self._limits.body:
            raise self._too_large()
        if name == b"expect" and value.lower() == b"100-continue":
            self._wants_continue = True

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._wants_continue:
            self._send_continue()

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        parser = self._parser
        self._calls.append(
            _Call(parser.get_method(), self._target, b"".join(self._body), bool(parser.should_keep_alive()))
        )
        self._in_head, self._size = True, 0


class _Connection:
    """One client, served by one thread until it goes, misbehaves or the server stops."""

    def __init__(self, client: socket.socket, server: Server, tls: ssl.SSLContext | None) -> None:
        self._socket = client
        self._server = server
        self._tls = tls

    def run(self) -> None:
        """Serve the client; the body of the thread."""
        try:
            if self._tls is None:
                # The kernel's timeouts, since Python's own cost a poll(2) and a turn of the GIL for each call.
                self._socket.settimeout(None)
                self._set_timeout(socket.SO_SNDTIMEO, self._server.limits.request_time)
            else:
                self._socket.settimeout(self._server.limits.request_time)
                secured = self._tls.wrap_socket(self._socket, server_side=True, do_handshake_on_connect=False)
                self._socket = secured
                secured.do_handshake()
            self._serve()
        except OSError as error:  # the client went away, or TLS failed
            _log.debug("connection ended: %s", error)
        except Exception:
            _log.exception("connection ended by a bug")
        finally:
            self._socket.close()

    def stop_reading(self) -> None:
        """Let the client send nothing more. What was received is still answered."""
        # Not SSLSocket's shutdown, which would go on in plain text.
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RD)

    def abort(self) -> None:
        """End it now."""
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _serve(self) -> None:
        limits = self._server.limits
        reader = _RequestReader(limits, lambda: self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n"))
        deadline: float | None = None  # of the request that is under way
        self._set_timeout(socket.SO_RCVTIMEO, limits.idle_time)
        while True:
            try:
                data = self._socket.recv(_CHUNK)
            except (TimeoutError, BlockingIOError):
                if deadline is not None:
                    self._refuse(_Refused(408, "the request took too long to arrive"))
                return
            if not data:
                return
            for call in reader.feed(data):
                answer = self._answer(call)
                self._send(answer, call.keep_alive and not self._server.stopping)
                self._server.plugin.log(answer)
                if not call.keep_alive:
                    return
            if reader.refused is not None:
                self._refuse(reader.refused)
                return
            if reader.midway:
                deadline = deadline or time.monotonic() + limits.request_time
                self._set_timeout(socket.SO_RCVTIMEO, deadline - time.monotonic())
            elif deadline is not None:
                deadline = None
                self._set_timeout(socket.SO_RCVTIMEO, limits.idle_time)

    def _answer(self, call: _Call) -> Answer:
        if call.method != b"POST":
            return refusal(405, f"{call.method.decode('latin-1')} is not POST")
        return self._server.plugin.handle(call.target.partition(b"?")[0].decode("latin-1"), call.body)

    def _send(self, answer: Answer, keep_alive: bool) -> None:
        self._socket.sendall(_head(answer, keep_alive) + answer.body)

    def _refuse(self, refused: _Refused) -> None:
        _log.warning("refused a request: %s", refused)
        self._send(refusal(refused.status, str(refused)), keep_alive=False)
        # Closing with bytes unread would reset the connection, and the client might not see the answer.
        socket.socket.shutdown(self._socket, socket.SHUT_WR)
        until = time.monotonic() + 2.0
        self._set_timeout(socket.SO_RCVTIMEO, 1.0)
        with suppress(TimeoutError, BlockingIOError):
            while time.monotonic() < until and socket.socket.recv(self._socket, _CHUNK):
                pass

    def _set_timeout(self, option: int, seconds: float) -> None:
        seconds = max(0.001, seconds)
        if self._tls is None:
            timeval = struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))
            self._socket.setsockopt(socket.SOL_SOCKET, option, timeval)
        else:
            self._socket.settimeout(seconds)


def _head(answer: Answer, keep_alive: bool) -> bytes:
    head = b"%sContent-Length: %d\r\n" % (_status_line(answer.status), len(answer.body))
    return head + (b"\r\n" if keep_alive else b"Connection: close\r\n\r\n")


@cache
def _status_line(status: int) -> bytes:
    return f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nContent-Type: {CONTENT_TYPE}\r\n".encode()


# ----------------------------------------------------------------------------------------------------- the server


class Server:
    """Serves a `Plugin` on the sockets that it is told to listen on, until `stop`.

    It is a context manager: leaving it closes the sockets and removes what `listen_unix` and `listen_tcp` made.
    """

    def __init__(self, plugin: Plugin, limits: Limits | None = None) -> None:
        self.plugin = plugin
        self.limits = limits or Limits()
        self.stopping = False
        self._listeners: list[tuple[socket.socket, ssl.SSLContext | None]] = []
        self._connections: set[_Connection] = set()
        self._changed = threading.Condition()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_write.setblocking(False)
        self._cleanup = ExitStack()
        self._cleanup.callback(self._wake_read.close)
        self._cleanup.callback(self._wake_write.close)

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
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.parent):
                _remove_stale(path)
                os.fchmod(listener.fileno(), mode)  # before it has a name, so that it is never wider open
                listener.bind(str(path))
                os.chown(path, _user_id(owner), _group_id(group))
                path.chmod(mode)
                listener.listen(_BACKLOG)
                made = path.stat()
        except (OSError, KeyError) as error:
            listener.close()
            raise Unavailable(f"cannot listen on {path}: {error}") from error
        except BaseException:
            listener.close()
            raise
        self._add(listener)
        self._cleanup.callback(_remove_own, path, made)

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
        if tls is None and not plain and not _is_loopback(host):
            raise Unavailable(f"refusing to serve plain TCP on {host}: give TLS files, or insist with plain=True")
        try:
            context = None if tls is None else _tls_context(tls)
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise Unavailable(f"cannot listen on {host} port {port}: {error}") from error
        self._add(listener, context)
        port = int(listener.getsockname()[1])
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        file, content = _discovery(name, address, tls, folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".{file.name}.{os.getpid()}")
            temporary.write_bytes(content)
            temporary.rename(file)
        except OSError as error:
            raise Unavailable(f"cannot write {file}: {error}") from error
        self._cleanup.callback(_remove_own, file, file.stat())
        return port

    def listen_systemd(self) -> bool:
        """Take over the sockets of a systemd ``.socket`` unit (``LISTEN_FDS``, sd_listen_fds(3)), if there are any."""
        if os.environ.get("LISTEN_PID") != str(os.getpid()):
            return False
        count = int(os.environ.pop("LISTEN_FDS", "0"))
        del os.environ["LISTEN_PID"]  # not for child processes
        for fd in range(_FIRST_SYSTEMD_FD, _FIRST_SYSTEMD_FD + count):
            os.set_inheritable(fd, False)
            self._add(socket.socket(fileno=fd))
        return count > 0

    def _add(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        listener.setblocking(False)
        self._listeners.append((listener, tls))
        self._cleanup.callback(listener.close)

    def run(self) -> None:
        """Serve until `stop` is called; then answer the calls that run, for `Limits.drain_time` at most."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            for listener, tls in self._listeners:
                selector.register(listener, selectors.EVENT_READ, tls)
            while not self.stopping:
                for key, _ in selector.select():
                    if isinstance(key.fileobj, socket.socket) and key.fileobj is not self._wake_read:
                        self._accept(key.fileobj, key.data)
        self._cleanup.close()
        self._drain()

    def stop(self) -> None:
        """Make `run` stop. May be called from any thread and from a signal handler."""
        self.stopping = True
        with suppress(OSError):  # full: it wakes up anyway; closed: it has stopped
            self._wake_write.send(b"\0")

    def _accept(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        with self._changed:
            # A full house: the backlog holds the others until somebody leaves.
            while len(self._connections) >= self.limits.connections and not self.stopping:
                self._changed.wait(0.5)
        try:
            client, _ = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                _log.error("cannot accept a connection: %s", error)
                time.sleep(0.1)
            return  # else: gone already
        connection = _Connection(client, self, tls)
        with self._changed:
            self._connections.add(connection)
        thread = threading.Thread(target=self._run_connection, args=(connection,), name="connection", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the process has its limit of threads
            _log.error("cannot serve a connection: %s", error)
            client.close()
            self._connections.discard(connection)

    def _run_connection(self, connection: _Connection) -> None:
        try:
            connection.run()
        finally:
            with self._changed:
                self._connections.discard(connection)
                self._changed.notify_all()

    def _drain(self) -> None:
        until = time.monotonic() + self.limits.drain_time
        with self._changed:
            for connection in self._connections:
                connection.stop_reading()
            self._changed.wait_for(lambda: not self._connections, self.limits.drain_time)
            if self._connections:
                _log.error("stopped with %d calls still running", len(self._connections))
                for connection in self._connections:
                    connection.abort()
                self._changed.wait_for(lambda: not self._connections, max(0.5, until - time.monotonic()))

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()


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
        pid, _uid, _gid = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
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


def _tls_context(files: TLSFiles) -> ssl.SSLContext:
    import ssl  # noqa: PLC0415  # 10 ms that only TLS needs

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(files.certificate, files.key)
    context.load_verify_locations(files.client_ca)
    context.verify_mode = ssl.CERT_REQUIRED
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
    limits: Limits | None = None,
    log_format: Literal["text", "json"] = "text",
    log_level: str = "INFO",
) -> None:
    """Serve drivers to the Docker Engine of this host until SIGTERM or SIGINT: the whole of a plugin's ``main``.

    It listens on the sockets that systemd hands over, else on `tcp` if that is given, else on a unix socket. It tells
    systemd when it is ready and when it stops (sd_notify(3)), and logs one line a call to standard error.

    Args:
        *drivers: a `NetworkDriver`, an `IpamDriver`, or one of each.
        name: the plugin's name, as in ``docker network create --driver NAME``.
        socket_path: the unix socket, else ``/run/docker/plugins/NAME.sock``.
        socket_mode: its permission bits.
        socket_owner: its owner, by name or id.
        socket_group: its group, by name or id.
        tcp: address and port to listen on instead; engines find it by a file in ``/etc/docker/plugins``.
        tls: files for TLS with client certificates on `tcp`.
        plain_tcp: insist on `tcp` without `tls` beyond the loopback addresses.
        state: the folder of what is remembered, else ``/var/lib/netplugin/NAME``.
        limits: what one client may cost.
        log_format: ``text``, or ``json`` for one object a line.
        log_level: of the standard library's `logging`; DEBUG shows each connection.

    Raises:
        ValueError: `name` cannot be a plugin's name.
        Conflict, Unavailable: it cannot start; the text says why.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot be a plugin's name: letters, digits, and _ . - after the first")
    _configure_logging(log_format, log_level)
    with (
        Plugin(*drivers, state=STATE_FOLDER / name if state is None else state) as plugin,
        Server(plugin, limits) as server,
    ):
        if server.listen_systemd():
            where = "the sockets of systemd"
        elif tcp is not None:
            port = server.listen_tcp(*tcp, name=name, tls=tls, plain=plain_tcp)
            where = f"{tcp[0]} port {port}"
        else:
            path = PLUGIN_FOLDER / f"{name}.sock" if socket_path is None else Path(socket_path)
            server.listen_unix(path, mode=socket_mode, owner=socket_owner, group=socket_group)
            where = str(path)
        with _signals_stop(server):
            _notify_systemd("READY=1")
            _log.info("%s serves %s on %s", name, " and ".join(type(driver).__name__ for driver in drivers), where)
            server.run()
    _log.info("%s stopped", name)


@contextmanager
def _signals_stop(server: Server) -> Iterator[None]:
    def stop(*_: object) -> None:
        _notify_systemd("STOPPING=1")
        server.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
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


def _configure_logging(form: Literal["text", "json"], level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _JsonFormatter(logging.Formatter):
    """One JSON object a line: time (Unix seconds), level, message, and a call's fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {"time": round(record.created, 6), "level": record.levelname}
        fields |= getattr(record, "call", None) or {"message": record.getMessage()}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()
