"""`netplugin inspect` and `netplugin repair`: state, kernel and Docker side by side, and made to agree."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from netplugin_sdk.cli.common import complete_name, json_option
from netplugin_sdk.errors import Unavailable
from netplugin_sdk.inspection.looking import take
from netplugin_sdk.inspection.model import UNKNOWN_TO_DOCKER, Fact, Snapshot
from netplugin_sdk.serving.settings import STATE_FOLDER

_F = TypeVar("_F", bound=Callable[..., Any])

_COLUMNS = ("state", "kernel", "docker")
_UNITS = tuple(map(Path, ("/etc/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system")))
_FULL = 12  # networks and endpoints, of which each fact is shown
_WAIT, _SETTLED = 45.0, 8.0  # seconds: a plugin removes what Docker has not known for 30; all else is done sooner


def inspected(command: _F) -> _F:
    """The argument `plugin`, a name, and the option ``--state``."""
    command = click.option(
        "--state",
        "folder",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help=f"The plugin's state folder, else {STATE_FOLDER}/NAME.",
    )(command)
    return click.argument("plugin", metavar="NAME", shell_complete=complete_name)(command)


def state_folder(plugin: str, folder: Path | None) -> Path:
    """Where a plugin of this name has its state."""
    return folder or STATE_FOLDER / plugin.removesuffix(":latest").rpartition("/")[2]


# ---------------------------------------------------------------------------------------------------------- inspect


@click.command(short_help="State, kernel and Docker of a plugin, side by side.")
@inspected
@click.option("-a", "--all", "everything", is_flag=True, help=f"Show each fact even of more than {_FULL} objects.")
@json_option
def inspect(*, plugin: str, folder: Path | None, everything: bool, as_json: bool) -> None:
    """Show networks and endpoints of a plugin as its state on disk, the kernel and Docker have them.

    NAME is the plugin's name for docker. Nothing is changed, and the plugin may run meanwhile or not. Differences
    are marked with ≠. Of many networks and endpoints, those that agree are shown with one line each.

    Works with fewer columns where there is no state folder (a plugin that was not made with this SDK), no Docker,
    or no root: without root, neither the state nor containers can be looked into. Run it on the plugin's host.

    Exit status: 0 if all agree, 1 if something differs.
    """
    snapshot = take(plugin, state_folder(plugin, folder))
    if as_json:
        click.echo(json.dumps(as_builtins(snapshot), indent=2))
    else:
        for line in report(snapshot, everything):
            click.echo(line)
    raise SystemExit(1 if snapshot.differences else 0)


def as_builtins(snapshot: Snapshot) -> Any:
    """For JSON: fields as in `Snapshot`, addresses as text."""
    return msgspec.to_builtins(snapshot, enc_hook=str, str_keys=True)


def report(snapshot: Snapshot, everything: bool) -> Iterator[str]:
    """The lines of text."""
    running = {True: "is served", False: "is served by nobody", None: "may be served"}[snapshot.served]
    by = f" by pid {snapshot.pid}" if snapshot.pid else ""
    yield click.style(f"{snapshot.plugin} {running}{by}", bold=True)
    for source, text in snapshot.sources.items():
        yield f"  {source.capitalize():<7} {text}"
    number = sum(1 + len(network.endpoints) for network in snapshot.networks)
    full = everything or number <= _FULL
    blocks = []
    for network in snapshot.networks:
        title = f"{network.name} {network.id[:12]} {', '.join(network.subnets)}".rstrip()
        blocks.append((0, title + (" internal" if network.internal else ""), network.facts))
        for endpoint in network.endpoints:
            at = ", ".join(str(address.ip) for address in endpoint.addresses)
            blocks.append((2, f"{endpoint.name} {endpoint.id[:12]} {at}".rstrip(), endpoint.facts))
    shown = [
        (indent, title, [fact for fact in facts if full or fact.wrong], any(fact.wrong for fact in facts))
        for indent, title, facts in blocks
    ]
    table = _Table([fact for _, _, facts, _ in shown for fact in facts])
    if any(facts for _, _, facts, _ in shown):
        yield from table.head()
    for indent, title, facts, differs in shown:
        if indent == 0 and full:
            yield ""
        mark = click.style("≠", fg="red") if differs else " "
        yield f"{mark} {' ' * indent}{click.style(title, bold=indent == 0)}"
        yield from (line for fact in facts for line in table.lines(fact))
    yield ""
    yield verdict(snapshot)
    yield from _differences(snapshot)


def _differences(snapshot: Snapshot) -> Iterator[str]:
    for difference in snapshot.differences:
        yield f"  {click.style('≠', fg='red')} {difference}"


def verdict(snapshot: Snapshot) -> str:
    """One line that sums it up."""
    differs = bool(snapshot.differences)
    return click.style(snapshot.summary, fg="red" if differs else "green", bold=differs)


class _Table:
    """Facts in columns; one below the other where the terminal is too narrow for that."""

    _INDENT = 6

    def __init__(self, facts: Sequence[Fact]) -> None:
        self._columns = [column for column in _COLUMNS if any(getattr(fact, column) is not None for fact in facts)]
        self._label = max([len(fact.name) for fact in facts], default=0) + 2
        self._widths = {
            column: max([len(column), *(len(getattr(fact, column) or "") for fact in facts)]) + 2
            for column in self._columns
        }
        width = self._INDENT + self._label + sum(self._widths.values())
        self._wide = not sys.stdout.isatty() or width <= shutil.get_terminal_size().columns

    def head(self) -> Iterator[str]:
        if self._wide:
            names = "".join(f"{column.capitalize():<{self._widths[column]}}" for column in self._columns)
            yield click.style(" " * (self._INDENT + self._label) + names.rstrip(), dim=True)

    def lines(self, fact: Fact) -> Iterator[str]:
        said = {column: getattr(fact, column) for column in self._columns}
        mark = click.style("≠", fg="red") if fact.wrong else " "
        begin = f"{mark}{' ' * (self._INDENT - 1)}{fact.name:<{self._label}}"
        if self._wide:
            cells = "".join(f"{text or '':<{self._widths[column]}}" for column, text in said.items())
            yield f"{begin}{cells}".rstrip()
            return
        different = {text for text in said.values() if text is not None}
        if len(different) == 1 and not fact.wrong:
            yield f"{begin}{different.pop()}"
            return
        for column, text in said.items():
            if text is not None:
                yield f"{begin}{column.capitalize()}: {text}"
                begin = " " * (self._INDENT + self._label)


# ----------------------------------------------------------------------------------------------------------- repair


@click.command(short_help="Have a plugin repair what differs.")
@inspected
@click.option("--wait", default=_WAIT, show_default=True, metavar="SECONDS", help="How long to wait at most.")
@json_option
def repair(*, plugin: str, folder: Path | None, wait: float, as_json: bool) -> None:
    """Have a running plugin compare its state with the kernel and Docker, and repair what differs.

    It gets SIGHUP: half-done operations are finished or undone, and missing parts in the kernel are made again.
    Networks and endpoints that Docker has not known for half a minute are removed, so repair may take longer. Needs
    root.

    Exit status: 0 if all agree afterwards, 1 if something is left.
    """
    where = state_folder(plugin, folder)
    before = take(plugin, where)
    pid = _process(before, where)
    if not as_json:
        click.echo(f"before: {verdict(before)}")
        for line in _differences(before):
            click.echo(line)
        click.echo(f"pid {pid} is told to repair it …")
    _tell(pid)
    after = _wait(plugin, where, wait)
    if as_json:
        texts = {"before": before, "after": after}
        click.echo(json.dumps({when: list(map(str, each.differences)) for when, each in texts.items()}, indent=2))
    else:
        click.echo(f"after:  {verdict(after)}")
        for line in _differences(after):
            click.echo(line)
        for command in _left(after):
            click.echo(f"  → {command}")
    raise SystemExit(1 if after.differences else 0)


def _wait(plugin: str, folder: Path, wait: float) -> Snapshot:
    """Until all agree; or for as long as the plugin may still do something about what is left."""
    began = time.monotonic()
    while True:
        time.sleep(0.3)
        after = take(plugin, folder)
        waits = any(UNKNOWN_TO_DOCKER in difference.text for difference in after.differences)
        until = wait if waits else min(wait, _SETTLED)
        if not after.differences or time.monotonic() - began > until:
            return after


def _left(snapshot: Snapshot) -> Iterator[str]:
    """The user's remedy where a plugin has none: the engine makes a container's interfaces when it starts."""
    containers = [
        endpoint.name
        for network in snapshot.networks
        for endpoint in network.endpoints
        if endpoint.joined and any(fact.wrong for fact in endpoint.facts if fact.name in ("known", "inside"))
    ]
    if containers:
        yield f"docker restart {shlex.join(dict.fromkeys(containers))}"
    for network in snapshot.networks:
        if any(fact.wrong and fact.state == "unknown" for fact in network.facts):
            yield f"docker network rm {shlex.quote(network.name)}, and create it again"


def _process(snapshot: Snapshot, folder: Path) -> int:
    plugin, pid = snapshot.plugin, snapshot.pid
    if pid is None and snapshot.served is False:
        units = [folder / f"{plugin}.service" for folder in _UNITS]
        start = f"systemctl start {plugin}" if any(unit.exists() for unit in units) else f"run {plugin} as root"
        raise Unavailable(
            f"nobody serves {plugin}, and it is the plugin that repairs what differs, also when it starts: {start}"
        )
    if pid is None:
        # Not the listener at its socket: that may be systemd, a trace or a Go program, and SIGHUP ends those.
        known = f"not with the state folder {folder}: name another one with --state"
        unknown = "only root sees by which process"
        raise Unavailable(f"{plugin} is served, but {known if os.geteuid() == 0 else unknown}")
    if not _hears(pid):
        raise Unavailable(f"the process {pid} that serves {plugin} does not take SIGHUP: it was not made with this SDK")
    return pid


def _hears(pid: int) -> bool:
    """Whether the process handles SIGHUP, which ends one that does not (proc(5), SigCgt)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (signal.SIGHUP - 1) & 1)


def _tell(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGHUP)
    except OSError as error:
        raise Unavailable(f"cannot signal the process {pid}: {error.strerror}") from error
