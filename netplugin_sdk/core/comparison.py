"""Networks and endpoints compared with those of Docker: the ones that it does not know any more are deleted.

Docker is asked in the background, never from within a call: see `netplugin_sdk.core.engine_api`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Generic

from netplugin_sdk.core.engine_api import Docker, DockerError
from netplugin_sdk.core.shared import Shared
from netplugin_sdk.core.store import StoredEndpoint, StoredNetwork
from netplugin_sdk.core.teardown import Teardown
from netplugin_sdk.core.workers import EngineQueries
from netplugin_sdk.network import OptionsT
from netplugin_sdk.protocol.messages import Scope

_log = logging.getLogger("netplugin_sdk")


class Comparison(Generic[OptionsT]):
    """Asks an engine which networks, endpoints and containers it has. With `docker` None it asks nobody."""

    def __init__(self, shared: Shared[OptionsT], teardown: Teardown[OptionsT], docker: Path | None) -> None:
        self._shared = shared
        self._driver, self._store, self._repairs = shared.driver, shared.store, shared.repairs
        self._timings = shared.timings
        self._teardown = teardown
        self._wants_containers = "container_attached" in shared.defined
        self._queries = None if docker is None else EngineQueries(docker, shared.timings)
        self._missing: dict[str, float] = {}
        """When Docker began not to list a network or an endpoint, by its id."""
        self._listing: set[str] = set()
        """Engines that have listed something of ours, in this life of the plugin, or are this node's in its swarm."""

    def close(self) -> None:
        """Ask nothing more."""
        if self._queries is not None:
            self._queries.close()

    def ask(self, delay: float = 0.0) -> None:
        """Compare with Docker in `delay` seconds, and again every few minutes."""
        if self._queries is not None and self._store.networks:
            self._queries.ask(self._compare, delay, recurring=True)

    def ask_soon(self) -> None:
        """Compare with Docker once it has had time to finish its own work."""
        self.ask(self._timings.engine_grace)

    def network_created(self, network: StoredNetwork[OptionsT]) -> None:
        """Docker has asked for this network, so it is not missing."""
        self._missing.pop(network.id, None)
        self.ask_soon()

    def find_container(self, endpoint: StoredEndpoint) -> None:
        """Find out which container a joined endpoint is in, if the driver wants to know."""
        if self._queries is not None and self._wants_containers:
            self._queries.ask(partial(self._ask_for_container, endpoint))

    def _ask_for_container(self, endpoint: StoredEndpoint, docker: Docker) -> bool:
        if not _is_joined(endpoint):
            return True
        container = None
        if (container_id := docker.endpoints(endpoint.network_id).get(endpoint.id)) is not None:
            container = docker.container(container_id)
        if container is None:
            return False
        with self._shared.locked(endpoint.network):
            if _is_joined(endpoint):
                self._driver.container_attached(endpoint.network, endpoint, container)
                self._store.is_in(endpoint, container)
        return True

    # ------------------------------------------------------------------------------------------------- the comparison

    def _compare(self, docker: Docker) -> bool:
        info = docker.call("GET", "/info")
        engine, listed = info["ID"], set(docker.networks())
        networks = self._store.networks
        if self._driver.scope == Scope.GLOBAL:
            if self._is_this_node(info):
                self._listing.add(engine)
            # An engine that is killed forgets a swarm's networks, and asks for those that it needs again.
            listed = {network_id for network_id in listed.intersection(networks) if docker.runs(network_id)}
        known = False
        missing: list[StoredNetwork[OptionsT] | StoredEndpoint] = []
        for network in networks.values():
            if network.id in listed:
                known = True
                if network.row.engine != engine:
                    self._store.seen_by(network, engine)
                missing += self._unknown_endpoints(network, docker)
            elif network.row.engine in (None, engine):
                missing.append(network)
        now = time.monotonic()
        self._missing = {record.id: self._missing.get(record.id, now) for record in missing}
        if known:
            self._listing.add(engine)
        # Another engine may listen at that socket than the one that uses this plugin.
        ours = engine in self._listing
        certain = [r for r in missing if ours or (isinstance(r, StoredNetwork) and r.row.engine is not None)]
        for record in certain:
            if now - self._missing[record.id] >= self._timings.missing_grace:
                self._repairs.run_logged("remove", record, partial(self._remove, record))
        soon = any(record.id in self._missing for record in certain)
        self.ask(self._timings.missing_grace if soon else self._timings.compare_every)
        return True

    def _is_this_node(self, info: Mapping[str, Any]) -> bool:
        this = self._driver.this_node
        return this is not None and info.get("Swarm", {}).get("NodeAddr") == str(this.address)

    @staticmethod
    def _unknown_endpoints(network: StoredNetwork[OptionsT], docker: Docker) -> list[StoredEndpoint]:
        ours = [endpoint for endpoint in network.endpoints.values() if endpoint.row.intent is None]
        if not ours:
            return []
        try:
            known = docker.endpoints(network.id)
        except DockerError as error:
            if error.http_status == 404:
                return []  # removed meanwhile
            raise
        return [endpoint for endpoint in ours if endpoint.id not in known]

    def _remove(self, record: StoredNetwork[OptionsT] | StoredEndpoint) -> None:
        with self._shared.locked(record if isinstance(record, StoredNetwork) else record.network):
            if record.id not in self._missing:
                return  # Docker has asked for it meanwhile
            if self._store.lists(record):
                _log.warning("%r is unknown to Docker: deleting it", record)
                self._repairs.count("unknown_to_docker")
                if isinstance(record, StoredEndpoint):
                    self._teardown.end_endpoint(record)
                else:
                    self._store.intend(record, "DeleteNetwork")
                    self._teardown.delete_network(record)
            self._missing.pop(record.id, None)


def _is_joined(endpoint: StoredEndpoint) -> bool:
    return endpoint.network.endpoints.get(endpoint.id) is endpoint and endpoint.join is not None
