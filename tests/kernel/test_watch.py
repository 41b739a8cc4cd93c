"""What somebody else takes away from an interface is heard of; what is removed here is not."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from ipaddress import ip_interface
from queue import SimpleQueue
from typing import Any

import pytest

from netplugin_sdk import losses
from netplugin_sdk.linux import links, watch
from netplugin_sdk.linux.links import addresses, diagnosis, netlink

from ..patience import PATIENCE
from .lab import Namespace, run

ADDRESSES = (ip_interface("10.9.0.1/24"), ip_interface("fd00:9::1/64"))


class Ear:
    def __init__(self) -> None:
        self._heard: SimpleQueue[str] = SimpleQueue()

    def __call__(self, loss: str) -> None:
        self._heard.put(loss)

    def hears(self) -> str:
        return self._heard.get(timeout=PATIENCE)

    def hears_nothing(self) -> None:
        """What has happened before is no loss: the next one is of an interface that is made to be lost."""
        for _ in range(2):  # the first may be looked at together with what has happened before
            links.ensure_veth("lost", "tsol")
            run("ip", "link", "del", "lost")
            assert self.hears() == "interface lost is gone"


@pytest.fixture
def ear(netns: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ear]:
    """With a bridge and a pair on it."""
    monkeypatch.setattr(diagnosis.watch, "quiet", 0.02)
    links.ensure_bridge("br-1", addresses=ADDRESSES)
    links.ensure_veth("ve", "vc", master="br-1")
    ear = Ear()
    losses.subscribe(ear)
    ear.hears_nothing()  # what was made has been looked at: else it would be for that, not for what follows
    yield ear
    losses.unsubscribe(ear)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, what has changed is not looked at."""
    go_on, look = threading.Event(), watch.Watch.suspects

    def wait_and_look(self: watch.Watch, listener: socket.socket) -> set[str]:
        go_on.wait()
        return look(self, listener)

    monkeypatch.setattr(watch.Watch, "suspects", wait_and_look)
    yield go_on
    go_on.set()


@pytest.mark.parametrize(
    ("command", "loss"),
    [
        ("link del ve", "interface ve is gone"),
        ("link del vc", "interface ve is gone"),
        ("link set ve nomaster", "interface ve is not a port of its bridge any more"),
        ("link set ve down", "interface ve is down"),
        ("link set br-1 down", "interface br-1 is down"),
        ("addr del 10.9.0.1/24 dev br-1", "interface br-1 has lost 10.9.0.1/24"),
        ("addr flush dev br-1", "interface br-1 has lost 10.9.0.1/24, fd00:9::1/64"),
        ("link set ve name vx", "interface ve is gone"),
    ],
)
def test_a_loss_is_heard_once(ear: Ear, command: str, loss: str) -> None:
    run("ip", *command.split())
    assert ear.hears() == loss
    ear.hears_nothing()


def test_with_a_bridge_its_ports_are_lost(ear: Ear) -> None:
    run("ip", "link", "del", "br-1")
    wanted = {"interface br-1 is gone", "interface ve is not a port of its bridge any more"}
    assert {ear.hears(), ear.hears()} == wanted


def test_what_is_brought_back_can_be_lost_again(ear: Ear) -> None:
    for _ in range(3):
        run("ip", "link", "set", "ve", "nomaster")
        assert ear.hears() == "interface ve is not a port of its bridge any more"
        assert links.attach("ve", "br-1")
        assert links.describe("ve").master == "br-1"
    run("ip", "link", "del", "br-1")
    assert {ear.hears(), ear.hears()} == {"interface br-1 is gone", "interface ve is not a port of its bridge any more"}
    links.ensure_bridge("br-1", addresses=ADDRESSES)
    assert links.attach("ve", "br-1")
    run("ip", "link", "del", "br-1")
    assert {ear.hears(), ear.hears()} == {"interface br-1 is gone", "interface ve is not a port of its bridge any more"}


def test_what_is_taken_away_and_put_back_at_once_is_no_loss(ear: Ear, held: threading.Event) -> None:
    run(
        "sh", "-c", "ip link set ve nomaster; ip link set ve master br-1; ip addr flush dev br-1; ip link set br-1 down"
    )
    links.ensure_bridge("br-1", addresses=ADDRESSES)
    held.set()
    ear.hears_nothing()


def test_what_is_removed_here_is_no_loss(ear: Ear) -> None:
    links.delete("ve")
    links.ensure_veth("ve", "vc", master="br-1")
    links.restore_link("br-1", mtu=1500, up=False, without=ADDRESSES)
    links.delete("ve")
    links.delete("br-1")
    ear.hears_nothing()


def test_what_happens_to_others_is_no_loss(ear: Ear) -> None:
    run("sh", "-c", "ip link add other type bridge; ip addr add 10.8.0.1/24 dev br-1; ip link set vc name eth0")
    run("sh", "-c", "ip addr del 10.8.0.1/24 dev br-1; ip link set br-1 mtu 1400; ip link del other")
    ear.hears_nothing()


def test_a_container_that_takes_its_end_and_gives_it_back_loses_nothing(ear: Ear) -> None:
    container = Namespace()
    container.adopt("vc", "10.9.0.2/24")
    ear.hears_nothing()
    container.run("ip", "link", "set", "vc", "down")
    ear.hears_nothing()
    container.close()  # and the pair goes with it
    assert ear.hears() == "interface ve is gone"


def test_more_changes_than_the_kernel_can_tell_of(ear: Ear, held: threading.Event) -> None:
    """It drops messages (ENOBUFS): then everything is looked at."""
    script = "".join(f"link set lo mtu {mtu}\n" for mtu in range(10_000, 12_000)) + "link set ve nomaster\n"
    subprocess.run(["ip", "-batch", "-"], input=script, text=True, check=True)
    held.set()
    assert ear.hears() == "interface ve is not a port of its bridge any more"


def test_after_close_nothing_is_heard_and_the_next_use_is_watched(ear: Ear) -> None:
    links.close()
    run("ip", "link", "set", "ve", "nomaster")
    ear.hears_nothing()
    assert links.attach("ve", "br-1")
    run("ip", "link", "set", "ve", "nomaster")
    assert ear.hears() == "interface ve is not a port of its bridge any more"


@pytest.mark.usefixtures("ear")
@pytest.mark.parametrize(("master", "why"), [("no", "No such device"), ("vc", "")])
def test_what_cannot_be_a_port(master: str, why: str) -> None:
    with pytest.raises(links.LinkError, match=f"interface ve: cannot attach to {master}: {why}"):
        links.attach("ve", master)


@pytest.mark.usefixtures("ear")
def test_what_is_not_here_is_no_port() -> None:
    assert not links.attach("no", "br-1")


class Meanwhile:
    """The kernel, where something happens before question `number`; counts the questions."""

    def __init__(self, kernel: Any, number: int, happen: Callable[[], object]) -> None:
        self._kernel, self._number, self._happen = kernel, number, happen
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        def ask(*args: Any, **kwargs: Any) -> Any:
            if self.asked == self._number:
                self._happen()
            self.asked += 1
            return getattr(self._kernel, name)(*args, **kwargs)

        return ask


@pytest.mark.usefixtures("netns")
def test_a_look_at_what_is_being_removed_tells_no_other_loss() -> None:
    """A look has several questions, and the interface may go before any of them."""

    def look_while_it_goes(before: int) -> tuple[str | None, int]:
        links.ensure_bridge("br-1", addresses=ADDRESSES)
        made = watch.Made(socket.if_nametoindex("br-1"), addresses=ADDRESSES)

        @netlink.operation
        def look() -> tuple[str | None, int]:
            ours = netlink.kernel()
            kernel = Meanwhile(ours, before, lambda: run("ip", "link", "del", "br-1"))
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(addresses, "kernel", lambda: kernel)
                patched.setattr(netlink, "kernel", lambda: kernel)
                return diagnosis.diagnose("br-1", made), kernel.asked

        answer = look()
        links.delete("br-1")
        return answer

    nothing, questions = look_while_it_goes(before=-1)
    assert nothing is None
    assert questions > 1
    for question in range(questions):
        wrong, _ = look_while_it_goes(before=question)
        assert wrong == "is gone"


@pytest.mark.usefixtures("netns")
def test_a_port_whose_bridge_goes_while_it_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    links.ensure_bridge("br-1")
    links.ensure_veth("ve", "vc", master="br-1")
    name_of = socket.if_indextoname

    def name_when_it_is_gone(index: int) -> str:
        run("ip", "link", "del", "br-1")
        return name_of(index)

    monkeypatch.setattr(socket, "if_indextoname", name_when_it_is_gone)
    assert links.describe("ve").master is None
