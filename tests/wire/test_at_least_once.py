"""At least once: whichever answers are lost, repeated requests have the same effect as requests that come once.

The test delivers each recorded request in all the ways that an engine's retries, or the death of the plugin, can cause.
It compares the state on disk after each request, since at the end of a conversation nothing is left anyway.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest

from netplugin_sdk import (
    AddressRequest,
    Endpoint,
    EndpointInterface,
    IpamDriver,
    Join,
    MacAddress,
    Network,
    NetworkDriver,
    Plugin,
    Pool,
    PoolRequest,
    Sandbox,
)
from netplugin_sdk.core.calls import Call
from netplugin_sdk.core.plugin import Answer
from netplugin_sdk.serving.loop import Server
from netplugin_sdk.values import IPInterface

from ..patience import PATIENCE
from ..unit.serving import Client, Reply, connect_unix, nothing_left, post
from ..volume import FULL
from .test_replay import REQUESTS, RESTARTS, Checking, Notes, Options, RecordedAddresses, lines

ASKING = {"NetworkDriver.EndpointOperInfo", "NetworkDriver.GwAllocCheck"}
"""Methods that change nothing, and so run for each copy; as all of an IpamDriver, whose requests have no id."""
WITHOUT_BODY = {
    "Plugin.Activate",
    "NetworkDriver.GetCapabilities",
    "IpamDriver.GetCapabilities",
    "IpamDriver.GetDefaultAddressSpaces",
}


# --------------------------------------------------------------------------------------------------------- the plugin


@dataclass(frozen=True)
class Kept:
    """Attached data: the object that it belongs to, and how often its method ran."""

    what: str
    times: int = 1


class Networks(Checking):
    """Attaches data, and gives the MAC addresses in turn: so what runs twice is seen in answers and on disk."""

    def create_network(self, network: Network[Options]) -> None:
        super().create_network(network)
        network.attach(Kept(str(network.subnets)))

    def create_endpoint(  # type: ignore[override]  # the recorded plugin gave none
        self, network: Network[Options], endpoint: Endpoint
    ) -> EndpointInterface | None:
        super().create_endpoint(network, endpoint)
        if endpoint.requested.mac_address is not None:
            return None
        number = [method for method, _ in self.notes].count("NetworkDriver.CreateEndpoint")
        return EndpointInterface(mac_address=MacAddress(f"02:00:00:00:00:{number:02x}"))

    def join(self, network: Network[Options], endpoint: Endpoint, sandbox: Sandbox) -> Join:
        before = endpoint.attached(Kept)
        endpoint.attach(Kept(sandbox.key, 1 if before is None else before.times + 1))
        return super().join(network, endpoint, sandbox)


class Addresses(RecordedAddresses):
    """Does not count what it gives to a repetition that asks for any: the conversation goes on with the first."""

    def request_pool(self, request: PoolRequest) -> Pool:
        before = dict(self.taken)
        pool = super().request_pool(request)
        if request.pool is None and self.repeated:
            self.taken = before
        return pool

    def request_address(self, request: AddressRequest) -> IPInterface:
        before = set(self.taken.get(request.pool_id, ()))
        address = super().request_address(request)
        if request.address is None and self.repeated:
            self.taken[request.pool_id] = before
        return address

    @property
    def repeated(self) -> bool:
        return self.notes[-2:-1] == self.notes[-1:]


class Telling(Plugin):
    """Tells that it has answered, also where the answer is lost."""

    def __init__(self, *drivers: NetworkDriver[Any] | IpamDriver, state: Path) -> None:
        self.answered = threading.Semaphore(0)
        super().__init__(*drivers, state=state)

    def handle(self, path: str, body: bytes, call: Call | None = None) -> Answer:
        answer = super().handle(path, body, call)
        self.answered.release()
        return answer


class Stage(ABC):
    """A plugin that is served on a socket, and starts again from what is on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder / "state", folder / "s.sock"
        self._start()

    @abstractmethod
    def drivers(self) -> tuple[NetworkDriver[Any] | IpamDriver, ...]:
        """Those of a process that starts."""

    def _start(self) -> None:
        self.plugin = Telling(*self.drivers(), state=self.folder)
        self._server = Server(self.plugin)
        self._server.listen_unix(self.path)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()

    def restart(self) -> None:
        """Another process in its place."""
        self.close()
        self._start()

    def close(self) -> None:
        self._server.stop()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self._server.__exit__()
        self.plugin.close()

    def connect(self) -> Client:
        return connect_unix(self.path)

    def wait(self, answers: int) -> None:
        """Until it has answered so many requests more."""
        for _ in range(answers):
            assert self.plugin.answered.acquire(timeout=PATIENCE), "a request was never answered"

    def rows(self) -> list[tuple[Any, ...]]:
        """The state on disk, without keys; read from a copy, since the plugin locks the file."""
        copy = self.folder.with_name("copy")
        shutil.copytree(self.folder, copy)
        db = sqlite3.connect(copy / "state.db")
        db.execute("PRAGMA synchronous = OFF")  # closing it takes the log into the file
        found = [row for select in SELECTS for row in db.execute(select)]
        db.close()
        shutil.rmtree(copy)
        return sorted(found, key=repr)


SELECTS = (
    "SELECT id, request, intent, data FROM networks",
    "SELECT network_id, id, endpoints.request, intent, endpoints.answer, external_request, data,"
    " joins.request, joins.answer FROM endpoints LEFT JOIN joins USING (key)",
    "SELECT 'nobody''s join', request, answer FROM joins WHERE key NOT IN (SELECT key FROM endpoints)",
)


class Recorded(Stage):
    """The recorded plugin, and what it was asked."""

    def __init__(self, folder: Path, *, ipam: bool) -> None:
        self.notes = Notes()
        self.addresses = Addresses(self.notes)
        self._ipam = ipam
        super().__init__(folder)

    def drivers(self) -> tuple[NetworkDriver[Any] | IpamDriver, ...]:
        networks = Networks(self.notes)
        return (networks, self.addresses) if self._ipam else (networks,)

    def _start(self) -> None:
        before = len(self.notes)
        super()._start()
        del self.notes[before:]  # from the plugin's restore


# -------------------------------------------------------------------------------------------------------- deliveries


def in_turn(copies: int, stage: Stage, method: str, body: bytes) -> list[Reply]:
    """The engine got no further than the answer."""
    replies = []
    with stage.connect() as client:
        for _ in range(copies):
            client.send(post(body, method=method))
            replies.append(client.receive())
    stage.wait(copies)
    return replies


def at_once(stage: Stage, method: str, body: bytes) -> list[Reply]:
    """The engine gave the first up while the plugin was at it."""
    with stage.connect() as one, stage.connect() as other:
        for client in (one, other):
            client.send(post(body, method=method))
        replies = [one.receive(), other.receive()]
    stage.wait(2)
    return replies


def lose(stage: Stage, method: str, body: bytes) -> None:
    """Nobody is there to read the answer."""
    with stage.connect() as client:
        client.send(post(body, method=method))


def lost(stage: Stage, method: str, body: bytes) -> list[Reply]:
    lose(stage, method, body)
    replies = in_turn(1, stage, method, body)
    stage.wait(1)
    return replies


def drained(stage: Stage, method: str, body: bytes) -> list[Reply]:
    """The engine's retry has lost its body (moby pkg/plugins/client.go); its user tries again."""
    lose(stage, method, body)
    (reply,) = in_turn(1, stage, method, b"")
    assert reply.status == (200 if method in WITHOUT_BODY else 400)
    stage.wait(1)
    return in_turn(1, stage, method, body)


def restarted(stage: Stage, method: str, body: bytes) -> list[Reply]:
    """The plugin ended between the change and the repetition."""
    lose(stage, method, body)
    stage.wait(1)
    stage.restart()
    return in_turn(1, stage, method, body)


Delivery: TypeAlias = Callable[[Stage, str, bytes], list[Reply]]
"""Sends a request and gives back the answers that were read."""

DELIVERIES: dict[str, tuple[int, Delivery]] = {
    "once": (1, partial(in_turn, 1)),
    "twice": (2, partial(in_turn, 2)),
    "three times": (3, partial(in_turn, 3)),
    "two at once": (2, at_once),
    "the answer is lost": (2, lost),
    "the answer is lost, and the body": (2, drained),
    "the answer is lost, and the plugin starts again": (2, restarted),
}
"""How many whole copies the plugin gets of a request, and how."""


# ------------------------------------------------------------------------------------------------------ conversations


class Step(NamedTuple):
    """A request and what came of it."""

    method: str
    asks_for_any: bool
    answers: list[tuple[int, Any]]
    noted: list[tuple[str, dict[str, Any]]]
    rows: list[tuple[Any, ...]]
    taken: dict[str, set[str]]


def directly(stage: Stage, method: str, body: bytes) -> list[Reply]:
    answer = stage.plugin.handle(f"/{method}", body)
    stage.wait(1)
    return [Reply(answer.status, {}, answer.body)]


def played(recording: str, folder: Path, deliver: Delivery) -> list[Step]:
    folder.mkdir()
    stage = Recorded(folder, ipam=recording.endswith("-ipam"))
    steps = []
    for line in lines(recording):
        if (mark := line.get("mark")) is not None:
            if mark in RESTARTS:
                stage.addresses = Addresses(stage.notes)  # its author writes nothing down
                stage.restart()
            continue
        method, request, before = line["method"], line["request"], len(stage.notes)
        body = b"" if line["raw_empty"] else json.dumps(request).encode()
        answers = [(reply.status, json.loads(reply.body)) for reply in deliver(stage, method, body)]
        steps.append(
            Step(
                method=method,
                asks_for_any=method.startswith("IpamDriver.Request")
                and not request[method[len("IpamDriver.Request") :]],
                answers=answers,
                noted=stage.notes[before:],
                rows=stage.rows(),
                taken={pool: set(taken) for pool, taken in stage.addresses.taken.items()},
            )
        )
    stage.close()
    return steps


NEWEST = "engine-28.5"
CASES = [
    (recording, delivery)
    for recording in REQUESTS
    for delivery in DELIVERIES
    # An older engine asks for much the same: of that, by default, only the delivery that does the most.
    if FULL or recording.startswith(NEWEST) or "starts again" in delivery
]


@pytest.fixture(scope="module")
def recording(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def plain(recording: str, tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    """The conversation with each request once, and every answer got."""
    return played(recording, tmp_path_factory.mktemp("plain") / recording, directly)


@pytest.mark.parametrize(("recording", "delivery"), CASES, indirect=["recording"])
def test_a_conversation_that_is_repeated(recording: str, delivery: str, plain: list[Step], tmp_path: Path) -> None:
    copies, deliver = DELIVERIES[delivery]
    with nothing_left():
        repeated = played(recording, tmp_path / "repeated", deliver)
    assert len(plain) == len(repeated) == REQUESTS[recording]
    assert sum(bool(step.rows) for step in plain) > 40  # else it would say nothing that they are the same
    for one, other in zip(plain, repeated, strict=True):
        ((status, content),) = one.answers
        runs = copies if one.method in ASKING or one.method.startswith("IpamDriver") else 1
        noted = other.noted
        if deliver is restarted:
            # A Join leaves no mark before it is done: after a start every endpoint may be half joined, and is left.
            if one.method == "NetworkDriver.Leave":
                runs = 2
            elif one.method == "NetworkDriver.DeleteEndpoint":
                noted = [note for note in noted if note[0] != "NetworkDriver.Leave"]
        assert noted == one.noted * runs
        assert (other.rows, other.taken) == (one.rows, one.taken)
        if one.asks_for_any:
            # Another request, for all that a driver can tell, with another answer.
            assert [status for status, _ in other.answers] == [status] * len(other.answers)
            texts = [json.dumps(content) for _, content in other.answers]
            assert status != 200 or len(set(texts[:2])) == len(texts[:2])
        else:
            assert other.answers == [(status, content)] * len(other.answers)
