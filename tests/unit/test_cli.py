"""The `netplugin` command line as a whole, and `netplugin check`."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from netplugin_sdk import Endpoint, EndpointInterface, MacAddress, Network, Plugin
from netplugin_sdk.cli import main
from netplugin_sdk.cnm import remote
from netplugin_sdk.testing.conformance import CHECKS, Group
from netplugin_sdk.testing.kit import serving

from .lab import Options, Recorder

COMMANDS = main.list_commands(click.Context(main))


def netplugin(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


# The group


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_what_it_does(command: str) -> None:
    assert f"  {command} " in netplugin("--help").stdout
    result = netplugin(command, "--help")
    assert result.exit_code == 0
    assert f"Usage: main {command}" in result.stdout
    assert "..." not in next(
        line for line in netplugin("--help").stdout.splitlines() if line.startswith(f"  {command}")
    )


def test_a_wrong_name_gets_a_hint() -> None:
    result = netplugin("chekc")
    assert result.exit_code == 2
    assert "No such command 'chekc'. Did you mean 'check'?" in result.stderr


def test_what_is_no_name_gets_none() -> None:
    result = netplugin("xyzzy")
    assert result.exit_code == 2
    assert "Did you mean" not in result.stderr


def test_the_shell_completes_commands_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "installed", lambda: ["l2", "l3", "myplugin"])

    def completed(*words: str) -> list[str]:
        found = ShellComplete(main, {}, "netplugin", "_NETPLUGIN_COMPLETE").get_completions([*words[:-1]], words[-1])
        return [item.value for item in found if item.type == "plain"]

    assert completed("ch") == ["check"]
    assert completed("check", "l") == ["l2", "l3"]
    assert completed("inspect", "my") == ["myplugin"]


# check


class Paper(Recorder):
    """A good driver without a kernel."""

    def create_endpoint(self, network: Network[Options], endpoint: Endpoint) -> EndpointInterface | None:
        return None if endpoint.requested.mac_address else EndpointInterface(mac_address=MacAddress.random())


class Wrong(Paper):
    def delete_endpoint(self, network: Network[Options], endpoint: Endpoint) -> None:
        raise RuntimeError("there is no such thing")


@pytest.fixture
def good(tmp_path: Path) -> Iterator[Path]:
    with Plugin(Paper()) as plugin, serving(plugin, tmp_path / "good.sock") as path:
        yield path


@pytest.fixture
def wrong(tmp_path: Path) -> Iterator[Path]:
    with Plugin(Wrong()) as plugin, serving(plugin, tmp_path / "wrong.sock") as path:
        yield path


def test_a_good_plugin(good: Path, tmp_path: Path) -> None:
    reports = {kind: tmp_path / f"report.{kind}" for kind in ("xml", "html", "txt")}
    arguments = [part for path in reports.values() for part in ("--report", str(path))]
    result = netplugin("check", str(good), "--no-data-plane", *arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "✓ activate" in result.stdout
    assert result.stdout.splitlines()[-1].endswith("skipped")
    assert "failed" not in result.stdout
    suite = ElementTree.parse(reports["xml"]).getroot()
    assert (int(suite.get("tests", "")), suite.get("failures")) == (len(CHECKS), "0")
    assert reports["html"].read_text().startswith("<!doctype html>")
    assert f"unix://{good}" in reports["txt"].read_text()


def test_a_wrong_plugin(wrong: Path) -> None:
    result = netplugin("check", str(wrong), "--no-data-plane", "--only", "lifecycle")
    assert result.exit_code == 1
    assert "there is no such thing" in result.stdout
    assert "hint:" in result.stdout


def test_json(wrong: Path) -> None:
    result = netplugin("check", str(wrong), "--no-data-plane", "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert {each["check"] for each in told["checks"]} == set(CHECKS)
    assert "failed" in {each["outcome"] for each in told["checks"]}


def test_some_checks(good: Path) -> None:
    result = netplugin("check", str(good), "--only", "activate", "--only", "errors", "--json")
    wanted = {"activate"} | {check.id for check in CHECKS.values() if check.group == Group.ERRORS}
    assert {each["check"] for each in json.loads(result.stdout)["checks"]} == wanted


def test_all_checks_are_listed() -> None:
    listed = netplugin("check", "--list").stdout
    assert all(check.id in listed and check.proves in listed for check in CHECKS.values())


def test_options_reach_the_plugin(tmp_path: Path) -> None:
    seen: list[Mapping[str, str]] = []

    class Seeing(Paper):
        def create_network(self, network: Network[Options]) -> None:
            super().create_network(network)
            seen.append(network.raw_options.generic)

    with Plugin(Seeing()) as plugin, serving(plugin, tmp_path / "x.sock") as path:
        netplugin("check", str(path), "--no-data-plane", "--only", "lifecycle", "-o", "mtu=1400")
    assert {"mtu": "1400"} in seen


def test_a_plugin_that_is_killed_and_started_again(tmp_path: Path) -> None:
    """By the user's command, between two calls."""
    socket = tmp_path / "p.sock"
    program = tmp_path / "plugin.py"
    program.write_text(
        "from netplugin_sdk import serve\nfrom netplugin_sdk.core import answers\n"
        "from tests.unit.test_cli import Paper\n"
        "answers.interface_exists = lambda _: True\n"  # as in conftest.py
        f"serve(Paper(), name='p', socket_path={str(socket)!r}, state={str(tmp_path / 'state')!r}, docker=None)\n"
    )
    root = Path(__file__).parents[2]
    restart = tmp_path / "restart"
    restart.write_text(
        f"cd {shlex.quote(str(root))}\n"
        f"if [ -e {tmp_path}/pid ]; then kill -9 $(cat {tmp_path}/pid); fi\n"
        f"PYTHONPATH=. {sys.executable} {program} 2>>{tmp_path}/log & echo $! >{tmp_path}/pid\n"
        f"for _ in $(seq 200); do [ -e {socket} ] && break; sleep 0.05; done\n"
    )
    command = f"sh {restart}"
    subprocess.run(command, shell=True, check=True)
    try:
        result = netplugin("check", str(socket), "--no-data-plane", "--restart", command, "--only", "restart", "--json")
        outcomes = {each["check"]: each["outcome"] for each in json.loads(result.stdout)["checks"]}
        assert outcomes
        assert set(outcomes.values()) == {"passed"}
        assert result.exit_code == 0
    finally:
        subprocess.run(f"kill $(cat {tmp_path}/pid)", shell=True, check=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], 'plugin "nowhere" not found'),
        (["/nowhere/x.sock"], "there is no socket /nowhere/x.sock"),
        (["GOOD", "--only", "nonsense"], "there is no check and no group nonsense"),
        (["GOOD", "--subnets", "10.0.0.0/28"], "an IPv4 network of /24 or larger is wanted"),
        (["GOOD", "--report", "x.pdf"], "x.pdf does not end with .txt, .xml, .html"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], said: str, good: Path) -> None:
    result = netplugin("check", *(str(good) if argument == "GOOD" else argument for argument in arguments))
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_socket_without_a_listener(good: Path, tmp_path: Path) -> None:
    import socket

    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(dead))
    result = netplugin("check", str(dead))
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "connection refused" in result.stderr
