"""The options of ``docker network create -d myplugin -o KEY=VALUE``: the keys of Docker's own bridge driver."""

from ipaddress import IPv4Address, IPv6Address
from typing import Self

from netplugin_sdk import DriverOptions, field
from netplugin_sdk.linux.firewall import Mode


class Mtu(int):
    """An MTU in bytes that IPv4 takes (RFC 791); bridge's 0 is 1500."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError for what is none."""
        if not text.isdecimal() or not 68 <= (value := int(text) or 1500) <= 65535:
            raise ValueError("expected 68 to 65535, or 0 for 1500")
        return cls(value)


class Prefix(str):
    """A prefix for interfaces' names: the kernel takes 15 bytes with the number (IFNAMSIZ)."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError for what cannot be in a name."""
        if len(text.encode()) > 12 or not text.isprintable() or set(text) & set(" /:%"):
            raise ValueError("expected up to 12 bytes without white space, '/', ':' or '%'")
        return cls(text or "eth")


class Options(DriverOptions):
    """The options of one network, with their defaults."""

    mtu: Mtu = field(name="com.docker.network.driver.mtu", default=Mtu(1500))
    """MTU of the bridge, the veths and the containers' interfaces."""

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
    """How containers reach the outside by IPv4, and which of their ports are reached from there."""

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

    prefix: Prefix = field(name="com.docker.network.container_iface_prefix", default=Prefix("eth"))
    """The prefix of the containers' interface names, before the number."""
