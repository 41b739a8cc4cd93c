"""What ``docker network create -d myplugin -o KEY=VALUE`` understands: the keys of Docker's own bridge driver."""

from typing import Annotated

from msgspec import Meta, field

from netplugin_sdk import DriverOptions


class Options(DriverOptions):
    """The options of one network, with their defaults."""

    mtu: Annotated[int, Meta(ge=68, le=65535)] = field(name="com.docker.network.driver.mtu", default=1500)
    """MTU in bytes of the bridge, the veths and the containers' interfaces; 68 is IPv4's least (RFC 791)."""

    masquerade: bool = field(name="com.docker.network.bridge.enable_ip_masquerade", default=True)
    """Whether packets that leave the host get the host's address as their source."""
