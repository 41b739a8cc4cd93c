"""Who calls a plugin: the server and the tap ask the kernel, whatever the socket's mode says.

Needs root: nobody else can be somebody else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from netplugin_sdk.serving.loop import Server

from ..unit.serving import echo, serving, serving_unix
from ..unit.test_tap import watched


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where everybody may look: the folders of pytest are for root alone."""
    with TemporaryDirectory(dir="/tmp") as made:
        Path(made).chmod(0o755)
        yield Path(made)


OWNER, GROUP, STRANGER = 50_001, 50_002, 50_003
"""Ids that nobody has."""

SOMEBODY = """
import json, os, socket, sys
user, group, others = json.loads(sys.argv[2])
with socket.socket(socket.AF_UNIX) as client:
    os.setgroups(others)
    os.setgid(group)
    os.setuid(user)
    client.settimeout(20)
    client.connect(sys.argv[1])
    try:
        client.sendall(sys.stdin.buffer.read())
        print("served" if client.recv(100).startswith(b"HTTP/1.1 200 ") else "cut")
    except (BrokenPipeError, ConnectionResetError):
        print("cut")
"""


def ask(path: Path, who: tuple[int, int, list[int]]) -> str:
    """What becomes of a call of this user, group and further groups."""
    command = [sys.executable, "-c", SOMEBODY, str(path), json.dumps(who)]
    return subprocess.run(command, input=echo(n="1"), capture_output=True, check=True).stdout.decode().strip()


@pytest.mark.parametrize(
    ("mode", "who", "served"),
    [
        (0o666, (0, 0, []), True),
        (0o666, (OWNER, STRANGER, []), True),
        (0o666, (STRANGER, STRANGER, []), False),
        (0o666, (STRANGER, GROUP, []), True),
        (0o666, (STRANGER, STRANGER, [STRANGER, GROUP]), True),
        (0o606, (STRANGER, STRANGER, []), False),
        (0o660, (STRANGER, GROUP, []), True),
    ],
)
def test_who_may_call_whatever_the_mode_says_of_others(
    folder: Path, mode: int, who: tuple[int, int, list[int]], served: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def listen(server: Server) -> Path:
        server.listen_unix(folder / "s.sock", mode=mode, owner=OWNER, group=GROUP)
        return folder / "s.sock"

    with serving(listen) as running:
        assert ask(running.path, who) == ("served" if served else "cut")
        assert running.driver.calls == served
    assert (f"of user {who[0]}, group {who[1]}" in caplog.text) is not served


def test_the_plugin_sees_who_calls_through_a_tap(folder: Path) -> None:
    """A stranger who may write to the socket by its mode is refused by the plugin, and is no friend through the tap."""
    stranger = (STRANGER, STRANGER, list[int]())
    with serving_unix(folder) as served:
        served.path.chmod(0o666)
        assert ask(served.path, stranger) == "cut"
        with watched(served.path) as tap:
            assert ask(served.path, stranger) == "cut"
            assert served.connect().echo(a="1") == {"a": "1"}
        assert [call.status for call in tap.calls if call.status] == [200]
