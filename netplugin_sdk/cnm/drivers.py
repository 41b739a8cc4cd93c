"""The drivers that a controller has of itself: Docker's ``none`` and ``host``, and those of installed packages.

A package says that it has one by an entry point of the group ``netplugin_sdk.drivers``: ``bridge =
"myplugin.driver:BridgeDriver"``.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from netplugin_sdk.driver import NetworkDriver
from netplugin_sdk.messages import EndpointInterface, Join
from netplugin_sdk.state import Endpoint, Network, Sandbox

GROUP = "netplugin_sdk.drivers"
"""The entry points of drivers."""


class NullDriver(NetworkDriver):
    """Does nothing: a sandbox on its network has what it had, only a loopback or all that the host has."""

    def create_network(self, network: Network) -> None:
        """Nothing."""

    def delete_network(self, network: Network) -> None:
        """Nothing."""

    def create_endpoint(self, network: Network, endpoint: Endpoint) -> EndpointInterface | None:
        """Nothing."""

    def delete_endpoint(self, network: Network, endpoint: Endpoint) -> None:
        """Nothing."""

    def join(self, network: Network, endpoint: Endpoint, sandbox: Sandbox) -> Join:  # noqa: ARG002
        """Nothing."""
        return Join()

    def leave(self, network: Network, endpoint: Endpoint) -> None:
        """Nothing."""


def installed(name: str) -> NetworkDriver[Any] | None:
    """A new driver of this name, if a package that is installed has one."""
    for found in entry_points(group=GROUP, name=name):
        driver = found.load()()
        if not isinstance(driver, NetworkDriver):
            raise TypeError(f"entry point {found.value} of {GROUP} is no NetworkDriver")
        return driver
    return None
