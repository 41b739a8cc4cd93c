"""The relay of published ports: a program of its own, which `ports` runs.

    python -I -S relay.py FD [NAME=NUMBER …]

It carries the traffic that the kernel's DNAT does not: clients on 127.0.0.1 and ::1, IPv6 clients of a container that
has only IPv4, a container that calls itself through the host's address, and all clients when the rules are gone.

FD is a SOCK_SEQPACKET socket to the plugin. A message with descriptors adds published sockets, one line for each,
``KEY ADDRESS PORT``: traffic that arrives there goes to that address. A message without descriptors removes ports, one
line for each, ``KEY``; the answer comes when they are closed and their connections cut. At the end of file the relay
exits, so it never outlives its plugin, in whatever way that ended. NAME is a parameter of `Relay`, such as ``idle=30``.

One thread and one epoll. Only the standard library, and little of it: no asyncio, no typing (10 MB instead of 20).
"""

from __future__ import annotations

import errno
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable

_LIMIT = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 16)  # of descriptors
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_MAX_FDS = 253  # linux/net/scm.h, SCM_MAX_FD
_IP_PKTINFO = 8  # linux/in.h; struct in_pktinfo: index, our address, the packet's destination
_RESET = struct.pack("ii", 1, 0)  # struct linger: close() sends RST
_BUFFER = memoryview(bytearray(1 << 16))


class Relay:
    """The loop, and everything that is open.

    Parameters:
        control: the socket to the plugin.
        idle: seconds after which a UDP client is forgotten, as docker-proxy does.
        sweep: seconds between looks for idle UDP clients.
        pause: seconds without accepting, when there is no room.
        connections: how many there may be. Two descriptors each; the others are for the published sockets.
        clients: how many UDP clients there may be, with a descriptor each.
    """

    def __init__(
        self,
        control: socket.socket,
        *,
        idle: float = 90.0,
        sweep: float = 10.0,
        pause: float = 0.1,
        connections: float = _LIMIT // 4,
        clients: float = _LIMIT // 16,
    ) -> None:
        self.max_connections, self.max_clients = connections, clients
        self._idle, self._sweep, self._pause = idle, sweep, pause
        self.published: dict[str, Listener | Datagrams] = {}
        self.connections: set[Stream] = set()
        """The clients' sides."""
        self.clients: dict[object, Client] = {}
        """Those of UDP, the longest idle one first."""
        self._control = control
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._paused: set[Listener] = set()
        self._resume = 0.0
        self.watch(control, self._read_command)

    def run(self) -> None:
        """Relay until the plugin ends."""
        while True:
            for fd, events in self._epoll.poll(self._pause if self._paused else self._sweep if self.clients else None):
                # None: an earlier event has closed this socket. A new socket may also get the event of a closed one; as
                # nothing here blocks, that does no harm.
                if (handler := self._handlers.get(fd)) is not None:
                    handler(events)
            now = time.monotonic()
            while self.clients and now - (oldest := next(iter(self.clients.values()))).used > self._idle:
                oldest.close()
            if self._paused and now > self._resume:
                for listener in self._paused:
                    self.set_events(listener.socket, select.EPOLLIN)
                self._paused.clear()

    def watch(self, sock: socket.socket, handler: Callable[[int], None]) -> None:
        """Call `handler` with the events when there is something to read; `set_events` changes that."""
        self._handlers[sock.fileno()] = handler
        self._epoll.register(sock, select.EPOLLIN)

    def set_events(self, sock: socket.socket, events: int) -> None:
        """Call the socket's handler for these events from now on."""
        self._epoll.modify(sock, events)

    def close(self, sock: socket.socket) -> None:
        """Close a socket; its handler is not called any more."""
        # epoll drops a socket by itself only when no process has it open, and the plugin has the published sockets.
        self._epoll.unregister(sock)
        del self._handlers[sock.fileno()]
        sock.close()

    def pause(self, listener: Listener) -> None:
        """Its clients wait in the kernel's queue until others have gone."""
        self.set_events(listener.socket, 0)
        self._paused.add(listener)
        self._resume = time.monotonic() + self._pause

    def _read_command(self, _: int) -> None:
        message, fds, flags, _ = socket.recv_fds(self._control, 1 << 16, _MAX_FDS)
        if not message:
            sys.exit()
        if flags & socket.MSG_CTRUNC:
            sys.exit("not enough descriptors for the published ports")  # a new relay, without connections, has them
        lines = message.decode().splitlines()
        for fd, line in zip(fds, lines, strict=False):
            sock = socket.socket(fileno=fd)
            key, address, port = line.split()
            kind = Datagrams if sock.type == socket.SOCK_DGRAM else Listener
            self.published[key] = kind(self, sock, (address, int(port)))
        if not fds:
            self._withdraw(lines)
            self._control.send(b"closed")

    def _withdraw(self, keys: list[str]) -> None:
        gone = {self.published.pop(key) for key in keys if key in self.published}
        flows: list[Stream | Client] = [*self.connections, *self.clients.values()]
        for flow in flows:
            if flow.origin in gone:
                flow.close()
        self._paused.difference_update(gone)
        for each in gone:
            self.close(each.socket)


class Listener:
    """A published port of TCP or SCTP."""

    def __init__(self, relay: Relay, sock: socket.socket, target: tuple[str, int]) -> None:
        self.relay, self.socket, self.target = relay, sock, target
        relay.watch(sock, self._accept)

    def _accept(self, _: int) -> None:
        if len(self.relay.connections) >= self.relay.max_connections:
            return self.relay.pause(self)
        server = None
        try:
            server = socket.socket(_family(self.target), socket.SOCK_STREAM, self.socket.proto)
            client, _ = self.socket.accept()
        except OSError as error:  # mostly: the client is not there any more
            if server is not None:
                server.close()
            if error.errno in _NO_ROOM:
                self.relay.pause(self)
            return None
        server.connect_ex(self.target)  # how it went is seen when we send
        one, other = Stream(self, client), Stream(self, server)
        one.peer, other.peer = other, one
        other.unsent = _BUFFER[:0]  # so the client is not read before the server is connected
        self.relay.connections.add(one)
        one.update()
        other.update()
        return None


class Stream:
    """One of the two sockets of a connection; data that is read here is sent to the `peer`."""

    __slots__ = ("_ended", "_events", "origin", "peer", "relay", "socket", "unsent")
    peer: Stream

    def __init__(self, origin: Listener, sock: socket.socket) -> None:
        self.origin, self.relay, self.socket = origin, origin.relay, sock
        self.unsent: memoryview | None = None
        """Data that the kernel has not taken yet; until it has, the peer is not read."""
        self._ended = False  # the other side sends no more
        self._events = select.EPOLLIN
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sock.proto == socket.IPPROTO_TCP:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.relay.watch(sock, self._ready)

    def update(self) -> None:
        """Wait for the events that this stream can handle now."""
        events = 0 if self._ended or self.peer.unsent is not None else select.EPOLLIN
        if self.unsent is not None:
            events |= select.EPOLLOUT
        if events != self._events:
            self._events = events
            # epoll always reports errors and hang-ups; edge-triggered, or it would report them again and again.
            self.relay.set_events(self.socket, events or select.EPOLLET)

    def _ready(self, events: int) -> None:
        try:
            if self.unsent is not None and events & ~select.EPOLLIN:
                self._send(self.unsent)
            if not self._ended and self.peer.unsent is None and events & ~select.EPOLLOUT:
                self._receive()
            elif self._ended and events & select.EPOLLERR:
                return self._close(reset=True)
        except BlockingIOError:
            pass
        except OSError:  # a connection that was reset or refused is reset on both sides
            return self._close(reset=True)
        if self._ended and self.peer._ended:  # and everything is sent, or they would not have been read to the end
            return self._close(reset=False)
        self.update()
        return self.peer.update()

    def _receive(self) -> None:
        size = self.socket.recv_into(_BUFFER)
        if size:
            self.peer._send(_BUFFER[:size])
        else:
            self._ended = True
            self.peer.socket.shutdown(socket.SHUT_WR)

    def _send(self, data: memoryview) -> None:
        try:
            data = data[self.socket.send(data) :]
        except BlockingIOError:
            self.unsent = memoryview(bytes(data))
        else:
            self.unsent = memoryview(bytes(data)) if data else None

    def close(self) -> None:
        """Cut the connection. If the container has finished sending, its data still reach the client."""
        self._close(reset=not self.peer._ended)

    def _close(self, *, reset: bool) -> None:
        for each in (self, self.peer):
            if reset:
                each.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.relay.close(each.socket)
            self.relay.connections.discard(each)
            del each.peer


class Datagrams:
    """A published port of UDP."""

    def __init__(self, relay: Relay, sock: socket.socket, target: tuple[str, int]) -> None:
        self.relay, self.socket, self.target = relay, sock, target
        relay.watch(sock, self._forward)

    def _forward(self, _: int) -> None:
        clients = self.relay.clients
        try:
            size, [(level, kind, info)], _, address = self.socket.recvmsg_into([_BUFFER], 64)
            # The answers' source, as a pktinfo: the address that the client knows, by whatever interface.
            if level == socket.IPPROTO_IP:
                source = bytes(4) + info[4:8] + bytes(4)
            else:
                source = (bytes(16) if info[0] == 0xFF else info[:16]) + bytes(4)  # multicast is no source
            key = (self, address, source)
            client = clients.pop(key, None)
            if client is None:
                if len(clients) >= self.relay.max_clients:
                    next(iter(clients.values())).close()
                client = Client(self, key, address, (level, kind, source))
            clients[key] = client
            client.send(_BUFFER[:size])
        except OSError:  # no data, no room, or no route to the container now: a datagram may get lost
            return


class Client:
    """A UDP client, to which the container's answers are sent."""

    __slots__ = ("_address", "_key", "_socket", "_source", "origin", "used")

    def __init__(
        self, origin: Datagrams, key: object, address: tuple[object, ...], source: tuple[int, int, bytes]
    ) -> None:
        self.origin, self._key, self._address, self._source = origin, key, address, source
        self._socket = socket.socket(_family(origin.target), socket.SOCK_DGRAM)
        self._socket.connect(origin.target)
        origin.relay.watch(self._socket, self._answer)

    def send(self, data: memoryview) -> None:
        """Send data to the container. Raises OSError if that fails."""
        self.used = time.monotonic()
        try:
            self._socket.send(data)
        except ConnectionRefusedError:  # the ICMP answer to an earlier one; this one has not been sent
            self._socket.send(data)

    def _answer(self, _: int) -> None:
        try:
            size = self._socket.recv_into(_BUFFER)
            clients = self.origin.relay.clients
            clients[self._key] = clients.pop(self._key)
            self.used = time.monotonic()
            self.origin.socket.sendmsg([_BUFFER[:size]], [self._source], 0, self._address)
        except OSError:  # the ICMP answer, or none
            return

    def close(self) -> None:
        """Forget the client."""
        del self.origin.relay.clients[self._key]
        self.origin.relay.close(self._socket)


def _family(target: tuple[str, int]) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in target[0] else socket.AF_INET


def main() -> None:
    """Serve the plugin at the other end of the descriptor that is the program's first argument."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # meant for the plugin, which finishes its calls, then ends us
        signal.signal(number, signal.SIG_IGN)
    settings = {name: float(value) for name, _, value in (text.partition("=") for text in sys.argv[2:])}
    socket.setdefaulttimeout(0)  # no socket blocks
    try:
        Relay(socket.socket(fileno=int(sys.argv[1])), **settings).run()
    except (BrokenPipeError, ConnectionResetError):  # of the control socket: the plugin did not wait for an answer
        sys.exit()


if __name__ == "__main__":
    main()
