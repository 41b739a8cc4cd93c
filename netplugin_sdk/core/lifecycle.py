"""Requests of the network driver: from a request to the author's method and back.

The engine delivers at least once, and the plugin can die between any two steps. So each call: takes the lock of its
network; answers a repeated request from memory; writes down what it is about to do; calls the author's method; writes
down that it is done; answers. A method that fails half-way is undone by its opposite.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeAlias

from netplugin_sdk.core import answers, calls
from netplugin_sdk.core.comparison import Comparison
from netplugin_sdk.core.shared import Shared
from netplugin_sdk.core.store import StoredEndpoint, StoredNetwork
from netplugin_sdk.core.swarm import Allocations, Peers
from netplugin_sdk.core.teardown import Teardown
from netplugin_sdk.errors import Conflict, NotFound
from netplugin_sdk.network import OptionsT, Sandbox
from netplugin_sdk.protocol import messages
from netplugin_sdk.protocol.messages import Message, Scope

_log = logging.getLogger("netplugin_sdk")

Handler: TypeAlias = Callable[[Any, bytes], bytes]
"""Takes the decoded request and its body, gives the body of the answer."""

Routes: TypeAlias = dict[str, tuple[type[Message], Handler]]
"""Method name (``Join``) → the type of its request, and its handler."""

_ToEndpoint: TypeAlias = (
    messages.CreateEndpoint | messages.EndpointRef | messages.JoinRequest | messages.ProgramExternalConnectivity
)

_DONE = b"{}"


class NetworkLifecycle(Generic[OptionsT]):
    """Serves the ``NetworkDriver`` methods with a driver and the store of its networks."""

    def __init__(
        self,
        shared: Shared[OptionsT],
        teardown: Teardown[OptionsT],
        comparison: Comparison[OptionsT],
        peers: Peers[OptionsT],
        allocations: Allocations[OptionsT],
    ) -> None:
        self._driver, self._defined = shared.driver, shared.defined
        self._store, self._locks = shared.store, shared.locks
        self._repairs = shared.repairs
        self._teardown = teardown
        self._comparison = comparison
        self._peers = peers
        self._allocations = allocations

    def routes(self) -> Routes:
        """The methods that this driver has. Any other gets a 404: "method not supported"."""
        m = messages
        routes: Routes = {
            "GetCapabilities": (m.Nothing, self._get_capabilities),
            "CreateNetwork": (m.CreateNetwork, self._create_network),
            "DeleteNetwork": (m.NetworkRef, self._delete_network),
            "CreateEndpoint": (m.CreateEndpoint, self._create_endpoint),
            "DeleteEndpoint": (m.EndpointRef, self._delete_endpoint),
            "EndpointOperInfo": (m.EndpointRef, self._endpoint_oper_info),
            "Join": (m.JoinRequest, self._join),
            "Leave": (m.EndpointRef, self._leave),
        }
        if "program_external_connectivity" in self._defined:
            routes["ProgramExternalConnectivity"] = (m.ProgramExternalConnectivity, self._program_external)
            routes["RevokeExternalConnectivity"] = (m.EndpointRef, self._revoke_external)
        if "gw_alloc_check" in self._defined:
            routes["GwAllocCheck"] = (m.GwAllocCheck, self._gw_alloc_check)
        if self._driver.scope == Scope.GLOBAL:
            routes["AllocateNetwork"] = (m.AllocateNetwork, self._allocations.allocate)
            routes["FreeNetwork"] = (m.NetworkRef, self._allocations.free)
        if self._connectivity == Scope.GLOBAL:
            routes["DiscoverNew"] = (m.Discovery, self._peers.discover_new)
            routes["DiscoverDelete"] = (m.Discovery, self._peers.discover_delete)
        return routes

    @property
    def _connectivity(self) -> Scope:
        """Docker reports nodes only to a driver of global connectivity."""
        return Scope.GLOBAL if self._defined & {"peer_joined", "peer_left"} else self._driver.scope

    def _get_capabilities(self, _request: messages.Nothing, _body: bytes) -> bytes:
        self._allocations.mark_unconfirmed()
        return messages.encode(
            {
                "Scope": self._driver.scope,
                "ConnectivityScope": self._connectivity,
                "GwAllocChecker": "gw_alloc_check" in self._defined,
            }
        )

    # -------------------------------------------------------------------------------------------------- networks

    def _create_network(self, request: messages.CreateNetwork, body: bytes) -> bytes:
        with self._locks.hold(request.network_id):
            calls.refuse_if_late()  # it has waited
            network = self._store.networks.get(request.network_id)
            is_swarms = self._driver.scope == Scope.GLOBAL
            if network is not None and is_swarms and not messages.same(network.row.request, body):
                # An engine that is killed forgets a swarm's networks, and its next version may say more of them.
                _log.warning("CreateNetwork: %r is created again, with another request", network)
                self._store.intend(network, "DeleteNetwork")
                self._teardown.delete_network(network)
                network = None
            if network is not None:
                _refuse_other_content(network, network.row.request, body)
                if network.row.intent is None:
                    if is_swarms:
                        self._forget_stale_endpoints(network)
                    return _DONE
            else:
                network = self._store.new_network(request, body)
                _ = network.options  # refused before anything is made
                self._teardown.wait()  # the new network may need the names and ports of one that is going
            self._store.intend(network, "CreateNetwork")
            try:
                self._driver.create_network(network)
                calls.commit()
                self._store.done(network)
            except BaseException:
                self._teardown.undo(network, "CreateNetwork", partial(self._teardown.delete_network, network))
                raise
            self._comparison.network_created(network)
            return _DONE

    def _forget_stale_endpoints(self, network: StoredNetwork[OptionsT]) -> None:
        """Delete the endpoints that a killed engine has forgotten; if only an answer was lost, there are none yet."""
        for endpoint in network.endpoints.values():
            _log.warning("CreateNetwork: %r still has %r, deleting it", network, endpoint)
            self._repairs.run_logged("delete", endpoint, partial(self._teardown.delete_endpoint, endpoint))
        self._comparison.network_created(network)

    def _delete_network(self, request: messages.NetworkRef, _body: bytes) -> bytes:
        with self._locks.hold(request.network_id):
            network = self._store.networks.get(request.network_id)
            if network is None:
                _log.warning("DeleteNetwork: network %s is unknown, nothing to delete", request.network_id[:12])
            else:
                self._teardown.end_network(network)
            return _DONE

    def _gw_alloc_check(self, request: messages.GwAllocCheck, _body: bytes) -> bytes:
        options: Any = self._driver.options_type.parse(request.options.generic)
        return answers.gw_alloc_check(self._driver.gw_alloc_check(options, request.options))

    # ------------------------------------------------------------------------------------------------- endpoints

    def _create_endpoint(self, request: messages.CreateEndpoint, body: bytes) -> bytes:
        with self._locks.hold(request.network_id):
            calls.refuse_if_late()  # it has waited
            network = self._network(request.network_id)
            if network.row.intent is not None:  # its deletion failed, so Docker still has it
                self._driver.create_network(network)
                self._store.done(network)
            if (endpoint := self._find_complete_endpoint(request)) is not None:
                _refuse_other_content(endpoint, endpoint.row.request, body)
                if endpoint.row.answer is not None:
                    return endpoint.row.answer
            endpoint = self._store.new_endpoint(network, request, body)
            if request.options.port_map and "program_external_connectivity" not in self._defined:
                _log.warning("%r has ports to publish, and this driver publishes none", endpoint)
            self._store.intend(endpoint, "CreateEndpoint")
            try:
                filled = self._driver.create_endpoint(network, endpoint)
                answer = answers.create_endpoint(filled, requested=request.interface)
                calls.commit()
                self._store.done(endpoint, answer=answer)
            except BaseException:
                self._teardown.undo(endpoint, "CreateEndpoint", partial(self._teardown.delete_endpoint, endpoint))
                raise
            return answer

    def _delete_endpoint(self, request: messages.EndpointRef, _body: bytes) -> bytes:
        with self._locks.hold(request.network_id):
            endpoint = self._find_endpoint(request)
            if endpoint is None:
                _log.warning("DeleteEndpoint: endpoint %s is unknown, nothing to delete", request.endpoint_id[:12])
            else:
                self._teardown.end_endpoint(endpoint)
            return _DONE

    def _endpoint_oper_info(self, request: messages.EndpointRef, _body: bytes) -> bytes:
        with self._locks.hold(request.network_id):
            endpoint = self._endpoint(request)
            return answers.endpoint_oper_info(self._driver.endpoint_oper_info(endpoint.network, endpoint))

    # ------------------------------------------------------------------------------------------ join and leave

    def _join(self, request: messages.JoinRequest, body: bytes) -> bytes:
        with self._locks.hold(request.network_id):
            calls.refuse_if_late()  # it has waited
            endpoint = self._endpoint(request)
            if endpoint.join is not None:
                _refuse_other_content(endpoint, endpoint.join.request, body)
                return endpoint.join.answer
            # No intent is written: after a crash every endpoint counts as one that may be joined.
            endpoint.may_be_joined = True
            network, sandbox = endpoint.network, Sandbox(request.sandbox_key, request.options)
            try:
                answer = answers.join(self._driver.join(network, endpoint, sandbox), network, endpoint)
                calls.commit()
                self._store.joined(endpoint, body, answer)
            except BaseException:
                self._teardown.undo(endpoint, "Join", partial(self._teardown.leave, endpoint))
                raise
            self._comparison.find_container(endpoint)
            return answer

    def _leave(self, request: messages.EndpointRef, _body: bytes) -> bytes:
        with self._locks.hold(request.network_id):
            endpoint = self._find_complete_endpoint(request)
            if endpoint is None or not endpoint.may_be_joined:
                _log.warning("Leave: endpoint %s is in no sandbox, nothing to leave", request.endpoint_id[:12])
            else:
                self._teardown.end_join(endpoint)
            return _DONE

    # -------------------------------------------------------------------------------------- external connectivity

    def _program_external(self, request: messages.ProgramExternalConnectivity, body: bytes) -> bytes:
        try:
            return self._program_external_once(request, body)
        except Conflict:
            self._teardown.delete_vanished_endpoints()  # the container that has the port may be dead
            return self._program_external_once(request, body)

    def _program_external_once(self, request: messages.ProgramExternalConnectivity, body: bytes) -> bytes:
        with self._locks.hold(request.network_id):
            calls.refuse_if_late()  # it has waited
            endpoint = self._endpoint(request)
            known = endpoint.row.external_request
            if known is not None and endpoint.row.intent is None and messages.same(known, body):
                return _DONE
            self._store.intend(endpoint, "ProgramExternalConnectivity", external_request=body)
            try:
                self._driver.program_external_connectivity(endpoint.network, endpoint, request.options)
                calls.commit()
                self._store.done(endpoint)
            except BaseException:
                revoke = partial(self._teardown.revoke_external, endpoint)
                self._teardown.undo(endpoint, "ProgramExternalConnectivity", revoke)
                raise
            return _DONE

    def _revoke_external(self, request: messages.EndpointRef, _body: bytes) -> bytes:
        with self._locks.hold(request.network_id):
            endpoint = self._find_complete_endpoint(request)
            # The engine also revokes where it never programmed, as on internal networks.
            if endpoint is not None and endpoint.row.external_request is not None:
                self._teardown.end_external(endpoint)
            return _DONE

    # -------------------------------------------------------------------------------------------------- looking up

    def _network(self, network_id: str) -> StoredNetwork[OptionsT]:
        network = self._store.networks.get(network_id)
        if network is None:
            raise NotFound(f"network {network_id[:12]} is unknown to this plugin")
        return network

    def _find_endpoint(self, request: _ToEndpoint) -> StoredEndpoint | None:
        network = self._store.networks.get(request.network_id)
        return None if network is None else network.endpoints.get(request.endpoint_id)

    def _find_complete_endpoint(self, request: _ToEndpoint) -> StoredEndpoint | None:
        """Finish or undo its half-done operation first, since its row holds only one intent.

        Published ports are the exception: they can be programmed again, or revoked, at any time.
        """
        found = self._find_endpoint(request)
        if found is None or found.row.intent in (None, "ProgramExternalConnectivity", "RevokeExternalConnectivity"):
            return found
        self._teardown.resolve_intent(found)
        return self._find_endpoint(request)

    def _endpoint(self, request: _ToEndpoint) -> StoredEndpoint:
        endpoint = self._find_complete_endpoint(request)
        if endpoint is None:
            self._network(request.network_id)
            raise NotFound(f"endpoint {request.endpoint_id[:12]} is unknown to this plugin")
        return endpoint


def _refuse_other_content(record: object, known: bytes, body: bytes) -> None:
    if not messages.same(known, body):
        raise Conflict(f"{record!r} exists already, with another request")
