"""`PoolIpamDriver`: like Docker's own IPAM driver, with a memory and some more choices."""

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

from netplugin_sdk.database import Database
from netplugin_sdk.driver import IpamDriver
from netplugin_sdk.errors import InvalidRequest, NotFound
from netplugin_sdk.ipam.number_pool import Strategy
from netplugin_sdk.ipam.pools import (
    GLOBAL_DEFAULTS,
    LOCAL_DEFAULTS,
    AddressPool,
    AddressSpace,
    DefaultPool,
    unique_local,
)
from netplugin_sdk.protocol.messages import ENDPOINT_NAME, AddressRef, AddressRequest, Pool, PoolRequest
from netplugin_sdk.protocol.options import DriverOptions
from netplugin_sdk.values import IPAddress, IPInterface, IPNetwork, UsedPool

_log = logging.getLogger("netplugin_sdk")

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
    options TEXT NOT NULL,
    engine TEXT
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
_LEFTOVERS = (  # of a release, or a request, that was killed
    "DELETE FROM networks WHERE key NOT IN (SELECT network FROM pools)",
    "DELETE FROM addresses WHERE network NOT IN (SELECT key FROM networks)",
)
_MACHINE_IDS = Path("/etc/machine-id"), Path("/proc/sys/kernel/random/boot_id")


class Lease(enum.Enum):
    """For which container an address is kept after its own is gone."""

    NONE = "none"
    MAC = "mac"
    """The one with the same MAC address, as with ``docker run --mac-address``."""
    NAME = "name"
    """The one with the same name (engines ≥ 29, which tell it)."""


class PoolOptions(DriverOptions):
    """``docker network create --ipam-opt KEY=VALUE``."""

    strategy: Strategy = Strategy.FIRST_FREE
    """Which of the free addresses is given out."""

    quarantine: Annotated[float, Meta(ge=0)] = 0.0
    """Seconds for which an address that was given back is given to others only if there is no other."""

    lease: Lease = Lease.NONE
    """For which container an address is kept after its own is gone."""

    lease_time: Annotated[float, Meta(gt=0)] = 86400.0
    """Seconds for which it is kept."""


@dataclass
class _Network:
    """One that pools are parts of."""

    key: int | None
    """In the file."""
    addresses: AddressPool
    leases: dict[IPAddress, str] = field(default_factory=dict)
    """Of an address in use: for which container it will be kept."""
    asked_again: set[IPAddress] = field(default_factory=set)
    """The pools and addresses that an engine may request again, since it has started."""


@dataclass
class _Pool:
    """As the engine names it: a network, or a part of one."""

    space: str
    network: IPNetwork
    part: IPNetwork | None
    options: PoolOptions
    engine: str | None = None
    """That has listed it."""

    @property
    def id(self) -> str:
        return _pool_id(self.space, self.network, self.part)

    @property
    def part_text(self) -> str | None:
        """In the file."""
        return None if self.part is None else str(self.part)


def _pool_id(space: str, network: IPNetwork, part: IPNetwork | None) -> str:
    return "/".join([space, str(network), *([str(part)] if part else [])])


class PoolIpamDriver(IpamDriver):
    """Gives out addresses as Docker's own IPAM does, from the pools that are asked for or from default ones.

    What is given out is on disk, in the plugin's state folder: nothing is asked again after a restart of the engine.
    Without a folder the engine is told to ask again (``RequiresRequestReplay``), and is answered as before.

    What the engine gave back while the plugin was down, or was given without hearing of it, is found and taken back
    (`engine_has`).

    Args:
        local, global_: where networks come from that nobody names, for hosts and for swarms; by default Docker's, and a
            unique local IPv6 network that follows from the machine's id.
        occupied: says which networks not to choose then, such as `netplugin_sdk.linux.links.occupied`: those that the
            host has addresses in, or routes to.
        clock: seconds since 1970.
        missing_grace: seconds that an engine must not have a new pool, or an address, before it is taken back.

    The options of a network (``--ipam-opt``) are `PoolOptions`.
    """

    requires_mac_address = True

    def __init__(
        self,
        *,
        local: Sequence[DefaultPool] | None = None,
        global_: Sequence[DefaultPool] = GLOBAL_DEFAULTS,
        occupied: Callable[[], Iterable[IPNetwork]] = tuple,
        clock: Callable[[], float] = time.time,
        missing_grace: float = 60.0,
    ) -> None:
        self._occupied = occupied
        self._missing_grace = missing_grace
        self._clock = clock
        self._spaces = {
            self.local_address_space: AddressSpace(_local_defaults() if local is None else local, clock=clock),
            self.global_address_space: AddressSpace(global_, clock=clock),
        }
        self._networks: dict[tuple[str, IPNetwork], _Network] = {}
        self._pools: dict[str, _Pool] = {}
        self._asked_again: set[str] = set()
        """Pools that may be asked for once more: by an engine that has started, or since nobody may know of them."""
        self._missing: dict[tuple[str, IPAddress | None], float] = {}
        """Pools, and addresses of pools, that an engine does not have: since when."""
        self._lock = Lock()
        self._database = Database(None, _MIGRATIONS)

    # --------------------------------------------------------------------------------------------------- the disk

    def open(self, folder: Path | None) -> None:
        """Read what is on disk."""
        self.requires_request_replay = folder is None
        self._database.close()
        self._database = database = Database(None if folder is None else folder / "ipam.db", _MIGRATIONS)
        for statement in _LEFTOVERS:
            database.write(statement, ())
        keys: dict[int, _Network] = {}
        columns = "key, space, networks.network, part, options, engine"
        query = f"SELECT {columns} FROM pools JOIN networks ON networks.key = pools.network"
        for key, space, network, part, options, engine in database.read(query):
            known_options = PoolOptions.parse(msgspec.json.decode(options))
            pool = _Pool(space, ip_network(network), _part(part), known_options, engine)
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
        # The answer may have been lost with the plugin that gave it.
        unheard = (p for p in self._pools.values() if p.engine is None and not len(self._network(p).addresses))
        self._asked_again = {pool.id for pool in unheard}

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def engine_starts(self) -> None:
        """An engine that was told to asks once more for all that it has."""
        if self.requires_request_replay:
            with self._lock:
                self._asked_again = set(self._pools)
                for network in self._networks.values():
                    network.asked_again = set(network.addresses)

    def engine_has(self, engine: str, pools: Sequence[UsedPool]) -> bool:
        """Take back the pools of networks that are gone, and the addresses of endpoints that are.

        Only this host's: of a swarm's networks an engine lists those that it uses.
        """
        used: dict[IPNetwork, set[IPAddress]] = {}
        for listed in pools:
            used.setdefault(listed.network, set()).update(listed.addresses)
        parts = {(listed.network, listed.part) for listed in pools}
        with self._lock:
            ours = [pool for pool in self._pools.values() if pool.space == self.local_address_space]
            known = [pool for pool in ours if (pool.network, pool.part) in parts]
            unknown = [pool for pool in ours if (pool.network, pool.part) not in parts]
            for pool in known:
                self._remember(pool, engine)
            for pool in unknown:
                if pool.engine == engine:  # it had it, and a network appears only once
                    self._take_back(pool, None)
            # Another engine may listen there than the one that uses this plugin.
            unheard = [pool for pool in unknown if known and pool.engine is None]
            missing: list[tuple[_Pool, IPAddress | None]] = [(pool, None) for pool in unheard]
            for pool in {pool.network: pool for pool in known}.values():
                addresses = self._network(pool).addresses
                strays = (a for a in addresses if a not in used[pool.network] and _is_endpoint(addresses.owner(a)))
                missing += [(pool, address) for address in strays]
            now = self._clock()
            self._missing = {(p.id, address): self._missing.get((p.id, address), now) for p, address in missing}
            for pool, address in missing:
                if now - self._missing[pool.id, address] >= self._missing_grace:
                    self._take_back(pool, address)
            return bool(self._missing)

    def _remember(self, pool: _Pool, engine: str) -> None:
        self._asked_again.discard(pool.id)
        if pool.engine != engine:
            where = self._network(pool).key, pool.part_text
            self._database.write("UPDATE pools SET engine = ? WHERE network = ? AND part IS ?", (engine, *where))
            pool.engine = engine

    def _take_back(self, pool: _Pool, address: IPAddress | None) -> None:
        if address is None:
            _log.warning("pool %s is unknown to Docker: taking it back", pool.id)
            self._drop_pool(pool)
        else:
            _log.warning("address %s of pool %s is unknown to Docker: taking it back", address, pool.id)
            self._drop_address(pool, address)

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
            else:
                pool_id = _pool_id(request.address_space, network, part)
                if pool_id in self._asked_again:
                    if self.requires_request_replay:
                        self._asked_again.discard(pool_id)
                        return Pool(pool_id, network)
                    self._drop_pool(self._pools[pool_id])  # it is asked for again, maybe with other options
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

    def _write_pool(self, pool: _Pool, addresses: AddressPool, options: Mapping[str, str]) -> None:
        where = pool.space, pool.network
        known = self._networks.get(where)
        if known is None:
            statement = "INSERT INTO networks (space, network) VALUES (?, ?)"
            known = _Network(self._database.write(statement, (pool.space, str(pool.network))), addresses)
        values = known.key, pool.part_text, msgspec.json.encode(dict(options)).decode()
        statement = "INSERT INTO pools (network, part, options) VALUES (?, ?, ?)"
        self._database.write(statement, values, synced=True)
        self._networks[where] = known
        self._pools[pool.id] = pool

    def release_pool(self, pool_id: str) -> None:
        """Take it back, with the addresses that are still out; an unknown pool has been taken back already."""
        with self._lock:
            pool = self._pools.get(pool_id)
            if pool is None:
                _log.warning("ReleasePool: pool %s is unknown, nothing to release", pool_id)
                return
            self._drop_pool(pool)

    def _drop_pool(self, pool: _Pool) -> None:
        key = self._network(pool).key
        self._database.write("DELETE FROM pools WHERE network = ? AND part IS ?", (key, pool.part_text), synced=True)
        del self._pools[pool.id]
        self._asked_again.discard(pool.id)
        self._missing.pop((pool.id, None), None)
        if self._spaces[pool.space].remove(pool.network, pool.part):
            del self._networks[pool.space, pool.network]
            self._database.write("DELETE FROM addresses WHERE network = ?", (key,))
            self._database.write("DELETE FROM networks WHERE key = ?", (key,))

    def _network(self, pool: _Pool) -> _Network:
        return self._networks[pool.space, pool.network]

    # ------------------------------------------------------------------------------------------------- addresses

    def request_address(self, request: AddressRequest) -> IPInterface:
        """The address that is asked for, or one by the pool's strategy; an owner that asks again gets the same."""
        with self._lock:
            pool = self._pools.get(request.pool_id)
            if pool is None:
                raise NotFound(f"cannot find address pool for poolID:{request.pool_id}")
            network, addresses = self._network(pool), self._network(pool).addresses
            self._expire(network)
            self._asked_again.discard(pool.id)
            owner, lease = _owner(request), None if request.is_gateway else _lease(request, pool.options)
            before = None if owner is None else addresses.of(owner)
            if before is not None and request.address in (None, before.ip):
                self._missing.pop((pool.id, before.ip), None)
                return before
            if request.address in network.asked_again:
                network.asked_again.discard(request.address)
                return addresses.interface(request.address)
            if request.address is not None:
                given = addresses.take(request.address, owner)
            elif (kept := addresses.of(_kept_for(lease) or "")) is not None and _is_in(kept, pool.part):
                given = addresses.take(kept.ip, owner)
            else:
                strategy = Strategy.FIRST_FREE if request.is_gateway else pool.options.strategy
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
        """Take it back, and keep it for its last owner, or from others, as the pool's options say."""
        with self._lock:
            pool = self._pools.get(address.pool_id)
            if pool is None or address.address not in self._network(pool).addresses:
                _log.warning("ReleaseAddress: %s is not given out, nothing to release", address.address)
                return
            self._drop_address(pool, address.address)

    def _drop_address(self, pool: _Pool, address: IPAddress) -> None:
        network = self._network(pool)
        lease, hold = network.leases.get(address), pool.options.quarantine
        if lease is not None:
            hold = pool.options.lease_time
        elif network.addresses.owner(address) == _gateway(pool.id):
            hold = 0.0  # the network ends
        if hold:
            until = self._clock() + hold
            self._write_address(network, address, None, lease, until)
            network.addresses.hold(address, until, _kept_for(lease))
        else:
            self._forget_address(network, address)
            network.addresses.release(address)
        network.leases.pop(address, None)
        network.asked_again.discard(address)
        self._missing.pop((pool.id, address), None)

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
    """The owner of an address in use: a gateway, an endpoint, or none in particular."""
    if request.is_gateway:
        return _gateway(request.pool_id)
    return None if request.mac_address is None else str(request.mac_address)


def _gateway(pool_id: str) -> str:
    return f"gateway {pool_id}"


def _is_endpoint(owner: str | None) -> bool:
    return owner is not None and not owner.startswith("gateway ")


def _lease(request: AddressRequest, options: PoolOptions) -> str | None:
    """The owner that it is kept for afterwards."""
    match options.lease:
        case Lease.MAC:
            return None if request.mac_address is None else str(request.mac_address)
        case Lease.NAME:
            return request.options.get(ENDPOINT_NAME)
        case Lease.NONE:
            return None


def _kept_for(lease: str | None) -> str | None:
    """The owner of a kept address: not one that has an address."""
    return None if lease is None else f"lease {lease}"


def _local_defaults() -> tuple[DefaultPool, ...]:
    machine = next(file for file in _MACHINE_IDS if file.exists()).read_text().strip()
    return (*LOCAL_DEFAULTS, unique_local(machine))


def _part(text: str | None) -> IPNetwork | None:
    return None if text is None else ip_network(text)


def _is_in(kept: IPInterface, part: IPNetwork | None) -> bool:
    return part is None or kept.ip in part
