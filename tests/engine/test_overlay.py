"""The overlay example as a managed plugin, in a swarm of three hosts with an engine each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from netplugin_sdk.testing.cluster import Cluster, Host
from netplugin_sdk.testing.engine import OUTSIDE_ADDRESS, EngineError, EngineUnavailable, PrivateEngine, wait_until

from ..patience import PATIENCE

pytestmark = pytest.mark.one_engine

PROJECT = Path(__file__).parents[2] / "examples/overlay"
NETPLUGIN = Path(sys.executable).with_name("netplugin")
DRIVER = "overlay-example:latest"
SERVE = "hostname > /tmp/index.html; exec httpd -f -h /tmp"
# Address by address: of several the C library may take the same one always (RFC 3484, rule 9).
ASK_ALL = r"""for a in $(nslookup web | sed -n "s/^Address: *\(10[.0-9]*\)$/\1/p"); do timeout 2 wget -qO- $a; done"""
RETURN = 5.0
"""Seconds from a node's return to connectivity."""
FORGOTTEN = 100.0
"""Seconds in which the plugin finds that an engine that was killed has forgotten a network."""


@pytest.fixture(scope="module")
def cluster(version: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A manager and two workers, with the plugin on each."""
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip("needs root and debootstrap")
    folder = tmp_path_factory.mktemp("overlay") / "plugin"
    made = subprocess.run([NETPLUGIN, "bundle", PROJECT, "-o", folder], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    try:
        cluster = Cluster(3, version)
    except EngineUnavailable as error:
        pytest.skip(str(error))
    with cluster:
        cluster.install_plugin("overlay-example", folder)
        cluster.start_swarm()
        yield cluster


@dataclass(frozen=True)
class Box:
    """A container, wherever it is."""

    host: Host
    id: str

    def run(self, *command: str) -> str:
        return self.host.engine.docker("exec", self.id, *command)

    def address(self, network: str) -> str:
        template = f'{{{{(index .NetworkSettings.Networks "{network}").IPAddress}}}}'
        return self.host.engine.docker("inspect", f"--format={template}", self.id)

    def reaches(self, target: str, seconds: int = 1) -> bool:
        with suppress(EngineError):
            self.run("ping", "-c1", f"-W{seconds}", target)
            return True
        return False


class Swarm:
    """Users' actions with one network, which is removed at the end; nothing may be left."""

    def __init__(self, cluster: Cluster, name: str, *options: str, driver: str = DRIVER) -> None:
        self.cluster, self.name = cluster, name
        self.manager = cluster.hosts[0].engine
        self.manager.docker("network", "create", "--driver", driver, "--scope", "swarm", "--attachable", *options, name)

    def service(self, name: str, *options: str, command: str = SERVE) -> None:
        quick = ("--no-resolve-image", "--detach", "--stop-signal", "KILL", "--endpoint-mode", "dnsrr")
        arguments = ("--name", name, "--network", self.name, *quick, *options, "busybox", "sh", "-c", command)
        self.manager.docker("service", "create", *arguments)

    def box(self, host: Host, *options: str) -> Box:
        """A container of ``docker run`` on this host."""
        arguments = ("--detach", "--network", self.name, "--stop-signal", "KILL", *options)
        return Box(host, host.engine.docker("run", *arguments, "busybox", "sh", "-c", SERVE))

    def replicas(self, service: str) -> list[Box]:
        """Those that run."""
        mine = ("--filter", f"label=com.docker.swarm.service.name={service}", "--format", "{{.ID}}")
        return [Box(host, id_) for host in self.cluster.hosts for id_ in host.engine.docker("ps", *mine).split()]

    def running(self, service: str, count: int, seconds: float = 60) -> list[Box]:
        """Wait until so many replicas run, as the manager and their engines say."""
        found: list[Box] = []

        def all_run() -> bool:
            nonlocal found
            shown = self.manager.docker(
                "service", "ps", "--filter", "desired-state=running", "--format", "{{.CurrentState}}", service
            ).splitlines()
            found = self.replicas(service)
            return len(found) == count == len(shown) and all(line.startswith("Running") for line in shown)

        try:
            wait_until(all_run, seconds, every=0.2)
        except TimeoutError:
            raise AssertionError(tasks_of(self, service)) from None
        return found

    def remove(self, *services: str, boxes: Sequence[Box] = ()) -> None:
        for box in boxes:
            box.host.engine.docker("rm", "--force", box.id)
        if services:
            self.manager.docker("service", "rm", *services)
        # It is in use until its last task has ended.
        wait_until(lambda: self.manager.run_docker("network", "rm", self.name).returncode == 0, PATIENCE, every=0.5)


def left(host: Host) -> list[str]:
    """The driver's objects on a host."""
    script = (
        "ip -brief link | grep -E '^(ov|vx|ve|vc)-'; iptables-save | grep netplugin; ip6tables-save | grep netplugin"
    )
    return host.engine.run(["sh", "-c", script]).stdout.splitlines()


@contextmanager
def nothing_left(cluster: Cluster, seconds: float = PATIENCE) -> Iterator[None]:
    yield
    with suppress(TimeoutError):
        wait_until(lambda: not any(map(left, cluster.hosts)), seconds, every=0.5)
    assert {host.name: left(host) for host in cluster.hosts} == {host.name: [] for host in cluster.hosts}


def all_reach_all(boxes: Sequence[Box], network: str) -> None:
    addresses = [box.address(network) for box in boxes]
    assert len(set(addresses)) == len(boxes)
    for box in boxes:
        assert [address for address in addresses if not box.reaches(address)] == []


# ------------------------------------------------------------------------------------------------------------ services


def test_a_service_over_three_hosts(cluster: Cluster) -> None:
    """Created, reached by name, updated one by one, scaled up and down, and gone."""
    with nothing_left(cluster):
        swarm = Swarm(cluster, "mynet")
        swarm.service("web", "--replicas", "6")
        boxes = swarm.running("web", 6)
        assert {box.host.name for box in boxes} == {"node-1", "node-2", "node-3"}
        all_reach_all(boxes, "mynet")
        names = {box.run("hostname") for box in boxes}
        for worker in cluster.hosts:  # by name, over TCP, from a container that is not of the service
            asked = worker.engine.docker("run", "--rm", "--network", "mynet", "busybox", "sh", "-c", ASK_ALL)
            assert set(asked.split()) == names, f"on {worker.name}"
            asked = worker.engine.docker("run", "--rm", "--network", "mynet", "busybox", "wget", "-qO-", "http://web/")
            assert asked in names
            pinged = worker.engine.docker("run", "--rm", "--network", "mynet", "busybox", "ping", "-c2", "-W2", "web")
            assert "2 packets received" in pinged

        one_by_one = ("--update-parallelism", "1", "--update-monitor", "100ms", "--update-delay", "0s")
        swarm.manager.docker("service", "update", "--detach", *one_by_one, "--env-add", "A=1", "web")
        with suppress(TimeoutError):
            wait_until(lambda: update_of(swarm, "web") == "completed", 120, every=0.5)
        assert update_of(swarm, "web") == "completed", tasks_of(swarm, "web")
        updated = swarm.running("web", 6)
        assert not {box.id for box in updated} & {box.id for box in boxes}
        all_reach_all(updated, "mynet")

        for replicas in (9, 3):
            swarm.manager.docker("service", "scale", "--detach", f"web={replicas}")
            all_reach_all(swarm.running("web", replicas), "mynet")
        swarm.remove("web")


def update_of(swarm: Swarm, service: str) -> str:
    (shown,) = json.loads(swarm.manager.docker("service", "inspect", service))
    return str(shown.get("UpdateStatus", {}).get("State", ""))


# ---------------------------------------------------------------------------------------------------------- containers


def test_what_is_reached_and_what_is_not(cluster: Cluster) -> None:
    """Full packets, IPv6, published ports, the outside; not another network, nor an internal one's outside."""
    with nothing_left(cluster):
        one, other = Swarm(cluster, "one", "-o", "ipv6=fd00:1::/96"), Swarm(cluster, "other", "--internal")
        first, second, third = cluster.hosts
        here, there = one.box(first), one.box(second)
        stranger, enclosed = other.box(third), other.box(first)
        assert "mtu 1450 " in here.run("ip", "link", "show", "eth0")
        assert "1 packets received" in here.run("ping", "-c1", "-W2", "-s", "1422", there.address("one"))
        (address,) = [word for word in there.run("ip", "-6", "address").split() if word.startswith("fd00:1::")]
        assert address == f"fd00:1::{hexadecimal(there.address('one'))}/96"
        wait_until(lambda: here.reaches(address.split("/")[0]), PATIENCE)

        assert enclosed.reaches(stranger.address("other"))
        for box, target in ((here, stranger.address("other")), (stranger, there.address("one"))):
            assert not box.reaches(target)
        assert here.reaches(OUTSIDE_ADDRESS), "by docker_gwbridge"
        assert not enclosed.reaches(OUTSIDE_ADDRESS)

        one.service("published", "--mode", "global", "--publish", "mode=host,published=8080,target=80")
        one.running("published", 3)
        for host in cluster.hosts:
            for published in cluster.hosts:
                if published is not host:
                    request = (
                        f"exec 3<>/dev/tcp/{published.address}/8080; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
                    )
                    answers_soon(host.engine, ["timeout", "20", "bash", "-c", request], "200 OK")
        one.remove("published", boxes=(here, there))
        other.remove(boxes=(stranger, enclosed))


def answers_soon(engine: PrivateEngine, command: list[str], said: str) -> None:
    """Raises TimeoutError unless the command prints that in the end."""
    wait_until(lambda: said in engine.run(command).stdout, PATIENCE)


def hexadecimal(ipv4: str) -> str:
    """As the end of an IPv6 address."""
    one, two, three, four = map(int, ipv4.split("."))
    return f"{one * 256 + two:x}:{three * 256 + four:x}"


def test_a_network_that_cannot_be(cluster: Cluster) -> None:
    """The command that makes it shows no error, since managers allocate later; its service shows it."""
    with nothing_left(cluster):
        swarm = Swarm(cluster, "huge", "-o", "mtu=9000")
        swarm.service("web", "--mode", "global", "--restart-condition", "none")
        wait_until(lambda: "leaves 1450 bytes" in tasks_of(swarm, "web"), PATIENCE, every=0.5)
        assert "option mtu=9000: eth1 (192.0.2.2) leaves 1450 bytes" in tasks_of(swarm, "web")
        swarm.remove("web")


def tasks_of(swarm: Swarm, service: str) -> str:
    return swarm.manager.docker("service", "ps", "--no-trunc", service)


# --------------------------------------------------------------------------------------------------- loss and return


class Pinging:
    """Between two containers, five times a second."""

    def __init__(self, box: Box, target: str) -> None:
        self._box = box
        # -W: a late answer counts as lost.
        box.run("sh", "-c", f"ping -i 0.2 -W 1 {target} > /tmp/ping & echo $! > /tmp/pid")

    def lost(self) -> tuple[int, int]:
        """How many were sent, and how many had no answer."""
        shown = self._box.run("sh", "-c", "kill -INT $(cat /tmp/pid); sleep 0.2; grep transmitted /tmp/ping")
        sent, received = (int(part.split()[0]) for part in shown.split(",")[:2])
        return sent, sent - received


def since(moment: float, condition: Callable[[], bool], within: float, what: str) -> float:
    """How many seconds after that moment it holds."""
    try:
        wait_until(condition, within + 20, every=0.05)
    except TimeoutError:
        raise AssertionError(f"{what}: not within {within + 20:g} s") from None
    seconds = time.monotonic() - moment
    print(f"{what}: {seconds:.2f} s")
    assert seconds < within, f"{what}: {seconds:.2f} s"
    return seconds


@pytest.mark.release
@pytest.mark.parametrize("number", [2, 0], ids=["worker", "manager"])
def test_a_link_that_is_cut(cluster: Cluster, number: int) -> None:
    """For 30 s, in which the swarm gives the node up; an address moves to another node meanwhile."""
    with nothing_left(cluster):
        swarm = Swarm(cluster, "mynet", "--subnet", "10.20.0.0/24")
        lost, (one, other) = (
            cluster.hosts[number],
            [host for host in cluster.hosts if host is not cluster.hosts[number]],
        )
        boxes = {host.name: swarm.box(host) for host in cluster.hosts}
        away, near, far = boxes[lost.name], boxes[one.name], boxes[other.name]
        all_reach_all(list(boxes.values()), "mynet")
        pinging = Pinging(near, far.address("mynet"))
        lost.cut()
        time.sleep(30)
        assert not away.reaches(near.address("mynet"))
        lost.heal()
        back = time.monotonic()
        since(back, lambda: near.reaches(away.address("mynet")), RETURN, f"{lost.name} is reached again")
        since(back, lambda: away.reaches(far.address("mynet")), RETURN, f"{lost.name} reaches others again")
        sent, without = pinging.lost()
        assert sent > 140
        assert without == 0, f"between the others {without} of {sent} were lost"
        wait_until(lambda: set(cluster.nodes().values()) == {"Ready"}, PATIENCE, every=0.5)
        swarm.remove(boxes=list(boxes.values()))


@pytest.mark.release
def test_an_engine_that_is_killed(cluster: Cluster) -> None:
    """With its service's replica; the swarm starts another there when it is back. Another network it forgets."""
    with nothing_left(cluster, FORGOTTEN):
        swarm, forgotten = Swarm(cluster, "mynet"), Swarm(cluster, "forgotten")
        old = forgotten.box(cluster.hosts[2])
        swarm.service("web", "--mode", "global")
        boxes = {box.host.name: box for box in swarm.running("web", 3)}
        near, far, lost = boxes["node-1"], boxes["node-2"], cluster.hosts[2]
        all_reach_all(list(boxes.values()), "mynet")
        pinging = Pinging(near, far.address("mynet"))
        lost.engine.kill()
        wait_until(lambda: cluster.nodes()["node-3"] != "Ready", PATIENCE, every=0.5)
        lost.engine.start()

        def replica() -> list[Box]:
            with suppress(EngineError):
                return [box for box in swarm.replicas("web") if box.host is lost and box != boxes[lost.name]]
            return []

        wait_until(lambda: bool(replica()), PATIENCE, every=0.1)
        back = time.monotonic()
        (box,) = replica()
        since(back, lambda: near.reaches(box.address("mynet")), RETURN, "the new replica is reached")
        since(back, lambda: box.reaches(far.address("mynet")), RETURN, "the new replica reaches others")
        sent, without = pinging.lost()
        assert sent > 60
        assert without == 0, f"between the others {without} of {sent} were lost"
        swarm.remove("web")
        forgotten.remove(boxes=[old])
