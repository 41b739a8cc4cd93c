"""Measure the time that `netplugin trace` adds to a call: call one plugin directly and through the trace, in turn.

    python benchmarks/tracing.py [--calls 4000]

Servers, client and Join calls are those of dispatch.py. In front of each server is a real ``netplugin trace --record``,
which also writes its lines to a file. Batches of 50 calls take turns, through the trace and directly to the plugin's
own socket, so that other load on this machine affects both.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dispatch import call_all, joins, running

SERVERS = ("docker-plugin-api", "sdk")
BAR = 200.0  # µs
BATCH = 50
WAYS = ("direct", "traced")


@contextlib.contextmanager
def traced(path: str) -> Iterator[dict[str, str]]:
    """The sockets of both ways."""
    with tempfile.TemporaryDirectory(prefix="netplugin-trace-") as folder:
        command = [
            str(Path(sys.executable).with_name("netplugin")),
            "trace",
            path,
            "--record",
            f"{folder}/record.jsonl",
        ]
        with Path(f"{folder}/lines").open("wb") as lines, subprocess.Popen(command, stdout=lines) as process:
            try:
                while "in front" not in Path(f"{folder}/lines").read_text():
                    assert process.poll() is None, "the trace does not begin"
                    time.sleep(0.02)
                yield {"traced": path, "direct": str(Path(path).parent / f".{Path(path).name}.traced" / "plugin")}
            finally:
                process.terminate()
                assert process.wait(20) == 0


def measure(server: str, callers: int, calls: int) -> dict[str, tuple[float, float]]:
    """p50 and p99 in µs of both ways."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with running(server) as path:
        requests = joins(path, calls)
        with traced(path) as sockets:
            for number, start in enumerate(range(0, calls, BATCH)):
                way = WAYS[number % 2]
                times[way] += call_all(sockets[way], callers, requests[start : start + BATCH])[0]
    return {
        way: (found[len(found) // 2] * 1e6, found[len(found) * 99 // 100] * 1e6)
        for way, found in ((way, sorted(found)) for way, found in times.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=4000, help="Join calls per server and callers (4000)")
    arguments = parser.parse_args()

    print(f"{'µs':20} {'direct p50':>11} {'p99':>7} {'traced p50':>11} {'p99':>7} {'added p50':>11} {'p99':>7}")
    missed = []
    for server in SERVERS:
        for callers in (1, 8):
            found = measure(server, callers, arguments.calls)
            (p50, p99), (traced_p50, traced_p99) = (found[way] for way in WAYS)
            cells = f"{p50:11.0f} {p99:7.0f} {traced_p50:11.0f} {traced_p99:7.0f}"
            name = f"{server}, {callers}"
            print(f"{name:20} {cells} {traced_p50 - p50:11.0f} {traced_p99 - p99:7.0f}", flush=True)
            if callers == 1 and traced_p50 - p50 > BAR:
                missed.append(server)
    print(f"bar: p50 with 1 caller at most {BAR:.0f} added: {'missed by ' + ', '.join(missed) if missed else 'kept'}")


if __name__ == "__main__":
    main()
