"""Records of conversations: in a file and back, compared, played again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netplugin_sdk import DriverError, Unavailable
from netplugin_sdk.cnm.remote import Address
from netplugin_sdk.testing.recording import (
    MISSING,
    Difference,
    Entry,
    Exchange,
    Mark,
    body,
    differences,
    from_json,
    read,
    refusal,
    replay,
    to_json,
)

from .serving import METHOD, NETWORK, serving_unix

RECORDINGS = sorted((Path(__file__).parents[1] / "wire" / "recordings").glob("*.jsonl"))


# ------------------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_what_real_engines_said_is_read_and_written_again(path: Path) -> None:
    for line, entry in zip(path.read_text().splitlines(), read(path), strict=True):
        assert json.loads(to_json(entry)) == json.loads(line)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)
bodies = st.binary() | st.text().map(str.encode) | JSON.map(lambda value: json.dumps(value).encode())
exchanges = st.builds(
    Exchange,
    method=st.text(),
    request=bodies,
    status=st.integers(100, 599),
    answer=bodies,
    headers=st.dictionaries(st.text(), st.text()),
    time=st.integers(0, 2**33).map(float),
    ms=st.none() | st.integers(0, 100_000).map(float),
) | st.builds(Exchange, method=st.text(), request=bodies, status=st.just(0), answer=st.just(b""), no_answer=st.text())


@example(Exchange("", b'"\x80', 200, b'"no end'))  # no JSON, though it begins as a text does
@example(Exchange("", b'"\\ud800"', 200, b""))  # JSON that UTF-8 cannot write as it is
@given(exchanges)
def test_nothing_is_lost_on_the_way(exchange: Exchange) -> None:
    line = to_json(exchange)
    assert "\n" not in line
    back = from_json(line)
    assert isinstance(back, Exchange)
    for name in ("request", "answer"):
        before, after = getattr(exchange, name), getattr(back, name)
        assert before == after or body(before) == body(after)
    assert (back.method, back.status, back.headers, back.time, back.ms, back.no_answer) == (
        exchange.method,
        exchange.status,
        exchange.headers,
        exchange.time,
        exchange.ms,
        exchange.no_answer,
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[]", "line 2: not a JSON object"),
        ("{", "line 2: "),
        ('{"method": "A.B", "request": null, "response": {}}', "line 2: the field 'status' is missing"),
        ('{"method": "A.B", "request": null, "response": {}, "status": []}', "line 2: a field has a wrong type"),
        ("\udcff", "line 2: 'utf-8' codec"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(f'{{"mark": "fine"}}\n{line}\n', errors="surrogateescape")
    with pytest.raises(DriverError, match=f"cannot read .*x.jsonl, {said}"):
        list(read(file))
    with pytest.raises(DriverError, match="No such file"):
        list(read(tmp_path / "y"))


@pytest.mark.parametrize(
    ("status", "answer", "error"),
    [
        (200, b"{}", ""),
        (200, b'{"Err": "no"}', "no"),
        (200, b'{"Error": "no"}', "no"),
        (200, b"what", ""),
        (500, b'{"Err": "no"}', "no"),
        (500, b'{"Error": "no"}', '{"Error": "no"}'),
        (404, b"page not found\n", "page not found"),
        (503, b"", "status 503"),
    ],
)
def test_what_engines_take_for_an_error(status: int, answer: bytes, error: str) -> None:
    assert refusal(status, answer) == error


# --------------------------------------------------------------------------------------------------------- differences


@pytest.mark.parametrize(
    ("before", "after", "ignore", "found"),
    [
        ({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 3]}}, (), [("b.c.1", 2, 3)]),
        ({"a": 1}, {"b": None}, (), [("a", 1, MISSING), ("b", MISSING, None)]),
        ({"a": [1]}, {"a": [1, 2]}, (), [("a", [1], [1, 2])]),
        ({"a": 1}, {"a": True}, (), [("a", 1, True)]),
        ("text", {"a": 1}, (), [("", "text", {"a": 1})]),
        ({"a": {"x": 1}, "b": {"x": 1}}, {"a": {"x": 2}, "b": {"x": 2}}, ("a.x",), [("b.x", 1, 2)]),
        ({"a": {"x": 1}, "b": {"x": 1}}, {"a": {"x": 2}, "b": {"x": 2}}, ("x",), []),
        ({"a": {"x": 1}}, {"a": {"x": 2}}, ("a",), []),
    ],
)
def test_differences(before: Any, after: Any, ignore: tuple[str, ...], found: list[Any]) -> None:
    assert differences(before, after, ignore) == [Difference(*each) for each in found]


@given(JSON, JSON)
def test_there_are_differences_if_and_only_if_it_differs(one: Any, other: Any) -> None:
    assert differences(one, one) == []
    assert bool(differences(one, other)) == (json.dumps(one, sort_keys=True) != json.dumps(other, sort_keys=True))


# --------------------------------------------------------------------------------------------------------------- replay


def exchange(answer: dict[str, str], *, status: int = 200, **options: str) -> Exchange:
    request = json.dumps({"NetworkID": NETWORK, "Options": options}).encode()
    return Exchange(METHOD, request, status, json.dumps({"Options": answer}).encode())


def test_a_record_is_played_and_compared(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        record: list[Entry] = [
            exchange({"a": "1"}, a="1"),
            Mark("something happened"),
            exchange({"a": "1"}, a="2"),
            exchange({}, status=404, a="3"),
            exchange({}, fail="no"),
            Exchange(METHOD, b"", 0, b"", no_answer="the plugin closed the connection"),
        ]
        played = list(replay(record, Address("x", f"unix://{served.path}")))
        assert [[str(each) for each in one.differences] for one in played] == [
            [],
            ['Options.a: "1" → "2"'],
            ["status: 404 → 200", 'Options.a: nothing → "3"'],
            ["status: 200 → 500", "Options: {} → nothing", 'Err: nothing → "no"', 'Error: nothing → "no"'],
            [],
        ]
        assert played[4].now.status == 400
        ignoring = list(replay(record[2:3], Address("x", f"unix://{served.path}"), ignore=["Options.a"]))
        assert ignoring[0].differences == []


def test_a_plugin_that_ends_is_a_difference(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        playing = replay([exchange({"a": "1"}, a="1")] * 2, Address("x", f"unix://{served.path}"))
        assert next(playing).differences == []
        served.server.stop()
        served.wait_stopped()
        ((path, before, _),) = next(playing).differences
        assert (path, before) == ("status", 200)
        assert list(playing) == []
        with pytest.raises(Unavailable):
            next(replay([exchange({})], Address("x", f"unix://{served.path}")))
