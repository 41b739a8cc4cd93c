"""What `netplugin trace` adds to a call: plugins asked directly and through it, side by side.

    python benchmarks/tracing.py [--calls 4000] [--rounds 3]

Servers, client and Join calls are those of dispatch.py. Each server runs twice in each round, once by itself and once
with a real ``netplugin trace --record FILE`` in front of it, whose lines go to a file, too.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from dispatch import measure, running

SERVERS = ("docker-plugin-api", "sdk")
BAR = 200.0  # µs


@contextlib.contextmanager
def traced(server: str) -> Iterator[str]:
    with running(server) as path, tempfile.TemporaryDirectory(prefix="netplugin-trace-") as folder:
        command = [Path(sys.executable).with_name("netplugin"), "trace", path, "--record", f"{folder}/record.jsonl"]
        with (
            Path(f"{folder}/lines").open("wb") as lines,
            subprocess.Popen(command, stdout=lines) as process,
        ):
            try:
                while "in front" not in Path(f"{folder}/lines").read_text():
                    assert process.poll() is None, "the trace does not begin"
                    time.sleep(0.02)
                yield path
            finally:
                process.terminate()
                assert process.wait(20) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=4000, help="Join calls per server, callers and round (4000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median of them counts (3)")
    arguments = parser.parse_args()

    results: dict[tuple[str, int, bool], list[tuple[float, float, float]]] = defaultdict(list)
    for round_number in range(arguments.rounds):
        for callers in (1, 8):
            for server in SERVERS:
                for through, start in ((False, running), (True, traced)):
                    print(f"\rround {round_number + 1}, {callers} callers, {server:20}", end="", file=sys.stderr)
                    results[server, callers, through].append(measure(server, callers, arguments.calls, start))
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr)

    print(f"{'':28} {'1 caller':>28} {'8 callers':>28}")
    print(f"{'':28} {'p50 µs':>9} {'p99 µs':>9} {'calls/s':>8} {'p50 µs':>9} {'p99 µs':>9} {'calls/s':>8}")
    middle = {key: [median(column) for column in zip(*rows, strict=True)] for key, rows in results.items()}
    for server in SERVERS:
        for through in (False, True):
            cells = [f"{value:9.0f}" for callers in (1, 8) for value in middle[server, callers, through]]
            print(f"{server + (', traced' if through else ''):28} {' '.join(cells)}")
    for server in SERVERS:
        p50, p99 = (middle[server, 1, True][i] - middle[server, 1, False][i] for i in (0, 1))
        print(f"\nadded to {server}, 1 caller: p50 {p50:.0f} µs (bar: {BAR:.0f}), p99 {p99:.0f} µs", end="")
    print()


if __name__ == "__main__":
    main()
