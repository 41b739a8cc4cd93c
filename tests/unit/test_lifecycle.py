from __future__ import annotations

import logging
import shutil
import sqlite3
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from netplugin_sdk import (
    AddressRef,
    AddressRequest,
    Conflict,
    DriverError,
    Endpoint,
    EndpointInterface,
    EndpointOptions,
    IpamDriver,
    Join,
    Later,
    MacAddress,
    Network,
    NetworkDriver,
    NotFound,
    Plugin,
    Pool,
    PoolRequest,
    Scope,
    Unsupported,
)
from netplugin_sdk.core.workers import Locks
from netplugin_sdk.values import IPInterface

from ..patience import PATIENCE
from .lab import (
    ENDPOINT,
    MAC,
    NETWORK,
    OTHER_ENDPOINT,
    OTHER_NETWORK,
    PUBLISHED,
    Docker,
    Everything,
    Options,
    Publisher,
    Recorder,
    copy_state,
    create_endpoint,
    create_network,
    joining,
    of,
    publishing,
)


def wait_for_late_work(plugin: Plugin) -> None:
    networks: Any = plugin._networks
    networks._teardown.wait()


@pytest.fixture
def driver() -> Publisher:
    return Publisher()


@pytest.fixture
def docker(driver: Publisher) -> Docker:
    return Docker(Plugin(driver))


@pytest.fixture
def running(docker: Docker, driver: Publisher) -> Docker:
    """With a container on a network; what the driver was asked for that is forgotten."""
    docker("CreateNetwork", create_network())
    docker.run()
    driver.since()
    return docker


def intents(folder: Path) -> list[tuple[str, str | None]]:
    """What is half done, by the file of a closed plugin."""
    db = sqlite3.connect(folder / "state.db")
    found = db.execute("SELECT id, intent FROM networks UNION ALL SELECT id, intent FROM endpoints").fetchall()
    db.close()
    return [(id_, intent) for id_, intent in found if intent]


# A day


def test_from_the_first_call_to_the_last(driver: Publisher, docker: Docker) -> None:
    assert docker("CreateNetwork", create_network()) == {}
    assert docker("CreateEndpoint", create_endpoint()) == {"Interface": {"MacAddress": MAC}}
    assert docker("Join", joining()) == {
        "InterfaceName": {"SrcName": f"vc-{ENDPOINT[:12]}", "DstPrefix": "eth"},
        "Gateway": "172.18.0.1",
        "GatewayIPv6": None,
        "StaticRoutes": [],
        "DisableGatewayService": False,
    }
    assert docker("ProgramExternalConnectivity", publishing()) == {}
    assert docker("EndpointOperInfo", of(NETWORK, ENDPOINT)) == {"Value": {}}
    assert docker("RevokeExternalConnectivity", of(NETWORK, ENDPOINT)) == {}
    assert docker("Leave", of(NETWORK, ENDPOINT)) == {}
    assert docker("DeleteEndpoint", of(NETWORK, ENDPOINT)) == {}
    assert docker("DeleteNetwork", of(NETWORK)) == {}
    assert driver.calls == [
        "create_network",
        "create_endpoint",
        "join",
        "program 18080",
        "revoke",
        "leave",
        "delete_endpoint",
        "delete_network",
    ]


def test_a_method_gets_the_objects_of_its_request(driver: Publisher, docker: Docker) -> None:
    seen: dict[str, Any] = {}
    for method in ("create_network", "delete_network"):
        driver.hooks[method] = lambda network, method=method: seen.update({method: network})  # type: ignore[misc]
    driver.hooks["create_endpoint"] = lambda endpoint: seen.update(requested=endpoint.requested)
    driver.hooks["join"] = lambda endpoint: seen.update(addresses=endpoint.addresses, mac=endpoint.mac_address)
    docker("CreateNetwork", create_network(internal=True, mtu="1400"))
    network = seen["create_network"]
    assert isinstance(network, Network)
    assert (network.id, network.internal, network.options.mtu) == (NETWORK, True, 1400)
    docker.run()
    assert seen["requested"] == EndpointInterface(address=ip_interface("172.18.0.2/16"))  # type: ignore[arg-type]
    assert (seen["addresses"], seen["mac"]) == ((ip_interface("172.18.0.2/16"),), MAC)
    assert set(network.endpoints) == {ENDPOINT}
    docker("DeleteNetwork", of(NETWORK))
    assert seen["delete_network"] is network
    assert network.endpoints == {}


def test_an_internal_network_joins_without_gateway(docker: Docker) -> None:
    docker("CreateNetwork", create_network(internal=True))
    docker("CreateEndpoint", create_endpoint())
    answer = docker("Join", joining())
    assert (answer["Gateway"], answer["DisableGatewayService"]) == (None, True)


def test_options_are_checked_before_anything_is_made(driver: Publisher, docker: Docker) -> None:
    status, text = docker.refused("CreateNetwork", create_network(mtu="big"))
    assert (status, text) == (400, "option mtu='big': expected int")
    assert driver.calls == []
    docker("CreateNetwork", create_network())


# The same request again

REPEATED: list[tuple[str, dict[str, Any]]] = [
    ("CreateNetwork", create_network()),
    ("CreateEndpoint", create_endpoint()),
    ("Join", joining()),
    ("ProgramExternalConnectivity", publishing()),
]


def test_a_repetition_is_answered_the_same_and_not_run(driver: Publisher, docker: Docker) -> None:
    for method, request in REPEATED:
        first = docker(method, request)
        ran = driver.since()
        assert len(ran) == 1
        assert docker(method, dict(reversed(request.items()))) == first
        assert driver.since() == []


def test_a_repetition_is_answered_the_same_after_a_restart(tmp_path: Path) -> None:
    with Plugin(Publisher(), state=tmp_path) as plugin:
        first = [Docker(plugin)(method, request) for method, request in REPEATED]
    driver = Publisher()
    with Plugin(driver, state=tmp_path) as plugin:
        assert [Docker(plugin)(method, request) for method, request in REPEATED] == first
    assert driver.calls == ["create_network", "program 18080"]  # restored


@pytest.mark.parametrize(
    ("method", "request_", "named"),
    [
        ("CreateNetwork", create_network(mtu="1400"), f"<Network {NETWORK[:12]}>"),
        ("CreateEndpoint", create_endpoint(k="v"), f"<Endpoint {ENDPOINT[:12]}>"),
        ("Join", joining(sandbox="/run/docker/exec/netns/other"), f"<Endpoint {ENDPOINT[:12]}>"),
    ],
)
def test_another_request_under_a_known_id_is_a_conflict(
    method: str, request_: dict[str, Any], named: str, running: Docker, driver: Publisher
) -> None:
    assert running.refused(method, request_) == (409, f"{named} exists already, with another request")
    assert driver.calls == []


def test_other_ports_are_programmed_again(running: Docker, driver: Publisher) -> None:
    for port in (18080, 18081, 18080, 18080):
        running("ProgramExternalConnectivity", publishing(port=port))
    assert driver.calls == ["program 18080", "program 18081", "program 18080"]


def test_one_endpoint_id_in_two_networks_are_two_endpoints(running: Docker) -> None:
    running("CreateNetwork", create_network(OTHER_NETWORK))
    running.run(OTHER_NETWORK)
    running("DeleteEndpoint", of(NETWORK, ENDPOINT))
    assert running.ask("EndpointOperInfo", of(OTHER_NETWORK, ENDPOINT))[0] == 200
    assert running.ask("EndpointOperInfo", of(NETWORK, ENDPOINT))[0] == 422


def test_after_leaving_an_endpoint_joins_again(running: Docker, driver: Publisher) -> None:
    running("Leave", of(NETWORK, ENDPOINT))
    running("Join", joining(sandbox="/run/docker/exec/netns/other"))
    running("DeleteEndpoint", of(NETWORK, ENDPOINT))
    running("CreateEndpoint", create_endpoint(k="v"))
    assert driver.calls == ["leave", "join", "leave", "delete_endpoint", "create_endpoint"]


# What is not known


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("CreateEndpoint", create_endpoint(OTHER_NETWORK)),
        ("EndpointOperInfo", of(OTHER_NETWORK, ENDPOINT)),
        ("Join", joining(OTHER_NETWORK)),
        ("ProgramExternalConnectivity", publishing(OTHER_NETWORK)),
    ],
)
def test_an_unknown_network(method: str, request_: dict[str, Any], running: Docker, driver: Publisher) -> None:
    text = f"network {OTHER_NETWORK[:12]} is unknown to this plugin"
    assert running.refused(method, request_) == (422, text)
    assert driver.calls == []


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("EndpointOperInfo", of(NETWORK, OTHER_ENDPOINT)),
        ("Join", joining(NETWORK, OTHER_ENDPOINT)),
        ("ProgramExternalConnectivity", publishing(NETWORK, OTHER_ENDPOINT)),
    ],
)
def test_an_unknown_endpoint(method: str, request_: dict[str, Any], running: Docker, driver: Publisher) -> None:
    text = f"endpoint {OTHER_ENDPOINT[:12]} is unknown to this plugin"
    assert running.refused(method, request_) == (422, text)
    assert driver.calls == []


NO_ENDPOINT = "is unknown, nothing to delete"
NO_SANDBOX = "is in no sandbox, nothing to leave"


@pytest.mark.parametrize(
    ("call", "warning"),
    [
        (("DeleteNetwork", of(OTHER_NETWORK)), f"network {OTHER_NETWORK[:12]} is unknown, nothing to delete"),
        (("DeleteEndpoint", of(NETWORK, OTHER_ENDPOINT)), f"endpoint {OTHER_ENDPOINT[:12]} {NO_ENDPOINT}"),
        (("DeleteEndpoint", of(OTHER_NETWORK, ENDPOINT)), f"endpoint {ENDPOINT[:12]} {NO_ENDPOINT}"),
        (("Leave", of(NETWORK, OTHER_ENDPOINT)), f"endpoint {OTHER_ENDPOINT[:12]} {NO_SANDBOX}"),
        (("Leave", of(OTHER_NETWORK, ENDPOINT)), f"endpoint {ENDPOINT[:12]} {NO_SANDBOX}"),
    ],
)
def test_removing_what_is_not_there_succeeds_with_a_warning(
    call: tuple[str, dict[str, Any]],
    warning: str,
    running: Docker,
    driver: Publisher,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert running(*call) == {}
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"{call[0]}: {warning}")
    ]
    assert driver.calls == []


def test_what_was_never_programmed_is_revoked_without_a_word(
    running: Docker, driver: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    # as the engine does on internal networks
    for request in (of(NETWORK, ENDPOINT), of(NETWORK, OTHER_ENDPOINT), of(OTHER_NETWORK, ENDPOINT)):
        assert running("RevokeExternalConnectivity", request) == {}
    assert (driver.calls, caplog.records) == ([], [])


# A method that fails


class Step(NamedTuple):
    """A request, the method that it calls, and the method that undoes it."""

    before: list[tuple[str, dict[str, Any]]]
    request: tuple[str, dict[str, Any]]
    method: str
    undo: str


DONE = [("CreateNetwork", create_network()), ("CreateEndpoint", create_endpoint()), ("Join", joining())]
PUBLISH = ("ProgramExternalConnectivity", publishing())
STEPS = [
    Step([], DONE[0], "create_network", "delete_network"),
    Step(DONE[:1], DONE[1], "create_endpoint", "delete_endpoint"),
    Step(DONE[:2], DONE[2], "join", "leave"),
    Step(DONE, PUBLISH, "program 18080", "revoke"),
]


def before(step: Step, driver: Publisher, docker: Docker) -> None:
    """What comes before the step."""
    for each in step.before:
        docker(*each)
    driver.since()


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.method)
def test_a_method_that_fails_is_undone_and_nothing_is_remembered(step: Step, driver: Publisher, tmp_path: Path) -> None:
    with Plugin(driver, state=tmp_path) as plugin:
        docker = Docker(plugin)
        before(step, driver, docker)
        driver.fails[step.method] = Unsupported("this is\n  not to be had")
        assert docker.refused(*step.request) == (501, "this is not to be had")
        assert driver.since() == [step.method, step.undo]
    assert intents(tmp_path) == []
    another = Publisher()
    with Plugin(another, state=tmp_path) as plugin:
        Docker(plugin)(*step.request)
    assert another.calls[-1:] == [step.method]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.method)
def test_an_undo_that_fails_is_logged_and_the_first_error_is_answered(
    step: Step, driver: Publisher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Plugin(driver, state=tmp_path) as plugin:
        docker = Docker(plugin)
        before(step, driver, docker)
        driver.fails = {step.method: OSError("the cause"), step.undo: OSError("and the undo")}
        assert docker.refused(*step.request) == (500, "OSError: the cause")
        assert driver.since() == [step.method, step.undo]
        record = next(record for record in caplog.records if "so did undoing it" in record.getMessage())
        assert record.getMessage().startswith(step.request[0]), "it says what failed"
        assert record.exc_info is not None
        assert "and the undo" in str(record.exc_info[1])
        # The same request again runs the method again, as what is there is not known; an endpoint is deleted before.
        driver.fails = {}
        docker(*step.request)
        assert driver.since() == [*([step.undo] if step.method == "create_endpoint" else []), step.method]
    assert intents(tmp_path) == []


def test_a_join_that_was_not_undone_is_left_before_its_endpoint_is_deleted(driver: Publisher, docker: Docker) -> None:
    docker("CreateNetwork", create_network())
    docker("CreateEndpoint", create_endpoint())
    driver.since()
    driver.fails = {"join": OSError(), "leave": OSError()}
    docker.refused("Join", joining())
    driver.fails = {}
    docker("DeleteEndpoint", of(NETWORK, ENDPOINT))
    assert driver.calls == ["join", "leave", "leave", "delete_endpoint"]


@pytest.mark.parametrize("step", STEPS[:3], ids=lambda step: step.method)
def test_what_cannot_be_written_down_is_undone(step: Step, driver: Publisher, tmp_path: Path) -> None:
    # The disk is full: nothing says that it was made, so nothing would ever remove it.
    plugin = Plugin(driver, state=tmp_path)
    docker = Docker(plugin)
    before(step, driver, docker)
    driver.hooks[step.method] = lambda _: plugin.close()
    status, text = docker.refused(*step.request)
    assert status == 503
    assert "cannot write the plugin's state" in text
    assert driver.calls == [step.method, step.undo]


def test_an_answer_that_the_engine_would_refuse_is_undone(driver: Publisher, docker: Docker) -> None:
    docker("CreateNetwork", create_network())
    request = create_endpoint()
    request["Interface"]["MacAddress"] = "02:00:00:00:00:01"
    status, text = docker.refused("CreateEndpoint", request)
    assert status == 500
    expected = "expected None or 02:00:00:00:00:01, which the engine has asked for"
    assert text == f"create_endpoint returned mac_address {MAC!r}; {expected}"
    assert driver.calls == ["create_network", "create_endpoint", "delete_endpoint"]
    assert docker.ask("EndpointOperInfo", of(NETWORK, ENDPOINT))[0] == 422


def test_what_create_endpoint_repeats_of_the_request_is_left_out(docker: Docker) -> None:
    docker("CreateNetwork", create_network())
    request = create_endpoint()
    request["Interface"]["MacAddress"] = MAC
    assert docker("CreateEndpoint", request) == {"Interface": {}}


class GatewayAsText(Recorder):
    def join(self, network: Network[Options], endpoint: Endpoint, sandbox: Any) -> Join:
        self.called("join")
        return Join("vc", gateways=["10.0.0.1"])  # type: ignore[list-item]


def test_a_join_that_cannot_be_written_is_left() -> None:
    driver = GatewayAsText()
    docker = Docker(Plugin(driver))
    docker("CreateNetwork", create_network())
    docker("CreateEndpoint", create_endpoint())
    assert docker.refused("Join", joining()) == (
        500,
        "join returned gateways '10.0.0.1'; expected IP addresses, such as Network.gateways",
    )
    assert driver.calls[-2:] == ["join", "leave"]


@pytest.mark.parametrize(
    ("fails", "request_", "calls"),
    [
        ("revoke", ("RevokeExternalConnectivity", of(NETWORK, ENDPOINT)), ["revoke"]),
        ("leave", ("Leave", of(NETWORK, ENDPOINT)), ["revoke", "leave"]),
        ("delete_endpoint", ("DeleteEndpoint", of(NETWORK, ENDPOINT)), ["revoke", "leave", "delete_endpoint"]),
        ("delete_network", ("DeleteNetwork", of(NETWORK)), ["revoke", "leave", "delete_endpoint", "delete_network"]),
    ],
)
def test_a_removal_that_fails_is_an_error_and_goes_on_where_it_was(
    fails: str, request_: tuple[str, dict[str, Any]], calls: list[str], running: Docker, driver: Publisher
) -> None:
    running("ProgramExternalConnectivity", publishing())
    driver.since()
    driver.fails[fails] = DriverError("busy")
    assert running.refused(*request_) == (500, "busy")
    assert driver.since() == calls
    driver.fails = {}
    running(*request_)
    assert driver.since() == [fails]


def test_an_endpoint_that_could_not_leave_has_left_before_it_joins_again(tmp_path: Path, driver: Publisher) -> None:
    with Plugin(driver, state=tmp_path) as plugin:
        docker = Docker(plugin)
        docker("CreateNetwork", create_network())
        docker.run()
        driver.fails["leave"] = DriverError("busy")
        docker.refused("Leave", of(NETWORK, ENDPOINT))
        assert docker.refused("Join", joining()) == (500, "busy")
        driver.fails = {}
        driver.since()
        docker("Join", joining())
        assert driver.since() == ["leave", "join"]
        docker("Join", joining())
        assert driver.since() == []
    assert intents(tmp_path) == [], "it is joined, and not leaving any more"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (("CreateEndpoint", create_endpoint()), 200),
        (("Join", joining()), 422),
        (("ProgramExternalConnectivity", publishing()), 422),
        (("EndpointOperInfo", of(NETWORK, ENDPOINT)), 422),
        (("Leave", of(NETWORK, ENDPOINT)), 200),
        (("RevokeExternalConnectivity", of(NETWORK, ENDPOINT)), 200),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_an_endpoint_that_could_not_be_deleted_is_deleted_first(
    request_: tuple[str, dict[str, Any]], status: int, running: Docker, driver: Publisher
) -> None:
    driver.fails["leave"] = DriverError("busy")
    running.refused("DeleteEndpoint", of(NETWORK, ENDPOINT))
    assert running.refused(*request_) == (500, "busy")
    driver.fails = {}
    driver.since()
    assert running.ask(*request_)[0] == status
    new = ["create_endpoint"] if request_[0] == "CreateEndpoint" else []
    assert driver.since() == ["leave", "delete_endpoint", *new]


def test_an_endpoint_that_could_not_be_undone_is_never_whole(tmp_path: Path, driver: Publisher) -> None:
    """Whatever is asked for afterwards."""
    with Plugin(driver, state=tmp_path) as plugin:
        docker = Docker(plugin)
        docker("CreateNetwork", create_network())
        driver.fails = {"create_endpoint": DriverError("no"), "delete_endpoint": DriverError("busy")}
        docker.refused("CreateEndpoint", create_endpoint())
        docker.refused("ProgramExternalConnectivity", publishing())
        stored: Any = driver.networks[NETWORK].endpoints[ENDPOINT]
        assert stored.row.intent == "CreateEndpoint"
        driver.fails = {}
        assert docker.refused("ProgramExternalConnectivity", publishing())[0] == 422
    assert intents(tmp_path) == []


def test_a_network_that_could_not_be_deleted_is_made_again_when_it_is_used(tmp_path: Path, driver: Publisher) -> None:
    """Docker still has it, and so has the next start."""
    with Plugin(driver, state=tmp_path) as plugin:
        docker = Docker(plugin)
        docker("CreateNetwork", create_network())
        driver.fails["delete_network"] = DriverError("busy")
        docker.refused("DeleteNetwork", of(NETWORK))
        driver.fails = {"create_network": DriverError("no")}
        assert docker.refused("CreateEndpoint", create_endpoint()) == (500, "no")
        driver.fails = {}
        driver.since()
        docker("CreateEndpoint", create_endpoint())
        assert driver.since() == ["create_network", "create_endpoint"]
    with Plugin(driver, state=tmp_path) as plugin:
        assert list(driver.networks) == [NETWORK]


# A crash


def crashed(folder: Path, method: str, *requests: tuple[str, dict[str, Any]]) -> None:
    """What `folder` holds when a plugin dies in a method of the driver, which the last of the requests calls."""
    driver = Publisher()
    living = folder.with_name(f"{folder.name}-living")
    with Plugin(driver, state=living) as plugin:
        *before, last = requests
        for request in before:
            Docker(plugin)(*request)
        driver.hooks[method] = lambda _: copy_state(living, folder)
        Docker(plugin)(*last)


@pytest.mark.parametrize(
    ("method", "requests", "calls"),
    [
        ("create_network", DONE[:1], ["create_network"]),
        ("create_endpoint", DONE[:2], ["create_endpoint"]),
        ("join", DONE, ["join"]),
        ("program 18080", [*DONE, PUBLISH], ["program 18080"]),
        ("revoke", [*DONE, PUBLISH, ("RevokeExternalConnectivity", of(NETWORK, ENDPOINT))], ["revoke"]),
        ("revoke", [*DONE, PUBLISH, ("Leave", of(NETWORK, ENDPOINT))], ["revoke", "leave"]),
        ("leave", [*DONE, PUBLISH, ("Leave", of(NETWORK, ENDPOINT))], ["leave"]),
        ("leave", [*DONE, ("DeleteEndpoint", of(NETWORK, ENDPOINT))], ["leave", "delete_endpoint"]),
        ("delete_endpoint", [*DONE[:2], ("DeleteEndpoint", of(NETWORK, ENDPOINT))], ["delete_endpoint"]),
        ("delete_network", [*DONE[:1], ("DeleteNetwork", of(NETWORK))], ["delete_network"]),
    ],
)
def test_what_was_half_done_runs_again(
    method: str, requests: list[tuple[str, dict[str, Any]]], calls: list[str], tmp_path: Path
) -> None:
    crashed(tmp_path, method, *requests)
    driver = Publisher()
    with Plugin(driver, state=tmp_path) as plugin:
        assert plugin.repairs["half_done"] == (method != "join"), "of that nothing is written before"
        Docker(plugin)(*requests[-1])
        # An endpoint that may be half joined may be left once more: leaving nothing is nothing.
        assert [call for call in driver.since() if call in calls] == calls
    assert intents(tmp_path) == []


@pytest.mark.parametrize("method", ["Leave", "DeleteEndpoint"])
def test_a_removal_that_got_half_way_is_still_marked(method: str, tmp_path: Path) -> None:
    crashed(tmp_path, "leave", *DONE, PUBLISH, (method, of(NETWORK, ENDPOINT)))
    assert intents(tmp_path) == [(ENDPOINT, method)]


def test_a_half_made_network_can_be_deleted(tmp_path: Path) -> None:
    crashed(tmp_path, "create_network", *DONE[:1])
    driver = Publisher()
    with Plugin(driver, state=tmp_path) as plugin:
        Docker(plugin)("DeleteNetwork", of(NETWORK))
        assert Docker(plugin).refused("CreateEndpoint", create_endpoint())[0] == 422
    assert driver.calls == ["delete_network"]


def test_a_half_made_endpoint_is_deleted_by_the_next_start(tmp_path: Path) -> None:
    # The engine may not ask again: its retry after a lost connection is empty, and then it gives up.
    crashed(tmp_path, "create_endpoint", *DONE[:2])
    driver = Publisher()
    with Plugin(driver, state=tmp_path) as plugin:
        assert driver.calls == ["leave", "delete_endpoint", "create_network"]
        assert Docker(plugin).ask("EndpointOperInfo", of(NETWORK, ENDPOINT))[0] == 422
        Docker(plugin)("DeleteEndpoint", of(NETWORK, ENDPOINT))
    assert driver.calls[-1] == "create_network"


def test_a_half_done_join_is_left_before_its_endpoint_is_deleted(tmp_path: Path) -> None:
    # The engine gave up on the Join meanwhile and deletes the endpoint, as after its 30 s of retries.
    crashed(tmp_path, "join", *DONE)
    driver = Publisher()
    with Plugin(driver, state=tmp_path) as plugin:
        Docker(plugin)("DeleteEndpoint", of(NETWORK, ENDPOINT))
    assert driver.calls == ["create_network", "leave", "delete_endpoint"]


def test_a_half_done_join_can_be_left(tmp_path: Path) -> None:
    crashed(tmp_path, "join", *DONE)
    driver = Publisher()
    with Plugin(driver, state=tmp_path) as plugin:
        Docker(plugin)("Leave", of(NETWORK, ENDPOINT))
    assert driver.calls == ["create_network", "leave"]


def test_half_programmed_ports_are_revoked_by_the_next_start(tmp_path: Path) -> None:
    crashed(tmp_path, "program 18080", *DONE, PUBLISH)
    driver = Publisher()
    with Plugin(driver, state=tmp_path) as plugin:
        assert driver.since() == ["revoke", "create_network"]
        Docker(plugin)("RevokeExternalConnectivity", of(NETWORK, ENDPOINT))
        assert driver.since() == []
        Docker(plugin)("ProgramExternalConnectivity", publishing())
    assert driver.since() == ["program 18080"]
    assert intents(tmp_path) == []


def test_a_half_done_leave_is_finished_by_the_next_start(tmp_path: Path) -> None:
    crashed(tmp_path, "leave", *DONE, ("Leave", of(NETWORK, ENDPOINT)))
    driver = Publisher()
    with Plugin(driver, state=tmp_path) as plugin:
        assert driver.since() == ["leave", "create_network"]
        Docker(plugin)("Leave", of(NETWORK, ENDPOINT))
        assert driver.since() == []
        Docker(plugin)("Join", joining())
    assert driver.since() == ["join"]
    assert intents(tmp_path) == []


def test_a_half_made_network_is_deleted_by_the_next_start(tmp_path: Path) -> None:
    crashed(tmp_path, "create_network", *DONE[:1])
    driver = Publisher()
    with Plugin(driver, state=tmp_path) as plugin:
        assert driver.calls == ["delete_network"]
        assert not driver.networks
        Docker(plugin)("CreateNetwork", create_network(mtu="1400"))


# Order of removal


def test_an_endpoint_that_is_published_and_joined_is_revoked_and_left_before_it_is_deleted(
    running: Docker, driver: Publisher
) -> None:
    running("ProgramExternalConnectivity", publishing())
    running("DeleteEndpoint", of(NETWORK, ENDPOINT))
    assert driver.calls == ["program 18080", "revoke", "leave", "delete_endpoint"]


def test_leaving_revokes_first(running: Docker, driver: Publisher) -> None:
    running("ProgramExternalConnectivity", publishing())
    running("Leave", of(NETWORK, ENDPOINT))
    running("RevokeExternalConnectivity", of(NETWORK, ENDPOINT))
    running("DeleteEndpoint", of(NETWORK, ENDPOINT))
    assert driver.calls == ["program 18080", "revoke", "leave", "delete_endpoint"]


def test_while_it_is_removed_an_endpoint_still_knows_its_sandbox_and_ports(running: Docker, driver: Publisher) -> None:
    known: dict[str, bool] = {}
    driver.hooks["revoke"] = lambda endpoint: known.update(external=endpoint.external is not None)
    driver.hooks["leave"] = lambda endpoint: known.update(sandbox=endpoint.sandbox is not None)
    driver.hooks["delete_endpoint"] = lambda endpoint: known.update(gone=endpoint.sandbox is endpoint.external is None)
    running("ProgramExternalConnectivity", publishing())
    running("DeleteEndpoint", of(NETWORK, ENDPOINT))
    assert known == {"external": True, "sandbox": True, "gone": True}


def test_a_network_with_endpoints_is_deleted_with_them(
    running: Docker, driver: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    running("CreateEndpoint", create_endpoint(NETWORK, OTHER_ENDPOINT))
    driver.since()
    running("DeleteNetwork", of(NETWORK))
    assert driver.calls == ["leave", "delete_endpoint", "delete_endpoint", "delete_network"]
    assert [record.getMessage() for record in caplog.records] == [
        f"DeleteNetwork: <Network {NETWORK[:12]}> still has <Endpoint {id_[:12]}>, deleting it first"
        for id_ in (ENDPOINT, OTHER_ENDPOINT)
    ]


def test_no_endpoint_outlives_its_network(tmp_path: Path) -> None:
    """Also one that could not be deleted, after the answer."""
    driver = Slow()
    driver.go.set()
    with Plugin(driver, state=tmp_path) as plugin:
        docker = Docker(plugin)
        docker("CreateNetwork", create_network())
        docker("CreateEndpoint", create_endpoint())
        driver.broken = True
        docker("DeleteEndpoint", of(NETWORK, ENDPOINT))
        wait_for_late_work(plugin)
        driver.broken = False
        docker("DeleteNetwork", of(NETWORK))
    with Plugin(Publisher(), state=tmp_path) as plugin:
        Docker(plugin)("CreateNetwork", create_network())


# An empty body


@pytest.mark.parametrize(
    "method", ["CreateNetwork", "DeleteNetwork", "CreateEndpoint", "Join", "Leave", "DeleteEndpoint"]
)
def test_an_empty_body_is_never_acted_on(method: str, running: Docker, driver: Publisher) -> None:
    status, text = running.refused(method)
    assert status == 400
    assert text.startswith(f"NetworkDriver.{method}: the request body is empty")
    assert driver.calls == []


# Threads


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls that run at the same time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(call) for call in calls]]


def test_calls_on_one_network_come_one_after_the_other(running: Docker, driver: Publisher) -> None:
    running("CreateEndpoint", create_endpoint(NETWORK, OTHER_ENDPOINT))
    driver.since()
    entered = threading.Event()
    second: list[Future[Any]] = []
    with ThreadPoolExecutor(2) as pool:

        def while_leaving(_: Any) -> None:
            second.append(pool.submit(running, "Join", joining(NETWORK, OTHER_ENDPOINT)))
            assert not entered.wait(0.05), "another call on the network is running"
            driver.calls.append("left")

        driver.hooks["leave"] = while_leaving
        driver.hooks["join"] = lambda _: entered.set()
        pool.submit(running, "Leave", of(NETWORK, ENDPOINT)).result(PATIENCE)
        second[0].result(PATIENCE)
    assert driver.calls == ["leave", "left", "join"]


def test_calls_on_different_networks_run_in_parallel(driver: Publisher, docker: Docker) -> None:
    together = threading.Barrier(2)

    def meet(_: object) -> None:
        together.wait(PATIENCE)

    driver.hooks["create_network"] = meet
    in_threads(
        lambda: docker("CreateNetwork", create_network(NETWORK)),
        lambda: docker("CreateNetwork", create_network(OTHER_NETWORK)),
    )


def test_the_same_request_at_the_same_time_runs_once(driver: Publisher, docker: Docker) -> None:
    docker("CreateNetwork", create_network())
    together = threading.Barrier(8)

    def repeat() -> Any:
        together.wait(PATIENCE)
        return docker("CreateEndpoint", create_endpoint())

    answers = in_threads(*[repeat] * 8)
    assert answers == [{"Interface": {"MacAddress": MAC}}] * 8
    assert driver.calls == ["create_network", "create_endpoint"]


def test_many_networks_in_many_threads(tmp_path: Path) -> None:
    def life(docker: Docker, number: int) -> None:
        network = f"{number:064x}"
        for _ in range(3):
            docker("CreateNetwork", create_network(network))
            docker.run(network)
            docker("ProgramExternalConnectivity", publishing(network))
            docker("DeleteNetwork", of(network))

    with Plugin(Publisher(), state=tmp_path) as plugin:
        in_threads(*[partial(life, Docker(plugin), number) for number in range(8)])
    with Plugin(Publisher(), state=tmp_path) as plugin:
        asked = [Docker(plugin).ask("EndpointOperInfo", of(f"{number:064x}", ENDPOINT)) for number in range(8)]
    assert {status for status, _ in asked} == {422}


def test_a_failed_call_gives_its_lock_back(driver: Publisher, docker: Docker) -> None:
    driver.fails["create_network"] = OSError()
    docker.refused("CreateNetwork", create_network())
    driver.fails = {}
    in_threads(lambda: docker("CreateNetwork", create_network()))


def test_a_lock_is_there_only_while_somebody_wants_it() -> None:
    locks = Locks(PATIENCE)
    held = {"a": 0, "b": 0}

    def take(key: str) -> None:
        for _ in range(200):
            with locks.hold(key):
                held[key] += 1

    in_threads(*[partial(take, key) for key in ("a", "b") * 3])
    assert held == {"a": 600, "b": 600}
    assert locks._locks == {}


def test_networks_and_endpoints_that_were_read_do_not_change(driver: Publisher, docker: Docker) -> None:
    """So any thread may iterate over them while calls come and go."""
    docker("CreateNetwork", create_network())
    for _ in driver.networks.values():
        docker("CreateNetwork", create_network(OTHER_NETWORK))
    assert len(driver.networks) == 2
    docker("CreateEndpoint", create_endpoint())
    for _ in driver.networks[NETWORK].endpoints:
        docker("CreateEndpoint", create_endpoint(endpoint=OTHER_ENDPOINT))
    for id_ in driver.networks[NETWORK].endpoints:
        docker("DeleteEndpoint", of(NETWORK, id_))
    assert not driver.networks[NETWORK].endpoints


# Capabilities and optional methods

OPTIONAL: dict[str, dict[str, Any]] = {
    "GwAllocCheck": {"Options": {}},
    "AllocateNetwork": {"NetworkID": NETWORK},
    "FreeNetwork": of(NETWORK),
    "DiscoverNew": {"DiscoveryType": 2},
    "DiscoverDelete": {"DiscoveryType": 2},
    "ProgramExternalConnectivity": publishing(),
    "RevokeExternalConnectivity": of(NETWORK, ENDPOINT),
}


class GlobalEverything(Everything):
    scope = Scope.GLOBAL


class Global(Recorder):
    scope = Scope.GLOBAL


class Discovering(Recorder):
    def peer_left(self, network: Any, peer: Any) -> None:
        self.called("peer_left", peer)


@pytest.mark.parametrize(
    ("driver_type", "capabilities", "methods"),
    [
        (Recorder, ("local", "local", False), set()),
        (Publisher, ("local", "local", False), {"ProgramExternalConnectivity", "RevokeExternalConnectivity"}),
        (Global, ("global", "global", False), {"AllocateNetwork", "FreeNetwork", "DiscoverNew", "DiscoverDelete"}),
        (Discovering, ("local", "global", False), {"DiscoverNew", "DiscoverDelete"}),
        (Everything, ("local", "global", True), set(OPTIONAL) - {"AllocateNetwork", "FreeNetwork"}),
        (GlobalEverything, ("global", "global", True), set(OPTIONAL)),
    ],
)
def test_capabilities_and_methods_follow_from_what_is_overridden(
    driver_type: type[Recorder], capabilities: tuple[str, str, bool], methods: set[str]
) -> None:
    docker = Docker(Plugin(driver_type()))
    docker("CreateNetwork", create_network())
    docker.run()
    scope, connectivity, checks = capabilities
    assert docker("GetCapabilities") == {
        "Scope": scope,
        "ConnectivityScope": connectivity,
        "GwAllocChecker": checks,
    }
    assert {method for method, request in OPTIONAL.items() if docker.ask(method, request)[0] != 404} == methods
    for method in OPTIONAL.keys() - methods:
        assert docker.refused(method, OPTIONAL[method])[1] == f"NetworkDriver.{method} is not supported by this plugin"


class OnlyPrograms(Recorder):
    def program_external_connectivity(self, network: Any, endpoint: Any, options: Any) -> None:
        pass


class OnlyRevokes(Recorder):
    def revoke_external_connectivity(self, network: Any, endpoint: Any) -> None:
        pass


@pytest.mark.parametrize("driver_type", [OnlyPrograms, OnlyRevokes])
def test_programming_and_revoking_come_together(driver_type: type[Recorder], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"{driver_type.__name__} defines only one of"):
        Plugin(driver_type(), state=tmp_path)
    Plugin(Recorder(), state=tmp_path).close()  # the folder is free again


def test_ports_that_a_driver_cannot_publish_are_not_lost_silently(caplog: pytest.LogCaptureFixture) -> None:
    for driver, warned in ((Recorder(), True), (Publisher(), False)):
        caplog.clear()
        docker = Docker(Plugin(driver))
        docker("CreateNetwork", create_network())
        docker("CreateEndpoint", {**create_endpoint(), "Options": {"com.docker.network.portmap": [PUBLISHED]}})
        assert ("has ports to publish, and this driver publishes none" in caplog.text) is warned


def test_gw_alloc_check() -> None:
    driver = Everything()
    docker = Docker(Plugin(driver))
    options = create_network(parent="eth0", mtu="1400")["Options"]
    assert docker("GwAllocCheck", {"Options": options}) == {"SkipIPv4": True, "SkipIPv6": False}
    assert driver.calls == ["gw_alloc_check mtu=1400"]
    options = create_network(nonsense="1")["Options"]
    assert docker.refused("GwAllocCheck", {"Options": options}) == (
        400,
        "unknown option 'nonsense'; known options: mtu, parent",
    )


def test_endpoint_oper_info_may_hold_addresses_and_ports() -> None:
    docker = Docker(Plugin(Everything()))
    docker("CreateNetwork", create_network())
    docker("CreateEndpoint", {**create_endpoint(), "Options": {"com.docker.network.portmap": [PUBLISHED]}})
    assert docker("EndpointOperInfo", of(NETWORK, ENDPOINT)) == {
        "Value": {
            "addresses": ["172.18.0.2/16"],
            "mac": MAC,
            "ports": [{**PUBLISHED, "IP": None, "HostIP": None}],
        }
    }


class ReadOnlyAnswers(Everything):
    scope = Scope.GLOBAL

    def endpoint_oper_info(self, network: Network[Options], endpoint: Endpoint) -> Mapping[str, Any]:
        return MappingProxyType({"a": "b"})

    def allocate_network(self, request: Any) -> Mapping[str, str]:
        return MappingProxyType({"a": "b"})


def test_a_mapping_of_any_kind_can_be_answered() -> None:
    docker = Docker(Plugin(ReadOnlyAnswers()))
    docker("CreateNetwork", create_network())
    docker.run()
    assert docker("AllocateNetwork", {"NetworkID": NETWORK}) == {"Options": {"a": "b"}}
    assert docker("EndpointOperInfo", of(NETWORK, ENDPOINT)) == {"Value": {"a": "b"}}


# IPAM


class Addresses(IpamDriver):
    requires_mac_address = True
    requires_request_replay = True
    local_address_space = "here"
    global_address_space = "everywhere"

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.hooks: dict[str, Callable[[Any], None]] = {}

    def called(self, method: str, request: object) -> None:
        self.calls.append(request)
        if hook := self.hooks.get(method):
            hook(request)

    def request_pool(self, request: PoolRequest) -> Pool:
        self.called("request_pool", request)
        return Pool("pool-1", request.pool or ip_network("fd77::/64" if request.v6 else "10.77.0.0/24"), {"k": "v"})

    def release_pool(self, pool_id: str) -> None:
        self.called("release_pool", pool_id)

    def request_address(self, request: AddressRequest) -> IPInterface:
        self.called("request_address", request)
        if request.pool_id == "lost":
            raise NotFound("pool lost is unknown")
        address = ip_address(request.address or "10.77.0.2")
        return ip_interface(f"{address}/{24 if address.version == 4 else 64}")

    def release_address(self, address: AddressRef) -> None:
        self.called("release_address", address)


def test_ipam_from_the_first_call_to_the_last() -> None:
    driver = Addresses()
    docker = Docker(Plugin(driver))
    assert docker("IpamDriver.GetCapabilities") == {"RequiresMACAddress": True, "RequiresRequestReplay": True}
    assert docker("IpamDriver.GetDefaultAddressSpaces") == {
        "LocalDefaultAddressSpace": "here",
        "GlobalDefaultAddressSpace": "everywhere",
    }
    pool = {"AddressSpace": "here", "Pool": "", "SubPool": "", "Options": {"x": "y"}, "V6": True}
    assert docker("IpamDriver.RequestPool", pool) == {"PoolID": "pool-1", "Pool": "fd77::/64", "Data": {"k": "v"}}
    options = {"com.docker.network.endpoint.macaddress": "02:00:00:00:00:09"}
    address = {"PoolID": "pool-1", "Address": "fd77::9", "Options": options}
    assert docker("IpamDriver.RequestAddress", address) == {"Address": "fd77::9/64", "Data": {}}
    assert docker("IpamDriver.ReleaseAddress", {"PoolID": "pool-1", "Address": "fd77::9"}) == {}
    assert docker("IpamDriver.ReleasePool", {"PoolID": "pool-1"}) == {}
    assert driver.calls == [
        PoolRequest(address_space="here", options={"x": "y"}, v6=True),
        AddressRequest(
            pool_id="pool-1",
            address=ip_address("fd77::9"),
            mac_address=MacAddress("02:00:00:00:00:09"),
            options=options,
        ),
        AddressRef("pool-1", ip_address("fd77::9")),
        "pool-1",
    ]


def test_an_ipam_driver_that_says_nothing_of_itself() -> None:
    class Plain(Addresses):
        requires_mac_address = IpamDriver.requires_mac_address
        requires_request_replay = IpamDriver.requires_request_replay
        local_address_space = IpamDriver.local_address_space
        global_address_space = IpamDriver.global_address_space

    docker = Docker(Plugin(Plain()))
    assert docker("IpamDriver.GetCapabilities") == {"RequiresMACAddress": False, "RequiresRequestReplay": False}
    assert docker("IpamDriver.GetDefaultAddressSpaces") == {
        "LocalDefaultAddressSpace": "LocalDefault",
        "GlobalDefaultAddressSpace": "GlobalDefault",
    }


def test_an_error_of_an_ipam_driver_is_not_lost() -> None:
    docker = Docker(Plugin(Addresses()))
    assert docker.refused("IpamDriver.RequestAddress", {"PoolID": "lost"}) == (422, "pool lost is unknown")
    status, text = docker.refused("IpamDriver.RequestAddress", {"PoolID": "", "Address": ""})
    assert (status, text) == (400, "IpamDriver.RequestAddress: PoolID is missing: it must be the id of a pool")


@pytest.mark.parametrize("method", ["RequestPool", "ReleasePool", "RequestAddress", "ReleaseAddress"])
def test_an_empty_body_is_never_acted_on_by_ipam(method: str) -> None:
    driver = Addresses()
    assert Docker(Plugin(driver)).refused(f"IpamDriver.{method}")[0] == 400
    assert driver.calls == []


METHODS = ("request_pool", "release_pool", "request_address", "release_address")


def request_address(pool: str) -> tuple[str, dict[str, Any]]:
    return "IpamDriver.RequestAddress", {"PoolID": pool, "Address": "", "Options": None}


REQUEST_POOL: tuple[str, dict[str, Any]] = ("IpamDriver.RequestPool", {"AddressSpace": "here"})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (request_address("a"), request_address("a")),
        (request_address("a"), ("IpamDriver.ReleaseAddress", {"PoolID": "a", "Address": "10.77.0.2"})),
        (request_address("a"), ("IpamDriver.ReleasePool", {"PoolID": "a"})),
        # Which pools there are is one thing, too.
        (REQUEST_POOL, REQUEST_POOL),
        (REQUEST_POOL, ("IpamDriver.ReleasePool", {"PoolID": "a"})),
    ],
    ids=lambda call: call[0],
)
def test_calls_on_one_pool_come_one_after_the_other(
    one: tuple[str, dict[str, Any]], other: tuple[str, dict[str, Any]]
) -> None:
    driver = Addresses()
    docker = Docker(Plugin(driver))
    entered, following = threading.Event(), list[Future[Any]]()
    with ThreadPoolExecutor(2) as pool:

        def first(_: object) -> None:
            driver.hooks = dict.fromkeys(METHODS, lambda _: entered.set())
            following.append(pool.submit(docker, *other))
            assert not entered.wait(0.05), "another call on the pool is running"

        driver.hooks = dict.fromkeys(METHODS, first)
        pool.submit(docker, *one).result(PATIENCE)
        following[0].result(PATIENCE)
    assert entered.is_set()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (request_address("a"), request_address("b")),
        (request_address("a"), ("IpamDriver.ReleasePool", {"PoolID": "b"})),
        (request_address("a"), ("IpamDriver.RequestPool", {"AddressSpace": "here"})),
    ],
)
def test_calls_on_different_pools_run_in_parallel(
    one: tuple[str, dict[str, Any]], other: tuple[str, dict[str, Any]]
) -> None:
    driver = Addresses()
    docker = Docker(Plugin(driver))
    together = threading.Barrier(2)

    def meet(_: object) -> None:
        together.wait(1)

    driver.hooks = dict.fromkeys(("request_address", "release_pool", "request_pool"), meet)
    in_threads(lambda: docker(*one), lambda: docker(*other))


def test_a_pool_that_is_busy_keeps_nobody_from_another() -> None:
    driver = Addresses()
    docker = Docker(Plugin(driver))
    releasing, released = list[Future[Any]](), threading.Event()
    with ThreadPoolExecutor(3) as pool:

        def busy(_: object) -> None:
            releasing.append(pool.submit(docker, "IpamDriver.ReleasePool", {"PoolID": "a"}))
            assert not released.wait(0.05)
            pool.submit(docker, "IpamDriver.RequestPool", {"AddressSpace": "here"}).result(1)

        driver.hooks = {"request_address": busy, "release_pool": lambda _: released.set()}
        pool.submit(docker, *request_address("a")).result(PATIENCE)
        releasing[0].result(PATIENCE)


def test_a_network_driver_and_its_own_exceptions_in_the_log(
    driver: Publisher, docker: Docker, caplog: pytest.LogCaptureFixture
) -> None:
    driver.fails["create_network"] = DriverError("no such parent")
    docker.refused("CreateNetwork", create_network())
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_network_driver_is_abstract() -> None:
    with pytest.raises(TypeError, match="NetworkDriver has no create_network, delete_endpoint, delete_network, join"):
        NetworkDriver()  # type: ignore[abstract]


# ------------------------------------------------------------------------------ endpoints that ended unnoticed


class Mortal(Publisher):
    """Knows whose containers are gone. A port belongs to one endpoint at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.gone: set[str] = set()
        self.owner: str | None = None

    def endpoint_is_gone(self, network: Network[Options], endpoint: Endpoint) -> bool:
        return endpoint.id in self.gone

    def program_external_connectivity(
        self, network: Network[Options], endpoint: Endpoint, options: EndpointOptions
    ) -> None:
        super().program_external_connectivity(network, endpoint, options)
        if self.owner not in (None, endpoint.id):
            raise Conflict("port is already allocated")
        self.owner = endpoint.id

    def revoke_external_connectivity(self, network: Network[Options], endpoint: Endpoint) -> None:
        super().revoke_external_connectivity(network, endpoint)
        if self.owner == endpoint.id:
            self.owner = None


def mortal(tmp_path: Path | None = None) -> tuple[Mortal, Docker]:
    driver = Mortal()
    docker = Docker(Plugin(driver, state=tmp_path))
    for method, request in REPEATED:
        docker(method, request)
    return driver, docker


def test_who_has_the_port_is_dead() -> None:
    driver, docker = mortal()
    docker.run(endpoint=OTHER_ENDPOINT)
    assert docker.refused("ProgramExternalConnectivity", publishing(endpoint=OTHER_ENDPOINT))[0] == 409
    assert list(driver.networks[NETWORK].endpoints) == [ENDPOINT, OTHER_ENDPOINT], "it lives"
    driver.gone.add(ENDPOINT)
    driver.since()
    docker("ProgramExternalConnectivity", publishing(endpoint=OTHER_ENDPOINT))
    ended = ["revoke", "leave", "delete_endpoint"]
    assert driver.since() == ["program 18080", "revoke", *ended, "program 18080"]
    assert list(driver.networks[NETWORK].endpoints) == [OTHER_ENDPOINT]
    assert driver.owner == OTHER_ENDPOINT


def test_an_engine_that_starts_may_have_forgotten_endpoints() -> None:
    driver, docker = mortal()
    docker("Plugin.Activate")
    assert list(driver.networks[NETWORK].endpoints) == [ENDPOINT]
    driver.gone.add(ENDPOINT)
    docker("Plugin.Activate")
    assert list(driver.networks[NETWORK].endpoints) == []
    assert docker.plugin.repairs["container_gone"] == 1
    assert driver.owner is None


def test_a_start_deletes_what_is_gone_before_it_publishes_again(tmp_path: Path) -> None:
    _, docker = mortal(tmp_path)
    docker.plugin.close()
    driver = Mortal()
    driver.gone.add(ENDPOINT)
    with Plugin(driver, state=tmp_path):
        assert driver.calls == ["revoke", "leave", "delete_endpoint", "create_network"]
        assert not driver.networks[NETWORK].endpoints


# --------------------------------------------------------------------------------------- what is done after answers


class Slow(Publisher):
    """Leaves the most of a deletion for later."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.broken = False

    def later(self, what: str) -> Later:
        def work() -> None:
            assert self.go.wait(PATIENCE)
            if self.broken:
                raise DriverError("the kernel says no")
            self.calls.append(what)

        return Later(work)

    def delete_network(self, network: Network[Options]) -> Later:
        super().delete_network(network)
        return self.later("network's late work")

    def delete_endpoint(self, network: Network[Options], endpoint: Endpoint) -> Later:
        super().delete_endpoint(network, endpoint)
        return self.later("endpoint's late work")


def test_the_answer_does_not_wait_for_late_work(tmp_path: Path) -> None:
    driver = Slow()
    with Plugin(driver, state=tmp_path / "state") as plugin:
        docker = Docker(plugin)
        docker("CreateNetwork", create_network())
        docker.run()
        docker("Leave", of(endpoint=ENDPOINT))
        docker("DeleteEndpoint", of(endpoint=ENDPOINT))
        assert not driver.networks[NETWORK].endpoints
        docker("DeleteEndpoint", of(endpoint=ENDPOINT))  # once more: nothing to delete
        docker("DeleteNetwork", of())
        assert not driver.networks
        copy = shutil.copytree(tmp_path / "state", tmp_path / "copy")
        assert {intent for _, intent in intents(copy)} == {"DeleteEndpoint", "DeleteNetwork"}
        assert [call for call in driver.calls if "late work" in call] == []
        driver.go.set()
    assert driver.calls[-2:] == ["endpoint's late work", "network's late work"]
    assert intents(tmp_path / "state") == []


def test_a_network_is_made_when_others_are_gone() -> None:
    driver = Slow()
    with Plugin(driver) as plugin:
        docker = Docker(plugin)
        docker("CreateNetwork", create_network())
        docker("DeleteNetwork", of())
        with ThreadPoolExecutor(1) as user:
            made = user.submit(docker, "CreateNetwork", create_network(OTHER_NETWORK))
            with pytest.raises(TimeoutError):
                made.result(timeout=0.1)
            driver.go.set()
            made.result(PATIENCE)
        assert driver.calls[-2:] == ["network's late work", "create_network"]


@pytest.mark.parametrize("crash", [True, False], ids=["killed", "failed"])
def test_late_work_that_was_not_done_is_done_at_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, crash: bool
) -> None:
    driver = Slow()
    with Plugin(driver, state=tmp_path / "state") as plugin:
        docker = Docker(plugin)
        docker("CreateNetwork", create_network())
        docker.run()
        docker("DeleteEndpoint", of(endpoint=ENDPOINT))
        docker("DeleteNetwork", of())
        copy = shutil.copytree(tmp_path / "state", tmp_path / "copy")  # as SIGKILL would leave it
        driver.broken = not crash
        driver.go.set()
    if not crash:
        assert "the kernel says no" in caplog.text
    again = Slow()
    again.go.set()
    folder = copy if crash else tmp_path / "state"
    with Plugin(again, state=folder):
        assert again.calls == [
            "leave",
            "delete_endpoint",
            "endpoint's late work",
            "delete_network",
            "network's late work",
        ]
    assert intents(folder) == []


# ------------------------------------------------------------------------------------------- what a start restores


class Restoring(Publisher):
    """Says what it cannot make again."""

    broken: str | None = None

    def create_network(self, network: Network[Options]) -> None:
        super().create_network(network)
        if self.broken == "network":
            raise DriverError("the bridge is somebody else's now")

    def program_external_connectivity(
        self, network: Network[Options], endpoint: Endpoint, options: EndpointOptions
    ) -> None:
        super().program_external_connectivity(network, endpoint, options)
        if self.broken == "ports":
            raise DriverError("the port is taken now")


@pytest.mark.parametrize("broken", [None, "network", "ports"])
def test_a_start_makes_again_what_is_on_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    with Plugin(Publisher(), state=tmp_path) as plugin:
        for method, request in REPEATED:
            Docker(plugin)(method, request)
    driver = Restoring()
    driver.broken = broken
    with Plugin(driver, state=tmp_path) as plugin:
        assert driver.calls == ["create_network", "program 18080"][: 1 if broken == "network" else 2]
        assert list(driver.networks) == [NETWORK]
        assert bool([r for r in caplog.records if r.levelname == "ERROR"]) == (broken is not None)
        Docker(plugin)("NetworkDriver.DeleteNetwork", {"NetworkID": NETWORK})  # what failed can still be removed
        assert not driver.networks


# What is deleted after the answer


class Lazy(Publisher):
    """Deletes endpoints after the answer, when it may, or cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.fails_late = False

    def delete_endpoint(self, network: Network[Options], endpoint: Endpoint) -> Later:
        def work() -> None:
            assert self.go.wait(PATIENCE)
            if self.fails_late:
                raise DriverError("no")

        return Later(work)


def test_an_endpoint_that_could_not_be_deleted_does_not_outlive_its_network(tmp_path: Path) -> None:
    driver = Lazy()
    driver.fails_late = True
    driver.go.set()
    with Plugin(driver, state=tmp_path) as plugin:
        docker = Docker(plugin)
        docker("CreateNetwork", create_network())
        docker.run()
        docker("DeleteEndpoint", of(NETWORK, ENDPOINT))
        docker("DeleteNetwork", of())
    with Plugin(Publisher(), state=tmp_path) as plugin:
        assert Docker(plugin)("CreateNetwork", create_network()) == {}


def test_an_endpoint_of_the_same_id_may_come_before_the_old_one_has_gone(tmp_path: Path) -> None:
    driver = Lazy()
    with Plugin(driver, state=tmp_path) as plugin:
        docker = Docker(plugin)
        docker("CreateNetwork", create_network())
        docker.run()
        docker("DeleteEndpoint", of(NETWORK, ENDPOINT))
        docker("CreateEndpoint", create_endpoint())
        driver.go.set()
        wait_for_late_work(plugin)
        docker("Join", joining())
    driver = Lazy()
    with Plugin(driver, state=tmp_path) as plugin:
        assert driver.networks[NETWORK].endpoints[ENDPOINT].sandbox is not None
