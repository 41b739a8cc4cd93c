"""How policies get to the back end and stay in force: with a back end that remembers. Needs no kernel."""

from __future__ import annotations

import fcntl
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any, TypeVar

import pytest

from netplugin_sdk.errors import Unavailable
from netplugin_sdk.linux import firewall
from netplugin_sdk.linux.firewall import FirewallError, KernelAnnouncements, Policy
from netplugin_sdk.linux.ports import Published
from netplugin_sdk.values import TransportProtocol

from ..patience import PATIENCE

T = TypeVar("T")

SHORT = 0.08
"""Seconds in which something would have happened that must not."""

QUIET, POLL = 0.2, 5.0  # the defaults


class Remembering:
    """A back end; what is in `refused` it does not take, and while `gate` is shut it takes its time."""

    announced = True

    def __init__(self) -> None:
        self.pids: Collection[int] = (os.getpid(),)
        self.kernel: dict[str, Policy] = {}
        self.calls: list[dict[str, Policy | None]] = []
        self.forgotten = 0
        self.refused: dict[str, Exception] = {}
        self.missing: Exception | None = None
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self) -> Remembering:
        if self.missing is not None:
            raise self.missing
        return self

    def apply(self, policies: Mapping[str, Policy | None]) -> bool:
        self.entered.set()
        assert self.gate.wait(PATIENCE)
        self.calls.append(dict(policies))
        for bridge in policies:
            if bridge in self.refused:
                raise self.refused[bridge]
        before = dict(self.kernel)
        for bridge, policy in policies.items():
            if policy is None:
                self.kernel.pop(bridge, None)
            else:
                self.kernel[bridge] = policy
        return before != self.kernel

    def forget(self) -> None:
        self.forgotten += 1


class Announcing:
    """In the place of the kernel: a byte on a pipe is somebody else's change."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.rounds = self.heard = 0

    def __call__(self) -> Announcing:
        return self

    def __enter__(self) -> Announcing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def fileno(self) -> int:
        return self.read

    def of_others(self, pids: Collection[int]) -> bool:
        self.rounds += 1
        try:
            os.read(self.read, 1000)
        except BlockingIOError:
            return False
        self.heard += 1
        return True

    def somebody_changes(self) -> None:
        os.write(self.write, b"x")


@pytest.fixture
def announcing() -> Iterator[Announcing]:
    announcements = Announcing()
    yield announcements
    os.close(announcements.read)
    os.close(announcements.write)


class Clock:
    """The keeper's, which stands still until the test goes on."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(firewall.keeper, "clock", made.monotonic)
    return made


def turn() -> None:
    """The keeper's thread has gone round: what is due is done."""
    for _ in range(2):
        soon(firewall.wait_until_applied)


@pytest.fixture(autouse=True)
def backend(announcing: Announcing, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remembering]:
    """A keeper of its own, with these two; whatever becomes of it, the others' tests have another one."""
    made = Remembering()
    monkeypatch.setattr(firewall, "keeper", firewall.Keeper(backends={"iptables": made}, announcements=announcing))
    firewall.use("iptables")
    yield made
    made.gate.set()
    soon(firewall.close)


def begin(function: Callable[..., T], *args: Any) -> Future[T]:
    """Run it in a thread that cannot keep the tests from ending."""
    future: Future[T] = Future()

    def target() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=target, daemon=True).start()
    return future


def soon(function: Callable[..., T], *args: Any) -> T:
    """What it returns or raises, without hanging for ever."""
    return begin(function, *args).result(PATIENCE)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not become so"
        time.sleep(0.005)


PLAIN = Policy(bridge="br-1", subnets=(ip_network("10.1.0.0/24"),))
LESS = replace(PLAIN, masquerade=False)
PORT = Published(
    protocol=TransportProtocol.TCP,
    host_address=ip_address("0.0.0.0"),
    host_port=8080,
    address=ip_address("10.1.0.2"),
    port=80,
)


def on(bridge: str, **fields: Any) -> Policy:
    return replace(PLAIN, bridge=bridge, **fields)


# --------------------------------------------------------------------------------------------------- who waits for what


def test_what_is_asked_for_is_in_force_at_the_return(backend: Remembering) -> None:
    soon(firewall.ensure, PLAIN)
    assert backend.kernel == {"br-1": PLAIN}
    soon(firewall.delete, "br-1")
    assert backend.kernel == {}


def test_what_only_takes_away_is_not_waited_for(backend: Remembering) -> None:
    soon(firewall.ensure, PLAIN)
    backend.gate.clear()
    soon(firewall.ensure, LESS)
    settled = begin(firewall.wait_until_applied)
    with pytest.raises(TimeoutError):
        settled.result(SHORT)
    assert backend.kernel == {"br-1": PLAIN}
    backend.gate.set()
    settled.result(PATIENCE)
    assert backend.kernel == {"br-1": LESS}


@pytest.mark.parametrize(
    "more",
    [
        replace(LESS, masquerade=True),
        replace(LESS, internal=True),
        replace(LESS, subnets=(ip_network("10.1.0.0/24"), ip_network("fd00:1::/64"))),
        replace(LESS, published={"e": (PORT,)}),
        replace(LESS, sources=(ip_address("192.0.2.9"),), masquerade=True),
    ],
)
def test_what_adds_is_waited_for(backend: Remembering, more: Policy) -> None:
    soon(firewall.ensure, LESS)
    backend.gate.clear()
    asked = begin(firewall.ensure, more)
    with pytest.raises(TimeoutError):
        asked.result(SHORT)
    backend.gate.set()
    asked.result(PATIENCE)
    assert backend.kernel == {"br-1": more}


def test_a_removal_is_not_taken_for_done_while_the_other_waits(backend: Remembering) -> None:
    """Two threads, the same bridge: the second adds less than the first, whose request is not done yet."""
    backend.gate.clear()
    first = begin(firewall.ensure, PLAIN)
    assert backend.entered.wait(PATIENCE)
    second = begin(firewall.ensure, PLAIN)
    third = begin(firewall.ensure, LESS)
    for asked in (second, third):
        with pytest.raises(TimeoutError):
            asked.result(SHORT)
    backend.gate.set()
    for asked in (first, second, third):
        asked.result(PATIENCE)


def test_what_was_refused_is_not_taken_for_in_force(backend: Remembering) -> None:
    backend.refused["br-1"] = FirewallError("no")
    for policy in (PLAIN, PLAIN, LESS):
        with pytest.raises(FirewallError, match=r"^no$"):
            soon(firewall.ensure, policy)
    backend.refused.clear()
    soon(firewall.ensure, PLAIN)
    assert backend.kernel == {"br-1": PLAIN}


def test_a_removal_that_failed_is_logged_and_then_waited_for(
    backend: Remembering, caplog: pytest.LogCaptureFixture
) -> None:
    soon(firewall.ensure, PLAIN)
    backend.refused["br-1"] = FirewallError("no")
    soon(firewall.ensure, LESS)
    soon(firewall.wait_until_applied)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "firewall: rules of br-1 cannot be removed: no")
    ]
    with pytest.raises(FirewallError):
        soon(firewall.ensure, LESS)


def test_another_label_is_not_only_a_removal(backend: Remembering) -> None:
    """All rules are written again, since it is in their comments."""
    soon(firewall.ensure, PLAIN)
    backend.refused["br-1"] = FirewallError("no")
    with pytest.raises(FirewallError):
        soon(firewall.ensure, replace(PLAIN, network="0123456789ab"))


def test_a_callers_dict_that_grew_is_a_change(backend: Remembering) -> None:
    ports: dict[str, tuple[Published, ...]] = {}
    soon(firewall.ensure, replace(PLAIN, published=ports))
    ports["e"] = (PORT,)
    backend.gate.clear()
    asked = begin(firewall.ensure, replace(PLAIN, published=ports))
    with pytest.raises(TimeoutError):
        asked.result(SHORT)


# --------------------------------------------------------------------------------------------------------- many at once


def test_what_was_asked_meanwhile_is_applied_at_once(backend: Remembering) -> None:
    backend.gate.clear()
    asked = [begin(firewall.ensure, on("first"))]
    assert backend.entered.wait(PATIENCE)
    asked += [begin(firewall.ensure, on(f"br-{number}")) for number in range(20)]
    until(lambda: len(firewall.keeper.waiting) == 20)
    backend.gate.set()
    for each in asked:
        each.result(PATIENCE)
    assert [len(call) for call in backend.calls] == [1, 20]


@pytest.mark.parametrize("error", [FirewallError("no"), KeyError("a bug")])
def test_one_that_fails_does_not_hurt_the_others(backend: Remembering, error: Exception) -> None:
    backend.gate.clear()
    backend.refused["bad"] = error
    begin(firewall.ensure, on("first"))
    assert backend.entered.wait(PATIENCE)
    bad = begin(firewall.ensure, on("bad"))
    good = [begin(firewall.ensure, on(f"br-{number}")) for number in range(5)]
    until(lambda: len(firewall.keeper.waiting) == 6)
    backend.gate.set()
    for each in good:
        each.result(PATIENCE)
    with pytest.raises(type(error)):
        bad.result(PATIENCE)
    assert backend.kernel.keys() == {"first", *(f"br-{number}" for number in range(5))}


def test_where_the_program_cannot_be_had_it_is_not_tried_for_each(backend: Remembering) -> None:
    """It may be one that does not end, for which the keeper waits."""
    backend.gate.clear()
    backend.refused["bad"] = Unavailable("iptables-restore has not ended")
    begin(firewall.ensure, on("first"))
    assert backend.entered.wait(PATIENCE)
    asked = [begin(firewall.ensure, on(name)) for name in ("bad", "br-1", "br-2")]
    until(lambda: len(firewall.keeper.waiting) == 3)
    backend.gate.set()
    for each in asked:
        with pytest.raises(Unavailable, match="has not ended"):
            each.result(PATIENCE)
    assert [len(call) for call in backend.calls] == [1, 3]


def test_the_last_word_of_many_is_in_force(backend: Remembering) -> None:
    def often(number: int) -> None:
        for turn in range(50):
            firewall.ensure(on(f"br-{number}", masquerade=turn % 2 == 0))
            firewall.ensure(on("shared", icc=number % 2 == 0))
            if turn % 5 == 0:
                firewall.delete(f"br-{number}")

    for each in [begin(often, number) for number in range(6)]:
        each.result(PATIENCE * 2)
    soon(firewall.wait_until_applied)
    assert backend.kernel == firewall.keeper.policies
    assert len(backend.kernel) == 7


# ------------------------------------------------------------------------------------------------------------ the watch


def test_a_change_by_others_is_looked_at_and_repaired(
    backend: Remembering, announcing: Announcing, caplog: pytest.LogCaptureFixture
) -> None:
    soon(firewall.ensure, PLAIN)
    backend.kernel.clear()
    announcing.somebody_changes()
    until(lambda: backend.kernel == {"br-1": PLAIN})
    until(lambda: len(caplog.records) == 1)
    assert caplog.messages == ["firewall: rules of ours were changed by others and are put back"]
    assert backend.forgotten


def test_many_changes_cost_one_look(backend: Remembering, announcing: Announcing, clock: Clock) -> None:
    soon(firewall.ensure, PLAIN)
    for number in range(10):
        announcing.somebody_changes()
        until(lambda heard=number + 1: announcing.heard == heard)  # type: ignore[misc]
    turn()
    assert backend.forgotten == 0
    for _ in range(2):
        clock.now += QUIET
        turn()
        assert (backend.forgotten, len(backend.calls)) == (1, 2)


def test_a_change_that_is_not_ours_to_repair_is_not_logged(
    backend: Remembering, announcing: Announcing, caplog: pytest.LogCaptureFixture
) -> None:
    soon(firewall.ensure, PLAIN)
    announcing.somebody_changes()
    until(lambda: len(backend.calls) == 2)
    soon(firewall.wait_until_applied)
    assert not caplog.records


def test_a_refused_policy_does_not_keep_the_others_from_repair(backend: Remembering, announcing: Announcing) -> None:
    soon(firewall.ensure, PLAIN)
    backend.refused["bad"] = FirewallError("no")
    with pytest.raises(FirewallError):
        soon(firewall.ensure, on("bad"))
    backend.kernel.clear()
    announcing.somebody_changes()
    until(lambda: backend.kernel == {"br-1": PLAIN})


def test_where_changes_are_not_announced_it_looks_now_and_then(backend: Remembering, clock: Clock) -> None:
    backend.announced = False
    soon(firewall.ensure, PLAIN)
    for _ in range(2):
        turn()
        backend.kernel.clear()
        clock.now += POLL
        turn()
        assert backend.kernel == {"br-1": PLAIN}
    soon(firewall.delete, "br-1")
    looks = []
    for _ in range(3):
        clock.now += POLL
        turn()
        looks.append(backend.forgotten)
    assert looks == [3, 3, 3], "there is nothing to look after: not once more after a look that was due"


def test_at_rest_it_takes_no_time(backend: Remembering, announcing: Announcing, clock: Clock) -> None:
    """Also after a first request that failed: then there is no back end that could look."""
    backend.missing = Unavailable("no iptables here")
    with pytest.raises(Unavailable):
        soon(firewall.ensure, PLAIN)
    announcing.somebody_changes()
    until(lambda: announcing.heard == 1)
    for _ in range(2):  # what would be due is due
        clock.now += 2 * QUIET
        with pytest.raises(Unavailable):
            soon(firewall.wait_until_applied)
    rounds = announcing.rounds
    time.sleep(SHORT)
    assert announcing.rounds <= rounds + 1, "it waits, but for the round that it may have been in"
    backend.missing = None
    soon(firewall.ensure, PLAIN)
    assert backend.kernel == {"br-1": PLAIN}


# ---------------------------------------------------------------------------------------------- what goes wrong outside


def test_a_back_end_that_is_not_there_yet(backend: Remembering) -> None:
    backend.missing = Unavailable("no iptables here")
    for _ in range(2):
        with pytest.raises(Unavailable, match="no iptables here"):
            soon(firewall.ensure, PLAIN)
    backend.missing = None
    soon(firewall.ensure, PLAIN)
    assert backend.kernel == {"br-1": PLAIN}


def test_more_descriptors_than_select_can_take(backend: Remembering) -> None:
    """Each published port has one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1200:
        if hard < 1200:
            pytest.skip(f"the process may not have 1200 descriptors: the limit is {hard}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (1200, hard))
    taken = [os.open("/dev/null", os.O_RDONLY)]
    try:
        while taken[-1] < 1100:
            taken.append(fcntl.fcntl(taken[0], fcntl.F_DUPFD_CLOEXEC, 0))
        soon(firewall.ensure, PLAIN)
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert backend.kernel == {"br-1": PLAIN}


def test_the_kernel_does_not_let_us_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without CAP_NET_ADMIN. Every caller hears of it, and nobody waits for ever."""

    def refuse() -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(firewall.keeper, "announcements", refuse)
    for call in (lambda: firewall.ensure(PLAIN), lambda: firewall.delete("br-1")):
        with pytest.raises((FirewallError, Unavailable), match="not permitted"):
            soon(call)
    soon(firewall.close)


def test_a_thread_that_cannot_be_started(backend: Remembering, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading, "Thread", Refused)
        with pytest.raises((RuntimeError, FirewallError, Unavailable), match="can't start new thread"):
            firewall.ensure(PLAIN)
    soon(firewall.ensure, PLAIN)
    assert backend.kernel == {"br-1": PLAIN}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_log_that_fails_does_not_end_the_watch(backend: Remembering, announcing: Announcing) -> None:
    def refuse(_: logging.LogRecord) -> bool:
        raise ValueError("the filter of somebody's logging")

    logger = logging.getLogger("netplugin_sdk")
    before = threading.enumerate()
    soon(firewall.ensure, PLAIN)
    (thread,) = (each for each in threading.enumerate() if each.name == "firewall" and each not in before)
    logger.addFilter(refuse)
    try:
        backend.kernel.clear()
        announcing.somebody_changes()
        until(lambda: backend.kernel == {"br-1": PLAIN})
        soon(firewall.ensure, on("br-2"))
        thread.join(PATIENCE)  # its last words are pytest's warning, which is this test's
    finally:
        logger.removeFilter(refuse)


# -------------------------------------------------------------------------------------------------------------- the end


def test_close_finishes_what_was_asked_for(backend: Remembering) -> None:
    soon(firewall.ensure, PLAIN)
    backend.gate.clear()
    soon(firewall.ensure, LESS)
    added = begin(firewall.ensure, on("br-2"))
    until(lambda: "br-2" in firewall.keeper.policies)
    closed = begin(firewall.close)
    with pytest.raises(TimeoutError):
        closed.result(SHORT)
    backend.gate.set()
    closed.result(PATIENCE)
    added.result(PATIENCE)
    assert backend.kernel == {"br-1": LESS, "br-2": on("br-2")}


def test_close_of_nothing_and_again(backend: Remembering) -> None:
    soon(firewall.close)
    soon(firewall.wait_until_applied)
    soon(firewall.ensure, PLAIN)
    soon(firewall.close)
    soon(firewall.close)
    assert backend.kernel == {"br-1": PLAIN}


def test_close_ends_the_thread_and_what_it_has_open() -> None:
    soon(firewall.ensure, PLAIN)
    soon(firewall.close)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - its own descriptor is in it both times
    threads = threading.active_count()
    for _ in range(3):
        soon(firewall.ensure, PLAIN)
        soon(firewall.close)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    until(lambda: threading.active_count() <= threads)


def test_after_close_nothing_is_kept_in_force(backend: Remembering, announcing: Announcing, clock: Clock) -> None:
    soon(firewall.ensure, PLAIN)
    soon(firewall.close)
    backend.kernel.clear()
    announcing.somebody_changes()
    soon(firewall.ensure, on("br-2"))
    announcing.somebody_changes()
    until(lambda: announcing.heard > 1)
    clock.now += QUIET
    turn()
    assert backend.forgotten == 1
    assert backend.kernel == {"br-2": on("br-2")}


def test_a_request_while_the_other_closes(backend: Remembering) -> None:
    """It is answered, and when it has been, it is in force; whether before or after the close."""
    ended = threading.Event()

    def request(number: int) -> None:
        while not ended.is_set():
            firewall.ensure(on(f"br-{number}"))
            assert f"br-{number}" in backend.kernel
            firewall.delete(f"br-{number}")
            assert f"br-{number}" not in backend.kernel

    def settle() -> None:
        while not ended.is_set():
            firewall.wait_until_applied()

    def close() -> None:
        for _ in range(150):
            firewall.close()

    others = [*(begin(request, number) for number in range(3)), begin(settle)]
    try:
        for each in [begin(close) for _ in range(2)]:
            each.result(PATIENCE * 2)
    finally:
        ended.set()
    for each in others:
        each.result(PATIENCE)


def test_a_request_between_the_threads_end_and_the_end_of_close(
    backend: Remembering, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment in which the thread looks no more, and the keeper does not know it yet."""
    before = threading.enumerate()
    soon(firewall.ensure, PLAIN)
    (thread,) = (each for each in threading.enumerate() if each.name == "firewall" and each not in before)
    asked: list[Future[None]] = []
    join = thread.join

    def joined() -> None:
        join()
        asked.append(begin(firewall.ensure, on("br-2")))
        asked.append(begin(firewall.wait_until_applied))
        wait(asked, SHORT)

    monkeypatch.setattr(thread, "join", joined)
    soon(firewall.close)
    for each in asked:
        each.result(PATIENCE)
    assert backend.kernel == {"br-1": PLAIN, "br-2": on("br-2")}


# --------------------------------------------------------------------------------------------------- the kernel's words


def header(kind: int, port: int, *, length: int = 20) -> bytes:
    return firewall_header.pack(length, kind, 0, 1, port) + bytes(length + 3 & ~3)[16:]


firewall_header = KernelAnnouncements.HEADER
GENERATION = KernelAnnouncements.NEW_GENERATION


@pytest.fixture
def real_announcements() -> Iterator[Any]:
    """On a socket pair."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    heard = socket.socket.__new__(KernelAnnouncements)
    socket.socket.__init__(heard, fileno=one.detach())
    heard.setblocking(False)
    with heard, other:
        yield heard, other


@pytest.mark.parametrize(
    ("packets", "found"),
    [
        ([], False),
        ([header(GENERATION, 7)], False),
        ([header(GENERATION, 8)], True),
        ([header(10 << 8 | 6, 8)], False),
        ([header(10 << 8 | 6, 8, length=23) + header(GENERATION, 8)], True),
        ([header(GENERATION, 7) + header(GENERATION, 8)], True),
        ([header(GENERATION, 8), header(GENERATION, 7)], True),
        ([b""], False),
        ([b"short"], False),
        ([header(GENERATION, 7, length=0)], False),
    ],
)
def test_whose_change_it_is(real_announcements: Any, packets: list[bytes], found: bool) -> None:
    heard, kernel = real_announcements
    for packet in packets:
        kernel.send(packet)
    assert heard.of_others([7]) is found
    assert heard.of_others([7]) is False, "all has been read"
