"""What is on disk compared with what Docker lists, by a small server that says what an engine would."""

from __future__ import annotations

import json
import logging
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from msgspec import structs

from netplugin_sdk import (
    Container,
    DriverError,
    Endpoint,
    IpamDriver,
    Network,
    Plugin,
    Scope,
    Timings,
    losses,
)
from netplugin_sdk.core import recovery
from netplugin_sdk.core.comparison import Comparison
from netplugin_sdk.core.engine_api import Docker as Engine
from netplugin_sdk.ipam import PoolIpamDriver
from netplugin_sdk.values import UsedPool

from ..patience import PATIENCE
from .lab import (
    ENDPOINT,
    NETWORK,
    OTHER_ENDPOINT,
    OTHER_NETWORK,
    Docker,
    Options,
    Publisher,
    Recorder,
    create_endpoint,
    create_network,
    joining,
    of,
    publishing,
)
from .serving import MOMENT, wait_for

LONG = 10 * PATIENCE
"""Seconds that no test waits for."""

FOREIGN = "f" * 64
CONTAINER: dict[str, Any] = {
    "Id": "c" * 64,
    "Names": ["/web", "/other/alias"],
    "Image": "busybox",
    "Labels": {"com.docker.compose.project": "shop", "com.docker.compose.service": "web", "tier": "front"},
}
WEB = Container(CONTAINER["Id"], "web", "busybox", CONTAINER["Labels"])


@dataclass
class Listed:
    """What the engine has, and how it is."""

    id: str = "engine 1"
    networks: dict[str, dict[str, str]] = field(default_factory=dict)
    """Each with its endpoints → what it is listed under: a container, or ``ep-…``."""
    info: dict[str, Any] = field(default_factory=dict)
    """What else it says of itself."""
    elsewhere: set[str] = field(default_factory=set)
    """Networks of other nodes of the swarm, which a manager lists, too."""
    pools: dict[str, str] = field(default_factory=dict)
    """Subnets of networks with an IPAM plugin."""
    containers: list[dict[str, Any]] = field(default_factory=list)
    broken: bool = False
    asked: list[str] = field(default_factory=list)


def answers(listed: Listed) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            listed.asked.append(self.path)
            status, content = self.answer(urlsplit(self.path))
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def answer(self, url: Any) -> tuple[int, Any]:
            match ["broken"] if listed.broken else url.path.split("/")[1:]:
                case ["info"]:
                    return 200, {"ID": listed.id, **listed.info}
                case ["networks"]:
                    pools = ({"Id": pool, "Scope": "local", "IPAM": {"Driver": "pools"}} for pool in listed.pools)
                    default = {"Scope": "local", "IPAM": {"Driver": "default"}}
                    networks = {**listed.networks, **dict.fromkeys(listed.elsewhere)}
                    return 200, [*({"Id": network, **default} for network in networks), *pools]
                case ["networks", network] if network in listed.pools:
                    return 200, {"Containers": {}, "IPAM": {"Config": [{"Subnet": listed.pools[network]}]}}
                case ["networks", network] if network in {*listed.networks, *listed.elsewhere}:
                    endpoints = listed.networks.get(network, {})
                    peers = {"Peers": [{"IP": "10.0.0.1"}]} if network in listed.networks else {}
                    return 200, {"Containers": {c: {"EndpointID": e} for e, c in endpoints.items()}, **peers}
                case ["containers", "json"]:
                    (wanted,) = json.loads(parse_qs(url.query)["filters"][0])["id"]
                    return 200, [c for c in listed.containers if c["Id"] == wanted]
            return 500 if listed.broken else 404, {"message": "no such thing"}

        def address_string(self) -> str:
            return "unix"

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Listed]:
    """At ``docker.sock`` in `tmp_path`."""
    listed = Listed()
    with socketserver.ThreadingUnixStreamServer(str(tmp_path / "docker.sock"), answers(listed)) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield listed
        server.shutdown()
        thread.join()


SHORT = Timings(missing_grace=0.2, engine_grace=0.0)
PATIENT = structs.replace(SHORT, missing_grace=LONG)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Docker]]:
    """Starts a plugin with this driver, on the same disk each time."""
    running: list[Plugin] = []

    def start(driver: Recorder, timings: Timings = SHORT) -> Docker:
        for plugin in running:
            plugin.close()
        running[:] = [Plugin(driver, state=tmp_path / "state", docker=tmp_path / "docker.sock", timings=timings)]
        return Docker(running[0])

    yield start
    for plugin in running:
        plugin.close()


Serve = Callable[..., Docker]


def stored(driver: Recorder) -> Mapping[str, Any]:
    """The driver's networks with what the SDK keeps of them."""
    return driver.networks


def half(docker: Docker) -> Any:
    """What serves the network driver."""
    return docker.plugin._networks


def stays(condition: Callable[[], object], missing: float = 0.2) -> bool:
    """Whether it holds for twice as long as something must be missing."""
    until = time.monotonic() + 2 * missing + MOMENT
    while condition() and time.monotonic() < until:
        time.sleep(0.01)
    return bool(condition())


# Orphans


def served_and_listed(engine: Listed, serve: Serve) -> tuple[Recorder, Docker]:
    """A plugin with one network, which the engine has listed."""
    driver = Recorder()
    docker = serve(driver)
    engine.networks = {NETWORK: {}}
    docker("CreateNetwork", create_network())
    wait_for(lambda: stored(driver)[NETWORK].row.engine, "the list to be seen")
    return driver, docker


def test_a_network_that_docker_has_forgotten_is_removed(engine: Listed, serve: Serve) -> None:
    driver = Recorder()
    docker = serve(driver)
    engine.networks = {NETWORK: {}, OTHER_NETWORK: {}}
    docker("CreateNetwork", create_network())
    docker("CreateNetwork", create_network(OTHER_NETWORK))
    wait_for(lambda: all(n.row.engine for n in stored(driver).values()), "the list to be seen")
    del engine.networks[NETWORK]
    docker.plugin.reconcile()
    wait_for(lambda: set(driver.networks) == {OTHER_NETWORK}, "the removal")
    assert "delete_network" in driver.calls
    assert stays(lambda: set(driver.networks) == {OTHER_NETWORK})
    assert docker.plugin.repairs["unknown_to_docker"] == 1


def test_the_last_network_that_docker_has_forgotten_is_removed_too(engine: Listed, serve: Serve) -> None:
    driver, _ = served_and_listed(engine, serve)
    engine.networks = {}
    serve(driver)  # a start is a look, too
    wait_for(lambda: not driver.networks, "the removal")


def test_a_network_that_was_never_listed_is_removed_where_others_of_ours_are(engine: Listed, serve: Serve) -> None:
    """Its CreateNetwork was answered as the engine died."""
    driver = Recorder()
    docker = serve(driver)
    engine.networks = {OTHER_NETWORK: {}}
    docker("CreateNetwork", create_network())
    docker("CreateNetwork", create_network(OTHER_NETWORK))
    wait_for(lambda: set(driver.networks) == {OTHER_NETWORK}, "the removal")


def test_a_network_that_was_never_listed_is_removed_when_others_of_ours_were(engine: Listed, serve: Serve) -> None:
    """It was forgotten with its engine, soon after its creation; the other network was removed meanwhile."""
    driver, docker = served_and_listed(engine, serve)
    docker("DeleteNetwork", of(NETWORK))
    engine.networks = {}
    docker("CreateNetwork", create_network(OTHER_NETWORK))
    wait_for(lambda: not driver.networks, "the removal")


def test_a_removal_that_fails_is_finished_by_the_next_start(
    engine: Listed, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    driver, docker = served_and_listed(engine, serve)
    driver.fails = {"delete_network": DriverError("not today")}
    engine.networks = {}
    docker.plugin.reconcile()
    wait_for(lambda: "not today" in caplog.text, "the failure")
    engine.broken = True  # so it is not Docker that says it again
    again = Recorder()
    serve(again)
    assert not again.networks
    assert again.calls == ["delete_network"]


def test_another_engine_at_that_socket_removes_nothing(engine: Listed, serve: Serve) -> None:
    """It lists none of ours: whose networks they are it does not know."""
    driver = Recorder()
    docker = serve(driver)
    engine.networks = {FOREIGN: {}}
    docker("CreateNetwork", create_network())
    docker.run()
    docker.plugin.reconcile()
    assert stays(lambda: driver.networks[NETWORK].endpoints)


def test_an_engine_that_was_exchanged_removes_nothing(engine: Listed, serve: Serve) -> None:
    driver, docker = served_and_listed(engine, serve)
    engine.id, engine.networks = "engine 2", {}
    docker.plugin.reconcile()
    assert stays(lambda: driver.networks)


def test_an_engine_that_does_not_answer_removes_nothing(engine: Listed, serve: Serve) -> None:
    driver, docker = served_and_listed(engine, serve)
    engine.broken = True
    docker.plugin.reconcile()
    assert stays(lambda: driver.networks)
    engine.broken, engine.networks = False, {}
    wait_for(lambda: not driver.networks, "the removal, once it answers")


def test_what_is_missing_for_a_moment_only_stays(engine: Listed, serve: Serve) -> None:
    """The engine lists a network only when all of its creation is done."""
    driver = Recorder()
    docker = serve(driver, PATIENT)
    engine.networks = {OTHER_NETWORK: {}}
    docker("CreateNetwork", create_network())
    docker("CreateNetwork", create_network(OTHER_NETWORK))
    docker.plugin.reconcile()  # one that came while the second was made did not know that
    wait_for(lambda: NETWORK in half(docker)._comparison._missing, "a look that misses it")
    engine.networks[NETWORK] = {}
    docker.plugin.reconcile()
    wait_for(lambda: stored(driver)[NETWORK].row.engine, "the next look")
    assert len(driver.networks) == 2


class Swarm(Recorder):
    scope = Scope.GLOBAL


@pytest.mark.parametrize("is_manager", [False, True])
def test_a_swarms_network_that_this_node_has_no_more_is_removed(engine: Listed, serve: Serve, is_manager: bool) -> None:
    """As after an engine that was killed; a manager goes on listing it."""
    driver = Swarm()
    docker = serve(driver)
    engine.networks = {NETWORK: {}, OTHER_NETWORK: {}}
    docker("CreateNetwork", create_network())
    docker("CreateNetwork", create_network(OTHER_NETWORK))
    docker.run()
    assert stays(lambda: len(driver.networks) == 2)
    del engine.networks[NETWORK]
    engine.elsewhere = {NETWORK} if is_manager else set()
    docker.plugin.reconcile()
    wait_for(lambda: set(driver.networks) == {OTHER_NETWORK}, "the removal")
    assert [call for call in driver.calls if call.startswith("delete")] == ["delete_endpoint", "delete_network"]
    assert stays(lambda: set(driver.networks) == {OTHER_NETWORK})


@pytest.mark.parametrize(("address", "is_removed"), [("10.0.0.1", True), ("10.0.0.2", False)])
def test_a_swarms_network_that_was_never_listed_is_removed_by_its_node(
    engine: Listed, serve: Serve, address: str, is_removed: bool
) -> None:
    """Its engine, which was killed soon after its creation, says that it is the node that the plugin is on."""
    driver = Swarm()
    docker = serve(driver)
    docker("DiscoverNew", {"DiscoveryType": 1, "DiscoveryData": {"Address": "10.0.0.1", "Self": True}})
    engine.info = {"Swarm": {"NodeAddr": address}}
    docker("CreateNetwork", create_network())
    if is_removed:
        wait_for(lambda: not driver.networks, "the removal")
    else:
        assert stays(lambda: driver.networks)


def test_a_swarms_network_that_is_asked_for_again_stays(engine: Listed, serve: Serve) -> None:
    driver = Swarm()
    docker = serve(driver, PATIENT)
    engine.networks = {NETWORK: {}}
    docker("CreateNetwork", create_network())
    docker.run()
    wait_for(lambda: stored(driver)[NETWORK].row.engine, "the first look")
    engine.networks, engine.elsewhere = {}, {NETWORK}
    docker.plugin.reconcile()
    wait_for(lambda: NETWORK in half(docker)._comparison._missing, "the next look")
    driver.since()
    docker("CreateNetwork", create_network())
    assert driver.since() == ["leave", "delete_endpoint"]  # the engine has forgotten it
    engine.networks, engine.elsewhere = {NETWORK: {ENDPOINT: "c1"}}, set()
    docker.run()
    half(docker)._comparison._timings = SHORT  # what is still on the list of the missing goes now
    docker.plugin.reconcile()
    assert stays(lambda: set(driver.networks[NETWORK].endpoints) == {ENDPOINT})


def test_a_network_that_is_asked_for_while_its_removal_waits_stays(
    engine: Listed, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Swarm()
    docker = serve(driver)
    engine.networks = {NETWORK: {}}
    docker("CreateNetwork", create_network())
    docker.run()
    wait_for(lambda: stored(driver)[NETWORK].row.engine, "the first look")
    entered, go_on, removes = threading.Event(), threading.Event(), threading.Event()
    remove = Comparison._remove

    def wait(_: object) -> None:
        entered.set()
        go_on.wait(PATIENCE)

    def removing(comparison: Comparison[Options], record: Any) -> None:
        removes.set()
        remove(comparison, record)

    monkeypatch.setattr(Comparison, "_remove", removing)

    driver.hooks = {"delete_endpoint": wait}
    asking = threading.Thread(target=docker, args=("CreateNetwork", create_network()))
    asking.start()
    assert entered.wait(PATIENCE)
    engine.networks = {}
    docker.plugin.reconcile()
    assert removes.wait(PATIENCE), "it looked twice, and wants to remove it"
    engine.networks = {NETWORK: {}}
    go_on.set()
    asking.join()
    assert stays(lambda: NETWORK in driver.networks)


def test_an_endpoint_that_docker_has_forgotten_is_deleted(engine: Listed, serve: Serve) -> None:
    """`docker rm -f` succeeds while the plugin is down, and nobody tells it."""
    driver = Publisher()
    docker = serve(driver)
    engine.networks = {NETWORK: {ENDPOINT: "c1", OTHER_ENDPOINT: "ep-2"}}
    docker("CreateNetwork", create_network())
    docker.run()
    docker("ProgramExternalConnectivity", publishing())
    docker.run(endpoint=OTHER_ENDPOINT)
    docker.plugin.close()
    del engine.networks[NETWORK][ENDPOINT]
    driver = Publisher()
    docker = serve(driver)
    wait_for(lambda: set(driver.networks[NETWORK].endpoints) == {OTHER_ENDPOINT}, "the removal")
    assert driver.calls[-3:] == ["revoke", "leave", "delete_endpoint"]
    assert stays(lambda: set(driver.networks[NETWORK].endpoints) == {OTHER_ENDPOINT})
    docker("DeleteEndpoint", of(NETWORK, ENDPOINT))  # should it be asked for after all


def with_one_that_docker_forgets(engine: Listed, serve: Serve) -> tuple[Recorder, Docker]:
    """Of two endpoints, after it has listed both for a while."""
    driver = Recorder()
    docker = serve(driver)
    engine.networks = {NETWORK: {ENDPOINT: "c1", OTHER_ENDPOINT: "c2"}}
    docker("CreateNetwork", create_network())
    docker.run()
    docker.run(endpoint=OTHER_ENDPOINT)
    assert stays(lambda: len(driver.networks[NETWORK].endpoints) == 2)
    del engine.networks[NETWORK][ENDPOINT]
    return driver, docker


@pytest.mark.parametrize("method", ["CreateEndpoint", "DeleteEndpoint"])
def test_what_was_lost_on_its_way_is_found(engine: Listed, serve: Serve, method: str) -> None:
    """The plugin was killed with the request; the engine repeats it without its content, and asks no more."""
    driver, docker = with_one_that_docker_forgets(engine, serve)
    assert stays(lambda: len(driver.networks[NETWORK].endpoints) == 2), "nobody has told of it"
    assert docker.plugin.handle(f"/NetworkDriver.{method}", b"").status == 400
    wait_for(lambda: set(driver.networks[NETWORK].endpoints) == {OTHER_ENDPOINT}, "the removal")


def test_what_docker_forgets_without_a_word_is_found(engine: Listed, serve: Serve) -> None:
    """As an engine with live-restore does that was killed: when it is back it calls nobody."""
    driver, docker = with_one_that_docker_forgets(
        engine, partial(serve, timings=structs.replace(SHORT, compare_every=0.1))
    )
    wait_for(lambda: set(driver.networks[NETWORK].endpoints) == {OTHER_ENDPOINT}, "the removal")
    assert docker.plugin.repairs["unknown_to_docker"] == 1


def test_an_engine_that_is_away_for_long_is_still_asked(
    engine: Listed, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    timings = structs.replace(SHORT, query_expires=0.1, query_retry_slow=0.2)
    driver, docker = served_and_listed(engine, partial(serve, timings=timings))
    engine.broken = True
    docker.plugin.reconcile()
    wait_for(lambda: "does not answer" in caplog.text, "the warning")
    asked = len(engine.asked)
    wait_for(lambda: len(engine.asked) > asked + 2, "more questions")
    assert caplog.text.count("does not answer") == 1
    engine.broken, engine.networks = False, {}
    wait_for(lambda: not driver.networks, "the removal, once it answers")


ENDED: dict[str, tuple[dict[str, dict[str, str]], str, tuple[str, dict[str, Any]]]] = {
    "a network, of another one": ({}, "delete_network", ("DeleteNetwork", of(OTHER_NETWORK))),
    "an endpoint's network": (
        {NETWORK: {}, OTHER_NETWORK: {}},
        "delete_endpoint",
        ("DeleteNetwork", of(OTHER_NETWORK)),
    ),
    "an endpoint": (
        {NETWORK: {}, OTHER_NETWORK: {}},
        "delete_endpoint",
        ("DeleteEndpoint", of(OTHER_NETWORK, OTHER_ENDPOINT)),
    ),
}


@pytest.mark.parametrize("case", ENDED.values(), ids=ENDED)
def test_what_docker_deletes_while_something_else_is_removed(
    engine: Listed, serve: Serve, caplog: pytest.LogCaptureFixture, case: Any
) -> None:
    """Two are missing; while the first is removed Docker asks for the end of the second."""
    left, hook, request_ = case
    driver = Recorder()
    docker = serve(driver)
    engine.networks = {NETWORK: {ENDPOINT: "c1"}, OTHER_NETWORK: {OTHER_ENDPOINT: "c2"}}
    for network, endpoint in ((NETWORK, ENDPOINT), (OTHER_NETWORK, OTHER_ENDPOINT)):
        docker("CreateNetwork", create_network(network))
        docker.run(network, endpoint)
    assert stays(lambda: len(driver.networks) == 2)
    ended: list[object] = []

    def end_another(record: object) -> None:
        if not ended:
            ended.append(record)
            docker(*request_)

    driver.hooks[hook] = end_another
    engine.networks = left
    docker.plugin.reconcile()
    wait_for(lambda: ended and not any(n.endpoints for n in driver.networks.values()), "the removal")
    assert stays(lambda: "Traceback" not in caplog.text)
    assert docker.plugin.repairs["unknown_to_docker"] == 1
    assert docker.plugin.repairs["failed"] == 0


# Losses


class Clock:
    """Passes only while a repair waits, which nobody ends."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        return False

    def set(self) -> None:
        pass


def test_what_vanishes_again_and_again_is_repaired_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(recovery, "time", clock)
    with Plugin(Recorder()) as plugin:
        networks: Any = plugin._networks
        networks._recovery._closing = clock

        def lose(times: int) -> list[float]:
            clock.waits.clear()
            for _ in range(times):
                losses.publish("br-1 vanished")
                networks._recovery._worker.wait()
            return clock.waits

        assert lose(10) == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]
        clock.now += 30.0  # not yet
        assert lose(1) == [30.0]
        clock.now += 30.1  # calm
        assert lose(2) == [0.2, 0.4]
        assert plugin.repairs["lost"] == 13


def test_the_end_waits_for_a_repair_that_has_begun() -> None:
    driver, begun, ended = Recorder(), threading.Event(), threading.Event()
    too_early: list[bool] = []

    def repair(_: object) -> None:
        begun.set()
        too_early.append(ended.wait(MOMENT))

    with Plugin(driver, timings=Timings(repair_delay_min=0.0)) as plugin:
        Docker(plugin)("CreateNetwork", create_network())
        driver.hooks = {"create_network": repair}
        losses.publish("br-1 vanished")
        assert begun.wait(PATIENCE)
    ended.set()
    assert too_early == [False]


# Containers


class Curious(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, Container]] = []

    def container_attached(self, network: Network[Options], endpoint: Endpoint, container: Container) -> None:
        self.told.append((endpoint.id, container))
        self.called("container_attached", endpoint)


def test_a_driver_is_told_of_the_container_and_it_is_kept(engine: Listed, serve: Serve) -> None:
    driver = Curious()
    docker = serve(driver)
    engine.networks, engine.containers = {NETWORK: {ENDPOINT: CONTAINER["Id"]}}, [CONTAINER]
    docker("CreateNetwork", create_network())
    docker.run()
    wait_for(lambda: driver.networks[NETWORK].endpoints[ENDPOINT].container == WEB, "the container")
    assert driver.told == [(ENDPOINT, WEB)]
    assert (WEB.compose_project, WEB.compose_service) == ("shop", "web")
    again = Curious()
    serve(again)
    assert again.networks[NETWORK].endpoints[ENDPOINT].container == WEB
    assert stays(lambda: not again.told)


def test_it_is_asked_again_until_the_engine_knows(engine: Listed, serve: Serve) -> None:
    driver = Curious()
    docker = serve(driver)
    docker("CreateNetwork", create_network())
    engine.broken = True
    docker.run()
    wait_for(lambda: len(engine.asked) > 1, "a second question")
    engine.broken, engine.networks = False, {NETWORK: {ENDPOINT: "ep-1"}}  # created, and not yet in its container
    engine.asked.clear()
    wait_for(lambda: engine.asked.count(f"/networks/{NETWORK}") > 1, "a question after an answer of it")
    assert not driver.told
    engine.networks, engine.containers = {NETWORK: {ENDPOINT: CONTAINER["Id"]}}, [CONTAINER]
    wait_for(lambda: driver.told, "the container")


def test_what_left_meanwhile_is_not_told_of(engine: Listed, serve: Serve) -> None:
    driver = Curious()
    docker = serve(driver)
    docker("CreateNetwork", create_network())
    docker.run()
    docker("Leave", of(NETWORK, ENDPOINT))
    engine.networks, engine.containers = {NETWORK: {ENDPOINT: CONTAINER["Id"]}}, [CONTAINER]
    assert stays(lambda: not driver.told)
    docker("Join", joining())
    wait_for(lambda: driver.told, "the container")


def test_an_error_in_it_is_logged_and_asked_for_no_more(
    engine: Listed, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Curious()
    driver.fails["container_attached"] = ValueError("no")
    docker = serve(driver)
    engine.networks, engine.containers = {NETWORK: {ENDPOINT: CONTAINER["Id"]}}, [CONTAINER]
    docker("CreateNetwork", create_network())
    docker.run()
    wait_for(lambda: "ValueError: no" in caplog.text, "the traceback")
    assert stays(lambda: len(driver.told) == 1)


# No call from inside a call


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))


@pytest.mark.parametrize(
    ("ask", "what"),
    [
        (lambda path: Engine(path).call("GET", "/info"), "GET /info"),
        (connect, "a connection"),
        (lambda _: subprocess.run(["docker", "ps"], check=True), "the program docker"),
        (lambda _: subprocess.run(["/usr/bin/docker", "ps"], check=True), "the program /usr/bin/docker"),
    ],
    ids=["by the SDK", "by a socket", "by the program", "by its path"],
)
def test_docker_is_not_asked_from_inside_a_call(
    engine: Listed, serve: Serve, tmp_path: Path, ask: Callable[[Path], object], what: str
) -> None:
    driver = Recorder()

    def hook(_: object) -> None:
        ask(tmp_path / "docker.sock")

    driver.hooks["create_endpoint"] = hook
    docker = serve(driver)
    engine.networks = {NETWORK: {}}
    docker("CreateNetwork", create_network())
    wait_for(lambda: stored(driver)[NETWORK].row.engine, "the SDK's own question")
    engine.asked.clear()
    status, text = docker.refused("CreateEndpoint", create_endpoint())
    assert status == 500
    assert text == (
        f"NetworkDriver.CreateEndpoint must not ask Docker ({what}): Docker waits for its answer, and both may wait "
        "forever; NetworkDriver.container_attached tells of containers"
    )
    assert not engine.asked


def test_other_sockets_and_programs_are_as_ever(serve: Serve, tmp_path: Path) -> None:
    done = []

    def ask(_: object) -> None:
        with socketserver.UnixStreamServer(str(tmp_path / "other.sock"), socketserver.StreamRequestHandler):
            connect(tmp_path / "other.sock")
        done.append(subprocess.run(["true"], check=True).returncode)

    driver = Recorder()
    driver.hooks["create_network"] = ask
    serve(driver)("CreateNetwork", create_network())
    assert done == [0]


def test_a_thread_of_the_drivers_own_may_ask(engine: Listed, serve: Serve, tmp_path: Path) -> None:
    said: list[Any] = []

    def ask(_: object) -> None:
        thread = threading.Thread(target=lambda: said.append(Engine(tmp_path / "docker.sock").call("GET", "/info")))
        thread.start()
        thread.join()

    driver = Recorder()
    driver.hooks["create_network"] = ask
    serve(driver)("CreateNetwork", create_network())
    assert said == [{"ID": engine.id}]


# Losses


def test_a_loss_makes_the_drivers_own_methods_bring_it_back(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)

    class Restorer(Publisher):
        def restore_endpoint(self, network: Network[Options], endpoint: Endpoint) -> None:
            self.called("restore_endpoint", endpoint)

    driver = Restorer()
    docker = serve(driver)
    docker("CreateNetwork", create_network())
    docker.run()
    docker("ProgramExternalConnectivity", publishing())
    docker("CreateEndpoint", create_endpoint(endpoint=OTHER_ENDPOINT))
    driver.since()
    pauses: list[float] = []
    burst = threading.Event()

    def wait(pause: float) -> bool:
        pauses.append(pause)
        assert burst.wait(PATIENCE)
        return False

    monkeypatch.setattr(half(docker)._recovery._closing, "wait", wait)
    for _ in range(10):
        losses.publish("interface br-1 is gone")
    burst.set()
    wait_for(lambda: "program 18080" in driver.calls, "the repair")
    wait_for(lambda: "1 of 1 networks are restored" in caplog.text, "what it says of it")
    assert driver.since() == ["create_network", "restore_endpoint", "program 18080"]
    assert "interface br-1 is gone: bringing it back" in caplog.text
    for _ in range(3):  # somebody does it again and again
        losses.publish("interface br-1 is gone")
        wait_for(lambda: "program 18080" in driver.calls, "the next repair")
        driver.since()
    assert pauses == [0.2, 0.4, 0.8, 1.6]
    docker.plugin.close()
    losses.publish("interface br-1 is gone")
    assert stays(lambda: not driver.calls)


def test_what_cannot_be_brought_back_does_not_keep_the_others(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    driver = Recorder()
    docker = serve(driver)
    docker("CreateNetwork", create_network())
    docker("CreateNetwork", create_network(OTHER_NETWORK))

    def fail(network: Network[Options]) -> None:
        if network.id == NETWORK:
            raise ValueError("no")

    driver.hooks["create_network"] = fail
    docker.plugin.reconcile()
    wait_for(lambda: "1 of 2 networks are restored" in caplog.text, "the repair")
    assert "ValueError: no" in caplog.text
    docker("DeleteNetwork", of())
    docker("DeleteNetwork", of(OTHER_NETWORK))


def test_what_is_deleted_while_another_is_restored_stays_deleted(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    driver = Recorder()
    docker = serve(driver)
    docker("CreateNetwork", create_network())
    docker("CreateNetwork", create_network(OTHER_NETWORK))
    driver.since()
    driver.hooks["create_network"] = lambda _: docker("DeleteNetwork", of(OTHER_NETWORK))
    docker.plugin.reconcile()
    wait_for(lambda: "2 of 2 networks are restored" in caplog.text, "the repair")
    assert driver.since() == ["create_network", "delete_network"]


def test_what_cannot_be_undone_is_not_restored(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    driver = Publisher()
    docker = serve(driver)
    docker("CreateNetwork", create_network())
    docker.run()
    docker("ProgramExternalConnectivity", publishing())
    driver.fails = {"delete_endpoint": DriverError("busy")}
    docker.refused("DeleteEndpoint", of(NETWORK, ENDPOINT))
    driver.since()
    docker.plugin.reconcile()
    wait_for(lambda: "1 of 1 networks are restored" in caplog.text, "the repair")
    assert driver.since() == ["delete_endpoint", "create_network"]
    driver.fails = {}
    docker("DeleteEndpoint", of(NETWORK, ENDPOINT))


class Told(PoolIpamDriver):
    """Wants to learn it `more` times more."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, list[str]]] = []
        self.more = 0

    def engine_has(self, engine: str, pools: Sequence[UsedPool]) -> bool:
        self.told.append((engine, [str(pool.network) for pool in pools]))
        self.more -= 1
        return self.more >= 0


def test_an_ipam_driver_is_told_what_the_engine_has(engine: Listed, tmp_path: Path) -> None:
    driver = Told()
    engine.networks["a"] = {}
    with Plugin(driver, docker=tmp_path / "docker.sock", timings=SHORT) as plugin:
        wait_for(lambda: driver.told == [("engine 1", [])], "the plugin's start")
        engine.pools["b"] = "10.1.0.0/24"
        occasions: dict[str, Callable[[], object]] = {
            "a request": partial(plugin.handle, "/IpamDriver.RequestPool", b'{"AddressSpace": "LocalDefault"}'),
            "an engine's start": partial(plugin.handle, "/IpamDriver.GetCapabilities", b"{}"),
            "SIGHUP": plugin.reconcile,
        }
        for occasion, happen in occasions.items():
            driver.told.clear()
            happen()
            wait_for(lambda: driver.told == [("engine 1", ["10.1.0.0/24"])], occasion)
        driver.more = 2
        driver.told.clear()
        plugin.reconcile()
        wait_for(lambda: len(driver.told) == 3, "what it wants to learn again")
        assert stays(lambda: len(driver.told) == 3)


def test_an_ipam_driver_that_does_not_want_to_know_is_not_told(engine: Listed, tmp_path: Path) -> None:
    class Deaf(Told):
        engine_has = IpamDriver.engine_has

    with Plugin(Deaf(), docker=tmp_path / "docker.sock") as plugin:
        plugin.handle("/IpamDriver.GetCapabilities", b"{}")
        plugin.reconcile()
        assert stays(lambda: not engine.asked)
