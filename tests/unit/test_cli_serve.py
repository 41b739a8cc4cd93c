"""`netplugin serve`: what it understands, where from, and what it refuses; and a plugin that it really serves."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import netplugin_sdk
from netplugin_sdk import TLSFiles
from netplugin_sdk.cli import main
from netplugin_sdk.core.engine_api import SOCKET
from netplugin_sdk.testing.engine import listens

from ..patience import PATIENCE
from .serving import DRIVER, connect_unix, wait_for

NETPLUGIN = (sys.executable, "-m", "netplugin_sdk.cli")

MODULE = (
    DRIVER.partition("arguments =")[0]
    + """
from netplugin_sdk.ipam import PoolIpamDriver

class Wanting(Echo):
    def __init__(self, parent): pass

class Unfinished(NetworkDriver):
    pass

class Breaking(Echo):
    def __init__(self): raise KeyError("no parent")

class Nested:
    Echo = Echo

ready = Echo()
addresses = PoolIpamDriver()
nothing = 7

def factory(): return Echo()
def broken_factory(): return "a driver"
"""
)

Serve = Callable[..., Result]


class Served:
    """The arguments of `serve`, of each time that it was called."""

    def __init__(self) -> None:
        self.drivers: tuple[Any, ...] = ()
        self.arguments: dict[str, Any] = {}

    def __call__(self, *drivers: Any, **arguments: Any) -> None:
        self.drivers, self.arguments = drivers, arguments


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with drivers in echoes.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "echoes.py").write_text(MODULE)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("echoes", "package", "broken", "syntax"):
            del sys.modules[name]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    served = Served()
    monkeypatch.setattr(netplugin_sdk, "serve", served)
    return served


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(main, ["serve", *arguments])


def refused(status: int, *arguments: str, **environment: str) -> str:
    """The one line that says why."""
    result = run(*arguments, **environment)
    assert result.exit_code == status, result.output
    *_, last = result.stderr.splitlines()
    return last.removeprefix("Error: ")


# Which drivers


@pytest.mark.parametrize("target", ["Echo", "ready", "factory", "Nested.Echo"])
def test_a_class_an_instance_and_a_factory_are_served(folder: Path, served: Served, target: str) -> None:
    result = run(f"echoes:{target}")
    assert result.exit_code == 0, result.output
    (driver,) = served.drivers
    assert type(driver).__name__ == "Echo"
    assert served.arguments["name"] == "echoes"


def test_a_network_driver_and_an_ipam_driver_are_served_together(folder: Path, served: Served) -> None:
    run("echoes:Echo", "echoes:addresses")
    assert [type(driver).__name__ for driver in served.drivers] == ["Echo", "PoolIpamDriver"]


def test_the_name_is_that_of_the_package(folder: Path, served: Served) -> None:
    (folder / "package").mkdir()
    (folder / "package/__init__.py").touch()
    (folder / "package/driver.py").write_text("from echoes import Echo")
    run("package.driver:Echo")
    assert served.arguments["name"] == "package"
    assert served.arguments["socket_path"] is None, "serve's own default: in Docker's folder, of this name"


@pytest.mark.parametrize(
    ("status", "targets", "why"),
    [
        (2, [], "Missing argument 'MODULE:DRIVER'."),
        (2, ["echoes"], "'echoes' is not MODULE:DRIVER, as in l2:L2."),
        (2, [":Echo"], "':Echo' is not MODULE:DRIVER, as in l2:L2."),
        (2, ["echoes.py:Echo"], "'echoes.py:Echo': a module is named without its .py."),
        (2, ["echoes:Echo", "echoes:ready"], "are of one kind: a plugin has one NetworkDriver."),
        (1, ["absent:Echo"], "there is no module absent in this folder, and none is installed"),
        (1, ["echoes.absent:Echo"], "there is no module echoes.absent in this folder, and none is installed"),
        (1, ["echoes:Ecko"], "module echoes has no Ecko; it has Echo, Wanting, Unfinished, Breaking, ready, addresses"),
        (1, ["echoes:nothing"], "echoes:nothing is not a driver, but 7"),
        (1, ["echoes:broken_factory"], "echoes:broken_factory is not a driver, but 'a driver'"),
        (1, ["echoes:Wanting"], "cannot make echoes:Wanting: TypeError: "),
        (1, ["echoes:Unfinished"], "Unfinished has no create_network, "),
    ],
)
def test_what_is_no_driver_is_one_line(folder: Path, served: Served, status: int, targets: list[str], why: str) -> None:
    result = run(*targets)
    assert result.exit_code == status
    *usage, last = result.stderr.splitlines()
    assert why in last
    assert status == 2 or not usage, "no traceback where none helps"
    assert served.arguments == {}


@pytest.mark.parametrize(
    ("content", "line", "why"),
    [
        ("import absent", "import absent", "ModuleNotFoundError: No module named 'absent'"),
        ("def f(): raise ValueError('oh')\nf()", "def f(): raise ValueError('oh')", "ValueError: oh"),
        ("x = (", "x = (", "SyntaxError: '(' was never closed (broken.py, line 1)"),
    ],
)
def test_a_module_that_is_broken_is_shown_with_its_own_lines_only(
    folder: Path, served: Served, content: str, line: str, why: str
) -> None:
    (folder / "broken.py").write_text(content)
    result = run("broken:Echo")
    assert result.exit_code == 1
    *shown, last = result.stderr.splitlines()
    assert last == f"Error: cannot import broken: {why}"
    assert line in map(str.strip, shown)
    assert "importlib" not in result.stderr
    assert "netplugin_sdk" not in result.stderr


def test_a_constructor_that_fails_is_shown(folder: Path, served: Served) -> None:
    result = run("echoes:Breaking")
    assert result.exit_code == 1
    assert 'raise KeyError("no parent")' in result.stderr
    assert result.stderr.splitlines()[-1] == "Error: cannot make echoes:Breaking: KeyError: 'no parent'"


# Options, from three places

EVERYTHING = {
    "name": "l2",
    "socket": "s.sock",
    "socket-mode": "640",
    "socket-owner": "7",
    "socket-group": "wheel",
    "tcp": "127.0.0.1:7000",
    "tls-certificate": "a",
    "tls-key": "b",
    "tls-client-ca": "c",
    "tls-engine-ca": "d",
    "tls-engine-certificate": "e",
    "tls-engine-key": "f",
    "state": "folder",
    "docker": "none",
    "metrics": "[::1]:9323",
    "log-level": "debug",
    "log-format": "json",
}

AS_ARGUMENTS = {
    "name": "l2",
    "socket_path": Path("s.sock"),
    "socket_mode": 0o640,
    "socket_owner": 7,
    "socket_group": "wheel",
    "tcp": ("127.0.0.1", 7000),
    "tls": TLSFiles(
        certificate=Path("a"),
        key=Path("b"),
        client_ca=Path("c"),
        engine_ca=Path("d"),
        engine_certificate=Path("e"),
        engine_key=Path("f"),
    ),
    "plain_tcp": True,
    "state": Path("folder"),
    "docker": None,
    "metrics": ("::1", 9323),
    "log_level": "DEBUG",
    "log_format": "json",
}


def test_every_option_on_the_command_line(folder: Path, served: Served) -> None:
    given = [word for key, value in EVERYTHING.items() for word in (f"--{key}", value)]
    assert run("echoes:Echo", "--plain-tcp", *given).exit_code == 0
    assert served.arguments == AS_ARGUMENTS


def test_every_option_in_the_environment(folder: Path, served: Served) -> None:
    given = {f"NETPLUGIN_{key.upper().replace('-', '_')}": value for key, value in EVERYTHING.items()}
    given |= {"NETPLUGIN_DRIVERS": "echoes:Echo echoes:addresses", "NETPLUGIN_PLAIN_TCP": "1"}
    result = run(**given)
    assert result.exit_code == 0, result.output
    assert served.arguments == AS_ARGUMENTS
    assert len(served.drivers) == 2


@pytest.mark.parametrize("file", ["netplugin.toml", "other.toml"])
def test_every_option_in_a_file(folder: Path, served: Served, file: str) -> None:
    lines = [f'{key} = "{value}"' for key, value in EVERYTHING.items()]
    lines += ['drivers = ["echoes:Echo", "echoes:addresses"]', "plain-tcp = true"]
    (folder / file).write_text("\n".join(lines))
    result = run(*([] if file == "netplugin.toml" else ["--config", file]))
    assert result.exit_code == 0, result.output
    assert served.arguments == AS_ARGUMENTS
    assert len(served.drivers) == 2


def test_the_defaults(folder: Path, served: Served) -> None:
    run("echoes:Echo")
    assert served.arguments == {
        "name": "echoes",
        "socket_path": None,
        "socket_mode": 0o600,
        "socket_owner": None,
        "socket_group": None,
        "tcp": None,
        "tls": None,
        "plain_tcp": False,
        "state": None,
        "docker": SOCKET,
        "metrics": None,
        "log_level": "INFO",
        "log_format": "text",
    }


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(folder: Path, served: Served) -> None:
    (folder / "netplugin.toml").write_text('name = "file"\nstate = "file"\nlog-format = "json"\ndrivers = ["no:No"]')
    run("echoes:Echo", "--name", "line", NETPLUGIN_NAME="environment", NETPLUGIN_STATE="environment")
    taken = {key: served.arguments[key] for key in ("name", "state", "log_format")}
    assert taken == {"name": "line", "state": Path("environment"), "log_format": "json"}


def test_a_named_file_is_read_instead_of_the_one_that_is_there(folder: Path, served: Served) -> None:
    (folder / "netplugin.toml").write_text('name = "there"\nlog-level = "DEBUG"')
    (folder / "other.toml").write_text('name = "named"')
    run("echoes:Echo", NETPLUGIN_CONFIG="other.toml")
    assert (served.arguments["name"], served.arguments["log_level"]) == ("named", "INFO")


def test_a_mere_port_for_metrics_is_on_the_loopback(folder: Path, served: Served) -> None:
    run("echoes:Echo", "--metrics", "9323")
    assert served.arguments["metrics"] == ("127.0.0.1", 9323)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('nmae = "x"', "netplugin.toml: unknown key 'nmae'; known keys: docker, drivers, log-format, "),
        ('config = "x"', "netplugin.toml: unknown key 'config'"),
        ("name = 7", "netplugin.toml: name: 7 is not a string"),
        ('drivers = "echoes:Echo"', "netplugin.toml: drivers: 'echoes:Echo' is not a list of strings"),
        ('plain-tcp = "yes"', "netplugin.toml: plain-tcp: 'yes' is not true or false"),
        ("[tcp]\nport = 7", "netplugin.toml: tcp: {'port': 7} is not a string"),
        ('metrics = "here"', "netplugin.toml: metrics: 'here' is not ADDRESS:PORT, as in 127.0.0.1:9323"),
        ('log-format = "xml"', "netplugin.toml: log-format: 'xml' is not one of 'text', 'json'."),
        ("name = ", "cannot read netplugin.toml: Invalid value (at end of document)"),
        ('name = "\xff"', "cannot read netplugin.toml: 'utf-8' codec can't decode"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it_and_the_key(folder: Path, served: Served, content: str, why: str) -> None:
    (folder / "netplugin.toml").write_bytes(content.encode("latin-1"))
    result = run("echoes:Echo")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.removeprefix("Error: ").startswith(why)
    assert served.arguments == {}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--name", "a/b"], "'a/b' cannot be a plugin's name: letters, digits, and _ . - after the first; --name "),
        (["--metrics", "here"], "Invalid value for '--metrics': 'here' is not ADDRESS:PORT"),
        (["--metrics", "127.0.0.1:65536"], "Invalid value for '--metrics': '127.0.0.1:65536' is not ADDRESS:PORT"),
        (["--tls-key", "k"], "TLS needs --tls-certificate, --tls-client-ca, --tls-engine-ca, "),
        (["--config", "absent.toml"], "Invalid value for '--config': File 'absent.toml' does not exist."),
    ],
)
def test_a_wrong_command_line(folder: Path, served: Served, arguments: list[str], why: str) -> None:
    assert refused(2, "echoes:Echo", *arguments).startswith(why)
    assert served.arguments == {}


def test_the_help_names_every_option(folder: Path) -> None:
    shown = run("--help").output
    assert all(f"--{key}" in shown for key in EVERYTHING)


# A plugin that is served


def test_it_serves_until_sigterm_what_the_current_folder_has(folder: Path) -> None:
    path = folder / "s.sock"
    (folder / "netplugin.toml").write_text(f'socket = "{path}"\nstate = "{folder}/state"\ndocker = "none"')
    command = (*NETPLUGIN, "serve", "echoes:Echo", "echoes:addresses")
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as plugin:
        try:
            wait_for(lambda: listens(path), "the socket")
            with connect_unix(path) as client:
                assert client.echo(n="1") == {"n": "1"}
            again = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)
            plugin.send_signal(signal.SIGTERM)
            _, log = plugin.communicate(timeout=PATIENCE)
        finally:
            plugin.kill()
    assert plugin.returncode == 0
    assert f"echoes serves Echo and PoolIpamDriver on {path}" in log
    assert not path.exists()
    assert (again.returncode, again.stderr) == (
        1,
        f"Error: the state folder {folder}/state is in use by pid {plugin.pid}\n",
    )


def test_a_socket_in_use_is_one_line(folder: Path) -> None:
    path = folder / "s.sock"
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(path))
        taken.listen()
        command = (*NETPLUGIN, "serve", "echoes:Echo", "--socket", str(path), "--state", "state", "--docker", "none")
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {path} is already served by pid ")
    assert len(done.stderr.splitlines()) == 1
