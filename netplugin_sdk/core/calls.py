"""The engine's call that a thread is answering: so that deeper floors know of it, and its wait can be ended."""

from __future__ import annotations

import threading
import time

from netplugin_sdk.errors import Unavailable

_here = threading.local()


class Call:
    """One call, from its request to its answer. A context manager that makes it the thread's own.

    Either it is settled, and its answer is the method's, or somebody gives it up, and what it did is undone.
    """

    __slots__ = ("_given_up", "_guard", "_settled", "began", "method", "thread")

    def __init__(self) -> None:
        self.method = ""
        """``NetworkDriver.Join``; empty before it is known."""
        self.began = time.monotonic()
        self.thread = threading.get_ident()
        self._guard = threading.Lock()
        self._given_up = self._settled = False

    def __enter__(self) -> Call:
        _here.call = self
        return self

    def __exit__(self, *_: object) -> None:
        _here.call = None

    @property
    def given_up(self) -> bool:
        """Whether the engine was told that it took too long."""
        return self._given_up

    def settle(self) -> bool:
        """Whether the answer will be the method's; from now on nobody gives it up."""
        with self._guard:
            self._settled = not self._given_up
            return self._settled

    def give_up(self) -> bool:
        """Whether the engine may be told that it took too long; not if it is settled."""
        with self._guard:
            self._given_up = not self._settled
            return self._given_up


def current() -> Call | None:
    """The call that this thread is answering."""
    call: Call | None = getattr(_here, "call", None)
    return call


def is_given_up() -> bool:
    """Whether the engine was told that what this thread answers took too long: by a 503, whatever it answers now."""
    call = current()
    return call is not None and call.given_up


def refuse_if_late() -> None:
    """For what has waited, before it begins. Raises `Unavailable` if the engine waits no more."""
    call = current()
    if call is not None and call.given_up:
        raise _late(call)


def settle() -> None:
    """For what is made, before it is written down. Raises `Unavailable` if the engine waits no more: undo it."""
    call = current()
    if call is not None and not call.settle():
        raise _late(call)


def _late(call: Call) -> Unavailable:
    return Unavailable(f"{call.method} took too long, and is undone")
