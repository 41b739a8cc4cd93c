"""`serve` in processes of its own, as systemd and an administrator meet it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from netplugin_sdk import Conflict, Unavailable, run, serve
from netplugin_sdk.ipam import PoolIpamDriver
from netplugin_sdk.serving import process as process_module

from ..patience import PATIENCE
from .serving import NETWORK, Echo, Process, connect_tcp, connect_unix, echo, post, process, wait_for

ENDPOINT = "fedcba9876543210" * 4

# Gives its descriptors the numbers from 3 on and its own pid to the program that it becomes, as systemd does.
SYSTEMD = """
import os, sys
fds = [int(fd) for fd in sys.argv[1].split(",")]
moved = [os.dup(fd) for fd in fds]
for number, fd in enumerate(moved):
    os.dup2(fd, 3 + number)
    os.set_inheritable(3 + number, True)
os.environ |= {"LISTEN_FDS": str(len(fds)), "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": "echo.socket"}
os.execv(sys.argv[2], sys.argv[2:])
"""


def systemd(*listeners: socket.socket) -> dict[str, Any]:
    fds = tuple(listener.fileno() for listener in listeners)
    launcher = (sys.executable, "-c", SYSTEMD, ",".join(str(fd) for fd in fds))
    return {"launcher": launcher, "pass_fds": fds}


def notify_socket(path: Path | str) -> socket.socket:
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.settimeout(PATIENCE)
    notify.bind(str(path))
    return notify


# sd_notify


@pytest.mark.parametrize("abstract", [False, True], ids=["a path", "an abstract name"])
def test_systemd_is_told_of_the_begin_and_the_end(tmp_path: Path, abstract: bool) -> None:
    name = f"netplugin-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with (
        notify_socket(f"\0{name}" if abstract else name) as notify,
        process(tmp_path, environment={"NOTIFY_SOCKET": f"@{name}" if abstract else name}) as plugin,
    ):
        assert notify.recv(100) == b"READY=1"
        with connect_unix(tmp_path / "s.sock") as client:  # at the first try
            assert client.echo(n="1") == {"n": "1"}
        plugin.signal(signal.SIGTERM)
        assert notify.recv(100) == b"STOPPING=1"
        assert plugin.wait() == 0


def test_systemd_is_told_of_the_end_before_the_last_call_has_ended(tmp_path: Path) -> None:
    with (
        notify_socket(tmp_path / "notify") as notify,
        process(tmp_path, environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as plugin,
    ):
        assert notify.recv(100) == b"READY=1"
        with connect_unix(tmp_path / "s.sock") as client:
            client.send(echo(started=str(tmp_path / "call")))
            wait_for((tmp_path / "call").exists, "the call to start")
            plugin.signal(signal.SIGTERM)
            assert notify.recv(100) == b"STOPPING=1"
            assert plugin.popen.poll() is None
            (tmp_path / "call").unlink()
            assert client.receive().status == 200
        assert plugin.wait() == 0


def test_a_notify_socket_that_nobody_listens_on_is_no_reason_to_fail(tmp_path: Path) -> None:
    with process(tmp_path, environment={"NOTIFY_SOCKET": str(tmp_path / "nobody")}) as plugin:
        plugin.wait_serving(tmp_path / "s.sock")
        plugin.signal(signal.SIGTERM)
        assert plugin.wait() == 0


# Socket activation


def test_the_sockets_of_systemd_are_served(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        unix.bind(str(tmp_path / "systemd.sock"))
        unix.listen()
        with process(tmp_path, **systemd(unix, tcp)) as plugin:
            with connect_unix(tmp_path / "systemd.sock") as client:
                assert client.echo(n="1") == {"n": "1"}
            with connect_tcp(tcp.getsockname()[1]) as client:
                assert client.echo(n="2") == {"n": "2"}
            assert not (tmp_path / "s.sock").exists(), "it listens on nothing else"
            plugin.signal(signal.SIGTERM)
            assert plugin.wait() == 0
        assert (tmp_path / "systemd.sock").exists(), "it is systemd's"


def test_a_plain_tcp_socket_of_systemd_beyond_the_host_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET) as wide:
        wide.bind(("0.0.0.0", 0))  # it never listens
        with process(tmp_path, **systemd(wide)) as plugin:
            assert plugin.wait() == 1
            assert any("refusing to serve plain TCP on 0.0.0.0" in line for line in plugin.log)


def test_a_client_that_waited_for_the_activation_is_served(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "systemd.sock"))
        unix.listen()
        with connect_unix(tmp_path / "systemd.sock") as client:
            client.send(echo(n="1"))
            with process(tmp_path, **systemd(unix)):
                assert client.receive().options == {"n": "1"}


def test_the_sockets_of_systemd_are_not_for_child_processes(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "systemd.sock"))
        unix.listen()
        with process(tmp_path, **systemd(unix)), connect_unix(tmp_path / "systemd.sock") as client:
            assert client.echo(inheritable="3") == {"inheritable": "False"}
            assert client.echo(environment="LISTEN_") == {"environment": "LISTEN_"}


@pytest.mark.parametrize(
    "environment",
    [{"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_FDS": "1"}],
    ids=["another process", "nobody"],
)
def test_sockets_for_somebody_else_are_left_alone(tmp_path: Path, environment: dict[str, str]) -> None:
    with process(tmp_path, environment=environment) as plugin:
        plugin.wait_serving(tmp_path / "s.sock")


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "s.sock"
    with process(tmp_path) as plugin:
        plugin.wait_serving(path)
        with connect_unix(path) as busy, connect_unix(path) as idle:
            idle.echo(n="1")
            busy.send(echo(network=ENDPOINT, started=str(tmp_path / "call")))
            wait_for((tmp_path / "call").exists, "the call to start")
            plugin.signal(number)
            idle.expect_end()
            wait_for(lambda: not path.exists(), "the socket to go")
            assert plugin.popen.poll() is None, "the call still runs"
            (tmp_path / "call").unlink()
            assert busy.last().options == {"started": str(tmp_path / "call")}
        assert plugin.wait() == 0
    assert not path.exists()


def test_sighup_is_no_end(tmp_path: Path) -> None:
    with process(tmp_path) as plugin:
        plugin.wait_serving(tmp_path / "s.sock")
        for number in range(3):
            plugin.signal(signal.SIGHUP)
            with connect_unix(tmp_path / "s.sock") as client:
                assert client.echo(n=str(number)) == {"n": str(number)}
        plugin.signal(signal.SIGTERM)
        assert plugin.wait() == 0


def test_a_second_signal_does_not_cut_the_running_call(tmp_path: Path) -> None:
    with process(tmp_path) as plugin:
        plugin.wait_serving(tmp_path / "s.sock")
        with connect_unix(tmp_path / "s.sock") as client:
            client.send(echo(started=str(tmp_path / "call")))
            wait_for((tmp_path / "call").exists, "the call to start")
            plugin.signal(signal.SIGTERM)
            wait_for(lambda: not (tmp_path / "s.sock").exists(), "the end to begin")
            for _ in range(3):
                plugin.signal(signal.SIGTERM)
                plugin.signal(signal.SIGINT)
            (tmp_path / "call").unlink()
            assert client.last().status == 200
        assert plugin.wait() == 0


def test_a_call_that_never_ends_does_not_keep_it_alive(tmp_path: Path) -> None:
    with process(tmp_path, limits={"drain_time": 0.3}) as plugin:
        plugin.wait_serving(tmp_path / "s.sock")
        with connect_unix(tmp_path / "s.sock") as client:
            client.send(echo(started=str(tmp_path / "call")))
            wait_for((tmp_path / "call").exists, "the call to start")
            plugin.signal(signal.SIGTERM)
            assert plugin.wait() == 0
            client.expect_end()
        assert any("ERROR" in line and "still running" in line for line in plugin.log)


def test_it_starts_again_after_it_was_killed(tmp_path: Path) -> None:
    for number in range(3):
        with process(tmp_path) as plugin:
            plugin.wait_serving(tmp_path / "s.sock")
            with connect_unix(tmp_path / "s.sock") as client:
                assert client.echo(n=str(number)) == {"n": str(number)}
            plugin.signal(signal.SIGKILL)
            assert plugin.wait() == -signal.SIGKILL
        assert (tmp_path / "s.sock").exists(), "stale"


# What it refuses


@pytest.mark.parametrize("same", ["socket", "state"])
def test_a_second_instance_is_refused(tmp_path: Path, same: str) -> None:
    with process(tmp_path) as first:
        first.wait_serving(tmp_path / "s.sock")
        arguments: dict[str, Any]
        if same == "socket":
            arguments = {"state": str(tmp_path / "other-state")}
            why = f"Conflict: {tmp_path}/s.sock is already served by pid {first.pid}"
        else:
            arguments = {"socket_path": str(tmp_path / "other.sock")}
            why = f"Conflict: the state folder {tmp_path}/state is in use by pid {first.pid}"
        with process(tmp_path, **arguments) as second:
            assert second.wait() != 0
            assert second.log[-1].endswith(why)
        with connect_unix(tmp_path / "s.sock") as client:
            assert client.echo(n="1") == {"n": "1"}
    assert not (tmp_path / "other.sock").exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-x", "a/b", "../x", "/x", "a b", "a\n", "a\0", "a:b", "Überbrücke", "x" * 65]
)
def test_a_bad_name_is_refused(tmp_path: Path, name: str) -> None:
    # Would the name be accepted, this is what stops it.
    (tmp_path / "s.sock").write_text("not a socket")
    with pytest.raises(ValueError, match="cannot be a plugin's name"):
        serve(Echo(), name=name, socket_path=tmp_path / "s.sock", state=tmp_path / "state")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("name", ["l2", "My_plugin-2.0", "x" * 64])
def test_a_good_name_is_accepted(tmp_path: Path, name: str) -> None:
    with process(tmp_path, name=name) as plugin:
        plugin.wait_serving(tmp_path / "s.sock")


def test_the_socket_is_made_as_wanted(tmp_path: Path) -> None:
    with process(tmp_path, socket_mode=0o660, socket_group=os.getegid()) as plugin:
        plugin.wait_serving(tmp_path / "s.sock")
        found = (tmp_path / "s.sock").stat()
        assert (found.st_mode & 0o7777, found.st_gid) == (0o660, os.getegid())


# The log


def some_calls(folder: Path, **arguments: Any) -> list[str]:
    """What is logged of a call that is answered, one that is not supported, one that fails and one with a bug."""

    def is_logged(calls: int) -> bool:
        return sum("method=" in line or '"method":' in line for line in plugin.log) >= calls

    with process(folder, **arguments) as plugin:
        plugin.wait_serving(folder / "s.sock")
        with connect_unix(folder / "s.sock") as client:
            ids = json.dumps({"NetworkID": NETWORK, "EndpointID": ENDPOINT}).encode()
            shown = arguments.get("log_level") != "error"
            for number, (request, status) in enumerate(
                (
                    (echo(n="1"), 200),
                    (post(b"{}", method="NetworkDriver.ProgramExternalConnectivity"), 404),
                    (echo(fail="no bridge\n  today"), 500),
                    (post(ids, method="NetworkDriver.Leave"), 200),
                    (post(ids, method="NetworkDriver.EndpointOperInfo"), 422),
                    (echo(bug="oh\nno"), 500),
                    (post(b"[]", method="NetworkDriver.Join"), 400),
                ),
                start=1,
            ):
                client.send(request)
                assert client.receive().status == status
                if shown:  # after the answer, and perhaps by another thread than that of the next call
                    wait_for(partial(is_logged, number), "its line")
        plugin.signal(signal.SIGTERM)
        assert plugin.wait() == 0
        return plugin.log


CALLS: list[dict[str, Any]] = [
    {"method": "NetworkDriver.AllocateNetwork", "network": NETWORK[:12], "status": 200},
    {"method": "NetworkDriver.ProgramExternalConnectivity", "status": 404},
    {"method": "NetworkDriver.AllocateNetwork", "network": NETWORK[:12], "status": 500, "error": "no bridge today"},
    {"method": "NetworkDriver.Leave", "network": NETWORK[:12], "endpoint": ENDPOINT[:12], "status": 200},
    {"method": "NetworkDriver.EndpointOperInfo", "network": NETWORK[:12], "endpoint": ENDPOINT[:12], "status": 422},
    {"method": "NetworkDriver.AllocateNetwork", "network": NETWORK[:12], "status": 500, "error": "KeyError: 'oh\\nno'"},
    {"method": "NetworkDriver.Join", "status": 400},
]


def test_the_log_as_json_has_one_object_a_line_and_one_line_a_call(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in some_calls(tmp_path, log_format="json")]
    assert all(isinstance(line["time"], float) and line["level"] in ("INFO", "WARNING", "ERROR") for line in lines)
    calls = [line for line in lines if "method" in line]
    assert [{name: call.get(name) for name in wanted} for call, wanted in zip(calls, CALLS, strict=True)] == CALLS
    assert [call["level"] for call in calls] == ["INFO", "INFO", "WARNING", "INFO", "WARNING", "WARNING", "WARNING"]
    for call in calls:
        if call["status"] != 404:
            assert 0 <= call["ms"] < PATIENCE * 1000
    messages = [line["message"] for line in lines if "message" in line]
    assert any(re.fullmatch(rf"echo serves Echo on {tmp_path}/s\.sock", message) for message in messages)
    assert messages[-1] == "echo stopped"
    (bug,) = (line for line in lines if "traceback" in line)
    assert bug["level"] == "ERROR"
    assert "KeyError" in bug["traceback"]


def test_the_log_as_text_has_one_line_a_call(tmp_path: Path) -> None:
    calls = [line for line in some_calls(tmp_path) if "method=" in line]
    for line, wanted in zip(calls, CALLS, strict=True):
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING) method=", line)
        for name, value in wanted.items():
            assert f" {name}={value}" in line
        if wanted["status"] != 404:
            assert re.search(r" ms=\d+(\.\d+)?( |$)", line)


def test_the_log_shows_no_calls_above_its_level(tmp_path: Path) -> None:
    log = some_calls(tmp_path, log_level="error", log_format="json")
    assert [json.loads(line)["level"] for line in log] == ["ERROR"]


def test_a_request_that_is_none_is_logged_in_one_line(tmp_path: Path) -> None:
    def log_of(plugin: Process) -> list[dict[str, Any]]:
        return [json.loads(line) for line in plugin.log]

    with process(tmp_path, log_format="json") as plugin:
        plugin.wait_serving(tmp_path / "s.sock")
        with connect_unix(tmp_path / "s.sock") as client:
            client.send(b"garbage\r\n\r\n")
            assert client.last().status == 400
        wait_for(lambda: any(line["level"] == "WARNING" for line in log_of(plugin)), "the line")
        (line,) = (line for line in log_of(plugin) if line["level"] == "WARNING")
        assert "refused a request" in line["message"]


# The command line


def command(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, make: Any = Echo, refused: Exception | None = None
) -> Any:
    """What `serve` is called with by a plugin's command, or what its status is."""
    called: list[Any] = []

    def serving(*drivers: Any, **given: Any) -> None:
        if refused is not None:
            raise refused
        called.append((*(type(driver) for driver in drivers), given))

    monkeypatch.setattr(process_module, "serve", serving)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/anything", *arguments])
    try:
        run(make, PoolIpamDriver, name="lan", program="netplugin-lan", description="A LAN: 100 % of it.")
    except SystemExit as ended:
        assert not called
        return ended.code
    (call,) = called
    return call


def test_a_command_serves_its_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    *drivers, given = command(monkeypatch)
    assert (drivers, given["name"], given["log_format"]) == ([Echo, PoolIpamDriver], "lan", "text")
    *_, given = command(monkeypatch, "--name", "other", "--log-format", "json", "--socket-group", "7")
    assert (given["name"], given["log_format"], given["socket_mode"]) == ("other", "json", 0o660)
    monkeypatch.setenv("NETPLUGIN_LOG_LEVEL", "debug")
    monkeypatch.setenv("NETPLUGIN_METRICS", "9323")
    *_, given = command(monkeypatch, "--metrics", "[::1]:1")
    assert (given["log_level"], given["metrics"]) == ("DEBUG", ("::1", 1)), "the command line goes first"


def test_a_command_tells_how_it_is_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: netplugin-lan ")
    assert "A LAN: 100 % of it." in said
    assert "[default: lan]" in said
    assert command(monkeypatch, "--nmae", "x") == 2
    assert "netplugin-lan: error: unrecognized arguments: --nmae x" in capsys.readouterr().err


def test_a_command_that_cannot_start_says_why_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Echo:
        raise Unavailable("the kernel has no macvlan")

    assert command(monkeypatch, refused=Conflict("/run/s.sock is already served by pid 7")) == 1
    assert command(monkeypatch, make=broken) == 1
    assert capsys.readouterr().err.splitlines() == [
        "netplugin-lan: /run/s.sock is already served by pid 7",
        "netplugin-lan: the kernel has no macvlan",
    ]


# Threads of a driver's


STAYING = """
import sys, threading, time
from netplugin_sdk import run
from tests.unit.serving import Echo

class Leaves(Echo):
    def open(self, folder):
        threading.Thread(target=time.sleep, args=(3600,), name="of the driver").start()

    def close(self):
        print("closed", flush=True)

sys.argv = ["leaves", "--socket", sys.argv[1], "--state", sys.argv[2], "--docker", "none"]
run(Leaves, name="leaves", description="It leaves a thread.")
"""


def test_a_thread_that_a_driver_leaves_does_not_keep_the_process(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", STAYING, str(path), str(tmp_path / "state")],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as plugin:
        wait_for(path.exists, "the socket")
        plugin.terminate()
        out, log = plugin.communicate(timeout=PATIENCE)
    assert plugin.returncode == 0
    assert out == "closed\n"
    assert "the driver has left threads that do not end: of the driver" in log
    assert not path.exists()
