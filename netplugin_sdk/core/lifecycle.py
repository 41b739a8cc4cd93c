"""From a request to the author's method and back: the order, the memory and the locks that the protocol needs.

The engine delivers at least once, and the plugin can die between any two steps. So each call: takes the lock of its
network or pool; answers a repetition from memory; writes down what it is about to do; calls the author's method; writes
down that it is done; answers. A method that fails half-way is undone by its opposite.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeAlias, get_args

from netplugin_sdk.core import calls
from netplugin_sdk.core.store import Store
from netplugin_sdk.core.swarm import Allocations, Peers
from netplugin_sdk.core.workers import Background, Locks
from netplugin_sdk.driver import IpamDriver, NetworkDriver, Rest
from netplugin_sdk.errors import Conflict, DriverError, NotFound, Unavailable
from netplugin_sdk.network import Endpoint, Network, Operation, OptionsT, Sandbox
from netplugin_sdk.protocol import messages
from netplugin_sdk.protocol.messages import EndpointInterface, Message, Scope

_log = logging.getLogger("netplugin_sdk")

Handler: TypeAlias = Callable[[Any, bytes], bytes]
"""Takes the decoded request and its body, gives the body of the answer."""

Repair: TypeAlias = Literal["reconciled", "lost", "half_done", "container_gone", "unknown_to_docker", "failed"]
"""What nobody called for. All networks were held against the kernel; something of ours vanished from it; what was half
done was finished or undone; an endpoint was deleted whose container ended unnoticed; so was what Docker does not know;
one of these could not be done."""

_ToEndpoint: TypeAlias = (
    messages.CreateEndpoint | messages.EndpointRef | messages.JoinRequest | messages.ProgramExternalConnectivity
)

Routes: TypeAlias = dict[str, tuple[type[Message], Handler]]
"""Method name (``Join``) → the type of its request and what handles it."""

_DONE = b"{}"
_PATIENCE = 2.0  # seconds that looking after a network waits for the calls on it


class NetworkLifecycle(Generic[OptionsT]):
    """Serves the ``NetworkDriver`` methods with a driver and the store of its networks."""

    def __init__(self, driver: NetworkDriver[OptionsT], store: Store[OptionsT]) -> None:
        self.driver = driver
        self.store = store
        self.created: Callable[[Network[OptionsT]], None] = lambda _network: None
        """Told of each new network, and of a swarm's that is asked for again."""
        self.joined: Callable[[Network[OptionsT], Endpoint], None] = lambda _network, _endpoint: None
        """Told of each new join."""
        self.repairs: dict[Repair, int] = dict.fromkeys(get_args(Repair), 0)
        """How often each was done."""
        self._counting = threading.Lock()
        self._locks = Locks()
        self._rests = Background("rests")
        self._unfinished: set[Network[OptionsT] | Endpoint] = set()
        """Networks with endpoints that could not be deleted after the answer: they stay on disk with them."""
        driver.networks = MappingProxyType(store.networks)
        self.peers = Peers(driver, store, self.hold)
        self._allocations = Allocations(driver, store, self._locks)

    def reap(self) -> None:
        """Delete the endpoints of containers that ended while nobody told."""
        for network in tuple(self.store.networks.values()):
            self.attempt("look after", network, partial(self._reap, network))

    def _reap(self, network: Network[OptionsT]) -> None:
        with self.hold(network):
            for endpoint in tuple(network.endpoints.values()):
                if endpoint.join is not None and self.driver.endpoint_is_gone(network, endpoint):
                    _log.warning("%r is gone, its container ended unnoticed: deleting it", endpoint)
                    self.count("container_gone")
                    self.free(network, endpoint)

    def free(self, network: Network[OptionsT], endpoint: Endpoint) -> None:
        """Delete an endpoint that Docker does not ask for any more. The network is held."""
        self.store.save(endpoint, intent="DeleteEndpoint")
        self._finish(endpoint, self._end_endpoint(network, endpoint))

    def settle(self, network: Network[OptionsT], endpoint: Endpoint) -> None:
        """Finish or undo what is half done with an endpoint. The network is held."""
        match endpoint.row.intent:
            case "CreateEndpoint" | "DeleteEndpoint":
                self.drop_endpoint(network, endpoint)
            case "Leave":
                self._end_join(network, endpoint)
            case "ProgramExternalConnectivity" | "RevokeExternalConnectivity":
                self._drop_external(network, endpoint)

    def hold(self, network: Network[OptionsT]) -> AbstractContextManager[None]:
        """Hold off calls on the network. Raises `Unavailable` where one of them goes on for long."""
        return self._locks.hold(network.id, _PATIENCE)

    def count(self, repair: Repair) -> None:
        """It is done."""
        with self._counting:
            self.repairs[repair] += 1

    def attempt(self, what: str, record: Network[OptionsT] | Endpoint, step: Callable[[], object]) -> bool:
        """Whether it could be done; else it is logged, since nobody waits for it."""
        try:
            step()
        except Exception as error:
            if isinstance(error, DriverError):
                _log.error("cannot %s %r: %s", what, record, error)
            else:
                _log.exception("cannot %s %r", what, record)
            self.count("failed")
            return False
        return True

    def close(self) -> None:
        """Wait until what is done after answers is done."""
        self.peers.close()
        self._rests.wait()

    def routes(self) -> Routes:
        """The methods that this driver has. What is missing here is a 404: "method not supported"."""
        driver, m = self.driver, messages
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
        programs = driver.overrides("program_external_connectivity")
        if programs != driver.overrides("revoke_external_connectivity"):
            raise TypeError(f"{type(driver).__name__} defines only one of program_ and revoke_external_connectivity")
        if programs:
            routes["ProgramExternalConnectivity"] = (m.ProgramExternalConnectivity, self._program_external)
            routes["RevokeExternalConnectivity"] = (m.EndpointRef, self._revoke_external)
        if driver.overrides("gw_alloc_check"):
            routes["GwAllocCheck"] = (m.GwAllocCheck, self._gw_alloc_check)
        if driver.scope == Scope.GLOBAL:
            routes["AllocateNetwork"] = (m.AllocateNetwork, self._allocations.allocate)
            routes["FreeNetwork"] = (m.NetworkRef, self._allocations.free)
        if self._connectivity == Scope.GLOBAL:
            routes["DiscoverNew"] = (m.Discovery, self.peers.discover_new)
            routes["DiscoverDelete"] = (m.Discovery, self.peers.discover_delete)
        return routes

    @property
    def _connectivity(self) -> Scope:
        """Only a driver of global connectivity is told of nodes."""
        discovers = self.driver.overrides("peer_joined") or self.driver.overrides("peer_left")
        return Scope.GLOBAL if discovers else self.driver.scope

    def _get_capabilities(self, _request: messages.Nothing, _body: bytes) -> bytes:
        self._allocations.doubt()
        return messages.encode(
            {
                "Scope": self.driver.scope,
                "ConnectivityScope": self._connectivity,
                "GwAllocChecker": self.driver.overrides("gw_alloc_check"),
            }
        )

    # -------------------------------------------------------------------------------------------------- networks

    def _create_network(self, request: messages.CreateNetwork, body: bytes) -> bytes:
        with self._locks.hold(request.network_id):
            calls.refuse_if_late()  # it has waited
            network = self.store.networks.get(request.network_id)
            is_swarms = self.driver.scope == Scope.GLOBAL
            if network is not None and is_swarms and not messages.same(network.row.request, body):
                # An engine that is killed forgets a swarm's networks, and its next version may say more of them.
                _log.warning("CreateNetwork: %r is created anew, with another request", network)
                self.store.save(network, intent="DeleteNetwork")
                self.drop_network(network)
                network = None
            if network is not None:
                _refuse_other_content(network, network.row.request, body)
                if network.row.intent is None:
                    if is_swarms:
                        self._is_asked_for_again(network)
                    return _DONE
            else:
                network = self.store.new_network(request, body)
                _ = network.options  # refused before anything is made
                self._rests.wait()  # it may want what a network that is going has
            self.store.save(network, intent="CreateNetwork")
            try:
                self.driver.create_network(network)
                calls.settle()
                self.store.save(network, intent=None)
            except Exception:
                self._undo(network, "CreateNetwork", lambda: self.drop_network(network))
                raise
            self.created(network)
            return _DONE

    def _is_asked_for_again(self, network: Network[OptionsT]) -> None:
        """An engine that was killed has forgotten its endpoints; of one whose answer was lost there are none yet."""
        for endpoint in tuple(network.endpoints.values()):
            _log.warning("CreateNetwork: %r still has %r, deleting it", network, endpoint)
            self.attempt("delete", endpoint, partial(self.drop_endpoint, network, endpoint))
        self.created(network)

    def _delete_network(self, request: messages.NetworkRef, _body: bytes) -> bytes:
        with self._locks.hold(request.network_id):
            network = self.store.networks.get(request.network_id)
            if network is None:
                _log.warning("DeleteNetwork: network %s is unknown, nothing to delete", request.network_id[:12])
                return _DONE
            self.store.save(network, intent="DeleteNetwork")
            for endpoint in tuple(network.endpoints.values()):
                _log.warning("DeleteNetwork: %r still has %r, deleting it first", network, endpoint)
                self.drop_endpoint(network, endpoint)
            self._finish(network, self.driver.delete_network(network))
            return _DONE

    def drop_network(self, network: Network[OptionsT]) -> None:
        """Remove a network that is half made or half deleted, to the end. It is held."""
        for endpoint in tuple(network.endpoints.values()):
            self.drop_endpoint(network, endpoint)
        if (rest := self.driver.delete_network(network)) is not None:
            rest()
        self.store.forget(network)

    def _finish(self, record: Network[OptionsT] | Endpoint, rest: Rest | None) -> None:
        """Forget the record, at once or when the rest is done."""
        if rest is None and self._rests.idle and record not in self._unfinished:
            self.store.forget(record)
            return

        def finish() -> None:
            if rest is not None:
                rest()
            if record not in self._unfinished:
                self.store.forget(record)

        network = self.store.networks[record.network_id] if isinstance(record, Endpoint) else None

        def finish_or_note() -> None:
            if not self.attempt("delete", record, finish) and network is not None:
                self._unfinished.add(network)

        # Gone for everybody but the file: should the plugin die, or fail, the next start finds there what is left.
        self.store.unlist(record)
        self._rests.submit(finish_or_note)

    def _gw_alloc_check(self, request: messages.GwAllocCheck, _body: bytes) -> bytes:
        options: Any = self.driver.options_type.parse(request.options.generic)
        return messages.encode(self.driver.gw_alloc_check(options, request.options))

    # ------------------------------------------------------------------------------------------------- endpoints

    def _create_endpoint(self, request: messages.CreateEndpoint, body: bytes) -> bytes:
        with self._locks.hold(request.network_id):
            calls.refuse_if_late()  # it has waited
            network = self._network(request.network_id)
            if network.row.intent is not None:  # its deletion failed, so Docker still has it
                self.driver.create_network(network)
                self.store.save(network, intent=None)
            if (found := self._find_whole_endpoint(request)) is not None:
                row = found[1].row
                _refuse_other_content(found[1], row.request, body)
                if row.answer is not None:
                    return row.answer
            endpoint = self.store.new_endpoint(request, body)
            if request.options.port_map and not self.driver.overrides("program_external_connectivity"):
                _log.warning("%r has ports to publish, and this driver publishes none", endpoint)
            self.store.save(endpoint, intent="CreateEndpoint")
            try:
                filled = self.driver.create_endpoint(network, endpoint) or EndpointInterface()
                answer = messages.encode(
                    messages.CreateEndpointAnswer(messages.only_new(filled, beside=request.interface))
                )
                calls.settle()
                self.store.save(endpoint, intent=None, answer=answer)
            except Exception:
                self._undo(endpoint, "CreateEndpoint", lambda: self.drop_endpoint(network, endpoint))
                raise
            return answer

    def _delete_endpoint(self, request: messages.EndpointRef, _body: bytes) -> bytes:
        with self._locks.hold(request.network_id):
            found = self._find_endpoint(request)
            if found is None:
                _log.warning("DeleteEndpoint: endpoint %s is unknown, nothing to delete", request.endpoint_id[:12])
                return _DONE
            network, endpoint = found
            self.store.save(endpoint, intent="DeleteEndpoint")
            self._finish(endpoint, self._end_endpoint(network, endpoint))
            return _DONE

    def drop_endpoint(self, network: Network[OptionsT], endpoint: Endpoint) -> None:
        """Remove an endpoint, whatever it has, to the end. Its network is held."""
        if endpoint.row.intent != "CreateEndpoint":
            self.store.save(endpoint, intent="DeleteEndpoint")
        if (rest := self._end_endpoint(network, endpoint)) is not None:
            rest()
        self.store.forget(endpoint)

    def _end_endpoint(self, network: Network[OptionsT], endpoint: Endpoint) -> Rest | None:
        # The engine revokes and leaves first, unless the plugin was down when it did.
        if endpoint.row.external_request is not None:
            self._drop_external(network, endpoint, then="DeleteEndpoint")
        if endpoint.may_be_joined:
            self._drop_join(network, endpoint)
        return self.driver.delete_endpoint(network, endpoint)

    def _endpoint_oper_info(self, request: messages.EndpointRef, _body: bytes) -> bytes:
        with self._locks.hold(request.network_id):
            network, endpoint = self._endpoint(request)
            return messages.encode({"Value": dict(self.driver.endpoint_oper_info(network, endpoint))})

    # ------------------------------------------------------------------------------------------ join and leave

    def _join(self, request: messages.JoinRequest, body: bytes) -> bytes:
        with self._locks.hold(request.network_id):
            calls.refuse_if_late()  # it has waited
            network, endpoint = self._endpoint(request)
            if endpoint.join is not None:
                _refuse_other_content(endpoint, endpoint.join.request, body)
                return endpoint.join.answer
            # No intent is written: after a crash every endpoint counts as one that may be joined.
            endpoint.may_be_joined = True
            try:
                join = self.driver.join(network, endpoint, Sandbox.of(request))
                answer = messages.encode(join.to_wire(endpoint.addresses, internal=network.internal))
                calls.settle()
                self.store.save_join(endpoint, body, answer)
            except Exception:
                self._undo(endpoint, "Join", lambda: self._drop_join(network, endpoint))
                raise
            self.joined(network, endpoint)
            return answer

    def _leave(self, request: messages.EndpointRef, _body: bytes) -> bytes:
        with self._locks.hold(request.network_id):
            found = self._find_whole_endpoint(request)
            if found is None or not found[1].may_be_joined:
                _log.warning("Leave: endpoint %s is in no sandbox, nothing to leave", request.endpoint_id[:12])
                return _DONE
            network, endpoint = found
            self.store.save(endpoint, intent="Leave")
            self._end_join(network, endpoint)
            return _DONE

    def _end_join(self, network: Network[OptionsT], endpoint: Endpoint) -> None:
        if endpoint.row.external_request is not None:
            self._drop_external(network, endpoint, then="Leave")
        self._drop_join(network, endpoint)
        self.store.save(endpoint, intent=None)

    def _drop_join(self, network: Network[OptionsT], endpoint: Endpoint) -> None:
        self.driver.leave(network, endpoint)
        self.store.forget_join(endpoint)

    # -------------------------------------------------------------------------------------- external connectivity

    def _program_external(self, request: messages.ProgramExternalConnectivity, body: bytes) -> bytes:
        try:
            return self._program_external_once(request, body)
        except Conflict:
            self.reap()  # who has the port may be dead
            return self._program_external_once(request, body)

    def _program_external_once(self, request: messages.ProgramExternalConnectivity, body: bytes) -> bytes:
        with self._locks.hold(request.network_id):
            calls.refuse_if_late()  # it has waited
            network, endpoint = self._endpoint(request)
            row = endpoint.row
            if row.external_request is not None and row.intent is None and messages.same(row.external_request, body):
                return _DONE
            self.store.save(endpoint, intent="ProgramExternalConnectivity", external_request=body)
            try:
                self.driver.program_external_connectivity(network, endpoint, request.options)
                calls.settle()
                self.store.save(endpoint, intent=None)
            except Exception:
                self._undo(endpoint, "ProgramExternalConnectivity", lambda: self._drop_external(network, endpoint))
                raise
            return _DONE

    def _revoke_external(self, request: messages.EndpointRef, _body: bytes) -> bytes:
        with self._locks.hold(request.network_id):
            found = self._find_whole_endpoint(request)
            # The engine also revokes what it never programmed, as on internal networks.
            if found is None or found[1].row.external_request is None:
                return _DONE
            network, endpoint = found
            self.store.save(endpoint, intent="RevokeExternalConnectivity")
            self._drop_external(network, endpoint)
            return _DONE

    def _drop_external(self, network: Network[OptionsT], endpoint: Endpoint, then: Operation | None = None) -> None:
        self.driver.revoke_external_connectivity(network, endpoint)
        self.store.save(endpoint, intent=then, external_request=None)

    # -------------------------------------------------------------------------------------------------- looking up

    def _network(self, network_id: str) -> Network[OptionsT]:
        network = self.store.networks.get(network_id)
        if network is None:
            raise NotFound(f"network {network_id[:12]} is unknown to this plugin")
        return network

    def _find_endpoint(self, request: _ToEndpoint) -> tuple[Network[OptionsT], Endpoint] | None:
        network = self.store.networks.get(request.network_id)
        endpoint = None if network is None else network.endpoints.get(request.endpoint_id)
        return None if network is None or endpoint is None else (network, endpoint)

    def _find_whole_endpoint(self, request: _ToEndpoint) -> tuple[Network[OptionsT], Endpoint] | None:
        """What is half done with it is finished or undone first, since its row can tell of one intent only.

        But not what is published: that is programmed again, or revoked, as often as it is asked for.
        """
        found = self._find_endpoint(request)
        if found is None or found[1].row.intent in (None, "ProgramExternalConnectivity", "RevokeExternalConnectivity"):
            return found
        _log.warning("%r: %s was not finished: finishing or undoing it", found[1], found[1].row.intent)
        self.count("half_done")
        self.settle(*found)
        return self._find_endpoint(request)

    def _endpoint(self, request: _ToEndpoint) -> tuple[Network[OptionsT], Endpoint]:
        found = self._find_whole_endpoint(request)
        if found is None:
            self._network(request.network_id)
            raise NotFound(f"endpoint {request.endpoint_id[:12]} is unknown to this plugin")
        return found

    @staticmethod
    def _undo(record: Network[OptionsT] | Endpoint, operation: Operation, undo: Callable[[], None]) -> None:
        """Take back what a method that failed may have made half of. The caller raises what it failed with."""
        try:
            undo()
        except Exception:
            # The row keeps its intent: it says what is half done.
            _log.exception("%s of %r failed, and so did undoing it", operation, record)


def _refuse_other_content(record: Network[Any] | Endpoint, known: bytes, body: bytes) -> None:
    if not messages.same(known, body):
        raise Conflict(f"{record!r} exists already, with another request")


class IpamLifecycle:
    """Serves the ``IpamDriver`` methods with a driver."""

    def __init__(self, driver: IpamDriver) -> None:
        self.driver = driver
        self.requested: Callable[[], None] = lambda: None
        """Told of each request for a pool, and of each engine that starts."""
        self._locks = Locks()

    def routes(self) -> Routes:
        """All methods."""
        m = messages
        return {
            "GetCapabilities": (m.Nothing, self._get_capabilities),
            "GetDefaultAddressSpaces": (m.Nothing, self._get_default_address_spaces),
            "RequestPool": (m.PoolRequest, self._request_pool),
            "ReleasePool": (m.PoolRef, self._release_pool),
            "RequestAddress": (m.AddressRequest, self._request_address),
            "ReleaseAddress": (m.AddressRef, self._release_address),
        }

    def _get_capabilities(self, _request: messages.Nothing, _body: bytes) -> bytes:
        self.driver.engine_starts()
        self.requested()
        return messages.encode(
            {
                "RequiresMACAddress": self.driver.requires_mac_address,
                "RequiresRequestReplay": self.driver.requires_request_replay,
            }
        )

    def _get_default_address_spaces(self, _request: messages.Nothing, _body: bytes) -> bytes:
        return messages.encode(
            {
                "LocalDefaultAddressSpace": self.driver.local_address_space,
                "GlobalDefaultAddressSpace": self.driver.global_address_space,
            }
        )

    def _request_pool(self, request: messages.PoolRequest, _body: bytes) -> bytes:
        self.requested()
        with self._locks.hold(""):  # the pool has no id yet
            calls.refuse_if_late()  # it has waited
            pool = self.driver.request_pool(request)
            self._settle(lambda: self.driver.release_pool(pool.pool_id))
            return messages.encode(pool)

    def _release_pool(self, request: messages.PoolRef, _body: bytes) -> bytes:
        with self._locks.hold(request.pool_id), self._locks.hold(""):
            self.driver.release_pool(request.pool_id)
            return _DONE

    def _request_address(self, request: messages.AddressRequest, _body: bytes) -> bytes:
        with self._locks.hold(request.pool_id):
            calls.refuse_if_late()  # it has waited
            address = self.driver.request_address(request)
            self._settle(lambda: self.driver.release_address(messages.AddressRef(request.pool_id, address.ip)))
            return messages.encode({"Address": address, "Data": {}})

    def _release_address(self, request: messages.AddressRef, _body: bytes) -> bytes:
        with self._locks.hold(request.pool_id):
            self.driver.release_address(request)
            return _DONE

    @staticmethod
    def _settle(undo: Callable[[], None]) -> None:
        """Take back what is given too late. Raises `Unavailable` then."""
        try:
            calls.settle()
        except Unavailable:
            try:
                undo()
            except Exception:
                _log.exception("what was given too late cannot be taken back")
            raise
