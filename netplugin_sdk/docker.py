"""The Docker Engine's own API, as far as a plugin asks for it."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from netplugin_sdk.errors import DriverError, Unavailable

SOCKET = Path("/run/docker.sock")
"""Where an engine listens, unless ``DOCKER_HOST`` names another socket (``unix:///…``)."""


class DockerError(DriverError):
    """The engine refused; the text is what it says."""

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
        self._connection = _Connection(str(path or _from_environment()), timeout)

    def call(self, method: str, path: str, content: Mapping[str, Any] | None = None) -> Any:
        """The decoded answer to, say, ``GET /networks``; None if there is none.

        Raises:
            DockerError: the engine refused.
            Unavailable: it does not answer.
        """
        body = None if content is None else json.dumps(content).encode()
        try:
            self._connection.request(method, path, body, {} if body is None else {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Unavailable(f"Docker: {method} {path}: {error or type(error).__name__}") from error
        except BaseException:
            self.close()  # half an answer is in it
            raise
        decoded = json.loads(answer) if answer.lstrip()[:1] in (b"{", b"[") else None
        if response.status >= 400:
            said = decoded["message"] if isinstance(decoded, dict) else answer.decode(errors="replace")
            raise DockerError(said, response.status)
        return decoded

    def close(self) -> None:
        """End the connection; the next call makes another."""
        self._connection.close()

    def __enter__(self) -> Docker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _from_environment() -> str:
    host = os.environ.get("DOCKER_HOST", "")
    return host.removeprefix("unix://") if host.startswith("unix://") else str(SOCKET)


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("docker", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
