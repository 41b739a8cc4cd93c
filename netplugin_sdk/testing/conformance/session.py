"""What a check is, whom it asks, and what comes of it."""

from __future__ import annotations

import enum
import http.client
import itertools
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from netplugin_sdk.cnm import NetworkController, RemoteError, RemotePlugin, Subnet
from netplugin_sdk.cnm.remote import ACCEPT, TLS, Address, Patience
from netplugin_sdk.errors import DriverError, Unavailable
from netplugin_sdk.protocol import messages
from netplugin_sdk.testing.recording import Exchange, refusal, short

if TYPE_CHECKING:
    from netplugin_sdk.testing.conformance.report import Report

_HOST = "plugin.moby.localhost"
_TIMEOUT = 30.0  # an engine's patience


class Group(enum.StrEnum):
    """What a check is about."""

    PROTOCOL = "protocol"
    LIFECYCLE = "lifecycle"
    AT_LEAST_ONCE = "at least once"
    ERRORS = "errors"
    RESTART = "restart"
    CONCURRENCY = "concurrency"
    IPAM = "IPAM"
    DATA_PLANE = "data plane"


class Outcome(enum.StrEnum):
    """Of a check."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    """It does not apply, or something is missing; the message says what."""


class Failed(Exception):
    """The plugin does not keep to the contract; the text says in what."""


class Skipped(Exception):
    """The check cannot be made; the text says why."""


@dataclass(frozen=True)
class Subject:
    """The plugin that is checked.

    Args:
        url: where it listens: ``unix:///run/docker/plugins/x.sock``, ``tcp://…``, ``https://…``.
        tls: the files for ``https``.
        options: ``-o`` of each network.
        subnets: IPv4 networks for the checks, a /24 each; () for a driver that wants the null IPAM driver.
        restart: kills it with SIGKILL, starts it again and returns when it listens; None skips what needs it.
        data_plane: whether its links are here, so that sandboxes can be made and joined.
    """

    url: str
    tls: TLS | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    subnets: Sequence[str] = tuple(f"10.213.{n}.0/24" for n in range(100))
    restart: Callable[[], None] | None = None
    data_plane: bool = True


@dataclass(frozen=True)
class Answer:
    """Of one request."""

    status: int
    body: bytes

    @property
    def content(self) -> dict[str, Any]:
        """The JSON object in it. Raises `Failed` if there is none."""
        try:
            decoded = json.loads(self.body)
        except ValueError:
            raise Failed(f"the answer is no JSON: {short(self.body)!r}") from None
        if not isinstance(decoded, dict):
            raise Failed(f"the answer is no JSON object: {short(self.body)!r}")
        return decoded

    @property
    def error(self) -> str:
        """What an engine would take for an error; "" if it takes it for success (moby ``pkg/plugins/client.go``)."""
        return refusal(self.status, self.body)


Step: TypeAlias = "Callable[[Session], None]"


@dataclass(frozen=True)
class Check:
    """One thing that an engine relies on."""

    id: str
    group: Group
    proves: str
    source: str
    """Where Docker relies on it: a file of moby, or a document."""
    hint: str
    """What to look at if it fails."""
    step: Step
    needs: frozenset[str]
    """``NetworkDriver``, ``IpamDriver``, ``restart``, ``data plane``, and ids of checks that it must have passed."""


@dataclass(frozen=True)
class Result:
    """What came of a check."""

    check: Check
    outcome: Outcome
    message: str
    seconds: float
    conversation: tuple[Exchange, ...]


CHECKS: dict[str, Check] = {}
"""All checks by id, in the order in which they are made."""


def check(id_: str, group: Group, *, needs: Iterable[str], source: str, hint: str) -> Callable[[Step], Step]:
    """Register a function as a check; its docstring is what it proves."""

    def register(step: Step) -> Step:
        proves = " ".join((step.__doc__ or "").split())
        CHECKS[id_] = Check(id_, group, proves, source, hint, step, frozenset(needs))
        return step

    return register


def expect(condition: object, otherwise: str) -> None:
    """Raise `Failed` unless it holds."""
    if not condition:
        raise Failed(otherwise)


class Session:
    """What a check asks a plugin. What it makes is removed when it ends."""

    def __init__(self, subject: Subject, implements: Sequence[str] = (), *, is_global: bool = False) -> None:
        self.subject, self.implements = subject, implements
        self.is_global = is_global
        """Whether its networks are a swarm's."""
        self.conversation: list[Exchange] = []
        self._plugin = RemotePlugin(Address("plugin", subject.url, subject.tls), timeout=_TIMEOUT)
        self._undo: list[Callable[[], object]] = []
        self._numbers = itertools.count()
        self._guard = threading.Lock()

    def close(self) -> None:
        """Remove what was made, whatever it is by now."""
        while self._undo:
            with suppress(Failed, OSError, http.client.HTTPException):
                self._undo.pop()()
        self._plugin.close()

    # ------------------------------------------------------------------------------------------------- requests

    @contextmanager
    def connection(self) -> Iterator[http.client.HTTPConnection]:
        """A new connection to the plugin."""
        connection = http.client.HTTPConnection(_HOST)
        connection.auto_open = 0  # it would look for a host of this name
        connection.sock = self._plugin.dial()
        with closing(connection):
            yield connection

    def post(self, path: str, body: bytes, *, headers: Mapping[str, str] = {}) -> Answer:
        """One request as bytes, on a connection of its own. Raises `Failed` if there is no answer."""
        try:
            with self.connection() as connection:
                return self.exchange(connection, path, body, headers=headers)
        except (OSError, http.client.HTTPException, Unavailable) as error:
            raise Failed(f"{path[1:]}: no answer: {error or type(error).__name__}") from error

    def exchange(
        self, connection: http.client.HTTPConnection, path: str, body: bytes, *, headers: Mapping[str, str] = {}
    ) -> Answer:
        """One request on this connection."""
        connection.request("POST", path, body, {"Accept": ACCEPT, **headers})
        response = connection.getresponse()
        answer = Answer(response.status, response.read())
        with self._guard:
            self.conversation.append(Exchange(path[1:], body, answer.status, answer.body))
        return answer

    def ask(self, method: str, **request: Any) -> Answer:
        """One request; `method` without a dot is a NetworkDriver's."""
        return self.post(f"/{_whole(method)}", json.dumps(request).encode())

    def call(self, method: str, **request: Any) -> dict[str, Any]:
        """The content of an answer. Raises `Failed` if it is an error."""
        answer = self.ask(method, **request)
        expect(answer.status == 200 and not answer.error, f"{_whole(method)}: {answer.error or answer.status}")
        return answer.content

    def refused(self, method: str, **request: Any) -> str:
        """The error. Raises `Failed` if it is a success."""
        answer = self.ask(method, **request)
        expect(answer.error, f"{_whole(method)} succeeds, where it must not")
        return answer.error

    def later(self, method: str, **request: Any) -> None:
        """Ask this when the check ends, to remove something."""
        self._undo.append(partial(self.ask, method, **request))

    # --------------------------------------------------------------------------------- networks and endpoints

    def network(self, *, internal: bool = False) -> Made:
        """Create one."""
        network = self.new_network(internal=internal)
        self.call("CreateNetwork", **network.request)
        return network

    def new_network(self, *, internal: bool = False) -> Made:
        """One that is not created yet, and is removed if it is."""
        made = Made(secrets.token_hex(32))
        options: dict[str, Any] = {
            messages.ENABLE_IPV4: True,
            messages.ENABLE_IPV6: False,
            messages.GENERIC: dict(self.subject.options),
        }
        if internal:
            options[messages.INTERNAL] = True
        data = {"AddressSpace": "", "Pool": "0.0.0.0/0"}
        if self.subject.subnets:
            with self._guard:
                made.subnet = self.subject.subnets[next(self._numbers) % len(self.subject.subnets)]
            gateway = f"{made.host(1)}/24"
            data = {"AddressSpace": "LocalDefault", "Pool": made.subnet, "Gateway": gateway}
        if self.is_global:  # as the leader of a swarm's managers, whose answer replaces the options
            self.later("FreeNetwork", NetworkID=made.id)
            allocated = self.call(
                "AllocateNetwork", NetworkID=made.id, Options=options[messages.GENERIC], IPv4Data=[data], IPv6Data=None
            )
            options[messages.GENERIC] = allocated.get("Options") or {}
        made.request = {"NetworkID": made.id, "Options": options, "IPv4Data": [data], "IPv6Data": []}
        self.later("DeleteNetwork", NetworkID=made.id)
        return made

    def endpoint(self, network: Made) -> Made:
        """Create one."""
        endpoint = self.new_endpoint(network)
        endpoint.answer = self.call("CreateEndpoint", **endpoint.request)
        return endpoint

    def new_endpoint(self, network: Made) -> Made:
        """One that is not created yet, and is removed if it is."""
        made = Made(secrets.token_hex(32), network.subnet)
        with self._guard:
            address = f"{network.host(next(network.hosts))}/24" if network.subnet else ""
        interface = {"Address": address, "AddressIPv6": "", "MacAddress": ""}
        options: dict[str, Any] = {messages.EXPOSED_PORTS: [], messages.PORT_MAP: []}
        made.ids = {"NetworkID": network.id, "EndpointID": made.id}
        made.request = {**made.ids, "Interface": interface, "Options": options}
        self.later("DeleteEndpoint", **made.ids)
        return made

    def join(self, endpoint: Made) -> dict[str, Any]:
        """Join it to a sandbox that is not there: a driver only remembers where it is."""
        self.later("Leave", **endpoint.ids)
        return self.call("Join", **endpoint.joining)

    def restart(self) -> None:
        """Kill the plugin and start it again."""
        assert self.subject.restart is not None
        self.subject.restart()

    @contextmanager
    def controller(self) -> Iterator[NetworkController]:
        """Docker's side with real sandboxes. What the plugin refuses there raises `Failed`."""
        remote = RemotePlugin(
            Address("plugin", self.subject.url, self.subject.tls), timeout=_TIMEOUT, patience=Patience(total=0)
        )
        try:
            with remote, NetworkController(find=lambda _: Recording(remote, self.conversation)) as controller:
                yield controller
        except RemoteError as error:
            raise Failed(str(error)) from error

    def subnet(self, number: int) -> list[Subnet]:
        """For a network of the controller's."""
        return [Subnet.parse(self.subject.subnets[-1 - number])]


def _whole(method: str) -> str:
    return method if "." in method else f"NetworkDriver.{method}"


@dataclass
class Made:
    """A network or an endpoint that a check makes."""

    id: str
    subnet: str = ""
    request: dict[str, Any] = field(default_factory=dict)
    """That creates it."""
    ids: dict[str, str] = field(default_factory=dict)
    """Of an endpoint: what names it in its other requests."""
    answer: dict[str, Any] = field(default_factory=dict)
    hosts: Iterator[int] = field(default_factory=lambda: itertools.count(2))

    @property
    def joining(self) -> dict[str, Any]:
        """The request that joins it."""
        return {**self.ids, "SandboxKey": f"/run/docker/netns/{self.id[:12]}", "Options": self.request["Options"]}

    def host(self, number: int) -> str:
        """An address of the subnet."""
        return f"{self.subnet.rpartition('.')[0]}.{number}"


class Recording:
    """A plugin as the controller asks it, with the conversation kept."""

    def __init__(self, plugin: RemotePlugin, conversation: list[Exchange]) -> None:
        self._plugin, self._conversation = plugin, conversation

    def activate(self, kind: str) -> object:
        """Ask what it is."""
        return self._plugin.activate(kind)

    def call(self, method: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer."""
        request = b"" if content is None else json.dumps(content).encode()
        try:
            answer = self._plugin.call(method, content)
        except RemoteError as error:
            self._conversation.append(Exchange(method, request, error.http_status, str(error).encode()))
            raise
        self._conversation.append(Exchange(method, request, 200, json.dumps(answer).encode()))
        return answer


def run(
    subject: Subject, checks: Iterable[Check] | None = None, *, told: Callable[[Result], object] = lambda _: None
) -> Report:
    """Make all checks, or these, one after the other. `told` hears of each result."""
    from netplugin_sdk.testing.conformance.report import Report  # noqa: PLC0415

    implements, is_global = _implements(subject)
    results: dict[str, Result] = {}
    for each in CHECKS.values() if checks is None else checks:
        results[each.id] = _make(each, Session(subject, implements, is_global=is_global), results)
        told(results[each.id])
    return Report(subject, tuple(results.values()))


def _implements(subject: Subject) -> tuple[tuple[str, ...], bool]:
    """The kinds of driver that it is, and whether its networks are a swarm's."""
    implements: tuple[str, ...] = ()
    with closing(Session(subject)) as session, suppress(Failed, TypeError, AttributeError):
        implements = tuple(session.post("/Plugin.Activate", b"").content.get("Implements") or ())
        if "NetworkDriver" in implements:
            capabilities = session.post("/NetworkDriver.GetCapabilities", b"").content
            return implements, capabilities.get("Scope") == "global"
    return implements, False


def _make(each: Check, session: Session, before: Mapping[str, Result]) -> Result:
    began = time.monotonic()
    with closing(session):
        outcome, message = Outcome.PASSED, ""
        try:
            if missing := _missing(each, session.subject, session.implements, before):
                raise Skipped(missing)
            each.step(session)
        except Skipped as why:
            outcome, message = Outcome.SKIPPED, str(why)
        except (Failed, DriverError) as why:
            outcome, message = Outcome.FAILED, str(why)
        conversation = tuple(session.conversation)
    return Result(each, outcome, message, time.monotonic() - began, conversation)


def _missing(each: Check, subject: Subject, implements: Sequence[str], before: Mapping[str, Result]) -> str:
    for kind in ("NetworkDriver", "IpamDriver"):
        if kind in each.needs and kind not in implements:
            return f"the plugin is no {kind}"
    if "restart" in each.needs and subject.restart is None:
        return "nobody says how to restart the plugin"
    if "data plane" in each.needs and not subject.data_plane:
        return "its links are not here"
    not_passed = [id_ for id_ in each.needs if id_ in before and before[id_].outcome is not Outcome.PASSED]
    return f"the check {min(not_passed)} has to pass first" if not_passed else ""
