"""Drivers that have every method and accept what they are given, to be fuzzed; run as a program, they are served."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Mapping
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Interface, ip_interface
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from netplugin_sdk import (
    AddressRef,
    AddressRequest,
    AllocateNetwork,
    DriverError,
    DriverOptions,
    Endpoint,
    EndpointInterface,
    EndpointOptions,
    IpamDriver,
    Join,
    MacAddress,
    Network,
    NetworkDriver,
    NetworkOptions,
    Node,
    Plugin,
    Pool,
    PoolRequest,
    Sandbox,
    Scope,
    SkipGateway,
)
from netplugin_sdk.core import answers
from netplugin_sdk.serving.http import Limits
from netplugin_sdk.serving.loop import Server
from netplugin_sdk.values import IPInterface

SAYS_NO = "the driver says no"
"""What an answer has that is a failure of the driver."""


class Mode(Enum):
    L2 = "l2"
    L3 = "l3"


class Options(DriverOptions, forbid_unknown_fields=False):
    mtu: Annotated[int, Meta(ge=68, le=65535)] = 1500
    ratio: float = 1.0
    mode: Mode = Mode.L2
    on: bool = True
    parent: str | None = None
    address: IPv4Address | None = None
    subnet: IPv4Network | None = None
    tunnel: IPv6Interface | None = None
    mac: MacAddress | None = None


class AnyNetwork(NetworkDriver[Options]):
    scope = Scope.GLOBAL

    def create_network(self, network: Network[Options]) -> None:
        _ = (network.subnets, network.gateways, network.internal, network.options, network.interface_name("br"))

    def delete_network(self, network: Network[Options]) -> None:
        _ = network.ipam

    def create_endpoint(self, network: Network[Options], endpoint: Endpoint) -> EndpointInterface | None:
        _ = (endpoint.options.port_map, endpoint.interface_name("ve"))
        if endpoint.requested.mac_address is not None:
            return None
        return EndpointInterface(mac_address=MacAddress("02:00:00:00:00:01"))

    def delete_endpoint(self, network: Network[Options], endpoint: Endpoint) -> None:
        _ = endpoint.requested

    def join(self, network: Network[Options], endpoint: Endpoint, sandbox: Sandbox) -> Join:
        gateways = {gateway.version: gateway for gateway in network.gateways}
        return Join(endpoint.interface_name("vc"), gateways=gateways.values())

    def leave(self, network: Network[Options], endpoint: Endpoint) -> None:
        _ = endpoint.sandbox

    def endpoint_oper_info(self, network: Network[Options], endpoint: Endpoint) -> Mapping[str, Any]:
        return {"ports": endpoint.options.port_map, "exposed": endpoint.options.exposed_ports}

    def program_external_connectivity(
        self, network: Network[Options], endpoint: Endpoint, options: EndpointOptions
    ) -> None:
        _ = options.port_map

    def revoke_external_connectivity(self, network: Network[Options], endpoint: Endpoint) -> None:
        _ = endpoint.external

    def gw_alloc_check(self, options: Options, request: NetworkOptions) -> SkipGateway:
        return SkipGateway(ipv4=options.mode is Mode.L2)

    def allocate_network(self, request: AllocateNetwork) -> Mapping[str, str]:
        if not request.ipv4_data:
            raise DriverError(SAYS_NO)
        return request.options

    def peer_joined(self, network: Network[Options], peer: Node) -> None:
        _ = network.options, peer.address

    def peer_left(self, network: Network[Options], peer: Node) -> None:
        _ = network.options, peer.address


class AnyIpam(IpamDriver):
    def request_pool(self, request: PoolRequest) -> Pool:
        return Pool("pool", request.pool or IPv4Network("10.0.0.0/24"))

    def release_pool(self, pool_id: str) -> None:
        pass

    def request_address(self, request: AddressRequest) -> IPInterface:
        return ip_interface(request.address or "10.0.0.2/24")

    def release_address(self, address: AddressRef) -> None:
        pass


def plugin() -> Plugin:
    return Plugin(AnyNetwork(), AnyIpam())


LIMITS = Limits(head=8_192, body=65_536, request_time=1.0, connections=64)


def main() -> None:
    logging.basicConfig(level=logging.ERROR)
    setattr(answers, "interface_exists", bool)  # noqa: B010  # as in conftest.py: any name
    with plugin() as served, Server(served, LIMITS) as server:
        signal.signal(signal.SIGTERM, lambda *_: server.stop())
        server.listen_unix(Path(sys.argv[1]))
        server.run()


if __name__ == "__main__":
    main()
