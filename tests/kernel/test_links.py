from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest

from netplugin_sdk.errors import Conflict, InvalidRequest, NotFound
from netplugin_sdk.linux import links
from netplugin_sdk.linux.links import LinkError, netlink
from netplugin_sdk.linux.namespaces import unshare
from netplugin_sdk.values import IPInterface, IPNetwork

from ..patience import PATIENCE
from ..unit.serving import wait_for
from .lab import SYSCTLS, Namespace, run

pytestmark = pytest.mark.usefixtures("netns")

V4, V6 = ip_interface("10.9.0.1/24"), ip_interface("fd00:9::1/64")
MAC = "02:42:0a:09:00:02"


# Bridges


def test_a_new_bridge_is_up_with_its_addresses_and_mtu() -> None:
    links.ensure_bridge("br-t", addresses=[V4, V6], mtu=1400)
    bridge = links.describe("br-t")
    assert (bridge.name, bridge.kind, bridge.mtu, bridge.up, bridge.master) == ("br-t", "bridge", 1400, True, None)
    assert {V4, V6} <= set(bridge.addresses)


def test_an_ipv6_address_can_be_used_at_once() -> None:
    links.ensure_bridge("br-t", addresses=[V6])
    assert "tentative" not in run("ip", "-6", "address", "show", "dev", "br-t", "to", str(V6))


def test_a_bridge_twice_is_the_same_bridge() -> None:
    links.ensure_bridge("br-t", addresses=[V4, V6], mtu=1400)
    first = links.describe("br-t")
    links.ensure_bridge("br-t", addresses=[V4, V6], mtu=1400)
    assert links.describe("br-t") == first


def test_an_existing_bridge_is_adopted() -> None:
    run("ip", "link", "add", "mine", "address", "02:00:00:00:00:07", "type", "bridge")
    run("ip", "address", "add", "192.0.2.1/24", "dev", "mine")
    links.ensure_bridge("mine", addresses=[V4], mtu=1300)
    bridge = links.describe("mine")
    assert (bridge.mac, bridge.mtu, bridge.up) == ("02:00:00:00:00:07", 1300, True)
    assert set(bridge.addresses) >= {V4, ip_interface("192.0.2.1/24")}


def test_a_bridge_keeps_its_mac_and_mtu_whatever_its_ports_do() -> None:
    links.ensure_bridge("br-t", mtu=1400)
    before = links.describe("br-t")
    assert before.mac is not None
    assert int(before.mac[:2], 16) & 0b11 == 0b10, "locally administered, unicast"
    links.ensure_veth("ve-h", "ve-i", master="br-t")
    run("ip", "link", "set", "ve-h", "address", "00:00:00:00:00:01", "mtu", "9000")
    assert (links.describe("br-t").mac, links.describe("br-t").mtu) == (before.mac, 1400)
    links.delete("ve-h")
    assert (links.describe("br-t").mac, links.describe("br-t").mtu) == (before.mac, 1400)


def test_pairs_do_not_change_the_mac_that_somebody_elses_bridge_has_of_its_port() -> None:
    run("ip", "link", "add", "br-u", "type", "bridge")
    run("ip", "link", "add", "up0", "address", "fc:00:00:00:00:01", "type", "veth", "peer", "name", "up1")
    run("ip", "link", "set", "up0", "master", "br-u")
    for n in range(8):
        links.ensure_veth(f"ve-{n}", f"vc-{n}", master="br-u")
    assert links.describe("br-u").mac == "fc:00:00:00:00:01"


def test_a_bridge_that_is_made_again_has_the_mac_that_containers_remember() -> None:
    links.ensure_bridge("br-t")
    before = links.describe("br-t").mac
    links.delete("br-t")
    links.close()
    links.ensure_bridge("br-t")
    links.ensure_bridge("br-u")
    assert links.describe("br-t").mac == before
    assert links.describe("br-u").mac != before


def test_bridges_of_one_name_on_two_hosts_have_different_macs() -> None:
    links.ensure_bridge("br-t")
    first = links.describe("br-t").mac
    links.close()
    unshare()
    links.ensure_bridge("br-t")
    assert links.describe("br-t").mac != first


def test_a_bridge_takes_a_jumbo_mtu_before_it_has_ports() -> None:
    links.ensure_bridge("br-t", mtu=9000)
    assert links.describe("br-t").mtu == 9000


def test_a_name_held_by_something_else_is_a_conflict() -> None:
    links.ensure_veth("ve-h", "ve-i")
    with pytest.raises(Conflict, match=r"^bridge ve-h: cannot create: a veth interface has this name$"):
        links.ensure_bridge("ve-h")
    with pytest.raises(Conflict, match=r"^bridge lo: cannot create: a physical or loopback interface has this name$"):
        links.ensure_bridge("lo")


def test_a_bridge_that_cannot_be_completed_is_removed() -> None:
    with pytest.raises(LinkError, match=r"^bridge br-t: cannot set up with MTU 9: Invalid argument"):
        links.ensure_bridge("br-t", mtu=9)
    assert not links.exists("br-t")
    with pytest.raises(
        LinkError, match=r"^bridge br-t: cannot add address ff02::1/64: Cannot assign requested address"
    ):
        links.ensure_bridge("br-t", addresses=[V4, ip_interface("ff02::1/64")])
    assert not links.exists("br-t")


def test_an_adopted_bridge_that_cannot_be_completed_stays() -> None:
    links.ensure_bridge("br-t")
    with pytest.raises(LinkError):
        links.ensure_bridge("br-t", mtu=9)
    assert links.exists("br-t")


# Pairs


def test_a_new_pair() -> None:
    links.ensure_bridge("br-t")
    links.ensure_veth("ve-h", "ve-i", master="br-t", mtu=1400, mac=MAC)
    host, inside = links.describe("ve-h"), links.describe("ve-i")
    assert (host.kind, host.mtu, host.up, host.master) == ("veth", 1400, True, "br-t")
    assert (inside.kind, inside.mtu, inside.up, inside.master, inside.mac) == ("veth", 1400, False, None, MAC)


def test_a_pair_twice_is_the_same_pair() -> None:
    links.ensure_veth("ve-h", "ve-i")
    index = run("cat", "/proc/net/dev_snmp6/ve-h")  # its first line is the index
    links.ensure_veth("ve-h", "ve-i")
    assert run("cat", "/proc/net/dev_snmp6/ve-h").splitlines()[0] == index.splitlines()[0]


def test_an_existing_pair_is_brought_to_what_is_asked() -> None:
    links.ensure_bridge("br-t")
    links.ensure_veth("ve-h", "ve-i")
    run("ip", "link", "set", "ve-h", "down")
    links.ensure_veth("ve-h", "ve-i", master="br-t", mtu=1400, mac=MAC)
    host, inside = links.describe("ve-h"), links.describe("ve-i")
    assert (host.mtu, host.up, host.master) == (1400, True, "br-t")
    assert (inside.mtu, inside.mac) == (1400, MAC)


def test_what_is_not_asked_stays() -> None:
    links.ensure_bridge("br-t")
    links.ensure_veth("ve-h", "ve-i", master="br-t", mtu=1400, mac=MAC)
    before = links.describe("ve-h"), links.describe("ve-i")
    links.ensure_veth("ve-h", "ve-i")
    assert (links.describe("ve-h"), links.describe("ve-i")) == before


def test_a_pair_whose_inside_has_moved_away_is_made_again(namespace: Callable[[], Namespace]) -> None:
    sandbox = namespace()
    links.ensure_veth("ve-h", "ve-i")
    sandbox.adopt("ve-i")
    assert not links.exists("ve-i")
    links.ensure_veth("ve-h", "ve-i")
    assert links.describe("ve-i").kind == "veth"
    assert "ve-i" not in sandbox.run("ip", "link")


def test_an_end_that_moved_away_is_not_taken_for_one_with_its_index_here(namespace: Callable[[], Namespace]) -> None:
    sandbox = namespace()
    run("ip", "link", "add", "gone", "index", "77", "type", "veth", "peer", "name", "ve-h")
    run("ip", "link", "set", "gone", "netns", sandbox.path)
    assert sandbox.run("ip", "-o", "link", "show", "gone").startswith("77:")
    run("ip", "link", "add", "ve-i", "index", "77", "type", "veth", "peer", "name", "other")
    with pytest.raises(Conflict, match=r"^veth ve-h: cannot create: ve-i exists and is not its other end$"):
        links.ensure_veth("ve-h", "ve-i")
    assert links.exists("ve-h")


def test_a_pair_with_another_end_is_made_again() -> None:
    links.ensure_veth("ve-h", "ve-x")
    links.ensure_veth("ve-h", "ve-i")
    assert links.exists("ve-i")
    assert not links.exists("ve-x")


def test_an_inside_that_belongs_to_another_pair_is_a_conflict() -> None:
    links.ensure_veth("other", "ve-i")
    with pytest.raises(Conflict, match=r"^veth ve-h: cannot create: ve-i exists and is not its other end$"):
        links.ensure_veth("ve-h", "ve-i")
    assert not links.exists("ve-h")


def test_a_pair_over_another_kind_is_a_conflict() -> None:
    links.ensure_bridge("ve-h")
    with pytest.raises(Conflict, match=r"^veth ve-h: cannot create: a bridge interface has this name$"):
        links.ensure_veth("ve-h", "ve-i")


def test_a_missing_master_is_named_and_nothing_is_made() -> None:
    with pytest.raises(LinkError, match=r"^veth ve-h: cannot attach to br-none: No such device$"):
        links.ensure_veth("ve-h", "ve-i", master="br-none")
    assert not links.exists("ve-h")


def test_a_pair_that_the_kernel_refuses_leaves_nothing() -> None:
    links.ensure_veth("not-a", "bridge")
    with pytest.raises(LinkError, match=r"^veth ve-h: cannot create with ve-i: Operation not supported"):
        links.ensure_veth("ve-h", "ve-i", master="not-a")
    with pytest.raises(LinkError, match=r"^veth ve-h: cannot create with ve-i: Cannot assign requested address"):
        links.ensure_veth("ve-h", "ve-i", mac="01:00:5e:00:00:01")
    assert not links.exists("ve-h")
    assert not links.exists("ve-i")


@pytest.mark.parametrize("mac", ["", "02:42", "02:42:0a:09:00:02:03", "zz:42:0a:09:00:02"])
def test_a_mac_that_is_none(mac: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a MAC address"):
        links.ensure_veth("ve-h", "ve-i", mac=mac)


# The rest


def test_delete() -> None:
    links.ensure_veth("ve-h", "ve-i")
    assert links.delete("ve-i")
    assert not links.exists("ve-h")
    assert not links.delete("ve-h")
    with pytest.raises(LinkError, match=r"^interface lo: cannot delete: Operation not supported"):
        links.delete("lo")


def test_describe() -> None:
    loopback = links.describe("lo")
    assert (loopback.kind, loopback.up, loopback.mtu) == (None, True, 65536)
    assert loopback.addresses == (ip_interface("127.0.0.1/8"), ip_interface("::1/128"))
    with pytest.raises(NotFound, match=r"^there is no interface br-none$"):
        links.describe("br-none")


def test_describe_is_not_confused_by_others() -> None:
    links.ensure_bridge("br-a", addresses=[V4])
    links.ensure_bridge("br-b", addresses=[V6])
    assert V4 not in links.describe("br-b").addresses
    assert V6 not in links.describe("br-a").addresses


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "a b", "a\tb", "a\nb", "a\0b", "a:b", "br%d", "x" * 16, "é" * 8, "\ud800", "a\u2003b"],
)
def test_names_that_the_kernel_would_not_take(name: str) -> None:
    for use in (links.ensure_bridge, links.delete, links.exists, links.describe):
        with pytest.raises(InvalidRequest, match="cannot be the name of an interface"):
            use(name)
    for pair in ((name, "ve-i"), ("ve-h", name)):
        with pytest.raises(InvalidRequest):
            links.ensure_veth(*pair)


@pytest.mark.parametrize("name", ["x", "x" * 15, "é" * 7, "...", "br+", "-x"])
def test_names_that_it_takes(name: str) -> None:
    links.ensure_bridge(name)
    assert links.describe(name).name == name
    assert links.delete(name)


# Threads


def descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def netlink_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("netlink")]


def test_many_threads_at_once_and_nothing_left_after_close() -> None:
    before = descriptors()
    links.ensure_bridge("br-t")

    def work(number: int) -> None:
        for turn in range(3):
            links.ensure_veth(f"h{number}.{turn}", f"i{number}.{turn}", master="br-t")
            assert links.describe(f"h{number}.{turn}").master == "br-t"
            links.ensure_veth(f"h{number}.{turn}", f"i{number}.{turn}", mtu=1400)
            assert links.delete(f"h{number}.{turn}")
            assert not links.exists(f"i{number}.{turn}")

    with ThreadPoolExecutor(8) as callers:
        list(callers.map(work, range(8)))
    assert len(netlink_threads()) == 4
    used = descriptors()
    with ThreadPoolExecutor(8) as callers:  # other threads than before
        list(callers.map(work, range(8)))
    assert descriptors() == used, "descriptors grow with the number of calling threads"

    links.close()
    assert netlink_threads() == []
    assert descriptors() == before


def test_close_waits_for_what_is_under_way_and_the_next_use_starts_again() -> None:
    for turn in range(10):
        links.ensure_veth(f"h{turn}", f"i{turn}")
    with ThreadPoolExecutor(10) as callers:
        deletions = [callers.submit(links.delete, f"h{turn}") for turn in range(10)]
        links.close()
        assert all(deletion.result(PATIENCE) for deletion in deletions)
    assert links.exists("lo")


def test_close_twice_and_before_any_use() -> None:
    links.close()
    links.close()


def test_a_socket_that_cannot_be_opened_is_an_error_of_that_call_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(netlink, "IPRoute", refuse)
        with pytest.raises(LinkError, match=r"^netlink socket: Too many open files$"):
            links.describe("lo")
    for _ in range(8):  # every worker has its turn
        assert links.describe("lo").up


def test_the_sdk_itself_does_not_import_netlink() -> None:
    code = "import sys, netplugin_sdk; sys.exit(any(name.startswith('pyroute2') for name in sys.modules))"
    run(sys.executable, "-c", code)


def test_an_adopted_bridge_is_given_back_as_it_was() -> None:
    run("ip", "link", "add", "own", "mtu", "1400", "type", "bridge")
    run("ip", "address", "add", "10.9.0.1/24", "dev", "own")
    before = links.describe("own")
    added = [ip_interface("10.1.0.1/24"), ip_interface("fd00::1/64")]
    links.ensure_bridge("own", addresses=[*added, ip_interface("10.9.0.1/24")], mtu=1300)
    links.restore_link("own", mtu=before.mtu, up=before.up, without=added)
    assert links.describe("own") == before
    links.restore_link("own", mtu=before.mtu, up=True, without=added)  # again, and the addresses are gone
    assert links.describe("own").up
    links.delete("own")
    links.restore_link("own", mtu=1500, up=True)
    assert not links.exists("own")


# What the host has


@pytest.mark.usefixtures("netns")
def test_occupied_is_where_the_host_has_addresses_and_routes() -> None:
    run("ip", "link", "add", "eth9", "type", "veth", "peer", "far9")
    run("ip", "link", "set", "far9", "up")
    run("ip", "address", "add", "10.7.1.5/24", "dev", "eth9")
    run("ip", "address", "add", "fd00:7::5/64", "dev", "eth9", "nodad")
    run("ip", "link", "set", "eth9", "up")
    run("ip", "route", "add", "default", "via", "10.7.1.1")
    run("ip", "route", "add", "10.8.0.0/16", "via", "10.7.1.1")
    run("ip", "route", "add", "10.9.9.9", "via", "10.7.1.1")
    run("ip", "route", "add", "blackhole", "10.66.0.0/16")
    run("ip", "-6", "route", "add", "fd00:8::/48", "via", "fd00:7::1")
    networks = {str(network) for network in links.occupied()}
    wanted = {"10.7.1.0/24", "fd00:7::/64", "10.8.0.0/16", "10.9.9.9/32", "10.66.0.0/16", "fd00:8::/48"}
    assert networks >= wanted
    assert networks - wanted <= {"127.0.0.0/8", "::1/128", "fe80::/64", "fd00:7::5/128"}


# Macvlans


def test_a_macvlan_has_its_own_mac_and_the_parents_mtu() -> None:
    run("ip", "link", "add", "up0", "mtu", "1400", "type", "bridge")
    links.ensure_macvlan("mv-t", "up0", mac=MAC)
    macvlan = links.describe("mv-t")
    assert (macvlan.kind, macvlan.mac, macvlan.mtu, macvlan.master) == ("macvlan", MAC, 1400, None)
    assert "macvlan mode bridge" in run("ip", "-details", "link", "show", "mv-t")
    assert "mv-t@up0" in run("ip", "link", "show", "mv-t")


def test_a_macvlan_twice_is_the_same_with_the_mac_of_the_second() -> None:
    run("ip", "link", "add", "up0", "type", "bridge")
    links.ensure_macvlan("mv-t", "up0")
    index = run("ip", "link", "show", "mv-t").split(":")[0]
    links.ensure_macvlan("mv-t", "up0", mac=MAC)
    assert run("ip", "link", "show", "mv-t").split(":")[0] == index
    assert links.describe("mv-t").mac == MAC


def test_a_vxlan_is_a_port_of_its_bridge() -> None:
    links.ensure_bridge("br-t")
    for _ in range(2):
        links.ensure_vxlan("vx-t", 5000, master="br-t", mtu=1400)
    vxlan = links.describe("vx-t")
    assert (vxlan.kind, vxlan.mtu, vxlan.master, vxlan.up) == ("vxlan", 1400, "br-t", True)
    assert "vxlan id 5000 " in run("ip", "-details", "link", "show", "vx-t")
    with pytest.raises(Conflict, match="with identifier 5001: a vxlan interface has this name"):
        links.ensure_vxlan("vx-t", 5001)
    with pytest.raises(LinkError, match="vxlan vx-u: cannot create with identifier 5000: File exists"):
        links.ensure_vxlan("vx-u", 5000)
    with pytest.raises(InvalidRequest, match="16777216 is not a network identifier"):
        links.ensure_vxlan("vx-u", 1 << 24)


@pytest.mark.parametrize(("old", "new"), [("192.0.2.1", "192.0.2.2"), ("192.0.2.1", "2001:db8::1")])
def test_a_vxlan_of_another_address_or_port_replaces_it(old: str, new: str) -> None:
    def index() -> str:
        return run("ip", "link", "show", "vx-t").split(":")[0]

    links.ensure_vxlan("vx-t", 5000, local=ip_address(old))
    first = index()
    links.ensure_vxlan("vx-t", 5000, local=ip_address(old), mtu=1300)
    assert index() == first
    assert links.describe("vx-t").mtu == 1300
    links.ensure_vxlan("vx-t", 5000, local=ip_address(new))
    assert f"local {new} " in run("ip", "-details", "link", "show", "vx-t")
    links.ensure_vxlan("vx-t", 5000, local=ip_address(new), port=4800)
    assert "dstport 4800 " in run("ip", "-details", "link", "show", "vx-t")


def entries(name: str) -> set[tuple[str, str]]:
    """MAC address and host of each entry of a VXLAN."""
    lines = [line.split() for line in run("bridge", "fdb", "show", "dev", name).splitlines()]
    return {(line[0], line[line.index("dst") + 1]) for line in lines if "dst" in line}


@pytest.mark.parametrize(
    ("local", "peers"),
    [
        ("192.0.2.1", ["192.0.2.2", "192.0.2.3", "192.0.2.4"]),
        ("2001:db8::1", ["2001:db8::2", "2001:db8::3", "2001:db8::4"]),
    ],
)
def test_a_vxlan_floods_to_exactly_its_peers(local: str, peers: list[str]) -> None:
    one, two, three = map(ip_address, peers)
    everyone = "00:00:00:00:00:00"
    for name, vni in (("vx-t", 5000), ("vx-u", 5001)):
        links.ensure_vxlan(name, vni, local=ip_address(local))
    links.set_flood_destinations("vx-u", [three])
    for _ in range(2):
        links.set_flood_destinations("vx-t", [one, two])
    assert entries("vx-t") == {(everyone, str(one)), (everyone, str(two))}
    for _ in range(2):
        links.add_flood_destination("vx-t", three)
    run("bridge", "fdb", "add", MAC, "dev", "vx-t", "dst", str(one))
    run("bridge", "fdb", "add", "02:42:0a:09:00:03", "dev", "vx-t", "dst", str(two))
    for _ in range(2):
        links.delete_flood_destination("vx-t", one)
    there = {("02:42:0a:09:00:03", str(two)), (everyone, str(two)), (everyone, str(three))}
    assert entries("vx-t") == there, "what it knew of that one is forgotten"
    links.set_flood_destinations("vx-t", [])
    assert entries("vx-t") == set()
    assert entries("vx-u") == {(everyone, str(three))}


def test_a_vxlan_with_many_peers() -> None:
    links.ensure_vxlan("vx-t", 5000, local=ip_address("192.0.2.1"))
    peers = [ip_address("10.0.0.1") + number for number in range(250)]
    links.set_flood_destinations("vx-t", peers)
    assert {peer for _, peer in entries("vx-t")} == set(map(str, peers))
    with pytest.raises(LinkError, match="cannot add the entry 00:00:00:00:00:00 → fd00::1: "):
        links.set_flood_destinations("vx-t", [*peers[:200], ip_address("10.1.0.1"), ip_address("fd00::1")])


def test_a_vxlan_that_cannot_flood() -> None:
    links.ensure_vxlan("vx-t", 5000, local=ip_address("192.0.2.1"))
    with pytest.raises(LinkError, match="vxlan vx-t: cannot add the entry 00:00:00:00:00:00 → 2001:db8::2: "):
        links.add_flood_destination("vx-t", ip_address("2001:db8::2"))
    for change in (links.add_flood_destination, links.delete_flood_destination):
        with pytest.raises(LinkError, match=r"vxlan vx-u: cannot .*: No such device"):
            change("vx-u", ip_address("192.0.2.2"))
    with pytest.raises(LinkError, match="vxlan vx-u: cannot read its entries: No such device"):
        links.set_flood_destinations("vx-u", [])


def test_a_bridge_knows_what_is_behind_its_port() -> None:
    links.ensure_bridge("br-t")
    for name in ("ve-t", "ve-u"):
        links.ensure_veth(name, f"{name}-c", master="br-t")
        for _ in range(2):
            links.ensure_fdb_entry(MAC, name)
        assert f"{MAC} dev {name} master br-t static" in run("bridge", "fdb", "show")
    assert run("bridge", "fdb", "show").count(MAC) == 1, "it has moved"
    with pytest.raises(LinkError, match=f"interface ve-x: cannot add the forwarding entry of {MAC}: No such device"):
        links.ensure_fdb_entry(MAC, "ve-x")


def test_the_interface_with_an_address() -> None:
    links.ensure_bridge("br-t", addresses=[V4, V6], mtu=1400)
    for address in (V4, V6):
        assert links.with_address(address.ip) == links.describe("br-t")
    for text in ("10.9.0.2", "fd00:9::2"):
        with pytest.raises(NotFound, match=f"no interface of this host has the address {text}"):
            links.with_address(ip_address(text))


def test_a_macvlan_without_its_parent_is_refused() -> None:
    with pytest.raises(LinkError, match="macvlan mv-t: cannot create on up0: No such device"):
        links.ensure_macvlan("mv-t", "up0")


def test_a_macvlan_takes_no_name_of_something_else() -> None:
    for parent in ("up0", "up1"):
        run("ip", "link", "add", parent, "type", "bridge")
    run("ip", "link", "add", "mv-t", "type", "bridge")
    links.ensure_macvlan("mv-u", "up1")
    for name, kind in (("mv-t", "bridge"), ("mv-u", "macvlan")):
        with pytest.raises(Conflict, match=f"cannot create on up0: a {kind} interface has this name"):
            links.ensure_macvlan(name, "up0")
    assert links.describe("mv-t").kind == "bridge"


def test_a_mac_that_is_none_is_refused_for_a_macvlan() -> None:
    run("ip", "link", "add", "up0", "type", "bridge")
    with pytest.raises(InvalidRequest, match="'02:42' is not a MAC address"):
        links.ensure_macvlan("mv-t", "up0", mac="02:42")


# Interfaces that the host routes by


def test_an_interface_is_set_up_with_its_addresses() -> None:
    links.ensure_veth("ve-t", "vc-t")
    run("ip", "link", "set", "ve-t", "down")
    for _ in range(2):
        assert links.set_up("ve-t", addresses=[V4, V6], group=0x70000001)
        link = links.describe("ve-t")
        assert link.up
        assert {V4, V6} <= set(link.addresses)
    assert "group 1879048193" in run("ip", "link", "show", "ve-t")
    assert "tentative" not in run("ip", "-6", "address", "show", "dev", "ve-t", "to", str(V6))
    assert links.set_up("ve-t")
    assert "group 1879048193" in run("ip", "link", "show", "ve-t"), "what is not asked stays"
    assert not links.set_up("none", addresses=[V4])


def test_an_address_that_the_kernel_refuses_is_named() -> None:
    links.ensure_veth("ve-t", "vc-t")
    (SYSCTLS / "ipv6/conf/ve-t/disable_ipv6").write_text("1")
    with pytest.raises(LinkError, match="interface ve-t: cannot add address fd00:9::1/64: Permission denied"):
        links.set_up("ve-t", addresses=[V6])


@pytest.mark.parametrize(
    "destination", [ip_network("10.9.0.2/32"), ip_network("fd00:9::2/128"), V4.network, V6.network]
)
def test_a_route(destination: IPNetwork) -> None:
    def routes(to: str) -> str:
        return run("ip", f"-{destination.version}", "route", "show", *to.split())

    links.ensure_veth("ve-t", "vc-t")
    links.ensure_veth("ve-u", "vc-u")
    run("ip", "link", "set", "ve-t", "down")
    with pytest.raises(LinkError, match=f"route to {destination} on ve-t: cannot add: Network is down"):
        links.ensure_route(destination, "ve-t")
    links.set_up("ve-t")
    for _ in range(2):
        links.ensure_route(destination, "ve-t")
    written = str(destination).removesuffix("/32").removesuffix("/128")
    assert routes("dev ve-t").startswith(written)
    for interface in ("ve-u", None):
        with pytest.raises(Conflict, match=f"route to {destination}.*: cannot add: there is another route to it"):
            links.ensure_route(destination, interface)
        assert not links.delete_route(destination, interface)
    assert links.delete_route(destination, "ve-t")
    assert not links.delete_route(destination, "ve-t")
    assert not links.delete_route(destination, "none")
    assert written not in routes("dev ve-t")
    with pytest.raises(LinkError, match=f"route to {destination} on none: cannot add: No such device"):
        links.ensure_route(destination, "none")


@pytest.mark.parametrize("link", [V4, V6])
def test_what_is_unreachable_but_for_a_part_of_it(link: IPInterface, namespace: Callable[[], Namespace]) -> None:
    network = link.network
    for _ in range(2):
        links.ensure_route(network)
    assert f"unreachable {network}" in run("ip", f"-{link.version}", "route")
    assert network in links.occupied()
    links.ensure_veth("ve-t", "vc-t")
    links.set_up("ve-t", addresses=[ip_interface(link.ip)])
    container = namespace()
    container.adopt("vc-t", f"{network[2]}/{network.prefixlen}")
    links.ensure_route(ip_network(network[2]), "ve-t")
    ping = ["ping", "-q", "-c1", "-W1", str(network[2])]
    wait_for(lambda: subprocess.run(ping, check=False, capture_output=True).returncode == 0, "the container to answer")
    with pytest.raises(AssertionError, match=r"^ping .*: (ping: connect: No route to host)?"):
        run("ping", "-c1", "-W2", str(network[3]))
    assert links.delete_route(network)
    assert not links.delete_route(network)


def test_a_vlan_where_the_kernel_has_it() -> None:
    links.ensure_veth("up0", "up1")
    command = ["ip", "link", "add", "try0", "link", "up0", "type", "vlan", "id", "9"]
    if subprocess.run(command, capture_output=True, check=False).returncode == 0:
        for _ in range(2):
            links.ensure_vlan("up0.10", "up0", 10)
        assert links.describe("up0.10").up
        assert "vlan protocol 802.1Q id 10 " in run("ip", "-details", "link", "show", "up0.10")
        with pytest.raises(Conflict, match="a vlan interface has this name"):
            links.ensure_vlan("up0.10", "up0", 11)
    else:
        with pytest.raises(LinkError, match=r"vlan up0\.10: cannot create .* on up0: .*Unknown device type"):
            links.ensure_vlan("up0.10", "up0", 10)
        assert not links.exists("up0.10")


@pytest.mark.parametrize("number", [0, 4095])
def test_what_is_no_vlan_number(number: int) -> None:
    with pytest.raises(InvalidRequest, match=f"vlan up0.{number}: {number} is not a VLAN number: that is 1 to 4094"):
        links.ensure_vlan(f"up0.{number}", "up0", number)
