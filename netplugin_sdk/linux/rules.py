"""The policy of a bridge, as a value, and the rules that follow from it: no program runs here.

    Policy ── rules(policy, version) ──→ (Rule, Rule, …) ── iptables or nftables ──→ text ──→ kernel

The rules of one bridge are in four places, with either back end:

    INTO   for packets that leave the host through this bridge: traffic to its ports
    OUT    for packets that came from this bridge and that no other bridge has refused
    DNAT   for packets to an address of the host: published ports
    SNAT   for accepted packets: the new source on the way out
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from netplugin_sdk.errors import DriverError, InvalidRequest
from netplugin_sdk.linux.ports import Published
from netplugin_sdk.values import IPAddress, IPNetwork, TransportProtocol

GROUP = 0x6E70
"""Group of interfaces (``ip link set group``) that marks a bridge as that of a network."""

# Stricter than the kernel: no characters with a meaning of their own in a rule (quotes, a trailing "+", which is a
# wildcard). 15 bytes leave room in a chain's name, which has at most 28.
_INTERFACE = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.@=-]{0,14}")
# 40 bytes: two of them, and the rest of a comment, make the 128 that nft takes.
_LABEL = re.compile(r"[A-Za-z0-9_.-]{0,40}")


class FirewallError(DriverError):
    """The firewall refused a change. The text is the program's own."""


class Mode(enum.StrEnum):
    """How a network reaches the outside, per IP version: Docker's ``gateway_mode_ipv4`` and ``_ipv6``."""

    NAT = "nat"
    """Published ports are reached through the host's addresses, and nothing else from outside."""
    UNPROTECTED = "nat-unprotected"
    """As `NAT`, and every host with a route to the network reaches every port of its containers."""
    ROUTED = "routed"
    """No address is translated; published ports are reached by the container's own address, and ping is."""
    ISOLATED = "isolated"
    """As an internal network; the bridge has no address either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The traffic that one bridge may have.

    By default its ports talk to each other and to the outside, with the host's address as their source, and get the
    answers; nobody outside can open a connection to them.
    """

    bridge: str
    """Name of the interface. It need not exist yet."""
    group: int | None = None
    """Number of a group of interfaces (``ip link set group``) that the host routes between, without a bridge. Then
    everything below about the bridge and its ports applies to them, and `bridge` is only a name for the rules."""
    network: str = ""
    """The network's name in comments, such as the start of its id."""
    subnets: tuple[IPNetwork, ...] = ()
    """The address families of the bridge follow from them; without any, it may carry both."""
    internal: bool = False
    """Its ports talk to each other and to nobody else."""
    bridged_only: bool = False
    """Its ports talk to each other; routed packets are left to other rules. For a bridge that somebody else made."""
    icc: bool = True
    """Whether its ports talk to each other directly (inter-container communication)."""
    masquerade: bool = True
    """Whether packets that leave have the host's address as their source."""
    sources: tuple[IPAddress, ...] = ()
    """That address, for IPv4 and for IPv6; by default, the address of the outgoing interface."""
    mode4: Mode = Mode.NAT
    mode6: Mode = Mode.NAT
    trusted: tuple[str, ...] = ()
    """Interfaces from which published ports are also reached by the container's own address."""
    published: Mapping[str, tuple[Published, ...]] = field(default_factory=dict)
    """Label of an endpoint → its ports; with `Published.host_port` 0 a port is open, but not on the host."""

    def __post_init__(self) -> None:
        """Raise `InvalidRequest` if a value cannot be written into a rule."""
        check(self.bridge)
        for name in self.trusted:
            check(name)
        for label in (self.network, *self.published):
            if not _LABEL.fullmatch(label):
                raise InvalidRequest(f"{label!r} cannot be a label in a firewall rule")
        ports = [port for ports in self.published.values() for port in ports]
        for address in (*self.sources, *(port.address for port in ports), *(port.host_address for port in ports)):
            # A scope id is any text; programs print IPv4-mapped addresses in ways of their own.
            if address.version == 6 and (address.scope_id or address.ipv4_mapped):
                raise InvalidRequest(f"{address} cannot be an address in a firewall rule")
        object.__setattr__(self, "published", dict(self.published))  # nobody else changes it

    @property
    def interfaces(self) -> str | int:
        """The interfaces in a rule: the name of the bridge, or the number of the group."""
        return self.bridge if self.group is None else self.group

    @property
    def versions(self) -> tuple[int, ...]:
        """The IP versions that it concerns."""
        return tuple(sorted({net.version for net in self.subnets})) or (4, 6)

    def comment(self, endpoint: str = "") -> str:
        """The text that names this bridge, its network and an endpoint in the comment of a rule."""
        network = f" network {self.network}" if self.network else ""
        return self.bridge + network + (f" endpoint {endpoint}" if endpoint else "")

    def mode(self, version: int) -> Mode:
        """`mode4` or `mode6`."""
        return self.mode4 if version == 4 else self.mode6


def check(interface: str) -> None:
    """Raise `InvalidRequest` if the name of an interface cannot be written into a rule."""
    if not _INTERFACE.fullmatch(interface):
        raise InvalidRequest(f"{interface!r} cannot be the name of an interface in a firewall rule")


class Place(enum.Enum):
    """The place of a rule; see the text of the module."""

    INTO = enum.auto()
    OUT = enum.auto()
    DNAT = enum.auto()
    SNAT = enum.auto()


class Verdict(enum.Enum):
    """The fate of a packet that a rule matches."""

    ACCEPT = enum.auto()
    DROP = enum.auto()
    TO_OTHERS = enum.auto()
    """Accepted, unless it goes to a bridge of Docker's own that refuses it."""
    DNAT = enum.auto()
    SNAT = enum.auto()
    MASQUERADE = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule: a packet that fits all matches gets the verdict. A match that is None fits every packet.

    An interface is written by its name, a group of them by its number.
    """

    place: Place
    verdict: Verdict
    incoming: str | int | None = None
    not_incoming: str | int | None = None
    from_bridges: bool = False
    """Came in through an interface of the group `GROUP`."""
    outgoing: str | int | None = None
    not_outgoing: str | int | None = None
    source: IPNetwork | None = None
    not_source: IPAddress | None = None
    destination: IPAddress | None = None
    protocol: TransportProtocol | None = None
    port: int | None = None
    """Destination port."""
    icmp: bool = False
    established: bool = False
    """Belongs to a connection that was accepted before."""
    translated: bool = False
    """Belongs to a connection whose destination a `Verdict.DNAT` replaced."""
    to: tuple[IPAddress, int] | IPAddress | None = None
    """The new destination or source."""
    endpoint: str = ""
    """For the comment."""


def rules(policy: Policy, version: int) -> tuple[Rule, ...]:
    """The rules of one bridge for one IP version; those of each `Place` in the order of evaluation."""
    bridge, mode = policy.interfaces, policy.mode(version)
    nat = mode in (Mode.NAT, Mode.UNPROTECTED)
    into = Place.INTO
    among = Rule(place=into, incoming=bridge, verdict=Verdict.ACCEPT)
    if policy.bridged_only:
        return (among,)
    neighbours = [among] if policy.icc else []
    rest = Rule(place=into, verdict=Verdict.DROP)
    if policy.internal or mode is Mode.ISOLATED:
        leaving = Rule(place=Place.OUT, incoming=bridge, not_outgoing=bridge, verdict=Verdict.DROP)
        return (*neighbours, rest, leaving)

    found = [Rule(place=into, established=True, verdict=Verdict.ACCEPT), *neighbours]
    for endpoint, ports in policy.published.items():
        # One container's port may be published on several of the host's: opened once.
        for protocol, address, port in dict.fromkeys((p.protocol, p.address, p.port) for p in ports):
            if address.version == version:
                opened = partial(
                    Rule,
                    place=into,
                    verdict=Verdict.ACCEPT,
                    destination=address,
                    protocol=protocol,
                    port=port,
                    endpoint=endpoint,
                )
                if nat:
                    found += [opened(translated=True), *(opened(incoming=name) for name in policy.trusted)]
                else:
                    found += [opened(not_incoming=bridge)]
    if mode is Mode.UNPROTECTED:
        # Unprotected from outside, not from other networks.
        found += [Rule(place=into, not_incoming=bridge, from_bridges=True, verdict=Verdict.DROP)]
        found += [Rule(place=into, not_incoming=bridge, verdict=Verdict.ACCEPT)]
    elif mode is Mode.ROUTED:
        found += [Rule(place=into, not_incoming=bridge, icmp=True, verdict=Verdict.ACCEPT)]
    found += [rest, Rule(place=Place.OUT, incoming=bridge, verdict=Verdict.TO_OTHERS)]
    if nat:
        found += _translations(policy, version)
    return tuple(found)


def _translations(policy: Policy, version: int) -> list[Rule]:
    found = [
        Rule(
            place=Place.DNAT,
            destination=None if port.host_address.is_unspecified else port.host_address,
            # Packets from a container to its own published port go to the host, and the relay sends them back. To
            # return through the same port of the bridge, that port would need hairpin mode (reflective relay):
            # then a container gets its own multicasts back, and IPv6 finds every address duplicated.
            not_source=port.address,
            protocol=port.protocol,
            port=port.host_port,
            verdict=Verdict.DNAT,
            to=(port.address, port.port),
            endpoint=endpoint,
        )
        for endpoint, ports in policy.published.items()
        for port in ports
        # The kernel routes nothing from or to a loopback address: the relay does, as for the other IP version.
        if port.address.version == version == port.host_address.version
        and port.host_port
        and not port.host_address.is_loopback
    ]
    source = next((address for address in policy.sources if address.version == version), None)
    replaced = Verdict.MASQUERADE if source is None else Verdict.SNAT
    for subnet in policy.subnets:
        # 0.0.0.0/0 is the null IPAM driver's "no subnet", and would masquerade the host's own
        if subnet.version == version and subnet.prefixlen:
            # A neighbour's published port, reached by the host's address: the answer must come back through the host.
            found += [
                Rule(
                    place=Place.SNAT,
                    source=subnet,
                    outgoing=policy.interfaces,
                    translated=True,
                    verdict=Verdict.MASQUERADE,
                )
            ]
            if policy.masquerade:
                found += [
                    Rule(place=Place.SNAT, source=subnet, not_outgoing=policy.interfaces, verdict=replaced, to=source)
                ]
    return found
