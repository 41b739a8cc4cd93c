"""The ptp example without Docker: what the host routes, and to whom."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path

import pytest
from netplugin_ptp.driver import PtpDriver

from netplugin_sdk import Plugin
from netplugin_sdk.cnm import RemoteError, Sandbox, Subnet
from netplugin_sdk.errors import DriverError
from netplugin_sdk.linux import firewall, links
from netplugin_sdk.protocol.messages import PortMapping
from netplugin_sdk.testing.conformance import Group, Outcome
from netplugin_sdk.testing.conformance import run as run_checks
from netplugin_sdk.testing.engine import wait_until
from netplugin_sdk.testing.kit import Lab
from netplugin_sdk.values import TransportProtocol

from ..unit.lab import ENDPOINT, OTHER_ENDPOINT, Docker, create_endpoint, create_network, joining, of
from .lab import SYSCTLS, Namespace, reaches, run, soon_reaches
from .test_conformance import Running

BOTH = [Subnet.parse("10.1.0.0/24"), Subnet.parse("fd00:1::/64")]
OTHERS = [Subnet.parse("10.2.0.0/24"), Subnet.parse("fd00:2::/64")]
OUTSIDE, OUTSIDE_IPV6 = "198.51.100.2", "2001:db8:51::2"
PROGRAM = """
import sys
from netplugin_ptp.driver import PtpDriver
from netplugin_sdk import serve
serve(PtpDriver(), name="x", socket_path=sys.argv[1], state=sys.argv[2], docker=None)
"""


def addresses(sandbox: Sandbox) -> list[str]:
    (endpoint,) = sandbox.endpoints
    return [str(address.ip) for address in endpoint.addresses.values()]


def echo_replies(sandbox: Sandbox) -> int:
    """That have come into it."""
    names, values = (line.split() for line in sandbox.run("grep", "^Icmp:", "/proc/net/snmp").splitlines())
    return int(values[names.index("InEchoReps")])


def routes() -> list[str]:
    """Of the host: what driver and kernel have added. Of a carrier the kernel hears late."""
    lines = f"{run('ip', 'route')}\n{run('ip', '-6', 'route')}".splitlines()
    return [line.replace("linkdown ", "") for line in lines if line and not line.startswith("fe80::")]


# ---------------------------------------------------------------------------------------------------- who reaches whom


def test_neighbours_and_the_outside(lab: Lab) -> None:
    one, two = lab.containers(PtpDriver(), "one", "two", subnets=BOTH, ipv6=True)
    assert lab.outside.exists
    assert soon_reaches(one, *addresses(two), "10.1.0.1", "fd00:1::1", OUTSIDE, OUTSIDE_IPV6)
    lines = one.run("ping", "-c1", "-w20", "-R", "10.1.0.3")
    assert "10.1.0.1" in lines, "the host is on the way"
    learned = one.run("ip", "neighbour") + one.run("ip", "-6", "neighbour")
    assert {line.split()[0] for line in learned.splitlines() if not line.startswith("fe80")} == {
        "10.1.0.1",
        "fd00:1::1",
    }, "a neighbour is asked for by nobody"
    assert not any(reaches(lab.outside, address) for address in addresses(one))


def test_an_address_that_nobody_has_is_unreachable_at_once(lab: Lab) -> None:
    one, two = lab.containers(PtpDriver(), "one", "two", subnets=BOTH, ipv6=True)
    gone = addresses(two)
    two.delete()
    for address in gone:
        with pytest.raises(
            DriverError, match=r"From .* (Destination Host Unreachable|Destination unreachable: No route)"
        ):
            one.run("ping", "-c1", "-W2", address)


def test_networks_are_apart(lab: Lab) -> None:
    (one,) = lab.containers(PtpDriver(), "one", subnets=BOTH, ipv6=True)
    other = lab.controller.create_network("other", "lan", subnets=OTHERS, ipv6=True)
    two = lab.controller.create_sandbox("two")
    two.connect(other)
    assert soon_reaches(one, "10.1.0.1", "fd00:1::1")
    assert soon_reaches(two, "10.2.0.1", "fd00:2::1")
    assert not any(reaches(one, address) for address in addresses(two))
    assert not any(reaches(two, address) for address in addresses(one))


def test_internal(lab: Lab) -> None:
    one, two = lab.containers(PtpDriver(), "one", "two", subnets=BOTH, ipv6=True, internal=True)
    assert lab.outside.exists
    assert soon_reaches(one, *addresses(two))
    assert not any(reaches(one, target) for target in (OUTSIDE, OUTSIDE_IPV6))
    assert "default" not in one.run("ip", "route") + one.run("ip", "-6", "route")
    one.run("ip", "route", "add", "default", "via", "10.1.0.1")
    assert not reaches(one, OUTSIDE), "who helps himself is stopped too"


def test_several_subnets_of_one_ip_version(lab: Lab) -> None:
    (one,) = lab.containers(PtpDriver(), "one", subnets=[BOTH[0], Subnet.parse("10.3.0.0/24")], internal=True)
    two = lab.controller.create_sandbox("two")
    two.connect(lab.controller.networks["lan"], addresses=[ip_address("10.3.0.9")])
    assert soon_reaches(one, "10.3.0.9", "10.3.0.1")
    assert soon_reaches(two, *addresses(one))


def test_options(lab: Lab) -> None:
    options = {"icc": "false", "masquerade": "false", "mtu": "1400"}
    one, two = lab.containers(PtpDriver(), "one", "two", subnets=BOTH, ipv6=True, options=options)
    assert lab.outside.exists
    assert soon_reaches(one, "10.1.0.1")
    assert soon_reaches(two, "10.1.0.1")
    assert not any(reaches(one, address) for address in addresses(two))
    assert "mtu 1400" in one.run("ip", "link", "show", "eth0")
    assert not reaches(one, OUTSIDE), "which does not know the way back"
    lab.outside.run("ip", "route", "add", "10.1.0.0/24", "via", "198.51.100.1")
    assert soon_reaches(one, OUTSIDE)


def test_nobody_has_the_source_address_of_somebody_else(lab: Lab) -> None:
    one, two = lab.containers(PtpDriver(), "one", "two", subnets=BOTH[:1])
    assert soon_reaches(one, "10.1.0.1")
    for stolen in ("10.1.0.99", *addresses(two)):
        one.run("ip", "address", "add", f"{stolen}/32", "dev", "lo")
        with pytest.raises(DriverError, match="100% packet loss"):
            one.run("ping", "-c1", "-W1", "-I", stolen, "10.1.0.1")
        assert echo_replies(two) == 0, "nor does the answer come to its owner"


@pytest.mark.parametrize("subnet", ["10.1.0.0/29", "10.1.0.0/30", "10.0.0.0/8"])
def test_subnets_of_every_size(lab: Lab, subnet: str) -> None:
    (one,) = lab.containers(PtpDriver(), "one", subnets=[Subnet.parse(subnet)])
    assert soon_reaches(one, subnet.replace(".0/", ".1/").split("/")[0])


def test_what_it_does_not_do(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    network = lab.network(PtpDriver(), subnets=BOTH)
    with pytest.raises(RemoteError, match="a routed network needs subnets with gateways: it cannot have --ipam-driver"):
        lab.controller.create_network("none", "lan", ipam="null")
    for wrong in ({"mtu": "1279"}, {"vlan": "7"}):
        with pytest.raises(RemoteError, match=r"option '?(mtu|vlan)"):
            lab.controller.create_network("none", "lan", options=wrong)
    mapping = PortMapping(protocol=TransportProtocol.TCP, container_port=80, host_port=8080)
    with caplog.at_level(logging.WARNING):
        lab.controller.create_sandbox("web", ports=[mapping]).connect(network)
    assert "no port is published" in caplog.text


# ---------------------------------------------------------------------------------------------------- what comes back


@pytest.fixture
def docker(iptables: None, tmp_path: Path) -> Iterator[Callable[[], Docker]]:
    """Starts the plugin, again each time, with what is on disk and in the kernel."""
    plugins: list[Plugin] = []

    def stop() -> None:
        for plugin in plugins:
            plugin.close()
        plugins.clear()
        firewall.close()
        links.close()

    def start() -> Docker:
        stop()
        plugins.append(Plugin(PtpDriver(), state=tmp_path))
        return Docker(plugins[-1])

    yield start
    stop()


def attached(docker: Docker, container: Namespace, endpoint: str = ENDPOINT) -> Namespace:
    """A container on the network 172.18.0.0/16, as an engine makes it."""
    docker("CreateEndpoint", create_endpoint(endpoint=endpoint))
    joined = docker("Join", joining(endpoint=endpoint))
    container.adopt(joined["InterfaceName"]["SrcName"], "172.18.0.2/16", gateway=joined["Gateway"])
    assert [(route["Destination"], route["NextHop"]) for route in joined["StaticRoutes"]] == [
        ("172.18.0.1/32", None),
        ("172.18.0.0/17", "172.18.0.1"),
        ("172.18.128.0/17", "172.18.0.1"),
    ]
    return container


Break = Callable[[], object]
LINK = f"ve-{ENDPOINT[:12]}"
BREAKS: dict[str, Break] = {
    "nothing": lambda: None,
    "down": lambda: run("ip", "link", "set", LINK, "down"),
    "address": lambda: run("ip", "address", "delete", "172.18.0.1/32", "dev", LINK),
    "route": lambda: run("ip", "route", "delete", "172.18.0.2/32"),
    "group": lambda: run("ip", "link", "set", LINK, "group", "default"),
    "subnet": lambda: run("ip", "route", "delete", "unreachable", "172.18.0.0/16"),
    "firewall": lambda: run("iptables", "-F"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_plugin_that_starts_makes_good(
    broken: str, docker: Callable[[], Docker], namespace: Callable[[], Namespace]
) -> None:
    first = docker()
    first("CreateNetwork", create_network())
    container = attached(first, namespace())
    assert container.reaches("172.18.0.1")
    before, link = routes(), run("ip", "link", "show", LINK)
    BREAKS[broken]()
    again = docker()
    assert sorted(routes()) == sorted(before)
    assert container.reaches("172.18.0.1")
    wait_until(lambda: run("ip", "link", "show", LINK) == link, 20)
    assert "--dst-group" in run("iptables-save")
    again("Leave", of(endpoint=ENDPOINT))
    again("DeleteEndpoint", of(endpoint=ENDPOINT))
    again("DeleteNetwork", of())
    assert not routes()
    assert links.names() == {"lo"}


@pytest.mark.parametrize("broken", ["down", "address"])
def test_what_somebody_takes_away_comes_back_by_itself(
    broken: str, docker: Callable[[], Docker], namespace: Callable[[], Namespace]
) -> None:
    start = docker()
    start("CreateNetwork", create_network())
    container = attached(start, namespace())
    BREAKS[broken]()
    assert container.reaches("172.18.0.1")


def test_after_a_reboot_the_network_is_there_and_its_endpoints_are_not(docker: Callable[[], Docker]) -> None:
    first = docker()
    first("CreateNetwork", create_network())
    first("CreateEndpoint", create_endpoint())
    first("Join", joining())
    links.delete(LINK)
    run("ip", "route", "flush", "table", "main")
    run("iptables", "-F")
    again = docker()
    assert routes() == ["unreachable 172.18.0.0/16 proto static "]
    again("Plugin.Activate")
    again("NetworkDriver.GetCapabilities")
    again("CreateEndpoint", create_endpoint(endpoint=OTHER_ENDPOINT))
    again("Join", joining(endpoint=OTHER_ENDPOINT))
    assert f"172.18.0.2 dev ve-{OTHER_ENDPOINT[:12]} proto static scope link " in "\n".join(routes())


def test_who_has_the_address_that_a_killed_engine_gives_again(
    docker: Callable[[], Docker], namespace: Callable[[], Namespace]
) -> None:
    start = docker()
    start("CreateNetwork", create_network())
    attached(start, namespace())
    container = attached(start, namespace(), OTHER_ENDPOINT)
    assert container.reaches("172.18.0.1")
    assert not links.exists(LINK)


def test_a_subnet_that_is_routed_elsewhere_is_refused(docker: Callable[[], Docker]) -> None:
    links.ensure_veth("up0", "up1")
    run("ip", "link", "set", "up0", "up")
    run("ip", "address", "add", "172.18.0.9/16", "dev", "up0")
    start, before = docker(), run("iptables-save")
    status, said = start.refused("CreateNetwork", create_network())
    assert status == 409
    assert said.endswith("route to 172.18.0.0/16: cannot add: there is another route to it")
    assert "172.18.0.0/16 dev up0" in "\n".join(routes())
    assert len(run("iptables-save").splitlines()) == len(before.splitlines())


def test_ipv6_where_the_host_has_it_off(lab: Lab) -> None:
    (SYSCTLS / "ipv6/conf/default/disable_ipv6").write_text("1")
    network = lab.network(PtpDriver(), subnets=BOTH, ipv6=True)
    (SYSCTLS / "ipv6/conf/default/disable_ipv6").write_text("0")
    box = lab.controller.create_sandbox("box")
    (SYSCTLS / "ipv6/conf/default/disable_ipv6").write_text("1")
    box.connect(network)
    assert "fd00:1::2" in run("ip", "-6", "route")


def test_the_controller_finds_it_where_it_is_installed(lab: Lab) -> None:
    network = lab.controller.create_network("lan", "ptp", subnets=BOTH)
    box = lab.controller.create_sandbox("box")
    box.connect(network)
    assert soon_reaches(box, "10.1.0.1")


@pytest.mark.usefixtures("lab")
def test_conformance(tmp_path: Path) -> None:
    """Killed and started again, too."""
    with closing(Running(PROGRAM, tmp_path)) as plugin:
        report = run_checks(plugin.subject)
    assert not report.failed, report.text()
    assert {result.check.group for result in report.results if result.outcome is Outcome.SKIPPED} == {Group.IPAM}
