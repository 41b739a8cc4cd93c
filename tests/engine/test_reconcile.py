"""Docker, the plugin's file and the kernel agree again, whichever of them has lost something."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from netplugin_sdk.testing.engine import OUTSIDE_ADDRESS, PrivateEngine, Process, wait_until

from ..patience import PATIENCE
from .conftest import remove_all
from .crash_lab import (
    IMPATIENT,
    LOST,
    Box,
    Known,
    Reached,
    agree,
    bridges,
    docker_knows,
    everything,
    impatient,
    is_soon,
    make,
    running,
)
from .drivers import CALL_TIME

WEB, CLIENT = Box("web", "red", 8080), Box("client", "red")


def driver(*arguments: str) -> tuple[str, ...]:
    """The program that serves one of those in drivers.py."""
    return (sys.executable, str(Path(__file__).with_name("drivers.py")), *arguments)


@contextmanager
def fresh(engine: PrivateEngine, *arguments: str) -> Iterator[Process]:
    """Such a plugin, with an empty log. It is killed if it still runs."""
    (engine.folder / "myplugin.log").unlink(missing_ok=True)
    plugin = engine.start_plugin("myplugin", driver(*arguments))
    try:
        yield plugin
    finally:
        plugin.kill()


@pytest.fixture
def clean(engine: PrivateEngine) -> Iterator[PrivateEngine]:
    """The engine; in the end everything is removed through Docker, with a plugin that works, and nothing is left."""
    before = everything(engine)
    yield engine
    with engine.start_plugin("myplugin", IMPATIENT):
        remove_all(engine)
        is_soon(lambda: everything(engine), before)


def told(plugin: Process, word: str) -> list[Any]:
    """The lines of drivers.py about it."""
    lines = plugin.log.read_text().splitlines()
    return [json.loads(line.removeprefix(word)) for line in lines if line.startswith(word)]


# ------------------------------------------------------------------------------------ Docker removes what it has, leaks


class Meanwhile:
    """Docker removes things while there is no plugin, for which it takes 45 s: other tests run meanwhile."""

    def __init__(self, engine: PrivateEngine) -> None:
        self.engine = engine
        with engine.start_plugin("myplugin", IMPATIENT) as plugin:
            self.first = everything(engine)
            make(engine, [WEB])
            self.before = everything(engine)
            make(engine, [Box("removed", "blue", 8081), Box("stopped", "blue", 8082), Box("disconnected", "blue")])
            engine.docker("network", "create", "--driver", "myplugin", "green")
            plugin.kill()
        commands = [
            ("rm", "--force", "removed"),
            ("stop", "stopped"),
            ("network", "disconnect", "blue", "disconnected"),
            ("network", "rm", "green"),
        ]
        self._users = ThreadPoolExecutor(len(commands))
        self._done = [self._users.submit(engine.docker, *command) for command in commands]

    def join(self) -> None:
        """Until it is done; none of it failed."""
        with self._users:
            for done in self._done:
                done.result()


@pytest.fixture(scope="module", autouse=True)
def meanwhile(engine: PrivateEngine) -> Iterator[Meanwhile]:
    with PrivateEngine(engine.version) as own:
        meanwhile = Meanwhile(own)
        yield meanwhile
        meanwhile.join()


@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_the_plugin_is_killed_with_a_request(clean: PrivateEngine, when: str) -> None:
    """Before, within or after what is done for it.

    The engine's retry is empty: it takes networks and endpoints for gone that are there, or one for not made that is.
    """
    engine, stuck = clean, clean.run_folder / "stuck"
    commands = [
        ("network", "create", "--driver", "myplugin", "new"),
        ("network", "rm", "blue"),
        ("rm", "--force", "removed"),
    ]
    with ThreadPoolExecutor(len(commands)) as users:
        with fresh(engine, "stuck", when, "CreateNetwork", "DeleteNetwork", "DeleteEndpoint") as plugin:
            make(engine, [WEB, Box("removed", "green", 8081)])
            engine.docker("network", "create", "--driver", "myplugin", "blue")
            kept = Reached(engine, [WEB])
            stuck.touch()
            done = [users.submit(engine.run_docker, *command) for command in commands]
            wait_until(lambda: len(told(plugin, "HANGS")) == len(commands), PATIENCE)
        stuck.unlink()
        with engine.start_plugin("myplugin", IMPATIENT) as plugin:
            if when == "within":
                assert plugin.log.read_text().count("was not finished") == len(commands), "as it started"
            created, *removed = [command.result() for command in done]
            assert LOST in created.stderr
            assert [command.returncode for command in removed] == [0, 0]
            agree(engine)
            assert len(docker_knows(engine).networks) == len(bridges(engine)) == 2
            assert not kept.missing()


# --------------------------------------------------------------------------------------------- the kernel loses things


class Red:
    """An engine of its own with a plugin, and on the network ``red`` two containers."""

    def __init__(self, engine: PrivateEngine) -> None:
        self.engine = engine
        self.plugin = engine.start_plugin("myplugin", IMPATIENT)
        subnets = ("--subnet", "10.99.0.0/24", "--ipv6", "--subnet", "fd00:99::/64", "--gateway", "fd00:99::1")
        self.id = engine.docker("network", "create", "--driver", "myplugin", *subnets, "red")
        self.bridge = f"br-{self.id[:12]}"
        for box in (WEB, CLIENT):
            box.run(engine)
        self.reached = Reached(engine, [WEB, CLIENT])
        (endpoint,) = json.loads(engine.docker("inspect", "web"))
        self.port = f"ve-{endpoint['NetworkSettings']['Networks']['red']['EndpointID'][:12]}"

    def restart(self, command: Sequence[str] = IMPATIENT) -> None:
        """The plugin."""
        self.plugin.kill()
        self.plugin = self.engine.start_plugin("myplugin", command)

    def sh(self, script: str) -> None:
        """On the engine's host."""
        done = self.engine.run(["sh", "-ec", script.replace("BRIDGE", self.bridge).replace("PORT", self.port)])
        assert done.returncode == 0, done.stderr

    def gets_out(self) -> bool:
        """Whether the client does. While nobody else says anything, from which it might learn of another gateway."""
        enter = ["nsenter", f"--net=/proc/{self.reached.pids['client']}/ns/net"]
        return self.engine.run([*enter, "ping", "-c1", "-W1", OUTSIDE_ADDRESS]).returncode == 0

    def logged(self) -> Callable[[], str]:
        """The lines that the plugin logs from now on."""
        before = self.plugin.log.stat().st_size

        def read() -> str:
            return self.plugin.log.read_bytes()[before:].decode()

        return read


@pytest.fixture(scope="module")
def red_host(engine: PrivateEngine) -> Iterator[Red]:
    with PrivateEngine(engine.version) as own:
        red = Red(own)
        yield red
        red.plugin.stop()


@pytest.fixture
def red(red_host: Red) -> Red:
    """With a plugin that has seen no loss yet, since it waits longer from one to the next."""
    for pid in red_host.reached.pids.values():
        red_host.sh(f"nsenter --net=/proc/{pid}/ns/net ip neigh flush all")  # an earlier test may have spoiled it
    red_host.restart()
    red_host.reached.soon()
    return red_host


LOSSES = [
    ("ip link del BRIDGE", "interface BRIDGE is gone: bringing it back"),
    ("ip link set BRIDGE down", "interface BRIDGE is down: bringing it back"),
    ("ip addr del 10.99.0.1/24 dev BRIDGE", "interface BRIDGE has lost 10.99.0.1/24: bringing it back"),
    ("ip addr del fd00:99::1/64 dev BRIDGE", "interface BRIDGE has lost fd00:99::1/64: bringing it back"),
    ("ip link set PORT nomaster", "interface PORT is not a port of its bridge any more: bringing it back"),
    ("ip link set PORT down", "interface PORT is down: bringing it back"),
    (
        "for tool in iptables ip6tables; do $tool -F; $tool -t nat -F; done",
        "firewall: rules of ours were changed by others and are put back",
    ),
]


@pytest.mark.one_engine
@pytest.mark.parametrize(("loss", "said"), LOSSES, ids=[loss for loss, _ in LOSSES])
def test_what_is_lost_comes_back(red: Red, loss: str, said: str) -> None:
    before, logged = bridges(red.engine), red.logged()
    red.sh(loss)
    said = said.replace("BRIDGE", red.bridge).replace("PORT", red.port)
    is_soon(lambda: said in logged(), True)
    is_soon(lambda: bridges(red.engine), before)
    is_soon(red.gets_out, True)
    red.reached.soon()
    if "firewall" not in said:
        is_soon(lambda: "1 of 1 networks are restored" in logged(), True)


@pytest.mark.one_engine
def test_what_is_lost_while_the_plugin_is_away_comes_back_as_it_starts(red: Red) -> None:
    before = bridges(red.engine)
    red.plugin.kill()
    red.sh("ip link del BRIDGE; iptables -F; iptables -t nat -F")
    red.restart()
    assert bridges(red.engine) == before
    is_soon(red.gets_out, True)
    red.reached.soon()


@pytest.mark.one_engine
def test_what_is_taken_again_and_again_comes_back_each_time(red: Red) -> None:
    for _ in range(3):
        red.sh("ip link del BRIDGE")
        is_soon(red.gets_out, True)
    red.reached.soon()


@pytest.mark.one_engine
def test_sighup_brings_back_what_nobody_watches(red: Red) -> None:
    logged = red.logged()

    def is_as_it_was() -> bool:
        shown = red.engine.run(["ip", "link", "show", red.bridge]).stdout
        return "mtu 1500" in shown and red.engine.run(["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout == "1\n"

    red.sh("ip link set BRIDGE mtu 1400; echo 0 > /proc/sys/net/ipv4/ip_forward")
    assert not is_as_it_was()
    os.kill(red.plugin.pid, signal.SIGHUP)
    is_soon(is_as_it_was, True)
    is_soon(lambda: "1 of 1 networks are restored" in logged(), True)
    red.reached.soon()


# -------------------------------------------------------------------------------------------------- Docker is not there


def test_what_docker_knows_stays_while_no_engine_or_another_one_answers(red: Red) -> None:
    """Whatever that one says; also if it uses the plugin itself."""
    engine = red.engine
    engine.docker("network", "create", "--driver", "myplugin", "blue")  # without endpoints
    with engine.api() as docker:
        first = docker.call("GET", "/info")["ID"]

    def hold_against_docker() -> None:
        """Twice, with longer between than something must be missing."""
        red.restart(impatient(0.3))
        time.sleep(0.6)
        os.kill(red.plugin.pid, signal.SIGHUP)
        time.sleep(0.6)

    hold_against_docker()  # so that it is listed once
    engine.stop()  # which ends the containers
    is_soon(lambda: Known.of(engine).endpoints, set())
    known, before = Known.of(engine), bridges(engine)
    assert len(known.networks) == 2
    logged = red.logged()
    hold_against_docker()
    assert (Known.of(engine), bridges(engine)) == (known, before)

    engine._arguments = ["--data-root", "/var/lib/another"]
    identity = "/etc/docker/key.json", "/etc/docker/another.json"  # of 20.10
    engine._in_engine(["sh", "-c", f"mv {identity[0]} {identity[1]} || true"], 10)
    engine.start()
    with engine.api() as docker:
        assert docker.call("GET", "/info")["ID"] != first
    assert docker_knows(engine) == Known()
    hold_against_docker()
    assert (Known.of(engine), bridges(engine)) == (known, before)
    theirs = engine.docker("network", "create", "--driver", "myplugin", "--subnet", "10.98.0.0/24", "red")
    hold_against_docker()
    assert Known.of(engine).networks == {*known.networks, theirs}
    engine.docker("network", "rm", "red")

    engine.stop()
    engine._arguments = []
    engine._in_engine(["sh", "-c", f"mv {identity[1]} {identity[0]} || true"], 10)
    engine.start()
    hold_against_docker()
    assert docker_knows(engine) == Known.of(engine) == known
    assert "unknown to Docker" not in logged()
    engine.docker("start", "web", "client")
    Reached(engine, [WEB, CLIENT]).soon()


# --------------------------------------------------------------------------------------------------------- containers


@pytest.fixture
def telling(clean: PrivateEngine) -> Iterator[Process]:
    with fresh(clean, "telling") as plugin:
        yield plugin


def test_a_driver_is_told_of_containers(engine: PrivateEngine, telling: Process) -> None:
    engine.docker("network", "create", "--driver", "myplugin", "red")
    labels = {"tier": "front", "com.docker.compose.project": "shop"}
    options = [word for key, value in labels.items() for word in ("--label", f"{key}={value}")]
    engine.docker("run", "--detach", "--name", "web", "--network", "red", *options, "busybox", "sleep", "600")
    (endpoint,) = docker_knows(engine).endpoints
    is_soon(lambda: told(telling, "ATTACHED"), [[endpoint[0], "web", labels, "shop"]])
    assert running(engine) == {"web"}
    telling.kill()
    with engine.start_plugin("myplugin", driver("telling")) as again:
        assert told(again, "REMEMBERED") == [[endpoint[0], "web"]]
        time.sleep(0.5)
        assert len(told(again, "ATTACHED")) == 1, "once for each join"
        engine.docker("restart", "--time", "0", "web")
        is_soon(lambda: [name for _, name, *_ in told(again, "ATTACHED")], ["web", "web"])


@pytest.mark.one_engine
def test_a_driver_is_told_of_twenty_at_once(engine: PrivateEngine, telling: Process) -> None:
    engine.docker("network", "create", "--driver", "myplugin", "red")
    names = {f"box{number}" for number in range(20)}
    command = ("run", "--detach", "--network", "red", "--label")
    with ThreadPoolExecutor(len(names)) as users:
        list(users.map(lambda n: engine.docker(*command, f"own={n}", "--name", n, "busybox", "sleep", "600"), names))
    seen = {endpoint for endpoint, _ in docker_knows(engine).endpoints}
    is_soon(lambda: {endpoint for endpoint, *_ in told(telling, "ATTACHED")}, seen)
    assert {(name, labels["own"]) for _, name, labels, _ in told(telling, "ATTACHED")} == {(n, n) for n in names}


@pytest.mark.one_engine
def test_a_driver_that_asks_docker_while_docker_waits_is_refused(clean: PrivateEngine) -> None:
    """Else both might wait forever."""
    methods = {"create": "NetworkDriver.CreateEndpoint", "join": "NetworkDriver.Join"}
    with fresh(clean, "asking"):
        for where, method in methods.items():
            for how in ("socket", "docker"):
                name = f"{where}.{how}"
                option = f"com.docker.network.bridge.name={name}"
                clean.docker("network", "create", "--driver", "myplugin", "-o", option, name)
                done = clean.run_docker("run", "--name", name, "--network", name, "busybox", "true")
                assert done.returncode == 125
                assert f"{method} must not ask Docker" in done.stderr
                assert "NetworkDriver.container_attached tells of containers" in done.stderr
                clean.docker("ps", timeout=PATIENCE)
                clean.docker("network", "inspect", name, timeout=PATIENCE)
                clean.docker("inspect", name, timeout=PATIENCE)
        assert docker_knows(clean).endpoints == Known.of(clean).endpoints == set()


# ---------------------------------------------------------------------------------------------------------- deadlines


@pytest.mark.one_engine
@pytest.mark.parametrize("seconds", [3 * CALL_TIME, 3600], ids=["late", "never"])
def test_calls_that_take_too_long(clean: PrivateEngine, seconds: float) -> None:
    """Their work is undone when they end; if they never end, when the plugin starts again."""
    engine, create = clean, ("network", "create", "--driver", "myplugin")
    with fresh(engine, "slow", str(seconds)) as plugin:
        engine.docker(*create, "-o", "com.docker.network.bridge.name=slow.join", "slow")
        engine.docker(*create, "quick")
        before, served = everything(engine), 0
        with ThreadPoolExecutor(2) as users:
            began = time.monotonic()
            run = users.submit(engine.run_docker, "run", "--network", "slow", "busybox", "true")
            option = "com.docker.network.bridge.name=slow.create"
            created = users.submit(engine.run_docker, *create, "-o", option, "another")
            while not (run.done() and created.done()):
                engine.docker("run", "--rm", "--network", "quick", "busybox", "true", timeout=PATIENCE)
                served += 1
            lasted = time.monotonic() - began
        assert run.result().returncode == 125
        assert f"NetworkDriver.Join took over {CALL_TIME:g} seconds" in run.result().stderr
        assert f"NetworkDriver.CreateNetwork took over {CALL_TIME:g} seconds" in created.result().stderr
        # When the join expires, the engine deletes the endpoint. That has to wait for the join, and expires, too.
        assert lasted > CALL_TIME
        assert served > 1, "on another network"
        log = plugin.log.read_text()
        for method in ("Join", "CreateNetwork"):
            assert f"NetworkDriver.{method} took over {CALL_TIME:g} s: the engine no longer waits" in log
        assert log.count("time.sleep(self._seconds)") >= 4, "where they are; also of a warning before"
        if seconds < 3600:
            is_soon(lambda: everything(engine), before, seconds)
    with engine.start_plugin("myplugin", IMPATIENT):
        is_soon(lambda: everything(engine), before)


# ----------------------------------------------------------------------------------------------- and what was meanwhile


def test_what_docker_removed_while_there_was_no_plugin(meanwhile: Meanwhile) -> None:
    """The engine gave up to tell it: endpoints with their links, ports and rules, and a network."""
    meanwhile.join()
    engine = meanwhile.engine
    reached = Reached(engine, [WEB])
    with engine.start_plugin("myplugin", IMPATIENT) as plugin:
        assert {"8081", "8082"} <= ports(engine), "or there is nothing to remove"
        agree(engine)
        assert len(docker_knows(engine).networks) == 2
        log = plugin.log.read_text()
        assert log.count("is unknown to Docker: deleting it") == 4
        assert not {"8081", "8082"} & ports(engine)
        assert not reached.missing()
        engine.docker("start", "stopped")
        engine.docker("network", "connect", "blue", "disconnected")
        engine.docker("rm", "--force", "stopped", "disconnected")
        engine.docker("network", "rm", "blue")
        is_soon(lambda: everything(engine), meanwhile.before)
        remove_all(engine)
        is_soon(lambda: everything(engine), meanwhile.first)


def ports(engine: PrivateEngine) -> set[str]:
    """Where somebody listens."""
    return {line.split()[3].rpartition(":")[2] for line in engine.run(["ss", "-Hltn"]).stdout.splitlines()}
