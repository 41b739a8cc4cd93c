"""Conversations of an engine and a plugin: kept in a file, compared, and played again.

    for entry in read("day.jsonl"):
        print(entry)
    for played in replay(read("day.jsonl"), Address("x", "unix:///run/docker/plugins/x.sock")):
        print(played.differences)

`Tap` records one from a running plugin. The file has a JSON object a line (JSON Lines), in the order of the answers:

    {"t": 1795486074.8863, "ms": 0.412, "method": "NetworkDriver.Join", "headers": {"Host": …}, "request": {…},
     "raw_empty": false, "status": 200, "response": {…}}
    {"mark": "plugin killed and started again", "t": 1795486081.2}

| field | what |
|---|---|
| ``t`` | when the request had arrived, in seconds since 1970 |
| ``ms`` | milliseconds from there to the end of the answer; may be missing |
| ``method`` | the path without its ``/`` |
| ``headers`` | the request's, as they came |
| ``request``, ``response`` | the bodies, decoded (so without their white space); null for an empty one |
| ``raw_empty`` | whether the request's body was empty, which ``null`` is not |
| ``request_text``, ``response_text`` | a body that is no JSON, as text; bytes that are no UTF-8 as lone surrogates |
| ``status`` | the answer's; null if there was none |
| ``error`` | why there was none |
| ``mark`` | what happened between two requests, in words |
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from netplugin_sdk.cnm.remote import ACCEPT, Address, RemotePlugin
from netplugin_sdk.errors import DriverError, Unavailable

_HOST = "plugin.moby.localhost"
_TIMEOUT = 60.0
_OF_THE_BODY = ("content-length", "transfer-encoding", "connection")  # headers that are made again


@dataclass(frozen=True)
class Exchange:
    """A request and its answer, as bytes of the bodies.

    `status` is 0 where there was no answer; then `no_answer` says why.
    """

    method: str
    request: bytes
    status: int
    answer: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    """The request's."""
    time: float = 0.0
    """When the request had arrived, in seconds since 1970; 0 if nobody looked."""
    ms: float | None = None
    """Until the end of the answer."""
    no_answer: str = ""

    @property
    def error(self) -> str:
        """The error that an engine would read in it; "" if it reads success (moby ``pkg/plugins/client.go``)."""
        if not self.status:
            return self.no_answer
        return refusal(self.status, self.answer)

    def __str__(self) -> str:
        answer = f"{self.status} {short(self.answer)}" if self.status else f"no answer: {self.no_answer}"
        return f"{self.method} {short(self.request)}\n    → {answer}"


@dataclass(frozen=True)
class Mark:
    """An event between two requests."""

    text: str
    time: float = 0.0
    """In seconds since 1970; 0 if nobody looked."""

    def __str__(self) -> str:
        return f"({self.text})"


Entry: TypeAlias = Exchange | Mark


def refusal(status: int, answer: bytes) -> str:
    """The error in an answer, as engines look for it (moby ``pkg/plugins/client.go``); "" if there is none.

    With status 200 it is ``Err``, or ``Error`` of an IpamDriver; with another one ``Err``, else the whole body.
    """
    content = body(answer)
    fields = content if isinstance(content, dict) else {}
    if status == 200:
        return str(fields.get("Err") or fields.get("Error") or "")
    return str(fields.get("Err") or short(answer) or f"status {status}")


def body(data: bytes) -> Any:
    """The JSON in a body, None if it is empty, else its text."""
    if not data.strip():
        return None
    try:
        return json.loads(data)
    except ValueError:
        return data.decode("utf-8", "surrogateescape")


def short(data: bytes) -> str:
    """A body for people to read."""
    text = data.decode("utf-8", "backslashreplace").strip()
    return text if len(text) <= 600 else f"{text[:600]} … ({len(text)} characters)"


# ------------------------------------------------------------------------------------------------------------ the file


def read(path: Path | str) -> Iterator[Entry]:
    """The entries of a file, line by line.

    Raises:
        DriverError: it cannot be read, or a line is not what it should be; the text says which.
    """
    number = 0
    try:
        with Path(path).open("rb") as file:
            for line in file:
                number += 1
                if line.strip():
                    yield from_json(line.decode())
    except (OSError, ValueError) as error:
        where = f"{path}, line {number}" if number else path
        words = error.strerror if isinstance(error, OSError) else error
        raise DriverError(f"cannot read {where}: {words}") from error


def to_json(entry: Entry) -> str:
    """The line of a file, without its end."""
    if isinstance(entry, Mark):
        return json.dumps({"mark": entry.text} | ({"t": round(entry.time, 4)} if entry.time else {}))
    line: dict[str, Any] = {"t": round(entry.time, 4)}
    if entry.ms is not None:
        line["ms"] = round(entry.ms, 3)
    line |= {"method": entry.method, "headers": dict(entry.headers)}
    line |= _body_fields("request", entry.request) | {"raw_empty": not entry.request}
    line |= {"status": entry.status or None} | _body_fields("response", entry.answer)
    if not entry.status:
        line["error"] = entry.no_answer
    return json.dumps(line)


def from_json(line: str) -> Entry:
    """The opposite. Raises ValueError if that is no such line."""
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    try:
        if "mark" in found:
            return Mark(str(found["mark"]), float(found.get("t", 0)))
        return Exchange(
            method=str(found["method"]),
            request=b"" if found.get("raw_empty") else _body_bytes(found, "request"),
            status=0 if found["status"] is None else int(found["status"]),
            answer=_body_bytes(found, "response"),
            headers={str(name): str(value) for name, value in found.get("headers", {}).items()},
            time=float(found.get("t", 0)),
            ms=None if found.get("ms") is None else float(found["ms"]),
            no_answer=str(found.get("error", "")),
        )
    except KeyError as error:
        raise ValueError(f"the field {error.args[0]!r} is missing") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"a field has a wrong type: {error}") from None


def _body_fields(name: str, data: bytes) -> dict[str, Any]:
    if not data.strip():
        return {name: None}
    try:
        return {name: json.loads(data)}
    except ValueError:
        return {name: None, f"{name}_text": body(data)}


def _body_bytes(line: Mapping[str, Any], name: str) -> bytes:
    if (text := line.get(f"{name}_text")) is not None:
        return str(text).encode("utf-8", "surrogateescape")
    decoded = line[name]
    if decoded is None and (name == "response" or "raw_empty" not in line):
        return b""
    text = json.dumps(decoded, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a pair, which JSON can name and UTF-8 has not
        return json.dumps(decoded, separators=(",", ":")).encode()


# ---------------------------------------------------------------------------------------------------------- differences


class Missing:
    """There is no such field."""

    def __repr__(self) -> str:
        return "nothing"


MISSING = Missing()


class Difference(NamedTuple):
    """Of one field: its path, as in ``Options.com.docker.network.portmap.0.HostPort``, and both values."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        before, after = (
            repr(value) if isinstance(value, Missing) else short(json.dumps(value, ensure_ascii=False).encode())
            for value in (self.before, self.after)
        )
        return f"{self.path or 'body'}: {before} → {after}"


def differences(before: Any, after: Any, ignore: Collection[str] = ()) -> list[Difference]:
    """Where two JSON values differ, field by field; lists of another length as a whole.

    `ignore` are fields: a name (``SrcName``), or the end of a path (``InterfaceName.SrcName``); with all below them.
    """
    return list(_differences(before, after, "", ignore))


def _differences(before: Any, after: Any, path: str, ignore: Collection[str]) -> Iterator[Difference]:
    if any(f".{path}".endswith(f".{name}") for name in ignore):
        return
    if isinstance(before, dict) and isinstance(after, dict):
        pairs: Iterable[tuple[Any, Any, Any]] = (
            (key, before.get(key, MISSING), after.get(key, MISSING)) for key in before | after
        )
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = ((key, *both) for key, both in enumerate(zip(before, after, strict=True)))
    else:
        if type(before) is not type(after) or before != after:
            yield Difference(path, before, after)
        return
    for key, one, other in pairs:
        yield from _differences(one, other, f"{path}.{key}" if path else str(key), ignore)


# --------------------------------------------------------------------------------------------------------------- replay


class Played(NamedTuple):
    """One request of a record, played again."""

    recorded: Exchange
    now: Exchange
    differences: list[Difference]
    """Of the answers, and ``status`` of them. None where no answer was recorded."""


def replay(
    entries: Iterable[Entry], plugin: Address, *, ignore: Collection[str] = (), timeout: float = _TIMEOUT
) -> Iterator[Played]:
    """Ask a plugin what was recorded, one after the other, and compare its answers with the recorded ones.

    Ids are those of the record: the plugin must not know them. Marks are passed over.

    Args:
        entries: the record.
        plugin: where it listens.
        ignore: fields of the answers that may differ, as in `differences`.
        timeout: seconds that the plugin may be silent.

    Raises:
        Unavailable: it cannot be reached at all. A connection that ends later is a difference.
    """
    with RemotePlugin(plugin, timeout=timeout) as remote:
        connection = _connect(remote)
        try:
            for entry in entries:
                if isinstance(entry, Mark):
                    continue
                now = _play(connection, entry)
                yield Played(entry, now, _answers_differ(entry, now, ignore))
                if connection.sock is None:
                    with suppress(Unavailable):
                        connection = _connect(remote)
        finally:
            connection.close()


def _connect(remote: RemotePlugin) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(_HOST)
    connection.auto_open = 0  # it would look for a host of this name
    connection.sock = remote.dial()
    return connection


def _play(connection: http.client.HTTPConnection, recorded: Exchange) -> Exchange:
    headers = {name: value for name, value in recorded.headers.items() if name.lower() not in _OF_THE_BODY}
    try:
        connection.request("POST", f"/{recorded.method}", recorded.request, {"Accept": ACCEPT, **headers})
        response = connection.getresponse()
        status, answer, why = response.status, response.read(), ""
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        status, answer, why = 0, b"", str(error) or type(error).__name__
    return Exchange(recorded.method, recorded.request, status, answer, recorded.headers, no_answer=why)


def _answers_differ(recorded: Exchange, now: Exchange, ignore: Collection[str]) -> list[Difference]:
    if not recorded.status:
        return []
    if not now.status:
        return [Difference("status", recorded.status, now.no_answer)]
    found = differences({"status": recorded.status}, {"status": now.status}, ignore)
    return found + differences(body(recorded.answer), body(now.answer), ignore)
