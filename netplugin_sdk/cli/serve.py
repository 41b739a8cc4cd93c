"""`netplugin serve`: a driver served from the command line, without a `main` of its own."""

from __future__ import annotations

import sys
import tomllib
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

import netplugin_sdk
from netplugin_sdk import IpamDriver, NetworkDriver, TLSFiles
from netplugin_sdk.core.engine_api import SOCKET
from netplugin_sdk.errors import DriverError
from netplugin_sdk.serving.server import PLUGIN_FOLDER, check_name

_F = TypeVar("_F", bound=Callable[..., Any])

CONFIG = Path("netplugin.toml")
"""Read from the current folder, if it is there."""

_TLS_HELP = {
    "certificate": "The plugin's certificate, for --tcp (PEM, as all of these).",
    "key": "Its key.",
    "client_ca": "The CA of the engines' certificates.",
    "engine_ca": "On the engine's host: the CA of the plugin's certificate.",
    "engine_certificate": "On the engine's host: the engine's certificate.",
    "engine_key": "On the engine's host: its key.",
}


class AddressPort(click.ParamType[tuple[str, int]]):
    """Where to listen: ``ADDRESS:PORT``, or only ``PORT`` for 127.0.0.1."""

    name = "address:port"

    def convert(
        self, value: str | tuple[str, int], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        """Address and port; anything else is a usage error."""
        if isinstance(value, tuple):
            return value
        address, _, port = value.rpartition(":")
        if not (port.isascii() and port.isdigit() and int(port) < 65536):
            self.fail(f"{value!r} is not ADDRESS:PORT, as in 127.0.0.1:9323", param, ctx)
        return address.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the options say, wherever they were given."""

    drivers: tuple[str, ...]
    """``MODULE:DRIVER``."""
    name: str
    socket: Path
    group: str | None
    tcp: tuple[str, int] | None
    plain_tcp: bool
    tls: TLSFiles | None
    state: Path | None
    docker: Path | None
    metrics: tuple[str, int] | None
    log_level: str
    log_format: Literal["text", "json"]

    @property
    def socket_mode(self) -> int:
        """Permission bits of the socket: its group may call where one is named."""
        return 0o600 if self.group is None else 0o660

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """From the values of `plugin_options`; what does not fit together is a usage error."""
        given = dict(given)
        drivers = given["drivers"]
        if not drivers:
            raise click.UsageError("Missing argument 'MODULE:DRIVER'.")
        for driver in drivers:
            module, _, name = driver.partition(":")
            if not module or not name:
                raise click.UsageError(f"{driver!r} is not MODULE:DRIVER, as in l2:L2.")
            if module.endswith(".py"):
                raise click.UsageError(f"{driver!r}: a module is named without its .py.")
        given["name"] = given["name"] or drivers[0].partition(":")[0].partition(".")[0]
        try:
            check_name(given["name"])
        except ValueError as error:
            raise click.UsageError(f"{error}; --name gives another.") from None
        given["socket"] = given["socket"] or PLUGIN_FOLDER / f"{given['name']}.sock"
        given["docker"] = None if given["docker"] == Path("none") else given["docker"]
        files = {field: given.pop(f"tls_{field}") for field in _TLS_HELP}
        missing = [_tls_option(field) for field, file in files.items() if file is None]
        if missing and len(missing) < len(files):
            raise click.UsageError(f"TLS needs {', '.join(missing)} too.")
        return cls(tls=None if missing else TLSFiles(**files), **given)


def _tls_option(field: str) -> str:
    return f"--tls-{field.replace('_', '-')}"


def _read_config(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
    """Make what the file says the options' defaults: the command line and the environment go before them."""
    if path is None:
        path = CONFIG
        if not path.is_file():
            return
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise click.ClickException(f"cannot read {path}: {error}") from None
    parameters = {param.opts[0].lstrip("-"): param for param in ctx.command.params if param.expose_value}
    ctx.default_map = {}
    for key, value in content.items():
        if (param := parameters.get(key)) is None:
            raise click.ClickException(f"{path}: unknown key {key!r}; known keys: {', '.join(sorted(parameters))}")
        try:
            ctx.default_map[param.name or key] = _checked(param, value, ctx)
        except click.BadParameter as error:
            raise click.ClickException(f"{path}: {key}: {error.message}") from None


def _checked(param: click.Parameter, value: object, ctx: click.Context) -> object:
    if param.nargs == -1:
        wanted, fits = "a list of strings", isinstance(value, list) and all(isinstance(one, str) for one in value)
    elif getattr(param, "is_flag", False):
        wanted, fits = "true or false", isinstance(value, bool)
    else:
        wanted, fits = "a string", isinstance(value, str)
    if not fits:
        raise click.BadParameter(f"{value!r} is not {wanted}")
    return param.type_cast_value(ctx, value)


def plugin_options(command: _F) -> _F:
    """The arguments and options of a command that serves drivers; `Settings.of` takes their values."""
    a_file = click.Path(path_type=Path)
    tls = [
        click.option(_tls_option(field), type=a_file, metavar="FILE", help=text) for field, text in _TLS_HELP.items()
    ]
    options = [
        click.argument("drivers", nargs=-1, metavar="MODULE:DRIVER [MODULE:IPAM]", envvar="NETPLUGIN_DRIVERS"),
        click.option("--name", help="The plugin's name, for docker network create -d NAME.  [default: the module's]"),
        click.option(
            "--socket", type=a_file, metavar="FILE", help=f"Where to listen.  [default: {PLUGIN_FOLDER}/NAME.sock]"
        ),
        click.option("--group", help="A group whose members may call the plugin, too: that makes them root."),
        click.option("--tcp", type=AddressPort(), metavar="ADDRESS:PORT", help="Listen there instead of on a socket."),
        *tls,
        click.option("--plain-tcp", is_flag=True, help="Insist on --tcp without TLS beyond the loopback addresses."),
        click.option(
            "--state",
            type=a_file,
            metavar="FOLDER",
            help="Where networks are remembered.  [default: /var/lib/netplugin/NAME]",
        ),
        click.option(
            "--docker",
            type=a_file,
            default=SOCKET,
            show_default=True,
            metavar="FILE|none",
            help="The engine's own socket, to ask what it has; 'none' asks nobody.",
        ),
        click.option(
            "--metrics",
            type=AddressPort(),
            metavar="ADDRESS:PORT",
            help="Serve Prometheus metrics at http://ADDRESS:PORT/metrics; a mere PORT is on 127.0.0.1.",
        ),
        click.option(
            "--log-level",
            type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"], case_sensitive=False),
            default="INFO",
            show_default=True,
            help="INFO shows each call.",
        ),
        click.option(
            "--log-format",
            type=click.Choice(["text", "json"]),
            default="text",
            show_default=True,
            help="On standard error: lines, or JSON objects.",
        ),
        click.option(
            "--config",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            is_eager=True,
            expose_value=False,
            callback=_read_config,
            help=f"A TOML file with any of these.  [default: {CONFIG}, if it is there]",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


ENVIRONMENT = {"auto_envvar_prefix": "NETPLUGIN"}
"""Context settings of a command with `plugin_options`."""


@click.command(short_help="Serve a driver to the Docker Engine of this host.", context_settings=ENVIRONMENT)
@plugin_options
def serve(**given: Any) -> None:
    """Serve a network driver, an IPAM driver, or one of each, until SIGTERM or Ctrl-C.

    MODULE:DRIVER is where it is: l2:L2 is the class L2 of l2.py, in the current folder or installed. An instance is
    served as it is; a class, or a function, is called without arguments.

    Every option can be given as an environment variable too (NETPLUGIN_LOG_LEVEL=DEBUG), or in a TOML file (log-level =
    "DEBUG"); the command line goes before the environment, and that before the file.
    """
    settings = Settings.of(given)
    sys.path.insert(0, str(Path.cwd()))
    netplugin_sdk.serve(
        *load_all(settings.drivers),
        name=settings.name,
        socket_path=settings.socket,
        socket_mode=settings.socket_mode,
        socket_group=settings.group,
        tcp=settings.tcp,
        tls=settings.tls,
        plain_tcp=settings.plain_tcp,
        state=settings.state,
        docker=settings.docker,
        metrics=settings.metrics,
        log_format=settings.log_format,
        log_level=settings.log_level,
    )


# ------------------------------------------------------------------------------------------------------ the drivers


def load_all(targets: tuple[str, ...]) -> list[NetworkDriver[Any] | IpamDriver]:
    """The drivers that are named, ``MODULE:DRIVER``. Raises click's exceptions where that is not what there is."""
    drivers = [_load(target) for target in targets]
    for kind in (NetworkDriver, IpamDriver):
        if sum(isinstance(driver, kind) for driver in drivers) > 1:
            raise click.UsageError(f"{' and '.join(targets)} are of one kind: a plugin has one {kind.__name__}.")
    return drivers


def _load(target: str) -> NetworkDriver[Any] | IpamDriver:
    module_name, _, name = target.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if f"{module_name}.".startswith(f"{error.name}."):
            raise click.ClickException(f"there is no module {error.name} here, nor is one installed") from None
        raise _broken(f"cannot import {module_name}", error) from error
    except Exception as error:
        raise _broken(f"cannot import {module_name}", error) from error
    try:
        found = reduce(getattr, name.split("."), module)
    except AttributeError:
        there = [key for key, value in vars(module).items() if _is_own_driver(value, module_name)]
        has = f"it has {', '.join(there)}" if there else "it has no driver"
        raise click.ClickException(f"module {module_name} has no {name}; {has}") from None
    if callable(found) and not isinstance(found, NetworkDriver | IpamDriver):
        try:
            found = found()
        except DriverError:
            raise
        except Exception as error:
            raise _broken(f"cannot make {target}", error) from error
    if not isinstance(found, NetworkDriver | IpamDriver):
        raise click.ClickException(f"{target} is no driver, but {found!r}")
    return found


def _is_own_driver(value: object, module: str) -> bool:
    kinds = NetworkDriver, IpamDriver
    if isinstance(value, type):
        return issubclass(value, kinds) and value.__module__ == module
    return isinstance(value, kinds)


def _broken(what: str, error: Exception) -> click.ClickException:
    """One line, below the traceback of the author's code, if it comes from there."""
    where = error.__traceback__
    while where is not None and where.tb_frame.f_globals.get("__name__", "") in (__name__, "importlib"):
        where = where.tb_next
    while where is not None and where.tb_frame.f_code.co_filename.startswith("<frozen importlib"):
        where = where.tb_next
    if where is not None or isinstance(error, SyntaxError):
        click.echo("".join(traceback.format_exception(type(error), error, where)), err=True, nl=False)
    return click.ClickException(f"{what}: {type(error).__name__}: {error}")
