"""The macvlan example without Docker: containers on the LAN of the lab's outside host."""

from __future__ import annotations

import json
import logging
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from netplugin_macvlan.driver import MacvlanDriver

from netplugin_sdk import Plugin
from netplugin_sdk.cnm import RemoteError, Sandbox, Subnet
from netplugin_sdk.linux import links
from netplugin_sdk.protocol.messages import PortMapping
from netplugin_sdk.testing.conformance import Group, Outcome, Subject
from netplugin_sdk.testing.conformance import run as run_checks
from netplugin_sdk.testing.kit import Lab
from netplugin_sdk.values import MacAddress, TransportProtocol

from ..unit.lab import NETWORK, OTHER_NETWORK, Docker, create_endpoint, create_network, joining, of
from .lab import reaches, soon_reaches
from .test_conformance import Running

HOST, ROUTER = "198.51.100.1", "198.51.100.2"
LAN = Subnet.parse("198.51.100.0/24", range="198.51.100.64/26", gateway=ROUTER)
LAN_IPV6 = Subnet.parse("2001:db8:51::/64", gateway="2001:db8:51::2")
THIRD, FOURTH = "3" * 64, "4" * 64
PROGRAM = """
import sys
from netplugin_macvlan.driver import MacvlanDriver
from netplugin_sdk import serve
serve(MacvlanDriver(), name="x", socket_path=sys.argv[1], state=sys.argv[2], docker=None)
"""


@pytest.fixture
def parent(lab: Lab) -> str:
    """The interface of the lab's host that leads to the outside host."""
    assert lab.outside.exists
    return "uplink"


def shown(sandbox: Sandbox) -> dict[str, Any]:
    (link,) = json.loads(sandbox.run("ip", "-json", "-details", "address", "show", "eth0"))
    return dict(link)


def test_containers_are_hosts_of_the_lan(lab: Lab, parent: str) -> None:
    subnets, options = [LAN, LAN_IPV6], {"parent": parent}
    one, two = lab.containers(MacvlanDriver(), "one", "two", subnets=subnets, ipv6=True, options=options)
    assert soon_reaches(one, "two", ROUTER, "2001:db8:51::2")
    (endpoint,) = two.endpoints
    assert soon_reaches(lab.outside, *(address.ip for address in endpoint.addresses.values()))
    assert not reaches(one, HOST), "as with every macvlan"
    assert one.run("ip", "route", "show", "default").startswith(f"default via {ROUTER} dev eth0")
    assert one.run("ip", "-6", "route", "show", "default").startswith("default via 2001:db8:51::2 dev eth0")
    link = shown(two)
    assert link["linkinfo"]["info_kind"] == "macvlan"
    assert link["linkinfo"]["info_data"]["mode"] == "bridge"
    assert MacAddress(link["address"]) == endpoint.mac
    neighbours = json.loads(lab.outside.run("ip", "-json", "neighbour", "show", str(endpoint.addresses[4].ip)))
    assert [neighbour["lladdr"] for neighbour in neighbours] == [link["address"]], "not the host's"


def test_the_controller_finds_it_where_it_is_installed(lab: Lab, parent: str) -> None:
    options = {"parent": parent}
    network = lab.controller.create_network("lan", "netplugin-macvlan", subnets=[LAN], options=options)
    box = lab.controller.create_sandbox("box")
    box.connect(network)
    assert soon_reaches(box, ROUTER)


def test_a_mac_address_of_ones_own(lab: Lab, parent: str) -> None:
    network = lab.network(MacvlanDriver(), subnets=[LAN], options={"parent": parent})
    box = lab.controller.create_sandbox("box")
    box.connect(network, mac=MacAddress("02:00:00:00:00:07"))
    assert shown(box)["address"] == "02:00:00:00:00:07"


@pytest.mark.parametrize("mode", ["private", "vepa"])
def test_modes_in_which_containers_are_apart(lab: Lab, parent: str, mode: str) -> None:
    options = {"parent": parent, "macvlan_mode": mode}
    one, _ = lab.containers(MacvlanDriver(), "one", "two", subnets=[LAN], options=options)
    assert shown(one)["linkinfo"]["info_data"]["mode"] == mode
    assert soon_reaches(one, ROUTER)
    assert not reaches(one, "two"), "the switch outside does not send back what it gets"


def test_passthru_is_for_one_container_of_one_network(lab: Lab, parent: str) -> None:
    mac = links.describe(parent).mac
    alone = {"parent": parent, "macvlan_mode": "passthru"}
    network = lab.network(MacvlanDriver(), subnets=[LAN], options=alone)
    one, two = (lab.controller.create_sandbox(name) for name in ("one", "two"))
    one.connect(network)
    assert soon_reaches(one, ROUTER)
    with pytest.raises(RemoteError, match=r"macvlan vc-.* cannot create on uplink: Invalid argument"):
        two.connect(network)
    for options in (alone, {"parent": parent}):
        with pytest.raises(RemoteError, match="is on uplink, and in mode passthru a parent has one network only"):
            lab.controller.create_network("other", "lan", options=options)
    one.delete()
    assert links.describe(parent).mac == mac
    two.connect(network)
    lab.controller.cleanup()
    shared = lab.controller.create_network("shared", "lan", options={"parent": parent})
    with pytest.raises(RemoteError, match="is on uplink, and in mode passthru"):
        lab.controller.create_network("alone", "lan", options=alone)
    shared.delete()


def test_two_networks_on_one_parent(lab: Lab, parent: str) -> None:
    (one,) = lab.containers(MacvlanDriver(), "one", subnets=[LAN], options={"parent": parent})
    other = lab.controller.create_network("other", "lan", subnets=[LAN_IPV6], ipv6=True, options={"parent": parent})
    two = lab.controller.create_sandbox("two")
    two.connect(other)
    assert soon_reaches(one, ROUTER)
    assert soon_reaches(two, "2001:db8:51::2")


def test_internal_has_no_default_route(lab: Lab, parent: str) -> None:
    (one,) = lab.containers(MacvlanDriver(), "one", subnets=[LAN], internal=True, options={"parent": parent})
    assert soon_reaches(one, ROUTER)
    assert "default" not in one.run("ip", "route")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "option 'parent' must be given; known options: macvlan_mode, parent"),
        ({"parent": "none0"}, "option parent=none0: there is no such interface; a VLAN is named like eth0.10"),
        ({"parent": "none0.7"}, "option parent=none0.7: there is no interface none0 to make a VLAN of"),
        ({"parent": "uplink.x"}, "option parent=uplink.x: there is no such interface"),
        ({"parent": "uplink.4095"}, "4095 is not a VLAN number: that is 1 to 4094"),
        ({"parent": "a/b"}, "'a/b' cannot be the name of an interface"),
        ({"parent": "lo"}, "option parent=lo: the loopback is no way to a LAN"),
        ({"parent": "uplink", "macvlan_mode": "foo"}, "option macvlan_mode='foo'"),
        ({"parent": "uplink", "mtu": "1400"}, "unknown option 'mtu'; known options: macvlan_mode, parent"),
    ],
)
@pytest.mark.usefixtures("parent")
def test_wrong_options_are_one_readable_line(lab: Lab, options: dict[str, str], said: str) -> None:
    driver, before = MacvlanDriver(), links.names()
    lab.plugin(driver, name="lan")
    with pytest.raises(RemoteError) as raised:
        lab.controller.create_network("lan", "lan", subnets=[LAN], options=options)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not driver.networks
    assert links.names() == before


def test_a_port_is_not_published_silently(lab: Lab, parent: str, caplog: pytest.LogCaptureFixture) -> None:
    network = lab.network(MacvlanDriver(), subnets=[LAN], options={"parent": parent})
    mapping = PortMapping(protocol=TransportProtocol.TCP, container_port=80, host_port=8080)
    with caplog.at_level(logging.WARNING):
        lab.controller.create_sandbox("web", ports=[mapping]).connect(network)
    assert "no port is published" in caplog.text


# ---------------------------------------------------------------------------------------------------- VLANs


@pytest.fixture
def vlan(parent: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A VLAN's name. Where the kernel has none, a macvlan is in its place: the tests ask whose it is, not what."""
    if subprocess.run(
        ["ip", "link", "add", "try0", "link", parent, "type", "vlan", "id", "9"], check=False, capture_output=True
    ).returncode:
        monkeypatch.setattr(links, "ensure_vlan", _instead)
    links.delete("try0")
    yield f"{parent}.10"
    links.delete(f"{parent}.10")


def _instead(name: str, parent: str, number: int) -> None:
    assert (name, parent, number) == ("uplink.10", "uplink", 10)
    links.ensure_macvlan(name, parent)
    links.set_up(name)


def create(docker: Docker, *networks: str, mode: str = "bridge", parent: str = "uplink.10") -> None:
    for network in networks:
        docker("CreateNetwork", create_network(network, parent=parent, macvlan_mode=mode))


def test_a_vlan_is_made_and_goes_with_its_last_network(vlan: str) -> None:
    with Plugin(MacvlanDriver()) as plugin:
        docker = Docker(plugin)
        create(docker, NETWORK, OTHER_NETWORK)
        assert links.describe(vlan).up
        alone = create_network(THIRD, parent=vlan, macvlan_mode="passthru")
        assert "mode passthru" in docker.refused("CreateNetwork", alone)[1]
        docker("DeleteNetwork", of(NETWORK))
        assert links.exists(vlan)
        create(docker, FOURTH)
        docker("DeleteNetwork", of(OTHER_NETWORK))
        assert links.exists(vlan)
        docker("DeleteNetwork", of(FOURTH))
        assert not links.exists(vlan)


def test_a_vlan_of_somebody_else_stays(vlan: str) -> None:
    links.ensure_vlan(vlan, "uplink", 10)
    with Plugin(MacvlanDriver()) as plugin:
        create(Docker(plugin), NETWORK)
        Docker(plugin)("DeleteNetwork", of(NETWORK))
    assert links.exists(vlan)


@pytest.mark.parametrize("reboots", [False, True])
def test_whose_a_vlan_is_is_remembered(vlan: str, reboots: bool, tmp_path: Path) -> None:
    with Plugin(MacvlanDriver(), state=tmp_path) as plugin:
        create(Docker(plugin), NETWORK, OTHER_NETWORK)
    if reboots:
        links.delete(vlan)
    with Plugin(MacvlanDriver(), state=tmp_path) as plugin:
        docker = Docker(plugin)
        assert links.describe(vlan).up
        docker("DeleteNetwork", of(NETWORK))
        assert links.exists(vlan)
        docker("DeleteNetwork", of(OTHER_NETWORK))
        assert not links.exists(vlan)


def test_networks_that_come_and_go_at_once(vlan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    delete_link = links.delete

    def hesitate(name: str) -> bool:
        time.sleep(0.01)
        return delete_link(name)

    def delete(network: str) -> None:
        docker("DeleteNetwork", of(network))

    monkeypatch.setattr(links, "delete", hesitate)

    groups = [[f"{letter}{number:063x}" for number in range(3)] for letter in "ab"]
    with Plugin(MacvlanDriver()) as plugin, ThreadPoolExecutor(6) as threads:
        docker = Docker(plugin)
        create(docker, *groups[0])
        for _ in range(10):
            leaving, coming = groups
            work = [threads.submit(delete, network) for network in leaving]
            work += [threads.submit(create, docker, network) for network in coming]
            for each in work:
                each.result()
            assert links.exists(vlan)
            groups.reverse()
        list(threads.map(delete, groups[0]))
        assert not links.exists(vlan)


def test_a_parent_that_comes_late(vlan: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a USB adapter does: it is no VLAN, and nobody's but the host's."""
    links.ensure_veth("usb0", "usb1")
    with Plugin(MacvlanDriver(), state=tmp_path) as plugin:
        create(Docker(plugin), NETWORK, parent="usb0")
    links.delete("usb0")
    with Plugin(MacvlanDriver(), state=tmp_path) as plugin:
        assert "there is no such interface" in caplog.text
        docker = Docker(plugin)
        links.ensure_veth("usb0", "usb1")
        docker("CreateEndpoint", create_endpoint())
        docker("Join", joining())
        docker("DeleteNetwork", of(NETWORK))
    assert links.exists("usb0")


# ---------------------------------------------------------------------------------------------------- conformance


def test_conformance(lab: Lab, parent: str, tmp_path: Path) -> None:
    """Killed and started again, too. The outside host is the router of all the networks."""
    with closing(Running(PROGRAM, tmp_path)) as plugin:
        subject = Subject(plugin.subject.url, options={"parent": parent}, restart=plugin.restart)
        gateways = [f"address add {next(ip_network(subnet).hosts())}/24 dev eth0\n" for subnet in subject.subnets]
        batch = tmp_path / "gateways"
        batch.write_text("".join(gateways))
        lab.outside.run("ip", "-batch", str(batch))
        report = run_checks(subject)
    assert not report.failed, report.text()
    assert {result.check.group for result in report.results if result.outcome is Outcome.SKIPPED} == {Group.IPAM}
