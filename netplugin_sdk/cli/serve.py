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
from typing import Any, TypeVar

import click

import netplugin_sdk
from netplugin_sdk import InvalidDriver, IpamDriver, NetworkDriver
from netplugin_sdk.errors import DriverError
from netplugin_sdk.serving.process import ending_despite_threads
from netplugin_sdk.serving.settings import SETTINGS, Setting, check_name, keywords, parsed

_F = TypeVar("_F", bound=Callable[..., Any])

CONFIG = Path("netplugin.toml")
"""Read from the current folder, if it is there."""


class _Value(click.ParamType[Any]):
    """The value of a setting; an invalid one is a usage error."""

    def __init__(self, setting: Setting) -> None:
        self.name = setting.metavar
        self._setting = setting

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return parsed(self._setting, value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@dataclass(frozen=True)
class Settings:
    """The settings, wherever they were given."""

    drivers: tuple[str, ...]
    """``MODULE:DRIVER``."""
    serve: Mapping[str, Any]
    """The keywords of `netplugin_sdk.serve`."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """From the values of `plugin_options`; a contradiction is a usage error."""
        values = dict(given)
        drivers = values.pop("drivers")
        if not drivers:
            raise click.UsageError("Missing argument 'MODULE:DRIVER'.")
        for driver in drivers:
            module, _, name = driver.partition(":")
            if not module or not name:
                raise click.UsageError(f"{driver!r} is not MODULE:DRIVER, as in l2:L2.")
            if module.endswith(".py"):
                raise click.UsageError(f"{driver!r}: a module is named without its .py.")
        values["name"] = values["name"] or drivers[0].partition(":")[0].partition(".")[0]
        try:
            check_name(values["name"])
        except ValueError as error:
            raise click.UsageError(f"{error}; --name gives another.") from None
        try:
            return cls(drivers, keywords(values))
        except ValueError as error:
            raise click.UsageError(f"{error}.") from None


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


def _option(setting: Setting) -> Callable[[_F], _F]:
    if setting.is_flag:
        return click.option(f"--{setting.option}", is_flag=True, help=setting.help)
    help_ = setting.help + ("  [default: the module's]" if setting.option == "name" else "")
    type_: Any = click.Choice(setting.choices, case_sensitive=False) if setting.choices else _Value(setting)
    return click.option(
        f"--{setting.option}",
        type=type_,
        default=setting.default,
        show_default=setting.default is not None,
        metavar=None if setting.choices else setting.metavar,
        help=help_,
    )


def plugin_options(command: _F) -> _F:
    """The arguments and options of a command that serves drivers; `Settings.of` takes their values."""
    options = [
        click.argument("drivers", nargs=-1, metavar="MODULE:DRIVER [MODULE:IPAM]", envvar="NETPLUGIN_DRIVERS"),
        *map(_option, SETTINGS),
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
    with ending_despite_threads():
        try:
            netplugin_sdk.serve(*load_all(settings.drivers), **settings.serve)
        except InvalidDriver as error:
            raise click.ClickException(str(error)) from None


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
            raise no_module(error.name or module_name) from None
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
        except InvalidDriver as error:
            raise click.ClickException(str(error)) from None
        except Exception as error:
            raise _broken(f"cannot make {target}", error) from error
    if not isinstance(found, NetworkDriver | IpamDriver):
        raise click.ClickException(f"{target} is not a driver, but {found!r}")
    return found


def no_module(name: str) -> click.ClickException:
    """The line for a module that is not there."""
    return click.ClickException(f"there is no module {name} in this folder, and none is installed")


def _is_own_driver(value: object, module: str) -> bool:
    kinds = NetworkDriver, IpamDriver
    if isinstance(value, type):
        return issubclass(value, kinds) and value.__module__ == module
    return isinstance(value, kinds)


def _broken(what: str, error: Exception) -> click.ClickException:
    """One line, below the traceback of the author's code, if it comes from there."""
    where = error.__traceback__
    while where is not None and where.tb_frame.f_globals.get("__name__", "") in (
        __name__,
        "importlib",
        "netplugin_sdk.driver",
    ):
        where = where.tb_next
    while where is not None and where.tb_frame.f_code.co_filename.startswith("<frozen importlib"):
        where = where.tb_next
    if where is not None or isinstance(error, SyntaxError):
        click.echo("".join(traceback.format_exception(type(error), error, where)), err=True, nl=False)
    return click.ClickException(f"{what}: {type(error).__name__}: {error}")
