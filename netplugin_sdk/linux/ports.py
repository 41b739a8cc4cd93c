"""Published ports, ``docker run -p``: host ports that are really taken, and a relay for traffic without DNAT.

A published port is a socket that is bound here and, for TCP, listens: so the kernel finds conflicts with any process
and any other driver, and nobody can take the port later. Nearly all traffic never reaches the socket, since the
firewall's DNAT sends it to the container. The rest is carried by the relay, a small process of its own (see `relay`)
that has copies of all sockets. It starts with the first port. If it dies, a new one gets the same sockets; until then
clients wait in the kernel's queues. When the plugin ends, in whatever way, the relay ends too.

All functions may be called from any number of threads, and again. They work in the network namespace of the caller;
the relay in that of the first, until `close`.
"""

from __future__ import annotations

import atexit
import errno
import itertools
import logging
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Protocol

from netplugin_sdk.errors import Conflict, DriverError, Unavailable
from netplugin_sdk.values import IPAddress, IPInterface, TransportProtocol

_log = logging.getLogger("netplugin_sdk")

_ANY: dict[int, IPAddress] = {4: IPv4Address("0.0.0.0"), 6: IPv6Address("::")}
_RELAY = str(Path(__file__).with_name("relay.py"))
_BACKLOG = 4096  # connections that wait to be accepted
_TRIES = 32  # for a port that is free on all addresses, of those that the kernel proposes
_BATCH = 250  # sockets in a message; the kernel takes 253 (linux/net/scm.h, SCM_MAX_FD)
_KINDS = {
    TransportProtocol.TCP: socket.SOCK_STREAM,
    TransportProtocol.UDP: socket.SOCK_DGRAM,
    TransportProtocol.SCTP: socket.SOCK_STREAM,
}
_PKTINFO = {4: (socket.IPPROTO_IP, 8), 6: (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO)}  # 8: linux/in.h, IP_PKTINFO


class PortInUse(Conflict):
    """A requested host port is taken. The text is Docker's own."""


class PortError(DriverError):
    """The kernel refused a host port for another reason. The text has address, port and reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A port of a container that is reached through a port of the host. Can be attached to a network or an endpoint."""

    protocol: TransportProtocol
    host_address: IPAddress
    """``0.0.0.0`` or ``::`` is every address of that version."""
    host_port: int
    address: IPAddress
    """The container's; of another version than `host_address` only the relay can reach it."""
    port: int
    """The container's."""

    def __str__(self) -> str:
        """As in ``0.0.0.0:8080->172.18.0.2:80/tcp``."""
        host, container = _join(self.host_address, self.host_port), _join(self.address, self.port)
        return f"{host}->{container}/{self.protocol}"


class Request(Protocol):
    """One ``-p``, such as a `PortMapping`; `publish` explains the numbers and None."""

    @property
    def protocol(self) -> TransportProtocol: ...  # noqa: D102
    @property
    def container_port(self) -> int: ...  # noqa: D102
    @property
    def host_address(self) -> IPAddress | None: ...  # noqa: D102
    @property
    def host_port(self) -> int: ...  # noqa: D102
    @property
    def host_port_end(self) -> int: ...  # noqa: D102


@dataclass(slots=True)
class Settings:
    """Timings of the relay, as the plugin sees it."""

    relay_timeout: float = 5.0
    """Seconds for the relay to answer or to end; then it is killed. It takes below a millisecond, its start 30."""
    restart_interval: float = 1.0
    """Seconds from the start of a relay to that of the next one, at least."""
    relay: Mapping[str, float] = field(default_factory=dict)
    """Parameters of the relay, each with a default there.

    In seconds: ``idle``, after which a UDP client is forgotten (90); ``sweep`` between looks for such clients (10);
    ``pause`` without accepting where there is no room (0.1). At most so many: TCP and SCTP ``connections`` and UDP
    ``clients`` (a quarter and a sixteenth of the limit of descriptors).
    """


def publish(
    owner: str,
    requests: Iterable[Request],
    *,
    addresses: Iterable[IPAddress | IPInterface],
    default_host: IPAddress | None = None,
    six_to_four: bool = True,
    keep: Iterable[Published] = (),
) -> tuple[Published, ...]:
    """Take the host ports of these requests, and no others, for `owner`: the container with these `addresses`.

    In a request, `host_port` 0 means a free port that the kernel picks, and a `host_port_end` above `host_port` means
    the first free one of the range. A request without `host_address` gets `default_host`; if that is None or
    ``0.0.0.0``, every address of the host, IPv4 and (where the host has it) IPv6, with the same port number. Requests
    that differ only in the host's address get the same number too. A host's IPv6 address leads to the container's IPv6
    address, or else, with `six_to_four`, to its IPv4 address; where the container has no fitting address nothing is
    published.

    Ports that the owner has already stay untouched where they fit. After a restart, pass the former result of `publish`
    as `keep`: those host ports are preferred. Where the kernel has no SCTP sockets, such a port is only remembered
    here.

    Either everything is done, or an error is raised and nothing has changed: `PortInUse`; `PortError`; `Unavailable` if
    the relay cannot be started.
    """
    by_version: dict[int, IPAddress] = {}
    for address in addresses:
        by_version.setdefault(address.version, getattr(address, "ip", address))
    if six_to_four and 4 in by_version:
        by_version.setdefault(6, by_version[4])
    return _ports.publish(owner, _wishes(requests, by_version, default_host), tuple(keep))


def release(owner: str) -> None:
    """Free all ports of `owner`; when this returns, others can bind them. Its relayed connections are cut."""
    _ports.release(owner)


def close() -> None:
    """Free all ports, end the relay and wait for its end. Called automatically when the interpreter exits."""
    _ports.close()


@dataclass(frozen=True, slots=True)
class _Wish:
    """Requests that differ only in the host's address."""

    protocol: TransportProtocol
    port: int
    first: int
    last: int
    targets: dict[IPAddress, IPAddress]
    """Host's address → container's."""

    def candidates(self, preferred: Iterable[Published]) -> Iterator[int]:
        """Host ports in the order in which to try them."""
        for old in preferred:
            fits = old.host_port in range(self.first, self.last + 1) or not self.first
            if fits and (old.protocol, old.port) == (self.protocol, self.port) and old.host_address in self.targets:
                yield old.host_port
        if self.first:
            yield from range(self.first, self.last + 1)
        else:
            host, protocol = next(iter(self.targets)), self.protocol if _has(self.protocol) else TransportProtocol.TCP
            for _ in range(_TRIES):
                with _open(protocol, host, 0) as probe:
                    port = probe.getsockname()[1]
                yield port

    def at(self, host_port: int) -> list[Published]:
        """The published ports that it becomes with this port of the host."""
        return [
            Published(protocol=self.protocol, host_address=host, host_port=host_port, address=address, port=self.port)
            for host, address in self.targets.items()
        ]


def _wishes(
    requests: Iterable[Request], by_version: dict[int, IPAddress], default_host: IPAddress | None
) -> list[_Wish]:
    default_hosts = [_ANY[4], _ANY[6]] if default_host in (None, _ANY[4]) and _has_ipv6() else [default_host or _ANY[4]]
    wishes: dict[tuple[TransportProtocol, int, int, int], _Wish] = {}
    for request in requests:
        first = request.host_port
        key = (request.protocol, request.container_port, first, max(first, request.host_port_end) if first else 0)
        for host in default_hosts if request.host_address is None else [request.host_address]:
            if host.version in by_version:
                wishes.setdefault(key, _Wish(*key, {})).targets[host] = by_version[host.version]
    # Those with the least choice come first.
    return sorted(wishes.values(), key=lambda wish: (not wish.first, wish.last - wish.first))


@dataclass(eq=False, slots=True)
class _Binding:
    published: Published
    key: int
    """The relay's name for it."""
    socket: socket.socket | None = None
    """None for SCTP on a kernel without it."""

    @property
    def place(self) -> tuple[TransportProtocol, int, int]:
        """Bindings with the same place may collide, since one of them may be for all addresses."""
        return self.published.protocol, self.published.host_address.version, self.published.host_port


class _Ports:
    """Which owner has which ports of the host."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._owners: dict[str, list[_Binding]] = {}
        self._taken: dict[tuple[TransportProtocol, int, int], set[_Binding]] = {}
        self._keys = itertools.count()
        self._relay: _Relay | None = None

    def publish(self, owner: str, wishes: Iterable[_Wish], keep: Iterable[Published]) -> tuple[Published, ...]:
        with self._lock, ExitStack() as undo:
            if self._relay is None:  # a range needs many descriptors, here and in the relay, which inherits the limit
                hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            before = self._owners.get(owner, [])
            preferred = (*(binding.published for binding in before), *keep)
            known, spare = set(before), set(before)
            after: list[_Binding] = []
            for wish in wishes:
                after += self._take(wish, preferred, spare, undo)
            self._have_relayed([binding for binding in after if binding not in known])
            undo.pop_all()
            self._owners[owner] = after
            self._drop(spare)
            return tuple(binding.published for binding in after)

    def release(self, owner: str) -> None:
        with self._lock:
            self._drop(self._owners.pop(owner, ()))

    def close(self) -> None:
        with self._lock:
            relay, self._relay = self._relay, None
            while self._owners:
                self._drop(self._owners.popitem()[1])
        if relay is not None:
            relay.close()  # without the lock, for which its watcher may be waiting

    def _take(
        self, wish: _Wish, preferred: Iterable[Published], spare: set[_Binding], undo: ExitStack
    ) -> list[_Binding]:
        """Take one host port on all its addresses. `spare` are the owner's bindings that no wish has used again."""
        refusal = PortInUse(
            f"Bind for {next(iter(wish.targets))}:{wish.first}-{wish.last} failed: all ports are allocated"
        )
        for port in wish.candidates(preferred):
            with ExitStack() as attempt:
                try:
                    bindings = [self._bind(wanted, spare, attempt) for wanted in wish.at(port)]
                except PortInUse as error:
                    if wish.first == wish.last:
                        refusal = error
                else:
                    undo.enter_context(attempt.pop_all())
                    return bindings
        raise refusal

    def _bind(self, wanted: Published, spare: set[_Binding], undo: ExitStack) -> _Binding:
        binding = _Binding(wanted, next(self._keys))
        every = _ANY[wanted.host_address.version]
        for other in list(self._taken.get(binding.place, ())):
            host = other.published.host_address
            if host != wanted.host_address and every not in (host, wanted.host_address):
                continue
            if other not in spare:
                raise PortInUse(f"Bind for {host}:{wanted.host_port} failed: port is already allocated")
            if other.published == wanted:
                spare.remove(other)
                undo.callback(spare.add, other)
                return other
            self._drop([other])  # the owner's own, and in the way
            undo.callback(self._restore, other)
        self._open(binding)
        undo.callback(self._forget, binding)
        return binding

    def _open(self, binding: _Binding) -> None:
        published = binding.published
        if _has(published.protocol):
            binding.socket = _open(published.protocol, published.host_address, published.host_port)
        self._taken.setdefault(binding.place, set()).add(binding)

    def _restore(self, binding: _Binding) -> None:
        """Undo `_drop`."""
        try:
            self._open(binding)
            self._have_relayed([binding])
        except DriverError:
            _log.exception("published port %s is lost", binding.published)

    def _forget(self, binding: _Binding) -> None:
        if (there := self._taken.get(binding.place)) is not None:
            there.discard(binding)
            if not there:
                del self._taken[binding.place]
        if binding.socket is not None:
            binding.socket.close()

    def _drop(self, bindings: Collection[_Binding]) -> None:
        for binding in bindings:
            self._forget(binding)
        if self._relay is not None:
            self._relay.remove([binding.key for binding in bindings])

    def _have_relayed(self, bindings: Collection[_Binding]) -> None:
        if self._relay is not None:
            self._relay.add(bindings)
        elif bindings:
            self._start_relay()

    def _start_relay(self) -> None:
        self._relay = _Relay(self._relay_ended, self._settings)
        self._relay.add([binding for there in self._taken.values() for binding in there])

    def _relay_ended(self, relay: _Relay, status: int) -> None:
        with self._lock:
            if self._relay is not relay:
                return
            self._relay = None
            _log.warning("the relay of published ports has ended with status %d: starting another", status)
            try:
                self._start_relay()
            except Unavailable:
                _log.exception("published ports are not relayed until the next one is published")


class _Relay:
    """The relay's process, seen from the plugin."""

    def __init__(self, ended: Callable[[_Relay, int], None], settings: Settings) -> None:
        self._timeout, self._restart_interval = settings.relay_timeout, settings.restart_interval
        arguments = [f"{name}={value}" for name, value in settings.relay.items()]
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(self._timeout)
        self._closed, self._gone = threading.Event(), threading.Event()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", _RELAY, str(theirs.fileno()), *arguments],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
            except OSError as error:
                self._socket.close()
                raise Unavailable(f"cannot start the relay of published ports: {error}") from error
        self._watcher = threading.Thread(target=self._watch, args=(ended,), name="relay", daemon=True)
        self._watcher.start()

    def _watch(self, ended: Callable[[_Relay, int], None]) -> None:
        next_start = time.monotonic() + self._restart_interval
        status = self._process.wait()
        self._gone.set()
        if not self._closed.wait(max(0.0, next_start - time.monotonic())):
            ended(self, status)
            self._socket.close()  # no other thread uses it any more

    def add(self, bindings: Iterable[_Binding]) -> None:
        """Have them relayed. The process need not be up yet; if it has died, the next one gets them."""
        lines = [
            (f"{binding.key} {binding.published.address} {binding.published.port}", binding.socket.fileno())
            for binding in bindings
            if binding.socket is not None
        ]
        try:
            for start in range(0, len(lines), _BATCH):
                texts, fds = zip(*lines[start : start + _BATCH], strict=True)
                socket.send_fds(self._socket, ["\n".join(texts).encode()], fds)
        except OSError:
            self._end()

    def remove(self, keys: Sequence[int]) -> None:
        """Have them closed. When this returns they are closed, if need be because the process was killed."""
        try:
            for start in range(0, len(keys), _BATCH):
                self._socket.send("\n".join(map(str, keys[start : start + _BATCH])).encode())
                if not self._socket.recv(16):
                    return self._end()
        except OSError:
            self._end()
        return None

    def close(self) -> None:
        """End the process for good."""
        self._closed.set()
        self._end()
        self._watcher.join()

    def _end(self) -> None:
        self._socket.close()  # the process then exits
        if not self._gone.wait(self._timeout):
            self._process.kill()
            self._gone.wait()


def _open(protocol: TransportProtocol, host: IPAddress, port: int) -> socket.socket:
    """A socket bound to this port of the host; 0 for any."""
    family = socket.AF_INET if host.version == 4 else socket.AF_INET6
    with ExitStack() as undo:
        try:
            sock = socket.socket(family, _KINDS[protocol], protocol)
            undo.enter_context(sock)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if protocol is TransportProtocol.TCP:
                # Earlier connections that are in TIME_WAIT are no conflict.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if protocol is TransportProtocol.UDP:
                # Before the first datagram: the relay needs the address that it was sent to.
                sock.setsockopt(*_PKTINFO[host.version], 1)
            sock.bind((str(host), port))
            if protocol is not TransportProtocol.UDP:
                sock.listen(_BACKLOG)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            text = f"listen {protocol}{host.version} {_join(host, port)}: bind: {reason[:1].lower()}{reason[1:]}"
            raise (PortInUse if error.errno == errno.EADDRINUSE else PortError)(text) from error
        undo.pop_all()
    return sock


def _has(protocol: TransportProtocol) -> bool:
    """Whether the kernel has sockets of this protocol: SCTP is often missing."""
    try:
        socket.socket(socket.AF_INET, _KINDS[protocol], protocol).close()
    except OSError as error:
        return error.errno != errno.EPROTONOSUPPORT
    return True


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))  # "::" could be bound even where net.ipv6.conf.all.disable_ipv6 is set
    except OSError:
        return False
    return True


def _join(address: IPAddress, port: int) -> str:
    return f"{address}:{port}" if address.version == 4 else f"[{address}]:{port}"


settings = Settings()
"""Those of this process, for the relays that are started from now on."""

_ports = _Ports(settings)
atexit.register(close)
