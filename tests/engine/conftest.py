"""Real Docker Engines. All tests share one of each version, and each test leaves it unchanged."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest

from netplugin_sdk.testing.engine import (
    VERSIONS,
    EngineUnavailable,
    PrivateEngine,
    Process,
    listens,
    require,
    wait_until,
)

from ..patience import PATIENCE
from ..volume import FULL
from .lived_on import LivedOnHost

MYPLUGIN = (sys.executable, "-m", "myplugin")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in ("engine", "version"):
        if name in metafunc.fixturenames:
            versions = metafunc.config.getoption("engine") or list(VERSIONS)
            one = metafunc.definition.get_closest_marker("one_engine")
            each = FULL or metafunc.definition.get_closest_marker("each_engine")
            if one and (not each or one.kwargs.get("always")):
                versions = [one_of(versions)]
            metafunc.parametrize(name, versions, indirect=True, scope="module")
            return


def one_of(versions: Sequence[str]) -> str:
    """The version for tests that need only one engine."""
    return "26.1" if "26.1" in versions else versions[0]


LONG = (
    *("rows_2", "sequences", "rows_1", "overlay", "managed", "ipam", "crashes", "reconcile", "lived_on", "demo"),
    *("template", "tutorial", "dhcp", "systemd", "myplugin", "swarm", "inspect", "faults", "macvlan"),
)
"""Modules that take long start first, so that no worker has one of them left at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(LONG)))  # stable


@contextlib.contextmanager
def or_skip() -> Iterator[None]:
    """Skip the test, with the reason, where an engine cannot be had."""
    try:
        yield
    except EngineUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def version(request: pytest.FixtureRequest) -> str:
    """The version of an engine that can be had here."""
    with or_skip():
        require(request.param)
    return str(request.param)


@pytest.fixture(scope="session")
def engines() -> Iterator[Callable[[str], PrivateEngine]]:
    """The running engine of a version, started when it is first asked for."""
    running: dict[str, PrivateEngine] = {}
    with contextlib.ExitStack() as closing:

        def get(version: str) -> PrivateEngine:
            if version not in running:
                running[version] = engine = closing.enter_context(PrivateEngine(version))
                # An engine makes some things once: let it do so before the first look.
                engine.docker("network", "create", "once")
                engine.docker("run", "--rm", "--network", "once", "busybox", "true")
                engine.docker("network", "rm", "once")
            return running[version]

        yield get


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest, engines: Callable[[str], PrivateEngine]) -> Iterator[PrivateEngine]:
    """A running engine, which a module leaves as it was."""
    with or_skip():
        engine = engines(request.param)
    before = all_of(engine)
    yield engine
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: all_of(engine) == before, PATIENCE)
    assert all_of(engine) == before, "tests of this module have left something behind"


@pytest.fixture(scope="session")
def lived_on(request: pytest.FixtureRequest) -> Iterator[LivedOnHost]:
    """A host of others, in namespaces; each test leaves it as it found it."""
    version = one_of(request.config.getoption("engine") or list(VERSIONS))
    with or_skip():
        require(version)
    with LivedOnHost(version) as host:
        yield host


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
            wait_until(lambda: state_of(engine) == before, PATIENCE)
    assert state_of(engine) == before, "the test or the plugin left something behind"


def remove_all(engine: PrivateEngine) -> None:
    """Remove all containers and networks."""
    with engine.api() as docker:
        for container in docker.call("GET", "/containers/json?all=1"):
            docker.call("DELETE", f"/containers/{container['Id']}?force=1")
        docker.call("POST", "/networks/prune")


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


def state_of_host(engine: PrivateEngine) -> str:
    """Devices, rules, global addresses, routes and listening sockets of the engine's host."""
    script = "ip -brief address | grep -v lo; ip route; ip -6 route; ip route show table local; ss -Hltun"
    done = engine.run(["sh", "-c", script])
    lines = []
    for line in done.stdout.splitlines():
        if line.startswith("fe80:"):
            continue
        words = [
            word
            for word in line.split()
            if word not in ("UP", "DOWN", "UNKNOWN", "LOWERLAYERDOWN", "linkdown") and "fe80::" not in word
        ]
        lines.append(" ".join(words))
    return "\n".join((state_of(engine), *sorted(lines)))


def all_of(engine: PrivateEngine) -> list[str]:
    """Everything that a module must not leave behind: containers, networks, plugins, processes, sockets and others."""
    with engine.api() as docker:
        containers = [container["Names"][0] for container in docker.call("GET", "/containers/json?all=1")]
        networks = [network["Name"] for network in docker.call("GET", "/networks")]
        plugins = [plugin["Name"] for plugin in docker.call("GET", "/plugins")]
    processes = engine.run(["ps", "-eo", "args"]).stdout.splitlines()
    return [
        *sorted(
            f"{kind} {name}" for kind, names in (("container", containers), ("network", networks)) for name in names
        ),
        *sorted(f"plugin {name}" for name in plugins),
        *sorted(f"socket {path.name}" for path in engine.plugin_folder.iterdir() if listens(path)),
        *sorted(f"process {line}" for line in processes if line.startswith(sys.prefix)),
        *state_of_host(engine).splitlines(),
    ]
