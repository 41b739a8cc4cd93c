"""`netplugin topology`: a picture of a plugin's networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from netplugin_sdk.cli.inspect import inspected, state_folder
from netplugin_sdk.inspection import drawing
from netplugin_sdk.inspection.looking import take
from netplugin_sdk.inspection.model import Snapshot

_FORMATS: dict[str, Callable[[Snapshot], str]] = {
    "svg": drawing.svg,
    "mermaid": drawing.mermaid,
    "html": drawing.html,
}
_SUFFIXES = {".svg": "svg", ".mmd": "mermaid", ".mermaid": "mermaid", ".html": "html"}


@click.command(short_help="Draw a plugin's networks, bridges, containers and ports.")
@inspected
@click.option("--format", "form", type=click.Choice(list(_FORMATS)), help="Else by the file's suffix, or svg.")
@click.option(
    "-o",
    "--output",
    default="-",
    type=click.Path(dir_okay=False, writable=True, allow_dash=True, path_type=Path),
    metavar="FILE",
    help="Where to write it; standard output if not given.",
)
def topology(*, plugin: str, folder: Path | None, form: str | None, output: Path) -> None:
    """Draw what a plugin has: host, networks, bridges, veth pairs, containers, published ports.

    NAME is the plugin's name for docker. It draws what `netplugin inspect` shows, and marks what differs. SVG and
    Mermaid are for documents; HTML is one page that needs no other file and tells more of what is pointed at.
    """
    picture = _FORMATS[form or _SUFFIXES.get(output.suffix, "svg")](take(plugin, state_folder(plugin, folder)))
    with click.open_file(str(output), "w", encoding="utf-8", atomic=str(output) != "-") as file:
        file.write(picture)
