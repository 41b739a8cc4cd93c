"""The view of a plugin: networks and endpoints as state, kernel and Docker have them, and the differences.

Each network and endpoint has facts, such as its MAC address; a fact has the values of the three views, as far as they
have one. The state counts, since Docker was told so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import msgspec

from netplugin_sdk.inspection.kernel import Interface
from netplugin_sdk.values import IPAddress, IPInterface, TransportProtocol

UNKNOWN_TO_DOCKER = "Docker does not know it"
"""The fault of a record that a plugin removes by itself, after Docker has not known it for half a minute."""


class Fact(msgspec.Struct, frozen=True, kw_only=True):
    """The three views of one fact; None where a view does not have it, or could not be asked."""

    name: str
    state: str | None = None
    kernel: str | None = None
    docker: str | None = None
    wrong: str | None = None
    """The fault, in words; None if all is well."""

    @classmethod
    def compared(cls, name: str, state: str | None, kernel: str | None = None, docker: str | None = None) -> Self:
        """A fact of which all that say anything have to say the same."""
        said = {"state": state, "kernel": kernel, "Docker": docker}
        present = {who: text for who, text in said.items() if text is not None}
        wrong = None
        if len(set(present.values())) > 1:
            wrong = f"{name}: " + ", ".join(f"{who} has {text or 'none'}" for who, text in present.items())
        return cls(name=name, state=state, kernel=kernel, docker=docker, wrong=wrong)


class Port(msgspec.Struct, frozen=True, kw_only=True):
    """A published port. `host_address` ``0.0.0.0`` or ``::`` is every address."""

    protocol: TransportProtocol
    host_address: IPAddress
    host_port: int
    container_port: int

    def __str__(self) -> str:
        """Such as ``0.0.0.0:8080 → 80/tcp``."""
        address = f"[{self.host_address}]" if self.host_address.version == 6 else f"{self.host_address}"
        return f"{address}:{self.host_port} → {self.container_port}/{self.protocol}"


class InspectedEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint, as the three have it."""

    id: str
    name: str
    """Of its container, as far as it is known; else the start of the id."""
    joined: bool
    """Whether it is in a sandbox."""
    addresses: tuple[IPInterface, ...]
    mac: str | None
    outside: Interface | None
    """On the host: a veth's outer end."""
    inside: Interface | None
    """In the container."""
    ports: tuple[Port, ...]
    facts: tuple[Fact, ...]


class InspectedNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """A network, as the three have it."""

    id: str
    name: str
    """Docker's, as far as it is known; else the start of the id."""
    internal: bool
    subnets: tuple[str, ...]
    interfaces: tuple[Interface, ...]
    """On the host, such as its bridge."""
    endpoints: tuple[InspectedEndpoint, ...]
    facts: tuple[Fact, ...]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not as it should be."""

    about: str
    """Such as ``network red (ca75b6ab4104)``."""
    text: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.about}: {self.text}"


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All of a plugin at one time."""

    plugin: str
    hostname: str
    sources: Mapping[str, str]
    """State, kernel, Docker: where it was read, and of what could not be read, why."""
    served: bool | None
    """Whether somebody listens; None where that cannot be seen."""
    pid: int | None
    """The process that holds the state folder, as it is seen here."""
    networks: tuple[InspectedNetwork, ...]
    differences: tuple[Difference, ...] = ()

    @property
    def summary(self) -> str:
        """Such as ``2 networks, 5 endpoints: all agree``."""
        endpoints = sum(len(network.endpoints) for network in self.networks)
        said = _count(len(self.differences), "difference") if self.differences else "all agree"
        return f"{_count(len(self.networks), 'network')}, {_count(endpoints, 'endpoint')}: {said}"


def about_network(network: InspectedNetwork) -> str:
    """Such as ``network red (ca75b6ab4104)``."""
    return f"network {_titled(network.name, network.id)}"


def about_endpoint(network: InspectedNetwork, endpoint: InspectedEndpoint) -> str:
    """Such as ``endpoint web (a8de4ba19c93) on red``."""
    return f"endpoint {_titled(endpoint.name, endpoint.id)} on {network.name}"


def _titled(name: str, id_: str) -> str:
    return name if name == id_[:12] else f"{name} ({id_[:12]})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
