"""Namespaces that files keep: interfaces moved in and out, addresses, routes, and neighbours that learn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest

from netplugin_sdk.errors import Conflict, DriverError, InvalidRequest, NotFound
from netplugin_sdk.linux import links
from netplugin_sdk.linux.links import LinkError
from netplugin_sdk.linux.namespaces import DEFAULT, Namespace, Route

from ..unit.serving import wait_for
from .lab import run

pytestmark = pytest.mark.usefixtures("netns")

FOUR, SIX = ip_interface("10.1.0.2/24"), ip_interface("fd00::2/64")
Make = Callable[[str], Namespace]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Namespace] = []

    def create(name: str) -> Namespace:
        made.append(Namespace.create(tmp_path / name))
        return made[-1]

    yield create
    for namespace in made:
        namespace.remove()
    assert not list(tmp_path.iterdir())


def shown(namespace: Namespace, *what: str) -> Any:
    return json.loads(namespace.run("ip", "-json", *what))


def test_a_namespace_is_there_until_it_is_removed(make: Make, tmp_path: Path) -> None:
    box = make("box")
    assert Namespace(box.path).exists
    (lo,) = shown(box, "address")
    assert "UP" in lo["flags"]
    assert [address["local"] for address in lo["addr_info"]] == ["127.0.0.1", "::1"]
    with pytest.raises(Conflict, match="box exists already"):
        Namespace.create(box.path)
    box.remove()
    assert not box.exists
    box.remove()
    (tmp_path / "empty").touch()  # what a reboot leaves
    empty = Namespace(tmp_path / "empty")
    assert not empty.exists
    empty.remove()


def test_that_of_the_thread_can_be_kept_too(tmp_path: Path) -> None:
    box = Namespace.create(tmp_path / "host", fresh=False)
    assert box.run("readlink", "/proc/self/ns/net") == run("readlink", "/proc/thread-self/ns/net")
    box.remove()
    assert run("ip", "link")


def test_what_is_run_and_called_is_inside(make: Make, tmp_path: Path) -> None:
    box = make("box")
    home = Path("/proc/thread-self/ns/net").stat().st_ino
    inside = box.call(lambda: Path("/proc/thread-self/ns/net").stat().st_ino)
    assert inside == box.path.stat().st_ino != home
    assert Path("/proc/thread-self/ns/net").stat().st_ino == home
    with pytest.raises(ZeroDivisionError):
        box.call(lambda: 1 / 0)
    with pytest.raises(DriverError, match=r"^false: status 1$"):
        box.run("false")
    with pytest.raises(DriverError, match=r"^ls /none: .*No such file"):
        box.run("ls", "/none")
    (tmp_path / "hosts").write_text("192.0.2.7 example\n")
    assert box.run("getent", "hosts", "example", hosts=tmp_path / "hosts").split() == ["192.0.2.7", "example"]
    (tmp_path / "hosts").unlink()


def test_a_link_goes_in_and_comes_back(make: Make) -> None:
    box = make("box")
    links.ensure_veth("ve", "vc")
    routes = [
        Route(DEFAULT[4], ip_address("10.1.0.1")),
        Route(DEFAULT[6], ip_address("fd00::1")),
        Route(ip_network("10.9.0.0/16"), interface="eth7"),
    ]
    box.take("vc", "eth7", [FOUR, SIX], mac="02:00:00:00:00:07", routes=routes)
    assert not links.exists("vc")
    (eth,) = shown(box, "address", "show", "eth7")
    assert eth["address"] == "02:00:00:00:00:07"
    assert {"10.1.0.2", "fd00::2"} < {address["local"] for address in eth["addr_info"]}
    assert {route["dst"]: route.get("gateway") for route in shown(box, "route")} == {
        "default": "10.1.0.1",
        "10.1.0.0/24": None,
        "10.9.0.0/16": None,
    }
    assert box.run("ip", "-6", "route", "show", "default").startswith("default via fd00::1 dev eth7")
    box.change_routes(routes, [])
    box.change_routes(routes, [])
    assert [route["dst"] for route in shown(box, "route")] == ["10.1.0.0/24"]
    assert box.move_out("eth7", "vc")
    assert not box.move_out("eth7", "vc")
    assert links.describe("vc").addresses == ()
    assert links.describe("vc").mac == "02:00:00:00:00:07"


def test_a_link_that_cannot_be_configured_is_here_again(make: Make) -> None:
    box = make("box")
    with pytest.raises(NotFound, match="there is no interface vc"):
        box.take("vc", "eth0", [])
    links.ensure_veth("ve", "vc")
    with pytest.raises(LinkError, match="cannot set the MAC address of eth0 to 01:00:00:00:00:01"):
        box.take("vc", "eth0", [FOUR], mac="01:00:00:00:00:01")
    with pytest.raises(LinkError, match=r"cannot add the route to 0.0.0.0/0 via 10.2.0.1: Network is unreachable"):
        box.take("vc", "eth0", [FOUR], routes=[Route(DEFAULT[4], ip_address("10.2.0.1"))])
    with pytest.raises(InvalidRequest, match="name"):
        box.take("vc", "no/name", [])
    with pytest.raises(LinkError, match="cannot move interface vc"):
        box.take("vc", "lo", [])
    assert links.exists("vc")
    box.take("vc", "eth0", [FOUR])


def test_neighbours_learn_where_an_address_is_now(make: Make) -> None:
    links.ensure_bridge("br", addresses=[ip_interface("10.1.0.1/24"), ip_interface("fd00::1/64")])
    links.ensure_veth("ve0", "vc0", master="br")
    run("ip", "link", "set", "vc0", "up")
    # Who has no carrier forgets its neighbours, some time later.
    wait_for(lambda: "LOWER_UP" in run("ip", "link", "show", "br"), "the bridge's carrier")
    run("ip", "neigh", "add", "10.1.0.2", "lladdr", "02:00:00:00:00:aa", "dev", "br", "nud", "stale")
    run("ip", "neigh", "add", "fd00::2", "lladdr", "02:00:00:00:00:aa", "dev", "br", "nud", "stale")
    links.ensure_veth("ve", "vc", master="br")
    make("box").take("vc", "eth0", [FOUR, SIX], mac="02:00:00:00:00:02")

    def known() -> set[str]:
        entries = json.loads(run("ip", "-json", "neigh", "show", "dev", "br"))
        return {entry["lladdr"] for entry in entries if entry["dst"] in ("10.1.0.2", "fd00::2")}

    wait_for(lambda: known() == {"02:00:00:00:00:02"}, "both to be learnt")
