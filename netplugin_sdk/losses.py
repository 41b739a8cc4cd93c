"""What vanished from the kernel though the SDK did not remove it: published by a watch, repaired by its subscribers."""

from __future__ import annotations

from collections.abc import Callable

_subscribers: list[Callable[[str], None]] = []


def subscribe(subscriber: Callable[[str], None]) -> None:
    """Have `subscriber` called with each loss, in words, in a thread that must not wait."""
    _subscribers.append(subscriber)


def unsubscribe(subscriber: Callable[[str], None]) -> None:
    """Take it back. Raises ValueError if it is no subscriber."""
    _subscribers.remove(subscriber)


def publish(loss: str) -> None:
    """Call all subscribers with a loss, such as ``interface br-1 is gone``."""
    for subscriber in tuple(_subscribers):
        subscriber(loss)
