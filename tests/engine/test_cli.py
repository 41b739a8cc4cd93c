"""`netplugin dev` beside a real engine: the README's driver, saved again and again while containers start."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from netplugin_sdk.testing.engine import PrivateEngine, Process

from .conftest import plugin_beside
from .test_minimal import source


@pytest.fixture
def l2(engine: PrivateEngine, tmp_path: Path) -> Iterator[Process]:
    (tmp_path / "l2.py").write_text(source())
    command = ["env", f"--chdir={tmp_path}", sys.executable, "-m", "netplugin_sdk.cli", "dev", "l2:L2"]
    yield from plugin_beside(engine, "l2", command)


def test_containers_start_while_the_driver_is_saved(engine: PrivateEngine, l2: Process, tmp_path: Path) -> None:
    ended = threading.Event()

    def save() -> None:
        while not ended.wait(0.7):
            with (tmp_path / "l2.py").open("a") as file:
                file.write("# saved\n")

    engine.docker("network", "create", "--driver", "l2", "mynet")
    engine.docker("run", "--detach", "--name", "web", "--network", "mynet", "busybox", "sleep", "600")
    saving = threading.Thread(target=save)
    saving.start()
    try:
        for _ in range(5):
            said = engine.docker("run", "--rm", "--network", "mynet", "busybox", "ping", "-c1", "web")
            assert " 0% packet loss" in said
    finally:
        ended.set()
        saving.join()
    log = l2.log.read_text()
    assert log.count("l2.py changed: starting anew") >= 3
    assert " WARNING " not in log
