"""What is seen of interfaces, sandboxes, ports and rules, in namespaces of the test's own."""

from __future__ import annotations

import socket
from collections.abc import Callable
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest

from netplugin_sdk import TransportProtocol
from netplugin_sdk.cli import findings
from netplugin_sdk.cli.findings import Level
from netplugin_sdk.inspection import kernel
from netplugin_sdk.linux import firewall, links
from netplugin_sdk.linux.firewall import Policy

from .lab import Namespace, run

TCP, UDP = TransportProtocol.TCP, TransportProtocol.UDP


@pytest.mark.usefixtures("netns")
def test_interfaces_here_and_in_a_sandbox(namespace: Callable[[], Namespace]) -> None:
    links.ensure_bridge("br-1", addresses=[ip_interface("172.30.0.1/24"), ip_interface("fd00::1/64")], mtu=1400)
    links.ensure_veth("ve-1", "vc-1", master="br-1", mtu=1400, mac="02:00:00:00:00:09")
    sandbox = namespace()
    sandbox.adopt("vc-1", "172.30.0.2/24", "fd00::2/64", gateway="172.30.0.1")
    here = kernel.host().sight.interfaces
    assert (here["br-1"].kind, here["br-1"].mtu, here["br-1"].up) == ("bridge", 1400, True)
    assert set(map(str, here["br-1"].addresses)) == {"172.30.0.1/24", "fd00::1/64"}
    assert (here["ve-1"].kind, here["ve-1"].master) == ("veth", "br-1")
    inside = kernel.inside(Path(sandbox.path))
    assert inside is not None
    assert inside.gateways == (ip_address("172.30.0.1"),)
    end = inside.interfaces["vc-1"]
    assert (end.index, end.mac) == (here["ve-1"].link, "02:00:00:00:00:09")
    assert set(map(str, end.addresses)) == {"172.30.0.2/24", "fd00::2/64"}


def test_a_sandbox_that_is_gone(tmp_path: Path) -> None:
    assert kernel.inside(tmp_path / "none") is None
    (tmp_path / "empty").touch()  # as after a reboot
    assert kernel.inside(tmp_path / "empty") is None


@pytest.mark.usefixtures("netns")
def test_who_listens() -> None:
    with (
        socket.create_server(("127.0.0.1", 8001)),
        socket.create_server(("::", 8002), family=socket.AF_INET6),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.create_connection(("127.0.0.1", 8001), source_address=("127.0.0.1", 8003)),
    ):
        datagrams.bind(("0.0.0.0", 8004))
        host = kernel.host()
    local, everything, six = ip_address("127.0.0.1"), ip_address("0.0.0.0"), ip_address("::1")
    assert host.takes(TCP, local, 8001)
    assert not host.takes(TCP, everything, 8001)
    assert not host.takes(UDP, local, 8001)
    assert host.takes(TCP, six, 8002)
    assert host.takes(TCP, everything, 8002)
    assert not host.takes(TCP, local, 8003), "a connection is no listener"
    assert host.takes(UDP, local, 8004)


def test_bridges_that_have_rules(backend: str) -> None:
    assert kernel.host().bridges == {}
    for name, network in (("br-1", "0123456789ab"), ("br-2", "")):
        links.ensure_bridge(name, addresses=[ip_interface("172.30.0.1/24")])
        policy = Policy(bridge=name, network=network, subnets=(ip_network("172.30.0.0/24"), ip_network("fd00::/64")))
        firewall.ensure(policy)
    try:
        assert firewall.bridges() == kernel.host().bridges == {"br-1": "0123456789ab", "br-2": ""}
    finally:
        for name in ("br-1", "br-2"):
            firewall.delete(name)
    assert firewall.bridges() == {}


@pytest.mark.usefixtures("netns")
def test_doctor_tries_the_kernel_and_leaves_nothing() -> None:
    before = run("ip", "link"), run("iptables-save"), run("nft", "list", "ruleset")
    found = {finding.text: finding.level for finding in findings._kernel()}
    for feature in ("network namespaces", "bridge", "veth", "macvlan", "vxlan", "nft filters and translates"):
        assert found[feature] is Level.OK
    assert (run("ip", "link"), run("iptables-save"), run("nft", "list", "ruleset")) == before


@pytest.mark.usefixtures("iptables")
@pytest.mark.parametrize("iptables", ["nft", "legacy"], indirect=True)
def test_doctor_tells_kinds_of_iptables_apart() -> None:
    found = [finding.text for finding in findings._firewall()]
    kind = run("iptables", "--version").strip()
    assert any(text.startswith(kind) for text in found)
    assert "what no rule accepts is dropped" in found


@pytest.mark.usefixtures("netns")
def test_doctor_reads_sysctls_of_here() -> None:
    found = {finding.text: finding.level for finding in findings._sysctls()}
    assert found["net.ipv4.ip_forward = 0: containers do not reach other networks"] is Level.WARNING
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    assert "net.ipv4.ip_forward = 1" in [finding.text for finding in findings._sysctls()]
