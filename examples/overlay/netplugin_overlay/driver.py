"""One network over all nodes of a swarm, in VXLANs between them, like Docker's overlay driver."""

import logging
import threading
import time
from collections.abc import Mapping
from ipaddress import IPv6Interface, IPv6Network
from typing import Annotated, ClassVar

from msgspec import Struct

from netplugin_sdk import (
    DriverError,
    DriverOptions,
    Endpoint,
    EndpointInterface,
    InvalidOption,
    InvalidRequest,
    Join,
    Later,
    MacAddress,
    Meta,
    Network,
    NetworkDriver,
    Node,
    Sandbox,
    Scope,
    Unavailable,
)
from netplugin_sdk.linux import firewall, links, shortcut, sysctls
from netplugin_sdk.linux.announce import announce, announce_to
from netplugin_sdk.linux.firewall import Policy
from netplugin_sdk.values import IPAddress

_log = logging.getLogger("netplugin_overlay")

_HEADERS = {4: 50, 6: 70}  # bytes of the underlay's IP, UDP, VXLAN and the inner Ethernet header (RFC 7348)
_ANNOUNCED = 0.0, 1.0, 1.0  # seconds between: one may be lost


class Options(DriverOptions):
    """The options of one network."""

    vni: Annotated[int, Meta(ge=1, lt=1 << 24)]
    """The VXLAN network identifier, the same on all nodes. The managers give one if the user does not."""

    mtu: Annotated[int, Meta(ge=1280, le=65535)] | None = None
    """Of the containers' interfaces, in bytes; by default what the underlay's interface leaves on each node."""

    port: Annotated[int, Meta(ge=1, le=65535)] = 4789
    """The UDP port of all nodes."""

    ipv6: IPv6Network | None = None
    """A prefix of at most 96 bits, such as ``fd00:1::/96``: each container has an address in it with its IPv4 address
    at the end. Engines give out IPv6 addresses each for itself, so two nodes would give the same one twice."""


class Carried(Struct, frozen=True):
    """Attached to each network: the MTU that it has on this node."""

    mtu: int


class OverlayDriver(NetworkDriver[Options]):
    """A network is a bridge ``ov-ID`` with a VXLAN ``vx-ID`` to the other nodes, where a container of it runs.

    An endpoint is a veth pair: ``ve-ID`` is a port of the bridge, the engine moves ``vc-ID`` into the container. The
    VXLAN sends a frame whose node it does not know to each node (head-end replication). The bridge has no address: the
    host is no part of the network, and a container's other traffic goes by its other interface, which the engine makes
    on ``docker_gwbridge``; so do published ports (``mode=host``).
    """

    scope = Scope.GLOBAL
    # Docker's own overlay counts from 4096, and a VXLAN is known by port and number for all of a host.
    cluster_numbers: ClassVar[Mapping[str, range]] = {"vni": range(1 << 20, 1 << 24)}

    def __init__(self) -> None:
        self._shortening = threading.Lock()

    # -------------------------------------------------------------------------------------------------- networks

    def create_network(self, network: Network[Options]) -> None:
        """Make bridge and VXLAN, and have it flood to exactly the peers."""
        options, bridge, vxlan = network.options, *_names(network)
        if options.ipv6 is not None and options.ipv6.prefixlen > 96:
            raise InvalidOption(f"option ipv6={options.ipv6}: at most 96 bits leave room for an IPv4 address")
        if any(subnet.version == 6 for subnet in network.subnets):
            raise InvalidRequest("each node gives out IPv6 addresses for itself: not --ipv6, but -o ipv6=PREFIX")
        underlay, mtu = self._underlay(options)
        network.attach(Carried(mtu))
        links.ensure_bridge(bridge, mtu=mtu)
        links.ensure_vxlan(vxlan, options.vni, master=bridge, local=underlay, port=options.port, mtu=mtu)
        for name in (bridge, vxlan):
            parameter = f"net/ipv6/conf/{name}/disable_ipv6"
            if sysctls.read(parameter) is not None:
                sysctls.ensure(parameter, 1)  # else the host would have a link-local address in the network
        links.set_flood_destinations(vxlan, [peer for peer in self.peers if peer.version == underlay.version])
        firewall.ensure(Policy(bridge=bridge, network=network.id[:12], internal=True))
        self._shorten(network)

    def _shorten(self, network: Network[Options]) -> None:
        """Let frames between containers, and to and from the VXLAN, pass by bridge and firewall. Not waited for."""

        def shorten() -> None:
            with self._shortening:
                ports = {
                    endpoint.mac_address: endpoint.interface_name("ve")
                    for endpoint in tuple(network.endpoints.values())
                    if endpoint.mac_address is not None
                }
                shortcut.ensure(network.interface_name("ov"), ports, network.interface_name("vx"))

        threading.Thread(target=shorten, name="shortcut").start()

    def _underlay(self, options: Options) -> tuple[IPAddress, int]:
        """This node's address, and the MTU that a network has on it."""
        if self.this_node is None:
            raise Unavailable("this host is no node of a swarm, as far as its engine has told")
        address = self.this_node.address
        underlay = links.with_address(address)
        room = underlay.mtu - _HEADERS[address.version]
        if options.mtu is not None and options.mtu > room:
            raise InvalidOption(f"option mtu={options.mtu}: {underlay.name} ({address}) leaves {room} bytes")
        return address, options.mtu or room

    def delete_network(self, network: Network[Options]) -> Later:
        """Remove both: the kernel takes its time."""
        bridge, vxlan = _names(network)
        firewall.delete(bridge)

        def remove() -> None:
            links.delete(vxlan)
            links.delete(bridge)
            with self._shortening:
                shortcut.delete(bridge)

        return Later(remove)

    # ----------------------------------------------------------------------------------------------------- nodes

    def peer_joined(self, network: Network[Options], peer: Node) -> None:
        """Flood to it, too; and tell it where this node's containers are: it may remember them elsewhere."""
        this, options = self.this_node, network.options
        if this is None or peer.address.version != this.address.version:
            return
        links.add_flood_destination(network.interface_name("vx"), peer.address)
        owners = _owners(*network.endpoints.values())
        try:
            announce_to(peer.address, owners, vni=options.vni, local=this.address, port=options.port)
        except DriverError as error:  # it is gone again, and learns from what it is sent
            _log.warning("%r: %s", network, error)

    def peer_left(self, network: Network[Options], peer: Node) -> None:
        """Flood to it no more, and forget what was there."""
        links.delete_flood_destination(network.interface_name("vx"), peer.address)

    # ------------------------------------------------------------------------------------------------- endpoints

    def create_endpoint(self, network: Network[Options], endpoint: Endpoint) -> EndpointInterface:
        """Give the endpoint the addresses that follow from its IPv4 address.

        The next container with that address has the MAC address that the neighbours remember.
        """
        requested = endpoint.requested
        if requested.address is None:
            return EndpointInterface(mac_address=None if requested.mac_address else MacAddress.random())
        return EndpointInterface(
            mac_address=None if requested.mac_address else MacAddress.of(requested.address.ip),
            address_ipv6=None if requested.address_ipv6 else _ipv6(network.options, int(requested.address.ip)),
        )

    def delete_endpoint(self, network: Network[Options], endpoint: Endpoint) -> Later:
        """Delete the pair, which has come back from the container."""

        def remove() -> None:
            links.delete(endpoint.interface_name("ve"))
            self._shorten(network)

        return Later(remove)

    def join(self, network: Network[Options], endpoint: Endpoint, sandbox: Sandbox) -> Join:
        """Make the pair; the other nodes are told that the address is here now."""
        bridge, _ = _names(network)
        outside, inside = endpoint.interface_name("ve"), endpoint.interface_name("vc")
        carried = network.attached(Carried)
        mtu = None if carried is None else carried.mtu
        links.ensure_veth(outside, inside, master=bridge, mtu=mtu, mac=endpoint.mac_address)
        self.restore_endpoint(network, endpoint)
        self._shorten(network)
        return Join(inside, gateway_service=not network.internal)

    def restore_endpoint(self, network: Network[Options], endpoint: Endpoint) -> None:
        """See that the pair is the bridge's port for its MAC address, and that all nodes know."""
        bridge, _ = _names(network)
        outside, mac = endpoint.interface_name("ve"), endpoint.mac_address
        if mac is not None and links.attach(outside, bridge):
            links.ensure_fdb_entry(mac, outside)
            _tell(network, endpoint)

    def endpoint_is_gone(self, network: Network[Options], endpoint: Endpoint) -> bool:
        """The pair ends with its container."""
        return not links.exists(endpoint.interface_name("ve"))


def _names(network: Network[Options]) -> tuple[str, str]:
    return network.interface_name("ov"), network.interface_name("vx")


def _ipv6(options: Options, ipv4: int) -> IPv6Interface | None:
    if options.ipv6 is None:
        return None
    return IPv6Interface((options.ipv6[ipv4], options.ipv6.prefixlen))


def _owners(*endpoints: Endpoint) -> dict[IPAddress, MacAddress]:
    return {
        address.ip: endpoint.mac_address
        for endpoint in endpoints
        if endpoint.mac_address is not None
        for address in endpoint.addresses
    }


def _tell(network: Network[Options], endpoint: Endpoint) -> None:
    """Have all nodes hear where it is. Not waited for."""
    owners = _owners(endpoint)

    def tell() -> None:
        for pause in _ANNOUNCED:
            time.sleep(pause)
            try:
                announce(network.interface_name("vx"), owners)
            except DriverError as error:  # it is deleted again
                _log.debug("%r: %s", network, error)
                return

    threading.Thread(target=tell, name="announcement", daemon=True).start()
