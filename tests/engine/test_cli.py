"""`netplugin dev` beside a real engine: the README's driver, saved again and again while containers start."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from netplugin_sdk.testing.engine import PrivateEngine, Process, wait_until

from ..patience import PATIENCE
from .conftest import plugin_beside
from .test_minimal import source

pytestmark = pytest.mark.one_engine


@pytest.fixture
def l2(engine: PrivateEngine, tmp_path: Path) -> Iterator[Process]:
    (tmp_path / "l2.py").write_text(source())
    command = ["env", f"--chdir={tmp_path}", sys.executable, "-m", "netplugin_sdk.cli", "dev", "l2:L2"]
    yield from plugin_beside(engine, "l2", command)


def test_containers_start_while_the_driver_is_saved(engine: PrivateEngine, l2: Process, tmp_path: Path) -> None:
    ended, before = threading.Event(), len(engine.log.read_bytes())

    def has_started(times: int) -> bool:
        return l2.log.read_text().count("l2 serves L2") >= times

    def save() -> None:
        for number in itertools.count(2):
            if ended.wait(0.5):
                return
            with (tmp_path / "l2.py").open("a") as file:
                file.write("# saved\n")
            wait_until(partial(has_started, number), PATIENCE)

    engine.docker("network", "create", "--driver", "l2", "mynet")
    engine.docker("run", "--detach", "--name", "web", "--network", "mynet", "busybox", "sleep", "600")
    saving = threading.Thread(target=save)
    saving.start()
    try:
        for _ in range(4):
            said = engine.docker("run", "--rm", "--network", "mynet", "busybox", "ping", "-c1", "web")
            assert " 0% packet loss" in said
    finally:
        ended.set()
        saving.join()
    log = l2.log.read_text()
    assert log.count("l2.py changed: starting again") >= 2
    assert " WARNING " not in log
    assert b"Unable to connect to plugin" not in engine.log.read_bytes()[before:], "it never tried twice"
