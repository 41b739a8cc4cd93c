"""The `netplugin` command line: a group of commands, each in a module of its own, which is imported when it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from netplugin_sdk.errors import DriverError

_COMMANDS = {
    "new": "netplugin_sdk.cli.new:new",
    "serve": "netplugin_sdk.cli.serve:serve",
    "dev": "netplugin_sdk.cli.dev:dev",
    "check": "netplugin_sdk.cli.check:check",
    "trace": "netplugin_sdk.cli.trace:trace",
    "replay": "netplugin_sdk.cli.trace:replay",
    "inspect": "netplugin_sdk.cli.inspect:inspect",
    "repair": "netplugin_sdk.cli.inspect:repair",
    "topology": "netplugin_sdk.cli.topology:topology",
    "bundle": "netplugin_sdk.cli.bundle:bundle",
    "doctor": "netplugin_sdk.cli.doctor:doctor",
}
"""Name → where it is. Help lists them in this order."""


class _Lazy(click.Group):
    """Imports a command's module only when it is needed, so that no command pays for another."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[Any, Any, list[str]]:
        """As click does; a name that is wrong by a letter or two gets a hint."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches  # noqa: PLC0415

            if close := get_close_matches(args[0], _COMMANDS, n=1):
                raise click.UsageError(f"{error.message} Did you mean {close[0]!r}?", ctx) from None
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """As click does; an error of the SDK is one line, and exit status 1."""
        try:
            return super().invoke(ctx)
        except DriverError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="netplugin-sdk")
def main() -> None:
    """Make, run, test and look into Docker network plugins.

    Exit status: 0 if all is well, 1 if something is wrong, which the text says, 2 for a wrong command line.
    """
