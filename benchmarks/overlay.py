"""Compare netplugin-overlay with Docker's built-in overlay, in a swarm of three private engines, in turn.

    python benchmarks/overlay.py [--engine 26.1] [--rounds 6] [--json FILE] [--plugin FOLDER]

- data: throughput (iperf3) and TCP round trip between containers on two hosts.
- join: the time from the request to the first answer. A container on one host listens, and a new one on another host
  connects to it. "run" starts a container on a worker (create and start by its engine's API, as `docker run` does),
  "scale" adds a replica to a service. "first" is the node's first container on the network, so engine and driver also
  make the network there; "second" is one more. Swarm and engine take most of the time, the same with both drivers.

Each turn has a network of its own, and nothing of the turn before is left. The order changes with every round. `ratio`
is the ratio of the medians. `paired` is the median of the rounds' ratios, with its 95 % confidence interval (by order
statistics; with fewer than 6 rounds, the interval is the whole range and means little). If the interval does not
contain 1, netplugin-overlay is "better" or "worse". `--control` compares Docker's overlay with itself: the noise.

It needs root, and the same programs as the tests' engines. A run of 6 rounds takes 3 to 5 minutes. All hosts share this
machine's processors, so they limit the throughput, not a wire.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _figures import Report, print_section, turns
from _traffic import PROCESSORS, round_trip, serving, throughput

from netplugin_sdk import DriverError
from netplugin_sdk.core.engine_api import Docker
from netplugin_sdk.linux.namespaces import Namespace
from netplugin_sdk.testing.cluster import Cluster, Host
from netplugin_sdk.testing.engine import VERSIONS, EngineError, EngineUnavailable, require, wait_until

PROJECT = Path(__file__).parents[1] / "examples" / "overlay"
PLUGIN = "overlay-example"
NETWORK, SERVICE = "bench", "replicas"
PORT = 7000
PATIENCE = 60.0  # seconds for what is to happen at all
SETTLE = 0.5  # seconds between turns, so that no driver pays for the other's late work in the kernel
SECTIONS = ("data", "join")


def connecting(address: str) -> list[str]:
    """The command of a container that connects, however often that takes, and stays."""
    return ["sh", "-c", f"until nc {address} {PORT} < /dev/null; do :; done; exec sleep 36000"]


@dataclass
class Node:
    """A host, and its engine's API on a connection that stays."""

    host: Host
    docker: Docker

    def run(self, name: str, command: list[str]) -> None:
        """Create and start a container on the network."""
        content = {"Image": "busybox", "Cmd": command, "HostConfig": {"NetworkMode": NETWORK}}
        self.docker.call("POST", f"/containers/create?name={name}", content)
        self.docker.call("POST", f"/containers/{name}/start")

    def inspect(self, container: str) -> dict[str, Any]:
        found: dict[str, Any] = self.docker.call("GET", f"/containers/{container}/json")
        return found

    def inside(self, container: str) -> str:
        """The network namespace of a running container, as programs beside the engine see it."""
        return f"/proc/{self.inspect(container)['State']['Pid']}/ns/net"

    def address(self, container: str) -> str:
        return str(self.inspect(container)["NetworkSettings"]["Networks"][NETWORK]["IPAddress"])

    def remove_containers(self) -> None:
        """Those of `run`; a service's go with it."""
        for container in self.docker.call("GET", "/containers/json?all=1"):
            if "com.docker.swarm.service.name" not in container["Labels"]:
                self.docker.call("DELETE", f"/containers/{container['Id']}?force=1")

    def has_something(self) -> bool:
        """Whether there are containers, or links of netplugin-overlay."""
        links = self.host.engine.run(["ip", "-brief", "link"]).stdout
        return bool(self.docker.call("GET", "/containers/json?all=1") or re.search("^(ov|vx|ve|vc)-", links, re.M))


@dataclass
class Bench:
    """A swarm with the plugin, and how much to do."""

    nodes: tuple[Node, ...]
    drivers: Mapping[str, str]  # contestant → driver
    report: Report
    options: argparse.Namespace
    say: Callable[[str], None]

    def turns(self, rounds: int, what: str) -> Iterator[str]:
        """The contestants in turn, so many times, in one order and then in the other."""
        return turns(list(self.drivers), rounds, lambda text: self.say(f"{what}, {text}"), SETTLE)

    def measure(self) -> None:
        for name, unit, more in (("throughput", "Gbit/s", True), ("round trip", "µs", False)):
            self.report.row("data", name, unit=unit, more_is_better=more)
        for contestant in self.turns(1, "warming up"):
            with self.network(contestant):
                self.one_turn()
        for contestant in self.turns(self.options.rounds, "measuring"):
            with self.network(contestant):
                for (section, name), value in self.one_turn().items():
                    self.report.row(section, name).add(contestant, value)

    def one_turn(self) -> dict[tuple[str, str], float]:
        """Each figure once, on a network that no node has anything of yet."""
        server, client, third = self.nodes
        figures: dict[tuple[str, str], float] = {}
        server.run("server", ["sleep", "36000"])
        address = server.address("server")
        with listening(server, "server") as first_answer:
            for which in ("first", "second"):
                run = self._running(client, which, address)
                figures["join", f"run, {which}"] = first_answer(run)
            self._create_service(third.host.name, address)
            for count, which in enumerate(("first", "second"), start=1):
                figures["join", f"scale, {which}"] = first_answer(self._scaling(count))
        seconds, inside = self.options.seconds, client.inside("first")
        with serving(server.host.engine, server.inside("server")):
            engine = client.host.engine
            figures["data", "round trip"] = round_trip(engine, inside, address, seconds / 2)
            figures["data", "throughput"] = throughput(engine, inside, address, seconds)
        return figures

    @staticmethod
    def _running(node: Node, name: str, address: str) -> Callable[[], None]:
        return lambda: node.run(name, connecting(address))

    def _create_service(self, node: str, address: str) -> None:
        """Without a replica yet; those to come run on this node."""
        # Endpoint mode dnsrr: a virtual IP would need ip_vs, which not every kernel has.
        options = ("--endpoint-mode", "dnsrr", "--no-resolve-image", "--detach", "--stop-signal", "KILL")
        where = ("--network", NETWORK, "--constraint", f"node.hostname=={node}", "--replicas", "0")
        self.nodes[0].host.engine.docker(
            "service", "create", "--name", SERVICE, *options, *where, "busybox", *connecting(address)
        )

    def _scaling(self, count: int) -> Callable[[], None]:
        """The request of `docker service scale`."""
        docker = self.nodes[0].docker
        service = docker.call("GET", f"/services/{SERVICE}")
        spec = service["Spec"] | {"Mode": {"Replicated": {"Replicas": count}}}
        path = f"/services/{SERVICE}/update?version={service['Version']['Index']}"
        return lambda: docker.call("POST", path, spec)

    @contextlib.contextmanager
    def network(self, contestant: str) -> Iterator[None]:
        """One of this contestant's; afterwards no node has anything of it."""
        engine = self.nodes[0].host.engine
        driver = self.drivers[contestant]
        engine.docker("network", "create", "--driver", driver, "--scope", "swarm", "--attachable", NETWORK)
        try:
            yield
        finally:
            engine.run_docker("service", "rm", SERVICE)
            for node in self.nodes:
                node.remove_containers()
            # It is in use until the manager has heard of the last task's end.
            wait(lambda: engine.run_docker("network", "rm", NETWORK).returncode == 0, "the network to be removed")
            wait(lambda: not any(map(Node.has_something, self.nodes)), "the nodes to have nothing left of it")


@contextlib.contextmanager
def listening(node: Node, container: str) -> Iterator[Callable[[Callable[[], None]], float]]:
    """A function that does something, and returns the milliseconds until somebody has connected to the container."""
    process = node.inspect(container)["State"]["Pid"]
    namespace = Namespace(node.host.engine.run_folder.parent / f"proc/{process}/ns/net")
    with ThreadPoolExecutor(1) as pool, namespace.call(lambda: socket.create_server(("", PORT))) as listener:
        listener.settimeout(PATIENCE)

        def accept() -> float:
            connection, _ = listener.accept()
            moment = time.perf_counter()
            connection.close()
            return moment

        def first_answer(to: Callable[[], None]) -> float:
            accepted = pool.submit(accept)
            began = time.perf_counter()
            to()
            return (accepted.result() - began) * 1e3

        yield first_answer


def wait(condition: Callable[[], bool], what: str) -> None:
    try:
        wait_until(condition, PATIENCE, every=0.1)
    except TimeoutError:
        raise EngineError(f"waited {PATIENCE:g} s for {what}") from None


# ---------------------------------------------------------------------------------------------------------- a run


def run(options: argparse.Namespace) -> Report:
    """Raises `EngineUnavailable`, `EngineError` and `DriverError`."""

    def say(text: str) -> None:
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    require(options.engine)
    drivers = {"docker": "overlay", "netplugin": f"{PLUGIN}:latest"}
    if options.control:
        drivers = {"docker": "overlay", "control": "overlay"}
    with contextlib.ExitStack() as stack:
        folder = options.plugin
        if folder is None and not options.control:
            say("bundling the plugin")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="netplugin-bench-")), PLUGIN)
            bundle(folder)
        say("starting three engines")
        cluster = stack.enter_context(Cluster(3, options.engine))
        if not options.control:
            cluster.install_plugin(PLUGIN, folder)
        cluster.start_swarm()
        nodes = tuple(
            Node(host, stack.enter_context(contextlib.closing(host.engine.api(timeout=PATIENCE))))
            for host in cluster.hosts
        )
        said = nodes[0].docker.call("GET", "/version")["Version"]
        machine = f"Linux {platform.release()}, {len(PROCESSORS)} processors, Python {platform.python_version()}"
        report = Report(options.engine, said, machine, list(drivers))
        Bench(nodes, drivers, report, options, say).measure()
        say("removing it")
    say("")
    return report


def bundle(folder: Path) -> None:
    netplugin = Path(sys.executable).with_name("netplugin")
    command = (netplugin, "bundle", PROJECT, "--name", PLUGIN, "--output", folder)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EngineError(f"netplugin bundle: {done.stderr.strip()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=list(VERSIONS), default="26.1", help="version of Docker Engine (26.1)")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each driver (6)")
    parser.add_argument("--seconds", type=int, default=2, help="of a throughput; a round trip has half of it (2)")
    parser.add_argument("--plugin", type=Path, metavar="FOLDER", help="what netplugin bundle has made already")
    parser.add_argument("--control", action="store_true", help="Docker's overlay against itself")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample")
    options = parser.parse_args()
    if min(options.rounds, options.seconds) < 1:
        parser.error("at least one round, and one second")
    if options.plugin is not None and not (options.plugin / "config.json").is_file():
        parser.error(f"{options.plugin} is not what netplugin bundle makes: it has no config.json")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # cleans up, as Ctrl-C does
    try:
        report = run(options)
    except (EngineUnavailable, EngineError, DriverError, TimeoutError) as error:
        print(f"\r\x1b[K{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\r\x1b[Kinterrupted; the engines are gone", file=sys.stderr)
        return 130
    print(f"Docker Engine {report.version}, {report.machine}; three hosts on this machine")
    for section in SECTIONS:
        print_section(report, section)
    if options.json:
        options.json.write_text(json.dumps([report.to_json()], indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
