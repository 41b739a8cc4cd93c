"""`netplugin inspect`, `repair`, `topology` and `doctor`: their words, and what they find without an engine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner, Result

from netplugin_sdk import Plugin
from netplugin_sdk.cli import findings, inspect, main
from netplugin_sdk.cli.findings import Finding, Level
from netplugin_sdk.cnm.remote import Folders
from netplugin_sdk.inspection.model import Difference, Fact, Snapshot

from .lab import NETWORK, Docker, Publisher, create_network
from .test_drawing import CASES, endpoint, network, of


def netplugin(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever listens on this machine."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")


# ------------------------------------------------------------------------------------------------ inspect, topology


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """Of a plugin that runs here, with a network."""
    with Plugin(Publisher(), state=tmp_path / "state", docker=None) as plugin:
        Docker(plugin)("CreateNetwork", create_network())
        yield tmp_path / "state"


def test_inspect_shows_the_state_without_an_engine(state: Path) -> None:
    done = netplugin("inspect", "p", "--state", str(state))
    assert done.exit_code == 0, done.output
    assert f"p is served by pid {os.getpid()}" in done.output
    assert f"{NETWORK[:12]} 172.18.0.0/16" in done.output
    assert "Docker  not asked: Docker: GET /networks" in done.output
    assert done.output.endswith("1 network, 0 endpoints: all agree\n")


def test_inspect_as_json(state: Path) -> None:
    done = netplugin("inspect", "p", "--state", str(state), "--json")
    shown = json.loads(done.output)
    assert (shown["pid"], shown["networks"][0]["id"], shown["differences"]) == (os.getpid(), NETWORK, [])
    assert {"name": "gateway", "state": "172.18.0.1", "kernel": None, "docker": None, "wrong": None} in (
        shown["networks"][0]["facts"]
    )


@pytest.mark.parametrize("command", ["inspect", "repair", "topology"])
def test_what_cannot_be_looked_at_is_one_line(command: str, tmp_path: Path) -> None:
    done = netplugin(command, "nosuch", "--state", str(tmp_path / "none"))
    assert done.exit_code == 1
    assert done.output.startswith("Error: there is nothing to compare; state: not read: there is no ")
    assert len(done.output.splitlines()) == 1


def test_a_name_that_cannot_be_one(tmp_path: Path) -> None:
    done = netplugin("inspect", "a b")
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert "'a b' cannot be a plugin's name" in done.output


@pytest.mark.parametrize("suffix", ["svg", "mmd", "html"])
def test_topology_writes_what_the_file_is_called(state: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"picture.{suffix}"
    done = netplugin("topology", "p", "--state", str(state), "-o", str(file))
    assert (done.exit_code, done.output) == (0, "")
    begin = {"svg": "<?xml", "mmd": "flowchart", "html": "<!doctype html>"}
    assert file.read_text().startswith(begin[suffix])
    assert NETWORK[:12] in file.read_text()


def test_topology_prints(state: Path) -> None:
    assert netplugin("topology", "p", "--state", str(state)).output.startswith("<?xml")
    assert netplugin("topology", "p", "--state", str(state), "--format", "mermaid").output.startswith("flowchart")


def lines(snapshot: Snapshot, everything: bool = False) -> list[str]:
    return [click.unstyle(line) for line in inspect.report(snapshot, everything)]


def test_many_that_agree_are_a_line_each() -> None:
    shown = lines(CASES["twenty networks"])
    endpoints = sum(len(net.endpoints) for net in CASES["twenty networks"].networks)
    assert len(shown) == 2 + 20 + endpoints + 2
    assert len(lines(CASES["twenty networks"], everything=True)) > len(shown) + endpoints


def test_what_differs_is_shown_side_by_side_among_many() -> None:
    many = [endpoint(n, f"web{n}") for n in range(30)]
    wrong = Fact.compared("MAC", "02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:01")
    many[7] = msgspec.structs.replace(many[7], facts=(wrong,))
    shown = lines(of(network("red", *many)))
    assert [line for line in shown if line.startswith("≠")] == [
        "≠   web7 000000000000 172.18.0.9, fd00:1234:5678:9abc:def0:1234:5678:9",
        "≠     MAC  02:00:00:00:00:01  02:00:00:00:00:02  02:00:00:00:00:01",
    ]
    assert next(line for line in shown if "Kernel" in line and "State" in line).split() == ["State", "Kernel", "Docker"]


def test_a_narrow_terminal_has_them_one_below_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    same, wrong = Fact.compared("IPv4", "10.0.0.2/24", "10.0.0.2/24", "10.0.0.2/24"), Fact.compared("MTU", "1", "2")
    table = inspect._Table([same, wrong])
    shown = [click.unstyle(line) for fact in (same, wrong) for line in table.lines(fact)]
    assert list(table.head()) == []
    assert shown == ["      IPv4  10.0.0.2/24", "≠     MTU   State: 1", "            Kernel: 2"]


# ----------------------------------------------------------------------------------------------------------- repair


def test_repair_says_how_to_start_a_plugin_that_does_not_run(tmp_path: Path) -> None:
    with Plugin(Publisher(), state=tmp_path, docker=None) as plugin:
        Docker(plugin)("CreateNetwork", create_network())
    done = netplugin("repair", "p", "--state", str(tmp_path))
    assert done.exit_code == 1
    assert "nobody serves p" in done.output
    assert "run p as root" in done.output


def test_repair_signals_who_holds_the_folder(state: Path) -> None:
    heard = []
    before = signal.signal(signal.SIGHUP, lambda *_: heard.append(True))
    try:
        done = netplugin("repair", "p", "--state", str(state))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert done.exit_code == 0, done.output
    assert heard == [True]
    assert "after:  1 network, 0 endpoints: all agree" in done.output


def test_repair_does_not_end_who_does_not_take_the_signal(tmp_path: Path) -> None:
    """Its default ends a process."""
    with Plugin(Publisher(), state=tmp_path, docker=None) as plugin:
        Docker(plugin)("CreateNetwork", create_network())
    script = f"lock = open({str(tmp_path / 'lock')!r}); print('open', flush=True); print('lives', input(), flush=True)"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdout.readline()
        done = netplugin("repair", "p", "--state", str(tmp_path))
        assert done.exit_code == 1
        assert f"the process {other.pid} that serves p does not take SIGHUP" in done.output
        other.stdin.write("still\n")
        other.stdin.flush()
        assert other.stdout.readline() == "lives still\n"


def test_repair_tells_nobody_else_who_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Go program catches SIGHUP, and ends."""
    seen = of(network("red"), differences=(Difference(about="network red", text="wrong"),))
    monkeypatch.setattr(inspect, "take", lambda *_: msgspec.structs.replace(seen, pid=None))
    done = netplugin("repair", "p", "--state", str(tmp_path))
    assert done.exit_code == 1
    assert "is served, but" in done.output


# ----------------------------------------------------------------------------------------------------------- doctor


def levels(findings: Iterator[Finding]) -> dict[str, Level]:
    found = list(findings)
    for finding in found:
        assert (finding.fix is None) == (finding.level is Level.OK), "what is not well has a command that fixes it"
    return {finding.text: finding.level for finding in found}


def test_doctor_as_json_on_this_machine() -> None:
    done = netplugin("doctor", "--json")
    found = json.loads(done.output)
    assert done.exit_code == (1 if any(each["level"] == "problem" for each in found) else 0)
    assert {each["topic"] for each in found} >= {"Python", "Kernel", "Sysctls", "Docker"}
    docker = next(each for each in found if each["topic"] == "Docker")
    assert docker["level"] == "problem"
    assert "systemctl start docker" in docker["fix"]


def bound(path: Path, *, listening: bool = True) -> socket.socket:
    path.parent.mkdir(exist_ok=True)
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    if listening:
        made.listen()
    return made


def test_doctor_tells_sockets_apart(tmp_path: Path) -> None:
    with bound(tmp_path / "live.sock"), bound(tmp_path / "inside" / "inside.sock"):
        bound(tmp_path / "stale.sock").close()
        assert levels(findings._sockets(tmp_path)) == {
            f"live listens at {tmp_path}/live.sock": Level.OK,
            f"inside listens at {tmp_path}/inside/inside.sock": Level.OK,
            f"{tmp_path}/stale.sock is stale: nobody listens, and Docker waits in vain": Level.WARNING,
        }


def test_doctor_finds_what_a_trace_has_left(tmp_path: Path) -> None:
    place, folder = tmp_path / "x.sock", tmp_path / ".x.sock.traced"
    with bound(folder / "plugin") as plugin:
        with bound(place):
            assert levels(findings._sockets(tmp_path)) == {f"x listens at {place}, under a trace": Level.OK}
        (finding,) = findings._sockets(tmp_path)
        text = "a trace of x was killed: Docker's calls end at it, while the plugin listens"
        assert (finding.level, finding.text) == (Level.PROBLEM, text)
        subprocess.run(finding.fix or "", shell=True, check=True)
        assert levels(findings._sockets(tmp_path)) == {f"x listens at {place}": Level.OK}
        plugin.close()
    folder.mkdir()
    place.unlink()
    assert levels(findings._sockets(tmp_path)) == {f"{folder} is left of a trace of x": Level.WARNING}


def test_doctor_minds_who_may_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert list(levels(findings._sockets(tmp_path)).values()) == [Level.PROBLEM]


def test_doctor_reads_specs(tmp_path: Path) -> None:
    for name, text in {
        "good.spec": "tcp://127.0.0.1:1",
        "bad.spec": "nonsense",
        "good2.json": '{"Addr": "https://127.0.0.1:2"}',
        "bad2.json": "{",
        "gone.spec": f"unix://{tmp_path}/gone.sock",
    }.items():
        (tmp_path / name).write_text(text)
    found = levels(findings._specs(Folders(specs=(tmp_path,)).specs))
    by_name = {
        Path(path).name: level for path, level in ((_file(text, tmp_path), level) for text, level in found.items())
    }
    assert by_name == {
        "bad.spec": Level.PROBLEM,
        "bad2.json": Level.PROBLEM,
        "gone.spec": Level.WARNING,
        "good.spec": Level.OK,
        "good2.json": Level.OK,
    }


def _file(text: str, folder: Path) -> str:
    return next(word.rstrip(":") for word in text.split() if word.startswith(f"{folder}/") and "." in Path(word).name)


def test_doctor_finds_state_without_a_plugin(tmp_path: Path) -> None:
    for name in ("idle", "gone"):
        with Plugin(Publisher(), state=tmp_path / name, docker=None) as plugin:
            if name == "gone":
                Docker(plugin)("CreateNetwork", create_network())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "state.db").write_bytes(b"nonsense" * 200)
    (tmp_path / "other").mkdir()
    with Plugin(Publisher(), state=tmp_path / "live", docker=None):
        found = levels(findings._states(tmp_path))
    damaged = next(text for text in found if "bad" in text)
    assert found == {
        damaged: Level.PROBLEM,
        f"{tmp_path}/gone knows 1 network, and no plugin runs with it": Level.WARNING,
        f"{tmp_path}/idle knows no network; its plugin does not run": Level.OK,
        f"live knows 0 networks and runs as pid {os.getpid()}": Level.OK,
    }


def test_doctor_reads_dockers_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "daemon.json"
    monkeypatch.setattr(findings, "_DAEMON_FILE", file)
    file.write_text('{"iptables": false, "userland-proxy": false}')
    found = levels(findings._Engine().findings())
    assert [level for text, level in found.items() if text.startswith("iptables is off")] == [Level.WARNING]
    assert any(text.startswith("no userland proxy") for text in found)
    file.write_text("{")
    found = levels(findings._Engine().findings())
    assert [level for text, level in found.items() if "malformed" in text] == [Level.PROBLEM]
