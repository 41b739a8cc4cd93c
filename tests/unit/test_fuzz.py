"""Malformed requests, a hundred thousand at full volume: no 5xx that is not the driver's, and nothing is left of them.

A failure prints its seed; NETPLUGIN_FUZZ_SEED repeats it.
"""

from __future__ import annotations

import copy
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from netplugin_sdk import Plugin
from netplugin_sdk.core.plugin import Answer

from ..patience import PATIENCE
from ..volume import volume
from . import anything
from .serving import Client, Reply, connect_unix, open_files, post, tasks, wait_for

RECORDINGS = Path(__file__).parents[1] / "wire" / "recordings"

HANDLED = volume(1_000, 10_000)
"""Requests to `Plugin.handle`, each chosen by hypothesis."""
SENT = volume(10_000, 90_000)
"""Requests to a server on a socket, not counting those that a mutation may have left good."""
CLIENTS = 4
"""That send them at the same time."""

SEED = int(os.environ.get("NETPLUGIN_FUZZ_SEED") or secrets.randbits(32))


class Recorded(NamedTuple):
    """A request of a real engine, and those before it that made what it is about."""

    method: str
    request: dict[str, Any]
    before: tuple[tuple[str, bytes], ...]


def _recorded() -> Iterator[Recorded]:
    for file in sorted(RECORDINGS.glob("*.jsonl")):
        made: dict[str, list[tuple[str, bytes]]] = {}
        for line in map(json.loads, file.read_text().splitlines()):
            if "method" in line:
                request = line["request"] or {}
                history = made.setdefault(request.get("NetworkID", ""), [])
                yield Recorded(line["method"], request, tuple(history))
                if line["method"].endswith((".CreateNetwork", ".CreateEndpoint", ".Join")):
                    history.append((line["method"], json.dumps(request).encode()))


RECORDED = list(_recorded())
METHODS = sorted({recorded.method for recorded in RECORDED})

WITHOUT_BODY = {"Plugin.Activate", "NetworkDriver.GetCapabilities", "IpamDriver.GetCapabilities"}
WITHOUT_BODY |= {"IpamDriver.GetDefaultAddressSpaces"}


def check(answer: Answer | Reply) -> None:
    """What every answer must be."""
    content = json.loads(answer.body)
    assert isinstance(content, dict)
    if answer.status != 200:
        text = content["Err"]
        assert text
        assert text == content["Error"]
        assert answer.status in (400, 404, 405, 408, 409, 413, 422, 431) or anything.SAYS_NO in text, answer


# --------------------------------------------------------------------------------------------------- Plugin.handle

SETTINGS = settings(
    max_examples=HANDLED // 2,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

# What a careless reader would stumble over.
STRINGS = [
    *("", " ", "0", "-1", "\0", "\n", "\u2028", "ü", "١٢", "x" * 200, "0123456789ab", "0123456789ab\n", "../../../etc"),
    *("10.0.0.0/8", "10.0.0.1/33", "10.0.0.1", "0.0.0.0/0", "::/0", "fe80::1%eth0", "1.2.3.4/255.0.255.0", "/24"),
    *("02:00:00:00:00:01", "AgAAAAAB", "AgAAAAA", "====", "true", "nan", "1e999", "9" * 400, "local", "global"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(STRINGS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in it with each of its keys."""
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in entries:
        yield content, key
        yield from places(value)


@st.composite
def mutated(draw: st.DrawFn) -> tuple[Recorded, bytes]:
    recorded = draw(st.sampled_from(RECORDED))
    content = copy.deepcopy(recorded.request)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(content))
        if not found:
            content["NetworkID"] = draw(JSON)
            continue
        container, key = found[draw(st.integers(0, len(found) - 1))]
        change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if change == "replace":
            container[key] = draw(JSON)
        elif change == "remove":
            del container[key]
        elif isinstance(container, dict):
            container[draw(st.text(max_size=10))] = draw(JSON)
        else:
            container.append(draw(JSON))
    body = bytearray(json.dumps(content).encode())
    for _ in range(draw(st.integers(0, 1))):
        body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    return recorded, bytes(body)


# Lone surrogates too, which have no UTF-8.
PATHS = st.sampled_from(METHODS).map("/{}".format) | st.text(st.characters(exclude_categories=()))


@given(PATHS, st.binary() | JSON.map(lambda j: json.dumps(j).encode()))
@SETTINGS
def test_any_path_and_any_body_has_an_answer(path: str, body: bytes) -> None:
    with anything.plugin() as plugin:
        handle(plugin, path, body)


@given(mutated())
@SETTINGS
def test_any_mutation_of_what_engines_send_has_an_answer(mutation: tuple[Recorded, bytes]) -> None:
    recorded, body = mutation
    with anything.plugin() as plugin:
        for method, request in recorded.before:
            plugin.handle(f"/{method}", request)
        handle(plugin, f"/{recorded.method}", body)
        # Whatever that did to its memory, it goes on.
        assert plugin.handle("/Plugin.Activate", b"").status == 200


def handle(plugin: Plugin, path: str, body: bytes) -> None:
    answer = plugin.handle(path, body)
    check(answer)
    plugin.log(answer)


def test_the_recordings_themselves_are_answered() -> None:
    """Else their mutations would say little."""
    answered: Counter[int] = Counter()
    for recorded in RECORDED:
        with anything.plugin() as plugin:
            for method, request in recorded.before:
                plugin.handle(f"/{method}", request)
            body = b"" if recorded.method in WITHOUT_BODY else json.dumps(recorded.request).encode()
            answered[plugin.handle(f"/{recorded.method}", body).status] += 1
    assert answered[200] > 0.8 * len(RECORDED), answered


# ------------------------------------------------------------------------------------------------------ the server


class Sent(NamedTuple):
    """The bytes of a request, and whether they are certainly none that may succeed."""

    data: bytes
    malformed: bool


class Fuzzer:
    """Makes requests out of a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    # Whole requests, with a content that cannot be accepted

    def whole(self) -> Sent:
        recorded = self.random.choice(RECORDED)
        method, request = recorded.method, copy.deepcopy(recorded.request)
        kind = self.random.randrange(10)
        malformed = True
        body = json.dumps(request).encode()
        if kind == 0:
            body = body[: self.random.randrange(1, len(body))]
        elif kind == 1:
            body = self.random.choice([b"[]", b"7", b'"x"', b"null", b"true", b" ", b"\0", b"\xff\xfe", b"{" * 5_000])
        elif kind == 2:
            body += self.random.choice([b"x", b"{}", b"\0", b",", b"]", b'"'])
        elif kind == 3:
            body = b'{"%b":1}' % self.random.choice([b"\xff", b"\xc0\x80", b"\\ud800", b"\\x", b"\n"])
        elif kind == 4 and method not in WITHOUT_BODY:
            body = b""
        elif kind == 5 and request.keys() & {"NetworkID", "PoolID"}:
            name = "NetworkID" if "NetworkID" in request else "PoolID"
            if self.random.random() < 0.3:
                del request[name]
            else:
                request[name] = self.random.choice([None, "", 7, 1.5, True, [], {}, ["x"]])
            body = json.dumps(request).encode()
        elif kind == 6:
            method = self.random.choice([method.lower(), f"{method}x", "", "..", "%00", "x" * 300, f"{method}/", "//"])
        elif kind == 7:
            verb = self.random.choice(["GET", "PUT", "DELETE", "OPTIONS", "PATCH"])
            return Sent(self.framed(method, body).replace(b"POST", verb.encode(), 1), malformed=True)
        else:
            if self.random.random() < 0.1:
                method = "NetworkDriver.AllocateNetwork"  # without pools the driver fails
            body, malformed = self.flipped(body), False
        return Sent(self.framed(method, body), malformed)

    def framed(self, method: str, body: bytes) -> bytes:
        """A good frame around it, of one kind or the other."""
        extra = () if self.random.random() < 0.9 else ("Expect: 100-continue",)
        whole = post(body, *extra, method=method)
        if self.random.random() < 0.9:
            return whole
        head = whole[: whole.index(b"Content-Length")] + b"Transfer-Encoding: chunked\r\n\r\n"
        return head + self.chunks(body) + b"0\r\n\r\n"

    def chunks(self, body: bytes) -> bytes:
        parts = []
        while body:
            size = self.random.randint(1, 200)
            parts.append(b"%x\r\n%b\r\n" % (len(body[:size]), body[:size]))
            body = body[size:]
        return b"".join(parts)

    def flipped(self, data: bytes) -> bytes:
        """With some bytes changed, removed or doubled."""
        changed = bytearray(data)
        for _ in range(self.random.randint(1, 5)):
            where = self.random.randrange(len(changed) + 1)
            part = bytes(changed[where : where + self.random.randint(0, 8)])
            new = self.random.choice([b"", part * 2, self.random.randbytes(len(part)), b"0", b'"', b"}", b"null"])
            changed[where : where + len(part)] = new
        return bytes(changed)

    # Last words: after these the connection is over

    def last(self) -> Sent:
        if self.random.random() < 0.1:
            return Sent(self.flipped(self.whole().data), malformed=False)
        make = self.random.choice(
            [self.garbage, self.broken_head, self.truncated, self.too_large, self.bad_chunks, self.wrong_length]
        )
        return Sent(make(), malformed=True)

    def garbage(self) -> bytes:
        return self.random.randbytes(self.random.randint(1, 400))

    def broken_head(self) -> bytes:
        head = self.random.choice(
            [
                b"post /x HTTP/1.1\r\n",
                b"POST/x HTTP/1.1\r\n",
                b"POST /x HTTP/7.1\r\n",
                b"POST /x\r\n",
                b"POST  HTTP/1.1\r\n",
                b"POST /x HTTP/1.1\r\nno colon\r\n",
                b"POST /x HTTP/1.1\r\n: empty\r\n",
                b"POST /x HTTP/1.1\r\na b: c\r\n",
                b"POST /x HTTP/1.1\r\na\0b: c\r\n",
                b"POST /x HTTP/1.1\r\nContent-Length: x\r\n",
                b"POST /x HTTP/1.1\r\nContent-Length: -5\r\n",
                b"POST /x HTTP/1.1\r\nContent-Length: 5, 6\r\n",
                b"POST /x HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n",
                b"POST /x HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n",
                b"POST /x HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n",
                b"CONNECT example:1 HTTP/1.1\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n",
            ]
        )
        return head + b"\r\n{}"

    def truncated(self) -> bytes:
        data = self.whole().data
        return data[: self.random.randrange(len(data))]

    def too_large(self) -> bytes:
        limits, size = anything.LIMITS, self.random.randint(70_000, 300_000)
        return self.random.choice(
            [
                b"POST /" + b"x" * (limits.head + size),
                b"POST /x HTTP/1.1\r\nX: " + b"x" * (limits.head + size) + b"\r\n\r\n",
                post(b" " * (limits.body + size)),
                post(b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
                + self.chunks(b" " * (limits.body + limits.head + size)),
            ]
        )

    def bad_chunks(self) -> bytes:
        head = b"POST /x HTTP/1.1\r\nHost: \r\nTransfer-Encoding: chunked\r\n\r\n"
        bad = [
            b"x\r\n",
            b"-1\r\n",
            b"\r\n\r\n",
            b"5\r\n{}\r\n0\r\n\r\n",
            b"1\r\n{}\r\n",
            b"f" * 20 + b"\r\n",
            b"2\n{}\n",
        ]
        return head + self.chunks(b" " * self.random.randrange(500)) + self.random.choice(bad)

    def wrong_length(self) -> bytes:
        body = json.dumps(self.random.choice(RECORDED).request).encode()
        wrong = len(body) + self.random.choice([-1, 1, 7, 1_000])
        return post(body).replace(b"Content-Length: %d" % len(body), b"Content-Length: %d" % wrong)


def fuzz(path: Path, number: int, count: int) -> Counter[str]:
    """Send so many requests over many connections; what was sent and what came back."""
    fuzzer, counted = Fuzzer(SEED + number), Counter[str]()
    while counted["malformed"] < count:
        batch = [*(fuzzer.whole() for _ in range(fuzzer.random.randint(0, 60))), fuzzer.last()]
        data = b"".join(sent.data for sent in batch)
        stays = fuzzer.random.random() < 0.9
        counted["sent"] += len(batch)
        counted["malformed"] += sum(sent.malformed for sent in batch)
        try:
            with connect_unix(path) as client:
                send(client, data, fuzzer.random)
                if stays:
                    read_all(client, batch, counted)
        except Exception as error:
            raise AssertionError(
                f"{error!r}; NETPLUGIN_FUZZ_SEED={SEED}, client {number}, so far {counted}, sent {data!r}"
            ) from error
    return counted


def send(client: Client, data: bytes, chance: random.Random) -> None:
    """At once or in pieces. It is no error if the server ends the connection before the last of it."""
    with suppress(BrokenPipeError, ConnectionResetError):
        while data:
            size = len(data) if chance.random() < 0.5 else chance.randint(1, len(data))
            client.send(data[:size])
            data = data[size:]


def read_all(client: Client, batch: list[Sent], counted: Counter[str]) -> None:
    """An answer to each request but the last; to that one or more answers or none, and the connection ends."""
    with suppress(OSError):  # the server may have ended it
        client.socket.shutdown(socket.SHUT_WR)
    *whole, last = batch
    for sent in whole:
        counted[f"{checked_answer(client, sent)}"] += 1
    with suppress(EOFError, ConnectionResetError):
        while True:
            counted[f"last {checked_answer(client, last)}"] += 1


def checked_answer(client: Client, sent: Sent) -> int:
    """The status that was answered."""
    reply = answer(client)
    check(reply)
    assert not sent.malformed or 400 <= reply.status < 500, (sent, reply)
    return reply.status


def answer(client: Client) -> Reply:
    """The next answer that is a final one."""
    while (reply := client.receive()).status == 100:
        pass
    return reply


def dribble(path: Path, number: int) -> None:
    """Some bytes of a request, one after the other, until the server has had enough."""
    data = Fuzzer(SEED - 1 - number).whole().data
    with connect_unix(path) as client:
        with suppress(BrokenPipeError):  # it reads no more, but answers
            for byte in data[: len(data) // 2]:
                if client.readable(0.01):
                    break
                client.send(bytes([byte]))
        reply = answer(client)
        check(reply)
        assert 400 <= reply.status < 500, (data, reply)


def go_away(path: Path, number: int) -> None:
    """A request, and gone."""
    with connect_unix(path) as client:
        client.send(Fuzzer(SEED - 1_000_000 - number).whole().data)


def test_a_server_survives_whatever_is_sent_to_it(tmp_path: Path) -> None:
    path, log = tmp_path / "s.sock", tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen((sys.executable, str(Path(anything.__file__)), str(path)), stderr=stderr)
    try:
        wait_for(lambda: process.poll() is not None or is_good(path), "the server")
        wait_for(lambda: process.poll() is not None or sockets(process.pid) == 1, "the first connections to end")
        threads, files = len(tasks(process.pid)), open_files(process.pid)
        with ThreadPoolExecutor(CLIENTS + 8) as clients:
            working = [clients.submit(fuzz, path, number, SENT // CLIENTS) for number in range(CLIENTS)]
            dribbling = [clients.submit(dribble, path, number) for number in range(8)]
            for number in range(500):
                go_away(path, number)
            for slow in dribbling:
                slow.result(2 * PATIENCE)
            counted = sum((done.result(10 * PATIENCE) for done in working), Counter[str]())
        assert counted["malformed"] >= SENT
        # What is never reached is not tested.
        reached = volume(1, 11)
        assert min(counted[status] for status in ("200", "400", "404", "405", "422", "500")) >= reached, counted
        assert min(counted[f"last {status}"] for status in (400, 413, 431)) >= reached, counted
        assert process.poll() is None, log.read_text()
        assert is_good(path), f"NETPLUGIN_FUZZ_SEED={SEED}"
        wait_for(lambda: len(tasks(process.pid)) <= threads, f"threads to end (NETPLUGIN_FUZZ_SEED={SEED})")
        wait_for(lambda: open_files(process.pid) == files, f"files to be closed (NETPLUGIN_FUZZ_SEED={SEED})")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert log.read_text() == "", f"NETPLUGIN_FUZZ_SEED={SEED}"  # of errors only
        print(sorted(counted.items()))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(PATIENCE)


def is_good(path: Path) -> bool:
    try:
        with connect_unix(path) as client:
            client.send(post(b"", method="Plugin.Activate"))
            return client.receive().status == 200
    except (FileNotFoundError, ConnectionRefusedError):
        return False


def sockets(pid: int) -> int:
    return sum(number for name, number in open_files(pid).items() if name.startswith("socket:"))
