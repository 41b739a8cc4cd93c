"""What the firewall writes down for a policy, and how it gets from one to the next. Needs no kernel.

``tests/unit/golden`` shows for some policies all that stands in the tables of a host that had nothing before. After a
change that is meant, write the files again and read the difference:

    NETPLUGIN_GOLDEN=write .venv/bin/python -m pytest tests/unit/test_rules.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netplugin_sdk.errors import InvalidRequest
from netplugin_sdk.linux import iptables, nftables
from netplugin_sdk.linux.iptables import Lines
from netplugin_sdk.linux.ports import Published
from netplugin_sdk.linux.rules import Mode, Policy, Verdict, rules
from netplugin_sdk.values import IPAddress, TransportProtocol

GOLDEN = Path(__file__).with_name("golden")
BOTH = (ip_network("10.1.0.0/24"), ip_network("fd00:1::/64"))
TCP, UDP, SCTP = TransportProtocol

TO_OURS = '-m comment --comment "netplugin_sdk:NETPLUGIN" -j NETPLUGIN'
BUILT_IN = {"filter": ("INPUT", "FORWARD", "OUTPUT"), "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING")}


def port(text: str) -> Published:
    """As it is printed: ``0.0.0.0:8080->10.1.0.2:80/tcp``."""
    text, protocol = text.split("/")
    (host_address, host_port), (address, number) = (end.rsplit(":", 1) for end in text.split("->"))
    return Published(
        protocol=TransportProtocol[protocol.upper()],
        host_address=ip_address(host_address.strip("[]")),
        host_port=int(host_port),
        address=ip_address(address.strip("[]")),
        port=int(number),
    )


class Host:
    """The tables of a host for one IP version, and what ``iptables-restore --noflush`` does with them."""

    def __init__(self) -> None:
        self.chains: dict[tuple[str, str], list[str]] = {
            (table, chain): [] for table, chains in BUILT_IN.items() for chain in chains
        }

    @classmethod
    def with_chains(cls, chains: Mapping[Any, Iterable[str]]) -> Host:
        host = cls()
        host.chains |= {place: list(held) for place, held in chains.items()}
        return host

    def restore(self, text: str) -> None:
        """Every table is taken as a whole or, with an AssertionError, not at all."""
        table, before = "", self.chains
        for line in text.splitlines():
            if line.startswith("*"):
                table, before = line[1:], self.chains
                self.chains = {place: list(held) for place, held in before.items()}
            elif line == "COMMIT":
                table = ""
            else:
                try:
                    self._do(table, line)
                except AssertionError:
                    self.chains = before
                    raise
        assert not table, "no COMMIT"

    def _do(self, table: str, line: str) -> None:
        verb, _, rest = line.partition(" ")
        name, _, rule = rest.partition(" ")
        if verb.startswith(":"):
            assert rest == "- [0:0]", line
            self.chains[table, verb[1:]] = []
            return
        place = (table, name)
        if verb == "-N":
            assert place not in self.chains, f"chain exists: {line}"
            self.chains[place] = []
            return
        assert place in self.chains, f"no such chain: {line}"
        held = self.chains[place]
        if verb == "-I":
            number, _, rule = rule.partition(" ")
            assert 1 <= int(number) <= len(held) + 1, f"index too big: {line}"
            held.insert(int(number) - 1, rule)
        elif verb == "-A":
            held.append(rule)
        elif verb == "-D":
            assert rule in held, f"no such rule: {line}"
            held.remove(rule)
        elif verb == "-F":
            held.clear()
        elif verb == "-X":
            assert not held, f"chain is not empty: {line}"
            users = [other for (where, _), all_ in self.chains.items() if where == table for other in all_]
            assert not any(other.endswith(f"-j {name}") for other in users), f"chain is in use: {line}"
            del self.chains[place]
        else:
            raise AssertionError(line)
        if verb in ("-I", "-A"):
            target = rule.rpartition("-j ")[2].split(" ")[0]
            known = target in Verdict.__members__ or target in ("RETURN", "LOG") or (table, target) in self.chains
            assert known, f"no such target: {line}"

    def __str__(self) -> str:
        """As ``iptables-save`` prints them, without what is empty."""
        found = ""
        for table, built_in in BUILT_IN.items():
            chains = {name: held for (where, name), held in self.chains.items() if where == table}
            found += f"*{table}\n"
            found += "".join(f":{name}\n" for name in sorted(chains.keys() - set(built_in)))
            for name in (*built_in, *sorted(chains.keys() - set(built_in))):
                found += "".join(f"-A {name} {rule}\n" for rule in chains[name])
        return found

    def parsed(self) -> dict[tuple[iptables._Table, str], list[str]]:
        return iptables.parse(self.saved())

    def saved(self) -> str:
        found = ""
        for table in BUILT_IN:
            chains = {name: held for (where, name), held in self.chains.items() if where == table}
            found += "\n".join((f"*{table}", *(f":{name} - [0:0]" for name in chains), ""))
            found += "".join(f"-A {name} {rule}\n" for name, held in chains.items() for rule in held) + "COMMIT\n"
        return found

    def put(self, *policies: Policy, version: int = 4) -> str:
        """What is asked for in the same way as by the back end: after a look. Returns the change."""
        chains = self.parsed()
        known = Lines.parse(chains)
        change = iptables.text(
            iptables.hook(chains, version),
            *(iptables.edit(p.bridge, known.get(p.bridge, Lines()), Lines.of(p, version)) for p in policies),
        )
        self.restore(change)
        return change

    def take(self, *bridges: str, version: int = 4) -> str:
        chains = self.parsed()
        known = Lines.parse(chains)
        edits = [iptables.edit(bridge, known.get(bridge, Lines()), None) for bridge in bridges]
        shared = () if known.keys() - set(bridges) else (iptables.unhook(chains, version),)
        self.restore(change := iptables.text(*edits, *shared))
        return change


# --------------------------------------------------------------------------------------------------------- golden files

POLICIES = {
    "plain": Policy(bridge="br-1", network="0123456789ab", subnets=BOTH),
    "internal": Policy(bridge="br-1", subnets=BOTH, internal=True),
    "isolated": Policy(bridge="br-1", subnets=BOTH, mode4=Mode.ISOLATED, mode6=Mode.ISOLATED, icc=False),
    "bridged-only": Policy(bridge="br-1", bridged_only=True),
    "no-icc-published": Policy(
        bridge="br-1",
        subnets=BOTH,
        icc=False,
        published={
            "web": (port("0.0.0.0:8080->10.1.0.2:80/tcp"), port("[::]:8080->[fd00:1::2]:80/tcp")),
        },
    ),
    "nat-unprotected": Policy(
        bridge="br-1",
        subnets=BOTH,
        mode4=Mode.UNPROTECTED,
        mode6=Mode.UNPROTECTED,
        published={"web": (port("0.0.0.0:8080->10.1.0.2:80/tcp"), port("[::]:8080->[fd00:1::2]:80/tcp"))},
    ),
    "routed-published": Policy(
        bridge="br-1",
        subnets=BOTH,
        mode4=Mode.ROUTED,
        mode6=Mode.ROUTED,
        published={"web": (port("0.0.0.0:0->10.1.0.2:80/tcp"), port("[::]:0->[fd00:1::2]:80/tcp"))},
    ),
    "nat4-routed6": Policy(
        bridge="br-1",
        subnets=BOTH,
        mode6=Mode.ROUTED,
        masquerade=False,
        published={"web": (port("0.0.0.0:8080->10.1.0.2:80/tcp"), port("[::]:0->[fd00:1::2]:80/tcp"))},
    ),
    "source-address": Policy(bridge="br-1", subnets=BOTH, sources=(ip_address("192.0.2.9"), ip_address("fd00:ff::9"))),
    "group": Policy(
        bridge="pt-1",
        group=0x70000001,
        subnets=BOTH,
        mode6=Mode.ROUTED,
        published={"web": (port("0.0.0.0:8080->10.1.0.2:80/tcp"), port("[::]:0->[fd00:1::2]:80/tcp"))},
    ),
    "group-internal": Policy(bridge="pt-1", group=0x70000001, subnets=BOTH, internal=True),
    "trusted": Policy(
        bridge="br-1",
        subnets=BOTH[:1],
        trusted=("eth0", "wg0"),
        published={"web": (port("0.0.0.0:8080->10.1.0.2:80/tcp"),)},
    ),
    "two-endpoints": Policy(
        bridge="br-1",
        network="0123456789ab",
        subnets=BOTH,
        published={
            "aaaaaaaaaaaa": (
                port("0.0.0.0:8080->10.1.0.2:80/tcp"),
                port("[::]:8080->10.1.0.2:80/tcp"),  # the relay's
                port("127.0.0.1:8081->10.1.0.2:81/udp"),  # the relay's
                port("192.0.2.1:8082->10.1.0.2:81/udp"),
            ),
            "bbbbbbbbbbbb": (
                port("192.0.2.1:9000->10.1.0.3:9000/sctp"),
                port("[fd00:ff::1]:9000->[fd00:1::3]:9000/tcp"),
            ),
        },
    ),
}


def described(policy: Policy) -> str:
    bare = Policy(bridge=policy.bridge)
    lines = []
    for name in Policy.__dataclass_fields__:
        value = getattr(policy, name)
        if name == "published":
            lines += [f"published of {endpoint}: {each}" for endpoint, ports in value.items() for each in ports]
        elif name == "bridge" or value != getattr(bare, name):
            lines.append(f"{name}: {', '.join(map(str, value)) if isinstance(value, tuple) else value}")
    return "".join(f"# {line}\n" for line in lines)


def standing(policy: Policy) -> str:
    text = described(policy)
    for version in policy.versions:
        host = Host()
        host.put(policy, version=version)
        text += f"\n# {'iptables' if version == 4 else 'ip6tables'}\n\n{host}"
    return text + f"\n# nft\n\n{nftables.text(policy)}"


@pytest.mark.parametrize("name", POLICIES)
def test_golden(name: str) -> None:
    file, text = GOLDEN / f"{name}.txt", standing(POLICIES[name])
    if os.environ.get("NETPLUGIN_GOLDEN") == "write":
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), "if that is meant, see the text of this module"


def test_each_golden_file_has_a_policy() -> None:
    assert {file.stem for file in GOLDEN.glob("*.txt")} == set(POLICIES)


# ------------------------------------------------------------------------------------------------ from policy to policy

OTHERS = ("-s 192.0.2.66/32 -j DROP", "-i docker0 ! -o docker0 -j ACCEPT", "-j LOG", "-p tcp -j RETURN")

addresses4 = st.sampled_from([ip_address(f"10.1.0.{n}") for n in (2, 3)])
addresses6 = st.sampled_from([ip_address(f"fd00:1::{n}") for n in (2, 3)])
hosts = st.sampled_from([ip_address(text) for text in ("0.0.0.0", "::", "127.0.0.1", "::1", "192.0.2.1", "fd00:ff::1")])
published = st.builds(
    Published,
    protocol=st.sampled_from(TransportProtocol),
    host_address=hosts,
    host_port=st.sampled_from([0, 8080, 8081]),
    address=addresses4 | addresses6,
    port=st.sampled_from([80, 81]),
)
subnets = st.lists(
    st.sampled_from([*BOTH, ip_network("10.9.0.0/16"), ip_network("0.0.0.0/0"), ip_network("::/0")]), max_size=3
)


def policies_of(bridge: str) -> st.SearchStrategy[Policy]:
    return st.builds(
        Policy,
        bridge=st.just(bridge),
        group=st.sampled_from([None, 7]),
        network=st.sampled_from(["", "n1"]),
        subnets=subnets.map(tuple),
        internal=st.booleans(),
        bridged_only=st.booleans(),
        icc=st.booleans(),
        masquerade=st.booleans(),
        sources=st.lists(hosts, max_size=2).map(tuple),
        mode4=st.sampled_from(Mode),
        mode6=st.sampled_from(Mode),
        trusted=st.lists(st.sampled_from(["eth0", "wg0"]), max_size=2).map(tuple),
        published=st.dictionaries(
            st.sampled_from(["e1", "e2"]), st.lists(published, max_size=4).map(tuple), max_size=2
        ),
    )


policies = policies_of("br-1")
versions = st.sampled_from([4, 6])


@st.composite
def used_hosts(draw: st.DrawFn) -> Host:
    """With rules of others' in every chain that exists without us, and perhaps with Docker."""
    several = st.lists(st.sampled_from(OTHERS), max_size=3)
    host = Host()
    for held in host.chains.values():
        held.extend(draw(several))
    if draw(st.booleans()):
        host.chains["filter", "DOCKER-USER"] = draw(several) + draw(st.sampled_from([[], ["-j RETURN"]]))
        host.chains["filter", "FORWARD"].insert(0, "-j DOCKER-USER")
        for name in draw(st.sets(st.sampled_from(iptables._ISOLATION))):
            host.chains["filter", name] = ["-o docker0 -j DROP"]
    return host


def of_others(host: Host, bridge: str) -> dict[tuple[str, str], list[str]]:
    """Everything but what is this bridge's own."""
    own = f'"netplugin_sdk:{bridge}'
    return {
        place: [rule for rule in held if f'{own}"' not in rule and f"{own} " not in rule]
        for place, held in host.chains.items()
        if place != ("filter", f"NETPLUGIN-{bridge}")
    }


def has(host: Host, policy: Policy, version: int) -> None:
    """The host has exactly the lines of this policy, and they are asked in a right order."""
    found, wanted = Lines.parse(host.parsed())[policy.bridge], Lines.of(policy, version)
    assert found.into == wanted.into
    for shared in ("first", "last", "dnat", "snat"):
        # They match different packets, so their order is left as it came, and once is enough.
        assert set(getattr(found, shared)) == set(getattr(wanted, shared)), shared
    ours = host.chains["filter", "NETPLUGIN"]
    leaving = [rule.endswith(f"-j {iptables._OUT}") for rule in ours]
    assert leaving == sorted(leaving), "what enters a bridge is asked before what leaves one"


@given(used_hosts(), policies, policies, policies_of("br-12"), versions)
def test_from_any_policy_to_any(host: Host, old: Policy, new: Policy, neighbour: Policy, version: int) -> None:
    host.put(neighbour, version=version)
    host.put(old, version=version)
    has(host, old, version)
    before = of_others(host, "br-1")
    host.restore(iptables.text(iptables.edit("br-1", Lines.of(old, version), Lines.of(new, version))))
    has(host, new, version)
    has(host, neighbour, version)
    assert of_others(host, "br-1") == before
    assert not host.put(new, neighbour, version=version), "nothing to do"


@given(used_hosts(), st.lists(policies, min_size=1, max_size=3), policies_of("br-12"), versions)
def test_when_all_are_gone_it_is_as_before(host: Host, several: list[Policy], neighbour: Policy, version: int) -> None:
    before = {place: list(held) for place, held in host.chains.items()}
    host.put(neighbour, version=version)
    for policy in several:
        host.put(policy, version=version)
    host.take("br-1", version=version)
    has(host, neighbour, version)
    assert of_others(host, "br-1") == dict(host.chains)
    host.take("br-12", version=version)
    assert host.chains == before
    assert not host.take("br-12", version=version)


@given(policies, versions)
def test_what_is_so_is_not_touched(policy: Policy, version: int) -> None:
    lines = Lines.of(policy, version)
    assert iptables.text(iptables.edit("br-1", lines, lines)) == ""
    assert Lines.of(policy, version) == lines


few = st.lists(st.sampled_from("abcdef"), max_size=6)


@given(few, few.map(lambda rules: list(dict.fromkeys(rules))))
def test_a_chain_of_ours_becomes_the_other_and_loses_nothing_on_the_way(old: list[str], new: list[str]) -> None:
    host = Host.with_chains({("filter", "C"): [f"-m {rule} -j DROP" for rule in old]})
    lines = iptables.rewrite("C", *([f"-m {rule} -j DROP" for rule in rules] for rules in (old, new)))
    host.restore("\n".join(("*filter", *lines, "COMMIT")))
    assert host.chains["filter", "C"] == [f"-m {rule} -j DROP" for rule in new]
    stay = [rule for rule in old if rule in new]
    if stay and stay == [rule for rule in new if rule in old] and len(set(old)) == len(old):
        assert not any(line.startswith(":") for line in lines)
        removed = [line.split()[3] for line in lines if line.startswith("-D")]
        assert removed == [rule for rule in old if rule not in new]


@given(policies)
def test_nft_has_a_table_for_each_policy(policy: Policy) -> None:
    text = nftables.text(policy)
    assert nftables.parse("table inet foreign {\n}\n" + text + "table inet netplug {\n}\n") == {"netplugin-br-1": text}


# ------------------------------------------------------------------------------------------------- what rules there are


def test_the_null_ipam_drivers_pool_is_no_subnet_to_masquerade() -> None:
    found = rules(Policy(bridge="br-1", subnets=(ip_network("0.0.0.0/0"),)), 4)
    assert Verdict.MASQUERADE not in {rule.verdict for rule in found}


@pytest.mark.parametrize("mode", Mode)
def test_without_icc_nothing_lets_neighbours_in_but_what_the_host_has_translated(mode: Mode) -> None:
    policy = replace(POLICIES["no-icc-published"], mode4=mode)
    for rule in rules(policy, 4):
        if rule.place.name == "INTO" and rule.verdict is Verdict.ACCEPT:
            assert rule.established or rule.translated or rule.not_incoming == "br-1", rule


# -------------------------------------------------------------------------------------------------------- beside Docker


def users_part(host: Host) -> list[str]:
    change = host.put(Policy(bridge="br-1"))
    return [line for line in change.splitlines() if line.startswith(("-I DOCKER-USER", "-D DOCKER-USER"))]


def test_our_jump_stands_after_the_users_rules_and_before_a_plain_return() -> None:
    def changes(*users: str) -> list[str]:
        chains = {("filter", "DOCKER-USER"): users, ("filter", "NETPLUGIN"): (), ("filter", "FORWARD"): (jump,)}
        return users_part(Host.with_chains(chains))

    jump, drop, later = "-j DOCKER-USER", "-s 192.0.2.0/24 -j DROP", "-p tcp -j DROP"
    assert changes() == [f"-I DOCKER-USER 1 {TO_OURS}"]
    assert changes(drop) == [f"-I DOCKER-USER 2 {TO_OURS}"]
    assert changes(drop, "-j RETURN") == [f"-I DOCKER-USER 2 {TO_OURS}"]
    assert changes("-i eth0 -j RETURN") == [f"-I DOCKER-USER 2 {TO_OURS}"], "not a plain one"
    assert changes(drop, TO_OURS) == []
    assert changes(drop, TO_OURS, "-j RETURN") == []
    assert changes(TO_OURS, "-j RETURN", drop) == [], "nothing after a plain RETURN is ever reached"
    assert changes(TO_OURS, drop) == [f"-D DOCKER-USER {TO_OURS}", f"-I DOCKER-USER 2 {TO_OURS}"]
    assert changes("-j RETURN", TO_OURS) == [f"-D DOCKER-USER {TO_OURS}", f"-I DOCKER-USER 1 {TO_OURS}"]
    assert changes(TO_OURS, later, TO_OURS) == [f"-D DOCKER-USER {TO_OURS}"] * 2 + [f"-I DOCKER-USER 2 {TO_OURS}"]


@pytest.mark.parametrize("name", iptables._ISOLATION)
def test_dockers_bridges_are_asked_before_a_packet_goes_out(name: str) -> None:
    host = Host()
    host.put(Policy(bridge="br-1"))
    host.chains["filter", name] = []
    assert host.put(Policy(bridge="br-1"))
    out = host.chains["filter", iptables._OUT]
    assert [rule.rpartition("-j ")[2] for rule in out] == ["ACCEPT", "ACCEPT", name, "ACCEPT"]
    assert not host.put(Policy(bridge="br-1"))


def test_delete_where_nothing_is_does_nothing() -> None:
    assert Host().take("br-1") == ""
    docker = Host.with_chains({("filter", "DOCKER-USER"): (), ("filter", "FORWARD"): ("-j DOCKER-USER",)})
    assert docker.take("br-1") == ""


def test_a_chain_that_a_user_has_filled_or_uses_stays() -> None:
    def use(place: str, rule: str) -> Callable[[Host], None]:
        return lambda host: host.chains["filter", place].append(rule)

    for change in (use("DOCKER-USER", "-s 192.0.2.66/32 -j DROP"), use("FORWARD", "-i uplink -j DOCKER-USER")):
        host = Host()
        host.put(Policy(bridge="br-1"))
        change(host)
        host.take("br-1")
        assert "NETPLUGIN" not in str(host)
        assert ("filter", "DOCKER-USER") in host.chains


def test_rules_without_match_and_target_are_read() -> None:
    """``iptables -A FORWARD`` counts packets."""
    parsed = iptables.parse("*filter\n:FORWARD DROP [0:0]\n-A FORWARD\n-A FORWARD -j LOG\nCOMMIT\n")
    assert parsed["filter", "FORWARD"] == ["", "-j LOG"]


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", ["", "br+", "a b", 'a"b', "a'b", "a\nCOMMIT", "-x", "!x", "x" * 16, "é", "$(id)", "a\\", "a/b", "br-1\n"]
)
def test_names_that_would_mean_something_else_in_a_rule(name: str) -> None:
    for fields in ({"bridge": name}, {"bridge": "br-1", "trusted": (name,)}):
        with pytest.raises(InvalidRequest, match="cannot be the name of an interface in a firewall rule"):
            Policy(**fields)


@pytest.mark.parametrize("label", ["a b", 'a"', "a\n", "é", "x" * 65, "a/b"])
def test_labels_that_would_mean_something_else_in_a_comment(label: str) -> None:
    for fields in ({"network": label}, {"published": {label: ()}}):
        with pytest.raises(InvalidRequest, match="cannot be a label in a firewall rule"):
            Policy(bridge="br-1", **fields)


@pytest.mark.parametrize("address", ["fe80::1%eth0", "fe80::1%x -j ACCEPT\n-A INPUT -j ACCEPT", "::ffff:192.0.2.1"])
def test_addresses_that_would_mean_something_else_in_a_rule(address: str) -> None:
    bad: IPAddress = ip_address(address)
    strange = replace(port("[::]:80->[fd00:1::2]:80/tcp"), host_address=bad)
    inside = replace(strange, address=bad, host_address=ip_address("::"))
    for fields in ({"sources": (bad,)}, {"published": {"e": (strange,)}}, {"published": {"e": (inside,)}}):
        with pytest.raises(InvalidRequest):
            Policy(bridge="br-1", subnets=BOTH, **fields)


@pytest.mark.parametrize("bridge", ["OUT", "NETPLUGIN", "DOCKER-USER", "POSTROUTING", "br-0123456789ab", ".", "1"])
def test_bridges_that_have_the_name_of_a_chain(bridge: str) -> None:
    host, policy, other = Host(), Policy(bridge=bridge, subnets=BOTH), Policy(bridge="br-1", internal=True)
    host.put(other)
    host.put(policy)
    has(host, policy, 4)
    has(host, other, 4)
    assert not host.put(policy, other)
    host.take(bridge)
    has(host, other, 4)
    host.take("br-1")
    assert host.chains == Host().chains


def test_bridges_of_any_name_have_nft_tables_of_their_own() -> None:
    names = ["a@b", "a=b", "a.b", "a_b", "a-b", "a.40b", "a40b"]
    tables = "".join(nftables.text(Policy(bridge=name)) for name in names)
    assert len(nftables.parse(tables)) == len(names)


def test_a_policy_is_a_value() -> None:
    """Else a caller that fills the same dict again would find that nothing has changed."""
    ports = {"web": (port("0.0.0.0:8080->10.1.0.2:80/tcp"),)}
    policy = Policy(bridge="br-1", subnets=BOTH, published=ports)
    before = rules(policy, 4)
    ports["other"] = (port("0.0.0.0:8081->10.1.0.3:80/tcp"),)
    assert rules(policy, 4) == before


def test_nothing_is_longer_than_the_programs_take() -> None:
    """A comment has 128 bytes at most with nft, 255 with iptables; a chain's name 28."""
    longest = Policy(
        bridge="br-0123456789ab",
        network="n" * 40,
        subnets=BOTH,
        published={"e" * 40: (port("0.0.0.0:8080->10.1.0.2:80/tcp"),)},
    )
    comments = [part.split('"')[0] for part in nftables.text(longest).split('comment "')[1:]]
    assert max(map(len, comments)) <= 128
    host = Host()
    host.put(longest)
    assert max(len(name) for _, name in host.chains) <= 28
    assert max(len(part.split('"')[0]) for part in str(host).split('--comment "')[1:]) <= 255


def test_priorities_are_written_as_every_nft_prints_them() -> None:
    """Since 1.0.8 nft prints -100 as "dstnat" in the hook output as well; a number near none has no name anywhere."""
    [line] = [line for line in nftables.text(POLICIES["trusted"]).splitlines() if "hook output" in line]
    number = int(line.split("priority ")[1].split(";")[0])
    assert all(abs(number - named) > 10 for named in (-300, -150, -100, 0, 50, 100))
