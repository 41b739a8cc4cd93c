"""Locks by name, and threads that are there while there is something for them to do."""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from netplugin_sdk.core.engine_api import Docker, DockerError, is_stopped
from netplugin_sdk.errors import Unavailable

_log = logging.getLogger("netplugin_sdk")

Question: TypeAlias = Callable[[Docker], bool]
"""Asks the engine, and does what follows. Whether it is done; else it is asked again."""

_AGAIN = 0.05, 2.0  # seconds until a question is asked again: at first, and at most
_PATIENCE = 60.0  # seconds until it is given up, or is asked slowly if it is one that stands
_SLOWLY = 30.0
_ANSWER_TIME = 10.0


@dataclass(order=True)
class _Due:
    when: float
    number: int  # of those that are due at a time the first is asked first
    question: Question = field(compare=False)
    until: float = field(compare=False)
    stands: bool = field(compare=False)
    pause: float = field(compare=False, default=_AGAIN[0])


class Locks:
    """A lock for each key, there only while somebody holds or wants it."""

    _PATIENCE = 30.0
    """Seconds: longer than an engine waits for an answer, so that threads do not gather before one that is stuck."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, _CountedLock] = {}

    def hold(self, key: str, patience: float = _PATIENCE) -> _Held:
        """A context manager that holds the lock of `key`.

        Raises `Unavailable` as it is entered, if it is not to be had in `patience` seconds.
        """
        return _Held(self._guard, self._locks, key, patience)


class _CountedLock:
    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0


class _Held:
    __slots__ = ("_guard", "_key", "_locks", "_patience")

    def __init__(self, guard: threading.Lock, locks: dict[str, _CountedLock], key: str, patience: float) -> None:
        self._guard, self._locks, self._key, self._patience = guard, locks, key, patience

    def __enter__(self) -> None:
        with self._guard:
            counted = self._locks.get(self._key)
            if counted is None:
                counted = self._locks[self._key] = _CountedLock()
            counted.users += 1
        if not counted.lock.acquire(timeout=self._patience):
            self._leave(counted)
            raise Unavailable(f"{self._key[:12] or 'the driver'} has been busy for {self._patience:g} seconds")

    def __exit__(self, *_: object) -> None:
        counted = self._locks[self._key]
        counted.lock.release()
        self._leave(counted)

    def _leave(self, counted: _CountedLock) -> None:
        with self._guard:
            counted.users -= 1
            if not counted.users:
                del self._locks[self._key]


class Background:
    """A thread that takes steps, one after the other. It ends when there is nothing to do."""

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
        """Do it, after what came before. It raises nothing."""
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


class Inquiries:
    """One thread that asks the engine, one question after the other; it ends when there is none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = threading.Condition()
        self._due: list[_Due] = []
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._docker: Docker | None = None  # the thread's
        self._closed = False

    def ask(self, question: Question, delay: float = 0.0, *, stands: bool = False) -> None:
        """Ask it in `delay` seconds, and again until it is done; after a minute it is given up, unless it stands.

        A question that waits already, and is equal, is asked at the earlier time. An engine that refuses or does not
        answer is asked again; what else a question raises is logged.
        """
        when = time.monotonic() + delay
        with self._changed:
            if self._closed:
                return
            for waiting in self._due:
                if waiting.question == question:
                    waiting.when, waiting.until = min(waiting.when, when), min(waiting.until, when + _PATIENCE)
                    heapq.heapify(self._due)
                    break
            else:
                heapq.heappush(self._due, _Due(when, next(self._numbers), question, when + _PATIENCE, stands))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="inquiries", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Ask nothing more; wait for what is being done with an answer, but for no answer.

        An engine that starts may wait for this plugin's end before it answers: it ends managed plugins of its
        predecessor (docs/managed.md).
        """
        with self._changed:
            self._closed = True
            self._due.clear()
            self._changed.notify_all()
            thread = self._thread
        until = time.monotonic() + _ANSWER_TIME
        while thread is not None and thread.is_alive() and time.monotonic() < until:
            if self._docker is not None:
                self._docker.abort()
            thread.join(0.05)

    def _run(self) -> None:
        with Docker(self._path, timeout=_ANSWER_TIME) as docker:
            self._docker = docker
            while (due := self._next()) is not None:
                if self._is_done(due.question, docker):
                    continue
                due.when = time.monotonic() + due.pause
                if due.until < math.inf:
                    due.pause = min(2 * due.pause, _AGAIN[1])
                if due.when > due.until:
                    _log.warning("Docker at %s does not tell what it is asked for", self._path)
                    if not due.stands:
                        continue
                    due.pause, due.until = _SLOWLY, math.inf
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

    def _is_done(self, question: Question, docker: Docker) -> bool:
        if is_stopped(self._path):
            return False
        try:
            return question(docker)
        except (DockerError, Unavailable) as error:
            _log.debug("%s", error)
            return False
        except Exception:
            _log.exception("cannot use what Docker told")
            return True
