"""Write Docker network drivers in Python: subclass `NetworkDriver`, write networking only.

The helpers that touch the kernel are in `netplugin_sdk.linux` and are not imported here.
"""

from netplugin_sdk.addresses import IPAddress, IPInterface, IPNetwork, MacAddress, TransportProtocol
from netplugin_sdk.docker import Container
from netplugin_sdk.driver import IpamDriver, NetworkDriver, Rest
from netplugin_sdk.errors import (
    Conflict,
    DriverError,
    InvalidOption,
    InvalidRequest,
    NotFound,
    Unavailable,
    Unsupported,
)
from netplugin_sdk.messages import (
    AddressRef,
    AddressRequest,
    AllocateNetwork,
    EndpointInterface,
    EndpointOptions,
    IpamData,
    Join,
    NetworkOptions,
    Node,
    Pool,
    PoolRequest,
    Port,
    PortMapping,
    Scope,
    SkipGateway,
    StaticRoute,
)
from netplugin_sdk.options import DriverOptions
from netplugin_sdk.plugin import Plugin
from netplugin_sdk.server import Server, TLSFiles, run, serve
from netplugin_sdk.state import Endpoint, Network, Sandbox

__all__ = [
    "AddressRef",
    "AddressRequest",
    "AllocateNetwork",
    "Conflict",
    "Container",
    "DriverError",
    "DriverOptions",
    "Endpoint",
    "EndpointInterface",
    "EndpointOptions",
    "IPAddress",
    "IPInterface",
    "IPNetwork",
    "InvalidOption",
    "InvalidRequest",
    "IpamData",
    "IpamDriver",
    "Join",
    "MacAddress",
    "Network",
    "NetworkDriver",
    "NetworkOptions",
    "Node",
    "NotFound",
    "Plugin",
    "Pool",
    "PoolRequest",
    "Port",
    "PortMapping",
    "Rest",
    "Sandbox",
    "Scope",
    "Server",
    "SkipGateway",
    "StaticRoute",
    "TLSFiles",
    "TransportProtocol",
    "Unavailable",
    "Unsupported",
    "run",
    "serve",
]
