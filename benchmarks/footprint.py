"""Measure the cost of an idle plugin: its import, its start and its memory, beside the other Python plugin.

    python benchmarks/footprint.py [--rounds 9]

- import: `import netplugin_sdk` in a new interpreter, without the time of the interpreter itself.
- start: from the start of the process to the answer to its first call, Plugin.Activate.
- memory: the resident set (VmRSS) of the idle process, after some calls.

The modules are compiled on disk (__pycache__), as in an installed package.

`myplugin` is the example driver as a user runs it, with netlink loaded; `docker-plugin-api` is PyPI's
docker-plugin-api 0.4 (Flask) under Werkzeug's server, with a driver that does nothing and no netlink.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dispatch import call_all, request

ACTIVATE = b"POST /Plugin.Activate HTTP/1.1\r\nHost: \r\nContent-Length: 0\r\n\r\n"
MYPLUGIN = """
import sys
from myplugin.driver import BridgeDriver
from netplugin_sdk import serve
serve(BridgeDriver(), name="myplugin", socket_path=sys.argv[1], state=sys.argv[2])
"""
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def import_time() -> float:
    """Milliseconds."""
    code = "import time; t = time.perf_counter(); import netplugin_sdk; print((time.perf_counter() - t) * 1e3)"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, check=True, text=True)
    return float(done.stdout)


def start_and_memory(command: list[str]) -> tuple[float, float]:
    """Milliseconds to the first answer, and megabytes at rest."""
    with tempfile.TemporaryDirectory(prefix="netplugin-bench-") as folder:
        path = f"{folder}/plugin.sock"
        started = time.perf_counter()
        with subprocess.Popen(
            [*command, path, f"{folder}/state"],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                while not answers(path):
                    if time.perf_counter() - started > 20:
                        raise TimeoutError(f"{command} does not answer")
                    time.sleep(0.001)
                elapsed = time.perf_counter() - started
                # A Leave of what is unknown goes through all of the SDK and harms nothing.
                with contextlib.suppress(RuntimeError):  # docker-plugin-api has no such method in this driver
                    call_all(path, 1, [request("Leave", {"NetworkID": "a" * 64, "EndpointID": "b" * 64})])
                time.sleep(0.2)
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(20)
        return elapsed * 1e3, pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def answers(path: str) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(path)
        client.sendall(ACTIVATE)
        return b" 200 " in client.recv(1000)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds; the median of them counts (9)")
    rounds = parser.parse_args().rounds

    dispatch = str(Path(__file__).with_name("dispatch.py"))
    plugins = {
        "myplugin": [sys.executable, "-c", MYPLUGIN],
        "docker-plugin-api": [sys.executable, dispatch, "--serve", "docker-plugin-api"],
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in plugins}
    imports: list[float] = []
    import_time()  # compiles
    for _ in range(rounds):
        imports.append(import_time())
        for name, command in plugins.items():
            measured[name].append(start_and_memory(command))

    median: Callable[[list[float]], float] = statistics.median
    print(f"import netplugin_sdk: {median(imports):.0f} ms (bar: 60 ms)")
    print(f"{'':20} {'start ms':>9} {'memory MB':>10}")
    for name, rows in measured.items():
        start, memory = (median(list(column)) for column in zip(*rows, strict=True))
        print(f"{name:20} {start:9.0f} {memory:10.1f}")
    print("bars for myplugin: 300 ms, 45 MB")


if __name__ == "__main__":
    main()
