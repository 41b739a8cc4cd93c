from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest
from werkzeug.test import Client, TestResponse

from netplugin_sdk import (
    AddressRef,
    AddressRequest,
    Conflict,
    DriverError,
    InvalidOption,
    InvalidRequest,
    IpamDriver,
    NotFound,
    Plugin,
    Pool,
    PoolRequest,
    Unavailable,
    Unsupported,
)
from netplugin_sdk.values import IPInterface

from .lab import ENDPOINT, NETWORK, Docker, Recorder, create_endpoint, create_network, of


class Addresses(IpamDriver):
    def request_pool(self, request: PoolRequest) -> Pool:
        return Pool("pool", ip_network("10.77.0.0/24"))

    def release_pool(self, pool_id: str) -> None:
        raise KeyError(pool_id)

    def request_address(self, request: AddressRequest) -> IPInterface:
        return ip_interface("10.77.0.2/24")

    def release_address(self, address: AddressRef) -> None:
        pass


@pytest.fixture
def driver() -> Recorder:
    return Recorder()


@pytest.fixture
def plugin(driver: Recorder) -> Plugin:
    return Plugin(driver)


# Which drivers


@pytest.mark.parametrize(
    ("drivers", "implements"),
    [
        ((Recorder,), ["NetworkDriver"]),
        ((Addresses,), ["IpamDriver"]),
        ((Recorder, Addresses), ["NetworkDriver", "IpamDriver"]),
        ((Addresses, Recorder), ["NetworkDriver", "IpamDriver"]),
    ],
)
def test_activation_says_what_there_is(drivers: tuple[Callable[[], Any], ...], implements: list[str]) -> None:
    docker = Docker(Plugin(*(driver() for driver in drivers)))
    assert docker("Plugin.Activate") == {"Implements": implements}
    for kind in ("NetworkDriver", "IpamDriver"):
        assert docker.ask(f"{kind}.GetCapabilities")[0] == (200 if kind in implements else 404)


def test_both_drivers_answer_under_one_name(driver: Recorder) -> None:
    docker = Docker(Plugin(driver, Addresses()))
    docker("CreateNetwork", create_network())
    assert docker("IpamDriver.RequestPool", {"AddressSpace": "LocalDefault"})["PoolID"] == "pool"
    assert driver.calls == ["create_network"]


@pytest.mark.parametrize(
    "drivers", [(), (Recorder(), Recorder()), (Addresses(), Addresses()), (Recorder(), Addresses(), Recorder())]
)
def test_one_driver_of_each_kind(drivers: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match="a plugin takes a NetworkDriver, an IpamDriver, or one of each"):
        Plugin(*drivers)


@pytest.mark.parametrize("thing", [Recorder, "l2", None])
def test_what_is_no_driver(thing: Any) -> None:
    with pytest.raises(TypeError, match="is neither a NetworkDriver nor an IpamDriver"):
        Plugin(thing)


class Both(Recorder, Addresses):
    pass


def test_a_driver_that_is_both_kinds_is_not_half_lost() -> None:
    # Silently serving only one half would show up in production, as "does not implement the requested driver".
    with pytest.raises(TypeError):
        Plugin(Both())


def test_the_state_folder_may_be_named_by_a_text(tmp_path: Path) -> None:
    with Plugin(Recorder(), state=str(tmp_path / "l2")):
        assert (tmp_path / "l2" / "state.db").exists()
        with pytest.raises(Conflict, match="is in use by pid"):
            Plugin(Recorder(), state=tmp_path / "l2")
    Plugin(Recorder(), state=tmp_path / "l2").close()


def test_a_closed_plugin_answers_errors(driver: Recorder, tmp_path: Path) -> None:
    plugin = Plugin(driver, state=tmp_path)
    plugin.close()
    plugin.close()
    assert Docker(plugin).refused("CreateNetwork", create_network())[0] == 503
    assert driver.calls == []


# Dispatch


@pytest.mark.parametrize(
    "path",
    [
        "/NetworkDriver.Nonsense",
        "/IpamDriver.RequestPool",
        "/NetworkDriver.join",
        "/NetworkDriver.CreateNetwork/",
        "/CreateNetwork",
        "/",
        "",
        "NetworkDriver.CreateNetwork",
    ],
)
def test_an_unknown_path_is_not_supported(path: str, plugin: Plugin) -> None:
    answer = plugin.handle(path, b"{}")
    assert answer.status == 404
    content = json.loads(answer.body)
    assert content["Err"] == content["Error"]
    assert content["Err"].endswith(" is not supported by this plugin")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DriverError("no room"), 500),
        (InvalidRequest("no room"), 400),
        (InvalidOption("no room"), 400),
        (NotFound("no room"), 422),
        (Conflict("no room"), 409),
        (Unsupported("no room"), 501),
        (Unavailable("no room"), 503),
    ],
)
def test_a_driver_error_is_its_own_answer(
    error: DriverError, status: int, driver: Recorder, plugin: Plugin, caplog: pytest.LogCaptureFixture
) -> None:
    driver.fails["create_network"] = error
    assert Docker(plugin).refused("CreateNetwork", create_network()) == (status, "no room")
    assert caplog.records == []


class Own(DriverError):
    status = 507


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (Own("no\n\troom   left\n"), (507, "no room left")),
        (Own(), (507, "Own")),
        (Own(" \n"), (507, "Own")),
        (Own("no", "room"), (507, "('no', 'room')")),
        (ValueError("no\nroom"), (500, "ValueError: no room")),
        (KeyError("10.77.0.0/24"), (500, "KeyError: '10.77.0.0/24'")),
        (OSError(28, "No space left on device"), (500, "OSError: [Errno 28] No space left on device")),
        (OSError(), (500, "OSError")),
        (NotImplementedError(), (500, "NotImplementedError")),
    ],
)
def test_every_error_is_one_line(error: Exception, answer: tuple[int, str], driver: Recorder, plugin: Plugin) -> None:
    driver.fails["create_network"] = error
    assert Docker(plugin).refused("CreateNetwork", create_network()) == answer


def test_any_other_exception_is_logged_with_its_traceback(
    driver: Recorder, plugin: Plugin, caplog: pytest.LogCaptureFixture
) -> None:
    driver.fails["create_network"] = ValueError("a bug")
    Docker(plugin).refused("CreateNetwork", create_network())
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == (
        "netplugin_sdk",
        "ERROR",
        "NetworkDriver.CreateNetwork failed",
    )
    assert "in create_network" in caplog.text
    assert "ValueError: a bug" in caplog.text


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even its text")


@pytest.mark.parametrize(
    "error",
    [
        # Names of files and the output of programs, read with surrogateescape, hold what UTF-8 has no form for.
        DriverError("cannot read b\udcffd"),
        OSError(2, "No such file or directory", "b\udcffd"),
        Unprintable(),
    ],
    ids=["surrogate", "surrogate in a bug", "unprintable"],
)
def test_whatever_a_driver_raises_is_answered(error: Exception, driver: Recorder, plugin: Plugin) -> None:
    driver.fails["create_network"] = error
    assert Docker(plugin).refused("CreateNetwork", create_network())[0] == 500


# Bodies


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "the request body is empty, as in a retry after a lost connection; try again"),
        (b"{", "the request body is not JSON: Input data was truncated"),
        (b"[]", "the request must be an object, got []"),
        (b"null", "the request must be an object, got None"),
        (b'"x"', "the request must be an object, got 'x'"),
        (b"{}", "NetworkID is missing: it must be an id"),
        (b'{"NetworkID": 7}', "NetworkID must be an id, got 7"),
    ],
)
def test_a_bad_body_names_the_method(body: bytes, text: str, driver: Recorder, plugin: Plugin) -> None:
    answer = plugin.handle("/NetworkDriver.CreateNetwork", body)
    assert (answer.status, json.loads(answer.body)["Err"]) == (400, f"NetworkDriver.CreateNetwork: {text}")
    assert driver.calls == []


def test_a_body_of_any_depth_is_a_bad_request(plugin: Plugin) -> None:
    statuses = {
        plugin.handle("/NetworkDriver.CreateNetwork", b'{"NetworkID":' + b"[" * depth + b"]" * depth + b"}").status
        for depth in (1, 900, *range(920, 1000), 100_000)
    }
    assert statuses == {400}


# The log


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "netplugin_sdk.core.calls"]


@pytest.fixture(autouse=True)
def at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "netplugin_sdk")


def say(plugin: Plugin, method: str, request: Any) -> None:
    plugin.log(plugin.handle(f"/NetworkDriver.{method}", json.dumps(request).encode()))


def test_a_call_is_one_line_of_the_log(plugin: Plugin, caplog: pytest.LogCaptureFixture) -> None:
    say(plugin, "CreateNetwork", create_network())
    say(plugin, "CreateEndpoint", create_endpoint())
    (level, network), (_, endpoint) = logged(caplog)
    assert level == "INFO"
    assert network.startswith(f"method=NetworkDriver.CreateNetwork network={NETWORK[:12]} ")
    assert endpoint.startswith(f"method=NetworkDriver.CreateEndpoint network={NETWORK[:12]} endpoint={ENDPOINT[:12]} ")
    call = caplog.records[-1].call  # type: ignore[attr-defined]
    assert call["method"] == "NetworkDriver.CreateEndpoint"
    assert (call["network"], call["endpoint"], call["status"]) == (NETWORK[:12], ENDPOINT[:12], 200)
    assert isinstance(call["ms"], float)


def test_a_failed_call_is_a_warning_with_status_error_and_time(
    driver: Recorder, plugin: Plugin, caplog: pytest.LogCaptureFixture
) -> None:
    driver.fails["create_network"] = Conflict("there is one")
    say(plugin, "CreateNetwork", create_network())
    ((level, line),) = logged(caplog)
    assert level == "WARNING"
    assert line.startswith(f"method=NetworkDriver.CreateNetwork network={NETWORK[:12]} ")
    assert line.endswith(" status=409 error=there is one")
    call = caplog.records[-1].call  # type: ignore[attr-defined]
    assert isinstance(call["ms"], float), "a call that fails may be the slow one"


def test_a_method_that_is_not_supported_is_no_warning(plugin: Plugin, caplog: pytest.LogCaptureFixture) -> None:
    say(plugin, "ProgramExternalConnectivity", of(NETWORK, ENDPOINT))
    ((level, line),) = logged(caplog)
    assert level == "INFO"
    assert line.startswith("method=NetworkDriver.ProgramExternalConnectivity ")
    assert " status=404" in line


def test_handling_alone_logs_no_call(plugin: Plugin, caplog: pytest.LogCaptureFixture) -> None:
    Docker(plugin)("CreateNetwork", create_network())
    assert logged(caplog) == []


# WSGI


def post(plugin: Plugin, path: str, body: bytes) -> TestResponse:
    return Client(plugin).post(path, data=body)


def test_the_plugin_is_a_wsgi_application(plugin: Plugin, caplog: pytest.LogCaptureFixture) -> None:
    response = post(plugin, "/Plugin.Activate", b"")
    assert (response.status_code, response.json) == (200, {"Implements": ["NetworkDriver"]})
    assert response.content_type == "application/vnd.docker.plugins.v1.1+json"
    assert response.content_length == len(response.data)
    response = post(plugin, "/NetworkDriver.CreateNetwork", json.dumps(create_network()).encode())
    assert (response.status_code, response.json) == (200, {})
    assert [line.split()[0] for _, line in logged(caplog)] == [
        "method=Plugin.Activate",
        "method=NetworkDriver.CreateNetwork",
    ]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD"])
def test_only_post_is_answered(method: str, driver: Recorder, plugin: Plugin, caplog: pytest.LogCaptureFixture) -> None:
    response = Client(plugin).open("/NetworkDriver.CreateNetwork", method=method, data=json.dumps(create_network()))
    assert response.status_code == 405
    assert driver.calls == []
    if method != "HEAD":
        assert response.json == {"Err": f"{method} is not POST", "Error": f"{method} is not POST"}
    ((level, line),) = logged(caplog)
    assert level == "WARNING"
    assert "NetworkDriver.CreateNetwork" in line, "the log says what was asked for"


def test_errors_over_wsgi(plugin: Plugin) -> None:
    assert post(plugin, "/NetworkDriver.Nonsense", b"").status_code == 404
    response = post(plugin, "/NetworkDriver.Join", b"{")
    assert response.status_code == 400
    assert response.content_type == "application/vnd.docker.plugins.v1.1+json"


def test_a_path_cannot_write_lines_into_the_log(plugin: Plugin, caplog: pytest.LogCaptureFixture) -> None:
    response = post(plugin, "/x%0Amethod=NetworkDriver.DeleteNetwork%20network=0", b"")
    assert response.status_code == 404
    assert response.json is not None
    assert "\n" not in response.json["Err"]
    ((_, line),) = logged(caplog)
    assert "\n" not in line


def test_the_log_says_how_long_a_call_took() -> None:
    """In milliseconds: at least what it waited, and no thousand times that."""
    driver, waited = Recorder(), threading.Event()

    def wait(_: object) -> None:
        waited.wait(0.05)

    driver.hooks["create_network"] = wait
    began = time.monotonic()
    with Plugin(driver) as plugin:
        answer = plugin.handle("/NetworkDriver.CreateNetwork", json.dumps(create_network()).encode())
    assert 50 <= answer.call["ms"] <= (time.monotonic() - began) * 1000
