"""How an engine finds a plugin and calls it, with its habits, its words and its flaws.

From the sources of moby (``pkg/plugins``, ``daemon/libnetwork/{drivers,ipams}/remote``) and of Go's ``net/http``, which
carries its requests. The text of an error here is the one that an engine prints behind ``Error response from daemon:``.
"""

from __future__ import annotations

import gzip
import http.client
import io
import json
import logging
import os
import select
import socket
import ssl
import stat
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

from netplugin_sdk.errors import DriverError, NotFound, Unavailable

_log = logging.getLogger("netplugin_sdk.cnm")

_T = TypeVar("_T")

ACCEPT = "application/vnd.docker.plugins.v1.2+json"
"""The media type that an engine asks for (moby ``pkg/plugins/transport/mimetype.go``)."""

_HOST = "plugin.moby.localhost"
_ERROR_FIELDS = {"NetworkDriver": "Err", "IpamDriver": "Error"}  # of an answer with status 200
_DIAL_TIME = 10.0
_IDLE_CONNECTIONS = 2  # net/http: DefaultMaxIdleConnsPerHost
_IDLE_TIME = 30.0
_FIRST_WRITE = 4096  # net/http: the buffer of a connection's writer
_NEXT_WRITES = 32 * 1024  # io.Copy
_SOCKET_PATH = 108  # sockaddr_un


class PluginNotFound(NotFound):
    """No folder has a plugin of this name."""


class RemoteError(DriverError):
    """The plugin refused, or its answer cannot be used. `http_status` is its answer's."""

    def __init__(self, text: str, http_status: int = 200) -> None:
        super().__init__(text)
        self.http_status = http_status

    def __str__(self) -> str:
        return str(self.args[0])  # as it is, since the engine too prints it as it is


class MethodNotSupported(RemoteError):
    """The answer was a 404: engines pass over it for the two ExternalConnectivity methods."""


# -------------------------------------------------------------------------------------------------------- discovery


@dataclass(frozen=True)
class Folders:
    """Where plugins are looked for."""

    sockets: Path = Path("/run/docker/plugins")
    specs: tuple[Path, ...] = (Path("/etc/docker/plugins"), Path("/usr/lib/docker/plugins"))


@dataclass(frozen=True)
class TLS:
    """``TLSConfig`` of a ``NAME.json``: PEM files, each "" for none."""

    ca: str = ""
    certificate: str = ""
    key: str = ""
    insecure: bool = False
    """The plugin's certificate is not looked at."""


@dataclass(frozen=True)
class Address:
    """Where a plugin listens."""

    name: str
    url: str
    """``unix:///…``, ``tcp://host:port``, ``https://host:port``: only ``https`` makes it speak TLS."""
    tls: TLS | None = None


DOCKER = Folders()
"""Of an engine that is not rootless."""


def find(name: str, *, folders: Folders = DOCKER) -> Address:
    """Look for a plugin: its socket first, then ``NAME.spec`` and ``NAME.json`` (moby ``pkg/plugins/discovery.go``).

    The engine looks again for 15 s where there is none; this looks once.

    Raises:
        PluginNotFound: there is none.
        DriverError: its file is malformed or cannot be read.
    """
    for path in _paths(folders.sockets, name, ".sock"):
        if stat.S_ISSOCK(_mode(path)):
            return Address(name, f"unix://{path}", TLS(insecure=True))
    for folder in folders.specs:
        for path in (*_paths(folder, name, ".spec"), *_paths(folder, name, ".json")):
            if _mode(path):
                return _read(name, path)
    where = ", ".join(map(str, (folders.sockets, *folders.specs)))
    raise PluginNotFound(f"plugin {json.dumps(name)} not found (in {where})")


def installed(folders: Folders = DOCKER) -> list[str]:
    """The names that an engine lists, which are not quite those that it finds (moby's ``Scan``, same file).

    A socket of any extension counts; one that is behind a symbolic link does not, nor a spec in a sub-folder behind
    another file of that name. A name that is there twice is listed twice.
    """
    names = []
    for entry in _entries(folders.sockets):
        found, mode = entry, entry.lstat().st_mode
        if stat.S_ISDIR(mode):
            found = entry / f"{entry.name}.sock"
            mode = _mode(found)
        if stat.S_ISSOCK(mode):
            names.append(_split(found)[0])
    for folder in folders.specs:
        for entry in _entries(folder):
            inside = _entries(entry) if stat.S_ISDIR(entry.lstat().st_mode) else []
            found = next((path for path in inside if _split(path)[0] == entry.name), entry)
            name, extension = _split(found)
            if extension in (".spec", ".json"):
                names.append(name)
    return names


def _paths(folder: Path, name: str, extension: str) -> tuple[Path, Path]:
    return Path(f"{folder}/{name}{extension}"), Path(f"{folder}/{name}/{name}{extension}")


def _mode(path: Path) -> int:
    """0 where there is nothing, or nothing that can be looked at."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DriverError(f"legacy plugin: error reading dir entries: open {folder}: {_words(error)}") from error


def _split(path: Path) -> tuple[str, str]:
    """Its name and extension as Go's ``filepath.Ext`` has it: unlike pathlib's suffix it may be all of the name."""
    stem, dot, extension = path.name.rpartition(".")
    return (stem, dot + extension) if dot else (path.name, "")


def _read(name: str, path: Path) -> Address:
    try:
        address = _described(name, path.read_bytes(), is_json=path.suffix == ".json")
        _locate(address.url)
    except (OSError, ValueError) as error:
        raise DriverError(f"legacy plugin: {path}: {_words(error)}") from error
    return address


def _described(name: str, content: bytes, *, is_json: bool) -> Address:
    if not is_json:
        return Address(name, content.decode().strip(), TLS(insecure=True))
    described, absent = _decode(content), dict[str, Any]()
    url = _field(described, "Addr", "")  # and its Name says nothing: the file's is the plugin's
    files = _field(described, "TLSConfig", absent)
    if files is absent:
        return Address(name, url)
    ca = _field(files, "CAFile", "")
    insecure = _field(files, "InsecureSkipVerify", False) or not ca
    return Address(name, url, TLS(ca, _field(files, "CertFile", ""), _field(files, "KeyFile", ""), insecure))


class _Target(NamedTuple):
    """A parsed address: where to dial, and the host name for requests."""

    path: str
    host: str
    port: int
    tls: bool
    header: str

    @property
    def words(self) -> str:
        """As Go's errors name it."""
        if self.path:
            return f"unix {self.path}"
        return f"tcp [{self.host}]:{self.port}" if ":" in self.host else f"tcp {self.host}:{self.port}"


def _locate(url: str) -> _Target:
    """Moby ``pkg/plugins/client.go`` (newTransport), whose schemes other than unix and https are all plain HTTP."""
    where = urlsplit(url)
    if not where.scheme:
        raise ValueError("Unknown protocol")
    if where.scheme == "unix":
        path = where.netloc or unquote(where.path)  # unix://run/x.sock is the socket "run" of the working folder
        if not path or len(os.fsencode(path)) > _SOCKET_PATH:
            raise ValueError(f'unix socket path "{path}" is too {"long" if path else "short"}')
        return _Target(path, "", 0, False, _HOST)
    if not where.hostname:
        raise ValueError(f"{url!r} names no host")
    tls = where.scheme == "https"
    return _Target("", where.hostname, where.port or (443 if tls else 80), tls, where.netloc)


# ------------------------------------------------------------------------------------------------------------ calls


@dataclass(frozen=True)
class Patience:
    """How long a request that fails on the way is tried again: after 1, 2, 4, 8 … s (moby ``pkg/plugins/client.go``).

    A pause that would end after `total` seconds is not begun, so that 30 are five tries within 15.
    """

    total: float = 30.0
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


ENGINE = Patience()
"""An engine's."""


class RemotePlugin:
    """A plugin as an engine has it. For any number of threads.

    Args:
        address: where it listens.
        host: what its requests give as ``Host``. Engines before 23 leave it empty for a unix socket.
        timeout: seconds that the plugin may be silent. An engine waits without end for a plugin on this host, and for a
            managed one as long as ``docker plugin enable --timeout`` says, which is 30 s.
        patience: how long it tries.

    Raises:
        DriverError: the address is malformed, or its TLS files cannot be used.
    """

    def __init__(
        self, address: Address, *, host: str | None = None, timeout: float | None = None, patience: Patience = ENGINE
    ) -> None:
        self.name = address.name
        self.implements: tuple[str, ...] | None = None
        """The kinds of driver that it is, once it is activated."""
        try:
            self._place = _locate(address.url)
            self._tls = _context(address.tls or TLS()) if self._place.tls else None
        except (OSError, ValueError) as error:
            raise DriverError(f"legacy plugin: {_words(error)}") from error
        self._host = self._place.header if host is None else host
        self._timeout, self._patience = timeout, patience
        self._idle: list[tuple[socket.socket, float]] = []  # and since when
        self._lock = threading.Lock()  # of the idle connections
        self._activation = threading.Lock()

    def activate(self, kind: str = "") -> tuple[str, ...]:
        """Ask once what it is, and require that it is a `kind` of driver (moby ``pkg/plugins/plugins.go``: Get).

        Returns:
            What it is.

        Raises:
            DriverError: it cannot be asked, or is no such driver.
        """
        with self._activation:
            try:
                if self.implements is None:
                    self.implements = _implemented(self.call("Plugin.Activate"))
                if kind and kind not in self.implements:
                    words = "Plugin does not implement the requested driver"
                    raise RemoteError(f'{words}: plugin="{self.name}", requested implementation="{kind}"')
            except DriverError as error:
                error.args = (f"legacy plugin: {error}",)  # daemon/pkg/plugin/store.go wraps whatever it is
                raise
            return self.implements

    def call(self, method: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """POST, say, ``NetworkDriver.Join`` and decode the answer (moby ``pkg/plugins/client.go``).

        The engine has a flaw that plugins have to live with, and so has this: all tries share one buffer. A try that
        finds no connection leaves it full, but once a try writes, the written part is gone, and the next
        sends the rest: nothing, or of a request that is too large for the kernel's buffers, the end.

        Args:
            method: kind and name.
            content: the request; None is an empty body.

        Raises:
            RemoteError: the plugin says no, or its answer is not understood. This is not tried again.
            Unavailable: it could not be reached, or went away before it answered.
        """
        response, connection = self._deliver(method, io.BytesIO(b"" if content is None else _encode(content)))
        refused = response.status != http.client.OK
        kind = MethodNotSupported if response.status == http.client.NOT_FOUND else RemoteError
        try:
            answer = self._read(response, connection)
            if refused:
                raise kind(f"{method}: {_refusal(answer)}", response.status)
            decoded = _decode(answer)
            field = _ERROR_FIELDS.get(method.partition(".")[0])
            said = _field(decoded, field, "") if field else ""
        except (OSError, EOFError, ValueError, zlib.error, http.client.HTTPException) as error:
            _log.error("%s: error reading plugin resp: %s", method, _words(error))
            raise kind(f"{method}: {_words(error)}" if refused else _words(error), response.status) from error
        if said:
            raise RemoteError(f"remote: {said}")  # daemon/libnetwork/drivers/remote/driver.go, ipams/remote/remote.go
        return decoded

    def dial(self) -> socket.socket:
        """A new connection, for a caller that speaks HTTP itself. Raises `Unavailable` if there is none."""
        try:
            return self._dial()
        except _Failure as failure:
            raise Unavailable(str(failure)) from failure

    def close(self) -> None:
        """End the idle connections; the next call makes another."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.close()

    def __enter__(self) -> RemotePlugin:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _deliver(self, method: str, buffer: io.BytesIO) -> tuple[http.client.HTTPResponse, socket.socket]:
        """Moby's callWithRetry: every failure before there is an answer is tried again."""
        url = f"{'https' if self._tls else 'http'}://{self._place.header}/{method}"
        began, pause = self._patience.now(), 1.0
        while True:
            try:
                return self._round_trip(method, buffer)
            except _Failure as failure:
                if pause + self._patience.now() - began >= self._patience.total:
                    raise Unavailable(f'Post "{url}": {failure}') from failure
                _log.warning("Unable to connect to plugin: %s: %s, retrying in %gs", url, failure, pause)
            self._patience.sleep(pause)
            pause = min(2 * pause, 30.0)

    def _round_trip(self, method: str, buffer: io.BytesIO) -> tuple[http.client.HTTPResponse, socket.socket]:
        """Go's ``http.Transport``: it has a remedy for that flaw, but only for a kept connection that takes nothing."""
        left = buffer.getvalue()[buffer.tell() :]
        while True:
            connection, kept = self._take()
            try:
                self._write(connection, method, buffer, len(left))
                return self._answer(connection), connection
            except BaseException as error:
                connection.close()
                if not (kept and isinstance(error, _NothingWritten)):
                    raise
            buffer = io.BytesIO(left)

    def _write(self, connection: socket.socket, method: str, buffer: io.BytesIO, size: int) -> None:
        lines = [
            f"POST /{method} HTTP/1.1",
            f"Host: {self._host}",
            "User-Agent: Go-http-client/1.1",
            f"Content-Length: {size}",
            f"Accept: {ACCEPT}",
            *([] if self._place.path else ["Accept-Encoding: gzip"]),  # moby's client: not for a unix socket
        ]
        data = "\r\n".join((*lines, "", "")).encode()
        data += buffer.read(max(0, _FIRST_WRITE - len(data)))
        try:
            sent = connection.send(data)
        except OSError as error:
            raise _NothingWritten(str(self._failure("write", error))) from error
        try:
            if data := data[sent:]:  # to write nothing finds out that the plugin has gone, which Go learns by reading
                connection.sendall(data)
            while data := buffer.read(_NEXT_WRITES):
                connection.sendall(data)
        except OSError as error:
            raise self._failure("write", error) from error

    def _answer(self, connection: socket.socket) -> http.client.HTTPResponse:
        """Its head; the body is to be read."""
        response = http.client.HTTPResponse(connection, method="POST")
        response.fp = _Reader(response.fp.detach())
        try:
            response.begin()
        except BaseException as error:
            response.close()
            if isinstance(error, OSError | EOFError | http.client.HTTPException):
                raise self._failure("read", error) from error
            raise
        return response

    def _read(self, response: http.client.HTTPResponse, connection: socket.socket) -> bytes:
        """All of it, of whatever size; net/http limits only the head."""
        usable = False
        try:
            answer = response.read()
            usable = not response.will_close
        finally:
            response.close()
            self._put_back(connection, usable=usable)
        if not self._place.path and response.getheader("Content-Encoding", "").lower() == "gzip":
            answer = gzip.decompress(answer)
        return answer

    def _failure(self, doing: str, error: Exception) -> _Failure:
        if isinstance(error, TimeoutError):
            return _Failure(f"{_words(error)} (Client.Timeout exceeded while awaiting headers)")
        if isinstance(error, EOFError | http.client.HTTPException | ssl.SSLError):
            return _Failure(_words(error))
        where = f"unix @->{self._place.path}" if self._place.path else self._place.words
        return _Failure(f"{doing} {where}: {doing}: {_words(error)}")

    def _take(self) -> tuple[socket.socket, bool]:
        """A connection, and whether it was kept from an earlier call."""
        while True:
            with self._lock:
                if not self._idle:
                    break
                connection, since = self._idle.pop()
            # Data before a request means the end of the connection, or makes no sense.
            if self._patience.now() - since < _IDLE_TIME and not _readable(connection):
                return connection, True
            connection.close()
        return self._dial(), False

    def _put_back(self, connection: socket.socket, *, usable: bool) -> None:
        with self._lock:
            if usable and len(self._idle) < _IDLE_CONNECTIONS:
                self._idle.append((connection, self._patience.now()))
                return
        connection.close()

    def _dial(self) -> socket.socket:
        place = self._place
        try:
            if place.path:
                connection = _connect_unix(place.path)
            else:
                connection = socket.create_connection((place.host, place.port), _DIAL_TIME)
        except OSError as error:
            words = "i/o timeout" if isinstance(error, TimeoutError) else f"connect: {_words(error)}"
            raise _Failure(f"dial {place.words}: {words}") from error
        connection.settimeout(self._timeout)
        if self._tls is None:
            return connection
        try:
            return self._tls.wrap_socket(connection, server_hostname=place.host)
        except OSError as error:
            raise _Failure(_words(error)) from error
        finally:
            connection.close()  # only what TLS did not take over


class _Failure(Exception):
    """There is no answer; a further try may get one."""


class _NothingWritten(_Failure):
    """Nor did the plugin see any of the request."""


class _Reader(io.BufferedReader):
    """Of an answer: http.client would take a head that ends early for a complete one."""

    _lines = 0

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        self._lines += 1
        if not line.endswith(b"\n") and (line or self._lines > 1):  # nothing at all it sees itself
            raise EOFError
        return line


def _implemented(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        kinds = _field(manifest, "Implements", list[Any]())
        return tuple(_field({"kind": kind}, "kind", "") for kind in kinds)
    except ValueError as error:
        raise RemoteError(str(error)) from error


def _connect_unix(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        # With a time to keep it is an error where the listener's backlog is full, as for Go: EAGAIN and not a wait.
        connection.settimeout(_DIAL_TIME)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


def _readable(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


def _context(tls: TLS) -> ssl.SSLContext:
    """Go-connections ``tlsconfig/config.go``: the CA is one more of those that the host trusts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    else:
        context.load_default_certs()
        if tls.ca:
            try:
                context.load_verify_locations(tls.ca)
            except OSError as error:
                raise ValueError(f'could not read CA certificate "{tls.ca}": {_words(error)}') from error
    if tls.certificate or tls.key:
        try:
            context.load_cert_chain(tls.certificate, tls.key, "")  # it would ask on the terminal
        except OSError as error:
            raise ValueError(f"could not load X509 key pair: {tls.certificate}, {tls.key}: {_words(error)}") from error
    return context


# -------------------------------------------------------------------------------------------------- JSON and words


def _encode(content: Mapping[str, Any]) -> bytes:
    """Go's ``json.Encoder``: nothing that HTML could take for its own, and a line feed behind it."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f"{text}\n".encode()


def _no_number(constant: str) -> Any:
    raise ValueError(f"invalid character {constant[0]!r} looking for beginning of value")


_DECODER = json.JSONDecoder(parse_constant=_no_number)  # Python takes NaN and Infinity


def _decode(content: bytes) -> dict[str, Any]:
    """Go's ``json.Decoder``: the first value, and never mind what comes behind it; null is an empty answer."""
    text = content.decode(errors="replace").lstrip(" \t\r\n")
    if not text:
        raise ValueError("EOF")
    try:
        value, _ = _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        if error.pos >= len(text) or error.msg.startswith("Unterminated"):
            raise ValueError("unexpected EOF") from error
        expected = "looking for beginning of value" if error.pos == 0 else f"in JSON: {error}"
        raise ValueError(f"invalid character {text[error.pos]!r} {expected}") from error
    except RecursionError as error:
        raise ValueError("exceeded max depth") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"json: cannot unmarshal {_TYPES[type(value)]} into Go value")
    return value or {}


_TYPES = {str: "string", bool: "bool", int: "number", float: "number", list: "array", dict: "object"}


def _field(content: Mapping[str, Any], name: str, default: _T) -> _T:
    """A field as Go's ``json`` finds it, which minds neither case nor null; its type is the default's."""
    found = default
    for key, value in content.items():
        if key.casefold() == name.casefold() and value is not None:
            if type(value) is not type(default):
                kind, wanted = _TYPES[type(value)], _TYPES[type(default)]
                raise ValueError(f"json: cannot unmarshal {kind} into Go struct field {name} of type {wanted}")
            found = value
    return found


def _refusal(answer: bytes) -> str:
    """The error text of an answer whose status is not 200: the ``Err`` of either kind of driver, else all of it."""
    text = answer.decode(errors="replace")
    try:
        content = json.loads(text, parse_constant=_no_number)
        return (_field(content, "Err", "") if isinstance(content, dict) else "") or text
    except (ValueError, RecursionError):
        return text


def _words(error: Exception) -> str:
    """Why, as Go says it where users meet it."""
    if isinstance(error, http.client.RemoteDisconnected):
        return "EOF"
    if isinstance(error, http.client.IncompleteRead | EOFError):
        return "unexpected EOF"
    if isinstance(error, http.client.HTTPException):
        return f"net/http: HTTP/1.x transport connection broken: malformed HTTP response {error}"
    if isinstance(error, TimeoutError):
        return "context deadline exceeded"
    if isinstance(error, OSError) and error.errno and not isinstance(error, ssl.SSLError | socket.gaierror):
        return os.strerror(error.errno).lower()
    return str(error)
