"""Networks and sandboxes of the controller, with myplugin behind it: real interfaces, real traffic, no Docker."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest
from myplugin.driver import BridgeDriver

from netplugin_sdk import Plugin
from netplugin_sdk.cnm import Network, NetworkController, Sandbox, Subnet
from netplugin_sdk.cnm.remote import RemoteError
from netplugin_sdk.errors import Conflict, DriverError, InvalidRequest, NotFound
from netplugin_sdk.linux import firewall, links, ports
from netplugin_sdk.protocol.messages import PortMapping, encode
from netplugin_sdk.values import MacAddress, TransportProtocol

from ..unit.serving import wait_for
from .lab import reaches, run, soon_reaches

LAN = Subnet.parse("10.1.0.0/24")
SIX = Subnet.parse("fd00:1::/64")


@pytest.fixture
def bridge(request: pytest.FixtureRequest) -> Iterator[Plugin]:
    request.getfixturevalue("iptables")
    with Plugin(BridgeDriver()) as bridge:
        yield bridge
    ports.close()
    firewall.close()
    links.close()


@pytest.fixture
def controller(bridge: Plugin) -> Iterator[NetworkController]:
    """After the test nothing is left of what it made."""
    before = host()
    with NetworkController({"bridge": bridge}) as controller:
        yield controller
    assert not list(controller.folder.parent.glob(f"{controller.folder.name}*"))
    wait_for(lambda: host() == before, "nothing to be left")


def host() -> list[Any]:
    found = [link["ifname"] for link in json.loads(run("ip", "-json", "link"))]
    rules = run("iptables-save"), run("ip6tables-save")
    return [sorted(found), *([line for line in text.splitlines() if line[0] == "-"] for text in rules)]


def two(controller: NetworkController, network: Network) -> tuple[Sandbox, Sandbox]:
    one, two = (controller.create_sandbox(name) for name in ("one", "two"))
    one.connect(network)
    two.connect(network)
    return one, two


# A day


def test_two_sandboxes_reach_each_other(controller: NetworkController) -> None:
    network = controller.create_network("lan", "bridge", subnets=[SIX, LAN], ipv6=True)
    assert network.subnets == (ip_network("10.1.0.0/24"), ip_network("fd00:1::/64"))
    assert network.gateways == (ip_interface("10.1.0.1/24"), ip_interface("fd00:1::1/64"))
    one, two = (controller.create_sandbox(name) for name in ("one", "two"))
    first = one.connect(network)
    second = two.connect(network, addresses=[ip_address("10.1.0.9")], mac=MacAddress("02:00:00:00:00:09"))
    assert second.addresses == {4: ip_interface("10.1.0.9/24"), 6: ip_interface("fd00:1::3/64")}
    (shown,) = json.loads(two.run("ip", "-json", "address", "show", "eth0"))
    assert shown["address"] == "02:00:00:00:00:09"
    assert soon_reaches(one, "10.1.0.9")
    assert soon_reaches(two, first.addresses[6].ip)
    assert soon_reaches(two, "10.1.0.1")
    assert one.run("ip", "route", "show", "default").startswith("default via 10.1.0.1 dev eth0")
    assert one.run("ip", "-6", "route", "show", "default").startswith("default via fd00:1::1 dev eth0")
    assert "from two (fd00:1::3)" in one.run("ping", "-c1", "-W1", "two")
    assert one.run("getent", "ahosts", "one").startswith("fd00:1::2")
    two.disconnect(network)
    assert "eth0" not in two.run("ip", "link")
    with pytest.raises(DriverError, match="ping: two: "):
        one.run("ping", "-c1", "two")
    assert not reaches(one, "10.1.0.9")
    assert list(network.endpoints) == ["one"]


def test_published_ports(controller: NetworkController) -> None:
    network = controller.create_network("lan", "bridge", subnets=[LAN])
    mapping = PortMapping(protocol=TransportProtocol.TCP, container_port=80, host_port=18080)
    web = controller.create_sandbox("web", ports=[mapping])
    endpoint = web.connect(network)
    published = endpoint.operational_info()["com.docker.network.portmap"]
    assert {(mapping["Port"], mapping["HostPort"]) for mapping in published} == {(80, 18080)}
    assert "18080" in run("iptables-save", "-t", "nat")
    web.delete()
    assert "18080" not in run("iptables-save", "-t", "nat")


def test_addresses_without_ipam(controller: NetworkController) -> None:
    network = controller.create_network("lan", "bridge", ipam="null")
    assert network.gateways == ()
    endpoint = controller.create_sandbox("one").connect(network)
    assert endpoint.addresses == {}
    assert endpoint.interface == "eth0"


def test_the_drivers_that_are_there(controller: NetworkController) -> None:
    """None, the host's, and that of an installed package."""
    none, host_network = controller.create_network("none", "null"), controller.create_network("host", "host")
    for driver in ("null", "host"):
        with pytest.raises(Conflict, match=f'only one instance of "{driver}" network is allowed'):
            controller.create_network("again", driver)
    box = controller.create_sandbox("box")
    box.connect(none)
    assert [link["ifname"] for link in json.loads(box.run("ip", "-json", "link"))] == ["lo"]
    with pytest.raises(InvalidRequest, match="connected to host network"):
        box.connect(host_network)
    open_box = controller.create_sandbox("open", host=True)
    open_box.connect(host_network)
    assert open_box.run("readlink", "/proc/self/ns/net") == run("readlink", "/proc/thread-self/ns/net")
    with pytest.raises(InvalidRequest, match="disconnected from host network"):
        open_box.connect(none)


def test_macvlan(controller: NetworkController) -> None:
    links.ensure_veth("up0", "up1")
    run("ip", "link", "set", "up1", "up")
    options = {"parent": "up0"}
    lan = controller.create_network("lan", "macvlan", subnets=[LAN], options=options)
    with pytest.raises(RemoteError, match=f"network {lan.id[:12]} is already using parent interface up0"):
        controller.create_network("again", "macvlan", options=options)
    with pytest.raises(RemoteError, match="option parent=none: there is no such interface"):
        controller.create_network("none", "macvlan", options={"parent": "none"})
    one, _ = two(controller, lan)
    assert soon_reaches(one, "10.1.0.3")
    assert default_route(one) == "default via 10.1.0.1 dev eth0"
    assert "macvlan mode bridge" in one.run("ip", "-details", "link", "show", "eth0")
    controller.cleanup()
    links.delete("up0")


def has_ipvlan() -> bool:
    done = subprocess.run(
        ["ip", "link", "add", "try0", "link", "up0", "type", "ipvlan"], capture_output=True, check=False
    )
    links.delete("try0")
    return done.returncode == 0


def test_ipvlan_where_the_kernel_has_it(controller: NetworkController) -> None:
    links.ensure_veth("up0", "up1")
    run("ip", "link", "set", "up1", "up")
    lan = controller.create_network("lan", "ipvlan", subnets=[LAN], options={"parent": "up0", "ipvlan_mode": "l3"})
    box = controller.create_sandbox("one")
    if has_ipvlan():
        box.connect(lan)
        assert default_route(box) == "default dev eth0"
    else:
        with pytest.raises(RemoteError, match=r"ipvlan vc-.* cannot create on up0: Operation not supported"):
            box.connect(lan)
    controller.cleanup()
    links.delete("up0")


def test_overlay_on_one_host(controller: NetworkController) -> None:
    create = controller.create_network
    chosen = {"com.docker.network.driver.overlay.vxlanid_list": "4097"}
    first = create("a", "overlay", subnets=[LAN])
    create("b", "overlay", options=chosen)
    create("c", "overlay")
    shown = json.loads(run("ip", "-json", "-details", "link", "show", "type", "vxlan"))
    assert [link["linkinfo"]["info_data"]["id"] for link in shown] == [4096, 4097, 4098]
    with pytest.raises(RemoteError, match="cannot create with identifier 4097"):
        create("d", "overlay", options=chosen)
    one, _ = two(controller, first)
    assert soon_reaches(one, "10.1.0.3")
    assert default_route(one) == ""
    assert "mtu 1450" in one.run("ip", "link", "show", "eth0")


@pytest.mark.usefixtures("iptables")
def test_a_driver_of_an_installed_package(tmp_path: Path) -> None:
    """It remembers in the controller's folder."""
    for turn in ("create", "use"):
        with NetworkController(folder=tmp_path) as controller:
            if turn == "create":
                controller.create_network("lan", "bridge", subnets=[LAN])
                continue
            one, _ = two(controller, controller.networks["lan"])
            assert soon_reaches(one, "10.1.0.3")
            controller.cleanup()
    ports.close()
    firewall.close()
    links.close()


# Gateways


def default_route(sandbox: Sandbox) -> str:
    return sandbox.run("ip", "route", "show", "default").partition(" proto")[0].strip()


def test_the_gateway_is_chosen_and_moves(controller: NetworkController) -> None:
    """By priority, then by name; internal networks come last; what leaves hands it over."""
    nets = {
        name: controller.create_network(name, "bridge", subnets=[Subnet.parse(f"10.{n}.0.0/24")], internal=name == "i")
        for n, name in enumerate(("i", "b", "c"), 1)
    }
    box = controller.create_sandbox("box")
    box.connect(nets["i"])
    assert default_route(box) == ""
    box.connect(nets["c"])
    assert default_route(box) == "default via 10.3.0.1 dev eth1"
    box.connect(nets["b"])
    assert default_route(box) == "default via 10.2.0.1 dev eth2"
    box.disconnect(nets["c"])
    box.connect(nets["c"], priority=1)
    assert default_route(box) == "default via 10.3.0.1 dev eth1"
    box.disconnect(nets["c"])
    assert default_route(box) == "default via 10.2.0.1 dev eth2"
    box.disconnect(nets["b"])
    assert default_route(box) == ""


# What is refused


def test_names_are_given_once(controller: NetworkController) -> None:
    network = controller.create_network("lan", "bridge", subnets=[LAN])
    with pytest.raises(Conflict, match="network with name lan already exists"):
        controller.create_network("lan", "bridge")
    box = controller.create_sandbox("one")
    with pytest.raises(Conflict, match="sandbox with name one already exists"):
        controller.create_sandbox("one")
    box.connect(network)
    with pytest.raises(Conflict, match="endpoint with name one already exists in network lan"):
        box.connect(network)
    with pytest.raises(Conflict, match=r'network lan has active endpoints \(name:"one" id:"[0-9a-f]{12}"\)'):
        network.delete()
    with pytest.raises(Conflict, match="another container is attached to the same network endpoint"):
        network.endpoints["one"].join(box)
    box.disconnect(network)
    with pytest.raises(NotFound, match="container one is not connected to network lan"):
        box.disconnect(network)


def test_what_a_driver_refuses_leaves_nothing(controller: NetworkController) -> None:
    with pytest.raises(NotFound, match='plugin "mars" not found'):
        controller.create_network("lan", "mars")
    with pytest.raises(RemoteError, match=r"NetworkDriver.GwAllocCheck: unknown option 'x'"):
        controller.create_network("lan", "bridge", subnets=[LAN], options={"x": "y"})
    with pytest.raises(InvalidRequest, match=r"auxiliary address: \(a:10.2.0.1\) must belong to the master pool"):
        controller.create_network("lan", "bridge", subnets=[Subnet.parse("10.1.0.0/24", auxiliary={"a": "10.2.0.1"})])
    network = controller.create_network("lan", "bridge", subnets=[LAN])  # its addresses are free
    box = controller.create_sandbox("one")
    with pytest.raises(InvalidRequest, match=r"invalid address 10.9.0.1: It does not belong to any"):
        box.connect(network, addresses=[ip_address("10.9.0.1")])
    with pytest.raises(DriverError, match=r"IpamDriver.RequestAddress: Address already in use"):
        box.connect(network, addresses=[ip_address("10.1.0.1")])
    with pytest.raises(RemoteError, match=r"IpamDriver.RequestPool: Pool overlaps with other one"):
        controller.create_network("other", "bridge", subnets=[LAN])
    assert str(box.connect(network).addresses[4]) == "10.1.0.2/24"


@dataclass
class Odd:
    """A driver whose answers are as the test says."""

    answers: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def activate(self, kind: str) -> None:
        assert kind == "NetworkDriver"

    def call(self, method: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        self.asked.append(method.partition(".")[2])
        json.dumps(json.loads(encode(content or {})))
        answer = self.answers.get(self.asked[-1], {"Scope": "local"})
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)


PROGRAM = "ProgramExternalConnectivity"
BUSY = {
    "Join": {"Gateway": "10.1.0.1", "InterfaceName": {"SrcName": "x1"}},
    PROGRAM: RemoteError("busy"),
}
ODD: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"CreateEndpoint": {"Interface": {"Address": "10.1.0.7/24"}}}, "driver modified", ["DeleteEndpoint"]),
    ({"CreateEndpoint": {"Interface": {"MacAddress": "no"}}}, "rolled back", ["DeleteEndpoint"]),
    ({"CreateEndpoint": RemoteError("NetworkDriver.CreateEndpoint: no")}, "CreateEndpoint: no", []),
    ({"Join": RemoteError("NetworkDriver.Join: no")}, "Join: no", ["Join", "Leave", "DeleteEndpoint"]),
    ({"Join": {"Gateway": "there"}}, "rolled back", ["Join", "Leave", "Leave", "DeleteEndpoint"]),
    (
        {"Join": {"InterfaceName": {"SrcName": "none"}}},
        "no interface none",
        ["Join", "Leave", "Leave", "DeleteEndpoint"],
    ),
    (BUSY, "busy", ["Join", PROGRAM, "Leave", "RevokeExternalConnectivity", "Leave", "DeleteEndpoint"]),
]


@pytest.mark.parametrize(("answers", "said", "asked"), ODD, ids=[said for _, said, _ in ODD])
@pytest.mark.usefixtures("netns")
def test_a_join_that_fails_is_rolled_back(answers: dict[str, Any], said: str, asked: list[str]) -> None:
    driver = Odd(answers)
    links.ensure_veth("x0", "x1")
    with NetworkController({}, find=lambda _: driver) as controller:
        network = controller.create_network("lan", "odd", subnets=[LAN])
        box = controller.create_sandbox("one")
        driver.asked.clear()
        with pytest.raises(DriverError, match=said):
            box.connect(network)
        assert driver.asked == ["CreateEndpoint", *asked]
        assert not network.endpoints
        assert not box.endpoints
        assert links.exists("x1")
        driver.answers = {"Join": {"InterfaceName": {"SrcName": "x1"}}}
        assert str(box.connect(network).addresses[4]) == "10.1.0.2/24"


# Restarts


def test_a_controller_goes_on(bridge: Plugin, tmp_path: Path) -> None:
    with NetworkController({"bridge": bridge}, folder=tmp_path) as controller:
        network = controller.create_network("lan", "bridge", subnets=[LAN, SIX], ipv6=True)
        two(controller, network)
        with pytest.raises(Conflict, match="in use by pid"):
            NetworkController({"bridge": bridge}, folder=tmp_path)
    before = {name: vars(endpoint) for name, endpoint in network.endpoints.items()}
    with NetworkController({"bridge": bridge}, folder=tmp_path) as controller:
        network = controller.networks["lan"]
        for name, endpoint in network.endpoints.items():
            for field_ in ("id", "addresses", "mac", "interface", "gateways", "source", "_programmed"):
                assert vars(endpoint)[field_] == before[name][field_]
        assert soon_reaches(controller.sandboxes["one"], "10.1.0.3")
        three = controller.create_sandbox("three")
        assert str(three.connect(network).addresses[4]) == "10.1.0.4/24"
        assert soon_reaches(three, "10.1.0.2")
        controller.sandboxes["two"].disconnect(network)
        controller.cleanup()
        assert not controller.networks
        assert not controller.sandboxes
        assert not list((tmp_path / "netns").iterdir())


def test_after_a_reboot_stale_endpoints_are_removed(
    bridge: Plugin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with NetworkController({"bridge": bridge}, folder=tmp_path) as controller:
        two(controller, controller.create_network("lan", "bridge", subnets=[LAN]))
        controller.sandboxes["one"].namespace.remove()
    with NetworkController({"bridge": bridge}, folder=tmp_path) as controller:
        assert list(controller.sandboxes) == ["two"]
        assert list(controller.networks["lan"].endpoints) == ["two"]
        assert caplog.text.count("removing stale endpoint one") == 1
        assert str(controller.create_sandbox("new").connect(controller.networks["lan"]).addresses[4]) == "10.1.0.2/24"
        controller.cleanup()
