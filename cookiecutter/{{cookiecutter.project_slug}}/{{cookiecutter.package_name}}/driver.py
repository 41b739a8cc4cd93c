"""The driver: a network is a Linux bridge, and each container gets a veth pair on it.

Every method can run again, and finds what it made by names that follow from the ids: Docker repeats its calls, and the
SDK runs them again where something vanished from the kernel.
"""

from typing import Annotated

from msgspec import Meta
from netplugin_sdk import DriverOptions, Endpoint, Join, Network, NetworkDriver, Sandbox
from netplugin_sdk.linux import firewall, links
from netplugin_sdk.linux.firewall import Policy

NAME = "{{ cookiecutter.plugin_name }}"
"""What ``docker network create --driver`` gets."""


class Options(DriverOptions):
    """What ``docker network create -o KEY=VALUE`` understands. Others are refused."""

    mtu: Annotated[int, Meta(ge=1280, le=65535)] = 1500
    """MTU in bytes of the bridge and the containers' interfaces. IPv6 needs 1280 (RFC 8200)."""


class Driver(NetworkDriver[Options]):
    """One bridge per network: the gateway of its containers, whose traffic to the outside is masqueraded."""

    def create_network(self, network: Network[Options]) -> None:
        """Make the bridge, and its rules in the firewall; an ``--internal`` network's let nothing out."""
        bridge = network.interface_name("br")
        links.ensure_bridge(bridge, addresses=network.gateways, mtu=network.options.mtu)
        firewall.ensure(Policy(bridge=bridge, subnets=network.subnets, internal=network.internal))

    def delete_network(self, network: Network[Options]) -> None:
        """Remove both."""
        bridge = network.interface_name("br")
        firewall.delete(bridge)
        links.delete(bridge)

    def create_endpoint(self, network: Network[Options], endpoint: Endpoint) -> None:
        """Nothing to prepare: Docker chose the addresses, the kernel chooses the MAC address."""

    def delete_endpoint(self, network: Network[Options], endpoint: Endpoint) -> None:
        """Delete the pair by its outer end, wherever the inner one is."""
        links.delete(endpoint.interface_name("ve"))

    def join(self, network: Network[Options], endpoint: Endpoint, sandbox: Sandbox) -> Join:
        """Make the veth pair; the engine moves the inner end into the container, and gives it its addresses."""
        outside, inside = endpoint.interface_name("ve"), endpoint.interface_name("vc")
        links.ensure_veth(outside, inside, master=network.interface_name("br"), mtu=network.options.mtu)
        return Join(inside, gateways=network.gateways)

    def leave(self, network: Network[Options], endpoint: Endpoint) -> None:
        """The engine takes the inner end out of the container."""

    def restore_endpoint(self, network: Network[Options], endpoint: Endpoint) -> None:
        """Put the pair on the bridge, which may be a new one."""
        links.attach(endpoint.interface_name("ve"), network.interface_name("br"))

    def endpoint_is_gone(self, network: Network[Options], endpoint: Endpoint) -> bool:
        """The pair goes with the container's network namespace, as after a reboot."""
        return not links.exists(endpoint.interface_name("ve"))
