"""What is said unasked of an address, as the kernel of who hears it understands it."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address, ip_interface

import pytest

from netplugin_sdk.errors import NotFound
from netplugin_sdk.linux import links
from netplugin_sdk.linux.announce import announce, announce_to
from netplugin_sdk.linux.links import LinkError
from netplugin_sdk.values import MacAddress

from ..unit.serving import wait_for
from .lab import Namespace, run

pytestmark = pytest.mark.usefixtures("netns")

OLD, NEW = MacAddress("02:42:0a:09:00:63"), MacAddress("02:42:0a:09:00:64")


@pytest.mark.parametrize("address", ["10.9.0.2", "fd00:9::2"])
def test_who_remembered_another_mac_address_learns_the_new_one(
    address: str, namespace: Callable[[], Namespace]
) -> None:
    neighbour = namespace()
    run("ip", "link", "add", "ve", "up", "type", "veth", "peer", "name", "eth0", "netns", neighbour.path)
    neighbour.adopt_addresses("eth0", "10.9.0.1/24", "fd00:9::1/64")
    neighbour.run("ip", "neighbour", "add", address, "lladdr", OLD, "dev", "eth0", "nud", "stale")

    def learned() -> bool:
        announce("ve", {ip_address(address): NEW})
        return f"lladdr {NEW}" in neighbour.run("ip", "neighbour", "show", address)

    wait_for(learned, "it to be learned: a link that is new hears no multicast yet")


def test_a_bridge_learns_where_it_came_from() -> None:
    for end in ("ve", "vf"):
        run("ip", "link", "add", "name", end, "up", "type", "veth", "peer", "name", f"{end}-br")
    run("ip", "link", "add", "name", "br", "up", "type", "bridge")
    for end in ("ve", "vf"):
        run("ip", "link", "set", f"{end}-br", "up", "master", "br")
    for end, address in (("ve", "10.9.0.2"), ("vf", "fd00:9::2")):

        def learned(end: str = end, address: str = address) -> bool:
            announce(end, {ip_address(address): NEW})
            return f"{NEW} dev {end}-br master br" in run("bridge", "fdb", "show")

        wait_for(learned, "it to be learned: a port that is new lets nothing pass yet")


@pytest.mark.parametrize(("here", "there"), [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")])
@pytest.mark.parametrize("address", ["10.9.0.2", "fd00:9::2"])
def test_one_host_only_learns_it_by_a_vxlan(
    here: str, there: str, address: str, namespace: Callable[[], Namespace]
) -> None:
    """Where the MAC address is, of the VXLAN, and which one it is, of the neighbour."""
    length = 64 if ":" in here else 24
    other = namespace()
    run("ip", "link", "add", "ve", "up", "type", "veth", "peer", "name", "eth0", "netns", other.path)
    run("ip", "address", "add", f"{here}/{length}", "dev", "ve", *(["nodad"] if ":" in here else []))
    other.adopt_addresses("eth0", f"{there}/{length}")
    zero = ["udp6zerocsumrx"] if ":" in here else []
    other.run("ip", "link", "add", "vx", "type", "vxlan", "id", "70000", "dstport", "4800", "local", there, *zero)
    other.adopt_addresses("vx", "10.9.0.1/24", "fd00:9::1/64")
    other.run("bridge", "fdb", "add", NEW, "dev", "vx", "dst", f"{there}9", "self", "dynamic")
    other.run("ip", "neighbour", "add", address, "lladdr", OLD, "dev", "vx", "nud", "stale")

    def learned() -> bool:
        announce_to(ip_address(there), {ip_address(address): NEW}, vni=70000, local=ip_address(here), port=4800)
        stations = other.run("bridge", "fdb", "show", "dev", "vx")
        neighbours = other.run("ip", "neighbour", "show", address)
        return f"{NEW} dst {here} self" in stations and f"lladdr {NEW}" in neighbours

    wait_for(learned, "both to be learned")


def test_a_host_that_cannot_be_told() -> None:
    links.ensure_bridge("br", addresses=[ip_interface("192.0.2.1/24")])
    for local, peer in (("192.0.2.1", "198.51.100.9"), ("192.0.2.3", "192.0.2.2"), ("192.0.2.1", "fd00::1")):
        with pytest.raises(LinkError, match=f"cannot announce addresses to {peer}: "):
            announce_to(ip_address(peer), {ip_address("10.9.0.2"): NEW}, vni=7, local=ip_address(local))


def test_an_interface_that_is_not_there_or_down() -> None:
    with pytest.raises(NotFound, match="there is no interface ve"):
        announce("ve", {ip_address("10.9.0.2"): NEW})
    run("ip", "link", "add", "ve", "type", "veth", "peer", "name", "vf")
    with pytest.raises(LinkError, match="interface ve: cannot announce an address: Network is down"):
        announce("ve", {ip_address("10.9.0.2"): NEW})
