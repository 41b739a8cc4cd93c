"""Replays the requests of an engine in a swarm of one node to a managed plugin, with the same restarts of the plugin.

They were recorded with the driver below, and its answers must still be the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from netplugin_sdk import DriverOptions, Plugin, Scope
from tests.unit.lab import Docker, Recorder

RECORDING = Path(__file__).parent / "swarm" / "engine-26.1.jsonl"
RESTARTS = ("plugin disable -f, enable", "engine started again", "engine killed and started")


class Options(DriverOptions):
    vni: int
    colour: str = ""


class Recorded(Recorder):
    scope = Scope.GLOBAL
    options_type = Options
    cluster_numbers = {"vni": range(4096, 1 << 24)}  # noqa: RUF012


@pytest.mark.parametrize("times", [1, 2])
def test_a_day_of_a_manager(times: int, tmp_path: Path) -> None:
    driver = Recorded()
    docker = Docker(Plugin(driver, state=tmp_path))
    made: list[Any] = []
    answered = restarted = 0
    for line in RECORDING.read_text().splitlines():
        said = json.loads(line)
        if (mark := said.get("mark")) is not None:
            if mark in RESTARTS:
                docker.plugin.close()
                networks = set(driver.networks)
                driver = Recorded()
                docker = Docker(Plugin(driver, state=tmp_path))
                assert set(driver.networks) == networks
                restarted += 1
            continue
        driver.hooks = {"create_network": made.append}
        for _ in range(times):
            assert docker.ask(said["method"], said["request"]) == (said["status"], said["response"])
        answered += 1
    assert (answered, restarted) == (31, 3)
    assert {(network.options.vni, network.options.colour) for network in made} == {(14134483, "red")}
    assert len(made) == 3  # not again as the engine was killed, since it was restored
    assert not driver.networks
    assert [options["vni"] for options in driver.allocations.values()] == ["5000"]  # nobody says that a swarm ended
    assert str(driver.this_node and driver.this_node.address) == "198.51.100.1"
    docker.plugin.close()
