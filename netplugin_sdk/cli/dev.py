"""`netplugin dev`: as `serve`, and with the code that was saved last. The engine never finds the socket closed."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys
import time
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import click

from netplugin_sdk.cli.serve import ENVIRONMENT, Settings, no_module, plugin_options
from netplugin_sdk.serving.http import Limits
from netplugin_sdk.serving.sockets import PLUGIN_FOLDER, tcp_socket, unix_socket

_LOOK_EVERY = 0.2  # seconds from one look at the files to the next
_END_TIMEOUT = Limits().drain_time + 5  # seconds for the old process to end
_SETTLED = 0.05  # seconds without a change, after which somebody has saved all of it
_FIRST_FD = 3  # sd_listen_fds(3)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_Saved = dict[str, tuple[int, int]]
"""Files with their times and sizes, which change when one is saved."""


class _Forwarding(click.Command):
    """Keeps its arguments as they were given, for the process that `serve` runs in."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[__name__] = tuple(args)
        return super().parse_args(ctx, args)


@click.command(
    cls=_Forwarding, short_help="Serve a driver, again whenever its code is saved.", context_settings=ENVIRONMENT
)
@plugin_options
@click.pass_context
def dev(ctx: click.Context, /, **given: Any) -> None:
    """Serve drivers as `serve` does, with the same options, and again whenever a Python file of theirs is saved.

    The socket stays open meanwhile, so that the engine does not notice: calls that run are answered by the old code,
    the next ones wait for the new. While that cannot be started they go on waiting; save again, and it is tried again.
    What is remembered of networks and endpoints stays.
    """
    settings = Settings.of(given)
    roots = _roots(settings.drivers)
    with _listening(settings) as listener:
        where = listener.getsockname()
        _say(f"{settings.serve['name']} listens at {where if isinstance(where, str) else '{}:{}'.format(*where)}")
        _say(f"it starts again when a Python file is saved in {' or '.join(map(str, roots))}")
        # -B, since byte code is taken for that of a file of the same size that was saved in the same second.
        serve = [sys.executable, "-B", "-m", "netplugin_sdk.cli", "serve"]
        _Reloader([*serve, *ctx.meta[__name__]], listener, roots).run()


def _listening(settings: Settings) -> AbstractContextManager[socket.socket]:
    given = settings.serve
    if given["tcp"] is not None:
        return tcp_socket(*given["tcp"], name=given["name"], tls=given["tls"], plain=given["plain_tcp"])
    path = given["socket_path"] or PLUGIN_FOLDER / f"{given['name']}.sock"
    return unix_socket(path, mode=given["socket_mode"], owner=given["socket_owner"], group=given["socket_group"])


def _say(text: str, colour: str = "cyan") -> None:
    click.secho(text, fg=colour, err=True)


# ------------------------------------------------------------------------------------------------------- what is saved


def _roots(drivers: tuple[str, ...]) -> list[Path]:
    """Where the drivers' code is: the current folder, or the folder of an installed package, or an installed module."""
    here = Path.cwd()
    sys.path.insert(0, str(here))
    roots = []
    for driver in drivers:
        name = driver.partition(":")[0].partition(".")[0]
        spec = find_spec(name)
        if spec is None:
            raise no_module(name)
        folders: list[str] = spec.submodule_search_locations or [spec.origin or ""]
        places = list(map(Path, folders))
        ours = [place.is_relative_to(here) and "site-packages" not in place.parts for place in places]
        roots += [here if our else place for our, place in zip(ours, places, strict=True)]
    return list(dict.fromkeys(roots))


def _look(roots: list[Path]) -> _Saved:
    """All Python files below, but not those of virtual environments and hidden folders."""
    saved: _Saved = {}
    for root in roots:
        for folder, inner, names in os.walk(root):
            if "pyvenv.cfg" in names:
                inner.clear()
                continue
            inner[:] = [name for name in inner if not name.startswith((".", "__pycache__", "node_modules"))]
            for name in names:
                if name.endswith(".py") and not name.startswith("."):
                    _note(saved, f"{folder}/{name}")
        if root.is_file():
            _note(saved, str(root))
    return saved


def _note(saved: _Saved, path: str) -> None:
    try:
        found = os.stat(path)  # noqa: PTH116  # thousands of them
    except OSError:
        return  # a moment ago it was there
    saved[path] = found.st_mtime_ns, found.st_size


def _settle(roots: list[Path]) -> _Saved:
    """The files once no editor is saving: editors write a file in steps, and several at a time."""
    saved = _look(roots)
    for _ in range(20):  # somebody may write one all the time
        time.sleep(_SETTLED)
        before, saved = saved, _look(roots)
        if saved == before:
            break
    return saved


# ---------------------------------------------------------------------------------------------------------- processes


class _Child:
    """A process of `command` that has the listening socket by systemd's protocol (sd_listen_fds(3))."""

    def __init__(self, command: list[str], listener: socket.socket) -> None:
        prctl = ctypes.CDLL(None).prctl
        self._pid = os.fork()  # there is one thread
        if self._pid == 0:
            try:
                prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
                # Ctrl-C is for all processes of the terminal; while it imports, this one waits for its parent's word.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                os.dup2(listener.fileno(), _FIRST_FD)
                os.set_inheritable(_FIRST_FD, True)
                os.execve(command[0], command, {**os.environ, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"})
            finally:
                os._exit(127)
        self._ended = select.poll()
        self._fd = os.pidfd_open(self._pid)
        self._ended.register(self._fd, select.POLLIN)

    def ends(self, within: float) -> bool:
        """Whether it has ended, `within` so many seconds."""
        return bool(self._ended.poll(within * 1000))

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it has not ended."""
        signal.pidfd_send_signal(self._fd, number)

    def close(self) -> int:
        """When it has ended: its exit status, or the signal that it died of, as a negative number."""
        _, status = os.waitpid(self._pid, 0)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(status)


class _Reloader:
    """One process of `command` after the other, each with the listening socket, until a signal ends it."""

    def __init__(self, command: list[str], listener: socket.socket, roots: list[Path]) -> None:
        self._command, self._listener, self._roots = command, listener, roots
        self._signals = 0  # that asked for the end
        self._pause = _LOOK_EVERY

    def run(self) -> None:
        """Until SIGINT, SIGTERM or SIGHUP."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._end)
        while not self._signals:
            saved = _settle(self._roots)
            child = _Child(self._command, self._listener)
            while not self._signals and not child.ends(self._pause):
                if self._is_saved_since(saved):
                    break
            ended = child.ends(0)
            self._stop(child)
            status = child.close()
            if ended and not self._signals:
                _say(f"it ended, with status {status}: calls wait until a file is saved and it can be started", "red")
            while ended and not self._signals and not self._is_saved_since(saved):
                time.sleep(self._pause)

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1

    def _is_saved_since(self, saved: _Saved) -> bool:
        began = time.monotonic()
        found = _look(self._roots)
        self._pause = max(
            _LOOK_EVERY, 10 * (time.monotonic() - began)
        )  # a tenth of a processor, in however large a folder
        if changed := sorted({path for path, _ in found.items() ^ saved.items()}):
            more = f" and {len(changed) - 1} more" if changed[1:] else ""
            _say(f"{os.path.relpath(changed[0])}{more} changed: starting again")
        return bool(changed)

    def _stop(self, child: _Child) -> None:
        child.send(signal.SIGTERM)
        signals, until = self._signals, time.monotonic() + _END_TIMEOUT
        while not child.ends(_LOOK_EVERY):
            if self._signals > max(signals, 1) or time.monotonic() > until:
                _say("it does not end: killing it", "red")
                child.send(signal.SIGKILL)
