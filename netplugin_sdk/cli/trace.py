"""`netplugin trace` and `netplugin replay`: what an engine and a plugin say to each other, live, kept, and again."""

from __future__ import annotations

import json
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import click

from netplugin_sdk.cli.common import PluginAddress, json_option, plugin_argument
from netplugin_sdk.cnm.remote import Address
from netplugin_sdk.testing import recording
from netplugin_sdk.testing.recording import Entry, Exchange, Mark, differences
from netplugin_sdk.testing.tap import Tap
from netplugin_sdk.testing.tap import restore as restore_socket

_REMEMBERED = 10_000  # requests, to know a repetition
_NAMES = ("NetworkID", "EndpointID")  # they are in the line
_SHORT = 12  # characters of an id, as docker shows it
_NOT_SUPPORTED = 404  # of an optional method: engines pass over it

verbose_option = click.option("-v", "--verbose", is_flag=True, help="Show the JSON of requests and answers.")
diff_option = click.option(
    "--diff", is_flag=True, help="Show what is different from the request of the same method before; -v does so, too."
)


@click.command(short_help="Watch the calls of an engine to a running plugin.")
@plugin_argument
@click.option(
    "--record",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the calls to this file, a JSON object a line; 'netplugin replay' plays them.",
)
@verbose_option
@diff_option
@click.option("--restore", is_flag=True, help="Only repair what killed traces left: let the socket lead to the plugin.")
@json_option
def trace(*, plugin: Address, record: Path | None, verbose: bool, diff: bool, restore: bool, as_json: bool) -> None:
    """Watch the calls of an engine to a running plugin, in any language, until Ctrl-C.

    PLUGIN is its name or the path of its socket; that of a plugin that Docker manages is in
    /run/docker/plugins/ID/. Neither it nor the engine is restarted or cut off, not even if the trace is killed.
    It is run as root, on the host of the engine. A plugin that ends and starts again meanwhile is traced again.

    Each call is a line: when, the method, network and endpoint, milliseconds, and the status or what went wrong.
    """
    path = _socket(plugin)
    if restore:
        click.echo(f"{path} leads to its plugin {'again' if restore_socket(path) else 'already'}")
        return
    view = _Json() if as_json else _View(verbose=verbose, diff=diff or verbose)
    with ExitStack() as closing:
        file = None if record is None else closing.enter_context(_opened(record))
        tap = closing.enter_context(Tap(path))
        closing.enter_context(_ended_by_signals(tap))
        if tap.restored:
            click.secho("An earlier trace was killed and had left the plugin cut off; it is not any more.", err=True)
        for entry in tap:
            if file is not None:
                _write(file, entry)
            view.show(entry)
        view.summarize()


@click.command(short_help="Show recorded calls, or make them again and compare the answers.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--to", "plugin", type=PluginAddress(), metavar="PLUGIN", help="Make the calls to this plugin.")
@click.option(
    "--ignore",
    multiple=True,
    metavar="FIELD",
    help="A field of answers that may differ: Gateway, InterfaceName.SrcName.",
)
@verbose_option
@diff_option
@json_option
def replay(
    *, file: Path, plugin: Address | None, ignore: tuple[str, ...], verbose: bool, diff: bool, as_json: bool
) -> None:
    """Show the calls in FILE, which 'netplugin trace --record' wrote; or make them again.

    With --to PLUGIN, which is a name, the path of a socket, or a URL, each request is sent to it, and its answer
    compared with the recorded one. The ids are those of the record, so the plugin must not have these networks.

    Exit status: 0 if all answers are the same, 1 if not.
    """
    view = _Json() if as_json else _View(verbose=verbose, diff=diff or verbose)
    if plugin is None:
        for entry in recording.read(file):
            view.show(entry)
        view.summarize()
        return
    count = different = 0
    for played in recording.replay(recording.read(file), plugin, ignore=ignore):
        view.show(played.now, played.differences)
        count += 1
        different += bool(played.differences)
    if not as_json:
        click.echo(f"\n{count} calls, {different} answered differently")
    raise SystemExit(1 if different else 0)


def _socket(plugin: Address) -> Path:
    where = urlsplit(plugin.url)
    if where.scheme != "unix":
        raise click.ClickException(
            f"{plugin.name} listens at {plugin.url}: only a plugin on a unix socket can be traced"
        )
    return Path(unquote(where.path))


def _opened(path: Path) -> FileIO:
    try:
        return path.open("wb", buffering=0)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from error


def _write(file: FileIO, entry: Entry) -> None:
    try:
        file.write(f"{recording.to_json(entry)}\n".encode())
    except OSError as error:
        raise click.ClickException(f"cannot write {file.name!s}: {error.strerror}") from error


@contextmanager
def _ended_by_signals(tap: Tap) -> Iterator[None]:
    """The first one ends the trace in order, a second one now."""

    def stop(*_: object) -> None:
        if tap.stopping:
            raise click.Abort
        tap.stop()
        signal.alarm(1)

    def tell(*_: object) -> None:
        with suppress(RuntimeError):  # it has interrupted a write
            click.echo("Calls are under way; Ctrl-C once more leaves them to end unseen.", err=True)

    handlers = {**dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), stop), signal.SIGALRM: tell}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------- the view


class _Json:
    """An object a line, as in a file."""

    def show(self, entry: Entry, answers_differ: list[recording.Difference] | None = None) -> None:
        line = recording.to_json(entry)
        if answers_differ is not None:
            listed = [[each.path, *map(_plain, (each.before, each.after))] for each in answers_differ]
            line = json.dumps(json.loads(line) | {"differences": listed})
        click.echo(line)

    def summarize(self) -> None:
        pass


def _plain(value: Any) -> Any:
    return None if isinstance(value, recording.Missing) else value


class _View:
    """Lines for people."""

    def __init__(self, *, verbose: bool, diff: bool) -> None:
        self._verbose, self._diff = verbose, diff
        self._last: dict[str, Any] = {}
        self._seen: dict[tuple[str, bytes], None] = {}
        self._times: dict[str, list[float | None]] = defaultdict(list)
        self._errors: dict[str, int] = defaultdict(int)

    def show(self, entry: Entry, answers_differ: list[recording.Difference] | None = None) -> None:
        """A call, or what happened; with how its answer differs from the recorded one."""
        if isinstance(entry, Mark):
            click.secho(f"{_clock(entry.time)}  {entry.text}", fg="cyan")
            return
        request = recording.body(entry.request)
        repeated = self._is_repeated(entry)
        self._times[entry.method].append(entry.ms)
        failed = bool(entry.error) and entry.status != _NOT_SUPPORTED
        self._errors[entry.method] += failed
        what = f"{entry.status} {entry.error}".strip() if entry.status else f"no answer: {entry.error}"
        took = "" if entry.ms is None else f"{entry.ms:.2f} ms"
        name = entry.method.removeprefix("NetworkDriver.")
        click.echo(
            f"{_clock(entry.time)}  {click.style(f'{name:<28}', bold=True)}  {_ids(request):<25}  {took:>11}  "
            + click.style(what, fg="red" if failed else None if entry.error else "green")
            + (click.style("  repeated", fg="yellow") if repeated else "")
        )
        if self._verbose:
            _detail("→", request)
            _detail("←", recording.body(entry.answer))
        if self._diff and not repeated:
            for difference in differences(self._last.get(entry.method, request), request, ignore=_NAMES):
                click.secho(f"    ~ {difference}", fg="yellow")
        for difference in answers_differ or ():
            click.secho(f"    ≠ {difference}", fg="red")
        self._last[entry.method] = request

    def summarize(self) -> None:
        """The calls by method."""
        if not self._times:
            click.echo("no calls")
            return
        click.echo(f"\n{'':<41}  {'calls':>6}  {'errors':>6}  {'p50 ms':>9}  {'max ms':>9}")
        for method, times in sorted(self._times.items()):
            known = [ms for ms in times if ms is not None]
            cells = [f"{value:>9.2f}" for value in (statistics.median(known), max(known))] if known else []
            errors = click.style(f"{self._errors[method]:>6}", fg="red" if self._errors[method] else None)
            click.echo("  ".join((f"{method:<41}", f"{len(times):>6}", errors, *cells)))

    def _is_repeated(self, entry: Exchange) -> bool:
        if not entry.request:
            return False
        key = (entry.method, entry.request)
        repeated = self._seen.pop(key, 0) is None
        self._seen[key] = None
        if len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return repeated


def _clock(seconds: float) -> str:
    if not seconds:
        return " " * 12
    return f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{int(seconds * 1000) % 1000:03d}"


def _ids(request: Any) -> str:
    """The subject of a call: network and endpoint, or pool and address."""
    if not isinstance(request, dict):
        return "(empty)" if request is None else "(no JSON object)"
    network, endpoint = (str(request.get(name) or "")[:_SHORT] for name in ("NetworkID", "EndpointID"))
    pool = " ".join(str(request[name]) for name in ("PoolID", "Pool", "Address") if request.get(name))
    return " ".join(filter(None, (network, endpoint))) or pool


def _detail(arrow: str, content: Any) -> None:
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        click.secho(f"    {arrow} {text}", fg="bright_black")
