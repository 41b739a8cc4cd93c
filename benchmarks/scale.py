"""Measure the cost of head-end replication as a swarm grows: a model of all nodes, and one real node.

    python benchmarks/scale.py [--nodes 3 10 30 100 300 1000] [--networks 100] [--endpoints 20] [--model] [--json FILE]

The model places the endpoints at random, with a seed. From that it derives the entries of each node, the calls of all
engines to their plugins, the copies of each broadcast, and the time of the gossip. One of the nodes is real, in network
namespaces that end with the program. The controller makes its networks and containers with the overlay example, which
is a process of its own with its state on disk. 1 000 nodes are 999 calls of DiscoverNew, and the program counts entries
and copies in the kernel. It measures that node twice: with the networks that the model places there, and with all of
them. The other nodes are addresses behind a gateway that does not exist: nothing leaves this machine.

The real part needs root, and takes about eight minutes; --model leaves it out. docs/scaling.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from statistics import mean, median
from typing import Any

from _chart import Box, Drawing, Group

from netplugin_sdk.cnm import Network, NetworkController, RemotePlugin, Subnet
from netplugin_sdk.cnm.remote import Address
from netplugin_sdk.linux import links, namespaces
from netplugin_sdk.linux.announce import frame
from netplugin_sdk.testing.engine import listens, wait_until
from netplugin_sdk.values import MacAddress

# memberlist's DefaultLANConfig, which moby's networkdb uses (daemon/libnetwork/networkdb/cluster.go).
GOSSIP_INTERVAL, GOSSIP_NODES, RETRANSMIT = 0.2, 3, 4
# Bytes of the copy of an ARP request: the request, the headers around it, and check sum, preamble and gap on the wire.
ON_THE_WIRE = 42 + 50 + 24

THIS, GATEWAY, GATEWAY_MAC = "192.0.2.1", "192.0.2.254", "02:00:00:00:00:fe"
NAME = "overlay-plugin"  # no name that the controller or a package has a driver of in process
FIRST_PEER = int(IPv4Address("10.0.0.1"))
FIRST_SUBNET = int(IPv4Address("198.18.0.0"))  # 198.18.0.0/15 is for benchmarks: 512 networks of 256 addresses
MOST_NETWORKS = 512
RTMGRP_NEIGH, RTM_DELNEIGH = 4, 29  # linux/rtnetlink.h
FLOOD = "00:00:00:00:00:00"
BROADCASTS = 200
# As engines do in containers of networks without IPv6. Else the container's own neighbour discovery is counted.
NO_IPV6 = "echo 1 | tee /proc/sys/net/ipv6/conf/*/disable_ipv6 >/dev/null"
SERVE = """
import sys
from netplugin_overlay.driver import OverlayDriver
from netplugin_sdk import Timings, serve
at_once = Timings(node_lost=0.0)  # a node that the gossip loses leaves at once, not after two minutes
where = {"socket_path": sys.argv[1], "state": sys.argv[2]}
serve(OverlayDriver(), name="plugin", **where, docker=None, log_level="WARNING", timings=at_once)
"""


@dataclass(frozen=True)
class Size:
    """Of a swarm."""

    nodes: int
    networks: int
    endpoints: int
    """In all."""
    spread: int = 0
    """How many nodes the endpoints of a network may be on; 0 is all."""


class Cluster:
    """Where the endpoints are: each in a network and on a node by chance. The same seed gives the same."""

    def __init__(self, size: Size, seed: int) -> None:
        chance = random.Random(seed)
        self.size = size
        self.of_node: list[Counter[int]] = [Counter() for _ in range(size.nodes)]
        """By node: network → endpoints there."""
        self.nodes_of: list[set[int]] = [set() for _ in range(size.networks)]
        """By network: the nodes that run it."""
        self.endpoints_of = Counter[int]()
        every = range(size.nodes)
        spread = min(size.spread or size.nodes, size.nodes)
        allowed = [every if spread == size.nodes else chance.sample(every, spread) for _ in range(size.networks)]
        for _ in range(size.endpoints):
            network = chance.randrange(size.networks)
            node = chance.choice(allowed[network])
            self.of_node[node][network] += 1
            self.nodes_of[network].add(node)
            self.endpoints_of[network] += 1

    def typical(self) -> Counter[int]:
        """The networks and endpoints of a node that has as many networks as half of the nodes have at most."""
        return sorted(self.of_node, key=len)[len(self.of_node) // 2]

    def flood_entries(self, node: int) -> int:
        """That a node has: in each of its networks one for each other node, as the driver makes them."""
        return len(self.of_node[node]) * (self.size.nodes - 1)

    def figures(self) -> dict[str, float]:
        """The entries and packets of all nodes."""
        nodes, others = self.size.nodes, self.size.nodes - 1
        flood = [self.flood_entries(node) for node in range(nodes)]
        running = [len(networks) for networks in self.of_node]
        needed = [sum(len(self.nodes_of[network]) - 1 for network in networks) for networks in self.of_node]
        stations = [
            sum(self.endpoints_of[network] - here for network, here in networks.items()) for networks in self.of_node
        ]
        # Of the broadcasts of all endpoints, one each: the nodes that it is for.
        useful = sum(
            (len(self.nodes_of[network]) - 1) * endpoints for network, endpoints in self.endpoints_of.items()
        ) / max(self.size.endpoints, 1)
        gossip = spread_of_news(nodes, random.Random(nodes))
        return {
            "nodes_of_a_network": mean(len(there) for there in self.nodes_of if there),
            "networks_of_a_node": mean(running),
            "flood_entries": mean(flood),
            "flood_entries_most": max(flood),
            "flood_entries_needed": mean(needed),
            "stations": mean(stations),
            "copies": others,
            "copies_useful": useful,
            "calls_of_a_start": nodes * nodes,  # each is told of all, itself among them
            "calls_of_a_join": 2 * nodes - 1,  # all others of it, and it of all
            "events_of_a_join": sum(running),  # peer_joined of a driver, for each network
            "announcements_of_a_join": self.size.endpoints,  # to the node that joins, netplugin_overlay.driver
            "gossip_messages": gossip.messages,
            "gossip_seconds": gossip.seconds,
            "gossip_reached": gossip.reached,
        }


@dataclass(frozen=True)
class News:
    messages: int
    seconds: float
    reached: float
    """Share of the nodes; those left out hear of it by the exchange of everything, every 30 s."""


def spread_of_news(nodes: int, chance: random.Random) -> News:
    """Gossip about one joining node: each node that knows it tells three others per round, and a limited number in all.

    No message is lost, and all have the same clock. It is memberlist's way, without its pings.
    """
    limit = RETRANSMIT * math.ceil(math.log10(nodes + 1))  # times that each tells it
    left = {0: limit}  # by node that knows
    rounds = messages = heard_last = 0
    while len(left) < nodes and any(left.values()):
        rounds += 1
        for node in [node for node, times in left.items() if times]:
            for _ in range(min(GOSSIP_NODES, left[node], nodes - 1)):
                left[node] -= 1
                messages += 1
                other = (node + chance.randrange(1, nodes)) % nodes
                if other not in left:
                    left[other] = limit
                    heard_last = rounds
    messages += sum(left.values())
    return News(messages, heard_last * GOSSIP_INTERVAL, len(left) / nodes)


# -------------------------------------------------------------------------------------------------- one real node


class RealNode:
    """The overlay example in a process of its own, the controller as its engine, and an uplink that counts."""

    def __init__(self, folder: Path, endpoints: Sequence[int]) -> None:
        """`endpoints`: one number for each network that the node has."""
        self._socket, self._state = folder / "overlay.sock", folder / "state"
        self._made = ExitStack()
        self.peers = 0
        try:
            _uplink()
            self._start()
            self._remote = self._made.enter_context(RemotePlugin(Address(NAME, f"unix://{self._socket}")))
            self._discover("New", THIS, this=True)
            controller = self._made.enter_context(NetworkController(find=lambda _: self._remote))
            self.networks = [_network(controller, number) for number in range(len(endpoints))]
            for network, count in zip(self.networks, endpoints, strict=True):
                for number in range(count):
                    box = controller.create_sandbox(f"{network.name}-{number}")
                    box.run("sh", "-c", NO_IPV6)
                    box.connect(network)
        except BaseException:
            self.close()
            raise
        self.vxlans = [f"vx-{network.id[:12]}" for network in self.networks]
        self.endpoints = sum(endpoints)

    def close(self) -> None:
        with ExitStack() as ending:
            ending.callback(self._stop)
            self._made.close()

    def _start(self) -> float:
        """Seconds until it answers."""
        began = time.perf_counter()
        argv = [sys.executable, "-c", SERVE, str(self._socket), str(self._state)]
        self._process = subprocess.Popen(argv)
        wait_until(lambda: listens(self._socket), 600)
        return time.perf_counter() - began

    def _stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)

    def restart(self, *, kernel_is_empty: bool) -> float:
        """Seconds until the plugin answers again. After a reboot the kernel has none of its VXLANs."""
        self._stop()
        self._remote.close()
        if kernel_is_empty:
            for name in self.vxlans:
                links.delete(name)
        return self._start()

    def _discover(self, what: str, address: str, *, this: bool = False) -> None:
        data = {"Address": address, "BindAddress": address if this else "", "Self": this}
        self._remote.call(f"NetworkDriver.Discover{what}", {"DiscoveryType": 1, "DiscoveryData": data})

    def grow(self, nodes: int) -> list[float]:
        """Have the swarm this many nodes. Seconds that each call took."""
        took = []
        while self.peers + 1 < nodes:
            began = time.perf_counter()
            self._discover("New", _peer(self.peers))
            took.append(time.perf_counter() - began)
            self.peers += 1
        return took

    def lose_one(self) -> float:
        """Seconds until the kernel has said of each VXLAN that it sends nothing to the last peer any more."""
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as news:
            news.bind((0, RTMGRP_NEIGH))
            news.settimeout(60)
            left = len(self.vxlans)
            began = time.perf_counter()
            self._discover("Delete", _peer(self.peers - 1))
            while left:
                message = news.recv(4096)  # one event each
                kind, family = struct.unpack_from("=4xH10xB", message)
                left -= (kind, family) == (RTM_DELNEIGH, socket.AF_BRIDGE)
            took = time.perf_counter() - began
        self.peers -= 1
        return took

    def entries(self) -> int:
        """All that the kernel floods to."""
        return sum(len(flooded(name)) for name in self.vxlans)

    def broadcast(self, times: int) -> tuple[float, int]:
        """Median seconds that the kernel needs for an ARP announcement in the first network, and copies of all."""
        data = frame(MacAddress.random(), ip_address("198.18.0.250"))
        before, took = sent(), list[float]()
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
            for _ in range(times):
                began = time.perf_counter()
                sender.sendto(data, (self.vxlans[0], 0))
                took.append(time.perf_counter() - began)
        return median(took), sent() - before

    def usage(self) -> tuple[float, int]:
        """Resident MB and threads of the plugin's process."""
        rows = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        status = dict(row.split(":", 1) for row in rows)
        return int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"])


def _uplink() -> None:
    """An interface with this node's address; its packets go to a gateway that does not exist, and are dropped."""
    for argv in (
        "link add up0 type veth peer name up1",
        f"address add {THIS}/24 dev up0",
        "link set up1 up",
        "link set up0 up",
        f"neighbour add {GATEWAY} lladdr {GATEWAY_MAC} dev up0 nud permanent",
        f"route add 10.0.0.0/8 via {GATEWAY}",
    ):
        subprocess.run(["ip", *argv.split()], check=True)
    for name in ("all", "default"):  # else the kernel's own neighbour discovery is counted
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")


def _network(controller: NetworkController, number: int) -> Network:
    subnet = Subnet.parse(f"{IPv4Address(FIRST_SUBNET + number * 256)}/24")
    return controller.create_network(f"net{number}", NAME, subnets=[subnet])


def _peer(number: int) -> str:
    return str(IPv4Address(FIRST_PEER + number))


def flooded(vxlan: str) -> set[str]:
    """The nodes to which it floods packets for unknown hosts."""
    done = subprocess.run(["bridge", "fdb", "show", "dev", vxlan], capture_output=True, text=True, check=True)
    return {line.split()[2] for line in done.stdout.splitlines() if line.startswith(FLOOD)}


def sent() -> int:
    """Packets that the uplink was given; one that its other end had no room for was sent, too."""
    rows = (line.split() for line in Path("/proc/thread-self/net/dev").read_text().splitlines())
    counters = next(row for row in rows if row[0] == "up0:")[1:]
    return int(counters[9]) + int(counters[11])  # of the eight of sending, those of packets and drops


def settled() -> int:
    """The same, once nothing was sent for longer than the second that is between announcements."""
    last, since = sent(), time.monotonic()
    while time.monotonic() - since < 1.5:
        time.sleep(0.1)
        if (now := sent()) != last:
            last, since = now, time.monotonic()
    return last


def kernel_megabytes() -> float:
    """Of the whole machine's kernel, so only a large difference says something."""
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(rows[name].split()[0]) for name in ("Slab", "Percpu")) / 1024


def measure(sizes: Sequence[int], endpoints: Sequence[int]) -> Iterator[dict[str, float]]:
    """A node with these endpoints, one number for each of its networks, in a swarm that grows to these sizes.

    It is in a network namespace of its own, which the process does not leave again.
    """
    namespaces.unshare()
    namespaces.up("lo")
    with tempfile.TemporaryDirectory(prefix="scale-") as folder, closing(RealNode(Path(folder), endpoints)) as node:
        memory, told = kernel_megabytes(), 0.0
        announced = 0
        for nodes in sizes:
            copies = settled()
            took = node.grow(nodes)
            told += sum(took)
            megabytes, threads = node.usage()
            announced += settled() - copies
            entries, in_kernel = node.entries(), kernel_megabytes() - memory
            each, counted = node.broadcast(BROADCASTS)
            node.grow(nodes + 1)
            copies = settled()
            left = node.lose_one()
            joined = node.grow(nodes + 1)
            settled_after = settled()
            node.lose_one()
            yield {
                "nodes": nodes,
                "networks": len(node.vxlans),
                "endpoints": node.endpoints,
                "told_seconds": told,
                "last_call_ms": median(took[-10:]) * 1000 if took else math.nan,
                "threads": threads,
                "megabytes": megabytes,
                "announcement_copies": announced,
                "entries": entries,
                "kernel_megabytes": in_kernel,
                "broadcast_us": each * 1e6,
                "copies": counted / BROADCASTS,
                "join_ms": joined[0] * 1000,
                "join_copies": settled_after - copies,
                "leave_ms": left * 1000,
                "restart_seconds": node.restart(kernel_is_empty=False),
                "rebuild_seconds": node.restart(kernel_is_empty=True),
                "megabytes_at_rest": node.usage()[0],
            }


# ---------------------------------------------------------------------------------------------------- report


def in_a_process(sizes: Sequence[int], endpoints: Sequence[int]) -> list[dict[str, float]]:
    """`measure` in a process of its own, since that stays in its namespace."""
    argv = [sys.executable, __file__, "--node", json.dumps({"sizes": sizes, "endpoints": endpoints})]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        rows = []
        for line in process.stdout:
            rows.append(row := json.loads(line))
            progress(f"  {row['nodes']} nodes: {row['entries']} entries, told in {row['told_seconds']:.1f} s")
    if process.returncode:
        raise SystemExit("the real node failed: its output is above")
    return rows


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


MODEL = {
    "nodes of a network": "nodes_of_a_network",
    "networks of a node": "networks_of_a_node",
    "flood entries": "flood_entries",
    "needed": "flood_entries_needed",
    "stations": "stations",
    "copies": "copies",
    "useful": "copies_useful",
    "calls: start": "calls_of_a_start",
    "join": "calls_of_a_join",
    "ARPs of a join": "announcements_of_a_join",
    "gossip s": "gossip_seconds",
}
REAL = {
    "entries": "entries",
    "told s": "told_seconds",
    "last call ms": "last_call_ms",
    "threads": "threads",
    "ARP copies": "announcement_copies",
    "broadcast µs": "broadcast_us",
    "copies": "copies",
    "join ms": "join_ms",
    "ARPs of a join": "join_copies",
    "leave ms": "leave_ms",
    "restart s": "restart_seconds",
    "after reboot s": "rebuild_seconds",
    "plugin MB": "megabytes_at_rest",
    "told: MB": "megabytes",
    "kernel MB": "kernel_megabytes",
}


def table(title: str, rows: Mapping[str, Mapping[str, float]], columns: Mapping[str, str]) -> None:
    print(f"\n{title}")
    widths = [max(len(name), 9) for name in columns]
    print(" " * 22 + "  ".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True)))
    for label, row in rows.items():
        figures = (f"{number(row[key]):>{width}}" for key, width in zip(columns.values(), widths, strict=True))
        print(f"{label:<22}" + "  ".join(figures))


def number(value: float) -> str:
    if math.isnan(value):
        return "-"
    if value >= 100 or value == int(value):
        return f"{value:.0f}" if value < 1e7 else f"{value:.2g}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def draw(sizes: Sequence[int], models: Mapping[int, Mapping[str, float]], networks: int, endpoints: int) -> str:
    drawing = Drawing(["as it is", "only nodes that run the network"])
    drawing.title(
        "Head-end replication, as a swarm grows",
        f"{networks} networks, {endpoints} endpoints per node, spread by chance",
    )
    for place, (title, now, needed) in enumerate(
        (
            ("copies of one broadcast", "copies", "copies_useful"),
            ("entries that one node floods to", "flood_entries", "flood_entries_needed"),
        )
    ):
        groups = [Group(f"{size} nodes", [models[size][now], models[size][needed]]) for size in sizes]
        drawing.bars(Box(20 + place * 490, 470, 260), title, groups)
    drawing.extend(270)
    drawing.notes(["Modelled by benchmarks/scale.py; a test compares the grey bars with the kernel of a real node."])
    return str(drawing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[3, 10, 30, 100, 300, 1000], metavar="N")
    parser.add_argument("--networks", type=int, default=100, metavar="N", help="of the swarm (100)")
    parser.add_argument("--endpoints", type=int, default=20, metavar="N", help="per node, on average (20)")
    parser.add_argument("--seed", type=int, default=8, help="of the placement (8)")
    parser.add_argument("--model", action="store_true", help="no real node: no root needed, a second")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw copies and entries of the model there")
    parser.add_argument("--node", type=json.loads, help=argparse.SUPPRESS)  # of `in_a_process`
    arguments = parser.parse_args()
    if arguments.node:
        for row in measure(**arguments.node):
            print(json.dumps(row), flush=True)
        return
    sizes = sorted(set(arguments.nodes))
    if sizes[0] < 2 or not 1 <= arguments.networks <= MOST_NETWORKS or arguments.endpoints < 1:
        parser.error(f"at least 2 nodes, 1 to {MOST_NETWORKS} networks and 1 endpoint per node")
    if not arguments.model and os.geteuid() != 0:
        parser.error("the real node needs root; --model does without")

    base = Size(sizes[-1], arguments.networks, arguments.endpoints * sizes[-1])
    grown = {size: Cluster(Size(size, base.networks, arguments.endpoints * size), arguments.seed) for size in sizes}
    models = {size: cluster.figures() for size, cluster in grown.items()}
    report: dict[str, Any] = {"nodes": [asdict(grown[size].size) | models[size] for size in sizes]}
    table(
        f"model: {base.networks} networks, {arguments.endpoints} endpoints per node; means per node",
        {f"{size} nodes": figures for size, figures in models.items()},
        MODEL,
    )
    others = {
        "networks": [replace(base, networks=count) for count in (10, 100, 1000)],
        "endpoints": [replace(base, endpoints=count * base.nodes) for count in (2, 20, 200)],
        "spread": [replace(base, spread=count) for count in (3, 10, 30, 100, 300, 1000) if count <= base.nodes],
    }
    for name, varied in others.items():
        rows = {f"{getattr(size, name)} {name}": Cluster(size, arguments.seed).figures() for size in varied}
        table(f"model: {base.nodes} nodes, and other {name}", rows, MODEL)
        report[name] = [asdict(size) | row for size, row in zip(varied, rows.values(), strict=True)]

    if not arguments.model:
        share = list(grown[base.nodes].typical().values())
        spare = max(arguments.endpoints - base.networks, 0)
        everything = [1 + (number < spare) for number in range(min(base.networks, arguments.endpoints))]
        everything += [0] * (base.networks - len(everything))
        for name, endpoints in (("share", share), ("everything", everything)):
            title = f"real: a node with {len(endpoints)} networks and {sum(endpoints)} containers"
            progress(f"{title} …")
            measured = report[f"real_{name}"] = in_a_process(sizes, endpoints)
            table(title, {f"{row['nodes']} nodes": row for row in measured}, REAL)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.svg:
        arguments.svg.write_text(draw(sizes, models, base.networks, arguments.endpoints))


if __name__ == "__main__":
    main()
