"""The engine's API, spoken to a small server; the engine's own answers are in tests/engine."""

import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, ClassVar

import pytest

from netplugin_sdk import Unavailable
from netplugin_sdk.core.engine_api import Docker, DockerError, is_stopped
from netplugin_sdk.core.timings import Timings
from netplugin_sdk.core.workers import EngineQueries
from netplugin_sdk.values import UsedPool


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answers: ClassVar[dict[str, tuple[int, bytes]]] = {
        "GET /networks": (200, b'[{"Name": "bridge"}]'),
        "POST /containers/a/start": (204, b""),
        "GET /_ping": (200, b"OK"),
        "GET /networks/no": (404, b'{"message":"network no not found"}\n'),
        "GET /old": (400, b"client version is too old"),
    }
    connections: ClassVar[set[object]] = set()

    def do_GET(self) -> None:
        self.connections.add(self.connection)
        if self.path == "/gone":
            self.close_connection = True
            return
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, body = (200, content) if self.path == "/echo" else self.answers[f"{self.command} {self.path}"]
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    Handler.connections.clear()
    with socketserver.ThreadingUnixStreamServer(str(tmp_path / "docker.sock"), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield tmp_path / "docker.sock"
        server.shutdown()
        thread.join()


def test_answers_are_decoded_and_the_connection_stays(path: Path) -> None:
    with Docker(path) as docker:
        assert docker.call("GET", "/networks") == [{"Name": "bridge"}]
        assert docker.call("POST", "/containers/a/start") is None
        assert docker.call("GET", "/_ping") is None
        assert docker.call("POST", "/echo", {"Name": "a"}) == {"Name": "a"}
        assert len(Handler.connections) == 1


@pytest.mark.parametrize(
    ("request_path", "said", "status"),
    [("/networks/no", "network no not found", 404), ("/old", "client version is too old", 400)],
)
def test_a_refusal_has_what_the_engine_says(path: Path, request_path: str, said: str, status: int) -> None:
    with Docker(path) as docker:
        with pytest.raises(DockerError) as caught:
            docker.call("GET", request_path)
        assert (str(caught.value), caught.value.http_status) == (said, status)
        assert docker.call("GET", "/networks")


def test_an_engine_that_hangs_up_is_unavailable_until_the_next_call(path: Path) -> None:
    with Docker(path) as docker:
        with pytest.raises(Unavailable, match=r"Docker: GET /gone: \S"):
            docker.call("GET", "/gone")
        assert docker.call("GET", "/networks")


def test_no_engine_is_unavailable(tmp_path: Path) -> None:
    with Docker(tmp_path / "none.sock") as docker, pytest.raises(Unavailable, match="No such file"):
        docker.call("GET", "/networks")


def test_the_environment_names_the_socket(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
    with Docker() as docker:
        assert docker.call("GET", "/networks")


DOCKERD = "import ctypes, sys; ctypes.CDLL(None).prctl(15, b'dockerd'); print('named', flush=True); sys.stdin.read()"


def test_an_engine_that_systemd_would_start_is_told_from_one_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket, pid = tmp_path / "docker.sock", tmp_path / "docker.pid"
    monkeypatch.setattr("netplugin_sdk.core.engine_api._SYSTEMD", tmp_path)
    assert is_stopped(socket)
    pid.write_text("nonsense")
    assert is_stopped(socket)
    pid.write_text(str(os.getpid()))  # somebody else's by now
    assert is_stopped(socket)
    with subprocess.Popen([sys.executable, "-c", DOCKERD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as engine:
        assert engine.stdout is not None
        assert engine.stdout.readline() == b"named\n"
        pid.write_text(str(engine.pid))
        assert not is_stopped(socket)
    assert is_stopped(socket)
    monkeypatch.setattr("netplugin_sdk.core.engine_api._SYSTEMD", tmp_path / "no")
    assert not is_stopped(socket)  # nobody would start it


POOLS: dict[str, Any] = {
    "GET /networks": [
        {"Id": "a", "Scope": "local", "IPAM": {"Driver": "pools"}},
        {"Id": "b", "Scope": "local", "IPAM": {"Driver": "default"}},
        {"Id": "c", "Scope": "swarm", "IPAM": {"Driver": "pools"}},
        {"Id": "gone", "Scope": "local", "IPAM": {"Driver": "pools"}},
        {"Id": "d", "Scope": "local", "IPAM": {"Driver": "pools"}},
        {"Id": "e", "Scope": "local", "IPAM": {"Driver": "null"}},
    ],
    "GET /networks/a": {
        "IPAM": {
            "Config": [
                {"Subnet": "10.1.0.5/24", "IPRange": "10.1.0.128/25", "Gateway": "10.1.0.1"},
                {"Subnet": "fd00::/64", "IPRange": ""},
            ]
        },
        "Containers": {
            "one": {"IPv4Address": "10.1.0.2/24", "IPv6Address": "fd00::2/64"},
            "ep-2": {"IPv4Address": "10.1.0.3/24", "IPv6Address": ""},
        },
    },
    "GET /networks/d": {"IPAM": {"Config": None}, "Containers": None},
}


def test_pools_are_those_of_other_ipam_drivers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {request: (200, json.dumps(answer).encode()) for request, answer in POOLS.items()}
    monkeypatch.setattr(Handler, "answers", {**answers, "GET /networks/gone": (404, b'{"message":"no network"}')})
    addresses = frozenset(map(ip_address, ("10.1.0.2", "10.1.0.3", "fd00::2")))
    with Docker(path) as docker:
        assert docker.pools() == [
            UsedPool(ip_network("10.1.0.0/24"), ip_network("10.1.0.128/25"), addresses),
            UsedPool(ip_network("fd00::/64"), None, addresses),
        ]


def test_an_engine_that_does_not_answer_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """It may wait for that very end: an engine that starts ends the managed plugins of its predecessor."""
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as engine:
        engine.bind(str(path))
        engine.listen()
        queries = EngineQueries(path, Timings())
        queries.ask(lambda docker: bool(docker.networks()))
        client, _ = engine.accept()
        with client:
            assert client.recv(100).startswith(b"GET /networks")
            ending = threading.Thread(target=queries.close)
            ending.start()
            ending.join(5)
            assert not ending.is_alive()
