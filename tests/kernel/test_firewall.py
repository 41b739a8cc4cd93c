from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest

from netplugin_sdk.errors import InvalidRequest, Unavailable
from netplugin_sdk.linux import firewall, links
from netplugin_sdk.linux.firewall import FirewallError

from .lab import SYSCTLS, Namespace, run

pytestmark = pytest.mark.usefixtures("iptables")

both_programs = pytest.mark.parametrize("iptables", ["nft", "legacy"], indirect=True)

SUBNETS = [ip_network("10.1.0.0/24"), ip_network("fd00:1::/64")]
COMMANDS = ("iptables", "ip6tables")


def rules() -> str:
    """All rules of both families, without the counters and the times."""
    saved = "".join(run(f"{command}-save") for command in COMMANDS)
    return "\n".join(line.split(" [")[0] for line in saved.splitlines() if not line.startswith("#"))


def docker_starts(*, old: bool = False) -> None:
    """What Docker does with its user's chain when it starts; 20.10 (`old`) ends the chain with a RETURN."""
    for command in COMMANDS:
        subprocess.run([command, "-N", "DOCKER-USER"], capture_output=True, check=False)
        subprocess.run([command, "-D", "FORWARD", "-j", "DOCKER-USER"], capture_output=True, check=False)
        run(command, "-I", "FORWARD", "-j", "DOCKER-USER")
        if old:
            run(command, "-A", "DOCKER-USER", "-j", "RETURN")


class Site:
    """A host with bridges br-1, br-2 …, containers on them, and a world outside that has routes to them all."""

    def __init__(self, namespace: Callable[[], Namespace]) -> None:
        self._namespace = namespace
        self.outside = namespace()
        links.ensure_veth("uplink", "far")
        run("ip", "address", "add", "192.0.2.1/24", "dev", "uplink")
        run("ip", "address", "add", "fd00:ff::1/64", "dev", "uplink", "nodad")
        self.outside.adopt("far", "192.0.2.2/24", "fd00:ff::2/64", gateway="192.0.2.1")
        self.outside.run("ip", "route", "add", "default", "via", "fd00:ff::1")

    def bridge(self, number: int, *, name: str | None = None) -> list[Namespace]:
        """A new bridge with two containers, N.2 and N.3."""
        name = name or f"br-{number}"
        gateways = [ip_interface(f"10.{number}.0.1/24"), ip_interface(f"fd00:{number}::1/64")]
        links.ensure_bridge(name, addresses=gateways)
        containers = []
        for host in (2, 3):
            container = self._namespace()
            host_end, inside = f"ve{number}.{host}h", f"ve{number}.{host}i"
            links.ensure_veth(host_end, inside, master=name)
            container.adopt(inside, f"10.{number}.0.{host}/24", f"fd00:{number}::{host}/64", gateway=f"10.{number}.0.1")
            container.run("ip", "route", "add", "default", "via", f"fd00:{number}::1")
            containers.append(container)
        return containers


@pytest.fixture
def site(request: pytest.FixtureRequest, namespace: Callable[[], Namespace]) -> Site:
    request.getfixturevalue("iptables")
    return Site(namespace)


def source_seen_by(server: Namespace, client: Namespace, address: str) -> str:
    with server.udp() as receiver, client.udp() as sender:
        receiver.bind((address, 0))
        receiver.settimeout(2)
        sender.sendto(b"hello", receiver.getsockname())
        _, (source, _) = receiver.recvfrom(16)
    return str(source)


# What passes


@both_programs
def test_neighbours_reach_each_other_only_with_it(site: Site) -> None:
    first, _ = site.bridge(1)
    if (SYSCTLS / "bridge").exists():
        assert not first.answering("10.1.0.3", "fd00:1::3")
    firewall.ensure_bridge("br-1", subnets=SUBNETS)
    assert first.answering("10.1.0.3", "fd00:1::3", within=2) == {"10.1.0.3", "fd00:1::3"}
    firewall.delete_bridge("br-1")
    if (SYSCTLS / "bridge").exists():
        assert not first.answering("10.1.0.3")


def test_a_bridge_without_subnets_carries_both_families(site: Site) -> None:
    first, _ = site.bridge(1)
    firewall.ensure_bridge("br-1")
    assert first.answering("10.1.0.3", "fd00:1::3", within=2) == {"10.1.0.3", "fd00:1::3"}
    assert "MASQUERADE" not in rules()


def test_only_the_families_of_the_subnets_are_touched() -> None:
    before = run("ip6tables-save").count("\n")
    firewall.ensure_bridge("br-1", subnets=SUBNETS[:1])
    assert run("ip6tables-save").count("\n") == before
    assert "br-1" in run("iptables-save")


@pytest.mark.parametrize("policy", ["DROP", "ACCEPT"])
def test_outbound_is_masqueraded_and_inbound_does_not_begin(site: Site, policy: str) -> None:
    for command in COMMANDS:
        run(command, "-P", "FORWARD", policy)
    first, _ = site.bridge(1)
    firewall.ensure_bridge("br-1", subnets=SUBNETS)
    assert first.answering("192.0.2.2", "fd00:ff::2", within=2) == {"192.0.2.2", "fd00:ff::2"}
    assert source_seen_by(site.outside, first, "192.0.2.2") == "192.0.2.1"
    assert not site.outside.answering("10.1.0.2", "fd00:1::2")


def test_without_masquerade_the_container_is_seen(site: Site) -> None:
    first, _ = site.bridge(1)
    firewall.ensure_bridge("br-1", subnets=SUBNETS, masquerade=False)
    assert source_seen_by(site.outside, first, "192.0.2.2") == "10.1.0.2"


@pytest.mark.parametrize("policy", ["DROP", "ACCEPT"])
def test_internal(site: Site, policy: str) -> None:
    for command in COMMANDS:
        run(command, "-P", "FORWARD", policy)
    first, _ = site.bridge(1)
    firewall.ensure_bridge("br-1", subnets=SUBNETS, internal=True)
    assert first.answering("10.1.0.3", "fd00:1::3", within=2) == {"10.1.0.3", "fd00:1::3"}
    assert not first.answering("192.0.2.2", "fd00:ff::2")
    assert not site.outside.answering("10.1.0.2", "fd00:1::2")


def test_two_bridges_do_not_reach_each_other_whichever_came_first(site: Site) -> None:
    on_one, on_two = site.bridge(1)[0], site.bridge(2)[0]
    firewall.ensure_bridge("br-1", subnets=SUBNETS)
    firewall.ensure_bridge("br-2", subnets=[ip_network("10.2.0.0/24")])
    assert not on_one.answering("10.2.0.2")
    assert not on_two.answering("10.1.0.2")
    assert on_one.answering("192.0.2.2", within=2)
    assert on_two.answering("192.0.2.2", within=2)


def test_dockers_own_bridges_do_not_reach_ours(site: Site) -> None:
    ours, dockers = site.bridge(1)[0], site.bridge(2, name="docker0")[0]
    docker_starts()
    run("iptables", "-A", "FORWARD", "-i", "docker0", "!", "-o", "docker0", "-j", "ACCEPT")
    run("iptables", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT")
    assert dockers.answering("10.1.0.2", within=2)
    firewall.ensure_bridge("br-1", subnets=SUBNETS)
    assert not dockers.answering("10.1.0.2")
    assert dockers.answering("192.0.2.2", within=2)
    assert ours.answering("192.0.2.2", within=2)


# Beside Docker and its users


@pytest.mark.parametrize("old", [False, True])
def test_a_users_drop_wins(site: Site, old: bool) -> None:
    first, _ = site.bridge(1)
    docker_starts(old=old)
    run("iptables", "-I", "DOCKER-USER", "-d", "192.0.2.2", "-j", "DROP")
    firewall.ensure_bridge("br-1", subnets=SUBNETS)
    assert not first.answering("192.0.2.2")
    assert first.answering("10.1.0.3", within=2)
    # One that was added behind ours takes effect when the plugin next makes sure of its bridge.
    run("iptables", "-F", "DOCKER-USER")
    firewall.ensure_bridge("br-1", subnets=SUBNETS)
    run("iptables", "-A", "DOCKER-USER", "-d", "10.1.0.3", "-j", "DROP")
    firewall.ensure_bridge("br-1", subnets=SUBNETS)
    assert first.answering("192.0.2.2", within=2)
    if (SYSCTLS / "bridge").exists():
        assert not first.answering("10.1.0.3")


@pytest.mark.parametrize("old", [False, True])
def test_an_engine_that_starts_later(site: Site, old: bool) -> None:
    first, _ = site.bridge(1)
    firewall.ensure_bridge("br-1", subnets=SUBNETS)
    docker_starts(old=old)
    assert first.answering("10.1.0.3", "192.0.2.2", within=2) == {"10.1.0.3", "192.0.2.2"}
    with_engine = rules()
    firewall.ensure_bridge("br-1", subnets=SUBNETS)
    assert rules() == with_engine
    firewall.delete_bridge("br-1")
    assert "NETPLUGIN" not in rules()
    assert rules().count("-A FORWARD -j DOCKER-USER") == 2
    assert rules().count("FORWARD") == 4


@both_programs
def test_twice_is_once() -> None:
    for number in (1, 2):
        firewall.ensure_bridge(f"br-{number}", subnets=SUBNETS)
    once = rules()
    for number in (1, 2):
        firewall.ensure_bridge(f"br-{number}", subnets=SUBNETS)
    assert rules() == once


@both_programs
def test_the_second_time_reads_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """That iptables prints our rules as we write them; if another version did not, they would be replaced each time."""
    firewall.ensure_bridge("br-1", subnets=SUBNETS)
    commands: list[str] = []
    original = subprocess.run

    def spy(argv: tuple[str, ...], **kwargs: Any) -> Any:
        commands.append(argv[0])
        return original(argv, **kwargs)

    monkeypatch.setattr(subprocess, "run", spy)
    firewall.ensure_bridge("br-1", subnets=SUBNETS)
    assert commands == ["iptables-save", "ip6tables-save"]


@both_programs
def test_again_with_other_wishes_leaves_nothing_of_the_old() -> None:
    firewall.ensure_bridge("br-1", subnets=SUBNETS, internal=True)
    internal = rules()
    firewall.ensure_bridge("br-1", subnets=SUBNETS)
    assert rules() != internal
    firewall.ensure_bridge("br-1", subnets=SUBNETS, internal=True)
    assert rules() == internal


@both_programs
@pytest.mark.parametrize("engine", [None, "new", "old"])
def test_delete_leaves_everything_as_it_was(engine: str | None) -> None:
    if engine:
        docker_starts(old=engine == "old")
        run(
            "iptables", "-I", "DOCKER-USER", "-s", "192.0.2.66", "-m", "comment", "--comment", "it's mine", "-j", "DROP"
        )
    before = rules()
    firewall.ensure_bridge("br-1", subnets=SUBNETS)
    firewall.ensure_bridge("br-12", subnets=SUBNETS[:1], internal=True)
    firewall.ensure_bridge("br-1", subnets=SUBNETS)
    firewall.delete_bridge("br-1")
    assert "br-12" in rules()
    assert '"netplugin_sdk:br-1"' not in rules()
    firewall.delete_bridge("br-12")
    assert rules() == before
    firewall.delete_bridge("br-12")
    assert rules() == before


@both_programs
def test_a_chain_that_a_user_has_filled_or_uses_stays() -> None:
    firewall.ensure_bridge("br-1", subnets=SUBNETS)
    run("iptables", "-A", "DOCKER-USER", "-s", "192.0.2.66", "-j", "DROP")
    run("ip6tables", "-A", "FORWARD", "-i", "uplink", "-j", "DOCKER-USER")
    firewall.delete_bridge("br-1")
    assert "NETPLUGIN" not in rules()
    assert "-A DOCKER-USER -s 192.0.2.66/32 -j DROP" in rules()
    assert "-A FORWARD -i uplink -j DOCKER-USER" in rules()


def test_after_somebody_flushed_everything() -> None:
    before = rules()
    firewall.ensure_bridge("br-1", subnets=SUBNETS)
    complete = rules()
    for command in COMMANDS:
        run(command, "-F")
    firewall.ensure_bridge("br-1", subnets=SUBNETS)
    assert rules() == complete
    for command in COMMANDS:
        run(command, "-F")
    firewall.delete_bridge("br-1")
    assert rules().replace(":DOCKER-USER -\n", "") == before  # without the jump, nothing says who made it


# At the same time


@both_programs
def test_many_threads() -> None:
    before = rules()
    with ThreadPoolExecutor(8) as threads:
        for _ in range(2):
            list(threads.map(lambda number: firewall.ensure_bridge(f"br-{number}", subnets=SUBNETS), range(8)))
        assert all(rules().count(f"-j NETPLUGIN-br-{number}\n") == 2 for number in range(8))
        list(threads.map(lambda number: firewall.delete_bridge(f"br-{number}"), range(8)))
    assert rules() == before


@both_programs
def test_two_plugins_and_an_engine() -> None:
    before = rules()
    code = """if True:
        import sys
        from ipaddress import ip_network
        from netplugin_sdk.linux import firewall
        for turn in range(4):
            firewall.ensure_bridge(sys.argv[1], subnets=[ip_network("10.1.0.0/24")])
            firewall.delete_bridge(sys.argv[1])
    """
    plugins = [subprocess.Popen([sys.executable, "-c", code, f"br-{n}"], stderr=subprocess.PIPE) for n in range(3)]
    while any(plugin.poll() is None for plugin in plugins):
        run("iptables", "-w", "-A", "FORWARD", "-s", "192.0.2.66", "-j", "DROP")
        run("iptables", "-w", "-D", "FORWARD", "-s", "192.0.2.66", "-j", "DROP")
    assert [plugin.communicate()[1] for plugin in plugins] == [b""] * 3
    assert rules() == before


# Errors


@both_programs
def test_what_iptables_says_is_passed_on_in_one_line() -> None:
    firewall.ensure_bridge("br-1", subnets=SUBNETS)
    run("iptables", "-A", "INPUT", "-j", "NETPLUGIN-br-1")
    with pytest.raises(FirewallError, match=r"^firewall of br-1: iptables-restore.* line 5\b.* failed") as caught:
        firewall.delete_bridge("br-1")
    assert "\n" not in str(caught.value)


def test_iptables_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PATH", os.fspath(empty))
    with pytest.raises(Unavailable, match=r"^firewall of br-1: no iptables-save here: install the package iptables$"):
        firewall.ensure_bridge("br-1", subnets=SUBNETS)


@pytest.mark.parametrize(
    "name", ["", "br+", "a b", 'a"b', "a'b", "a\nCOMMIT", "-x", "!x", "x" * 16, "é", "$(id)", "a\\"]
)
def test_names_that_would_mean_something_else_in_a_rule(name: str) -> None:
    for use in (firewall.ensure_bridge, firewall.delete_bridge):
        with pytest.raises(InvalidRequest, match="cannot be the name of a bridge in a firewall rule"):
            use(name)


def test_a_name_as_long_as_it_can_be() -> None:
    before = rules()
    firewall.ensure_bridge("br-0123456789ab", subnets=SUBNETS)
    firewall.ensure_bridge("br-0123456789ab", subnets=SUBNETS)
    firewall.delete_bridge("br-0123456789ab")
    assert rules() == before
