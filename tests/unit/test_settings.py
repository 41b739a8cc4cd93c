"""One table of settings: `serve`, `run` and `netplugin serve` take the same, with the same meaning."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import netplugin_sdk
from netplugin_sdk import TLSFiles, serve
from netplugin_sdk.cli.serve import plugin_options
from netplugin_sdk.cli.serve import serve as command
from netplugin_sdk.serving.settings import SETTINGS, Setting, check_name, keywords, parse_command_line, parsed

GIVEN: dict[str, tuple[str, Any]] = {
    "name": ("lan", "lan"),
    "socket": ("/run/x.sock", Path("/run/x.sock")),
    "socket_mode": ("640", 0o640),
    "socket_owner": ("1000", 1000),
    "socket_group": ("docker", "docker"),
    "tcp": ("127.0.0.1:1", ("127.0.0.1", 1)),
    "plain_tcp": ("true", True),
    "state": ("/s", Path("/s")),
    "docker": ("none", None),
    "metrics": ("9323", ("127.0.0.1", 9323)),
    "log_level": ("debug", "DEBUG"),
    "log_format": ("json", "json"),
    **{s.key: ("/f.pem", Path("/f.pem")) for s in SETTINGS if s.key.startswith("tls_")},
}
PROGRAM_ONLY = {"limits", "timings"}
"""Keywords of `serve` that are objects of Python."""


def of_command_line(*arguments: str, **environment: str) -> dict[str, Any]:
    return parse_command_line(list(arguments), environment, name="lan", program="lan", description="A LAN.")


def arguments(setting: Setting) -> list[str]:
    return [f"--{setting.option}"] if setting.is_flag else [f"--{setting.option}", GIVEN[setting.key][0]]


def test_serve_has_a_keyword_for_each() -> None:
    made = keywords({setting.key: parsed(setting, GIVEN[setting.key][0]) for setting in SETTINGS})
    signature = inspect.signature(serve).parameters
    assert made.keys() == signature.keys() - {"drivers"} - PROGRAM_ONLY


def test_without_any_serve_does_as_by_itself() -> None:
    signature = inspect.signature(serve).parameters
    for key, value in of_command_line().items():
        if key != "name":
            assert value == signature[key].default, key


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.option)
def test_each_way_takes_each(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an option, from the environment, and for `netplugin serve`."""
    others = [s for s in SETTINGS if s.key.startswith("tls_") and s is not setting]
    together = others if setting.key.startswith("tls_") else []
    line = [word for each in (setting, *together) for word in arguments(each)]
    expected = {"socket": "socket_path"}.get(setting.key, setting.key)
    wanted: Any = GIVEN[setting.key][1]
    if setting.key.startswith("tls_"):
        expected, wanted = "tls", TLSFiles(**{f: Path("/f.pem") for f in TLSFiles.__struct_fields__})
    assert of_command_line(*line)[expected] == wanted
    variables = {each.variable: GIVEN[each.key][0] for each in (setting, *together)}
    assert of_command_line(**variables)[expected] == wanted
    served: list[dict[str, Any]] = []
    monkeypatch.setattr(netplugin_sdk, "serve", lambda *_, **given: served.append(given))
    monkeypatch.setattr("netplugin_sdk.cli.serve.load_all", lambda _: [])
    for given, environment in ((line, {}), ([], variables)):
        result = CliRunner(env=environment).invoke(command, ["l2:L2", *given])
        assert result.exit_code == 0, result.output
        assert served.pop()[expected] == wanted
    assert f"--{setting.option}" in CliRunner().invoke(command, ["--help"]).output


def test_the_commands_help_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        of_command_line("--help")
    said = capsys.readouterr().out
    assert all(f"--{setting.option}" in said for setting in SETTINGS)
    assert "NETPLUGIN_LOG_LEVEL" in said


@pytest.mark.parametrize(
    ("arguments", "environment", "line"),
    [
        (["--tcp", "there"], {}, "argument --tcp: 'there' is not ADDRESS:PORT, as in 127.0.0.1:9323"),
        ([], {"NETPLUGIN_TCP": "there"}, "NETPLUGIN_TCP: 'there' is not ADDRESS:PORT, as in 127.0.0.1:9323"),
        (["--socket-mode", "rw"], {}, "argument --socket-mode: 'rw' is not a mode, as in 660"),
        (["--log-level", "loud"], {}, "argument --log-level: 'loud' is not one of DEBUG, INFO, WARNING, ERROR"),
        ([], {"NETPLUGIN_PLAIN_TCP": "perhaps"}, "NETPLUGIN_PLAIN_TCP: 'perhaps' is not true or false"),
        (["--tls-key", "/k"], {}, "TLS needs --tls-certificate, --tls-client-ca, --tls-engine-ca"),
        (["--name", "a b"], {}, "'a b' cannot be a plugin's name: letters, digits"),
    ],
)
def test_what_cannot_be_used_is_one_line_that_says_where_it_was(
    arguments: list[str], environment: dict[str, str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        of_command_line(*arguments, **environment)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"lan: error: {line}")


@pytest.mark.parametrize(
    "name",
    ["bridge", "host", "none", "null", "overlay", "macvlan", "ipvlan", "default", "ingress", "container", "Bridge"],
)
def test_names_that_docker_keeps_for_itself(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^'{name}' cannot be a plugin's name: Docker "):
        check_name(name)
    check_name(f"my{name}")


def test_options_of_a_command_are_the_tables() -> None:
    @plugin_options
    def function() -> None:
        pass

    made = {parameter.name for parameter in getattr(function, "__click_params__", ())}
    assert made == {setting.key for setting in SETTINGS} | {"drivers", "config"}
