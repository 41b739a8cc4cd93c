"""Compare myplugin with Docker's built-in bridge on a real, private Docker Engine: the same calls to both, in turn.

    python benchmarks/engine.py [operations] [burst] [scale] [data] [--engine 26.1] [--json FILE] [--svg FILE]

- operations: the time of nine operations.
- burst: 1, 10 and 100 containers started at once, then removed at once.
- scale: the time of operations beside 1, 50, 100 and 200 networks with two containers each, of one driver at a time.
- data: throughput (iperf3) and TCP round trip, container to container, outwards, and inwards by a published port.

The program measures the engine's API over its socket, on one connection: Docker's command line would add its own start
(25 to 70 ms) to both. Except for scale, both drivers run in every round, and their order changes each time. `ratio` is
the ratio of the medians. `paired` is the median of the rounds' ratios, with its 95 % confidence interval (by order
statistics; with fewer than 6 rounds, the interval is the whole range and means little). If the interval does not
contain 1, myplugin is "better" or "worse". `--control` compares the bridge with itself.

It needs root, and the same programs as the tests' engines. A run of all four takes 10 to 15 minutes per engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from _chart import Box, Drawing, Group
from _figures import Report, Row, print_section, turns
from _traffic import IPERF, PONG, PROCESSORS, round_trip, serving, throughput

from netplugin_sdk import DriverError
from netplugin_sdk.testing.engine import (
    ENGINE_ADDRESS,
    OUTSIDE_ADDRESS,
    VERSIONS,
    EngineError,
    EngineUnavailable,
    PrivateEngine,
    require,
    wait_until,
)

PLUGIN = "myplugin"
SETTLE = 0.3  # seconds between turns, so that no driver pays for the other's late work in the kernel
SAMPLES = 7  # of each operation at each size of `scale`


# ------------------------------------------------------------------------------------------------------- the engine


class Timed:
    """The engine's API on one connection. Timed methods return milliseconds."""

    def __init__(self, engine: PrivateEngine) -> None:
        self._docker = engine.api(timeout=180)
        self.call = self._docker.call
        self.close = self._docker.close

    def timed(self, method: str, path: str, content: Mapping[str, Any] | None = None) -> float:
        started = time.perf_counter()
        self.call(method, path, content)
        return (time.perf_counter() - started) * 1e3

    def create_network(self, name: str, driver: str, subnet: str = "") -> float:
        ipam = {"IPAM": {"Config": [{"Subnet": subnet}]}} if subnet else {}
        return self.timed("POST", "/networks/create", {"Name": name, "Driver": driver, "CheckDuplicate": True, **ipam})

    def remove_network(self, name: str) -> float:
        return self.timed("DELETE", f"/networks/{name}")

    def connect_container(self, network: str, container: str) -> float:
        return self.timed("POST", f"/networks/{network}/connect", {"Container": container})

    def disconnect_container(self, network: str, container: str) -> float:
        return self.timed("POST", f"/networks/{network}/disconnect", {"Container": container})

    def create_container(
        self,
        name: str,
        network: str,
        ports: Mapping[int, int] | None = None,
        command: Sequence[str] = ("sleep", "36000"),
    ) -> None:
        """Nothing of the network is made yet. `ports`: those of the container → those of the host, TCP."""
        bindings = {f"{inside}/tcp": [{"HostPort": str(outside)}] for inside, outside in (ports or {}).items()}
        content = {
            "Image": "busybox",
            "Cmd": command,
            "ExposedPorts": {port: {} for port in bindings},
            "HostConfig": {"NetworkMode": network, "PortBindings": bindings, "RestartPolicy": {"Name": "no"}},
        }
        self.call("POST", f"/containers/create?name={name}", content)

    def start(self, container: str) -> float:
        return self.timed("POST", f"/containers/{container}/start")

    def remove(self, container: str) -> float:
        """`docker rm -f`."""
        return self.timed("DELETE", f"/containers/{container}?force=1&v=0")

    def remove_all(self) -> None:
        for container in self.call("GET", "/containers/json?all=1"):
            self.remove(container["Id"])
        self.call("POST", "/networks/prune")


@dataclass
class Bench:
    """One engine with the plugin beside it, and how much to do."""

    engine: PrivateEngine
    docker: Timed
    drivers: Mapping[str, str]  # contestant → driver
    report: Report
    options: argparse.Namespace
    say: Callable[[str], None]
    publishes: Mapping[str, bool] = field(default_factory=dict)  # contestant → whether a published port is reached
    _pool: list[Timed] = field(default_factory=list)

    def turns(self, rounds: int, what: str) -> Iterator[str]:
        """The contestants in turn, so many times, in one order and then in the other."""
        return turns(list(self.drivers), rounds, lambda text: self.say(f"{what}, {text}"), SETTLE)

    def at_once(self, work: Sequence[Callable[[Timed], object]], workers: int | None = None) -> float:
        """Do all of it, each in a thread with a connection of its own, or by so many workers; milliseconds."""
        workers = min(workers or len(work), len(work))
        while len(self._pool) < workers:
            self._pool.append(Timed(self.engine))
            self._pool[-1].call("GET", "/_ping")
        shared, begin = iter(work), threading.Barrier(workers + 1)
        errors: list[DriverError] = []
        lock = threading.Lock()

        def worker(docker: Timed) -> None:
            begin.wait()
            while not errors:
                with lock:
                    item = next(shared, None)
                if item is None:
                    return
                try:
                    item(docker)
                except DriverError as error:
                    errors.append(error)

        # Daemons, so that Ctrl-C does not wait for answers.
        threads = [threading.Thread(target=worker, args=[docker], daemon=True) for docker in self._pool[:workers]]
        for thread in threads:
            thread.start()
        begin.wait()
        started = time.perf_counter()
        for thread in threads:
            thread.join()
        elapsed = (time.perf_counter() - started) * 1e3
        if errors:
            raise errors[0]
        return elapsed

    def inside(self, container: str) -> str:
        """The network namespace of a running container, as programs beside the engine see it."""
        return f"/proc/{self.docker.call('GET', f'/containers/{container}/json')['State']['Pid']}/ns/net"

    def address(self, container: str, network: str) -> str:
        networks = self.docker.call("GET", f"/containers/{container}/json")["NetworkSettings"]["Networks"]
        return str(networks[network]["IPAddress"])


# ------------------------------------------------------------------------------------------------------ operations

OPERATIONS = (
    "network create",
    "network rm",
    "network rm, create",
    "network connect",
    "network disconnect",
    "container start",
    "start -p",
    "kill+rm",
    "kill+rm -p",
)
PORT = 18080


def operations(bench: Bench) -> None:
    """Each driver has a network with a running container all the while, as an engine in use has."""
    docker = bench.docker
    for contestant, driver in bench.drivers.items():
        docker.create_network(f"base-{contestant}", driver)
        docker.create_container(f"idle-{contestant}", f"base-{contestant}")
        docker.start(f"idle-{contestant}")
    for contestant in bench.turns(2, "operations, warming up"):
        one_of_each(docker, contestant, bench.drivers[contestant])
    for name in OPERATIONS:
        bench.report.row("operations", name)
    for contestant in bench.turns(bench.options.rounds, "operations"):
        for name, value in one_of_each(docker, contestant, bench.drivers[contestant]).items():
            bench.report.row("operations", name).add(contestant, value)
    docker.remove_all()


def one_of_each(docker: Timed, contestant: str, driver: str) -> dict[str, float]:
    base, idle = f"base-{contestant}", f"idle-{contestant}"
    times = {"network create": docker.create_network("bench", driver)}
    times["network connect"] = docker.connect_container("bench", idle)
    times["network disconnect"] = docker.disconnect_container("bench", idle)
    times["network rm"] = docker.remove_network("bench")
    time.sleep(SETTLE)
    docker.create_network("bench", driver)
    time.sleep(SETTLE)
    # One right after the other, since a driver may leave something of the one to the other.
    times["network rm, create"] = docker.remove_network("bench") + docker.create_network("bench", driver)
    docker.remove_network("bench")
    time.sleep(SETTLE)
    docker.create_container("plain", base)
    docker.create_container("published", base, {80: PORT})
    times["container start"] = docker.start("plain")
    times["start -p"] = docker.start("published")
    times["kill+rm"] = docker.remove("plain")
    times["kill+rm -p"] = docker.remove("published")
    return times


# ----------------------------------------------------------------------------------------------------------- burst

BURSTS = (1, 10, 100)


def burst(bench: Bench) -> None:
    """All on one new network; created before, since nothing of the network is made then."""
    for contestant in bench.turns(1, "burst, warming up"):
        one_burst(bench, contestant, 3)
    for name in ("start at once", "kill+rm at once"):
        for count in BURSTS:
            bench.report.row("burst", name, at=count)
    for count in BURSTS:
        # Few are as short as an operation and as noisy; a hundred take a while and are an average already.
        rounds = min(bench.options.rounds, max(3, 2 * bench.options.rounds // count))
        for contestant in bench.turns(rounds, f"burst of {count}"):
            started, removed = one_burst(bench, contestant, count)
            bench.report.row("burst", "start at once", at=count).add(contestant, started)
            bench.report.row("burst", "kill+rm at once", at=count).add(contestant, removed)


def one_burst(bench: Bench, contestant: str, count: int) -> tuple[float, float]:
    names = [f"burst-{i}" for i in range(count)]
    bench.docker.create_network("burst", bench.drivers[contestant])
    bench.at_once([partial(Timed.create_container, name=name, network="burst") for name in names], 4)
    started = bench.at_once([partial(Timed.start, container=name) for name in names])
    removed = bench.at_once([partial(Timed.remove, container=name) for name in names])
    bench.docker.remove_network("burst")
    return started, removed


# ----------------------------------------------------------------------------------------------------------- scale

ONE_MORE = ("network create", "start -p", "kill+rm -p", "network rm", "start, no network", "kill+rm, no network")
PROBE_SUBNET = 16383  # the last of 10.64.0.0/10


def subnet(index: int) -> str:
    """A /24 of 10.64.0.0/10: the engine's own pools have but 31 networks."""
    return f"10.{64 + index // 256}.{index % 256}.0/24"


def scale(bench: Bench) -> None:
    """One of the two containers of each network publishes a port."""
    most = bench.options.networks
    sizes = sorted({1, max(1, most // 4), max(1, most // 2), most})
    for name in ONE_MORE:
        for size in sizes:
            bench.report.row("scale", name, at=size, paired=False)
    for contestant, driver in bench.drivers.items():
        bench.say(f"scale, {contestant}: nothing else is there")
        bench.docker.remove_all()
        fill, exist = 0.0, 0
        for size in sizes:
            bench.say(f"scale, {contestant}: from {exist} to {size} networks of {most}")
            fill += bench.at_once([Filling(i, driver) for i in range(exist, size)], 4)
            exist = size
            time.sleep(SETTLE)
            bench.say(f"scale, {contestant}: measuring with {size} networks of {most}")
            for _ in range(SAMPLES):
                for name, value in one_more(bench.docker, driver).items():
                    bench.report.row("scale", name, at=size).add(contestant, value)
        bench.say(f"scale, {contestant}: removing {most} networks")
        remove = bench.at_once([Emptying(i) for i in range(most)], 4)
        for name, value in (("fill, 4 callers", fill), ("empty, 4 callers", remove)):
            bench.report.row("scale", name, unit="s", at=most, paired=False).add(contestant, value / 1e3)
    for name in ONE_MORE if len(sizes) > 1 else ():
        first, last = (bench.report.row("scale", name, at=size) for size in (sizes[0], sizes[-1]))
        growth = {
            contestant: f"{contestant} x{(last.median(contestant) or 0) / (first.median(contestant) or 1):.2f}"
            for contestant in bench.drivers
        }
        bench.report.notes.append(f"scale: {name} at {sizes[-1]} beside at {sizes[0]}: {', '.join(growth.values())}")


@dataclass
class Filling:
    index: int
    driver: str

    def __call__(self, docker: Timed) -> None:
        network = f"scale-{self.index}"
        docker.create_network(network, self.driver, subnet(self.index))
        docker.create_container(f"{network}-a", network)
        docker.create_container(f"{network}-b", network, {80: 20000 + self.index})
        docker.start(f"{network}-a")
        docker.start(f"{network}-b")


@dataclass
class Emptying:
    index: int

    def __call__(self, docker: Timed) -> None:
        network = f"scale-{self.index}"
        docker.remove(f"{network}-a")
        docker.remove(f"{network}-b")
        docker.remove_network(network)


def one_more(docker: Timed, driver: str) -> dict[str, float]:
    times = {"network create": docker.create_network("probe", driver, subnet(PROBE_SUBNET))}
    docker.create_container("probe", "probe", {80: PORT})
    times["start -p"] = docker.start("probe")
    times["kill+rm -p"] = docker.remove("probe")
    times["network rm"] = docker.remove_network("probe")
    time.sleep(SETTLE)
    docker.create_container("alone", "none")  # here only the engine itself grows
    times["start, no network"] = docker.start("alone")
    times["kill+rm, no network"] = docker.remove("alone")
    return times


# ------------------------------------------------------------------------------------------------------------ data

OUTSIDE = "/run/netns/outside"


def data(bench: Bench) -> None:
    """The network and its containers are made for each turn, so that one driver's rules are not in the other's way."""
    paths = ("container-container", "container-outside", "outside-container -p")
    for path in paths:
        bench.report.row("data", path, unit="Gbit/s", more_is_better=True)
    for path in paths:
        bench.report.row("data", f"{path} round trip", unit="µs")
    engine, seconds = bench.engine, bench.options.seconds
    with serving(engine, OUTSIDE):
        for contestant in bench.turns(bench.options.data_rounds, "data"):
            docker = bench.docker
            docker.create_network("data", bench.drivers[contestant])
            docker.create_container("server", "data", {IPERF: IPERF, PONG: PONG})
            docker.create_container("client", "data")
            docker.start("server")
            docker.start("client")
            client = bench.inside("client")
            ends = ((client, bench.address("server", "data")), (client, OUTSIDE_ADDRESS), (OUTSIDE, ENGINE_ADDRESS))
            with serving(engine, bench.inside("server")):
                for path, (namespace, address) in zip(paths, ends, strict=True):
                    if namespace == OUTSIDE and not bench.publishes[contestant]:
                        continue
                    trip = round_trip(engine, namespace, address, seconds / 2)
                    bench.report.row("data", f"{path} round trip").add(contestant, trip)
                    bench.report.row("data", path).add(contestant, throughput(engine, namespace, address, seconds))
            docker.remove("server")
            docker.remove("client")
            docker.remove_network("data")


def check_publishing(bench: Bench, contestant: str) -> bool:
    """Whether a published port is reached from outside. A note says where it is not."""
    bench.docker.create_network("check", bench.drivers[contestant])
    bench.docker.create_container("check", "check", {80: PORT}, ["httpd", "-f", "-p", "80"])
    bench.docker.start("check")
    try:
        attempt = ["timeout", "1", "bash", "-c", f"exec 3<>/dev/tcp/{ENGINE_ADDRESS}/{PORT}"]
        wait_until(lambda: bench.engine.run_outside(attempt).returncode == 0, 2, every=0.1)
    except TimeoutError:
        bench.report.notes.append(f"{contestant} does not publish ports: its figures with -p are those without")
        return False
    else:
        return True
    finally:
        bench.docker.remove("check")
        bench.docker.remove_network("check")


SECTIONS: Mapping[str, Callable[[Bench], None]] = {
    "operations": operations,
    "burst": burst,
    "scale": scale,
    "data": data,
}


def measure(version: str, sections: Sequence[str], options: argparse.Namespace) -> tuple[Report, bool]:
    """The measurements, and whether they are complete."""

    def say(text: str) -> None:
        print(f"\r\x1b[K{f'Engine {version}: {text}' if text else ''}", end="", file=sys.stderr, flush=True)

    complete = True
    say("starting")
    drivers = {"bridge": "bridge", PLUGIN: PLUGIN}
    if options.control:
        drivers = {"bridge": "bridge", "control": "bridge"}
    with (
        PrivateEngine(version) as engine,
        engine.start_plugin(PLUGIN, [sys.executable, "-m", PLUGIN]),
        contextlib.closing(Timed(engine)) as docker,
    ):
        said = docker.call("GET", "/version")["Version"]
        machine = f"Linux {platform.release()}, {len(PROCESSORS)} processors, Python {platform.python_version()}"
        report = Report(version, said, machine, list(drivers))
        bench = Bench(engine, docker, drivers, report, options, say)
        bench.publishes = {contestant: check_publishing(bench, contestant) for contestant in drivers}
        for section in sections:
            try:
                SECTIONS[section](bench)
            except (EngineError, DriverError) as error:
                complete = False
                report.notes.append(f"{section} ended early: {error}")
                docker.remove_all()
        say("removing it")
    say("")
    return report, complete


# --------------------------------------------------------------------------------------------------------- output


def print_report(report: Report) -> None:
    print(f"\nDocker Engine {report.version}, {report.machine}; times are of the engine's API")
    for section in SECTIONS:
        print_section(report, section, {"burst": "containers", "scale": "networks"}.get(section, ""))
    for note in report.notes:
        print(f"\n{note}" if note is report.notes[0] else note)


def draw(reports: Sequence[Report]) -> str:
    """All engines below each other."""
    drawing = Drawing(reports[0].contestants)
    for report in reports:
        first, second = report.contestants
        drawing.title(f"{second} beside {first}, Docker Engine {report.version}", report.machine)

        def group(row: Row, label: str, per: int = 1, report: Report = report) -> Group:
            compared = row.compare(*report.contestants)
            ratio = compared.paired if compared.paired is not None else compared.ratio
            values = [None if (value := row.median(name)) is None else value / per for name in report.contestants]
            return Group(label, values, "" if ratio is None else f"x{ratio:.2f}", compared.verdict)

        if rows := report.of("operations"):
            title = "Operations: API time in ms, median; less is better"
            drawing.bars(Box(20, 960, 230), title, [group(row, row.name) for row in rows])
            drawing.extend(240)
        if rows := report.of("burst"):
            groups = [group(row, f"{row.name.replace(' at once', '')}\n{row.at} at once", row.at or 1) for row in rows]
            drawing.bars(Box(20, 960, 200), "Bursts: ms per container; less is better", groups)
            drawing.extend(222)
        if rows := [row for row in report.of("scale") if row.unit == "ms"]:
            names = list(dict.fromkeys(row.name for row in rows))
            width = 960 / len(names)
            for i, name in enumerate(names):
                groups = [group(row, str(row.at)) for row in rows if row.name == name]
                drawing.lines(Box(20 + i * width, width - 10, 200), f"{name}: ms, by networks", groups)
            drawing.extend(208)
        if rows := report.of("data"):
            for i, (unit, title) in enumerate((("Gbit/s", "Throughput: Gbit/s, more is better"), ("µs", ROUND_TRIP))):
                groups = [
                    group(row, row.name.replace(" round trip", "").replace(" -p", ", -p"))
                    for row in rows
                    if row.unit == unit
                ]
                drawing.bars(Box(20 + i * 485, 475, 210), title, groups)
            drawing.extend(216)
        drawing.notes(report.notes)
    drawing.notes(["Above the bars: median of the rounds' ratios, coloured where its 95 % interval leaves out 1."])
    return str(drawing)


ROUND_TRIP = "TCP round trip: µs, median; less is better"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} (all)")
    parser.add_argument(
        "--engine", action="append", choices=list(VERSIONS), help="version of Docker Engine; may be repeated (26.1)"
    )
    parser.add_argument("--rounds", type=int, default=30, help="of operations and of bursts of one container (30)")
    parser.add_argument("--data-rounds", type=int, default=6, help="of data (6)")
    parser.add_argument("--seconds", type=int, default=2, help="of a throughput; a round trip has half of it (2)")
    parser.add_argument("--networks", type=int, default=200, help="at most, of scale (200)")
    parser.add_argument("--control", action="store_true", help="the bridge against itself: what noise looks like")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw it")
    parser.add_argument(
        "--from", dest="files", action="append", type=Path, default=[], metavar="FILE", help="show this --json instead"
    )
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if min(options.rounds, options.data_rounds, options.networks) < 1 or options.networks > PROBE_SUBNET:
        parser.error(f"at least one round, and 1 to {PROBE_SUBNET} networks")
    sections = [name for name in SECTIONS if name in options.sections or not options.sections]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # cleans up, as Ctrl-C does

    reports = [Report.from_json(content) for file in options.files for content in json.loads(file.read_text())]
    complete = True
    try:
        versions = [] if options.files else options.engine or ["26.1"]
        for version in versions:
            require(version)  # before minutes go into another
        for version in versions:
            report, whole = measure(version, sections, options)
            complete &= whole
            reports.append(report)
            print_report(report)
            write(options, reports)
        if options.files:
            for report in reports:
                print_report(report)
            write(options, reports)
    except (EngineUnavailable, EngineError, DriverError) as error:
        print(f"\r\x1b[K{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\r\x1b[Kinterrupted; the engine is gone", file=sys.stderr)
        return 130
    return 0 if complete else 1


def write(options: argparse.Namespace, reports: Sequence[Report]) -> None:
    """After each engine, so that the figures are not lost with the next."""
    if options.json:
        options.json.write_text(json.dumps([report.to_json() for report in reports], indent=1, ensure_ascii=False))
    if options.svg:
        options.svg.write_text(draw(reports))


if __name__ == "__main__":
    sys.exit(main())
