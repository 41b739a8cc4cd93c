"""Removal of networks and endpoints: deleted by Docker, half done, or left behind; and the work after an answer.

Everything here ends with the record out of the store, or with its intent in the file: then the next start finds it.
Each method says whether its network must be locked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Generic

from netplugin_sdk.core import answers
from netplugin_sdk.core.shared import Shared
from netplugin_sdk.core.store import Operation, StoredEndpoint, StoredNetwork
from netplugin_sdk.core.workers import SerialWorker
from netplugin_sdk.driver import Later
from netplugin_sdk.network import OptionsT

_log = logging.getLogger("netplugin_sdk")


class Teardown(Generic[OptionsT]):
    """Removes networks and endpoints, by the driver's own methods."""

    def __init__(self, shared: Shared[OptionsT]) -> None:
        self._shared = shared
        self._driver, self._store, self._repairs = shared.driver, shared.store, shared.repairs
        self._late = SerialWorker("late work")

    def wait(self) -> None:
        """Wait until no work is left to do after answers."""
        self._late.wait()

    # ------------------------------------------------------------------------------------------- deleted by Docker

    def end_network(self, network: StoredNetwork[OptionsT]) -> None:
        """``DeleteNetwork``; part of it may run after the answer. The network is locked."""
        self._store.intend(network, "DeleteNetwork")
        for endpoint in network.endpoints.values():
            _log.warning("DeleteNetwork: %r still has %r, deleting it first", network, endpoint)
            self.delete_endpoint(endpoint)
        self._finish(network, self._delete_network(network))

    def end_endpoint(self, endpoint: StoredEndpoint) -> None:
        """``DeleteEndpoint``, and an endpoint that Docker does not ask for any more. Its network is locked."""
        self._store.intend(endpoint, "DeleteEndpoint")
        self._finish(endpoint, self._delete_endpoint(endpoint))

    def end_join(self, endpoint: StoredEndpoint) -> None:
        """``Leave``. The network is locked."""
        self._store.intend(endpoint, "Leave")
        self._finish_leave(endpoint)

    def _finish_leave(self, endpoint: StoredEndpoint) -> None:
        self._revoke_within(endpoint, "Leave")
        self.leave(endpoint)
        self._store.done(endpoint)

    def leave(self, endpoint: StoredEndpoint) -> None:
        """Take it out of its sandbox, even after half a join. The network is locked."""
        self._driver.leave(endpoint.network, endpoint)
        self._store.left(endpoint)

    def end_external(self, endpoint: StoredEndpoint) -> None:
        """``RevokeExternalConnectivity``. The network is locked."""
        self._store.intend(endpoint, "RevokeExternalConnectivity")
        self.revoke_external(endpoint)

    def revoke_external(self, endpoint: StoredEndpoint) -> None:
        """Undo whatever was published. The network is locked."""
        self._driver.revoke_external_connectivity(endpoint.network, endpoint)
        self._store.done(endpoint, external_request=None)

    def _revoke_within(self, endpoint: StoredEndpoint, operation: Operation) -> None:
        """The engine revokes and leaves first, unless the plugin was down when it did."""
        if endpoint.row.external_request is not None:
            self._driver.revoke_external_connectivity(endpoint.network, endpoint)
            self._store.intend(endpoint, operation, external_request=None)

    def _finish(self, record: StoredNetwork[OptionsT] | StoredEndpoint, work: Later | None) -> None:
        """Out of the store, at once or when the work after the answer is done."""
        if work is None and self._late.idle:
            self._store.gone(record)
            return

        def finish() -> None:
            if work is not None:
                work()
            self._store.gone(record)

        self._store.going(record)
        self._late.submit(lambda: self._repairs.run_logged("delete", record, finish))

    # ------------------------------------------------------------------------------------------ removed now

    def delete_network(self, network: StoredNetwork[OptionsT]) -> None:
        """Remove a network that is half made or half deleted, completely. It is locked."""
        for endpoint in network.endpoints.values():
            self.delete_endpoint(endpoint)
        if (work := self._delete_network(network)) is not None:
            work()
        self._store.gone(network)

    def delete_endpoint(self, endpoint: StoredEndpoint) -> None:
        """Remove an endpoint completely, in any state. Its network is locked."""
        if endpoint.row.intent != "CreateEndpoint":
            self._store.intend(endpoint, "DeleteEndpoint")
        if (work := self._delete_endpoint(endpoint)) is not None:
            work()
        self._store.gone(endpoint)

    def resolve_intent(self, endpoint: StoredEndpoint) -> None:
        """Finish or undo an endpoint's half-done operation. Its network is locked."""
        _log.warning("%r: %s was not finished: finishing or undoing it", endpoint, endpoint.row.intent)
        self._repairs.count("half_done")
        match endpoint.row.intent:
            case "CreateEndpoint" | "DeleteEndpoint":
                self.delete_endpoint(endpoint)
            case "Leave":
                self._finish_leave(endpoint)
            case "ProgramExternalConnectivity" | "RevokeExternalConnectivity":
                self.revoke_external(endpoint)

    @staticmethod
    def undo(record: object, operation: Operation, undo: Callable[[], None]) -> None:
        """Undo the half of its work that a failed method may have done. The caller raises the failure."""
        try:
            undo()
        except BaseException:
            # The row keeps its intent, and so names the half-done operation.
            _log.exception("%s of %r failed, and so did undoing it", operation, record)

    # --------------------------------------------------------------------------------------- left behind

    def delete_vanished_endpoints(self) -> None:
        """Delete the endpoints whose links are gone: their containers ended, and no call said so. Nothing is locked."""
        for network in self._store.networks.values():
            self._repairs.run_logged("look after", network, partial(self._delete_vanished, network))

    def _delete_vanished(self, network: StoredNetwork[OptionsT]) -> None:
        with self._shared.locked(network):
            for endpoint in network.endpoints.values():
                if endpoint.join is None:
                    continue
                gone = self._driver.endpoint_is_gone(network, endpoint)
                if answers.yes_or_no("endpoint_is_gone", gone):
                    _log.warning("%r is gone, its container ended unnoticed: deleting it", endpoint)
                    self._repairs.count("container_gone")
                    self.end_endpoint(endpoint)

    # ------------------------------------------------------------------------------------------ the driver's methods

    def _delete_network(self, network: StoredNetwork[OptionsT]) -> Later | None:
        return answers.later("delete_network", self._driver.delete_network(network))

    def _delete_endpoint(self, endpoint: StoredEndpoint) -> Later | None:
        self._revoke_within(endpoint, "DeleteEndpoint")
        if endpoint.may_be_joined:
            self.leave(endpoint)
        return answers.later("delete_endpoint", self._driver.delete_endpoint(endpoint.network, endpoint))
