"""Calls that take too long: the engine is told in time, and what they make in the end is undone."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from netplugin_sdk import Plugin, Scope
from netplugin_sdk.core.calls import Call
from netplugin_sdk.ipam import PoolIpamDriver
from netplugin_sdk.protocol.messages import AddressRequest, Pool, PoolRequest
from netplugin_sdk.serving.http import Limits
from netplugin_sdk.values import IPInterface

from ..patience import PATIENCE
from .lab import (
    ENDPOINT,
    NETWORK,
    OTHER_NETWORK,
    Docker,
    Everything,
    Publisher,
    create_endpoint,
    create_network,
    joining,
    of,
    publishing,
)
from .serving import MOMENT, Gate, echo, serving_unix, wait_for

SHORT = Limits(call_time=0.3)


# Who waits is told


def test_the_engine_is_told_in_time_and_the_log_says_where_it_hangs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving_unix(tmp_path, SHORT) as served:
        gate, client = served.driver.gate(), served.connect()
        client.send(echo(gate="gate"))
        gate.wait_entered()
        reply = client.last()
        assert (reply.status, reply.error) == (503, "NetworkDriver.AllocateNetwork took over 0.3 seconds")
        stacks = [r.getMessage() for r in caplog.records if "pass_through" in r.getMessage()]
        assert [(s.splitlines()[0], r.levelname) for s, r in zip(stacks, caplog.records, strict=False)] == [
            ("NetworkDriver.AllocateNetwork has been running for 0 s:", "WARNING"),
            ("NetworkDriver.AllocateNetwork took over 0.3 s: the engine no longer waits", "ERROR"),
        ]
        assert all("self._opened.wait" in stack for stack in stacks), "the line where it hangs"
        gate.open()


def test_other_networks_are_served_meanwhile_and_the_same_one_afterwards(tmp_path: Path) -> None:
    with serving_unix(tmp_path, SHORT) as served:
        gate, client, other = served.driver.gate(), served.connect(), served.connect()
        client.send(echo(gate="gate"))
        gate.wait_entered()
        for number in range(20):
            assert other.echo(network=OTHER_NETWORK, n=str(number)) == {"n": str(number)}
        assert client.last().status == 503
        behind = served.connect()
        behind.send(echo(n="behind"))
        assert not behind.readable(MOMENT / 3)
        gate.open()
        assert behind.receive().options == {"n": "behind"}


def test_who_waits_for_a_call_that_hangs_is_told_too_and_its_own_is_not_begun(tmp_path: Path) -> None:
    with serving_unix(tmp_path, SHORT) as served:
        gate, clients = served.driver.gate(), [served.connect() for _ in range(5)]
        for client in clients:
            client.send(echo(gate="gate"))
        assert [client.last().status for client in clients] == [503] * 5
        gate.open()
        wait_for(lambda: not served.server._connections, "the threads to end")


def test_a_call_in_time_is_told_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with serving_unix(tmp_path, Limits(call_time=PATIENCE)) as served:
        gate, client = served.driver.gate(), served.connect()
        client.send(echo(gate="gate"))
        gate.wait_entered()
        assert not client.readable(MOMENT)
        gate.open()
        assert client.receive().options == {"gate": "gate"}
        assert client.echo(n="2") == {"n": "2"}
    assert not caplog.records


def test_a_call_is_either_answered_or_given_up() -> None:
    for first, second in ((Call.commit, Call.expire), (Call.expire, Call.commit)):
        call = Call()
        assert first(call)
        assert not second(call)
        assert first(call)
        assert call.expired is (first is Call.expire)


# What they make


def begun(docker: Docker, method: str, request: dict[str, Any], call: Call) -> tuple[int, str]:
    answer = docker.plugin.handle(f"/NetworkDriver.{method}", json.dumps(request).encode(), call)
    return answer.status, json.loads(answer.body).get("Err", "")


def gives_up(call: Call) -> Callable[[Any], None]:
    """For a driver's method: the engine's patience ends in it."""

    def hook(_: Any) -> None:
        assert call.expire()

    return hook


LATE = [
    ("CreateNetwork", create_network(), ["create_network", "delete_network"]),
    ("CreateEndpoint", create_endpoint(), ["create_endpoint", "delete_endpoint"]),
    ("Join", joining(), ["join", "leave"]),
    ("ProgramExternalConnectivity", publishing(), ["program 18080", "revoke"]),
]


@pytest.mark.parametrize(("method", "request_", "calls"), LATE, ids=[method for method, *_ in LATE])
def test_what_comes_too_late_is_undone(method: str, request_: dict[str, Any], calls: list[str], tmp_path: Path) -> None:
    driver = Publisher()
    with Plugin(driver, state=tmp_path) as plugin:
        docker = Docker(plugin)
        for before, request, _ in LATE[: [name for name, *_ in LATE].index(method)]:
            docker(before, request)
        driver.since()
        call = Call()
        driver.hooks[calls[0]] = gives_up(call)
        refusal = (503, f"NetworkDriver.{method} took too long, and is undone")
        assert begun(docker, method, request_, call) == refusal
        assert driver.since() == calls
        driver.hooks.clear()
        docker(method, request_)  # as if it had not been asked before
        assert driver.since() == calls[:1]
    with Plugin(driver, state=tmp_path) as plugin:
        assert Docker(plugin)("DeleteNetwork", of(NETWORK)) == {}
        assert not driver.networks


class Swarm(Everything):
    scope = Scope.GLOBAL


def test_what_is_allocated_too_late_is_freed() -> None:
    driver, call = Swarm(), Call()
    with Plugin(driver) as plugin:
        docker = Docker(plugin)
        driver.hooks = {"allocate_network": gives_up(call)}
        assert begun(docker, "AllocateNetwork", of(), call)[0] == 503
        assert driver.since() == ["allocate_network", f"free_network {NETWORK}"]
        assert not driver.allocations
        driver.hooks.clear()
        docker("AllocateNetwork", of())
        assert driver.since() == ["allocate_network"]


@pytest.mark.parametrize(
    ("method", "request_"), [("AllocateNetwork", of()), *((method, request) for method, request, _ in LATE)]
)
def test_what_is_too_late_when_its_turn_comes_is_not_begun(method: str, request_: dict[str, Any]) -> None:
    driver, call = Swarm(), Call()
    with Plugin(driver) as plugin:
        docker = Docker(plugin)
        for before, request, _ in LATE:
            if before == method:
                break
            docker(before, request)
        driver.since()
        assert call.expire()
        assert begun(docker, method, request_, call)[0] == 503
        assert driver.since() == []


class Untouched(PoolIpamDriver):
    def request_pool(self, request: PoolRequest) -> Pool:
        raise AssertionError("it is begun")

    def request_address(self, request: AddressRequest) -> IPInterface:
        raise AssertionError("it is begun")


@pytest.mark.parametrize("method", ["RequestPool", "RequestAddress"])
def test_addresses_are_not_given_to_who_is_gone_when_its_turn_comes(method: str) -> None:
    call = Call()
    assert call.expire()
    with Plugin(Untouched()) as plugin:
        body = json.dumps({"AddressSpace": "LocalDefault", "PoolID": "any", "Address": ""}).encode()
        answer = plugin.handle(f"/IpamDriver.{method}", body, call)
    assert "it is begun" not in answer.body.decode()
    assert answer.status == 503


class SlowPools(PoolIpamDriver):
    """Somebody gives up a call while it is answered."""

    call: Call | None = None

    def request_pool(self, request: PoolRequest) -> Pool:
        given = super().request_pool(request)
        assert self.call is None or self.call.expire()
        return given

    def request_address(self, request: AddressRequest) -> IPInterface:
        given = super().request_address(request)
        assert self.call is None or self.call.expire()
        return given


def test_addresses_that_are_given_too_late_are_taken_back(caplog: pytest.LogCaptureFixture) -> None:
    driver = SlowPools()
    with Plugin(driver) as plugin:
        pool = {"AddressSpace": "LocalDefault", "Pool": "10.1.0.0/24"}
        address = {"PoolID": "LocalDefault/10.1.0.0/24", "Address": "10.1.0.9"}
        for method, request in (("RequestPool", pool), ("RequestAddress", address)):
            driver.call = Call()
            answer = plugin.handle(f"/IpamDriver.{method}", json.dumps(request).encode(), driver.call)
            assert (answer.status, answer.error) == (503, f"IpamDriver.{method} took too long, and is undone")
            driver.call = None
            assert plugin.handle(f"/IpamDriver.{method}", json.dumps(request).encode()).status == 200
        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(SlowPools, "release_address", lambda *_: 1 / 0)
            driver.call = Call()
            request = {**address, "Address": "10.1.0.10"}
            answer = plugin.handle("/IpamDriver.RequestAddress", json.dumps(request).encode(), driver.call)
            assert answer.status == 503
    assert "cannot take back a pool or an address that was given too late" in caplog.text


DELETIONS = [
    ("Leave", of(NETWORK, ENDPOINT), "leave"),
    ("DeleteEndpoint", of(NETWORK, ENDPOINT), "delete_endpoint"),
    ("DeleteNetwork", of(NETWORK), "delete_network"),
]


@pytest.mark.parametrize(("method", "request_", "called"), DELETIONS, ids=[method for method, *_ in DELETIONS])
def test_what_is_removed_too_late_is_removed(method: str, request_: dict[str, Any], called: str) -> None:
    driver = Publisher()
    with Plugin(driver) as plugin:
        docker, call = Docker(plugin), Call()
        docker("CreateNetwork", create_network())
        docker.run()
        driver.hooks[called] = gives_up(call)
        assert begun(docker, method, request_, call) == (503, f"NetworkDriver.{method} took too long")
        driver.since()
        docker(method, request_)
        assert driver.since() == []


def test_what_is_written_down_already_is_answered() -> None:
    driver = Publisher()
    with Plugin(driver) as plugin:
        call, late = Call(), list[bool]()

        def too_late(_network: object) -> None:
            late.append(call.expire())

        networks: Any = plugin._networks
        networks._comparison.network_created = too_late
        assert begun(Docker(plugin), "CreateNetwork", create_network(), call)[0] == 200
        assert late == [False]
        assert len(driver.networks) == 1


def test_a_call_that_waited_too_long_is_not_begun() -> None:
    driver, gate = Publisher(), Gate()
    driver.hooks["create_network"] = lambda _: gate.pass_through()
    with Plugin(driver) as plugin:
        docker, call = Docker(plugin), Call()
        first = threading.Thread(target=docker, args=("CreateNetwork", create_network()))
        first.start()
        gate.wait_entered()
        answers: list[tuple[int, str]] = []
        second = threading.Thread(
            target=lambda: answers.append(begun(docker, "CreateEndpoint", create_endpoint(), call))
        )
        second.start()
        assert call.expire()
        gate.open()
        first.join(PATIENCE)
        second.join(PATIENCE)
        assert answers == [(503, "NetworkDriver.CreateEndpoint took too long, and is undone")]
        assert driver.since() == ["create_network"]


# systemd's watchdog


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(str(tmp_path / "notify"))
    notify.settimeout(PATIENCE)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    return notify


def test_the_watchdog_hears_that_it_lives_also_while_a_call_hangs(systemd: socket.socket, tmp_path: Path) -> None:
    with systemd, serving_unix(tmp_path) as served:
        assert systemd.recv(100) == b"WATCHDOG=1"
        gate = served.driver.gate()
        served.connect().send(echo(gate="gate"))
        gate.wait_entered()
        assert [systemd.recv(100) for _ in range(10)] == [b"WATCHDOG=1"] * 10
        gate.open()


def test_the_watchdog_hears_nothing_of_a_server_that_serves_nobody(
    systemd: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    with systemd, serving_unix(tmp_path) as served:
        client = served.connect()
        client.echo(n="1")
        monkeypatch.setattr(served.server.plugin, "log", lambda _: gate.pass_through())  # nobody reads the log, say
        client.send(echo(n="2"))  # and the line of the first may be the one that waits
        gate.wait_entered()
        served.connect().send(echo(n="3"))  # should another thread lead by now, it waits as well
        systemd.settimeout(MOMENT)

        def is_silent() -> bool:
            with suppress(TimeoutError):
                return not systemd.recv(100)
            return True

        wait_for(is_silent, "silence")
        gate.open()
        systemd.settimeout(PATIENCE)
        assert systemd.recv(100) == b"WATCHDOG=1"


@pytest.mark.parametrize("environment", [{"WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"}], ids=lambda e: next(iter(e)))
def test_no_watchdog_hears_nothing(
    systemd: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with systemd, serving_unix(tmp_path) as served:
        served.connect().echo(n="1")
        systemd.settimeout(MOMENT)
        with pytest.raises(TimeoutError):
            systemd.recv(100)
