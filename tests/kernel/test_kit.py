"""The test kit, as authors of drivers use it."""

from __future__ import annotations

from pathlib import Path

import pytest
from myplugin.driver import BridgeDriver

from netplugin_sdk.cnm import RemotePlugin, Subnet
from netplugin_sdk.cnm.remote import Address
from netplugin_sdk.testing.kit import Lab

from .lab import run, soon_reaches

FIRST = """
from myplugin.driver import BridgeDriver

def test_neighbours(lab):
    one, two = lab.containers(BridgeDriver(), "one", "two")
    one.run("ping", "-c1", "-w20", "two")
"""


def test_the_first_test_of_an_author_is_three_lines(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(FIRST)
    links = run("ip", "-brief", "link")
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)
    assert run("ip", "-brief", "link") == links


def test_a_failure_leaves_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(f"{FIRST}    assert False\n\ndef test_again(lab):\n    test_neighbours(lab)\n")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=2)
    result.stdout.no_fnmatch_line("*already exists*")
    assert not list(Path(pytester.path).glob("**/netns/*"))


def test_a_lab(lab: Lab) -> None:
    links = run("ip", "-brief", "link")
    assert [line.split()[0] for line in links.splitlines()] == ["lo"]
    assert "UP" in links
    network = lab.network(BridgeDriver(), subnets=[Subnet.parse("10.1.0.0/24")])
    box = lab.controller.create_sandbox("box")
    box.connect(network)
    assert soon_reaches(box, "10.1.0.1")
    other = lab.network(BridgeDriver(), "other", subnets=[Subnet.parse("10.2.0.0/24")])
    box.connect(other)
    assert sorted(lab.controller.networks) == ["lan", "other"]


def test_outside_sees_who_masquerades(lab: Lab) -> None:
    (box,) = lab.containers(BridgeDriver(), "box", subnets=[Subnet.parse("10.1.0.0/24")])
    assert soon_reaches(lab.outside, "198.51.100.1", "2001:db8:51::1")
    assert soon_reaches(box, "198.51.100.2")


def test_a_plugin_over_its_socket(lab: Lab) -> None:
    with lab.served(lab.plugin(BridgeDriver())) as path, RemotePlugin(Address("x", f"unix://{path}")) as remote:
        assert remote.activate() == ("NetworkDriver",)


def test_conformance(lab: Lab) -> None:
    report = lab.conformance(BridgeDriver(), data_plane=False)
    assert not report.failed, report.text()
