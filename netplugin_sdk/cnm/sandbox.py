"""Sandboxes: network namespaces, and the endpoints that are in them (moby ``daemon/libnetwork/sandbox.go``).

What `Sandbox.connect` does beside that is the daemon's (``daemon/container_operations.go``).
"""

from __future__ import annotations

import logging
import threading
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import msgspec

from netplugin_sdk.cnm.endpoint import Endpoint
from netplugin_sdk.cnm.network import Network
from netplugin_sdk.cnm.records import Host, Record, read
from netplugin_sdk.errors import DriverError, InvalidRequest, NotFound
from netplugin_sdk.linux.namespaces import DEFAULT, Namespace, Route
from netplugin_sdk.protocol import messages
from netplugin_sdk.protocol.messages import Port, PortMapping
from netplugin_sdk.values import IPAddress, MacAddress

_log = logging.getLogger("netplugin_sdk")


class _Saved(msgspec.Struct, kw_only=True):
    """Of a sandbox, on disk."""

    name: str
    is_host: bool
    options: dict[str, Any]
    default_routes: tuple[Route, ...]


class Sandbox(Record):
    """A container's network namespace, with the endpoints that are in it."""

    def __init__(
        self,
        host: Host,
        name: str,
        id_: str | None = None,
        *,
        deleted: Callable[[Sandbox], None] = lambda _sandbox: None,
    ) -> None:
        super().__init__(name, id_)
        self.key = host.folder / "netns" / self.id[:12]
        """The file that keeps the namespace, as drivers are told."""
        self.namespace = Namespace(self.key)
        self.endpoints: list[Endpoint] = []
        """In the order of their gateways: the first that has one carries the default route."""
        self.host = host
        self._deleted = deleted
        self.joining = threading.RLock()
        self.options: dict[str, Any] = {}
        self._is_host = self.deleting = False
        self._default_routes: tuple[Route, ...] = ()

    @classmethod
    def restored(cls, host: Host, id_: str, data: bytes, deleted: Callable[[Sandbox], None]) -> Sandbox:
        """The sandbox that was saved."""
        kept = read(_Saved, data)
        sandbox = cls(host, kept.name, id_, deleted=deleted)
        sandbox._is_host, sandbox.options, sandbox._default_routes = kept.is_host, kept.options, kept.default_routes
        return sandbox

    def saved(self) -> _Saved:
        """The part of it that is on disk."""
        return _Saved(name=self.name, is_host=self._is_host, options=self.options, default_routes=self._default_routes)

    def create(self, ports: Sequence[PortMapping], exposed: Sequence[Port], host: bool) -> None:
        """Make the namespace."""
        published = (Port(mapping.protocol, mapping.container_port) for mapping in ports)
        self.options = {
            messages.EXPOSED_PORTS: list(dict.fromkeys([*published, *exposed])),
            messages.PORT_MAP: list(map(_port_to_wire, ports)),
        }
        Namespace.create(self.key, fresh=not host)
        self._is_host = host

    def run(self, *command: str, timeout: float | None = None) -> str:
        """The output of a program that runs in it, and finds the names of its neighbours in ``/etc/hosts``.

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
        with self.joining:
            is_published = [messages.PORT_MAP in endpoint.operational_info() for endpoint in self.endpoints]
            told: dict[str, Any] = dict(options)
            if not network.internal and not any(is_published):
                told |= self.options
            if mac is not None:
                told[messages.MAC_ADDRESS] = b64encode(bytes.fromhex(mac.replace(":", ""))).decode()
            endpoint = network.create_endpoint(self.name, addresses=addresses, mac=mac, options=told)
            try:
                endpoint.join(self, priority=priority)
                if self.host.engine.inspects_twice:
                    endpoint.operational_info()
                self._inspect()
            except BaseException:
                endpoint.delete()
                raise
            return endpoint

    def disconnect(self, network: Network) -> None:
        """``docker network disconnect``. Raises `NotFound` if it is not connected."""
        with self.joining:
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
        with self.joining:
            self.deleting = True
            for endpoint in tuple(self.endpoints):
                endpoint.delete()
            self.namespace.remove()
            self.key.with_suffix(".hosts").unlink(missing_ok=True)
        self.host.forget(self)
        self._deleted(self)

    def gateway_endpoints(self) -> tuple[Endpoint | None, Endpoint | None]:
        """Those that carry the default routes of IPv4 and IPv6."""
        four, six = (next((ep for ep in self.endpoints if ep.has_route(version)), None) for version in (4, 6))
        return four, six

    def add(self, endpoint: Endpoint) -> None:
        """List an endpoint that joins."""
        self.endpoints.append(endpoint)
        self.endpoints.sort(key=lambda endpoint: endpoint.order)

    def populate(self, endpoint: Endpoint, names: Mapping[str, str]) -> None:
        """Move the endpoint's interface in, and set its routes."""
        if source := names.get("SrcName"):
            prefix, used = names.get("DstPrefix") or "eth", {ep.interface for ep in self.endpoints}
            name = next(name for n in count() if (name := f"{prefix}{n}") not in used)
            endpoint.interface, endpoint.source = name, source
            addresses = endpoint.addresses.values()
            try:
                self.namespace.take(source, name, addresses, mac=endpoint.mac, routes=endpoint.static_routes())
            except BaseException:
                endpoint.interface = None
                raise
        else:
            self.namespace.change_routes((), endpoint.static_routes())
        if endpoint in self.gateway_endpoints():
            self.set_gateways()

    def remove(self, endpoint: Endpoint) -> None:
        """Take an endpoint out, and its interface back."""
        if endpoint not in self.endpoints:
            return
        self.endpoints.remove(endpoint)
        self.namespace.change_routes(endpoint.static_routes(), ())
        if endpoint.interface is not None:
            try:
                self.namespace.move_out(endpoint.interface, endpoint.source)
            except DriverError as error:
                _log.debug("%s", error)  # a driver may delete its link when it leaves
            endpoint.interface = None

    def set_gateways(self) -> None:
        """Make the default routes those of the gateway endpoints."""
        routes = tuple(
            Route(DEFAULT[version], endpoint.gateways[version])
            for version, endpoint in zip((4, 6), self.gateway_endpoints(), strict=True)
            if endpoint is not None and version in endpoint.gateways
        )
        self.namespace.change_routes(self._default_routes, routes)
        self._default_routes = routes
        self.host.save(self)

    def update_external(self, endpoint: Endpoint, before: tuple[Endpoint | None, Endpoint | None]) -> None:
        """Tell the drivers which endpoint carries the default routes now."""
        after = self.gateway_endpoints()
        if endpoint in after:
            for former in dict.fromkeys(filter(None, before)):
                former.program(*after)
        endpoint.program(*after)


def _port_to_wire(mapping: PortMapping) -> dict[str, Any]:
    return {
        "Proto": mapping.protocol,
        "IP": mapping.container_address or "",
        "Port": mapping.container_port,
        "HostIP": mapping.host_address or "",
        "HostPort": mapping.host_port,
        "HostPortEnd": mapping.host_port_end or mapping.host_port,
    }
