"""The ptp example on real engines: routed containers, without a bridge."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from netplugin_sdk.testing.engine import OUTSIDE_ADDRESS, PrivateEngine, Process, wait_until

from ..patience import PATIENCE
from .conftest import plugin_beside

pytestmark = pytest.mark.one_engine

COMMAND = (sys.executable, "-m", "netplugin_ptp")
SUBNETS = ("--subnet", "10.20.0.0/24", "--ipv6", "--subnet", "fd00:20::/64")
OUTSIDE_IPV6 = "2001:db8:51::2"


def routes(engine: PrivateEngine) -> list[str]:
    """Of the engine's host; not those that come and go with links by themselves."""
    lines = engine.run(["ip", "route"]).stdout + engine.run(["ip", "-6", "route"]).stdout
    return sorted(line.strip() for line in lines.splitlines() if not line.startswith("fe80::"))


@pytest.fixture
def ptp(engine: PrivateEngine) -> Iterator[Process]:
    before = routes(engine)
    yield from plugin_beside(engine, "ptp", COMMAND)
    assert routes(engine) == before


def pings(engine: PrivateEngine, container: str, *targets: str) -> bool:
    """Whether all answer, the first time and within a second."""
    script = " && ".join(f"ping -c1 -W1 {target}" for target in targets)
    return engine.run_docker("exec", container, "sh", "-c", script).returncode == 0


def run(engine: PrivateEngine, name: str, *options: str) -> None:
    engine.docker("run", "--detach", "--name", name, "--network", "mynet", *options, "busybox", "sleep", "600")


def ipv6_of(engine: PrivateEngine, container: str) -> str:
    (found,) = json.loads(engine.docker("inspect", container))
    return str(found["NetworkSettings"]["Networks"]["mynet"]["GlobalIPv6Address"])


def test_a_day(engine: PrivateEngine, ptp: Process) -> None:
    engine.docker("network", "create", "--driver", "ptp", *SUBNETS, "mynet")
    run(engine, "one", "--ip", "10.20.0.2")
    run(engine, "two")
    assert engine.docker("exec", "one", "ip", "route").split("\n") == [
        "default via 10.20.0.1 dev eth0 ",
        "10.20.0.0/25 via 10.20.0.1 dev eth0 ",
        "10.20.0.0/24 dev eth0 scope link  src 10.20.0.2 ",
        "10.20.0.1 dev eth0 scope link ",
        "10.20.0.128/25 via 10.20.0.1 dev eth0 ",
    ], "as in the example's README"
    everybody = ("two", ipv6_of(engine, "two"), "10.20.0.1", OUTSIDE_ADDRESS, OUTSIDE_IPV6)
    assert pings(engine, "one", *everybody)
    assert not any(" br-" in line for line in engine.run(["ip", "-o", "link"]).stdout.splitlines()), "no bridge"
    assert engine.run_outside(["ping", "-c1", "-W1", "10.20.0.2"]).returncode != 0

    engine.docker("network", "create", "--driver", "ptp", "--internal", "inside")
    engine.docker("network", "connect", "inside", "two")
    engine.docker("run", "--detach", "--name", "three", "--network", "inside", "busybox", "sleep", "600")
    assert pings(engine, "three", "two")
    assert "default" not in engine.docker("exec", "three", "ip", "route")
    assert not pings(engine, "three", OUTSIDE_ADDRESS)
    assert pings(engine, "two", *everybody[2:]), "with a leg in each network"

    before = routes(engine)
    ptp.kill()
    engine.run(["ip", "route", "delete", "10.20.0.2/32"])
    with engine.start_plugin("ptp", COMMAND):
        assert routes(engine) == before
        assert pings(engine, "one", *everybody)
        engine.docker("restart", "--time", "0", "two")
        address = ipv6_of(engine, "two")
        assert pings(engine, "one", "two", address)
        engine.docker("rm", "--force", "three")
        engine.docker("rm", "--force", "two")
        assert pings(engine, "one", "10.20.0.1")
        assert not pings(engine, "one", address)


@pytest.mark.usefixtures("ptp")
def test_an_engine_that_restarts(engine: PrivateEngine) -> None:
    """And one that is killed: the addresses that it gives again are those that the plugin still knows."""
    engine.docker("network", "create", "--driver", "ptp", *SUBNETS, "mynet")
    run(engine, "one", "--restart", "always", "--stop-timeout", "1")
    for end in (engine.stop, engine.kill):
        end()
        engine.start()
        wait_until(lambda: engine.docker("inspect", "-f", "{{.State.Running}}", "one") == "true", PATIENCE)
        assert pings(engine, "one", OUTSIDE_ADDRESS, OUTSIDE_IPV6)
        assert sum(line.startswith("10.20.0.") for line in routes(engine)) == 1


@pytest.mark.usefixtures("ptp")
def test_what_it_refuses_is_one_readable_line(engine: PrivateEngine) -> None:
    done = engine.run_docker("network", "create", "--driver", "ptp", "--ipam-driver", "null", "mynet")
    assert done.returncode != 0
    assert "a routed network needs subnets with gateways: it cannot have --ipam-driver null" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
