"""Helpers that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from netplugin_sdk.cnm import remote

_F = TypeVar("_F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


class PluginAddress(click.ParamType[remote.Address]):
    """Where a plugin listens, as Docker's name of it, the path of its socket, or a URL."""

    name = "plugin"

    def convert(
        self, value: str | remote.Address, param: click.Parameter | None, ctx: click.Context | None
    ) -> remote.Address:
        """A `remote.Address`. A name is looked up in Docker's folders; an unknown one is a usage error."""
        if isinstance(value, remote.Address):
            return value
        if "://" in value:
            return remote.Address(value, value)
        if "/" in value:
            path = Path(value).absolute()
            if not path.is_socket():
                self.fail(f"there is no socket {path}", param, ctx)
            return remote.Address(path.stem, f"unix://{path}")
        try:
            return remote.find(value)
        except remote.PluginNotFound as error:
            names = ", ".join(sorted(set(remote.installed())))
            self.fail(f"{error}; {f'there are {names}' if names else 'there are none'}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that Docker knows, and files."""
        return [*complete_name(ctx, param, incomplete), CompletionItem(incomplete, type="file")]


def complete_name(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The plugins of Docker's folders, for the shell."""
    names = sorted(set(remote.installed()))
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def plugin_argument(command: _F) -> _F:
    """The argument `plugin` of a command: a name, a socket, or a URL."""
    return click.argument("plugin", type=PluginAddress(), metavar="PLUGIN")(command)
