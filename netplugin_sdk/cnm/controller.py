"""Docker's side of the contract: networks, endpoints and sandboxes, as libnetwork has them.

    controller ── registry ── drivers (in process, or over sockets)
        ├── networks ── endpoints ──┐
        └── sandboxes ──────────────┘ join, leave

The order of the calls, what is rolled back and the texts of errors are libnetwork's (moby ``daemon/libnetwork``:
``controller.go``, ``network.go``, ``endpoint.go``, ``sandbox.go``); what `Sandbox.connect` does beside it is the
daemon's (``daemon/container_operations.go``).
"""

from __future__ import annotations

import logging
import secrets
import tempfile
import threading
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_interface, ip_network
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import msgspec

from netplugin_sdk.cnm import remote
from netplugin_sdk.cnm.drivers import BUILT_IN, installed
from netplugin_sdk.cnm.registry import Driver, InProcess, Known, Registry
from netplugin_sdk.cnm.remote import MethodNotSupported, RemotePlugin
from netplugin_sdk.core.plugin import Plugin
from netplugin_sdk.database import Database, Folder
from netplugin_sdk.driver import IpamDriver, NetworkDriver
from netplugin_sdk.errors import Conflict, DriverError, InvalidRequest, NotFound
from netplugin_sdk.ipam import PoolIpamDriver
from netplugin_sdk.linux import links
from netplugin_sdk.linux.namespaces import DEFAULT, Namespace, Route
from netplugin_sdk.protocol import messages
from netplugin_sdk.protocol.messages import Port, PortMapping
from netplugin_sdk.protocol.options import from_text
from netplugin_sdk.values import IPAddress, IPInterface, IPNetwork, MacAddress

_log = logging.getLogger("netplugin_sdk")

_SPECIAL = ("host", "null")  # networks without addresses, of which there is one
_NULL = "null"  # the IPAM driver without addresses
_MIGRATIONS = ("CREATE TABLE records (id TEXT PRIMARY KEY, kind TEXT NOT NULL, data BLOB NOT NULL) WITHOUT ROWID;",)


@dataclass(frozen=True)
class Engine:
    """How a version of the Docker Engine speaks to its plugins."""

    version: str
    checks_gateways: bool
    """``GwAllocCheck`` before a network is created, and whether IPv4 is enabled (≥ 28)."""
    tells_names: bool
    """An endpoint's name with ``RequestAddress`` (≥ 29)."""
    inspects_twice: bool
    """``EndpointOperInfo`` once more after a join (< 28)."""


ENGINES: Mapping[str, Engine] = {
    "20.10": Engine("20.10", checks_gateways=False, tells_names=False, inspects_twice=True),
    "26.1": Engine("26.1", checks_gateways=False, tells_names=False, inspects_twice=True),
    "28.5": Engine("28.5", checks_gateways=True, tells_names=False, inspects_twice=False),
    "29": Engine("29", checks_gateways=True, tells_names=True, inspects_twice=False),
}


class Subnet(msgspec.Struct, frozen=True, kw_only=True):
    """What ``docker network create`` says of a subnet; what is None the IPAM driver chooses.

    `range` is ``--ip-range``, `auxiliary` is ``--aux-address``.
    """

    version: int
    """4 or 6."""
    network: IPNetwork | None = None
    range: IPNetwork | None = None
    gateway: IPAddress | None = None
    auxiliary: Mapping[str, IPAddress] = {}

    @classmethod
    def parse(cls, network: str, *, range: str = "", gateway: str = "", auxiliary: Mapping[str, str] = {}) -> Subnet:
        """Of texts. Raises ValueError."""
        subnet = ip_network(network)
        return cls(
            version=subnet.version,
            network=subnet,
            range=ip_network(range) if range else None,
            gateway=ip_address(gateway) if gateway else None,
            auxiliary={name: ip_address(address) for name, address in auxiliary.items()},
        )


class _Pool(msgspec.Struct):
    """A pool that a network has."""

    id: str
    network: IPNetwork
    version: int
    subnet: Subnet
    """As it was asked for."""
    gateway: IPInterface | None = None
    auxiliary: dict[str, IPInterface] = {}

    def to_wire(self, space: str) -> dict[str, Any]:
        wire: dict[str, Any] = {"AddressSpace": space, "Pool": self.network}
        if self.gateway is not None:
            wire["Gateway"] = self.gateway
        if self.auxiliary:
            wire["AuxAddresses"] = self.auxiliary
        return wire


def _remote(name: str) -> Driver:
    return RemotePlugin(remote.find(name))


class NetworkController:
    """Networks and sandboxes of a host, with drivers by their names. A context manager, which cleans up.

    Args:
        drivers: plugins in this process, by the names that networks use; each may serve networks, addresses or both.
            Beside them there are ``null``, ``host``, ``macvlan``, ``ipvlan`` and ``overlay`` (on one host), those of
            packages that are installed (entry points ``netplugin_sdk.drivers``), and the IPAM driver ``default``, a
            `PoolIpamDriver`.
        find: finds every other driver by its name; by default as an engine finds plugins.
        engine: the version to speak like.
        folder: for what it must remember, and the files of sandboxes. A controller that is made with it again, by
            this process or another, goes on where the last one ended, and asks drivers what an engine asks after its
            start. None makes a folder, and with the controller's end everything is deleted.

    Raises `Conflict` if another process holds the folder, `NotFound` if a driver of a network is not there any more.
    """

    def __init__(
        self,
        drivers: Mapping[str, Plugin] = {},
        *,
        find: Callable[[str], Driver] = _remote,
        engine: str = "28.5",
        folder: Path | None = None,
    ) -> None:
        self._closing = ExitStack()
        self._passing = folder is None
        self.engine = ENGINES[engine]
        self.folder = folder or Path(self._closing.enter_context(tempfile.TemporaryDirectory(prefix="cnm-")))
        self.registry = Registry(drivers, lambda name: self._in_process(name) or find(name))
        self.networks: dict[str, Network] = {}
        """By name."""
        self.sandboxes: dict[str, Sandbox] = {}
        """By name."""
        self._lock = threading.Lock()
        try:
            held = Folder(self.folder)
            self._closing.callback(held.close)
            self._database = Database(self.folder / "cnm.db", _MIGRATIONS)
            self._closing.callback(self._database.close)
            self._restore()
        except BaseException:
            self._closing.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End. Sandboxes and networks stay, if there is a folder that remembers them; else they are deleted."""
        with self._closing:
            if self._passing:
                self.cleanup()

    def cleanup(self) -> None:
        """Delete all sandboxes and networks."""
        for sandbox in tuple(self.sandboxes.values()):
            sandbox.delete()
        for network in tuple(self.networks.values()):
            network.delete()

    def _in_process(self, name: str) -> Driver | None:
        """A driver of the controller's own, or of a package that is installed, with a memory in its folder."""
        driver: NetworkDriver[Any] | IpamDriver | None
        if name in BUILT_IN:
            driver = BUILT_IN[name]()
        elif name == "default":
            driver = _default_ipam()
        else:
            driver = installed(name)
        if driver is None:
            return None
        return InProcess(self._closing.enter_context(Plugin(driver, state=self.folder / "drivers" / name)))

    # ------------------------------------------------------------------------------------------------- the disk

    def _save(self, record: _Record) -> None:
        values = (
            record.id,
            type(record).__name__,
            messages.encode({name: getattr(record, name) for name in record.saved}),
        )
        with self._lock:
            self._database.write("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", values)

    def _forget(self, record: _Record) -> None:
        with self._lock:
            self._database.write("DELETE FROM records WHERE id = ?", (record.id,))

    def _restore(self) -> None:
        """Read what was there, and do what an engine does when it starts."""
        rows: dict[str, dict[str, bytes]] = {"Network": {}, "Sandbox": {}, "Endpoint": {}}
        for id_, kind, data in self._database.read("SELECT * FROM records"):
            rows[kind][id_] = data
        networks = {id_: Network._restored(self, id_, data) for id_, data in rows["Network"].items()}
        sandboxes = {id_: Sandbox._restored(self, id_, data) for id_, data in rows["Sandbox"].items()}
        self.networks = {network.name: network for network in networks.values()}
        self.sandboxes = {box.name: box for box in sandboxes.values() if box.namespace.exists}
        for id_, data in rows["Endpoint"].items():
            endpoint = Endpoint._restored(id_, data, networks, sandboxes)
            endpoint.network.endpoints[endpoint.name] = endpoint
        for network in networks.values():
            network._replay()
        for network in networks.values():
            for endpoint in tuple(network.endpoints.values()):
                if endpoint.sandbox is None or not endpoint.sandbox.namespace.exists:  # as after a reboot
                    _log.info("removing stale endpoint %s (%s)", endpoint.name, endpoint.id)
                    endpoint.sandbox = None
                    endpoint.delete()
        for box in sandboxes.values():
            if not box.namespace.exists:
                box.key.unlink(missing_ok=True)
                self._forget(box)

    def create_network(
        self,
        name: str,
        driver: str,
        *,
        ipam: str = "default",
        ipam_options: Mapping[str, str] = {},
        subnets: Sequence[Subnet] = (),
        ipv6: bool = False,
        internal: bool = False,
        options: Mapping[str, str] = {},
    ) -> Network:
        """``docker network create``. `options` are ``-o``, `ipam_options` ``--ipam-opt``.

        Raises:
            Conflict: there is one of this name.
            NotFound: there is no such driver.
            RemoteError: a driver refused; nothing is left of it.
        """
        with self._lock:
            if name in self.networks:
                raise Conflict(f"network with name {name} already exists")
            if driver in _SPECIAL and any(network.driver.name == driver for network in self.networks.values()):
                raise Conflict(f'only one instance of "{driver}" network is allowed')
        if driver in _SPECIAL:
            ipam = _NULL
        network = Network(self, name, driver, ipam, ipv6=ipv6, internal=internal, options=options)
        network._create(subnets, ipam_options)
        with self._lock:
            made_meanwhile = name in self.networks
            self.networks.setdefault(name, network)
        if made_meanwhile:
            network._delete()
            raise Conflict(f"network with name {name} already exists")
        self._save(network)
        return network

    def create_sandbox(
        self, name: str, *, ports: Sequence[PortMapping] = (), exposed: Sequence[Port] = (), host: bool = False
    ) -> Sandbox:
        """A network namespace, as a container has. `ports` are ``-p``, `exposed` is ``--expose``.

        With `host` it is the calling thread's own, as with ``docker run --network host``.

        Raises `Conflict` if there is one of this name.
        """
        with self._lock:
            if name in self.sandboxes:
                raise Conflict(f"sandbox with name {name} already exists")
            sandbox = self.sandboxes[name] = Sandbox(self, name)
        try:
            sandbox._create(ports, exposed, host)
            self._save(sandbox)
        except BaseException:
            sandbox.delete()
            raise
        return sandbox


class _Record:
    """What networks, endpoints and sandboxes share: an id, a name, and what of it is on disk."""

    saved: ClassVar[Mapping[str, Any]]
    """Attributes and their types."""

    def __init__(self, name: str, id_: str | None = None) -> None:
        self.id = id_ or secrets.token_hex(32)
        self.name = name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.id[:12]}>"

    @classmethod
    def _decode(cls, data: bytes) -> dict[str, Any]:
        kept = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        return {
            name: msgspec.json.decode(kept[name], type=kind, dec_hook=from_text) for name, kind in cls.saved.items()
        }


class Network(_Record):
    """A network of a controller."""

    saved: ClassVar = {
        "name": str,
        "internal": bool,
        "ipv6": bool,
        "_options": dict[str, str],
        "_pools": list[_Pool],
        "_ipam_options": dict[str, str],
        "_drivers": tuple[str, str],
    }

    def __init__(
        self,
        controller: NetworkController,
        name: str,
        driver: str,
        ipam: str,
        *,
        ipv6: bool = False,
        internal: bool = False,
        options: Mapping[str, str] = {},
        id_: str | None = None,
    ) -> None:
        super().__init__(name, id_)
        self.internal, self.ipv6 = internal, ipv6
        self.endpoints: dict[str, Endpoint] = {}
        """By name."""
        self._controller = controller
        self._drivers = driver, ipam
        self.driver = controller.registry.network_driver(driver)
        self._ipam = None if ipam == _NULL else controller.registry.ipam_driver(ipam)
        self._options, self._ipam_options = dict(options), dict[str, str]()
        self._pools: list[_Pool] = []
        self._lock = threading.Lock()

    @classmethod
    def _restored(cls, controller: NetworkController, id_: str, data: bytes) -> Network:
        kept = cls._decode(data)
        network = cls(controller, kept["name"], *kept["_drivers"], id_=id_)
        vars(network).update(kept)
        return network

    @property
    def subnets(self) -> tuple[IPNetwork, ...]:
        """Its subnets, IPv4 before IPv6."""
        return tuple(pool.network for pool in self._pools)

    @property
    def gateways(self) -> tuple[IPInterface, ...]:
        """Their gateways' addresses."""
        return tuple(pool.gateway for pool in self._pools if pool.gateway is not None)

    # ---------------------------------------------------------------------------------------- create and delete

    def _create(self, subnets: Sequence[Subnet], ipam_options: Mapping[str, str]) -> None:
        options: dict[str, Any] = {messages.ENABLE_IPV6: self.ipv6, messages.GENERIC: self._options}
        if self._controller.engine.checks_gateways:
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
                self._pools.append(self._allocate(subnet, skips, undo))
            data = {4: list[dict[str, Any]](), 6: list[dict[str, Any]]()}
            for pool in self._pools:
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
        undo.callback(self._try, self.driver, "FreeNetwork", {"NetworkID": self.id})
        return dict(answer.get("Options") or {})

    def _skipped_gateways(self, options: Mapping[str, Any]) -> frozenset[int]:
        if not (self._controller.engine.checks_gateways and self.driver.capabilities.get("GwAllocChecker")):
            return frozenset()
        answer = self.driver.call("GwAllocCheck", {"Options": options})
        return frozenset(version for version in (4, 6) if answer.get(f"SkipIPv{version}"))

    @property
    def _space(self) -> str:
        if self._ipam is None:
            return _NULL
        scope = str(self.driver.capabilities["Scope"]).capitalize()
        return str(self._ipam.capabilities[f"{scope}DefaultAddressSpace"])

    def _allocate(self, subnet: Subnet, skips: frozenset[int], undo: ExitStack) -> _Pool:
        if self._ipam is None:
            return _Pool("", DEFAULT[subnet.version], subnet.version, subnet)
        answer = self._request_pool(subnet, subnet.network)
        pool = _Pool(answer["PoolID"], ip_network(answer["Pool"]), subnet.version, subnet)
        undo.callback(self._try, self._ipam, "ReleasePool", {"PoolID": pool.id})
        if subnet.gateway is None and messages.GATEWAY["RequestAddressType"] in (answer.get("Data") or {}):
            pool.gateway = ip_interface(answer["Data"][messages.GATEWAY["RequestAddressType"]])
        elif subnet.gateway is not None or subnet.version not in skips:
            with _explained(f"failed to allocate gateway ({subnet.gateway or ''})"):
                pool.gateway = self._request_address(pool, subnet.gateway, messages.GATEWAY)
        for name, address in subnet.auxiliary.items():
            if address not in pool.network:
                raise InvalidRequest(
                    f"auxiliary address: ({name}:{address}) must belong to the master pool: {pool.network}"
                )
            with _explained(f"failed to allocate secondary ip address ({name}:{address})"):
                pool.auxiliary[name] = self._request_address(pool, address, None)
        return pool

    def _request_pool(self, subnet: Subnet, network: IPNetwork | None) -> dict[str, Any]:
        assert self._ipam is not None
        request = {
            "AddressSpace": self._space,
            "Pool": network or "",
            "SubPool": subnet.range or "",
            "Options": self._ipam_options,
            "V6": subnet.version == 6,
        }
        return self._ipam.call("RequestPool", request)

    def _replay(self) -> None:
        """Ask again for what it has, if the IPAM driver wants that (``RequiresRequestReplay``)."""
        if self._ipam is None or not self._ipam.capabilities.get("RequiresRequestReplay"):
            return
        for pool in self._pools:
            pool.id = self._request_pool(pool.subnet, pool.network)["PoolID"]
            if pool.gateway is not None:
                self._request_address(pool, pool.gateway.ip, messages.GATEWAY)
            for address in pool.auxiliary.values():
                self._request_address(pool, address.ip, None)
            for endpoint in self.endpoints.values():
                if pool.version in endpoint.addresses and endpoint.addresses[pool.version].ip in pool.network:
                    self._request_address(pool, endpoint.addresses[pool.version].ip, None)

    def _request_address(
        self, pool: _Pool, address: IPAddress | None, options: Mapping[str, str] | None
    ) -> IPInterface:
        assert self._ipam is not None
        request = {"PoolID": pool.id, "Address": address or "", "Options": options}
        return ip_interface(self._ipam.call("RequestAddress", request)["Address"])

    def delete(self) -> None:
        """``docker network rm``.

        Raises `Conflict` if it has endpoints, `RemoteError` if the driver refuses; then it is still there.
        """
        if self.endpoints:
            active = " ".join(f'name:"{name}" id:"{ep.id[:12]}"' for name, ep in sorted(self.endpoints.items()))
            raise Conflict(f"network {self.name} has active endpoints ({active})")
        self._delete()
        self._controller._forget(self)
        with self._controller._lock:
            del self._controller.networks[self.name]

    def _delete(self) -> None:
        self.driver.call("DeleteNetwork", {"NetworkID": self.id})
        if self._is_global:
            self._try(self.driver, "FreeNetwork", {"NetworkID": self.id})
        for pool in self._pools:
            if self._ipam is None:
                continue
            if pool.gateway is not None:
                self._try(self._ipam, "ReleaseAddress", {"PoolID": pool.id, "Address": pool.gateway.ip})
            for address in pool.auxiliary.values():
                self._try(self._ipam, "ReleaseAddress", {"PoolID": pool.id, "Address": address.ip})
            self._try(self._ipam, "ReleasePool", {"PoolID": pool.id})

    @staticmethod
    def _try(driver: Known, method: str, request: Mapping[str, Any]) -> None:
        """What an engine only logs if it fails."""
        try:
            driver.call(method, request)
        except DriverError as error:
            _log.warning("%s", error)

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
        with self._lock:
            if name in self.endpoints:
                raise Conflict(f"endpoint with name {name} already exists in network {self.name}")
        endpoint = Endpoint(self, name)
        with ExitStack() as undo:
            endpoint._assign(tuple(addresses), mac, undo)
            endpoint._create(options)
            undo.pop_all()
        with self._lock:
            self.endpoints[name] = endpoint
        self._controller._save(endpoint)
        return endpoint


class Endpoint(_Record):
    """A container's attachment to a network."""

    saved: ClassVar = {
        "name": str,
        "addresses": dict[int, IPInterface],
        "mac": MacAddress | None,
        "interface": str | None,
        "gateways": dict[int, IPAddress],
        "routes": tuple[Route, ...],
        "priority": int,
        "_pools": dict[int, str],
        "_source": str,
        "_programmed": tuple[bool, bool],
        "_places": tuple[str, str | None],
    }

    def __init__(self, network: Network, name: str, id_: str | None = None) -> None:
        super().__init__(name, id_)
        self.network = network
        self.addresses: dict[int, IPInterface] = {}
        """By IP version."""
        self.mac: MacAddress | None = None
        self.sandbox: Sandbox | None = None
        self.interface: str | None = None
        """Its name inside the sandbox."""
        self.gateways: dict[int, IPAddress] = {}
        """That the driver's ``Join`` named, by IP version."""
        self.routes: tuple[Route, ...] = ()
        self.priority = 0
        self._pools: dict[int, str] = {}
        self._source = ""
        self._programmed: tuple[bool, bool] = (False, False)

    @classmethod
    def _restored(
        cls, id_: str, data: bytes, networks: Mapping[str, Network], sandboxes: Mapping[str, Sandbox]
    ) -> Endpoint:
        kept = cls._decode(data)
        network, sandbox = kept.pop("_places")
        endpoint = cls(networks[network], kept["name"], id_)
        vars(endpoint).update(kept)
        endpoint.sandbox = sandboxes.get(sandbox)
        if endpoint.sandbox is not None:
            endpoint.sandbox._add(endpoint)
        return endpoint

    @property
    def _places(self) -> tuple[str, str | None]:
        """Of the network and the sandbox: their ids."""
        return self.network.id, None if self.sandbox is None else self.sandbox.id

    @property
    def _ids(self) -> dict[str, str]:
        return {"NetworkID": self.network.id, "EndpointID": self.id}

    def _assign(self, wished: tuple[IPAddress, ...], mac: MacAddress | None, undo: ExitStack) -> None:
        network, ipam, self.mac = self.network, self.network._ipam, mac
        if ipam is None:
            return
        options: dict[str, str] = {}
        if network._controller.engine.tells_names:
            options[messages.ENDPOINT_NAME] = self.name
        if ipam.capabilities.get("RequiresMACAddress"):
            self.mac = self.mac or MacAddress.random()
            options[messages.MAC_ADDRESS] = str(self.mac)
        for version in (4, 6):
            pools = [pool for pool in network._pools if pool.version == version]
            wish = next((address for address in wished if address.version == version), None)
            if not pools:
                continue
            fitting = [pool for pool in pools if wish is None or wish in pool.network]
            if not fitting:
                raise InvalidRequest(f"invalid address {wish}: It does not belong to any of this network's subnets")
            for pool in fitting:
                try:
                    given = network._request_address(pool, wish, options)
                except DriverError as error:
                    if wish is not None or "no available addresses" not in str(error) or pool is fitting[-1]:
                        raise
                    continue
                self.addresses[version], self._pools[version] = given, pool.id
                undo.callback(self._release, version)
                break

    def _release(self, version: int) -> None:
        ipam = self.network._ipam
        if ipam is not None:
            request = {"PoolID": self._pools[version], "Address": self.addresses[version].ip}
            self.network._try(ipam, "ReleaseAddress", request)

    def _create(self, options: Mapping[str, Any]) -> None:
        asked = {
            "Address": self.addresses.get(4, ""),
            "AddressIPv6": self.addresses.get(6, ""),
            "MacAddress": self.mac or "",
        }
        driver = self.network.driver
        answer = driver.call("CreateEndpoint", {**self._ids, "Interface": asked, "Options": options})
        given = answer.get("Interface") or {}
        try:
            for name, value in given.items():
                if value and asked.get(name):
                    what = "MAC address" if name == "MacAddress" else "address"
                    raise InvalidRequest(f"driver modified interface {what}: endpoint interface {what} is set already")
            for name, version in (("Address", 4), ("AddressIPv6", 6)):
                if given.get(name):
                    self.addresses[version] = ip_interface(given[name])
            if given.get("MacAddress"):
                self.mac = MacAddress(given["MacAddress"])
        except (ValueError, InvalidRequest) as error:
            self.network._try(driver, "DeleteEndpoint", self._ids)
            raise InvalidRequest(f"{error}; rolled back") from None

    def operational_info(self) -> dict[str, Any]:
        """What the driver knows of it (``EndpointOperInfo``), as `docker inspect` asks."""
        value: dict[str, Any] = self.network.driver.call("EndpointOperInfo", self._ids).get("Value") or {}
        return value

    # ------------------------------------------------------------------------------------------- join and leave

    def join(self, sandbox: Sandbox, *, priority: int = 0) -> None:
        """Connect the sandbox: the driver's ``Join``, the interface moved, and external connectivity.

        Raises `Conflict` if it is in one, `RemoteError` or `LinkError` if that cannot be done; it has left again then.
        """
        with sandbox._joining:
            self._join(sandbox, priority)

    def _join(self, sandbox: Sandbox, priority: int) -> None:
        if self.sandbox is not None:
            raise Conflict("another container is attached to the same network endpoint")
        self.sandbox, self.priority = sandbox, priority
        try:
            request = {**self._ids, "SandboxKey": str(sandbox.key), "Options": sandbox._options}
            answer = self.network.driver.call("Join", request)
            with ExitStack() as undo:  # once more below, as libnetwork does
                undo.callback(self.network._try, self.network.driver, "Leave", self._ids)
                self._read(answer)
                before = sandbox.gateway_endpoints()
                sandbox._add(self)
                sandbox._populate(self, answer.get("InterfaceName") or {})
                sandbox._update_external(self, before)
                self.network._controller._save(self)
                undo.pop_all()
        except BaseException:
            if self.sandbox is not None:
                self._leave(sandbox)
            raise

    def _read(self, answer: Mapping[str, Any]) -> None:
        try:
            texts = {4: answer.get("Gateway"), 6: answer.get("GatewayIPv6")}
            self.gateways = {version: ip_address(text) for version, text in texts.items() if text}
            self.routes = tuple(
                Route(ip_network(route["Destination"]), ip_address(hop) if (hop := route.get("NextHop")) else None)
                for route in answer.get("StaticRoutes") or ()
            )
        except ValueError as error:
            raise InvalidRequest(f"the answer to Join cannot be used: {error}; rolled back") from None
        if 6 not in self.addresses:
            self.gateways.pop(6, None)

    def leave(self) -> None:
        """Disconnect it from its sandbox. What the driver refuses is logged, as an engine does."""
        sandbox = self.sandbox
        if sandbox is None:
            raise Conflict("cannot leave endpoint with no attached sandbox")
        with sandbox._joining:
            self._leave(sandbox)

    def _leave(self, sandbox: Sandbox) -> None:
        network, was_gateway = self.network, self in sandbox.gateway_endpoints()
        self.sandbox = None
        try:
            self._program(None, None)
        except DriverError as error:
            _log.warning("driver failed revoking external connectivity on endpoint: %s", error)
        network._try(network.driver, "Leave", self._ids)
        sandbox._remove(self)
        network._controller._save(self)
        if was_gateway and not sandbox._deleting:
            sandbox._set_gateways()
            for endpoint in dict.fromkeys(filter(None, sandbox.gateway_endpoints())):
                try:
                    endpoint._program(*sandbox.gateway_endpoints())
                except DriverError as error:
                    _log.warning("%s", error)

    def _program(self, four: Endpoint | None, six: Endpoint | None) -> None:
        """Tell the driver whether it carries the sandbox's default routes. Raises `RemoteError`."""
        is_gateway = (self is four, self is six)
        if is_gateway == self._programmed:
            return
        self._programmed = is_gateway
        driver, engine = self.network.driver, self.network._controller.engine
        with suppress(MethodNotSupported):
            if not any(is_gateway):
                driver.call("RevokeExternalConnectivity", self._ids)
            elif not self.network.internal and self.sandbox is not None:
                options = dict(self.sandbox._options)
                if engine.checks_gateways:
                    options[messages.NO_PROXY_6TO4] = six is not None and six is not self
                driver.call("ProgramExternalConnectivity", {**self._ids, "Options": options})

    def delete(self) -> None:
        """Delete it; it leaves its sandbox first. What the driver refuses is logged, as an engine does."""
        if self.sandbox is not None:
            self.leave()
        network = self.network
        network._try(network.driver, "DeleteEndpoint", self._ids)
        for version in self._pools:
            self._release(version)
        network._controller._forget(self)
        with network._lock:
            network.endpoints.pop(self.name, None)

    @property
    def _order(self) -> tuple[Any, ...]:
        """Which endpoint of a sandbox carries its default routes: the first (moby ``Endpoint.Less``)."""
        return -self.priority, self.network.internal, -len(self.gateways), self.network.name

    def _static_routes(self) -> tuple[Route, ...]:
        return tuple(replace(route, interface=self.interface) for route in self.routes)

    def _has_route(self, version: int) -> bool:
        return version in self.gateways or any(route.destination == DEFAULT[version] for route in self.routes)


class Sandbox(_Record):
    """A container's network namespace, with the endpoints that are in it."""

    saved: ClassVar = {"name": str, "_is_host": bool, "_options": dict[str, Any], "_default_routes": tuple[Route, ...]}

    def __init__(self, controller: NetworkController, name: str, id_: str | None = None) -> None:
        super().__init__(name, id_)
        self.key = controller.folder / "netns" / self.id[:12]
        """The file that keeps the namespace, as drivers are told."""
        self.namespace = Namespace(self.key)
        self.endpoints: list[Endpoint] = []
        """In the order of their gateways: the first that has one carries the default route."""
        self._controller = controller
        self._joining = threading.RLock()
        self._options: dict[str, Any] = {}
        self._is_host = self._deleting = False
        self._default_routes: tuple[Route, ...] = ()

    @classmethod
    def _restored(cls, controller: NetworkController, id_: str, data: bytes) -> Sandbox:
        kept = cls._decode(data)
        sandbox = cls(controller, kept["name"], id_)
        vars(sandbox).update(kept)
        return sandbox

    def _create(self, ports: Sequence[PortMapping], exposed: Sequence[Port], host: bool) -> None:
        published = (Port(mapping.protocol, mapping.container_port) for mapping in ports)
        self._options = {
            messages.EXPOSED_PORTS: list(dict.fromkeys([*published, *exposed])),
            messages.PORT_MAP: list(map(_port_to_wire, ports)),
        }
        Namespace.create(self.key, fresh=not host)
        self._is_host = host

    def run(self, *command: str, timeout: float | None = None) -> str:
        """What a program prints that runs in it, and finds the names of its neighbours in ``/etc/hosts``.

        Raises `DriverError` with what it complains of, if it fails.
        """
        hosts = self.key.with_suffix(".hosts")
        lines = [f"{address}\t{name}\n" for name, addresses in self.neighbours().items() for address in addresses]
        hosts.write_text("".join(["127.0.0.1\tlocalhost\n::1\tlocalhost\n", *lines]))
        return self.namespace.run(*command, hosts=hosts, timeout=timeout)

    def neighbours(self) -> dict[str, list[IPAddress]]:
        """The names on its networks, its own among them, and their addresses."""
        found: dict[str, list[IPAddress]] = {}
        for mine in self.endpoints:
            for endpoint in mine.network.endpoints.values():
                if endpoint.sandbox is not None:
                    found.setdefault(endpoint.name, []).extend(address.ip for address in endpoint.addresses.values())
        return found

    def connect(
        self,
        network: Network,
        *,
        addresses: Iterable[IPAddress] = (),
        mac: MacAddress | None = None,
        priority: int = 0,
        options: Mapping[str, str] = {},
    ) -> Endpoint:
        """``docker network connect``; a container's start does the same for each of its networks.

        Args:
            addresses: ``--ip``, ``--ip6``.
            mac: ``--mac-address``.
            priority: ``gw-priority``: the endpoint with the highest carries the default route.
            options: ``--driver-opt``.

        Raises what `Network.create_endpoint` and `Endpoint.join` raise; nothing is left of it.
        """
        if self._is_host is not (network.driver.name == "host"):
            raise InvalidRequest("container cannot be disconnected from host network or connected to host network")
        with self._joining:
            is_published = [messages.PORT_MAP in endpoint.operational_info() for endpoint in self.endpoints]
            told: dict[str, Any] = dict(options)
            if not network.internal and not any(is_published):
                told |= self._options
            if mac is not None:
                told[messages.MAC_ADDRESS] = b64encode(bytes.fromhex(mac.replace(":", ""))).decode()
            endpoint = network.create_endpoint(self.name, addresses=addresses, mac=mac, options=told)
            try:
                endpoint.join(self, priority=priority)
                if self._controller.engine.inspects_twice:
                    endpoint.operational_info()
                self._inspect()
            except BaseException:
                endpoint.delete()
                raise
            return endpoint

    def disconnect(self, network: Network) -> None:
        """``docker network disconnect``. Raises `NotFound` if it is not connected."""
        with self._joining:
            endpoint = next((endpoint for endpoint in self.endpoints if endpoint.network is network), None)
            if endpoint is None:
                raise NotFound(f"container {self.name} is not connected to network {network.name}")
            endpoint.leave()
            self._inspect()
            endpoint.delete()

    def _inspect(self) -> None:
        for endpoint in self.endpoints:
            endpoint.operational_info()

    def delete(self) -> None:
        """Leave and delete all endpoints, and remove the namespace, as when a container stops."""
        with self._joining:
            self._deleting = True
            for endpoint in tuple(self.endpoints):
                endpoint.delete()
            self.namespace.remove()
            self.key.with_suffix(".hosts").unlink(missing_ok=True)
        self._controller._forget(self)
        with self._controller._lock:
            self._controller.sandboxes.pop(self.name, None)

    def gateway_endpoints(self) -> tuple[Endpoint | None, Endpoint | None]:
        """Those that carry the default routes of IPv4 and IPv6."""
        four, six = (next((ep for ep in self.endpoints if ep._has_route(version)), None) for version in (4, 6))
        return four, six

    def _add(self, endpoint: Endpoint) -> None:
        self.endpoints.append(endpoint)
        self.endpoints.sort(key=lambda endpoint: endpoint._order)

    def _populate(self, endpoint: Endpoint, names: Mapping[str, str]) -> None:
        """Move the endpoint's interface in, and set its routes."""
        if source := names.get("SrcName"):
            prefix, used = names.get("DstPrefix") or "eth", {ep.interface for ep in self.endpoints}
            name = next(name for n in count() if (name := f"{prefix}{n}") not in used)
            endpoint.interface, endpoint._source = name, source
            addresses = endpoint.addresses.values()
            try:
                self.namespace.take(source, name, addresses, mac=endpoint.mac, routes=endpoint._static_routes())
            except BaseException:
                endpoint.interface = None
                raise
        else:
            self.namespace.change_routes((), endpoint._static_routes())
        if endpoint in self.gateway_endpoints():
            self._set_gateways()

    def _remove(self, endpoint: Endpoint) -> None:
        if endpoint not in self.endpoints:
            return
        self.endpoints.remove(endpoint)
        self.namespace.change_routes(endpoint._static_routes(), ())
        if endpoint.interface is not None:
            try:
                self.namespace.give_back(endpoint.interface, endpoint._source)
            except DriverError as error:
                _log.debug("%s", error)  # a driver may delete its link when it leaves
            endpoint.interface = None

    def _set_gateways(self) -> None:
        routes = tuple(
            Route(DEFAULT[version], endpoint.gateways[version])
            for version, endpoint in zip((4, 6), self.gateway_endpoints(), strict=True)
            if endpoint is not None and version in endpoint.gateways
        )
        self.namespace.change_routes(self._default_routes, routes)
        self._default_routes = routes
        self._controller._save(self)

    def _update_external(self, endpoint: Endpoint, before: tuple[Endpoint | None, Endpoint | None]) -> None:
        """Tell the drivers who carries the default routes now."""
        after = self.gateway_endpoints()
        if endpoint in after:
            for former in dict.fromkeys(filter(None, before)):
                former._program(*after)
        endpoint._program(*after)


def _default_ipam() -> PoolIpamDriver:
    """Docker's own wants no MAC addresses, so drivers choose them."""
    driver = PoolIpamDriver(occupied=links.occupied)
    driver.requires_mac_address = False
    return driver


def _port_to_wire(mapping: PortMapping) -> dict[str, Any]:
    return {
        "Proto": mapping.protocol,
        "IP": mapping.container_address or "",
        "Port": mapping.container_port,
        "HostIP": mapping.host_address or "",
        "HostPort": mapping.host_port,
        "HostPortEnd": mapping.host_port_end or mapping.host_port,
    }


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except DriverError as error:
        raise type(error)(f"{what}: {error}") from error
