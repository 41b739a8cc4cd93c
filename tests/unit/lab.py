"""An engine's calls without an engine, and drivers that write down what is asked of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from netplugin_sdk import (
    AllocateNetwork,
    Container,
    DriverOptions,
    Endpoint,
    EndpointInterface,
    EndpointOptions,
    Join,
    Later,
    MacAddress,
    Network,
    NetworkDriver,
    NetworkOptions,
    Node,
    Plugin,
    Sandbox,
    SkipGateway,
)

NETWORK = "ca75b6ab4104197bca40854b04bbec109626cb90c9d7510b4828a78878da6253"
OTHER_NETWORK = "040a9492dfe466ace8bcdef6c25f5440253349966153138bb454ee161344221c"
ENDPOINT = "a8de4ba19c93688b6575aede7b50db8e825d043e1d6629a287613810ea43982e"
OTHER_ENDPOINT = "79da9eaa24a51e0b6d9f2f9e4ab15c2ab1c6a9f3d8a3a5ff1a4cfee87fbc8e5b"
SANDBOX = "/run/docker/exec/netns/6855b13f513b"
MAC = MacAddress("02:42:0a:7b:00:4d")
PUBLISHED = {"Proto": 6, "IP": "", "Port": 80, "HostIP": "", "HostPort": 18080, "HostPortEnd": 18080}


def create_network(network: str = NETWORK, *, internal: bool = False, **options: str) -> dict[str, Any]:
    extra = {"com.docker.network.internal": True} if internal else {}
    return {
        "NetworkID": network,
        "Options": {"com.docker.network.enable_ipv6": False, "com.docker.network.generic": options, **extra},
        "IPv4Data": [{"AddressSpace": "LocalDefault", "Gateway": "172.18.0.1/16", "Pool": "172.18.0.0/16"}],
        "IPv6Data": [],
    }


def create_endpoint(network: str = NETWORK, endpoint: str = ENDPOINT, **options: Any) -> dict[str, Any]:
    interface = {"Address": "172.18.0.2/16", "AddressIPv6": "", "MacAddress": ""}
    return {"NetworkID": network, "EndpointID": endpoint, "Interface": interface, "Options": options}


def joining(network: str = NETWORK, endpoint: str = ENDPOINT, sandbox: str = SANDBOX) -> dict[str, Any]:
    return {"NetworkID": network, "EndpointID": endpoint, "SandboxKey": sandbox, "Options": {}}


def publishing(network: str = NETWORK, endpoint: str = ENDPOINT, port: int = 18080) -> dict[str, Any]:
    ports = [{**PUBLISHED, "HostPort": port, "HostPortEnd": port}]
    return {"NetworkID": network, "EndpointID": endpoint, "Options": {"com.docker.network.portmap": ports}}


def of(network: str = NETWORK, endpoint: str | None = None) -> dict[str, Any]:
    """What names a network or an endpoint in all the other requests."""
    return {"NetworkID": network} if endpoint is None else {"NetworkID": network, "EndpointID": endpoint}


class Docker:
    """Calls a plugin as the engine does. A method without a dot is a NetworkDriver's."""

    def __init__(self, plugin: Plugin) -> None:
        self.plugin = plugin

    def __call__(self, method: str, request: Mapping[str, Any] | None = None) -> Any:
        """The content of an answer that must be a success."""
        status, content = self.ask(method, request)
        assert status == 200, content
        return content

    def refused(self, method: str, request: Mapping[str, Any] | None = None) -> tuple[int, str]:
        """Status and text of an answer that must be an error."""
        status, content = self.ask(method, request)
        assert status != 200, content
        assert content["Err"] == content["Error"]
        return status, content["Err"]

    def ask(self, method: str, request: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        path = f"/{method}" if "." in method else f"/NetworkDriver.{method}"
        answer = self.plugin.handle(path, b"" if request is None else json.dumps(request).encode())
        return answer.status, json.loads(answer.body)

    def run(self, network: str = NETWORK, endpoint: str = ENDPOINT) -> None:
        """CreateEndpoint and Join, as for a container that starts."""
        self("CreateEndpoint", create_endpoint(network, endpoint))
        self("Join", joining(network, endpoint))


class ListingEngine:
    """What is asked of a `Docker`, answered: a network with an endpoint, as long as it is listed."""

    def __init__(self) -> None:
        self.listed = {NETWORK: {ENDPOINT: "c" * 64}}

    def call(self, method: str, path: str) -> Any:
        return {"ID": "engine 1"}

    def networks(self) -> dict[str, Any]:
        return dict.fromkeys(self.listed)

    def runs(self, network_id: str) -> bool:
        return network_id in self.listed

    def endpoints(self, network_id: str) -> dict[str, str]:
        return self.listed[network_id]

    def container(self, container_id: str) -> Container:
        return Container(container_id, "web", "busybox")


def copy_state(folder: Path, into: Path) -> None:
    """The state folder as SIGKILL would leave it now, for another plugin."""
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(folder, into, ignore=shutil.ignore_patterns("lock"))


class Options(DriverOptions):
    mtu: int = 1500
    parent: str | None = None


class Recorder(NetworkDriver[Options]):
    """The methods that must be written. `calls` is what was asked, `fails` raises in a method, `hooks` runs in it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: dict[str, BaseException] = {}
        self.hooks: dict[str, Callable[[Any], None]] = {}

    def called(self, method: str, of: object = None) -> None:
        self.calls.append(method)
        if hook := self.hooks.get(method):
            hook(of)
        if error := self.fails.get(method):
            raise error

    def since(self) -> list[str]:
        """The calls since this was asked last."""
        calls, self.calls = self.calls, []
        return calls

    def create_network(self, network: Network[Options]) -> None:
        self.called("create_network", network)

    def delete_network(self, network: Network[Options]) -> Later | None:
        self.called("delete_network", network)
        return None

    def create_endpoint(self, network: Network[Options], endpoint: Endpoint) -> EndpointInterface | None:
        self.called("create_endpoint", endpoint)
        return EndpointInterface(mac_address=MAC)

    def delete_endpoint(self, network: Network[Options], endpoint: Endpoint) -> Later | None:
        self.called("delete_endpoint", endpoint)
        return None

    def join(self, network: Network[Options], endpoint: Endpoint, sandbox: Sandbox) -> Join:
        self.called("join", endpoint)
        return Join(endpoint.interface_name("vc"), gateways=network.gateways)

    def leave(self, network: Network[Options], endpoint: Endpoint) -> None:
        self.called("leave", endpoint)


class Publisher(Recorder):
    """Publishes ports, too."""

    def program_external_connectivity(
        self, network: Network[Options], endpoint: Endpoint, options: EndpointOptions
    ) -> None:
        self.called(f"program {','.join(str(mapping.host_port) for mapping in options.port_map)}", endpoint)

    def revoke_external_connectivity(self, network: Network[Options], endpoint: Endpoint) -> None:
        self.called("revoke", endpoint)


class Everything(Publisher):
    """Every optional method."""

    def endpoint_oper_info(self, network: Network[Options], endpoint: Endpoint) -> Mapping[str, Any]:
        self.called("endpoint_oper_info", endpoint)
        return {"addresses": endpoint.addresses, "mac": endpoint.mac_address, "ports": endpoint.options.port_map}

    def gw_alloc_check(self, options: Options, request: NetworkOptions) -> SkipGateway:
        self.called(f"gw_alloc_check mtu={options.mtu}")
        return SkipGateway(ipv4=options.parent is not None)

    def allocate_network(self, request: AllocateNetwork) -> Mapping[str, str]:
        self.called("allocate_network", request)
        return {"vni": "4097", **request.options}

    def free_network(self, network_id: str) -> None:
        self.called(f"free_network {network_id}")

    def peer_joined(self, network: Network[Options], peer: Node) -> None:
        self.called(f"peer_joined {network.id[:4]} {peer.address}", peer)

    def peer_left(self, network: Network[Options], peer: Node) -> None:
        self.called(f"peer_left {network.id[:4]} {peer.address}", peer)
