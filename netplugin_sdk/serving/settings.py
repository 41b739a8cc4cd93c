"""The settings of a process that serves a plugin: one table for `serve`, `run` and the ``netplugin`` command line.

Each setting is a keyword of `serve`, an option of a command (``--log-level``) and an environment variable
(``NETPLUGIN_LOG_LEVEL``). The command line goes before the environment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netplugin_sdk.core.engine_api import SOCKET
from netplugin_sdk.serving.sockets import PLUGIN_FOLDER, TLSFiles

STATE_FOLDER = Path("/var/lib/netplugin")
"""Where plugins keep their state, in a folder of their name."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_RESERVED = {
    **dict.fromkeys(("bridge", "host", "ipvlan", "macvlan", "null", "overlay"), "Docker has a driver of this name"),
    **dict.fromkeys(("none", "default", "container"), "Docker gives this name a meaning of its own"),
    "ingress": "Docker has a network of this name in each swarm",
}
"""Names that no plugin can have: moby ``daemon/libnetwork/drivers_linux.go``, ``api/types/container/hostconfig.go``."""


def check_name(name: str) -> None:
    """Raise ValueError if `name` cannot be a plugin's: it is a part of file names, and of Docker's references."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot be a plugin's name: letters, digits, and _ . - after the first")
    if (reason := _RESERVED.get(name.lower())) is not None:
        raise ValueError(f"{name!r} cannot be a plugin's name: {reason}")


def address_port(text: str) -> tuple[str, int]:
    """``ADDRESS:PORT``, or only ``PORT`` for 127.0.0.1. Raises ValueError for anything else."""
    address, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ValueError(f"{text!r} is not ADDRESS:PORT, as in 127.0.0.1:9323")
    return address.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def _mode(text: str) -> int:
    if not re.fullmatch(r"0?[0-7]{3}", text):
        raise ValueError(f"{text!r} is not a mode, as in 660")
    return int(text, 8)


def _user(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _engine_socket(text: str) -> Path | None:
    return None if text == "none" else Path(text)


@dataclass(frozen=True)
class Setting:
    """One of them. `option` is its name on the command line, without ``--``; `parse` raises ValueError."""

    option: str
    help: str
    """A sentence."""
    metavar: str = "TEXT"
    parse: Callable[[str], Any] = str
    default: str | None = None
    """As it would be given; None if the help says what happens without."""
    choices: tuple[str, ...] = ()
    is_flag: bool = False

    @property
    def key(self) -> str:
        """In Python: ``log_level``."""
        return self.option.replace("-", "_")

    @property
    def variable(self) -> str:
        """In the environment: ``NETPLUGIN_LOG_LEVEL``."""
        return f"NETPLUGIN_{self.key.upper()}"


SETTINGS = (
    Setting("name", "The plugin's name, for docker network create -d NAME."),
    Setting("socket", f"Where to listen.  [default: {PLUGIN_FOLDER}/NAME.sock]", "FILE", Path),
    Setting("socket-mode", "Its permission bits.  [default: 600, or 660 with --socket-group]", "MODE", _mode),
    Setting("socket-owner", "Its owner, by name or id.", "USER", _user),
    Setting(
        "socket-group", "A group whose members may call the plugin, too: that makes them root.", "GROUP", _user
    ),
    Setting("tcp", "Listen there instead of on a socket.", "ADDRESS:PORT", address_port),
    Setting("tls-certificate", "The plugin's certificate, for --tcp (PEM, as all of these).", "FILE", Path),
    Setting("tls-key", "Its key.", "FILE", Path),
    Setting("tls-client-ca", "The CA of the engines' certificates.", "FILE", Path),
    Setting("tls-engine-ca", "On the engine's host: the CA of the plugin's certificate.", "FILE", Path),
    Setting("tls-engine-certificate", "On the engine's host: the engine's certificate.", "FILE", Path),
    Setting("tls-engine-key", "On the engine's host: its key.", "FILE", Path),
    Setting("plain-tcp", "Insist on --tcp without TLS beyond the loopback addresses.", is_flag=True),
    Setting("state", f"Where networks are remembered.  [default: {STATE_FOLDER}/NAME]", "FOLDER", Path),
    Setting(
        "docker",
        "The engine's own socket, to ask it what it has; 'none' asks nobody.",
        "FILE|none",
        _engine_socket,
        str(SOCKET),
    ),
    Setting(
        "metrics",
        "Serve Prometheus metrics at http://ADDRESS:PORT/metrics; only a PORT is on 127.0.0.1.",
        "ADDRESS:PORT",
        address_port,
    ),
    Setting(
        "log-level", "INFO shows each call.", parse=str.upper, default="INFO",
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
    ),
    Setting("log-format", "On standard error: lines, or JSON objects.", default="text", choices=("text", "json")),
)  # fmt: skip
"""All of them, in the order of ``--help``."""

_TLS = tuple(setting for setting in SETTINGS if setting.option.startswith("tls-"))


def keywords(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `serve` for the values of all `SETTINGS`, by their keys; None where one was not given.

    Raises ValueError: they do not fit together, or the name cannot be a plugin's.
    """
    values = dict(values)
    check_name(values["name"])
    files = {setting.key.removeprefix("tls_"): values.pop(setting.key) for setting in _TLS}
    missing = [f"--{setting.option}" for setting in _TLS if files[setting.key.removeprefix("tls_")] is None]
    if missing and len(missing) < len(files):
        raise ValueError(f"TLS needs {', '.join(missing)} too")
    values["tls"] = None if missing else TLSFiles(**files)
    values["socket_path"] = values.pop("socket")
    if values["socket_mode"] is None:
        values["socket_mode"] = 0o600 if values["socket_group"] is None else 0o660
    return values


def parse_command_line(arguments: list[str] | None, environment: Mapping[str, str], *, name: str, program: str,
                       description: str) -> dict[str, Any]:  # fmt: skip
    """The keywords of `serve` from a command line, and from the environment for what it does not say.

    Prints the help and exits for ``--help``; exits with status 2 and one line for what cannot be used.

    Args:
        arguments: without the program; None takes this process's.
        environment: variables by name.
        name: the plugin's, unless something else is given.
        program: for the usage line.
        description: a sentence for the help.
    """
    import argparse  # noqa: PLC0415  # 6 ms that only programs need

    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog="Every option can be given as an environment variable, too: NETPLUGIN_LOG_LEVEL=DEBUG.",
    )
    for setting in SETTINGS:
        default = name if setting.option == "name" else setting.default
        text = setting.help.replace("%", "%%") + (f"  [default: {default}]" if default is not None else "")
        if setting.is_flag:
            parser.add_argument(f"--{setting.option}", action="store_true", default=None, help=text)
        else:
            metavar = "|".join(setting.choices) or setting.metavar
            parser.add_argument(f"--{setting.option}", metavar=metavar, help=text)
    given = vars(parser.parse_args(arguments))

    values: dict[str, Any] = {}
    try:
        for setting in SETTINGS:
            where = f"argument --{setting.option}: "
            value: str | bool | None = given[setting.key]
            if value is None and setting.variable in environment:
                value, where = environment[setting.variable], f"{setting.variable}: "
            if value is None:
                value = name if setting.option == "name" else setting.default
            values[setting.key] = parsed(setting, value)
        where = ""
        return keywords(values)
    except ValueError as error:
        parser.error(f"{where}{error}")


def parsed(setting: Setting, text: str | bool | None) -> Any:
    """The value of a setting. Raises ValueError for what cannot be used."""
    if setting.is_flag:
        if text is None or isinstance(text, bool):
            return bool(text)
        if (value := _TRUTH.get(text.lower())) is None:
            raise ValueError(f"{text!r} is not true or false")
        return value
    if text is None:
        return None
    value = setting.parse(str(text))
    if setting.choices and value not in setting.choices:
        raise ValueError(f"{text!r} is not one of {', '.join(setting.choices)}")
    return value


_TRUTH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
