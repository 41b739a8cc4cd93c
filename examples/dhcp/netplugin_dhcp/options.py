"""The options of ``docker network create -d dhcp -o KEY=VALUE``, and of a container's ``driver-opt=KEY=VALUE``."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Annotated

from netplugin_sdk import DriverOptions, EndpointOptions, InvalidOption, Meta


class Options(DriverOptions):
    """The options of one network. Either `bridge` or `parent` must be given."""

    bridge: str = ""
    """A bridge of the host that the LAN is a port of; containers become its ports."""

    parent: str = ""
    """An interface of the host on the LAN; containers get macvlans on it."""

    timeout: Annotated[float, Meta(ge=1, le=20)] = 10.0
    """Seconds that a container's start waits for a lease. Docker waits for the driver a little longer."""

    ipv6: bool = False
    """Whether containers take the IPv6 addresses that the LAN's routers announce (SLAAC)."""

    @property
    def link(self) -> str:
        """The bridge or the parent. Raises `InvalidOption` unless exactly one of them is given."""
        if bool(self.bridge) == bool(self.parent):
            raise InvalidOption("give one of the options bridge=NAME and parent=NAME: where the DHCP server is reached")
        return self.bridge or self.parent


def wanted_address(options: EndpointOptions) -> IPv4Address | None:
    """The address that ``docker run --network name=lan,driver-opt=address=…`` asks for.

    Docker refuses ``--ip`` where no subnet is configured, and with the null IPAM driver none can be.
    """
    text = options.get("address")
    if text is None:
        return None
    try:
        return IPv4Address(text)
    except ValueError as error:
        raise InvalidOption(f"driver-opt address={str(text)[:80]!r}: {error}") from None
