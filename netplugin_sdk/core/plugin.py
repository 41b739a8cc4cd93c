"""`Plugin`: drivers under one name. Bytes of a request in, bytes of an answer out; also a WSGI application."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from netplugin_sdk.core.calls import Call, has_expired
from netplugin_sdk.core.driver_check import check_driver
from netplugin_sdk.core.engine_api import refuse_inside_calls
from netplugin_sdk.core.lifecycle import Routes
from netplugin_sdk.core.networks import Networks
from netplugin_sdk.core.pools import Pools
from netplugin_sdk.core.repairs import Repair
from netplugin_sdk.core.timings import Timings
from netplugin_sdk.database import Folder
from netplugin_sdk.driver import IpamDriver, NetworkDriver
from netplugin_sdk.errors import DriverError, InvalidRequest
from netplugin_sdk.network import Network
from netplugin_sdk.protocol import messages

if TYPE_CHECKING:
    from types import TracebackType
    from wsgiref.types import StartResponse, WSGIEnvironment

CONTENT_TYPE = "application/vnd.docker.plugins.v1.1+json"
"""Of every answer (moby ``pkg/plugins/transport``)."""

_log = logging.getLogger("netplugin_sdk")
_calls = logging.getLogger("netplugin_sdk.core.calls")


class Answer(NamedTuple):
    """The answer to a call: an HTTP status and a JSON body; and facts of the call for the log.

    `call` has ``method`` and, as far as they are known, ``network``, ``endpoint`` and ``ms``.
    """

    status: int
    body: bytes
    call: dict[str, Any]
    error: str | None = None


Answerer: TypeAlias = Callable[[str, bytes], Answer]
"""Answers one call: path and body as `Plugin.handle` takes them."""


class Plugin:
    """One or two drivers, answering the engine's calls.

    Args:
        *drivers: a `NetworkDriver`, an `IpamDriver`, or one of each; `docker` names both by the plugin's name.
        state: the folder that remembers networks and endpoints; None remembers them in memory only.
        docker: the engine's own socket, to ask it in the background what it has; None asks nobody.
        timings: how long the SDK waits.

    Raises:
        TypeError: there is no driver, two of a kind, or something else.
        InvalidDriver: a driver's class has a mistake, such as a method with a misspelt name.
        Conflict: another process holds the state folder.
        Unavailable: the state folder cannot be used.

    Threads may call it at the same time. It is a WSGI application, so that it runs under any WSGI server and under
    Werkzeug's test client.
    """

    def __init__(
        self,
        *drivers: NetworkDriver[Any] | IpamDriver,
        state: Path | str | None = None,
        docker: Path | str | None = None,
        timings: Timings | None = None,
    ) -> None:
        refuse_inside_calls()
        kinds = {_kind(driver): driver for driver in drivers}
        if not drivers or len(kinds) != len(drivers):
            raise TypeError("a plugin takes a NetworkDriver, an IpamDriver, or one of each")
        defined = {kind: check_driver(driver) for kind, driver in kinds.items()}
        self._folder = None if state is None else Folder(Path(state))
        self._networks: Networks[Any] | None = None
        self._halves: list[Networks[Any] | Pools] = []
        self._routes: Routes = {"/Plugin.Activate": (messages.Nothing, self._activate)}
        self._answer: Answerer = self._answer_call
        self._implements = messages.encode({"Implements": sorted(kinds, reverse=True)})
        folder = None if self._folder is None else self._folder.path
        where = folder, None if docker is None else Path(docker), timings or Timings()
        try:
            for kind, driver in kinds.items():
                half: Networks[Any] | Pools
                if isinstance(driver, NetworkDriver):
                    half = self._networks = Networks(driver, defined[kind], *where)
                else:
                    half = Pools(driver, defined[kind], *where)
                self._halves.append(half)
                half.start()
                self._routes.update({f"/{kind}.{method}": route for method, route in half.routes.items()})
        except BaseException:
            self.close()
            raise

    def handle(self, path: str, body: bytes, call: Call | None = None) -> Answer:
        """Answer one call: `path` is ``/NetworkDriver.Join``, `body` its JSON. Never raises.

        Call `log` afterwards, when the answer is on its way. `call` is passed by a caller that may end the engine's
        wait before.
        """
        with call or Call() as current:
            current.method = path[1:]
            return self._answer(path, body)

    def wrap(self, wrapper: Callable[[Answerer], Answerer]) -> None:
        """Put something around every call from now on, such as a measurement: as middleware is around an application.

        `wrapper` takes the function that answers calls and returns its replacement; neither raises. Both run in the
        thread of the call.
        Not while calls are running.
        """
        self._answer = wrapper(self._answer)

    @property
    def methods(self) -> frozenset[str]:
        """The methods that can be called, as in ``NetworkDriver.Join``. Everything else is a 404."""
        return frozenset(path[1:] for path in self._routes)

    @property
    def networks(self) -> Mapping[str, Network[Any]]:
        """All networks by id; an IPAM driver has none."""
        return {} if self._networks is None else self._networks.networks

    @property
    def repairs(self) -> Mapping[Repair, int]:
        """How often each repair of the network driver's networks was done since the start."""
        return {} if self._networks is None else self._networks.repairs

    def _answer_call(self, path: str, body: bytes) -> Answer:
        started = time.perf_counter()
        try:
            kind, handler = self._routes[path]
        except KeyError:
            # A 404 tells the engine "method not supported".
            name = _printable(path[1:])
            return Answer(404, _text(f"{name} is not supported by this plugin"), {"method": name})
        method = path[1:]
        call: dict[str, Any] = {"method": method}
        try:
            try:
                request: Any = messages.decode(kind, body)
            except InvalidRequest as invalid:
                if not body:  # the first try was lost: Docker takes it for done or refused, and has to be asked which
                    for half in self._halves:
                        half.ask_soon()
                raise InvalidRequest(f"{method}: {invalid}") from None
            if network_id := getattr(request, "network_id", None):
                call["network"] = network_id[:12]
            if endpoint_id := getattr(request, "endpoint_id", None):
                call["endpoint"] = endpoint_id[:12]
            answer = Answer(200, handler(request, body), call)
        except DriverError as error:
            answer = refusal(error.status, _line(error) or type(error).__name__, call)
        except BaseException as error:  # a driver's sys.exit must not end the thread without an answer
            _log.exception("%s failed", method)
            text = _line(error)
            answer = refusal(500, f"{type(error).__name__}: {text}" if text else type(error).__name__, call)
        if has_expired():  # the engine has its answer; this one is for the log and the metrics
            answer = refusal(503, answer.error or f"{method} took too long", call)
        call["ms"] = round((time.perf_counter() - started) * 1000, 2)
        return answer

    @staticmethod
    def refuse_method(method: str, path: str) -> Answer:
        """The answer to a GET and others: the engine only sends POST."""
        return refusal(405, f"{_printable(method)} is not POST", {"method": _printable(path[1:])})

    @staticmethod
    def log(answer: Answer) -> None:
        """Log the call that was answered, as one line."""
        # A 404 is an optional method that the driver does not have.
        level = logging.INFO if answer.status in (200, 404) else logging.WARNING
        if _calls.isEnabledFor(level):
            call = {**answer.call, "status": answer.status}
            if answer.error is not None:
                call["error"] = answer.error
            text = " ".join([f"{name}={value}" for name, value in call.items()])
            # Made by hand, since Logger.log walks the stack for the line that called it.
            record = logging.LogRecord(_calls.name, level, "", 0, text, (), None)
            record.call = call
            _calls.handle(record)

    def _activate(self, _request: messages.Nothing, _body: bytes) -> bytes:
        if self._networks is not None:
            self._networks.engine_starts()
        return self._implements

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """The WSGI application."""
        # Here, since a plugin under its own server does not need Werkzeug, nor the 8 MB and 60 ms of its import.
        from werkzeug import Request, Response  # noqa: PLC0415

        request = Request(environ)
        if request.method == "POST":
            answer = self.handle(request.path, request.get_data(cache=False))
        else:
            answer = self.refuse_method(request.method, request.path)
        self.log(answer)
        response = Response(answer.body, answer.status, content_type=CONTENT_TYPE)
        return response(environ, start_response)

    def reconcile(self) -> None:
        """Begin to make the kernel agree with the state on disk, and both with Docker.

        It runs in the background, as after the loss of an interface; each repair, and each failure, is logged.
        """
        for half in self._halves:
            half.reconcile()

    def close(self) -> None:
        """Finish the work for after answers, and let the state folder go.

        Call it when no call is running; the plugin cannot be used afterwards.
        """
        for half in self._halves:
            half.close()
        if self._folder is not None:
            self._folder.close()

    def __enter__(self) -> Plugin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _kind(driver: object) -> str:
    if isinstance(driver, NetworkDriver) and isinstance(driver, IpamDriver):
        raise TypeError(f"{driver!r} is both a NetworkDriver and an IpamDriver: make it two objects")
    if isinstance(driver, NetworkDriver):
        return "NetworkDriver"
    if isinstance(driver, IpamDriver):
        return "IpamDriver"
    raise TypeError(f"{driver!r} is neither a NetworkDriver nor an IpamDriver")


def refusal(status: int, text: str, call: dict[str, Any] | None = None) -> Answer:
    """The answer that says why there is no other."""
    return Answer(status, _text(text), call or {}, text)


def _line(error: BaseException) -> str:
    """The text of an error, as one line that can be encoded."""
    try:
        text = str(error)
    except Exception:
        text = "(its text cannot be had)"
    return " ".join(text.split()).encode("utf-8", "backslashreplace").decode()


def _printable(text: str) -> str:
    """A client's text, as it can be shown in a line of the log."""
    return text[:80] if text.isprintable() else ascii(text[:80])


def _text(text: str) -> bytes:
    # A non-200 answer is read from `Err` for both kinds of driver; `Error` is where an IpamDriver's 200 has it.
    return messages.encode({"Err": text, "Error": text})
