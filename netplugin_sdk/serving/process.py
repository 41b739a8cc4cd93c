"""A plugin as a process: `serve` and `run`, signals, and the name that it has for Docker."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from netplugin_sdk.core.engine_api import SOCKET
from netplugin_sdk.core.plugin import Plugin
from netplugin_sdk.core.timings import Timings
from netplugin_sdk.driver import IpamDriver, NetworkDriver
from netplugin_sdk.errors import DriverError, InvalidDriver, Unavailable
from netplugin_sdk.serving import logs, systemd
from netplugin_sdk.serving.http import Limits
from netplugin_sdk.serving.loop import Server
from netplugin_sdk.serving.settings import STATE_FOLDER, check_name, parse_command_line
from netplugin_sdk.serving.sockets import PLUGIN_FOLDER, TLSFiles
from netplugin_sdk.serving.tracing import trace_calls

_log = logging.getLogger("netplugin_sdk")


def serve(
    *drivers: NetworkDriver[Any] | IpamDriver,
    name: str,
    socket_path: Path | str | None = None,
    socket_mode: int = 0o600,
    socket_owner: int | str | None = None,
    socket_group: int | str | None = None,
    tcp: tuple[str, int] | None = None,
    tls: TLSFiles | None = None,
    plain_tcp: bool = False,
    state: Path | str | None = None,
    docker: Path | str | None = SOCKET,
    limits: Limits | None = None,
    timings: Timings | None = None,
    metrics: tuple[str, int] | None = None,
    log_format: Literal["text", "json"] = "text",
    log_level: str = "INFO",
) -> None:
    """Serve drivers to the Docker Engine of this host until SIGTERM or SIGINT: all of a plugin's ``main``.

    It listens on the sockets that systemd hands over, else on `tcp` if that is given, else on a unix socket. It tells
    systemd when it is ready, that it lives and when it stops (sd_notify(3)), and logs one line per call to standard
    error. SIGHUP makes it compare what is on disk with the kernel and with Docker (`Plugin.reconcile`). Where the
    process has an OpenTelemetry tracer provider by now, each call is a span (`netplugin_sdk.serving.tracing`).

    Args:
        *drivers: a `NetworkDriver`, an `IpamDriver`, or one of each.
        name: the plugin's name, as in ``docker network create --driver NAME``.
        socket_path: the unix socket, else ``/run/docker/plugins/NAME.sock``.
        socket_mode: its permission bits.
        socket_owner: its owner, by name or id.
        socket_group: its group, by name or id.
        tcp: address and port to listen on instead; engines find it by a file in ``/etc/docker/plugins``.
        tls: files for TLS with client certificates on `tcp`, or on a TCP socket of systemd's.
        plain_tcp: insist on TCP without `tls` beyond the loopback addresses.
        state: the folder of what is remembered, else ``/var/lib/netplugin/NAME``.
        docker: the engine's own socket, to ask it in the background what it has; None asks nobody.
        limits: sizes and times of one client.
        timings: how long the SDK waits.
        metrics: address and port where Prometheus finds ``/metrics`` (`netplugin_sdk.serving.metrics`); it needs the
            extra ``netplugin-sdk[metrics]``, and anyone who can connect may read.
        log_format: ``text``, or ``json`` for one object per line.
        log_level: of the standard library's `logging`; DEBUG shows each connection.

    Raises:
        ValueError: `name` cannot be a plugin's name, or Docker keeps it for itself.
        Conflict, Unavailable: it cannot start; the text says why.
    """
    check_name(name)
    logs.configure(log_format, log_level)
    with (
        Plugin(
            *drivers, state=STATE_FOLDER / name if state is None else state, docker=docker, timings=timings
        ) as plugin,
        Server(plugin, limits) as server,
        _signals(server),  # before anybody can see that it listens
        nullcontext() if metrics is None else _exporting(plugin, name, metrics),
    ):
        trace_calls(plugin)
        if server.listen_systemd(tls=tls, plain=plain_tcp):
            where = "the sockets that it was given"
        elif tcp is not None:
            port = server.listen_tcp(*tcp, name=name, tls=tls, plain=plain_tcp)
            where = f"{tcp[0]} port {port}"
        else:
            path = PLUGIN_FOLDER / f"{name}.sock" if socket_path is None else Path(socket_path)
            server.listen_unix(path, mode=socket_mode, owner=socket_owner, group=socket_group)
            where = str(path)
        systemd.notify("READY=1")
        _log.info("%s serves %s on %s", name, " and ".join(type(driver).__name__ for driver in drivers), where)
        server.run()
    _log.info("%s stopped", name)


def run(
    *drivers: Callable[[], NetworkDriver[Any] | IpamDriver], name: str, program: str | None = None, description: str
) -> None:
    """The command line of a plugin: an option for each keyword of `serve`, and ``--help``; then `serve`.

    A failure to start is one line on standard error, and exit status 1; a wrong argument is status 2. Each
    option can be an environment variable, too: ``NETPLUGIN_LOG_LEVEL``.

    Args:
        *drivers: a class, or a function without arguments, for each driver that `serve` shall have.
        name: the plugin's name, unless the command line gives another.
        program: the name of the command; None takes `name`.
        description: of the driver, for ``--help``: a sentence.
    """
    program = program or name
    settings = parse_command_line(None, os.environ, name=name, program=program, description=description)
    with ending_despite_threads():
        try:
            serve(*(make() for make in drivers), **settings)
        except (DriverError, ValueError, TypeError) as error:
            if isinstance(error, TypeError) and not isinstance(error, InvalidDriver):
                raise
            sys.stderr.write(f"{program}: {error}\n")
            raise SystemExit(1) from None


@contextmanager
def ending_despite_threads() -> Iterator[None]:
    """End the process when the block ends, although threads go on that were started in it.

    For the last thing that a program does. Such threads, which a driver has left, get a second; the log names them.
    """
    before = set(threading.enumerate())
    raised: BaseException | None = None
    try:
        yield
    except BaseException as error:
        raised = error
    if left := _threads_left(before):
        _log.error("the driver has left threads that do not end: %s", ", ".join(thread.name for thread in left))
        status = _status(raised)
        atexit._run_exitfuncs()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if raised is not None:
        raise raised


def _status(raised: BaseException | None) -> int:
    """The status that Python would exit with; its message is printed."""
    if raised is None or (isinstance(raised, SystemExit) and raised.code is None):
        return 0
    if isinstance(raised, SystemExit) and isinstance(raised.code, int):
        return raised.code
    if isinstance(raised, SystemExit):
        sys.stderr.write(f"{raised.code}\n")
    else:
        traceback.print_exception(raised)
    return 1


def _threads_left(before: set[threading.Thread]) -> list[threading.Thread]:
    """Threads that were started since, and that Python would wait for."""
    until = time.monotonic() + 1.0
    left = [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]
    for thread in left:
        thread.join(max(0.0, until - time.monotonic()))
    return [thread for thread in left if thread.is_alive()]


def _exporting(plugin: Plugin, name: str, address: tuple[str, int]) -> AbstractContextManager[None]:
    try:
        from netplugin_sdk.serving.metrics import exporting  # noqa: PLC0415  # 60 ms that only metrics need
    except ModuleNotFoundError as error:
        raise Unavailable(f"metrics need the package {error.name}: pip install 'netplugin-sdk[metrics]'") from error
    return exporting(plugin, name, *address)


@contextmanager
def _signals(server: Server) -> Iterator[None]:
    def stop(*_: object) -> None:
        systemd.notify("STOPPING=1")
        server.stop()

    def reconcile(*_: object) -> None:
        server.plugin.reconcile()

    handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: reconcile}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
