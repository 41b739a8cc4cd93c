"""The return value of an author's method: checked, and turned into the body of the answer.

Docker would refuse a wrong value later, in its own terms, or accept it and leave a container without a network. Each
function raises `InvalidReturn`, one line that names method, field and value. A function returns the body, or the
checked value where the caller needs it.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network, ip_interface
from typing import TYPE_CHECKING, Any, NoReturn

from netplugin_sdk.driver import Later
from netplugin_sdk.errors import InvalidReturn
from netplugin_sdk.protocol import messages
from netplugin_sdk.protocol.messages import EndpointInterface, Join, Pool, SkipGateway, StaticRoute
from netplugin_sdk.values import MacAddress

if TYPE_CHECKING:
    from netplugin_sdk.network import Endpoint, Network
    from netplugin_sdk.values import IPInterface, IPNetwork

_IFNAMSIZ = 15  # bytes of a name, without the NUL (linux/if.h)
_NUMBER = 3  # digits that the engine puts behind a prefix, at most 999 interfaces in a container
_NAME = re.compile(r"[^/:\s\0\ud800-\udfff]+")  # the kernel's dev_valid_name; JSON has no surrogates
_GATEWAY = "com.docker.network.gateway"  # moby daemon/libnetwork/netlabel
_CIDR = re.compile(r"[0-9a-fA-F:.]+/[0-9]{1,3}")  # of Go's net.ParseCIDR, which reads no netmask


def join(value: object, network: Network[Any], endpoint: Endpoint) -> bytes:
    """The answer to ``Join``."""
    if value is None:
        _wrong("join", None, "a Join: is there a `return`?")
    if not isinstance(value, Join):
        _wrong("join", value, "a Join")
    if value.interface is not None:
        _check_name(value.interface)
        if not interface_exists(value.interface):
            _wrong("join", value.interface, "the name of an interface that is there", "interface")
    if not _is_name(value.prefix, _IFNAMSIZ - _NUMBER):
        expected = f"1 to {_IFNAMSIZ - _NUMBER} bytes without slash, colon or space, to which Docker adds a number"
        _wrong("join", value.prefix, expected, "prefix")
    routes = _items("static_routes", value.static_routes, StaticRoute, "StaticRoutes")
    for route in routes:
        _check_route(route)
    kinds = (IPv4Address, IPv6Address)  # interface addresses are addresses, too
    given = _items("gateways", value.gateways, kinds, "IP addresses, such as Network.gateways")
    checked = Join(value.interface, value.prefix, given, routes, value.gateway_service)
    addresses = endpoint.addresses
    _check_gateways(checked, addresses, network)
    return messages.encode(checked.to_wire(addresses, internal=network.internal))


def interface_exists(name: str) -> bool:
    """Whether the network namespace of the plugin has an interface of this name."""
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def _check_name(name: object) -> None:
    if not _is_name(name, _IFNAMSIZ) or name in (".", ".."):
        expected = f"the name of an interface: 1 to {_IFNAMSIZ} bytes without slash, colon or space"
        _wrong("join", name, expected, "interface")


def _is_name(name: object, most: int) -> bool:
    return isinstance(name, str) and _NAME.fullmatch(name) is not None and len(name.encode()) <= most


def _items(field: str, value: Any, kind: type | tuple[type, ...], what: str) -> tuple[Any, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        _wrong("join", value, what, field)
    items = tuple(value)
    for item in items:
        if not isinstance(item, kind):
            _wrong("join", item, what, field)
    return items


def _check_route(route: StaticRoute) -> None:
    if not isinstance(route.destination, IPv4Network | IPv6Network):
        _wrong("join", route.destination, "an IP network", "static_routes.destination")
    hop: object = route.next_hop
    if hop is None:
        return
    if not isinstance(hop, IPv4Address | IPv6Address) or isinstance(hop, IPv4Interface | IPv6Interface):
        _wrong("join", hop, "an IP address", "static_routes.next_hop")
    if hop.version != route.destination.version:
        _wrong("join", hop, f"an IPv{route.destination.version} address", "static_routes.next_hop")


def _check_gateways(join: Join, addresses: tuple[IPInterface, ...], network: Network[Any]) -> None:
    """The kernel refuses a gateway that no route leads to, and the container does not start.

    Where it is in a subnet of the network, and the endpoint is not, IPAM is wrong, not the driver.
    """
    reached = [route.destination for route in join.static_routes if route.next_hop is None]
    reached += [*network.subnets, *(gateway.network for gateway in network.gateways)]
    for gateway in join.default_gateways(addresses).values():
        own = [address.network for address in addresses if address.version == gateway.version]
        if not own or gateway.is_link_local or any(gateway in subnet for subnet in own + reached):
            continue
        expected = f"addresses in the endpoint's subnet {' or '.join(map(str, own))}, or in a static route to the link"
        _wrong("join", gateway, expected, "gateways")


def create_endpoint(value: object, *, requested: EndpointInterface) -> bytes:
    """The answer to ``CreateEndpoint``; addresses that the request had are left out."""
    if value is None:
        value = EndpointInterface()
    if not isinstance(value, EndpointInterface):
        _wrong("create_endpoint", value, "an EndpointInterface or None")
    new: dict[str, Any] = {}
    for field, kind, what in (
        ("address", IPv4Interface, "an IPv4Interface: an IPv4 address with its prefix length"),
        ("address_ipv6", IPv6Interface, "an IPv6Interface: an IPv6 address with its prefix length"),
        ("mac_address", MacAddress, "a MacAddress"),
    ):
        given, asked = getattr(value, field), getattr(requested, field)
        if given is not None and not isinstance(given, kind):
            _wrong("create_endpoint", given, what, field)
        if given is not None and asked is not None and given != asked:
            _wrong("create_endpoint", given, f"None or {asked}, which the engine has asked for", field)
        if isinstance(given, IPv4Interface | IPv6Interface) and (given.ip.is_multicast or given.ip.is_unspecified):
            _wrong("create_endpoint", given, "the address of one interface, not of a group", field)
        if asked is None:
            new[field] = given
    mac = new.get("mac_address")
    if mac is not None and (mac.packed[0] & 1 or not any(mac.packed)):
        _wrong("create_endpoint", mac, "the address of one interface, not of a group", "mac_address")
    return messages.encode(messages.CreateEndpointAnswer(EndpointInterface(**new)))


def endpoint_oper_info(value: object) -> bytes:
    """The answer to ``EndpointOperInfo``."""
    if not isinstance(value, Mapping):
        _wrong("endpoint_oper_info", value, "a mapping")
    try:
        return messages.encode({"Value": dict(value)})
    except (TypeError, ValueError, RecursionError) as error:
        _wrong("endpoint_oper_info", value, f"values that have a JSON form ({error})")


def gw_alloc_check(value: object) -> bytes:
    """The answer to ``GwAllocCheck``."""
    if not isinstance(value, SkipGateway):
        _wrong("gw_alloc_check", value, "a SkipGateway")
    return messages.encode(value)


def later(method: str, value: object) -> Later | None:
    """The work for after the answer that a method returned.

    True and False mean none: ``return links.delete(bridge)`` is no mistake, it has done its work already.
    """
    if value is None or isinstance(value, bool):
        return None
    if not isinstance(value, Later):
        _wrong(method, value, "None, or Later(function, ...) for work after the answer")
    return value


def allocate_network(value: object) -> Mapping[str, str]:
    """The options that `allocate_network` returned."""
    if not isinstance(value, Mapping):
        _wrong("allocate_network", value, "a mapping of texts")
    for key, text in value.items():
        if not isinstance(key, str) or not isinstance(text, str):
            _wrong("allocate_network", text, "a text, as every option is", str(key))
    return value


def yes_or_no(method: str, value: object) -> bool:
    """The bool that a method returned."""
    if not isinstance(value, bool):
        _wrong(method, value, "True or False")
    return value


def request_pool(value: object) -> Pool:
    """The pool that `request_pool` returned."""
    if not isinstance(value, Pool):
        _wrong("request_pool", value, "a Pool")
    if not isinstance(value.pool_id, str) or not value.pool_id:
        _wrong("request_pool", value.pool_id, "a text that is not empty", "pool_id")
    if not isinstance(value.pool, IPv4Network | IPv6Network):
        _wrong("request_pool", value.pool, "an IPv4Network or IPv6Network", "pool")
    if not isinstance(value.data, Mapping):
        _wrong("request_pool", value.data, "a mapping of texts", "data")
    for key, text in value.data.items():
        if not isinstance(key, str) or not isinstance(text, str):
            _wrong("request_pool", text, "a text", f"data[{key!r}]")
    if _GATEWAY in value.data:
        _check_pool_gateway(value.data[_GATEWAY], value.pool)
    return value


def _check_pool_gateway(text: str, pool: IPNetwork) -> None:
    """The engine takes the gateway from there, as address/length (moby daemon/libnetwork/network.go).

    0.0.0.0/0 and ::/0 say that there is none to be reserved, as Calico's driver does.
    """
    field = f"data[{_GATEWAY!r}]"
    try:
        gateway = ip_interface(text) if _CIDR.fullmatch(text) else None
    except ValueError:
        gateway = None
    if gateway is None or gateway.version != pool.version:
        _wrong("request_pool", text, f"an IPv{pool.version} address with its prefix length", field)
    if not (gateway.ip in pool or gateway.ip.is_unspecified or gateway.is_link_local):
        _wrong("request_pool", text, f"an address of the pool {pool}", field)


def request_address(value: object, *, pool: IPNetwork | None) -> IPInterface:
    """The address that `request_address` returned. `pool` is the one that it should be in; None if unknown."""
    if not isinstance(value, IPv4Interface | IPv6Interface):
        _wrong(
            "request_address", value, "an IPv4Interface or IPv6Interface: an address with the prefix length of its pool"
        )
    if pool is None or not pool.prefixlen:  # 0.0.0.0/0: the driver has other pools than the engine is told
        return value
    if value.ip not in pool:
        _wrong("request_address", value, f"an address of the pool {pool}")
    if value.network.prefixlen != pool.prefixlen:
        _wrong("request_address", value, f"the prefix length of the pool {pool}")
    return value


def _wrong(method: str, value: object, expected: str, field: str | None = None) -> NoReturn:
    try:
        shown = str(value) if isinstance(value, IPv4Address | IPv6Address | IPv4Network | IPv6Network) else repr(value)
    except Exception:
        shown = f"a {type(value).__name__}"
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    what = f"{method} returned {shown}" if field is None else f"{method} returned {field} {shown}"
    raise InvalidReturn(f"{what}; expected {expected}")
