"""The swarm as a driver sees it: the options that its networks are allocated, and the nodes.

The swarm's own memory is the log of its managers. The state on disk here holds only the parts that this host was told,
and where the two differ the swarm is right. docs/swarm.md has the facts, and where they come from.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Generic

import msgspec

from netplugin_sdk.core import answers, calls
from netplugin_sdk.core.shared import Shared
from netplugin_sdk.errors import Conflict, InvalidRequest
from netplugin_sdk.ipam.number_pool import NumberPool, Strategy
from netplugin_sdk.network import Network, OptionsT
from netplugin_sdk.protocol import messages
from netplugin_sdk.protocol.messages import Node, Scope
from netplugin_sdk.values import IPAddress

_log = logging.getLogger("netplugin_sdk")

_DONE = b"{}"
_NEVER = float("inf")


class Allocations(Generic[OptionsT]):
    """``AllocateNetwork`` and ``FreeNetwork``, which the leader of the managers sends to its own plugin only.

    A manager that becomes the leader sends ``AllocateNetwork`` for each network, with the options that it was given
    before, by whichever manager's plugin. So the options of a request count more than those on disk. And those on disk
    may have been freed elsewhere: until it is asked for again, others get its numbers only if there are no more.
    """

    def __init__(self, shared: Shared[OptionsT]) -> None:
        driver = shared.driver
        self._driver, self._store, self._locks = driver, shared.store, shared.locks
        self.current: Mapping[str, Mapping[str, str]] = MappingProxyType({})
        """The options that each network is allocated, by its id. A mapping that was read does not change."""
        self._pools: dict[str, NumberPool] = {}
        self._guard = threading.Lock()  # of the pools: networks are allocated in parallel
        if driver.cluster_numbers:
            if driver.scope != Scope.GLOBAL:
                raise TypeError(f"{type(driver).__name__} has cluster_numbers, and its scope is not global")
            for name, numbers in driver.cluster_numbers.items():
                if numbers.step != 1:
                    raise TypeError(f"the cluster_numbers {name} have gaps: {numbers}")
                self._pools[name] = NumberPool(numbers.start, numbers.stop - 1)
        self._publish()
        self.mark_unconfirmed()

    def mark_unconfirmed(self) -> None:
        """Another manager may have led since (``GetCapabilities``, which comes as a manager begins to lead)."""
        with self._guard:
            for network_id in tuple(self._store.allocations):
                self._hold(network_id)

    def allocate(self, request: messages.AllocateNetwork, body: bytes) -> bytes:
        """``AllocateNetwork``."""
        network_id = request.network_id
        with self._locks.hold(network_id):
            calls.refuse_if_late()  # it has waited
            known = self._store.allocations.get(network_id)
            try:
                numbers = self._take(network_id, request.options)
                if known is not None and messages.same(known.request, body):
                    return known.answer
                options = {**request.options, **numbers}
                try:
                    given = answers.allocate_network(
                        self._driver.allocate_network(msgspec.structs.replace(request, options=options))
                    )
                    # The answer replaces the network's options: the nodes get no others.
                    answer = messages.encode({"Options": {**options, **given, **numbers}})
                    calls.commit()
                    self._store.save_allocation(network_id, body, answer)
                except BaseException:
                    if known is None:
                        self._undo(network_id)
                    raise
            except BaseException:
                with self._guard:
                    self._release(network_id)
                    if known is not None:
                        self._hold(network_id)
                        self._confirm(network_id)
                raise
            self._publish()
            return answer

    def _undo(self, network_id: str) -> None:
        try:
            self._driver.free_network(network_id)
        except BaseException:
            _log.exception("AllocateNetwork of network %s failed, and so did undoing it", network_id[:12])

    def free(self, request: messages.NetworkRef, _body: bytes) -> bytes:
        """``FreeNetwork``."""
        with self._locks.hold(request.network_id):
            if request.network_id not in self._store.allocations:
                # Another manager led when it was allocated, or this is said again.
                _log.info("FreeNetwork: network %s is not allocated here, nothing to free", request.network_id[:12])
                return _DONE
            self._driver.free_network(request.network_id)
            self._store.forget_allocation(request.network_id)
            with self._guard:
                self._release(request.network_id)
            self._publish()
            return _DONE

    def _publish(self) -> None:
        with self._guard:
            rows = tuple(self._store.allocations.values())
            self.current = MappingProxyType({row.network_id: MappingProxyType(_options(row.answer)) for row in rows})

    # ---------------------------------------------------------------------------------------------------- numbers

    def _take(self, network_id: str, options: Mapping[str, str]) -> dict[str, str]:
        """The network's numbers: those that its options hold, else those that it had, else free ones."""
        with self._guard:
            taken = {}
            for name, pool in self._pools.items():
                if name in options:
                    number = _read(options[name])
                    if number is None:
                        raise InvalidRequest(f"{name} must be a whole number, got {options[name][:80]!r}")
                    if pool.of(network_id) != number:
                        _release(pool, network_id)
                    try:
                        pool.take(number, network_id)
                    except (Conflict, InvalidRequest) as error:
                        raise type(error)(f"{name} cannot be had: {error}") from None
                else:
                    # By a hash: another manager that is asked would say the same, and it is not soon used again.
                    number = pool.allocate(network_id, strategy=Strategy.HASHED)
                self._revoke_duplicates(name, number, but=network_id)
                taken[name] = str(number)
            return taken

    def _revoke_duplicates(self, name: str, number: int, *, but: str) -> None:
        """Forget networks that had this number, and that the leader has not asked for again."""
        text = str(number)
        for row in tuple(self._store.allocations.values()):
            if row.network_id != but and _options(row.answer).get(name) == text:
                _log.warning("%s %s: network %s has it now, instead of %s", name, text, but[:12], row.network_id[:12])
                self._store.forget_allocation(row.network_id)
                self._release(row.network_id)

    def _hold(self, network_id: str) -> None:
        options = _options(self._store.allocations[network_id].answer)
        for name, pool in self._pools.items():
            number = _read(options.get(name, ""))
            if number is None or not pool.first <= number <= pool.last:
                continue  # an older version of the driver gave it
            if pool.of(network_id) in (None, number):  # else it is being allocated another one
                pool.hold(number, _NEVER, network_id)

    def _confirm(self, network_id: str) -> None:
        for pool in self._pools.values():
            if (number := pool.of(network_id)) is not None:
                pool.take(number, network_id)

    def _release(self, network_id: str) -> None:
        for pool in self._pools.values():
            _release(pool, network_id)


def _release(pool: NumberPool, owner: str) -> None:
    if (number := pool.of(owner)) is not None:
        pool.take(number, owner)  # a held number cannot be released
        pool.release(number)


def _read(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


class _Answer(msgspec.Struct):
    options: dict[str, str] = msgspec.field(name="Options")


def _options(answer: bytes) -> dict[str, str]:
    return msgspec.json.decode(answer, type=_Answer).options


class Peers(Generic[OptionsT]):
    """``DiscoverNew`` and ``DiscoverDelete``, which the engine derives from its gossip about addresses.

    The set on disk counts. It changes first, then the driver is told, network by network. Where that fails, or
    this node has changed, `restore` asks for the driver's `create_network` of each network, which finds the set.

    A node that the gossip loses is one of the set for a while: mostly it is only unreachable, or its engine restarts
    while its containers go on, and the engines take up to a minute to find each other again.
    """

    def __init__(self, shared: Shared[OptionsT], restore: Callable[[], None]) -> None:
        self.this_node: Node | None = None
        """This host as a node; None until the engine has told."""
        self.current: Mapping[IPAddress, Node] = MappingProxyType({})
        """The other nodes by address. A mapping that was read does not change."""
        self._shared = shared
        self._driver, self._store, self._timings = shared.driver, shared.store, shared.timings
        self._restore = restore
        self._lock = threading.Lock()
        self._joins: dict[str, list[float]] = {}
        """Address → when nodes of it joined that have not left, since the engine's agent started."""
        self._agent_started: float | None = None
        self._lost: dict[IPAddress, float] = {}
        """Nodes that the gossip has lost: when they will have left."""
        self._timer: threading.Timer | None = None
        self._peers: dict[IPAddress, Node] = {}
        self._read()

    def close(self) -> None:
        """Stop the timer: no node leaves any more."""
        with self._lock:
            self._lost.clear()
            if self._timer is not None:
                self._timer.cancel()

    def discover_new(self, request: messages.Discovery, body: bytes) -> bytes:
        """``DiscoverNew``."""
        if (node := request.node) is not None:
            with self._lock:
                if node.is_self:
                    self._is_this(node, body)
                else:
                    self._join(node, body)
        return _DONE

    def discover_delete(self, request: messages.Discovery, _body: bytes) -> bytes:
        """``DiscoverDelete``."""
        if (node := request.node) is not None and not node.is_self:
            with self._lock:
                joins = self._joins.get(str(node.address), [])
                if joins:
                    joins.pop(0)
                if joins:
                    # Its engine was killed and is back already: the gossip gives the earlier one up only now.
                    _log.info("a node at %s left, another one of the same address is there", node.address)
                elif node.address in self.current:
                    _log.info("the gossip has lost the node at %s", node.address)
                    self._lost.setdefault(node.address, time.monotonic() + self._timings.node_lost)
                    self._wait_for_lost()
        return _DONE

    def _wait_for_lost(self) -> None:
        if self._timer is None and self._lost:
            self._timer = threading.Timer(min(self._lost.values()) - time.monotonic(), self._end_lost)
            self._timer.daemon = True
            self._timer.start()

    def _end_lost(self) -> None:
        """Let the nodes leave that have been lost for long enough."""
        with self._lock:
            self._timer = None
            now = time.monotonic()
            for address in [address for address, until in self._lost.items() if until <= now]:
                try:
                    self._leave(self.current[address])
                except Exception:  # the disk's
                    _log.exception("the node at %s cannot be forgotten", address)
                    self._lost[address] = now + self._timings.node_lost
            self._wait_for_lost()

    def _is_this(self, node: Node, body: bytes) -> None:
        before = self.this_node
        if node.bind_address is not None:
            self._agent_starts()
        elif before is not None:
            return  # the gossip's address of this node, which need not be that of its data (--data-path-addr)
        if (other := self.current.get(node.address)) is not None:
            self._leave(other)
        if node != before:
            self._store.save_node(str(node.address), body)
            if before is not None and before.address != node.address:
                self._store.forget_node(str(before.address))
            self.this_node = node
            self._restore()

    def _agent_starts(self) -> None:
        """An agent that starts tells all other nodes again; but one also says so when a plugin is enabled.

        A second one in the life of this process is a new one: this node left its swarm, and is in another now.
        """
        now = time.monotonic()
        before, self._agent_started = self._agent_started, now
        if before is None or now - before < self._timings.agent_start:
            return
        recent = {
            address: [at for at in joins if now - at < self._timings.agent_start]
            for address, joins in self._joins.items()
        }
        self._joins = {address: joins for address, joins in recent.items() if joins}
        for node in self.current.values():
            if str(node.address) not in self._joins:
                self._leave(node)

    def _join(self, node: Node, body: bytes) -> None:
        this = self.this_node
        if this is not None and node.address == this.address:
            return
        self._joins.setdefault(str(node.address), []).append(time.monotonic())
        was_lost = self._lost.pop(node.address, None) is not None
        if node.address not in self.current:
            self._store.save_node(str(node.address), body)
            self._peers[node.address] = node
            self._publish()
        elif not was_lost:
            return
        self._tell(node, self._driver.peer_joined)

    def _leave(self, node: Node) -> None:
        self._joins.pop(str(node.address), None)
        self._lost.pop(node.address, None)
        if node.address in self.current:
            self._store.forget_node(str(node.address))
            del self._peers[node.address]
            self._publish()
            self._tell(node, self._driver.peer_left)

    def _tell(self, node: Node, event: Callable[[Network[OptionsT], Node], None]) -> None:
        if event.__name__ not in self._shared.defined:
            return
        done = True
        for network in self._store.networks.values():
            try:
                with self._shared.locked(network):
                    if self._store.lists(network) and network.row.intent is None:
                        event(network, node)
            except BaseException:
                _log.exception("%s of node %s failed for %r", event.__name__, node.address, network)
                done = False
        if not done:
            self._restore()

    def _read(self) -> None:
        for row in self._store.nodes.values():
            node = messages.decode(messages.Discovery, row.request).node
            if node is not None and node.is_self:
                self.this_node = node
            elif node is not None:
                self._peers[node.address] = node
        self._publish()

    def _publish(self) -> None:
        # Another one each time, since other threads may iterate over it.
        self.current = MappingProxyType(self._peers.copy())
