"""The overlay example on one node; the other is a host whose VXLAN is made by hand."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from netplugin_overlay.driver import OverlayDriver

from netplugin_sdk import Timings
from netplugin_sdk.cnm import Network, RemoteError, Sandbox, Subnet
from netplugin_sdk.errors import Unavailable
from netplugin_sdk.linux import links, shortcut
from netplugin_sdk.testing.conformance import Group, Outcome
from netplugin_sdk.testing.conformance import run as run_checks
from netplugin_sdk.testing.conformance.session import Session
from netplugin_sdk.testing.engine import wait_until
from netplugin_sdk.testing.kit import HOST, HOST_IPV6, OUTSIDE, OUTSIDE_IPV6, Lab
from netplugin_sdk.values import MacAddress

from ..unit.lab import Docker
from .lab import SYSCTLS, reaches, run, soon_reaches
from .test_conformance import Running

SUBNET = "10.1.0.0/24"
VNI = "2000000"
REMOTE, REMOTE_MAC = "10.1.0.99", "02:42:0a:01:00:63"
THIS, PEER = HOST.split("/")[0], OUTSIDE.split("/")[0]
THIS_IPV6, PEER_IPV6 = HOST_IPV6.split("/")[0], OUTSIDE_IPV6.split("/")[0]
PROGRAM = """
import sys
from netplugin_overlay.driver import OverlayDriver
from netplugin_sdk import serve
serve(OverlayDriver(), name="x", socket_path=sys.argv[1], state=sys.argv[2], docker=None)
"""


def node(address: str, *, this: bool = False) -> dict[str, Any]:
    data = {"Address": address, "BindAddress": address if this else "", "Self": this}
    return {"DiscoveryType": 1, "DiscoveryData": data}


class Swarm:
    """Of this node, where the plugin is, and of the outside host."""

    def __init__(self, lab: Lab, this: str, peer: str) -> None:
        self.lab, self.this, self.peer = lab, this, peer
        self.driver = OverlayDriver()
        self.docker = Docker(lab.plugin(self.driver, name="overlay"))
        assert lab.outside.exists  # with its link
        self.docker("DiscoverNew", node(this, this=True))
        self.docker("DiscoverNew", node(peer))

    def network(self, name: str = "lan", subnet: str = SUBNET, **options: str) -> Network:
        subnets = [Subnet.parse(subnet)]
        return self.lab.controller.create_network(name, "overlay", subnets=subnets, options={"vni": VNI, **options})

    def container(self, network: Network, name: str = "box") -> Sandbox:
        sandbox = self.lab.controller.create_sandbox(name)
        sandbox.connect(network)
        return sandbox

    def make_remote(self, *options: str, vni: str = VNI) -> None:
        """The VXLAN on the outside host, which is its container, too."""
        outside = self.lab.outside.run
        link = ("link", "add", "far", "address", REMOTE_MAC, "mtu", "1430", "type", "vxlan", "id", vni)
        outside("ip", *link, "dstport", "4789", "local", self.peer, *options)
        outside("ip", "address", "add", f"{REMOTE}/24", "dev", "far")
        outside("ip", "address", "add", "fd00:1::63/64", "dev", "far", "nodad")
        outside("ip", "link", "set", "far", "up")
        outside("bridge", "fdb", "append", "00:00:00:00:00:00", "dev", "far", "dst", self.this)

    def vxlan(self) -> str:
        (name,) = [name for name in links.names() if name.startswith("vx-")]
        return name

    def flooded(self) -> list[str]:
        entries = run("bridge", "fdb", "show", "dev", self.vxlan()).splitlines()
        return sorted(entry.split()[2] for entry in entries if entry.startswith("00:00:00:00:00:00"))


@pytest.fixture
def host(lab: Lab) -> Swarm:
    return Swarm(lab, THIS, PEER)


# ------------------------------------------------------------------------------------------------------ who is reached


@pytest.mark.parametrize(("this", "peer", "mtu"), [(THIS, PEER, 1450), (THIS_IPV6, PEER_IPV6, 1430)])
def test_a_container_and_one_on_another_host(lab: Lab, this: str, peer: str, mtu: int) -> None:
    """Over IPv4 and IPv6, inside and below; with full packets that must not be fragmented."""
    host = Swarm(lab, this, peer)
    host.make_remote(*(["udp6zerocsumrx"] if ":" in this else []))
    box = host.container(host.network(ipv6="fd00:1::/64"))
    assert f"mtu {mtu} " in box.run("ip", "link", "show", "eth0")
    assert soon_reaches(box, REMOTE)
    wait_until(lambda: reaches(box, REMOTE, "-Mdo", f"-s{1430 - 28}"), 20)
    assert not reaches(box, REMOTE, "-Mdo", f"-s{mtu - 27}")
    (address,) = [line.split()[3] for line in box.run("ip", "-4", "-o", "address", "show", "eth0").splitlines()]
    inside = int(ip_address(address.split("/")[0]))
    assert f"{ip_address('fd00:1::') + inside}/64" in box.run("ip", "-6", "address", "show", "eth0")
    assert soon_reaches(box, "fd00:1::63")
    assert soon_reaches(lab.outside, address.split("/")[0])


def test_what_is_not_known_is_sent_to_each_peer_and_what_is_learned_to_one(host: Swarm) -> None:
    host.make_remote()
    host.docker("DiscoverNew", node("198.51.100.3"))
    host.docker("DiscoverNew", node("2001:db8:51::4"))  # of the other IP version: no way there
    box = host.container(host.network())
    assert host.flooded() == [PEER, "198.51.100.3"]
    host.docker("DiscoverNew", node("198.51.100.5"))
    assert host.flooded() == [PEER, "198.51.100.3", "198.51.100.5"]
    assert soon_reaches(box, REMOTE)
    assert f"{REMOTE_MAC} dst {PEER} self" in run("bridge", "fdb", "show", "dev", host.vxlan())


def test_who_is_lost_is_still_sent_to(host: Swarm) -> None:
    """For two minutes: it may be back."""
    host.make_remote()
    box = host.container(host.network())
    host.docker("DiscoverDelete", node(PEER))
    assert soon_reaches(box, REMOTE)
    assert host.flooded() == [PEER]


def test_who_has_left_is_sent_nothing(host: Swarm) -> None:
    plugin: Any = host.docker.plugin
    plugin._networks._peers._timings = Timings(node_lost=0.1)
    host.make_remote()
    box = host.container(host.network())
    assert soon_reaches(box, REMOTE)
    host.lab.outside.run("ip", "link", "set", "far", "down")  # what it still sends would be learned again
    host.docker("DiscoverDelete", node(PEER))
    wait_until(lambda: f"dst {PEER}" not in run("bridge", "fdb", "show", "dev", host.vxlan()), 20)
    host.lab.outside.run("ip", "link", "set", "far", "up")
    host.docker("DiscoverNew", node(PEER))
    assert soon_reaches(box, REMOTE)


def test_an_address_that_was_on_another_host_is_found_here(host: Swarm) -> None:
    """At its container's start, and when a host is back that did not hear of it."""
    host.make_remote()
    network = host.network()
    entry = ("02:42:0a:01:00:02", "dev", "far", "dst")
    outside = host.lab.outside.run

    def known() -> str:
        lines = outside("bridge", "fdb", "show", "dev", "far").splitlines()
        return next((line.split()[2] for line in lines if line.startswith(entry[0])), "")

    outside("bridge", "fdb", "replace", *entry, "198.51.100.9", "self", "dynamic")
    box = host.container(network)
    wait_until(lambda: known() == THIS, 20)
    assert soon_reaches(box, REMOTE)
    wait_until(lambda: not announcing(), 20)
    outside("bridge", "fdb", "replace", *entry, "198.51.100.9", "self", "dynamic")
    host.docker("DiscoverDelete", node(PEER))
    host.docker("DiscoverNew", node(PEER))
    wait_until(lambda: known() == THIS, 20)


def announcing() -> bool:
    return any(thread.name == "announcement" for thread in threading.enumerate())


def test_a_bridge_knows_its_containers_before_they_speak(host: Swarm) -> None:
    host.container(host.network())
    shown = run("bridge", "fdb", "show")
    assert any(line.startswith("02:42:0a:01:00:02 dev ve-") and line.endswith(" static") for line in shown.splitlines())


def drop_what_is_bridged() -> None:
    (SYSCTLS / "bridge/bridge-nf-call-iptables").write_text("1")
    run("iptables", "-I", "FORWARD", "-j", "DROP")


def test_frames_to_known_stations_pass_by_the_firewall(host: Swarm) -> None:
    host.make_remote()
    network = host.network()
    box, neighbour = host.container(network), host.container(network, "neighbour")
    assert soon_reaches(box, REMOTE)
    assert soon_reaches(box, "10.1.0.3")
    wait_until(lambda: {"02:42:0a:01:00:02", "02:42:0a:01:00:03"} <= shortened(), 20)
    drop_what_is_bridged()
    assert soon_reaches(box, REMOTE)
    assert soon_reaches(box, "10.1.0.3")
    neighbour.delete()
    wait_until(lambda: "02:42:0a:01:00:03" not in shortened(), 20)
    box.delete()
    network.delete()
    wait_until(lambda: not run("nft", "list", "tables", "netdev"), 20)


def shortened() -> set[str]:
    """The MAC addresses that frames are handed to."""
    return set(re.findall(r"(02:42:0a:\S+) fwd", run("nft", "list", "ruleset", "netdev")))


def test_without_nft_they_go_through_it(host: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise Unavailable("no nft here")

    monkeypatch.setattr(shortcut, "run", missing)
    host.make_remote()
    network = host.network()
    box = host.container(network)
    host.container(network, "neighbour")
    assert soon_reaches(box, REMOTE)
    assert soon_reaches(box, "10.1.0.3")
    drop_what_is_bridged()
    assert not reaches(box, REMOTE)
    assert not reaches(box, "10.1.0.3")


def test_a_mac_address_of_the_users_own_is_reached(host: Swarm) -> None:
    """By the bridge, which has learned it."""
    host.make_remote()
    network = host.network()
    box, other = host.container(network), host.lab.controller.create_sandbox("other")
    other.connect(network, mac=MacAddress("06:00:00:00:00:07"))
    assert soon_reaches(box, "10.1.0.3")
    assert soon_reaches(other, REMOTE)
    assert soon_reaches(host.lab.outside, "10.1.0.3")


# --------------------------------------------------------------------------------------------------------- who is not


def test_networks_and_the_host_are_apart(host: Swarm) -> None:
    one, two = host.network(), host.network("other", "10.2.0.0/24", vni="2000001")
    box, stranger = host.container(one), host.container(two, "stranger")
    host.container(one, "neighbour")
    assert soon_reaches(box, "10.1.0.3")
    assert "10.2.0.2" in stranger.run("ip", "address")
    bridges = [name for name in links.names() if name.startswith("ov-")]
    assert len(bridges) == 2
    assert not any(links.describe(name).addresses for name in bridges), "no link-local address either"
    # Who sends to the host's own MAC address is not routed by it, even if it has routes to both.
    run("ip", "route", "add", "10.1.0.0/24", "dev", bridges[0])
    run("ip", "route", "add", "10.2.0.0/24", "dev", bridges[1])
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    for bridge in bridges:
        mac = str(links.describe(bridge).mac)
        box.run("ip", "neighbour", "replace", "10.1.0.1", "lladdr", mac, "dev", "eth0", "nud", "permanent")
        box.run("ip", "route", "replace", "default", "via", "10.1.0.1")
        assert not reaches(box, "10.2.0.2")
        assert not reaches(box, PEER)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mtu": "1451"}, r"option mtu=1451: uplink \(198.51.100.1\) leaves 1450 bytes"),
        ({"mtu": "1279"}, r"option mtu='1279': expected int >= 1280"),
        ({"ipv6": "fd00::/97"}, r"option ipv6=fd00::/97: at most 96 bits leave room"),
        ({"port": "0"}, r"option port='0': expected int >= 1"),
        ({"encrypted": "true"}, r"option 'encrypted'"),
    ],
)
def test_options_that_are_refused(host: Swarm, options: dict[str, str], said: str) -> None:
    with pytest.raises(RemoteError, match=said):
        host.network(**options)
    assert not [name for name in links.names() if name[:3] in ("ov-", "vx-")]


def test_ipv6_that_engines_give_out_is_refused(host: Swarm) -> None:
    both = [Subnet.parse(SUBNET), Subnet.parse("fd00:1::/64")]
    with pytest.raises(RemoteError, match="each node gives out IPv6 addresses for itself: not --ipv6, but -o ipv6="):
        host.lab.controller.create_network("lan", "overlay", subnets=both, ipv6=True)


def test_options(host: Swarm) -> None:
    box = host.container(host.network(mtu="1400", port="4800"))
    assert "mtu 1400 " in box.run("ip", "link", "show", "eth0")
    assert f"local {THIS} dev" not in (shown := run("ip", "-d", "link", "show", host.vxlan()))
    assert f"vxlan id {VNI} local {THIS} " in shown
    assert "dstport 4800 " in shown


def test_a_host_that_is_no_node(lab: Lab) -> None:
    docker = Docker(lab.plugin(OverlayDriver(), name="overlay"))
    with pytest.raises(RemoteError, match="this host is no node of a swarm"):
        lab.controller.create_network("lan", "overlay")
    docker("DiscoverNew", node("192.0.2.1", this=True))
    with pytest.raises(RemoteError, match=r"no interface of this host has the address 192\.0\.2\.1"):
        lab.controller.create_network("lan", "overlay")


# ---------------------------------------------------------------------------------------------------- what comes back


Break = Callable[[Swarm], object]
BREAKS: dict[str, Break] = {
    "vxlan": lambda host: run("ip", "link", "delete", host.vxlan()),
    "vxlan down": lambda host: run("ip", "link", "set", host.vxlan(), "down"),
    "vxlan's bridge": lambda host: run("ip", "link", "set", host.vxlan(), "nomaster"),
    "bridge": lambda _: run("ip", "link", "delete", next(name for name in links.names() if name.startswith("ov-"))),
    "firewall": lambda _: run("iptables", "-F"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_what_somebody_takes_away_comes_back_by_itself(broken: str, host: Swarm) -> None:
    host.make_remote()
    box = host.container(host.network())
    assert soon_reaches(box, REMOTE)
    BREAKS[broken](host)
    assert soon_reaches(box, REMOTE)
    assert host.flooded() == [PEER]


def test_another_address_of_this_node(host: Swarm) -> None:
    host.make_remote()
    box = host.container(host.network())
    run("ip", "address", "add", "198.51.100.77/24", "dev", "uplink")
    host.docker("DiscoverNew", node("198.51.100.77", this=True))
    wait_until(lambda: "local 198.51.100.77 " in run("ip", "-d", "link", "show", "type", "vxlan"), 20)
    wait_until(lambda: host.flooded() == [PEER], 20)
    assert soon_reaches(box, REMOTE)


def test_nothing_is_left(host: Swarm) -> None:
    before = links.names(), run("iptables-save").count("\n-A")
    network = host.network()
    box = host.container(network)
    box.delete()
    network.delete()
    wait_until(lambda: (links.names(), run("iptables-save").count("\n-A")) == before, 20)


@pytest.fixture
def plugin(lab: Lab, tmp_path: Path) -> Iterator[Running]:
    """In a process of its own, told of its node."""
    assert lab.outside.exists
    with closing(Running(PROGRAM, tmp_path)) as running:
        yield running


def test_conformance(plugin: Running) -> None:
    """Killed and started again, too."""
    with closing(Session(plugin.subject)) as session:
        session.call("DiscoverNew", **node(THIS, this=True))
    report = run_checks(plugin.subject)
    assert not report.failed, report.text()
    assert {result.check.group for result in report.results if result.outcome is Outcome.SKIPPED} == {Group.IPAM}


def test_the_command_says_how_it_is_used() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "netplugin_overlay", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "one network over all nodes of a swarm" in done.stdout
