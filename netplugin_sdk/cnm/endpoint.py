"""Endpoints of a network, and their joins (moby ``daemon/libnetwork/endpoint.go``)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from typing import TYPE_CHECKING, Any

import msgspec

from netplugin_sdk.cnm.records import Record, attempt, read
from netplugin_sdk.cnm.remote import MethodNotSupported
from netplugin_sdk.errors import Conflict, DriverError, InvalidRequest
from netplugin_sdk.linux.namespaces import DEFAULT, Route
from netplugin_sdk.protocol import messages
from netplugin_sdk.values import IPAddress, IPInterface, MacAddress

if TYPE_CHECKING:
    from netplugin_sdk.cnm.network import Network
    from netplugin_sdk.cnm.sandbox import Sandbox

_log = logging.getLogger("netplugin_sdk")


class _Saved(msgspec.Struct, kw_only=True):
    """Of an endpoint, on disk."""

    name: str
    addresses: dict[int, IPInterface]
    mac: MacAddress | None
    interface: str | None
    gateways: dict[int, IPAddress]
    routes: tuple[Route, ...]
    priority: int
    pools: dict[int, str]
    source: str
    programmed: tuple[bool, bool]
    network: str
    sandbox: str | None


class Endpoint(Record):
    """A container's attachment to a network."""

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
        self.source = ""
        """The interface's name as the driver's ``Join`` said it."""
        self._programmed: tuple[bool, bool] = (False, False)

    @classmethod
    def restored(
        cls, id_: str, data: bytes, networks: Mapping[str, Network], sandboxes: Mapping[str, Sandbox]
    ) -> Endpoint:
        """The endpoint that was saved, in its network and its sandbox. Both are named by their ids."""
        kept = read(_Saved, data)
        endpoint = cls(networks[kept.network], kept.name, id_)
        endpoint.addresses, endpoint.mac, endpoint.interface = kept.addresses, kept.mac, kept.interface
        endpoint.gateways, endpoint.routes, endpoint.priority = kept.gateways, kept.routes, kept.priority
        endpoint._pools, endpoint.source, endpoint._programmed = kept.pools, kept.source, kept.programmed
        if kept.sandbox is not None and (sandbox := sandboxes.get(kept.sandbox)) is not None:
            endpoint.sandbox = sandbox
            sandbox.add(endpoint)
        return endpoint

    def saved(self) -> _Saved:
        """The part of it that is on disk."""
        return _Saved(
            name=self.name,
            addresses=self.addresses,
            mac=self.mac,
            interface=self.interface,
            gateways=self.gateways,
            routes=self.routes,
            priority=self.priority,
            pools=self._pools,
            source=self.source,
            programmed=self._programmed,
            network=self.network.id,
            sandbox=None if self.sandbox is None else self.sandbox.id,
        )

    @property
    def ids(self) -> dict[str, str]:
        """As each request names it."""
        return {"NetworkID": self.network.id, "EndpointID": self.id}

    def assign(self, wished: tuple[IPAddress, ...], mac: MacAddress | None, undo: ExitStack) -> None:
        """Take addresses from IPAM, the wished ones where they are given. Raises `RemoteError`."""
        network, ipam, self.mac = self.network, self.network.ipam, mac
        if ipam is None:
            return
        options: dict[str, str] = {}
        if network.host.engine.tells_names:
            options[messages.ENDPOINT_NAME] = self.name
        if ipam.capabilities.get("RequiresMACAddress"):
            self.mac = self.mac or MacAddress.random()
            options[messages.MAC_ADDRESS] = str(self.mac)
        for version in (4, 6):
            pools = [pool for pool in network.pools if pool.version == version]
            wish = next((address for address in wished if address.version == version), None)
            if not pools:
                continue
            fitting = [pool for pool in pools if wish is None or wish in pool.network]
            if not fitting:
                raise InvalidRequest(f"invalid address {wish}: It does not belong to any of this network's subnets")
            for pool in fitting:
                try:
                    given = network.request_address(pool, wish, options)
                except DriverError as error:
                    if wish is not None or "no available addresses" not in str(error) or pool is fitting[-1]:
                        raise
                    continue
                self.addresses[version], self._pools[version] = given, pool.id
                undo.callback(self._release, version)
                break

    def _release(self, version: int) -> None:
        ipam = self.network.ipam
        if ipam is not None:
            request = {"PoolID": self._pools[version], "Address": self.addresses[version].ip}
            attempt(ipam, "ReleaseAddress", request)

    def create(self, options: Mapping[str, Any]) -> None:
        """``CreateEndpoint``. Raises `RemoteError`, or `InvalidRequest` for an answer that cannot be used."""
        asked = {
            "Address": self.addresses.get(4, ""),
            "AddressIPv6": self.addresses.get(6, ""),
            "MacAddress": self.mac or "",
        }
        driver = self.network.driver
        answer = driver.call("CreateEndpoint", {**self.ids, "Interface": asked, "Options": options})
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
            attempt(driver, "DeleteEndpoint", self.ids)
            raise InvalidRequest(f"{error}; rolled back") from None

    def operational_info(self) -> dict[str, Any]:
        """The driver's facts of it (``EndpointOperInfo``), as `docker inspect` asks for them."""
        value: dict[str, Any] = self.network.driver.call("EndpointOperInfo", self.ids).get("Value") or {}
        return value

    # ------------------------------------------------------------------------------------------- join and leave

    def join(self, sandbox: Sandbox, *, priority: int = 0) -> None:
        """Connect the sandbox: the driver's ``Join``, the interface moved, and external connectivity.

        Raises `Conflict` if it is in one, `RemoteError` or `LinkError` if that cannot be done; it has left again then.
        """
        with sandbox.joining:
            self._join(sandbox, priority)

    def _join(self, sandbox: Sandbox, priority: int) -> None:
        if self.sandbox is not None:
            raise Conflict("another container is attached to the same network endpoint")
        self.sandbox, self.priority = sandbox, priority
        try:
            request = {**self.ids, "SandboxKey": str(sandbox.key), "Options": sandbox.options}
            answer = self.network.driver.call("Join", request)
            with ExitStack() as undo:  # once more below, as libnetwork does
                undo.callback(attempt, self.network.driver, "Leave", self.ids)
                self._read(answer)
                before = sandbox.gateway_endpoints()
                sandbox.add(self)
                sandbox.populate(self, answer.get("InterfaceName") or {})
                sandbox.update_external(self, before)
                self.network.host.save(self)
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
        """Disconnect it from its sandbox. A refusal of the driver is logged, as an engine does."""
        sandbox = self.sandbox
        if sandbox is None:
            raise Conflict("cannot leave endpoint with no attached sandbox")
        with sandbox.joining:
            self._leave(sandbox)

    def _leave(self, sandbox: Sandbox) -> None:
        network, was_gateway = self.network, self in sandbox.gateway_endpoints()
        self.sandbox = None
        try:
            self.program(None, None)
        except DriverError as error:
            _log.warning("driver failed revoking external connectivity on endpoint: %s", error)
        attempt(network.driver, "Leave", self.ids)
        sandbox.remove(self)
        network.host.save(self)
        if was_gateway and not sandbox.deleting:
            sandbox.set_gateways()
            for endpoint in dict.fromkeys(filter(None, sandbox.gateway_endpoints())):
                try:
                    endpoint.program(*sandbox.gateway_endpoints())
                except DriverError as error:
                    _log.warning("%s", error)

    def program(self, four: Endpoint | None, six: Endpoint | None) -> None:
        """Tell the driver whether it carries the sandbox's default routes. Raises `RemoteError`."""
        is_gateway = (self is four, self is six)
        if is_gateway == self._programmed:
            return
        self._programmed = is_gateway
        driver, engine = self.network.driver, self.network.host.engine
        with suppress(MethodNotSupported):
            if not any(is_gateway):
                driver.call("RevokeExternalConnectivity", self.ids)
            elif not self.network.internal and self.sandbox is not None:
                options = dict(self.sandbox.options)
                if engine.checks_gateways:
                    options[messages.NO_PROXY_6TO4] = six is not None and six is not self
                driver.call("ProgramExternalConnectivity", {**self.ids, "Options": options})

    def delete(self) -> None:
        """Delete it; it leaves its sandbox first. A refusal of the driver is logged, as an engine does."""
        if self.sandbox is not None:
            self.leave()
        network = self.network
        attempt(network.driver, "DeleteEndpoint", self.ids)
        for version in self._pools:
            self._release(version)
        network.host.forget(self)
        with network.lock:
            network.endpoints.pop(self.name, None)

    @property
    def order(self) -> tuple[Any, ...]:
        """Which endpoint of a sandbox carries its default routes: the first (moby ``Endpoint.Less``)."""
        return -self.priority, self.network.internal, -len(self.gateways), self.network.name

    def static_routes(self) -> tuple[Route, ...]:
        """Its routes, by its interface."""
        return tuple(replace(route, interface=self.interface) for route in self.routes)

    def has_route(self, version: int) -> bool:
        """Whether it leads to the default destination of this IP version."""
        return version in self.gateways or any(route.destination == DEFAULT[version] for route in self.routes)
