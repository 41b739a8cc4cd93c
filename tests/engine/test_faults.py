"""The plugin is killed in the middle of a real engine's requests, and starts again: then disk, kernel and Docker agree.

The test creates a network, runs a container on it with a published port, and removes both. Meanwhile it kills the
plugin as that enters its Nth system call that changes anything (tests/faults). In tests/kernel a simulated engine calls
and repeats; here a real one does, at every ninth point of one engine or another, and with NETPLUGIN_FULL at each point
of each.
"""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import count
from pathlib import Path
from shutil import copy
from tempfile import TemporaryDirectory
from threading import Event, Thread

import pytest

from netplugin_sdk.core.engine_api import Docker, DockerError
from netplugin_sdk.testing.engine import PrivateEngine, Process, wait_until

from ..patience import PATIENCE
from ..volume import volume
from .conftest import remove_all, state_of

EVERY = volume(27, 1)
FIRST = {"20.10": 1, "26.1": min(10, EVERY), "28.5": min(19, EVERY)}
"""Of the points: others on each engine."""
KILL_AT = Path(__file__).parents[1] / "faults" / "kill_at.py"
PROGRAM = """
from myplugin.__main__ import main
from functools import partial
from netplugin_sdk.core import plugin
plugin.Timings = partial(plugin.Timings, engine_grace=0.2, missing_grace=0.6)  # else the test takes an hour
main()
"""
EMPTY = "the request body is empty"
"""So the engine repeats a request that it had sent already (moby pkg/plugins/client.go)."""


class Supervisor:
    """Starts the plugin again when it has ended, as systemd does."""

    def __init__(self, engine: PrivateEngine) -> None:
        self._engine = engine
        self.plugin = self._start()
        self._over = Event()
        self._thread = Thread(target=self._run)
        self._thread.start()

    def _start(self) -> Process:
        return self._engine.start_plugin("myplugin", [sys.executable, "-c", PROGRAM])

    def _run(self) -> None:
        while not self._over.wait(0.02):
            if not self.plugin.running:
                self.plugin = self._start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self.plugin.stop()


@pytest.fixture
def supervisor(engine: PrivateEngine) -> Iterator[Supervisor]:
    before = state_of(engine)
    with closing(Supervisor(engine)) as supervisor:
        yield supervisor
        remove_all(engine)
        wait_until(lambda: state_of(engine) == before, PATIENCE)


def rows(engine: PrivateEngine) -> list[str]:
    """Of a copy: nobody else reads the file."""
    with TemporaryDirectory() as folder:
        for file in (engine.run_folder.parent / "var/lib/netplugin/myplugin").glob("state.db*"):
            copy(file, folder)
        with closing(sqlite3.connect(f"{folder}/state.db")) as db:
            return sorted(
                f"{table} {row}"
                for table, columns in (("networks", "id, intent"), ("endpoints", "id, intent"), ("joins", "key"))
                for row in db.execute(f"SELECT {columns} FROM {table}")
            )


def live(docker: Docker) -> list[str]:
    """The life of a network and a container; returns the engine's errors, in its words."""
    refused = []

    def ask(method: str, path: str, content: Mapping[str, object] | None = None) -> bool:
        try:
            docker.call(method, path, content)
        except DockerError as error:
            refused.append(f"{method} {path}: {error}")
            return False
        return True

    pool = {"Config": [{"Subnet": "10.77.7.0/24"}]}
    if ask("POST", "/networks/create", {"Name": "faulty", "Driver": "myplugin", "IPAM": pool}):
        container = {
            "Image": "busybox",
            "Cmd": ["sleep", "60"],
            "StopSignal": "KILL",
            "ExposedPorts": {"80/tcp": {}},
            "HostConfig": {"NetworkMode": "faulty", "PortBindings": {"80/tcp": [{"HostPort": "28080"}]}},
        }
        ask("POST", "/containers/create?name=faulty", container)
        ask("POST", "/containers/faulty/start")
        ask("DELETE", "/containers/faulty?force=1")
        ask("DELETE", "/networks/faulty")
    return refused


def test_killed_at_points_of_what_an_engine_asks_for(engine: PrivateEngine, supervisor: Supervisor) -> None:
    engine.docker("network", "create", "--driver", "myplugin", "--subnet", "10.77.8.0/24", "keeper")
    right = state_of(engine), rows(engine)
    lost: list[str] = []
    tried = refusals = 0
    with engine.api() as docker:
        for point in count(FIRST[engine.version], EVERY):
            wait_until(lambda: supervisor.plugin.running, PATIENCE)  # it may have been killed after all was done
            plugin = supervisor.plugin
            command = [sys.executable, "-I", str(KILL_AT), str(plugin.pid), str(point)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killer:
                assert killer.stdout is not None
                assert killer.stdout.readline() == "attached\n"
                refused = live(docker)
                until = time.monotonic() + PATIENCE
                while (seen := (state_of(engine), rows(engine))) != right and time.monotonic() < until:
                    time.sleep(0.1)
                if not plugin.running:
                    *_, what = killer.stdout.read().splitlines()
                killer.send_signal(signal.SIGKILL)
            if plugin.running:
                break
            tried += 1
            refusals += len(refused)
            lost += [f"point {what}: {said}" for said in refused if EMPTY not in said]
            if seen != right:
                left, wanted = [[*state.splitlines(), *rows] for state, rows in (seen, right)]
                lost.append(f"point {what}: left {[line for line in left if line not in wanted]}")
                break
    print(f"Engine {engine.version}: {tried} points tried, {len(lost)} lost; {refusals} refused")
    assert not lost, "\n".join(lost)
    assert tried > 100 // EVERY
