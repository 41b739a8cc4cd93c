"""The plugin, the engine or both are killed while ten containers run and users come and go: few of them may notice.

This plugin deletes objects that Docker does not know sooner than others (`IMPATIENT`), so the tests need not wait.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from random import Random

import pytest

from netplugin_sdk.testing.engine import PrivateEngine, wait_until

from ..patience import PATIENCE
from ..volume import volume
from .conftest import remove_all
from .crash_lab import (
    IMPATIENT,
    LOST,
    TEN,
    Reached,
    Users,
    agree,
    bridges,
    cut_power,
    docker_knows,
    everything,
    is_soon,
    make,
    running,
)

NAMES = {box.name for box in TEN}
ALWAYS = [box for box in TEN if box.always]
ONCE = [box for box in TEN if not box.always]
KILLS = volume(3, 5)


class Host:
    """An engine with the plugin; both can be killed, and started again."""

    def __init__(self, engine: PrivateEngine) -> None:
        self.engine = engine
        self.start_plugin()

    def start_plugin(self) -> None:
        self.plugin = self.engine.start_plugin("myplugin", IMPATIENT)


@contextmanager
def ten_on(engine: PrivateEngine) -> Iterator[Host]:
    """Ten containers. At the end all is removed through Docker, and nothing is left."""
    host = Host(engine)
    try:
        before = everything(engine)
        make(engine)
        Reached(engine).soon()
        agree(engine)
        yield host
        remove_all(engine)
        is_soon(lambda: everything(engine), before)
    finally:
        if host.plugin.running:
            host.plugin.stop()


@pytest.fixture(scope="module")
def host(version: str) -> Iterator[Host]:
    """With an engine of its own, since that is killed. Each test leaves all ten running."""
    with PrivateEngine(version) as engine, ten_on(engine) as host:
        yield host


def remove_users(engine: PrivateEngine) -> None:
    """The leftovers of users whose commands were cut off."""
    left = set(engine.docker("ps", "--all", "--format", "{{.Names}}").split()) - NAMES
    if left:
        engine.docker("rm", "--force", *left)


def all_are_served(engine: PrivateEngine) -> None:
    """New users meet no trouble, and what Docker, the plugin and the kernel have is the same."""
    remove_users(engine)
    with Users(engine) as users:
        wait_until(lambda: users.done >= 4 or users.failed != [], PATIENCE)
    assert users.failed == []
    agree(engine)


def comes_back(engine: PrivateEngine) -> None:
    """After the engine was killed: containers with a restart policy run and answer; of the others nothing is left."""
    is_soon(lambda: running(engine) & NAMES, {box.name for box in ALWAYS})
    remove_users(engine)
    Reached(engine, ALWAYS).soon()
    agree(engine)
    engine.docker("start", *(box.name for box in ONCE))
    Reached(engine).soon()
    all_are_served(engine)


def test_the_plugin_is_killed_again_and_again(engine: PrivateEngine) -> None:
    """The engine tries again for 30 s, so no command fails; but for those whose request died with the plugin."""
    random = Random(engine.version)
    with ten_on(engine) as host:
        networks = docker_knows(engine).networks
        reached = Reached(engine)
        with Users(engine) as users:
            for number in range(KILLS):
                time.sleep(random.uniform(0.1, 1.0))
                host.plugin.kill()
                if number == 1:
                    assert not reached.missing(relay=False), "what is in the kernel stays there"
                host.start_plugin()
                assert not reached.missing()
            done = users.done
            wait_until(lambda: users.done > done + 2, PATIENCE)
        lost = [said for said in users.failed if LOST in said]
        assert [said for said in users.failed if said not in lost] == []
        assert len(lost) <= 2 * KILLS, "each of the two has one request at a time"
        assert docker_knows(engine).networks == networks
        all_are_served(engine)


def test_the_engine_is_killed(host: Host) -> None:
    networks = docker_knows(host.engine).networks
    with Users(host.engine) as users:
        wait_until(lambda: users.done >= 4, PATIENCE)
        assert users.failed == []
        host.engine.kill()
    host.engine.start()
    assert docker_knows(host.engine).networks == networks
    comes_back(host.engine)


def test_both_are_killed(host: Host) -> None:
    """The engine is the first to start, as where nobody has told systemd of an order: it waits for the plugin."""
    networks = docker_knows(host.engine).networks
    with Users(host.engine) as users:
        wait_until(lambda: users.done >= 4, PATIENCE)
        host.plugin.kill()
        host.engine.kill()
    logged = host.engine.log.stat().st_size
    with ThreadPoolExecutor(1) as starter:
        started = starter.submit(host.engine.start)
        wait_until(lambda: b"retrying in" in host.engine.log.read_bytes()[logged:], PATIENCE)
        host.start_plugin()
        started.result()
    assert docker_knows(host.engine).networks == networks
    comes_back(host.engine)


def test_the_power_is_cut(host: Host) -> None:
    """Another kernel with the old disks: networks are there before anybody can call, and what uses them comes back."""
    engine = host.engine
    networks, before = docker_knows(engine).networks, bridges(engine)
    assert len(before) == len(networks) == 3
    cut_power(engine)
    assert bridges(engine) == {}
    host.start_plugin()
    assert bridges(engine) == before
    log = host.plugin.log.read_text().splitlines()
    assert "3 of 3 networks are restored" in log[-2], "before it listens"
    assert "serves BridgeDriver" in log[-1]
    engine.start()
    assert docker_knows(engine).networks == networks
    comes_back(engine)


def test_live_restore(version: str) -> None:
    """Containers go on without the engine, and without both, and are the same afterwards."""
    with PrivateEngine(version, ["--live-restore"]) as engine, ten_on(engine) as host:
        reached, known = Reached(engine), docker_knows(engine)
        for plugin_too in (False, True):
            with Users(engine) as users:
                wait_until(lambda: users.done >= 2, PATIENCE)
                engine.kill()
                if plugin_too:
                    host.plugin.kill()
            assert not reached.missing(relay=not plugin_too)
            if plugin_too:
                host.start_plugin()
                assert not reached.missing()
            engine.start()
            assert not reached.missing()
            assert Reached(engine).pids == reached.pids
            remove_users(engine)
            agree(engine)
            assert docker_knows(engine) == known
        all_are_served(engine)
