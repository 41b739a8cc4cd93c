"""Networks of a controller (moby ``daemon/libnetwork/network.go``)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from ipaddress import ip_interface, ip_network
from typing import Any

import msgspec

from netplugin_sdk.cnm.endpoint import Endpoint
from netplugin_sdk.cnm.records import NO_ADDRESSES, Host, Pool, Record, Subnet, attempt, explained, read
from netplugin_sdk.errors import Conflict, InvalidRequest
from netplugin_sdk.linux.namespaces import DEFAULT
from netplugin_sdk.protocol import messages
from netplugin_sdk.values import IPAddress, IPInterface, IPNetwork, MacAddress


class _Saved(msgspec.Struct, kw_only=True):
    """Of a network, on disk."""

    name: str
    internal: bool
    ipv6: bool
    options: dict[str, str]
    pools: list[Pool]
    ipam_options: dict[str, str]
    driver: str
    ipam: str


class Network(Record):
    """A network of a controller."""

    def __init__(
        self,
        host: Host,
        name: str,
        driver: str,
        ipam: str,
        *,
        ipv6: bool = False,
        internal: bool = False,
        options: Mapping[str, str] = {},
        id_: str | None = None,
        deleted: Callable[[Network], None] = lambda _network: None,
    ) -> None:
        super().__init__(name, id_)
        self.internal, self.ipv6 = internal, ipv6
        self.endpoints: dict[str, Endpoint] = {}
        """By name."""
        self.host = host
        self._deleted = deleted
        self._drivers = driver, ipam
        self.driver = host.registry.network_driver(driver)
        self.ipam = None if ipam == NO_ADDRESSES else host.registry.ipam_driver(ipam)
        self._options, self._ipam_options = dict(options), dict[str, str]()
        self.pools: list[Pool] = []
        self.lock = threading.Lock()

    @classmethod
    def restored(cls, host: Host, id_: str, data: bytes, deleted: Callable[[Network], None]) -> Network:
        """The network that was saved."""
        kept = read(_Saved, data)
        network = cls(
            host,
            kept.name,
            kept.driver,
            kept.ipam,
            ipv6=kept.ipv6,
            internal=kept.internal,
            options=kept.options,
            id_=id_,
            deleted=deleted,
        )
        network.pools, network._ipam_options = kept.pools, kept.ipam_options
        return network

    def saved(self) -> _Saved:
        """The part of it that is on disk."""
        driver, ipam = self._drivers
        return _Saved(
            name=self.name,
            internal=self.internal,
            ipv6=self.ipv6,
            options=self._options,
            pools=self.pools,
            ipam_options=self._ipam_options,
            driver=driver,
            ipam=ipam,
        )

    @property
    def subnets(self) -> tuple[IPNetwork, ...]:
        """Its subnets, IPv4 before IPv6."""
        return tuple(pool.network for pool in self.pools)

    @property
    def gateways(self) -> tuple[IPInterface, ...]:
        """Their gateways' addresses."""
        return tuple(pool.gateway for pool in self.pools if pool.gateway is not None)

    # ---------------------------------------------------------------------------------------- create and delete

    def create(self, subnets: Sequence[Subnet], ipam_options: Mapping[str, str]) -> None:
        """Ask the drivers to make it. Raises `RemoteError`: one refused; nothing is left of it."""
        options: dict[str, Any] = {messages.ENABLE_IPV6: self.ipv6, messages.GENERIC: self._options}
        if self.host.engine.checks_gateways:
            options[messages.ENABLE_IPV4] = True
        if self.internal:
            options[messages.INTERNAL] = True
        self._ipam_options = dict(ipam_options)
        skips = self._skipped_gateways(options)
        wanted = [*subnets]
        for version in (4, 6) if self.ipv6 else (4,):
            if not any(subnet.version == version for subnet in wanted):
                wanted.append(Subnet(version=version))
        with ExitStack() as undo:
            for subnet in sorted(wanted, key=lambda subnet: subnet.version):
                self.pools.append(self._allocate(subnet, skips, undo))
            data = {4: list[dict[str, Any]](), 6: list[dict[str, Any]]()}
            for pool in self.pools:
                data[pool.version].append(pool.to_wire(self._space))
            if self._is_global:
                options[messages.GENERIC] = self._allocate_numbers([*data[4], *data[6]], undo)
            request = {"NetworkID": self.id, "Options": options, "IPv4Data": data[4], "IPv6Data": data[6]}
            self.driver.call("CreateNetwork", request)
            undo.pop_all()

    @property
    def _is_global(self) -> bool:
        return bool(self.driver.capabilities["Scope"] == "global")

    def _allocate_numbers(self, data: Sequence[Mapping[str, Any]], undo: ExitStack) -> dict[str, str]:
        """As the manager of a swarm of this one host: the driver's answer replaces the options (docs/swarm.md)."""
        request = {"NetworkID": self.id, "Options": self._options, "IPv4Data": data, "IPv6Data": None}
        answer = self.driver.call("AllocateNetwork", request)
        undo.callback(attempt, self.driver, "FreeNetwork", {"NetworkID": self.id})
        return dict(answer.get("Options") or {})

    def _skipped_gateways(self, options: Mapping[str, Any]) -> frozenset[int]:
        if not (self.host.engine.checks_gateways and self.driver.capabilities.get("GwAllocChecker")):
            return frozenset()
        answer = self.driver.call("GwAllocCheck", {"Options": options})
        return frozenset(version for version in (4, 6) if answer.get(f"SkipIPv{version}"))

    @property
    def _space(self) -> str:
        if self.ipam is None:
            return NO_ADDRESSES
        scope = str(self.driver.capabilities["Scope"]).capitalize()
        return str(self.ipam.capabilities[f"{scope}DefaultAddressSpace"])

    def _allocate(self, subnet: Subnet, skips: frozenset[int], undo: ExitStack) -> Pool:
        if self.ipam is None:
            return Pool("", DEFAULT[subnet.version], subnet.version, subnet)
        answer = self._request_pool(subnet, subnet.network)
        pool = Pool(answer["PoolID"], ip_network(answer["Pool"]), subnet.version, subnet)
        undo.callback(attempt, self.ipam, "ReleasePool", {"PoolID": pool.id})
        if subnet.gateway is None and messages.GATEWAY["RequestAddressType"] in (answer.get("Data") or {}):
            pool.gateway = ip_interface(answer["Data"][messages.GATEWAY["RequestAddressType"]])
        elif subnet.gateway is not None or subnet.version not in skips:
            with explained(f"failed to allocate gateway ({subnet.gateway or ''})"):
                pool.gateway = self.request_address(pool, subnet.gateway, messages.GATEWAY)
        for name, address in subnet.auxiliary.items():
            if address not in pool.network:
                raise InvalidRequest(
                    f"auxiliary address: ({name}:{address}) must belong to the master pool: {pool.network}"
                )
            with explained(f"failed to allocate secondary ip address ({name}:{address})"):
                pool.auxiliary[name] = self.request_address(pool, address, None)
        return pool

    def _request_pool(self, subnet: Subnet, network: IPNetwork | None) -> dict[str, Any]:
        assert self.ipam is not None
        request = {
            "AddressSpace": self._space,
            "Pool": network or "",
            "SubPool": subnet.range or "",
            "Options": self._ipam_options,
            "V6": subnet.version == 6,
        }
        return self.ipam.call("RequestPool", request)

    def replay(self) -> None:
        """Ask again for what it has, if the IPAM driver wants that (``RequiresRequestReplay``)."""
        if self.ipam is None or not self.ipam.capabilities.get("RequiresRequestReplay"):
            return
        for pool in self.pools:
            pool.id = self._request_pool(pool.subnet, pool.network)["PoolID"]
            if pool.gateway is not None:
                self.request_address(pool, pool.gateway.ip, messages.GATEWAY)
            for address in pool.auxiliary.values():
                self.request_address(pool, address.ip, None)
            for endpoint in self.endpoints.values():
                if pool.version in endpoint.addresses and endpoint.addresses[pool.version].ip in pool.network:
                    self.request_address(pool, endpoint.addresses[pool.version].ip, None)

    def request_address(self, pool: Pool, address: IPAddress | None, options: Mapping[str, str] | None) -> IPInterface:
        """One of a pool, or this one. Raises `RemoteError`."""
        assert self.ipam is not None
        request = {"PoolID": pool.id, "Address": address or "", "Options": options}
        return ip_interface(self.ipam.call("RequestAddress", request)["Address"])

    def delete(self) -> None:
        """``docker network rm``.

        Raises `Conflict` if it has endpoints, `RemoteError` if the driver refuses; then it is still there.
        """
        if self.endpoints:
            active = " ".join(f'name:"{name}" id:"{ep.id[:12]}"' for name, ep in sorted(self.endpoints.items()))
            raise Conflict(f"network {self.name} has active endpoints ({active})")
        self.undo()
        self.host.forget(self)
        self._deleted(self)

    def undo(self) -> None:
        """Have the drivers remove it. Raises `RemoteError`: the network driver refuses."""
        self.driver.call("DeleteNetwork", {"NetworkID": self.id})
        if self._is_global:
            attempt(self.driver, "FreeNetwork", {"NetworkID": self.id})
        for pool in self.pools:
            if self.ipam is None:
                continue
            if pool.gateway is not None:
                attempt(self.ipam, "ReleaseAddress", {"PoolID": pool.id, "Address": pool.gateway.ip})
            for address in pool.auxiliary.values():
                attempt(self.ipam, "ReleaseAddress", {"PoolID": pool.id, "Address": address.ip})
            attempt(self.ipam, "ReleasePool", {"PoolID": pool.id})

    # ------------------------------------------------------------------------------------------------ endpoints

    def create_endpoint(
        self,
        name: str,
        *,
        addresses: Iterable[IPAddress] = (),
        mac: MacAddress | None = None,
        options: Mapping[str, Any] = {},
    ) -> Endpoint:
        """An attachment for a container: addresses from IPAM, then the driver's ``CreateEndpoint``.

        `addresses` are those that are wished for (``--ip``, ``--ip6``).

        Raises:
            Conflict: there is one of this name.
            RemoteError: a driver refused; nothing is left of it.
        """
        with self.lock:
            if name in self.endpoints:
                raise Conflict(f"endpoint with name {name} already exists in network {self.name}")
        endpoint = Endpoint(self, name)
        with ExitStack() as undo:
            endpoint.assign(tuple(addresses), mac, undo)
            endpoint.create(options)
            undo.pop_all()
        with self.lock:
            self.endpoints[name] = endpoint
        self.host.save(endpoint)
        return endpoint
