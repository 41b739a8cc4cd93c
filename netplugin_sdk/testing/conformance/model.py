"""The terms of the conformance suite: a subject, a check with its requirements, a result with its outcome."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from netplugin_sdk.cnm.remote import TLS
from netplugin_sdk.testing.recording import Exchange


class Group(enum.StrEnum):
    """The subject of a check."""

    PROTOCOL = "protocol"
    LIFECYCLE = "lifecycle"
    AT_LEAST_ONCE = "at least once"
    ERRORS = "errors"
    RESTART = "restart"
    CONCURRENCY = "concurrency"
    IPAM = "IPAM"
    DATA_PLANE = "data plane"


class Requirement(enum.StrEnum):
    """The condition for a check to be run."""

    NETWORK_DRIVER = "NetworkDriver"
    """The plugin implements this kind of driver."""
    IPAM_DRIVER = "IpamDriver"
    RESTART = "restart"
    """`Subject.restart` is given."""
    DATA_PLANE = "data plane"
    """`Subject.data_plane` is set."""


class Outcome(enum.StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    """A requirement is missing, or an earlier check has not passed; the message says which."""


class Failed(Exception):
    """The plugin does not keep to the contract; the text says how."""


@dataclass(frozen=True)
class Subject:
    """The plugin that is checked.

    Args:
        url: where it listens: ``unix:///run/docker/plugins/x.sock``, ``tcp://…``, ``https://…``.
        tls: the files for ``https``.
        options: driver options (``-o``) of each network.
        subnets: IPv4 networks for the checks, a /24 each; () for a driver that needs the null IPAM driver.
        restart: kills the plugin with SIGKILL, starts it again and returns when it listens. Without it, the checks that
            need a restart are skipped.
        data_plane: whether the plugin's links are in this network namespace, so that sandboxes can be joined to them.
        timeout: seconds that the plugin may take for one answer; an engine waits as long as this default.
    """

    url: str
    tls: TLS | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    subnets: Sequence[str] = tuple(f"10.213.{n}.0/24" for n in range(100))
    restart: Callable[[], None] | None = None
    data_plane: bool = True
    timeout: float = 30.0


@dataclass(frozen=True)
class Check:
    """One thing that an engine relies on."""

    id: str
    """The function's name, with hyphens."""
    group: Group
    proves: str
    """One sentence that is true of a plugin that passes."""
    source: str
    """Where Docker relies on it: a file of moby, or a document."""
    hint: str
    """The place to look at if it fails."""
    function: Callable[..., None]
    """Takes a session; raises ``Failed`` if the plugin does not keep to the contract."""
    requires: frozenset[Requirement]
    after: tuple[str, ...]
    """Ids of the checks that must have passed, in their order; so the cause is reported, not its effects."""


@dataclass(frozen=True)
class Result:
    """How one check ended."""

    check: Check
    outcome: Outcome
    message: str
    """Why it failed or was skipped; else empty."""
    seconds: float
    conversation: tuple[Exchange, ...]
    """All requests of the check, with their answers."""
