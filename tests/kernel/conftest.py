"""Real network namespaces, which vanish with the test: nothing of the host's network is seen or touched.

Each test is checked for what it leaves behind.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from netplugin_sdk.linux import firewall
from netplugin_sdk.testing.kit import own_namespace

from ..patience import PATIENCE
from .lab import SYSCTLS, Namespace, run, things


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A network namespace that the tests of a module take for the host's, and a folder for temporary files.

    Both are this process's own, so what is left in them is the test's, whatever else runs on this machine.
    """
    folder = tmp_path_factory.mktemp("t")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)
        if os.geteuid() == 0:  # else there are the tests that do not need it
            stack.enter_context(own_namespace())
            stack.callback(_empty)
        yield folder


def _empty() -> None:
    assert run("ip", "route") == run("ip", "-6", "route") == ""
    if shutil.which("nft"):
        assert run("nft", "list", "ruleset") == ""


@pytest.fixture(autouse=True)
def nothing_left(home: Path) -> Iterator[None]:
    """Each test is checked for what it leaves behind."""
    before = things(home)
    yield

    def left() -> dict[str, Counter[str]]:
        return {kind: more for kind, found in things(home).items() if (more := found - before[kind])}

    until, pause = time.monotonic() + PATIENCE, 0.01
    while (found := left()) and time.monotonic() < until:
        gc.collect()
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    assert not found, threading.enumerate()


@pytest.fixture
def netns() -> Iterator[None]:
    """A fresh network namespace around the test, with the loopback up; the code under test works in it."""
    with own_namespace():
        yield


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> Iterator[Callable[[], Namespace]]:
    """Makes further namespaces, which are gone after the test."""
    request.getfixturevalue("netns")
    made: list[Namespace] = []

    def make() -> Namespace:
        made.append(Namespace())
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def iptables(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host as Docker leaves it: it forwards, and FORWARD drops what nobody accepts, even between a bridge's ports.

    Two programs are called iptables. This is the one over nftables, unless the test's parameter says "legacy".
    """
    request.getfixturevalue("netns")
    _install_iptables(getattr(request, "param", "nft"), tmp_path, monkeypatch)
    _forward()


@pytest.fixture(params=["iptables-nft", "iptables-legacy", "nftables"])
def backend(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A host whose firewall is written with each of these, as Docker leaves it, and `firewall` that uses it.

    For iptables see that fixture; where Docker writes with nft it forbids nothing but the way to its own bridges.
    """
    request.getfixturevalue("netns")
    if request.param == "nftables":
        if missing := [tool for tool in ("nft", "ping") if not shutil.which(tool)]:
            pytest.skip(f"not installed: {', '.join(missing)} (packages nftables, iputils-ping)")
        firewall.use("nftables")
    else:
        _install_iptables(request.param.removeprefix("iptables-"), tmp_path, monkeypatch)
        firewall.use("iptables")
    _forward()
    yield request.param
    firewall.use(None)


def _install_iptables(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = shutil.which(f"xtables-{kind}-multi")
    if program is None or not shutil.which("ping"):
        pytest.skip(f"not installed: xtables-{kind}-multi or ping (packages iptables, iputils-ping)")
    for command in ("iptables", "ip6tables"):
        for name in (command, f"{command}-save", f"{command}-restore"):
            (tmp_path / name).symlink_to(program)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    try:
        run("iptables", "-P", "FORWARD", "DROP")
    except AssertionError as error:
        pytest.skip(f"the kernel has no support for {kind} iptables: {error}")
    run("ip6tables", "-P", "FORWARD", "DROP")
    for command in ("iptables", "ip6tables"):
        # A rule of somebody else's, which also makes the table exist before and after.
        run(command, "-t", "nat", "-A", "POSTROUTING", "-o", "lo", "-j", "RETURN")


def _forward() -> None:
    for sysctl in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        (SYSCTLS / sysctl).write_text("1")
    for sysctl in ("bridge/bridge-nf-call-iptables", "bridge/bridge-nf-call-ip6tables"):
        if (SYSCTLS / sysctl).exists():  # without the module br_netfilter bridged packets are not filtered
            (SYSCTLS / sysctl).write_text("1")
