"""Measure the time to allocate an address, and the memory of a million of them: this SDK beside its rivals.

    python benchmarks/ipam.py [--quick] [--rounds 7] [--json FILE]

A figure is the CPU time to allocate one address and release it, so the pool is unchanged afterwards. It is the median
of some rounds; in each round every contender has a turn of about 50 ms in every state. Each contender and state is a
process of its own. Nobody waits for anything, so on a quiet machine wall time is the same; the last line shows the
deviation, and --json has both times. An operation that takes longer than a second runs as often as fits into some
seconds, at least once, and is marked with *. If setting up or running takes longer than a minute, the figure is "-".

- sdk: `netplugin_sdk.ipam.AddressPool` by its three strategies, and first-free for an owner (a MAC address in text).
  It is filled by `Numbers.add`, which `take` ends in: that is faster by what the checks cost.
- scan: the simplest way, `next(host for host in network.hosts() if host not in used)` with a set. Nothing is faster if
  the first free address is near. But the time grows with the distance, and filling a pool takes quadratic time.
- netaddr, lowest: PyPI's netaddr 1.3 with the addresses in use in an IPSet: the first gap of its `iter_cidrs()`, `add`,
  `remove`. (`IPSet([network]) - used` makes the set of free ones each time: slower. To keep that one is slower too:
  it has some 50 networks for each address in use of a /64, all of which `iter_cidrs()` sorts.)
- netaddr, any: the free addresses in an IPSet; one network is taken out by `pop` and walked through address by address,
  released addresses go in by `add`. This is netaddr's fastest way, but it does not choose the address.
- ipalloc: PyPI's ipalloc 1.0, an IPAM library on top of netaddr, in memory, with its HeadPolicy (the lowest).

The states of the /8 are: the lower half in use, in one piece; the lower 99.9 %, in one piece; all except 0.1 %, which
are scattered. Nobody fills half of a /64: there, the given number is in use, at random, or in one piece from its start.

Memory is the growth of the resident set of a new process by a million addresses. "~" is scaled up from 100 000 of them
(netaddr, lowest) or 10 000 (netaddr, any; ipalloc).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import enum
import gc
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

from netplugin_sdk.ipam import AddressPool, Strategy

MILLION = 1_000_000
BATCH = 0.05  # seconds that a contender has in a round
SLOW = 1.0  # seconds; longer operations run less often
IPNetwork = IPv4Network | IPv6Network


# ------------------------------------------------------------------------------------------------------ the states


class Shape(enum.Enum):
    PIECE = "in one piece"
    RANDOM = "at random"
    HOLES = "all but some that are strewn about"


@dataclass(frozen=True)
class State:
    """Which addresses of a network are in use."""

    name: str
    count: int
    shape: Shape = Shape.PIECE


@dataclass(frozen=True)
class Scene:
    """One network in several states."""

    title: str
    network: str
    states: tuple[State, ...]
    growth: bool = False


BIG, HUGE = "10.0.0.0/8", "fd00::/64"
ALL = 2**24 - 2  # without the network's own and its broadcast address
NEARLY_ALL = ALL * 999 // 1000
EMPTY = State("empty", 0)
GROWTH = (1000, 10_000, 100_000, MILLION)
SCENES = (
    Scene(
        "a /8",
        BIG,
        (
            EMPTY,
            State("50 %", ALL // 2),
            State("99.9 %", NEARLY_ALL),
            State("99.9 %, holes", NEARLY_ALL, Shape.HOLES),
        ),
    ),
    Scene(
        "a /64, in use at random",
        HUGE,
        (EMPTY, *(State(f"{count:.0e}".replace("+0", ""), count, Shape.RANDOM) for count in GROWTH)),
        growth=True,
    ),
    Scene(
        "a /64, in use in one piece",
        HUGE,
        (EMPTY, *(State(f"{count:.0e}".replace("+0", ""), count) for count in GROWTH)),
        growth=True,
    ),
)


def strewn(network: IPNetwork) -> Iterator[int]:
    """Numbers of its addresses as if at random, none twice: a linear congruential generator of full period."""
    number, last = 1, network.num_addresses - 1
    while True:
        number = (number * 6364136223846793005 + 1442695040888963407) & last
        if 0 < number < last:
            yield number


def in_use(network: IPNetwork, state: State) -> Iterable[int]:
    """Numbers of the addresses; those in `holes` come too."""
    if state.shape is Shape.RANDOM:
        return itertools.islice(strewn(network), state.count)
    return range(1, (ALL if state.shape is Shape.HOLES else state.count) + 1)


def holes(network: IPNetwork, state: State) -> Iterable[int]:
    return itertools.islice(strewn(network), ALL - state.count) if state.shape is Shape.HOLES else ()


# -------------------------------------------------------------------------------------------------- the contenders

Turn = Callable[[], object]
"""Allocates an address and releases it; returns the address."""


class Contender(ABC):
    """Something that gives out addresses, in one way or in several."""

    ways: ClassVar[tuple[str, ...]]
    lowest: ClassVar[tuple[str, ...]] = ()
    """The ways that give out the lowest that is free: they have to agree."""

    def __init__(self, network: str) -> None:
        self.network = ip_network(network)
        self.first = int(self.network.network_address)

    @classmethod
    def reaches(cls, state: State, quick: bool) -> bool:
        """Whether it can be set up and measured within a minute (with `quick`, some seconds)."""
        return not quick or state.count != MILLION

    @abstractmethod
    def fill(self, state: State) -> None: ...

    @abstractmethod
    def turns(self) -> dict[str, Turn]:
        """By way."""

    def address(self, number: int) -> IPv4Address | IPv6Address:
        return (IPv4Address if self.network.version == 4 else IPv6Address)(self.first + number)


class Sdk(Contender):
    ways = ("sdk first-free", "sdk serial", "sdk hashed", "sdk first-free, owner")
    lowest = ("sdk first-free", "sdk first-free, owner")

    def __init__(self, network: str) -> None:
        super().__init__(network)
        self.pool = AddressPool(self.network)

    def fill(self, state: State) -> None:
        numbers = self.pool._numbers._used
        for number in in_use(self.network, state):
            numbers.add(number)
        for number in holes(self.network, state):
            numbers.remove(number)

    def turns(self) -> dict[str, Turn]:
        pool, counter = self.pool, itertools.count()

        def first_free() -> object:
            address = pool.allocate().ip
            pool.release(address)
            return address

        def serial() -> object:
            address = pool.allocate(strategy=Strategy.SERIAL).ip
            pool.release(address)
            return address

        def hashed() -> object:
            address = pool.allocate(strategy=Strategy.HASHED, seed=mac(next(counter))).ip
            pool.release(address)
            return address

        def owner() -> object:
            address = pool.allocate(mac(next(counter))).ip
            pool.release(address)
            return address

        return dict(zip(self.ways, (first_free, serial, hashed, owner), strict=True))


def mac(number: int) -> str:
    return f"02:42:{number >> 24 & 255:02x}:{number >> 16 & 255:02x}:{number >> 8 & 255:02x}:{number & 255:02x}"


class SdkOwned(Sdk):
    """For its memory: each address has an owner."""

    def fill(self, state: State) -> None:
        for index, number in enumerate(in_use(self.network, state)):
            self.pool.take(self.address(number), mac(index))


class Scan(Contender):
    ways = ("scan",)
    lowest = ways

    def __init__(self, network: str) -> None:
        super().__init__(network)
        self.used: set[IPv4Address | IPv6Address] = set()

    @classmethod
    def reaches(cls, state: State, quick: bool) -> bool:
        return super().reaches(state, quick) and not (quick and state.count > MILLION)

    def fill(self, state: State) -> None:
        self.used.update(map(self.address, in_use(self.network, state)))
        self.used.difference_update(map(self.address, holes(self.network, state)))

    def turns(self) -> dict[str, Turn]:
        network, used = self.network, self.used

        def scan() -> object:
            address = next(host for host in network.hosts() if host not in used)
            used.add(address)
            used.discard(address)
            return address

        return {self.ways[0]: scan}


class ScanOwned(Scan):
    """For its memory: a dictionary of owners instead of the set."""

    def fill(self, state: State) -> None:
        self.owners = {self.address(n): mac(index) for index, n in enumerate(in_use(self.network, state))}


class Netaddr(Contender):
    """With what both ways need."""

    def __init__(self, network: str) -> None:
        super().__init__(network)
        import netaddr  # type: ignore[import-untyped]  # noqa: PLC0415

        self.netaddr = netaddr
        self.whole = netaddr.IPNetwork(network)

    def ip(self, number: int) -> Any:
        return self.netaddr.IPAddress(self.first + number, self.network.version)

    def reserved(self) -> list[Any]:
        """Addresses that the SDK does not give out either."""
        return [self.ip(0), *([self.ip(self.network.num_addresses - 1)] if self.network.version == 4 else [])]

    def used_set(self, state: State) -> Any:
        if state.shape is Shape.HOLES:
            return self.netaddr.IPSet(self.whole) - self.netaddr.IPSet(map(self.ip, holes(self.network, state)))
        if state.shape is Shape.PIECE:
            pieces = [self.netaddr.IPRange(self.ip(0), self.ip(state.count))] if state.count else []
            return self.netaddr.IPSet([*self.reserved(), *pieces])
        return self.netaddr.IPSet([*self.reserved(), *map(self.ip, in_use(self.network, state))])


class NetaddrLowest(Netaddr):
    ways = ("netaddr, lowest",)
    lowest = ways

    def fill(self, state: State) -> None:
        self.used = self.used_set(state)

    def turns(self) -> dict[str, Turn]:
        used, first, version, make = self.used, self.first, self.network.version, self.netaddr.IPAddress

        def lowest() -> object:
            free = first
            for cidr in used.iter_cidrs():
                if cidr.first > free:
                    break
                free = cidr.last + 1
            address = make(free, version)
            used.add(address)
            used.remove(address)
            return address

        return {self.ways[0]: lowest}


class NetaddrAny(Netaddr):
    ways = ("netaddr, any",)

    @classmethod
    def reaches(cls, state: State, quick: bool) -> bool:
        return super().reaches(state, quick) and (state.shape is not Shape.RANDOM or state.count <= 10_000)

    def fill(self, state: State) -> None:
        self.free = self.netaddr.IPSet(self.whole) - self.used_set(state)

    def turns(self) -> dict[str, Turn]:
        free = self.free
        walk: Iterator[Any] = iter(())

        def any_of_them() -> object:
            nonlocal walk
            address = next(walk, None)
            if address is None:
                walk = iter(free.pop())
                address = next(walk)
            free.add(address)
            return address

        return {self.ways[0]: any_of_them}


class Ipalloc(Contender):
    ways = ("ipalloc",)
    lowest = ways

    def __init__(self, network: str) -> None:
        super().__init__(network)
        from ipalloc import HeadPolicy, Store  # type: ignore[import-untyped]  # noqa: PLC0415

        self.pool = Store.open("memory://").create_pool(name="bench", ranges=[network], policy=HeadPolicy())

    @classmethod
    def reaches(cls, state: State, quick: bool) -> bool:
        if state.shape is Shape.PIECE:
            return state.count <= (1000 if quick else 10_000)
        return state.count <= 1000 and not quick

    def fill(self, state: State) -> None:
        added = in_use(self.network, state)
        if state.shape is Shape.PIECE:
            self.pool.allocate_many([mac(number) for number in added])
        else:
            for index, number in enumerate(added):
                self.pool.reserve(str(self.address(number)), mac(index))

    def turns(self) -> dict[str, Turn]:
        pool = self.pool

        def head() -> object:
            address = pool.allocate("bench")
            pool.release("bench")
            return address

        return {self.ways[0]: head}


CONTENDERS: tuple[type[Contender], ...] = (Sdk, Scan, NetaddrLowest, NetaddrAny, Ipalloc)
WAYS = tuple((contender, way) for contender in CONTENDERS for way in contender.ways)


@dataclass(frozen=True)
class Holding:
    """Whose memory is measured: with how many addresses, in one piece and at random."""

    name: str
    contender: type[Contender]
    piece: int = MILLION
    random: int = MILLION
    quick: bool = False


HOLDINGS = (
    Holding("sdk", Sdk, quick=True),
    Holding("set (scan)", Scan, quick=True),
    Holding("sdk, owners", SdkOwned),
    Holding("dict, owners", ScanOwned),
    Holding("netaddr, lowest", NetaddrLowest, random=100_000),
    Holding("netaddr, any", NetaddrAny, random=10_000),
    Holding("ipalloc", Ipalloc, piece=10_000, random=0),
)


# --------------------------------------------------------------------------------------------------- the processes


@dataclass
class Sample:
    """Microseconds for one turn."""

    wall: float
    cpu: float
    address: str


def resident() -> float:
    """Megabytes."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(turn: Turn, turns: int) -> Sample:
    address: object = None
    cpu, wall = time.process_time_ns(), time.perf_counter_ns()
    for _ in range(turns):
        address = turn()
    wall, cpu = time.perf_counter_ns() - wall, time.process_time_ns() - cpu
    return Sample(wall / turns / 1e3, cpu / turns / 1e3, str(address))


def work(connection: Connection, kind: type[Contender], network: str, state: State) -> None:
    """Says when it is filled, and answers to `Worker.measure` until that hangs up."""
    contender, before = kind(network), resident()
    gc.disable()
    contender.fill(state)
    gc.enable()
    connection.send(resident() - before)
    turns = contender.turns()
    with contextlib.suppress(EOFError):
        while True:
            way, count = connection.recv()
            connection.send(measure(turns[way], count))


class Worker:
    """A contender in a process of its own, in one state."""

    def __init__(self, kind: type[Contender], network: str, state: State) -> None:
        self.kind = kind
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, kind, network, state))
        self.process.start()
        other.close()

    def filled(self) -> float:
        """When it is: the megabytes that this took."""
        grown: float = self.connection.recv()
        return grown

    def measure(self, way: str, turns: int) -> Sample:
        self.connection.send((way, turns))
        sample: Sample = self.connection.recv()
        return sample

    def close(self) -> None:
        self.connection.close()
        self.process.join()


# ----------------------------------------------------------------------------------------------------- the figures


@dataclass
class Figure:
    """The time of one contender in one state: microseconds per turn, one value per round."""

    scene: str
    state: str
    way: str
    address: str
    """The first that it gave out."""
    turns: int = 1
    """In a round."""
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        self.wall.append(sample.wall)
        self.cpu.append(sample.cpu)

    @property
    def median(self) -> float:
        return statistics.median(self.cpu)

    @property
    def median_wall(self) -> float:
        return statistics.median(self.wall)


@dataclass
class Held:
    """The memory of addresses, in megabytes."""

    name: str
    state: str
    count: int
    megabytes: float

    @property
    def of_a_million(self) -> float:
        return self.megabytes / self.count * MILLION


class Bench:
    def __init__(self, rounds: int, quick: bool) -> None:
        self.rounds = rounds
        self.quick = quick
        self.budget = 1 if quick else 4  # seconds for what is slow, in each state
        self.figures: dict[tuple[str, str, str], Figure] = {}
        self.held: dict[tuple[str, str], Held] = {}

    def run_scene(self, scene: Scene) -> None:
        say(f"{scene.title}: being filled")
        workers = {
            (state, kind): Worker(kind, scene.network, state)
            for state in scene.states
            for kind in CONTENDERS
            if kind.reaches(state, self.quick)
        }
        try:
            for (state, kind), worker in workers.items():
                megabytes = worker.filled()
                if state.shape is Shape.HOLES:
                    name = next(holding.name for holding in HOLDINGS if holding.contender is kind)
                    self.held[name, state.name] = Held(name, state.name, state.count, megabytes)
            figures = [
                (worker, self.calibrate(scene, state, worker, way))
                for (state, kind), worker in workers.items()
                for way in kind.ways
            ]
            self.agree(scene)
            for round_number in range(self.rounds):
                say(f"{scene.title}: round {round_number + 1} of {self.rounds}")
                for worker, figure in figures if round_number % 2 else reversed(figures):
                    if sum(figure.wall) * figure.turns < self.budget * 1e6:
                        figure.add(worker.measure(figure.way, figure.turns))
        finally:
            for worker in workers.values():
                worker.close()

    def calibrate(self, scene: Scene, state: State, worker: Worker, way: str) -> Figure:
        """Warms it up and finds how many turns fit."""
        say(f"{scene.title}: {state.name}: {way}")
        sample, turns = worker.measure(way, 1), 1
        figure = self.figures[scene.title, state.name, way] = Figure(scene.title, state.name, way, sample.address)
        if sample.wall > SLOW * 1e6:
            figure.add(sample)
        while sample.wall * turns < BATCH / 3 * 1e6:
            turns *= 2
            sample = worker.measure(way, turns)
        figure.turns = max(1, round(BATCH * 1e6 / sample.wall))
        return figure

    def agree(self, scene: Scene) -> None:
        for state in scene.states:
            ways = [way for kind in CONTENDERS for way in kind.lowest]
            found = {w: f.address for w in ways if (f := self.figures.get((scene.title, state.name, w))) is not None}
            if len(set(found.values())) > 1:
                raise RuntimeError(f"{scene.title}, {state.name}: which is the lowest free address? {found}")

    def run_memory(self) -> None:
        for name, network, shape in MEMORY:
            for holding in HOLDINGS:
                count = holding.piece if shape is Shape.PIECE else holding.random
                if count and (holding.quick or not self.quick):
                    say(f"memory: {name}: {holding.name}")
                    worker = Worker(holding.contender, network, State(name, count, shape))
                    self.held[holding.name, name] = Held(holding.name, name, count, worker.filled())
                    worker.close()


MEMORY = (
    ("in one piece", BIG, Shape.PIECE),
    ("at random, /8", BIG, Shape.RANDOM),
    ("at random, /64", HUGE, Shape.RANDOM),
)


def say(what: str) -> None:
    print(f"\r{what:70}", end="", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------ the tables


def number(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}" if value < 100 else f"{value:,.0f}".replace(",", " ")


def time_table(bench: Bench, scene: Scene) -> Iterator[str]:
    names = [state.name for state in scene.states]
    yield (
        f"{scene.title + ', µs':24}" + "".join(f"{name:>15}" for name in names) + ("   growth" if scene.growth else "")
    )
    for _, way in WAYS:
        figures = [bench.figures.get((scene.title, name, way)) for name in names]
        if not any(figures):
            continue
        line = f"{way:24}"
        for figure in figures:
            mark = "" if figure is None or len(figure.wall) >= bench.rounds else "*"
            line += f"{'-' if figure is None else number(figure.median) + mark:>15}"
        if scene.growth:
            line += f"   {growth(bench, scene, way)}"
        yield line.rstrip()


def growth(bench: Bench, scene: Scene, way: str) -> str:
    measured = grown(bench, scene, way)
    if len(measured) < 2:
        return "-"
    return f"x{number(measured[-1].median / measured[0].median)} to {measured[-1].state}"


def grown(bench: Bench, scene: Scene, way: str) -> list[Figure]:
    """From a thousand to the most that were measured."""
    figures = (bench.figures.get((scene.title, state.name, way)) for state in scene.states if state.count)
    return [figure for figure in figures if figure is not None]


def memory_table(bench: Bench) -> Iterator[str]:
    full = next(state.name for scene in SCENES for state in scene.states if state.shape is Shape.HOLES)
    yield f"{'a million, MB':24}" + "".join(f"{name:>15}" for name, _, _ in MEMORY) + f"{'/8 ' + full:>20}"
    for holding in HOLDINGS:
        line = f"{holding.name:24}"
        for name, _, _ in MEMORY:
            held = bench.held.get((holding.name, name))
            if held is None:
                line += f"{'-':>15}"
            else:
                line += f"{('' if held.count == MILLION else '~') + number(max(held.of_a_million, 0)):>15}"
        whole = bench.held.get((holding.name, full))
        yield line + f"{'-' if whole is None else number(max(whole.megabytes, 0)):>20}"


def verdicts(bench: Bench) -> Iterator[str]:
    least, most = GROWTH[0], GROWTH[-2] if bench.quick else GROWTH[-1]
    factor, what = max(
        (series[-1].median / series[0].median, f"{way}, {scene.title}")
        for scene in SCENES
        for way in Sdk.ways
        if scene.growth and (series := grown(bench, scene, way))
    )
    yield (
        f"sdk, from {number(least)} to {number(most)} in use: at most x{factor:.1f} ({what}); "
        f"logarithmic is x{math.log(most) / math.log(least):.1f}, linear x{number(most / least)}"
    )
    busy = sorted((f.median_wall / f.median, f"{f.way}, {f.scene}, {f.state}") for f in bench.figures.values())
    yield (
        f"wall time beside CPU time: median x{busy[len(busy) // 2][0]:.2f}, at most x{busy[-1][0]:.2f} ({busy[-1][1]})"
    )


def to_json(bench: Bench) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} processors",
        "rounds": bench.rounds,
        "quick": bench.quick,
        "times_us": [
            {**vars(figure), "median": figure.median, "median_wall": figure.median_wall}
            for figure in bench.figures.values()
        ],
        "memory_mb": [{**vars(held), "of_a_million": held.of_a_million} for held in bench.held.values()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="rounds; the median of them counts (7; with --quick 3)")
    parser.add_argument(
        "--quick", action="store_true", help="about a minute: 1e5 in use in the /64 at most, less of what is slow"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's wall and CPU time")
    arguments = parser.parse_args()
    bench = Bench(arguments.rounds or (3 if arguments.quick else 7), arguments.quick)
    for scene in SCENES:
        bench.run_scene(scene)
    bench.run_memory()
    say("")
    print("\r", end="", file=sys.stderr)

    print("one address given out and taken back, CPU time, median")
    for scene in SCENES:
        print("\n" + "\n".join(time_table(bench, scene)))
    print("\n" + "\n".join(memory_table(bench)))
    print("\n" + "\n".join(verdicts(bench)))
    if arguments.json:
        arguments.json.write_text(json.dumps(to_json(bench), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
