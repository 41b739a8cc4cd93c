"""Plugins that misbehave, or log what they see: ``drivers.py KIND [ARGUMENT …]`` serves such a variant of myplugin."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from myplugin.driver import BridgeDriver
from myplugin.options import Options

from netplugin_sdk import Container, Endpoint, EndpointInterface, Join, Network, Sandbox, serve
from netplugin_sdk.core.lifecycle import NetworkLifecycle
from netplugin_sdk.serving.http import Limits

CALL_TIME = 1.0
"""Of `Slow`."""


def say(word: str, content: object) -> None:
    """A line of the log, for the test; at once, since it reads meanwhile."""
    os.write(2, f"{word} {json.dumps(content)}\n".encode())


class Telling(BridgeDriver):
    """Says what it is told of containers."""

    def container_attached(self, network: Network[Options], endpoint: Endpoint, container: Container) -> None:
        """Says whose endpoint it is."""
        say("ATTACHED", [endpoint.id, container.name, dict(container.labels), container.compose_project])

    def restore_endpoint(self, network: Network[Options], endpoint: Endpoint) -> None:
        """Says what is remembered of it."""
        super().restore_endpoint(network, endpoint)
        say("REMEMBERED", [endpoint.id, endpoint.container and endpoint.container.name])


class Asking(BridgeDriver):
    """Asks Docker from inside a method; a network's bridge says in which, and how: ``join.docker``."""

    def create_endpoint(self, network: Network[Options], endpoint: Endpoint) -> EndpointInterface | None:
        """May ask."""
        _ask(network, "create")
        return super().create_endpoint(network, endpoint)

    def join(self, network: Network[Options], endpoint: Endpoint, sandbox: Sandbox) -> Join:
        """May ask, when it has made the link."""
        joined = super().join(network, endpoint, sandbox)
        _ask(network, "join")
        return joined


def _ask(network: Network[Options], method: str) -> None:
    if network.options.bridge == f"{method}.docker":
        subprocess.run(["docker", "ps"], check=True)
    elif network.options.bridge == f"{method}.socket":
        connection = http.client.HTTPConnection("docker")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect("/run/docker.sock")
        connection.request("GET", f"/networks/{network.id}")
        connection.getresponse().read()


class Slow(BridgeDriver):
    """Whose methods last so many seconds more on some networks; a network's bridge says which: ``slow.join``."""

    def __init__(self, seconds: str) -> None:
        self._seconds = float(seconds)

    def create_network(self, network: Network[Options]) -> None:
        """Sleeps, maybe, when it has made the bridge."""
        super().create_network(network)
        self._sleep(network, "create")

    def join(self, network: Network[Options], endpoint: Endpoint, sandbox: Sandbox) -> Join:
        """Sleeps, maybe, when it has made the link."""
        joined = super().join(network, endpoint, sandbox)
        self._sleep(network, "join")
        return joined

    def _sleep(self, network: Network[Options], method: str) -> None:
        if network.options.bridge == f"slow.{method}":
            time.sleep(self._seconds)


def stuck(when: str, *methods: str) -> BridgeDriver:
    """While there is a file /run/stuck, calls of these methods (``DeleteNetwork``) hang for ever.

    ``before`` anything is done; or ``within`` the driver's method, when an intent is on disk; or ``after`` it is done.
    """
    for method in methods:
        name = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in method)
        where, name = (BridgeDriver, name[1:]) if when == "within" else (NetworkLifecycle, name)
        setattr(where, name, _stuck(getattr(where, name), when, method))
    return BridgeDriver()


def _stuck(original: Callable[..., Any], when: str, method: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        hangs = Path("/run/stuck").exists()
        answer = None if hangs and when != "after" else original(*arguments)
        if hangs:
            say("HANGS", method)
            time.sleep(3600)
        return answer

    return call


KINDS: dict[str, Callable[..., BridgeDriver]] = {"telling": Telling, "asking": Asking, "slow": Slow, "stuck": stuck}

if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    limits = Limits(call_time=CALL_TIME, drain_time=1.0) if kind == "slow" else None
    serve(KINDS[kind](*arguments), name="myplugin", limits=limits)
