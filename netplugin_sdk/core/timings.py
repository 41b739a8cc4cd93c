"""How long the SDK waits."""

from __future__ import annotations

import msgspec


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Waits of the SDK, in seconds. The defaults fit Docker's engines; tests pass shorter ones."""

    call_lock: float = 30.0
    """A call waits for the calls before it on its network or pool: longer than an engine waits for its answer, so that
    threads do not gather before one that hangs."""
    repair_lock: float = 2.0
    """A repair waits for the calls on its network."""
    repair_delay_min: float = 0.2
    """From a loss to its repair, since losses come together."""
    repair_delay_max: float = 30.0
    """The same, when something is lost again and again."""
    engine_grace: float = 10.0
    """An engine that starts, makes a network or lost a request has this long before it is asked for its networks."""
    missing_grace: float = 30.0
    """Docker must not know a network or an endpoint for this long before it is deleted."""
    compare_every: float = 300.0
    """Docker is asked again: an engine with live-restore forgets endpoints and calls nobody."""
    query_timeout: float = 10.0
    """An engine has this long for an answer."""
    query_retry_min: float = 0.05
    """A query that failed is repeated: at first."""
    query_retry_max: float = 2.0
    """The same, at most."""
    query_expires: float = 60.0
    """A query that goes on failing is dropped, or repeated slowly if it is recurring."""
    query_retry_slow: float = 30.0
    """A recurring query that goes on failing is repeated."""
    agent_start: float = 60.0
    """Nodes that the engine's network agent announces within this time belong to one start of it."""
    node_lost: float = 120.0
    """A node that the gossip lost has left: workers find a manager that restarts alone after up to 60 s."""
