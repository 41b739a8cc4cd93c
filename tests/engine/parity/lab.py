"""The parts of a row of the parity table.

A row is a function that takes a `Lab`, does with docker what a user would do, and returns the facts it saw, by name::

    @row("P5", "enable_icc=false", {"one to two": False, "published": True})
    def test_p5_icc(lab: Lab) -> Facts:
        lab.network("-o", "com.docker.network.bridge.enable_icc=false")
        lab.together(lambda: lab.run("one"), lambda: lab.run("two", "-p", "8080:80"))
        lab.serve("two", "tcp 80")
        seen = lab.survey({
            "one to two": ("one", tcp(lab.address("two"), 80)),
            "published": (OUTSIDE, tcp(ENGINE_ADDRESS, 8080)),
        })
        return {name: bool(answer) for name, answer in seen.items()}

It runs on a clean host with myplugin, and passes if the facts are those of the row. Before a release (NETPLUGIN_FULL),
and for the table (``--parity-table``), it also runs with Docker's bridge: the row states the facts of bridge. Facts are
plain values without ids or names of drivers (`Lab.who`, `Lab.plain`), so that the two can be compared.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from netplugin_sdk.core.engine_api import DockerError
from netplugin_sdk.testing.engine import (
    ENGINE_ADDRESS,
    OUTSIDE_ADDRESS,
    EngineError,
    PrivateEngine,
    Process,
    listens,
    wait_until,
)

from ...patience import PATIENCE
from ..conftest import MYPLUGIN, state_of_host

Facts = dict[str, object]

HOST = "the engine's host"
"""Where: the network namespace of the engine."""

OUTSIDE = "the outside host"
"""Where: the namespace of a host beside the engine's, which has no route to any container network."""

ENGINE_ADDRESS_6 = "2001:db8:51::1"
OUTSIDE_ADDRESS_6 = "2001:db8:51::2"

ROWS: Mapping[str, str] = {
    "P1": "network create, default IPAM",
    "P2": "com.docker.network.bridge.name",
    "P3": "com.docker.network.driver.mtu",
    "P4": "containers on one network",
    "P5": "enable_icc=false",
    "P6": "isolation between networks",
    "P7": "outbound, enable_ip_masquerade",
    "P8": "SNAT to host_ipv4, host_ipv6",
    "P9": "--internal",
    "P10": "-p 8080:80, tcp, udp, sctp",
    "P11": "-p ADDRESS:PORT:PORT, host_binding_ipv4",
    "P12": "-p 80, -p 8000-8010:80, -P",
    "P13": "a port that is taken",
    "P14": "ports on stop, start, rm -f",
    "P15": "IPv6, IPv6-only",
    "P16": "dual stack publishing, host IPv6 to a v4-only container",
    "P17": "gateway_mode nat, nat-unprotected, routed, isolated",
    "P18": "inhibit_ipv4",
    "P19": "container_iface_prefix",
    "P20": "--ip, --ip6, --mac-address, --link-local-ip, aux addresses, ip-range",
    "P21": "MAC when none asked",
    "P22": "connect, disconnect, several networks, gw-priority",
    "P23": "restart, stop, pause, kill -9, rm -f, --restart always",
    "P24": "engine restart, kill -9, live-restore",
    "P25": "plugin restart, kill -9, host reboot",
    "P26": "network rm with endpoints, prune",
    "P27": "two networks with the same subnet",
    "P28": "EndpointOperInfo",
    "P29": "ip_forward, bridge-nf-call, rp_filter, accept_ra, disable_ipv6",
    "P30": "trusted_host_interfaces",
    "P31": "endpoint sysctls, ifname",
    "P32": "docker compose",
}


# ----------------------------------------------------------------------------------------------------------- probes


class Target(NamedTuple):
    """The target of a probe."""

    kind: str
    host: str
    port: int


def tcp(host: str, port: int) -> Target:
    return Target("tcp", host, port)


def udp(host: str, port: int) -> Target:
    return Target("udp", host, port)


def sctp(host: str, port: int) -> Target:
    return Target("sctp", host, port)


def ping(host: str) -> Target:
    return Target("ping", host, 0)


class Answer(NamedTuple):
    """The answer; true if there is one."""

    by: str
    """Name of the server that answered ("pong" for a ping), or nothing."""

    peer: str
    """The address that the server saw."""

    failed: str
    """Why nothing came: "timed out", "Connection refused", "No route to host", "closed", …"""

    def __bool__(self) -> bool:
        return bool(self.by)


class Agent:
    """The process beside an engine that serves and asks in any namespace; see agent.py."""

    def __init__(self, engine: PrivateEngine) -> None:
        self._socket = engine.folder / "agent.sock"
        program = Path(__file__).with_name("agent.py")
        self._process = engine.spawn("agent", [sys.executable, str(program), str(self._socket)])
        wait_until(lambda: listens(self._socket), PATIENCE)

    def do(self, **request: object) -> Any:
        """Raises `EngineError` if it cannot."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(str(self._socket))
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as reply:
                said = json.loads(reply.readline())
        if "error" in said:
            raise EngineError(said["error"])
        return said["ok"]

    def close(self) -> None:
        self._process.stop()


# -------------------------------------------------------------------------------------------------------------- lab


class Lab:
    """One engine with one driver; containers and networks by their names, default network ``net``."""

    def __init__(self, engine: PrivateEngine, driver: str, agent: Agent, patience: float = 0.5) -> None:
        self.engine = engine
        self.driver = driver
        self.version = version_of(engine.version)
        """As numbers: ``lab.version >= (28, 0)``."""
        self.patience = patience
        """How many seconds a probe waits before it says that nothing came."""
        self.plugin: Process | None = None
        """The process of myplugin, to be killed and started (`start_plugin`); None for bridge."""
        self._agent = agent
        self._undo = contextlib.ExitStack()

    # -------------------------------------------------------------------------------------------------- docker

    def docker(self, *arguments: str) -> str:
        """Its output; raises `EngineError` if it fails."""
        return self.engine.docker(*arguments)

    def refusal(self, *arguments: str) -> str:
        """Docker's error (see `plain`), or nothing if it succeeds."""
        done = self.engine.run_docker(*arguments)
        return self.plain(done.stderr.strip() or "failed, and said nothing") if done.returncode else ""

    def network(self, *options: str, name: str = "net", driver: str = "") -> str:
        """Create it with the row's driver (or another one); its id."""
        return self.docker("network", "create", "--driver", driver or self.driver, *options, name)

    def refused_network(self, *options: str, name: str = "net") -> str:
        """As `refusal`."""
        return self.refusal("network", "create", "--driver", self.driver, *options, name)

    def run(self, name: str, *options: str, network: str = "net", command: Sequence[str] = ("sleep", "600")) -> None:
        """Start a container; ``docker stop`` ends it at once."""
        self.docker(*self._run(name, options, network), *command)

    def refused_run(self, name: str, *options: str, network: str = "net") -> str:
        """As `refusal`; the container that docker leaves is removed."""
        said = self.refusal(*self._run(name, options, network), "sleep", "600")
        self.engine.run_docker("rm", "--force", name)
        return said

    @staticmethod
    def _run(name: str, options: Sequence[str], network: str) -> list[str]:
        return ["run", "--detach", "--stop-signal", "KILL", "--name", name, "--network", network, *options, "busybox"]

    def together(self, *calls: Callable[[], Any]) -> list[Any]:
        """Do several things at once, since most of the time is spent waiting for docker."""
        with ThreadPoolExecutor(len(calls)) as users:
            return [future.result() for future in [users.submit(call) for call in calls]]

    def runs(self, *names: str, network: str = "net") -> None:
        """Start several containers at once."""
        self.together(*(lambda name=name: self.run(name, network=network) for name in names))

    def exec(self, container: str, *command: str) -> subprocess.CompletedProcess[str]:
        """``docker exec``."""
        return self.engine.run_docker("exec", container, *command)

    def pings(self, container: str, target: str) -> bool:
        """Whether busybox's ping gets an answer, by name too (IPv4: busybox has no ping6 here)."""
        return self.exec(container, "ping", "-c1", f"-W{max(1, round(self.patience))}", target).returncode == 0

    def api(self, path: str) -> Any:
        """GET of Docker's API (2 ms instead of the 40 of ``docker inspect``); None for what is not found."""
        with self.engine.api() as docker:
            try:
                return docker.call("GET", path)
            except DockerError as error:
                if error.http_status != 404:
                    raise
                return None

    def inspect(self, container: str) -> Any:
        """``docker inspect`` of a container."""
        return self.api(f"/containers/{container}/json")

    def inspect_network(self, name: str = "net") -> Any:
        """``docker network inspect``."""
        return self.api(f"/networks/{name}")

    def endpoint(self, container: str, network: str = "net") -> Any:
        """A container's endpoint on a network, from inspect: IPAddress, MacAddress, Gateway, …"""
        return self.inspect(container)["NetworkSettings"]["Networks"][network]

    def address(self, container: str, network: str = "net", version: int = 4) -> str:
        """Its IPv4 or IPv6 address there, or nothing."""
        return str(self.endpoint(container, network)["IPAddress" if version == 4 else "GlobalIPv6Address"])

    def gateway(self, network: str = "net", version: int = 4) -> str:
        """The network's gateway address as inspect shows it, without a prefix length."""
        for pool in self.inspect_network(network)["IPAM"]["Config"]:
            if (":" in pool["Subnet"]) == (version == 6):
                return str(pool.get("Gateway", "")).partition("/")[0]
        return ""

    # ------------------------------------------------------------------------------------------------- the host

    def bridge(self, network: str = "net") -> str:
        """Name of the network's bridge device, unless an option gave it one."""
        return "br-" + str(self.inspect_network(network)["Id"])[:12]

    def namespace(self, where: str) -> str:
        """Path of the network namespace of HOST (nothing), OUTSIDE or a container, for `nsenter --net=`."""
        if where == HOST:
            return ""
        if where == OUTSIDE:
            return "/run/netns/outside"
        container = self.inspect(where)
        if not container or not container["State"]["Pid"]:
            raise EngineError(f"there is no running container {where!r}")
        return f"/proc/{container['State']['Pid']}/ns/net"

    def host(self, *command: str, where: str = HOST) -> str:
        """The output of a host's program in a namespace: ``lab.host("ip", "route", where="one")``."""
        done = self.try_host(*command, where=where)
        if done.returncode != 0:
            raise EngineError(f"{shlex.join(command)} in {where}: {done.stderr.strip()}")
        return done.stdout.rstrip("\n")

    def try_host(self, *command: str, where: str = HOST) -> subprocess.CompletedProcess[str]:
        """As `host`, and it may fail."""
        namespace = self.namespace(where)
        return self.engine.run([*(["nsenter", f"--net={namespace}", "--"] if namespace else []), *command])

    def link(self, device: str, where: str = HOST) -> Any:
        """``ip -json -details address show``: ifname, mtu, address, linkinfo, addr_info, …; None if missing."""
        done = self.try_host("ip", "-json", "-details", "address", "show", device, where=where)
        return json.loads(done.stdout)[0] if done.returncode == 0 else None

    def gone(self, device: str) -> bool:
        """Whether there is none such, within 5 s: a driver may remove it after its answer."""
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: self.link(device) is None, 5)
        return self.link(device) is None

    def ports_of(self, network: str = "net", bridge: str = "") -> list[str]:
        """The devices on the network's bridge."""
        shown = self.host("ip", "-brief", "link", "show", "master", bridge or self.bridge(network))
        return [line.split()[0].partition("@")[0] for line in shown.splitlines()]

    def addresses(self, device: str, where: str = HOST) -> list[str]:
        """Its addresses with their prefix lengths, but for link-local IPv6."""
        shown = self.link(device, where) or {"addr_info": []}
        return [f"{a['local']}/{a['prefixlen']}" for a in shown["addr_info"] if not a["local"].startswith("fe80:")]

    def sysctl(self, name: str, where: str = HOST) -> str:
        """``net/ipv4/ip_forward``, with slashes."""
        done = self.try_host("sysctl", "-n", name, where=where)
        return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()

    def listening(self, kind: str = "tcp", where: str = HOST) -> set[str]:
        """``ADDRESS:PORT`` of what listens, by ``ss``."""
        shown = self.host("ss", "-Hln", "--tcp" if kind == "tcp" else "--udp", where=where)
        return {line.split()[3] for line in shown.splitlines()}

    def route_outside(self, subnet: str) -> None:
        """Give the outside host a route to a container network via the engine's host, until the row's end."""
        via = ENGINE_ADDRESS_6 if ":" in subnet else ENGINE_ADDRESS
        self.host("ip", "route", "add", subnet, "via", via, where=OUTSIDE)
        self.defer(lambda: self.host("ip", "route", "del", subnet, "via", via, where=OUTSIDE))

    def host_address(self, address: str) -> None:
        """Give the engine's host one more address, ``198.51.100.7/24``, until the row's end."""
        self.host("ip", "address", "add", address, "dev", "eth0", *(["nodad"] if ":" in address else []))
        self.defer(lambda: self.host("ip", "address", "del", address, "dev", "eth0"))

    def settle(self, *containers: str) -> None:
        """Wait until no IPv6 address of the host and these containers is tentative (2 s): before, the host forwards
        nothing from another network to a new bridge, for it cannot yet ask for neighbours there."""

        def settled(where: str) -> bool:
            return not self.host("ip", "-6", "-brief", "address", "show", "tentative", where=where)

        with contextlib.suppress(TimeoutError):
            wait_until(lambda: all(settled(where) for where in (HOST, *containers)), 8, every=0.1)

    def state(self) -> str:
        """Devices, rules, addresses, routes and listening sockets of the engine's host, to be compared."""
        return state_of_host(self.engine)

    def left(self, before: str) -> list[str]:
        """New (``+ …``) and missing (``- …``) facts since `state` was taken; nothing, within 5 s.

        The kernel takes down a namespace, and the veth in it, up to a second after docker has answered.
        """
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: self.state() == before, 5, every=0.05)
        was, now = before.splitlines(), self.state().splitlines()
        changed = [f"- {line}" for line in was if line not in now] + [f"+ {line}" for line in now if line not in was]
        return changed or ([] if was == now else ["another order"])

    def defer(self, undo: Callable[[], object]) -> None:
        """Something to do at the row's end, before the containers are removed; the last is done first."""
        self._undo.callback(undo)

    # --------------------------------------------------------------------------------------------------- probes

    def serve(self, where: str, *ports: str, name: str = "") -> None:
        """Answer on ``"tcp 80"``, ``"udp 53"``, ``"sctp 80"`` of all IPv4 and IPv6 addresses, until the row's end.

        A server tells its name (that of the place if not given) and the address of its caller.
        A container that is started again has a new namespace, hence no server.
        """
        split = [(kind, int(number)) for kind, number in (port.split() for port in ports)]
        self._agent.do(do="serve", where=self.namespace(where), name=(name or where).replace(" ", "-"), ports=split)

    def survey(self, probes: Mapping[str, tuple[str, Target]], patience: float = 0) -> dict[str, Answer]:
        """Ask all at once: ``{"fact": (where from, target)}`` to ``{"fact": answer}``."""
        places = {where: self.namespace(where) for where, _ in probes.values()}
        asked = [(places[where], *target) for where, target in probes.values()]
        answers = self._agent.do(do="ask", patience=patience or self.patience, probes=asked)
        return {fact: Answer(*answer) for fact, answer in zip(probes, answers, strict=True)}

    def reached(self, probes: Mapping[str, tuple[str, Target]], patience: float = 0) -> Facts:
        """As `survey`, as booleans."""
        return {fact: bool(answer) for fact, answer in self.survey(probes, patience).items()}

    def ask(self, where: str, target: Target, patience: float = 0) -> Answer:
        """Ask one."""
        return self.survey({"": (where, target)}, patience)[""]

    def heard(self, name: str) -> list[str]:
        """Addresses of those who asked the TCP and UDP servers of that name, whether or not the answer came back."""
        return sorted({peer for server, peer in self._agent.do(do="heard") if server == name.replace(" ", "-")})

    def cannot_bind(self, where: str, *targets: Target) -> list[str]:
        """For each, why a process there cannot listen on it, or nothing if it can."""
        namespace = self.namespace(where)
        return [str(said) for said in self._agent.do(do="bind", probes=[(namespace, *target) for target in targets])]

    def who(self, address: str) -> str:
        """Whose address that is: "host", "outside", "loopback", "one", "gateway of net", or itself."""
        known = {
            "": "",
            ENGINE_ADDRESS: "host",
            ENGINE_ADDRESS_6: "host",
            OUTSIDE_ADDRESS: "outside",
            OUTSIDE_ADDRESS_6: "outside",
            "127.0.0.1": "loopback",
            "::1": "loopback",
        }
        for short in self.api("/networks"):
            network = self.inspect_network(short["Id"])
            for pool in network["IPAM"]["Config"] or []:
                known.setdefault(str(pool.get("Gateway", "")).partition("/")[0], f"gateway of {network['Name']}")
            for container in network["Containers"].values():
                for key in ("IPv4Address", "IPv6Address"):
                    known.setdefault(container[key].partition("/")[0], container["Name"])
        return known.get(address, address)

    def plain(self, text: str) -> str:
        """A text without what differs from run to run: ids, names of drivers, docker's frame."""
        text = re.sub(r"\b[0-9a-f]{64}\b", "ID", text)
        text = re.sub(r"\b[0-9a-f]{12}\b", "ID", text)
        text = re.sub(r"\bveth[0-9a-f]{7}\b", "VETH", text)
        return re.sub(r"\b(bridge|myplugin)\b", "DRIVER", text) if self.driver == "myplugin" else text

    # ----------------------------------------------------------------------------------------- start and clean up

    def start_plugin(self) -> None:
        """Start myplugin, if it does not run; nothing for bridge."""
        if self.driver != "bridge" and (self.plugin is None or not self.plugin.running):
            self.plugin = self.engine.start_plugin(self.driver, MYPLUGIN, timeout=PATIENCE)

    def clean_up(self) -> None:
        """End the servers, do what was deferred, remove all containers and networks."""
        try:
            self._undo.close()
        finally:
            self._agent.do(do="stop")
            self.start_plugin()
            if containers := self.docker("ps", "--all", "--quiet").split():
                self.docker("rm", "--force", "--volumes", *containers)
            if networks := [n["Id"] for n in self.api("/networks") if n["Name"] not in ("bridge", "host", "none")]:
                self.docker("network", "rm", *networks)


def version_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


# ------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Difference:
    """A fact in which myplugin differs from bridge, is known to and has a reason; the table shows it."""

    fact: str
    myplugin: object
    """The value that is seen instead. The row fails when it no longer is, so that no reason gets stale."""

    why: str
    engines: Sequence[str] = ()
    """Where; nothing: everywhere."""


@dataclass(frozen=True)
class Row:
    """One function of a row."""

    number: str
    title: str
    expected: Mapping[str, object]
    function: Callable[[Lab], Facts]
    on: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    since: str = "20.10"
    engine_since: str = "20.10"
    differences: Sequence[Difference] = ()

    def expected_on(self, version: str) -> Facts:
        return {**self.expected, **self.on.get(version, {})}


@dataclass
class Outcome:
    """The results of one row on one engine."""

    row: Row
    engine: str
    bridge: str = "not tried"
    myplugin: str = "not tried"
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def row(
    number: str,
    title: str,
    expected: Mapping[str, object],
    *,
    on: Mapping[str, Mapping[str, object]] | None = None,
    since: str = "20.10",
    engine_since: str = "20.10",
    differences: Sequence[Difference] = (),
) -> Callable[[Callable[[Lab], Facts]], Callable[[Both], None]]:
    """Make a test of a function of a row.

    Args:
        number: that of parity.md.
        title: the part of the row that it tests, for the table.
        expected: the facts of bridge and of myplugin.
        on: engine's version to what differs from that there; for both drivers.
        since: the first engine whose bridge does it. With earlier ones bridge must show something else, which is
            recorded, and myplugin must do it all the same.
        engine_since: the first engine that can be asked for it at all (options of docker's client, checks of the engine
            before any driver); with earlier ones both drivers must fail with an error of docker, which is recorded.
        differences: facts that myplugin cannot have in common with bridge.
    """

    def decorate(function: Callable[[Lab], Facts]) -> Callable[[Both], None]:
        this = Row(number, title, expected, function, on or {}, since, engine_since, differences)

        def test(both: Both) -> None:
            both.try_row(this)

        test.__name__ = function.__name__
        test.__doc__ = f"{number} {title}"
        test.__module__ = function.__module__
        return test

    return decorate


class Both:
    """Runs rows with both drivers on one engine."""

    def __init__(self, engine: PrivateEngine, agent: Agent, outcomes: list[Outcome], drivers: Sequence[str]) -> None:
        self.engine = engine
        self.outcomes = outcomes
        self._agent = agent
        self._drivers = drivers
        self._plugin: Process | None = None

    def try_row(self, row: Row) -> None:
        """Raises AssertionError that lists the differing facts, and which driver has them."""
        outcome = Outcome(row, self.engine.version)
        self.outcomes.append(outcome)
        try:
            seen = {driver: self._observe(row, driver, outcome) for driver in self._drivers}
            if "bridge" in seen:
                outcome.bridge = self._judge_bridge(row, seen["bridge"], outcome)
            if "myplugin" in seen:
                outcome.myplugin = self._judge_myplugin(row, seen["myplugin"], outcome)
        except BaseException as error:
            outcome.problems.append(f"{type(error).__name__}: {error}")
            raise
        if outcome.problems:
            raise AssertionError(f"{row.number} {row.title}, engine {outcome.engine}\n" + "\n".join(outcome.problems))

    def _wanted(self, row: Row, driver: str) -> Facts:
        wanted = row.expected_on(self.engine.version)
        if driver == "myplugin":
            wanted.update((difference.fact, difference.myplugin) for difference in self._differences(row))
        return wanted

    def _differences(self, row: Row) -> list[Difference]:
        return [d for d in row.differences if not d.engines or self.engine.version in d.engines]

    def _judge_bridge(self, row: Row, seen: Facts, outcome: Outcome) -> str:
        version, wanted = version_of(outcome.engine), self._wanted(row, "bridge")
        if version < version_of(row.engine_since):
            if "docker" not in seen:
                outcome.problems.append(f"bridge: the engine does it though engine_since={row.engine_since}")
            return f"engine cannot: {seen.get('docker', seen)}"
        if version < version_of(row.since):
            if seen == wanted:
                outcome.problems.append(f"bridge does it though since={row.since}")
            return "not on this engine: " + _difference(seen, wanted, "seen")
        if seen == wanted:
            return "does it"
        outcome.problems.append("bridge: " + _difference(seen, wanted, "seen"))
        return "differs: " + _difference(seen, wanted, "seen")

    def _judge_myplugin(self, row: Row, seen: Facts, outcome: Outcome) -> str:
        version, wanted = version_of(outcome.engine), self._wanted(row, "myplugin")
        if version < version_of(row.engine_since):
            if "docker" not in seen:
                outcome.problems.append(f"myplugin: the engine does it though engine_since={row.engine_since}")
            return f"engine cannot: {seen.get('docker', seen)}"
        reasons: dict[str, list[str]] = {}
        for difference in self._differences(row):
            reasons.setdefault(difference.why, []).append(difference.fact)
        outcome.notes += [f"{', '.join(facts)}: {why}" for why, facts in reasons.items()]
        if seen == wanted:
            return "does it"
        outcome.problems.append("myplugin: " + _difference(seen, wanted, "seen"))
        return "differs: " + _difference(seen, wanted, "seen")

    def _observe(self, row: Row, driver: str, outcome: Outcome) -> Facts:
        """The facts; if they are not the wanted ones, those of a second look with more patience, which is noted."""
        wanted = self._wanted(row, driver)
        seen: Facts = {}
        for patience in (0.5, 3.0):
            first, began = seen, time.monotonic()
            seen = self._look(row, driver, patience, outcome)
            outcome.seconds.setdefault(driver, time.monotonic() - began)
            if seen == wanted:
                if first:
                    outcome.notes.append(f"{driver}: only at the second look ({_difference(first, wanted, 'first')})")
                break
            version = version_of(outcome.engine)
            if "docker" in seen or (driver == "bridge" and version < version_of(row.since)):
                break  # no patience helps
        return seen

    def _look(self, row: Row, driver: str, patience: float, outcome: Outcome) -> Facts:
        lab = Lab(self.engine, driver, self._agent, patience)
        lab.plugin = self._plugin
        lab.start_plugin()
        before = state_of_host(self.engine)
        try:
            try:
                return row.function(lab)
            except EngineError as error:
                return {"docker": lab.plain(str(error))}
        finally:
            lab.clean_up()
            if driver != "bridge":
                self._plugin = lab.plugin
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: state_of_host(self.engine) == before, PATIENCE, every=0.05)
            if (after := state_of_host(self.engine)) != before:
                gone, left = set(before.splitlines()), set(after.splitlines())
                outcome.problems.append(f"{driver} left {sorted(left - gone)}, took away {sorted(gone - left)}")

    def close(self) -> None:
        if self._plugin is not None and self._plugin.running:
            self._plugin.stop()


def _difference(seen: Facts, wanted: Facts, name: str) -> str:
    if "docker" in seen and "docker" not in wanted:
        return f"failed: {seen['docker']}"
    return "; ".join(
        f"{fact}: {name} {seen.get(fact, 'nothing')!r}, wanted {wanted.get(fact, 'nothing')!r}"
        for fact in {**wanted, **seen}
        if seen.get(fact, "nothing") != wanted.get(fact, "nothing")
    )
