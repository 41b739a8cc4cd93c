"""The whole plugin over a long time, and under many hands."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import sqlite3
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from netplugin_sdk import DriverError, Endpoint, Later, Network, NetworkDriver, Plugin
from netplugin_sdk.serving.loop import Server

from ..patience import PATIENCE
from ..volume import volume
from .lab import SANDBOX, Docker, Options, Publisher, create_endpoint, create_network, joining, of, publishing
from .serving import connect_unix, nothing_left, open_files, post, tasks, wait_for


@pytest.fixture(autouse=True)
def silent(caplog: pytest.LogCaptureFixture) -> None:
    """Failures and warnings are wanted here, and pytest would keep them all."""
    caplog.set_level(logging.CRITICAL, "netplugin_sdk")


def rows(folder: Path) -> int:
    """How many there are in the file of a closed plugin."""
    db = sqlite3.connect(folder / "state.db")
    found = [db.execute(f"SELECT * FROM {table}").fetchall() for table in ("networks", "endpoints", "joins")]
    db.close()
    return sum(map(len, found))


# --------------------------------------------------------------------------------------------------------- long life


class Builder(Publisher):
    """Notes nothing; leaves half of its deletions for after the answer."""

    def called(self, method: str, of: object = None) -> None:
        if method in self.fails:
            raise self.fails[method]

    def delete_endpoint(self, network: Network[Options], endpoint: Endpoint) -> Later | None:
        return None if int(endpoint.id, 16) % 2 else Later(lambda: None)


def life(docker: Docker, number: int) -> None:
    """A network with a container, from the first call to the last; repetitions, refusals and failures among them."""
    network, endpoint = f"{number:064x}", f"{number + 1:064x}"
    docker("CreateNetwork", create_network(network))
    docker("CreateNetwork", create_network(network))
    docker.refused("CreateNetwork", create_network(network, mtu="1400"))
    docker.run(network, endpoint)
    docker("ProgramExternalConnectivity", publishing(network, endpoint))
    docker.refused("Join", joining(network, "f" * 64))
    docker("RevokeExternalConnectivity", of(network, endpoint))
    docker("Leave", of(network, endpoint))
    docker("DeleteEndpoint", of(network, endpoint))
    docker("DeleteNetwork", of(network))
    docker("DeleteNetwork", of(network))


@pytest.mark.untraced
def test_a_plugin_does_not_grow(tmp_path: Path) -> None:
    """Many networks and containers later it has what it had: memory, descriptors, threads, bytes on disk."""
    settled, lives = 500, volume(1_000, 10_000)

    def size() -> dict[str, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {
            "resident": pages * os.sysconf("SC_PAGE_SIZE"),
            "objects": sys.getallocatedblocks(),
            "on disk": sum(file.stat().st_size for file in tmp_path.iterdir()),
        }

    driver, threads = Builder(), len(tasks())
    with Plugin(driver, state=tmp_path) as plugin:
        docker = Docker(plugin)
        for number in range(settled):  # until SQLite's log has been moved into the file, and begun again
            life(docker, number)
        before, files = size(), open_files()
        for number in range(settled, settled + lives):
            if number % 10 == 0:
                driver.fails = {"create_network": ValueError("a bug"), "delete_network": DriverError("and more")}
                docker.refused("CreateNetwork", create_network(f"{number:064x}"))
                driver.fails = {}
            life(docker, number)
        after = size()
        assert after["resident"] - before["resident"] < 1_000_000, (before, after)
        assert after["objects"] - before["objects"] < max(250, lives // 10), (before, after)
        assert after["on disk"] - before["on disk"] < 100_000, (before, after)
        assert open_files() == files
        wait_for(lambda: len(tasks()) <= threads, "threads to end")
    assert rows(tmp_path) == 0


# -------------------------------------------------------------------------------------------------------- many hands

NETWORKS = [f"{number:02d}{'0' * 62}" for number in range(50)]
DOOMED, LASTING = NETWORKS[:10], NETWORKS[10:]
HANDS, CALLS = 25, 40

Shown: TypeAlias = dict[str, dict[str, tuple[str | None, int | None]]]
"""Network → endpoint → its sandbox and its port, as far as it has them."""


def shown(driver: NetworkDriver[Any]) -> Shown:
    """What the SDK shows of what it remembers."""
    return {
        network.id: {
            endpoint.id: (
                None if endpoint.sandbox is None else endpoint.sandbox.key,
                None if endpoint.external is None else endpoint.external.port_map[0].host_port,
            )
            for endpoint in network.endpoints.values()
        }
        for network in driver.networks.values()
    }


class Careful(Publisher):
    """Takes its time now and then, and complains when calls on one network overlap or something is made twice."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[str, ...]] = set()
        self.complaints: list[str] = []
        self._busy: set[str] = set()
        self._chance = random.Random(1)

    def called(self, method: str, of: object = None) -> None:
        assert isinstance(of, Network | Endpoint)
        network, me = of.id if isinstance(of, Network) else of.network_id, (of.id,)
        if network in self._busy:
            self.complaints.append(f"{method} {of!r} while another call is at it")
        self._busy.add(network)
        time.sleep(self._chance.choice((0.0, 0.0, 0.0, 0.001, 0.01)))
        what = method.partition(" ")[0]
        kind, makes = {
            "create_network": ("network", True),
            "delete_network": ("network", False),
            "create_endpoint": ("endpoint", True),
            "delete_endpoint": ("endpoint", False),
            "join": ("join", True),
            "leave": ("join", False),
            "program": ("ports", True),
            "revoke": ("ports", False),
        }[what]
        fact = (kind, network, *me)
        if (fact in self.made) is makes and kind != "ports":  # other ports replace those
            self.complaints.append(f"{method} {of!r} once too often")
        (self.made.add if makes else self.made.discard)(fact)
        self._busy.discard(network)


class Hand:
    """Somebody who calls. Its endpoints are its own, networks are everybody's."""

    def __init__(self, number: int, path: Path) -> None:
        self.number, self.path = number, path
        self.chance = random.Random(number)
        self.asked = 0
        self.networks: set[str] = set()
        self.endpoints: dict[tuple[str, str], tuple[str | None, int | None]] = {}

    def work(self) -> None:
        with connect_unix(self.path) as one, connect_unix(self.path) as other:
            self.clients = one, other
            for call in range(CALLS):
                if call == CALLS // 2 and self.number < len(DOOMED):
                    self.ask("DeleteNetwork", of(DOOMED[self.number]))
                else:
                    self.any_call(call)

    def any_call(self, call: int) -> None:
        mine = list(self.endpoints)
        kind = self.chance.choice(("network", "endpoint", *["next"] * 4))
        if kind == "network":
            network = self.chance.choice(LASTING)
            self.ask("CreateNetwork", create_network(network))
            self.networks.add(network)
        elif kind == "endpoint" or not mine:
            network, endpoint = self.chance.choice(NETWORKS), f"{self.number:02d}{call:02d}{'e' * 60}"
            if self.ask("CreateEndpoint", create_endpoint(network, endpoint), or_unknown=True):
                self.endpoints[network, endpoint] = None, None
        else:
            self.go_on(*self.chance.choice(mine))

    def go_on(self, network: str, endpoint: str) -> None:
        """Something else with an endpoint. That of a doomed network may be gone."""
        joined, port = self.endpoints[network, endpoint]
        at = of(network, endpoint)
        doomed = network in DOOMED
        match self.chance.choice(("Join", "Join", "Program", "Program", "Revoke", "Leave", "Delete")):
            case "Join":
                if self.ask("Join", joining(network, endpoint, SANDBOX), or_unknown=doomed):
                    self.endpoints[network, endpoint] = SANDBOX, port
            case "Program":
                port = self.chance.randrange(1, 65536)
                asked = publishing(network, endpoint, port)
                if self.ask("ProgramExternalConnectivity", asked, or_unknown=doomed):
                    self.endpoints[network, endpoint] = joined, port
            case "Revoke":
                self.ask("RevokeExternalConnectivity", at)
                self.endpoints[network, endpoint] = joined, None
            case "Leave":
                self.ask("Leave", at)
                if joined is not None:
                    self.endpoints[network, endpoint] = None, None
            case "Delete":
                self.ask("DeleteEndpoint", at)
                del self.endpoints[network, endpoint]

    def ask(self, method: str, request: dict[str, Any], *, or_unknown: bool = False) -> bool:
        """Whether it succeeded; now and then by two copies at once, which have the same answer."""
        clients = self.clients if self.chance.random() < 0.2 else self.clients[:1]
        for client in clients:
            client.send(post(json.dumps(request).encode(), method=f"NetworkDriver.{method}"))
        replies = [client.receive() for client in clients]
        self.asked += len(replies)
        statuses = {reply.status for reply in replies}
        # Between the copies the network may have been made, or deleted by somebody else.
        assert statuses <= ({200, 422} if or_unknown else {200}), (method, request, replies)
        return 200 in statuses


def test_a_thousand_calls_from_many_hands_at_once(tmp_path: Path) -> None:
    driver, state, path = Careful(), tmp_path / "state", tmp_path / "s.sock"
    with nothing_left():
        with Plugin(driver, state=state) as plugin, Server(plugin) as server:
            for network in DOOMED:
                Docker(plugin)("CreateNetwork", create_network(network))
            server.listen_unix(path)
            serving = threading.Thread(target=server.run, daemon=True)
            serving.start()
            hands = [Hand(number, path) for number in range(HANDS)]
            with ThreadPoolExecutor(HANDS) as threads:
                for done in [threads.submit(hand.work) for hand in hands]:
                    done.result(PATIENCE)
            said: Shown = {network: {} for hand in hands for network in hand.networks}
            for hand in hands:
                for (network, endpoint), content in hand.endpoints.items():
                    if network in LASTING:
                        said[network][endpoint] = content
            remembered = shown(driver)
            server.stop()
            serving.join(PATIENCE)
        again = Publisher()
        with Plugin(again, state=state):
            assert shown(again) == said
    assert remembered == said
    assert driver.complaints == []
    assert driver.made == {
        *(("network", network, network) for network in said),
        *(("endpoint", network, endpoint) for network, there in said.items() for endpoint in there),
        *(("join", n, e) for n, there in said.items() for e, (sandbox, _) in there.items() if sandbox is not None),
        *(("ports", n, e) for n, there in said.items() for e, (_, port) in there.items() if port is not None),
    }
    assert sum(hand.asked for hand in hands) >= 1_000
    contents = Counter(content for there in said.values() for content in there.values())
    assert len(said) > 30, said
    assert contents[None, None], contents
