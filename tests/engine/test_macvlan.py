"""The macvlan example beside Docker's macvlan: the same commands, and what a container, the LAN and the host see."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from netplugin_sdk.testing.engine import PrivateEngine, Process

from .conftest import plugin_beside, remove_all

pytestmark = pytest.mark.one_engine

NAME = "netplugin-macvlan"
COMMAND = (sys.executable, "-m", "netplugin_macvlan")
ROUTER, HOST = "192.168.7.1", "192.168.7.99"
SUBNET = ("--subnet", "192.168.7.0/24", "--gateway", ROUTER)
OTHER = ("--subnet", "192.168.8.0/24")
SUBNETS = (*SUBNET, "--ipv6", "--subnet", "fd00:7::/64", "--gateway", "fd00:7::1")


class Lan:
    """The interface ``up0`` of the engine's host leads to it; the router is a namespace of its own."""

    def __init__(self, engine: PrivateEngine) -> None:
        self._engine = engine
        for command in (
            "ip netns add lan",
            "ip link add up0 type veth peer name lan0 netns lan",
            f"ip address add {HOST}/24 dev up0",
            "ip link set up0 up",
            f"ip -n lan address add {ROUTER}/24 dev lan0",
            "ip -n lan address add fd00:7::1/64 dev lan0 nodad",
            "ip -n lan link set lan0 up",
        ):
            done = engine.run(command.split())
            assert done.returncode == 0, done.stderr

    def reaches(self, target: str) -> bool:
        return self._engine.run(["nsenter", "--net=/run/netns/lan", "ping", "-c1", "-W2", target]).returncode == 0

    def knows(self, address: str) -> str:
        """The MAC address that it knows it by."""
        (found,) = json.loads(self._engine.run(["ip", "-n", "lan", "-json", "neighbour", "show", address]).stdout)
        return str(found["lladdr"])

    @property
    def mac(self) -> str:
        """Of the host's interface."""
        (link,) = json.loads(self._engine.run(["ip", "-json", "link", "show", "up0"]).stdout)
        return str(link["address"])

    def close(self) -> None:
        self._engine.run(["ip", "link", "delete", "up0"])
        self._engine.run(["ip", "netns", "delete", "lan"])


@pytest.fixture
def lan(engine: PrivateEngine) -> Iterator[Lan]:
    lan = Lan(engine)
    yield lan
    lan.close()


@pytest.fixture
def plugin(engine: PrivateEngine, lan: Lan) -> Iterator[Process]:
    assert lan
    yield from plugin_beside(engine, NAME, COMMAND)


class Side:
    """One of the two drivers, and what is found out of it."""

    def __init__(self, engine: PrivateEngine, driver: str) -> None:
        self._engine, self._driver = engine, driver

    def create(self, name: str, *options: str) -> bool:
        """Whether it does; if not, it says so in one line, and leaves nothing."""
        done = self._engine.run_docker("network", "create", "--driver", self._driver, *options, name)
        assert done.returncode in (0, 1)
        if done.returncode:
            assert done.stderr.splitlines()[0].startswith("Error response from daemon: ")
            assert name not in self._engine.docker("network", "ls", "--format", "{{.Name}}").split()
        return done.returncode == 0

    def run(self, name: str, network: str, *options: str) -> bool:
        arguments = ("--detach", "--name", name, "--network", network, *options, "busybox", "sleep", "600")
        return self._engine.run_docker("run", *arguments).returncode == 0

    def execute(self, container: str, *command: str) -> str:
        return self._engine.docker("exec", container, *command)

    def reaches(self, container: str, target: str) -> bool:
        return self._engine.run_docker("exec", container, "ping", "-c1", "-W1", target).returncode == 0

    def inspect(self, container: str, network: str) -> dict[str, Any]:
        (found,) = json.loads(self._engine.docker("inspect", container))
        return dict(found["NetworkSettings"]["Networks"][network])


def a_lan(engine: PrivateEngine, side: Side, lan: Lan) -> dict[str, Any]:
    assert side.create("lan", *SUBNETS, "--ip-range", "192.168.7.64/26", "-o", "parent=up0")
    assert side.run("one", "lan", "--mac-address", "02:00:00:00:00:07", "--publish", "8080:80")
    assert side.run("two", "lan", "--ip", "192.168.7.70")
    shown = {name: side.inspect(name, "lan") for name in ("one", "two")}
    fields = ("IPAddress", "IPPrefixLen", "Gateway", "GlobalIPv6Address", "GlobalIPv6PrefixLen", "IPv6Gateway")
    return {
        "inspect": [[each[field] for field in fields] for each in shown.values()],
        "chosen MAC": shown["one"]["MacAddress"],
        "MAC": side.execute("two", "cat", "/sys/class/net/eth0/address") == shown["two"]["MacAddress"],
        "MAC outside": lan.reaches("192.168.7.70") and lan.knows("192.168.7.70") == shown["two"]["MacAddress"],
        "routes": side.execute("one", "ip", "route"),
        "IPv6 routes": sorted(
            line.split(" expires ")[0]
            for line in side.execute("one", "ip", "-6", "route").splitlines()
            if not line.startswith(("fe80", "ff00"))
        ),
        "MTU": side.execute("one", "cat", "/sys/class/net/eth0/mtu"),
        "reached": {to: side.reaches("one", to) for to in ("two", ROUTER, "fd00:7::1", "fd00:7::3", HOST)},
        "reached by the host": engine.run(["ping", "-c1", "-W1", "192.168.7.70"]).returncode == 0,
        "published": engine.run(["bash", "-c", "< /dev/tcp/127.0.0.1/8080"]).returncode == 0,
        "second network": side.create("second", *OTHER, "-o", "parent=up0"),
        "passthru": side.create(
            "third", "--subnet", "192.168.9.0/24", "-o", "parent=up0", "-o", "macvlan_mode=passthru"
        ),
    }


def internal(engine: PrivateEngine, side: Side, lan: Lan) -> dict[str, Any]:
    assert side.create("lan", *SUBNET[:2], "--internal", "-o", "parent=up0")
    assert side.run("one", "lan")
    return {"routes": side.execute("one", "ip", "route"), "address": side.inspect("one", "lan")["IPAddress"]}


def apart(engine: PrivateEngine, side: Side, lan: Lan) -> dict[str, Any]:
    assert side.create("lan", *SUBNET, "-o", "parent=up0", "-o", "macvlan_mode=private")
    assert all(side.run(name, "lan") for name in ("one", "two"))
    return {"reached": {to: side.reaches("one", to) for to in ("two", ROUTER)}}


def passthru(engine: PrivateEngine, side: Side, lan: Lan) -> dict[str, Any]:
    before = lan.mac
    assert side.create("lan", *SUBNET, "-o", "parent=up0", "-o", "macvlan_mode=passthru")
    assert side.run("one", "lan")
    found = {
        "MAC": lan.mac == side.inspect("one", "lan")["MacAddress"],
        "reached": side.reaches("one", ROUTER),
        "another container": side.run("two", "lan"),
        "another network": side.create("second", *OTHER, "-o", "parent=up0"),
    }
    engine.docker("rm", "--force", "one")
    return found | {"MAC afterwards": lan.mac == before}


def refused(engine: PrivateEngine, side: Side, lan: Lan) -> dict[str, Any]:
    parents = ("none0", "up0.0", "up0.4095", "none0.7", "lo")
    return {parent: side.create("lan", *SUBNET, "-o", f"parent={parent}") for parent in parents} | {
        "mode": side.create("lan", *SUBNET, "-o", "parent=up0", "-o", "macvlan_mode=foo")
    }


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("scene", [a_lan, internal, apart, passthru, refused])
def test_it_is_as_dockers(engine: PrivateEngine, lan: Lan, scene: Any) -> None:
    found = []
    for driver in ("macvlan", NAME):
        found.append(scene(engine, Side(engine, driver), lan))
        remove_all(engine)
    dockers, ours = found
    if scene is a_lan:
        assert ours["second network"]
        if not engine.version.startswith("28"):  # as the example's README says
            assert dockers.pop("second network") is False
            del ours["second network"]
    if scene is internal and engine.version.startswith("28"):
        assert ours["address"] == "192.168.7.1", "no address is kept for a gateway"
    assert ours == dockers
    assert ours, "something was seen"


def test_a_day(engine: PrivateEngine, lan: Lan, plugin: Process) -> None:
    """The plugin is killed, the container goes on, and ends."""
    side = Side(engine, NAME)
    assert side.create("lan", *SUBNET, "-o", "parent=up0")
    assert side.run("one", "lan", "--publish", "8080:80")
    assert "no port is published" in plugin.log.read_text()
    plugin.kill()
    assert side.reaches("one", ROUTER)
    with engine.start_plugin(NAME, COMMAND):
        engine.docker("restart", "--time", "0", "one")
        assert side.reaches("one", ROUTER)
        assert lan.reaches(side.inspect("one", "lan")["IPAddress"])
        done = engine.run_docker("network", "create", "--driver", NAME, "-o", "parent=none0", "other")
        assert "option parent=none0: there is no such interface; a VLAN is named like eth0.10" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
