"""The netlink sockets that all operations on links share, and the reading of one interface."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial, wraps
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeAlias, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from netplugin_sdk.errors import Conflict, DriverError, InvalidRequest

IFF_UP = 0x1  # linux/if.h

P = ParamSpec("P")
T = TypeVar("T")


class LinkError(DriverError):
    """The kernel refused to make, change or remove an interface. The text has its name, the attempt and the reason."""

    def __init__(self, what: str, error: NetlinkError | OSError) -> None:
        code, text = error.args[:2]
        reason = os.strerror(code)
        # The kernel often says more than the number does (NETLINK_EXT_ACK): "mtu less than device minimum".
        super().__init__(f"{what}: {reason}" if text == reason else f"{what}: {reason} ({text})")


def operation(function: Callable[P, T]) -> Callable[P, T]:
    """Run the function in a worker thread, where `kernel` is a netlink socket; if called in one, run it directly."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if getattr(_current, "kernel", None) is not None:
            return function(*args, **kwargs)
        return _workers.run(partial(function, *args, **kwargs))

    return run


def kernel() -> Any:
    """This thread's `pyroute2.IPRoute`, within an `operation`."""
    return _current.kernel


def close() -> None:
    """Wait for the operations under way, then end the threads and close their sockets; the next use starts them again.

    A worker stays in the network namespace of the thread whose call started it.
    """
    _workers.close()


_current = threading.local()
_Job: TypeAlias = "tuple[Future[Any], Callable[[], Any]]"


class _Workers:
    """A few threads with a netlink socket each, which the first operations start.

    Threads of our own, because an IPRoute keeps an event loop and a socket for every thread that ever used it, and
    only close() in that same thread frees them: the callers' threads are many and short-lived. More than one,
    because the kernel holds a thread for 16 to 36 ms while it deletes a link. A complete operation is one job, since
    each change of threads costs a quarter of a netlink request.
    """

    _MAX = 4

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def run(self, job: Callable[[], T]) -> T:
        """Run a job in a worker. Returns or raises as the job does."""
        future: Future[T] = Future()
        with self._lock:  # so that no job comes behind the end marks of close()
            self._jobs.put((future, job))
            if len(self._threads) < self._MAX:
                thread = threading.Thread(
                    target=_work, args=(self._jobs,), name=f"netlink-{len(self._threads)}", daemon=True
                )
                thread.start()
                self._threads.append(thread)
        return future.result()

    def close(self) -> None:
        with self._lock:
            jobs, self._jobs = self._jobs, SimpleQueue()
            threads, self._threads = self._threads, []
        for _ in threads:
            jobs.put(None)
        for thread in threads:
            thread.join()


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    while (found := jobs.get()) is not None:
        future, job = found
        try:
            if getattr(_current, "kernel", None) is None:
                _current.kernel = IPRoute(ext_ack=True, strict_check=True)
            future.set_result(job())
        except DriverError as error:
            future.set_exception(error)
        except Exception as error:
            # Not an answer of the kernel but a failure to get one: do not use this socket any more.
            _close_socket()
            future.set_exception(LinkError("netlink socket", error) if isinstance(error, OSError) else error)
        del found, future, job  # an idle worker keeps nothing alive
    _close_socket()


def _close_socket() -> None:
    ipr, _current.kernel = getattr(_current, "kernel", None), None
    if ipr is not None:
        ipr.close()


_workers = _Workers()


def check_name(name: str) -> None:
    """Raise `InvalidRequest` unless a name is valid for the kernel (net/core/dev.c, dev_valid_name) and has no ``%``.

    The kernel would replace that with a number.
    """
    if (
        not name.isprintable()  # first: neither control characters nor lone surrogates reach encode()
        or set(name) & set(" /:%")
        or name in (".", "..")
        or not 1 <= len(name.encode()) <= 15
    ):
        raise InvalidRequest(
            f"{name!r} cannot be the name of an interface: that is 1 to 15 bytes without white space, '/', ':' or '%'"
        )


def index_of(name: str) -> int | None:
    """The index of an interface; None if there is none. By ioctl: 5 µs, where a netlink request takes 250."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def required_index(cannot: str, master: str) -> int:
    """The index of an interface. Raises `LinkError`, with `cannot` as the start of its text, if there is none."""
    if (index := index_of(master)) is None:
        raise LinkError(cannot, OSError(errno.ENODEV, os.strerror(errno.ENODEV)))
    return index


def name_of(index: int) -> str | None:
    """The name of an interface; None if it is gone."""
    try:
        return socket.if_indextoname(index)
    except OSError:  # gone
        return None


def message_of(name: str) -> Any | None:
    """The kernel's RTM_NEWLINK message of this interface, if there is one."""
    try:
        return kernel().link("get", ifname=name)[0]
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise LinkError(f"interface {name}: cannot read", error) from error


def kind_of(message: Any) -> str | None:
    """The kind of an interface: ``bridge``, ``veth`` …"""
    kind: str | None = message.get(("linkinfo", "kind"))
    return kind


def a_kind(kind: str | None) -> str:
    """A kind in words."""
    return f"a {kind}" if kind else "a physical or loopback"


def given(**attributes: object) -> dict[str, Any]:
    """The attributes that are not None."""
    return {name: value for name, value in attributes.items() if value is not None}


def add(cannot: str, kind: str, name: str, same: Mapping[Any, object], /, **attributes: object) -> Any | None:
    """Create an interface. None if it is new; else the message of the existing one.

    The existing one must be of this `kind`, and its attributes must equal `same`: those that tell one interface of the
    kind from another. Raises `Conflict` if it differs, `NetlinkError` if the kernel refuses.
    """
    try:
        kernel().link("add", kind=kind, ifname=name, **attributes)
    except NetlinkError as error:
        if error.code != errno.EEXIST or (there := message_of(name)) is None:
            raise
        if kind_of(there) != kind or any(there.get(attribute) != value for attribute, value in same.items()):
            raise Conflict(f"{cannot}: {a_kind(kind_of(there))} interface has this name") from None
        return there
    return None
