"""A plugin that is killed at any point starts again, and has lost nothing.

The engine's calls of a network's whole life are made to myplugin, in a process of its own, once for each point at which
that process changes anything: a write, a netlink message, a file, a port, a program that is started or waited for.
There it is killed. It starts again, the engine repeats its call, and everything must be as if nothing had happened.
The points are counted as they come (tests/faults/kill_at.py), so that none is left out. By default every nineteenth of
them is tried, each test beginning with another one; with NETPLUGIN_FULL=1 all of them.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from netplugin_sdk.linux.namespaces import unshare
from netplugin_sdk.testing.engine import listens, wait_until

from ..patience import PATIENCE
from ..volume import volume
from .lab import SYSCTLS, Namespace, run

KILL_AT = Path(__file__).parents[1] / "faults" / "kill_at.py"
PROGRAM = """
import sys
from pathlib import Path
from myplugin.driver import BridgeDriver
from netplugin_sdk import serve
from netplugin_sdk.linux import firewall
firewall.use(sys.argv[2])
sys.stdin.readline()  # until somebody is there to kill it
folder = Path(sys.argv[1])
serve(BridgeDriver(), name="faulty", socket_path=folder / "faulty.sock", state=folder / "state", docker=None)
"""
EVERY = volume(19, 1)
"""Of the points. A prime: what the plugin does again and again is met at another place each time."""
SIDE_BY_SIDE = volume(2, 3)
"""Plugins: they wait more than they work."""
RULES = {"iptables": "iptables-save; ip6tables-save", "nftables": "nft list ruleset"}

NETWORK, ENDPOINT = "0123456789abcdef" * 4, "fedcba9876543210" * 4
BRIDGE, OUTSIDE, INSIDE = f"br-{NETWORK[:12]}", f"ve-{ENDPOINT[:12]}", f"vc-{ENDPOINT[:12]}"
PORTS = [
    {"Proto": protocol, "Port": port, "HostPort": port + 8000, "HostPortEnd": port + 8000, "IP": "", "HostIP": ""}
    for protocol, port in ((6, 80), (17, 53))
]
POOLS = [("IPv4Data", "10.9.8.0/24", "10.9.8.1/24"), ("IPv6Data", "fd00:9:8::/64", "fd00:9:8::1/64")]
CALLS: list[tuple[str, dict[str, Any]]] = [
    (
        "CreateNetwork",
        {
            "Options": {"com.docker.network.enable_ipv6": True, "com.docker.network.generic": {}},
            **{key: [{"AddressSpace": "", "Pool": pool, "Gateway": gateway}] for key, pool, gateway in POOLS},
        },
    ),
    (
        "CreateEndpoint",
        {
            "Interface": {"Address": "10.9.8.2/24", "AddressIPv6": "fd00:9:8::2/64", "MacAddress": ""},
            "Options": {"com.docker.network.portmap": PORTS, "com.docker.network.endpoint.exposedports": []},
        },
    ),
    ("Join", {"SandboxKey": "/var/run/docker/netns/1", "Options": {}}),
    ("ProgramExternalConnectivity", {"Options": {"com.docker.network.portmap": PORTS}}),
    ("RevokeExternalConnectivity", {}),
    ("Leave", {}),
    ("DeleteEndpoint", {}),
    ("DeleteNetwork", {}),
]


@dataclass(frozen=True)
class Seen:
    """The kernel, and the plugin's file."""

    kernel: list[str]
    rows: list[str]

    def is_between(self, others: Sequence[Seen]) -> bool:
        """Whether each is as at one of those moments."""
        return self.kernel in [o.kernel for o in others] and self.rows in [o.rows for o in others]

    def beside(self, wanted: Seen) -> str:
        """How it differs."""
        have, want = [*self.kernel, *self.rows], [*wanted.kernel, *wanted.rows]
        return (
            f"left {[line for line in have if line not in want]}, missing {[line for line in want if line not in have]}"
        )


class Host:
    """A namespace with a plugin, and another for its container. Made in a thread of its own, which it is bound to."""

    def __init__(self, backend: str) -> None:
        unshare()
        run("ip", "link", "set", "lo", "up")
        self.container = Namespace()
        self.backend = backend
        self._started: list[subprocess.Popen[Any]] = []
        self.folder = Path(tempfile.mkdtemp(prefix="faults-"))
        self.home = f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net"
        for sysctl in ("ipv4/ip_forward", "ipv6/conf/default/forwarding", "ipv6/conf/all/forwarding"):
            (SYSCTLS / sysctl).write_text("1")
        if backend == "iptables":
            for command in ("iptables", "ip6tables"):
                run(command, "-P", "FORWARD", "DROP")
                run(command, "-t", "nat", "-A", "POSTROUTING", "-o", "lo", "-j", "RETURN")  # so that there is a table

    def close(self) -> None:
        for process in self._started:
            with process:
                process.kill()  # if it still runs: the test has failed
        self.container.close()
        shutil.rmtree(self.folder)

    # ------------------------------------------------------------------------------------------------- the plugin

    def start(self) -> None:
        """Start the plugin; it waits until it may go on."""
        with (self.folder / "log").open("ab") as log:
            command = [sys.executable, "-c", PROGRAM, str(self.folder), self.backend]
            self.plugin = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
        self._started.append(self.plugin)

    def go_on(self) -> None:
        """Until it listens, or has ended."""
        assert self.plugin.stdin is not None
        self.plugin.stdin.write(b"\n")
        self.plugin.stdin.close()
        wait_until(lambda: self.ended or listens(self.folder / "faulty.sock"), PATIENCE)

    def kill_at(self, point: int) -> subprocess.Popen[str]:
        """A program that kills the plugin there, and prints what it does until then."""

        def reads_its_input() -> bool:
            return Path(f"/proc/{self.plugin.pid}/syscall").read_text().startswith(("0 0x0 ", "63 0x0 "))

        wait_until(reads_its_input, PATIENCE)  # it has imported all
        command = [sys.executable, "-I", str(KILL_AT), str(self.plugin.pid), str(point)]
        killer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._started.append(killer)
        assert killer.stdout is not None
        assert killer.stdout.readline() == "attached\n"
        return killer

    @property
    def ended(self) -> bool:
        return self.plugin.poll() is not None

    def log(self) -> str:
        return (self.folder / "log").read_text()[-4000:]

    def stop(self) -> None:
        self.plugin.terminate()
        self.plugin.wait(PATIENCE)

    def call(self, method: str, content: dict[str, Any]) -> None:
        body = json.dumps({"NetworkID": NETWORK, "EndpointID": ENDPOINT, **content})
        with closing(_Connection(self.folder / "faulty.sock")) as connection:
            connection.request("POST", f"/NetworkDriver.{method}", body)
            response = connection.getresponse()
            answer = response.read()
        assert response.status == 200, answer

    # ------------------------------------------------------------------------------------- the engine, and a look

    def move(self, method: str) -> None:
        """What the engine does with the answer."""
        if method == "Join":
            run("ip", "link", "set", INSIDE, "netns", self.container.path)
        elif method == "Leave":
            self.container.run("ip", "link", "set", INSIDE, "netns", self.home)

    def look(self) -> Seen:
        kernel = [
            f"{link['ifname']} {link.get('master')} {link['mtu']} {'UP' in link['flags']} {address}"
            for link in json.loads(run("ip", "-json", "address"))
            for address in (
                None,
                *(f"{a['local']}/{a['prefixlen']}" for a in link["addr_info"] if a["scope"] != "link"),
            )
        ]
        for line in run("sh", "-c", f"{RULES[self.backend]}; ss -Hltun").splitlines():
            if not line.startswith(("#", ":", "*", "COMMIT")):
                kernel.append(re.sub(r"counter packets \d+ bytes \d+", "counter", line))
        return Seen(sorted(kernel), sorted(self._rows()))

    def _rows(self) -> Iterator[str]:
        """Of a copy: nobody else reads the file."""
        with tempfile.TemporaryDirectory() as copy:
            for file in (self.folder / "state").glob("state.db*"):
                shutil.copy(file, copy)
            with closing(sqlite3.connect(f"{copy}/state.db")) as db:
                yield from (f"network {row}" for row in db.execute("SELECT intent FROM networks"))
                query = "SELECT e.intent, e.answer NOTNULL, external_request NOTNULL, j.key NOTNULL FROM endpoints e"
                yield from (f"endpoint {row}" for row in db.execute(f"{query} LEFT JOIN joins j USING (key)"))

    def settled(self, *wanted: Seen) -> Seen:
        """What is seen when it is as at one of these, or when the plugin has ended, or else in the end.

        Some is done after an answer.
        """
        until = time.monotonic() + PATIENCE
        while not (seen := self.look()).is_between(wanted) and not self.ended and time.monotonic() < until:
            time.sleep(0.02)
        return seen


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("plugin", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(self._path))


@dataclass(frozen=True)
class Step:
    """A call, and what is to be seen before it, when it is answered, and when the engine has used the answer."""

    method: str
    content: dict[str, Any]
    moments: tuple[Seen, Seen, Seen]


UNDOES = {"RevokeExternalConnectivity": "Join", "DeleteEndpoint": "CreateNetwork"}
"""Calls, part of which is done after their answers, and after which everything is as after this earlier one."""


def undisturbed(host: Host) -> list[Step]:
    """A life in which nobody is killed."""
    host.start()
    host.go_on()
    start = before = host.look()
    after, steps = {"DeleteNetwork": start}, list[Step]()
    for method, content in CALLS:
        host.call(method, content)
        if method in UNDOES:
            after[method] = after[UNDOES[method]]
        answered = host.settled(after[method]) if method in after else host.look()
        assert answered == after.get(method, answered), method
        host.move(method)
        steps.append(Step(method, content, (before, answered, before := host.look())))
        after[method] = before
    host.stop()
    assert before == start
    return steps


class Trial:
    """A life in which the plugin is killed at a point."""

    def __init__(self, host: Host, point: int) -> None:
        self.host, self.point = host, point
        self.wrong: list[str] = []
        host.start()
        self._killer = host.kill_at(point)
        host.go_on()

    def start_again(self, during: str, *right: Seen) -> None:
        """It was killed: then everything is as at one of these moments."""
        assert self.host.plugin.wait(PATIENCE) == -signal.SIGKILL, self.host.log()
        self.host.start()
        self.host.go_on()
        self.check(f"in {during}, started again", *right)

    def check(self, when: str, *right: Seen) -> None:
        seen = self.host.settled(*right)
        if not seen.is_between(right):
            self.wrong.append(f"{when}: {seen.beside(right[-1])}")

    def live(self, steps: Sequence[Step]) -> None:
        if self.host.ended:
            self.start_again("its start", steps[0].moments[0])
        for step in steps:
            try:
                self.host.call(step.method, step.content)
            except (OSError, http.client.HTTPException):
                self.start_again(step.method, *step.moments)
                self.host.call(step.method, step.content)  # as the engine does
                self.host.move(step.method)
                self.check(f"in {step.method}, called again", step.moments[-1])
            else:
                self.host.move(step.method)
        end = steps[-1].moments[-1]
        self.host.settled(end)
        if self.host.ended:
            self.start_again("what it does in the end", end)
        self.check("in the end", end)

    def end(self, right: Seen) -> str | None:
        """Stop it. Where it was killed; None if it never came to that point."""
        self.host.stop()
        if self.host.plugin.returncode != 0:
            self.start_again("its end", right)
            self.host.stop()
        printed, _ = self._killer.communicate(timeout=PATIENCE)
        *_, last = printed.splitlines()
        number, _, name = last.partition(" ")
        return name if int(number) == self.point else None


class Tally:
    """Of what was tried by several hosts side by side: every so many points from this one on."""

    def __init__(self, first: int) -> None:
        self.points = count(min(first, EVERY), EVERY)
        self.tried: dict[int, str] = {}
        self.lost: list[str] = []

    def add(self, trial: Trial, name: str | None) -> bool:
        if name is not None:
            self.tried[trial.point] = name
            self.lost.extend(f"point {trial.point}, {name} {text}" for text in trial.wrong)
        return name is not None

    def run(self, work: Callable[[], None]) -> None:
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            for worker in [pool.submit(work) for _ in range(SIDE_BY_SIDE)]:
                worker.result()
        kinds = Counter(name.split()[0] for name in self.tried.values())
        print(f"{len(self.tried)} points tried, {len(self.lost)} lost;", *(f"{kind} {n}" for kind, n in kinds.items()))
        # The same life has a point more or less each time, so the last ones may be missing; none before them.
        assert max(self.tried) // EVERY - len(self.tried) < SIDE_BY_SIDE
        assert not self.lost, "\n".join(self.lost)


@pytest.mark.parametrize(("backend", "first"), [("iptables", 1), ("nftables", 8)])
def test_killed_at_any_point_of_a_networks_life(backend: str, first: int) -> None:
    tally = Tally(first)

    def work() -> None:
        with closing(Host(backend)) as host:
            steps = undisturbed(host)
            for point in tally.points:
                shutil.rmtree(host.folder / "state")
                trial = Trial(host, point)
                trial.live(steps)
                if not tally.add(trial, trial.end(steps[-1].moments[-1])):
                    return

    tally.run(work)
    assert max(tally.tried) > 100


@pytest.mark.parametrize(("rebooted", "first"), [(False, 4), (True, 12)])
def test_killed_at_any_point_of_its_start(rebooted: bool, first: int) -> None:
    """With a network, a container on it and published ports; after a reboot with nothing of them in the kernel."""
    tally = Tally(first)

    def work() -> None:
        with closing(Host("iptables")) as known:
            known.start()
            known.go_on()
            for method, content in CALLS[:4]:
                known.call(method, content)
                known.move(method)
            known.stop()
            kept = shutil.copytree(known.folder / "state", known.folder / "kept")

            def host_with_state() -> AbstractContextManager[Host]:
                host = Host("iptables") if rebooted else known
                shutil.rmtree(host.folder / "state", ignore_errors=True)
                shutil.copytree(kept, host.folder / "state")
                return closing(host) if rebooted else nullcontext(host)

            with host_with_state() as host:
                host.start()
                host.go_on()
                right = host.look()
                host.stop()
            for point in tally.points:
                with host_with_state() as host:
                    trial = Trial(host, point)
                    if host.ended:
                        trial.start_again("its start", right)
                    if not tally.add(trial, trial.end(right)):
                        return

    tally.run(work)
    assert max(tally.tried) > 20
