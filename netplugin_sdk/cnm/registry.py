"""Drivers by their names: some in this process, the others found as an engine finds plugins."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from netplugin_sdk.cnm.remote import MethodNotSupported, RemoteError
from netplugin_sdk.core.plugin import Plugin
from netplugin_sdk.errors import InvalidRequest
from netplugin_sdk.protocol import messages

Kind: TypeAlias = Literal["NetworkDriver", "IpamDriver"]


class Driver(Protocol):
    """A plugin, asked as an engine asks it: a `RemotePlugin`, or one in this process."""

    def activate(self, kind: str) -> object:
        """Ask what it is. Raises `RemoteError` if it is not a driver of this kind."""

    def call(self, method: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer to, say, ``NetworkDriver.Join``. Raises `RemoteError` if it is refused."""


class InProcess:
    """A plugin in this process: the same requests and answers as over a socket, byte for byte, without one."""

    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin

    def activate(self, kind: str) -> None:
        """Ask what it is. Raises `RemoteError` if it is not a driver of this kind."""
        if kind not in self.call("Plugin.Activate")["Implements"]:
            raise RemoteError(f"the plugin in this process is no {kind}")

    def call(self, method: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer. Raises `RemoteError` if it is refused."""
        body = b"" if content is None else msgspec.json.encode(content)
        answer = self._plugin.handle(f"/{method}", body)
        decoded: dict[str, Any] = msgspec.json.decode(answer.body)
        if answer.status != 200:
            kind = MethodNotSupported if answer.status == 404 else RemoteError
            raise kind(f"{method}: {decoded['Err']}", answer.status)
        return decoded


@dataclass(frozen=True)
class Known:
    """A driver of the registry, and its capabilities."""

    name: str
    driver: Driver
    kind: Kind
    capabilities: Mapping[str, Any] = field(default_factory=dict)

    def call(self, method: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a method of its kind, such as ``Join``. Raises `RemoteError` if it is refused."""
        plain = msgspec.json.decode(messages.encode(content))  # addresses as text
        return self.driver.call(f"{self.kind}.{method}", plain)


class Registry:
    """Drivers by their names.

    Args:
        plugins: those in this process. The caller closes them.
        find: finds any other by its name, or raises `NotFound`.
    """

    def __init__(self, plugins: Mapping[str, Plugin], find: Callable[[str], Driver]) -> None:
        self._drivers: dict[str, Driver] = {name: InProcess(plugin) for name, plugin in plugins.items()}
        self._find = find
        self._known: dict[tuple[Kind, str], Known] = {}
        self._lock = threading.Lock()

    def add(self, name: str, plugin: Plugin) -> None:
        """Give it a further plugin in this process."""
        with self._lock:
            self._drivers[name] = InProcess(plugin)

    def network_driver(self, name: str) -> Known:
        """The network driver of this name, activated. Raises `NotFound` if there is none."""
        return self._get("NetworkDriver", name)

    def ipam_driver(self, name: str) -> Known:
        """The IPAM driver of this name, activated. Raises `NotFound` if there is none."""
        return self._get("IpamDriver", name)

    def _get(self, kind: Kind, name: str) -> Known:
        with self._lock:
            if (known := self._known.get((kind, name))) is None:
                known = self._known[kind, name] = self._ask(kind, name)
            return known

    def _ask(self, kind: Kind, name: str) -> Known:
        driver = self._drivers.get(name) or self._find(name)
        driver.activate(kind)
        capabilities = dict(driver.call(f"{kind}.GetCapabilities"))
        if kind == "IpamDriver":
            capabilities |= driver.call("IpamDriver.GetDefaultAddressSpaces")
        elif (scope := capabilities.get("Scope")) not in ("local", "global"):
            raise InvalidRequest(f"invalid capability: expecting 'local' or 'global', got {scope}")
        self._drivers[name] = driver
        return Known(name, driver, kind, capabilities)
