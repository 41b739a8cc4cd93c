"""`netplugin dev`: code that is saved again and again under callers that never notice."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from netplugin_sdk.cnm.remote import Address, Patience, RemotePlugin

from ..patience import PATIENCE
from .lab import ENDPOINT, NETWORK, create_endpoint, create_network
from .serving import METHOD, connect_unix, echo, wait_for

SAVES = 8
"""How often the code is saved under the callers."""

SOURCE = """
import os, time
from pathlib import Path
from helper import VERSION
from netplugin_sdk import Join, NetworkDriver, Scope

class Counting(NetworkDriver):
    scope = Scope.GLOBAL
    def allocate_network(self, request):
        if "started" in request.options:  # wait until the test lets it go on
            started = Path(request.options["started"])
            started.touch()
            while started.exists():
                time.sleep(0.01)
        known = sum(len(network.endpoints) for network in self.networks.values())
        return {"version": str(VERSION), "endpoints": str(known), "pid": str(os.getpid())}
    def create_network(self, network): pass
    def delete_network(self, network): pass
    def create_endpoint(self, network, endpoint): pass
    def delete_endpoint(self, network, endpoint): pass
    def join(self, network, endpoint, sandbox): return Join()
    def leave(self, network, endpoint): pass
"""


_CALLS = itertools.count()


def unique() -> dict[str, str]:
    """An option that makes a request another one than those before: a repeated one is answered from memory."""
    return {"call": str(next(_CALLS))}


class Dev:
    """A `netplugin dev` that runs."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self.folder, self.process = folder, process
        self.path = folder / "s.sock"
        self.url = f"unix://{self.path}"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def save(self, version: object) -> None:
        """In the way that keeps the size, and is not atomic."""
        (self.folder / "helper.py").write_text(f"VERSION = {version}\n")

    def ask(self, **options: str) -> dict[str, str]:
        with connect_unix(self.path) as client:
            return client.echo(**unique(), **options)

    def wait_for_version(self, version: int) -> None:
        wait_for(lambda: self.ask()["version"] == str(version), f"version {version}; the log:\n{self.log}")

    def wait_for_log(self, text: str) -> None:
        wait_for(lambda: text in self.log, f"{text!r} in the log:\n{self.log}")

    def children(self) -> list[int]:
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def lives(pid: int) -> bool:
    """A zombie does not."""
    return Path(f"/proc/{pid}/exe").exists()


@contextmanager
def developing(folder: Path, *arguments: str) -> Iterator[Dev]:
    (folder / "counting.py").write_text(SOURCE)
    (folder / "helper.py").write_text("VERSION = 0\n")
    command = [sys.executable, "-m", "netplugin_sdk.cli", "dev", "counting:Counting", "--docker", "none"]
    command += ["--state", str(folder / "state"), *(arguments or ("--socket", str(folder / "s.sock")))]
    with (folder / "log").open("wb") as log:
        # A group of its own, as a terminal gives it: Ctrl-C is for all of it.
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    dev = Dev(folder, process)
    try:
        yield dev
    finally:
        children = dev.children() if process.poll() is None else []
        process.kill()
        process.wait()
        wait_for(lambda: not any(map(lives, children)), "the child to end with its parent")


@pytest.fixture
def dev(tmp_path: Path) -> Iterator[Dev]:
    with developing(tmp_path) as dev:
        dev.wait_for_log(" listens at ")
        dev.wait_for_version(0)
        yield dev


def test_callers_never_notice_that_code_is_saved(dev: Dev) -> None:
    address = Address("counting", dev.url)
    with RemotePlugin(address) as engine:
        engine.call("NetworkDriver.CreateNetwork", create_network())
        engine.call("NetworkDriver.CreateEndpoint", create_endpoint())
    failed: list[BaseException] = []
    ended = threading.Event()
    answers: dict[str, list[dict[str, str]]] = {"new": [], "kept": []}

    def call_all_the_time(kind: str, ask: Callable[[], dict[str, str]]) -> None:
        try:
            while not ended.is_set():
                answers[kind].append(ask())
        except BaseException as error:
            failed.append(error)

    def is_seen(version: int) -> bool:
        """By many calls of each kind, the next ones of which are under way as it is saved again."""
        return bool(failed) or all(
            sum(answer["version"] == str(version) for answer in tuple(found)) > 10 for found in answers.values()
        )

    # As an engine with its kept connections, but without its second tries.
    kept = RemotePlugin(address, patience=Patience(total=0))

    def ask_again() -> dict[str, str]:
        options: dict[str, str] = kept.call(METHOD, {"NetworkID": NETWORK, "Options": unique()})["Options"]
        return options

    threads = [
        *(threading.Thread(target=call_all_the_time, args=("new", dev.ask)) for _ in range(2)),
        threading.Thread(
            target=call_all_the_time,
            args=("kept", ask_again),
        ),
    ]
    with kept:
        for thread in threads:
            thread.start()
        try:
            for version in range(SAVES + 1):
                if version > 0:
                    dev.save(version)
                wait_for(partial(is_seen, version), "all callers to see it")
        finally:
            ended.set()
            for thread in threads:
                thread.join(PATIENCE)
    assert failed == [], dev.log[-3000:]
    for kind in ("new", "kept"):
        seen = [int(answer["version"]) for answer in answers[kind]]
        assert sorted(set(seen)) == list(range(SAVES + 1)), f"each version answered {kind} connections"
        assert seen == sorted(seen) or kind == "new"
        assert {answer["endpoints"] for answer in answers[kind]} == {"1"}, "what is remembered stays"
    assert len({answer["pid"] for answer in answers["kept"]}) == SAVES + 1


def test_a_call_that_runs_is_answered_by_the_old_code(dev: Dev) -> None:
    call = dev.folder / "call"
    with connect_unix(dev.path) as running, connect_unix(dev.path) as kept:
        kept.echo(**unique())
        running.send(echo(network=ENDPOINT, started=str(call)))
        wait_for(call.exists, "the call to start")
        dev.save(1)
        kept.expect_end()
        with connect_unix(dev.path) as waiting:
            waiting.send(echo(**unique()))
            waiting.expect_silence()
            call.unlink()
            assert running.last().options["version"] == "0"
            assert waiting.receive().options["version"] == "1"


def test_code_that_cannot_be_imported_is_shown_and_calls_wait_for_the_next_save(dev: Dev) -> None:
    dev.save("(")
    dev.wait_for_log("SyntaxError: '(' was never closed")
    dev.wait_for_log("it ended, with status 1: calls wait until a file is saved and it can be started")
    with connect_unix(dev.path) as waiting:
        waiting.send(echo(**unique()))
        waiting.expect_silence()
        dev.save("undefined")
        dev.wait_for_log("NameError: name 'undefined' is not defined")
        waiting.expect_silence()
        dev.save(2)
        assert waiting.receive().options["version"] == "2"


def test_new_files_count_but_not_those_that_are_nobodys_code(dev: Dev) -> None:
    pid = dev.ask()["pid"]
    (dev.folder / "venv/lib").mkdir(parents=True)
    (dev.folder / "venv/pyvenv.cfg").touch()
    for name in ("venv/lib/x.py", ".#counting.py", "notes.txt"):
        (dev.folder / name).touch()
    (dev.folder / "further.py").touch()
    wait_for(lambda: dev.ask()["pid"] != pid, "a new process")
    assert re.findall(r".*changed.*", dev.log) == ["further.py changed: starting again"], "neither before nor with it"


def test_ctrl_c_ends_it_and_removes_the_socket(dev: Dev) -> None:
    call = dev.folder / "call"
    with connect_unix(dev.path) as running:
        running.send(echo(started=str(call)))
        wait_for(call.exists, "the call to start")
        os.killpg(dev.process.pid, signal.SIGINT)
        running.expect_silence()
        call.unlink()
        assert running.last().options["version"] == "0"
    assert dev.process.wait(PATIENCE) == 0
    assert not dev.path.exists()
    assert "Traceback" not in dev.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_while_code_is_broken(dev: Dev, number: signal.Signals) -> None:
    dev.save("(")
    dev.wait_for_log("calls wait")
    dev.process.send_signal(number)
    assert dev.process.wait(PATIENCE) == 0
    assert not dev.path.exists()


def test_it_ends_while_the_code_is_imported(dev: Dev) -> None:
    dev.save("__import__('os').mkdir('importing') or __import__('time').sleep(60)")
    wait_for((dev.folder / "importing").exists, "the import to begin")
    os.killpg(dev.process.pid, signal.SIGINT)
    assert dev.process.wait(PATIENCE) == 0
    assert "Traceback" not in dev.log


def test_a_kill_leaves_no_process(dev: Dev) -> None:
    (child,) = dev.children()
    dev.process.kill()
    wait_for(lambda: not lives(child), "the child to end")


def test_what_serve_refuses_it_refuses_too(tmp_path: Path) -> None:
    with developing(tmp_path, "--tcp", "0.0.0.0:0") as dev:
        assert dev.process.wait(PATIENCE) == 1
        assert "refusing to serve plain TCP on 0.0.0.0" in dev.log


def test_what_cannot_be_found_is_one_line(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "netplugin_sdk.cli", "dev", "absent:Driver", "--socket", "s.sock")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "Error: there is no module absent in this folder, and none is installed\n",
    )
    assert not (tmp_path / "s.sock").exists()
