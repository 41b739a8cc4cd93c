"""Containers on the LAN of a parent interface, with MAC addresses of their own, like Docker's macvlan driver."""

import logging
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from netplugin_sdk import (
    Conflict,
    DriverOptions,
    Endpoint,
    EndpointInterface,
    InvalidOption,
    Join,
    MacAddress,
    Network,
    NetworkDriver,
    NetworkOptions,
    Sandbox,
    SkipGateway,
)
from netplugin_sdk.linux import links

_log = logging.getLogger("netplugin_macvlan")


class Options(DriverOptions):
    """The options of one network, as Docker's driver names them."""

    parent: str
    """The host's interface on the LAN. ``eth0.10``, if it is not there, is made: VLAN 10 of ``eth0``."""

    macvlan_mode: Literal["bridge", "private", "vepa", "passthru"] = "bridge"
    """Whether containers on one parent reach each other: directly, not, by the switch; or there is only one."""


@dataclass(frozen=True)
class Made:
    """Attached to each network of a parent that this driver has made."""


class MacvlanDriver(NetworkDriver[Options]):
    """A network is a parent interface; an endpoint is a macvlan on it, which the engine moves into the container."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # calls on several networks run side by side
        self._on: dict[str, dict[str, Network[Options]]] = defaultdict(dict)
        """The networks on each parent, by id."""

    def gw_alloc_check(self, options: Options, request: NetworkOptions) -> SkipGateway:
        """An internal network has no router, so its address is free for a container."""
        return SkipGateway(ipv4=request.internal, ipv6=request.internal)

    def create_network(self, network: Network[Options]) -> None:
        """See that the parent is there."""
        parent = network.options.parent
        if parent == "lo":
            raise InvalidOption("option parent=lo: the loopback is no way to a LAN")
        with self._lock:
            others = [other for other in self._on[parent].values() if other.id != network.id]
            if others and "passthru" in {each.options.macvlan_mode for each in (network, *others)}:
                raise Conflict(f"{others[0]!r} is on {parent}, and in mode passthru a parent has one network only")
            self._on[parent][network.id] = network
            if not links.exists(parent) or any(each.attached(Made) for each in (network, *others)):
                base, number = _vlan(parent)
                network.attach(Made())  # first, so that it is ours even if this process dies now
                links.ensure_vlan(parent, base, number)

    def delete_network(self, network: Network[Options]) -> None:
        """Delete the parent, if this driver has made it and no other network is on it."""
        parent = network.options.parent
        with self._lock:
            self._on[parent].pop(network.id, None)
            if network.attached(Made) and not self._on[parent]:
                links.delete(parent)

    def create_endpoint(self, network: Network[Options], endpoint: Endpoint) -> EndpointInterface | None:
        """Give the endpoint a MAC address, unless ``--mac-address`` did."""
        if endpoint.options.port_map:
            _log.warning("%r: no port is published: the LAN reaches each by the container's own address", endpoint)
        if endpoint.requested.mac_address is not None:
            return None
        address = endpoint.requested.address
        return EndpointInterface(mac_address=MacAddress.of(address.ip) if address else MacAddress.random())

    def delete_endpoint(self, network: Network[Options], endpoint: Endpoint) -> None:
        """Delete the link, which has come back from the container."""
        links.delete(endpoint.interface_name("vc"))

    def join(self, network: Network[Options], endpoint: Endpoint, sandbox: Sandbox) -> Join:
        """Make the link. The gateway is a router on the LAN."""
        options, name = network.options, endpoint.interface_name("vc")
        links.ensure_macvlan(name, options.parent, mode=options.macvlan_mode, mac=endpoint.mac_address)
        return Join(name, gateways=network.gateways)


def _vlan(name: str) -> tuple[str, int]:
    """The interface and the VLAN number that ``eth0.10`` means."""
    base, _, number = name.rpartition(".")
    if not number.isdecimal():
        raise InvalidOption(f"option parent={name}: there is no such interface; a VLAN is named like eth0.10")
    if not links.exists(base):
        raise InvalidOption(f"option parent={name}: there is no interface {base} to make a VLAN of")
    return base, int(number)
