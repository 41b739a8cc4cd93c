"""`PoolIpamDriver`: what Docker's own IPAM does, with a memory and some choices more."""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path
from threading import Lock
from typing import Annotated

import msgspec
from msgspec import Meta

from netplugin_sdk.addresses import IPAddress, IPInterface, IPNetwork
from netplugin_sdk.database import Database
from netplugin_sdk.driver import IpamDriver
from netplugin_sdk.errors import InvalidRequest, NotFound
from netplugin_sdk.ipam.numbers import Strategy
from netplugin_sdk.ipam.pools import GLOBAL_DEFAULTS, LOCAL_DEFAULTS, AddressPool, AddressSpace, DefaultPool
from netplugin_sdk.messages import AddressRef, AddressRequest, Pool, PoolRequest
from netplugin_sdk.options import DriverOptions

_log = logging.getLogger("netplugin_sdk")

_ENDPOINT_NAME = "com.docker.network.endpoint.name"  # engines ≥ 29

_MIGRATIONS = (
    """
CREATE TABLE networks (
    key INTEGER PRIMARY KEY,
    space TEXT NOT NULL,
    network TEXT NOT NULL
);
CREATE TABLE pools (
    network INTEGER NOT NULL,
    part TEXT,
    options TEXT NOT NULL
);
CREATE TABLE addresses (
    network INTEGER NOT NULL,
    address BLOB NOT NULL,
    owner TEXT,
    lease TEXT,
    until REAL,
    PRIMARY KEY (network, address)
) WITHOUT ROWID;
""",
)


class Lease(enum.Enum):
    """Whom an address is kept for after its container is gone."""

    NONE = "none"
    MAC = "mac"
    """Who has the same MAC address, as with ``docker run --mac-address``."""
    NAME = "name"
    """Who has the same name (engines ≥ 29, which tell it)."""


class PoolOptions(DriverOptions):
    """``docker network create --ipam-opt KEY=VALUE``."""

    strategy: Strategy = Strategy.FIRST_FREE
    """Which of the free addresses is given out."""

    quarantine: Annotated[float, Meta(ge=0)] = 0.0
    """Seconds for which an address that was given back is given to others only if there is no other."""

    lease: Lease = Lease.NONE
    """Whom an address is kept for after its container is gone."""

    lease_time: Annotated[float, Meta(gt=0)] = 86400.0
    """Seconds for which it is kept."""


@dataclass
class _Network:
    """One that pools are parts of."""

    key: int | None
    """In the file."""
    addresses: AddressPool
    leases: dict[IPAddress, str] = field(default_factory=dict)
    """Of what is in use: whom it will be kept for."""


@dataclass(frozen=True)
class _Pool:
    """As the engine names it: a network, or a part of one."""

    space: str
    network: IPNetwork
    part: IPNetwork | None
    options: PoolOptions

    @property
    def id(self) -> str:
        return _pool_id(self.space, self.network, self.part)


def _pool_id(space: str, network: IPNetwork, part: IPNetwork | None) -> str:
    return "/".join([space, str(network), *([str(part)] if part else [])])


class PoolIpamDriver(IpamDriver):
    """Gives out addresses as Docker's own IPAM does, from the pools that are asked for or from default ones.

    What is given out is on disk, in the plugin's state folder: nothing is asked again after a restart of the engine.
    Without a folder the engine is told to ask again (``RequiresRequestReplay``), and is answered as before.

    Args:
        local, global_: where networks come from that nobody names, for hosts and for swarms; Docker's by default.
        occupied: says which networks not to choose then, such as `netplugin_sdk.linux.links.occupied`: those that the
            host has addresses in, or routes to.
        clock: seconds since 1970.

    The options of a network (``--ipam-opt``) are `PoolOptions`.
    """

    requires_mac_address = True

    def __init__(
        self,
        *,
        local: Sequence[DefaultPool] = LOCAL_DEFAULTS,
        global_: Sequence[DefaultPool] = GLOBAL_DEFAULTS,
        occupied: Callable[[], Iterable[IPNetwork]] = tuple,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._occupied = occupied
        self._clock = clock
        self._spaces = {
            self.local_address_space: AddressSpace(local, clock=clock),
            self.global_address_space: AddressSpace(global_, clock=clock),
        }
        self._networks: dict[tuple[str, IPNetwork], _Network] = {}
        self._pools: dict[str, _Pool] = {}
        self._asked_again: set[str] = set()
        """Pools that an engine may ask for once more, since it has started."""
        self._lock = Lock()
        self._database = Database(None, _MIGRATIONS)

    # --------------------------------------------------------------------------------------------------- the disk

    def open(self, folder: Path | None) -> None:
        """Read what is on disk."""
        self.requires_request_replay = folder is None
        self._database.close()
        self._database = database = Database(None if folder is None else folder / "ipam.db", _MIGRATIONS)
        keys: dict[int, _Network] = {}
        query = "SELECT key, space, networks.network, part, options FROM pools JOIN networks ON key = pools.network"
        for key, space, network, part, options in database.read(query):
            pool = _Pool(space, ip_network(network), _part(part), PoolOptions.parse(msgspec.json.decode(options)))
            addresses = self._spaces[space].add(pool.network, pool.part)
            keys[key] = self._networks.setdefault((space, pool.network), _Network(key, addresses))
            self._pools[pool.id] = pool
        for key, packed, owner, lease, until in database.read("SELECT * FROM addresses"):
            address, known = ip_address(packed), keys[key]
            if until is not None:
                known.addresses.hold(address, until, _kept_for(lease))
                continue
            known.addresses.take(address, owner)
            if lease is not None:
                known.leases[address] = lease

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def engine_starts(self) -> None:
        """An engine that was told to asks once more for each pool that it has."""
        if self.requires_request_replay:
            self._asked_again = set(self._pools)

    # ---------------------------------------------------------------------------------------------------- pools

    def request_pool(self, request: PoolRequest) -> Pool:
        """A pool that overlaps none that was given out; ``0.0.0.0/24`` is any /24 of the default ones."""
        options = PoolOptions.parse(request.options)
        with self._lock:
            space = self._spaces.get(request.address_space)
            if space is None:
                raise InvalidRequest(f"invalid address space {request.address_space!r}")
            network, part = request.pool, request.sub_pool
            if network is None or int(network.network_address) == 0:
                if part is not None:
                    raise InvalidRequest("invalid address subpool: there is no pool that it is a part of")
                network = self._choose(space, network, 6 if request.v6 else 4)
            elif self._is_asked_again(pool_id := _pool_id(request.address_space, network, part)):
                return Pool(pool_id, network)
            else:
                space.add(network, part)
            pool = _Pool(request.address_space, network, part, options)
            try:
                self._write_pool(pool, space.pools[network].addresses, request.options)
            except BaseException:
                space.remove(network, part)
                raise
            return Pool(pool.id, network)

    def _choose(self, space: AddressSpace, wanted: IPNetwork | None, version: int) -> IPNetwork:
        if wanted is None:
            return space.choose(version=version, beside=self._occupied())
        return space.choose(version=wanted.version, size=wanted.prefixlen or None, beside=self._occupied())

    def _is_asked_again(self, pool_id: str) -> bool:
        """Whether it is an engine's that has it, or that never heard that it has it: then nobody has an address."""
        pool = self._pools.get(pool_id)
        if pool is None:
            return False
        again = pool_id in self._asked_again or not len(self._network(pool).addresses)
        self._asked_again.discard(pool_id)
        return again

    def _write_pool(self, pool: _Pool, addresses: AddressPool, options: Mapping[str, str]) -> None:
        where = pool.space, pool.network
        known = self._networks.get(where)
        if known is None:
            statement = "INSERT INTO networks (space, network) VALUES (?, ?)"
            known = _Network(self._database.write(statement, (pool.space, str(pool.network))), addresses)
        values = known.key, None if pool.part is None else str(pool.part), msgspec.json.encode(dict(options)).decode()
        self._database.write("INSERT INTO pools VALUES (?, ?, ?)", values, synced=True)
        self._networks[where] = known
        self._pools[pool.id] = pool

    def release_pool(self, pool_id: str) -> None:
        """Take it back, with the addresses that are still out; what is unknown is taken back already."""
        with self._lock:
            pool = self._pools.get(pool_id)
            if pool is None:
                _log.warning("ReleasePool: pool %s is unknown, nothing to release", pool_id)
                return
            key, part = self._network(pool).key, None if pool.part is None else str(pool.part)
            self._database.write("DELETE FROM pools WHERE network = ? AND part IS ?", (key, part), synced=True)
            del self._pools[pool_id]
            if self._spaces[pool.space].remove(pool.network, pool.part):
                del self._networks[pool.space, pool.network]
                self._database.write("DELETE FROM addresses WHERE network = ?", (key,))
                self._database.write("DELETE FROM networks WHERE key = ?", (key,))

    def _network(self, pool: _Pool) -> _Network:
        return self._networks[pool.space, pool.network]

    # ------------------------------------------------------------------------------------------------- addresses

    def request_address(self, request: AddressRequest) -> IPInterface:
        """The address that is asked for, or one by the pool's strategy; who has one and asks again gets the same."""
        with self._lock:
            pool = self._pools.get(request.pool_id)
            if pool is None:
                raise NotFound(f"cannot find address pool for poolID:{request.pool_id}")
            network, addresses = self._network(pool), self._network(pool).addresses
            self._expire(network)
            owner, lease = _owner(request), None if request.is_gateway else _lease(request, pool.options)
            before = None if owner is None else addresses.of(owner)
            if before is not None and request.address in (None, before.ip):
                return before
            if request.address is not None:
                given = addresses.take(request.address, owner)
            elif (kept := addresses.of(_kept_for(lease) or "")) is not None and _is_in(kept, pool.part):
                given = addresses.take(kept.ip, owner)
            else:
                strategy = pool.options.strategy
                given = addresses.allocate(owner, within=pool.part, strategy=strategy, seed=lease)
            try:
                self._write_address(network, given.ip, owner, lease, None)
            except BaseException:
                addresses.release(given.ip)
                raise
            if lease is not None:
                network.leases[given.ip] = lease
            return given

    def release_address(self, address: AddressRef) -> None:
        """Take it back, and keep it for who had it, or from others, as the pool's options say."""
        with self._lock:
            pool = self._pools.get(address.pool_id)
            if pool is None or address.address not in (network := self._network(pool)).addresses:
                _log.warning("ReleaseAddress: %s is not given out, nothing to release", address.address)
                return
            lease = network.leases.get(address.address)
            hold = pool.options.quarantine if lease is None else pool.options.lease_time
            if hold:
                until = self._clock() + hold
                self._write_address(network, address.address, None, lease, until)
                network.addresses.hold(address.address, until, _kept_for(lease))
            else:
                self._forget_address(network, address.address)
                network.addresses.release(address.address)
            network.leases.pop(address.address, None)

    def _expire(self, network: _Network) -> None:
        for address in network.addresses.expire():
            self._forget_address(network, address)

    def _write_address(
        self, network: _Network, address: IPAddress, owner: str | None, lease: str | None, until: float | None
    ) -> None:
        values = network.key, address.packed, owner, lease, until
        self._database.write("INSERT OR REPLACE INTO addresses VALUES (?, ?, ?, ?, ?)", values)

    def _forget_address(self, network: _Network, address: IPAddress) -> None:
        values = network.key, address.packed
        self._database.write("DELETE FROM addresses WHERE network = ? AND address = ?", values)


def _owner(request: AddressRequest) -> str | None:
    """Who has the address while it is in use."""
    if request.is_gateway:
        return f"gateway {request.pool_id}"
    return None if request.mac_address is None else str(request.mac_address)


def _lease(request: AddressRequest, options: PoolOptions) -> str | None:
    """Whom it is kept for afterwards."""
    match options.lease:
        case Lease.MAC:
            return None if request.mac_address is None else str(request.mac_address)
        case Lease.NAME:
            return request.options.get(_ENDPOINT_NAME)
        case Lease.NONE:
            return None


def _kept_for(lease: str | None) -> str | None:
    """The owner of what is kept, so that it is nobody's who has an address."""
    return None if lease is None else f"lease {lease}"


def _part(text: str | None) -> IPNetwork | None:
    return None if text is None else ip_network(text)


def _is_in(kept: IPInterface, part: IPNetwork | None) -> bool:
    return part is None or kept.ip in part
