"""Losses: interfaces and addresses that vanished though the SDK did not remove them. A watch publishes them."""

from __future__ import annotations

from collections.abc import Callable

_subscribers: list[Callable[[str], None]] = []


def subscribe(subscriber: Callable[[str], None]) -> None:
    """Have `subscriber` called with the text of each loss, in a thread that must not wait."""
    _subscribers.append(subscriber)


def unsubscribe(subscriber: Callable[[str], None]) -> None:
    """Undo `subscribe`. Raises ValueError if it is not a subscriber."""
    _subscribers.remove(subscriber)


def publish(loss: str) -> None:
    """Call all subscribers with a loss, such as ``interface br-1 is gone``."""
    for subscriber in tuple(_subscribers):
        subscriber(loss)
