"""Which promise each write to the disk carries: SQLite is asked, at the moment of the write, what it would sync.

In its log (WAL), FULL syncs each transaction: the row survives a power cut, with all rows before it. NORMAL syncs only
when the log goes into the file: the row survives the end of the process, and the file stays sound. OFF promises
nothing. https://www.sqlite.org/pragma.html#pragma_synchronous
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import Any, TypeVar

import pytest

from netplugin_sdk import Network, Plugin, Scope
from netplugin_sdk.ipam import PoolIpamDriver
from netplugin_sdk.values import UsedPool

from .lab import ENDPOINT, Docker, Everything, create_endpoint, create_network, joining, of, publishing

RecordT = TypeVar("RecordT")

KILL, POWER_CUT = "survives a kill", "survives a power cut"
PROMISES = {0: "nothing", 1: KILL, 2: POWER_CUT, 3: POWER_CUT}
"""By what ``PRAGMA synchronous`` answers."""

WRITE = re.compile(r"(INSERT|UPDATE|DELETE)(?: OR REPLACE)?(?: INTO| FROM)? (\w+)")


class Witness(sqlite3.Connection):
    """Notes what each write will survive."""

    written: list[tuple[str, str]]

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        if write := WRITE.match(statement):
            assert self.ask("journal_mode") == "wal", "elsewhere the levels mean something else"
            self.written.append((" ".join(write.groups()), PROMISES[self.ask("synchronous")]))
        return super().execute(statement, *values)

    def ask(self, pragma: str) -> Any:
        return super().execute(f"PRAGMA {pragma}").fetchone()[0]


@dataclass
class Data:
    number: int


class Attaching(Everything):
    """Attaches something to the network that it makes."""

    scope = Scope.GLOBAL

    def create_network(self, network: Network[Any]) -> None:
        network.attach(Data(1))


def node(address: str, *, this: bool = False) -> dict[str, Any]:
    return {"DiscoveryType": 1, "DiscoveryData": {"Address": address, "BindAddress": address, "Self": this}}


POOL = "LocalDefault/10.1.0.0/24"
REQUEST_ADDRESS = {"PoolID": POOL, "Address": "10.1.0.9", "Options": {}}
RELEASE_ADDRESS = {"PoolID": POOL, "Address": "10.1.0.9"}

# Networks and pools outlive a power cut, and so does what a swarm's networks are allocated. Endpoints and addresses
# end with the containers that it kills, nodes of the swarm are told again. What is half done need not survive it:
# the write that completes it syncs all that is before it in the log.
PROMISED: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("NetworkDriver.AllocateNetwork", of(), [("INSERT allocations", POWER_CUT)]),
    (
        "NetworkDriver.CreateNetwork",
        create_network(),
        [("INSERT networks", KILL), ("UPDATE networks", KILL), ("UPDATE networks", POWER_CUT)],
    ),
    ("NetworkDriver.CreateEndpoint", create_endpoint(), [("INSERT endpoints", KILL), ("UPDATE endpoints", KILL)]),
    ("NetworkDriver.Join", joining(), [("INSERT joins", KILL)]),
    ("NetworkDriver.ProgramExternalConnectivity", publishing(), [("UPDATE endpoints", KILL)] * 2),
    ("network.attach", {}, [("UPDATE networks", POWER_CUT)]),
    ("endpoint.attach", {}, [("UPDATE endpoints", KILL)]),
    ("NetworkDriver.RevokeExternalConnectivity", of(endpoint=ENDPOINT), [("UPDATE endpoints", KILL)] * 2),
    (
        "NetworkDriver.Leave",
        of(endpoint=ENDPOINT),
        [("UPDATE endpoints", KILL), ("DELETE joins", KILL), ("UPDATE endpoints", KILL)],
    ),
    ("NetworkDriver.DeleteEndpoint", of(endpoint=ENDPOINT), [("UPDATE endpoints", KILL), ("DELETE endpoints", KILL)]),
    ("NetworkDriver.DeleteNetwork", of(), [("UPDATE networks", KILL), ("DELETE networks", POWER_CUT)]),
    ("NetworkDriver.FreeNetwork", of(), [("DELETE allocations", POWER_CUT)]),
    ("NetworkDriver.DiscoverNew", node("192.0.2.1", this=True), [("INSERT nodes", KILL)]),
    (  # this node's address has changed
        "NetworkDriver.DiscoverNew",
        node("192.0.2.2", this=True),
        [("INSERT nodes", KILL), ("DELETE nodes", KILL)],
    ),
    (
        "IpamDriver.RequestPool",
        {"AddressSpace": "LocalDefault", "Pool": "10.1.0.0/24"},
        [("INSERT networks", KILL), ("INSERT pools", POWER_CUT)],
    ),
    ("engine_has", {}, [("UPDATE pools", KILL)]),
    ("IpamDriver.RequestAddress", REQUEST_ADDRESS, [("INSERT addresses", KILL)]),
    ("IpamDriver.ReleaseAddress", RELEASE_ADDRESS, [("DELETE addresses", KILL)]),
    (  # without its pool the rest is removed at the next start
        "IpamDriver.ReleasePool",
        {"PoolID": POOL},
        [("DELETE pools", POWER_CUT), ("DELETE addresses", KILL), ("DELETE networks", KILL)],
    ),
]


def test_each_write_promises_what_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, str]] = []
    monkeypatch.setattr(Witness, "written", written, raising=False)
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Witness))
    driver, pools = Attaching(), PoolIpamDriver(local=())
    with Plugin(driver, pools, state=tmp_path) as plugin:
        docker = Docker(plugin)
        others: dict[str, Callable[[], object]] = {
            "network.attach": lambda: only(driver.networks).attach(Data(2)),
            "endpoint.attach": lambda: only(only(driver.networks).endpoints).attach(Data(2)),
            "engine_has": lambda: pools.engine_has("engine", [UsedPool(ip_network("10.1.0.0/24"), None, frozenset())]),
        }
        assert {promise for _, promise in written} == {KILL}, "what a start cleans up, it can clean up again"
        for call, request, promised in PROMISED:
            written.clear()
            if call in others:
                others[call]()
            else:
                docker(call, request)
            assert written == promised, call
    writes = {write for _, _, promised in PROMISED for write, _ in promised}
    assert {f"{verb} {table}" for table in tables(tmp_path) for verb in ("INSERT", "DELETE")} <= writes


def tables(folder: Path) -> set[str]:
    """All that the files in the folder have."""
    found: set[str] = set()
    for file in folder.glob("*.db"):
        with closing(sqlite3.connect(file)) as database:
            found |= {name for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    return found


def only(records: Mapping[str, RecordT]) -> RecordT:
    (record,) = records.values()
    return record
