"""One Linux bridge per network, one veth pair per endpoint."""

from myplugin.options import Options
from netplugin_sdk import Endpoint, EndpointInterface, Join, MacAddress, Network, NetworkDriver, Sandbox
from netplugin_sdk.linux import firewall, links


class BridgeDriver(NetworkDriver[Options]):
    """What Docker's bridge driver does, link by link.

    A network is the bridge ``br-ID`` with the gateway addresses and its firewall rules. An endpoint is a veth pair:
    ``ve-ID`` stays on the bridge, the engine moves ``vc-ID`` into the container.
    """

    def create_network(self, network: Network[Options]) -> None:
        """Make the bridge and let its traffic through Docker's firewall."""
        bridge = network.interface_name("br")
        links.ensure_bridge(bridge, addresses=network.gateways, mtu=network.options.mtu)
        firewall.ensure_bridge(
            bridge, subnets=network.subnets, masquerade=network.options.masquerade, internal=network.internal
        )

    def delete_network(self, network: Network[Options]) -> None:
        """Remove the rules and the bridge."""
        bridge = network.interface_name("br")
        firewall.delete_bridge(bridge)
        links.delete(bridge)

    def create_endpoint(self, network: Network[Options], endpoint: Endpoint) -> EndpointInterface | None:
        """Give the endpoint a MAC address, unless ``--mac-address`` did."""
        if endpoint.requested.mac_address is not None:
            return None
        return EndpointInterface(mac_address=MacAddress.random())

    def delete_endpoint(self, network: Network[Options], endpoint: Endpoint) -> None:
        """There is nothing but what `leave` removed."""

    def join(self, network: Network[Options], endpoint: Endpoint, sandbox: Sandbox) -> Join:
        """Make the veth pair; the engine takes one end."""
        outside, inside = endpoint.interface_name("ve"), endpoint.interface_name("vc")
        links.ensure_veth(outside, inside, master=network.interface_name("br"), mtu=network.options.mtu)
        return Join(inside, gateways=network.gateways)

    def leave(self, network: Network[Options], endpoint: Endpoint) -> None:
        """Delete the pair by its outer end, wherever the inner one is."""
        links.delete(endpoint.interface_name("ve"))
