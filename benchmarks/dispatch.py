"""Measure the time of one Join call, and calls per second, with 1 and with 8 callers: this SDK beside its rivals.

    python benchmarks/dispatch.py [--calls 4000] [--rounds 3]

Each server is a process of its own on a unix socket; all take turns, for several rounds. The client is one process. It
keeps one call per caller in flight (closed loop) over keep-alive connections, and reconnects if a server closes them.
Every Join is the first for an endpoint that was created before, never a repetition.

- sdk: this SDK's server and plugin as `serve` runs them, with one log line per call, and state in SQLite on disk.
- sdk-metrics: the same, with metrics for Prometheus, which does not scrape meanwhile.
- sdk-memory: the same without the file.
- waitress: the same plugin (state on disk) as a WSGI application under waitress.
- docker-plugin-api: PyPI's docker-plugin-api 0.4 (Flask) under Werkzeug's server. It checks and stores nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from netplugin_sdk import Endpoint, Join, Network, NetworkDriver, Plugin, Sandbox, serve

SERVERS = ("sdk", "sdk-metrics", "sdk-memory", "waitress", "docker-plugin-api")
NETWORK = "937ae052fefe991b2d2409d7837e1a10b54195e97ae4488923ed9854c543e6f0"
OPTIONS = {
    "com.docker.network.endpoint.exposedports": [{"Proto": 6, "Port": 80}],
    "com.docker.network.portmap": [
        {"Proto": 6, "IP": "", "Port": 80, "HostIP": "", "HostPort": 18080, "HostPortEnd": 18080}
    ],
}


# ---------------------------------------------------------------------------------------------------- the servers


class Bare(NetworkDriver):
    """A driver that does nothing, so that only the way to it is measured."""

    def create_network(self, network: Network) -> None:
        pass

    def delete_network(self, network: Network) -> None:
        pass

    def create_endpoint(self, network: Network, endpoint: Endpoint) -> None:
        pass

    def delete_endpoint(self, network: Network, endpoint: Endpoint) -> None:
        pass

    def join(self, network: Network, endpoint: Endpoint, sandbox: Sandbox) -> Join:
        return Join(endpoint.interface_name("ve"), gateways=network.gateways)

    def leave(self, network: Network, endpoint: Endpoint) -> None:
        pass


def serve_sdk(path: str, folder: str) -> None:
    serve(Bare(), name="bench", socket_path=path, state=folder)


def serve_sdk_metrics(path: str, folder: str) -> None:
    serve(Bare(), name="bench", socket_path=path, state=folder, metrics=("127.0.0.1", 0))


def serve_sdk_memory(path: str, folder: str) -> None:
    # `serve` always keeps its state on disk; a tmpfs takes the disk away.
    serve(Bare(), name="bench", socket_path=path, state=Path("/dev/shm") / Path(folder).parent.name)


def serve_waitress(path: str, folder: str) -> None:
    import waitress  # noqa: PLC0415

    waitress.serve(Plugin(Bare(), state=folder), unix_socket=path, threads=8, _quiet=True)


def serve_docker_plugin_api(path: str, folder: str) -> None:  # noqa: ARG001
    import docker_plugin_api.NetworkDriverEntities as entities  # noqa: PLC0415
    import docker_plugin_api.Plugin as api  # noqa: PLC0415
    import flask  # noqa: PLC0415
    from werkzeug.serving import run_simple  # noqa: PLC0415

    app = flask.Flask("bench")
    api.functions.append("NetworkDriver")

    @api.app.route("/NetworkDriver.CreateNetwork", methods=["POST"])  # type: ignore[untyped-decorator]
    def create_network() -> dict[str, Any]:
        entities.NetworkCreateEntity(**flask.request.get_json(force=True))
        return {}

    @api.app.route("/NetworkDriver.CreateEndpoint", methods=["POST"])  # type: ignore[untyped-decorator]
    def create_endpoint() -> dict[str, Any]:
        entities.EndpointCreateEntity(**flask.request.get_json(force=True))
        return {"Interface": {}}

    @api.app.route("/NetworkDriver.Join", methods=["POST"])  # type: ignore[untyped-decorator]
    def join() -> dict[str, Any]:
        entity = entities.JoinEntity(**flask.request.get_json(force=True))
        return {
            "InterfaceName": {"SrcName": f"ve-{entity.EndpointID[:12]}", "DstPrefix": "eth"},
            "Gateway": "172.18.0.1",
            "GatewayIPv6": "",
            "StaticRoutes": [],
        }

    app.register_blueprint(api.app)
    run_simple(f"unix://{path}", 0, app, threaded=True)


START: dict[str, Callable[[str, str], None]] = {
    "sdk": serve_sdk,
    "sdk-metrics": serve_sdk_metrics,
    "sdk-memory": serve_sdk_memory,
    "waitress": serve_waitress,
    "docker-plugin-api": serve_docker_plugin_api,
}


@contextlib.contextmanager
def running(server: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="netplugin-bench-") as folder:
        path = f"{folder}/plugin.sock"
        with (
            Path(f"{folder}/log").open("wb") as log,
            subprocess.Popen(
                [sys.executable, __file__, "--serve", server, path, f"{folder}/state"],
                stdout=log,
                stderr=log,
            ) as process,
        ):
            try:
                for _ in range(200):
                    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                        probe.connect(path)
                        break
                    time.sleep(0.05)
                yield path
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(20)
                shutil.rmtree(Path("/dev/shm") / Path(folder).name, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------- the client


def request(method: str, content: dict[str, Any]) -> bytes:
    body = json.dumps(content).encode()
    return (
        f"POST /NetworkDriver.{method} HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\n"
        f"Content-Length: {len(body)}\r\nAccept: application/vnd.docker.plugins.v1.2+json\r\n\r\n"
    ).encode() + body


class Caller:
    """One connection with one call under way."""

    def __init__(self, path: str, calls: Iterator[bytes]) -> None:
        self.path = path
        self.calls = calls
        self.connection: socket.socket | None = None
        self.times: list[float] = []

    def start(self) -> bool:
        call = next(self.calls, None)
        if call is None:
            return False
        self.started = time.perf_counter()
        self.received = b""
        if self.connection is None:
            self.connection = socket.socket(socket.AF_UNIX)
            self.connection.connect(self.path)
        self.connection.sendall(call)
        return True

    def read(self) -> bool:
        """Whether the answer is complete."""
        assert self.connection is not None
        data = self.connection.recv(65536)
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        lowered = head.lower()
        closes = b"connection: close" in lowered or head.startswith(b"HTTP/1.0")
        if found and b"content-length: " in lowered:
            complete = len(body) >= int(lowered.split(b"content-length: ")[1].split(b"\r\n")[0])
        else:
            complete = bool(found) and not data
        if not complete and not data:
            raise ConnectionError(f"the server closed the connection after {self.received!r}")
        if complete:
            self.times.append(time.perf_counter() - self.started)
            if b" 200 " not in head.split(b"\r\n")[0] or b'"Err"' in body:
                raise RuntimeError(f"the server answered {self.received!r}")
            if closes:
                self.connection.close()
                self.connection = None
        return complete


def call_all(path: str, callers: int, calls: list[bytes]) -> tuple[list[float], float]:
    """The time of each call and of all together, in seconds, with so many callers."""
    shared = iter(calls)
    started = time.perf_counter()
    active = [caller for caller in (Caller(path, shared) for _ in range(callers)) if caller.start()]
    everyone = list(active)
    with selectors.DefaultSelector() as selector:
        registered: dict[Caller, socket.socket] = {}

        def watch(caller: Caller) -> None:
            if registered.get(caller) is not caller.connection:
                if caller in registered:
                    with contextlib.suppress(KeyError, ValueError):
                        selector.unregister(registered[caller])
                assert caller.connection is not None
                selector.register(caller.connection, selectors.EVENT_READ, caller)
                registered[caller] = caller.connection

        for caller in active:
            watch(caller)
        while active:
            for key, _ in selector.select():
                caller = key.data
                if caller.read():
                    if caller.connection is None:
                        selector.unregister(registered.pop(caller))
                    if caller.start():
                        watch(caller)
                    else:
                        active.remove(caller)
    elapsed = time.perf_counter() - started
    for caller in everyone:
        if caller.connection is not None:
            caller.connection.close()
    return [seconds for caller in everyone for seconds in caller.times], elapsed


def joins(path: str, calls: int) -> list[bytes]:
    """So many requests, each for an endpoint that is created here."""
    networks = [f"{caller:02x}{NETWORK[2:]}" for caller in range(8)]
    endpoints = [(networks[i % 8], f"{i * 2654435761 % 2**32:08x}{i:056x}") for i in range(calls)]
    pool = {"AddressSpace": "LocalDefault", "Gateway": "172.18.0.1/16", "Pool": "172.18.0.0/16"}
    call_all(
        path,
        1,
        [
            request("CreateNetwork", {"NetworkID": network, "Options": {}, "IPv4Data": [pool], "IPv6Data": []})
            for network in networks
        ],
    )
    interface = {"Address": "172.18.0.2/16", "AddressIPv6": "", "MacAddress": ""}
    call_all(
        path,
        1,
        [
            request(
                "CreateEndpoint",
                {"NetworkID": network, "EndpointID": endpoint, "Interface": interface, "Options": OPTIONS},
            )
            for network, endpoint in endpoints
        ],
    )
    return [
        request(
            "Join",
            {"NetworkID": network, "EndpointID": endpoint, "SandboxKey": "/run/x", "Options": OPTIONS},
        )
        for network, endpoint in endpoints
    ]


def measure(server: str, callers: int, calls: int) -> tuple[float, float, float]:
    """p50 and p99 in µs and calls a second."""
    with running(server) as path:
        times, elapsed = call_all(path, callers, joins(path, calls))
    times.sort()
    return times[len(times) // 2] * 1e6, times[len(times) * 99 // 100] * 1e6, calls / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=4000, help="Join calls per server, callers and round (4000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median of them counts (3)")
    parser.add_argument("--serve", nargs=3, metavar=("SERVER", "SOCKET", "STATE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        server, path, state = arguments.serve
        START[server](path, state)
        return

    results: dict[tuple[str, int], list[tuple[float, float, float]]] = defaultdict(list)
    for round_number in range(arguments.rounds):
        for callers in (1, 8):
            for server in SERVERS:
                print(f"\rround {round_number + 1}, {callers} callers, {server:20}", end="", file=sys.stderr)
                results[server, callers].append(measure(server, callers, arguments.calls))
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr)

    print(f"{'':20} {'1 caller':>28} {'8 callers':>28}")
    print(f"{'':20} {'p50 µs':>9} {'p99 µs':>9} {'calls/s':>8} {'p50 µs':>9} {'p99 µs':>9} {'calls/s':>8}")
    median: dict[tuple[str, int], list[float]] = {
        key: [statistics.median(column) for column in zip(*rows, strict=True)] for key, rows in results.items()
    }
    for server in SERVERS:
        cells = [f"{value:9.0f}" for callers in (1, 8) for value in median[server, callers]]
        print(f"{server:20} {' '.join(cells)}")
    p50 = median["docker-plugin-api", 1][0] / median["sdk", 1][0]
    throughput = median["sdk", 8][2] / median["docker-plugin-api", 8][2]
    print(
        f"\nsdk beside docker-plugin-api: p50 with 1 caller 1/{p50:.1f} (bar: 1/4), "
        f"calls a second with 8 callers x{throughput:.1f} (bar: x8)"
    )


if __name__ == "__main__":
    main()
