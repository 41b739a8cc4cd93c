"""The kernel is made to agree with the state on disk: at a start, on SIGHUP, and after a loss.

The state on disk counts, since Docker was told so. Half-done operations are finished or undone; missing parts are made
again, by the driver's own methods.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from contextlib import suppress
from functools import partial
from typing import Generic

from netplugin_sdk import losses
from netplugin_sdk.core.comparison import Comparison
from netplugin_sdk.core.shared import Shared
from netplugin_sdk.core.store import StoredEndpoint, StoredNetwork
from netplugin_sdk.core.teardown import Teardown
from netplugin_sdk.core.workers import SerialWorker
from netplugin_sdk.network import OptionsT

_log = logging.getLogger("netplugin_sdk")


class Recovery(Generic[OptionsT]):
    """Restores networks and endpoints."""

    def __init__(
        self, shared: Shared[OptionsT], teardown: Teardown[OptionsT], comparison: Comparison[OptionsT]
    ) -> None:
        self._shared = shared
        self._driver, self._store, self._repairs = shared.driver, shared.store, shared.repairs
        self._timings = shared.timings
        self._teardown = teardown
        self._comparison = comparison
        self._worker = SerialWorker("repairs")
        self._pending = threading.Lock()  # held from a request until its repair begins
        self._closing = threading.Event()
        self._delay, self._repaired = self._timings.repair_delay_min, -math.inf

    def start(self) -> None:
        """Before the first call."""
        self._restore_all()
        losses.subscribe(self._lost)

    def close(self) -> None:
        """End the background work."""
        with suppress(ValueError):  # it was not started
            losses.unsubscribe(self._lost)
        self._closing.set()
        self._worker.wait()

    def request(self) -> None:
        """Restore soon, in a thread of its own."""
        if self._pending.acquire(blocking=False):
            self._worker.submit(self._repair)

    def _lost(self, loss: str) -> None:
        _log.warning("%s: bringing it back", loss)
        self._repairs.count("lost")
        self.request()

    def _repair(self) -> None:
        if time.monotonic() - self._repaired > self._timings.repair_delay_max:
            self._delay = self._timings.repair_delay_min
        stopped = self._closing.wait(self._delay)
        self._pending.release()
        if not stopped:
            self._restore_all()
            # Somebody may delete it again and again: the two must not use up a processor.
            self._delay, self._repaired = min(2 * self._delay, self._timings.repair_delay_max), time.monotonic()

    def _restore_all(self) -> None:
        """Make the kernel agree now, and compare with Docker when it answers. Failures are logged."""
        began = time.monotonic()
        self._teardown.delete_vanished_endpoints()
        networks = self._store.networks.values()
        done = [self._repairs.run_logged("restore", network, partial(self._restore, network)) for network in networks]
        if networks:
            _log.info("%d of %d networks are restored, in %.2f s", sum(done), len(done), time.monotonic() - began)
        self._repairs.count("reconciled")
        self._comparison.ask()

    def _restore(self, network: StoredNetwork[OptionsT]) -> None:
        with self._shared.locked(network):
            if not self._store.lists(network):
                return  # deleted meanwhile
            if network.row.intent is not None:  # CreateNetwork or DeleteNetwork, which no call will ask for again
                _log.warning("%r: %s was not finished: removing it", network, network.row.intent)
                self._repairs.count("half_done")
                self._teardown.delete_network(network)
                return
            for endpoint in network.endpoints.values():
                if endpoint.row.intent is not None:
                    resolve = partial(self._teardown.resolve_intent, endpoint)
                    self._repairs.run_logged("finish or undo", endpoint, resolve)
            self._driver.create_network(network)
            for endpoint in network.endpoints.values():
                self._repairs.run_logged("restore", endpoint, partial(self._restore_endpoint, endpoint))

    def _restore_endpoint(self, endpoint: StoredEndpoint) -> None:
        if endpoint.row.intent is not None:
            return
        network = endpoint.network
        if endpoint.join is not None:
            self._driver.restore_endpoint(network, endpoint)
            if endpoint.container is None:
                self._comparison.find_container(endpoint)
        if endpoint.external is not None:
            self._driver.program_external_connectivity(network, endpoint, endpoint.external)
