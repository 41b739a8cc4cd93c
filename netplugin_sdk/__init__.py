"""Write Docker network drivers in Python: subclass `NetworkDriver`, write networking only.

The helpers that touch the kernel are in `netplugin_sdk.linux` and are not imported here.
"""

from msgspec import Meta, field

from netplugin_sdk.core.plugin import Plugin
from netplugin_sdk.core.timings import Timings
from netplugin_sdk.driver import IpamDriver, Later, NetworkDriver
from netplugin_sdk.errors import (
    Conflict,
    DriverError,
    InvalidDriver,
    InvalidOption,
    InvalidRequest,
    InvalidReturn,
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
from netplugin_sdk.serving.http import Limits
from netplugin_sdk.serving.loop import Server
from netplugin_sdk.serving.process import run, serve
from netplugin_sdk.serving.sockets import TLSFiles
from netplugin_sdk.values import Container, IPAddress, IPInterface, IPNetwork, MacAddress, TransportProtocol, UsedPool

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
    "InvalidDriver",
    "InvalidOption",
    "InvalidRequest",
    "InvalidReturn",
    "IpamData",
    "IpamDriver",
    "Join",
    "Later",
    "Limits",
    "MacAddress",
    "Meta",
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
    "Sandbox",
    "Scope",
    "Server",
    "SkipGateway",
    "StaticRoute",
    "TLSFiles",
    "Timings",
    "TransportProtocol",
    "Unavailable",
    "Unsupported",
    "UsedPool",
    "field",
    "run",
    "serve",
]
