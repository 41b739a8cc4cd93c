"""One Linux bridge per network, one veth pair per endpoint: Docker's bridge driver, option by option."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from myplugin.options import Options
from netplugin_sdk import (
    Conflict,
    Endpoint,
    EndpointInterface,
    EndpointOptions,
    InvalidOption,
    IPInterface,
    Join,
    Later,
    MacAddress,
    Network,
    NetworkOptions,
    PortMapping,
    Sandbox,
    SkipGateway,
    TransportProtocol,
)
from netplugin_sdk.linux import conntrack, firewall, links, ports, sysctls, together
from netplugin_sdk.linux.firewall import Mode, Policy
from netplugin_sdk.linux.ports import Published
from netplugin_sdk.veth import VethDriver

_log = logging.getLogger("myplugin")


@dataclass(frozen=True)
class Device:
    """Attached to a network: the settings of its bridge before, if it was there."""

    adopted: bool = False
    mtu: int = 0
    up: bool = False
    added: tuple[IPInterface, ...] = ()
    """The addresses that it got."""
    disable_ipv6: str | None = None


@dataclass(frozen=True)
class Ports:
    """Attached to an endpoint: the published ports, and with host port 0 those that are open without translation."""

    published: tuple[Published, ...] = ()


class BridgeDriver(VethDriver[Options]):
    """The driver: does what Docker's bridge driver does.

    A network is a bridge with the gateway addresses and its firewall rules. An endpoint is a veth pair: ``ve-ID`` stays
    on the bridge, the engine moves ``vc-ID`` into the container. Its published ports are held open on the host, and
    the rules lead them to it.
    """

    # ------------------------------------------------------------------------------------------------- networks

    def gw_alloc_check(self, options: Options, request: NetworkOptions) -> SkipGateway:
        """A bridge that gets no address needs no gateway address, unless containers are told a default route."""
        return SkipGateway(
            ipv4=options.gateway_mode_ipv4 is Mode.ISOLATED or (options.inhibit_ipv4 and request.internal),
            ipv6=options.gateway_mode_ipv6 is Mode.ISOLATED,
        )

    def create_network(self, network: Network[Options]) -> None:
        """Make the bridge and let its traffic through Docker's firewall."""
        options, bridge = network.options, _bridge(network)
        policy = _policy(network)  # first, since it refuses what cannot be written into a rule
        if options.mtu < 1280 and any(subnet.version == 6 for subnet in network.subnets):
            raise InvalidOption(f"option com.docker.network.driver.mtu={options.mtu}: IPv6 needs 1280 (RFC 8200)")
        if Mode.ISOLATED in (options.gateway_mode_ipv4, options.gateway_mode_ipv6) and not network.internal:
            raise InvalidOption("gateway mode 'isolated' can only be used for an internal network")
        for other in tuple(self.networks.values()):
            if other is not network:
                _refuse_overlap(network, other)
        if network.attached(Device) is None:
            network.attach(_before(network, bridge))
        links.ensure_bridge(bridge, addresses=_bridge_addresses(network), mtu=options.mtu, group=firewall.GROUP)
        _set_sysctls(network, bridge)
        firewall.ensure(policy)

    def delete_network(self, network: Network[Options]) -> Later | None:
        """Remove the rules, and the bridge unless it was there before."""
        bridge = _bridge(network)
        device = network.attached(Device)
        if device is None:
            return None  # nothing was made, and the name may be another network's
        remove = partial(_give_back, bridge, device) if device.adopted else partial(links.delete, bridge)
        return Later(together, partial(firewall.delete, bridge), remove)

    # ------------------------------------------------------------------------------------------------ endpoints

    def create_endpoint(self, network: Network[Options], endpoint: Endpoint) -> EndpointInterface | None:
        """Give the endpoint a MAC address, unless ``--mac-address`` did."""
        if endpoint.requested.mac_address is not None:
            return None
        address = endpoint.requested.address
        return EndpointInterface(mac_address=MacAddress.of(address.ip) if address else MacAddress.random())

    def join(self, network: Network[Options], endpoint: Endpoint, sandbox: Sandbox) -> Join:
        """Make the veth pair; the engine takes one end."""
        made = super().join(network, endpoint, sandbox)
        return Join(made.interface, prefix=network.options.prefix, gateways=_gateways(network))

    def bridge(self, network: Network[Options]) -> str:
        """``-o com.docker.network.bridge.name=``, else a name of its own."""
        return _bridge(network)

    def mtu(self, network: Network[Options]) -> int:
        """``-o com.docker.network.driver.mtu=``."""
        return network.options.mtu

    def endpoint_oper_info(self, network: Network[Options], endpoint: Endpoint) -> Mapping[str, Any]:
        """The facts that bridge tells. From a plugin the engine shows only some of them (moby daemon/network.go)."""
        return {
            "com.docker.network.endpoint.macaddress": endpoint.mac_address,
            "com.docker.network.endpoint.exposedports": endpoint.options.exposed_ports,
            "com.docker.network.portmap": [
                PortMapping(
                    protocol=port.protocol,
                    container_address=port.address,
                    container_port=port.port,
                    host_address=port.host_address,
                    host_port=port.host_port,
                    host_port_end=port.host_port,
                )
                for port in _published(endpoint)
            ],
        }

    # ------------------------------------------------------------------------------------------ published ports

    def program_external_connectivity(
        self, network: Network[Options], endpoint: Endpoint, options: EndpointOptions
    ) -> None:
        """Take the host ports, and let what comes to them through to the container."""
        if not options.port_map or network.internal:
            return
        translated = [a for a in endpoint.addresses if _mode(network, a.version) is not Mode.ROUTED]
        published = ports.publish(
            endpoint.id,
            options.port_map,
            addresses=translated,
            default_host=network.options.host_binding,
            six_to_four=not options.no_proxy_6to4,
            keep=_published(endpoint),
        )
        published += tuple(
            Published(
                protocol=mapping.protocol,
                host_address=type(address.ip)(0),
                host_port=0,
                address=address.ip,
                port=mapping.container_port,
            )
            for address in endpoint.addresses
            if address not in translated
            for mapping in options.port_map
        )
        endpoint.attach(Ports(published))
        firewall.ensure(_policy(network))
        _log.info("%r: published %s", endpoint, ", ".join(map(str, published)))

    def revoke_external_connectivity(self, network: Network[Options], endpoint: Endpoint) -> None:
        """Free the host ports."""
        published = _published(endpoint)
        endpoint.attach(Ports())
        if network.attached(Device) is not None and published:
            firewall.ensure(_policy(network))
        ports.release(endpoint.id)
        for address in {port.address for port in published if port.protocol is TransportProtocol.UDP}:
            conntrack.forget_published(address)


def _bridge(network: Network[Options]) -> str:
    return network.options.bridge or network.interface_name("br")


def _mode(network: Network[Options], version: int) -> Mode:
    return network.options.gateway_mode_ipv4 if version == 4 else network.options.gateway_mode_ipv6


def _published(endpoint: Endpoint) -> tuple[Published, ...]:
    return (endpoint.attached(Ports) or Ports()).published


def _bridge_addresses(network: Network[Options]) -> Iterator[IPInterface]:
    for gateway in network.gateways:
        inhibited = gateway.version == 4 and network.options.inhibit_ipv4
        if not inhibited and _mode(network, gateway.version) is not Mode.ISOLATED:
            yield gateway


def _gateways(network: Network[Options]) -> Iterator[IPInterface]:
    """Of containers: the bridge's, or what ``--aux-address DefaultGatewayIPv4=`` (or 6) names."""
    for data in network.ipam:
        named = data.auxiliary_addresses.get(f"DefaultGatewayIPv{data.pool.version}")
        if (gateway := named or data.gateway) is not None:
            yield gateway


def _policy(network: Network[Options]) -> Policy:
    """The firewall's policy for this network and its endpoints."""
    options = network.options
    return Policy(
        bridge=_bridge(network),
        network=network.id[:12],
        subnets=network.subnets,
        internal=network.internal,
        icc=options.icc,
        masquerade=options.masquerade,
        sources=tuple(address for address in (options.host_ipv4, options.host_ipv6) if address is not None),
        mode4=options.gateway_mode_ipv4,
        mode6=options.gateway_mode_ipv6,
        trusted=tuple(name for name in options.trusted.split(":") if name),
        published={
            endpoint.id[:12]: published
            for endpoint in tuple(network.endpoints.values())
            if (published := _published(endpoint))
        },
    )


def _before(network: Network[Options], bridge: str) -> Device:
    if not links.exists(bridge):
        return Device()
    link = links.describe(bridge)
    return Device(
        adopted=True,
        mtu=link.mtu,
        up=link.up,
        added=tuple(address for address in _bridge_addresses(network) if address not in link.addresses),
        disable_ipv6=sysctls.read(f"net/ipv6/conf/{bridge}/disable_ipv6"),
    )


def _give_back(bridge: str, device: Device) -> None:
    links.restore_link(bridge, mtu=device.mtu, up=device.up, without=device.added)
    if device.disable_ipv6 is not None and links.exists(bridge):
        sysctls.ensure(f"net/ipv6/conf/{bridge}/disable_ipv6", device.disable_ipv6)


def _refuse_overlap(network: Network[Options], other: Network[Options]) -> None:
    if _bridge(network) == _bridge(other):
        raise Conflict(f"{network!r} conflicts with {other!r}: networks have same bridge name {_bridge(other)!r}")
    for one in network.subnets:
        for two in other.subnets:
            if one.version == two.version and one.overlaps(two):
                raise Conflict(f"{network!r} conflicts with {other!r}: networks have overlapping subnets {one}, {two}")


def _set_sysctls(network: Network[Options], bridge: str) -> None:
    versions = {subnet.version for subnet in network.subnets}
    for version in sorted(versions):
        firewall.ensure_forwarding(version)
    if 6 in versions:
        isolated = network.options.gateway_mode_ipv6 is Mode.ISOLATED
        sysctls.ensure(f"net/ipv6/conf/{bridge}/disable_ipv6", int(isolated))
    device = network.attached(Device)
    if device and not device.adopted and sysctls.read(f"net/ipv6/conf/{bridge}/accept_ra") is not None:
        sysctls.ensure(f"net/ipv6/conf/{bridge}/accept_ra", 0)  # no neighbour is the host's router
    if not network.options.icc:
        # Else what goes from one port of the bridge to another is not filtered.
        for version in versions:
            sysctls.ensure(f"net/bridge/bridge-nf-call-ip{'6' if version == 6 else ''}tables", 1)
