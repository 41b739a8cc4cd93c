"""The model of benchmarks/scale.py against the kernel: what it counts is what a real node has and sends."""

from __future__ import annotations

import runpy
import socket
import subprocess
import sys
from collections import Counter
from contextlib import closing
from ipaddress import IPv4Address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ..patience import PATIENCE

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scale.py"
NODES = 10


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def test_entries_and_copies(netns: None, tmp_path: Path, scale: Any) -> None:
    cluster = scale.Cluster(scale.Size(nodes=NODES, networks=6, endpoints=30), seed=3)
    here = cluster.of_node[0]
    first = next(iter(here))
    with closing(scale.RealNode(tmp_path, list(here.values()))) as node:
        node.grow(NODES)
        assert node.entries() == cluster.flood_entries(0) > 0
        scale.settled()
        # What the uplink carries, as its other end hears it.
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003)) as ear:
            ear.bind(("up1", 0))
            ear.settimeout(PATIENCE)
            _, copies = node.broadcast(1)
            heard = [ear.recv(2048) for _ in range(copies)]
            ear.settimeout(0.5)
            with pytest.raises(TimeoutError):
                ear.recv(2048)
    assert copies == cluster.figures()["copies"] == NODES - 1
    assert len({packet[46:49] for packet in heard}) == 1, "one VXLAN network identifier"
    reached = Counter(int(IPv4Address(packet[30:34])) - scale.FIRST_PEER + 1 for packet in heard)
    assert reached == dict.fromkeys(range(1, NODES), 1)
    useful = [node for node in reached if node in cluster.nodes_of[first]]
    assert len(useful) == len(cluster.nodes_of[first]) - 1 < copies, "the others have no use for it"


def test_a_node_that_leaves_is_flooded_to_no_more(netns: None, tmp_path: Path, scale: Any) -> None:
    with closing(scale.RealNode(tmp_path, [1, 0])) as node:
        node.grow(5)
        assert node.entries() == 2 * 4
        node.lose_one()
        assert node.entries() == 2 * 3
        node.restart(kernel_is_empty=True)
        assert node.entries() == 2 * 3


def test_the_placement_adds_up(scale: Any) -> None:
    size = scale.Size(nodes=50, networks=20, endpoints=500, spread=7)
    cluster, again = scale.Cluster(size, 1), scale.Cluster(size, 1)
    assert cluster.figures() == again.figures()
    assert sum(node.total() for node in cluster.of_node) == cluster.endpoints_of.total() == 500
    assert max(len(nodes) for nodes in cluster.nodes_of) <= 7
    # From both sides: each node of a network has an entry for each other one.
    needed = sum(len(nodes) * (len(nodes) - 1) for nodes in cluster.nodes_of)
    assert cluster.figures()["flood_entries_needed"] == pytest.approx(needed / 50)


def test_gossip_reaches_all(scale: Any) -> None:
    seconds = []
    for nodes in (2, 10, 100, 1000):
        news = scale.spread_of_news(nodes, scale.random.Random(1))
        assert news.reached == 1.0
        assert news.messages <= nodes * 4 * len(str(nodes))
        seconds.append(news.seconds)
    assert seconds == sorted(seconds)
    assert seconds[-1] < 5


def test_its_command_line() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)

    done = run("--model", "--nodes", "3", "10", "--networks", "5", "--endpoints", "4")
    assert (done.returncode, done.stderr) == (0, "")
    assert "10 nodes" in done.stdout
    refused = run("--nodes", "1")
    assert refused.returncode == 2
    assert "at least 2 nodes" in refused.stderr
