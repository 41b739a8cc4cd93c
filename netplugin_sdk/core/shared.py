"""The parts that requests, repairs and the swarm's events of one network driver share."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic

from netplugin_sdk.core.repairs import Repairs
from netplugin_sdk.core.store import Store
from netplugin_sdk.core.timings import Timings
from netplugin_sdk.core.workers import Locks
from netplugin_sdk.driver import NetworkDriver
from netplugin_sdk.network import Network, OptionsT


@dataclass(frozen=True)
class Shared(Generic[OptionsT]):
    """The driver, the methods that it defines, the store, a lock for each network, the repairs, and the timings."""

    driver: NetworkDriver[OptionsT]
    defined: frozenset[str]
    store: Store[OptionsT]
    locks: Locks
    repairs: Repairs
    timings: Timings

    def locked(self, network: Network[OptionsT]) -> AbstractContextManager[None]:
        """Hold off calls on the network during a repair. Raises `Unavailable` where a call holds it for long."""
        return self.locks.hold(network.id, self.timings.repair_lock)
