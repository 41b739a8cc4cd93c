"""Requests and answers of the protocol: typed, decoded, validated, encoded.

Wire names (``NetworkID``, ``com.docker.network.portmap``) stay in this module. Decoding ignores fields that it does
not know, since engines add some, and refuses a missing or ill-typed one with an `InvalidRequest` that names the
field and its value. Go sends an empty string or null where Python says None; both are read as None.

Source: moby ``daemon/libnetwork/drivers/remote/api`` and ``daemon/libnetwork/ipams/remote/api``.
"""

from __future__ import annotations

import base64
import binascii
import enum
from collections.abc import Callable, Iterable, Mapping
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from typing import Any, Protocol, Self, TypeVar

import msgspec

from netplugin_sdk.errors import InvalidRequest
from netplugin_sdk.values import IPAddress, IPInterface, IPNetwork, MacAddress, TransportProtocol

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------- reading


class _Reader:
    """Takes typed fields out of one JSON object, knowing where in the request it stands."""

    __slots__ = ("_fields", "_path")

    def __init__(self, value: Any, path: str = "") -> None:
        if not isinstance(value, dict):
            raise _wrong(path or "the request", "an object", value)
        self._fields: dict[str, Any] = value
        self._path = f"{path}." if path else ""

    def get(self, name: str, kind: type[T], what: str) -> T | None:
        """The field; None where it is absent, null or, for a string, empty."""
        value = self._fields.get(name)
        if value is None:
            return None
        if type(value) is not kind:  # not isinstance: in Python a bool is an int
            raise self.wrong(name, what, value)
        return None if kind is str and not value else value

    def text(self, name: str) -> str:
        """A string; absent is empty."""
        return self.get(name, str, "a string") or ""

    def required(self, name: str, what: str) -> str:
        """A string that is there and not empty."""
        value = self.get(name, str, what)
        if value is None:
            raise InvalidRequest(f"{self._path}{name} is missing: it must be {what}")
        return value

    def boolean(self, name: str) -> bool:
        return self.get(name, bool, "true or false") or False

    def number(self, name: str, highest: int, lowest: int = 0) -> int:
        """A whole number of this range; absent is 0."""
        value = self.get(name, int, "a whole number") or 0
        if not lowest <= value <= highest:
            raise self.wrong(name, f"a number from {lowest} to {highest}", value)
        return value

    def identifier(self, name: str) -> str:
        """An id that is made of letters and digits, so that it is safe in a file or interface name."""
        value = self.required(name, "an id")
        if not (12 <= len(value) <= 128 and value.isascii() and value.isalnum()):
            raise self.wrong(name, "an id of 12 to 128 letters and digits", value)
        return value

    def parsed(self, name: str, parse: Callable[[str], T], what: str) -> T | None:
        """A string turned by `parse`, which raises ValueError for what it cannot read."""
        value = self.get(name, str, what)
        if value is None:
            return None
        try:
            return parse(value)
        except ValueError:
            raise self.wrong(name, what, value) from None

    def mapping(self, name: str) -> dict[str, Any]:
        return self.get(name, dict, "an object") or {}

    def strings(self, name: str) -> dict[str, str]:
        """A map of strings; absent or null is empty."""
        values = self.mapping(name)
        for key, value in values.items():
            if not isinstance(value, str):
                raise self.wrong(f"{name}.{key}", "a string", value)
        return values

    def items(self, name: str, read: Callable[[_Reader], T]) -> tuple[T, ...]:
        """A list of objects; absent or null is empty."""
        values = self.get(name, list, "a list") or ()
        return tuple(read(_Reader(value, f"{self._path}{name}[{i}]")) for i, value in enumerate(values))

    def nested(self, name: str) -> _Reader:
        return _Reader(self.mapping(name), self._path + name)

    def wrong(self, name: str, what: str, value: Any) -> InvalidRequest:
        return _wrong(f"{self._path}{name}", what, value)


def _wrong(path: str, what: str, value: Any) -> InvalidRequest:
    try:
        shown = repr(value)
    except RecursionError:
        shown = "something nested too deeply"
    return InvalidRequest(f"{path} must be {what}, got {shown if len(shown) <= 80 else shown[:77] + '...'}")


def _without_scope(text: str) -> IPAddress:
    """``fe80::1%eth0`` names an interface, and its scope may be any text."""
    if "%" in text:
        raise ValueError(text)
    return ip_address(text)


def _with_prefix(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Require the prefix length: without one `ipaddress` would take /32 or /128."""

    def parsed(text: str) -> T:
        if "/" not in text:
            raise ValueError(text)
        return parse(text)

    return parsed


@_with_prefix
def _network(text: str) -> IPNetwork:
    """An address in it stands for it, as engines up to 23 take it (``--subnet 10.0.0.5/24``)."""
    return ip_network(text, strict=False)


# ------------------------------------------------------------------------------------------------- value types


class Scope(enum.StrEnum):
    """Whether a driver's networks belong to one host or to the cluster (``GetCapabilities``)."""

    LOCAL = "local"
    GLOBAL = "global"


def _read_protocol(reader: _Reader) -> TransportProtocol:
    number = reader.number("Proto", 255)
    try:
        return TransportProtocol(number)
    except ValueError:
        raise reader.wrong("Proto", "6 (tcp), 17 (udp) or 132 (sctp)", number) from None


class Port(msgspec.Struct, frozen=True):
    """An exposed port of a container."""

    protocol: TransportProtocol = msgspec.field(name="Proto")
    port: int = msgspec.field(name="Port")

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(_read_protocol(reader), reader.number("Port", 65535, lowest=1))

    def __str__(self) -> str:
        return f"{self.port}/{self.protocol.name.lower()}"


class PortMapping(msgspec.Struct, frozen=True, kw_only=True):
    """One ``-p``: `container_port` published on the host's `host_port`.

    `host_port` 0 means that the driver picks one; a `host_port_end` above it, that any port of the range will do.
    `host_address` None means every address of the host. `container_address` is usually None: the endpoint's own.
    """

    protocol: TransportProtocol = msgspec.field(name="Proto")
    container_port: int = msgspec.field(name="Port")
    container_address: IPAddress | None = msgspec.field(name="IP", default=None)
    host_address: IPAddress | None = msgspec.field(name="HostIP", default=None)
    host_port: int = msgspec.field(name="HostPort", default=0)
    host_port_end: int = msgspec.field(name="HostPortEnd", default=0)

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(
            protocol=_read_protocol(reader),
            container_port=reader.number("Port", 65535, lowest=1),
            container_address=reader.parsed("IP", ip_address, "an IP address"),
            host_address=reader.parsed("HostIP", _without_scope, "an IP address"),
            host_port=reader.number("HostPort", 65535),
            host_port_end=reader.number("HostPortEnd", 65535),
        )


class IpamData(msgspec.Struct, frozen=True, kw_only=True):
    """One address pool of a network, as the network's IPAM driver gave it out.

    With the null IPAM driver `pool` is ``0.0.0.0/0`` and there is no gateway.
    """

    address_space: str
    pool: IPNetwork
    gateway: IPInterface | None = None
    auxiliary_addresses: Mapping[str, IPInterface] = {}

    @classmethod
    def _read_version(cls, *versions: int) -> Callable[[_Reader], IpamData]:
        ip = f"IPv{' or IPv'.join(map(str, versions))}"

        def read(reader: _Reader) -> IpamData:
            def of_version(parse: Callable[[str], Any]) -> Callable[[str], Any]:
                def parsed(text: str) -> Any:
                    value = _with_prefix(parse)(text)
                    if value.version not in versions:
                        raise ValueError(text)
                    return value

                return parsed

            pool = reader.parsed("Pool", of_version(_network), f"an {ip} network")
            if pool is None:
                raise reader.wrong("Pool", f"an {ip} network", "")
            interface = of_version(ip_interface)
            auxiliary = reader.nested("AuxAddresses")
            return cls(
                address_space=reader.text("AddressSpace"),
                pool=pool,
                gateway=reader.parsed("Gateway", interface, f"an {ip} address with prefix length"),
                auxiliary_addresses={
                    name: address
                    for name in reader.mapping("AuxAddresses")
                    if (address := auxiliary.parsed(name, interface, f"an {ip} address")) is not None
                },
            )

        return read


_read_ipv4_data = IpamData._read_version(4)
_read_ipv6_data = IpamData._read_version(6)
_read_any_data = IpamData._read_version(4, 6)


class EndpointInterface(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Addresses of an endpoint: what the engine asks for, or what the driver fills in.

    A driver may only fill in what the request left None: the engine refuses a repeated or changed value
    ("driver modified interface address").
    """

    address: IPv4Interface | None = msgspec.field(name="Address", default=None)
    address_ipv6: IPv6Interface | None = msgspec.field(name="AddressIPv6", default=None)
    mac_address: MacAddress | None = msgspec.field(name="MacAddress", default=None)

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(
            address=reader.parsed("Address", _with_prefix(IPv4Interface), "an IPv4 address with prefix length"),
            address_ipv6=reader.parsed(
                "AddressIPv6", _with_prefix(IPv6Interface), "an IPv6 address with prefix length"
            ),
            mac_address=reader.parsed("MacAddress", MacAddress, "a MAC address"),
        )


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A node of the cluster (``DiscoverNew``, ``DiscoverDelete``)."""

    address: IPAddress
    bind_address: IPAddress | None = None
    is_self: bool = False


# ------------------------------------------------------------------------------------------------ option maps

GENERIC = "com.docker.network.generic"
INTERNAL = "com.docker.network.internal"
ENABLE_IPV4 = "com.docker.network.enable_ipv4"
ENABLE_IPV6 = "com.docker.network.enable_ipv6"
PORT_MAP = "com.docker.network.portmap"
EXPOSED_PORTS = "com.docker.network.endpoint.exposedports"
MAC_ADDRESS = "com.docker.network.endpoint.macaddress"
NO_PROXY_6TO4 = "com.docker.network.driver.private.no_proxy_6to4"
ENDPOINT_NAME = "com.docker.network.endpoint.name"  # engines ≥ 29
GATEWAY = {"RequestAddressType": "com.docker.network.gateway"}
"""``Options`` of the ``RequestAddress`` for a network's gateway."""


class NetworkOptions(dict[str, Any]):
    """``Options`` of ``CreateNetwork`` and ``GwAllocCheck``: the raw map, its well-known keys typed.

    Attributes:
        generic: what ``docker network create -o KEY=VALUE`` gave.
        internal: ``--internal``: no traffic to or from outside of the network.
        enable_ipv4: ``--ipv4``; true on engines before 28, which do not send it.
        enable_ipv6: ``--ipv6``.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        super().__init__(raw)
        reader = _Reader(self, "Options")
        self.generic: Mapping[str, str] = reader.strings(GENERIC)
        self.internal = reader.boolean(INTERNAL)
        self.enable_ipv4 = self.get(ENABLE_IPV4) is None or reader.boolean(ENABLE_IPV4)
        self.enable_ipv6 = reader.boolean(ENABLE_IPV6)


class EndpointOptions(dict[str, Any]):
    """``Options`` of ``CreateEndpoint``, ``Join`` and ``ProgramExternalConnectivity``: the raw map and typed keys.

    ``docker network connect --driver-opt KEY=VALUE`` arrives beside the well-known keys, in the map itself.

    Attributes:
        port_map: the ports to publish (``-p``, ``-P``).
        exposed_ports: the ports that the container exposes (``EXPOSE``, ``--expose``).
        mac_address: ``--mac-address``; base64 of the 6 octets on the wire.
        no_proxy_6to4: true where another endpoint of the container owns IPv6 (engines ≥ 28).
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        super().__init__(raw)
        reader = _Reader(self, "Options")
        self.port_map: tuple[PortMapping, ...] = reader.items(PORT_MAP, PortMapping._read)
        self.exposed_ports: tuple[Port, ...] = reader.items(EXPOSED_PORTS, Port._read)
        self.mac_address = reader.parsed(MAC_ADDRESS, _mac_from_base64, "base64 of a MAC address")
        self.no_proxy_6to4 = reader.boolean(NO_PROXY_6TO4)


def _mac_from_base64(text: str) -> MacAddress:
    try:
        return MacAddress.from_bytes(base64.b64decode(text, validate=True))
    except binascii.Error as error:
        raise ValueError(text) from error


# --------------------------------------------------------------------------------------------------- requests


class Message(Protocol):
    """A message type: made from the JSON object of a body."""

    @classmethod
    def _read(cls, reader: _Reader) -> Self: ...


class Nothing(msgspec.Struct, frozen=True):
    """``Plugin.Activate`` and every ``GetCapabilities``: the engine sends an empty body."""

    @classmethod
    def _read(cls, _: _Reader) -> Self:
        return cls()


class NetworkRef(msgspec.Struct, frozen=True):
    """``DeleteNetwork``, ``FreeNetwork``."""

    network_id: str

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(reader.identifier("NetworkID"))


class EndpointRef(msgspec.Struct, frozen=True):
    """``DeleteEndpoint``, ``EndpointOperInfo``, ``Leave``, ``RevokeExternalConnectivity``."""

    network_id: str
    endpoint_id: str

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(reader.identifier("NetworkID"), reader.identifier("EndpointID"))


class CreateNetwork(msgspec.Struct, frozen=True):
    """``CreateNetwork``."""

    network_id: str
    options: NetworkOptions
    ipv4_data: tuple[IpamData, ...]
    ipv6_data: tuple[IpamData, ...]

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(
            reader.identifier("NetworkID"),
            NetworkOptions(reader.mapping("Options")),
            reader.items("IPv4Data", _read_ipv4_data),
            reader.items("IPv6Data", _read_ipv6_data),
        )


class AllocateNetwork(msgspec.Struct, frozen=True):
    """``AllocateNetwork``: a swarm manager asks what a global network needs before any node creates it.

    `options` has the ``-o`` options. The nodes get the driver's answer with ``CreateNetwork``.
    """

    network_id: str
    options: Mapping[str, str]
    ipv4_data: tuple[IpamData, ...]
    ipv6_data: tuple[IpamData, ...]

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        # A manager has the pools of both in IPv4Data (swarmkit, allocateDriverState).
        data = (*reader.items("IPv4Data", _read_any_data), *reader.items("IPv6Data", _read_ipv6_data))
        return cls(
            reader.identifier("NetworkID"),
            reader.strings("Options"),
            tuple(each for each in data if each.pool.version == 4),
            tuple(each for each in data if each.pool.version == 6),
        )


class CreateEndpoint(msgspec.Struct, frozen=True):
    """``CreateEndpoint``."""

    network_id: str
    endpoint_id: str
    interface: EndpointInterface
    options: EndpointOptions

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(
            reader.identifier("NetworkID"),
            reader.identifier("EndpointID"),
            EndpointInterface._read(reader.nested("Interface")),
            EndpointOptions(reader.mapping("Options")),
        )


class JoinRequest(msgspec.Struct, frozen=True):
    """``Join``."""

    network_id: str
    endpoint_id: str
    sandbox_key: str
    options: EndpointOptions

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(
            reader.identifier("NetworkID"),
            reader.identifier("EndpointID"),
            reader.required("SandboxKey", "the path of a network namespace"),
            EndpointOptions(reader.mapping("Options")),
        )


class ProgramExternalConnectivity(msgspec.Struct, frozen=True):
    """``ProgramExternalConnectivity``."""

    network_id: str
    endpoint_id: str
    options: EndpointOptions

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(
            reader.identifier("NetworkID"), reader.identifier("EndpointID"), EndpointOptions(reader.mapping("Options"))
        )


class GwAllocCheck(msgspec.Struct, frozen=True):
    """``GwAllocCheck``."""

    options: NetworkOptions

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(NetworkOptions(reader.mapping("Options")))


class Discovery(msgspec.Struct, frozen=True):
    """``DiscoverNew``, ``DiscoverDelete``. `node` is None for a discovery type that is not a node."""

    node: Node | None

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        if reader.number("DiscoveryType", 2**31) != _NODE_DISCOVERY:
            return cls(None)
        data = reader.nested("DiscoveryData")
        address = data.parsed("Address", ip_address, "an IP address")
        if address is None:
            raise data.wrong("Address", "an IP address", "")
        return cls(
            Node(
                address=address,
                bind_address=data.parsed("BindAddress", ip_address, "an IP address"),
                is_self=data.boolean("Self"),
            )
        )


_NODE_DISCOVERY = 1


class PoolRequest(msgspec.Struct, frozen=True, kw_only=True):
    """``IpamDriver.RequestPool``: `pool` None means that the driver chooses one, of IPv6 if `v6`.

    `sub_pool` (``--ip-range``) is the part of `pool` to hand addresses out of; `options` is ``--ipam-opt``.
    """

    address_space: str
    pool: IPNetwork | None = None
    sub_pool: IPNetwork | None = None
    options: Mapping[str, str] = {}
    v6: bool = False

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(
            address_space=reader.text("AddressSpace"),
            pool=reader.parsed("Pool", _network, "a network in CIDR form"),
            sub_pool=reader.parsed("SubPool", _network, "a network in CIDR form"),
            options=reader.strings("Options"),
            v6=reader.boolean("V6"),
        )


class PoolRef(msgspec.Struct, frozen=True):
    """``IpamDriver.ReleasePool``."""

    pool_id: str

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(_pool_id(reader))


class AddressRequest(msgspec.Struct, frozen=True, kw_only=True):
    """``IpamDriver.RequestAddress``: `address` None means that the driver chooses.

    `is_gateway` is true when it is asked for the network's gateway; `mac_address` is the endpoint's, sent if the
    driver says `IpamDriver.requires_mac_address`.
    """

    pool_id: str
    address: IPAddress | None = None
    is_gateway: bool = False
    mac_address: MacAddress | None = None
    options: Mapping[str, str] = {}

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        options = reader.strings("Options")
        return cls(
            pool_id=_pool_id(reader),
            address=reader.parsed("Address", ip_address, "an IP address"),
            is_gateway=options.items() >= GATEWAY.items(),
            # text here, not base64 as in CreateEndpoint
            mac_address=reader.nested("Options").parsed(MAC_ADDRESS, MacAddress, "a MAC address"),
            options=options,
        )


class AddressRef(msgspec.Struct, frozen=True):
    """``IpamDriver.ReleaseAddress``."""

    pool_id: str
    address: IPAddress

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        address = reader.parsed("Address", ip_address, "an IP address")
        if address is None:
            raise reader.wrong("Address", "an IP address", "")
        return cls(_pool_id(reader), address)


def _pool_id(reader: _Reader) -> str:
    return reader.required("PoolID", "the id of a pool")


# ---------------------------------------------------------------------------------------------------- answers


class CreateEndpointAnswer(msgspec.Struct, frozen=True):
    """The answer to ``CreateEndpoint``: what the driver filled in."""

    interface: EndpointInterface = msgspec.field(name="Interface")

    @classmethod
    def _read(cls, reader: _Reader) -> Self:
        return cls(EndpointInterface._read(reader.nested("Interface")))


class StaticRoute(msgspec.Struct, frozen=True):
    """A route to add in the sandbox: by `next_hop`, or on the link itself where it is None."""

    destination: IPNetwork
    next_hop: IPAddress | None = None


class Join(msgspec.Struct, frozen=True):
    """The answer to ``Join``: what the engine puts into the sandbox.

    The engine moves `interface` from the plugin's network namespace into the sandbox, renames it `prefix` + number,
    and sets its addresses, MAC, routes and default gateways. `interface` is the name of a link that exists when
    `join` returns; None if the driver put one there itself.

    `gateways` are the default gateways, as addresses or interface addresses; where there are several of one IP version,
    the one in the endpoint's own subnet counts, so that `Network.gateways` will always do. On an ``--internal`` network
    the SDK leaves them out. Where none is given, the engine would attach the container to ``docker_gwbridge``; the SDK
    tells it not to, unless `gateway_service` is true.
    """

    interface: str | None = None
    prefix: str = "eth"
    gateways: Iterable[IPAddress | IPInterface] = ()
    static_routes: Iterable[StaticRoute] = ()
    gateway_service: bool = False

    def default_gateways(self, addresses: Iterable[IPInterface]) -> dict[int, IPAddress]:
        """Those of `gateways` that an endpoint of these addresses gets, by IP version."""
        subnets = [address.network for address in addresses]
        chosen: dict[int, IPAddress] = {}
        for gateway in self.gateways:
            address = gateway.ip if isinstance(gateway, IPv4Interface | IPv6Interface) else gateway
            if address.version not in chosen or any(address in subnet for subnet in subnets):
                chosen[address.version] = address
        return chosen

    def to_wire(self, addresses: Iterable[IPInterface], *, internal: bool) -> dict[str, Any]:
        """The fields of the answer for an endpoint of these addresses."""
        gateways = {} if internal else self.default_gateways(addresses)
        answer: dict[str, Any] = {
            "Gateway": gateways.get(4),
            "GatewayIPv6": gateways.get(6),
            "StaticRoutes": [
                {"Destination": route.destination, "RouteType": int(route.next_hop is None), "NextHop": route.next_hop}
                for route in self.static_routes
            ],
            # Never beside a gateway: the engine would then overlook it when it looks for one (default_gateway.go).
            "DisableGatewayService": not (gateways or self.gateway_service),
        }
        if self.interface is not None:
            answer["InterfaceName"] = {"SrcName": self.interface, "DstPrefix": self.prefix}
        return answer


class SkipGateway(msgspec.Struct, frozen=True):
    """The answer to ``GwAllocCheck``: for which IP versions the network needs no gateway address."""

    ipv4: bool = msgspec.field(name="SkipIPv4", default=False)
    ipv6: bool = msgspec.field(name="SkipIPv6", default=False)


class Pool(msgspec.Struct, frozen=True):
    """The answer to ``RequestPool``: `pool_id` is what the engine names the pool by from then on."""

    pool_id: str = msgspec.field(name="PoolID")
    pool: IPNetwork = msgspec.field(name="Pool")
    data: dict[str, str] = msgspec.field(name="Data", default_factory=dict)


# ------------------------------------------------------------------------------------------------------- JSON

MessageT = TypeVar("MessageT", bound=Message)


def decode(kind: type[MessageT], body: bytes) -> MessageT:
    """The message of type `kind` in a body.

    Raises:
        InvalidRequest: the body is empty where it must not be, not JSON, or not what the protocol says.
    """
    if not body:
        if kind is Nothing:
            return kind._read(_Reader({}))
        # The engine's retry after a lost connection: its buffer is already drained (moby pkg/plugins/client.go).
        raise InvalidRequest("the request body is empty, as in a retry after a lost connection; try again")
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the request body is not JSON: {error}") from None
    return kind._read(_Reader(content))


def encode(answer: Mapping[str, Any] | msgspec.Struct) -> bytes:
    """The JSON of an answer; IP addresses, MAC addresses, ports and port mappings in it in their wire form.

    Raises:
        TypeError: a value has no JSON form.
    """
    return msgspec.json.encode(answer, enc_hook=_to_json)


def _to_json(value: Any) -> Any:
    if isinstance(value, IPv4Address | IPv6Address | IPv4Network | IPv6Network):  # IPv4Interface is an IPv4Address
        return str(value)
    if isinstance(value, str):  # msgspec takes no subclasses, such as MacAddress or a type of a driver's options
        return str.__str__(value)
    raise TypeError(f"an answer cannot hold {value!r}")


def same(one: bytes, other: bytes) -> bool:
    """Whether two request bodies say the same: JSON's order of keys and white space do not count."""
    return one == other or _sorted(one) == _sorted(other)


def _sorted(body: bytes) -> bytes:
    # As text, since in Python true equals 1.
    return msgspec.json.encode(msgspec.json.decode(body), order="sorted")
