"""What stands in the kernel, who else may touch it, and what is done then. See test_firewall_packets for packets."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from netplugin_sdk.errors import InvalidRequest, Unavailable
from netplugin_sdk.linux import firewall, iptables
from netplugin_sdk.linux.firewall import FirewallError, Mode, Policy
from netplugin_sdk.linux.iptables import Backend, parse
from netplugin_sdk.linux.ports import Published
from netplugin_sdk.linux.programs import run as run_program
from netplugin_sdk.values import TransportProtocol

from ..patience import PATIENCE
from ..unit.serving import wait_for
from ..unit.test_rules import GOLDEN, POLICIES, Host
from .lab import SYSCTLS, run

SUBNETS = (ip_network("10.1.0.0/24"), ip_network("fd00:1::/64"))
COMMANDS = ("iptables", "ip6tables")

iptables_only = pytest.mark.parametrize("backend", ["iptables-nft", "iptables-legacy"], indirect=True)
announced_only = pytest.mark.parametrize("backend", ["iptables-nft", "nftables"], indirect=True)
nft_iptables_only = pytest.mark.parametrize("backend", ["iptables-nft"], indirect=True)


def port(host_port: int, address: str = "10.1.0.2", number: int = 80) -> Published:
    inside = ip_address(address)
    anywhere = ip_address("0.0.0.0" if inside.version == 4 else "::")
    return Published(
        protocol=TransportProtocol.TCP, host_address=anywhere, host_port=host_port, address=inside, port=number
    )


def policy(bridge: str = "br-1", **fields: Any) -> Policy:
    return Policy(**({"bridge": bridge, "subnets": SUBNETS} | fields))


FULL = policy(published={"web": (port(8080), port(8080, "fd00:1::2"))})
REFUSED = policy("br-bad", published={"web": (port(70000),)})
"""There is no such port, so each program refuses the rule."""


def rules(backend: str) -> str:
    """All rules, without the counters and the times."""
    if backend == "nftables":
        return run("nft", "list", "ruleset")
    saved = "".join(run(f"{command}-save") for command in COMMANDS)
    return "\n".join(line.split(" [")[0] for line in saved.splitlines() if not line.startswith("#"))


def same(backend: str, before: str) -> bool:
    """Whether there are the same rules; those that were put back stand behind those that were not."""
    return sorted(rules(backend).splitlines()) == sorted(before.splitlines())


def until(condition: Callable[[], bool]) -> None:
    wait_for(condition, "it to become so")


@pytest.fixture
def looks() -> Callable[[], int]:
    """How many there were at what others have changed."""
    before = firewall.keeper.comparisons
    return lambda: firewall.keeper.comparisons - before


@pytest.fixture
def lively(monkeypatch: pytest.MonkeyPatch, looks: Callable[[], int]) -> Callable[[], None]:
    """It looks soon, also where nobody tells of changes. Waits until what has changed before has been looked at."""
    monkeypatch.setattr(firewall.keeper, "quiet", 0.02)
    monkeypatch.setattr(firewall.keeper, "poll", 0.1)

    def settle() -> None:
        before = looks()
        run("nft", "add table ip telling; delete table ip telling")  # of this it is told last
        until(lambda: looks() > before)
        firewall.wait_until_applied()

    return settle


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The programs that have run, such as ``iptables-save``; with nft also what it was for."""
    ran: list[str] = []
    popen = subprocess.Popen

    class Spy(popen):  # type: ignore[misc, valid-type]
        def __init__(self, argv: Any, *args: Any, **kwargs: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                ran.append(" ".join(argv[:2]) if argv[0] == "nft" else argv[0])
            super().__init__(argv, *args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", Spy)
    return ran


LOOKS = {"iptables --version", "iptables", "iptables-save", "ip6tables-save", "nft list"}


def docker_starts(*, old: bool = False) -> None:
    """What Docker does with its user's chain when it starts; 20.10 (`old`) ends the chain with a RETURN."""
    for command in COMMANDS:
        subprocess.run([command, "-N", "DOCKER-USER"], capture_output=True, check=False)
        subprocess.run([command, "-D", "FORWARD", "-j", "DOCKER-USER"], capture_output=True, check=False)
        run(command, "-I", "FORWARD", "-j", "DOCKER-USER")
        if old:
            run(command, "-A", "DOCKER-USER", "-j", "RETURN")


# ---------------------------------------------------------------------------------------------------- what stands there


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        *(("iptables-nft", name) for name in POLICIES),
        *(("nftables", name) for name in POLICIES),
        *(
            ("iptables-legacy", name)
            for name in ("nat-unprotected", "nat4-routed6", "trusted", "two-endpoints", "group")
        ),
    ],
    indirect=["backend"],
)
def test_the_programs_print_what_the_golden_files_show(backend: str, name: str, programs: list[str]) -> None:
    """So the second time reads and changes nothing; if a program printed it otherwise, each look would replace it."""
    golden = (GOLDEN / f"{name}.txt").read_text()
    parts = dict(re.findall(r"^# (iptables|ip6tables|nft)\n\n(.*?\n)\n?(?=^# |\Z)", golden, re.MULTILINE | re.DOTALL))
    firewall.ensure(POLICIES[name])
    if backend == "nftables":
        assert run("nft", "list", "table", "inet", f"netplugin-{POLICIES[name].bridge}") == parts["nft"]
    for command in COMMANDS if backend != "nftables" else ():
        if command in parts:
            chains = parse(run(f"{command}-save"))
            chains["nat", "POSTROUTING"].remove("-o lo -j RETURN")  # the fixture's
            assert str(Host.with_chains(chains)) == parts[command]

    before = rules(backend)
    firewall.close()  # all is forgotten
    programs.clear()
    firewall.ensure(POLICIES[name])
    assert set(programs) <= LOOKS
    assert "nft list" in programs or "iptables-save" in programs
    assert rules(backend) == before


FORWARDING = {4: ("ipv4/ip_forward",), 6: ("ipv6/conf/default/forwarding", "ipv6/conf/all/forwarding")}


@pytest.mark.parametrize("version", FORWARDING)
@pytest.mark.usefixtures("iptables")
def test_who_forwards_only_now_forwards_nothing_else(version: int, caplog: pytest.LogCaptureFixture) -> None:
    def state() -> dict[str, list[str]]:
        policies = {command: run(command, "-S", "FORWARD").split()[:3][-1] for command in COMMANDS}
        return {
            command: [policies[command], *((SYSCTLS / name).read_text().strip() for name in names)]
            for command, names in zip(COMMANDS, FORWARDING.values(), strict=True)
        }

    for command in COMMANDS:
        run(command, "-P", "FORWARD", "ACCEPT")
    firewall.ensure_forwarding(version)
    assert state() == {"iptables": ["ACCEPT", "1"], "ip6tables": ["ACCEPT", "1", "1"]}, "so it was, and it stays"
    assert not caplog.records
    for names in FORWARDING.values():
        for name in names:
            (SYSCTLS / name).write_text("0")
    firewall.ensure_forwarding(version)
    changed = {4: {"iptables": ["DROP", "1"]}, 6: {"ip6tables": ["DROP", "1", "1"]}}[version]
    assert state() == {"iptables": ["ACCEPT", "0"], "ip6tables": ["ACCEPT", "0", "0"]} | changed
    assert len(caplog.records) == len(FORWARDING[version])


@pytest.mark.parametrize("backend", ["nftables"], indirect=True)
def test_where_docker_uses_nftables_forwarding_is_the_administrators(backend: str) -> None:
    firewall.ensure_forwarding(4)
    (SYSCTLS / "ipv4/ip_forward").write_text("0")
    with pytest.raises(FirewallError, match="with nftables the administrator must turn forwarding on"):
        firewall.ensure_forwarding(4)
    assert (SYSCTLS / "ipv4/ip_forward").read_text() == "0\n"


def test_twice_is_once(backend: str) -> None:
    for number in (1, 2):
        firewall.ensure(replace(FULL, bridge=f"br-{number}"))
    once = rules(backend)
    for number in (1, 2):
        firewall.ensure(replace(FULL, bridge=f"br-{number}"))
    firewall.wait_until_applied()
    assert rules(backend) == once


@pytest.mark.parametrize(
    ("backend", "close"),
    [("iptables-nft", False), ("iptables-legacy", True), ("nftables", True)],
    indirect=["backend"],
)
def test_again_with_other_wishes_leaves_nothing_of_the_old(backend: str, close: bool) -> None:
    """Also those of a process that was before us."""
    wishes = [
        policy(internal=True),
        FULL,
        replace(FULL, published={"other": (port(8081), port(8082, "10.1.0.3"))}),
        replace(FULL, mode4=Mode.ROUTED, mode6=Mode.UNPROTECTED),
        replace(FULL, icc=False, masquerade=False),
        replace(FULL, subnets=SUBNETS[:1]),
        replace(FULL, subnets=SUBNETS[1:]),
        replace(FULL, network="0123456789ab", trusted=("eth0",), sources=(ip_address("192.0.2.9"),)),
    ]
    texts = []
    for wish in wishes:
        firewall.ensure(wish)
        firewall.wait_until_applied()
        texts.append(sorted(rules(backend).splitlines()))
        firewall.delete("br-1")
    assert len(set(map(tuple, texts))) == len(wishes)
    for wish, text in [*zip(wishes, texts, strict=True), *zip(wishes[::-1], texts[::-1], strict=True)]:
        firewall.ensure(wish)
        firewall.wait_until_applied()
        assert sorted(rules(backend).splitlines()) == text
        if close:
            firewall.close()


def test_only_the_families_of_the_subnets_are_touched(backend: str) -> None:
    if backend == "nftables":
        firewall.ensure(policy(subnets=SUBNETS[:1]))
        assert "ipv6" not in rules(backend)
        return
    before = run("ip6tables-save").count("\n")
    firewall.ensure(policy(subnets=SUBNETS[:1]))
    assert run("ip6tables-save").count("\n") == before
    assert "br-1" in run("iptables-save")


@pytest.mark.parametrize("engine", [None, "new", "old"])
@iptables_only
def test_delete_leaves_everything_as_it_was(backend: str, engine: str | None) -> None:
    if engine:
        docker_starts(old=engine == "old")
        comment = ("-m", "comment", "--comment", "it's mine")
        run("iptables", "-I", "DOCKER-USER", "-s", "192.0.2.66", *comment, "-j", "DROP")
    before = rules(backend)
    firewall.ensure(FULL)
    firewall.ensure(policy("br-12", subnets=SUBNETS[:1], internal=True))
    firewall.ensure(FULL)
    firewall.delete("br-1")
    assert "br-12" in rules(backend)
    assert '"netplugin_sdk:br-1"' not in rules(backend)
    firewall.delete("br-12")
    assert rules(backend) == before
    firewall.delete("br-12")
    firewall.close()
    firewall.delete("br-12")
    assert rules(backend) == before


def test_delete_of_what_another_process_has_left(backend: str) -> None:
    before = rules(backend)
    firewall.ensure(FULL)
    firewall.ensure(policy("br-12"))
    firewall.close()
    firewall.delete("br-1")
    assert "br-12" in rules(backend)
    assert '"netplugin_sdk:br-1"' not in rules(backend)
    firewall.delete("br-12")
    assert rules(backend) == before


@iptables_only
def test_a_chain_that_a_user_has_filled_or_uses_stays(backend: str) -> None:
    firewall.ensure(FULL)
    run("iptables", "-A", "DOCKER-USER", "-s", "192.0.2.66", "-j", "DROP")
    run("ip6tables", "-A", "FORWARD", "-i", "uplink", "-j", "DOCKER-USER")
    firewall.delete("br-1")
    assert "NETPLUGIN" not in rules(backend)
    assert "-A DOCKER-USER -s 192.0.2.66/32 -j DROP" in rules(backend)
    assert "-A FORWARD -i uplink -j DOCKER-USER" in rules(backend)


@iptables_only
@pytest.mark.usefixtures("backend")
def test_rules_of_others_of_every_kind_are_read() -> None:
    run("iptables", "-A", "FORWARD")
    run("iptables", "-A", "FORWARD", "-m", "comment", "--comment", 'a "quoted" \\ one')
    strange = [b"iptables", b"-A", b"FORWARD", b"-m", b"comment", b"--comment", b"\xff\xfe", b"-j", b"RETURN"]
    subprocess.run(strange, check=True)
    before = run("iptables-save", "-t", "nat")
    firewall.ensure(FULL)
    firewall.delete("br-1")
    assert run("iptables-save", "-t", "nat").count("\n") == before.count("\n")


@pytest.mark.parametrize("backend", ["nftables"], indirect=True)
@pytest.mark.usefixtures("backend")
def test_tables_of_others_of_every_kind_are_read() -> None:
    run("nft", "add table inet netplug; add chain inet netplug c; add table ip netplugin-br-1")
    text = b'add rule inet netplug c accept comment "\xff"\n'
    subprocess.run(["nft", "-f", "-"], input=text, check=True)
    firewall.ensure(FULL)
    firewall.close()
    firewall.delete("br-1")
    assert set(run("nft", "list", "tables").splitlines()) >= {"table inet netplug", "table ip netplugin-br-1"}
    assert "inet netplugin-br-1" not in run("nft", "list", "tables")


# -------------------------------------------------------------------------------------------------------- beside Docker


@pytest.mark.parametrize(
    ("backend", "old"),
    [("iptables-nft", False), ("iptables-nft", True), ("iptables-legacy", True)],
    indirect=["backend"],
)
def test_an_engine_that_starts_later(backend: str, old: bool, lively: Callable[[], None]) -> None:
    firewall.ensure(FULL)
    docker_starts(old=old)
    lively()
    with_engine = rules(backend)
    firewall.close()
    firewall.ensure(FULL)
    assert rules(backend) == with_engine
    firewall.delete("br-1")
    assert "NETPLUGIN" not in rules(backend)
    assert rules(backend).count("-A FORWARD -j DOCKER-USER") == 2
    assert rules(backend).count("FORWARD") == 4


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("backend", "old"),
    [("iptables-nft", False), ("iptables-nft", True), ("iptables-legacy", True)],
    indirect=["backend"],
)
def test_our_jump_stands_behind_the_users_rules(old: bool, lively: Callable[[], None]) -> None:
    docker_starts(old=old)
    run("iptables", "-I", "DOCKER-USER", "-s", "192.0.2.66", "-j", "DROP")
    firewall.ensure(FULL)

    def chain() -> list[str]:
        listed = [line for line in run("iptables-save").splitlines() if line.startswith("-A DOCKER-USER")]
        return [line.rpartition(" ")[2] for line in listed]

    assert chain() == ["DROP", "NETPLUGIN", *(["RETURN"] if old else [])]
    run("iptables", "-A", "DOCKER-USER", "-s", "192.0.2.67", "-j", "DROP")
    if old:  # what stands behind a plain RETURN is never asked
        lively()
        assert chain() == ["DROP", "NETPLUGIN", "RETURN", "DROP"]
    else:
        until(lambda: chain() == ["DROP", "DROP", "NETPLUGIN"])


# ----------------------------------------------------------------------------------------------------- at the same time


def test_what_only_takes_away_happens_in_the_background(backend: str) -> None:
    firewall.ensure(FULL)
    with ThreadPoolExecutor(1) as thread, held_lock():
        thread.submit(firewall.ensure, policy()).result(PATIENCE)  # or it would wait until the lock is free
        if backend != "nftables":  # where there is no lock, it may be done already
            assert "8080" in rules(backend)
    firewall.wait_until_applied()
    assert "8080" not in rules(backend)


def test_close_waits_for_what_was_asked(backend: str) -> None:
    firewall.ensure(FULL)
    firewall.ensure(policy())
    firewall.close()
    assert "8080" not in rules(backend)
    assert "br-1" in rules(backend)


@contextmanager
def held_lock() -> Iterator[None]:
    """Somebody else is changing rules."""
    with Path("/proc/thread-self/ns/net").open("rb") as namespace:
        fcntl.flock(namespace, fcntl.LOCK_EX)
        yield


@iptables_only
def test_nobody_looks_between_the_look_of_another_and_its_change(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two that see the same rules change them twice, or the one removes what the other builds upon."""
    first, second = Backend(), Backend()
    order: list[str] = []
    looked, go_on = threading.Event(), threading.Event()

    def run_noted(pids: deque[int], package: str, *argv: str, stdin: str = "") -> tuple[int, str, str]:
        who = "first" if pids is first.pids else "second"
        order.append(who)
        done = run_program(pids, package, *argv, stdin=stdin)
        if who == "first" and argv[0] == "iptables-save":
            looked.set()
            assert go_on.wait(20)
        return done

    monkeypatch.setattr(iptables, "run", run_noted)
    with ThreadPoolExecutor(2) as threads:  # in the test's namespace, too
        change = threads.submit(first.apply, {"br-1": policy("br-1")})
        assert looked.wait(20)
        other = threads.submit(second.apply, {"br-2": policy("br-2")})
        until(lambda: somebody_waits() or other.done())
        go_on.set()
        assert (change.result(20), other.result(20)) == (True, True)
    assert order == sorted(order), "first's programs, then second's"
    for bridge in ("br-1", "br-2"):
        assert all(f"NETPLUGIN-{bridge}" in run(f"{command}-save") for command in COMMANDS)


def somebody_waits() -> bool:
    """For the lock of this network namespace."""
    inode = Path("/proc/thread-self/ns/net").stat().st_ino
    waiting = re.compile(rf"-> FLOCK .*:{inode} ")
    return waiting.search(Path("/proc/locks").read_text()) is not None


def test_many_threads(backend: str) -> None:
    before = rules(backend)

    def ensure(number: int) -> None:
        firewall.ensure(policy(f"br-{number}", published={"web": (port(8000 + number),)}))

    with ThreadPoolExecutor(8) as threads:
        for _ in range(2):
            list(threads.map(ensure, range(8)))
        firewall.wait_until_applied()
        found = rules(backend)
        for number in range(8):
            assert f"dport {8000 + number}" in found
            assert found.count(f"-j NETPLUGIN-br-{number}\n") == 2 or backend == "nftables"
        list(threads.map(lambda number: firewall.delete(f"br-{number}"), range(8)))
    assert rules(backend) == before


def test_many_threads_and_one_bridge(backend: str) -> None:
    """Whatever they ask, in the end the last word stands, all of it and nothing else."""
    before = rules(backend)

    def often(number: int) -> None:
        for turn in range(6):
            ports = {f"e{number}": tuple(port(8000 + 10 * number + each) for each in range(turn % 3))}
            firewall.ensure(policy(published=ports, icc=turn % 2 == 0))
            if turn % 3 == 2:
                firewall.delete("br-1")

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(often, range(6)))
    firewall.ensure(FULL)
    firewall.wait_until_applied()
    after = sorted(rules(backend).splitlines())
    firewall.delete("br-1")
    assert rules(backend) == before
    firewall.ensure(FULL)
    assert sorted(rules(backend).splitlines()) == after


def taken(bridge: str) -> bool:
    """Whether what was asked for a new bridge is being done, or is done."""
    return bridge in firewall.keeper.policies and bridge not in firewall.keeper.waiting


def waits(wish: Policy, answer: Future[None]) -> bool:
    """Whether it has been asked for: it waits for what is being done, or is done already, where there is no lock."""
    return answer.done() or wish.bridge in firewall.keeper.waiting


def test_a_policy_that_is_refused_does_not_hurt_the_others(backend: str) -> None:
    asked: list[Policy] = [policy(f"br-{number}") for number in range(6)]
    asked.insert(3, REFUSED)
    with ThreadPoolExecutor(8) as threads:
        with held_lock():
            first = threads.submit(firewall.ensure, policy("br-first"))
            until(lambda: taken("br-first"))
            waiting = [threads.submit(firewall.ensure, each) for each in asked]
            until(lambda: all(map(waits, asked, waiting)))
        first.result()
    errors = [each.exception() for each in waiting]
    assert [type(error) for error in errors] == [FirewallError if each is REFUSED else type(None) for each in asked]
    found = rules(backend)
    assert all(f"br-{number}" in found for number in range(6))


# ------------------------------------------------------------------------------------ others change, and it is repaired


def put_back(caplog: pytest.LogCaptureFixture) -> int:
    return sum("were changed by others and are put back" in message for message in caplog.messages)


FLUSHES = {
    "rules": ["iptables -F", "iptables -t nat -F"],
    "all": [f"{command} {what}" for command in COMMANDS for what in ("-F", "-X", "-t nat -F", "-t nat -X")],
    "nft": ["nft flush ruleset"],
}


def flush(backend: str, how: str | None = None) -> None:
    for line in FLUSHES[how or ("nft" if backend == "nftables" else "rules")]:
        # -X fails where something has been put back already.
        done = subprocess.run(line.split(), check=False, capture_output=True)
        assert done.returncode == 0 or "-X" in line, done.stderr


@pytest.mark.parametrize(
    ("backend", "how"),
    [
        ("iptables-nft", "rules"),
        ("iptables-nft", "all"),
        ("iptables-nft", "nft"),
        ("iptables-legacy", "rules"),
        ("iptables-legacy", "all"),
        ("nftables", "nft"),
    ],
    indirect=["backend"],
)
def test_a_flush_is_repaired_and_logged(
    backend: str, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if backend == "iptables-legacy":
        monkeypatch.setattr(firewall.keeper, "poll", 0.3)  # it is not told
    firewall.ensure(FULL)
    firewall.ensure(policy("br-2", internal=True))
    wanted = ours(backend)
    flush(backend, how)
    until(lambda: ours(backend) == wanted)
    until(lambda: put_back(caplog) >= 1)
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def ours(backend: str) -> list[str]:
    return sorted(line for line in rules(backend).splitlines() if "netplugin" in line.lower())


@pytest.mark.usefixtures("lively")
@nft_iptables_only
def test_each_single_rule_is_put_back(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    firewall.ensure(FULL)
    complete = rules(backend)
    lines = [line for line in run("iptables-save").splitlines() if line.startswith(("-A", "*"))]
    table = ""
    for line in lines:
        if line.startswith("*"):
            table = line[1:]
        elif "netplugin_sdk" in line:
            caplog.clear()
            restore = f"*{table}\n-D{line[2:]}\nCOMMIT\n"
            subprocess.run(["iptables-restore", "--noflush"], input=restore, text=True, check=True)
            until(lambda: same(backend, complete))
            until(lambda: put_back(caplog) == 1)


@pytest.mark.usefixtures("lively")
@pytest.mark.parametrize("backend", ["nftables"], indirect=True)
def test_each_single_nft_rule_is_put_back(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    firewall.ensure(FULL)
    complete = rules(backend)
    chains = ["forward", "into", "out", "prerouting", "output", "publish", "postrouting"]
    for chain in chains:
        caplog.clear()
        run("nft", "flush", "chain", "inet", "netplugin-br-1", chain)
        until(lambda: rules(backend) == complete)
        until(lambda: put_back(caplog) == 1)
    run("nft", "insert rule inet netplugin-br-1 into accept")
    until(lambda: rules(backend) == complete)
    run("nft", "delete table inet netplugin-br-1")
    until(lambda: rules(backend) == complete)


def test_what_others_have_changed_for_themselves_is_kept(
    backend: str, programs: list[str], caplog: pytest.LogCaptureFixture, lively: Callable[[], None]
) -> None:
    firewall.ensure(FULL)
    programs.clear()
    if backend == "nftables":
        run("nft", "add table inet mine; add chain inet mine c; add rule inet mine c accept")
    else:
        run("iptables", "-A", "INPUT", "-s", "192.0.2.66", "-j", "DROP")
        run("iptables", "-t", "nat", "-A", "PREROUTING", "-s", "192.0.2.66", "-j", "RETURN")
    lively()
    assert programs
    assert set(programs) <= LOOKS, "it looks, and changes nothing"
    assert not caplog.messages
    assert "192.0.2.66" in rules(backend) or "table inet mine" in rules(backend)


@announced_only
@pytest.mark.usefixtures("backend")
def test_our_own_changes_cost_no_look(monkeypatch: pytest.MonkeyPatch, looks: Callable[[], int]) -> None:
    monkeypatch.setattr(firewall.keeper, "quiet", 0.0)
    for turn in range(5):
        for number in range(3):
            firewall.ensure(policy(f"br-{number}", icc=turn % 2 == 0))
        firewall.delete("br-1")
    for _ in range(2):  # what it is told of it has heard before it answers, and looked at before it answers again
        firewall.wait_until_applied()
    assert not looks()
    run("nft", "add", "table", "ip", "mine")
    until(lambda: looks() > 0)


@announced_only
def test_a_change_after_somebody_elses_costs_no_look(
    backend: str, programs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firewall.keeper, "quiet", 3600.0)  # else the look at theirs may come first
    firewall.ensure(FULL)
    if backend == "nftables":
        run("nft", "add table inet mine; add chain inet mine c; add rule inet mine c accept")
    else:
        run("iptables", "-A", "INPUT", "-s", "192.0.2.66", "-j", "DROP")
    programs.clear()
    firewall.ensure(policy("br-2"))
    looked = set(programs) & LOOKS
    assert programs
    assert not looked


@pytest.mark.parametrize(
    ("backend", "how"),
    [("iptables-nft", "rules"), ("iptables-nft", "all"), ("iptables-nft", "nft"), ("nftables", "nft")],
    indirect=["backend"],
)
@pytest.mark.parametrize("change", [policy("br-2"), replace(FULL, icc=False), policy("br-1")])
def test_a_change_right_after_a_flush(backend: str, how: str, change: Policy) -> None:
    firewall.ensure(FULL)
    firewall.ensure(change)
    firewall.wait_until_applied()
    wanted = ours(backend)
    firewall.ensure(FULL)
    firewall.delete("br-2")
    flush(backend, how)
    firewall.ensure(change)
    until(lambda: ours(backend) == wanted)


@pytest.mark.usefixtures("lively")
def test_a_refused_policy_does_not_keep_the_others_from_repair(backend: str) -> None:
    firewall.ensure(FULL)
    complete = rules(backend)
    with pytest.raises(FirewallError):
        firewall.ensure(REFUSED)
    flush(backend)
    wanted = {line for line in complete.splitlines() if '"netplugin_sdk:br-1' in line}
    until(lambda: wanted <= set(rules(backend).splitlines()))


@pytest.mark.usefixtures("lively")
def test_what_was_deleted_is_not_put_back(backend: str) -> None:
    firewall.ensure(FULL)
    firewall.ensure(policy("br-2"))
    firewall.delete("br-1")
    wanted = ours(backend)
    flush(backend)
    until(lambda: ours(backend) == wanted)
    assert '"netplugin_sdk:br-2"' in rules(backend)
    assert '"netplugin_sdk:br-1"' not in rules(backend)


# ------------------------------------------------------------------------------------------------------ other processes


class Other:
    """Another process with bridges of its own, in the same network namespace, that does as it is told."""

    _CODE = """if True:
        import os, sys
        from ipaddress import ip_network
        from netplugin_sdk.linux import firewall, iptables
        firewall.use(sys.argv[1])
        for line in sys.stdin:
            verb, _, bridge = line.strip().partition(" ")
            if verb == "ensure":
                firewall.ensure(firewall.Policy(bridge=bridge, subnets=(ip_network("10.9.0.0/24"),)))
            elif verb == "less":
                firewall.ensure(firewall.Policy(bridge=bridge, subnets=(ip_network("10.9.0.0/24"),), masquerade=False))
            elif verb == "delete":
                firewall.delete(bridge)
            elif verb == "often":
                for turn in range(4):
                    firewall.ensure(firewall.Policy(bridge=bridge, subnets=(ip_network("10.9.0.0/24"),)))
                    firewall.delete(bridge)
            elif verb == "end":
                break
            print("done", flush=True)
    """

    def __init__(self, backend: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self._CODE, backend.partition("-")[0]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def tell(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def done(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "done\n", self.end()

    def do(self, text: str) -> None:
        self.tell(text)
        self.done()

    def end(self) -> str:
        """What it complained of."""
        return self.process.communicate(timeout=PATIENCE)[1]


@pytest.fixture
def other(backend: str) -> Iterator[Callable[[], Other]]:
    made: list[Other] = []

    def make() -> Other:
        made.append(Other(backend))
        return made[-1]

    yield make
    for each in made:
        if each.process.poll() is None:
            each.process.kill()
        each.process.communicate()


def lines_of(backend: str, bridge: str) -> list[str]:
    own = [line for line in rules(backend).splitlines() if f'"netplugin_sdk:{bridge}"' in line]
    hooks = [line for line in rules(backend).splitlines() if re.search(r'"netplugin_sdk:[A-Z_-]+"', line)]
    return sorted(own) + sorted(line for line in hooks if "10.1" not in line)


@pytest.mark.usefixtures("lively")
def test_another_process_is_never_disturbed(backend: str, other: Callable[[], Other]) -> None:
    another = other()
    another.do("ensure br-9")
    theirs = lines_of(backend, "br-9")
    assert theirs
    for turn in range(3):
        for number in (1, 2):
            firewall.ensure(replace(FULL, bridge=f"br-{number}", icc=turn % 2 == 0))
            assert set(theirs) <= set(rules(backend).splitlines())
        for number in (1, 2):
            firewall.delete(f"br-{number}")  # our last
            assert set(theirs) <= set(rules(backend).splitlines())
    firewall.ensure(FULL)
    ours_ = lines_of(backend, "br-1")
    another.do("delete br-9")  # their last
    assert set(ours_) <= set(rules(backend).splitlines())
    another.do("ensure br-9")
    flush(backend)
    until(lambda: set(ours_) <= set(rules(backend).splitlines()))
    if backend == "iptables-legacy":
        another.do("ensure br-8")  # looks by itself only every 5 s
        another.do("ensure br-9")
    else:
        until(lambda: set(theirs) <= set(rules(backend).splitlines()))
    another.tell("end")
    assert set(another.end().splitlines()) <= {"firewall: rules of ours were changed by others and are put back"}
    assert set(ours_) <= set(rules(backend).splitlines())
    for bridge in ("br-8", "br-9", "br-1"):
        firewall.delete(bridge)
    assert "netplugin" not in rules(backend).lower()


@iptables_only
def test_several_processes_and_an_engine(backend: str, other: Callable[[], Other]) -> None:
    """Each makes and removes its only bridge again and again: who is last removes what all of them share."""
    before = rules(backend)
    others = [other() for _ in range(3)]
    for number, each in enumerate(others):
        each.tell(f"often br-{number}")
        each.tell("end")
    while any(each.process.poll() is None for each in others):
        run("iptables", "-w", "-A", "FORWARD", "-s", "192.0.2.66", "-j", "DROP")
        run("iptables", "-w", "-D", "FORWARD", "-s", "192.0.2.66", "-j", "DROP")
    assert [each.end() for each in others] == [""] * 3
    assert rules(backend) == before


@iptables_only
def test_a_process_that_is_killed_in_the_middle_leaves_no_lock(backend: str, other: Callable[[], Other]) -> None:
    before = rules(backend)
    for delay in (0.003, 0.015):
        victim = other()
        victim.do("ensure br-9")
        victim.tell("often br-9")
        time.sleep(delay)
        victim.process.send_signal(signal.SIGKILL)
        firewall.ensure(FULL)
        firewall.delete("br-9")
        firewall.delete("br-1")
        victim.process.wait(PATIENCE)
    until(lambda: gone(backend, before))


def gone(backend: str, before: str) -> bool:
    """What the victim's last program did after its death is removed as well."""
    firewall.delete("br-9")
    return rules(backend) == before


def masqueraded(backend: str, bridge: str) -> bool:
    """Whether what leaves by another interface is."""
    return (f'oifname != "{bridge}"' if backend == "nftables" else f"! -o {bridge}") in rules(backend)


def test_the_rules_stay_when_the_process_ends(backend: str, other: Callable[[], Other]) -> None:
    """And what it had been asked for just before is done."""
    another = other()
    another.do("ensure br-9")
    assert masqueraded(backend, "br-9")
    another.tell("less br-9\nend")
    assert another.end() == ""
    assert "br-9" in rules(backend)
    assert not masqueraded(backend, "br-9")
    firewall.delete("br-9")
    assert "br-9" not in rules(backend)


@pytest.mark.parametrize("tail", ["", "firewall.delete('br-8')"])
@announced_only
def test_many_removals_are_done_before_the_interpreter_ends(backend: str, tail: str) -> None:
    code = f"""if True:
        from dataclasses import replace
        from ipaddress import ip_network
        from netplugin_sdk.linux import firewall, iptables
        firewall.use({backend.partition("-")[0]!r})
        wide = [firewall.Policy(bridge=f"br-{{n}}", subnets=(ip_network("10.9.0.0/24"),)) for n in range(9)]
        for each in wide:
            firewall.ensure(each)
        for each in wide:
            firewall.ensure(replace(each, masquerade=False))
        {tail}
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stderr, done.returncode) == ("", 0)
    assert not any(masqueraded(backend, f"br-{number}") for number in range(9))
    assert ("br-8" in rules(backend)) == (not tail)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def empty_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PATH", os.fspath(empty))
    return empty


def test_the_program_is_not_installed(backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name, package = ("nft", "nftables") if backend == "nftables" else ("iptables", "iptables")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", os.fspath(tmp_path / "nowhere"))
        for call in (partial(firewall.ensure, FULL), partial(firewall.delete, "br-1"), partial(firewall.ensure, FULL)):
            with pytest.raises(Unavailable, match=rf"^firewall: no {name} here: install the package {package}$"):
                call()
    firewall.ensure(FULL)
    assert "br-1" in rules(backend)
    firewall.wait_until_applied()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", os.fspath(tmp_path / "nowhere"))
        with pytest.raises(Unavailable):
            firewall.ensure(policy("br-2"))
    firewall.ensure(policy("br-2"))
    assert "br-2" in rules(backend)


@nft_iptables_only
@pytest.mark.usefixtures("backend", "empty_path")
def test_nothing_is_installed_and_nobody_has_chosen() -> None:
    firewall.use(None)
    with pytest.raises(Unavailable, match="no iptables here"):
        firewall.ensure(FULL)


@nft_iptables_only
@pytest.mark.usefixtures("backend")
def test_without_the_half_for_ipv6(empty_path: Path) -> None:
    """Networks with IPv4 only do not need it."""
    for name in ("iptables", "iptables-save", "iptables-restore"):
        (empty_path / name).symlink_to("/usr/sbin/xtables-nft-multi")
    firewall.ensure(policy(subnets=SUBNETS[:1]))
    firewall.ensure(policy(subnets=SUBNETS[:1], internal=True))
    with pytest.raises(Unavailable, match="no ip6tables-save here"):
        firewall.ensure(FULL)


def test_a_rule_that_is_refused(backend: str) -> None:
    firewall.ensure(FULL)
    before = rules(backend)
    for _ in range(2):
        with pytest.raises(FirewallError, match=r"^firewall: .*(70000|out of range)") as caught:
            firewall.ensure(REFUSED)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300
    firewall.delete(REFUSED.bridge)
    assert rules(backend) == before


@iptables_only
def test_what_iptables_says_is_passed_on_in_one_line(backend: str) -> None:
    firewall.ensure(FULL)
    run("iptables", "-A", "INPUT", "-j", "NETPLUGIN-br-1")
    with pytest.raises(FirewallError, match=r"^firewall: iptables-restore.* line \d+\b.* failed") as caught:
        firewall.delete("br-1")
    assert "\n" not in str(caught.value)
    run("iptables", "-D", "INPUT", "-j", "NETPLUGIN-br-1")
    firewall.delete("br-1")
    assert "br-1" not in rules(backend)


@iptables_only
def test_a_delete_that_is_refused_is_told_also_beside_others(backend: str) -> None:
    """Here for IPv6, of which the other that is asked for at the same time has nothing."""
    firewall.ensure(FULL)
    firewall.ensure(policy("br-0"))
    run("ip6tables", "-A", "INPUT", "-j", "NETPLUGIN-br-1")
    with ThreadPoolExecutor(3) as threads:
        with held_lock():
            first = threads.submit(firewall.ensure, policy("br-0", internal=True))
            until(lambda: firewall.keeper.policies["br-0"].internal and taken("br-0"))
            deleted = threads.submit(firewall.delete, "br-1")
            added = threads.submit(firewall.ensure, wish := policy("br-2", subnets=SUBNETS[:1]))
            until(lambda: waits(FULL, deleted) and waits(wish, added))
        first.result()
        added.result()
        with pytest.raises(FirewallError):
            deleted.result()
    assert "br-2" in rules(backend)


# ---------------------------------------------------------------------------------------------------------------- names


@announced_only
def test_unusual_names(backend: str) -> None:
    before = rules(backend)
    names = ["br-0123456789ab", "a@b=c", "a@b.c", ".x", "123", "OUT", "NETPLUGIN", "_", "x=", "jump", "all", "a.-_"]
    ports = {"e" * 40: (port(8080), port(8080, "fd00:1::2"))}
    each = [policy(name, network="n" * 40, trusted=(name,), published=ports) for name in names]
    for one in each:
        firewall.ensure(one)
    once = rules(backend)
    firewall.close()
    for one in each:
        firewall.ensure(one)
    assert rules(backend) == once
    for name in names:
        firewall.delete(name)
    assert rules(backend) == before


@pytest.mark.parametrize("name", ["", "br+", "a b", 'a"b', "a\nCOMMIT", "-x", "x" * 16])
def test_names_that_would_mean_something_else_in_a_rule(name: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot be the name of an interface in a firewall rule"):
        firewall.delete(name)
