"""`netplugin trace` and `netplugin replay` as programs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from netplugin_sdk.cli import main
from netplugin_sdk.testing.recording import Exchange, read, to_json

from ..patience import PATIENCE
from .serving import METHOD, NETWORK, Served, echo, serving_unix, wait_for

NETPLUGIN = str(Path(sys.executable).with_name("netplugin"))


@contextmanager
def tracing(served: Served, *options: str) -> Iterator[list[str]]:
    """Its lines, once it has ended."""
    lines: list[str] = []
    command = [NETPLUGIN, "trace", str(served.path), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as popen:
        try:
            assert popen.stdout is not None
            lines.append(popen.stdout.readline())
            assert "in front" in lines[0]
            yield lines
            popen.send_signal(signal.SIGINT)
            lines += popen.communicate(timeout=PATIENCE)[0].splitlines()
            assert popen.returncode == 0
        finally:
            popen.kill()


def test_the_live_view(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        with tracing(served, "--diff") as lines:
            client = served.connect()
            for options in ({"a": "1"}, {"a": "2"}, {"a": "2"}, {"fail": "too bad"}):
                client.send(echo(**options))
                client.receive()
        with tracing(served, "-v") as verbose:
            served.connect().echo(a="1")
    calls = [line for line in lines if line[2:3] == ":" and "front" not in line]
    when, network = r"\d\d:\d\d:\d\d\.\d\d\d", NETWORK[:12]
    for call, end in zip(calls, ("200", "200", "200  repeated", "500 too bad"), strict=True):
        assert re.fullmatch(rf"{when}  AllocateNetwork +{network} +\d+\.\d\d ms  {end}", call)
    assert [line for line in lines if "~" in line] == [
        '    ~ Options.a: "1" → "2"',
        '    ~ Options.a: "2" → nothing',
        '    ~ Options.fail: nothing → "too bad"',
    ]
    assert re.fullmatch(rf"{METHOD} +4 +1 +\d+\.\d\d +\d+\.\d\d", lines[-1])
    assert not any("\033" in line for line in lines)
    assert f'    → {{"NetworkID": "{NETWORK}", "Options": {{"a": "1"}}}}' in verbose
    assert '    ← {"Options": {"a": "1"}}' in verbose


def test_an_optional_method_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served, tracing(served) as lines:
        client = served.connect()
        client.send(echo(a="1").replace(METHOD.encode(), b"NetworkDriver.EndpointIsGone"))
        client.receive()
    assert "404 NetworkDriver.EndpointIsGone is not supported" in lines[1]
    assert re.fullmatch(r"NetworkDriver.EndpointIsGone +1 +0 +\d+\.\d\d +\d+\.\d\d", lines[-1])


def test_json_and_record_are_the_same_lines(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    with serving_unix(tmp_path) as served:
        with tracing(served, "--json", "--record", str(record)) as lines:
            served.connect().echo(a="1")
        assert [json.loads(line) for line in lines] == [json.loads(line) for line in record.read_text().splitlines()]
        *_, call = read(record)
        assert isinstance(call, Exchange)
        assert (call.method, call.status, json.loads(call.answer)) == (METHOD, 200, {"Options": {"a": "1"}})
        assert json.loads(call.request) == {"NetworkID": NETWORK, "Options": {"a": "1"}}
        assert "Content-Length" in call.headers
        assert call.ms is not None

        again = CliRunner().invoke(main, ["replay", str(record), "--to", str(served.path)])
        assert again.exit_code == 0, again.output
        assert "1 calls, 0 answered differently" in again.output
    shown = CliRunner().invoke(main, ["replay", str(record)])
    assert shown.exit_code == 0
    assert f"AllocateNetwork               {NETWORK[:12]}" in shown.output
    assert "in front of the plugin" in shown.output


def test_differences_of_a_replay(tmp_path: Path) -> None:
    request = json.dumps({"NetworkID": NETWORK, "Options": {"a": "2", "b": "1"}}).encode()
    record = tmp_path / "record.jsonl"
    record.write_text(to_json(Exchange(METHOD, request, 200, b'{"Options": {"a": "1", "b": "1"}}')) + "\n")
    with serving_unix(tmp_path) as served:

        def replay(*options: str) -> tuple[int, str]:
            done = CliRunner().invoke(main, ["replay", str(record), "--to", str(served.path), *options])
            return done.exit_code, done.output

        status, said = replay()
        assert status == 1
        assert '    ≠ Options.a: "1" → "2"' in said
        assert "1 calls, 1 answered differently" in said
        status, said = replay("--json")
        assert (status, json.loads(said)["differences"]) == (1, [["Options.a", "1", "2"]])
        assert replay("--ignore", "Options.a")[0] == 0


def test_no_calls(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served, tracing(served) as lines:
        pass
    assert lines[-1] == "no calls"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["trace", "tcp://127.0.0.1:1234"], 1, "only a plugin on a unix socket can be traced"),
        (["trace", "{dead}"], 1, "nobody listens at {dead}"),
        (["trace", "{folder}/nothing"], 2, "there is no socket {folder}/nothing"),
        (["trace", "{served}", "--record", "/nowhere/x"], 1, "cannot write /nowhere/x: No such file or directory"),
        (["trace", "{served}", "--record", "/dev/full"], 1, "cannot write /dev/full: No space left on device"),
        (["trace", "--restore", "{served}"], 0, "{served} leads to its plugin already"),
        (["replay", "{folder}/wrong"], 1, "cannot read {folder}/wrong, line 1: not a JSON object"),
        (["replay", "{folder}/nothing"], 2, "does not exist"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, arguments: list[str], status: int, said: str) -> None:
    import socket

    (tmp_path / "wrong").write_text("[]\n")
    with serving_unix(tmp_path) as served, socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
        names = {"dead": tmp_path / "dead.sock", "folder": tmp_path, "served": served.path}
        done = CliRunner().invoke(main, [argument.format(**names) for argument in arguments])
        assert (done.exit_code, said.format(**names) in done.output) == (status, True), done.output
        assert len(done.output.splitlines()) == 1 or status == 2
        assert list(tmp_path.glob(".*")) == []


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        client = served.connect()
        with subprocess.Popen([NETPLUGIN, "trace", str(served.path)], stdout=subprocess.PIPE, text=True) as popen:
            assert popen.stdout is not None
            popen.stdout.readline()
            busy = served.connect()
            gate = served.driver.gate()
            busy.send(echo(gate="gate"))
            gate.wait_entered()
            inode = served.path.stat().st_ino
            popen.send_signal(signal.SIGINT)
            wait_for(lambda: served.path.stat().st_ino != inode, "the plugin's own socket")
            assert popen.poll() is None
            popen.send_signal(signal.SIGINT)
            assert popen.wait(PATIENCE) == 1
            with tracing(served):  # another one, meanwhile
                pass
            gate.open()
            assert busy.receive().options == {"gate": "gate"}
            client.close()
