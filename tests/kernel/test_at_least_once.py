"""At least once, with myplugin: links, rules and ports are after each repetition what they are without it."""

from __future__ import annotations

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from myplugin.driver import BridgeDriver

from netplugin_sdk import NetworkDriver
from netplugin_sdk.linux import firewall, links, ports

from ..unit.serving import nothing_left, wait_for
from ..volume import volume
from ..wire.test_at_least_once import ASKING, DELIVERIES, Delivery, Stage, directly
from ..wire.test_replay import REQUESTS, RESTARTS, lines
from .lab import run

BACKENDS = ("iptables-nft", "nftables")
REPEATED = ("two at once", "the answer is lost", "the answer is lost, and the plugin starts again")
TRIED = volume(1, len(REPEATED))
"""Of these, with each recording. tests/wire has all of all, without a kernel."""
COUNTERS = re.compile(r"packets \d+ bytes \d+|\[\d+:\d+\]|^#.*$", re.MULTILINE)


class Bridges(Stage):
    def drivers(self) -> tuple[NetworkDriver[Any], ...]:
        return (BridgeDriver(),)

    def close(self) -> None:
        """As its process ends: rules and links stay."""
        super().close()
        ports.close()
        firewall.close()
        links.close()


class Seen(NamedTuple):
    links: dict[str, Any]
    rules: list[str]
    sockets: list[str]


class Step(NamedTuple):
    method: str
    answers: list[tuple[int, Any]]
    rows: list[tuple[Any, ...]]
    kernel: Seen


def kernel(backend: str) -> Seen:
    """What is in the kernel, but for MAC addresses: random, or the engine gives them."""
    found = {}
    for link in json.loads(run("ip", "-json", "-details", "address")):
        found[link["ifname"]] = {
            "kind": link.get("linkinfo", {}).get("info_kind"),
            **{name: link.get(name) for name in ("mtu", "master", "group")},
            "up": "UP" in link["flags"],
            "addresses": sorted(
                f"{address['local']}/{address['prefixlen']}"
                for address in link["addr_info"]
                if address["scope"] != "link"
            ),
        }
    saves = [("nft", "list", "ruleset")] if backend == "nftables" else [("iptables-save",), ("ip6tables-save",)]
    rules = [line for save in saves for line in COUNTERS.sub("", run(*save)).splitlines()]
    sockets = sorted(" ".join(line.split()[:5:4]) for line in run("ss", "-Hlntu").splitlines())
    return Seen(found, rules, sockets)


def played(recording: str, folder: Path, deliver: Delivery, backend: str) -> list[Step]:
    folder.mkdir()
    stage, seen = Bridges(folder), kernel(backend)
    steps: list[Step] = []

    def settled() -> bool:
        """Whether what is done after the answers is done."""
        rows = stage.rows()
        return not any(str(value).startswith("Delete") for row in rows for value in row)

    for line in lines(recording):
        if line.get("mark") in RESTARTS:
            stage.restart()
        if not line.get("method", "").startswith("NetworkDriver"):
            continue
        method, request = line["method"], copy.deepcopy(line["request"])
        if method == "NetworkDriver.CreateNetwork":
            request["Options"]["com.docker.network.generic"].pop("my.opt", None)  # which this driver does not have
        if method == "NetworkDriver.CreateEndpoint" and not request["Interface"]["Address"]:
            request["Interface"]["MacAddress"] = "02:00:00:00:00:07"  # else it is a random one
        body = b"" if line["raw_empty"] else json.dumps(request).encode()
        replies = (directly if method in ASKING else deliver)(stage, method, body)
        if method not in ASKING:
            wait_for(settled, "what is left to do")
            firewall.wait_until_applied()
            seen = kernel(backend)
        answers = [(reply.status, json.loads(reply.body)) for reply in replies]
        steps.append(Step(method, answers, stage.rows(), seen))
    stage.close()
    return steps


@pytest.mark.parametrize(
    ("recording", "backend", "first"),
    list(zip(REQUESTS, itertools.cycle(BACKENDS), itertools.cycle(range(3)), strict=False)),
    indirect=["backend"],
)
def test_a_conversation_that_is_repeated(recording: str, backend: str, first: int, tmp_path: Path) -> None:
    with nothing_left():
        plain = played(recording, tmp_path / "plain", directly, backend)
        before, after = kernel(backend), plain[-1].kernel
        assert before == after
        assert len({str(step.kernel) for step in plain}) > 15  # else it would say nothing that they are the same
        for number in range(first, first + TRIED):
            delivery = REPEATED[number % len(REPEATED)]
            repeated = played(recording, tmp_path / f"{number}", DELIVERIES[delivery][1], backend)
            assert len(repeated) == len(plain)
            for one, other in zip(plain, repeated, strict=True):
                assert (delivery, other.answers) == (delivery, one.answers * len(other.answers))
                assert (delivery, other.rows, other.kernel) == (delivery, one.rows, one.kernel)
