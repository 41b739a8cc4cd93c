"""The engine's call that a thread is answering: so that deeper floors know of it, and its wait can be ended."""

from __future__ import annotations

import threading

from netplugin_sdk.errors import Unavailable

_here = threading.local()


class Call:
    """One call, from its request to its answer. A context manager that makes it the thread's own."""

    __slots__ = ("answered", "method", "thread")

    def __init__(self) -> None:
        self.method = ""
        """``NetworkDriver.Join``; empty before it is known."""
        self.thread = threading.get_ident()
        self.answered = False
        """Whether the engine was told that it took too long: what it did is then to be undone."""

    def __enter__(self) -> Call:
        _here.call = self
        return self

    def __exit__(self, *_: object) -> None:
        _here.call = None


def current() -> Call | None:
    """The call that this thread is answering."""
    call: Call | None = getattr(_here, "call", None)
    return call


def refuse_if_late() -> None:
    """For what the engine does not wait for any more. Raises `Unavailable`."""
    call = current()
    if call is not None and call.answered:
        raise Unavailable(f"{call.method} took too long, and is undone")
