"""The forwarder in front of a plugin's socket: a program of its own, which `tap` runs as ``python -P forwarder.py``.

Its arguments are the path of the plugin's socket, the descriptor that holds its `Place`, and that of a pipe for what
it sees. It ends when its standard input does, so also when its parent is killed: it gives the socket back, answers what
was asked, and exits. So no call is cut and no client ever meets a closed socket.

    engine ── PATH: our socket ── forwarder ── FOLDER/plugin: the plugin's socket ── plugin

Bytes go on as they came; closed is closed and half closed half closed. One thread and one epoll. HTTP is parsed beside
it, only to know which connections have a call under way. It writes everything that it sees to the pipe behind it, as
records of a `HEADER` and bytes; a reader that falls too far behind ends the trace, never a call.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import httptools

HEADER = struct.Struct("<cIQI")
"""Of a record: kind, number of the connection, monotonic ns, length of what follows. Kinds:

``>`` bytes from the engine, ``<`` from the plugin; ``x`` the connection is over, and which side ended it; ``f`` we are
in front of a plugin from now on, its pid; ``n`` a note, which is text; ``!`` why we cannot begin.
"""

REQUEST, ANSWER, CLOSED, IN_FRONT, NOTE, FAILED = b">", b"<", b"x", b"f", b"n", b"!"

_BACKLOG = 4096
_CHUNK = 64 * 1024
_CREDENTIALS = struct.Struct("iII")  # struct ucred
_SO_PEERGROUPS = 59  # asm-generic/socket.h
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LOOK_EVERY = 0.2  # seconds between the looks whether the path still leads to us
_RETRY = 0.01  # seconds between two tries to reach a plugin that is not there
_PLUGIN_TIMEOUT = 15.0  # seconds that a call waits for the plugin's return; an engine tries as long
_FIRST_WORDS = 1.0  # seconds that a new connection has for its first request, whatever ends
_GRACE = 0.1  # seconds of accepting after the path leads elsewhere: a client that has looked it up connects a bit later
_DELAY_NS = 10_000_000  # that a record may wait for others
_BATCH = 32 * 1024
_BEHIND = 64 << 20  # bytes that the reader may be behind
_TRACED = ".traced"  # ends the names of folders
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2

_IN, _OUT, _HUP = select.EPOLLIN | select.EPOLLRDHUP, select.EPOLLOUT, select.EPOLLHUP | select.EPOLLERR


# --------------------------------------------------------------------------------------------------- names of sockets


def _exchange(one: Path, other: Path) -> None:
    """Let two files swap their names at once (renameat2(2), RENAME_EXCHANGE)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(one), None, str(other))


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samestat(one.lstat(), other.lstat())
    except FileNotFoundError:
        return False


class Place:
    """A plugin's socket, and the folder beside it where it is while its path leads to us.

    Docker's scan passes over the folder, which has no socket of its own name in it. Its files say what there is to
    restore, whichever process was killed: `ours` is a second name of our socket, `plugin` is the one that we stand in
    front of.
    """

    def __init__(self, path: Path, held: int = -1) -> None:
        self.path = path
        self.held = held
        """The descriptor by which the folder is held; -1 if it is not."""
        self.folder = path.with_name(f".{path.name}{_TRACED}")
        self.ours = self.folder / path.name
        self.plugin = self.folder / "plugin"

    @classmethod
    def of(cls, folder: Path) -> Place | None:
        """The place whose folder this is, by its name; None if it is none's."""
        if not (folder.name.startswith(".") and folder.name.endswith(_TRACED)):
            return None
        return cls(folder.with_name(folder.name[1:].removesuffix(_TRACED)))

    def hold(self) -> bool:
        """Make the folder and hold it; False if somebody else does."""
        while True:
            self.folder.mkdir(0o711, exist_ok=True)  # any user may connect to the plugin, as before
            with suppress(FileNotFoundError):
                fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(fd)
                    return False
                self.release()
                self.held = fd
                if self._is_there():
                    return True  # else its holder removed it

    def _is_there(self) -> bool:
        """Whether the folder that is held is still the one of this name."""
        try:
            return self.held >= 0 and os.path.samestat(os.fstat(self.held), self.folder.lstat())
        except FileNotFoundError:
            return False

    def take(self) -> socket.socket:
        """Let the path lead to a new socket, which listens and has owner and mode of the plugin's.

        It works in the folder, since a socket's name must be short. Docker removes it with that of a plugin it stops.
        """
        if not self._is_there() and not self.hold():
            raise ConnectionError("somebody else is in front")
        os.fchdir(self.held)
        found = self.path.lstat()
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.setblocking(False)
            listener.bind(self.ours.name)
            os.chown(self.ours, found.st_uid, found.st_gid)
            self.ours.chmod(stat.S_IMODE(found.st_mode))
            listener.listen(_BACKLOG)
            self.plugin.hardlink_to(self.ours)
            _exchange(self.plugin, self.path)
        except BaseException:
            listener.close()
            self.give_back()
            raise
        return listener

    @property
    def taken(self) -> bool:
        """Whether the path leads to us."""
        return _is_same(self.path, self.ours)

    def give_back(self) -> bool:
        """Let the path lead to the plugin's socket again, unless there is another one; return whether it led to us."""
        if not self._is_there():
            return False
        taken = self.taken
        if taken:
            _exchange(self.plugin, self.path)
            if not _is_same(self.plugin, self.ours):  # somebody was faster
                _exchange(self.plugin, self.path)
        self.plugin.unlink(missing_ok=True)
        self.ours.unlink(missing_ok=True)
        return taken

    def release(self) -> None:
        """Hold the folder no more, and remove it if it is empty."""
        if self._is_there():
            with suppress(OSError):
                self.folder.rmdir()
        if self.held >= 0:
            os.close(self.held)
        self.held = -1


# -------------------------------------------------------------------------------------------------------- connections


class _Identity:
    """The user that has connected: a context manager in which we are the same, since plugins check it (SO_PEERCRED)."""

    def __init__(self, user: int, group: int, groups: list[int]) -> None:
        self._user, self._group, self._groups = user, group, groups
        self._own = os.getgroups()

    @classmethod
    def of(cls, client: socket.socket) -> _Identity | None:
        """None if it is the user that we are."""
        _, user, group = _CREDENTIALS.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user == os.geteuid():
            return None
        groups = b""
        with suppress(OSError):  # over 256
            groups = client.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
        return cls(user, group, list(struct.unpack(f"{len(groups) // 4}I", groups)))

    def __enter__(self) -> None:
        os.setgroups(self._groups)
        os.setegid(self._group)
        os.seteuid(self._user)

    def __exit__(self, *_: object) -> None:
        os.seteuid(os.getuid())
        os.setegid(os.getgid())
        os.setgroups(self._own)


class _Counter:
    """How many messages of a stream have begun and have ended."""

    def __init__(self) -> None:
        self.begun = self.ended = 0

    def on_message_begin(self) -> None:
        self.begun += 1

    def on_message_complete(self) -> None:
        self.ended += 1


class _Side:
    """One of the two sockets of a connection."""

    def __init__(self, sock: socket.socket, connection: _Connection) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.fd = sock.fileno()
        self.connection = connection
        self.unsent = b""
        self.ended = False  # nothing more can be read
        self.passed_on = False  # and the other side was told so
        self.hung = False  # the other end is closed, though something may be left to read
        self.mask = 0
        """The events that epoll was given; -1 removes the connection."""

    def handle(self, events: int) -> None:
        self.connection.handle(self, events)

    def shut(self, how: int) -> None:
        with suppress(OSError):
            self.socket.shutdown(how)


class _Connection:
    """An engine's, and ours to the plugin for it."""

    def __init__(self, forwarder: Forwarder, client: socket.socket, number: int) -> None:
        self.number = number
        self.waits_until = time.monotonic() + _PLUGIN_TIMEOUT
        self._began = time.monotonic()
        self._who = _Identity.of(client)
        self._forwarder = forwarder
        self._requests, self._answers = _Counter(), _Counter()
        self._parsers: tuple[httptools.HttpRequestParser, httptools.HttpResponseParser] | None = (
            httptools.HttpRequestParser(self._requests),
            httptools.HttpResponseParser(self._answers),
        )
        self._held = b""  # of a request that found no plugin
        self._held_after = 0  # so many answers
        self._leaving = False  # no request is accepted any more, but those that were sent before that was said
        self.engine = _Side(client, self)
        self.plugin: _Side | None = None
        forwarder.register(self.engine)

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return self._requests.begun > self._answers.ended

    def dial(self) -> bool:
        """Connect to the plugin, and deliver what waits; False if it is not there now."""
        made = self._forwarder.dial(self._who)
        if made is None:
            return False
        self.plugin = _Side(made, self)
        self._forwarder.register(self.plugin)
        held, self._held = self._held, b""
        if held:
            self._deliver(self.plugin, held)
            self._settle()
        else:
            self.handle(self.engine, _IN)  # a client mostly sends something at once
        return True

    def handle(self, side: _Side, events: int) -> None:
        """Epoll says so of this side."""
        if side.socket.fileno() < 0:  # another event has closed it
            return
        if self.plugin is None:
            if events & _HUP:
                self.close(b"engine")
            return
        other = self.plugin if side is self.engine else self.engine
        if events & _HUP:
            side.hung = True
        if events & (_OUT | _HUP) and side.unsent and not self._send(side, b""):
            other.shut(socket.SHUT_RD)
        if events & (_IN | _HUP):
            while not side.ended and not other.unsent and self._read(side, other) and side.hung:
                pass  # remains after the last answer of a connection
        self._settle()

    def leave(self) -> None:
        """End it when no call is under way, and when none can be on its way."""
        self._leaving = True
        if self.plugin is not None:
            self.handle(self.engine, _IN)

    def close(self, who: bytes) -> None:
        """End both sides; `who` did so."""
        for side in (self.engine, self.plugin):
            if side is not None:
                self._forwarder.unregister(side)
                side.socket.close()
        self._forwarder.ended(self, who)

    def expire(self) -> None:
        """There is no plugin."""
        if self._held:
            self._forwarder.tell(REQUEST, self.number, self._held)
        self.close(b"nobody")

    def _read(self, side: _Side, other: _Side) -> bool:
        """Pass on what there is now; False if there was nothing."""
        try:
            data = side.socket.recv(_CHUNK)
        except BlockingIOError:
            return False
        except OSError:  # reset
            data, side.hung = b"", True
        if not data:
            side.ended = True
            if side is self.plugin and self._answers.begun > self._answers.ended:
                self._answers.ended += 1  # its end is the answer's
            return False
        self._deliver(other, data)
        return self.plugin is not None

    def _deliver(self, side: _Side, data: bytes) -> None:
        """Send it, then tell of it: the latter costs the call nothing."""
        to_plugin = side is self.plugin
        idle, now = not self.busy, time.monotonic_ns()
        if not self._send(side, data):
            if to_plugin and idle and self._hold(data):
                return
            (self.engine if to_plugin else self.plugin or self.engine).shut(socket.SHUT_RD)
        self._forwarder.tell(REQUEST if to_plugin else ANSWER, self.number, data, now)
        if self._parsers is not None:
            try:
                self._parsers[0 if to_plugin else 1].feed_data(data)
            except httptools.HttpParserError:
                self._parsers = None
                self._answers.ended = self._requests.begun  # an unknown answer: the best guess

    def _hold(self, data: bytes) -> bool:
        """A plugin that ends takes no request. An engine would see that first, and dial again, as we do."""
        if self.plugin is None or not data.startswith(b"POST ") or self._answers.ended == self._held_after:
            return False  # the last: nor is a new connection that takes nothing
        self._held_after = self._answers.ended
        self._forwarder.unregister(self.plugin)
        self.plugin.socket.close()
        self.plugin, self._held, self.waits_until = None, data, time.monotonic() + _PLUGIN_TIMEOUT
        self._forwarder.wait(self)
        return True

    @staticmethod
    def _send(side: _Side, data: bytes) -> bool:
        """Send this behind what is unsent; False if the other end takes nothing more."""
        data = side.unsent + data
        try:
            side.unsent = data[side.socket.send(data) :]
        except BlockingIOError:
            side.unsent = data
        except OSError:
            side.unsent = b""
            return False
        return True

    def _settle(self) -> None:
        """Take the next step after an event, and set the events to wait for."""
        engine, plugin = self.engine, self.plugin
        if plugin is None or engine.unsent:
            pass
        elif engine.ended and engine.hung and not plugin.unsent and not self._leaving:
            return self.close(b"engine")
        elif plugin.ended and plugin.hung:
            if self.busy or engine.ended or not self._last_words():
                return self.close(b"plugin")
        elif self._leaving and not self.busy:
            if engine.ended:
                return self.close(b"trace")
            if self._requests.begun or time.monotonic() - self._began > _FIRST_WORDS:
                engine.shut(socket.SHUT_RD)  # data that has arrived can still be read
        elif engine.ended and plugin.ended and not plugin.unsent:
            return self.close(b"plugin")
        plugin = self.plugin
        if plugin is None:
            return None
        for side, other in ((engine, plugin), (plugin, engine)):
            if side.ended and not side.passed_on and not other.unsent and not (self._leaving and side is engine):
                side.passed_on = True
                other.shut(socket.SHUT_WR)
            mask = (0 if side.ended or other.unsent else _IN) | (_OUT if side.unsent else 0)
            self._forwarder.expect(side, -1 if not mask and side.hung else mask)
        return None

    def _last_words(self) -> bool:
        """The plugin has closed an idle connection: is there a request that was sent before the engine could see it?"""
        self._leaving = True
        self.engine.shut(socket.SHUT_RD)
        with suppress(OSError):
            return self._hold(self.engine.socket.recv(_CHUNK))
        return False


# ---------------------------------------------------------------------------------------------------------- the program


class Forwarder:
    """The loop, and everything that is open."""

    def __init__(self, place: Place, records: int) -> None:
        self.connections: set[_Connection] = set()
        self._place = place
        self._records = records
        os.set_blocking(records, False)
        self._unsaid: list[bytes] = []
        self._unsaid_size = 0
        self._unsaid_since = 0
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._numbers = 0
        self._listener: socket.socket | None = None
        self._leaving: list[tuple[float, socket.socket]] = []  # former listeners, and until when they accept
        self._pidfd = -1
        self._waiting: list[_Connection] = []
        self._stopped = self._ending = False
        self._control = sys.stdin.fileno()
        self._handlers[self._control] = self._obey
        self._epoll.register(self._control, select.EPOLLIN)

    def run(self) -> None:
        """Until the trace ends, and then until all that was asked is answered."""
        try:
            if not self._begin():
                return
            look = time.monotonic()
            while not self._ending or self.connections or self._leaving:
                # All handlers first: one may close a socket, and the next get a new one of the same number.
                for handler, events in [
                    (self._handlers[fd], events) for fd, events in self._epoll.poll(self._patience())
                ]:
                    handler(events)
                now = time.monotonic()
                if self._stopped and not self._ending:
                    self._end()
                if self._waiting:
                    self._dial_again(now)
                if now >= look or (self._listener is None and not self._ending):
                    look = now + _LOOK_EVERY
                    self._look()
                while self._leaving and self._leaving[0][0] < now:
                    self._forget(self._leaving.pop(0)[1])
                self._say()
        finally:
            self._place.give_back()
            os.set_blocking(self._records, True)
            with suppress(OSError):
                self._write(b"".join(self._unsaid))

    def _patience(self) -> float:
        if self._unsaid:
            return _DELAY_NS / 1e9
        return (
            _RETRY if self._waiting or (self._listener is None and not self._ending) or self._leaving else _LOOK_EVERY
        )

    def stop(self) -> None:
        """As if standard input had ended; for a signal handler."""
        self._stopped = True

    # -------------------------------------------------------------------------------------------- in front, or not

    def _begin(self) -> bool:
        path = self._place.path
        try:
            if self._take():
                return True
            self.tell(FAILED, 0, f"nobody listens at {path}".encode())
        except OSError as error:
            self.tell(FAILED, 0, f"cannot go in front of {path}: {error.strerror}".encode())
        except AttributeError:
            self.tell(FAILED, 0, b"cannot swap sockets: this C library has no renameat2")
        return False

    def _take(self) -> bool:
        """Go in front of the plugin; False if none listens."""
        pid = 0
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                with suppress(BlockingIOError):  # its backlog is full
                    probe.connect(os.fsencode(self._place.path))
                    pid, *_ = _CREDENTIALS.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                self._listener = self._place.take()
            except (ConnectionError, FileNotFoundError):
                return False
        self._listen(self._listener)
        with suppress(OSError):  # it is in another PID namespace, or has handed its socket over and ended
            self._pidfd = os.pidfd_open(pid)
            self._handlers[self._pidfd] = self._process_ended
            self._epoll.register(self._pidfd, select.EPOLLIN)
        self.tell(IN_FRONT, 0, b"%d" % pid)
        return True

    def _give_way(self) -> None:
        """Stop being in front. Clients that have connected until now are served."""
        self._forget_process()
        if (listener := self._listener) is not None:
            self._listener = None
            self._place.give_back()
            self._accept(listener)
            self._leaving.append((time.monotonic() + _GRACE, listener))

    def _look(self) -> None:
        """Is the path still ours? Is there a plugin again?"""
        if self._ending:
            for connection in list(self.connections):
                connection.leave()
            return
        if self._listener is not None and not self._place.taken:
            self._give_way()
            self.tell(NOTE, 0, b"the plugin has made another socket")
        try:
            if self._listener is None and self._take():
                self._dial_again(time.monotonic())
        except OSError as error:
            self.tell(NOTE, 0, f"the trace ends: {error.strerror}".encode())
            self._stopped = True

    def _process_ended(self, _: int) -> None:
        self._forget_process()
        if (made := self.dial()) is not None:  # another process listens there, too: systemd
            made.close()

    def _forget_process(self) -> None:
        if self._pidfd >= 0:
            self._epoll.unregister(self._pidfd)
            del self._handlers[self._pidfd]
            os.close(self._pidfd)
            self._pidfd = -1

    def dial(self, who: _Identity | None = None) -> socket.socket | None:
        """A new connection to the plugin; None if it is not there now. Then the path is free for the next."""
        try:
            made = socket.socket(socket.AF_UNIX)
        except OSError:  # no descriptors
            return None
        try:
            made.setblocking(False)
            with who or nullcontext():
                made.connect("plugin" if self._listener is not None else os.fsencode(self._place.path))
        except OSError as error:
            made.close()
            if self._listener is not None and isinstance(error, ConnectionError | FileNotFoundError):
                self._give_way()
                self.tell(NOTE, 0, b"the plugin has ended")
            return None
        return made

    def _obey(self, _: int) -> None:
        if not os.read(self._control, 1):
            self._epoll.unregister(self._control)
            del self._handlers[self._control]
            self._stopped = True

    def _end(self) -> None:
        self._ending = True
        self._give_way()
        self._place.release()  # another one can begin while calls are under way here
        for connection in list(self.connections):
            connection.leave()

    # ------------------------------------------------------------------------------------------------ connections

    def _listen(self, listener: socket.socket) -> None:
        self._handlers[listener.fileno()] = lambda _: self._accept(listener)
        self._epoll.register(listener, select.EPOLLIN)

    def _forget(self, listener: socket.socket) -> None:
        self._epoll.unregister(listener)
        del self._handlers[listener.fileno()]
        listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _NO_ROOM:
                    time.sleep(_RETRY)  # the backlog holds them
                return
            self._numbers += 1
            connection = _Connection(self, client, self._numbers)
            self.connections.add(connection)
            if not connection.dial():
                self.wait(connection)
            if self._ending and connection in self.connections:
                connection.leave()

    def wait(self, connection: _Connection) -> None:
        """It has no plugin now: dial again and again."""
        self._waiting.append(connection)
        self.expect(connection.engine, 0)

    def _dial_again(self, now: float) -> None:
        waiting, self._waiting = self._waiting, []
        for connection in waiting:
            if connection not in self.connections or connection.dial():
                continue
            if now > connection.waits_until:
                connection.expire()
            else:
                self._waiting.append(connection)

    def ended(self, connection: _Connection, who: bytes) -> None:
        """A connection is over."""
        self.connections.discard(connection)
        self.tell(CLOSED, connection.number, who)

    def register(self, side: _Side) -> None:
        """Have its events handled."""
        side.mask = _IN
        self._handlers[side.fd] = side.handle
        self._epoll.register(side.fd, _IN)

    def expect(self, side: _Side, mask: int) -> None:
        """Which events; -1 is none at all, since with 0 epoll still tells of the end, again and again."""
        if mask == side.mask:
            return
        if mask == -1:
            self._epoll.unregister(side.fd)
        elif side.mask == -1:
            self._epoll.register(side.fd, mask)
        else:
            self._epoll.modify(side.fd, mask)
        side.mask = mask

    def unregister(self, side: _Side) -> None:
        """It is about to be closed."""
        self.expect(side, -1)
        self._handlers.pop(side.fd, None)

    # ---------------------------------------------------------------------------------------------------- records

    def tell(self, kind: bytes, number: int, data: bytes, now: int = 0) -> None:
        """A record, to be said when there is time."""
        now = now or time.monotonic_ns()
        if not self._unsaid:
            self._unsaid_since = now
        self._unsaid += (HEADER.pack(kind, number, now, len(data)), data)
        self._unsaid_size += len(data)

    def _say(self) -> None:
        old = time.monotonic_ns() - self._unsaid_since > _DELAY_NS
        if not self._unsaid or not (old or self._unsaid_size > _BATCH):
            return
        data = b"".join(self._unsaid)
        try:
            data = data[os.write(self._records, data) :]
        except BlockingIOError:
            pass
        except OSError:  # the reader has gone, and standard input will say so
            data = b""
        self._unsaid, self._unsaid_size = [data] if data else [], len(data)
        if self._unsaid_size > _BEHIND and not self._stopped:
            self.tell(NOTE, 0, b"the trace ends, since nobody reads it")
            self._stopped = True

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._records, data) :]


def main() -> None:
    """The program."""
    path, held, records = sys.argv[1:]
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    place = Place(Path(path), int(held))
    try:
        forwarder = Forwarder(place, int(records))
        signal.signal(signal.SIGTERM, lambda *_: forwarder.stop())
        forwarder.run()
    finally:
        place.release()


if __name__ == "__main__":
    main()
