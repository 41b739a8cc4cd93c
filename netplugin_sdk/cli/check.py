"""`netplugin check`: check a plugin, in any language, against Docker's contract."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from netplugin_sdk.cli.common import json_option, plugin_argument
from netplugin_sdk.cnm.remote import Address, Patience, RemotePlugin
from netplugin_sdk.errors import DriverError
from netplugin_sdk.testing.conformance import CHECKS, Check, Group, Outcome, Report, Result, Subject, run
from netplugin_sdk.testing.conformance.report import line

_REPORTS: dict[str, Callable[[Report], str]] = {".txt": Report.text, ".xml": Report.junit, ".html": Report.html}
_COLOURS = {Outcome.PASSED: "green", Outcome.FAILED: "red", Outcome.SKIPPED: "bright_black"}
_START_TIME = 20.0


def _list(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        for check in CHECKS.values():
            click.echo(f"{click.style(check.id, bold=True)} ({check.group}): {check.proves}")
        ctx.exit()


@click.command(short_help="Check a plugin against Docker's contract.")
@plugin_argument
@click.option("-o", "--opt", "options", multiple=True, metavar="NAME=VALUE", help="Driver option of each network.")
@click.option(
    "--subnets",
    default="10.213.0.0/16",
    show_default=True,
    metavar="NETWORK|none",
    help="The networks of the checks are /24s of this one; 'none' for a driver that wants --ipam-driver null.",
)
@click.option("--restart", metavar="COMMAND", help="Kills the plugin with SIGKILL and starts it again.")
@click.option("--no-data-plane", is_flag=True, help="Make no sandboxes: the plugin's links are on another host.")
@click.option("--only", multiple=True, metavar="CHECK|GROUP", help="Make only these; may be repeated.")
@click.option(
    "--report",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    multiple=True,
    help="Write a report too: .xml is JUnit's, .html a page, .txt text. May be repeated.",
)
@json_option
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_list, help="List all checks.")
def check(
    *,
    plugin: Address,
    options: tuple[str, ...],
    subnets: str,
    restart: str | None,
    no_data_plane: bool,
    only: tuple[str, ...],
    report: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Check a running plugin, in any language, against Docker's contract.

    PLUGIN is its name, the path of its socket, or a URL. The checks make networks and endpoints of their own and
    remove them; the plugin may go on serving an engine meanwhile. With root, and on the plugin's host, they also
    join real sandboxes and send packets.

    Exit status: 0 if the plugin keeps to the contract, 1 if not.
    """
    chosen = _chosen(only)
    for path in report:
        if path.suffix not in _REPORTS:
            raise click.BadParameter(f"{path.name} does not end with {', '.join(_REPORTS)}", param_hint="--report")
    subject = Subject(
        plugin.url,
        plugin.tls,
        options=_pairs(options),
        subnets=_subnets(subnets),
        restart=None if restart is None else lambda: _restart(restart, plugin),
        data_plane=os.geteuid() == 0 and not no_data_plane,
    )
    _activate(plugin)
    if as_json:
        made = run(subject, chosen)
        click.echo(json.dumps(_as_json(made), indent=2))
    else:
        with click.progressbar(length=len(chosen), label=plugin.name, hidden=not _is_terminal()) as bar:

            def told(result: Result) -> None:
                if _is_terminal():
                    click.echo("\r\033[K", nl=False)  # the bar is drawn again below
                click.secho(line(result), fg=_COLOURS[result.outcome])
                bar.update(1)

            made = run(subject, chosen, on_result=told)
        click.echo(f"\n{made.text()}" if made.failed else f"\n{made.summary}")
    for path in report:
        path.write_text(_REPORTS[path.suffix](made))
    raise SystemExit(1 if made.failed else 0)


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _chosen(only: Iterable[str]) -> list[Check]:
    names = set(only)
    if unknown := names - set(CHECKS) - set(Group):
        raise click.BadParameter(f"there is no check and no group {', '.join(sorted(unknown))}", param_hint="--only")
    return [check for check in CHECKS.values() if not names or {check.id, check.group} & names]


def _pairs(options: Iterable[str]) -> dict[str, str]:
    """As docker takes them: without a ``=`` the value is empty."""
    return {name: value for name, _, value in (option.partition("=") for option in options)}


def _subnets(text: str) -> tuple[str, ...]:
    if text == "none":
        return ()
    try:
        network = ipaddress.IPv4Network(text)
        return tuple(str(subnet) for _, subnet in zip(range(100), network.subnets(new_prefix=24), strict=False))
    except ValueError as error:
        text = f"{error}; an IPv4 network of /24 or larger is wanted"
        raise click.BadParameter(text, param_hint="--subnets") from None


def _activate(plugin: Address) -> None:
    with RemotePlugin(plugin, timeout=10, patience=Patience(total=0)) as remote:
        remote.activate()


def _restart(command: str, plugin: Address) -> None:
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)
    until = time.monotonic() + _START_TIME
    while True:
        try:
            return _activate(plugin)
        except DriverError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "plugin": report.subject.url,
        "summary": report.summary,
        "checks": [
            {
                "check": result.check.id,
                "group": result.check.group,
                "outcome": result.outcome,
                "message": result.message,
                "seconds": round(result.seconds, 3),
            }
            for result in report.results
        ],
    }
