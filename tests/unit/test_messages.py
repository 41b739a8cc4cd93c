from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Interface, IPv6Interface, ip_address, ip_interface, ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netplugin_sdk import (
    EndpointInterface,
    InvalidRequest,
    Join,
    MacAddress,
    Node,
    Pool,
    Port,
    PortMapping,
    Scope,
    SkipGateway,
    StaticRoute,
    TransportProtocol,
)
from netplugin_sdk.protocol import messages as m

from .lab import ENDPOINT, NETWORK, SANDBOX, create_endpoint, create_network, joining, of

REQUESTS: list[type[m.Message]] = [
    m.Nothing,
    m.NetworkRef,
    m.EndpointRef,
    m.CreateNetwork,
    m.AllocateNetwork,
    m.CreateEndpoint,
    m.JoinRequest,
    m.ProgramExternalConnectivity,
    m.GwAllocCheck,
    m.Discovery,
    m.PoolRequest,
    m.PoolRef,
    m.AddressRequest,
    m.AddressRef,
    m.CreateEndpointAnswer,
]


def read(kind: type[m.MessageT], content: Any) -> m.MessageT:
    return m.decode(kind, json.dumps(content).encode())


def written(answer: Any) -> Any:
    return json.loads(m.encode(answer))


def refusal(kind: type[m.Message], content: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        read(kind, content)
    return str(caught.value)


def changed(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `content` with the value at a path like ``IPv4Data/0/Pool`` replaced."""
    copy: dict[str, Any] = json.loads(json.dumps(content))
    *folders, name = path.split("/")
    place: Any = copy
    for folder in folders:
        place = place[int(folder) if folder.isdigit() else folder]
    place[name] = value
    return copy


# Requests, from the recordings

TWO_STACKS = {
    "NetworkID": NETWORK,
    "Options": {
        "com.docker.network.enable_ipv4": True,
        "com.docker.network.enable_ipv6": True,
        "com.docker.network.generic": {"com.docker.network.driver.mtu": "1400", "my.opt": "7"},
        "com.docker.network.internal": True,
    },
    "IPv4Data": [
        {
            "AddressSpace": "LocalDefault",
            "AuxAddresses": {"host1": "10.123.0.200/24"},
            "Gateway": "10.123.0.254/24",
            "Pool": "10.123.0.0/24",
        }
    ],
    "IPv6Data": [{"AddressSpace": "LocalDefault", "Gateway": "fd00:123::1/64", "Pool": "fd00:123::/64"}],
}
PORTS: dict[str, Any] = {
    "com.docker.network.endpoint.exposedports": [{"Proto": 6, "Port": 99}, {"Proto": 17, "Port": 81}],
    "com.docker.network.portmap": [
        {"Proto": 17, "IP": "", "Port": 81, "HostIP": "127.0.0.1", "HostPort": 18081, "HostPortEnd": 18081},
        {"Proto": 6, "IP": "", "Port": 80, "HostIP": "", "HostPort": 0, "HostPortEnd": 0},
        {"Proto": 132, "IP": "172.18.0.9", "Port": 7, "HostIP": "::1", "HostPort": 8000, "HostPortEnd": 8010},
    ],
}
WITH_PORTS = {
    "NetworkID": NETWORK,
    "EndpointID": ENDPOINT,
    "Interface": {
        "Address": "172.20.0.2/16",
        "AddressIPv6": "fd00:123::44/64",
        "MacAddress": "02:42:0a:7b:00:4d",
    },
    "Options": {
        **PORTS,
        "com.docker.network.endpoint.macaddress": "AkIKewBN",
        "com.docker.network.driver.private.no_proxy_6to4": True,
        "k": "v",
    },
}


def test_create_network() -> None:
    request = read(m.CreateNetwork, TWO_STACKS)
    assert request.network_id == NETWORK
    assert request.options.generic == {"com.docker.network.driver.mtu": "1400", "my.opt": "7"}
    assert (request.options.internal, request.options.enable_ipv4, request.options.enable_ipv6) == (True, True, True)
    (four,), (six,) = request.ipv4_data, request.ipv6_data
    assert (four.address_space, four.pool, four.gateway) == (
        "LocalDefault",
        ip_network("10.123.0.0/24"),
        ip_interface("10.123.0.254/24"),
    )
    assert four.auxiliary_addresses == {"host1": ip_interface("10.123.0.200/24")}
    assert (six.pool, six.gateway, six.auxiliary_addresses) == (
        ip_network("fd00:123::/64"),
        ip_interface("fd00:123::1/64"),
        {},
    )


def test_create_network_of_the_null_ipam_driver() -> None:
    pools = [{"AddressSpace": "null", "Pool": "0.0.0.0/0"}]
    request = read(m.CreateNetwork, {"NetworkID": NETWORK, "Options": {}, "IPv4Data": pools, "IPv6Data": []})
    assert request.ipv4_data == (m.IpamData(address_space="null", pool=ip_network("0.0.0.0/0")),)
    assert request.ipv6_data == ()


def test_options_of_a_network_keep_what_they_do_not_know() -> None:
    options = read(m.CreateNetwork, changed(TWO_STACKS, "Options/com.docker.network.new", [1])).options
    assert options["com.docker.network.new"] == [1]
    assert options == {**TWO_STACKS["Options"], "com.docker.network.new": [1]}  # type: ignore[dict-item]


def test_an_engine_before_28_does_not_say_ipv4_and_means_it() -> None:
    options = read(m.CreateNetwork, create_network()).options
    assert options.enable_ipv4 is True
    assert (options.internal, options.enable_ipv6, options.generic) == (False, False, {})


@pytest.mark.parametrize(("said", "meant"), [(True, True), (False, False), (None, True)])
def test_enable_ipv4(said: bool | None, meant: bool) -> None:
    assert m.NetworkOptions({"com.docker.network.enable_ipv4": said}).enable_ipv4 is meant


def test_a_pool_may_be_written_by_one_of_its_addresses() -> None:
    request = read(m.CreateNetwork, changed(TWO_STACKS, "IPv4Data/0/Pool", "10.123.0.7/24"))
    assert request.ipv4_data[0].pool == ip_network("10.123.0.0/24")


def test_allocate_network() -> None:
    # as swarm's manager sends it: plain options, and null where there is no IPv6
    content: dict[str, Any] = {
        "NetworkID": "8l5mkgx5w0sjr6vmvtn2sgz1m",
        "Options": {"a": "b"},
        "IPv4Data": [],
        "IPv6Data": None,
    }
    request = read(m.AllocateNetwork, {**content, "IPv4Data": TWO_STACKS["IPv4Data"]})
    assert (request.network_id, request.options) == ("8l5mkgx5w0sjr6vmvtn2sgz1m", {"a": "b"})
    assert [data.pool for data in request.ipv4_data] == [ip_network("10.123.0.0/24")]
    assert request.ipv6_data == ()
    # of --ipv6 it puts the pools behind those of IPv4
    request = read(m.AllocateNetwork, {**content, "IPv4Data": [*TWO_STACKS["IPv4Data"], *TWO_STACKS["IPv6Data"]]})
    assert [data.pool for data in request.ipv4_data] == [ip_network("10.123.0.0/24")]
    assert [data.pool for data in request.ipv6_data] == [ip_network("fd00:123::/64")]


def test_create_endpoint() -> None:
    request = read(m.CreateEndpoint, WITH_PORTS)
    assert (request.network_id, request.endpoint_id) == (NETWORK, ENDPOINT)
    assert request.interface == EndpointInterface(
        address=IPv4Interface("172.20.0.2/16"),
        address_ipv6=IPv6Interface("fd00:123::44/64"),
        mac_address=MacAddress("02:42:0a:7b:00:4d"),
    )
    options = request.options
    assert options.mac_address == "02:42:0a:7b:00:4d"
    assert isinstance(options.mac_address, MacAddress)
    assert options.no_proxy_6to4 is True
    assert options["k"] == "v"
    assert options.exposed_ports == (Port(TransportProtocol.TCP, 99), Port(TransportProtocol.UDP, 81))
    udp, any_port, sctp = options.port_map
    assert udp == PortMapping(
        protocol=TransportProtocol.UDP,
        container_port=81,
        host_address=ip_address("127.0.0.1"),
        host_port=18081,
        host_port_end=18081,
    )
    assert any_port == PortMapping(protocol=TransportProtocol.TCP, container_port=80)
    assert (sctp.protocol, sctp.host_address, sctp.container_address) == (
        TransportProtocol.SCTP,
        ip_address("::1"),
        ip_address("172.18.0.9"),
    )
    assert (sctp.host_port, sctp.host_port_end) == (8000, 8010)


@pytest.mark.parametrize("nothing", ["", None])
def test_empty_and_null_addresses_are_none(nothing: str | None) -> None:
    content = {"Address": nothing, "AddressIPv6": nothing, "MacAddress": nothing}
    assert read(m.CreateEndpoint, {**create_endpoint(), "Interface": content}).interface == EndpointInterface()


@pytest.mark.parametrize("interface", [{}, {"Interface": None}, {"Interface": {}}])
def test_an_endpoint_without_interface(interface: dict[str, Any]) -> None:
    content = {"NetworkID": NETWORK, "EndpointID": ENDPOINT, **interface}
    request = read(m.CreateEndpoint, content)
    assert request.interface == EndpointInterface()
    assert (request.options, request.options.port_map, request.options.exposed_ports) == ({}, (), ())
    assert (request.options.mac_address, request.options.no_proxy_6to4) == (None, False)


@pytest.mark.parametrize("key", ["com.docker.network.portmap", "com.docker.network.endpoint.exposedports"])
def test_null_lists_of_ports_are_empty(key: str) -> None:
    options = m.EndpointOptions({key: None})
    assert (options.port_map, options.exposed_ports) == ((), ())


def test_an_ipv4_mapped_address_is_no_ipv4_address() -> None:
    text = refusal(m.CreateEndpoint, changed(WITH_PORTS, "Interface/Address", "::ffff:172.18.0.2/112"))
    assert text == "Interface.Address must be an IPv4 address with prefix length, got '::ffff:172.18.0.2/112'"
    mapping = {"Proto": 6, "Port": 80, "HostIP": "::ffff:127.0.0.1"}
    (read_mapping,) = m.EndpointOptions({"com.docker.network.portmap": [mapping]}).port_map
    assert read_mapping.host_address == ip_address("::ffff:127.0.0.1")


def test_join() -> None:
    request = read(m.JoinRequest, {**joining(), "Options": PORTS})
    assert (request.network_id, request.endpoint_id, request.sandbox_key) == (NETWORK, ENDPOINT, SANDBOX)
    assert [str(port) for port in request.options.exposed_ports] == ["99/tcp", "81/udp"]


def test_program_external_connectivity() -> None:
    request = read(m.ProgramExternalConnectivity, {**of(NETWORK, ENDPOINT), "Options": PORTS})
    assert (request.network_id, request.endpoint_id) == (NETWORK, ENDPOINT)
    assert [mapping.host_port for mapping in request.options.port_map] == [18081, 0, 8000]
    assert request.options.no_proxy_6to4 is False


def test_references() -> None:
    assert read(m.NetworkRef, of(NETWORK)) == m.NetworkRef(NETWORK)
    assert read(m.EndpointRef, of(NETWORK, ENDPOINT)) == m.EndpointRef(NETWORK, ENDPOINT)
    assert read(m.PoolRef, {"PoolID": "10.77.0.0/24"}) == m.PoolRef("10.77.0.0/24")


def test_gw_alloc_check() -> None:
    assert read(m.GwAllocCheck, {"Options": TWO_STACKS["Options"]}).options.generic["my.opt"] == "7"


def test_discovery_of_a_node() -> None:
    content = {"DiscoveryType": 1, "DiscoveryData": {"Address": "10.0.0.2", "BindAddress": "0.0.0.0", "Self": True}}
    node = read(m.Discovery, content).node
    assert node == Node(address=ip_address("10.0.0.2"), bind_address=ip_address("0.0.0.0"), is_self=True)
    bare = read(m.Discovery, {"DiscoveryType": 1, "DiscoveryData": {"Address": "fd00::2", "BindAddress": ""}}).node
    assert bare == Node(address=ip_address("fd00::2"))


@pytest.mark.parametrize("content", [{"DiscoveryType": 2, "DiscoveryData": ["any", "thing"]}, {"DiscoveryType": 3}])
def test_discovery_of_something_else(content: dict[str, Any]) -> None:
    assert read(m.Discovery, content).node is None


def test_request_pool() -> None:
    content = {
        "AddressSpace": "recl",
        "Pool": "10.99.0.0/24",
        "SubPool": "10.99.0.64/26",
        "Options": {"x": "y"},
        "V6": False,
    }
    assert read(m.PoolRequest, content) == m.PoolRequest(
        address_space="recl",
        pool=ip_network("10.99.0.0/24"),
        sub_pool=ip_network("10.99.0.64/26"),
        options={"x": "y"},
    )


def test_a_pool_is_the_network_that_an_address_is_in() -> None:
    pool = read(m.PoolRequest, {"AddressSpace": "a", "Pool": "10.0.0.5/8", "SubPool": "10.1.0.5/16"})
    assert (pool.pool, pool.sub_pool) == (ip_network("10.0.0.0/8"), ip_network("10.1.0.0/16"))


def test_request_pool_of_the_drivers_choice() -> None:
    content = {"AddressSpace": "recl", "Pool": "", "SubPool": "", "Options": None, "V6": True}
    assert read(m.PoolRequest, content) == m.PoolRequest(address_space="recl", v6=True)


def test_request_address_of_a_gateway() -> None:
    options = {"RequestAddressType": "com.docker.network.gateway"}
    request = read(m.AddressRequest, {"PoolID": "fd77:3::/64", "Address": "fd77:3::1", "Options": options})
    assert request == m.AddressRequest(
        pool_id="fd77:3::/64", address=ip_address("fd77:3::1"), is_gateway=True, options=options
    )


def test_request_address_of_an_endpoint_has_its_mac_as_text() -> None:
    options = {"com.docker.network.endpoint.macaddress": "e2:e3:58:45:e6:a7"}
    request = read(m.AddressRequest, {"PoolID": "10.99.0.0/24", "Address": "", "Options": options})
    assert (request.address, request.is_gateway, request.mac_address) == (None, False, "e2:e3:58:45:e6:a7")


def test_request_address_without_options() -> None:
    request = read(m.AddressRequest, {"PoolID": "10.99.0.0/24", "Address": "10.99.0.5", "Options": None})
    assert request == m.AddressRequest(pool_id="10.99.0.0/24", address=ip_address("10.99.0.5"))


def test_release_address() -> None:
    request = read(m.AddressRef, {"PoolID": "10.99.0.0/24", "Address": "10.99.0.2"})
    assert request == m.AddressRef("10.99.0.0/24", IPv4Address("10.99.0.2"))


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (m.CreateNetwork, TWO_STACKS),
        (m.CreateEndpoint, WITH_PORTS),
        (m.JoinRequest, joining()),
        (m.EndpointRef, of(NETWORK, ENDPOINT)),
        (m.PoolRequest, {"AddressSpace": "recl"}),
        (m.AddressRef, {"PoolID": "p", "Address": "10.99.0.2"}),
    ],
)
def test_fields_that_are_not_known_are_ignored(kind: type[m.Message], content: dict[str, Any]) -> None:
    assert read(kind, {**content, "Added": {"in": ["a", "later", "engine"]}}) == read(kind, content)


def test_unknown_fields_of_inner_objects_are_ignored() -> None:
    for path in ("IPv4Data/0/New", "IPv6Data/0/New"):
        assert read(m.CreateNetwork, changed(TWO_STACKS, path, 1)) == read(m.CreateNetwork, TWO_STACKS)
    for path in ("Interface/New", "Options/com.docker.network.portmap/0/New"):
        request = read(m.CreateEndpoint, changed(WITH_PORTS, path, 1))
        assert request.interface == read(m.CreateEndpoint, WITH_PORTS).interface
        assert request.options.port_map == read(m.CreateEndpoint, WITH_PORTS).options.port_map


# What is refused

AN_ID = "an id of 12 to 128 letters and digits"
WRONG: list[tuple[type[m.Message], dict[str, Any], str, Any, str]] = [
    (m.NetworkRef, of(), "NetworkID", None, "NetworkID is missing: it must be an id"),
    (m.NetworkRef, of(), "NetworkID", "", "NetworkID is missing: it must be an id"),
    (m.NetworkRef, of(), "NetworkID", 7, "NetworkID must be an id, got 7"),
    (m.NetworkRef, of(), "NetworkID", "short", f"NetworkID must be {AN_ID}, got 'short'"),
    (m.NetworkRef, of(), "NetworkID", "../../etc/passwd", f"NetworkID must be {AN_ID}, got '../../etc/passwd'"),
    (m.NetworkRef, of(), "NetworkID", "déjà0123456789", f"NetworkID must be {AN_ID}, got 'déjà0123456789'"),
    (m.EndpointRef, of(NETWORK, ENDPOINT), "EndpointID", [], "EndpointID must be an id, got []"),
    (m.CreateNetwork, TWO_STACKS, "Options", [1], "Options must be an object, got [1]"),
    (m.CreateNetwork, TWO_STACKS, "IPv4Data", {}, "IPv4Data must be a list, got {}"),
    (m.CreateNetwork, TWO_STACKS, "IPv6Data", [3], "IPv6Data[0] must be an object, got 3"),
    (m.CreateNetwork, TWO_STACKS, "IPv4Data/0/Pool", "", "IPv4Data[0].Pool must be an IPv4 network, got ''"),
    (m.CreateNetwork, TWO_STACKS, "IPv4Data/0/Pool", "x", "IPv4Data[0].Pool must be an IPv4 network, got 'x'"),
    (m.CreateNetwork, TWO_STACKS, "IPv4Data/0/Pool", 5, "IPv4Data[0].Pool must be an IPv4 network, got 5"),
    (
        m.CreateNetwork,
        TWO_STACKS,
        "IPv4Data/0/Pool",
        "fd00::/64",
        "IPv4Data[0].Pool must be an IPv4 network, got 'fd00::/64'",
    ),
    (
        m.CreateNetwork,
        TWO_STACKS,
        "IPv6Data/0/Gateway",
        "10.0.0.1/24",
        "IPv6Data[0].Gateway must be an IPv6 address with prefix length, got '10.0.0.1/24'",
    ),
    (
        m.CreateNetwork,
        TWO_STACKS,
        "IPv4Data/0/AuxAddresses/host1",
        "10.123.0.999/24",
        "IPv4Data[0].AuxAddresses.host1 must be an IPv4 address, got '10.123.0.999/24'",
    ),
    (m.CreateNetwork, TWO_STACKS, "IPv4Data/0/AddressSpace", 1, "IPv4Data[0].AddressSpace must be a string, got 1"),
    (
        m.CreateNetwork,
        TWO_STACKS,
        "Options/com.docker.network.generic",
        {"a": 1},
        "Options.com.docker.network.generic.a must be a string, got 1",
    ),
    (
        m.CreateNetwork,
        TWO_STACKS,
        "Options/com.docker.network.internal",
        "true",
        "Options.com.docker.network.internal must be true or false, got 'true'",
    ),
    (
        m.CreateNetwork,
        TWO_STACKS,
        "Options/com.docker.network.enable_ipv6",
        1,
        "Options.com.docker.network.enable_ipv6 must be true or false, got 1",
    ),
    (m.AllocateNetwork, of(), "Options", {"a": None}, "Options.a must be a string, got None"),
    (m.CreateEndpoint, WITH_PORTS, "Interface", "eth0", "Interface must be an object, got 'eth0'"),
    (
        m.CreateEndpoint,
        WITH_PORTS,
        "Interface/Address",
        "172.18.0.256/16",
        "Interface.Address must be an IPv4 address with prefix length, got '172.18.0.256/16'",
    ),
    (
        m.CreateEndpoint,
        WITH_PORTS,
        "Interface/AddressIPv6",
        ["fd00::1/64"],
        "Interface.AddressIPv6 must be an IPv6 address with prefix length, got ['fd00::1/64']",
    ),
    (
        m.CreateEndpoint,
        WITH_PORTS,
        "Interface/MacAddress",
        "02:42",
        "Interface.MacAddress must be a MAC address, got '02:42'",
    ),
    (
        m.CreateEndpoint,
        WITH_PORTS,
        "Options/com.docker.network.endpoint.macaddress",
        "02:42:0a:7b:00:4d",
        "Options.com.docker.network.endpoint.macaddress must be base64 of a MAC address, got '02:42:0a:7b:00:4d'",
    ),
    (
        m.CreateEndpoint,
        WITH_PORTS,
        "Options/com.docker.network.endpoint.macaddress",
        "AkIK",
        "Options.com.docker.network.endpoint.macaddress must be base64 of a MAC address, got 'AkIK'",
    ),
    (
        m.CreateEndpoint,
        WITH_PORTS,
        "Options/com.docker.network.portmap/1/Proto",
        7,
        "Options.com.docker.network.portmap[1].Proto must be 6 (tcp), 17 (udp) or 132 (sctp), got 7",
    ),
    (
        m.CreateEndpoint,
        WITH_PORTS,
        "Options/com.docker.network.portmap/0/HostPort",
        65536,
        "Options.com.docker.network.portmap[0].HostPort must be a number from 0 to 65535, got 65536",
    ),
    (
        m.CreateEndpoint,
        WITH_PORTS,
        "Options/com.docker.network.portmap/0/HostPort",
        True,
        "Options.com.docker.network.portmap[0].HostPort must be a whole number, got True",
    ),
    (
        m.CreateEndpoint,
        WITH_PORTS,
        "Options/com.docker.network.portmap/2/HostIP",
        "localhost",
        "Options.com.docker.network.portmap[2].HostIP must be an IP address, got 'localhost'",
    ),
    (
        m.CreateEndpoint,
        WITH_PORTS,
        "Options/com.docker.network.endpoint.exposedports/1/Port",
        0,
        "Options.com.docker.network.endpoint.exposedports[1].Port must be a number from 1 to 65535, got 0",
    ),
    (
        m.CreateEndpoint,
        WITH_PORTS,
        "Options/com.docker.network.endpoint.exposedports/1/Port",
        80.5,
        "Options.com.docker.network.endpoint.exposedports[1].Port must be a whole number, got 80.5",
    ),
    (
        m.JoinRequest,
        joining(),
        "SandboxKey",
        "",
        "SandboxKey is missing: it must be the path of a network namespace",
    ),
    (
        m.Discovery,
        {"DiscoveryType": 1, "DiscoveryData": {}},
        "DiscoveryData/Address",
        "",
        "DiscoveryData.Address must be an IP address, got ''",
    ),
    (m.Discovery, {"DiscoveryType": 1}, "DiscoveryType", "1", "DiscoveryType must be a whole number, got '1'"),
    (m.PoolRequest, {}, "Pool", "10.0.0.0", "Pool must be a network in CIDR form, got '10.0.0.0'"),
    (m.PoolRequest, {}, "SubPool", 26, "SubPool must be a network in CIDR form, got 26"),
    (m.PoolRequest, {}, "V6", "false", "V6 must be true or false, got 'false'"),
    (m.PoolRef, {}, "PoolID", "", "PoolID is missing: it must be the id of a pool"),
    (m.AddressRequest, {"PoolID": "p"}, "Address", "10.0.0.1/8", "Address must be an IP address, got '10.0.0.1/8'"),
    (m.AddressRequest, {"PoolID": "p"}, "Options", {"a": 1}, "Options.a must be a string, got 1"),
    (
        m.AddressRequest,
        {"PoolID": "p"},
        "Options",
        {"com.docker.network.endpoint.macaddress": "AkIKewBN"},
        "Options.com.docker.network.endpoint.macaddress must be a MAC address, got 'AkIKewBN'",
    ),
    (m.AddressRef, {"PoolID": "p"}, "Address", None, "Address must be an IP address, got ''"),
]


@pytest.mark.parametrize(
    ("kind", "content", "path", "value", "text"),
    WRONG,
    ids=[f"{kind.__name__} {path}={value!r}" for kind, _, path, value, _ in WRONG],
)
def test_a_wrong_field_is_named_with_its_value(
    kind: type[m.Message], content: dict[str, Any], path: str, value: Any, text: str
) -> None:
    assert refusal(kind, changed(content, path, value)) == text


def test_an_address_without_prefix_length_is_refused() -> None:
    # The engine always sends one, as net.IPNet; /32 would be a guess.
    text = refusal(m.CreateEndpoint, changed(WITH_PORTS, "Interface/Address", "172.20.0.2"))
    assert text == "Interface.Address must be an IPv4 address with prefix length, got '172.20.0.2'"


def test_a_long_value_is_shortened() -> None:
    text = refusal(m.NetworkRef, {"NetworkID": "x" * 10_000})
    assert text.startswith("NetworkID must be an id of 12 to 128 letters and digits, got 'xxxx")
    assert text.endswith("xxx...")
    assert len(text) < 200


@pytest.mark.parametrize("body", [b"[]", b"null", b'"NetworkID"', b"7", b"true"])
def test_a_request_is_an_object(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^the request must be an object, got "):
        m.decode(m.NetworkRef, body)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b" ",
        b"NetworkID=1",
        b'{"NetworkID": "x"} {}',
        b'{"NetworkID": "\xff"}',
        b'{"NetworkID": "\\ud800"}',
        b"\x00",
        b"[" * 100_000,
        b'{"a":1e999}',
        b'{"a":1' + b"0" * 5000 + b"}",
    ],
    ids=["open", "blank", "form", "two", "no UTF-8", "surrogate", "zero", "deep", "too large", "too long"],
)
@pytest.mark.parametrize("kind", [m.NetworkRef, m.Nothing])
def test_what_is_not_json_is_refused_as_such(kind: type[m.Message], body: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^the request body is not JSON: "):
        m.decode(kind, body)


@pytest.mark.parametrize("kind", [kind for kind in REQUESTS if kind is not m.Nothing])
def test_an_empty_body_is_a_retry_with_a_drained_buffer(kind: type[m.Message]) -> None:
    with pytest.raises(InvalidRequest, match=r"^the request body is empty, as in a retry after a lost connection"):
        m.decode(kind, b"")


def test_an_empty_body_is_right_where_nothing_is_asked() -> None:
    assert m.decode(m.Nothing, b"") == m.decode(m.Nothing, b"{}") == m.Nothing()


def test_no_depth_of_nesting_is_anything_but_an_invalid_request() -> None:
    # The depth that the JSON parser just accepts is too deep for what comes after it.
    for depth in range(800, 1050):
        nested = b"[" * depth + b"]" * depth
        for body in (nested, b'{"NetworkID":' + nested + b"}", b'{"Options":' + nested + b"}"):
            with pytest.raises(InvalidRequest):
                m.decode(m.CreateNetwork, body)


# Any JSON at all

KEYS = st.sampled_from(
    [
        "NetworkID",
        "EndpointID",
        "Options",
        "IPv4Data",
        "IPv6Data",
        "Pool",
        "Gateway",
        "AuxAddresses",
        "Interface",
        "Address",
        "AddressIPv6",
        "MacAddress",
        "SandboxKey",
        "DiscoveryType",
        "DiscoveryData",
        "PoolID",
        "SubPool",
        "V6",
        "com.docker.network.generic",
        "com.docker.network.portmap",
        "com.docker.network.endpoint.exposedports",
        "com.docker.network.endpoint.macaddress",
        "Proto",
        "Port",
        "HostIP",
        "HostPort",
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(
        [NETWORK, ENDPOINT, "10.0.0.0/8", "10.0.0.1/8", "fd00::/8", "fe80::1%eth0/64", "10.0.0.1", "02:42:0a:7b:00:4d"]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=6),
    max_leaves=15,
)


@pytest.mark.parametrize("kind", REQUESTS)
@settings(max_examples=30)
@given(value=VALUES | st.dictionaries(KEYS, VALUES, max_size=8))
def test_any_json_is_a_request_or_an_invalid_request(kind: type[m.Message], value: Any) -> None:
    try:
        request = read(kind, value)
    except InvalidRequest as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert isinstance(request, kind)


@settings(max_examples=100)
@given(value=VALUES, path=st.sampled_from(sorted({path for _, _, path, _, _ in WRONG})))
def test_any_json_in_one_place_of_a_good_request(value: Any, path: str) -> None:
    for kind, content, where, _, _ in WRONG:
        if where == path:
            try:
                read(kind, changed(content, path, value))
            except InvalidRequest as error:
                assert path.split("/", maxsplit=1)[0] in str(error)  # noqa: PT017


@settings(max_examples=100)
@given(st.binary(max_size=100))
def test_any_bytes_are_a_request_or_an_invalid_request(body: bytes) -> None:
    for kind in REQUESTS:
        try:
            m.decode(kind, body)
        except InvalidRequest:
            continue


# MAC addresses


@given(st.binary(min_size=6, max_size=6))
def test_a_mac_address_survives_every_form(octets: bytes) -> None:
    address = MacAddress.from_bytes(octets)
    assert address.packed == octets
    forms = (address, address.upper(), address.replace(":", "-"), ":".join(f"{octet:x}" for octet in octets))
    assert {MacAddress(form) for form in forms} == {address}
    assert written({"mac": address}) == {"mac": str(address)}


@given(st.text(max_size=20))
def test_a_text_is_a_mac_address_or_a_value_error(text: str) -> None:
    try:
        assert len(MacAddress(text).packed) == 6
    except ValueError as error:
        assert repr(text) in str(error)  # noqa: PT017


@pytest.mark.parametrize("text", ["", "02:42:0a:7b:00", "02:42:0a:7b:00:4d:00", "02:42:0a:7b:00:4g", "02420a7b004d"])
def test_what_is_no_mac_address(text: str) -> None:
    with pytest.raises(ValueError, match="is not a MAC address"):
        MacAddress(text)


def test_a_mac_address_is_its_text() -> None:
    assert MacAddress("2-42-A-7B-0-4D") == "02:42:0a:7b:00:4d"
    assert MacAddress.parse("02:42:0A:7B:00:4D") == "02:42:0a:7b:00:4d"


def test_a_wrong_number_of_octets() -> None:
    for octets in (b"", b"12345", b"1234567"):
        with pytest.raises(ValueError, match="is not a MAC address"):
            MacAddress.from_bytes(octets)


def test_the_mac_address_that_goes_with_an_ip_address() -> None:
    assert MacAddress.of(IPv4Address("10.123.0.77")) == "02:42:0a:7b:00:4d"


def test_a_random_mac_address_is_unicast_and_locally_administered() -> None:
    drawn = {MacAddress.random() for _ in range(50)}
    assert len(drawn) == 50
    assert {address.packed[0] & 0b11 for address in drawn} == {0b10}


# Answers


def test_a_port_mapping_goes_back_as_it_came() -> None:
    mappings = read(m.CreateEndpoint, WITH_PORTS).options.port_map
    sent = PORTS["com.docker.network.portmap"]
    none = {"IP": None, "HostIP": None}
    assert written({"ports": mappings}) == {
        "ports": [{**one, **{key: none[key] for key in none if one[key] == ""}} for one in sent]
    }


def test_ports_go_back_as_they_came() -> None:
    ports = read(m.CreateEndpoint, WITH_PORTS).options.exposed_ports
    assert written({"ports": ports}) == {"ports": PORTS["com.docker.network.endpoint.exposedports"]}
    assert str(Port(TransportProtocol.SCTP, 7)) == "7/sctp"


def test_addresses_and_enums_in_an_answer() -> None:
    answer = {
        "address": ip_address("fd00::1"),
        "interface": ip_interface("10.0.0.1/8"),
        "network": ip_network("fd00::/8"),
        "scope": Scope.GLOBAL,
        "protocol": TransportProtocol.UDP,
        "nested": [{"mac": MacAddress("02:42:0a:7b:00:4d")}],
    }
    assert written(answer) == {
        "address": "fd00::1",
        "interface": "10.0.0.1/8",
        "network": "fd00::/8",
        "scope": "global",
        "protocol": 17,
        "nested": [{"mac": "02:42:0a:7b:00:4d"}],
    }


def test_what_has_no_json_form_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="an answer cannot hold <object"):
        m.encode({"Value": object()})


def test_a_filled_in_interface_holds_only_what_is_new() -> None:
    answer = m.CreateEndpointAnswer(EndpointInterface(mac_address=MacAddress("02:42:0a:7b:00:4d")))
    assert written(answer) == {"Interface": {"MacAddress": "02:42:0a:7b:00:4d"}}
    assert read(m.CreateEndpointAnswer, written(answer)) == answer
    assert written(m.CreateEndpointAnswer(EndpointInterface())) == {"Interface": {}}


def test_skip_gateway() -> None:
    assert written(SkipGateway()) == {"SkipIPv4": False, "SkipIPv6": False}
    assert written(SkipGateway(ipv6=True)) == {"SkipIPv4": False, "SkipIPv6": True}


def test_pool() -> None:
    pool = ip_network("fd77:3::/64")
    assert written(Pool("p-1", pool)) == {"PoolID": "p-1", "Pool": "fd77:3::/64", "Data": {}}
    assert written(Pool("p-1", pool, {"a": "b"}))["Data"] == {"a": "b"}


# The answer to Join


def answer_of(join: Join, *, internal: bool = False) -> Any:
    return written(join.to_wire((), internal=internal))


GATEWAYS = (ip_interface("172.18.0.1/16"), ip_address("fd00::1"))


def test_join_with_both_gateways() -> None:
    assert answer_of(Join("vc-1", gateways=GATEWAYS)) == {
        "InterfaceName": {"SrcName": "vc-1", "DstPrefix": "eth"},
        "Gateway": "172.18.0.1",
        "GatewayIPv6": "fd00::1",
        "StaticRoutes": [],
        "DisableGatewayService": False,
    }


def test_join_of_an_internal_network_has_no_gateway_and_no_gateway_service() -> None:
    answer = answer_of(Join("vc-1", gateways=GATEWAYS), internal=True)
    assert (answer["Gateway"], answer["GatewayIPv6"], answer["DisableGatewayService"]) == (None, None, True)


def test_join_without_interface() -> None:
    assert "InterfaceName" not in answer_of(Join())


def test_join_with_another_prefix() -> None:
    assert answer_of(Join("vc-1", prefix="net"))["InterfaceName"] == {"SrcName": "vc-1", "DstPrefix": "net"}


@pytest.mark.parametrize(
    ("join", "disabled"),
    [
        (Join(), True),
        (Join(gateway_service=True), False),
        (Join(gateways=[ip_address("10.0.0.1")]), False),
        (Join(gateways=[ip_address("fd00::1")], gateway_service=True), False),
    ],
)
def test_who_gives_the_default_route(join: Join, disabled: bool) -> None:
    assert answer_of(join)["DisableGatewayService"] is disabled


def test_of_several_gateways_the_one_in_the_endpoints_subnet_counts() -> None:
    gateways = [ip_interface(text) for text in ("10.0.0.1/24", "10.0.1.1/24", "10.0.2.1/24", "fd00::1/64")]

    def gateway(*addresses: str) -> Any:
        answer = Join(gateways=gateways).to_wire([ip_interface(text) for text in addresses], internal=False)
        return str(answer["Gateway"]), str(answer["GatewayIPv6"])

    assert gateway("10.0.1.7/24") == ("10.0.1.1", "fd00::1")
    assert gateway("10.0.2.7/24", "fd00::7/64") == ("10.0.2.1", "fd00::1")
    assert gateway() == ("10.0.0.1", "fd00::1")


def test_static_routes() -> None:
    routes = (
        StaticRoute(ip_network("10.1.0.0/16"), ip_address("172.18.0.254")),
        StaticRoute(ip_network("fd01::/64")),
    )
    assert answer_of(Join(static_routes=iter(routes)))["StaticRoutes"] == [
        {"Destination": "10.1.0.0/16", "RouteType": 0, "NextHop": "172.18.0.254"},
        {"Destination": "fd01::/64", "RouteType": 1, "NextHop": None},
    ]


# The same request, and what is new in an answer


def test_the_order_of_keys_and_white_space_do_not_count() -> None:
    assert m.same(b'{"a": 1, "b": [2]}', b'{"b":[2],"a":1}')


@pytest.mark.parametrize(
    "other", [b'{"a":1,"b":[2,1]}', b'{"a":1}', b'{"a":true,"b":[1,2]}', b'{"a":1,"b":[1,2],"c":null}']
)
def test_other_content_is_not_the_same(other: bytes) -> None:
    assert not m.same(b'{"a":1,"b":[1,2]}', other)


def test_an_answer_may_hold_a_text_of_a_class_of_the_drivers() -> None:
    class Prefix(str):
        __slots__ = ()

    wire = m.Join("vc-1", prefix=Prefix("foo")).to_wire((), internal=False)
    assert json.loads(m.encode(wire))["InterfaceName"] == {"SrcName": "vc-1", "DstPrefix": "foo"}
