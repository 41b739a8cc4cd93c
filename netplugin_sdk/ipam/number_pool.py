"""A set of whole numbers that finds a free one fast, and a pool to take numbers from.

Nothing here knows of addresses: VNIs, ports and VLAN ids are given out in the same way.
"""

from __future__ import annotations

import enum
import heapq
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from netplugin_sdk.errors import Conflict, InvalidRequest, Unavailable

_BITS = 8
_FANOUT = 1 << _BITS
_FULL = (1 << _FANOUT) - 1


class Numbers:
    """A set of numbers from 0 to ``size - 1``, with the lowest that is not in it in logarithmic time.

    A tree of 256 children a node. A node is an int with a bit for each child that is full, at the lowest floor for each
    number that is in the set; a node that is full or empty is not stored. So a contiguous range costs next to
    nothing, and a scattered number costs the same whatever the size.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._floors: list[dict[int, int]] = [{}]
        while size > 1 << _BITS * len(self._floors):
            self._floors.append({})
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, number: int) -> bool:
        for floor in self._floors:
            node, bit = number >> _BITS, number & _FANOUT - 1
            if (mask := floor.get(node)) is not None:
                return bool(mask >> bit & 1)
            number = node  # the node is empty or full: the one above knows
        return False

    def __iter__(self) -> Iterator[int]:
        """In ascending order."""
        pieces = sorted(
            ((node << _BITS) + bit << _BITS * height, 1 << _BITS * height)
            for height, floor in enumerate(self._floors)
            for node, mask in floor.items()
            for bit in range(_FANOUT)
            if mask >> bit & 1
        )
        for first, length in pieces:
            yield from range(first, first + length)

    def add(self, number: int) -> bool:
        """Whether it was not in the set."""
        if number in self:
            return False
        self._count += 1
        for floor in self._floors:
            node, bit = number >> _BITS, number & _FANOUT - 1
            mask = floor.get(node, 0) | 1 << bit
            if mask != _FULL or floor is self._floors[-1]:
                floor[node] = mask
                break
            floor.pop(node, None)
            number = node
        return True

    def remove(self, number: int) -> bool:
        """Whether it was in the set."""
        if number not in self:
            return False
        self._count -= 1
        for floor in self._floors:
            node, bit = number >> _BITS, number & _FANOUT - 1
            mask = floor.get(node)
            if mask is not None and mask != 1 << bit:
                floor[node] = mask & ~(1 << bit)
                break
            if mask is not None:
                del floor[node]
                break
            floor[node] = _FULL & ~(1 << bit)  # it was full, by a node above
            number = node
        return True

    def first_free(self, start: int, last: int) -> int | None:
        """The lowest number from `start` to `last` that is not in the set."""
        found = self._find(len(self._floors) - 1, 0, start) if start <= last else None
        return found if found is not None and found <= last else None

    def _find(self, height: int, node: int, start: int) -> int | None:
        shift = _BITS * height
        first = max((start >> shift) - (node << _BITS), 0)
        free = ~self._floors[height].get(node, 0) & (_FULL >> first << first)
        if not free:
            return None
        bit = _lowest(free)
        child = (node << _BITS) + bit
        if not height:
            return child
        found = self._find(height - 1, child, start)
        if found is None:  # only in the child that `start` is in: the others have some
            free &= free - 1
            if not free:
                return None
            child = (node << _BITS) + _lowest(free)
            found = self._find(height - 1, child, child << shift)
        return found


def _lowest(mask: int) -> int:
    return (mask & -mask).bit_length() - 1


class Strategy(enum.Enum):
    """Which of the free numbers is given out."""

    FIRST_FREE = "first-free"
    """The lowest."""
    SERIAL = "serial"
    """The next behind the last that was given out; behind the end the lowest again."""
    HASHED = "hashed"
    """One that follows from the owner, so that it mostly is the same again."""


@dataclass(order=True, slots=True)
class Held:
    """A number that was given back, and is not given to others before this time."""

    until: float
    number: int


class NumberPool:
    """Gives out the numbers from `first` to `last`, each to one owner at a time.

    An owner is a text such as a MAC address; an owner that asks again gets the same. A number that was given
    back can be held: for an owner, and from everybody else while there is any other.

    Args:
        first, last: the lowest and the highest number.
        clock: seconds; `time.time` where times are kept on disk.

    Operations take time logarithmic in the size, and memory is for numbers that are in use. Not for several threads.
    """

    def __init__(self, first: int, last: int, *, clock: Callable[[], float] = time.time) -> None:
        if last < first:
            raise ValueError(f"no number is from {first} to {last}")
        self.first, self.last = first, last
        self._clock = clock
        self._used = Numbers(last - first + 1)
        self._next = first
        self._owners: dict[int, str] = {}
        self._numbers: dict[str, int] = {}
        self._held: dict[int, Held] = {}
        self._by_time: list[Held] = []  # a heap; numbers that are not in `_held` any more are skipped

    def __len__(self) -> int:
        """How many are in use."""
        return len(self._used) - len(self._held)

    def __contains__(self, number: int) -> bool:
        """Whether it is in use."""
        return self.first <= number <= self.last and number - self.first in self._used and number not in self._held

    def __iter__(self) -> Iterator[int]:
        """Those that are in use, in ascending order."""
        return (number for index in self._used if (number := self.first + index) not in self._held)

    def owner(self, number: int) -> str | None:
        """Its owner, or the one that it is held for."""
        return self._owners.get(number)

    def of(self, owner: str) -> int | None:
        """The number that the owner has, or that is held for it."""
        return self._numbers.get(owner)

    def allocate(
        self,
        owner: str | None = None,
        *,
        strategy: Strategy = Strategy.FIRST_FREE,
        seed: str | None = None,
        first: int | None = None,
        last: int | None = None,
    ) -> int:
        """A number for this owner, from `first` to `last` if they are given.

        With `Strategy.HASHED` it follows from `seed`, or else from the owner.

        Raises `Unavailable` if all are in use.
        """
        low = self.first if first is None else max(first, self.first)
        high = self.last if last is None else min(last, self.last)
        if owner is not None and (number := self._numbers.get(owner)) is not None and low <= number <= high:
            self._held.pop(number, None)
            return number
        self.expire()
        number = self._choose(strategy, seed or owner, low, high)
        if number is None:
            number = self._soonest(low, high)
        if number is None:
            raise Unavailable(f"all numbers from {low} to {high} are in use")
        self._give(number, owner)
        self._next = number + 1
        return number

    def take(self, number: int, owner: str | None = None) -> None:
        """Give this number to this owner, also if it is held.

        Raises `InvalidRequest` if it is out of range, `Conflict` if another owner, or nobody in particular, has it.
        """
        if not self.first <= number <= self.last:
            raise InvalidRequest(f"{number} is not from {self.first} to {self.last}")
        if number in self and (owner is None or self._owners.get(number) != owner):
            raise Conflict(f"{number} is in use")
        self._give(number, owner)

    def release(self, number: int) -> bool:
        """Take it back; a held number stays held. Returns whether it was in use."""
        if number not in self:
            return False
        self._free(number)
        return True

    def hold(self, number: int, until: float, owner: str | None = None) -> None:
        """Hold a number, in use or not, until that time, and for this owner."""
        self._give(number, owner)
        held = self._held[number] = Held(until, number)
        heapq.heappush(self._by_time, held)

    def expire(self) -> list[int]:
        """Free what was held until now."""
        now, freed = self._clock(), []
        while self._by_time and (self._by_time[0].until <= now or not self._is_held(self._by_time[0])):
            held = heapq.heappop(self._by_time)
            if self._is_held(held):
                self._free(held.number)
                freed.append(held.number)
        return freed

    def _is_held(self, held: Held) -> bool:
        return self._held.get(held.number) is held

    def _choose(self, strategy: Strategy, seed: str | None, low: int, high: int) -> int | None:
        start = low
        if strategy is Strategy.SERIAL and low <= self._next <= high:
            start = self._next
        elif strategy is Strategy.HASHED and seed is not None and low <= high:
            import hashlib  # noqa: PLC0415 - brings OpenSSL, 3 ms

            digest = hashlib.blake2b(seed.encode(), digest_size=16).digest()
            start = low + int.from_bytes(digest) % (high - low + 1)
        found = self._used.first_free(start - self.first, high - self.first)
        if found is None and start > low:
            found = self._used.first_free(low - self.first, start - 1 - self.first)
        return None if found is None else self.first + found

    def _soonest(self, low: int, high: int) -> int | None:
        """Of those that are held the one whose time comes first."""
        inside = [held for held in self._held.values() if low <= held.number <= high]
        return min(inside).number if inside else None

    def _give(self, number: int, owner: str | None) -> None:
        self._used.add(number - self.first)
        self._held.pop(number, None)
        if self._owners.get(number) != owner:
            self._disown(number)
        if owner is not None and self._numbers.get(owner) != number:
            if (before := self._numbers.get(owner)) is not None:
                del self._owners[before]  # it is in use, and nobody's in particular
            self._owners[number], self._numbers[owner] = owner, number

    def _disown(self, number: int) -> None:
        if (owner := self._owners.pop(number, None)) is not None:
            del self._numbers[owner]

    def _free(self, number: int) -> None:
        self._used.remove(number - self.first)
        self._held.pop(number, None)
        self._disown(number)
