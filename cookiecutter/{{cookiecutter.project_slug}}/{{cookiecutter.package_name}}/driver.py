"""The driver: a network is a Linux bridge, and each container gets a veth pair on it.

Every method can run again, and finds what it made by names that follow from the ids: Docker repeats its calls, and the
SDK runs them again where something vanished from the kernel.
"""

from typing import Annotated

from netplugin_sdk import DriverOptions, Meta, Network
from netplugin_sdk.linux import firewall, links
from netplugin_sdk.linux.firewall import Policy
from netplugin_sdk.veth import VethDriver

NAME = "{{ cookiecutter.plugin_name }}"
"""The name for ``docker network create --driver``."""


class Options(DriverOptions):
    """The options of ``docker network create -o KEY=VALUE``. Others are refused."""

    mtu: Annotated[int, Meta(ge=1280, le=65535)] = 1500
    """MTU in bytes of the bridge and the containers' interfaces. IPv6 needs 1280 (RFC 8200)."""


class Driver(VethDriver[Options]):
    """One bridge per network: the gateway of its containers, whose traffic to the outside is masqueraded.

    `VethDriver` makes the pairs. To make something else, subclass `NetworkDriver`, and write `join` and
    `delete_endpoint`, too.
    """

    def create_network(self, network: Network[Options]) -> None:
        """Make the bridge, and its rules in the firewall; an ``--internal`` network's let nothing out."""
        bridge = self.bridge(network)
        links.ensure_bridge(bridge, addresses=network.gateways, mtu=network.options.mtu)
        firewall.ensure(Policy(bridge=bridge, subnets=network.subnets, internal=network.internal))

    def delete_network(self, network: Network[Options]) -> None:
        """Remove both."""
        bridge = self.bridge(network)
        firewall.delete(bridge)
        links.delete(bridge)

    def mtu(self, network: Network[Options]) -> int:
        """The containers' interfaces have the bridge's."""
        return network.options.mtu
