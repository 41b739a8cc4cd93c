"""State, kernel and Docker compared, without looking at anything."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address
from typing import Any

import msgspec

from netplugin_sdk.core.store import StoredEndpoint, StoredNetwork
from netplugin_sdk.inspection.engine import Engine, EngineEndpoint, EngineNetwork
from netplugin_sdk.inspection.kernel import Host, Interface, NamespaceView
from netplugin_sdk.inspection.model import (
    UNKNOWN_TO_DOCKER,
    Difference,
    Fact,
    InspectedEndpoint,
    InspectedNetwork,
    Port,
    Snapshot,
    about_endpoint,
    about_network,
)
from netplugin_sdk.linux.ports import Published
from netplugin_sdk.values import IPInterface, TransportProtocol

_OWN = re.compile(r"(..?)-([0-9a-zA-Z]{12})")  # `Network.interface_name`
_BRIDGE_NAME = "com.docker.network.bridge.name"
_PUBLISHED = frozenset(Published.__dataclass_fields__)


def compare(
    plugin: str,
    networks: Mapping[str, StoredNetwork] | None,
    found: Engine | None,
    here: Host,
    sandboxes: Mapping[str, NamespaceView | None],
) -> Snapshot:
    """Compare them.

    Args:
        plugin: its name.
        networks: those of its state; None if it was not read.
        found: Docker's view; None if it was not asked.
        here: the kernel's, of the plugin's network namespace.
        sandboxes: the view into the sandbox of each endpoint, by its id; None where the sandbox is gone. An endpoint
            that is not in it was not looked at.
    """
    listed = found.networks if found else {}
    ids = dict.fromkeys((*(networks or {}), *listed))
    compared = [_Network(networks, found, here, sandboxes, network_id).inspected() for network_id in ids]
    expected = _prefixes(compared)
    inspected = tuple(sorted((_with_missing(each, expected, here) for each in compared), key=_in_order))
    return Snapshot(
        plugin=plugin,
        hostname=socket.gethostname(),
        sources={},
        served=None,
        pid=None,
        networks=inspected,
        differences=tuple(_differences(inspected)),
    )


class _Network:
    """The comparison of one network."""

    def __init__(
        self,
        networks: Mapping[str, StoredNetwork] | None,
        found: Engine | None,
        here: Host,
        sandboxes: Mapping[str, NamespaceView | None],
        network_id: str,
    ) -> None:
        self.id = network_id
        self.here, self.sandboxes = here, sandboxes
        self.has_state, self.has_docker = networks is not None, found is not None
        self.known = (networks or {}).get(network_id)
        self.listed: EngineNetwork | None = found.networks.get(network_id) if found else None
        self.options: Mapping[str, str] = self.known.raw_options.generic if self.known else {}

    def inspected(self) -> InspectedNetwork:
        known = self.known.endpoints if self.known else {}
        listed = self.listed.endpoints if self.listed else {}
        endpoints = [self._endpoint(each, known.get(each), listed.get(each)) for each in {**known, **listed}]
        interfaces = self._interfaces(endpoints)
        masters = {each.name for each in interfaces}
        subnets = self.known.subnets if self.known else self.listed.subnets if self.listed else ()
        return InspectedNetwork(
            id=self.id,
            name=self.listed.name if self.listed else self.id[:12],
            internal=self.known.internal if self.known else bool(self.listed and self.listed.internal),
            subnets=tuple(map(str, subnets)),
            interfaces=interfaces,
            endpoints=tuple(sorted((_on_its_bridge(each, masters) for each in endpoints), key=_in_order)),
            facts=tuple(self._facts(interfaces, {endpoint.id[:12] for endpoint in endpoints})),
        )

    def _interfaces(self, endpoints: Iterable[InspectedEndpoint]) -> tuple[Interface, ...]:
        """By name; or an endpoint's interface is a port of it."""
        there = self.here.sight.interfaces
        names = [name for name in there if _own_id(name) == self.id[:12]]
        names += [endpoint.outside.master for endpoint in endpoints if endpoint.outside and endpoint.outside.master]
        names.append(self.options.get(_BRIDGE_NAME, ""))
        names += [bridge for bridge, network in (self.here.bridges or {}).items() if network == self.id[:12]]
        return tuple(there[name] for name in dict.fromkeys(names) if name in there)

    # ------------------------------------------------------------------------------------------------- its facts

    def _facts(self, interfaces: tuple[Interface, ...], endpoints: set[str]) -> Iterator[Fact]:
        known, listed = self.known, self.listed
        yield _presence(
            self.has_state, known is not None, self.has_docker, listed is not None, known.row.intent if known else None
        )
        yield Fact.compared(
            "subnets",
            state=_listing(known.subnets) if known else None,
            docker=_listing(listed.subnets) if listed else None,
        )
        if known and listed and known.internal != listed.internal:
            yield Fact.compared("internal", _yes(known.internal), docker=_yes(listed.internal))
        bridge = next((each for each in interfaces if each.kind == "bridge"), None)
        yield from self._gateways(bridge)
        if (wanted := self.options.get(_BRIDGE_NAME)) and wanted not in self.here.sight.interfaces:
            yield Fact(name="interface", state=wanted, kernel="is not there", wrong=f"there is no {wanted}")
        for each in interfaces:
            wrong = None if each.up else f"{each.name} is down"
            yield Fact(name="interface", kernel=str(each), wrong=wrong)
            for port in self.here.sight.interfaces.values():
                own = _own_id(port.name) if port.master == each.name else None
                if own is not None and self.has_state and own not in endpoints and own != self.id[:12]:
                    text = f"{port.name} is on {each.name} and belongs to no endpoint"
                    yield Fact(name="interface", kernel=str(port), wrong=text)
        mtu = next((value for key, value in self.options.items() if key.rpartition(".")[2] == "mtu"), "")
        if bridge is not None and mtu.isdecimal() and int(mtu):
            yield Fact.compared("MTU", mtu, str(bridge.mtu))

    def _gateways(self, bridge: Interface | None) -> Iterator[Fact]:
        """Docker lists those that somebody chose, and of IPv4 also those that it gave."""
        known, listed = self.known, self.listed
        away = any(_keeps_gateway_away(*option) for option in self.options.items())
        for version, name in ((4, "gateway"), (6, "gateway6")):
            ours = [each.ip for each in known.gateways if each.version == version] if known else None
            theirs = [each for each in listed.gateways if each.version == version] if listed else []
            there = None
            if bridge is not None and not away:
                has = {address.ip for address in bridge.addresses}
                there = _listing(address for address in (theirs if ours is None else ours) if address in has)
            if ours or theirs:
                said = None if ours is None else _listing(ours)
                yield Fact.compared(name, said, there, _listing(theirs) if theirs else None)

    # --------------------------------------------------------------------------------------------- its endpoints

    def _endpoint(
        self, endpoint_id: str, known: StoredEndpoint | None, listed: EngineEndpoint | None
    ) -> InspectedEndpoint:
        joined = known.join is not None if known else listed is not None and listed.container is not None
        addresses = known.addresses if known else listed.addresses if listed else ()
        mac = str(known.mac_address) if known and known.mac_address else listed.mac if listed else None
        own = [each for name, each in self.here.sight.interfaces.items() if _own_id(name) == endpoint_id[:12]]
        # Until the engine has taken the inner end, both are here.
        outside = max(own, key=lambda each: each.master is not None, default=None)
        looked = endpoint_id in self.sandboxes
        sight = self.sandboxes.get(endpoint_id)
        inside = None if sight is None else _inside(sight, mac, addresses, outside)
        if outside is None and inside is not None:
            outside = _other_end(inside, self.here.sight)
        name = listed.name if listed else known.container.name if known and known.container else endpoint_id[:12]
        ports = tuple(_ports(self.known, known)) if self.known and known else ()
        facts = [
            _presence(
                self.has_state,
                known is not None,
                self.has_docker and self.listed is not None,
                listed is not None,
                known.row.intent if known else None,
            ),
            *_container(known, listed),
            *_addresses(known, listed, inside),
        ]
        if outside is not None:
            facts.append(
                Fact(name="outside", kernel=str(outside), wrong=None if outside.up else f"{outside.name} is down")
            )
        if joined and looked:
            facts.append(_in_sandbox(known, sight, inside))
        if inside is not None and sight is not None and known is not None and known.external is not None:
            facts += _routes(known, sight)
        facts += [self._held(port) for port in ports]
        return InspectedEndpoint(
            id=endpoint_id,
            name=name,
            joined=joined,
            addresses=addresses,
            mac=mac,
            outside=outside,
            inside=inside,
            ports=ports,
            facts=tuple(facts),
        )

    def _held(self, port: Port) -> Fact:
        if self.here.takes(port.protocol, port.host_address, port.host_port):
            return Fact(name="port", state=str(port), kernel="is listened on")
        # The kernel may have no SCTP sockets; then the firewall alone carries it.
        wrong = None if port.protocol is TransportProtocol.SCTP else f"nobody listens on {str(port).partition(' ')[0]}"
        return Fact(name="port", state=str(port), kernel="nobody listens", wrong=wrong)


def _presence(has_state: bool, known: bool, asked: bool, listed: bool, intent: str | None) -> Fact:
    wrong = None
    if intent:
        wrong = f"{intent} was begun and is not finished"
    elif asked and has_state and known != listed:
        wrong = UNKNOWN_TO_DOCKER if known else "the plugin does not know it"
    said = f"half done: {intent}" if intent else "known" if known else "unknown"
    docker = "known" if listed else "unknown"
    return Fact(name="known", state=said if has_state else None, docker=docker if asked else None, wrong=wrong)


def _container(known: StoredEndpoint | None, listed: EngineEndpoint | None) -> Iterator[Fact]:
    kept = known.container if known else None
    if kept is not None or listed is not None:
        ours = f"{kept.name} {kept.id[:12]}" if kept else None
        theirs = f"{listed.name} {(listed.container or 'none')[:12]}" if listed else None
        wrong = None
        if kept and listed and listed.container and kept.id != listed.container:
            wrong = f"it is in container {listed.name}, and state has {kept.name}"
        yield Fact(name="container", state=ours, docker=theirs, wrong=wrong)


def _addresses(known: StoredEndpoint | None, listed: EngineEndpoint | None, inside: Interface | None) -> Iterator[Fact]:
    for version in (4, 6):
        ours = _of(version, known.addresses) if known else None
        theirs = _of(version, listed.addresses) if listed else None
        there = _of(version, inside.addresses) if inside else None
        given = ours or theirs
        if given:
            if there is not None and set(given) <= set(there):
                there = given  # more than was given is the container's own affair
            said = (None if addresses is None else _listing(addresses) for addresses in (ours, there, theirs))
            yield Fact.compared(f"IPv{version}", *said)
    mac = str(known.mac_address) if known and known.mac_address else None
    if mac or (listed and listed.mac):
        yield Fact.compared("MAC", mac, inside.mac if inside else None, listed.mac if listed else None)


def _of(version: int, addresses: Iterable[IPInterface]) -> list[IPInterface]:
    return [each for each in addresses if each.version == version]


def _in_sandbox(known: StoredEndpoint | None, sight: NamespaceView | None, inside: Interface | None) -> Fact:
    place = known.sandbox.key if known and known.sandbox else None
    if sight is None:
        return Fact(name="inside", state=place, kernel="the sandbox is gone", wrong="its sandbox is gone")
    if inside is None:
        return Fact(name="inside", state=place, kernel="no interface", wrong="its container has no interface for it")
    return Fact(
        name="inside", state=place, kernel=str(inside), wrong=None if inside.up else f"{inside.name} is down inside"
    )


def _routes(known: StoredEndpoint, sight: NamespaceView) -> Iterator[Fact]:
    """Only of an endpoint that carries its container's default route: with ports, if it has any."""
    answer = msgspec.json.decode(known.join.answer) if known.join else {}
    for key, version in (("Gateway", 4), ("GatewayIPv6", 6)):
        if text := answer.get(key):
            there = _listing(each for each in sight.gateways if each.version == version)
            yield Fact.compared("route" if version == 4 else "route6", str(ip_address(text)), there)


def _on_its_bridge(endpoint: InspectedEndpoint, bridges: set[str]) -> InspectedEndpoint:
    """The endpoints whose outer end has lost its bridge, if the network has one."""
    outside = endpoint.outside
    if outside is None or outside.kind != "veth" or outside.master in bridges or not bridges:
        return endpoint
    wrong = f"{outside.name} is on no bridge"
    facts = tuple(
        msgspec.structs.replace(each, wrong=each.wrong or wrong) if each.name == "outside" else each
        for each in endpoint.facts
    )
    return msgspec.structs.replace(endpoint, facts=facts)


def _inside(
    sight: NamespaceView, mac: str | None, addresses: tuple[IPInterface, ...], outside: Interface | None
) -> Interface | None:
    """The container's end: the other end of a pair, or the one with the addresses."""
    others = [each for each in sight.interfaces.values() if each.name != "lo"]
    for same in (
        lambda each: outside is not None and outside.kind == "veth" and each.index == outside.link,
        lambda each: bool(set(addresses) & set(each.addresses)),
        lambda each: mac is not None and each.mac == mac,
    ):
        if (found := next(filter(same, others), None)) is not None:
            return found
    return None


def _other_end(inside: Interface, here: NamespaceView) -> Interface | None:
    """Of a pair whose name says nothing, as of a plugin that was not made with this SDK."""
    for each in here.interfaces.values():
        if each.kind == inside.kind == "veth" and (each.index, each.link) == (inside.link, inside.index):
            return each
    return None


def _ports(network: StoredNetwork, endpoint: StoredEndpoint) -> Iterator[Port]:
    """The published ports, as the driver has attached them (`linux.ports.Published`); else the requested ones."""
    external = endpoint.external
    if external is None or network.internal:
        return
    attached = list(_published(msgspec.json.decode(endpoint.row.data)))
    for each in attached:
        if each["host_port"]:
            yield Port(
                protocol=TransportProtocol(each["protocol"]),
                host_address=ip_address(each["host_address"]),
                host_port=each["host_port"],
                container_port=each["port"],
            )
    for mapping in () if attached else external.port_map:
        if mapping.host_port and mapping.host_port_end in (0, mapping.host_port):
            yield Port(
                protocol=mapping.protocol,
                host_address=mapping.host_address or ip_address("0.0.0.0"),
                host_port=mapping.host_port,
                container_port=mapping.container_port,
            )


def _published(data: Any) -> Iterator[dict[str, Any]]:
    if isinstance(data, dict) and data.keys() == _PUBLISHED:
        yield data
    elif isinstance(data, dict | list):
        for each in data.values() if isinstance(data, dict) else data:
            yield from _published(each)


# ------------------------------------------------------------------------------------------------- what is missing


def _prefixes(networks: Iterable[InspectedNetwork]) -> set[str]:
    """The prefix of the names of the networks' own bridges, if any are there: a driver makes all alike."""
    return {
        match[1]
        for network in networks
        for interface in network.interfaces
        if interface.kind == "bridge" and (match := _OWN.fullmatch(interface.name)) and match[2] == network.id[:12]
    }


def _with_missing(network: InspectedNetwork, prefixes: set[str], here: Host) -> InspectedNetwork:
    """A network without a bridge, where others have one or where rules name it."""
    if any(each.kind == "bridge" for each in network.interfaces):
        return network
    if any((each.name, each.state) == ("known", "unknown") for each in network.facts):
        return network  # nobody is to make one
    if any(each.name == "interface" and each.state for each in network.facts):
        return network  # it is missed by its name already
    names = [
        bridge
        for bridge, of in (here.bridges or {}).items()
        if of == network.id[:12] or _own_id(bridge) == network.id[:12]
    ]
    names += [f"{prefix}-{network.id[:12]}" for prefix in sorted(prefixes)]
    if not names:
        return network
    missing = Fact(name="interface", kernel=f"no {names[0]}", wrong=f"its bridge {names[0]} is not there")
    return msgspec.structs.replace(network, facts=(*network.facts, missing))


def _differences(networks: Iterable[InspectedNetwork]) -> Iterator[Difference]:
    for network in networks:
        for each in network.facts:
            if each.wrong:
                yield Difference(about=about_network(network), text=each.wrong)
        for endpoint in network.endpoints:
            for each in endpoint.facts:
                if each.wrong:
                    yield Difference(about=about_endpoint(network, endpoint), text=each.wrong)


def _own_id(name: str) -> str | None:
    match = _OWN.fullmatch(name)
    return match and match[2]


def _keeps_gateway_away(key: str, value: str) -> bool:
    """Whether this option of Docker's bridge says that the bridge gets no address."""
    key = key.rpartition(".")[2]
    return (key == "inhibit_ipv4" and value in ("true", "1")) or (
        key in ("gateway_mode_ipv4", "gateway_mode_ipv6") and value == "isolated"
    )


def _listing(values: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, values)))


def _in_order(named: InspectedNetwork | InspectedEndpoint) -> list[tuple[int, str]]:
    """By name, numbers in it by their value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", named.name)]


def _yes(value: bool) -> str:
    return "yes" if value else "no"
