"""The driver with real bridges, pairs and packets, and without Docker, in a network namespace of each test.

As root; else they are skipped.
"""

import pytest
from netplugin_sdk import DriverError
from netplugin_sdk.cnm import Subnet
from netplugin_sdk.linux import sysctls
from netplugin_sdk.testing.kit import Lab

from {{ cookiecutter.package_name }}.driver import Driver

OUTSIDE = "198.51.100.2"
"""Address of a host that has no route to containers: it answers only to masqueraded packets."""


def test_neighbours_reach_each_other(lab: Lab) -> None:
    one, _two = lab.containers(Driver(), "one", "two")
    one.run("ping", "-c1", "-w5", "two")  # which raises an error if nobody answers


def test_they_do_by_ipv6(lab: Lab) -> None:
    subnets = [Subnet.parse("10.1.0.0/24"), Subnet.parse("fd00:1::/64")]
    one, _two = lab.containers(Driver(), "one", "two", subnets=subnets)
    one.run("ping", "-6", "-c1", "-w5", "two")


def test_the_outside_is_reached_by_masquerading(lab: Lab) -> None:
    sysctls.ensure("net/ipv4/ip_forward", 1)  # as Docker does
    assert lab.outside
    (box,) = lab.containers(Driver(), "box")
    box.run("ping", "-c1", "-w5", OUTSIDE)


def test_an_internal_network_stays_within(lab: Lab) -> None:
    sysctls.ensure("net/ipv4/ip_forward", 1)
    assert lab.outside
    one, _two = lab.containers(Driver(), "one", "two", internal=True)
    one.run("ping", "-c1", "-w5", "two")
    with pytest.raises(DriverError):
        one.run("ping", "-c1", "-w1", OUTSIDE)


def test_the_mtu_is_the_containers(lab: Lab) -> None:
    (box,) = lab.containers(Driver(), "box", options={"mtu": "1400"})
    assert " mtu 1400 " in box.run("ip", "link", "show", "eth0")


def test_it_keeps_to_dockers_contract(lab: Lab) -> None:
    report = lab.conformance(Driver())
    assert not report.failed, report.text()
