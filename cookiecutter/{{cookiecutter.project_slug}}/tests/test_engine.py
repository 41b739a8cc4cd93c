"""The driver under a real Docker Engine in namespaces of its own.

As root, with debootstrap; else they are skipped. ``--docker-engine 28.5`` takes another version, and may be repeated.
"""

import sys
from collections.abc import Iterator

import pytest
from netplugin_sdk.testing.engine import OUTSIDE_ADDRESS, EngineError, PrivateEngine

from {{ cookiecutter.package_name }}.driver import NAME

COMMAND = [sys.executable, "-m", "{{ cookiecutter.package_name }}"]


@pytest.fixture
def engine(docker_engine: PrivateEngine) -> Iterator[PrivateEngine]:
    """The engine, with the plugin beside it and a network `lan` with a container `web`."""
    with docker_engine.start_plugin(NAME, COMMAND):
        docker_engine.docker("network", "create", "--driver", NAME, "-o", "mtu=1400", "lan")
        docker_engine.docker("run", "--detach", "--name", "web", "--network", "lan", "busybox", "sleep", "600")
        yield docker_engine
        docker_engine.docker("rm", "--force", "web")
        docker_engine.docker("network", "rm", "lan")


def test_containers_reach_each_other_and_the_outside(engine: PrivateEngine) -> None:
    engine.docker("run", "--rm", "--network", "lan", "busybox", "ping", "-c2", "web")  # or an EngineError
    engine.docker("exec", "web", "ping", "-c2", OUTSIDE_ADDRESS)
    assert " mtu 1400 " in engine.docker("exec", "web", "ip", "link", "show", "eth0")


@pytest.mark.usefixtures("engine")
def test_a_wrong_option_is_an_error(docker_engine: PrivateEngine) -> None:
    with pytest.raises(EngineError, match="option mtu='1': expected int >= 1280"):
        docker_engine.docker("network", "create", "--driver", NAME, "-o", "mtu=1", "other")
