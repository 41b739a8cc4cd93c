"""Random sequences of users' actions: afterwards the host is exactly as it was before.

A sequence makes networks with random options, runs, connects, disconnects, kills, restarts and removes containers, and
ends the plugin now and then. The test checks the facts after every step. At the end Docker removes everything, and
nothing may be left: no interface, address, route, rule, chain, sysctl, process, socket, or row of the plugin's state.

A failure prints the leftovers, the plugin's log, and a blob that repeats the sequence. A sequence takes about a second.
The sequences are the same in each run: 12 with each engine, or 67 with NETPLUGIN_FULL. NETPLUGIN_SEQUENCES=100 plays
100, and others each time.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import unified_diff
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any, Protocol, TypeAlias, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from netplugin_sdk import DriverError
from netplugin_sdk.core.engine_api import Docker, DockerError
from netplugin_sdk.testing.engine import ENGINE_ADDRESS, EngineError, PrivateEngine, wait_until

from ..patience import PATIENCE
from ..volume import volume
from .conftest import MYPLUGIN

TIMES = int(os.environ.get("NETPLUGIN_SEQUENCES") or volume(12, 67))
"""Sequences with each engine."""
STEPS = 7
"""Of a sequence, after its first network."""
DESCRIPTORS, THREADS = 60, 24
"""That the plugin may have open, and may have, when there is no network."""

LOST = re.compile(r"method=NetworkDriver\.(Create|Delete)Network .* the request body is empty")
"""The plugin was killed with that request on its way. The engine repeats it without its content, takes a network for
gone, or not made, whatever the answer is, and never asks again: something is left, and nobody could know of what."""

LOST_ENDPOINT = re.compile(r"method=NetworkDriver\.(Create|Delete)Endpoint .* the request body is empty")
"""The same with an endpoint. Whether it is there Docker can be asked, and is: after 10 s, and once more after 30."""

SNAPSHOT = [sys.executable, "-I", str(Path(__file__).with_name("sequences") / "snapshot.py")]
HOST, OUTSIDE = "host", "outside"
ADOPTED = ("adopted0", "adopted.1")
"""Bridges of the user's, with an address of their own."""
KEPT = [
    f"/proc/sys/net/{name}"
    for name in (
        "ipv4/ip_forward",
        "ipv6/conf/default/forwarding",
        "ipv6/conf/all/forwarding",
        "bridge/bridge-nf-call-iptables",
        "bridge/bridge-nf-call-ip6tables",
    )
]
"""A driver sets these to 1 once and leaves them: the test sets them before the first look."""

T = TypeVar("T")


# -------------------------------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True)
class NetworkOptions:
    """Of ``docker network create``."""

    driver: Mapping[str, str] = field(default_factory=dict)
    """``-o``; keys without ``com.docker.network.`` before them."""
    bridge: str = ""
    internal: bool = False
    ipv6: bool = False
    gateway: bool = False
    """Whether its address is asked for."""

    def __str__(self) -> str:
        flags = [name for name in ("internal", "ipv6", "gateway") if getattr(self, name)]
        options = {**self.driver, **({"bridge.name": self.bridge} if self.bridge else {})}
        return " ".join((*flags, *(f"{key}={value}" for key, value in options.items()))) or "plain"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(f"<{self}>")

    @property
    def binding(self) -> str:
        """Where ports are published by default, if it says so."""
        return self.driver.get("bridge.host_binding_ipv4", "")

    @property
    def nat(self) -> bool:
        """Whether its containers' ports are published on the host, by IPv4."""
        mode = self.driver.get("bridge.gateway_mode_ipv4", "nat")
        return not self.internal and mode.startswith("nat")


BOOLEANS = st.sampled_from(["true", "false", "1", "0"])
MODES = ["nat", "nat-unprotected", "routed"]


def or_nothing(strategy: st.SearchStrategy[T], nothing: int = 2) -> st.SearchStrategy[T | None]:
    """Mostly nothing, so that a network has few options."""
    return st.one_of(*[st.none()] * nothing, strategy)


@st.composite
def network_options(draw: st.DrawFn) -> NetworkOptions:
    """Valid ones."""
    internal, ipv6 = draw(st.sampled_from([False, False, False, True])), draw(st.booleans())
    modes = st.sampled_from([*MODES, "isolated"] if internal else MODES)
    bridge = draw(or_nothing(st.sampled_from([*ADOPTED, "mine", "a.b-c@d=e_f", "fifteen_bytes_0"]), 3)) or ""
    # Below 1280 the kernel takes IPv6 from a device, for good.
    mtus = ["1280", "1420", "9000", "65535", "0", *([] if ipv6 or bridge in ADOPTED else ["68", "576"])]
    drawn = {
        "driver.mtu": draw(or_nothing(st.sampled_from(mtus))),
        "bridge.enable_icc": draw(or_nothing(BOOLEANS)),
        "bridge.enable_ip_masquerade": draw(or_nothing(BOOLEANS)),
        "bridge.gateway_mode_ipv4": draw(or_nothing(modes)),
        "bridge.gateway_mode_ipv6": draw(or_nothing(modes)),
        "bridge.inhibit_ipv4": draw(or_nothing(BOOLEANS, 4)),
        "bridge.host_binding_ipv4": draw(or_nothing(st.sampled_from(["127.0.0.1", ENGINE_ADDRESS, "0.0.0.0"]))),
        "host_ipv4": draw(or_nothing(st.just(ENGINE_ADDRESS), 4)),
        "host_ipv6": draw(or_nothing(st.just("2001:db8:51::1"), 4)),
        "bridge.trusted_host_interfaces": draw(or_nothing(st.sampled_from(["", "eth0", "eth0:not-there"]), 3)),
        "container_iface_prefix": draw(or_nothing(st.sampled_from(["", "net", "twelve_bytes", "ü"]), 3)),
    }
    return NetworkOptions(
        driver={key: value for key, value in drawn.items() if value is not None},
        bridge=bridge,
        internal=internal,
        ipv6=ipv6,
        gateway=draw(st.booleans()),
    )


INVALID = [
    (NetworkOptions({"driver.mtu": "none"}), "mtu='none': expected 68 to 65535"),
    (NetworkOptions({"driver.mtu": "67"}), "mtu='67': expected 68 to 65535"),
    (NetworkOptions({"driver.mtu": "65536"}), "mtu='65536': expected 68 to 65535"),
    (NetworkOptions({"driver.mtu": "1000"}, ipv6=True), "IPv6"),
    (NetworkOptions({"bridge.enable_icc": "perhaps"}), "enable_icc='perhaps': expected true or false"),
    (NetworkOptions({"bridge.gateway_mode_ipv4": "wild"}), "gateway_mode_ipv4='wild': expected nat, "),
    (NetworkOptions({"bridge.gateway_mode_ipv6": "isolated"}), "'isolated' can only be used for an internal"),
    (NetworkOptions({"bridge.host_binding_ipv4": "::1"}), "host_binding_ipv4='::1': expected an IPv4 address"),
    (NetworkOptions({"host_ipv4": "fe80::1%eth0"}), "host_ipv4='fe80::1%eth0': expected an IPv4 address"),
    (NetworkOptions({"host_ipv6": "fe80::1%eth0"}), "fe80::1%eth0"),
    (NetworkOptions({"bridge.trusted_host_interfaces": 'eth0:a"b'}), "'a\"b' cannot be the name of an interface"),
    (NetworkOptions({"container_iface_prefix": "thirteen_byte"}), "expected up to 12 bytes"),
    (NetworkOptions({"nonsense": "1"}), "unknown option 'com.docker.network.nonsense'"),
    (NetworkOptions(bridge="eth0"), "bridge eth0: cannot create: a veth interface has this name"),
    (NetworkOptions(bridge="sixteen_bytes_00"), "'sixteen_bytes_00' cannot be the name of an interface"),
    (NetworkOptions(bridge="a/b"), "'a/b' cannot be the name of an interface"),
    (NetworkOptions(bridge="br%d"), "'br%d' cannot be the name of an interface"),
    (NetworkOptions(bridge="a b"), "'a b' cannot be the name of an interface"),
    (NetworkOptions(bridge="wild+"), "'wild+' cannot be the name of an interface"),
]


@dataclass(frozen=True)
class Port:
    """One ``-p``."""

    inside: str
    """``80/tcp``; there somebody serves."""
    host: str = ""
    """A port, a range, or nothing."""
    address: str = ""

    @property
    def protocol(self) -> str:
        return self.inside.partition("/")[2]

    def __str__(self) -> str:
        return ":".join(part for part in (self.address, self.host, self.inside) if part)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(f"<{self}>")


# Few, so that they are often taken.
HOST_PORTS = ["20000", "20001", "20002", "20000-20001", "20000-20004", ""]
ADDRESSES = ["", "", "", "0.0.0.0", "127.0.0.1", ENGINE_ADDRESS, "::1", "203.0.113.9"]
NO_ADDRESS = "203.0.113.9"
"""Of no host here."""
PORTS = st.lists(
    st.builds(
        Port,
        inside=st.sampled_from(["80/tcp", "80/tcp", "81/tcp", "53/udp", "80/sctp"]),
        host=st.sampled_from(HOST_PORTS),
        address=st.sampled_from(ADDRESSES),
    ),
    max_size=3,
    unique_by=(lambda port: port.inside, lambda port: (port.protocol, port.host)),
)
TAKEN = re.compile(r"port is already allocated|address already in use|all ports are allocated|assign requested address")


# ------------------------------------------------------------------------------------------------------- the world


class Engine(Docker):
    """The engine's API, on one connection."""

    def refusal(self, method: str, path: str, content: Mapping[str, Any] | None = None) -> str:
        """The refusal's text; nothing if it succeeds."""
        try:
            self.call(method, path, content)
        except DockerError as error:
            return str(error)
        return ""


class World:
    """An engine with the plugin, that all sequences of a test use in turn."""

    def __init__(self, engine: PrivateEngine) -> None:
        self.engine = engine
        self.proc = engine.run_folder.parents[1]
        self.docker = self.connection()
        self.numbers = 0
        self.sequences = 0
        self.events: Counter[str] = Counter()
        """The events of all sequences, and how often each happened."""
        self._before: list[str] = []
        self._file = engine.folder / "expected.json"
        self._kept = {name: engine.run(["cat", name]).stdout.strip() for name in KEPT}
        self._prepare()
        for tool in ("iptables", "ip6tables"):
            (engine.folder / f"{tool}.saved").write_text(engine.run([f"{tool}-save"]).stdout)
        self.plugin = self.engine.start_plugin("myplugin", MYPLUGIN, timeout=PATIENCE)
        self._logged = 0

    def _prepare(self) -> None:
        script = "set -e; "
        for number, name in enumerate(ADOPTED):
            # With a port that is up, so that the kernel changes nothing by itself as containers come and go.
            script += f"ip link add {name} type bridge; ip link add port{number} type veth peer far{number}; "
            for device in (name, f"port{number}", f"far{number}"):
                script += f"ip link set {device} addrgenmode none; ip link set {device} up; "
            script += f"ip link set port{number} master {name}; "
            script += f"ip addr add 10.99.{number}.1/24 dev {name}; "
        script += "".join(f"if [ -e {name} ]; then echo 1 > {name}; fi; " for name in KEPT)
        done = self.engine.run(["sh", "-c", script])
        assert done.returncode == 0, done.stderr
        tentative = ["ip", "-6", "-brief", "address", "show", "tentative"]
        wait_until(lambda: not self.engine.run(tentative).stdout, PATIENCE, every=0.1)

    def connection(self) -> Engine:
        return Engine(self.engine.api_socket, timeout=120)

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def close(self) -> None:
        """End the plugin; remove what this has made."""
        try:
            self.clear()
            self.stop_plugin(signal.SIGTERM)
            devices = " ".join((*ADOPTED, "port0", "port1"))
            script = f"for name in {devices}; do ip link del $name; done; "
            script += "".join(f"echo {value} > {name}; " for name, value in self._kept.items() if value)
            self.engine.run(["sh", "-c", script])
        finally:
            self.docker.close()

    # ---------------------------------------------------------------------------------------------- the plugin

    def start_plugin(self) -> None:
        self.plugin = self.engine.start_plugin("myplugin", MYPLUGIN, timeout=PATIENCE)

    def stop_plugin(self, number: signal.Signals) -> None:
        if number == signal.SIGKILL:
            self.plugin.kill()
        else:
            status = self.plugin.stop()
            assert status == 0, f"the plugin ended with status {status}"
        left = self._processes()
        assert not left, f"the plugin has ended, and left {left}"

    def _processes(self) -> list[str]:
        """The plugin's and its relay's."""
        found: list[str] = []

        def none() -> bool:
            found.clear()
            for file in (self.proc / "root" / "proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    text = file.read_bytes().replace(b"\0", b" ").decode()
                    if "myplugin" in text or "/linux/relay.py" in text:
                        found.append(text)
            return not found

        with contextlib.suppress(TimeoutError):
            wait_until(none, PATIENCE)
        return found

    def kill_relay(self) -> None:
        """If there is one."""
        plugin = self.plugin.pid
        for child in Path(f"/proc/{plugin}/task/{plugin}/children").read_text().split():
            with contextlib.suppress(OSError):
                if "/linux/relay.py" in Path(f"/proc/{child}/cmdline").read_text():
                    os.kill(int(child), signal.SIGKILL)

    def log(self) -> str:
        """The end of what the plugin has written in this sequence."""
        return self.plugin.log.read_bytes()[self._logged :][-10_000:].decode(errors="replace")

    # ------------------------------------------------------------------------------------------------ the host

    def begin(self) -> None:
        """Before a sequence."""
        if not self._before:
            self._before = self._look()["lines"]
        self._logged = self.plugin.log.stat().st_size

    def end(self) -> None:
        """After it: Docker removes all, and what is left is an error."""
        self.sequences += 1
        before, self._before = self._before, []  # after trouble it is taken again
        trouble = self.clear()
        found = self._look(before)
        after, plugin = found["lines"], found["plugin"]
        trouble += [f"left: {line}" for line in after if line not in before]
        trouble += [f"gone: {line}" for line in before if line not in after]
        if not trouble and after != before:
            trouble += ["another order:", *unified_diff(before, after, lineterm="")]
        if plugin["processes"] != 1 or plugin["relays"] > 1:
            trouble.append(f"processes: {plugin}")
        if plugin["descriptors"] > DESCRIPTORS or plugin["threads"] > THREADS:
            trouble.append(f"the plugin has {plugin}")
        if "Traceback" in self.log():
            trouble.append("a traceback in the plugin's log")
        if trouble:
            lost = LOST.search(self.log())
            self._scrub(before)
            if lost is None:
                raise AssertionError("\n".join(trouble))
            self.events["lost"] += 1
        else:
            self._before = before

    def clear(self) -> list[str]:
        """Remove all containers and networks through Docker, all at once; return its output."""
        if not self.plugin.running:
            self.start_plugin()
        containers = [c["Id"] for c in self.docker.call("GET", "/containers/json?all=1")]
        trouble = self._remove([f"/containers/{name}?force=1" for name in containers])
        networks = [n["Id"] for n in self.docker.call("GET", "/networks") if n["Driver"] == "myplugin"]
        return trouble + self._remove([f"/networks/{name}" for name in networks])

    def _remove(self, paths: Sequence[str]) -> list[str]:
        def remove(path: str) -> str:
            with contextlib.closing(self.connection()) as docker:
                return docker.refusal("DELETE", path)

        if len(paths) < 2:
            return [said for path in paths if (said := self.docker.refusal("DELETE", path))]
        with ThreadPoolExecutor(len(paths)) as users:
            return [said for said in users.map(remove, paths) if said]

    def _look(self, expected: list[str] | None = None) -> Any:
        wait = []
        if expected is not None:
            self._file.write_text(json.dumps({"lines": expected}))
            wait = [str(self._file), str(PATIENCE)]
        done = self.engine.run([*SNAPSHOT, *wait])
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def _scrub(self, before: list[str]) -> None:
        """Remove leftovers, so that they do not disturb the next sequence."""
        self.plugin.kill()
        keep = {line.split()[2] for line in before if line.startswith("interface ")}
        script = "rm -rf /var/lib/netplugin; cd /proc/sys/net/ipv4/conf; "
        script += f"for name in *; do case ' all default {' '.join(keep)} ' in *' '$name' '*) ;; "
        script += "*) ip link del $name;; esac; done; "
        for tool in ("iptables", "ip6tables"):
            for table in ("filter", "nat"):
                script += f"{tool} -t {table} -F; {tool} -t {table} -X; "
            script += f"{tool}-restore < {self.engine.folder}/{tool}.saved; "
        self.engine.run(["sh", "-c", script])
        for name in ADOPTED:
            self.engine.run(["ip", "link", "del", name])
        for number in range(len(ADOPTED)):
            self.engine.run(["ip", "link", "del", f"port{number}"])
        self._prepare()
        self.start_plugin()

    # ------------------------------------------------------------------------------------------------ looking

    def interfaces(self) -> set[str]:
        lines = (self.proc / "net" / "dev").read_text().splitlines()[2:]
        return {line.partition(":")[0].strip() for line in lines}

    def holds(self, protocol: str, port: int) -> set[str]:
        """The addresses of the host's sockets with this port, in hexadecimal."""
        found = set()
        for kind in (protocol, f"{protocol}6"):
            with contextlib.suppress(FileNotFoundError):
                for line in (self.proc / "net" / kind).read_text().splitlines()[1:]:
                    _, local, _, status, *_ = line.split()
                    address, _, number = local.partition(":")
                    if int(number, 16) == port and (protocol == "udp" or status == "0A"):
                        found.add(address)
        return found

    def namespace(self, pid: int) -> Path:
        return self.proc / "root" / "proc" / str(pid) / "ns" / "net"

    def answers(self, where: Path | str, host: str, port: int) -> str:
        """Nothing, if an HTTP server answers; else why not."""
        path = {HOST: self.proc / "ns" / "net", OUTSIDE: self.proc / "root" / "run" / "netns" / "outside"}.get(
            str(where), Path(where)
        )
        return within(path, lambda: ask(host, port))


def within(namespace: Path, work: Callable[[], T]) -> T:
    """Its return value in a network namespace, from a thread that ends with it."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000) != 0:  # CLONE_NEWNET
                    raise OSError(ctypes.get_errno(), f"setns {namespace}")
            finally:
                os.close(descriptor)
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def ask(host: str, port: int, patience: float = 5.0) -> str:
    """As `World.answers`, here; it is tried again, since a server may not be up yet."""
    until = time.monotonic() + patience
    while True:
        try:
            with socket.create_connection((host, port), timeout=1) as caller:
                caller.sendall(b"GET / HTTP/1.0\r\n\r\n")
                said = caller.recv(100)
            if said.startswith(b"HTTP/"):
                return ""
            failed = f"it says {said!r}"
        except OSError as error:
            failed = str(error)
        if time.monotonic() > until:
            return failed
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------- the sequence


class Draw(Protocol):
    """Of hypothesis."""

    def __call__(self, strategy: st.SearchStrategy[T]) -> T: ...


Action: TypeAlias = Callable[[Draw], None]


@dataclass(eq=False)
class Net:
    """A network that is there."""

    name: str
    id: str
    options: NetworkOptions

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(self.name)

    @property
    def bridge(self) -> str:
        return self.options.bridge or f"br-{self.id[:12]}"


@dataclass(eq=False)
class Box:
    """A container that is there."""

    name: str
    ports: Sequence[Port]
    networks: set[Net]
    """That it is connected to, also while it does not run."""
    state: str = "created"
    pid: int = 0
    endpoints: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Name of a network → what inspect shows."""

    def __str__(self) -> str:
        ports = "".join(f" -p {port}" for port in self.ports)
        return f"{self.name} on {', '.join(net.name for net in self.networks)}{ports}"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(self.name)

    @property
    def running(self) -> bool:
        return self.state in ("running", "paused")


class Sequences(RuleBasedStateMachine):
    """One of them."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.docker = world.docker
        self.nets: list[Net] = []
        self.boxes: list[Box] = []
        self.steps: list[str] = []
        """In words."""
        world.begin()
        self.devices = world.interfaces()

    def teardown(self) -> None:
        with self.explained():
            self.world.end()

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Errors tell what was done, and have the end of the plugin's log."""
        try:
            yield
        except (AssertionError, EngineError, DriverError, OSError) as error:
            lines = ("--- the sequence:", *self.steps, "--- the plugin's log:", self.world.log())
            # At once: hypothesis does it again, and shows what happens then.
            print("", error, *lines, sep="\n")
            raise

    def told(self, step: str, said: str = "") -> None:
        self.steps.append(f"{step}{f' → {said}' if said else ''}")
        self.world.events[step.split(maxsplit=1)[0] + (" refused" if said else "")] += 1

    # Hypothesis prefers what is first in a list, and repeats itself: steps are to be chosen evenly.
    @initialize(options=network_options(), random=st.randoms(use_true_random=True))
    def begin(self, options: NetworkOptions, random: Random) -> None:
        self.random = random
        with self.explained():
            assert self.create(options) == ""

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """One of those that make sense now, and that are not done yet; mostly those that change much."""
        weights, actions = zip(*self.actions(), strict=True)
        (action,) = self.random.choices(actions, weights)
        with self.explained():
            action(data.draw)
            self.check_interfaces()

    def actions(self) -> Iterator[tuple[int, Action]]:
        """The actions that are possible now, and how often to choose each."""
        yield 1, self.invalid_network
        yield 1, self.end_plugin
        if len(self.nets) < 3:
            yield 2, self.another_network
        if not self.nets:
            return
        yield 1, self.remove_network
        if len(self.boxes) < 3:
            yield 8 - 3 * len(self.boxes), self.run_container
        if self.boxes:
            yield 1, self.remove_container
            yield 1, self.kill_container
            yield 1, self.disconnect
            yield 1, self.restart_container
            yield 1, self.pause_container
        if any(self.served(box) for box in self.boxes):
            yield 8, self.published
        if any(not box.running for box in self.boxes):
            yield 3, self.start_container
        if any(net not in box.networks for box in self.boxes for net in self.nets):
            yield 4, self.connect
        if any(self.common(one, other) for one in self.boxes for other in self.boxes):
            yield 8, self.neighbours

    # ------------------------------------------------------------------------------------------------ networks

    def request(self, options: NetworkOptions) -> tuple[str, Mapping[str, Any]]:
        """Name of a new network, and what to ask the engine for."""
        number = self.world.number()
        high, low = 100 + number // 250 % 100, number % 250
        pools = [{"Subnet": f"10.{high}.{low}.0/24"}]
        if options.ipv6:
            pools.append({"Subnet": f"fd00:{high}:{low}::/64"})
        if options.gateway:
            pools[0]["Gateway"] = f"10.{high}.{low}.254"
        given = {f"com.docker.network.{key}": value for key, value in options.driver.items()}
        if options.bridge:
            given["com.docker.network.bridge.name"] = options.bridge
        name = f"net{number}"
        return name, {
            "Name": name,
            "Driver": "myplugin",
            "Internal": options.internal,
            "EnableIPv6": options.ipv6,
            "IPAM": {"Config": pools},
            "Options": given,
        }

    def create(self, options: NetworkOptions) -> str:
        """Why it cannot be created, where it cannot."""
        name, content = self.request(options)
        try:
            id_ = self.docker.call("POST", "/networks/create", content)["Id"]
        except DockerError as error:
            self.told(f"create {name} {options}", str(error))
            return str(error)
        self.told(f"create {name} {options}")
        self.nets.append(Net(name, id_, options))
        return ""

    def another_network(self, draw: Draw) -> None:
        options = draw(network_options())
        same = [net for net in self.nets if net.bridge == options.bridge]
        said = self.create(options)
        assert said == "" if not same else f"networks have same bridge name '{options.bridge}'" in said
        assert "\n" not in said

    def invalid_network(self, draw: Draw) -> None:
        options, wanted = draw(st.sampled_from(INVALID))
        said = self.create(options)
        assert wanted in said
        assert "\n" not in said
        assert "Traceback" not in said

    def remove_network(self, draw: Draw) -> None:
        net = draw(st.sampled_from(self.nets))
        said = self.docker.refusal("DELETE", f"/networks/{net.name}")
        self.told(f"remove_network {net.name}", said)
        if any(net in box.networks and box.running for box in self.boxes):
            assert "has active endpoints" in said
        else:
            assert said == ""
            self.nets.remove(net)

    # ---------------------------------------------------------------------------------------------- containers

    def run_container(self, draw: Draw) -> None:
        box = self.create_box(draw)
        if not self.start(box, f"run {box}", "start"):
            self.drop(box)

    def create_box(self, draw: Draw) -> Box:
        net = draw(st.sampled_from(self.nets))
        box = Box(f"box{self.world.number()}", draw(PORTS), {net})
        bindings: dict[str, list[dict[str, str]]] = {}
        for port in box.ports:
            bindings.setdefault(port.inside, []).append({"HostIp": port.address, "HostPort": port.host})
        content = {
            "Image": "busybox",
            "Cmd": ["httpd", "-f", "-p", "80"],
            "StopSignal": "KILL",
            "ExposedPorts": {inside: {} for inside in bindings},
            "HostConfig": {
                "NetworkMode": net.name,
                "PortBindings": bindings,
                "LogConfig": {"Type": "none"},
                "IpcMode": "none",
            },
        }
        self.docker.call("POST", f"/containers/create?name={box.name}", content)
        self.boxes.append(box)
        return box

    def start(self, box: Box, step: str, path: str) -> bool:
        """Whether it runs then. Where it does not, that is for a port that is taken, or a network that is gone."""
        taken = [port for port in box.ports if self.taken(port)]
        said = self.docker.refusal("POST", f"/containers/{box.name}/{path}")
        self.told(step, said)
        self.look(box)
        assert box.running == (said == "")
        if not said:
            (net, *others) = box.networks or [None]
            if net is not None and not others and net.options.nat and not net.options.binding:
                assert not [port for port in taken if port.address in ("", "0.0.0.0")], "a port of somebody else's"
            return True
        if any(net not in self.nets for net in box.networks):
            assert re.search("network .* not found|could not find a network", said)
        else:
            # Where the kernel has no SCTP sockets, nobody but the plugin sees whose port it is.
            assert taken or any(port.inside.endswith("/sctp") for port in box.ports)
            assert TAKEN.search(said)
        assert "\n" not in said
        return False

    def taken(self, port: Port) -> bool:
        """Whether somebody has all of its host ports, or there is no such address."""
        if port.address == NO_ADDRESS:
            return True
        if port.host == "" or port.protocol == "sctp":
            return False
        first, _, last = port.host.partition("-")
        return all(self.world.holds(port.protocol, each) for each in range(int(first), int(last or first) + 1))

    def look(self, box: Box) -> None:
        """The facts that hold for it now."""
        shown = self.docker.call("GET", f"/containers/{box.name}/json")
        state = shown["State"]
        box.state = "paused" if state["Paused"] else "running" if state["Running"] else "stopped"
        box.pid = state["Pid"]
        networks = shown["NetworkSettings"]["Networks"]
        box.endpoints = {name: seen for name, seen in networks.items() if seen["EndpointID"]} if box.running else {}

    def do(self, box: Box, what: str) -> None:
        self.docker.call("POST", f"/containers/{box.name}/{what}")
        self.told(f"{what.partition('?')[0]} {box.name}")
        self.look(box)

    def remove_container(self, draw: Draw) -> None:
        self.drop(draw(st.sampled_from(self.boxes)))

    def drop(self, box: Box) -> None:
        self.docker.call("DELETE", f"/containers/{box.name}?force=1")
        self.told(f"remove {box.name}")
        self.boxes.remove(box)

    def kill_container(self, draw: Draw) -> None:
        box = draw(st.sampled_from(self.boxes))
        if box.running:
            self.do(box, "kill")

    def start_container(self, draw: Draw) -> None:
        box = draw(st.sampled_from([box for box in self.boxes if not box.running]))
        self.start(box, f"start {box.name}", "start")

    def pause_container(self, draw: Draw) -> None:
        box = draw(st.sampled_from(self.boxes))
        if box.running:
            self.do(box, "unpause" if box.state == "paused" else "pause")

    def restart_container(self, draw: Draw) -> None:
        box = draw(st.sampled_from(self.boxes))
        if box.state == "paused":  # which engines may refuse
            self.do(box, "unpause")
        if box.running:
            self.do(box, "stop?t=0")  # its own ports are not to count as taken
        self.start(box, f"restart {box.name}", "restart?t=0")

    def connect(self, draw: Draw) -> None:
        pairs = [(box, net) for box in self.boxes for net in self.nets if net not in box.networks]
        box, net = draw(st.sampled_from(pairs))
        taken = [port for port in box.ports if self.taken(port)]
        said = self.docker.refusal("POST", f"/networks/{net.name}/connect", {"Container": box.name})
        self.told(f"connect {box.name} to {net.name}", said)
        self.look(box)
        if not said:
            box.networks.add(net)
            return
        assert taken
        assert TAKEN.search(said)
        # To the engine it is now half connected, with Docker's own bridge too: nothing to go on with.
        self.drop(box)

    def disconnect(self, draw: Draw) -> None:
        box = draw(st.sampled_from(self.boxes))
        if nets := [net for net in self.nets if net in box.networks]:
            net = draw(st.sampled_from(nets))
            content = {"Container": box.name, "Force": draw(st.booleans())}
            self.docker.call("POST", f"/networks/{net.name}/disconnect", content)
            self.told(f"disconnect {box.name} from {net.name}")
            box.networks.remove(net)
            self.look(box)

    # ----------------------------------------------------------------------------------------------- and others

    def end_plugin(self, draw: Draw) -> None:
        how = draw(st.sampled_from(["SIGTERM", "SIGKILL", "relay"]))
        self.told(f"end_{how}")
        if how == "relay":
            self.world.kill_relay()
        else:
            self.world.stop_plugin(signal.Signals[how])
            self.world.start_plugin()

    def common(self, one: Box, other: Box) -> list[Net]:
        """Networks on which they must reach each other."""
        if one is other or not one.state == other.state == "running":
            return []
        icc = "bridge.enable_icc"
        return [net for net in one.networks & other.networks if net.options.driver.get(icc, "1") in ("true", "1")]

    def neighbours(self, draw: Draw) -> None:
        """They reach each other on the networks that they have in common."""
        pairs = [(one, other) for one in self.boxes for other in self.boxes if self.common(one, other)]
        one, other = draw(st.sampled_from(pairs))
        for net in self.common(one, other):
            self.told(f"ask {other.name} from {one.name} on {net.name}")
            seen = other.endpoints[net.name]
            for address in filter(None, (seen["IPAddress"], seen["GlobalIPv6Address"])):
                failed = self.world.answers(self.world.namespace(one.pid), address, 80)
                assert not failed, f"{other.name} does not answer {one.name}: {failed}"

    def served(self, box: Box) -> list[tuple[str, str, Port]]:
        """Ports that must be reached: from where, by which address."""
        nets = list(box.networks)
        if box.state != "running" or len(nets) != 1 or not nets[0].options.nat:
            return []
        options = nets[0].options
        if options.driver.get("bridge.inhibit_ipv4") in ("true", "1"):
            return []  # the host has no way to the container
        ways = {"0.0.0.0": (OUTSIDE, ENGINE_ADDRESS), ENGINE_ADDRESS: (OUTSIDE, ENGINE_ADDRESS)}
        ways["127.0.0.1"] = (HOST, "127.0.0.1")
        return [
            (*ways[binding], port)
            for port in box.ports
            if port.inside == "80/tcp" and port.host.isdecimal()
            if (binding := port.address or options.binding or "0.0.0.0") in ways
        ]

    def published(self, draw: Draw) -> None:
        """A published port answers clients on the host and outside of it."""
        box = draw(st.sampled_from([box for box in self.boxes if self.served(box)]))
        for where, address, port in self.served(box):
            self.told(f"ask_{where} for {port} of {box.name}")
            failed = self.world.answers(where, address, int(port.host))
            assert not failed, f"{port} of {box.name} does not answer {where}: {failed}"

    def check_interfaces(self) -> None:
        """Those of networks and of running containers, and no others."""
        bridges = {net.bridge for net in self.nets}
        ends = {f"ve-{seen['EndpointID'][:12]}" for box in self.boxes for seen in box.endpoints.values()}
        wanted = self.devices | bridges | ends
        log = self.world.log()
        patience = 1 if LOST.search(log) else 3 * PATIENCE if LOST_ENDPOINT.search(log) else PATIENCE
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: self.world.interfaces() == wanted, patience)
        there = self.world.interfaces()
        assert there == wanted or LOST.search(self.world.log()), f"left: {there - wanted}, missing: {wanted - there}"
        for box in self.boxes:
            if box.running:
                assert set(box.endpoints) == {net.name for net in box.networks}


class Crashes(Sequences):
    """The plugin is killed while it does something: the engine asks once more a second later, or gives up."""

    def actions(self) -> Iterator[tuple[int, Action]]:
        yield from super().actions()
        yield 2, self.crash_create
        if self.nets:
            yield 1, self.crash_remove_network
            yield 3, self.crash_start
        if any(box.running for box in self.boxes):
            yield 6, self.crash_container
        if any(net not in box.networks for box in self.boxes for net in self.nets):
            yield 2, self.crash_connect

    def crash(self, draw: Draw, work: Callable[[Engine], T]) -> T | DockerError:
        """Do it with the plugin killed meanwhile."""

        def do() -> T | DockerError:
            with contextlib.closing(self.world.connection()) as docker:
                try:
                    return work(docker)
                except DockerError as error:
                    return error

        moment = draw(st.integers(0, 60)) / 1000
        with ThreadPoolExecutor(1) as user:
            done = user.submit(do)
            time.sleep(moment)
            self.world.stop_plugin(signal.SIGKILL)
            self.world.start_plugin()
            result = done.result()
        self.told(f"... and killed the plugin after {moment} s: {result}")
        return result

    def crash_create(self, draw: Draw) -> None:
        options = draw(network_options())
        if not any(net.bridge == options.bridge for net in self.nets):
            name, content = self.request(options)
            self.told(f"crash_create {name} {options}")
            answer = self.crash(draw, lambda docker: docker.call("POST", "/networks/create", content))
            if not isinstance(answer, DockerError):
                self.nets.append(Net(name, answer["Id"], options))

    def crash_remove_network(self, draw: Draw) -> None:
        net = draw(st.sampled_from(self.nets))
        if not any(net in box.networks for box in self.boxes):
            self.told(f"crash_remove_network {net.name}")
            said = self.crash(draw, lambda docker: docker.refusal("DELETE", f"/networks/{net.name}"))
            assert said == "" or self.docker.refusal("DELETE", f"/networks/{net.name}") == ""
            self.nets.remove(net)

    def crash_start(self, draw: Draw) -> None:
        box = self.create_box(draw)
        self.told(f"crash_start {box}")
        self.crash(draw, lambda docker: docker.refusal("POST", f"/containers/{box.name}/start"))
        self.look(box)
        if not box.running:
            self.drop(box)

    def crash_container(self, draw: Draw) -> None:
        box = draw(st.sampled_from([box for box in self.boxes if box.running]))
        what = draw(st.sampled_from(["kill", "restart?t=0", "disconnect", "remove"]))
        self.told(f"crash_{what} {box.name}")
        if what == "remove":
            self.crash(draw, lambda docker: docker.refusal("DELETE", f"/containers/{box.name}?force=1"))
        elif what != "disconnect":
            self.crash(draw, lambda docker: docker.refusal("POST", f"/containers/{box.name}/{what}"))
        elif box.networks:
            net = draw(st.sampled_from(sorted(box.networks, key=lambda net: net.name)))
            content = {"Container": box.name}
            self.crash(draw, lambda docker: docker.refusal("POST", f"/networks/{net.name}/disconnect", content))
        self.give_up(box)

    def crash_connect(self, draw: Draw) -> None:
        pairs = [(box, net) for box in self.boxes for net in self.nets if net not in box.networks]
        box, net = draw(st.sampled_from(pairs))
        self.told(f"crash_connect {box.name} to {net.name}")
        content = {"Container": box.name}
        if self.crash(draw, lambda docker: docker.refusal("POST", f"/networks/{net.name}/connect", content)):
            self.give_up(box)
        else:
            box.networks.add(net)
            self.look(box)

    def give_up(self, box: Box) -> None:
        """Remove it, which may have been done already."""
        said = self.docker.refusal("DELETE", f"/containers/{box.name}?force=1")
        self.told(f"remove {box.name}", said)
        assert said == "" or "No such container" in said
        self.boxes.remove(box)


class EngineRestarts(Sequences):
    """The engine is restarted, too."""

    def actions(self) -> Iterator[tuple[int, Action]]:
        yield from super().actions()
        if self.boxes:
            yield 8, self.restart_engine

    def restart_engine(self, draw: Draw) -> None:
        how = draw(st.sampled_from(["stop", "kill"]))
        self.told(f"engine_{how}")
        self.docker.close()
        getattr(self.world.engine, how)()
        self.world.engine.start()
        for box in self.boxes:
            self.look(box)


# ----------------------------------------------------------------------------------------------------------- tests


@pytest.fixture
def world(engine: PrivateEngine) -> Iterator[World]:
    world = World(engine)
    yield world
    world.close()


def play(machine: Callable[[World], Sequences], world: World, times: int, steps: int) -> None:
    chosen = settings(
        max_examples=times,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        derandomize="NETPLUGIN_SEQUENCES" not in os.environ,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],  # a sequence is short, and shrinking it takes minutes
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(lambda: machine(world), settings=chosen)  # type: ignore[arg-type]
    assert world.sequences >= times
    print(f"{world.sequences} sequences: {', '.join(f'{what} {times}' for what, times in world.events.items())}")


def test_sequences(world: World) -> None:
    play(Sequences, world, TIMES, STEPS)


def test_the_plugin_is_killed_while_it_works(world: World) -> None:
    play(Crashes, world, max(3, TIMES // 20), STEPS)


def test_the_engine_is_restarted(world: World) -> None:
    play(EngineRestarts, world, max(2, TIMES // 50), STEPS)
