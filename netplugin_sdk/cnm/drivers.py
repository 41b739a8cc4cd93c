"""The drivers that a controller has of itself: Docker's null, host, macvlan …, and those of packages.

A package says that it has one by an entry point of the group ``netplugin_sdk.drivers``: ``bridge =
"myplugin.driver:BridgeDriver"``.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from threading import Lock
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from netplugin_sdk.driver import NetworkDriver
from netplugin_sdk.errors import Conflict, InvalidOption
from netplugin_sdk.ipam import NumberPool
from netplugin_sdk.linux import firewall, links
from netplugin_sdk.linux.firewall import Policy
from netplugin_sdk.linux.namespaces import DEFAULT
from netplugin_sdk.network import Endpoint, Network, OptionsT, Sandbox
from netplugin_sdk.protocol.messages import EndpointInterface, Join, StaticRoute
from netplugin_sdk.protocol.options import DriverOptions

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


class OverlayOptions(DriverOptions):
    """``-o`` of overlay networks, as Docker's driver names them."""

    vni: Annotated[int, Meta(ge=1, lt=1 << 24)] | None = field(
        name="com.docker.network.driver.overlay.vxlanid_list", default=None
    )
    """VXLAN network identifier (RFC 7348); none takes the next free one from 4096."""
    mtu: Annotated[int, Meta(ge=68, le=65535)] = field(name="com.docker.network.driver.mtu", default=1450)
    """Of the containers' interfaces, in bytes: VXLAN adds 50."""


class Identified(Struct, frozen=True):
    """Attached to an overlay network: its VXLAN network identifier."""

    vni: int


class OverlayDriver(NetworkDriver[OverlayOptions]):
    """Docker's overlay on one host: a bridge with a VXLAN as a port, which nobody is told the other hosts of."""

    def __init__(self) -> None:
        self._choosing = Lock()

    def create_network(self, network: Network[OverlayOptions]) -> None:
        """A bridge, and the VXLAN."""
        with self._choosing:
            identified = network.attached(Identified)
            if identified is None:
                identified = Identified(network.options.vni or self._free())
                network.attach(identified)
        bridge = network.interface_name("ov")
        links.ensure_bridge(bridge, mtu=network.options.mtu)
        links.ensure_vxlan(network.interface_name("vx"), identified.vni, master=bridge, mtu=network.options.mtu)
        firewall.ensure(Policy(bridge=bridge, bridged_only=True))  # Docker's would drop what goes from port to port

    def _free(self) -> int:
        numbers = NumberPool(4096, (1 << 24) - 1)
        for other in self.networks.values():
            if (known := other.attached(Identified)) is not None and known.vni >= numbers.first:
                numbers.take(known.vni)
        return numbers.allocate()

    def delete_network(self, network: Network[OverlayOptions]) -> None:
        """Delete both."""
        firewall.delete(network.interface_name("ov"))
        for prefix in ("vx", "ov"):
            links.delete(network.interface_name(prefix))

    def create_endpoint(self, network: Network[OverlayOptions], endpoint: Endpoint) -> EndpointInterface | None:
        """Nothing: `join` makes the links."""

    def delete_endpoint(self, network: Network[OverlayOptions], endpoint: Endpoint) -> None:  # noqa: ARG002
        """Delete the links."""
        links.delete(endpoint.interface_name("ve"))

    def join(self, network: Network[OverlayOptions], endpoint: Endpoint, sandbox: Sandbox) -> Join:  # noqa: ARG002
        """A pair to the bridge; there is no gateway on an overlay."""
        outside, inside = endpoint.interface_name("ve"), endpoint.interface_name("vc")
        links.ensure_veth(outside, inside, master=network.interface_name("ov"), mtu=network.options.mtu)
        return Join(inside)

    def leave(self, network: Network[OverlayOptions], endpoint: Endpoint) -> None:
        """Nothing: the link comes back."""


BUILT_IN: dict[str, type[NetworkDriver[Any]]] = {
    "null": NullDriver,
    "host": NullDriver,
    "macvlan": MacvlanDriver,
    "ipvlan": IpvlanDriver,
    "overlay": OverlayDriver,
}
"""By the names that Docker has for them."""


def installed(name: str) -> NetworkDriver[Any] | None:
    """A new driver of this name, if a package that is installed has one."""
    for found in entry_points(group=GROUP, name=name):
        driver = found.load()()
        if not isinstance(driver, NetworkDriver):
            raise TypeError(f"entry point {found.value} of {GROUP} is not a NetworkDriver")
        return driver
    return None
