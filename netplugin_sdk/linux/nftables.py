"""Rules written with nft.

Docker's own nftables mode (engines ≥ 29) drops nothing by policy, and its own tables protect Docker's bridges; a packet
must be accepted by every table. So each bridge has a table of its own, for packets that enter or leave this bridge and
no others:

    table inet netplugin-br-1
        forward      → into       Place.INTO
                     → out        Place.OUT
        prerouting   → publish    Place.DNAT
        output       → publish
        postrouting               Place.SNAT

A change replaces the table, in one transaction. The text is as ``nft list`` prints it, so that it can be compared.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from ipaddress import IPv6Address

from netplugin_sdk.errors import Unavailable
from netplugin_sdk.linux.programs import run
from netplugin_sdk.linux.rules import GROUP, FirewallError, Place, Policy, Rule, Verdict, rules

_PREFIX = "netplugin-"


class Backend:
    """Our rules in the firewall. Used by one thread."""

    announced = True

    def __init__(self) -> None:
        self.pids: deque[int] = deque(maxlen=64)
        self._known: dict[str, str] | None = None

    def forget(self) -> None:
        """Read the rules again before the next change: another program may have changed ours."""
        self._known = None

    def apply(self, policies: Mapping[str, Policy | None]) -> bool:
        """Put these policies in force; None removes the rules of a bridge. Returns whether anything was changed."""
        if self._known is None:
            self._known = parse(_run(self.pids, "list", "ruleset", "inet"))
        known = self._known
        wanted = {_table(bridge): None if policy is None else text(policy) for bridge, policy in policies.items()}
        changes = {name: table for name, table in wanted.items() if known.get(name) != table}
        if not changes:
            return False
        # nft refuses to delete a table that does not exist, but adds one that does: so add first, then delete.
        lines = [f"add table inet {name}\ndelete table inet {name}\n{table or ''}" for name, table in changes.items()]
        _run(self.pids, "-f", "-", stdin="\n".join(lines))
        for name, table in changes.items():
            if table is None:
                known.pop(name, None)
            else:
                known[name] = table
        return True


def used_by_docker() -> bool:
    """Whether Docker writes its rules with nft here."""
    try:
        return "table ip docker-bridges" in _run(deque(), "list", "tables")
    except (Unavailable, FirewallError):
        return False


def parse(listed: str) -> dict[str, str]:
    """Our tables by name, from the output of ``nft list ruleset``."""
    found = re.findall(rf"^table inet ({_PREFIX}\S+) {{\n.*?^}}\n", listed, re.MULTILINE | re.DOTALL)
    blocks = re.findall(rf"^table inet {_PREFIX}\S+ {{\n.*?^}}\n", listed, re.MULTILINE | re.DOTALL)
    return dict(zip(found, blocks, strict=True))


def text(policy: Policy) -> str:
    """The table of one bridge, as ``nft list table`` prints it."""
    lines: dict[Place, list[str]] = {place: [] for place in Place}
    for version in policy.versions:
        for rule in rules(policy, version):
            lines[rule.place].append(_line(rule, policy, version))
    own = policy.interfaces
    chains = {
        "forward": [
            "type filter hook forward priority filter - 5; policy accept;",
            f"{_interface('oif', '', own)} jump into",
            f"{_interface('iif', '', own)} jump out",
        ],
        "into": lines[Place.INTO],
        "out": lines[Place.OUT],
    }
    if lines[Place.DNAT]:
        chains |= {
            "prerouting": [
                "type nat hook prerouting priority dstnat; policy accept;",
                "fib daddr type local jump publish",
            ],
            "output": [
                # A number, not a name: some versions of nft print "dstnat" here, and some -100.
                "type nat hook output priority -80; policy accept;",
                "ip daddr 127.0.0.0/8 return",
                "ip6 daddr ::1 return",
                "fib daddr type local jump publish",
            ],
            "publish": lines[Place.DNAT],
        }
    if lines[Place.SNAT]:
        chains["postrouting"] = ["type nat hook postrouting priority srcnat; policy accept;", *lines[Place.SNAT]]
    blocks = (
        f"\tchain {name} {{\n" + "".join(f"\t\t{line}\n" for line in content) + "\t}\n"
        for name, content in chains.items()
    )
    return f"table inet {_table(policy.bridge)} {{\n" + "\n".join(blocks) + "}\n"


def _table(bridge: str) -> str:
    # "@" and "=" may be in a bridge's name and not in a table's, "/" the other way round.
    return _PREFIX + re.sub(r"[@=]", lambda match: f"/{ord(match[0]):x}", bridge)


def _line(rule: Rule, policy: Policy, version: int) -> str:
    ip = "ip" if version == 4 else "ip6"
    parts = []
    for direction, operator, of in (
        ("iif", "", rule.incoming),
        ("iif", "!= ", rule.not_incoming),
        ("oif", "", rule.outgoing),
        ("oif", "!= ", rule.not_outgoing),
    ):
        if of is not None:
            parts.append(_interface(direction, operator, of))
    if rule.from_bridges:
        parts.append(f"iifgroup {GROUP}")
    if rule.source is not None:
        parts.append(f"{ip} saddr {rule.source}")
    if rule.not_source is not None:
        parts.append(f"{ip} saddr != {rule.not_source}")
    if rule.destination is not None:
        parts.append(f"{ip} daddr {rule.destination}")
    if rule.icmp:
        parts.append("meta l4proto icmp" if version == 4 else "meta l4proto ipv6-icmp")
    if rule.protocol is not None:
        parts.append(f"{rule.protocol} dport {rule.port}")
    if rule.established:
        parts.append("ct state established,related")
    if rule.translated:
        parts.append("ct status dnat")
    if not (rule.source or rule.not_source or rule.destination or rule.icmp):  # these imply the version
        parts.insert(0, f"meta nfproto ipv{version}")
    return " ".join((*parts, _verdict(rule, ip), f'comment "netplugin_sdk:{policy.comment(rule.endpoint)}"'))


def _interface(direction: str, operator: str, of: str | int) -> str:
    return f'{direction}name {operator}"{of}"' if isinstance(of, str) else f"{direction}group {operator}{of}"


def _verdict(rule: Rule, ip: str) -> str:
    match rule.verdict:
        case Verdict.TO_OTHERS:
            return "accept"  # Docker's tables check it as well
        case Verdict.DNAT:
            assert isinstance(rule.to, tuple)
            address, port = rule.to
            return f"dnat {ip} to {f'[{address}]' if isinstance(address, IPv6Address) else address}:{port}"
        case Verdict.SNAT:
            return f"snat {ip} to {rule.to}"
        case _:
            return rule.verdict.name.lower()


def _run(pids: deque[int], *arguments: str, stdin: str = "") -> str:
    status, output, errors = run(pids, "nftables", "nft", *arguments, stdin=stdin)
    if status:
        # nft repeats each faulty line, with marks below it.
        said = "; ".join(line.partition("Error: ")[2] for line in errors.splitlines() if "Error: " in line) or errors
        raise FirewallError(f"firewall: {said.strip() or f'nft: status {status}'}")
    return output
