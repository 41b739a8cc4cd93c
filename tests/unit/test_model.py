"""A naive model: after any sequence of calls, failures, ends and kills there is what a dictionary would hold.

NETPLUGIN_MODEL=5000 plays so many sequences, others in each run; by default they are few, and the same in each run.
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from netplugin_sdk import (
    DriverError,
    Endpoint,
    EndpointInterface,
    EndpointOptions,
    Join,
    Later,
    MacAddress,
    Network,
    NetworkDriver,
    Plugin,
    Sandbox,
    Unavailable,
)

from ..volume import volume
from .lab import SANDBOX, Docker, Options, create_endpoint, create_network, joining, of, publishing
from .test_endurance import rows, shown

SEQUENCES, STEPS = volume(100, 300), 40
MEMORY = Path("/dev/shm")
"""No power fails here, so no disk need be waited for."""

CREATORS = ("create_network", "create_endpoint", "join", "program", "restore")
REMOVERS = ("delete_network", "delete_endpoint", "leave", "revoke")
TOGETHER = (
    *(CREATORS, REMOVERS, CREATORS + REMOVERS, CREATORS + REMOVERS, ("late work",), ("late work",)),
    *((method,) for method in REMOVERS),
)
"""Methods of the driver that fail in the same call."""
ERRORS = (DriverError("the kernel says no"), Unavailable("not now"), ValueError("a bug"), OSError(5, "and another"))

WEIGHTS = {
    "CreateNetwork": 4,
    "DeleteNetwork": 1,
    "CreateEndpoint": 4,
    "DeleteEndpoint": 2,
    "Join": 6,
    "Leave": 3,
    "ProgramExternalConnectivity": 5,
    "RevokeExternalConnectivity": 8,
}
NEED_AN_ENDPOINT = ("Join", "ProgramExternalConnectivity")
EXTERNAL = {"ProgramExternalConnectivity", "RevokeExternalConnectivity"}
EXISTENCE = {"CreateEndpoint", "DeleteEndpoint"}
ENDPOINTS_REMOVERS = ("revoke", "leave", "delete_endpoint", "late work")

Fact: TypeAlias = tuple[str, ...]
"""Something that a driver has made: what, of which network, of which endpoint."""

Failing: TypeAlias = dict[str, tuple[bool, Exception]]
"""Method of the driver → whether it fails after it has done its work, or before; and how."""


# --------------------------------------------------------------------------------------------------------- the driver


class Builder(NetworkDriver[Options]):
    """Builds in a world that outlives it. It fails as it is told; at one moment what SIGKILL would leave is kept."""

    def __init__(self, world: set[Fact]) -> None:
        self.world = world
        self.late = False
        self.failing: Failing = {}
        self.ran: list[str] = []
        self.raised: dict[str, Exception] = {}
        self.raised_later: dict[str, Exception] = {}
        """After the answer."""
        self.moment = -1
        self.at_moment: Callable[[], None] = lambda: None

    def run(self, method: str, change: Callable[[], object]) -> None:
        self.ran.append(method)
        fails_after, error = self.failing.get(method, (False, None))
        for changed in (False, True):
            if changed:
                change()
            if self.moment == 0:
                self.at_moment()
            self.moment -= 1
            if error is not None and fails_after is changed:
                later = threading.current_thread().name == "late work"
                (self.raised_later if later else self.raised)[method] = error
                raise error

    def make(self, *fact: str) -> None:
        self.world.add(fact)

    def remove(self, *start: str) -> None:
        self.world -= {fact for fact in self.world if fact[: len(start)] == start}

    def later(self, method: str, change: Callable[[], object]) -> Later | None:
        if not self.late:
            self.run(method, change)
            return None
        self.run(method, lambda: None)
        return Later(self.run, "late work", change)

    def create_network(self, network: Network[Options]) -> None:
        self.run("create_network", lambda: self.make("network", network.id))

    def delete_network(self, network: Network[Options]) -> Later | None:
        return self.later("delete_network", lambda: self.remove("network", network.id))

    def create_endpoint(self, network: Network[Options], endpoint: Endpoint) -> EndpointInterface:
        self.run("create_endpoint", lambda: self.make("endpoint", network.id, endpoint.id))
        return EndpointInterface(mac_address=MacAddress.random())

    def delete_endpoint(self, network: Network[Options], endpoint: Endpoint) -> Later | None:
        return self.later("delete_endpoint", lambda: self.remove("endpoint", network.id, endpoint.id))

    def join(self, network: Network[Options], endpoint: Endpoint, sandbox: Sandbox) -> Join:
        self.run("join", lambda: self.make("join", network.id, endpoint.id))
        return Join(endpoint.interface_name("vc"), prefix=f"e{secrets.token_hex(5)}")

    def leave(self, network: Network[Options], endpoint: Endpoint) -> None:
        self.run("leave", lambda: self.remove("join", network.id, endpoint.id))

    def program_external_connectivity(
        self, network: Network[Options], endpoint: Endpoint, options: EndpointOptions
    ) -> None:
        def program() -> None:
            self.remove("port", network.id, endpoint.id)
            self.make("port", network.id, endpoint.id, str(options.port_map[0].host_port))

        self.run("program", program)

    def revoke_external_connectivity(self, network: Network[Options], endpoint: Endpoint) -> None:
        self.run("revoke", lambda: self.remove("port", network.id, endpoint.id))

    def restore_endpoint(self, network: Network[Options], endpoint: Endpoint) -> None:
        self.run("restore", lambda: None)


# ---------------------------------------------------------------------------------------------------------- the model


@dataclass
class ModelEndpoint:
    variant: int
    answer: Any = None
    joined: str | None = None
    join_answer: Any = None
    port: int | None = None
    half: set[str] = field(default_factory=set)
    """Operations that were begun and neither finished nor undone. All but a join are marked on disk."""


@dataclass
class ModelNetwork:
    variant: int
    endpoints: dict[str, ModelEndpoint] = field(default_factory=dict)
    half: bool = False


@dataclass(frozen=True)
class Asked:
    """A request in the words of the model."""

    operation: str
    network: str
    endpoint: str
    variant: int

    @property
    def sandbox(self) -> str:
        return f"{SANDBOX}{self.variant}"

    @property
    def port(self) -> int:
        return 18080 + self.variant

    @property
    def request(self) -> dict[str, Any]:
        match self.operation:
            case "CreateNetwork":
                return create_network(self.network, mtu=str(1400 + self.variant))
            case "CreateEndpoint":
                return create_endpoint(self.network, self.endpoint, variant=self.variant)
            case "Join":
                return joining(self.network, self.endpoint, self.sandbox)
            case "ProgramExternalConnectivity":
                return publishing(self.network, self.endpoint, self.port)
            case "DeleteNetwork":
                return of(self.network)
            case _:
                return of(self.network, self.endpoint)


FEW = ("a" * 64, "b" * 64)
ANYTHING = [Asked(*words) for words in itertools.product(WEIGHTS, FEW, FEW, (0, 1))]
FAILING = st.builds(
    lambda methods, create, remove: {method: create if method in CREATORS else remove for method in methods},
    st.sampled_from(TOGETHER),
    *[st.tuples(st.booleans(), st.sampled_from(ERRORS))] * 2,
)


class Model:
    """What the answers have said."""

    def __init__(self) -> None:
        self.networks: dict[str, ModelNetwork] = {}
        self.ghosts: set[tuple[str, ...]] = set()
        """What is deleted for everybody though something is left of it, since that failed after the answer."""

    def find(self, asked: Asked) -> tuple[ModelNetwork | None, ModelEndpoint | None]:
        network = self.networks.get(asked.network)
        return network, None if network is None else network.endpoints.get(asked.endpoint)

    def is_made_again_first(self, asked: Asked) -> bool:
        """Whether its network is, since it could not be deleted."""
        network, _ = self.find(asked)
        return asked.operation == "CreateEndpoint" and network is not None and network.half

    def is_settled_first(self, asked: Asked) -> bool:
        """Whether what is half done with its endpoint is finished or undone before."""
        _, endpoint = self.find(asked)
        asks_for_it = asked.operation not in ("CreateNetwork", "DeleteNetwork", "DeleteEndpoint")
        return asks_for_it and endpoint is not None and bool(endpoint.half & (EXISTENCE | {"Leave"}))

    def settled(self, network: ModelNetwork, endpoint_id: str) -> None:
        """What is half done with an endpoint is finished or undone."""
        endpoint = network.endpoints[endpoint_id]
        if endpoint.half & EXISTENCE:
            del network.endpoints[endpoint_id]
        elif "Leave" in endpoint.half:
            endpoint.joined = endpoint.port = None
            endpoint.half &= {"Join"}  # it may have been killed in one, afterwards
        elif endpoint.half & EXTERNAL:
            endpoint.port = None
            endpoint.half -= EXTERNAL

    def refusal(self, asked: Asked) -> int | None:
        """The status of the refusal, if it is refused."""
        network, endpoint = self.find(asked)
        match asked.operation:
            case "CreateNetwork":
                other, unknown = network is not None and network.variant != asked.variant, False
            case "CreateEndpoint":
                other, unknown = endpoint is not None and endpoint.variant != asked.variant, network is None
            case "Join":
                other = endpoint is not None and endpoint.joined not in (None, asked.sandbox)
                unknown = endpoint is None
            case operation:
                other, unknown = False, operation == "ProgramExternalConnectivity" and endpoint is None
        return 422 if unknown else 409 if other else None

    def remembered(self, asked: Asked) -> Any:
        """The answer, if the driver is not asked for it."""
        network, endpoint = self.find(asked)
        there, answer = endpoint or ModelEndpoint(-1), {}
        match asked.operation:
            case "CreateNetwork":
                known = network is not None and not network.half
            case "DeleteNetwork":
                known = network is None
            case "CreateEndpoint":
                known, answer = endpoint is not None, there.answer
            case "Join":
                known, answer = there.joined is not None, there.join_answer
            case "ProgramExternalConnectivity":
                known = there.port == asked.port and not there.half & EXTERNAL
            case "RevokeExternalConnectivity":
                known = there.port is None
            case _:
                known = endpoint is None
        return answer if known else None

    def succeeded(self, asked: Asked, content: Any, driver: Builder) -> None:
        network, endpoint = self.find(asked)
        if asked.operation == "CreateNetwork":
            self.networks[asked.network] = ModelNetwork(asked.variant, network.endpoints if network else {})
            return
        assert network is not None
        if asked.operation == "DeleteNetwork":
            del self.networks[asked.network]
            haunted = any(ghost[0] == asked.network for ghost in self.ghosts)
            self.ghosts |= {(asked.network,)} if driver.raised_later or haunted else set()
        elif asked.operation == "CreateEndpoint":
            endpoint = network.endpoints.setdefault(asked.endpoint, ModelEndpoint(asked.variant))
            endpoint.answer = content
            endpoint.half.discard("CreateEndpoint")
        elif asked.operation == "DeleteEndpoint":
            del network.endpoints[asked.endpoint]
            self.ghosts |= {(asked.network, asked.endpoint)} if driver.raised_later else set()
        elif endpoint is not None:
            self._changed(asked, endpoint, content, driver)

    @staticmethod
    def _changed(asked: Asked, endpoint: ModelEndpoint, content: Any, driver: Builder) -> None:
        match asked.operation:
            case "Join":
                endpoint.joined, endpoint.join_answer = asked.sandbox, content
                endpoint.half -= {"Join"} if "join" in driver.ran else set()
            case "Leave" if "leave" in driver.ran:
                endpoint.joined = endpoint.port = None
                endpoint.half -= {"Join", "Leave"} | EXTERNAL
            case "Leave":
                assert endpoint.joined is None
            case "ProgramExternalConnectivity":
                endpoint.port = asked.port
                endpoint.half -= EXTERNAL if "program" in driver.ran else set()
            case "RevokeExternalConnectivity":
                endpoint.port = None
                endpoint.half -= EXTERNAL

    def failed(self, asked: Asked, driver: Builder) -> None:
        """What creates is undone, unless that failed as well. What removes goes on when it is asked for again."""
        network, endpoint = self.find(asked)
        undone = set(driver.raised) <= set(CREATORS)
        if asked.operation == "CreateNetwork" and undone:
            self.networks.pop(asked.network, None)
        elif asked.operation.endswith("Network"):
            network = self.networks.setdefault(asked.network, ModelNetwork(asked.variant))
            network.half = True
        elif network is not None and asked.operation == "CreateEndpoint" and undone:
            network.endpoints.pop(asked.endpoint, None)
        elif network is not None:
            endpoint = network.endpoints.setdefault(asked.endpoint, ModelEndpoint(asked.variant))
            if asked.operation == "Join" and undone:
                endpoint.joined = None
                endpoint.half.discard("Join")
            elif asked.operation == "ProgramExternalConnectivity" and undone:
                endpoint.port = None
                endpoint.half -= EXTERNAL
            else:
                endpoint.half.add(asked.operation)
                if asked.operation == "ProgramExternalConnectivity":
                    endpoint.port = asked.port

    def killed(self, asked: Asked) -> None:
        """Inside of the driver."""
        network, _ = self.find(asked)
        if asked.operation in ("CreateNetwork", "DeleteNetwork"):
            self.networks.pop(asked.network, None)  # the next start removes it
        elif network is not None:
            there = network.endpoints.get(asked.endpoint)
            endpoint = network.endpoints.setdefault(asked.endpoint, ModelEndpoint(asked.variant))
            if asked.operation != "CreateEndpoint" or there is None or there.half & EXISTENCE:
                endpoint.half.add(asked.operation)

    def started(self) -> None:
        """What was half done is finished or undone."""
        self.ghosts.clear()
        self.networks = {id_: network for id_, network in self.networks.items() if not network.half}
        for network in self.networks.values():
            for endpoint_id in list(network.endpoints):
                self.settled(network, endpoint_id)


# -------------------------------------------------------------------------------------------------------- the machine


class Sequences(RuleBasedStateMachine):
    """Calls of all kinds on few objects, in any order, and what may happen in between."""

    happened: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.states = 0
        self.asked: list[Asked] = []
        self.world: set[Fact] = set()
        self.model = Model()
        self.open(self.folder / "0", {})

    def open(self, state: Path, failing: Failing) -> None:
        self.state = state
        self.driver = Builder(self.world)
        self.driver.failing = failing
        self.plugin = Plugin(self.driver, state=state)
        self.docker = Docker(self.plugin)
        note(f"started; ran {self.driver.ran}, raised {self.driver.raised}")

    def teardown(self) -> None:
        try:
            self.reopen(failing={})
            for network in list(self.model.networks):
                self.docker("DeleteNetwork", of(network))
            self.plugin.close()
            assert self.world == set()
            assert rows(self.state) == 0
        finally:
            shutil.rmtree(self.folder)

    @rule(
        how=st.sampled_from(("go on", "go on", "go on", "go on", "again", "anything")),
        pick=st.integers(0, 2**20),
        failing=st.just({}) | st.just({}) | FAILING,
        late=st.booleans(),
        moment=st.just(-1) | st.just(-1) | st.integers(0, 4),
    )
    def ask(self, *, how: str, pick: int, failing: Failing, late: bool, moment: int) -> None:
        choice = {"go on": self.possible(), "again": self.asked[-2:], "anything": ANYTHING}[how]
        if choice := [asked for asked in choice if not self.is_haunted(asked)]:
            asked = choice[pick % len(choice)]
            self.asked.append(asked)
            self.call(asked, failing, late, moment)

    def possible(self) -> list[Asked]:
        """What the driver is asked to do. More often to make than to remove, to get anywhere."""
        model = self.model
        return [
            asked
            for asked in ANYTHING
            if model.is_made_again_first(asked)
            or model.is_settled_first(asked)
            or (model.refusal(asked) is None and model.remembered(asked) is None)
            for _ in range(WEIGHTS[asked.operation])
        ]

    def is_haunted(self, asked: Asked) -> bool:
        """Whether it is about what is gone with something left of it. No engine gives an id twice."""
        ghosts, network, endpoint = self.model.ghosts, (asked.network,), (asked.network, asked.endpoint)
        if asked.operation == "DeleteNetwork":
            return network in ghosts
        return network in ghosts or endpoint in ghosts

    def call(self, asked: Asked, failing: Failing, late: bool, moment: int) -> None:
        driver = self.driver
        driver.failing, driver.late, driver.moment = failing, late or "late work" in failing, moment
        driver.ran, driver.raised, driver.raised_later = [], {}, {}
        kept: list[set[Fact]] = []

        def keep() -> None:
            self.states += 1
            shutil.copytree(self.state, self.folder / f"{self.states}")
            kept.append(set(self.world))

        driver.at_moment = keep
        status, content = self.docker.ask(asked.operation, asked.request)
        networks: Any = self.plugin._networks
        networks._teardown.wait()
        driver.failing, driver.moment = {}, -1
        what = "killed" if kept else f"{status}"
        self.happened[f"{asked.operation} {what}"] += 1
        self.happened["failed after the answer"] += bool(driver.raised_later)
        note(f"{asked}: {what}; ran {driver.ran}, raised {driver.raised | driver.raised_later}")
        if kept:
            self.plugin.close()
            self.world.clear()
            self.world |= kept[0]
            self.open(self.folder / f"{self.states}", {})
            if self.model.is_made_again_first(asked):  # before, or not yet
                self.model.networks[asked.network].half = asked.network not in self.driver.networks
            self.model.killed(asked)
            self.started()
        else:
            self.answered(asked, status, content)

    def answered(self, asked: Asked, status: int, content: Any) -> None:
        model, driver = self.model, self.driver
        if not self.went_first(asked, status, content):
            self.take_over()
            return
        if (refusal := model.refusal(asked)) is not None:
            assert (status, driver.ran) == (refusal, []), content
        elif (answer := model.remembered(asked)) is not None:
            assert (status, content, driver.ran) == (200, answer, [])
        else:
            assert (status == 200) == (not driver.raised), content
            if status == 200:
                model.succeeded(asked, content, driver)
            else:
                assert str(next(iter(driver.raised.values()))) in content["Err"]
                model.failed(asked, driver)
                if asked.operation.endswith("Network"):
                    self.take_over_marks()
                self.take_over()

    def went_first(self, asked: Asked, status: int, content: Any) -> bool:
        """Whether what comes before the request itself could be done; then what ran is what came after."""
        model, driver = self.model, self.driver
        if model.is_made_again_first(asked):
            assert driver.ran.pop(0) == "create_network"
            if error := driver.raised.get("create_network"):
                assert status != 200
                assert str(error) in content["Err"]
                assert not driver.ran
                return False
            model.networks[asked.network].half = False
        if model.is_settled_first(asked):
            first = list(itertools.takewhile(ENDPOINTS_REMOVERS.__contains__, driver.ran))
            if driver.raised.keys() & set(first):
                assert status != 200
                assert driver.ran == first
                return False
            driver.ran = driver.ran[len(first) :]
            model.settled(model.networks[asked.network], asked.endpoint)
        return True

    @rule(failing=st.just({}) | FAILING)
    def reopen(self, *, failing: Failing) -> None:
        self.plugin.close()
        self.open(self.state, failing)
        self.driver.failing = {}
        if self.driver.raised:
            self.take_over_ghosts()
            self.take_over_marks()
            self.take_over()
        else:
            self.started()

    def started(self) -> None:
        self.model.started()
        self.take_over()
        # Who reboots has nothing in the kernel.
        endpoints = [there for network in self.model.networks.values() for there in network.endpoints.values()]
        ran = Counter(self.driver.ran)
        assert ran["create_network"] == len(self.model.networks)
        assert ran["restore"] == sum(there.joined is not None for there in endpoints)
        assert ran["program"] == sum(there.port is not None for there in endpoints)

    def take_over(self) -> None:
        """Of what is half something: whether it is still there, and how much of it; it is not more than before."""
        there = shown(self.driver)
        for id_, network in list(self.model.networks.items()):
            if network.half and id_ not in there:
                del self.model.networks[id_]
                continue
            for endpoint_id, endpoint in list(network.endpoints.items()):
                if not endpoint.half:
                    continue
                if endpoint_id not in there[id_]:
                    del network.endpoints[endpoint_id]
                    continue
                joined, port = there[id_][endpoint_id]
                assert joined in (None, endpoint.joined)
                assert port in (None, endpoint.port)
                endpoint.joined, endpoint.port = joined, port

    def take_over_marks(self) -> None:
        """Where not everything could be done, some of the endpoints are done with, and one is half done."""
        self.take_over()
        for id_, network in self.model.networks.items():
            found = self.driver.networks[id_].endpoints if id_ in self.driver.networks else {}
            for endpoint_id, endpoint in network.endpoints.items():
                if endpoint.half or network.half:
                    intent = _intent(found[endpoint_id]) if endpoint_id in found else "DeleteEndpoint"
                    endpoint.half = (endpoint.half & {"Join"}) | ({intent} if intent else set())

    def take_over_ghosts(self) -> None:
        """They are there again, if a start could not delete them."""
        networks = self.driver.networks
        for id_, *endpoint_id in sorted(self.model.ghosts, key=len):
            network = networks.get(id_)
            if network is not None and not endpoint_id:
                self.model.networks[id_] = ModelNetwork(network.options.mtu - 1400, half=True)
            elif network is not None and endpoint_id[0] in network.endpoints:
                variant = network.endpoints[endpoint_id[0]].options["variant"]
                found = ModelEndpoint(variant, half={"DeleteEndpoint"})
                self.model.networks[id_].endpoints[endpoint_id[0]] = found
        self.model.ghosts.clear()

    @invariant()
    def the_plugin_shows_what_the_answers_said(self) -> None:
        networks = self.model.networks
        assert shown(self.driver) == {
            id_: {endpoint_id: (there.joined, there.port) for endpoint_id, there in network.endpoints.items()}
            for id_, network in networks.items()
        }
        for network in self.driver.networks.values():
            assert network.options.mtu == 1400 + networks[network.id].variant
            for endpoint in network.endpoints.values():
                assert endpoint.options["variant"] == networks[network.id].endpoints[endpoint.id].variant

    @invariant()
    def what_is_known_is_made_and_what_is_made_is_known(self) -> None:
        whole, doubtful = set[Fact](), self.model.ghosts.copy()
        for id_, network in self.model.networks.items():
            whole.add(("network", id_))
            doubtful |= {(id_,)} if network.half else set()
            for endpoint_id, endpoint in network.endpoints.items():
                at = (id_, endpoint_id)
                whole.add(("endpoint", *at))
                whole |= {("join", *at)} if endpoint.joined is not None else set()
                whole |= {("port", *at, f"{endpoint.port}")} if endpoint.port is not None else set()
                doubtful |= {at} if endpoint.half else set()
        assert {fact for fact in whole ^ self.world if not {fact[1:2], fact[1:3]} & doubtful} == set()


def test_any_sequence_goes_as_the_naive_model_says(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "netplugin_sdk")
    Sequences.happened.clear()
    wanted = os.environ.get("NETPLUGIN_MODEL")
    chosen = settings(
        max_examples=int(wanted or SEQUENCES),
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        derandomize=wanted is None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],  # to shrink a sequence takes minutes
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(Sequences, settings=chosen)
    happened = Sequences.happened
    print(sorted(happened.items()))
    if wanted is None:  # what is never reached is not tested
        reached = [happened[f"{operation} {what}"] for operation in WEIGHTS for what in ("200", "killed")]
        assert min(*reached, happened["failed after the answer"]) >= volume(1, 6), happened


def _intent(endpoint: Endpoint) -> str | None:
    """What is half done with it, as it is on disk."""
    stored: Any = endpoint
    intent: str | None = stored.row.intent
    return intent
