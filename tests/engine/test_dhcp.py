"""The DHCP driver on real engines: containers on a LAN with a real DHCP server (dnsmasq), all of it in namespaces."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from netplugin_sdk.testing.engine import PrivateEngine, Process, wait_until

from ..patience import PATIENCE
from .conftest import plugin_beside, state_of

pytestmark = pytest.mark.one_engine

# With the rights that its README names, and no others: all that follows is done with them.
RIGHTS = "-all,+net_admin,+net_raw,+sys_admin"
DHCP = ("setpriv", f"--bounding-set={RIGHTS}", "--no-new-privs", sys.executable, "-m", "netplugin_dhcp")
ROUTER = "192.168.7.1"
SHORT = ("--dhcp-option=option:T1,3", "--dhcp-option=option:T2,4")


class Lan:
    """A namespace ``lan`` with the router and its DHCP server, on the bridge ``br0`` of the engine's host.

    The host's end of the link to it is ``up0``. `up` says which of the two a network is to use.
    """

    def __init__(self, engine: PrivateEngine, folder: Path) -> None:
        self._engine, self._folder = engine, folder
        self._server: Process | None = None
        self._starts = 0
        for command in (
            "ip netns add lan",
            "ip link add br0 type bridge",
            "ip link set br0 up",
            "ip link add up0 type veth peer name lan0 netns lan",
            "ip link set up0 master br0 up",
            f"ip -n lan address add {ROUTER}/24 dev lan0",
            "ip -n lan address add fd00:7::1/64 dev lan0 nodad",
            "ip -n lan link set lan0 up",
        ):
            done = engine.run(command.split())
            assert done.returncode == 0, done.stderr

    def serve(self, *options: str) -> None:
        """Start the server, or another one in its place, with the same memory."""
        self.stop()
        self._starts += 1
        self._server = self._engine.spawn(
            f"dnsmasq-{self._folder.name}-{self._starts}",
            [
                *("nsenter", "--net=/run/netns/lan", "dnsmasq"),
                *("--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--user=root", "--pid-file="),
                *("--interface=lan0", "--bind-interfaces", "--no-ping", "--log-facility=-"),
                f"--dhcp-leasefile={self._folder}/leases",
                *("--dhcp-range=192.168.7.100,192.168.7.150,255.255.255.0,1h", *options),
            ],
        )
        wait_until(lambda: "DHCP, IP range" in self.log, PATIENCE)

    @property
    def log(self) -> str:
        """Of the server that runs, or ran last."""
        assert self._server is not None
        return self._server.log.read_text()

    def leases(self) -> dict[str, tuple[str, str]]:
        """By MAC address: IP address and host name."""
        lines = [line.split() for line in (self._folder / "leases").read_text().splitlines()]
        return {line[1]: (line[2], line[3]) for line in lines if len(line) == 5 and line[0] != "duid"}

    def run(self, *command: str) -> str:
        done = self._engine.run(["nsenter", "--net=/run/netns/lan", *command])
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def stop(self) -> None:
        if self._server is not None and self._server.running:
            self._server.stop()

    def close(self) -> None:
        self.stop()
        self._engine.run(["ip", "netns", "delete", "lan"])
        wait_until(lambda: self._engine.run(["ip", "link", "show", "up0"]).returncode != 0, PATIENCE)
        self._engine.run(["ip", "link", "delete", "br0"])


@pytest.fixture
def lan(engine: PrivateEngine, tmp_path: Path) -> Iterator[Lan]:
    lan = Lan(engine, tmp_path)
    yield lan
    lan.close()


@pytest.fixture
def plugin(engine: PrivateEngine, lan: Lan) -> Iterator[Process]:
    """Beside an engine that has no container or network when it begins, and none when it ends."""
    assert lan
    yield from plugin_beside(engine, "dhcp", DHCP)


@pytest.fixture(params=["bridge=br0", "parent=up0"])
def link(engine: PrivateEngine, plugin: Process, request: pytest.FixtureRequest) -> str:
    """The option that says where the LAN is."""
    assert plugin.running
    if request.param == "parent=up0":
        engine.run(["ip", "link", "set", "up0", "nomaster"])
    return str(request.param)


def create(engine: PrivateEngine, *options: str) -> None:
    engine.docker(
        "network",
        "create",
        "--driver",
        "dhcp",
        "--ipam-driver",
        "null",
        *(w for o in options for w in ("-o", o)),
        "lan",
    )


def run(engine: PrivateEngine, name: str, *options: str, network: str = "lan") -> None:
    engine.docker("run", "--detach", "--name", name, "--network", network, *options, "busybox", "sleep", "600")


def inspect(engine: PrivateEngine, name: str) -> dict[str, Any]:
    """Docker's record of the container's endpoint."""
    (container,) = json.loads(engine.docker("inspect", name))
    found: dict[str, Any] = container["NetworkSettings"]["Networks"]["lan"]
    return found


def pings(engine: PrivateEngine, container: str, target: str) -> bool:
    return engine.run_docker("exec", container, "ping", "-c1", "-W2", target).returncode == 0


def test_a_container_is_a_host_of_the_lan(engine: PrivateEngine, lan: Lan, link: str) -> None:
    lan.serve(f"--dhcp-option=121,10.20.0.0/16,192.168.7.2,0.0.0.0/0,{ROUTER}")
    create(engine, link)
    run(engine, "web")
    endpoint = inspect(engine, "web")
    assert lan.leases()[endpoint["MacAddress"]][0] == endpoint["IPAddress"]
    assert f"{endpoint['IPAddress']}/24" in engine.docker("exec", "web", "ip", "address", "show", "eth0")
    assert f"link/ether {endpoint['MacAddress']}" in engine.docker("exec", "web", "ip", "address", "show", "eth0")
    routes = engine.docker("exec", "web", "ip", "route")
    assert f"default via {ROUTER} dev eth0" in routes
    assert "10.20.0.0/16 via 192.168.7.2 dev eth0" in routes
    assert pings(engine, "web", ROUTER)
    assert "0% packet loss" in lan.run("ping", "-c2", endpoint["IPAddress"])

    run(engine, "two")
    assert pings(engine, "two", "web")

    engine.docker("rm", "--force", "web", "two")
    wait_until(lambda: lan.leases() == {}, PATIENCE)


def test_a_container_that_starts_again(engine: PrivateEngine, lan: Lan, link: str) -> None:
    lan.serve("--dhcp-host=02:00:00:00:00:77,192.168.7.77")
    create(engine, link)
    run(engine, "web")
    run(engine, "fixed", "--mac-address", "02:00:00:00:00:77")
    assert inspect(engine, "fixed")["IPAddress"] == "192.168.7.77"
    engine.docker("stop", "--time", "0", "web", "fixed")
    wait_until(lambda: lan.leases() == {}, PATIENCE)
    engine.docker("start", "web", "fixed")
    assert inspect(engine, "fixed")["IPAddress"] == "192.168.7.77"
    assert {address for address, _ in lan.leases().values()} == {"192.168.7.77", inspect(engine, "web")["IPAddress"]}
    assert pings(engine, "web", "192.168.7.77")


@pytest.mark.usefixtures("plugin")
def test_the_servers_list_has_the_names_of_the_containers(engine: PrivateEngine, lan: Lan) -> None:
    lan.serve()
    create(engine, "bridge=br0")
    run(engine, "my_web.1")
    run(engine, "db")
    wait_until(lambda: {name for _, name in lan.leases().values()} == {"my-web-1", "db"}, PATIENCE)


@pytest.mark.usefixtures("plugin")
def test_an_address_that_is_asked_for(engine: PrivateEngine, lan: Lan) -> None:
    lan.serve()
    create(engine, "bridge=br0")
    run(engine, "web", network="name=lan,driver-opt=address=192.168.7.133")
    assert inspect(engine, "web")["IPAddress"] == "192.168.7.133"
    done = engine.run_docker("run", "--rm", "--network", "name=lan,driver-opt=address=192.168.7.133", "busybox")
    assert done.returncode != 0
    assert "the DHCP server on br0 does not grant 192.168.7.133, only 192.168.7." in done.stderr
    assert len(lan.leases()) == 1


def test_a_plugin_that_is_killed_goes_on_with_its_leases(
    engine: PrivateEngine, lan: Lan, plugin: Process, link: str
) -> None:
    lan.serve(*SHORT)
    create(engine, link)
    run(engine, "web")
    address = inspect(engine, "web")["IPAddress"]

    def renewed() -> int:
        return lan.log.count(f"DHCPACK(lan0) {address}")

    wait_until(lambda: renewed() >= 3, PATIENCE)
    plugin.kill()
    before, discovered = renewed(), lan.log.count("DHCPDISCOVER")
    with engine.start_plugin("dhcp", DHCP) as again:
        wait_until(lambda: renewed() >= before + 3, PATIENCE)
        assert lan.log.count("DHCPDISCOVER") == discovered
        assert "Traceback" not in again.log.read_text()
        assert pings(engine, "web", ROUTER)
        assert inspect(engine, "web")["IPAddress"] == address
        engine.docker("rm", "--force", "web")
        wait_until(lambda: lan.leases() == {}, PATIENCE)


@pytest.mark.usefixtures("lan")
def test_without_a_server_docker_says_so_and_nothing_is_left(engine: PrivateEngine, link: str) -> None:
    create(engine, link, "timeout=2")
    before = state_of(engine)
    done = engine.run_docker("run", "--rm", "--network", "lan", "busybox")
    assert done.returncode != 0
    assert f"no DHCP server answered on {link.partition('=')[2]} within 2 s" in done.stderr
    wait_until(lambda: state_of(engine) == before, PATIENCE)


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ipam-driver", "null", "-o", "bridge=br7"], "option bridge=br7: there is no interface br7"),
        (["--ipam-driver", "null"], "give one of the options bridge=NAME and parent=NAME"),
        (["-o", "bridge=br0"], "the LAN's DHCP server gives out the addresses: add --ipam-driver null"),
    ],
)
def test_a_network_that_cannot_be(engine: PrivateEngine, arguments: list[str], said: str) -> None:
    done = engine.run_docker("network", "create", "--driver", "dhcp", *arguments, "lan")
    assert done.returncode != 0
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "lan" not in engine.docker("network", "ls").split()


def test_ten_containers_at_once(engine: PrivateEngine, lan: Lan, link: str) -> None:
    lan.serve()
    create(engine, link)
    names = [f"web{n}" for n in range(10)]
    with ThreadPoolExecutor(10) as pool:
        [*pool.map(lambda name: run(engine, name), names)]
    addresses = {inspect(engine, name)["IPAddress"] for name in names}
    assert len(addresses) == 10
    assert addresses == {address for address, _ in lan.leases().values()}
    assert all(
        IPv4Address("192.168.7.100") <= IPv4Address(address) <= IPv4Address("192.168.7.150") for address in addresses
    )
    for name in names:  # `docker rm` of several at once makes Engine 20.10 miscount: "network has active endpoints"
        engine.docker("rm", "--force", name)
    wait_until(lambda: lan.leases() == {}, PATIENCE)


def test_an_engine_that_restarts(engine: PrivateEngine, lan: Lan, link: str) -> None:
    lan.serve()
    create(engine, link)
    run(engine, "web", "--restart", "always", "--stop-timeout", "1")
    engine.stop()
    wait_until(lambda: lan.leases() == {}, PATIENCE)
    engine.start()
    wait_until(lambda: engine.docker("inspect", "-f", "{{.State.Running}}", "web") == "true", PATIENCE)
    address = inspect(engine, "web")["IPAddress"]
    assert [address for address, _ in lan.leases().values()] == [address]
    assert pings(engine, "web", ROUTER)


def test_ipv6_addresses_are_those_that_the_router_announces(engine: PrivateEngine, lan: Lan, link: str) -> None:
    lan.serve("--enable-ra", "--dhcp-range=fd00:7::,ra-only", "--ra-param=lan0,4")
    create(engine, link, "ipv6=true")
    run(engine, "web")

    def global_addresses() -> str:
        return engine.docker("exec", "web", "ip", "-6", "address", "show", "dev", "eth0", "scope", "global")

    wait_until(lambda: "fd00:7:" in global_addresses() and "tentative" not in global_addresses(), PATIENCE)
    assert "default via fe80:" in engine.docker("exec", "web", "ip", "-6", "route")
    assert engine.run_docker("exec", "web", "ping", "-6", "-c1", "-W2", "fd00:7::1").returncode == 0
    of_the_host = engine.run(["ip", "-6", "-brief", "address"]).stdout.splitlines()
    assert not [line for line in of_the_host if line.startswith(("ve-", "vc-")) and "fd00:7:" in line]
