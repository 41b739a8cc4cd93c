"""When Docker is asked what it has, whether that is asked until there is an answer, and what an answer ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from netplugin_sdk import Container, Endpoint, Network, Plugin, Timings
from netplugin_sdk.core import comparison, pools
from netplugin_sdk.core.engine_api import DockerError
from netplugin_sdk.ipam import PoolIpamDriver
from netplugin_sdk.values import UsedPool

from .lab import ENDPOINT, NETWORK, Docker, ListingEngine, Options, Recorder, create_network, of

TIMINGS = Timings()
SOON, MISSING, LATER = TIMINGS.engine_grace, TIMINGS.missing_grace, TIMINGS.compare_every


class Asked:
    """Takes the place of what asks Docker: a question's name, in how many seconds, and whether it is recurring."""

    questions: dict[str, Callable[[Any], bool]]
    since_: list[tuple[str, float, bool]]

    def __init__(self, _path: Path, _timings: Timings) -> None:
        pass

    def ask(self, question: Any, delay: float = 0.0, *, recurring: bool = False) -> None:
        name = (question.func if isinstance(question, partial) else question).__name__
        self.questions[name] = question
        self.since_.append((name, delay, recurring))

    def close(self) -> None:
        pass

    @classmethod
    def since(cls) -> list[tuple[str, float, bool]]:
        since, cls.since_ = cls.since_, []
        return since


class Curious(Recorder):
    def container_attached(self, network: Network[Options], endpoint: Endpoint, container: Container) -> None:
        self.called("container_attached", endpoint)


class Engine(ListingEngine):
    """Has pools, too."""

    def __init__(self) -> None:
        super().__init__()
        self.used = [UsedPool(ip_network("10.1.0.0/24"), None, frozenset())]

    def pools(self) -> list[UsedPool]:
        return self.used


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Docker]:
    for module in (comparison, pools):
        monkeypatch.setattr(module, "EngineQueries", Asked)
    monkeypatch.setattr(Asked, "questions", {}, raising=False)
    monkeypatch.setattr(Asked, "since_", [], raising=False)
    with Plugin(Curious(), PoolIpamDriver(local=()), state=tmp_path, docker=tmp_path / "docker.sock") as plugin:
        yield Docker(plugin)


NETWORKS_SOON, POOLS_SOON = ("_compare", SOON, True), ("_tell", SOON, True)


def test_docker_is_asked_when_something_may_have_changed_there(docker: Docker) -> None:
    assert Asked.since() == [("_tell", 0.0, True)], "networks there are none"
    docker("CreateNetwork", create_network())
    assert Asked.since() == [NETWORKS_SOON]
    docker.run()
    assert Asked.since() == [("_ask_for_container", 0.0, False)]
    docker("Plugin.Activate")
    assert Asked.since() == [NETWORKS_SOON]
    docker("IpamDriver.GetCapabilities")
    assert Asked.since() == [POOLS_SOON]
    docker("IpamDriver.RequestPool", {"AddressSpace": "LocalDefault", "Pool": "10.1.0.0/24"})
    assert Asked.since() == [POOLS_SOON]
    docker.refused("Leave")  # without its content: the engine's second try
    assert Asked.since() == [NETWORKS_SOON, POOLS_SOON]
    docker.plugin.reconcile()
    plugin: Any = docker.plugin
    plugin._networks._recovery._worker.wait()
    container, networks, pools = sorted(Asked.since())
    assert container == ("_ask_for_container", 0.0, False), "it is not known yet"
    assert (networks, pools) == (("_compare", 0.0, True), ("_tell", 0.0, True))


def test_an_answer_says_when_docker_is_asked_again(docker: Docker) -> None:
    engine = Engine()
    docker("CreateNetwork", create_network())
    docker.run()
    docker("IpamDriver.RequestPool", {"AddressSpace": "LocalDefault", "Pool": "10.1.0.0/24"})
    docker("IpamDriver.RequestPool", {"AddressSpace": "LocalDefault", "Pool": "10.2.0.0/24"})
    compare, tell = Asked.questions["_compare"], Asked.questions["_tell"]
    Asked.since()
    assert compare(engine)
    assert Asked.since() == [("_compare", LATER, True)]
    engine.listed[NETWORK] = {}
    assert compare(engine)
    assert Asked.since() == [("_compare", MISSING, True)], "soon enough to see whether it is still missing"
    assert tell(engine)
    assert Asked.since() == [("_tell", MISSING, True)]
    engine.used.append(UsedPool(ip_network("10.2.0.0/24"), None, frozenset()))
    assert tell(engine)
    assert Asked.since() == [("_tell", LATER, True)]


def test_a_container_is_asked_for_until_it_is_known_or_gone(docker: Docker) -> None:
    engine = Engine()
    docker("CreateNetwork", create_network())
    docker.run()
    find = Asked.questions["_ask_for_container"]
    engine.listed[NETWORK] = {}
    assert not find(engine)
    engine = Engine()
    assert find(engine)
    docker("Leave", of(endpoint=ENDPOINT))
    assert find(engine), "nobody wants to know any more"
    (network,) = docker.plugin.networks.values()
    assert network.endpoints[ENDPOINT].container == engine.container("c" * 64)


def test_a_container_that_leaves_while_it_is_asked_for_is_not_told_of(docker: Docker) -> None:
    class Leaving(Engine):
        def container(self, container_id: str) -> Container:
            docker("Leave", of(endpoint=ENDPOINT))
            return super().container(container_id)

    docker("CreateNetwork", create_network())
    docker.run()
    assert Asked.questions["_ask_for_container"](Leaving())
    (network,) = docker.plugin.networks.values()
    assert network.endpoints[ENDPOINT].container is None


@pytest.mark.parametrize(("status", "is_done"), [(404, True), (500, False)])
def test_a_network_that_is_removed_while_it_is_asked_for(docker: Docker, status: int, is_done: bool) -> None:
    class Removing(Engine):
        def endpoints(self, network_id: str) -> dict[str, str]:
            raise DockerError("no such network, or worse", status)

    docker("CreateNetwork", create_network())
    docker.run()
    compare = Asked.questions["_compare"]
    if is_done:
        assert compare(Removing())
    else:
        with pytest.raises(DockerError):
            compare(Removing())
    (network,) = docker.plugin.networks.values()
    assert ENDPOINT in network.endpoints
