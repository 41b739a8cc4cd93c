"""What is on disk held against the kernel and against Docker, and made to agree.

At a start, on SIGHUP, and when something of ours vanished from the kernel. What is on disk counts: it is what Docker
was told. What was half done is finished or undone; what is missing is made again, by the driver's own methods; what
Docker does not know any more is removed.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic

from netplugin_sdk import losses
from netplugin_sdk.core.engine_api import Docker, DockerError
from netplugin_sdk.core.lifecycle import IpamLifecycle, NetworkLifecycle, Repair
from netplugin_sdk.core.workers import Background, Inquiries
from netplugin_sdk.driver import IpamDriver
from netplugin_sdk.errors import NotFound
from netplugin_sdk.network import Endpoint, Network, OptionsT
from netplugin_sdk.protocol.messages import Scope

_log = logging.getLogger("netplugin_sdk")

_BURST, _CALM = 0.2, 30.0  # seconds from a loss to its repair, since they come together: at first, and at most
_TOLD = 10.0  # seconds until an engine that starts, makes a network, or lost a request is asked what it has
_MISSING = 30.0  # seconds that Docker must not know a network or an endpoint before it is removed
_EVERY = 300.0  # seconds until Docker is asked again: an engine with live-restore forgets endpoints and calls nobody


@dataclass(frozen=True)
class Listed:
    """Attached to a network: which engine has listed it."""

    engine: str


class PoolReconciler:
    """Tells an IPAM driver what an engine has, if it wants to know."""

    def __init__(self, lifecycle: IpamLifecycle, docker: Path | None) -> None:
        self._lifecycle = lifecycle
        self._driver = lifecycle.driver
        wanted = type(self._driver).engine_has is not IpamDriver.engine_has
        self._inquiries = Inquiries(docker) if docker is not None and wanted else None

    def start(self) -> None:
        """Before the first call."""
        self._lifecycle.requested = self.ask_soon
        self.request()

    def request(self, delay: float = 0.0) -> None:
        """Tell it in `delay` seconds, by a thread of its own."""
        if self._inquiries is not None:
            self._inquiries.ask(self._tell, delay, stands=True)

    def ask_soon(self) -> None:
        """Tell it when Docker has had time to do what it is about."""
        self.request(_TOLD)

    def _tell(self, docker: Docker) -> bool:
        soon = self._driver.engine_has(docker.call("GET", "/info")["ID"], docker.pools())
        self.request(_MISSING if soon else _EVERY)
        return True

    def close(self) -> None:
        """End what is done in the background."""
        if self._inquiries is not None:
            self._inquiries.close()


class Reconciler(Generic[OptionsT]):
    """Makes what is there agree with what is on disk.

    `docker` is the engine's socket; with None no engine is asked.
    """

    def __init__(self, lifecycle: NetworkLifecycle[OptionsT], docker: Path | None) -> None:
        self._lifecycle = lifecycle
        self._driver = lifecycle.driver
        self._networks = lifecycle.store.networks
        self._inquiries = None if docker is None else Inquiries(docker)
        self._repairs = Background("repairs")
        self._pending = threading.Lock()  # held from a request until its repair begins
        self._closing = threading.Event()
        self._pause, self._repaired = _BURST, -math.inf
        self._missing: dict[str, float] = {}
        """What Docker did not list: since when."""
        self._listing: set[str] = set()
        """Engines that have listed something of ours, in this life of the plugin, or are this node's in its swarm."""

    def start(self) -> None:
        """Before the first call."""
        self._reconcile()
        losses.hear(self._hear)
        self._lifecycle.peers.outdated = self.request
        self._lifecycle.created = self._is_new
        if self._driver.overrides("container_attached"):
            self._lifecycle.joined = self._find_container

    @property
    def repairs(self) -> Mapping[Repair, int]:
        """What was done, and how often."""
        return self._lifecycle.repairs

    def close(self) -> None:
        """End what is done in the background."""
        with suppress(ValueError):  # it was not started
            losses.hear_no_more(self._hear)
        self._closing.set()
        if self._inquiries is not None:
            self._inquiries.close()
        self._repairs.wait()

    def request(self) -> None:
        """Have it agree soon, by a thread of its own."""
        if self._pending.acquire(blocking=False):
            self._repairs.submit(self._repair)

    def _reconcile(self) -> None:
        """Make it agree with the kernel now, and with Docker when Docker tells. What fails is logged."""
        began = time.monotonic()
        self._lifecycle.reap()
        networks = tuple(self._networks.values())
        done = [self._lifecycle.attempt("restore", network, partial(self._restore, network)) for network in networks]
        if networks:
            _log.info("%d of %d networks are restored, in %.2f s", sum(done), len(done), time.monotonic() - began)
        self._lifecycle.count("reconciled")
        self._compare_with_docker(0.0)

    def ask_soon(self) -> None:
        """Compare with Docker when it has had time to do what it is about."""
        self._compare_with_docker(_TOLD)

    def engine_starts(self) -> None:
        """Delete what an engine that was killed has forgotten."""
        self._lifecycle.reap()
        self.ask_soon()

    # --------------------------------------------------------------------------------------------- with the kernel

    def _hear(self, loss: str) -> None:
        _log.warning("%s: bringing it back", loss)
        self._lifecycle.count("lost")
        self.request()

    def _repair(self) -> None:
        if time.monotonic() - self._repaired > _CALM:
            self._pause = _BURST
        stopped = self._closing.wait(self._pause)
        self._pending.release()
        if not stopped:
            self._reconcile()
            # Somebody may take it away again and again: they do not share a processor for ever.
            self._pause, self._repaired = min(2 * self._pause, _CALM), time.monotonic()

    def _restore(self, network: Network[OptionsT]) -> None:
        lifecycle, driver = self._lifecycle, self._driver
        with lifecycle.hold(network):
            if self._networks.get(network.id) is not network:
                return  # deleted meanwhile
            if network.row.intent is not None:  # CreateNetwork or DeleteNetwork, which nobody will ask for again
                _log.warning("%r: %s was not finished: removing it", network, network.row.intent)
                lifecycle.count("half_done")
                lifecycle.drop_network(network)
                return
            for endpoint in tuple(network.endpoints.values()):
                if endpoint.row.intent is not None:
                    _log.warning("%r: %s was not finished: finishing or undoing it", endpoint, endpoint.row.intent)
                    lifecycle.count("half_done")
                    lifecycle.attempt("settle", endpoint, partial(lifecycle.settle, network, endpoint))
            driver.create_network(network)
            for endpoint in tuple(network.endpoints.values()):
                lifecycle.attempt("restore", endpoint, partial(self._restore_endpoint, network, endpoint))

    def _restore_endpoint(self, network: Network[OptionsT], endpoint: Endpoint) -> None:
        if endpoint.row.intent is not None:
            return
        if endpoint.join is not None:
            self._driver.restore_endpoint(network, endpoint)
            if endpoint.container is None and self._driver.overrides("container_attached"):
                self._find_container(network, endpoint)
        if endpoint.external is not None:
            self._driver.program_external_connectivity(network, endpoint, endpoint.external)

    # ------------------------------------------------------------------------------------------------- with Docker

    def _find_container(self, network: Network[OptionsT], endpoint: Endpoint) -> None:
        if self._inquiries is not None:
            self._inquiries.ask(partial(self._ask_for_container, network, endpoint))

    def _ask_for_container(self, network: Network[OptionsT], endpoint: Endpoint, docker: Docker) -> bool:
        if not self._is_joined(network, endpoint):
            return True
        container = None
        if (container_id := docker.endpoints(network.id).get(endpoint.id)) is not None:
            container = docker.container(container_id)
        if container is None:
            return False
        with self._lifecycle.hold(network):
            if self._is_joined(network, endpoint):
                self._driver.container_attached(network, endpoint, container)
                with suppress(NotFound):
                    endpoint.attach(container)
        return True

    def _is_joined(self, network: Network[OptionsT], endpoint: Endpoint) -> bool:
        return network.endpoints.get(endpoint.id) is endpoint and endpoint.join is not None

    def _compare_with_docker(self, delay: float) -> None:
        if self._inquiries is not None and self._networks:
            self._inquiries.ask(self._compare, delay, stands=True)

    def _is_new(self, network: Network[OptionsT]) -> None:
        self._missing.pop(network.id, None)
        self.ask_soon()

    def _compare(self, docker: Docker) -> bool:
        info = docker.call("GET", "/info")
        engine, listed = info["ID"], set(docker.networks())
        if self._driver.scope == Scope.GLOBAL:
            if self._is_this_node(info):
                self._listing.add(engine)
            # An engine that is killed forgets a swarm's networks, and asks for those that it needs again.
            listed = {network_id for network_id in listed.intersection(self._networks) if docker.runs(network_id)}
        known = False
        missing: list[Network[OptionsT] | Endpoint] = []
        for network in tuple(self._networks.values()):
            before = network.attached(Listed)
            if network.id in listed:
                known = True
                if before != Listed(engine):
                    with suppress(NotFound):
                        network.attach(Listed(engine))
                missing += self._unknown_endpoints(network, docker)
            elif before is None or before.engine == engine:
                missing.append(network)
        now = time.monotonic()
        self._missing = {record.id: self._missing.get(record.id, now) for record in missing}
        if known:
            self._listing.add(engine)
        # Another engine may listen at that socket than the one that uses this plugin.
        ours = engine in self._listing
        certain = [r for r in missing if ours or (isinstance(r, Network) and r.attached(Listed) is not None)]
        for record in certain:
            if now - self._missing[record.id] >= _MISSING:
                self._lifecycle.attempt("remove", record, partial(self._remove, record))
        soon = any(record.id in self._missing for record in certain)
        self._compare_with_docker(_MISSING if soon else _EVERY)
        return True

    def _is_this_node(self, info: Mapping[str, Any]) -> bool:
        this = self._driver.this_node
        return this is not None and info.get("Swarm", {}).get("NodeAddr") == str(this.address)

    def _unknown_endpoints(self, network: Network[OptionsT], docker: Docker) -> list[Endpoint]:
        ours = [endpoint for endpoint in tuple(network.endpoints.values()) if endpoint.row.intent is None]
        if not ours:
            return []
        try:
            known = docker.endpoints(network.id)
        except DockerError as error:
            if error.http_status == 404:
                return []  # removed meanwhile
            raise
        return [endpoint for endpoint in ours if endpoint.id not in known]

    def _remove(self, record: Network[OptionsT] | Endpoint) -> None:
        network = record if isinstance(record, Network) else self._networks.get(record.network_id)
        if network is None:
            return
        with self._lifecycle.hold(network):
            if record.id not in self._missing:
                return  # asked for meanwhile
            if isinstance(record, Endpoint):
                if network.endpoints.get(record.id) is record:
                    _log.warning("%r is unknown to Docker: deleting it", record)
                    self._lifecycle.count("unknown_to_docker")
                    self._lifecycle.free(network, record)
            elif self._networks.get(record.id) is record:
                _log.warning("%r is unknown to Docker: deleting it", record)
                self._lifecycle.count("unknown_to_docker")
                self._lifecycle.store.save(record, intent="DeleteNetwork")
                self._lifecycle.drop_network(record)
            self._missing.pop(record.id, None)
