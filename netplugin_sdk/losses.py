"""What vanished from the kernel though nobody removed it: told by who keeps watch, heard by who can bring it back."""

from __future__ import annotations

from collections.abc import Callable

_listeners: list[Callable[[str], None]] = []


def hear(listener: Callable[[str], None]) -> None:
    """Have `listener` called with each loss, in words, in a thread that must not wait."""
    _listeners.append(listener)


def hear_no_more(listener: Callable[[str], None]) -> None:
    """Take it back."""
    _listeners.remove(listener)


def tell(loss: str) -> None:
    """Tell everybody of a loss, such as ``interface br-1 is gone``."""
    for listener in tuple(_listeners):
        listener(loss)
