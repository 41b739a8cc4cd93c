"""`netplugin doctor`: prints what this host lacks for network plugins, and the commands that fix it."""

from __future__ import annotations

import json

import click
import msgspec

from netplugin_sdk.cli.common import json_option
from netplugin_sdk.cli.findings import Level, examine

_MARKS = {
    Level.OK: ("✓", "green"),
    Level.WARNING: ("!", "yellow"),
    Level.PROBLEM: ("✗", "red"),
    Level.UNKNOWN: ("?", "bright_black"),
}


@click.command(short_help="Say what this host lacks, and what fixes it.")
@json_option
def doctor(*, as_json: bool) -> None:
    """Look at what network plugins need of this host: kernel, sysctls, firewall, Docker, folders, state.

    What the kernel can do is tried in a network namespace that vanishes again: it may load modules of its own, and
    nothing else of the host is changed. Without root some of it cannot be looked at, and says so.

    Exit status: 0 if nothing is in the way of plugins, warnings or not; 1 if there is a problem.
    """
    found = []
    topic = None
    for finding in examine():
        found.append(finding)
        if as_json:
            continue
        if finding.topic != topic:
            click.secho(f"{'' if topic is None else chr(10)}{finding.topic}", bold=True)
            topic = finding.topic
        mark, colour = _MARKS[finding.level]
        click.echo(f"  {click.style(mark, fg=colour)} {finding.text}")
        if finding.fix:
            click.echo(f"      {click.style('→', fg=colour)} {finding.fix}")
    problems = sum(finding.level is Level.PROBLEM for finding in found)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(found), indent=2))
    else:
        warnings = sum(finding.level is Level.WARNING for finding in found)
        unseen = sum(finding.level is Level.UNKNOWN for finding in found)
        click.echo(
            f"\n{problems} problem{'' if problems == 1 else 's'}, {warnings} warning{'' if warnings == 1 else 's'}"
            + (f", {unseen} not seen" if unseen else "")
        )
    raise SystemExit(1 if problems else 0)
