"""A base for drivers that give each container a veth pair on a bridge.

It is not imported by `netplugin_sdk`, since it loads netlink: ``from netplugin_sdk.veth import VethDriver``.
"""

from __future__ import annotations

from netplugin_sdk.driver import Later, NetworkDriver
from netplugin_sdk.linux import links
from netplugin_sdk.network import Endpoint, Network, OptionsT, Sandbox
from netplugin_sdk.protocol.messages import Join


class VethDriver(NetworkDriver[OptionsT]):
    """An endpoint is a veth pair: ``ve-ID`` is a port of the network's bridge, the engine moves ``vc-ID``.

    A subclass writes `create_network`, which makes the bridge, and `delete_network`. If somebody deletes the bridge,
    the SDK runs `create_network` again, and the pairs become ports of the new one. A subclass may extend every method::

        class L2(VethDriver[Options]):
            def mtu(self, network: Network[Options]) -> int:
                return network.options.mtu
    """

    def bridge(self, network: Network[OptionsT]) -> str:
        """The name of the network's bridge, which `create_network` makes."""
        return network.interface_name("br")

    def mtu(self, network: Network[OptionsT]) -> int:  # noqa: ARG002
        """The MTU of the pairs, in bytes."""
        return 1500

    def delete_endpoint(self, network: Network[OptionsT], endpoint: Endpoint) -> Later | None:  # noqa: ARG002
        """Delete the pair by its outer end, wherever the inner one is, after the answer."""
        return Later(links.delete, _outside(endpoint))

    def join(self, network: Network[OptionsT], endpoint: Endpoint, sandbox: Sandbox) -> Join:  # noqa: ARG002
        """Make the pair. Raises `links.LinkError`: the kernel refuses, or there is no bridge."""
        inside = endpoint.interface_name("vc")
        links.ensure_veth(_outside(endpoint), inside, master=self.bridge(network), mtu=self.mtu(network))
        return Join(inside, gateways=network.gateways)

    def restore_endpoint(self, network: Network[OptionsT], endpoint: Endpoint) -> None:
        """Make the pair a port of the bridge again, which may be another one than before."""
        links.attach(_outside(endpoint), self.bridge(network))

    def endpoint_is_gone(self, network: Network[OptionsT], endpoint: Endpoint) -> bool:  # noqa: ARG002
        """Whether the pair is gone, as it is with the container's network namespace."""
        return not links.exists(_outside(endpoint))


def _outside(endpoint: Endpoint) -> str:
    return endpoint.interface_name("ve")
