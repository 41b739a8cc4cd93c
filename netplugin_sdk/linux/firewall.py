"""Packet filtering and masquerading for a bridge that stands beside Docker's own, by iptables.

What it decides, per bridge: its ports may talk to each other and to the outside and get the answers; nothing from
outside may begin. `internal`: its ports may talk to each other, and that is all. (Not decided here: traffic from the
bridge to a network of Docker's own bridge driver counts as outbound.)

Where its rules stand. Docker sets FORWARD's policy to DROP, so ACCEPTs are needed in that very table; and Docker's
later chains accept whatever leaves Docker's own bridges, so our DROPs must come before them. The one place before
them that Docker leaves alone is the chain DOCKER-USER, the first jump in FORWARD: when the engine starts it creates
the chain if there is none, keeps what is in it, and moves its jump to the top. So that chain is created here too if
the plugin is first, and the order of the starts does not matter. In it a single jump leads to the chain NETPLUGIN:
after the user's rules, which therefore win, and before the plain RETURN that Engine 20.10 puts at the end.

    FORWARD → DOCKER-USER: the user's rules → NETPLUGIN: -o br-2 → NETPLUGIN-br-2: neighbours and answers, else DROP
                                                         -o br-1 → NETPLUGIN-br-1: …
                                                         -i br-1 ACCEPT
                                                         -i br-2 ACCEPT

What may enter a bridge is asked before what may leave one: otherwise bridge 1's right to go out would let it into 2.

Each rule has a comment that names its bridge, by which it is found again. A change is one iptables-save and one
iptables-restore for a family; each table in it is taken as a whole or not at all.
"""

from __future__ import annotations

import fcntl
import re
import subprocess
from collections.abc import Callable, Iterable
from functools import partial
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Literal, TypeAlias

from netplugin_sdk.errors import DriverError, InvalidRequest, Unavailable

_Subnet: TypeAlias = IPv4Network | IPv6Network
_Command: TypeAlias = Literal["iptables", "ip6tables"]
_Rules: TypeAlias = "dict[tuple[str, str], list[str]]"
"""(table, chain) → its rules in order, each without the ``-A CHAIN`` before it."""

_COMMANDS: dict[int, _Command] = {4: "iptables", 6: "ip6tables"}
_USERS = "DOCKER-USER"
_OURS = "NETPLUGIN"
_FROM_USERS = f'-m comment --comment "netplugin_sdk:{_OURS}" -j {_OURS}'
# Docker's own jump has no comment, so this one also tells who made the way to DOCKER-USER.
_FROM_FORWARD = f'-m comment --comment "netplugin_sdk:{_USERS}" -j {_USERS}'

# Tighter than the kernel: what would mean something else in a line of iptables-restore (quotes, a trailing "+",
# which is a wildcard) is not a name here. 15 bytes leave room in a chain's name, which has at most 28.
_BRIDGE = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.@=-]{0,14}")


class FirewallError(DriverError):
    """iptables refused: for which bridge, and its own words."""


def ensure_bridge(
    bridge: str, *, subnets: Iterable[_Subnet] = (), masquerade: bool = True, internal: bool = False
) -> None:
    """Let this bridge's ports reach each other and the outside; with `internal`, each other only.

    Concerns the address families of `subnets`; a bridge without subnets may carry both, so both are. With
    `masquerade`, what leaves a subnet by another interface gets that interface's address as its source. The bridge
    need not exist yet. Run again, it brings what it made before to what is asked now, and moves behind rules
    that the user has added since.

    Raises `FirewallError` if iptables refuses, `Unavailable` if it is not installed, `InvalidRequest` if the name
    cannot be written into a rule.
    """
    _check(bridge)
    nets = tuple(subnets)
    for version in sorted({net.version for net in nets} or _COMMANDS):
        sources = [net for net in nets if net.version == version and masquerade and not internal]
        plan = partial(_with_bridge, bridge=bridge, sources=sources, internal=internal)
        _change(_COMMANDS[version], bridge, plan)


def delete_bridge(bridge: str) -> None:
    """Remove all that `ensure_bridge` made for a bridge of this name, in both families; nothing there is no error.

    With the last bridge go the chains shared by all; DOCKER-USER only if it was made here, is empty, and Docker does
    not use it. Raises as `ensure_bridge` does.
    """
    _check(bridge)
    for command in _COMMANDS.values():
        _change(command, bridge, partial(_without_bridge, bridge=bridge))


def _with_bridge(saved: str, bridge: str, sources: Iterable[_Subnet], internal: bool) -> str:
    """From what iptables-save printed, the input for iptables-restore --noflush that makes it so; empty if it is so."""
    rules = _parse(saved)
    note, chain = _note(bridge), _chain(bridge)

    entering = [f"-i {bridge} {note} -j ACCEPT", f"{note} -j DROP"]
    first, last = [f"-o {bridge} {note} -j {chain}"], []
    if internal:
        first += [f"-i {bridge} ! -o {bridge} {note} -j DROP"]
    else:
        entering[1:1] = [f"-m conntrack --ctstate RELATED,ESTABLISHED {note} -j ACCEPT"]
        last += [f"-i {bridge} {note} -j ACCEPT"]
    leaving = [
        f"-s {net} ! -o {bridge} {note} -j MASQUERADE"
        for net in sources
        if net.prefixlen  # 0.0.0.0/0 is the null IPAM driver's "no subnet", and would masquerade the host's own
    ]

    # -N, not ":NAME", which would empty a chain that Docker made meanwhile; for the bridge's own that is what we want.
    # What is so already is not touched: iptables over nftables waits 16 ms wherever it has removed a rule.
    filter_ = [f"-N {name}" for name in (_USERS, _OURS) if ("filter", name) not in rules]
    if not {f"-j {_USERS}", _FROM_FORWARD} & set(rules.get(("filter", "FORWARD"), ())):
        filter_ += [f"-I FORWARD 1 {_FROM_FORWARD}"]
    filter_ += _jump_after_users(rules.get(("filter", _USERS), []))
    if rules.get(("filter", chain)) != entering:
        filter_ += [f":{chain} - [0:0]", *(f"-A {chain} {rule}" for rule in entering)]
    if (old := _noted(rules, "filter", _OURS, bridge)) != first + last:
        filter_ += [f"-D {_OURS} {rule}" for rule in old]
        filter_ += [f"-I {_OURS} 1 {rule}" for rule in reversed(first)]
        filter_ += [f"-A {_OURS} {rule}" for rule in last]
    nat = []
    if (old := _noted(rules, "nat", "POSTROUTING", bridge)) != leaving:
        nat += [f"-D POSTROUTING {rule}" for rule in old]
        nat += [f"-A POSTROUTING {rule}" for rule in leaving]
    return _text(filter=filter_, nat=nat)


def _without_bridge(saved: str, bridge: str) -> str:
    """As `_with_bridge`, to make it gone; empty if there is nothing to do."""
    rules = _parse(saved)
    chain = _chain(bridge)

    ours, users, forward = (rules.get(("filter", name), []) for name in (_OURS, _USERS, "FORWARD"))
    filter_ = [f"-D {_OURS} {rule}" for rule in _noted(rules, "filter", _OURS, bridge)]
    last = len(filter_) == len(ours)
    if ("filter", chain) in rules:
        filter_ += [f"-F {chain}", f"-X {chain}"]
    if filter_ and last:
        filter_ += [f"-D {_USERS} {_FROM_USERS}"] * users.count(_FROM_USERS)
        filter_ += [f"-X {_OURS}"] * (("filter", _OURS) in rules)
        filter_ += [f"-D FORWARD {_FROM_FORWARD}"] * forward.count(_FROM_FORWARD)
        if _FROM_FORWARD in forward and set(users) <= {_FROM_USERS} and not _used_by_others(rules):
            filter_ += [f"-X {_USERS}"]
    nat = [f"-D POSTROUTING {rule}" for rule in _noted(rules, "nat", "POSTROUTING", bridge)]
    return _text(filter=filter_, nat=nat)


def _used_by_others(rules: _Rules) -> bool:
    ways = (f"-j {_USERS}", f"-g {_USERS}")
    return any(rule.endswith(ways) and rule != _FROM_FORWARD for chain in rules.values() for rule in chain)


def _jump_after_users(users: list[str]) -> list[str]:
    """Changes to DOCKER-USER after which our jump stands once, behind all rules that a packet can get to."""
    others = [rule for rule in users if rule != _FROM_USERS]
    place = others.index("-j RETURN") if "-j RETURN" in others else len(others)
    if users == [*others[:place], _FROM_USERS, *others[place:]]:
        return []
    removals = [f"-D {_USERS} {_FROM_USERS}"] * (len(users) - len(others))
    return [*removals, f"-I {_USERS} {place + 1} {_FROM_USERS}"]


def _noted(rules: _Rules, table: str, chain: str, bridge: str) -> list[str]:
    note = _note(bridge)
    return [rule for rule in rules.get((table, chain), ()) if note in rule]


def _note(bridge: str) -> str:
    # As iptables-save prints it: with quotes, because of the colon. So "br-1" is never taken for "br-12".
    return f'-m comment --comment "netplugin_sdk:{bridge}"'


def _chain(bridge: str) -> str:
    return f"{_OURS}-{bridge}"


def _parse(saved: str) -> _Rules:
    rules: _Rules = {}
    table = ""
    for line in saved.split("\n"):
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":"):
            rules[table, line[1:].split()[0]] = []
        elif line.startswith("-A "):
            _, chain, rule = line.split(" ", 2)
            rules[table, chain].append(rule)
    return rules


def _text(**tables: list[str]) -> str:
    return "".join("\n".join((f"*{table}", *lines, "COMMIT\n")) for table, lines in tables.items() if lines)


def _change(command: _Command, bridge: str, plan: Callable[[str], str]) -> None:
    """Apply what `plan` makes of the present rules."""
    # No other bridge's change between the look and the change, neither by a thread nor by another plugin's process:
    # rules belong to a network namespace, and its own file is one inode for whoever is in it.
    with Path("/proc/thread-self/ns/net").open("rb") as namespace:
        fcntl.flock(namespace, fcntl.LOCK_EX)
        text = plan(_run(bridge, f"{command}-save"))
        while text:
            try:
                # 10 s for Docker, or whoever else holds the lock of legacy iptables.
                _run(bridge, f"{command}-restore", "--noflush", "-w", "10", stdin=text)
                return
            except FirewallError:
                # If Docker or the user changed the rules meanwhile, the plan was for others than these.
                before, text = text, plan(_run(bridge, f"{command}-save"))
                if text == before:
                    raise


def _run(bridge: str, *argv: str, stdin: str = "") -> str:
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            capture_output=True,
            check=False,
            encoding="utf-8",
            errors="surrogateescape",  # comments of other rules may hold any bytes
        )
    except FileNotFoundError as error:
        raise Unavailable(f"firewall of {bridge}: no {argv[0]} here: install the package iptables") from error
    if done.returncode:
        said = " ".join(line for line in done.stderr.splitlines() if not line.startswith("Try `"))
        raise FirewallError(f"firewall of {bridge}: {said or f'{argv[0]}: status {done.returncode}'}")
    return done.stdout


def _check(bridge: str) -> None:
    if not _BRIDGE.fullmatch(bridge):
        raise InvalidRequest(f"{bridge!r} cannot be the name of a bridge in a firewall rule")
