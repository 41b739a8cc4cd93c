"""The set of numbers against a plain set, and the pool against a plain dict."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from netplugin_sdk import Conflict, InvalidRequest, Unavailable
from netplugin_sdk.ipam import NumberPool, Numbers, Strategy

from ..volume import volume

SIZES = st.sampled_from([1, 2, 7, 255, 256, 257, 1000, 65_536, 65_537, 1 << 24, 1 << 64, (1 << 128) - 1])


def first_free(numbers: set[int], start: int, last: int) -> int | None:
    return next((number for number in range(start, last + 1) if number not in numbers), None)


class NumbersLikeASet(RuleBasedStateMachine):
    @initialize(size=SIZES)
    def begin(self, size: int) -> None:
        self.size = size
        self.numbers, self.plain = Numbers(size), set[int]()

    def near(self, draw: st.DataObject) -> int:
        """Mostly near others, so that nodes become full and empty again."""
        low = draw.draw(st.sampled_from([0, 0, 0, self.size // 2, max(self.size - 600, 0)]))
        return min(low + draw.draw(st.integers(0, 600)), self.size - 1)

    @rule(draw=st.data())
    def add(self, draw: st.DataObject) -> None:
        number = self.near(draw)
        assert self.numbers.add(number) is (number not in self.plain)
        self.plain.add(number)

    @rule(draw=st.data(), length=st.integers(1, 600))
    def add_many(self, draw: st.DataObject, length: int) -> None:
        start = self.near(draw)
        for number in range(start, min(start + length, self.size)):
            assert self.numbers.add(number) is (number not in self.plain)
            self.plain.add(number)

    @rule(draw=st.data())
    def remove(self, draw: st.DataObject) -> None:
        number = self.near(draw)
        assert self.numbers.remove(number) is (number in self.plain)
        self.plain.discard(number)

    @rule(draw=st.data(), length=st.integers(1, 600))
    def remove_many(self, draw: st.DataObject, length: int) -> None:
        start = self.near(draw)
        for number in range(start, min(start + length, self.size)):
            assert self.numbers.remove(number) is (number in self.plain)
            self.plain.discard(number)

    @rule(draw=st.data(), length=st.integers(0, 2000))
    def find(self, draw: st.DataObject, length: int) -> None:
        start = self.near(draw)
        last = min(start + length, self.size - 1)
        assert self.numbers.first_free(start, last) == first_free(self.plain, start, last)
        assert self.numbers.first_free(start, self.size - 1) == first_free(self.plain, start, self.size - 1)

    @invariant()
    def same(self) -> None:
        if hasattr(self, "plain"):
            assert len(self.numbers) == len(self.plain)
            assert list(self.numbers) == sorted(self.plain)


TestNumbers = NumbersLikeASet.TestCase
TestNumbers.settings = settings(max_examples=volume(30, 60), stateful_step_count=25, derandomize=True)


def test_what_is_full_costs_nothing() -> None:
    numbers = Numbers(1 << 24)
    for number in range(1 << 17):
        numbers.add(number)
    assert sum(map(len, numbers._floors)) <= 3
    for number in range(1 << 17):
        numbers.remove(number)
    assert sum(map(len, numbers._floors)) == 0


class PoolLikeADict(RuleBasedStateMachine):
    """Against a model that looks at every number."""

    owners = st.none() | st.sampled_from("abcdefgh")

    @initialize(first=st.integers(0, 1000), size=st.sampled_from([1, 3, 20, 300]))
    def begin(self, first: int, size: int) -> None:
        self.now = 0.0
        self.first, self.last = first, first + size - 1
        self.pool = NumberPool(self.first, self.last, clock=lambda: self.now)
        self.used: dict[int, str | None] = {}
        self.held: dict[int, tuple[float, str | None]] = {}

    def of(self, owner: str | None) -> int | None:
        everybody = {**self.used, **{number: who for number, (_, who) in self.held.items()}}
        return next((number for number, who in everybody.items() if who is not None and who == owner), None)

    def give(self, number: int, owner: str | None) -> None:
        if owner is not None and (before := self.of(owner)) is not None and before != number:
            if before in self.used:
                self.used[before] = None
            else:
                self.held[before] = (self.held[before][0], None)
        self.held.pop(number, None)
        self.used[number] = owner

    def free(self, low: int, high: int) -> Iterator[int]:
        return (number for number in range(low, high + 1) if number not in self.used and number not in self.held)

    @rule(owner=owners, strategy=st.sampled_from(Strategy), part=st.booleans(), draw=st.data())
    def allocate(self, owner: str | None, strategy: Strategy, part: bool, draw: st.DataObject) -> None:
        low, high = self.first, self.last
        if part:
            low = draw.draw(st.integers(self.first, self.last))
            high = draw.draw(st.integers(low, self.last))
        self.expire()
        has = self.of(owner)
        free = set(self.free(low, high))
        held = {number for number in self.held if low <= number <= high}
        if not free and not held and not (has is not None and low <= has <= high):
            with pytest.raises(Unavailable, match=f"all numbers from {low} to {high} are in use"):
                self.pool.allocate(owner, strategy=strategy, first=low, last=high)
            return
        number = self.pool.allocate(owner, strategy=strategy, first=low, last=high)
        if has is not None and low <= has <= high:
            assert number == has
        elif free:
            assert number in free
            if strategy is Strategy.FIRST_FREE:
                assert number == min(free)
        else:
            assert number in held
            assert self.held[number][0] == min(self.held[each][0] for each in held)
        self.give(number, owner)

    @rule(owner=owners, draw=st.data())
    def take(self, owner: str | None, draw: st.DataObject) -> None:
        number = draw.draw(st.integers(self.first - 1, self.last + 1))
        try:
            self.pool.take(number, owner)
        except InvalidRequest:
            assert not self.first <= number <= self.last
        except Conflict:
            assert number in self.used
            assert owner is None or self.used[number] != owner
        else:
            assert number not in self.used or self.used[number] == owner
            self.give(number, owner)

    @precondition(lambda self: bool(getattr(self, "used", None)))
    @rule(draw=st.data())
    def release(self, draw: st.DataObject) -> None:
        number = draw.draw(st.sampled_from(sorted(self.used)))
        assert self.pool.release(number)
        assert not self.pool.release(number)
        del self.used[number]

    @precondition(lambda self: bool(getattr(self, "used", None)))
    @rule(draw=st.data(), seconds=st.floats(0.5, 20), owner=owners)
    def hold(self, draw: st.DataObject, seconds: float, owner: str | None) -> None:
        number = draw.draw(st.sampled_from(sorted(self.used)))
        self.pool.hold(number, self.now + seconds, owner)
        self.give(number, owner)
        del self.used[number]
        self.held[number] = (self.now + seconds, owner)

    @rule(seconds=st.floats(0.1, 10))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def expire(self) -> None:
        gone = {number for number, (until, _) in self.held.items() if until <= self.now}
        assert set(self.pool.expire()) == gone
        for number in gone:
            del self.held[number]

    @invariant()
    def same(self) -> None:
        if hasattr(self, "used"):
            assert {n for n in range(self.first, self.last + 1) if n in self.pool} == set(self.used)
            assert list(self.pool) == sorted(self.used)
            assert len(self.pool) == len(self.used)
            for owner in "abcdefgh":
                assert self.pool.of(owner) == self.of(owner)


TestPool = PoolLikeADict.TestCase
TestPool.settings = settings(max_examples=volume(40, 80), stateful_step_count=40, derandomize=True)


def test_serial_goes_round() -> None:
    pool = NumberPool(10, 14)
    assert [pool.allocate(strategy=Strategy.SERIAL) for _ in range(3)] == [10, 11, 12]
    pool.release(10)
    pool.release(11)
    assert [pool.allocate(strategy=Strategy.SERIAL) for _ in range(4)] == [13, 14, 10, 11]
    with pytest.raises(Unavailable):
        pool.allocate(strategy=Strategy.SERIAL)


def test_first_free_is_the_lowest() -> None:
    pool = NumberPool(10, 14)
    assert [pool.allocate() for _ in range(3)] == [10, 11, 12]
    pool.release(11)
    assert [pool.allocate(), pool.allocate()] == [11, 13]


@given(owners=st.lists(st.text(min_size=1), min_size=1, max_size=30, unique=True))
@settings(max_examples=50, derandomize=True)
def test_hashed_follows_from_the_owner_whoever_else_is_there(owners: list[str]) -> None:
    big = 1 << 64
    numbers = {owner: NumberPool(0, big).allocate(owner, strategy=Strategy.HASHED) for owner in owners}
    assert len(set(numbers.values())) == len(owners)
    pool = NumberPool(0, big)
    random.Random(1).shuffle(owners)
    assert {owner: pool.allocate(owner, strategy=Strategy.HASHED) for owner in owners} == numbers


def test_a_range_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no number is from 2 to 1"):
        NumberPool(2, 1)


@pytest.mark.parametrize(("first", "last"), [(10 << 24, (11 << 24) - 1), (0xFD << 120, (0xFD << 120) + (1 << 64) - 1)])
def test_many_out_and_back(first: int, last: int) -> None:
    """As in a /8 and in a /64."""
    count, chooser = volume(100_000, 1_000_000), random.Random(7)
    pool, out = NumberPool(first, last), list[int]()
    for step in range(count):
        if step % 4 == 3:  # so that holes come up, and go
            place = chooser.randrange(len(out))
            out[place], out[-1] = out[-1], out[place]
            assert pool.release(out.pop())
        out.append(pool.allocate())
    assert len(out) == len(set(out)) == len(pool)
    assert max(out) == first + len(out) - 1  # the lowest free one each time: no hole is left
    for number in out:
        assert pool.release(number)
    assert len(pool) == 0
    assert sum(map(len, pool._used._floors)) == 0
