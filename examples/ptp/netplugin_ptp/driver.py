"""Routed containers: each has a veth pair and a route to its address, and there is no bridge."""

import logging
from collections.abc import Iterator
from ipaddress import ip_interface, ip_network
from typing import Annotated

from netplugin_sdk import (
    DriverOptions,
    Endpoint,
    InvalidRequest,
    Join,
    Meta,
    Network,
    NetworkDriver,
    Sandbox,
    StaticRoute,
)
from netplugin_sdk.linux import firewall, links, sysctls
from netplugin_sdk.linux.firewall import Policy

_log = logging.getLogger("netplugin_ptp")


class Options(DriverOptions):
    """The options of one network."""

    mtu: Annotated[int, Meta(ge=1280, le=65535)] = 1500
    """Of the pairs, in bytes; not less than IPv6 needs (RFC 8200)."""

    icc: bool = True
    """Whether containers of the network reach each other."""

    masquerade: bool = True
    """Whether what leaves the host has the host's address as its source. If not, others must know the way back."""


class PtpDriver(NetworkDriver[Options]):
    """The host is the router of its containers.

    An endpoint is a veth pair: the engine moves ``vc-ID`` into the container; ``ve-ID`` has the gateway's address, and
    a route leads to the container's by it. A network is the group of these links, which the firewall knows it by.
    """

    def create_network(self, network: Network[Options]) -> None:
        """Let the group's traffic through the firewall, and let nothing that is for the subnet leave the host."""
        if not network.subnets or len(network.gateways) != len(network.subnets):
            raise InvalidRequest("a routed network needs subnets with gateways: it cannot have --ipam-driver null")
        for subnet in network.subnets:
            firewall.ensure_forwarding(subnet.version)
            links.ensure_route(subnet)  # unreachable, but for its containers
        firewall.ensure(
            Policy(
                bridge=network.interface_name("pt"),
                group=network.interface_group,
                network=network.id[:12],
                subnets=network.subnets,
                internal=network.internal,
                icc=network.options.icc,
                masquerade=network.options.masquerade,
            )
        )

    def delete_network(self, network: Network[Options]) -> None:
        """Take both back."""
        firewall.delete(network.interface_name("pt"))
        for subnet in network.subnets:
            links.delete_route(subnet)

    def create_endpoint(self, network: Network[Options], endpoint: Endpoint) -> None:
        """The link is made by `join`."""
        if endpoint.options.port_map:
            _log.warning("%r: no port is published: this driver does not do that", endpoint)

    def delete_endpoint(self, network: Network[Options], endpoint: Endpoint) -> None:
        """Delete the pair, and the route with it: now, since the next container may get the address."""
        links.delete(endpoint.interface_name("ve"))

    def join(self, network: Network[Options], endpoint: Endpoint, sandbox: Sandbox) -> Join:
        """Make the pair and the route to it; the engine takes one end."""
        for other in network.endpoints.values():
            if other is not endpoint and set(other.addresses) & set(endpoint.addresses):
                links.delete(other.interface_name("ve"))  # an engine that was killed has forgotten it
        inside = endpoint.interface_name("vc")
        links.ensure_veth(endpoint.interface_name("ve"), inside, mtu=network.options.mtu)
        self.restore_endpoint(network, endpoint)
        return Join(inside, gateways=network.gateways, static_routes=_routes(network, endpoint))

    def restore_endpoint(self, network: Network[Options], endpoint: Endpoint) -> None:
        """The host's part of the pair: addresses, group and route."""
        outside = endpoint.interface_name("ve")
        if not links.exists(outside):
            return
        if endpoint.interface.address_ipv6:
            sysctls.ensure(f"net/ipv6/conf/{outside}/disable_ipv6", 0)
            # Nobody else is here; and until its link-local address is verified the host cannot ask for the container.
            sysctls.ensure(f"net/ipv6/conf/{outside}/accept_dad", 0)
        sysctls.ensure(f"net/ipv4/conf/{outside}/rp_filter", 1)  # nobody has another's address as its source
        gateways = [ip_interface(gateway.ip) for gateway in network.gateways]
        links.set_up(outside, addresses=gateways, group=network.interface_group)
        for address in endpoint.addresses:
            links.ensure_route(ip_network(address.ip), outside)

    def endpoint_is_gone(self, network: Network[Options], endpoint: Endpoint) -> bool:
        """The pair goes with the container's network namespace."""
        return not links.exists(endpoint.interface_name("ve"))


def _routes(network: Network[Options], endpoint: Endpoint) -> Iterator[StaticRoute]:
    """To the neighbours by the gateway too.

    The container has its address with the subnet's prefix length, and would look for all of the subnet on its link.
    Routes to the halves are more specific.
    """
    for address in endpoint.addresses:
        gateway = next(gateway.ip for gateway in network.gateways if gateway.ip in address.network)
        yield StaticRoute(ip_network(gateway))
        for subnet in network.subnets:
            for half in subnet.subnets():
                if half.version == gateway.version and half.num_addresses > 1:  # else gateway and container are all
                    yield StaticRoute(half, gateway)
