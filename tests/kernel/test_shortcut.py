"""When a shortcut past a bridge is made again, and what is left of it; test_overlay.py sends frames by it."""

from __future__ import annotations

import re

import pytest

from netplugin_sdk.linux import links, shortcut
from netplugin_sdk.values import MacAddress

from .lab import run

pytestmark = pytest.mark.usefixtures("netns")

PORTS = {MacAddress(f"02:42:0a:09:00:{number:02x}"): f"ve-{number}" for number in range(6)}


@pytest.fixture(autouse=True)
def bridge(netns: None) -> None:
    links.ensure_bridge("br")
    links.ensure_vxlan("vx", 7, master="br")
    for port in PORTS.values():
        links.ensure_veth(port, port.replace("ve", "vc"), master="br")


def handle() -> str:
    """Of the table: another one each time that it is made."""
    (found,) = re.findall(r"table netdev \S+ \{ # handle (\d+)", run("nft", "-a", "list", "ruleset"))
    return str(found)


def test_what_is_so_is_left_alone() -> None:
    assert shortcut.ensure("br", PORTS, "vx")
    first = handle()
    assert shortcut.ensure("br", PORTS, "vx")
    assert handle() == first


@pytest.mark.parametrize("name", ["vx", "ve-3"])
def test_an_interface_that_was_made_again_is_handed_to(name: str) -> None:
    shortcut.ensure("br", PORTS, "vx")
    first = handle()
    links.delete(name)
    if name == "vx":
        links.ensure_vxlan("vx", 7, master="br")
    else:
        links.ensure_veth("ve-3", "vc-3", master="br")
    assert shortcut.ensure("br", PORTS, "vx")
    assert handle() != first
    assert run("nft", "list", "ruleset").count(f'device "{name}"') == 1
    assert shortcut.ensure("br", PORTS, "vx")


def test_ports_that_come_and_go() -> None:
    shortcut.ensure("br", {}, "vx")
    assert run("nft", "list", "ruleset").count("fwd to") == 1
    shortcut.ensure("br", PORTS, "vx")
    links.delete("ve-5")
    assert shortcut.ensure("br", PORTS, "vx"), "without the one that is gone"
    shown = run("nft", "list", "ruleset")
    assert "ve-4" in shown
    assert "ve-5" not in shown


def test_nothing_is_left_of_it() -> None:
    for _ in range(2):
        shortcut.delete("br")
    shortcut.ensure("br", PORTS, "vx")
    shortcut.ensure("other@br", {}, "ve-1")
    shortcut.delete("br")
    assert run("nft", "list", "tables").count("netdev") == 1
    links.delete("ve-1")
    assert not shortcut.ensure("other@br", {}, "ve-1")
    assert run("nft", "list", "tables") == ""
