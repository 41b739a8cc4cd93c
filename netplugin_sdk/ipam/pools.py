"""Address pools: addresses out of a network, networks out of an address space. Pure: no disk, no kernel."""

from __future__ import annotations

import hashlib
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv6Interface, IPv6Network, ip_network

from netplugin_sdk.errors import Conflict, InvalidRequest, NotFound, Unavailable
from netplugin_sdk.ipam.number_pool import NumberPool, Strategy
from netplugin_sdk.values import IPAddress, IPInterface, IPNetwork


class AddressPool:
    """The addresses of one network, each given to one owner at a time.

    Never given out: an IPv4 network's own address and its broadcast address, except in a /31 (RFC 3021) and a /32; an
    IPv6 network's own address, the anycast address of its routers (RFC 4291), except in a /127 (RFC 6164) and a /128.

    The texts of its errors are those of Docker's own IPAM.
    """

    def __init__(self, network: IPNetwork, *, clock: Callable[[], float] = time.time) -> None:
        self.network = network
        self._numbers = NumberPool(int(network.network_address), int(network.broadcast_address), clock=clock)
        self._reserved = 0
        if network.max_prefixlen - network.prefixlen > 1:
            self._reserve(network.network_address)
            if network.version == 4:
                self._reserve(network.broadcast_address)

    def _reserve(self, address: IPAddress) -> None:
        self._numbers.take(int(address))
        self._reserved += 1

    def __len__(self) -> int:
        """How many addresses are in use."""
        return len(self._numbers) - self._reserved

    def __contains__(self, address: IPAddress) -> bool:
        """Whether it is in use."""
        return address in self.network and not self._is_reserved(address) and int(address) in self._numbers

    def __iter__(self) -> Iterator[IPAddress]:
        """Those that are in use, in ascending order."""
        found = (self.interface(number).ip for number in self._numbers)
        return (address for address in found if not self._is_reserved(address))

    def of(self, owner: str) -> IPInterface | None:
        """The address that the owner has, or that is held for it."""
        number = self._numbers.of(owner)
        return None if number is None else self.interface(number)

    def owner(self, address: IPAddress) -> str | None:
        """Its owner, or the one that it is held for."""
        return self._numbers.owner(int(address))

    def allocate(
        self,
        owner: str | None = None,
        *,
        within: IPNetwork | None = None,
        strategy: Strategy = Strategy.FIRST_FREE,
        seed: str | None = None,
    ) -> IPInterface:
        """An address for this owner, out of the part `within`, with the network's prefix length.

        `seed` is what `Strategy.HASHED` hashes; else the owner. An owner gets the same again.

        Raises `Unavailable` if there is none.
        """
        part = within or self.network
        first, last = int(part.network_address), int(part.broadcast_address)
        try:
            return self.interface(self._numbers.allocate(owner, strategy=strategy, seed=seed, first=first, last=last))
        except Unavailable:
            raise Unavailable("no available addresses on this pool") from None

    def take(self, address: IPAddress, owner: str | None = None) -> IPInterface:
        """Give this address to this owner.

        Raises `InvalidRequest` if it is not in the network, `Conflict` if somebody else has it.
        """
        if address not in self.network:
            raise InvalidRequest("requested address is out of range")
        try:
            self._numbers.take(int(address), owner)
        except Conflict:
            raise Conflict("Address already in use") from None
        return self.interface(int(address))

    def release(self, address: IPAddress) -> bool:
        """Take it back; a held address stays held. Returns whether it was in use."""
        if address not in self.network or self._is_reserved(address):
            return False
        return self._numbers.release(int(address))

    def hold(self, address: IPAddress, until: float, owner: str | None = None) -> None:
        """Hold it until that time, and for this owner. Raises `Conflict` if it is one that is never given out."""
        if self._is_reserved(address):
            raise Conflict("Address already in use")
        self._numbers.hold(int(address), until, owner)

    def expire(self) -> list[IPAddress]:
        """Free what was held until now."""
        return [self.interface(number).ip for number in self._numbers.expire()]

    def _is_reserved(self, address: IPAddress) -> bool:
        network = self.network
        return self._reserved > 0 and (
            address == network.network_address or (network.version == 4 and address == network.broadcast_address)
        )

    def interface(self, address: IPAddress | int) -> IPInterface:
        """The address with the network's prefix length."""
        kind = IPv4Interface if self.network.version == 4 else IPv6Interface
        return kind((int(address), self.network.prefixlen))


@dataclass(frozen=True)
class DefaultPool:
    """A network that others are cut from: ``172.17.0.0/16 size 20`` is sixteen of them, a /20 each."""

    base: IPNetwork
    size: int
    """Their prefix length."""

    def __post_init__(self) -> None:
        if not self.base.prefixlen <= self.size <= self.base.max_prefixlen:
            raise ValueError(f"{self.base} has no parts of size {self.size}")

    @classmethod
    def parse(cls, text: str) -> DefaultPool:
        """Of ``NETWORK size LENGTH``, or ``NETWORK`` alone for a single one. Raises ValueError."""
        base, _, size = text.partition(" size ")
        network = ip_network(base.strip())
        return cls(network, int(size) if size else network.prefixlen)


LOCAL_DEFAULTS = tuple(
    map(
        DefaultPool.parse,
        (
            "172.17.0.0/16",
            "172.18.0.0/16",
            "172.19.0.0/16",
            "172.20.0.0/14 size 16",
            "172.24.0.0/14 size 16",
            "172.28.0.0/14 size 16",
            "192.168.0.0/16 size 20",
        ),
    )
)
"""Docker's, for networks of this host (moby ``ipamutils``)."""

GLOBAL_DEFAULTS = (DefaultPool.parse("10.0.0.0/8 size 24"),)
"""Docker's, for networks of a swarm."""


def unique_local(seed: str) -> DefaultPool:
    """A unique local IPv6 network (RFC 4193), cut into /64s; its global ID follows from the seed, such as a machine's.

    Engines from 27 on have one, too.
    """
    global_id = hashlib.sha256(seed.encode()).digest()[:5]
    return DefaultPool(IPv6Network((b"\xfd" + global_id + bytes(10), 48)), 64)


@dataclass
class Pool:
    """A network in an address space, with the parts of it that were asked for."""

    addresses: AddressPool
    parts: set[IPNetwork | None] = field(default_factory=set)
    """None is the complete pool."""


class AddressSpace:
    """Networks that do not overlap.

    Several parts of one network (``--ip-range``) may be asked for, as long as each is asked for once; they share its
    addresses.
    """

    def __init__(self, defaults: Sequence[DefaultPool] = (), *, clock: Callable[[], float] = time.time) -> None:
        self._defaults = defaults
        self._clock = clock
        self.pools: dict[IPNetwork, Pool] = {}
        self._taken: dict[int, list[tuple[int, int]]] = {4: [], 6: []}
        """By IP version: first and last address of each network, in order."""

    def add(self, network: IPNetwork, part: IPNetwork | None = None) -> AddressPool:
        """Take a network, or a part of one.

        Raises:
            Conflict: it, or this part of it, is taken, or it overlaps another one.
            InvalidRequest: the part is not in the network.
        """
        if part is not None and (part.version != network.version or not _is_in(part, network)):
            raise InvalidRequest(f"invalid address subpool: {part} is not in {network}")
        pool = self.pools.get(network)
        if pool is None:
            if self._overlaps(network):
                raise Conflict("Pool overlaps with other one on this address space")
            pool = self._insert(network)
        elif part is None or part in pool.parts:
            raise Conflict("Pool overlaps with other one on this address space")
        pool.parts.add(part)
        return pool.addresses

    def choose(self, *, version: int = 4, size: int | None = None, beside: Iterable[IPNetwork] = ()) -> IPNetwork:
        """Take the first of the default pools that is free and overlaps none of `beside`, with this prefix length.

        Raises `Unavailable` if there is none.
        """
        defaults = [default for default in self._defaults if default.base.version == version]
        if size is not None:
            defaults = [DefaultPool(d.base, size) for d in defaults if d.base.prefixlen <= size <= d.base.max_prefixlen]
        if not defaults:
            raise Unavailable(f"there are no default IPv{version} pools" + (f" for a /{size}" if size else ""))
        avoided = _merged([*self._taken[version], *(_ends(n) for n in beside if n.version == version)])
        for default in defaults:
            if (found := _first_between(default, avoided)) is not None:
                self._insert(found).parts.add(None)
                return found
        raise Unavailable("all predefined address pools have been fully subnetted")

    def remove(self, network: IPNetwork, part: IPNetwork | None = None) -> bool:
        """Give it back; with the last of its parts the network goes. Whether it is gone.

        Raises `NotFound` if it is not taken.
        """
        pool = self.pools.get(network)
        if pool is None or part not in pool.parts:
            raise NotFound("address space does not contain specified address pool")
        pool.parts.discard(part)
        if pool.parts:
            return False
        del self.pools[network]
        self._taken[network.version].remove(_ends(network))
        return True

    def _insert(self, network: IPNetwork) -> Pool:
        taken, ends = self._taken[network.version], _ends(network)
        taken.insert(bisect_left(taken, ends), ends)
        pool = self.pools[network] = Pool(AddressPool(network, clock=self._clock))
        return pool

    def _overlaps(self, network: IPNetwork) -> bool:
        taken, (first, last) = self._taken[network.version], _ends(network)
        behind = bisect_left(taken, (last + 1,))
        return behind > 0 and taken[behind - 1][1] >= first


def _is_in(part: IPNetwork, network: IPNetwork) -> bool:
    (first, last), (low, high) = _ends(part), _ends(network)
    return low <= first and last <= high


def _ends(network: IPNetwork) -> tuple[int, int]:
    return int(network.network_address), int(network.broadcast_address)


def _merged(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(intervals):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged


def _first_between(default: DefaultPool, avoided: list[tuple[int, int]]) -> IPNetwork | None:
    """The first part that overlaps none of these intervals, which are sorted and apart."""
    base_first, base_last = _ends(default.base)
    length = 1 << (default.base.max_prefixlen - default.size)
    first, position = base_first, bisect_left(avoided, (base_first, base_first))
    position = max(position - 1, 0)
    while first + length - 1 <= base_last:
        while position < len(avoided) and avoided[position][1] < first:
            position += 1
        if position == len(avoided) or avoided[position][0] > first + length - 1:
            return type(default.base)((first, default.size))
        first = -(-(avoided[position][1] + 1 - base_first) // length) * length + base_first
    return None
