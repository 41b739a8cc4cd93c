"""Mistakes of a driver's author: each gets one line that says where it is, what it is, and what was expected."""

from __future__ import annotations

import enum
import logging
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any, ClassVar, Final, NewType

import pytest

from netplugin_sdk import (
    AddressRef,
    AddressRequest,
    AllocateNetwork,
    Container,
    DriverError,
    DriverOptions,
    Endpoint,
    EndpointInterface,
    EndpointOptions,
    InvalidDriver,
    IpamDriver,
    IPInterface,
    Join,
    Later,
    MacAddress,
    Network,
    NetworkDriver,
    NetworkOptions,
    Plugin,
    Pool,
    PoolRequest,
    Sandbox,
    Scope,
    SkipGateway,
    StaticRoute,
)
from netplugin_sdk.core import answers

from .lab import ENDPOINT, NETWORK, Docker, create_endpoint, create_network, joining, of

GOOD = Join("vc-1")


class Author(NetworkDriver):
    """A driver each of whose methods returns, or raises, what a test puts there."""

    def __init__(self, **returns: Any) -> None:
        self.returns = returns
        self.calls: list[str] = []

    def said(self, method: str, otherwise: Any = None) -> Any:
        self.calls.append(method)
        value = self.returns.get(method, otherwise)
        if isinstance(value, BaseException):
            raise value
        return value() if callable(value) and not isinstance(value, Later) and value is not print else value

    def create_network(self, network: Network) -> None:
        self.said("create_network")

    def delete_network(self, network: Network) -> Later | None:
        return self.said("delete_network")  # type: ignore[no-any-return]

    def create_endpoint(self, network: Network, endpoint: Endpoint) -> EndpointInterface | None:
        return self.said("create_endpoint")  # type: ignore[no-any-return]

    def delete_endpoint(self, network: Network, endpoint: Endpoint) -> Later | None:
        return self.said("delete_endpoint")  # type: ignore[no-any-return]

    def join(self, network: Network, endpoint: Endpoint, sandbox: Sandbox) -> Join:
        return self.said("join", GOOD)  # type: ignore[no-any-return]

    def leave(self, network: Network, endpoint: Endpoint) -> None:
        self.said("leave")

    def endpoint_oper_info(self, network: Network, endpoint: Endpoint) -> Mapping[str, Any]:
        return self.said("endpoint_oper_info", {})  # type: ignore[no-any-return]

    def gw_alloc_check(self, options: DriverOptions, request: NetworkOptions) -> SkipGateway:
        return self.said("gw_alloc_check", SkipGateway())  # type: ignore[no-any-return]

    def endpoint_is_gone(self, network: Network, endpoint: Endpoint) -> bool:
        return self.said("endpoint_is_gone", False)  # type: ignore[no-any-return]


class Manager(Author):
    scope: ClassVar[Scope] = Scope.GLOBAL

    def allocate_network(self, request: AllocateNetwork) -> Mapping[str, str]:
        return self.said("allocate_network", {})  # type: ignore[no-any-return]


CALLS: dict[str, Sequence[tuple[str, dict[str, Any]]]] = {
    "create_network": [("CreateNetwork", create_network())],
    "create_endpoint": [("CreateNetwork", create_network()), ("CreateEndpoint", create_endpoint())],
}
CALLS["join"] = [*CALLS["create_endpoint"], ("Join", joining())]
CALLS["leave"] = [*CALLS["join"], ("Leave", of(NETWORK, ENDPOINT))]
CALLS["endpoint_oper_info"] = [*CALLS["create_endpoint"], ("EndpointOperInfo", of(NETWORK, ENDPOINT))]
CALLS["delete_endpoint"] = [*CALLS["create_endpoint"], ("DeleteEndpoint", of(NETWORK, ENDPOINT))]
CALLS["delete_network"] = [*CALLS["create_network"], ("DeleteNetwork", of(NETWORK))]
CALLS["gw_alloc_check"] = [("GwAllocCheck", {"Options": {}})]
CALLS["allocate_network"] = [("AllocateNetwork", {"NetworkID": NETWORK})]

TEXT: Any = "10.0.0.1"
CIRCLE: dict[str, Any] = {}
CIRCLE["a"] = CIRCLE
NAME = "1 to 15 bytes without slash, colon or space"
RETURNS: list[tuple[str, Any, str]] = [
    ("join", lambda: None, "join returned None; expected a Join: is there a `return`?"),
    ("join", "vc-1", "join returned 'vc-1'; expected a Join"),
    ("join", Join("e" * 16), f"join returned interface '{'e' * 16}'; expected the name of an interface: {NAME}"),
    ("join", Join(""), f"join returned interface ''; expected the name of an interface: {NAME}"),
    ("join", Join("a/b"), f"join returned interface 'a/b'; expected the name of an interface: {NAME}"),
    ("join", Join("a\0b"), f"join returned interface 'a\\x00b'; expected the name of an interface: {NAME}"),
    ("join", Join("\udcff"), f"join returned interface '\\udcff'; expected the name of an interface: {NAME}"),
    (
        "join",
        Join("vc-1", "e\0"),
        "join returned prefix 'e\\x00'; expected 1 to 12 bytes without slash, colon or space",
    ),
    ("join", Join("gone"), "join returned interface 'gone'; expected the name of an interface that is there"),
    ("join", Join("vc-1", ""), "join returned prefix ''; expected 1 to 12 bytes without slash, colon or space"),
    ("join", Join("vc-1", "e/th"), "join returned prefix 'e/th'; expected 1 to 12 bytes without slash"),
    ("join", Join("vc-1", "e" * 13), f"join returned prefix '{'e' * 13}'; expected 1 to 12 bytes"),
    ("join", Join("vc-1", gateways=TEXT), "join returned gateways '10.0.0.1'; expected IP addresses, such as Network"),
    ("join", Join("vc-1", gateways=[TEXT]), "join returned gateways '10.0.0.1'; expected IP addresses, such as"),
    (
        "join",
        Join("vc-1", gateways=[ip_address("10.9.9.9")]),
        "join returned gateways 10.9.9.9; expected addresses in the endpoint's subnet 172.18.0.0/16, or in",
    ),
    ("join", Join("vc-1", static_routes=[TEXT]), "join returned static_routes '10.0.0.1'; expected StaticRoutes"),
    (
        "join",
        Join("vc-1", static_routes=[StaticRoute(TEXT)]),
        "join returned static_routes.destination '10.0.0.1'; expected an IP network",
    ),
    (
        "join",
        Join("vc-1", static_routes=[StaticRoute(ip_network("10.0.0.0/8"), TEXT)]),
        "join returned static_routes.next_hop '10.0.0.1'; expected an IP address",
    ),
    (
        "join",
        Join("vc-1", static_routes=[StaticRoute(ip_network("10.0.0.0/8"), ip_address("fd00::1"))]),
        "join returned static_routes.next_hop fd00::1; expected an IPv4 address",
    ),
    ("create_endpoint", 5, "create_endpoint returned 5; expected an EndpointInterface or None"),
    (
        "create_endpoint",
        EndpointInterface(address_ipv6=ip_interface("10.0.0.1/24")),  # type: ignore[arg-type]
        "create_endpoint returned address_ipv6 10.0.0.1/24; expected an IPv6Interface",
    ),
    (
        "create_endpoint",
        EndpointInterface(address_ipv6="fd00::1/64"),  # type: ignore[arg-type]
        "create_endpoint returned address_ipv6 'fd00::1/64'; expected an IPv6Interface",
    ),
    (
        "create_endpoint",
        EndpointInterface(address=IPv4Interface("10.0.0.9/24")),
        "create_endpoint returned address 10.0.0.9/24; expected None or 172.18.0.2/16, which the engine has asked for",
    ),
    (
        "create_endpoint",
        EndpointInterface(mac_address=MacAddress("01:00:5e:00:00:01")),
        "create_endpoint returned mac_address '01:00:5e:00:00:01'; expected the address of one interface, not of",
    ),
    (
        "create_endpoint",
        EndpointInterface(mac_address=MacAddress("00:00:00:00:00:00")),
        "create_endpoint returned mac_address '00:00:00:00:00:00'; expected the address of one interface",
    ),
    (
        "create_endpoint",
        EndpointInterface(address_ipv6=IPv6Interface("ff02::1/64")),
        "create_endpoint returned address_ipv6 ff02::1/64; expected the address of one interface, not of a group",
    ),
    (
        "create_endpoint",
        EndpointInterface(address_ipv6=IPv6Interface("::/64")),
        "create_endpoint returned address_ipv6 ::/64; expected the address of one interface, not of a group",
    ),
    (
        "create_endpoint",
        EndpointInterface(mac_address="02:00:00:00:00:01"),  # type: ignore[arg-type]
        "create_endpoint returned mac_address '02:00:00:00:00:01'; expected a MacAddress",
    ),
    (
        "delete_network",
        5,
        "delete_network returned 5; expected None, or Later(function, ...) for work after the answer",
    ),
    ("delete_network", print, "delete_network returned <built-in function print>; expected None, or Later("),
    ("delete_endpoint", "done", "delete_endpoint returned 'done'; expected None, or Later("),
    ("endpoint_oper_info", lambda: None, "endpoint_oper_info returned None; expected a mapping"),
    ("endpoint_oper_info", {"a": object}, "expected values that have a JSON form"),
    ("endpoint_oper_info", {"a": "\udcff"}, "expected values that have a JSON form"),
    ("endpoint_oper_info", CIRCLE, "expected values that have a JSON form"),
    ("gw_alloc_check", True, "gw_alloc_check returned True; expected a SkipGateway"),
    ("allocate_network", lambda: None, "allocate_network returned None; expected a mapping of texts"),
    ("allocate_network", {"vni": 5}, "allocate_network returned vni 5; expected a text, as every option is"),
]


@pytest.mark.parametrize(("method", "value", "line"), RETURNS, ids=[f"{m}: {t[:60]}" for m, _, t in RETURNS])
def test_what_a_method_returns(method: str, value: Any, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "interface_exists", lambda name: name == "vc-1")
    driver = Manager(**{method: value}) if method == "allocate_network" else Author(**{method: value})
    with Plugin(driver) as plugin:
        docker = Docker(plugin)
        *before, last = CALLS[method]
        for call in before:
            docker(*call)
        status, text = docker.refused(*last)
        assert (status, line in text, "\n" in text) == (500, True, False), text
        undone = {"create_endpoint": "delete_endpoint", "join": "leave", "create_network": "delete_network"}
        if method in undone:
            assert driver.calls[-1] == undone[method]
        driver.returns = {}


@pytest.mark.parametrize("value", [None, True, False, Later(print)], ids=str)
def test_what_a_removal_may_return(value: Any) -> None:
    """Such as ``return links.delete(bridge)``."""
    with Plugin(Author(delete_network=lambda: value, delete_endpoint=lambda: value)) as plugin:
        for call in (*CALLS["delete_endpoint"], ("DeleteNetwork", of(NETWORK))):
            Docker(plugin)(*call)
        assert not plugin.networks


def test_later_takes_a_function() -> None:
    broken: Any = 5
    with pytest.raises(TypeError, match="Later takes a function and its arguments, got 5"):
        Later(broken)


def test_a_gateway_by_a_route_to_the_link_is_right() -> None:
    gateway = ip_address("169.254.1.1")
    routes = [StaticRoute(ip_network("169.254.1.1/32"))]
    link_local = Join("vc-1", gateways=[gateway, ip_address("fe80::1")], static_routes=routes)
    with Plugin(Author(join=link_local)) as plugin:
        for call in CALLS["join"][:-1]:
            Docker(plugin)(*call)
        assert Docker(plugin)(*CALLS["join"][-1])["Gateway"] == "169.254.1.1"


@pytest.mark.parametrize("method", ["create_network", "create_endpoint", "join", "leave", "delete_endpoint"])
@pytest.mark.parametrize(
    ("raised", "line"),
    [(SystemExit(3), "SystemExit: 3"), (KeyboardInterrupt(), "KeyboardInterrupt"), (GeneratorExit(), "GeneratorExit")],
    ids=["sys.exit(3)", "KeyboardInterrupt", "GeneratorExit"],
)
def test_what_would_end_a_thread_is_answered_logged_and_undone(
    method: str, raised: BaseException, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Author(**{method: raised})
    with Plugin(driver) as plugin:
        docker = Docker(plugin)
        *before, last = CALLS[method]
        for call in before:
            docker(*call)
        assert docker.refused(*last) == (500, line)
        assert f"NetworkDriver.{last[0]} failed" in caplog.text
        undone = {"create_network": "delete_network", "create_endpoint": "delete_endpoint", "join": "leave"}
        if method in undone:
            assert driver.calls[-1] == undone[method]
        driver.returns = {}
        docker(*last)


def test_late_work_that_ends_its_thread_does_not_end_the_others(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []
    driver = Author(delete_endpoint=Later(sys.exit, 3), delete_network=Later(done.append, "network"))
    with Plugin(driver) as plugin:
        for call in (*CALLS["delete_endpoint"], ("DeleteNetwork", of(NETWORK))):
            Docker(plugin)(*call)
    assert done == ["network"]
    assert "cannot delete <Endpoint" in caplog.text


def test_a_start_goes_on_after_a_method_that_ends_its_thread(tmp_path: Path) -> None:
    with Plugin(Author(), state=tmp_path) as plugin:
        Docker(plugin)(*CALLS["create_network"][0])

    class Quitting(Author):
        def create_network(self, network: Network) -> None:
            sys.exit(3)

    with Plugin(Quitting(), state=tmp_path) as plugin:
        assert plugin.repairs["failed"] == 1


# A driver's class


class TooFew(Author):
    def join(self, network: Network, endpoint: Endpoint) -> Join:  # type: ignore[override]
        return GOOD


class Misspelt(NetworkDriver):
    def create_network(self, network: Network) -> None:
        pass

    delete_network = create_network

    def delete_endpoint(self, network: Network, endpoint: Endpoint) -> None:
        pass

    def join(self, network: Network, endpoint: Endpoint, sandbox: Sandbox) -> Join:
        return GOOD

    def leav(self, network: Network, endpoint: Endpoint) -> None:
        pass


class Plural(Author):
    def restore_endpoints(self, network: Network, endpoint: Endpoint) -> None:
        pass


class Async(Author):
    async def leave(self, network: Network, endpoint: Endpoint) -> None:  # type: ignore[override]
        pass


class NoMethod(Author):
    peer_joined = None  # type: ignore[assignment]


class NamedParameter(Author):
    def leave(self, network: Network, *, endpoint: Endpoint) -> None:  # type: ignore[override]
        pass


class Static(Author):
    @staticmethod
    def restore_endpoints(network: Network, endpoint: Endpoint) -> None:
        pass


class Opne(Author):
    def opne(self, folder: Path | None) -> None:
        pass


class Peers(Author):
    peers = None  # type: ignore[assignment]


class Swarm(Author):
    scope = "global"  # type: ignore[assignment]


class OnlyOne(Author):
    def program_external_connectivity(self, network: Network, endpoint: Endpoint, options: EndpointOptions) -> None:
        pass


class Addresses(IpamDriver):
    address: IPInterface | str | None = ip_interface("10.77.0.2/24")
    pool: Any = Pool("pool", ip_network("10.77.0.0/24"))

    def request_pool(self, request: PoolRequest) -> Pool:
        return self.pool  # type: ignore[no-any-return]

    def release_pool(self, pool_id: str) -> None:
        pass

    def request_address(self, request: AddressRequest) -> IPInterface:
        address: Any = self.address
        return address  # type: ignore[no-any-return]

    def release_address(self, address: AddressRef) -> None:
        pass


class MisspeltPools(Addresses):
    def engine_start(self) -> None:
        pass


@pytest.mark.parametrize(
    ("driver", "line"),
    [
        (TooFew, "TooFew.join must take (network, endpoint, sandbox), it takes (network, endpoint)"),
        (Misspelt, "Misspelt.leav is not a method of NetworkDriver: did you mean leave?"),
        (Plural, "Plural.restore_endpoints is not a method of NetworkDriver: did you mean restore_endpoint?"),
        (Async, "Async.leave must be a plain method, without async and yield"),
        (NoMethod, "NoMethod.peer_joined must be a method, got None"),
        (NamedParameter, "NamedParameter.leave must take (network, endpoint), it takes (network, *, endpoint)"),
        (Static, "Static.restore_endpoints is not a method of NetworkDriver: did you mean restore_endpoint?"),
        (Opne, "Opne.opne is not a method of NetworkDriver: did you mean open?"),
        (Peers, "Peers.peers is the SDK's own: call yours by another name"),
        (Swarm, "Swarm.scope must be Scope.LOCAL or Scope.GLOBAL, got 'global'"),
        (OnlyOne, "OnlyOne defines only one of program_ and revoke_external_connectivity"),
        (MisspeltPools, "MisspeltPools.engine_start is not a method of IpamDriver: did you mean engine_starts?"),
    ],
)
def test_a_class_is_refused_when_the_plugin_starts(driver: Callable[[], Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidDriver) as refused:
        Plugin(driver(), state=tmp_path / "state")
    assert str(refused.value).startswith(line)
    assert not (tmp_path / "state").exists()


def test_a_class_without_a_method_that_it_must_have_says_which_and_what_looks_like_it() -> None:
    class Joni(NetworkDriver):
        def create_network(self, network: Network) -> None:
            pass

        delete_network = create_network

        def delete_endpoint(self, network: Network, endpoint: Endpoint) -> None:
            pass

        def joni(self, network: Network, endpoint: Endpoint, sandbox: Sandbox) -> Join:
            return GOOD

    with pytest.raises(InvalidDriver, match=r"^Joni has no join, which it must have \(did you mean join by joni\?\)$"):
        Joni()  # type: ignore[abstract]


def test_methods_of_an_authors_own_are_left_alone() -> None:
    class Own(Author):
        def joined(self) -> None:
            """Looks like `join`, which is there, too."""

        def _leav(self) -> None:
            pass

        def clone(self) -> None:
            """Looks like `close`, as `reopen` looks like `open`; both are words of their own."""

        def reopen(self) -> None:
            pass

        @staticmethod
        def leave(network: Network, endpoint: Endpoint) -> None:
            pass

        def bridge_of(self, network: Network) -> str:
            return network.interface_name("br")

        def create_network(self, *everything: Any, more: int = 0) -> None:
            pass

    Plugin(Own()).close()


@pytest.mark.parametrize("status", [520, 404, 200, "500", 99, None])
def test_a_status_that_is_none_is_refused_when_the_class_is_made(status: Any) -> None:
    with pytest.raises(TypeError, match=r"Broken\.status must (be an error status of HTTP|not be 404)"):
        type("Broken", (DriverError,), {"status": status})


@pytest.mark.parametrize("status", [418, HTTPStatus.IM_A_TEAPOT], ids=repr)
def test_a_status_of_an_authors_own(status: int) -> None:
    teapot = type("Teapot", (DriverError,), {"status": status})
    with Plugin(Author(create_network=teapot("short and stout"))) as plugin:
        assert Docker(plugin).refused("CreateNetwork", create_network()) == (418, "short and stout")


class Colour(enum.Enum):
    RED = "red"


class Ratio(enum.Enum):
    HALF = 0.5


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (dict, "dict"),
        (dict[str, str], "dict"),
        (complex, "complex"),
        (bytes, "bytes"),
        (list[dict[str, int]], "dict"),
        (list[list[str]], "list"),
        (int | complex, "complex"),
        (Container, "Container"),
        (object, "object"),
        (Text, "Text"),
        (
            IPv4Address | IPv6Address,
            r"ipaddress\.IPv4Address \| ipaddress\.IPv6Address: Type unions may not contain more",
        ),
        (list[int] | set[int], r"list\[int\] \| set\[int\]: Type unions may not contain more than one array-like"),
        (Ratio, "Ratio: Enums must contain either all str or all int values"),
    ],
    ids=str,
)
def test_an_option_that_no_text_can_be_is_refused_when_the_class_is_made(kind: Any, name: str) -> None:
    with pytest.raises(TypeError, match=rf"^Options\.many: no option can be a {name}"):
        type("Options", (DriverOptions,), {"__annotations__": {"many": kind}})


def test_an_option_of_a_class_that_comes_later_is_checked_with_the_drivers_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: Any = type("Options", (DriverOptions,), {"__annotations__": {"many": "Soon"}, "__module__": __name__})
    monkeypatch.setitem(globals(), "Soon", dict)
    with pytest.raises(TypeError, match=r"^Options\.many: no option can be a dict"):
        type("Driver", (Author,), {"options_type": options})


Tag = NewType("Tag", int)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Tag, "7", 7),
        (list[Tag], "7,8", [7, 8]),
        (NewType("Tags", list[int]), "7,8", [7, 8]),
        (Final[int], "7", 7),
        (Any, "7", "7"),
        (int | str, "7a", "7a"),
        (Colour | None, "red", Colour.RED),
        (uuid.UUID, "00000000-0000-0000-0000-000000000007", uuid.UUID(int=7)),
    ],
    ids=str,
)
def test_an_option_that_a_text_can_be(kind: Any, text: str, value: Any) -> None:
    options: Any = type("Options", (DriverOptions,), {"__annotations__": {"one": kind}})
    type("Driver", (Author,), {"options_type": options})
    assert options.parse({"one": text}).one == value


@dataclass
class Listed:
    number: int


def test_attached_classes_may_have_any_name(tmp_path: Path) -> None:
    """Also those that the SDK once had for itself."""
    own: Any = dataclass(type("Container", (), {"__annotations__": {"colour": str}}))
    data = own("red")
    with Plugin(Author(), state=tmp_path) as plugin:
        for call in CALLS["create_endpoint"]:
            Docker(plugin)(*call)
        network = plugin.networks[NETWORK]
        network.attach(Listed(5))
        network.endpoints[ENDPOINT].attach(data)
    with Plugin(Author(), state=tmp_path) as plugin:
        network = plugin.networks[NETWORK]
        assert network.attached(Listed) == Listed(5)
        assert network.endpoints[ENDPOINT].container is None


# IPAM


@pytest.mark.parametrize(
    ("address", "line"),
    [
        (
            ip_interface("10.77.0.2"),
            "request_address returned 10.77.0.2/32; expected the prefix length of the pool 10.77",
        ),
        (
            ip_interface("10.78.0.2/24"),
            "request_address returned 10.78.0.2/24; expected an address of the pool 10.77.0",
        ),
        (
            IPv6Interface("fd00::2/64"),
            "request_address returned fd00::2/64; expected an address of the pool 10.77.0.0/24",
        ),
        ("10.77.0.2/24", "request_address returned '10.77.0.2/24'; expected an IPv4Interface or IPv6Interface"),
        (None, "request_address returned None; expected an IPv4Interface or IPv6Interface"),
    ],
)
def test_an_address(address: Any, line: str) -> None:
    driver = Addresses()
    driver.address = address
    with Plugin(driver) as plugin:
        docker = Docker(plugin)
        docker("IpamDriver.RequestPool", {"AddressSpace": "LocalDefault", "Pool": "10.77.0.0/24"})
        status, text = docker.refused("IpamDriver.RequestAddress", {"PoolID": "pool", "Address": ""})
        assert (status, text[: len(line)]) == (500, line)


@pytest.mark.parametrize(
    ("pool", "line"),
    [
        (None, "request_pool returned None; expected a Pool"),
        (Pool("", ip_network("10.0.0.0/8")), "request_pool returned pool_id ''; expected a text that is not empty"),
        (Pool("a", TEXT), "request_pool returned pool '10.0.0.1'; expected an IPv4Network or IPv6Network"),
        (
            Pool("a", ip_network("10.0.0.0/8"), {"k": 5}),  # type: ignore[dict-item]
            "request_pool returned data['k'] 5; expected a text",
        ),
        *(
            (
                Pool("a", ip_network("10.0.0.0/8"), {"com.docker.network.gateway": gateway}),
                f"request_pool returned data['com.docker.network.gateway'] '{gateway}'; expected {expected}",
            )
            for gateway, expected in (
                ("10.0.0.1", "an IPv4 address with its prefix length"),
                ("10.0.0.1/255.0.0.0", "an IPv4 address with its prefix length"),
                ("10.0.0.1/33", "an IPv4 address with its prefix length"),
                ("fd00::1/64", "an IPv4 address with its prefix length"),
                ("192.0.2.1/24", "an address of the pool 10.0.0.0/8"),
            )
        ),
    ],
)
def test_a_pool(pool: Any, line: str) -> None:
    driver = Addresses()
    driver.pool = pool
    with Plugin(driver) as plugin:
        asked = {"AddressSpace": "LocalDefault", "Pool": "10.77.0.0/24"}
        assert Docker(plugin).refused("IpamDriver.RequestPool", asked) == (500, line)


@pytest.mark.parametrize("gateway", ["10.0.0.1/8", "0.0.0.0/0", "169.254.1.1/32"])
def test_a_gateway_of_a_pool(gateway: str) -> None:
    driver = Addresses()
    driver.pool = Pool("a", ip_network("10.0.0.0/8"), {"com.docker.network.gateway": gateway})
    with Plugin(driver) as plugin:
        answer = Docker(plugin)("IpamDriver.RequestPool", {"AddressSpace": "LocalDefault", "Pool": "10.0.0.0/8"})
        assert answer["Data"] == driver.pool.data


def test_threads_of_the_sdk_log_what_they_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """`endpoint_is_gone` without a `return` is a line in the log, and nothing is deleted for it."""
    caplog.set_level(logging.ERROR)
    with Plugin(Author(endpoint_is_gone=lambda: None)) as plugin:
        docker = Docker(plugin)
        for call in CALLS["join"]:
            docker(*call)
        docker("Plugin.Activate")
        assert "endpoint_is_gone returned None; expected True or False" in caplog.text
        assert plugin.networks[NETWORK].endpoints
