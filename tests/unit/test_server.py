from __future__ import annotations

import errno
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from grp import struct_group
from pathlib import Path
from pwd import struct_passwd
from typing import Any

import pytest

from netplugin_sdk import AllocateNetwork, Conflict, Plugin, Unavailable
from netplugin_sdk.core.plugin import CONTENT_TYPE
from netplugin_sdk.serving.http import Limits
from netplugin_sdk.serving.loop import Server
from netplugin_sdk.serving.sockets import unix_socket

from ..patience import PATIENCE
from ..volume import volume
from .serving import (
    METHOD,
    MOMENT,
    Client,
    Echo,
    Gate,
    Reply,
    Served,
    body,
    connect_unix,
    echo,
    nothing_left,
    post,
    serving,
    serving_unix,
    wait_for,
)

OTHER = "fedcba9876543210" * 4
"""The calls on one network wait for each other, so a second one takes another."""


def networks(count: int) -> Iterator[str]:
    return (f"{number:064x}" for number in range(count))


# Requests


def test_an_answer_is_what_the_engine_expects(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served, served.connect() as client:
        client.send(post(b"", method="Plugin.Activate"))
        reply = client.receive()
    assert reply.status == 200
    assert reply.headers["content-type"] == CONTENT_TYPE
    assert json.loads(reply.body) == {"Implements": ["NetworkDriver"]}


def test_a_connection_is_kept_for_the_next_request(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served, served.connect() as client:
        for number in range(20):
            client.send(echo(n=str(number)))
            reply = client.receive()
            assert reply.options == {"n": str(number)}
            assert not reply.closes


def test_pipelined_requests_are_answered_in_their_order(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served, served.connect() as client:
        client.send(b"".join(echo(n=str(number)) for number in range(500)))
        assert [client.receive().options["n"] for _ in range(500)] == [str(number) for number in range(500)]


def test_pipelined_requests_keep_their_order_behind_a_slow_one(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served, served.connect() as client:
        gate = served.driver.gate()
        client.send(echo(gate="gate") + echo(network=OTHER, n="second") + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        gate.wait_entered()
        client.expect_silence()
        gate.open()
        assert client.receive().options == {"gate": "gate"}
        assert client.receive().options == {"n": "second"}
        assert client.receive().status == 405


def test_a_request_may_arrive_byte_by_byte(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served, served.connect() as client:
        for byte in echo(n="1") + echo(n="2"):
            client.send(bytes([byte]))
            client.wait_read()
        assert [client.receive().options["n"] for _ in range(2)] == ["1", "2"]


def test_a_request_may_arrive_together_with_half_of_the_next(tmp_path: Path) -> None:
    requests = b"".join(echo(n=str(number)) for number in range(10))
    with serving_unix(tmp_path) as served, served.connect() as client:
        for start in range(0, len(requests), 200):
            client.send(requests[start : start + 200])
            client.wait_read()
        assert [client.receive().options["n"] for _ in range(10)] == [str(number) for number in range(10)]


def test_a_body_may_come_in_chunks(tmp_path: Path) -> None:
    content = body({"large": "y" * 100_000})
    with serving_unix(tmp_path) as served, served.connect() as client:
        for _ in range(2):
            client.send(chunked(content))
            assert client.receive().options == {"large": "y" * 100_000}


def test_a_large_body_is_received_and_a_large_answer_sent(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served, served.connect() as client:
        assert client.echo(large="y" * 8_000_000) == {"large": "y" * 8_000_000}
        assert client.echo(n="1") == {"n": "1"}


def test_a_client_that_expects_100_continue_gets_it_before_it_sends_the_body(tmp_path: Path) -> None:
    content = body({"n": "1"})
    request = post(content, "Expect: 100-continue")
    with serving_unix(tmp_path) as served, served.connect() as client:
        client.send(request.removesuffix(content))
        assert client.receive().status == 100
        client.send(content)
        assert client.receive().options == {"n": "1"}


def test_an_empty_host_is_accepted(tmp_path: Path) -> None:
    """Docker 20.10 sends one."""
    request = echo(n="1")
    assert b"\r\nHost: \r\n" in request
    with serving_unix(tmp_path) as served, served.connect() as client:
        client.send(request)
        assert client.receive().options == {"n": "1"}


@pytest.mark.parametrize(
    "request_",
    [post(body({"n": "1"}), version="1.0"), post(body({"n": "1"}), "Connection: close")],
    ids=["HTTP/1.0", "Connection: close"],
)
def test_the_connection_ends_behind_the_answer_if_the_client_says_so(tmp_path: Path, request_: bytes) -> None:
    with serving_unix(tmp_path) as served, served.connect() as client:
        client.send(request_)
        reply = client.last()
    assert reply.options == {"n": "1"}


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_a_method_other_than_post_is_refused(tmp_path: Path, method: str) -> None:
    with serving_unix(tmp_path) as served, served.connect() as client:
        client.send(f"{method} /{METHOD} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        reply = client.receive()
        assert (reply.status, reply.error) == (405, f"{method} is not POST")
        assert served.driver.calls == 0


def test_an_unknown_path_is_a_404_and_the_connection_lives_on(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served, served.connect() as client:
        client.send(post(b"{}", method="NetworkDriver.Nonsense"))
        assert client.receive().status == 404
        assert client.echo(n="1") == {"n": "1"}


def test_the_error_of_a_driver_is_answered_and_the_connection_lives_on(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served, served.connect() as client:
        client.send(echo(fail="no bridge today"))
        reply = client.receive()
        assert (reply.status, reply.error) == (500, "no bridge today")
        assert client.echo(n="1") == {"n": "1"}


# Limits


def refused_request(folder: Path, data: bytes, limits: Limits | None = None) -> Reply:
    """How the server refuses these bytes. The driver is not called, and the server serves on."""
    with serving_unix(folder, limits) as served:
        with served.connect() as client:
            client.send(data)
            reply = client.last()
        assert served.driver.calls == 0
        assert served.connect().echo(n="1") == {"n": "1"}
    return reply


@pytest.mark.parametrize("complete", [True, False], ids=["a whole request", "a head without end"])
def test_a_head_that_is_too_large_is_refused(tmp_path: Path, complete: bool) -> None:
    request = post(body({"n": "1"}), *(f"X-Header-{number}: {'x' * 100}" for number in range(50)))
    head = request.partition(b"\r\n\r\n")[0]
    reply = refused_request(tmp_path, request if complete else head, Limits(head=2000))
    assert reply.status == 431
    assert "2000 bytes" in reply.error


def test_a_url_without_end_is_refused(tmp_path: Path) -> None:
    assert refused_request(tmp_path, b"POST /" + b"x" * 5000, Limits(head=2000)).status == 431


def test_a_large_head_within_the_limit_is_served(tmp_path: Path) -> None:
    with serving_unix(tmp_path, Limits(head=100_000)) as served, served.connect() as client:
        client.send(post(body({"n": "1"}), "X-Large: " + "x" * 90_000))
        assert client.receive().options == {"n": "1"}


def test_a_body_of_the_largest_size_is_served_and_one_more_byte_is_refused(tmp_path: Path) -> None:
    largest = [body({"n": number}).ljust(100_000) for number in "123"]
    with serving_unix(tmp_path, Limits(body=100_000)) as served, served.connect() as client:
        for number, content in enumerate(largest, 1):
            client.send(post(content))
            assert client.receive().options == {"n": str(number)}
        client.send(post(largest[0] + b" "))
        reply = client.last()
        assert reply.status == 413
        assert "100000 bytes" in reply.error
        assert served.driver.calls == 3


@pytest.mark.parametrize("size", [5_000, 8_000_000])
@pytest.mark.parametrize("coding", ["Content-Length", "chunked"])
def test_who_sends_a_body_that_is_too_large_reads_the_refusal(tmp_path: Path, coding: str, size: int) -> None:
    content = body({"n": "1"}).ljust(size)
    request = chunked(content) if coding == "chunked" else post(content)
    reply = refused_request(tmp_path, request, Limits(body=2_000))
    assert reply.status == 413
    assert "2000 bytes" in reply.error


def test_a_body_that_is_announced_too_large_is_not_asked_for(tmp_path: Path) -> None:
    head = post(b"", "Expect: 100-continue").replace(b"Content-Length: 0", b"Content-Length: 2001")
    assert refused_request(tmp_path, head, Limits(body=2_000)).status == 413


def test_trailers_without_end_are_refused(tmp_path: Path) -> None:
    request = chunked(body({"n": "1"}))[:-2] + b"".join(b"T-%d: %s\r\n" % (n, b"x" * 80) for n in range(2_000))
    assert refused_request(tmp_path, request, Limits(head=2_000, body=2_000)).status in (400, 413, 431)


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"\0" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
        b"POST /x HTTP/9.9\r\n\r\n",
        b"POST /x NTTP/1.1\r\n\r\n",
        b"POST /x HTTP/1.1\r\nno colon\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\n{",
        b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1_0\r\n\r\n0123456789",
        b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999999\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}}",
        b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}no end of chunk",
        b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffffffff\r\n{}",
    ],
)
def test_what_is_no_request_is_refused(tmp_path: Path, data: bytes) -> None:
    assert refused_request(tmp_path, data).status in (400, 413)


def test_garbage_behind_a_request_does_not_spoil_its_answer(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served, served.connect() as client:
        client.send(echo(n="1") + b"\0garbage\r\n\r\n")
        assert client.receive().options == {"n": "1"}
        assert client.last().status == 400


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_request_that_stops_half_way_is_refused_after_request_time(tmp_path: Path, part: str) -> None:
    request = echo(n="1")
    data = request[:30] if part == "head" else request[:-5]
    with serving_unix(tmp_path, Limits(request_time=0.3)) as served, served.connect() as client:
        client.send(data)
        assert client.last().status == 408
        assert served.driver.calls == 0


def test_a_request_that_dribbles_in_is_refused_after_request_time(tmp_path: Path) -> None:
    """The time counts from its first byte, not from its last."""
    request = post(b"x" * 1_000)
    with serving_unix(tmp_path, Limits(request_time=0.3)) as served, served.connect() as client:
        sent = 0
        with suppress(BrokenPipeError):  # it reads no more, but answers
            while not client.readable(0.02):
                client.send(request[sent : sent + 1])
                sent += 1
                assert sent < len(request)
        assert client.receive().status == 408


def test_the_second_request_of_a_connection_is_bounded_too(tmp_path: Path) -> None:
    with serving_unix(tmp_path, Limits(request_time=0.3)) as served, served.connect() as client:
        client.send(echo(n="1") + echo(n="2")[:-5])
        assert client.receive().options == {"n": "1"}
        assert client.last().status == 408


def test_request_time_does_not_count_between_requests(tmp_path: Path) -> None:
    with serving_unix(tmp_path, Limits(request_time=0.3)) as served, served.connect() as client:
        for number in range(3):
            assert client.echo(n=str(number)) == {"n": str(number)}
            time.sleep(0.4)


def test_a_driver_may_take_longer_than_any_limit_of_the_client(tmp_path: Path) -> None:
    with serving_unix(tmp_path, Limits(request_time=0.2, idle_time=0.2)) as served, served.connect() as client:
        gate = served.driver.gate()
        client.send(echo(gate="gate"))
        gate.wait_entered()
        client.expect_silence()
        gate.open()
        assert client.receive().options == {"gate": "gate"}


@pytest.mark.parametrize("requests", [0, 1, 2])
def test_an_idle_connection_is_closed_after_idle_time(tmp_path: Path, requests: int) -> None:
    with serving_unix(tmp_path, Limits(idle_time=0.3)) as served, served.connect() as client:
        for _ in range(requests):
            assert client.echo(n="1") == {"n": "1"}
        client.expect_end()
        assert served.connect().echo(n="2") == {"n": "2"}


def test_connections_beyond_the_limit_wait_and_are_then_served(tmp_path: Path) -> None:
    with serving_unix(tmp_path, Limits(connections=2)) as served:
        first, second = served.connect(), served.connect()
        for client in (first, second):
            client.echo(n="1")
        waiting = [served.connect() for _ in range(3)]
        for number, client in enumerate(waiting):
            client.send(echo(n=str(number)))
        for client in waiting:
            client.expect_silence()
        assert first.echo(n="2") == {"n": "2"}, "who is in is still served"
        first.close()
        for number, client in enumerate(waiting):
            assert client.receive().options == {"n": str(number)}
            client.close()
        assert second.echo(n="3") == {"n": "3"}


def test_a_call_that_runs_counts_as_a_connection(tmp_path: Path) -> None:
    with serving_unix(tmp_path, Limits(connections=1)) as served:
        gate, busy, waiting = served.driver.gate(), served.connect(), served.connect()
        busy.send(echo(gate="gate"))
        gate.wait_entered()
        waiting.send(echo(network=OTHER, n="1"))
        waiting.expect_silence()
        gate.open()
        assert busy.receive().options == {"gate": "gate"}
        busy.close()
        assert waiting.receive().options == {"n": "1"}


# Many clients


def test_a_slow_call_does_not_hold_up_others(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        before, slow = served.connect(), served.connect()
        assert before.echo(n="0") == {"n": "0"}
        gate = served.driver.gate()
        slow.send(echo(gate="gate"))
        gate.wait_entered()
        assert before.echo(network=OTHER, n="1") == {"n": "1"}
        assert served.connect().echo(network=OTHER, n="2") == {"n": "2"}
        assert not slow.readable()
        gate.open()
        assert slow.receive().options == {"gate": "gate"}
        assert slow.echo(n="3") == {"n": "3"}


def test_an_error_in_the_servers_own_thread_does_not_end_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("the log is broken")

    with serving_unix(tmp_path) as served, served.connect() as client:
        with monkeypatch.context() as patch:
            patch.setattr(served.server.plugin, "log", fail)
            assert client.echo(n="1") == {"n": "1"}
            wait_for(lambda: "a bug in the server" in caplog.text, "the failure")
        assert client.echo(n="2") == {"n": "2"}
        assert served.connect().echo(n="3") == {"n": "3"}


def test_an_error_of_a_thread_that_leads_no_more_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("the log is broken")

    with serving_unix(tmp_path) as served:
        ((client, _, gate),) = slow_calls(served, 1)
        assert served.connect().echo(n="1") == {"n": "1"}, "by another thread"
        monkeypatch.setattr(served.server.plugin, "log", fail)
        gate.open()
        client.receive()
        wait_for(lambda: "a bug in the server" in caplog.text, "the failure")


def test_a_bug_while_it_waits_is_logged_and_ends_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken, lead_once = iter([True]), Server._lead_once

    def fail_once(self: Server, me: threading.Thread) -> None:
        if next(broken, False):
            raise RuntimeError("the loop is broken")
        lead_once(self, me)

    with serving_unix(tmp_path) as served, served.connect() as client:
        monkeypatch.setattr(Server, "_lead_once", fail_once)
        assert client.echo(n="1") == {"n": "1"}
        wait_for(lambda: "the loop is broken" in caplog.text, "the failure")
        assert client.echo(n="2") == {"n": "2"}


def test_without_descriptors_a_client_waits_until_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusals, accept = iter([errno.EMFILE, errno.ENFILE, errno.ECONNABORTED]), socket.socket.accept

    def accept_later(self: socket.socket) -> tuple[socket.socket, Any]:
        if number := next(refusals, 0):
            raise OSError(number, os.strerror(number))
        return accept(self)

    with serving_unix(tmp_path) as served:
        monkeypatch.setattr(socket.socket, "accept", accept_later)
        assert served.connect().echo(n="1") == {"n": "1"}
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [text.rpartition("] ")[2] for text in said] == ["Too many open files", "Too many open files in system"]


def test_without_threads_calls_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name == "server":
            raise RuntimeError("can't start new thread")
        start(self)

    with serving_unix(tmp_path) as served:
        gate, client, other = served.driver.gate(), served.connect(), served.connect()
        other.echo(n="0")
        monkeypatch.setattr(threading.Thread, "start", refuse)
        client.send(echo(gate="gate"))
        gate.wait_entered()
        wait_for(lambda: "calls wait for each other: can't start new thread" in caplog.text, "the error in the log")
        other.send(echo(n="1"))
        assert not other.readable(MOMENT)
        gate.open()
        assert client.receive().options == {"gate": "gate"}
        assert other.receive().options == {"n": "1"}
    assert caplog.text.count("calls wait for each other") == 1


def slow_calls(served: Served, count: int) -> list[tuple[Client, str, Gate]]:
    """So many calls that are all in the driver, on a network each."""
    calls = [(served.connect(), network, served.driver.gate(network)) for network in networks(count)]
    for client, network, gate in calls:
        client.send(echo(network=network, gate=network))
        gate.wait_entered()
    return calls


def test_many_slow_calls_run_at_the_same_time(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        calls = slow_calls(served, 40)
        assert served.connect().echo(n="1") == {"n": "1"}
        for client, network, gate in reversed(calls):
            gate.open()
            assert client.receive().options == {"gate": network}
        for client, network, _ in calls:
            assert client.echo(network=network, n="2") == {"n": "2"}


def test_calls_that_wait_for_the_same_network_do_not_hold_up_others(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        gate, first = served.driver.gate(), served.connect()
        first.send(echo(gate="gate"))
        gate.wait_entered()
        queue = [served.connect() for _ in range(10)]
        for number, client in enumerate(queue):
            client.send(echo(n=str(number)))
        assert served.connect().echo(network=OTHER, n="1") == {"n": "1"}
        assert not any(client.readable() for client in queue)
        gate.open()
        assert [client.receive().options["n"] for client in queue] == [str(number) for number in range(10)]


def test_slow_calls_one_after_the_other_leave_the_server_as_it_was(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        slow, other = served.connect(), served.connect()
        for name in networks(50):
            gate = served.driver.gate(name)
            slow.send(echo(gate=name))
            gate.wait_entered()
            assert other.echo(network=OTHER, n=name) == {"n": name}
            gate.open()
            assert slow.receive().options == {"gate": name}


def test_many_clients_at_once_get_each_its_own_answers(tmp_path: Path) -> None:
    turns = volume(10, 50)

    def work(served: Served, network: str) -> None:
        client = connect_unix(served.path)
        with client:
            for number in range(turns):
                client.send(b"".join(echo(network=network, n=f"{network} {number} {part}") for part in range(3)))
                for part in range(3):
                    assert client.receive().options == {"n": f"{network} {number} {part}"}

    with serving_unix(tmp_path) as served:
        with ThreadPoolExecutor(32) as workers:
            for done in [workers.submit(work, served, network) for network in networks(32)]:
                done.result(PATIENCE)
        assert served.driver.calls == 32 * turns * 3


def test_short_connections_in_a_burst_are_all_served(tmp_path: Path) -> None:
    def work(served: Served, network: str) -> None:
        with connect_unix(served.path) as client:
            client.send(post(body({"n": network}, network), "Connection: close"))
            assert client.last().options == {"n": network}

    with serving_unix(tmp_path) as served, ThreadPoolExecutor(16) as workers:
        for done in [workers.submit(work, served, network) for network in networks(500)]:
            done.result(PATIENCE)


def test_a_client_that_goes_away_before_its_answer_changes_nothing(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        gate, client = served.driver.gate(), served.connect()
        client.send(echo(gate="gate", size="1000000"))
        gate.wait_entered()
        client.close()
        gate.open()
        gate.wait_left()
        assert served.connect().echo(n="1") == {"n": "1"}


def test_clients_that_leave_at_any_point_of_a_request_change_nothing(tmp_path: Path) -> None:
    request = echo(n="1")
    with serving_unix(tmp_path) as served:
        for size in range(0, len(request) + 1, 7):
            with served.connect() as client:
                client.send(request[:size])
        assert served.connect().echo(n="2") == {"n": "2"}


def test_a_client_that_has_said_its_last_word_still_gets_its_answer(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        gate, client = served.driver.gate(), served.connect()
        client.send(echo(gate="gate"))
        client.socket.shutdown(socket.SHUT_WR)
        gate.wait_entered()
        gate.open()
        assert client.receive().options == {"gate": "gate"}
        client.expect_end()


def test_clients_that_do_not_read_their_answers_do_not_hold_up_others(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        deaf = [(served.connect(), network) for network in networks(5)]
        for client, network in deaf:
            client.send(echo(network=network, size="8000000"))
            assert client.readable(PATIENCE), "the answer is on its way"
        for number in range(5):
            assert served.connect().echo(n=str(number)) == {"n": str(number)}
        for client, _ in deaf:
            assert len(client.receive().options["large"]) == 8_000_000, "late, but it reads"


def test_a_client_that_does_not_read_its_answer_is_cut_after_request_time(tmp_path: Path) -> None:
    with serving_unix(tmp_path, Limits(request_time=0.3)) as served, served.connect() as client:
        client.send(echo(size="8000000"))
        client.wait_cut()
        with pytest.raises((EOFError, ConnectionResetError)):
            client.receive()
        assert served.connect().echo(n="1") == {"n": "1"}


def test_a_client_that_reads_its_answer_drop_by_drop_is_cut_after_request_time(tmp_path: Path) -> None:
    with serving_unix(tmp_path, Limits(request_time=0.3)) as served, served.connect() as client:
        client.send(echo(size="4000000"))
        received = 0
        try:
            while data := client.socket.recv(4096):
                received += len(data)
                assert received < 4_000_000, "it was never cut"
                time.sleep(0.004)
        except ConnectionResetError:
            pass


# The socket


def test_the_socket_is_for_root_alone_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with serving_unix(tmp_path) as served:
            found = served.path.stat()
    finally:
        os.umask(before)
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600


def test_the_mode_of_the_socket_is_as_wanted_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with Plugin(Echo()) as plugin, Server(plugin) as server:
            server.listen_unix(tmp_path / "s.sock", mode=0o666)
            assert stat.S_IMODE((tmp_path / "s.sock").stat().st_mode) == 0o666
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_the_socket_is_never_wider_open_than_it_is_to_be(
    tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From `bind` on it has a name, and whoever may open that waits for `listen` and is the first to call."""
    path, seen = tmp_path / "s.sock", {}

    class Watched(socket.socket):
        def bind(self, address: object) -> None:
            super().bind(address)  # type: ignore[arg-type]
            seen["bind"] = stat.S_IMODE(path.stat().st_mode)

        def listen(self, backlog: int) -> None:  # type: ignore[override]
            seen["listen"] = stat.S_IMODE(path.stat().st_mode)
            super().listen(backlog)

    monkeypatch.setattr(socket, "socket", Watched)
    before = os.umask(0)
    try:
        with unix_socket(path, mode=mode):
            pass
    finally:
        os.umask(before)
    assert seen == {"bind": mode, "listen": mode}


OWNER, GROUP = (12345, 23456) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
"""To whom a file can be given: only root can give it away."""


def test_the_socket_gets_its_owner_and_group(tmp_path: Path) -> None:
    with Plugin(Echo()) as plugin, Server(plugin) as server:
        server.listen_unix(tmp_path / "s.sock", mode=0o660, owner=OWNER, group=GROUP)
        found = (tmp_path / "s.sock").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (OWNER, GROUP, 0o660)


def test_owner_and_group_may_be_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of this test: who runs it need not have one."""
    monkeypatch.setattr("pwd.getpwnam", {"l2": struct_passwd(("l2", "x", OWNER, GROUP, "", "/", ""))}.__getitem__)
    monkeypatch.setattr("grp.getgrnam", {"l2s": struct_group(("l2s", "x", GROUP, []))}.__getitem__)
    with Plugin(Echo()) as plugin, Server(plugin) as server:
        server.listen_unix(tmp_path / "s.sock", owner="l2", group="l2s")
        found = (tmp_path / "s.sock").stat()
    assert (found.st_uid, found.st_gid) == (OWNER, GROUP)


@pytest.mark.parametrize("who", ["owner", "group"])
def test_an_unknown_owner_or_group_is_an_error_and_leaves_no_socket(tmp_path: Path, who: str) -> None:
    with nothing_left(), Plugin(Echo()) as plugin, Server(plugin) as server:
        with pytest.raises(Unavailable, match="nobody-of-this-name"):
            server.listen_unix(tmp_path / "s.sock", **{who: "nobody-of-this-name"})  # type: ignore[arg-type]
        assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "run" / "docker" / "plugins" / "s.sock"

    def listen(server: Server) -> Path:
        server.listen_unix(path)
        return path

    with serving(listen) as served:
        assert served.connect().echo(n="1") == {"n": "1"}


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Plugin(Echo()) as plugin, Server(plugin) as server, pytest.raises(Unavailable, match="cannot listen on"):
        server.listen_unix(tmp_path / "file" / "s.sock")


def test_a_path_that_is_too_long_for_a_socket_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 120)
    with nothing_left(), Plugin(Echo()) as plugin, Server(plugin) as server:
        with pytest.raises(Unavailable, match="cannot listen on"):
            server.listen_unix(path)
        assert list(tmp_path.iterdir()) == []


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s.sock"))
        dead.listen()
    assert (tmp_path / "s.sock").exists()
    with serving_unix(tmp_path) as served:
        assert served.connect().echo(n="1") == {"n": "1"}


def test_a_live_socket_is_refused_and_left_alone(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        with Plugin(Echo()) as plugin, Server(plugin) as second, refused(f"is already served by pid {os.getpid()}"):
            second.listen_unix(served.path)
        assert served.connect().echo(n="1") == {"n": "1"}
        assert served.path.exists()


def test_the_pid_in_a_refusal_is_that_of_the_server(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); sys.stdin.read()"
    with subprocess.Popen((sys.executable, "-c", code, str(path)), stdin=subprocess.PIPE) as other:
        try:
            wait_for(lambda: path.exists() and can_connect(path), "the other server")
            with Plugin(Echo()) as plugin, Server(plugin) as server, refused(f"is already served by pid {other.pid}"):
                server.listen_unix(path)
            assert can_connect(path)
        finally:
            other.kill()


def test_a_live_socket_whose_backlog_is_full_is_refused_too(tmp_path: Path) -> None:
    path, clients = tmp_path / "s.sock", []
    with nothing_left(), socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen(0)
        try:
            while True:
                clients.append(socket.socket(socket.AF_UNIX))
                clients[-1].setblocking(False)
                clients[-1].connect(str(path))
        except BlockingIOError:
            pass
        with Plugin(Echo()) as plugin, Server(plugin) as server, pytest.raises(Conflict, match="already served"):
            server.listen_unix(path)
        for client in clients:
            client.close()
        assert path.exists()


@pytest.mark.parametrize("kind", ["file", "folder", "link to a socket"])
def test_what_is_not_a_socket_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s.sock"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    before = path.lstat()
    with nothing_left(), Plugin(Echo()) as plugin, Server(plugin) as server, refused("exists and is not a socket"):
        server.listen_unix(path)
    assert path.lstat() == before


def test_the_socket_is_gone_afterwards(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        assert served.path.exists()
    assert list(tmp_path.iterdir()) == []


def test_the_socket_is_gone_even_if_the_server_never_ran(tmp_path: Path) -> None:
    with nothing_left(), Plugin(Echo()) as plugin, Server(plugin) as server:
        server.listen_unix(tmp_path / "s.sock")
    assert list(tmp_path.iterdir()) == []


def test_a_socket_that_somebody_else_has_put_there_stays(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served, socket.socket(socket.AF_UNIX) as other:
        served.path.unlink()
        other.bind(str(served.path))
        other.listen()
        served.server.stop()
        served.wait_stopped()
        assert can_connect(served.path)


def test_a_server_may_listen_on_several_sockets(tmp_path: Path) -> None:
    def listen(server: Server) -> Path:
        server.listen_unix(tmp_path / "1.sock")
        server.listen_unix(tmp_path / "2.sock")
        return tmp_path / "1.sock"

    with serving(listen) as served, connect_unix(tmp_path / "2.sock") as second:
        assert served.connect().echo(n="1") == {"n": "1"}
        assert second.echo(n="2") == {"n": "2"}
    assert list(tmp_path.iterdir()) == []


# The end


def test_stop_lets_a_running_call_end_and_ends_idle_connections(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        gate, busy, idle, fresh = served.driver.gate(), served.connect(), served.connect(), served.connect()
        idle.echo(n="1")
        busy.send(echo(gate="gate"))
        gate.wait_entered()
        served.server.stop()
        idle.expect_end()
        fresh.expect_end()
        wait_for(lambda: not served.path.exists(), "the socket to go")
        assert served.running
        gate.open()
        reply = busy.receive()
        assert reply.options == {"gate": "gate"}
        assert reply.closes
        busy.expect_end()
        served.wait_stopped()


def test_stop_lets_all_running_calls_end(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        calls = slow_calls(served, 10)
        served.server.stop()
        for client, network, gate in calls:
            gate.open()
            assert client.receive().options == {"gate": network}
            client.expect_end()
        served.wait_stopped()


def test_stop_lets_a_large_answer_be_read_to_its_end(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served, served.connect() as client:
        client.send(echo(size="8000000"))
        assert client.readable(PATIENCE)
        served.server.stop()
        wait_for(lambda: not served.path.exists(), "the socket to go")
        assert len(client.receive().options["large"]) == 8_000_000
        client.expect_end()
        served.wait_stopped()


@pytest.mark.parametrize("sent", [0, 40], ids=["nothing yet", "half a request"])
def test_stop_hears_a_client_that_is_about_to_call(tmp_path: Path, sent: int) -> None:
    # An engine repeats a call of which a kept connection takes nothing, but not one on a new connection.
    with serving_unix(tmp_path, limits=Limits(first_request_time=PATIENCE)) as served:
        calling, idle = served.connect(), served.connect()
        calling.send(echo(n="1")[:sent])
        idle.echo(n="2")
        served.server.stop()
        idle.expect_end()
        calling.send(echo(n="1")[sent:])
        assert calling.last().options == {"n": "1"}
        served.wait_stopped()


def test_stop_does_not_wait_for_the_rest_of_a_request(tmp_path: Path) -> None:
    limits = Limits(request_time=10 * PATIENCE, drain_time=10 * PATIENCE)
    with serving_unix(tmp_path, limits) as served, served.connect() as client:
        client.send(echo(n="1") + echo(n="2")[:-5])
        assert client.receive().options == {"n": "1"}
        served.server.stop()
        served.wait_stopped()
        assert served.driver.calls == 1


def test_stop_waits_no_longer_than_drain_time(tmp_path: Path) -> None:
    with serving_unix(tmp_path, Limits(drain_time=0.3)) as served, served.connect() as client:
        gate = served.driver.gate()
        client.send(echo(gate="gate"))
        gate.wait_entered()
        served.server.stop()
        served.wait_stopped()
        with pytest.raises((EOFError, ConnectionResetError)):
            client.receive()
        gate.open()
        gate.wait_left()


def test_stop_does_not_wait_for_a_client_that_does_not_read(tmp_path: Path) -> None:
    limits = Limits(drain_time=0.3, request_time=10 * PATIENCE)
    with serving_unix(tmp_path, limits) as served, served.connect() as client:
        client.send(echo(size="8000000"))
        assert client.readable(PATIENCE)
        served.server.stop()
        served.wait_stopped()


def test_stop_works_while_the_house_is_full(tmp_path: Path) -> None:
    with serving_unix(tmp_path, Limits(connections=1)) as served:
        inside, waiting = served.connect(), served.connect()
        inside.echo(n="1")
        waiting.send(echo(n="2"))
        waiting.expect_silence()
        served.server.stop()
        served.wait_stopped()
        inside.expect_end()


def test_stop_works_from_a_call_of_the_driver(tmp_path: Path) -> None:
    class Last(Echo):
        def allocate_network(self, request: AllocateNetwork) -> Mapping[str, str]:
            server.stop()
            return {}

    with nothing_left(), Plugin(Last()) as plugin, Server(plugin) as server:
        server.listen_unix(tmp_path / "s.sock")
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        with connect_unix(tmp_path / "s.sock") as client:
            client.send(echo(n="1"))
            assert client.receive().status == 200
            thread.join(PATIENCE)
            assert not thread.is_alive()


def test_stop_may_come_early_late_and_more_than_once(tmp_path: Path) -> None:
    with nothing_left(), Plugin(Echo()) as plugin, Server(plugin) as server:
        server.listen_unix(tmp_path / "s.sock")
        server.stop()
        server.stop()
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        server.stop()
    server.stop()


def test_a_new_server_takes_over_at_once(tmp_path: Path) -> None:
    for number in range(5):
        with serving_unix(tmp_path) as served:
            assert served.connect().echo(n=str(number)) == {"n": str(number)}


def test_idle_connections_cost_nothing_once_they_are_gone(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        served.connect().echo(n="0")
        with nothing_left():
            for number in range(200):
                with served.connect() as client:
                    assert client.echo(n=str(number)) == {"n": str(number)}


def refused(why: str) -> pytest.RaisesExc[Conflict]:
    return pytest.raises(Conflict, match=rf"/s\.sock {why}$")


def can_connect(path: Path) -> bool:
    try:
        connect_unix(path).close()
    except OSError:
        return False
    return True


def chunked(content: bytes) -> bytes:
    """A request whose body comes in chunks of all sizes, the first with an extension, and with a trailer."""
    head = post(b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
    parts, start, size = [], 0, 1
    while start < len(content):
        part = content[start : start + size]
        parts.append(b"%x%s\r\n%s\r\n" % (len(part), b";a=b" if not start else b"", part))
        start, size = start + size, min(size * 2, 65_536)
    return head + b"".join(parts) + b"0\r\nT: 1\r\n\r\n"
