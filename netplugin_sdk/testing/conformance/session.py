"""A check's conversation with a plugin: requests, the networks and endpoints that it makes, and their removal."""

from __future__ import annotations

import http.client
import itertools
import json
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from netplugin_sdk.cnm import NetworkController, RemoteError, RemotePlugin, Subnet
from netplugin_sdk.cnm.remote import ACCEPT, Address, Patience
from netplugin_sdk.errors import Unavailable
from netplugin_sdk.protocol import messages
from netplugin_sdk.testing.conformance.model import Failed, Subject
from netplugin_sdk.testing.recording import Exchange, refusal, short

_HOST = "plugin.moby.localhost"


@dataclass(frozen=True)
class Answer:
    """The answer to one request."""

    status: int
    body: bytes

    @property
    def content(self) -> dict[str, Any]:
        """The JSON object in the body. Raises `Failed` if the body is not one."""
        try:
            decoded = json.loads(self.body)
        except ValueError:
            raise Failed(f"the answer is not JSON: {short(self.body)!r}") from None
        if not isinstance(decoded, dict):
            raise Failed(f"the answer is not a JSON object: {short(self.body)!r}")
        return decoded

    @property
    def error(self) -> str:
        """The error that an engine would see; "" if it would see success (moby ``pkg/plugins/client.go``)."""
        return refusal(self.status, self.body)


def expect(condition: object, message: str) -> None:
    """Raise `Failed` with this message unless the condition holds."""
    if not condition:
        raise Failed(message)


class Session:
    """One check's requests to a plugin. `close` removes the networks and endpoints that the check made.

    Methods may be called from any thread.
    """

    def __init__(self, subject: Subject, *, is_global: bool = False) -> None:
        self.subject = subject
        self.is_global = is_global
        """Whether the plugin's networks span a swarm."""
        self.conversation: list[Exchange] = []
        self._plugin = RemotePlugin(Address("plugin", subject.url, subject.tls), timeout=subject.timeout)
        self._cleanups: list[Callable[[], object]] = []
        self._numbers = itertools.count()
        self._guard = threading.Lock()

    def close(self) -> None:
        """Remove everything that the check made, last things first, in any state."""
        while self._cleanups:
            with suppress(Failed, OSError, http.client.HTTPException):
                self._cleanups.pop()()
        self._plugin.close()

    # ------------------------------------------------------------------------------------------------- requests

    @contextmanager
    def connection(self) -> Iterator[http.client.HTTPConnection]:
        """A new connection to the plugin."""
        connection = http.client.HTTPConnection(_HOST)
        connection.auto_open = 0  # else a closed connection would be opened again, to a host of this name
        connection.sock = self._plugin.dial()
        with closing(connection):
            yield connection

    def post(self, path: str, body: bytes, *, headers: Mapping[str, str] = {}) -> Answer:
        """Send one request as bytes, on a connection of its own. Raises `Failed` if there is no answer."""
        try:
            with self.connection() as connection:
                return self.exchange(connection, path, body, headers=headers)
        except (OSError, http.client.HTTPException, Unavailable) as error:
            raise Failed(f"{path[1:]}: no answer: {error or type(error).__name__}") from error

    def exchange(
        self, connection: http.client.HTTPConnection, path: str, body: bytes, *, headers: Mapping[str, str] = {}
    ) -> Answer:
        """Send one request on this connection."""
        connection.request("POST", path, body, {"Accept": ACCEPT, **headers})
        response = connection.getresponse()
        answer = Answer(response.status, response.read())
        with self._guard:
            self.conversation.append(Exchange(path[1:], body, answer.status, answer.body))
        return answer

    def ask(self, method: str, **request: Any) -> Answer:
        """Send one request. A `method` without a dot is one of NetworkDriver."""
        return self.post(f"/{_full_name(method)}", json.dumps(request).encode())

    def call(self, method: str, **request: Any) -> dict[str, Any]:
        """Send one request and return the content of the answer. Raises `Failed` if the answer is an error."""
        answer = self.ask(method, **request)
        expect(answer.status == 200 and not answer.error, f"{_full_name(method)}: {answer.error or answer.status}")
        return answer.content

    def expect_error(self, method: str, **request: Any) -> str:
        """Send one request and return the error. Raises `Failed` if the plugin answers with success."""
        answer = self.ask(method, **request)
        expect(answer.error, f"{_full_name(method)} succeeds, and must be refused")
        return answer.error

    def call_at_close(self, method: str, **request: Any) -> None:
        """Send this request when the check ends, to remove something."""
        self._cleanups.append(partial(self.ask, method, **request))

    # --------------------------------------------------------------------------------- networks and endpoints

    def network(self, *, internal: bool = False) -> Resource:
        """Create a network."""
        network = self.new_network(internal=internal)
        self.call("CreateNetwork", **network.request)
        return network

    def new_network(self, *, internal: bool = False) -> Resource:
        """A network that is not created yet. If the check creates it, `close` removes it."""
        made = Resource(secrets.token_hex(32))
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
        if self.is_global:  # as the leader of a swarm's managers does; its answer replaces the options
            self.call_at_close("FreeNetwork", NetworkID=made.id)
            allocated = self.call(
                "AllocateNetwork", NetworkID=made.id, Options=options[messages.GENERIC], IPv4Data=[data], IPv6Data=None
            )
            options[messages.GENERIC] = allocated.get("Options") or {}
        made.request = {"NetworkID": made.id, "Options": options, "IPv4Data": [data], "IPv6Data": []}
        self.call_at_close("DeleteNetwork", NetworkID=made.id)
        return made

    def endpoint(self, network: Resource) -> Resource:
        """Create an endpoint."""
        endpoint = self.new_endpoint(network)
        self.call("CreateEndpoint", **endpoint.request)
        return endpoint

    def new_endpoint(self, network: Resource) -> Resource:
        """An endpoint that is not created yet. If the check creates it, `close` removes it."""
        made = Resource(secrets.token_hex(32), network.subnet)
        with self._guard:
            address = f"{network.host(next(network.hosts))}/24" if network.subnet else ""
        interface = {"Address": address, "AddressIPv6": "", "MacAddress": ""}
        options: dict[str, Any] = {messages.EXPOSED_PORTS: [], messages.PORT_MAP: []}
        made.ids = {"NetworkID": network.id, "EndpointID": made.id}
        made.request = {**made.ids, "Interface": interface, "Options": options}
        self.call_at_close("DeleteEndpoint", **made.ids)
        return made

    def join(self, endpoint: Resource) -> dict[str, Any]:
        """Join the endpoint to a sandbox that does not exist: a driver only remembers its path."""
        self.call_at_close("Leave", **endpoint.ids)
        return self.call("Join", **endpoint.join_request)

    def restart(self) -> None:
        """Kill the plugin and start it again."""
        assert self.subject.restart is not None
        self.subject.restart()

    @contextmanager
    def controller(self) -> Iterator[NetworkController]:
        """Docker's side with real sandboxes. A request that the plugin refuses raises `Failed`."""
        remote = RemotePlugin(
            Address("plugin", self.subject.url, self.subject.tls),
            timeout=self.subject.timeout,
            patience=Patience(total=0),
        )
        try:
            with remote, NetworkController(find=lambda _: _RecordedPlugin(remote, self.conversation)) as controller:
                yield controller
        except RemoteError as error:
            raise Failed(str(error)) from error

    def subnet(self, number: int) -> list[Subnet]:
        """A subnet for a network of the controller, counted from the last one."""
        return [Subnet.parse(self.subject.subnets[-1 - number])]


def _full_name(method: str) -> str:
    return method if "." in method else f"NetworkDriver.{method}"


@dataclass
class Resource:
    """A network or an endpoint that a check makes."""

    id: str
    subnet: str = ""
    request: dict[str, Any] = field(default_factory=dict)
    """The request that creates it."""
    ids: dict[str, str] = field(default_factory=dict)
    """The fields that name an endpoint in its other requests."""
    hosts: Iterator[int] = field(default_factory=lambda: itertools.count(2))

    @property
    def join_request(self) -> dict[str, Any]:
        """The request that joins the endpoint."""
        return {**self.ids, "SandboxKey": f"/run/docker/netns/{self.id[:12]}", "Options": self.request["Options"]}

    def host(self, number: int) -> str:
        """The address with this number in the subnet."""
        return f"{self.subnet.rpartition('.')[0]}.{number}"


class _RecordedPlugin:
    """Passes the controller's calls on to the plugin and keeps the conversation."""

    def __init__(self, plugin: RemotePlugin, conversation: list[Exchange]) -> None:
        self._plugin, self._conversation = plugin, conversation

    def activate(self, kind: str) -> object:
        """Ask the plugin which kinds of driver it implements."""
        return self._plugin.activate(kind)

    def call(self, method: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send one request and return the content of the answer."""
        request = b"" if content is None else json.dumps(content).encode()
        try:
            answer = self._plugin.call(method, content)
        except RemoteError as error:
            self._conversation.append(Exchange(method, request, error.http_status, str(error).encode()))
            raise
        self._conversation.append(Exchange(method, request, 200, json.dumps(answer).encode()))
        return answer
