"""Containers on the LAN of the host: as ports of a bridge, or as macvlans, with what its DHCP server grants them."""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress
from functools import partial

from netplugin_dhcp.lease import Lease, host_name
from netplugin_dhcp.leases import Interface, Leases, Refused
from netplugin_dhcp.namespaces import interface_of, within
from netplugin_dhcp.options import Options, wanted_address
from netplugin_sdk import (
    Conflict,
    Container,
    DriverError,
    Endpoint,
    EndpointInterface,
    InvalidOption,
    InvalidRequest,
    Join,
    Later,
    MacAddress,
    Network,
    NetworkDriver,
    NotFound,
    Sandbox,
    StaticRoute,
    Unavailable,
)
from netplugin_sdk.linux import firewall, links, sysctls
from netplugin_sdk.linux.firewall import Policy

_log = logging.getLogger("netplugin_dhcp")


class DhcpDriver(NetworkDriver[Options]):
    """A network is a LAN that is there: a bridge of the host, or the parent of macvlans. Neither is made nor changed.

    An endpoint is a link of its own on that LAN, with a MAC address of its own, and a lease that is obtained before
    Docker hears of the address. On a bridge it is a veth pair, whose end ``ve-ID`` is a port; the engine moves the
    other end ``vc-ID``, or the macvlan of that name, into the container. The lease is attached to the endpoint.
    """

    def __init__(self) -> None:
        self.leases = Leases()

    # ------------------------------------------------------------------------------------------------- networks

    def create_network(self, network: Network[Options]) -> None:
        """Look whether the LAN is there, and let what its bridge carries through Docker's firewall."""
        options, name = network.options, network.options.link
        if network.subnets:
            raise InvalidRequest("the LAN's DHCP server gives out the addresses: add --ipam-driver null")
        if network.internal:
            raise InvalidRequest("a LAN is not --internal: its hosts reach the containers, and are reached")
        try:
            link = links.describe(name)
        except NotFound as error:
            raise InvalidOption(f"option {'bridge' if options.bridge else 'parent'}={name}: {error}") from None
        if options.bridge and link.kind != "bridge":
            raise InvalidOption(f"option bridge={name}: it is no bridge; for macvlans on it: -o parent={name}")
        if options.parent and link.master is not None:
            raise InvalidOption(f"option parent={name}: it is a port of {link.master}; use -o bridge={link.master}")
        if options.bridge:
            firewall.ensure(Policy(bridge=name, bridged_only=True))

    def delete_network(self, network: Network[Options]) -> None:
        """Take the firewall's rules back, unless another network has the same bridge."""
        bridge = network.options.bridge
        others = [other for other in tuple(self.networks.values()) if other is not network]
        if bridge and not any(other.options.bridge == bridge for other in others):
            with suppress(InvalidRequest):  # no interface can have this name, and `create_network` has said so
                firewall.delete(bridge)

    # ------------------------------------------------------------------------------------------------ endpoints

    def create_endpoint(self, network: Network[Options], endpoint: Endpoint) -> EndpointInterface | None:
        """Make the link, and obtain a lease by it."""
        options, wanted = network.options, wanted_address(endpoint.options)
        mac = endpoint.requested.mac_address or _mac_of(endpoint)
        _make_link(network, endpoint, mac)

        def offered(lease: Lease) -> None:
            if wanted not in (None, lease.address.ip):
                raise Conflict(f"the DHCP server on {options.link} does not grant {wanted}, only {lease.address.ip}")
            endpoint.attach(lease)  # before it is ours, so that it is given back should this process die

        try:
            lease = self.leases.obtain(mac, offered, wanted=wanted, timeout=options.timeout)
        except TimeoutError:
            raise Unavailable(f"no DHCP server answered on {options.link} within {options.timeout:g} s") from None
        except Refused as no:
            raise Unavailable(f"the DHCP server on {options.link} refuses what it has offered{no}") from None
        except OSError as error:
            raise Unavailable(f"DHCP on {options.link}: {error}") from error
        endpoint.attach(lease)
        _log.info("%r: %s from %s", endpoint, lease.address, lease.server)
        return EndpointInterface(
            address=lease.address, mac_address=None if endpoint.requested.mac_address is not None else mac
        )

    def join(self, network: Network[Options], endpoint: Endpoint, sandbox: Sandbox) -> Join:
        """Let the engine take the link, and keep its lease from now on."""
        lease = endpoint.attached(Lease)
        if lease is None or endpoint.mac_address is None:
            raise Conflict(f"{endpoint!r} has no lease")
        _make_link(network, endpoint, endpoint.mac_address)
        self._keep(network, endpoint, lease)
        return Join(
            _link(endpoint),
            gateways=() if lease.gateway is None else (lease.gateway,),
            static_routes=[StaticRoute(route.destination, route.next_hop) for route in lease.routes],
        )

    def container_attached(self, network: Network[Options], endpoint: Endpoint, container: Container) -> None:
        """Tell the DHCP server the container's name."""
        self.leases.rename(_link(endpoint), host_name(container.name))

    def delete_endpoint(self, network: Network[Options], endpoint: Endpoint) -> Later:
        """Give the lease back, and delete the link."""
        return Later(self._end, network, endpoint)

    def restore_endpoint(self, network: Network[Options], endpoint: Endpoint) -> None:
        """Make the link a port of the bridge again, and go on with its lease."""
        if network.options.bridge:
            links.attach(_port(endpoint), network.options.bridge)
        if (lease := endpoint.attached(Lease)) is not None:
            self._keep(network, endpoint, lease, confirm=True)

    def endpoint_is_gone(self, network: Network[Options], endpoint: Endpoint) -> bool:
        """A pair goes with the container's network namespace. A macvlan cannot be seen; Docker tells in the end."""
        return bool(network.options.bridge) and not links.exists(_port(endpoint))

    # --------------------------------------------------------------------------------------------------- leases

    def _keep(self, network: Network[Options], endpoint: Endpoint, lease: Lease, *, confirm: bool = False) -> None:
        container = endpoint.container
        self.leases.keep(
            _link(endpoint),
            lease,
            where=partial(_interface, endpoint),
            granted=partial(_granted, network, endpoint),
            host_name="" if container is None else host_name(container.name),
            confirm=confirm,
        )

    def _end(self, network: Network[Options], endpoint: Endpoint) -> None:
        self.leases.drop(_link(endpoint))
        lease = endpoint.attached(Lease)
        try:
            if lease is not None:
                # The container may have ended with its link; the server knows the MAC address.
                mac = endpoint.mac_address or _mac_of(endpoint)
                _make_link(network, endpoint, mac)
                self.leases.release(mac, lease)
        except (DriverError, OSError) as error:
            _log.warning("%r: its lease is not given back, and expires: %s", endpoint, error)
        finally:
            links.delete(_port(endpoint) if network.options.bridge else _link(endpoint))


def _link(endpoint: Endpoint) -> str:
    """The link that the engine moves, which names the lease too."""
    return endpoint.interface_name("vc")


def _port(endpoint: Endpoint) -> str:
    """Its other end, where it is a pair."""
    return endpoint.interface_name("ve")


def _mac_of(endpoint: Endpoint) -> MacAddress:
    """The same whenever it is asked for, so that a repeated request gets the same lease. Locally administered."""
    digest = hashlib.blake2b(endpoint.id.encode(), digest_size=5).digest()
    return MacAddress.from_bytes(b"\x02" + digest)


def _make_link(network: Network[Options], endpoint: Endpoint, mac: MacAddress) -> None:
    options, inside = network.options, _link(endpoint)
    if options.bridge:
        mtu = links.describe(options.bridge).mtu  # a bridge takes the smallest of its ports', unless it was set
        links.ensure_veth(_port(endpoint), inside, master=options.bridge, mtu=mtu, mac=mac)
    else:
        links.ensure_macvlan(inside, options.parent, mac=mac)
    # While it is here it is not the host that is to get an address from the LAN's routers.
    name = f"net/ipv6/conf/{inside}/disable_ipv6"
    if sysctls.read(name) is not None:
        sysctls.ensure(name, 1)


def _interface(endpoint: Endpoint) -> Interface:
    """Where the endpoint's link is now."""
    sandbox = endpoint.sandbox
    return Interface(endpoint.mac_address or _mac_of(endpoint), None if sandbox is None else sandbox.key)


def _granted(network: Network[Options], endpoint: Endpoint, lease: Lease) -> None:
    with suppress(NotFound):  # it is being deleted
        endpoint.attach(lease)
    if network.options.ipv6 and endpoint.sandbox is not None:
        interface = _interface(endpoint)
        try:
            within(interface.namespace, partial(_enable_ipv6, interface.mac))
        except (DriverError, OSError) as error:
            _log.warning("%r: gets no IPv6 addresses: %s", endpoint, error)


def _enable_ipv6(mac: MacAddress) -> None:
    """Engines disable it on an interface that they know no IPv6 address of."""
    sysctls.ensure(f"net/ipv6/conf/{interface_of(mac)}/disable_ipv6", 0)
