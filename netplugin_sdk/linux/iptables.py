"""Rules written with iptables and ip6tables.

Their place. Docker sets FORWARD's policy to DROP, so ACCEPTs are needed in that very table; and Docker's later chains
accept all packets that leave Docker's own bridges, so our DROPs must come before them. The one place before them that
Docker does not change is the chain DOCKER-USER, the first jump in FORWARD: when the engine starts it creates
the chain if there is none, keeps what is in it, and moves its jump to the top. So that chain is created here too if
the plugin is first, and the order of the starts does not matter. In it a single jump leads to the chain NETPLUGIN:
after the user's rules, which therefore win, and before the plain RETURN that Engine 20.10 puts at the end.

    filter  FORWARD → DOCKER-USER: the user's rules → NETPLUGIN: -o br-2 → NETPLUGIN-br-2: Place.INTO of br-2
                                                                 -o br-1 → NETPLUGIN-br-1: Place.INTO of br-1
                                                                 -i br-1 → NETPLUGIN_OUT: Docker's own bridges, ACCEPT
                                                                 -i br-2 → NETPLUGIN_OUT
    nat     PREROUTING, OUTPUT: to the host's addresses → NETPLUGIN: Place.DNAT of all
            POSTROUTING: Place.SNAT of all

Rules for entering a bridge come before rules for leaving one: otherwise bridge 1's right to go out would let it into 2.
Packets that leave also pass the chain in which Docker isolates its own bridges from each other.

Each rule is found again by its comment, which names its bridge. A change is one iptables-restore per family, after one
iptables-save where the existing rules are not known; the kernel takes each table in it completely or not at all. Lines
are written as iptables-save prints them, so that they can be compared.
"""

from __future__ import annotations

import fcntl
import re
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from ipaddress import IPv6Address
from pathlib import Path
from typing import Literal, TypeAlias

from netplugin_sdk.errors import Unavailable
from netplugin_sdk.linux import together
from netplugin_sdk.linux.programs import run
from netplugin_sdk.linux.rules import GROUP, FirewallError, Place, Policy, Rule, Verdict, rules

_Table: TypeAlias = Literal["filter", "nat"]
_Chains: TypeAlias = "dict[tuple[_Table, str], list[str]]"
"""(table, chain) → its rules in order, each without the ``-A CHAIN`` before it."""

_USERS = "DOCKER-USER"
_OURS = "NETPLUGIN"
_OUT = "NETPLUGIN_OUT"  # no bridge's: their chains begin with "NETPLUGIN-"
_TRIES = 5  # of one change, while others change the rules
_LOCK_WAIT = "10"  # seconds for which iptables waits for its lock
_ISOLATION = ("DOCKER-BRIDGE", "DOCKER-ISOLATION-STAGE-2")
"""Chains in which Docker refuses what goes to its own bridges: engines ≥ 28, and before."""


def _mark(what: str) -> str:
    # As iptables-save prints it: with quotes, because of the colon.
    return f'-m comment --comment "netplugin_sdk:{what}"'


_LOCAL = "-m addrtype --dst-type LOCAL"
_FROM_USERS = f"{_mark(_OURS)} -j {_OURS}"
# Docker's own jump has no comment, so this comment also shows that the jump to DOCKER-USER is ours.
_FROM_FORWARD = f"{_mark(_USERS)} -j {_USERS}"
_FROM_PREROUTING = f"{_LOCAL} {_mark(_OURS)} -j {_OURS}"
_FROM_OUTPUT = {
    4: f"! -d 127.0.0.0/8 {_LOCAL} {_mark(_OURS)} -j {_OURS}",
    6: f"! -d ::1/128 {_LOCAL} {_mark(_OURS)} -j {_OURS}",
}
_BRIDGE_OF = re.compile(r'--comment "netplugin_sdk:([^" ]+)[" ]')


# --------------------------------------------------------------------------------------------------- text of rules


class Lines:
    """The rules of one bridge in the chains of one IP version."""

    def __init__(self) -> None:
        self.into: list[str] = []
        """All of ``NETPLUGIN-BRIDGE``."""
        self.first: list[str] = []
        """In ``NETPLUGIN``, before all rules for packets that leave a bridge."""
        self.last: list[str] = []
        """In ``NETPLUGIN``, after all rules for packets that enter a bridge."""
        self.dnat: list[str] = []
        """In ``NETPLUGIN`` of the table nat."""
        self.snat: list[str] = []
        """In ``POSTROUTING`` of the table nat."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lines) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def of(cls, policy: Policy, version: int) -> Lines:
        """The rules of a policy."""
        lines, chain = cls(), f"{_OURS}-{policy.bridge}"
        way = _interfaces(Rule(place=Place.INTO, verdict=Verdict.ACCEPT, outgoing=policy.interfaces))
        lines.first.append(" ".join((*way, _mark(policy.comment()), f"-j {chain}")))
        for rule in rules(policy, version):
            text = _line(rule, _mark(policy.comment(rule.endpoint)), version)
            match rule.place:
                case Place.INTO:
                    lines.into.append(text)
                case Place.OUT:
                    (lines.first if rule.verdict is Verdict.DROP else lines.last).append(text)
                case Place.DNAT:
                    lines.dnat.append(text)
                case Place.SNAT:
                    lines.snat.append(text)
        return lines

    @staticmethod
    def parse(chains: _Chains) -> dict[str, Lines]:
        """The existing rules, by bridge, including those of other processes."""
        found: dict[str, Lines] = {}

        def of(rule: str) -> Lines | None:
            match = _BRIDGE_OF.search(rule)
            return found.setdefault(match[1], Lines()) if match else None

        for rule in chains.get(("filter", _OURS), ()):
            if lines := of(rule):
                (lines.last if rule.endswith(_OUT) else lines.first).append(rule)
        for rule in chains.get(("nat", _OURS), ()):
            if lines := of(rule):
                lines.dnat.append(rule)
        for rule in chains.get(("nat", "POSTROUTING"), ()):
            if lines := of(rule):
                lines.snat.append(rule)
        prefix = f"{_OURS}-"
        for (table, chain), held in chains.items():
            if table == "filter" and chain.startswith(prefix):
                found.setdefault(chain.removeprefix(prefix), Lines()).into = held
        return found


def _line(rule: Rule, mark: str, version: int) -> str:
    full = 32 if version == 4 else 128
    parts = []
    if rule.source is not None:
        parts.append(f"-s {rule.source}")
    if rule.not_source is not None:
        parts.append(f"! -s {rule.not_source}/{full}")
    if rule.destination is not None:
        parts.append(f"-d {rule.destination}/{full}")
    if rule.icmp:
        protocol = ["-p icmp" if version == 4 else "-p ipv6-icmp"]
    elif rule.protocol is not None:
        protocol = [f"-p {rule.protocol} -m {rule.protocol} --dport {rule.port}"]
    else:
        protocol = []
    parts += _interfaces(rule, protocol)
    if rule.established:
        parts.append("-m conntrack --ctstate RELATED,ESTABLISHED")
    if rule.translated:
        parts.append("-m conntrack --ctstate DNAT")
    return " ".join((*parts, mark, f"-j {_target(rule)}"))


def _interfaces(rule: Rule, protocol: Sequence[str] = ()) -> list[str]:
    """The matches of interfaces and protocol, in order: groups of interfaces need a module and come last."""
    names, groups = [], []
    for flag, option, of in (
        ("-i", "--src-group", rule.incoming),
        ("! -i", "! --src-group", rule.not_incoming),
        ("-o", "--dst-group", rule.outgoing),
        ("! -o", "! --dst-group", rule.not_outgoing),
        ("", "--src-group", GROUP if rule.from_bridges else None),
    ):
        if isinstance(of, int):
            groups.append(f"{option} {of:#x}")
        elif of is not None:
            names.append(f"{flag} {of}")
    return [*names, *protocol, *(["-m devgroup " + " ".join(groups)] if groups else [])]


def _target(rule: Rule) -> str:
    match rule.verdict:
        case Verdict.TO_OTHERS:
            return _OUT
        case Verdict.DNAT:
            assert isinstance(rule.to, tuple)
            address, port = rule.to
            return f"DNAT --to-destination {f'[{address}]' if isinstance(address, IPv6Address) else address}:{port}"
        case Verdict.SNAT:
            return f"SNAT --to-source {rule.to}"
        case _:
            return rule.verdict.name


# ------------------------------------------------------------------------------------------------------- changes


def edit(bridge: str, old: Lines, new: Lines | None) -> dict[_Table, list[str]]:
    """The lines of iptables-restore that turn the `old` rules of one bridge into the `new` ones; None is no rules."""
    chain = f"{_OURS}-{bridge}"
    wanted = new or Lines()
    # First the content of the chain, then the jump to it; removal goes the other way round.
    filter_ = [] if new is None else rewrite(chain, old.into, wanted.into)
    filter_ += [f"-D {_OURS} {rule}" for rule in (*old.first, *old.last) if rule not in wanted.first + wanted.last]
    filter_ += [f"-I {_OURS} 1 {rule}" for rule in reversed(wanted.first) if rule not in old.first]
    filter_ += [f"-A {_OURS} {rule}" for rule in wanted.last if rule not in old.last]
    if new is None and (old.into or old.first):
        filter_ += [f"-F {chain}", f"-X {chain}"]
    nat = []
    for name, before, after in ((_OURS, old.dnat, wanted.dnat), ("POSTROUTING", old.snat, wanted.snat)):
        nat += [f"-D {name} {rule}" for rule in before if rule not in after]
        nat += [f"-A {name} {rule}" for rule in after if rule not in before]
    return {"filter": filter_, "nat": nat}


def rewrite(chain: str, old: list[str], new: list[str]) -> list[str]:
    """The lines that turn one of our own chains from `old` to `new`, without touching rules that stay.

    iptables over nftables waits 14 ms wherever it has removed a rule.
    """
    kept = [rule for rule in old if rule in new]
    if not kept or kept != [rule for rule in new if rule in old] or len(set(old)) != len(old):
        # -N, where there is none, would not empty one that a crash left
        return [] if old == new else [f":{chain} - [0:0]", *(f"-A {chain} {rule}" for rule in new)]
    removed = [f"-D {chain} {rule}" for rule in old if rule not in new]
    return removed + [f"-I {chain} {i} {rule}" for i, rule in enumerate(new, 1) if rule not in old]


def hook(chains: _Chains, version: int) -> dict[_Table, list[str]]:
    """The lines that add the missing ones of the chains and jumps that all bridges share.

    They also move our jump behind rules that the user has added since.
    """
    # -N, not ":NAME", which would empty a chain that Docker has made since.
    filter_ = [f"-N {name}" for name in (_USERS, _OURS) if ("filter", name) not in chains]
    if not {f"-j {_USERS}", _FROM_FORWARD} & set(chains.get(("filter", "FORWARD"), ())):
        filter_ += [f"-I FORWARD 1 {_FROM_FORWARD}"]
    filter_ += _jump_after_users(chains.get(("filter", _USERS), []))
    isolation = next((f"{_mark(_OUT)} -j {name}" for name in _ISOLATION if ("filter", name) in chains), None)
    out = [
        f"-m conntrack --ctstate RELATED,ESTABLISHED {_mark(_OUT)} -j ACCEPT",
        f"-m conntrack --ctstate DNAT {_mark(_OUT)} -j ACCEPT",  # a port that Docker published
        *([isolation] if isolation else []),
        f"{_mark(_OUT)} -j ACCEPT",
    ]
    filter_ += rewrite(_OUT, chains.get(("filter", _OUT), []), out)
    nat = [] if ("nat", _OURS) in chains else [f"-N {_OURS}"]
    for chain, jump in (("PREROUTING", _FROM_PREROUTING), ("OUTPUT", _FROM_OUTPUT[version])):
        if jump not in chains.get(("nat", chain), ()):
            nat += [f"-A {chain} {jump}"]
    return {"filter": filter_, "nat": nat}


def _jump_after_users(users: list[str]) -> list[str]:
    """Changes to DOCKER-USER after which it has our jump once, behind all rules that a packet can reach."""
    others = [rule for rule in users if rule != _FROM_USERS]
    place = others.index("-j RETURN") if "-j RETURN" in others else len(others)
    if users == [*others[:place], _FROM_USERS, *others[place:]]:
        return []
    removals = [f"-D {_USERS} {_FROM_USERS}"] * (len(users) - len(others))
    return [*removals, f"-I {_USERS} {place + 1} {_FROM_USERS}"]


def unhook(chains: _Chains, version: int) -> dict[_Table, list[str]]:
    """The lines that remove the shared chains and jumps, after the lines that remove the last bridge.

    They remove DOCKER-USER only if it was made here and nobody uses it.
    """
    users, forward = (chains.get(("filter", name), []) for name in (_USERS, "FORWARD"))
    filter_ = [f"-D {_USERS} {_FROM_USERS}"] * users.count(_FROM_USERS)
    if ("filter", _OURS) in chains:
        filter_ += [f"-X {_OURS}"]
    if ("filter", _OUT) in chains:
        filter_ += [f"-F {_OUT}", f"-X {_OUT}"]
    filter_ += [f"-D FORWARD {_FROM_FORWARD}"] * forward.count(_FROM_FORWARD)
    if _FROM_FORWARD in forward and set(users) <= {_FROM_USERS} and not _used_by_others(chains):
        filter_ += [f"-X {_USERS}"]
    nat = []
    for chain, jump in (("PREROUTING", _FROM_PREROUTING), ("OUTPUT", _FROM_OUTPUT[version])):
        nat += [f"-D {chain} {jump}"] * chains.get(("nat", chain), []).count(jump)
    if ("nat", _OURS) in chains:
        nat += [f"-X {_OURS}"]
    return {"filter": filter_, "nat": nat}


def _used_by_others(chains: _Chains) -> bool:
    ways = (f"-j {_USERS}", f"-g {_USERS}")
    return any(rule.endswith(ways) and rule != _FROM_FORWARD for chain in chains.values() for rule in chain)


def parse(saved: str) -> _Chains:
    """The chains that iptables-save printed."""
    chains: _Chains = {}
    table: _Table = "filter"
    for line in saved.split("\n"):
        if line.startswith("*"):
            table = line[1:]  # type: ignore[assignment]
        elif line.startswith(":"):
            chains[table, line[1:].split()[0]] = []
        elif line.startswith("-A "):
            chain, _, rule = line[3:].partition(" ")
            chains[table, chain].append(rule)
    return chains


def text(*changes: Mapping[_Table, list[str]]) -> str:
    """The input of iptables-restore for all these changes; empty if there are none."""
    found = ""
    for table in ("filter", "nat"):
        if lines := [line for change in changes for line in change.get(table, ())]:
            found += "\n".join((f"*{table}", *lines, "COMMIT\n"))
    return found


# ------------------------------------------------------------------------------------------------------- programs


def set_policy(version: int) -> None:
    """Set the policy of FORWARD to DROP."""
    _run(deque(), "iptables" if version == 4 else "ip6tables", "-w", _LOCK_WAIT, "-P", "FORWARD", "DROP")


class Backend:
    """Our rules in the firewall, in both address families. Used by one thread."""

    def __init__(self) -> None:
        self.pids: deque[int] = deque(maxlen=64)
        said = _run(self.pids, "iptables", "--version")
        self.announced = "nf_tables" in said  # changes by the legacy one are not announced
        self._families = [_Family(version, self.pids) for version in (4, 6)]

    def forget(self) -> None:
        """Read the rules again before the next change: another program may have changed ours."""
        for family in self._families:
            family.known = None

    def apply(self, policies: Mapping[str, Policy | None]) -> bool:
        """Put these policies in force; None removes the rules of a bridge. Returns whether anything was changed."""
        if not self.announced:
            self.forget()
        # A lock against other processes of this SDK, from reading to writing: rules belong to a network namespace,
        # and its file is one inode for all processes in it.
        with Path("/proc/thread-self/ns/net").open("rb") as namespace:
            fcntl.flock(namespace, fcntl.LOCK_EX)
            return any(together(*(partial(family.apply, policies) for family in self._families)))


class _Family:
    """One address family."""

    def __init__(self, version: int, pids: deque[int]) -> None:
        self._version = version
        self._command = "iptables" if version == 4 else "ip6tables"
        self._pids = pids
        self._own: set[str] = set()  # bridges of this process
        self.known: dict[str, Lines] | None = None
        """The rules of each bridge, of all processes; None if they are not known."""

    def apply(self, policies: Mapping[str, Policy | None]) -> bool:
        """As `Backend.apply`."""
        wanted = {
            bridge: Lines.of(policy, self._version) if policy and self._version in policy.versions else None
            for bridge, policy in policies.items()
        }
        removes = not any(wanted.values())
        if removes and self.known is not None and not self.known.keys() & wanted.keys():
            return False
        try:
            return self._quick(wanted) or self._slow(wanted)
        except (FirewallError, Unavailable):
            self.known = None
            if removes and None not in policies.values():
                return False  # networks of the other family only, on a host that may lack this one
            raise

    def _quick(self, wanted: Mapping[str, Lines | None]) -> bool:
        """Change the rules without reading them. False if that is not possible."""
        known = self.known
        # Only if we have a bridge before and after: then the shared chains stay.
        if known is None or not self._own or not (self._own - wanted.keys() or any(wanted.values())):
            return False
        try:
            self._restore(text(*(edit(bridge, known.get(bridge, Lines()), new) for bridge, new in wanted.items())))
        except FirewallError:
            return False
        self._note(known, wanted)
        return True

    def _slow(self, wanted: Mapping[str, Lines | None]) -> bool:
        """Read the rules, and change them. False if nothing had to be changed."""
        known, change = self._look(wanted)
        changed = bool(change)
        failures = 0
        while change:
            try:
                self._restore(change)
                break
            except FirewallError:
                # Docker or the user may have changed the rules after they were read. And iptables over nftables may
                # fail when any program commits any change at the same moment.
                failures += 1
                if failures == _TRIES:
                    raise
                known, change = self._look(wanted)
        self._note(known, wanted)
        return changed

    def _look(self, wanted: Mapping[str, Lines | None]) -> tuple[dict[str, Lines], str]:
        """The existing rules, and the input of iptables-restore that changes them; empty if they are as wanted."""
        chains = parse(_run(self._pids, f"{self._command}-save"))
        known = Lines.parse(chains)
        edits = [edit(bridge, known.get(bridge, Lines()), new) for bridge, new in wanted.items()]
        if known.keys() - wanted.keys() or any(wanted.values()):
            return known, text(hook(chains, self._version), *edits)
        return known, text(*edits, unhook(chains, self._version))

    def _note(self, known: dict[str, Lines], wanted: Mapping[str, Lines | None]) -> None:
        for bridge, lines in wanted.items():
            if lines is None:
                known.pop(bridge, None)
                self._own.discard(bridge)
            else:
                known[bridge] = lines
                self._own.add(bridge)
        self.known = known

    def _restore(self, change: str) -> None:
        if change:
            # 10 s for Docker, or another holder of the lock of legacy iptables.
            _run(self._pids, f"{self._command}-restore", "--noflush", "-w", _LOCK_WAIT, stdin=change)


def _run(pids: deque[int], *argv: str, stdin: str = "") -> str:
    status, output, errors = run(pids, "iptables", *argv, stdin=stdin)
    if status:
        said = " ".join(line for line in errors.splitlines() if not line.startswith("Try `"))
        raise FirewallError(f"firewall: {said or f'{argv[0]}: status {status}'}")
    return output
