"""The kernel's table of connections, of a network namespace that the test makes."""

from __future__ import annotations

import socket
from collections.abc import Callable
from ipaddress import ip_address, ip_interface

import pytest

from netplugin_sdk import TransportProtocol
from netplugin_sdk.linux import conntrack, firewall, links
from netplugin_sdk.linux.firewall import Policy
from netplugin_sdk.linux.ports import Published

from ..patience import PATIENCE
from .lab import Namespace, run

pytestmark = pytest.mark.usefixtures("iptables")


@pytest.mark.parametrize(
    ("gateway", "host", "one", "other"),
    [
        ("10.1.0.1/24", "192.0.2.1", "10.1.0.2", "10.1.0.3"),
        ("fd00:1::1/64", "2001:db8::1", "fd00:1::2", "fd00:1::3"),
    ],
)
def test_a_flow_that_goes_on_follows_the_port_to_the_next_container(
    namespace: Callable[[], Namespace], gateway: str, host: str, one: str, other: str
) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    prefix = gateway.partition("/")[2]
    links.ensure_bridge("br-1", addresses=[ip_interface(gateway)])
    network = ip_interface(f"{host}/{prefix}")
    links.ensure_veth("uplink", "peer")
    run("ip", "address", "add", str(network), "dev", "uplink", *(("nodad",) if network.version == 6 else ()))
    outside = namespace()
    outside.adopt("peer", f"{network.ip + 1}/{prefix}")

    def publish(address: str) -> None:
        port = Published(
            protocol=TransportProtocol.UDP,
            host_address=ip_address("::" if family == socket.AF_INET6 else "0.0.0.0"),
            host_port=5000,
            address=ip_address(address),
            port=5001,
        )
        subnets = (ip_interface(gateway).network,)
        firewall.ensure(Policy(bridge="br-1", subnets=subnets, published={"container": (port,)}))
        firewall.wait_until_applied()

    servers = []
    for number, address in enumerate((one, other)):
        container = namespace()
        links.ensure_veth(f"ve{number}", f"vc{number}", master="br-1")
        container.adopt(f"vc{number}", f"{address}/{prefix}", gateway=gateway.partition("/")[0])
        server = container.call(lambda: socket.socket(family, socket.SOCK_DGRAM))
        server.bind((address, 5001))
        server.settimeout(PATIENCE)
        servers.append(server)
        assert container.reaches(gateway.partition("/")[0])
    assert outside.reaches(host)
    first, second = servers
    with outside.call(lambda: socket.socket(family, socket.SOCK_DGRAM)) as client, first, second:
        client.bind((str(network.ip + 1), 4000))
        client.settimeout(PATIENCE)
        publish(one)
        client.sendto(b"to the first", (host, 5000))
        message, address = first.recvfrom(100)
        assert message == b"to the first"
        first.sendto(b"answer", address)
        assert client.recv(100) == b"answer"
        publish(other)
        client.sendto(b"still to the first", (host, 5000))
        assert first.recv(100) == b"still to the first", "the reason for this function"
        assert conntrack.forget_published(ip_address(one)) == 1
        client.sendto(b"to the second", (host, 5000))
        assert second.recv(100) == b"to the second"
        assert conntrack.forget_published(ip_address(one)) == 0
    firewall.close()
