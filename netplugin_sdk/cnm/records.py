"""The common part of networks, endpoints and sandboxes: the engine to imitate, and the file that keeps them."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from netplugin_sdk.cnm.registry import Known, Registry
from netplugin_sdk.database import Database
from netplugin_sdk.errors import DriverError
from netplugin_sdk.protocol import messages
from netplugin_sdk.protocol.options import from_text
from netplugin_sdk.values import IPAddress, IPInterface, IPNetwork

_log = logging.getLogger("netplugin_sdk")

NO_ADDRESSES = "null"
"""The IPAM driver without addresses."""

SPECIAL = ("host", "null")
"""Networks without addresses, of which there is one."""

MIGRATIONS = (
    "CREATE TABLE records (id TEXT PRIMARY KEY, kind TEXT NOT NULL, data BLOB NOT NULL) WITHOUT ROWID;",
    "DELETE FROM records;",  # of a version before the first release, with other fields
)


@dataclass(frozen=True)
class Engine:
    """How a version of the Docker Engine speaks to its plugins."""

    version: str
    checks_gateways: bool
    """``GwAllocCheck`` before a network is created, and whether IPv4 is enabled (≥ 28)."""
    tells_names: bool
    """An endpoint's name with ``RequestAddress`` (≥ 29)."""
    inspects_twice: bool
    """``EndpointOperInfo`` once more after a join (< 28)."""


ENGINES: Mapping[str, Engine] = {
    "20.10": Engine("20.10", checks_gateways=False, tells_names=False, inspects_twice=True),
    "26.1": Engine("26.1", checks_gateways=False, tells_names=False, inspects_twice=True),
    "28.5": Engine("28.5", checks_gateways=True, tells_names=False, inspects_twice=False),
    "29": Engine("29", checks_gateways=True, tells_names=True, inspects_twice=False),
}


class Subnet(msgspec.Struct, frozen=True, kw_only=True):
    """A subnet as ``docker network create`` gives it; the IPAM driver chooses where a field is None.

    `range` is ``--ip-range``, `auxiliary` is ``--aux-address``.
    """

    version: int
    """4 or 6."""
    network: IPNetwork | None = None
    range: IPNetwork | None = None
    gateway: IPAddress | None = None
    auxiliary: Mapping[str, IPAddress] = {}

    @classmethod
    def parse(cls, network: str, *, range: str = "", gateway: str = "", auxiliary: Mapping[str, str] = {}) -> Subnet:
        """Of texts. Raises ValueError."""
        subnet = ip_network(network)
        return cls(
            version=subnet.version,
            network=subnet,
            range=ip_network(range) if range else None,
            gateway=ip_address(gateway) if gateway else None,
            auxiliary={name: ip_address(address) for name, address in auxiliary.items()},
        )


class Pool(msgspec.Struct):
    """A pool that a network has."""

    id: str
    network: IPNetwork
    version: int
    subnet: Subnet
    """As it was asked for."""
    gateway: IPInterface | None = None
    auxiliary: dict[str, IPInterface] = {}

    def to_wire(self, space: str) -> dict[str, Any]:
        """As in ``IPv4Data`` of ``CreateNetwork``."""
        wire: dict[str, Any] = {"AddressSpace": space, "Pool": self.network}
        if self.gateway is not None:
            wire["Gateway"] = self.gateway
        if self.auxiliary:
            wire["AuxAddresses"] = self.auxiliary
        return wire


@dataclass(frozen=True)
class Host:
    """The parts that the networks and sandboxes of one controller share."""

    engine: Engine
    folder: Path
    registry: Registry
    database: Database
    lock: threading.Lock = field(default_factory=threading.Lock)

    def save(self, record: Record) -> None:
        """Write a record down."""
        values = (record.id, type(record).__name__, messages.encode(record.saved()))
        with self.lock:
            self.database.write("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", values)

    def forget(self, record: Record) -> None:
        """Delete a record from the file."""
        with self.lock:
            self.database.write("DELETE FROM records WHERE id = ?", (record.id,))


class Record:
    """A network, an endpoint or a sandbox: an id and a name."""

    def __init__(self, name: str, id_: str | None = None) -> None:
        self.id = id_ or secrets.token_hex(32)
        self.name = name

    def saved(self) -> msgspec.Struct:
        """The part of it that is on disk."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.id[:12]}>"


SavedT = TypeVar("SavedT", bound=msgspec.Struct)


def read(kind: type[SavedT], data: bytes) -> SavedT:
    """The value that `Record.saved` wrote."""
    return msgspec.json.decode(data, type=kind, dec_hook=from_text)


def attempt(driver: Known, method: str, request: Mapping[str, Any]) -> None:
    """Make a call that an engine only logs if it fails."""
    try:
        driver.call(method, request)
    except DriverError as error:
        _log.warning("%s", error)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Put `what` before the text of a `DriverError`."""
    try:
        yield
    except DriverError as error:
        raise type(error)(f"{what}: {error}") from error
