"""Locks by name, and threads that exist while they have something to do."""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from netplugin_sdk.core.engine_api import Docker, DockerError, is_stopped
from netplugin_sdk.core.timings import Timings
from netplugin_sdk.errors import Unavailable

_log = logging.getLogger("netplugin_sdk")

Query: TypeAlias = Callable[[Docker], bool]
"""Asks the engine and acts on the answer. Returns whether it is done; otherwise it is asked again."""


@dataclass(order=True)
class _Due:
    when: float
    number: int  # of queries that are due at the same time the first is asked first
    query: Query = field(compare=False)
    expires: float = field(compare=False)
    recurring: bool = field(compare=False)
    pause: float = field(compare=False)


class Locks:
    """A lock for each key, which exists only while a thread holds or wants it.

    `wait` is how many seconds `hold` waits, unless it is told otherwise.
    """

    def __init__(self, wait: float) -> None:
        self._wait = wait
        self._guard = threading.Lock()
        self._locks: dict[str, _CountedLock] = {}

    def hold(self, key: str, wait: float | None = None) -> AbstractContextManager[None]:
        """A context manager that holds the lock of `key`.

        Raises `Unavailable` as it is entered, if the lock is not free within `wait` seconds.
        """
        return _Held(self._guard, self._locks, key, self._wait if wait is None else wait)


class _CountedLock:
    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0


class _Held(AbstractContextManager[None]):
    __slots__ = ("_guard", "_key", "_locks", "_wait")

    def __init__(self, guard: threading.Lock, locks: dict[str, _CountedLock], key: str, wait: float) -> None:
        self._guard, self._locks, self._key, self._wait = guard, locks, key, wait

    def __enter__(self) -> None:
        with self._guard:
            counted = self._locks.get(self._key)
            if counted is None:
                counted = self._locks[self._key] = _CountedLock()
            counted.users += 1
        if not counted.lock.acquire(timeout=self._wait):
            self._leave(counted)
            raise Unavailable(f"{self._key[:12] or 'the driver'} has been busy for {self._wait:g} seconds")

    def __exit__(self, *_: object) -> None:
        counted = self._locks[self._key]
        counted.lock.release()
        self._leave(counted)

    def _leave(self, counted: _CountedLock) -> None:
        with self._guard:
            counted.users -= 1
            if not counted.users:
                del self._locks[self._key]


class SerialWorker:
    """A thread that runs steps one after the other. It ends when there is nothing to do."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._steps: deque[Callable[[], object]] = deque()
        self._running = False

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._running

    def submit(self, step: Callable[[], object]) -> None:
        """Run it after the steps before it. It must not raise."""
        with self._changed:
            self._steps.append(step)
            if not self._running:
                threading.Thread(target=self._run, name=self._name).start()
                self._running = True

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._steps:
                    self._running = False
                    self._changed.notify_all()
                    return
                step = self._steps.popleft()
            step()

    def wait(self) -> None:
        """Wait until there is nothing to do."""
        if self._running:
            with self._changed:
                self._changed.wait_for(lambda: not self._running)


class EngineQueries:
    """One thread that asks the engine, one query after the other; it ends when there is none."""

    def __init__(self, path: Path, timings: Timings) -> None:
        self._path = path
        self._timings = timings
        self._changed = threading.Condition()
        self._due: list[_Due] = []
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._docker: Docker | None = None  # the thread's
        self._closed = False

    def ask(self, query: Query, delay: float = 0.0, *, recurring: bool = False) -> None:
        """Ask it in `delay` seconds, and again until it is done; it is dropped after a minute, unless it is recurring.

        A query that waits already, and is equal, is asked at the earlier time. An engine that refuses or does not
        answer is asked again; any other exception of a query is logged.
        """
        when = time.monotonic() + delay
        expires = when + self._timings.query_expires
        with self._changed:
            if self._closed:
                return
            for waiting in self._due:
                if waiting.query == query:
                    waiting.when, waiting.expires = min(waiting.when, when), min(waiting.expires, expires)
                    heapq.heapify(self._due)
                    break
            else:
                pause = self._timings.query_retry_min
                heapq.heappush(self._due, _Due(when, next(self._numbers), query, expires, recurring, pause))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine queries", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Ask nothing more; wait until the current answer is processed, but for no further answer.

        An engine that starts may wait for this plugin's end before it answers: it ends managed plugins of its
        predecessor (docs/managed.md).
        """
        with self._changed:
            self._closed = True
            self._due.clear()
            self._changed.notify_all()
            thread = self._thread
        until = time.monotonic() + self._timings.query_timeout
        while thread is not None and thread.is_alive() and time.monotonic() < until:
            if self._docker is not None:
                self._docker.abort()
            thread.join(0.05)

    def _run(self) -> None:
        with Docker(self._path, timeout=self._timings.query_timeout) as docker:
            self._docker = docker
            while (due := self._next()) is not None:
                if self._is_done(due.query, docker):
                    continue
                due.when = time.monotonic() + due.pause
                if due.expires < math.inf:
                    due.pause = min(2 * due.pause, self._timings.query_retry_max)
                if due.when > due.expires:
                    _log.warning("Docker at %s does not answer", self._path)
                    if not due.recurring:
                        continue
                    due.pause, due.expires = self._timings.query_retry_slow, math.inf
                with self._changed:
                    if not self._closed:
                        heapq.heappush(self._due, due)

    def _next(self) -> _Due | None:
        with self._changed:
            while self._due:
                wait = self._due[0].when - time.monotonic()
                if wait <= 0:
                    return heapq.heappop(self._due)
                self._changed.wait(wait)
            self._thread = None
            return None

    def _is_done(self, query: Query, docker: Docker) -> bool:
        if is_stopped(self._path):
            return False
        try:
            return query(docker)
        except (DockerError, Unavailable) as error:
            _log.debug("%s", error)
            return False
        except BaseException:  # SystemExit, too: a driver's sys.exit must not end this thread
            _log.exception("cannot use Docker's answer")
            return True
