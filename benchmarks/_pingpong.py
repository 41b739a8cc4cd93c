"""Send one byte there and one back over TCP. _traffic.py runs both ends, in network namespaces of its choice.

    python _pingpong.py serve PORT
    python _pingpong.py call ADDRESS PORT SECONDS    prints the median of a round trip in microseconds, and how many

It imports only the standard library. If there are two processors, each end keeps to one of them; otherwise the figure
would mostly depend on the kernel's choice.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time


def serve(port: int) -> None:
    keep_to(0)
    with socket.create_server(("", port)) as server:
        while True:
            connection, _ = server.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while byte := connection.recv(1):
                    connection.send(byte)


def call(address: str, port: int, seconds: float) -> None:
    keep_to(-1)
    with connect(address, port) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        until = time.monotonic() + seconds
        times: list[int] = []
        while time.monotonic() < until:
            for _ in range(100):
                started = time.perf_counter_ns()
                connection.send(b".")
                if not connection.recv(1):
                    sys.exit("the other end closed the connection")
                times.append(time.perf_counter_ns() - started)
    print(statistics.median(times[100:] or times) / 1e3, len(times))


def connect(address: str, port: int) -> socket.socket:
    """Wait up to 2 s for the other end to listen."""
    until = time.monotonic() + 2
    while True:
        try:
            return socket.create_connection((address, port), 2)
        except OSError as error:
            if time.monotonic() > until:
                sys.exit(f"{address} port {port}: {error}")
        time.sleep(0.02)


def keep_to(index: int) -> None:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[index]})


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        call(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
