"""The state of the engine's host, as lines of text: run in its namespaces, once for each look.

Usage: ``snapshot.py [EXPECTED SECONDS]``. Prints JSON: ``lines``, and ``plugin`` (descriptors and threads of myplugin).
With EXPECTED, a file with earlier output, it looks again until the lines are equal, for at most SECONDS.

It leaves out facts that change by themselves: counters, timers, carrier, ids in names of the engine's own sockets.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

STATE = Path("/var/lib/netplugin")
PROGRAMS = {
    "link": ["ip", "-json", "-details", "address"],
    "route": ["ip", "route", "show", "table", "all"],
    "rule": ["ip", "rule"],
    "rule6": ["ip", "-6", "rule"],
    "neighbour": ["ip", "neigh", "show", "nud", "permanent"],
    "iptables": ["iptables-save"],
    "ip6tables": ["ip6tables-save"],
    "nft": ["nft", "list", "tables"],
}
OF_LINKS = ("ifname", "mtu", "address", "group", "master", "promiscuity", "txqlen", "ifalias")
OF_BRIDGES = ("stp_state", "vlan_filtering", "mcast_snooping", "nf_call_iptables", "nf_call_ip6tables")
IPTABLES = re.compile(r"table ip6? (filter|nat|mangle|raw|security)")
SYSCTLS = ("ipv4", "ipv6", "bridge", "netfilter")
# These count, or belong to the engine's restarts.
PASSING = re.compile(r"nf_conntrack_(count|buckets)|tcp_mem|udp_mem|neigh/default/gc")


def snapshot() -> tuple[list[str], dict[str, int]]:
    running = {
        what: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for what, command in PROGRAMS.items()
    }
    # Before the programs end, which are none of the processes.
    own = {os.getpid(), *(process.pid for process in running.values())}
    processes, plugin = list_processes(own)
    said = {what: process.communicate()[0] for what, process in running.items()}
    found = [*links(said.pop("link")), *processes, *sockets(), *sysctls(), *state()]
    ordered: list[str] = []  # of rules it matters
    for what, text in said.items():
        table = ""
        for line in text.splitlines():
            table = f" {line[1:]}" if line.startswith("*") else table
            if kept := plain(what, line.strip()):
                (ordered if table else found).append(f"{what}{table} {kept}")
    return sorted(found) + ordered, plugin


def links(text: str) -> Iterator[str]:
    for link in json.loads(text):
        up = "up" if "UP" in link["flags"] else "down"
        kind = link.get("linkinfo", {})
        seen = [f"{key} {link[key]}" for key in OF_LINKS if key in link]
        seen += [f"{key} {kind['info_data'][key]}" for key in OF_BRIDGES if key in kind.get("info_data", {})]
        yield f"interface {' '.join((*seen, kind.get('info_kind', ''), up))}"
        for address in link["addr_info"]:
            yield f"address {link['ifname']} {address['local']}/{address['prefixlen']} {address['scope']}"


def plain(what: str, line: str) -> str:
    if what.startswith("ip"):
        # Not the built-in chains' names, which reading a table makes; nor Docker's jump to its user's chain, which it
        # removes and adds with every network, by two commands that race with those for another network.
        if not line.startswith(("-A", ":")) or line == "-A FORWARD -j DOCKER-USER":
            return ""
        line = re.sub(r" \[\d+:\d+\]$", "", line)
        return "" if re.fullmatch(r":[A-Z]+ ACCEPT", line) else line
    if what == "nft":
        return "" if IPTABLES.fullmatch(line) else line
    return re.sub(r" linkdown| dead| expires \w+| pref \w+", "", line)


def list_processes(own: set[int]) -> tuple[list[str], dict[str, int]]:
    found, plugin = [], {"processes": 0, "relays": 0, "descriptors": 0, "threads": 0}
    plugins: dict[str, str] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not entry.name.isdecimal() or int(entry.name) in own:
                continue
            status = (entry / "stat").read_text().rpartition(")")[2].split()
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            name = (entry / "comm").read_text().strip()
            if status[0] == "Z":
                found.append(f"process {name} defunct")
            elif words[1:3] == ["-m", "myplugin"]:
                plugins[entry.name] = status[1]
                plugin["descriptors"] = max(plugin["descriptors"], len(list((entry / "fd").iterdir())))
                plugin["threads"] = max(plugin["threads"], len(list((entry / "task").iterdir())))
            elif len(words) > 3 and words[3].endswith("/linux/relay.py"):
                plugin["relays"] += 1
            else:
                found.append(f"process {' '.join(words)[:200]!r}")
    # Not what is about to become another program.
    plugin["processes"] = sum(parent not in plugins for parent in plugins.values())
    return found, plugin


def sockets() -> Iterator[str]:
    for kind in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        for line in Path(f"/proc/self/net/{kind}").read_text().splitlines()[1:]:
            _, local, _, status, *_ = line.split()
            if status == "0A" or not kind.startswith("tcp"):
                yield f"socket {kind} {local}"
    for line in Path("/proc/self/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if int(words[3], 16) & 0x10000 and len(words) > 7:
            yield f"socket unix {re.sub('[0-9a-f]{12,}', 'ID', words[7])}"


def sysctls() -> Iterator[str]:
    for part in SYSCTLS:
        for folder, _, files in os.walk(f"/proc/sys/net/{part}"):
            for file in files:
                name = f"{folder}/{file}".removeprefix("/proc/sys/")
                with contextlib.suppress(OSError):  # those that can only be written, and what has gone
                    if not PASSING.search(name):
                        yield f"sysctl {name} {Path(folder, file).read_text().strip()}"


def state() -> Iterator[str]:
    for folder in STATE.iterdir() if STATE.is_dir() else ():
        with tempfile.TemporaryDirectory() as copy:
            for file in folder.iterdir():
                if file.name != "lock":
                    shutil.copy(file, copy)
            with contextlib.closing(sqlite3.connect(f"{copy}/state.db")) as db:
                for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                    for row in db.execute(f"SELECT * FROM {table}"):
                        yield f"row of {table} {str(row)[:400]}"


def main() -> None:
    expected = json.loads(Path(sys.argv[1]).read_text())["lines"] if len(sys.argv) > 1 else None
    until = time.monotonic() + (float(sys.argv[2]) if expected else 0)
    while True:
        lines, plugin = snapshot()
        if lines == expected or time.monotonic() > until:
            break
        time.sleep(0.05)
    json.dump({"lines": lines, "plugin": plugin}, sys.stdout)


if __name__ == "__main__":
    main()
