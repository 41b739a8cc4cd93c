"""The DHCP driver's methods, asked as an engine asks, and a real DHCP server (dnsmasq) on a LAN of namespaces."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any

import pytest
from netplugin_dhcp.driver import DhcpDriver
from netplugin_dhcp.lease import Lease

from netplugin_sdk import MacAddress, Plugin
from netplugin_sdk.linux import firewall, links
from netplugin_sdk.testing.engine import wait_until

from ..unit.lab import ENDPOINT, NETWORK, OTHER_ENDPOINT, OTHER_NETWORK, Docker, joining, of
from .lab import Namespace, run

pytestmark = pytest.mark.usefixtures("netns")


class Lan:
    """A LAN: a namespace with the addresses of a router, and a DHCP server in it, on the bridge ``br0`` of the test's.

    The link to it is ``up0``; for macvlans it is taken off the bridge.
    """

    def __init__(self, folder: Path, namespace: Namespace) -> None:
        self.namespace = namespace
        self._folder = folder
        self._server: subprocess.Popen[bytes] | None = None
        run("ip", "link", "add", "br0", "type", "bridge")
        run("ip", "link", "set", "br0", "up")
        run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "lan0")
        run("ip", "link", "set", "up0", "master", "br0", "up")
        namespace.adopt("lan0", "192.168.7.1/24", "192.168.7.2/24")

    def serve(self, *options: str, lease: str = "1h", range_: str = "192.168.7.100,192.168.7.150") -> None:
        """Start the server, or another one in its place, with the same memory."""
        self.stop()
        log = self._folder / "dnsmasq.log"
        with log.open("ab") as output:
            self._server = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", "nsenter", f"--net={self.namespace.path}", "dnsmasq"),
                    *("--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--user=root", "--pid-file="),
                    *("--interface=lan0", "--bind-interfaces", "--no-ping", "--log-facility=-", "--log-dhcp"),
                    f"--dhcp-leasefile={self._folder}/leases",
                    *(f"--dhcp-range={range_},255.255.255.0,{lease}", *options),
                ],
                stdout=output,
                stderr=output,
            )
        before = log.read_text().count("DHCP, IP range")
        wait_until(lambda: log.read_text().count("DHCP, IP range") > before, 10)

    def stop(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.wait(10)
            self._server = None

    @property
    def log(self) -> str:
        return (self._folder / "dnsmasq.log").read_text()

    def leases(self) -> dict[str, tuple[str, str]]:
        """By MAC address: IP address and host name."""
        lines = [line.split() for line in (self._folder / "leases").read_text().splitlines()]
        return {mac: (address, name) for _, mac, address, name, _ in lines}


@pytest.fixture
def lan(tmp_path: Path, namespace: Callable[[], Namespace]) -> Iterator[Lan]:
    lan = Lan(tmp_path, namespace())
    yield lan
    lan.stop()


def network(network_id: str = NETWORK, pool: str = "0.0.0.0/0", **options: str) -> dict[str, Any]:
    return {
        "NetworkID": network_id,
        "Options": {"com.docker.network.generic": options},
        "IPv4Data": [{"AddressSpace": "null", "Pool": pool}],
        "IPv6Data": [],
    }


def endpoint(endpoint_id: str = ENDPOINT, mac: str = "", network_id: str = NETWORK, **options: Any) -> dict[str, Any]:
    interface = {"Address": "", "AddressIPv6": "", "MacAddress": mac}
    return {"NetworkID": network_id, "EndpointID": endpoint_id, "Interface": interface, "Options": options}


class Stage:
    """A plugin with this driver, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.start()

    def start(self) -> None:
        self.driver = DhcpDriver()
        self.plugin = Plugin(self.driver, state=self._folder)
        self.ask = Docker(self.plugin)

    def stop(self) -> None:
        self.plugin.close()
        self.driver._leases.close()
        links.close()
        firewall.close()


@pytest.fixture
def stage(tmp_path: Path, iptables: None) -> Iterator[Stage]:
    stage = Stage(tmp_path / "state")
    yield stage
    stage.stop()


def test_timing(lan: Lan, stage: Stage) -> None:
    lan.serve()
    stage.ask("CreateNetwork", network(bridge="br0"))
    for n in range(5):
        t = time.monotonic()
        print(stage.ask("CreateEndpoint", endpoint(f"{n}" * 20)), time.monotonic() - t)
        t = time.monotonic()
        print(stage.ask("DeleteEndpoint", of(NETWORK, f"{n}" * 20)), time.monotonic() - t)
        time.sleep(.2)
        print(lan.leases())
    print(lan.log)
