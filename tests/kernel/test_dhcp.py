"""The DHCP driver's methods, asked as an engine asks, and a real DHCP server (dnsmasq) on a LAN of namespaces."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any, NoReturn

import pytest
from netplugin_dhcp import leases
from netplugin_dhcp.driver import DhcpDriver
from netplugin_dhcp.lease import Lease
from netplugin_dhcp.leases import Waits

from netplugin_sdk import Container, DriverError, MacAddress, Plugin
from netplugin_sdk.linux import firewall, links
from netplugin_sdk.testing.engine import wait_until

from ..patience import PATIENCE
from ..unit.lab import ENDPOINT, NETWORK, OTHER_ENDPOINT, OTHER_NETWORK, Docker, copy_state, joining, of
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
        log.touch()
        before = self.log.count("DHCP, IP range")  # each that starts says so once
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
        wait_until(lambda: self.log.count("DHCP, IP range") > before, 20)

    def stop(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.wait(PATIENCE)
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


def network(
    network_id: str = NETWORK, pool: str = "0.0.0.0/0", internal: bool = False, **options: str
) -> dict[str, Any]:
    return {
        "NetworkID": network_id,
        "Options": {"com.docker.network.generic": options, "com.docker.network.internal": internal},
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
        self._died = folder.with_name("died")
        self._waits = Waits()
        self.start()

    def start(self) -> None:
        if self._died.exists():
            shutil.rmtree(self._folder)
            self._died.rename(self._folder)
        self.driver = DhcpDriver()
        self.driver.leases.waits = self._waits
        self.plugin = Plugin(self.driver, state=self._folder)
        self.ask = Docker(self.plugin)

    def wait(self, waits: Waits) -> None:
        """How long is waited from now on, after a restart, too."""
        self._waits = self.driver.leases.waits = waits

    def kill(self) -> None:
        """What is in the kernel and on disk stays."""
        self.plugin.close()
        self.driver.leases.close()
        firewall.close()
        links.close()

    def die(self, *_: object, **__: object) -> NoReturn:
        """In a method of the driver: what is on disk now is what the next start finds."""
        copy_state(self._folder, self._died)
        raise DriverError("killed")

    def forget(self) -> None:
        """As with an empty disk."""
        shutil.rmtree(self._folder)


@pytest.fixture
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    """On a host whose FORWARD drops what nobody accepts, even between the ports of a bridge."""
    request.getfixturevalue("iptables")
    stage = Stage(tmp_path / "state")
    yield stage
    stage.kill()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the driver has logged as a warning or an error."""
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def lease_of(stage: Stage, endpoint_id: str = ENDPOINT, network_id: str = NETWORK) -> Lease:
    lease = stage.driver.networks[network_id].endpoints[endpoint_id].attached(Lease)
    assert lease is not None
    return lease


def start(stage: Stage, container: Namespace, endpoint_id: str = ENDPOINT, **options: Any) -> IPv4Interface:
    """CreateEndpoint and Join, and what the engine does after them."""
    interface = stage.ask("CreateEndpoint", endpoint(endpoint_id, **options))["Interface"]
    joined = stage.ask("Join", joining(endpoint=endpoint_id, sandbox=container.path))
    container.adopt(joined["InterfaceName"]["SrcName"], interface["Address"], gateway=joined["Gateway"])
    return IPv4Interface(interface["Address"])


def nothing_left() -> bool:
    return not {"ve-", "vc-"} & {line.split()[0][:3] for line in run("ip", "-brief", "link").splitlines()}


SHORT = ("--dhcp-option=option:T1,1", "--dhcp-option=option:T2,4")
"""More time is asked for after a second; three seconds later, of any server."""


# What is granted


def test_an_endpoint_has_the_address_that_the_server_leases_to_its_mac(lan: Lan, stage: Stage) -> None:
    lan.serve()
    stage.ask("CreateNetwork", network(bridge="br0"))
    interface = stage.ask("CreateEndpoint", endpoint())["Interface"]
    address = IPv4Interface(interface["Address"])
    assert address.network == IPv4Interface("192.168.7.0/24").network
    assert lan.leases() == {interface["MacAddress"]: (str(address.ip), "*")}
    assert lan.log.count("broadcast response") >= 2, "who has no address yet is not asked for it by ARP"
    assert MacAddress(interface["MacAddress"]).packed[0] & 0b11 == 0b10, "locally administered, unicast"
    lease = lease_of(stage)
    assert (lease.address, lease.server) == (address, IPv4Address("192.168.7.1"))
    assert 1700 < lease.renewal - time.time() <= 1800
    assert 3500 < lease.expiry - time.time() <= 3600


def test_a_repeated_request_gets_the_same_lease(lan: Lan, stage: Stage) -> None:
    lan.serve()
    stage.ask("CreateNetwork", network(bridge="br0"))
    first = stage.ask("CreateEndpoint", endpoint())
    stage.kill()  # and what was answered is unknown to who starts again
    stage.forget()
    stage.start()
    stage.ask("CreateNetwork", network(bridge="br0"))
    assert stage.ask("CreateEndpoint", endpoint()) == first
    assert len(lan.leases()) == 1


def test_a_mac_address_that_is_asked_for_and_reserved(lan: Lan, stage: Stage) -> None:
    lan.serve("--dhcp-host=02:00:00:00:00:77,192.168.7.77")
    stage.ask("CreateNetwork", network(bridge="br0"))
    interface = stage.ask("CreateEndpoint", endpoint(mac="02:00:00:00:00:77"))["Interface"]
    assert interface == {"Address": "192.168.7.77/24"}, "no MAC address: an engine refuses what it gave"
    assert links.describe(f"vc-{ENDPOINT[:12]}").mac == "02:00:00:00:00:77"


def test_an_address_that_is_asked_for(lan: Lan, stage: Stage) -> None:
    lan.serve()
    stage.ask("CreateNetwork", network(bridge="br0"))
    assert stage.ask("CreateEndpoint", endpoint(address="192.168.7.133"))["Interface"]["Address"] == "192.168.7.133/24"


def test_an_address_that_another_has_is_not_replaced_by_any(lan: Lan, stage: Stage) -> None:
    lan.serve()
    stage.ask("CreateNetwork", network(bridge="br0"))
    stage.ask("CreateEndpoint", endpoint(OTHER_ENDPOINT, address="192.168.7.133"))
    status, text = stage.ask.refused("CreateEndpoint", endpoint(address="192.168.7.133"))
    assert status == 409
    assert text.startswith("the DHCP server on br0 does not grant 192.168.7.133, only 192.168.7.")
    assert lan.log.count("DHCPREQUEST") == 1, "so it is not accepted"
    assert len(lan.leases()) == 1
    assert f"vc-{ENDPOINT[:12]}" not in run("ip", "link")


@pytest.mark.usefixtures("lan")
def test_an_address_that_is_none_is_refused(stage: Stage) -> None:
    stage.ask("CreateNetwork", network(bridge="br0"))
    status, text = stage.ask.refused("CreateEndpoint", endpoint(address="192.168.7"))
    assert (status, text) == (400, "driver-opt address='192.168.7': Expected 4 octets in '192.168.7'")


def test_gateway_and_routes_are_the_servers(lan: Lan, stage: Stage) -> None:
    lan.serve("--dhcp-option=3,192.168.7.2")
    stage.ask("CreateNetwork", network(bridge="br0"))
    stage.ask("CreateEndpoint", endpoint())
    joined = stage.ask("Join", joining())
    assert (joined["Gateway"], joined["StaticRoutes"]) == ("192.168.7.2", [])
    assert joined["InterfaceName"] == {"SrcName": f"vc-{ENDPOINT[:12]}", "DstPrefix": "eth"}

    lan.serve("--dhcp-option=3,192.168.7.2", "--dhcp-option=121,10.0.0.0/8,192.168.7.3,0.0.0.0/0,192.168.7.4")
    stage.ask("CreateEndpoint", endpoint(OTHER_ENDPOINT))
    joined = stage.ask("Join", joining(endpoint=OTHER_ENDPOINT))
    assert joined["Gateway"] == "192.168.7.4", "with option 121 option 3 does not count (RFC 3442)"
    assert joined["StaticRoutes"] == [{"Destination": "10.0.0.0/8", "RouteType": 0, "NextHop": "192.168.7.3"}]


def test_a_lan_without_a_router(lan: Lan, stage: Stage) -> None:
    lan.serve("--dhcp-option=3")
    stage.ask("CreateNetwork", network(bridge="br0"))
    stage.ask("CreateEndpoint", endpoint())
    joined = stage.ask("Join", joining())
    assert (joined["Gateway"] or "", joined["DisableGatewayService"]) == ("", True)


@pytest.mark.usefixtures("lan")
def test_without_a_server_one_line_says_so_and_nothing_is_left(stage: Stage) -> None:
    stage.ask("CreateNetwork", network(bridge="br0", timeout="1.5"))
    began = time.monotonic()
    assert stage.ask.refused("CreateEndpoint", endpoint()) == (503, "no DHCP server answered on br0 within 1.5 s")
    assert time.monotonic() - began > 1.4
    assert nothing_left()


def forged(discover: bytes, options: bytes, **header: bytes) -> bytes:
    """An answer to `discover` with these options; `header` replaces its fields."""
    xid, mac = header.get("xid", discover[4:8]), header.get("mac", discover[28:34])
    offered = IPv4Address("192.0.2.9").packed
    return b"\x02\x01\x06\x00" + xid + bytes(8) + offered + bytes(8) + mac + bytes(202) + b"c\x82Sc" + options


def test_what_cannot_be_read_and_answers_to_others_do_no_harm(lan: Lan, stage: Stage) -> None:
    """Anybody on the LAN may send them, to all; here they come before the server does."""
    stage.ask("CreateNetwork", network(bridge="br0"))
    kind, server_id, mask = b"\x35\x01\x02", b"\x36\x04\xc0\x00\x02\x01", b"\x01\x04\xff\xff\xff\x00"
    good = kind + server_id + mask + b"\x33\x04\x00\x00\x0e\x10\xff"
    with lan.namespace.udp() as sender, lan.namespace.udp() as server, ThreadPoolExecutor(1) as pool:
        for each in (sender, server):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lan0")
        server.bind(("", 67))
        server.settimeout(PATIENCE)
        asked = pool.submit(stage.ask, "CreateEndpoint", endpoint())
        discover = server.recv(2000)
        for message in (
            *(b"", b"x", discover, forged(discover, b"")[:100]),
            *(forged(discover, good, xid=b"\0\0\0\7"), forged(discover, good, mac=b"\2\0\0\0\0\7")),
            *(forged(discover, options) for options in (b"", b"\x35", b"\x35\x01\x63\xff", kind, kind + server_id)),
            *(forged(discover, b"\x79\x05\x21\x0a\0\0\1" + good), forged(discover, b"\x79\x05\x20\x0a")),
        ):
            sender.sendto(message, ("255.255.255.255", 68))
        again = server.recv(2000)
        assert b"\x35\x01\x01" in again, "a DISCOVER: it has accepted no offer"
        sender.sendto(forged(again, good), ("255.255.255.255", 68))
        assert b"\x35\x01\x03" in server.recv(2000), "a REQUEST: this one could be read, and so were the others"
        server.close()
        lan.serve()
        assert asked.result(PATIENCE)["Interface"]["Address"].startswith("192.168.7."), "who offered it said no more"


# While a container runs


def test_a_lease_is_renewed_inside_the_container(
    lan: Lan, stage: Stage, namespace: Callable[[], Namespace], said: Callable[[], list[str]]
) -> None:
    lan.serve(*SHORT)
    stage.ask("CreateNetwork", network(bridge="br0"))
    container = namespace()
    address = start(stage, container)
    first, discovered = lease_of(stage), lan.log.count("DHCPDISCOVER")
    broadcast = lan.log.count("broadcast response")
    assert lan.namespace.reaches(str(address.ip))
    assert container.reaches("192.168.7.1")
    wait_until(lambda: lan.log.count(f"DHCPACK(lan0) {address.ip}") >= 3, 20)  # at its start, and twice
    wait_until(lambda: lease_of(stage).expiry > first.expiry, 20)
    assert lan.log.count("DHCPDISCOVER") == discovered
    assert lan.log.count("broadcast response") == broadcast, "it is between the two of them"
    assert said() == []


def test_the_servers_list_has_the_containers_name(lan: Lan, stage: Stage, namespace: Callable[[], Namespace]) -> None:
    lan.serve()
    stage.ask("CreateNetwork", network(bridge="br0"))
    address = start(stage, namespace())
    attach(stage, "my_web.1")
    wait_until(lambda: [*lan.leases().values()] == [(str(address.ip), "my-web-1")], 20)


def test_the_name_is_told_when_the_engine_has_moved_the_link(
    lan: Lan, stage: Stage, namespace: Callable[[], Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Docker may tell of a container whose interface is still on its way."""
    tried, prolong = threading.Semaphore(0), leases._Kept._prolong

    async def counted(kept: leases._Kept) -> None:
        await prolong(kept)
        tried.release()

    monkeypatch.setattr(leases._Kept, "_prolong", counted)
    lan.serve()
    stage.ask("CreateNetwork", network(bridge="br0"))
    container = namespace()
    interface = stage.ask("CreateEndpoint", endpoint())["Interface"]
    stage.ask("Join", joining(sandbox=container.path))
    attach(stage, "web")
    for _ in range(2):
        assert tried.acquire(timeout=PATIENCE)
    assert [name for _, name in lan.leases().values()] == ["*"]
    container.adopt(f"vc-{ENDPOINT[:12]}", interface["Address"])
    wait_until(lambda: [name for _, name in lan.leases().values()] == ["web"], 20)


def attach(stage: Stage, name: str) -> None:
    here = stage.driver.networks[NETWORK]
    stage.driver.container_attached(here, here.endpoints[ENDPOINT], Container("c" * 64, name, "busybox"))


def test_another_server_may_go_on_with_a_lease(lan: Lan, stage: Stage, namespace: Callable[[], Namespace]) -> None:
    """At T2 any server is asked (REBINDING): the first one has gone."""
    lan.serve(*SHORT)
    stage.ask("CreateNetwork", network(bridge="br0"))
    start(stage, namespace())
    lan.stop()
    lan.namespace.run("ip", "address", "delete", "192.168.7.1/24", "dev", "lan0")
    lan.namespace.run("ip", "address", "add", "192.168.7.2/24", "dev", "lan0")
    lan.serve(*SHORT)
    wait_until(lambda: lease_of(stage).server == IPv4Address("192.168.7.2"), 20)


def test_a_server_that_is_silent_for_a_while(
    lan: Lan, stage: Stage, namespace: Callable[[], Namespace], said: Callable[[], list[str]]
) -> None:
    stage.wait(Waits(exchange=1.0, silence=1.0))
    lan.serve(*SHORT)
    stage.ask("CreateNetwork", network(bridge="br0"))
    address = start(stage, namespace())
    lan.stop()
    first = lease_of(stage)
    wait_until(lambda: len(said()) == 2, 20)
    what = f"lease of {address} for vc-{ENDPOINT[:12]}"
    assert said() == [f"{what}: the DHCP server does not answer", f"{what}: no DHCP server prolongs it"]
    assert lease_of(stage) == first
    lan.serve(*SHORT)
    stage.driver.leases.rename(f"vc-{ENDPOINT[:12]}", "web")  # else it waits for half the time that is left
    wait_until(lambda: lease_of(stage).expiry > first.expiry, 20)


def test_a_lease_that_the_server_refuses_is_told_of_and_tried_for_again(
    lan: Lan, stage: Stage, namespace: Callable[[], Namespace], said: Callable[[], list[str]]
) -> None:
    stage.wait(Waits(silence=0.5))
    lan.serve()
    stage.ask("CreateNetwork", network(bridge="br0"))
    container = namespace()
    address = start(stage, container)
    first = lease_of(stage)
    lan.serve("--dhcp-authoritative", range_="192.168.7.10,192.168.7.20")
    stage.driver.leases.rename(f"vc-{ENDPOINT[:12]}", "web")  # so it asks at once
    wait_until(lambda: len(said()) >= 2, 20)
    refused, offered = said()[:2]
    assert refused.startswith(f"lease of {address} for vc-{ENDPOINT[:12]}: the DHCP server refuses it: ")
    assert "the DHCP server refuses it and offers 192.168.7.1" in offered
    assert str(address) in container.run("ip", "address"), "Docker knows it by this address"
    tries = lan.log.count("DHCPDISCOVER")
    wait_until(lambda: lan.log.count("DHCPDISCOVER") >= tries + 3, 20)
    assert len(said()) <= 3, "once for each trouble"
    assert lease_of(stage) == first
    lan.serve()
    wait_until(lambda: lease_of(stage).expiry > first.expiry, 20)
    assert lease_of(stage).address == address


def test_a_lease_that_has_expired_is_regained(lan: Lan, stage: Stage, namespace: Callable[[], Namespace]) -> None:
    """The host slept, or no server was there for long."""
    lan.serve()
    stage.ask("CreateNetwork", network(bridge="br0"))
    address = start(stage, namespace())
    offered = lan.log.count(f"DHCPOFFER(lan0) {address.ip}")
    past = time.time() - 10
    here = stage.driver.networks[NETWORK].endpoints[ENDPOINT]
    here.attach(replace(lease_of(stage), renewal=past, rebinding=past, expiry=past))
    stage.kill()
    stage.start()
    wait_until(lambda: lease_of(stage).expiry > time.time() + 3000, 20)
    assert lease_of(stage).address == address
    assert lan.log.count(f"DHCPOFFER(lan0) {address.ip}") > offered


def test_a_lease_is_renewed_in_time_though_the_host_slept(
    lan: Lan, stage: Stage, namespace: Callable[[], Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.wait(Waits(clock=0.1))
    lan.serve()
    stage.ask("CreateNetwork", network(bridge="br0"))
    start(stage, namespace())
    first, now, looks = lease_of(stage), time.time, threading.Semaphore(0)

    def clock() -> float:
        looks.release()
        return now()

    monkeypatch.setattr(time, "time", clock)
    for _ in range(5):
        assert looks.acquire(timeout=PATIENCE)
    assert lease_of(stage) == first, "half an hour too early"
    monkeypatch.setattr(time, "time", lambda: now() + 2000)
    wait_until(lambda: lease_of(stage).expiry > first.expiry + 1900, 20)


def test_nothing_of_ours_keeps_a_containers_namespace_alive(lan: Lan, stage: Stage) -> None:
    lan.serve(*SHORT)
    stage.ask("CreateNetwork", network(bridge="br0"))
    container = Namespace()
    start(stage, container)
    wait_until(lambda: lan.log.count("DHCPACK") >= 2, 20)
    assert f"ve-{ENDPOINT[:12]}" in run("ip", "link")
    container.close()
    wait_until(lambda: f"ve-{ENDPOINT[:12]}" not in run("ip", "link"), 20)
    wait_until(lambda: lan.leases() == {}, 20)  # that it has gone is seen, and its lease given back


# A plugin that starts again


def test_a_plugin_that_was_killed_goes_on_with_its_leases(
    lan: Lan, stage: Stage, namespace: Callable[[], Namespace]
) -> None:
    lan.serve()
    stage.ask("CreateNetwork", network(bridge="br0"))
    container = namespace()
    address = start(stage, container)
    stage.kill()
    lan.serve(*SHORT)
    before, discovered = lan.log.count("DHCPREQUEST"), lan.log.count("DHCPDISCOVER")
    stage.start()
    wait_until(lambda: lan.log.count("DHCPREQUEST") > before, 20)  # INIT-REBOOT: more time is due in half an hour
    wait_until(lambda: lan.log.count("DHCPREQUEST") > before + 1, 20)
    assert lan.log.count("DHCPDISCOVER") == discovered
    assert container.reaches("192.168.7.1")
    assert lease_of(stage).address == address


def test_a_plugin_that_starts_again_without_a_server_keeps_the_lease(
    lan: Lan, stage: Stage, namespace: Callable[[], Namespace], said: Callable[[], list[str]]
) -> None:
    stage.wait(Waits(exchange=1.0))
    lan.serve()
    stage.ask("CreateNetwork", network(bridge="br0"))
    address = start(stage, namespace())
    lan.stop()
    stage.kill()
    stage.start()
    wait_until(lambda: len(said()) > 0, 20)
    assert said() == [f"lease of {address} for vc-{ENDPOINT[:12]}: no DHCP server confirms it"]
    lan.serve()
    stage.driver.leases.rename(f"vc-{ENDPOINT[:12]}", "web")
    wait_until(lambda: [*lan.leases().values()] == [(str(address.ip), "web")], 20)


def test_an_endpoint_that_was_half_made_gives_its_lease_back(lan: Lan, stage: Stage) -> None:
    """The plugin dies with its lease in hand, and the engine repeats its request to the next one."""
    lan.serve()
    stage.ask("CreateNetwork", network(bridge="br0"))
    given: list[str] = []

    def die(*_: object) -> None:
        given.extend(address for address, _ in lan.leases().values())
        stage.die()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("netplugin_dhcp"), "info", die)  # of the address
        patch.setattr(DhcpDriver, "delete_endpoint", lambda *_: None)  # who is dead undoes nothing
        stage.ask.refused("CreateEndpoint", endpoint())
    (address,) = given
    stage.kill()
    stage.start()
    wait_until(lambda: lan.leases() == {} and nothing_left(), 20)
    assert stage.ask("CreateEndpoint", endpoint())["Interface"]["Address"] == f"{address}/24"


def test_a_lease_is_on_disk_before_it_is_accepted(lan: Lan, stage: Stage) -> None:
    lan.serve()
    stage.ask("CreateNetwork", network(bridge="br0"))
    on_disk: list[Lease] = []

    def accept(*_: object, **__: object) -> NoReturn:
        on_disk.append(lease_of(stage))
        raise DriverError("not now")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leases._Socket, "accept", accept)
        stage.ask.refused("CreateEndpoint", endpoint())
    assert on_disk[0].address in IPv4Interface("192.168.7.0/24").network


def test_a_bridge_that_was_made_anew_gets_its_containers_back(
    lan: Lan, stage: Stage, namespace: Callable[[], Namespace]
) -> None:
    lan.serve()
    stage.ask("CreateNetwork", network(bridge="br0"))
    container = namespace()
    start(stage, container)
    run("ip", "link", "delete", "br0")
    run("ip", "link", "add", "br0", "type", "bridge")
    run("ip", "link", "set", "br0", "up")
    run("ip", "link", "set", "up0", "master", "br0")
    stage.plugin.reconcile()  # as on SIGHUP
    assert container.reaches("192.168.7.1")


# The end


def test_a_lease_is_released_with_its_endpoint(
    lan: Lan, stage: Stage, namespace: Callable[[], Namespace], said: Callable[[], list[str]]
) -> None:
    stage.wait(Waits(missing_min=0.1, missing_max=0.2))
    lan.serve(*SHORT)
    stage.ask("CreateNetwork", network(bridge="br0"))
    container = namespace()
    start(stage, container)
    stage.ask("Leave", of(NETWORK, ENDPOINT))
    container.run("ip", "link", "set", f"vc-{ENDPOINT[:12]}", "netns", str(os.getpid()))
    stage.ask("DeleteEndpoint", of(NETWORK, ENDPOINT))
    wait_until(lambda: lan.leases() == {} and nothing_left(), 20)
    log = lan.log
    time.sleep(1.5)
    assert lan.log == log, "nobody asks for more time"
    assert said() == [], "nor tries to"


def test_a_lease_is_released_when_the_container_is_gone_with_its_link(
    lan: Lan, stage: Stage, namespace: Callable[[], Namespace]
) -> None:
    lan.serve()
    stage.ask("CreateNetwork", network(bridge="br0"))
    container = namespace()
    start(stage, container)
    stage.ask("Leave", of(NETWORK, ENDPOINT))
    run("ip", "link", "delete", f"ve-{ENDPOINT[:12]}")
    stage.ask("DeleteEndpoint", of(NETWORK, ENDPOINT))
    wait_until(lambda: lan.leases() == {} and nothing_left(), 20)


def test_an_endpoint_is_deleted_when_its_lease_cannot_be_released(
    lan: Lan, stage: Stage, said: Callable[[], list[str]]
) -> None:
    lan.serve()
    stage.ask("CreateNetwork", network(bridge="br0"))
    stage.ask("CreateEndpoint", endpoint())
    run("ip", "link", "delete", "br0")
    stage.ask("DeleteEndpoint", of(NETWORK, ENDPOINT))
    wait_until(lambda: nothing_left() and len(said()) > 0, 20)
    assert said()[-1] == (
        f"<Endpoint {ENDPOINT[:12]}>: its lease is not given back, and expires: there is no interface br0"
    )
    stage.ask("DeleteNetwork", of(NETWORK))


@pytest.mark.usefixtures("lan")
def test_what_was_never_made_is_deleted(stage: Stage) -> None:
    stage.ask("CreateNetwork", network(bridge="br0"))
    stage.ask("DeleteEndpoint", of(NETWORK, ENDPOINT))
    stage.ask("DeleteNetwork", of(NETWORK))
    stage.ask("DeleteNetwork", of(NETWORK))


# Where


def test_macvlans_on_a_parent(lan: Lan, stage: Stage, namespace: Callable[[], Namespace]) -> None:
    run("ip", "link", "set", "up0", "nomaster")
    lan.serve(*SHORT)
    stage.ask("CreateNetwork", network(parent="up0"))
    container, other = namespace(), namespace()
    address = start(stage, container)
    assert run("ip", "-brief", "link").count("up0") == 1, "it is in the container"
    assert container.reaches("192.168.7.1")
    assert other.reaches(str(start(stage, other, OTHER_ENDPOINT).ip))
    assert other.reaches(str(address.ip))
    wait_until(lambda: lan.log.count(f"DHCPACK(lan0) {address.ip}") >= 2, 20)
    for endpoint_id, left in ((ENDPOINT, container), (OTHER_ENDPOINT, other)):
        stage.ask("Leave", of(NETWORK, endpoint_id))
        left.run("ip", "link", "set", f"vc-{endpoint_id[:12]}", "netns", str(os.getpid()))
        stage.ask("DeleteEndpoint", of(NETWORK, endpoint_id))
    wait_until(lambda: lan.leases() == {}, 20)
    wait_until(nothing_left, 20)


def test_the_bridge_is_left_as_it_was(lan: Lan, stage: Stage) -> None:
    run("ip", "link", "set", "up0", "mtu", "1400")
    run("ip", "address", "add", "192.168.7.9/24", "dev", "br0")
    rules, before = run("iptables-save", "-t", "filter"), links.describe("br0")
    assert before.mtu == 1400, "of its one port"
    lan.serve()
    for network_id in (NETWORK, OTHER_NETWORK):  # two of them on one bridge
        stage.ask("CreateNetwork", network(network_id, bridge="br0"))
    stage.ask("CreateEndpoint", endpoint())
    assert links.describe("br0") == before
    assert links.describe(f"vc-{ENDPOINT[:12]}").mtu == 1400
    stage.ask("DeleteEndpoint", of(NETWORK, ENDPOINT))
    stage.ask("DeleteNetwork", of(NETWORK))
    wait_until(nothing_left, 20)
    assert stage.ask("CreateEndpoint", endpoint(network_id=OTHER_NETWORK)), "the other network's frames still pass"
    stage.ask("DeleteEndpoint", of(OTHER_NETWORK, ENDPOINT))
    stage.ask("DeleteNetwork", of(OTHER_NETWORK))
    wait_until(nothing_left, 20)
    assert links.describe("br0") == before
    assert [line for line in run("iptables-save", "-t", "filter").splitlines() if "br0" in line] == [
        line for line in rules.splitlines() if "br0" in line
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give one of the options bridge=NAME and parent=NAME: where the DHCP server is reached"),
        (
            {"bridge": "br0", "parent": "up0"},
            "give one of the options bridge=NAME and parent=NAME: where the DHCP server is reached",
        ),
        ({"bridge": "br7"}, "option bridge=br7: there is no interface br7"),
        (
            {"bridge": "br 0"},
            "'br 0' cannot be the name of an interface: that is 1 to 15 bytes without white space, '/', ':' or '%'",
        ),
        ({"parent": "eth7"}, "option parent=eth7: there is no interface eth7"),
        ({"bridge": "up0"}, "option bridge=up0: it is no bridge; for macvlans on it: -o parent=up0"),
        ({"parent": "up0"}, "option parent=up0: it is a port of br0; use -o bridge=br0"),
        ({"bridge": "br0", "timeout": "30"}, "option timeout='30': expected float <= 20.0"),
        (
            {"internal": True, "bridge": "br0"},
            "a LAN is not --internal: its hosts reach the containers, and are reached",
        ),
        (
            {"pool": "10.1.0.0/24", "bridge": "br0"},
            "the LAN's DHCP server gives out the addresses: add --ipam-driver null",
        ),
    ],
)
@pytest.mark.usefixtures("lan")
def test_a_network_that_cannot_be_is_refused_in_one_line(stage: Stage, options: dict[str, Any], said: str) -> None:
    assert stage.ask.refused("CreateNetwork", network(**options)) == (400, said)
    assert not stage.driver.networks


def test_ten_at_once(lan: Lan, stage: Stage) -> None:
    lan.serve()
    stage.ask("CreateNetwork", network(bridge="br0"))
    ids = [f"{n}" * 20 for n in range(10)]
    with ThreadPoolExecutor(10) as pool:
        answers = [*pool.map(lambda n: stage.ask("CreateEndpoint", endpoint(n)), ids)]
    assert len({answer["Interface"]["Address"] for answer in answers}) == 10
    assert len(lan.leases()) == 10
    with ThreadPoolExecutor(10) as pool:
        [*pool.map(lambda n: stage.ask("DeleteEndpoint", of(NETWORK, n)), ids)]
    wait_until(lambda: lan.leases() == {} and nothing_left(), 20)


# IPv6


def test_ipv6_addresses_are_those_that_the_router_announces(
    lan: Lan, stage: Stage, namespace: Callable[[], Namespace]
) -> None:
    lan.namespace.run("ip", "address", "add", "fd00:7::1/64", "dev", "lan0", "nodad")
    lan.serve("--enable-ra", "--dhcp-range=fd00:7::,ra-only", "--ra-param=lan0,4")
    stage.ask("CreateNetwork", network(bridge="br0", ipv6="true"))
    container = namespace()
    address = start(stage, container)
    disable = f"net.ipv6.conf.vc-{ENDPOINT[:12]}.disable_ipv6"
    container.run("sysctl", "-w", f"{disable}=1")  # as engines do
    attach(stage, "web")
    wait_until(lambda: "fd00:7::" in container.run("ip", "-6", "address", "show", "scope", "global"), 20)
    assert "default via fe80::" in container.run("ip", "-6", "route")
    assert str(address) in container.run("ip", "address")


def test_a_link_that_is_still_on_the_host_gets_the_host_no_ipv6_address(lan: Lan, stage: Stage) -> None:
    lan.namespace.run("ip", "address", "add", "fd00:7::1/64", "dev", "lan0", "nodad")
    lan.serve("--enable-ra", "--dhcp-range=fd00:7::,ra-only", "--ra-param=lan0,4")
    Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("0")  # a router would not listen
    stage.ask("CreateNetwork", network(bridge="br0", ipv6="true"))
    stage.ask("CreateEndpoint", endpoint())
    wait_until(lambda: "fd00:7::" in run("ip", "-6", "address", "show", "dev", "br0"), 20)
    assert "inet6" not in run("ip", "-6", "address", "show", "dev", f"vc-{ENDPOINT[:12]}")
