"""The drivers that a controller has of itself: Docker's null, host, macvlan and ipvlan, and those of packages.

A package says that it has one by an entry point of the group ``netplugin_sdk.drivers``: ``bridge =
"myplugin.driver:BridgeDriver"``.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any, Literal

from netplugin_sdk.driver import NetworkDriver
from netplugin_sdk.errors import Conflict, InvalidOption
from netplugin_sdk.linux import links
from netplugin_sdk.linux.namespaces import DEFAULT
from netplugin_sdk.messages import EndpointInterface, Join, StaticRoute
from netplugin_sdk.options import DriverOptions
from netplugin_sdk.state import Endpoint, Network, OptionsT, Sandbox

GROUP = "netplugin_sdk.drivers"
"""The entry points of drivers."""


class NullDriver(NetworkDriver):
    """Does nothing: a sandbox on its network has what it had, only a loopback or all that the host has."""

    def create_network(self, network: Network) -> None:
        """Nothing."""

    def delete_network(self, network: Network) -> None:
        """Nothing."""

    def create_endpoint(self, network: Network, endpoint: Endpoint) -> EndpointInterface | None:
        """Nothing."""

    def delete_endpoint(self, network: Network, endpoint: Endpoint) -> None:
        """Nothing."""

    def join(self, network: Network, endpoint: Endpoint, sandbox: Sandbox) -> Join:  # noqa: ARG002
        """Nothing."""
        return Join()

    def leave(self, network: Network, endpoint: Endpoint) -> None:
        """Nothing."""


class MacvlanOptions(DriverOptions):
    """``-o`` of macvlan networks, as Docker's driver names them."""

    parent: str
    """The host's interface that they are on; it must be there."""
    macvlan_mode: Literal["bridge", "private", "vepa", "passthru"] = "bridge"


class IpvlanOptions(DriverOptions):
    """``-o`` of ipvlan networks, as Docker's driver names them."""

    parent: str
    """The host's interface that they are on; it must be there."""
    ipvlan_mode: Literal["l2", "l3", "l3s"] = "l2"


class _Upon(NetworkDriver[OptionsT]):
    """Containers are on the network of an interface of the host, with links of their own."""

    def create_network(self, network: Network[OptionsT]) -> None:
        """Look whether the parent is there, and no other network's."""
        parent = _parent(network)
        if not links.exists(parent):
            raise InvalidOption(f"option parent={parent}: there is no such interface")
        others = (other for other in self.networks.values() if other is not network and _parent(other) == parent)
        if (other := next(others, None)) is not None:
            raise Conflict(f"network {other.id[:12]} is already using parent interface {parent}")

    def delete_network(self, network: Network[OptionsT]) -> None:
        """Nothing: the parent is the host's."""

    def create_endpoint(self, network: Network[OptionsT], endpoint: Endpoint) -> EndpointInterface | None:
        """Nothing: `join` makes the link."""

    def delete_endpoint(self, network: Network[OptionsT], endpoint: Endpoint) -> None:  # noqa: ARG002
        """Delete the link, which has come back from the sandbox."""
        links.delete(endpoint.interface_name("vc"))

    def leave(self, network: Network[OptionsT], endpoint: Endpoint) -> None:
        """Nothing: the link comes back."""


def _parent(network: Network[Any]) -> str:
    return str(network.options.parent)


class MacvlanDriver(_Upon[MacvlanOptions]):
    """Docker's macvlan: links with MAC addresses of their own on a parent interface."""

    def join(self, network: Network[MacvlanOptions], endpoint: Endpoint, sandbox: Sandbox) -> Join:  # noqa: ARG002
        """The link, and the network's gateway, which is a router there."""
        options, name = network.options, endpoint.interface_name("vc")
        links.ensure_macvlan(name, options.parent, mode=options.macvlan_mode, mac=endpoint.mac_address)
        return Join(name, gateways=network.gateways)


class IpvlanDriver(_Upon[IpvlanOptions]):
    """Docker's ipvlan: links with the MAC address of a parent interface."""

    def join(self, network: Network[IpvlanOptions], endpoint: Endpoint, sandbox: Sandbox) -> Join:  # noqa: ARG002
        """The link; with l3 and l3s everything is reached by it, without a gateway."""
        options, name = network.options, endpoint.interface_name("vc")
        links.ensure_ipvlan(name, options.parent, mode=options.ipvlan_mode)
        if options.ipvlan_mode == "l2":
            return Join(name, gateways=network.gateways)
        versions = {address.version for address in endpoint.addresses}
        return Join(name, static_routes=[StaticRoute(DEFAULT[version]) for version in sorted(versions)])


BUILT_IN: dict[str, type[NetworkDriver[Any]]] = {
    "null": NullDriver,
    "host": NullDriver,
    "macvlan": MacvlanDriver,
    "ipvlan": IpvlanDriver,
}
"""By the names that Docker has for them."""


def installed(name: str) -> NetworkDriver[Any] | None:
    """A new driver of this name, if a package that is installed has one."""
    for found in entry_points(group=GROUP, name=name):
        driver = found.load()()
        if not isinstance(driver, NetworkDriver):
            raise TypeError(f"entry point {found.value} of {GROUP} is no NetworkDriver")
        return driver
    return None
