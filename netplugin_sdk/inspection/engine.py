"""Docker's view of a plugin: networks, endpoints, containers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any

import msgspec

from netplugin_sdk.core.engine_api import Docker, DockerError
from netplugin_sdk.values import IPAddress, IPInterface, IPNetwork

_ANSWER_TIMEOUT = 15.0  # seconds that an answer may take


class EngineEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint as Docker lists it: that of a container that runs."""

    id: str
    name: str
    """Of its container."""
    container: str | None
    """The id; None where no container has it."""
    mac: str | None
    addresses: tuple[IPInterface, ...]


class EngineNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """A network as Docker lists it."""

    id: str
    name: str
    internal: bool
    subnets: tuple[IPNetwork, ...]
    gateways: tuple[IPAddress, ...]
    endpoints: Mapping[str, EngineEndpoint]


class Engine(msgspec.Struct, frozen=True):
    """An engine, with the networks of one plugin by id."""

    version: str
    networks: Mapping[str, EngineNetwork]
    managed: bool | None
    """Whether the plugin, if it is one that ``docker plugin`` manages, is enabled."""


def look(plugin: str) -> Engine:
    """Ask the engine of this host. Raises `Unavailable` if it does not answer, `DockerError` if it refuses."""
    with Docker(timeout=_ANSWER_TIMEOUT) as docker:
        networks = {}
        for listed in docker.networks().values():
            if _same(listed["Driver"], plugin):
                with suppress(DockerError):  # removed meanwhile
                    network = _network(docker.call("GET", f"/networks/{listed['Id']}"))
                    networks[network.id] = network
        managed = [each["Enabled"] for each in docker.call("GET", "/plugins") or () if _same(each["Name"], plugin)]
        return Engine(docker.call("GET", "/version")["Version"], networks, managed[0] if managed else None)


def sandbox(container: str) -> tuple[Path, ...]:
    """Where the network namespace of a container may be found. Raises as `look`."""
    with Docker(timeout=_ANSWER_TIMEOUT) as docker:
        found = docker.call("GET", f"/containers/{container}/json")
    places = [f"/proc/{found['State']['Pid']}/ns/net"] if found["State"]["Pid"] else []
    return tuple(map(Path, [*places, found["NetworkSettings"]["SandboxKey"]]))


def _same(name: str, plugin: str) -> bool:
    """Docker adds a tag to the names of plugins that it manages."""
    return name.removesuffix(":latest") == plugin.removesuffix(":latest")


def _network(found: Mapping[str, Any]) -> EngineNetwork:
    pools = [pool for pool in found["IPAM"]["Config"] or () if pool.get("Subnet")]
    subnets = [ip_network(pool["Subnet"], strict=False) for pool in pools]
    return EngineNetwork(
        id=found["Id"],
        name=found["Name"],
        internal=found["Internal"],
        subnets=tuple(pool for pool in subnets if pool.prefixlen),  # the null IPAM driver's is 0.0.0.0/0
        gateways=tuple(ip_interface(pool["Gateway"]).ip for pool in pools if pool.get("Gateway")),
        endpoints={each["EndpointID"]: _endpoint(key, each) for key, each in (found["Containers"] or {}).items()},
    )


def _endpoint(key: str, found: Mapping[str, Any]) -> EngineEndpoint:
    texts = [found[field] for field in ("IPv4Address", "IPv6Address")]
    return EngineEndpoint(
        id=found["EndpointID"],
        name=found["Name"],
        container=None if key.startswith("ep-") else key,
        mac=found["MacAddress"].lower() or None,
        addresses=tuple(ip_interface(text) for text in texts if text),
    )
