"""Sockets that engines find: unix, TCP with TLS, discovery files, and which processes may call."""

from __future__ import annotations

import fcntl
import grp
import ipaddress
import os
import pwd
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from netplugin_sdk.errors import Conflict, Unavailable

if TYPE_CHECKING:
    import ssl

PLUGIN_FOLDER = Path("/run/docker/plugins")
"""Where Docker looks for plugin sockets first."""

SPEC_FOLDER = Path("/etc/docker/plugins")
"""Where Docker looks for ``NAME.spec`` and ``NAME.json``."""

BACKLOG = 4096
"""Connections that may wait; the kernel caps it at net.core.somaxconn. A full one costs the engine a second."""

_CREDENTIALS = struct.Struct("iII")  # struct ucred
_SO_PEERGROUPS = 59  # asm-generic/socket.h


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


@contextmanager
def unix_socket(
    path: Path, *, mode: int = 0o600, owner: int | str | None = None, group: int | str | None = None
) -> Iterator[socket.socket]:
    """A unix socket that listens, to be handed on; afterwards it and its file are gone.

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
                listener.listen(BACKLOG)
        except (OSError, KeyError) as error:
            raise Unavailable(f"cannot listen on {path}: {error}") from error
        yield listener


@contextmanager
def tcp_socket(
    host: str, port: int, *, name: str, tls: TLSFiles | None = None, plain: bool = False, folder: Path = SPEC_FOLDER
) -> Iterator[socket.socket]:
    """A TCP socket that listens, to be handed on; afterwards it and the discovery file are gone.

    Arguments and errors are those of `Server.listen_tcp`; `tls` is for the discovery file only.
    """
    if tls is None and not plain:
        refuse_beyond_loopback(host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
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


class AllowedPeers(msgspec.Struct, frozen=True):
    """The processes that may call at a unix socket.

    They are those of root, of this process's user and of the socket's owner, and of its group if that may write. Looked
    at for each connection (SO_PEERCRED, unix(7)), since a mode can be wider than it was meant, or changed.
    """

    users: frozenset[int]
    groups: frozenset[int]

    @classmethod
    def of(cls, listener: socket.socket) -> AllowedPeers:
        """Those of a socket that listens."""
        users, groups = {0, os.geteuid()}, set()
        name = listener.getsockname()
        if isinstance(name, str) and name:  # neither abstract nor without a name
            with suppress(OSError):
                made = Path(name).stat()
                users.add(made.st_uid)
                if made.st_mode & stat.S_IWGRP:
                    groups.add(made.st_gid)
        return cls(frozenset(users), frozenset(groups))

    def reject_reason(self, client: socket.socket) -> str | None:
        """Which process it is, in words, if it may not call."""
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


def refuse_beyond_loopback(host: str) -> None:
    """Raise `Unavailable` unless `host` is a loopback address, or its name."""
    if not _is_loopback(host):
        raise Unavailable(f"refusing to serve plain TCP on {host}: give TLS files, or insist on plain TCP")


def tls_context(files: TLSFiles) -> ssl.SSLContext:
    """For clients with a certificate of `files.client_ca`. Raises OSError: a file cannot be read or used."""
    import ssl  # noqa: PLC0415  # 10 ms that only TLS needs

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(files.certificate, files.key)
    context.load_verify_locations(files.client_ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF  # a client that leaves without close_notify is no error
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
