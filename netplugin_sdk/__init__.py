"""Write Docker network drivers in Python: subclass `NetworkDriver`, write networking only.

The helpers that touch the kernel are in `netplugin_sdk.linux` and are not imported here.
"""

from netplugin_sdk.core.plugin import Plugin
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
from netplugin_sdk.network import Endpoint, Network, Sandbox
from netplugin_sdk.protocol.messages import (
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
from netplugin_sdk.protocol.options import DriverOptions
from netplugin_sdk.serving.server import Server, TLSFiles, run, serve
from netplugin_sdk.values import Container, IPAddress, IPInterface, IPNetwork, MacAddress, TransportProtocol

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
