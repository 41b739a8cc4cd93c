"""Rows of the parity table that need no Docker, with the controller in its place: myplugin in some tenths of a second.

What each row must show is what Docker's bridge shows on real engines (docs/parity.md, tests/engine/parity).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from ipaddress import ip_address
from typing import Any

import pytest
from myplugin.driver import BridgeDriver

from netplugin_sdk.cnm import Network, RemoteError, Sandbox, Subnet
from netplugin_sdk.linux.namespaces import Namespace
from netplugin_sdk.protocol.messages import PortMapping
from netplugin_sdk.testing.kit import Lab
from netplugin_sdk.values import TransportProtocol

from .lab import SYSCTLS, run
from .test_firewall_packets import BR_NETFILTER, Server, answers, ask, reached

HOST, HOST6, OUTSIDE = "198.51.100.1", "2001:db8:51::1", "198.51.100.2"
BRIDGE = "com.docker.network.bridge"
TCP, UDP = TransportProtocol.TCP, TransportProtocol.UDP


class Site:
    """The lab with one driver for all networks; in each sandbox, outside and on the host somebody answers."""

    def __init__(self, lab: Lab) -> None:
        self._closing = ExitStack()
        self.lab = lab
        for sysctl in ("ipv6/conf/default/accept_dad", "ipv6/conf/default/dad_transmits"):
            (SYSCTLS / sysctl).write_text("0")
        lab.plugin(BridgeDriver(), name="bridge")
        self.outside = lab.outside
        self.serve(self.outside)

    def serve(self, machine: Any) -> None:
        self._closing.enter_context(closing(Server(machine)))

    def network(
        self, number: int, options: Mapping[str, str] = {}, *, internal: bool = False, ipv6: bool = False
    ) -> Network:
        subnets = [Subnet.parse(f"10.{number}.0.0/24"), *([Subnet.parse(f"fd00:{number}::/64")] if ipv6 else [])]
        create = self.lab.controller.create_network
        return create(f"n{number}", "bridge", subnets=subnets, ipv6=ipv6, internal=internal, options=options)

    def box(self, network: Network, name: str, *ports: PortMapping) -> Sandbox:
        box = self.lab.controller.create_sandbox(name, ports=ports)
        self.serve(box.namespace)
        box.connect(network)
        return box

    def close(self) -> None:
        self._closing.close()


@pytest.fixture
def site(lab: Lab) -> Iterator[Site]:
    run("iptables", "-P", "FORWARD", "DROP")  # as Docker leaves it
    run("ip6tables", "-P", "FORWARD", "DROP")
    with closing(Site(lab)) as site:
        yield site


def published(number: int, host_port: int, *, protocol: TransportProtocol = TCP, host: str = "") -> PortMapping:
    address = ip_address(host) if host else None
    return PortMapping(protocol=protocol, container_port=number, host_address=address, host_port=host_port)


def reaches(client: Namespace | Sandbox | None, *targets: str) -> bool:
    return reached(client.namespace if isinstance(client, Sandbox) else client, *targets)  # type: ignore[arg-type]


def seen(client: Namespace | Sandbox, target: str) -> str:
    """By which address it knows the client."""
    namespace: Any = client.namespace if isinstance(client, Sandbox) else client
    return answers(namespace, target)[target]


def asked(client: Namespace | Sandbox, target: str) -> str | None:
    namespace: Any = client.namespace if isinstance(client, Sandbox) else client
    return ask(namespace, target, within=0.3).get(target)


def test_neighbours_and_strangers(site: Site) -> None:
    """P1, P5: those of one network reach each other, those of two do not."""
    one, two = (site.network(n, ipv6=True) for n in (1, 2))
    a, b = site.box(one, "a"), site.box(one, "b")
    site.box(two, "c")
    assert reaches(a, "tcp 10.1.0.3 80", "udp 10.1.0.3 80", "tcp fd00:1::3 80", "udp fd00:1::3 80")
    assert reaches(b, "tcp 10.1.0.2 80")
    assert asked(a, "tcp 10.2.0.2 80") is None
    assert asked(a, "tcp fd00:2::2 80") is None
    assert reaches(None, "tcp 10.1.0.2 80", "tcp 10.2.0.2 80")


def test_the_outside_sees_the_host(site: Site) -> None:
    """P6: what leaves has the host's address."""
    box = site.box(site.network(1), "a")
    assert seen(box, f"tcp {OUTSIDE} 80") == HOST
    assert asked(site.outside, "tcp 10.1.0.2 80") is None


def test_without_masquerade(site: Site) -> None:
    box = site.box(site.network(1, {f"{BRIDGE}.enable_ip_masquerade": "false"}), "a")
    site.outside.run("ip", "route", "add", "10.1.0.0/24", "via", HOST)
    assert seen(box, f"tcp {OUTSIDE} 80") == "10.1.0.2"


def test_internal(site: Site) -> None:
    """P4: nothing in, nothing out."""
    network = site.network(1, internal=True)
    a, _ = site.box(network, "a"), site.box(network, "b")
    assert reaches(a, "tcp 10.1.0.3 80")
    assert a.run("ip", "route", "show", "default") == ""
    assert asked(a, f"tcp {OUTSIDE} 80") is None
    site.outside.run("ip", "route", "add", "10.1.0.0/24", "via", HOST)
    assert asked(site.outside, "tcp 10.1.0.2 80") is None


@pytest.mark.parametrize("host", ["", "0.0.0.0", HOST])
def test_published_ports(site: Site, host: str) -> None:
    """P9 to P12: from the outside, from the host, from containers of this and of other networks."""
    ports = [published(80, 8080, host=host), published(80, 8080, protocol=UDP, host=host)]
    one = site.network(1)
    web, client = site.box(one, "web", *ports), site.box(one, "client")
    stranger = site.box(site.network(2), "stranger")
    both = (f"tcp {HOST} 8080", f"udp {HOST} 8080")
    assert reaches(site.outside, *both)
    assert seen(site.outside, f"tcp {HOST} 8080") == OUTSIDE
    assert reaches(client, *both)
    assert reaches(stranger, *both)
    assert reaches(web, *both)
    assert reaches(None, f"tcp {HOST} 8080")
    if host != HOST:
        assert reaches(None, "tcp 127.0.0.1 8080")
    if host == "":
        assert reaches(site.outside, f"tcp {HOST6} 8080")
    assert asked(site.outside, f"tcp {HOST} 8081") is None
    web.delete()
    assert asked(site.outside, f"tcp {HOST} 8080") is None


def test_ports_of_the_loopback_are_not_for_the_outside(site: Site) -> None:
    site.box(site.network(1), "web", published(80, 8080, host="127.0.0.1"))
    assert reaches(None, "tcp 127.0.0.1 8080")
    assert asked(site.outside, f"tcp {HOST} 8080") is None


def test_a_port_that_somebody_has(site: Site) -> None:
    """P10: the container does not start, and nothing of it stays."""
    network = site.network(1)
    site.box(network, "web", published(80, 8080))
    again = site.lab.controller.create_sandbox("again", ports=[published(80, 8080)])
    with pytest.raises(RemoteError, match="8080"):
        again.connect(network)
    assert list(network.endpoints) == ["web"]
    assert not again.endpoints
    assert reaches(site.outside, f"tcp {HOST} 8080")


def test_a_port_of_the_drivers_choice(site: Site) -> None:
    box = site.box(site.network(1), "web", published(80, 0))
    (endpoint,) = box.endpoints
    chosen = {mapping["HostPort"] for mapping in endpoint.operational_info()["com.docker.network.portmap"]}
    assert len(chosen) == 1
    assert reaches(site.outside, f"tcp {HOST} {chosen.pop()}")


MODES = {  # mode: as whom the outside sees it; which of its ports the outside reaches at its own address
    "nat": (HOST, []),
    "routed": ("10.1.0.2", ["80"]),
    "nat-unprotected": (HOST, ["80", "81"]),
}


@pytest.mark.parametrize("mode", list(MODES))
def test_gateway_modes(site: Site, mode: str) -> None:
    """P18: port 80 is published."""
    address, open_ports = MODES[mode]
    network = site.network(1, {f"{BRIDGE}.gateway_mode_ipv4": mode})
    box = site.box(network, "a", published(80, 8080))
    site.outside.run("ip", "route", "add", "10.1.0.0/24", "via", HOST)
    assert seen(box, f"tcp {OUTSIDE} 80") == address
    for port in ("80", "81"):
        target = f"tcp 10.1.0.2 {port}"
        assert reaches(site.outside, target) if port in open_ports else asked(site.outside, target) is None


def test_the_mtu_is_that_of_the_network(site: Site) -> None:
    """P7."""
    box = site.box(site.network(1, {"com.docker.network.driver.mtu": "1280"}), "a")
    assert "mtu 1280" in box.run("ip", "link", "show", "eth0")


def test_icc(site: Site) -> None:
    """P8: where the kernel shows bridged packets to the firewall; else the option is refused."""
    options = {f"{BRIDGE}.enable_icc": "false"}
    if not BR_NETFILTER:
        with pytest.raises(RemoteError, match="enable_icc"):
            site.network(1, options)
        return
    network = site.network(1, options)
    a, _ = site.box(network, "a"), site.box(network, "b", published(80, 8080))
    assert asked(a, "tcp 10.1.0.3 80") is None
    assert reaches(a, f"tcp {HOST} 8080")


def test_bad_options_are_one_line(site: Site) -> None:
    for option, value in ((f"{BRIDGE}.enable_icc", "maybe"), ("com.docker.network.driver.mtu", "9"), ("no.such", "1")):
        with pytest.raises(RemoteError, match=f"option.*{option}") as refused:
            site.network(1, {option: value})
        assert "\n" not in str(refused.value)
    site.network(1)
