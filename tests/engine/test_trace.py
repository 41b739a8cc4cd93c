"""`netplugin trace` between real engines and plugins: ours, and one of docker-plugin-api that is not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from netplugin_sdk.cnm.remote import Folders, installed
from netplugin_sdk.testing.engine import PrivateEngine, Process, wait_until
from netplugin_sdk.testing.recording import Entry, Exchange, read

from ..patience import PATIENCE
from .conftest import plugin_beside

pytestmark = pytest.mark.one_engine

NETPLUGIN = str(Path(sys.executable).with_name("netplugin"))

FOREIGN = """
import subprocess, sys
import docker_plugin_api.Plugin as api
import flask
from werkzeug.serving import run_simple

app = flask.Flask("foreign")
api.functions.append("NetworkDriver")

def answers(method):
    return api.app.route(f"/NetworkDriver.{method}", methods=["POST"])

def name():
    return flask.request.get_json(force=True)["EndpointID"][:8]

@answers("GetCapabilities")
def capabilities(): return {"Scope": "local", "ConnectivityScope": "local"}

@answers("CreateNetwork")
def create_network(): return {}

@answers("DeleteNetwork")
def delete_network(): return {}

@answers("CreateEndpoint")
def create_endpoint(): return {"Interface": {}}

@answers("EndpointOperInfo")
def info(): return {"Value": {}}

@answers("Join")
def join():
    command = f"ip link add fo{name()} type veth peer name fi{name()}"
    subprocess.run(command.split(), check=True)
    return {"InterfaceName": {"SrcName": f"fi{name()}", "DstPrefix": "eth"}, "Gateway": "", "StaticRoutes": [],
            "DisableGatewayService": True}

@answers("Leave")
def leave(): return {}

@answers("DeleteEndpoint")
def delete_endpoint():
    subprocess.run(["ip", "link", "del", f"fo{name()}"])
    return {}

app.register_blueprint(api.app)
run_simple(f"unix://{sys.argv[1]}", 0, app, threaded=True)
"""


@pytest.fixture
def foreign(engine: PrivateEngine, tmp_path: Path) -> Iterator[Process]:
    file = tmp_path / "foreign.py"
    file.write_text(FOREIGN)
    yield from plugin_beside(engine, "foreign", [sys.executable, str(file), "/run/docker/plugins/foreign.sock"])


@contextmanager
def tracing(engine: PrivateEngine, plugin: str, record: Path, mark: str = "in front") -> Iterator[Process]:
    """A trace of it, which has come so far."""
    with engine.spawn("trace", [NETPLUGIN, "trace", plugin, "-v", "--record", str(record)]) as trace:
        wait_until(lambda: record.exists() and mark in record.read_text(), PATIENCE)
        yield trace


def methods(entries: list[Entry]) -> list[str]:
    return [entry.method.partition(".")[2] for entry in entries if isinstance(entry, Exchange)]


def listed(engine: PrivateEngine) -> tuple[str, list[str]]:
    """What the engine says that there is, and what its scan finds."""
    return engine.docker("info", "--format", "{{json .Plugins}}"), installed(Folders(engine.plugin_folder, ()))


def day(engine: PrivateEngine, plugin: str) -> None:
    """Of a container."""
    engine.docker("network", "create", "--driver", plugin, "--subnet", "10.77.0.0/24", "traced")
    engine.docker("run", "--rm", "--network", "traced", "busybox", "ip", "addr", "show", "eth0")
    engine.docker("network", "rm", "traced")


DAY = ["CreateNetwork", "CreateEndpoint", "Join", "Leave", "DeleteEndpoint", "DeleteNetwork"]


@pytest.mark.parametrize("plugin", ["myplugin", "foreign"])
def test_a_day_is_seen_and_nobody_notices(
    engine: PrivateEngine, plugin: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    request.getfixturevalue(plugin)
    record = tmp_path / "record.jsonl"
    day(engine, plugin)  # the engine keeps connections from here on; the foreign plugin closes them all
    before = listed(engine)
    with tracing(engine, plugin, record, "kept connection" if plugin == "myplugin" else "in front") as trace:
        day(engine, plugin)
        assert listed(engine) == before
    entries = list(read(record))
    assert [method for method in methods(entries) if method in DAY] == DAY
    assert all(entry.status == 200 and entry.ms for entry in entries if isinstance(entry, Exchange) and not entry.error)
    assert "DeleteNetwork" in trace.log.read_text()
    assert not list(engine.plugin_folder.glob(".*"))

    day(engine, plugin)  # as before
    again = engine.run([NETPLUGIN, "replay", str(record), "--to", plugin])
    assert again.returncode == 0, again.stdout
    assert "0 answered differently" in again.stdout


@pytest.mark.usefixtures("myplugin")
def test_killed_in_the_middle_of_a_day(engine: PrivateEngine, tmp_path: Path) -> None:
    with tracing(engine, "myplugin", tmp_path / "record.jsonl") as trace:
        engine.docker("network", "create", "--driver", "myplugin", "mynet")
        engine.docker("run", "--detach", "--name", "web", "--network", "mynet", "busybox", "sleep", "600")
        trace.kill()
    wait_until(lambda: not list(engine.plugin_folder.glob(".*")), PATIENCE)
    assert "0% packet loss" in engine.docker("run", "--rm", "--network", "mynet", "busybox", "ping", "-c1", "web")
    engine.docker("rm", "--force", "web")
    engine.docker("network", "rm", "mynet")
