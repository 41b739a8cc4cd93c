"""The packet filter and the address translation of bridges, beside Docker's own.

A `Policy` states the traffic that one bridge, or a group of interfaces, may have; `ensure` puts it in force, `delete`
removes it:

    firewall.ensure(Policy(bridge="br-1", subnets=network.subnets, internal=network.internal))

Policies are kept in force: when somebody flushes the firewall, firewalld reloads or the engine restarts, missing rules
are put back. The rules themselves are in `netplugin_sdk.linux.rules`; they are written with iptables or with nftables,
whichever Docker uses on this host.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import re
import select
import shutil
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Literal, Protocol, Self, TypeAlias

from netplugin_sdk.errors import Unavailable
from netplugin_sdk.linux import iptables, nftables, sysctls
from netplugin_sdk.linux.programs import run
from netplugin_sdk.linux.rules import GROUP, FirewallError, Mode, Policy, check, rules

__all__ = [
    "GROUP",
    "BackendName",
    "FirewallError",
    "Keeper",
    "Mode",
    "Policy",
    "bridges",
    "close",
    "delete",
    "detect",
    "ensure",
    "ensure_forwarding",
    "keeper",
    "use",
    "wait_until_applied",
]

_log = logging.getLogger("netplugin_sdk")

BackendName: TypeAlias = Literal["iptables", "nftables"]

_FORWARDING = {4: ("net/ipv4/ip_forward",), 6: ("net/ipv6/conf/default/forwarding", "net/ipv6/conf/all/forwarding")}
_LISTING = (
    ("iptables", "iptables-save"),
    ("iptables", "ip6tables-save"),
    ("nftables", "nft", "list", "ruleset", "inet"),
)
_COMMENT = re.compile(r'"netplugin_sdk:([^" ]+)(?: network (\w+))?[" ]')  # `Policy.comment`
_CHAIN = re.compile(r"^:(\S+) ", re.MULTILINE)


def ensure(policy: Policy) -> None:
    """Put a policy in force; another one for the same bridge is replaced, in one transaction for each IP version.

    New rules are in force when this returns, except rules that another program removed in the last `Keeper.quiet`
    seconds. If the policy only removes rules, that is done at once in the background (some 20 ms: the kernel waits for
    its readers), and failures are logged.

    Raises `FirewallError` if the kernel or the program refuses, `Unavailable` if the program is not installed.
    """
    keeper.submit(policy.bridge, policy)


def delete(bridge: str) -> None:
    """Remove all rules that `ensure` made for a bridge of this name, if there are any. Returns when they are gone.

    The chains shared by all bridges go with the last one. Raises as `ensure` does, and `InvalidRequest` if the name
    cannot be written into a rule.
    """
    check(bridge)
    keeper.submit(bridge, None)


def ensure_forwarding(version: int) -> None:
    """Have this host forward packets of one IP version.

    If it did not before, the policy of FORWARD becomes DROP, as with Docker: packets that no rule accepts are dropped.
    Otherwise the host would be a router for everybody.

    Raises `FirewallError` if it is refused, or if Docker uses nftables here: then forwarding is left to the
    administrator; `SysctlError` if the kernel refuses, `Unavailable` if iptables is not installed.
    """
    for name in _FORWARDING[version]:
        if sysctls.read(name) != "1":
            _forward_nothing_else(version)
            sysctls.ensure(name, 1)
            _log.warning("%s was 0 and is 1 now; packets that no rule accepts are not forwarded", name)


def _forward_nothing_else(version: int) -> None:
    if (keeper.chosen or detect()) == "nftables":
        raise FirewallError("firewall: with nftables the administrator must turn forwarding on and restrict it")
    iptables.set_policy(version)


def detect() -> BackendName:
    """The back end that Docker uses on this host."""
    return "nftables" if nftables.used_by_docker() else "iptables"


def bridges() -> dict[str, str]:
    """All bridges with rules of this SDK on this host, from any process, each with its `Policy.network`.

    Raises `Unavailable` if a program does not end.
    """
    found: dict[str, str] = {}
    for package, *command in _LISTING:
        if shutil.which(command[0]) is not None:
            _, listed, _ = run(deque(maxlen=1), package, *command)
            chains = set(_CHAIN.findall(listed))  # the rules that lead to them have comments, too
            for bridge, network in _COMMENT.findall(listed):
                if bridge not in chains:
                    found[bridge] = network or found.get(bridge, "")
    return found


def wait_until_applied() -> None:
    """Wait until all earlier requests are in force."""
    keeper.wait_until_applied()


def use(backend: BackendName | None) -> None:
    """Write rules with this back end, not with the one that Docker uses here. Call it before anything else."""
    close()
    keeper.chosen = backend


def close() -> None:
    """Finish all requests and stop watching; rules stay. The next use starts again, without any policy.

    Called automatically when the interpreter exits. The watch stays in the network namespace of the thread whose call
    started it: a process that changes its namespace closes first.
    """
    keeper.close()


class Backend(Protocol):
    """Writes rules into the kernel."""

    @property
    def pids(self) -> Collection[int]:
        """Ids of the processes that made its latest changes."""

    @property
    def announced(self) -> bool:
        """Whether the kernel announces changes."""

    def apply(self, policies: Mapping[str, Policy | None]) -> bool:
        """Put these policies in force; None removes the rules of a bridge. Returns whether anything was changed."""

    def forget(self) -> None:
        """Read the rules again before the next change: another program may have changed ours."""


class Announcements(Protocol):
    """Announcements of changes to the firewall."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def fileno(self) -> int:
        """The descriptor that is readable when something was announced."""

    def of_others(self, pids: Collection[int]) -> bool:
        """Read all announcements. Whether a process changed something that is none of these."""


class KernelAnnouncements(socket.socket):
    """The kernel's, of changes to nf_tables, with the process that made each (linux/netfilter/nfnetlink.h)."""

    _NETLINK_NETFILTER = 12
    _GROUP = 1 << (7 - 1)  # NFNLGRP_NFTABLES
    NEW_GENERATION = 10 << 8 | 15  # NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWGEN
    HEADER = struct.Struct("=IHHII")  # struct nlmsghdr

    def __init__(self) -> None:
        super().__init__(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, self._NETLINK_NETFILTER)
        self.bind((0, self._GROUP))

    def of_others(self, pids: Collection[int]) -> bool:
        """Read all announcements. Whether a process changed something that is none of these."""
        found = False
        while True:
            try:
                packet = self.recv(65536)
            except BlockingIOError:
                return found
            except OSError:  # ENOBUFS: more came than there was room for
                found = True
                continue
            place = 0
            while place + self.HEADER.size <= len(packet):
                length, kind, _, _, port = self.HEADER.unpack_from(packet, place)
                found = found or (kind == self.NEW_GENERATION and port not in pids)
                place += max(self.HEADER.size, length + 3 & ~3)


BACKENDS: Mapping[BackendName, Callable[[], Backend]] = {"iptables": iptables.Backend, "nftables": nftables.Backend}
"""The back ends, by name."""


class Keeper:
    """One thread that applies policies and keeps them in force. Requests that come together are applied together."""

    def __init__(
        self,
        *,
        quiet: float = 0.2,
        poll: float = 5.0,
        backends: Mapping[BackendName, Callable[[], Backend]] = BACKENDS,
        announcements: Callable[[], Announcements] = KernelAnnouncements,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quiet = quiet
        """Seconds from another program's change to a comparison: changes come in bursts."""
        self.poll = poll
        """Seconds between comparisons where changes are not announced."""
        self.backends = backends
        """Makers of the back ends, by name."""
        self.announcements = announcements
        """Opens the source of announcements; called once for each start of the thread."""
        self.clock = clock
        """The time in seconds, from any start; never goes back."""
        self.chosen: BackendName | None = None
        """The back end that `use` chose; None for the one that Docker uses here."""
        self.comparisons = 0
        """How many times the firewall was compared with the policies without a request."""
        self._changed = threading.Condition()
        self._policies: dict[str, Policy] = {}
        self._in_force: dict[str, Policy] = {}  # answered, and nothing asked since
        self._asked: dict[str, list[Future[None]]] = {}
        self._thread: threading.Thread | None = None
        self._wake = -1
        self._closing = False

    @property
    def policies(self) -> Mapping[str, Policy]:
        """The policies to be kept in force, by bridge, as they are now."""
        with self._changed:
            return dict(self._policies)

    @property
    def waiting(self) -> frozenset[str]:
        """The bridges with a request that the thread has not begun."""
        with self._changed:
            return frozenset(self._asked)

    def submit(self, bridge: str, policy: Policy | None) -> None:
        """Put a policy in force, as `ensure`; None removes it, as `delete`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closing)
            done = self._ask(bridge)
            before = self._in_force.pop(bridge, None)
            if policy is None:
                self._policies.pop(bridge, None)
            else:
                self._policies[bridge] = policy
            wait = policy is None or before is None or not _only_removes(before, policy)
        if wait:
            done.result()
        else:
            done.add_done_callback(partial(_log_failure, bridge))

    def wait_until_applied(self) -> None:
        """Wait until all earlier requests are in force."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closing)
            done = self._ask("") if self._thread is not None else None
        if done is not None:
            done.result()

    def _ask(self, bridge: str) -> Future[None]:
        if self._thread is None:
            wake = os.eventfd(0, os.EFD_CLOEXEC)
            thread = threading.Thread(target=self._run, args=(wake,), name="firewall", daemon=True)
            try:
                thread.start()
            except BaseException:
                os.close(wake)
                raise
            self._thread, self._wake = thread, wake
        done: Future[None] = Future()
        self._asked.setdefault(bridge, []).append(done)
        os.eventfd_write(self._wake, 1)
        return done

    def close(self) -> None:
        """Finish the requests, end the thread and forget all policies."""
        with self._changed:
            if (thread := self._thread) is not None:
                self._closing = True
                os.eventfd_write(self._wake, 1)
                self._changed.wait_for(lambda: self._thread is not thread)
            else:
                self._policies.clear()
        if thread is not None:
            thread.join()

    def _run(self, wake: int) -> None:
        reason: Exception = FirewallError("firewall: closed before the request was done")
        try:
            self._watch(wake)
        except Exception as error:
            _log.exception("firewall: the watch has failed; the next request starts it again")
            reason = FirewallError(f"firewall: {error}")
            reason.__cause__ = error
        finally:
            with self._changed:
                os.close(wake)
                left, self._asked = self._asked, {}
                self._in_force.clear()
                if self._closing:  # else the next thread needs them
                    self._policies.clear()
                self._thread, self._closing = None, False
                self._changed.notify_all()
            for futures in left.values():
                for future in futures:
                    future.set_exception(reason)

    def _watch(self, wake: int) -> None:
        backend: Backend | None = None
        look_at = math.inf
        with self.announcements() as announcements:
            poll = select.poll()
            poll.register(wake, select.POLLIN)
            poll.register(announcements, select.POLLIN)
            while True:
                seconds = look_at - self.clock()
                ready = dict(poll.poll(None if look_at == math.inf else max(0.0, seconds * 1000)))
                if wake in ready:
                    os.eventfd_read(wake)
                others = announcements.of_others(backend.pids if backend else ())
                if others and backend is not None:
                    # The next change does not read the rules first: reading takes longer the more rules there are,
                    # and few changes are to ours. A change that does not fit fails, and is made after reading.
                    look_at = min(look_at, self.clock() + self.quiet)
                with self._changed:
                    asked, self._asked = self._asked, {}
                    policies = dict(self._policies)
                    closing = self._closing
                if asked:
                    backend = self._answer(backend, asked, policies)
                if closing:
                    return
                if backend is not None and self.clock() >= look_at:
                    backend.forget()
                    _repair(backend, policies)
                    self.comparisons += 1
                    look_at = math.inf
                if look_at == math.inf and policies and backend is not None and not backend.announced:
                    look_at = self.clock() + self.poll

    def _answer(
        self, backend: Backend | None, asked: dict[str, list[Future[None]]], policies: dict[str, Policy]
    ) -> Backend | None:
        try:
            backend = backend or self.backends[self.chosen or detect()]()
            _, failed = _apply(backend, {bridge: policies.get(bridge) for bridge in asked if bridge})
        except Exception as error:
            failed = dict.fromkeys(asked, error)
        with self._changed:
            for bridge in asked.keys() & policies.keys() - failed.keys() - self._asked.keys():
                self._in_force[bridge] = policies[bridge]
        for bridge, futures in asked.items():
            for future in futures:
                if bridge in failed:
                    future.set_exception(failed[bridge])
                else:
                    future.set_result(None)
        return backend


def _only_removes(before: Policy, after: Policy) -> bool:
    """Whether all rules of `after` are among those of `before`."""
    return (before.versions, before.network) == (after.versions, after.network) and all(
        set(rules(after, version)) <= set(rules(before, version)) for version in after.versions
    )


def _apply(backend: Backend, changes: Mapping[str, Policy | None]) -> tuple[bool, dict[str, Exception]]:
    """Apply them together; if that fails, one by one. Whether anything was changed, and the errors by bridge."""
    if not changes:
        return False, {}
    try:
        return backend.apply(changes), {}
    except Exception as error:
        if len(changes) == 1 or isinstance(error, Unavailable):  # then it is so for all of them
            return False, dict.fromkeys(changes, error)
    parts = [_apply(backend, {bridge: policy}) for bridge, policy in changes.items()]
    return any(changed for changed, _ in parts), {bridge: error for _, each in parts for bridge, error in each.items()}


def _repair(backend: Backend, policies: dict[str, Policy]) -> None:
    changed, failed = _apply(backend, policies)
    if changed:
        _log.warning("firewall: rules of ours were changed by others and are put back")
    for bridge, error in failed.items():
        _log.error("firewall: rules of %s were changed by others and cannot be put back: %s", bridge, error)


def _log_failure(bridge: str, done: Future[None]) -> None:
    if (error := done.exception()) is not None:
        _log.error("firewall: rules of %s cannot be removed: %s", bridge, error)


keeper = Keeper()
"""The keeper of this process, which the functions above use."""
atexit.register(close)
