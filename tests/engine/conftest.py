"""Real Docker Engines. One of each version is started for all tests; each test leaves it as it found it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

import pytest

from netplugin_sdk.testing.engine import VERSIONS, EngineUnavailable, PrivateEngine, Process, require, wait_until
from netplugin_sdk.testing.kit import running_engine

MYPLUGIN = (sys.executable, "-m", "myplugin")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in ("engine", "version"):
        if name in metafunc.fixturenames:
            versions = metafunc.config.getoption("engine") or list(VERSIONS)
            if metafunc.definition.get_closest_marker("one_engine"):
                versions = ["26.1"] if "26.1" in versions else versions[:1]
            metafunc.parametrize(name, versions, indirect=True, scope="session")
            return


@pytest.fixture(scope="session")
def version(request: pytest.FixtureRequest) -> str:
    """The version of an engine that can be had here."""
    try:
        require(request.param)
    except EngineUnavailable as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> Iterator[PrivateEngine]:
    """A running engine."""
    yield from running_engine(request.param)


@pytest.fixture
def myplugin(engine: PrivateEngine) -> Iterator[Process]:
    """The engine with myplugin beside it."""
    yield from plugin_beside(engine, "myplugin", MYPLUGIN)


def plugin_beside(engine: PrivateEngine, name: str, command: Sequence[str]) -> Iterator[Process]:
    """A plugin, for a fixture; afterwards nothing is left of the containers, networks and rules."""
    before = state_of(engine)
    plugin = engine.start_plugin(name, command)
    yield plugin
    with plugin if plugin.running else engine.start_plugin(name, command):
        remove_all(engine)
        with contextlib.suppress(TimeoutError):  # it removes after its answers
            wait_until(lambda: state_of(engine) == before, 20)
    assert state_of(engine) == before, "the test or the plugin left something behind"


def remove_all(engine: PrivateEngine) -> None:
    """Remove all containers and networks."""
    if containers := engine.docker("ps", "--all", "--quiet").split():
        engine.docker("rm", "--force", *containers)
    engine.docker("network", "prune", "--force")


def state_of(engine: PrivateEngine) -> str:
    """Interfaces, and rules and chains of the firewall, on the engine's host."""

    def lines(*command: str) -> list[str]:
        done = engine.run(command)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    links = sorted(line.split()[0] for line in lines("ip", "-brief", "link"))
    saved = [*lines("iptables-save"), *lines("ip6tables-save")]
    # Not the built-in chains, which reading a table makes; nor Docker's jump to its user's chain, which it removes and
    # adds with every network, by two commands that race with those for another network.
    rules = [line for line in saved if line.startswith("-A ") or " - [" in line]
    return "\n".join((*links, *(line for line in rules if line != "-A FORWARD -j DOCKER-USER")))
