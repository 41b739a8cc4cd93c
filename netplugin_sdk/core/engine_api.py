"""The Docker Engine's own API, as far as a plugin asks for it, and why not from inside a call.

While a driver's method runs the engine waits for it, often with a lock that its API wants too: asking there can hang
both forever. So it is refused, whatever library is used. `NetworkDriver.container_attached` tells a driver about
containers.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from netplugin_sdk.core import calls
from netplugin_sdk.errors import DriverError, Unavailable
from netplugin_sdk.values import Container, UsedPool

if TYPE_CHECKING:
    import http.client

SOCKET = Path("/run/docker.sock")
"""Where an engine listens, unless ``DOCKER_HOST`` names another socket (``unix:///…``)."""


_SYSTEMD = Path("/run/systemd/system")  # sd_booted(3)


class DockerError(DriverError):
    """The engine refused; the text is the engine's."""

    def __init__(self, text: str, http_status: int) -> None:
        super().__init__(text)
        self.http_status = http_status


class Docker:
    """An engine's API on one connection, which stays. For one thread at a time.

    Args:
        path: of the engine's socket.
        timeout: seconds that an answer may take.
    """

    def __init__(self, path: Path | str | None = None, *, timeout: float = 60) -> None:
        self._path, self._timeout = str(path or _from_environment()), timeout
        self._connection: http.client.HTTPConnection | None = None

    def call(self, method: str, path: str, content: Mapping[str, Any] | None = None) -> Any:
        """The decoded answer to, say, ``GET /networks``; None if there is none.

        Raises:
            DockerError: the engine refused.
            Unavailable: it does not answer.
            DriverError: this is the thread of a driver's method.
        """
        from http.client import HTTPException  # noqa: PLC0415  # 15 ms that only a query needs

        _refuse_inside_a_call(f"{method} {path}")
        body = None if content is None else json.dumps(content).encode()
        connection = self._connection = self._connection or _connection(self._path, self._timeout)
        try:
            connection.request(method, path, body, {} if body is None else {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
        except BaseException as error:
            self.close()  # half an answer may be in it
            if isinstance(error, OSError | HTTPException):
                raise Unavailable(f"Docker: {method} {path}: {error or type(error).__name__}") from error
            raise
        decoded = json.loads(answer) if answer.lstrip()[:1] in (b"{", b"[") else None
        if response.status >= 400:
            said = decoded["message"] if isinstance(decoded, dict) else answer.decode(errors="replace")
            raise DockerError(said, response.status)
        return decoded

    def networks(self) -> dict[str, dict[str, Any]]:
        """All networks by id, without their containers."""
        return {network["Id"]: network for network in self.call("GET", "/networks")}

    def endpoints(self, network_id: str) -> dict[str, str | None]:
        """The endpoints of a network by id, each with the id of its container if it is in one."""
        found = self.call("GET", f"/networks/{quote(network_id, safe='')}")["Containers"]
        return {
            endpoint["EndpointID"]: None if container.startswith("ep-") else container
            for container, endpoint in (found or {}).items()
        }

    def runs(self, network_id: str) -> bool:
        """Whether the engine has this network of a swarm itself. A manager lists those of all nodes, without peers."""
        network = self._network(network_id)
        return network is not None and bool(network["Containers"] or network.get("Peers"))

    def pools(self) -> list[UsedPool]:
        """The pools of its networks, but not of those that the engine gives addresses to itself, nor of a swarm's."""
        found = []
        for listed in self.networks().values():
            if listed["Scope"] != "local" or listed["IPAM"]["Driver"] in ("default", "null"):
                continue
            if (network := self._network(listed["Id"])) is None:
                continue  # removed meanwhile
            endpoints = (network["Containers"] or {}).values()
            texts = [endpoint[field] for endpoint in endpoints for field in ("IPv4Address", "IPv6Address")]
            addresses = frozenset(ip_interface(text).ip for text in texts if text)
            for pool in network["IPAM"]["Config"] or ():
                part = ip_network(pool["IPRange"], strict=False) if pool.get("IPRange") else None
                found.append(UsedPool(ip_network(pool["Subnet"], strict=False), part, addresses))
        return found

    def _network(self, network_id: str) -> dict[str, Any] | None:
        """With its containers; None if there is none."""
        try:
            network: dict[str, Any] = self.call("GET", f"/networks/{quote(network_id, safe='')}")
        except DockerError as error:
            if error.http_status == 404:
                return None
            raise
        return network

    def container(self, container_id: str) -> Container | None:
        """A container; None if there is none.

        It is looked up in the list, since an inspection would wait for the container's start to end.
        """
        chosen = quote(json.dumps({"id": [container_id]}))
        for found in self.call("GET", f"/containers/json?all=1&filters={chosen}"):
            if found["Id"] == container_id:
                name = next((name[1:] for name in found["Names"] if name.count("/") == 1), "")  # others are links
                return Container(found["Id"], name, found["Image"], found["Labels"] or {})
        return None

    def close(self) -> None:
        """End the connection; the next call makes another."""
        if self._connection is not None:
            self._connection.close()

    def abort(self) -> None:
        """End the connection, under a call that waits in another thread too, which then raises `Unavailable`."""
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Docker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_stopped(path: Path) -> bool:
    """Whether systemd listens at this socket for an engine that does not run: a connection would start it.

    An engine has its process id in a file beside its socket (``dockerd --pidfile``).
    """
    if not _SYSTEMD.is_dir():
        return False
    try:
        pid = int(path.with_suffix(".pid").read_text())
        return "dockerd" not in Path(f"/proc/{pid}/comm").read_text()
    except (OSError, ValueError):
        return True


@cache
def refuse_inside_calls() -> None:
    """From now on, for good, no driver's method gets a connection to the engine, nor runs ``docker``."""
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        if calls.current() is not None and _is_engine(arguments[1]):
            _refuse_inside_a_call("a connection")
    elif event == "subprocess.Popen" and calls.current() is not None:
        program = os.fsdecode(arguments[0])
        if Path(program).name in ("docker", "docker-compose"):
            _refuse_inside_a_call(f"the program {program}")


def _is_engine(address: object) -> bool:
    host = os.environ.get("DOCKER_HOST", "")
    if isinstance(address, tuple):
        where = urlsplit(host)
        return where.scheme in ("tcp", "http", "https") and address[:2] == (where.hostname, where.port)
    path = os.fsdecode(address) if isinstance(address, str | bytes) else ""
    return Path(path).name == SOCKET.name or (host != "" and host == f"unix://{path}")


def _refuse_inside_a_call(what: str) -> None:
    if (call := calls.current()) is not None:
        raise DriverError(
            f"{call.method} must not ask Docker ({what}): Docker waits for its answer, and both may wait forever; "
            "NetworkDriver.container_attached tells of containers"
        )


def _from_environment() -> str:
    host = os.environ.get("DOCKER_HOST", "")
    return host.removeprefix("unix://") if host.startswith("unix://") else str(SOCKET)


def _connection(path: str, timeout: float) -> http.client.HTTPConnection:
    import http.client  # noqa: PLC0415

    class Connection(http.client.HTTPConnection):
        def connect(self) -> None:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(timeout)
            self.sock.connect(path)

    return Connection("docker", timeout=timeout)
