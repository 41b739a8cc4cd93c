"""The engine's call that a thread is answering: code below can find it, and its deadline can end it."""

from __future__ import annotations

import threading
import time

from netplugin_sdk.errors import Unavailable

_current = threading.local()


class Call:
    """One call, from its request to its answer. A context manager that makes it the thread's own.

    Either it is committed, and the method's answer is sent, or it expires, and its work is undone.
    """

    __slots__ = ("_committed", "_expired", "_guard", "began", "method", "thread")

    def __init__(self) -> None:
        self.method = ""
        """``NetworkDriver.Join``; empty before it is known."""
        self.began = time.monotonic()
        self.thread = threading.get_ident()
        self._guard = threading.Lock()
        self._expired = self._committed = False

    def __enter__(self) -> Call:
        _current.call = self
        return self

    def __exit__(self, *_: object) -> None:
        _current.call = None

    @property
    def expired(self) -> bool:
        """Whether the engine was told that it took too long."""
        return self._expired

    def commit(self) -> bool:
        """Whether the answer will be the method's; from now on it cannot expire."""
        with self._guard:
            self._committed = not self._expired
            return self._committed

    def expire(self) -> bool:
        """Whether the engine may be told that it took too long; not if it is committed."""
        with self._guard:
            self._expired = not self._committed
            return self._expired


def current() -> Call | None:
    """The call that this thread is answering."""
    call: Call | None = getattr(_current, "call", None)
    return call


def has_expired() -> bool:
    """Whether the engine was told, by a 503, that the call of this thread took too long."""
    call = current()
    return call is not None and call.expired


def refuse_if_late() -> None:
    """For work that had to wait, before it begins. Raises `Unavailable` if the engine no longer waits."""
    call = current()
    if call is not None and call.expired:
        raise _late(call)


def commit() -> None:
    """For finished work, before it is written down. Raises `Unavailable` if the engine no longer waits: undo it."""
    call = current()
    if call is not None and not call.commit():
        raise _late(call)


def _late(call: Call) -> Unavailable:
    return Unavailable(f"{call.method} took too long, and is undone")
