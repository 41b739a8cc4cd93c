"""`netplugin inspect`, `repair` and `topology` beside a real engine: they mark and repair missing parts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from netplugin_sdk.cnm.remote import Address, RemotePlugin
from netplugin_sdk.testing.engine import PrivateEngine, wait_until

from ..patience import PATIENCE
from .conftest import remove_all
from .crash_lab import KILL, everything, impatient, is_soon

pytestmark = pytest.mark.one_engine

MISSING = 5.0
"""Seconds that Docker must not know something before the plugin removes it: longer than two looks take."""
NAMES = ("web", "db", "both", "six")


@pytest.fixture(scope="module")
def host(engine: PrivateEngine) -> Iterator[Host]:
    """Three networks and four containers, one on two of them. Each test leaves them as they were."""
    before = everything(engine)
    host = Host(engine)
    try:
        create = ("network", "create", "--driver", "myplugin")
        mine = ("-o", "com.docker.network.bridge.name=own", "-o", "com.docker.network.driver.mtu=1400")
        engine.docker(*create, "--subnet", "10.88.0.0/24", "red")
        engine.docker(*create, *mine, "blue")
        engine.docker(*create, "--internal", "--ipv6", "--subnet", "fd00:77::/64", "six")
        for name, network, *options in (
            ("web", "red", "-p", "8080:80", "-p", "127.0.0.1::443", "-p", "5353:53/udp"),
            ("db", "red"),
            ("both", "blue", "-p", "8081:80"),
            ("six", "six"),
        ):
            run = ("run", "--detach", *KILL, "--name", name, "--network", network, *options)
            engine.docker(*run, "busybox", "sleep", "600")
        engine.docker("network", "connect", "red", "both")
        yield host
        remove_all(engine)
        is_soon(lambda: everything(engine), before, 3 * MISSING)
    finally:
        host.plugin.kill()


class Host:
    """The engine with the plugin, which can be stopped, or killed and started again."""

    def __init__(self, engine: PrivateEngine) -> None:
        self.engine = engine
        self.start()

    def start(self) -> None:
        self.plugin = self.engine.start_plugin("myplugin", impatient(MISSING))

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """So that it cannot repair what is about to be taken away. The nsenter that started it stops, too."""
        os.kill(self.plugin.pid, signal.SIGSTOP)
        starter = int(Path(f"/proc/{self.plugin.pid}/stat").read_text().rpartition(")")[2].split()[1])
        try:
            yield
        finally:
            os.kill(starter, signal.SIGCONT)  # which then continues the plugin

    def has_sighup(self) -> bool:
        """Whether it was sent one that waits for it to go on."""
        status = Path(f"/proc/{self.plugin.pid}/status").read_text()
        (pending,) = re.findall(r"^ShdPnd:\s*(\w+)$", status, re.MULTILINE)
        return bool(int(pending, 16) & 1 << signal.SIGHUP - 1)

    @contextmanager
    def killed(self) -> Iterator[None]:
        self.plugin.kill()
        try:
            yield
        finally:
            self.start()


def netplugin(engine: PrivateEngine, *arguments: str) -> subprocess.CompletedProcess[str]:
    return engine.run([sys.executable, "-m", "netplugin_sdk.cli", *arguments])


def inspect(engine: PrivateEngine) -> tuple[int, dict[str, Any]]:
    done = netplugin(engine, "inspect", "myplugin", "--json")
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def differences(engine: PrivateEngine) -> set[tuple[str, str]]:
    """Without the ids."""
    status, shown = inspect(engine)
    assert (status == 1) == bool(shown["differences"])
    return {(re.sub(r" \(\w+\)", "", each["about"]), each["text"]) for each in shown["differences"]}


def links(engine: PrivateEngine) -> str:
    return engine.run(["ip", "-brief", "link"]).stdout


def facts(of: Mapping[str, Any], name: str) -> list[tuple[str | None, str | None, str | None]]:
    return [(fact["state"], fact["kernel"], fact["docker"]) for fact in of["facts"] if fact["name"] == name]


def test_all_agree(host: Host) -> None:
    engine = host.engine
    status, shown = inspect(engine)
    assert (status, shown["differences"], shown["served"]) == (0, [], True)
    assert set(shown["sources"]) == {"state", "kernel", "docker"}
    networks = {network["name"]: network for network in shown["networks"]}
    assert set(networks) == {"red", "blue", "six"}
    assert {end["name"] for end in networks["red"]["endpoints"]} == {"web", "db", "both"}
    assert [each["name"] for each in networks["blue"]["interfaces"]] == ["own"]
    assert facts(networks["blue"], "MTU") == [("1400", "1400", None)]
    web = next(end for end in networks["red"]["endpoints"] if end["name"] == "web")
    (address,) = facts(web, "IPv4")
    assert len(set(address)) == 1
    assert address[0].startswith("10.88.0.")  # type: ignore[union-attr]
    assert len(set(*facts(web, "MAC"))) == 1
    assert len(facts(web, "port")) == 5, "8080 and 5353 by IPv4 and IPv6, and one that the kernel picked"
    (six,) = facts(networks["six"]["endpoints"][0], "IPv6")
    assert len(set(six)) == 1
    text = netplugin(engine, "inspect", "myplugin")
    assert text.returncode == 0
    assert "≠" not in text.stdout
    assert "3 networks, 5 endpoints: all agree" in text.stdout


@pytest.mark.parametrize(
    ("without", "column"), [(("--state", "/nonexistent"), "State"), (("DOCKER_HOST=unix:///nonexistent",), "Docker")]
)
def test_fewer_columns(host: Host, without: tuple[str, ...], column: str) -> None:
    """As of a plugin that was not made with this SDK, or where no engine runs."""
    command = [sys.executable, "-m", "netplugin_sdk.cli", "inspect", "myplugin"]
    done = host.engine.run([*command, *without] if without[0].startswith("-") else ["env", *without, *command])
    assert done.returncode == 0, done.stdout + done.stderr
    heads = [line.split() for line in done.stdout.splitlines() if line.startswith("       ") and "Kernel" in line]
    assert heads == [[name for name in ("State", "Kernel", "Docker") if name != column]]
    assert re.search(rf"{column} +not (read|asked): ", done.stdout)
    assert "3 networks, 5 endpoints: all agree" in done.stdout
    assert "eth0 up" in done.stdout


def test_what_was_taken_from_the_kernel_is_marked_and_mended(host: Host) -> None:
    engine = host.engine
    with host.stopped():
        (bridge,) = re.findall(r"^(br-\w+) .*$", links(engine), re.MULTILINE)[:1]
        red = inspect(engine)[1]["networks"]
        name = next(each["name"] for each in red if each["interfaces"][0]["name"] == bridge)
        engine.run(["ip", "link", "delete", "own"])
        engine.run(["ip", "link", "delete", bridge])
        assert differences(engine) == {
            ("network blue", "there is no own"),
            (f"network {name}", f"its bridge {bridge} is not there"),
        }
    done = netplugin(engine, "repair", "myplugin")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all agree" in done.stdout.splitlines()[-1]
    assert {bridge, "own"} <= {line.split()[0] for line in links(engine).splitlines()}


def test_a_pair_that_is_gone_takes_a_restart(host: Host) -> None:
    engine = host.engine
    with host.stopped():
        status, shown = inspect(engine)
        assert status == 0
        network = next(each for each in shown["networks"] if each["name"] == "red")
        db = next(end for end in network["endpoints"] if end["name"] == "db")
        engine.run(["ip", "link", "delete", db["outside"]["name"]])
        assert differences(engine) == {("endpoint db on red", "its container has no interface for it")}
    done = netplugin(engine, "repair", "myplugin", "--wait", "2")
    assert done.returncode == 1
    assert "→ docker restart db" in done.stdout
    engine.docker("restart", "--time", "0", "db")
    assert differences(engine) == set()


def test_what_docker_does_not_know_is_removed(host: Host) -> None:
    """As what an engine has forgotten: here it is a call that was not the engine's."""
    engine = host.engine
    address = Address("myplugin", f"unix://{engine.plugin_folder}/myplugin.sock")
    leaked = "1eaced" + 58 * "0"
    with RemotePlugin(address) as caller:
        pool = {"AddressSpace": "LocalDefault", "Pool": "10.99.0.0/24", "Gateway": "10.99.0.1/24"}
        caller.call("NetworkDriver.CreateNetwork", {"NetworkID": leaked, "Options": {}, "IPv4Data": [pool]})
    with host.stopped():  # so that it does not remove it by itself before it is asked to
        assert differences(engine) == {(f"network {leaked[:12]}", "Docker does not know it")}
        repair = engine.spawn("repair", [sys.executable, "-m", "netplugin_sdk.cli", "repair", "myplugin", "--json"])
        wait_until(host.has_sighup, PATIENCE)
    wait_until(lambda: not repair.running, PATIENCE)
    said = repair.log.read_text()
    assert repair.stop() == 0, said
    assert json.loads(said) == {"before": [f"network {leaked[:12]}: Docker does not know it"], "after": []}
    assert f"br-{leaked[:12]}" not in links(engine)


def test_a_plugin_that_does_not_run(host: Host) -> None:
    engine = host.engine
    with host.killed():
        found = differences(engine)
        assert ("endpoint web on red", "nobody listens on 0.0.0.0:8080") in found
        assert [about for about, text in found if "nobody serves it" in text] == ["plugin myplugin"]
        done = netplugin(engine, "repair", "myplugin")
        assert done.returncode == 1
        assert "nobody serves myplugin" in done.stderr
        listed = json.loads(netplugin(engine, "doctor", "--json").stdout)
        ill = {each["text"]: (each["level"], each["fix"]) for each in listed}
        text = "/run/docker/plugins/myplugin.sock is stale: nobody listens, and Docker waits in vain"
        assert ill[text][0] == "warning"
        wanted = "red wants the plugin myplugin, and nobody serves it"
        assert ill[wanted] == ("problem", "start myplugin, or: docker network rm red")
        assert netplugin(engine, "doctor").returncode == 1
    assert differences(engine) == set()


def test_topology_names_all(host: Host) -> None:
    engine = host.engine
    svg = netplugin(engine, "topology", "myplugin").stdout
    texts = [each.text or "" for each in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    mermaid = netplugin(engine, "topology", "myplugin", "--format", "mermaid").stdout
    page = netplugin(engine, "topology", "myplugin", "--format", "html").stdout
    for name in (*NAMES, "red", "blue"):
        assert name in texts
        assert f'"{name}<br/>' in mermaid
        assert f">{name}<" in page
    assert ":8080 → 80/tcp" in texts
    assert texts.count("both") == 2


def test_doctor_finds_nothing_in_the_way(host: Host) -> None:
    done = netplugin(host.engine, "doctor", "--json")
    found = {each["text"]: each["level"] for each in json.loads(done.stdout)}
    assert (done.returncode, [text for text, level in found.items() if level == "problem"]) == (0, [])
    assert any(text.startswith("Engine ") for text in found)
    assert found["red by myplugin"] == "ok"
    assert found["myplugin listens at /run/docker/plugins/myplugin.sock"] == "ok"
