"""Throughput and round trips between network namespaces of private engines, for engine.py and overlay.py.

Programs run beside an engine; a namespace is named by its path as these see it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from netplugin_sdk.testing.engine import EngineError, PrivateEngine

PROCESSORS = sorted(os.sched_getaffinity(0))
IPERF, PONG = 5201, 7000
"""TCP ports of the servers."""
_PINGPONG = str(Path(__file__).with_name("_pingpong.py"))


@contextlib.contextmanager
def serving(engine: PrivateEngine, namespace: str) -> Iterator[None]:
    """The servers of both, in this namespace."""
    with (
        engine.spawn("pingpong", pingpong(namespace, "serve", str(PONG))) as pong,
        engine.spawn("iperf3", iperf3(engine, namespace, "--server", "--port", str(IPERF))) as iperf,
    ):
        yield
        for server in (pong, iperf):
            if not server.running:
                raise EngineError(f"{server.name} ended by itself; its log:\n{server.log.read_text()}")


def throughput(engine: PrivateEngine, namespace: str, address: str, seconds: float) -> float:
    """Gbit/s that arrive at the server of this address."""
    # The two ends on two processors: otherwise the figure is mostly about where the kernel put them.
    processors = f"{PROCESSORS[-1]},{PROCESSORS[0]}"
    arguments = ("-c", address, "-p", str(IPERF), "-t", f"{seconds:g}", "-A", processors, "--json")
    result: Any = {}
    for _ in range(20):
        done = engine.run(iperf3(engine, namespace, *arguments))
        result = json.loads(done.stdout or "{}")
        if "error" not in result and done.returncode == 0:
            return float(result["end"]["sum_received"]["bits_per_second"]) / 1e9
        time.sleep(0.1)  # not listening yet, or still with the test before
    raise EngineError(f"iperf3 to {address}: {result.get('error') or done.stderr.strip()}")


def round_trip(engine: PrivateEngine, namespace: str, address: str, seconds: float) -> float:
    """Of one byte over TCP; the median, in microseconds."""
    done = engine.run(pingpong(namespace, "call", address, str(PONG), str(seconds)))
    if done.returncode != 0:
        raise EngineError(f"round trips to {done.stderr.strip()}")
    return float(done.stdout.split()[0])


def iperf3(engine: PrivateEngine, namespace: str, *arguments: str) -> list[str]:
    """The command for the engine's own, in its root file system."""
    anchor = (engine.run_folder / "engine.pid").read_text().strip()
    return ["nsenter", f"--mount=/proc/{anchor}/ns/mnt", f"--net={namespace}", "iperf3", *arguments]


def pingpong(namespace: str, *arguments: str) -> list[str]:
    """The command for either end of a round trip."""
    return ["nsenter", f"--net={namespace}", sys.executable, _PINGPONG, *arguments]
