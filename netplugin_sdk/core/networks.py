"""The network half of a plugin: the rooms that serve a `NetworkDriver`, put together once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic

from netplugin_sdk.core.comparison import Comparison
from netplugin_sdk.core.lifecycle import NetworkLifecycle, Routes
from netplugin_sdk.core.recovery import Recovery
from netplugin_sdk.core.repairs import Repair, Repairs
from netplugin_sdk.core.shared import Shared
from netplugin_sdk.core.store import Store, StoredNetwork
from netplugin_sdk.core.swarm import Allocations, Peers
from netplugin_sdk.core.teardown import Teardown
from netplugin_sdk.core.timings import Timings
from netplugin_sdk.core.workers import Locks
from netplugin_sdk.driver import NetworkDriver
from netplugin_sdk.network import OptionsT
from netplugin_sdk.protocol.messages import Node
from netplugin_sdk.values import IPAddress


class Networks(Generic[OptionsT]):
    """A network driver with its store, requests and repairs; also the driver's view of them.

    Raises `Unavailable` if the state file in `folder` cannot be used.
    """

    def __init__(
        self,
        driver: NetworkDriver[OptionsT],
        defined: frozenset[str],
        folder: Path | None,
        docker: Path | None,
        timings: Timings,
    ) -> None:
        self._driver = driver
        self._folder = folder
        self._is_open = False
        self._store: Store[Any] = Store(folder, driver.options_type)
        self._repairs = Repairs()
        shared = Shared(driver, defined, self._store, Locks(timings.call_lock), self._repairs, timings)
        try:
            self._teardown = Teardown(shared)
            self._comparison = Comparison(shared, self._teardown, docker)
            self._recovery = Recovery(shared, self._teardown, self._comparison)
            self._peers = Peers(shared, self._recovery.request)
            self._allocations = Allocations(shared)
        except BaseException:
            self._store.close()
            raise
        lifecycle = NetworkLifecycle(shared, self._teardown, self._comparison, self._peers, self._allocations)
        self.routes: Routes = lifecycle.routes()
        """The methods that can be called, by name."""
        driver.bind(self)

    # ------------------------------------------------------------------------------------------ the driver's view

    @property
    def networks(self) -> Mapping[str, StoredNetwork[OptionsT]]:
        """All networks by id."""
        return self._store.networks

    @property
    def allocations(self) -> Mapping[str, Mapping[str, str]]:
        """The options that this manager allocated, by the network's id."""
        return self._allocations.current

    @property
    def this_node(self) -> Node | None:
        """This host as a node of the swarm."""
        return self._peers.this_node

    @property
    def peers(self) -> Mapping[IPAddress, Node]:
        """The other nodes of the swarm."""
        return self._peers.current

    # -------------------------------------------------------------------------------------------- the plugin's part

    @property
    def repairs(self) -> Mapping[Repair, int]:
        """How often each repair was done."""
        return self._repairs.counts

    def start(self) -> None:
        """Before the first call: open the driver, and restore its networks."""
        self._driver.open(self._folder)
        self._is_open = True
        self._recovery.start()

    def engine_starts(self) -> None:
        """``Plugin.Activate``: delete the endpoints that a killed engine has forgotten."""
        self._teardown.delete_vanished_endpoints()
        self._comparison.ask_soon()

    def reconcile(self) -> None:
        """Restore all networks soon, and compare them with Docker."""
        self._recovery.request()

    def ask_soon(self) -> None:
        """Compare with Docker soon: a request was lost."""
        self._comparison.ask_soon()

    def close(self) -> None:
        """After the last call: end the background work, and close the driver and the file."""
        self._recovery.close()
        self._comparison.close()
        self._peers.close()
        self._teardown.wait()
        if self._is_open:
            self._driver.close()
        self._store.close()
