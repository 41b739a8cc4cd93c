"""What ``docker network create -d myplugin -o KEY=VALUE`` understands: the keys of Docker's own bridge driver."""

from ipaddress import IPv4Address, IPv6Address
from typing import Annotated

from msgspec import Meta, field

from netplugin_sdk import DriverOptions
from netplugin_sdk.linux.firewall import Mode


class Options(DriverOptions):
    """The options of one network, with their defaults."""

    mtu: Annotated[int, Meta(ge=68, le=65535)] = field(name="com.docker.network.driver.mtu", default=1500)
    """MTU in bytes of the bridge, the veths and the containers' interfaces; 68 is IPv4's least (RFC 791)."""

    bridge: str = field(name="com.docker.network.bridge.name", default="")
    """Name of the bridge; empty is ``br-`` and 12 characters of the network's id. One that exists is used, and kept."""

    icc: bool = field(name="com.docker.network.bridge.enable_icc", default=True)
    """Whether containers of the network reach each other, other than by published ports."""

    masquerade: bool = field(name="com.docker.network.bridge.enable_ip_masquerade", default=True)
    """Whether packets that leave the host get the host's address as their source."""

    host_ipv4: IPv4Address | None = field(name="com.docker.network.host_ipv4", default=None)
    """That address for IPv4; none is the one of the interface that they leave by."""

    host_ipv6: IPv6Address | None = field(name="com.docker.network.host_ipv6", default=None)
    """That address for IPv6."""

    gateway_mode_ipv4: Mode = field(name="com.docker.network.bridge.gateway_mode_ipv4", default=Mode.NAT)
    """How the outside is reached by IPv4, and what of the containers is reached from there."""

    gateway_mode_ipv6: Mode = field(name="com.docker.network.bridge.gateway_mode_ipv6", default=Mode.NAT)
    """How it is by IPv6."""

    host_binding: IPv4Address = field(
        name="com.docker.network.bridge.host_binding_ipv4", default_factory=lambda: IPv4Address("0.0.0.0")
    )
    """Address of the host that ports are published on, where ``-p`` names none."""

    trusted: str = field(name="com.docker.network.bridge.trusted_host_interfaces", default="")
    """Interfaces, separated by ``:``, from which published ports are also reached by the container's own address."""

    inhibit_ipv4: bool = field(name="com.docker.network.bridge.inhibit_ipv4", default=False)
    """Whether the bridge gets no IPv4 address."""

    prefix: Annotated[str, Meta(pattern=r"^[^\s/:%]{0,12}$")] = field(
        name="com.docker.network.container_iface_prefix", default="eth"
    )
    """What the names of the containers' interfaces begin with: up to 12 characters, before the number."""
