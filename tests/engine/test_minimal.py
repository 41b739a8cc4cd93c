"""The driver in the README, as it stands there, on real engines."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from netplugin_sdk.testing.engine import OUTSIDE_ADDRESS, PrivateEngine, Process, wait_until

from ..patience import PATIENCE
from .conftest import plugin_beside

README = Path(__file__).parents[2] / "README.md"


def source() -> str:
    (found,) = re.findall(r"<!-- minimal driver[^\n]*-->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    return str(found)


@pytest.fixture
def l2(engine: PrivateEngine, tmp_path: Path) -> Iterator[Process]:
    file = tmp_path / "l2.py"
    file.write_text(source())
    yield from plugin_beside(engine, "l2", [sys.executable, str(file)])


def test_it_has_at_most_50_lines() -> None:
    assert len(source().splitlines()) <= 50


@pytest.mark.usefixtures("l2")
def test_a_bridge_that_was_deleted_comes_back_with_its_ports(engine: PrivateEngine) -> None:
    network = engine.docker("network", "create", "--driver", "l2", "mynet")
    for name in ("web", "db"):
        engine.docker("run", "--detach", "--name", name, "--network", "mynet", "busybox", "sleep", "600")
    assert "0% packet loss" in engine.docker("exec", "web", "ping", "-c1", "db")
    engine.run(["ip", "link", "del", f"br-{network[:12]}"])
    reached = ("exec", "web", "ping", "-c1", "-W1", "db")
    wait_until(lambda: engine.run_docker(*reached).returncode == 0, PATIENCE)


@pytest.mark.usefixtures("l2")
def test_create_run_inspect_rm(engine: PrivateEngine) -> None:
    network = engine.docker("network", "create", "--driver", "l2", "-o", "mtu=1400", "mynet")
    engine.docker("run", "--detach", "--name", "web", "--network", "mynet", "busybox", "sleep", "600")
    assert "0% packet loss" in engine.docker("run", "--rm", "--network", "mynet", "busybox", "ping", "-c2", "web")
    assert "0% packet loss" in engine.docker("exec", "web", "ping", "-c2", OUTSIDE_ADDRESS)
    assert " mtu 1400 " in engine.docker("exec", "web", "ip", "link", "show", "eth0")

    (inspected,) = json.loads(engine.docker("network", "inspect", "mynet"))
    assert (inspected["Driver"], inspected["Options"]) == ("l2", {"mtu": "1400"})
    assert [container["Name"] for container in inspected["Containers"].values()] == ["web"]
    assert f"br-{network[:12]}" in engine.run(["ip", "-brief", "link"]).stdout

    engine.docker("rm", "--force", "web")
    engine.docker("network", "rm", "mynet")
    assert f"br-{network[:12]}" not in engine.run(["ip", "-brief", "link"]).stdout


@pytest.mark.usefixtures("l2")
def test_an_internal_network_stays_within(engine: PrivateEngine) -> None:
    engine.docker("network", "create", "--driver", "l2", "--internal", "mynet")
    engine.docker("run", "--detach", "--name", "web", "--network", "mynet", "busybox", "sleep", "600")
    assert "0% packet loss" in engine.docker("run", "--rm", "--network", "mynet", "busybox", "ping", "-c1", "web")
    assert "default" not in engine.docker("exec", "web", "ip", "route")
    assert engine.run_docker("exec", "web", "ping", "-c1", "-W1", OUTSIDE_ADDRESS).returncode != 0


@pytest.mark.usefixtures("l2")
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("mtu=67", "option mtu='67': expected int >= 68"),
        ("mtu=big", "option mtu='big': expected int"),
        ("vlan=7", "unknown option 'vlan'; known options: mtu"),
    ],
)
def test_a_wrong_option_is_one_readable_line(engine: PrivateEngine, option: str, said: str) -> None:
    done = engine.run_docker("network", "create", "--driver", "l2", "-o", option, "mynet")
    assert done.returncode != 0
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "mynet" not in engine.docker("network", "ls")
