"""Pools and address spaces; among the cases are those that moby's tests of its default IPAM describe."""

from __future__ import annotations

import random
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_interface, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netplugin_sdk import Conflict, InvalidRequest, NotFound, Unavailable
from netplugin_sdk.ipam import LOCAL_DEFAULTS, AddressPool, AddressSpace, DefaultPool, Strategy, unique_local

NO_MORE = "no available addresses on this pool"
OVERLAPS = "Pool overlaps with other one on this address space"


def net(text: str) -> IPv4Network | IPv6Network:
    return ip_network(text)


def space(*defaults: str) -> AddressSpace:
    return AddressSpace([DefaultPool.parse(text) for text in defaults])


# Addresses


@pytest.mark.parametrize(
    ("network", "addresses"),
    [
        ("192.168.0.0/30", ["192.168.0.1/30", "192.168.0.2/30"]),
        ("192.168.0.0/31", ["192.168.0.0/31", "192.168.0.1/31"]),
        ("192.168.0.1/32", ["192.168.0.1/32"]),
        ("2001:db8::/126", ["2001:db8::1/126", "2001:db8::2/126", "2001:db8::3/126"]),
        ("2001:db8::/127", ["2001:db8::/127", "2001:db8::1/127"]),
        ("2001:db8::1/128", ["2001:db8::1/128"]),
    ],
)
def test_what_is_given_out_of_small_networks(network: str, addresses: list[str]) -> None:
    pool = AddressPool(net(network))
    assert [str(pool.allocate()) for _ in addresses] == addresses
    with pytest.raises(Unavailable, match=NO_MORE):
        pool.allocate()
    assert len(pool) == len(addresses)
    for address in addresses:
        assert pool.release(ip_interface(address).ip)
    assert len(pool) == 0


@pytest.mark.parametrize("network", ["192.168.0.0/24", "2001:db8::/64"])
def test_reserved_addresses_are_never_given_out(network: str) -> None:
    pool = AddressPool(net(network))
    reserved = {pool.network.network_address}
    if pool.network.version == 4:
        reserved.add(pool.network.broadcast_address)
    for address in reserved:
        with pytest.raises(Conflict, match="Address already in use"):
            pool.take(address)
        with pytest.raises(Conflict, match="Address already in use"):
            pool.hold(address, 0)
        assert not pool.release(address)
        assert address not in pool
    assert len(pool) == 0
    assert not list(pool)
    given = pool.allocate().ip
    assert list(pool) == [given]


def test_an_address_that_is_asked_for() -> None:
    pool = AddressPool(net("192.168.100.0/24"))
    wanted = ip_address("192.168.100.250")
    assert pool.take(wanted) == ip_interface("192.168.100.250/24")
    with pytest.raises(Conflict, match="Address already in use"):
        pool.take(wanted)
    assert pool.release(wanted)
    assert not pool.release(wanted)
    pool.take(wanted)
    for outside in ("192.168.101.1", "2001:db8::1"):
        with pytest.raises(InvalidRequest, match="requested address is out of range"):
            pool.take(ip_address(outside))
        assert not pool.release(ip_address(outside))
        assert ip_address(outside) not in pool


def test_a_part_of_the_network() -> None:
    pool, part = AddressPool(net("172.28.0.0/16")), net("172.28.30.0/29")
    inside = [pool.allocate(within=part) for _ in range(8)]
    assert [str(address) for address in inside] == [f"172.28.30.{n}/16" for n in range(8)]
    with pytest.raises(Unavailable, match=NO_MORE):
        pool.allocate(within=part)
    pool.release(inside[3].ip)
    assert pool.allocate(within=part) == inside[3]
    assert str(pool.take(ip_address("172.28.30.77"))) == "172.28.30.77/16"  # beyond the part, as Docker allows


def test_a_part_has_the_networks_own_addresses_reserved() -> None:
    pool = AddressPool(net("172.28.0.0/24"))
    part = net("172.28.0.0/30")
    assert [pool.allocate(within=part).ip.packed[-1] for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("strategy", Strategy)
@pytest.mark.parametrize("prefix", [20, 23, 27, 29, 30])
def test_all_addresses_of_a_network_and_each_once(prefix: int, strategy: Strategy) -> None:
    pool = AddressPool(net(f"10.0.0.0/{prefix}"))
    count = 2 ** (32 - prefix) - 2
    given_out = {pool.allocate(str(owner), strategy=strategy).ip for owner in range(count)}
    assert given_out == set(pool.network.hosts())
    with pytest.raises(Unavailable):
        pool.allocate("late", strategy=strategy)
    released = random.Random(prefix).sample(sorted(given_out, key=int), count // 2)
    for address in released:
        assert pool.release(address)
    again = {pool.allocate(str(-owner - 1), strategy=strategy).ip for owner in range(len(released))}
    assert again == set(released)


def test_serial_does_not_use_again_at_once() -> None:
    pool = AddressPool(net("192.168.0.0/29"))

    def next_one() -> int:
        return pool.allocate(strategy=Strategy.SERIAL).ip.packed[-1]

    assert [next_one() for _ in range(3)] == [1, 2, 3]
    pool.release(ip_address("192.168.0.1"))
    assert [next_one() for _ in range(4)] == [4, 5, 6, 1]


def test_hashed_is_the_same_after_everything_is_forgotten() -> None:
    macs = [f"02:42:ac:11:00:{n:02x}" for n in range(50)]
    first, second = AddressPool(net("2001:db8::/64")), AddressPool(net("2001:db8::/64"))
    before = {mac: first.allocate(mac, strategy=Strategy.HASHED) for mac in macs}
    assert {mac: second.allocate(mac, strategy=Strategy.HASHED) for mac in reversed(macs)} == before


def test_who_asks_again_gets_the_same() -> None:
    pool = AddressPool(net("192.168.0.0/29"))
    mine = pool.allocate("me")
    assert pool.allocate("me") == mine
    assert pool.of("me") == mine
    assert pool.owner(mine.ip) == "me"
    assert pool.take(mine.ip, "me") == mine
    with pytest.raises(Conflict):
        pool.take(mine.ip, "you")
    assert len(pool) == 1


def test_what_is_held_is_for_its_owner_and_for_others_in_need() -> None:
    now = 0.0
    pool = AddressPool(net("192.168.0.0/29"), clock=lambda: now)
    one, two, *_ = [pool.allocate(str(n)) for n in range(6)]
    pool.hold(one.ip, 60, "kept")
    pool.hold(two.ip, 30, None)
    assert one.ip not in pool
    assert pool.allocate("kept") == one
    pool.hold(one.ip, 60, "kept")
    assert pool.allocate("in need") == two  # the one that would be free first
    assert pool.allocate("kept") == one
    pool.hold(one.ip, 60, "kept")
    now = 61.0
    assert pool.expire() == [one.ip]
    assert pool.of("kept") is None
    assert pool.allocate("anybody") == one


# Networks


def test_networks_do_not_overlap() -> None:
    a = space()
    a.add(net("10.1.0.0/16"))
    for other in ("10.1.0.0/16", "10.1.1.0/24", "10.0.0.0/8", "10.1.255.255/32", "0.0.0.0/0"):
        with pytest.raises(Conflict, match=OVERLAPS):
            a.add(net(other))
    for other in ("10.0.0.0/16", "10.2.0.0/16", "2001:db8::/32", "8000::/1"):
        a.add(net(other))
    a.remove(net("10.1.0.0/16"))
    a.add(net("10.1.1.0/24"))
    for ends in ("10.3.0.0/32", "10.3.255.255/32"):
        a.add(net(ends))
        with pytest.raises(Conflict, match=OVERLAPS):
            a.add(net("10.3.0.0/16"))
        a.remove(net(ends))


@given(
    st.lists(st.tuples(st.integers(0, 255), st.integers(24, 32)).map(lambda t: IPv4Network((t[0], t[1]), strict=False)))
)
@settings(max_examples=200, derandomize=True)
def test_what_overlaps_is_found_as_by_looking_at_all(networks: list[IPv4Network]) -> None:
    a, taken = space(), list[IPv4Network]()
    for network in networks:
        if any(network.overlaps(other) for other in taken):
            with pytest.raises(Conflict):
                a.add(network)
        else:
            a.add(network)
            taken.append(network)
    for network in taken:
        assert a.remove(network)
    assert not a.pools


def test_parts_of_one_network_share_its_addresses() -> None:
    a, whole, part, other = space(), net("172.28.0.0/16"), net("172.28.10.0/24"), net("172.28.20.0/24")
    pool = a.add(whole, part)
    assert a.add(whole, other) is pool
    for wrong in (part, other, None):
        with pytest.raises(Conflict, match=OVERLAPS):
            a.add(whole, wrong)
    assert not a.remove(whole, part)
    assert a.pools[whole].addresses is pool
    assert a.remove(whole, other)
    assert not a.pools
    assert a.add(whole) is not pool
    assert len(a.add(whole, part)) == 0


@pytest.mark.parametrize("part", ["10.0.0.0/8", "172.29.0.0/24", "2001:db8::/64"])
def test_a_part_that_is_none(part: str) -> None:
    with pytest.raises(InvalidRequest, match=f"invalid address subpool: {part} is not in 172.28.0.0/16"):
        space().add(net("172.28.0.0/16"), net(part))


def test_what_is_not_taken_cannot_be_given_back() -> None:
    a = space()
    a.add(net("172.28.0.0/16"))
    for network, part in (("172.28.0.0/24", None), ("172.28.0.0/16", "172.28.1.0/24"), ("2001:db8::/64", None)):
        with pytest.raises(NotFound, match="address space does not contain specified address pool"):
            a.remove(net(network), net(part) if part else None)
    assert a.remove(net("172.28.0.0/16"))
    with pytest.raises(NotFound):
        a.remove(net("172.28.0.0/16"))


# Networks of its own choice


def test_the_default_ones_are_dockers() -> None:
    a = AddressSpace(LOCAL_DEFAULTS)
    chosen = [str(a.choose()) for _ in range(15 + 16)]
    with pytest.raises(Unavailable, match="all predefined address pools have been fully subnetted"):
        a.choose()
    assert chosen == [*(f"172.{n}.0.0/16" for n in range(17, 32)), *(f"192.168.{n}.0/20" for n in range(0, 256, 16))]


@pytest.mark.parametrize(
    ("defaults", "taken", "beside", "wanted"),
    [  # moby's address_space_test.go, TestDynamicPoolAllocation, by its cases' ideas
        (["10.0.0.0/8 size 24"], [], [], "10.0.0.0/24"),
        (["10.0.0.0/8 size 24"], ["10.0.0.0/24"], [], "10.0.1.0/24"),
        (["10.0.0.0/8 size 24"], ["10.0.0.0/24", "10.0.2.0/24"], [], "10.0.1.0/24"),
        (["10.0.0.0/8 size 24"], ["10.0.0.128/25"], [], "10.0.1.0/24"),
        (["10.0.0.0/8 size 24"], ["10.0.0.0/25"], ["10.0.1.7/32"], "10.0.2.0/24"),
        (["10.0.0.0/8 size 24"], ["10.0.0.0/16"], [], "10.1.0.0/24"),
        (["10.0.0.0/24 size 24", "172.16.0.0/12 size 16"], ["10.0.0.0/8"], [], "172.16.0.0/16"),
        (["10.0.0.0/24", "172.16.0.0/16"], [], ["10.0.0.0/8", "172.0.0.0/9"], None),
        (["10.10.0.0/16 size 24"], ["10.0.0.0/8"], [], None),
        (["10.10.0.0/16 size 24"], ["9.0.0.0/8", "11.0.0.0/8"], [], "10.10.0.0/24"),
        (["10.10.0.0/23 size 24"], ["10.10.0.0/24"], ["10.10.1.255/32"], None),
        (["10.10.0.0/16 size 16"], ["10.10.255.255/32"], [], None),
        (["192.168.0.0/16 size 20"], ["192.168.0.0/24"], ["192.168.16.0/20"], "192.168.32.0/20"),
        (["172.16.0.0/15 size 16", "172.16.0.0/16"], ["172.16.0.0/16", "172.17.0.0/16"], [], None),
        (["0.0.0.0/0 size 8"], ["0.0.0.0/8"], ["1.0.0.0/8", "2.0.0.0/7"], "4.0.0.0/8"),
        (["255.255.255.0/24 size 25"], ["255.255.255.0/25"], [], "255.255.255.128/25"),
        (["255.255.255.0/24 size 25"], ["255.255.255.0/25", "255.255.255.128/25"], [], None),
    ],
)
def test_the_first_that_is_free(defaults: list[str], taken: list[str], beside: list[str], wanted: str | None) -> None:
    a = space(*defaults)
    for text in taken:
        a.add(net(text))
    if wanted is None:
        with pytest.raises(Unavailable, match="all predefined address pools have been fully subnetted"):
            a.choose(beside=map(net, beside))
    else:
        assert a.choose(beside=map(net, beside)) == net(wanted)
        with pytest.raises(Conflict):
            a.add(net(wanted))


def test_it_is_never_the_same_until_it_is_given_back() -> None:
    a = space("10.0.0.0/16 size 24")
    chosen = [a.choose() for _ in range(256)]
    assert len(set(chosen)) == 256
    a.remove(chosen[100])
    assert a.choose() == chosen[100]


def test_of_a_size_that_is_asked_for() -> None:
    a = space("172.17.0.0/16", "192.168.0.0/16 size 20", "fd00::/48 size 64")
    assert a.choose(size=24) == net("172.17.0.0/24")
    assert space("172.17.0.0/16 size 24").choose(size=16) == net("172.17.0.0/16")
    assert a.choose() == net("192.168.0.0/20")  # the first has room for no more /16
    assert a.choose(size=30) == net("172.17.1.0/30")
    assert a.choose(size=32) == net("172.17.1.4/32")
    with pytest.raises(Unavailable, match="there are no default IPv4 pools for a /8"):
        a.choose(size=8)


def test_single_addresses_to_the_last() -> None:
    a = space("10.0.0.0/30 size 32")
    assert [str(a.choose()) for _ in range(4)] == [f"10.0.0.{n}/32" for n in range(4)]
    with pytest.raises(Unavailable, match="fully subnetted"):
        a.choose()


@pytest.mark.parametrize("part", ["10.1.0.0/25", "10.1.0.128/25", "10.1.0.0/24"])
def test_a_part_may_begin_and_end_with_its_network(part: str) -> None:
    space().add(net("10.1.0.0/24"), net(part))


def test_a_48_of_64s() -> None:
    a = space("fd00:1::/48 size 64")
    assert [str(a.choose(version=6)) for _ in range(3)] == ["fd00:1::/64", "fd00:1:0:1::/64", "fd00:1:0:2::/64"]
    assert a.choose(version=6, size=80) == net("fd00:1:0:3::/80")
    with pytest.raises(Unavailable, match="there are no default IPv4 pools"):
        a.choose()


def test_the_network_of_a_machine_is_always_the_same() -> None:
    """Also in the next version of the SDK: hosts have addresses of it."""
    assert unique_local("machine") == DefaultPool.parse("fdbc:20a:35b7::/48 size 64")
    assert unique_local("another") != unique_local("machine")


@given(
    taken=st.lists(st.tuples(st.integers(0, 255), st.integers(27, 32)), max_size=12),
    size=st.integers(26, 31),
)
@settings(max_examples=300, derandomize=True)
def test_the_first_that_is_free_as_by_looking_at_all(taken: list[tuple[int, int]], size: int) -> None:
    base = IPv4Network((10 << 24, 24))
    others = [IPv4Network(((10 << 24) + offset, length), strict=False) for offset, length in taken]
    free = [part for part in base.subnets(new_prefix=size) if not any(part.overlaps(other) for other in others)]
    a = AddressSpace([DefaultPool(base, size)])
    for part in free:
        assert a.choose(beside=others) == part
    with pytest.raises(Unavailable):
        a.choose(beside=others)


@pytest.mark.parametrize(
    ("text", "base", "size"),
    [("10.0.0.0/24 size 32", "10.0.0.0/24", 32), ("10.0.0.0/8", "10.0.0.0/8", 8), ("fd00::/8 size 64", "fd00::/8", 64)],
)
def test_default_pools_as_text(text: str, base: str, size: int) -> None:
    assert DefaultPool.parse(text) == DefaultPool(net(base), size)


@pytest.mark.parametrize("text", ["10.0.0.0/8 size 7", "10.0.0.0/8 size 33", "10.0.0.1/8", "10.0.0.0/8 size", "x", ""])
def test_default_pools_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        DefaultPool.parse(text)
