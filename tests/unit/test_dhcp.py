"""What the DHCP driver makes of a server's words."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from netplugin_dhcp.lease import Lease, Route, classless_routes, host_name
from netplugin_dhcp.options import Options, wanted_address

from netplugin_sdk import EndpointOptions, InvalidOption

GRANT: dict[str, Any] = {"lease_time": 3600, "subnet_mask": "255.255.255.0", "server_id": "192.0.2.1"}


def granted(address: str = "192.0.2.77", **options: Any) -> Lease:
    return Lease.granted(address, GRANT | options, "02:00:00:00:00:01", 1000.0)


def route(destination: str, next_hop: str | None) -> Route:
    return Route(IPv4Network(destination), None if next_hop is None else IPv4Address(next_hop))


# Option 121


@pytest.mark.parametrize(
    ("octets", "routes"),
    [
        # The table of RFC 3442, and its 0.0.0.0: the route of a link.
        ([0, 10, 0, 0, 1], [route("0.0.0.0/0", "10.0.0.1")]),
        ([8, 10, 10, 0, 0, 1], [route("10.0.0.0/8", "10.0.0.1")]),
        ([24, 10, 0, 0, 10, 0, 0, 1], [route("10.0.0.0/24", "10.0.0.1")]),
        ([16, 10, 17, 10, 0, 0, 1], [route("10.17.0.0/16", "10.0.0.1")]),
        ([24, 10, 27, 129, 10, 0, 0, 1], [route("10.27.129.0/24", "10.0.0.1")]),
        ([25, 10, 229, 0, 128, 10, 0, 0, 1], [route("10.229.0.128/25", "10.0.0.1")]),
        ([32, 10, 198, 122, 47, 10, 0, 0, 1], [route("10.198.122.47/32", "10.0.0.1")]),
        ([24, 192, 0, 2, 0, 0, 0, 0], [route("192.0.2.0/24", None)]),
        # Bits beyond the prefix are ignored.
        ([9, 10, 255, 10, 0, 0, 1], [route("10.128.0.0/9", "10.0.0.1")]),
        ([0, 10, 0, 0, 1, 8, 10, 10, 0, 0, 2], [route("0.0.0.0/0", "10.0.0.1"), route("10.0.0.0/8", "10.0.0.2")]),
        ([], []),
    ],
)
def test_classless_routes(octets: list[int], routes: list[Route]) -> None:
    assert [*classless_routes(octets)] == routes


@pytest.mark.parametrize("octets", [[33, 10, 0, 0, 0, 0, 10, 0, 0, 1], [24, 10, 0, 0, 10, 0, 0], [24], [0, 10, 0, 0]])
def test_what_is_no_list_of_routes(octets: list[int]) -> None:
    with pytest.raises(ValueError, match="option 121 is not a list of routes"):
        [*classless_routes(octets)]


@given(st.lists(st.tuples(st.integers(0, 32), st.ip_addresses(v=4), st.ip_addresses(v=4)), max_size=8))
def test_routes_are_read_as_they_were_written(written: list[tuple[int, IPv4Address, IPv4Address]]) -> None:
    octets, routes = b"", []
    for length, address, router in written:
        octets += bytes([length]) + address.packed[: -(-length // 8)] + router.packed
        routes.append(Route(IPv4Network((address, length), strict=False), None if router.is_unspecified else router))
    assert [*classless_routes([*octets])] == routes


@given(st.binary(max_size=40))
def test_any_octets_are_routes_or_refused(octets: bytes) -> None:
    try:
        assert len([*classless_routes([*octets])]) <= len(octets) // 5
    except ValueError as error:
        assert octets.hex()[-8:] in str(error)  # noqa: PT017


# Leases


def test_a_lease_is_what_the_server_says() -> None:
    lease = granted(router=["192.0.2.1", "192.0.2.2"], renewal_time=100, rebinding_time=200)
    assert lease == Lease(
        address=IPv4Interface("192.0.2.77/24"),
        server=IPv4Address("192.0.2.1"),
        server_mac=lease.server_mac,
        gateway=IPv4Address("192.0.2.1"),
        routes=(),
        renewal=1100.0,
        rebinding=1200.0,
        expiry=4600.0,
    )


def test_times_that_the_server_does_not_say_or_says_wrongly() -> None:
    lease = granted()
    assert (lease.renewal, lease.rebinding) == (1000 + 1800, 1000 + 3150)
    lease = granted(renewal_time=7200, rebinding_time=9000)
    assert lease.renewal == lease.rebinding == lease.expiry == 4600


def test_a_lease_for_ever() -> None:
    lease = granted(lease_time=-1, renewal_time=-1, rebinding_time=-1)  # as pyroute2 reads 2**32 - 1
    assert lease.renewal == lease.expiry == 1000 + 2**32 - 1


def test_with_classless_routes_the_routers_do_not_count() -> None:
    lease = granted(router=["192.0.2.1"], classless_static_route=[8, 10, 192, 0, 2, 9])
    assert (lease.gateway, lease.routes) == (None, (route("10.0.0.0/8", "192.0.2.9"),))
    lease = granted(router=["192.0.2.1"], classless_static_route=[0, 192, 0, 2, 9])
    assert (lease.gateway, lease.routes) == (IPv4Address("192.0.2.9"), ())


def test_no_gateway() -> None:
    assert granted().gateway is None
    assert granted(router=[]).gateway is None


@pytest.mark.parametrize(
    ("address", "options", "said"),
    [
        ("0.0.0.0", {}, "0.0.0.0 cannot be an interface's address"),
        ("224.0.0.1", {}, "224.0.0.1 cannot be an interface's address"),
        ("192.0.2.77", {"subnet_mask": "255.0.255.0"}, "'255.0.255.0' is not a valid netmask"),
        ("192.0.2.77", {"server_id": "x"}, "Expected 4 octets in 'x'"),
        ("192.0.2.77", {"classless_static_route": [99]}, "option 121 is not a list of routes: 63"),
    ],
)
def test_what_cannot_be_used(address: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        granted(address, **options)


@pytest.mark.parametrize("missing", GRANT)
def test_what_must_be_said(missing: str) -> None:
    with pytest.raises(ValueError, match=f"the DHCP server does not say its {missing}"):
        Lease.granted("192.0.2.77", {k: v for k, v in GRANT.items() if k != missing}, "02:00:00:00:00:01", 0.0)


# Names


@pytest.mark.parametrize(
    ("container", "name"),
    [
        ("web", "web"),
        ("my_web.1", "my-web-1"),
        ("shop-db-1", "shop-db-1"),
        ("a__b", "a-b"),
        ("web_", "web"),
        ("x" * 62 + "_y", "x" * 62),
    ],
)
def test_the_host_name_of_a_container(container: str, name: str) -> None:
    assert host_name(container) == name


# Options


def test_options() -> None:
    assert Options.parse({"bridge": "br0"}).link == "br0"
    options = Options.parse({"parent": "eth0.7", "timeout": "2.5", "ipv6": "true"})
    assert (options.link, options.timeout, options.ipv6) == ("eth0.7", 2.5, True)


@pytest.mark.parametrize("given_", [{}, {"bridge": "br0", "parent": "eth0"}])
def test_either_a_bridge_or_a_parent(given_: dict[str, str]) -> None:
    with pytest.raises(InvalidOption, match="give one of the options bridge=NAME and parent=NAME"):
        _ = Options.parse(given_).link


def test_the_address_that_a_container_wants() -> None:
    assert wanted_address(EndpointOptions({})) is None
    assert wanted_address(EndpointOptions({"address": "192.0.2.7"})) == IPv4Address("192.0.2.7")
    for wrong in ("192.0.2.0/24", "fd00::1", "", 7.5):
        with pytest.raises(InvalidOption, match="driver-opt address="):
            wanted_address(EndpointOptions({"address": wrong}))
