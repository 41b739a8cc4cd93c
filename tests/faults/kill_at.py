"""Run as a program: kill a process with SIGKILL as it enters its Nth call that changes something, and say which it was.

    kill_at.py PID N

It counts over all threads: what writes to a file or a socket, names or removes a file, opens a port, starts a program
or waits for one; not what goes to the log or wakes a thread. A program that the process starts is not killed: it goes
on alone, as it does in life. The first line that is printed is "attached", then each call as it is counted. It ends
with the process.

By ptrace(2), which counts over all threads; ``strace --inject=…:when=N`` counts in each by itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from pathlib import Path

_NUMBERS = {
    "x86_64": {
        1: "write",
        18: "pwrite64",
        20: "writev",
        44: "sendto",
        46: "sendmsg",
        49: "bind",
        50: "listen",
        56: "clone",
        57: "fork",
        58: "vfork",
        61: "wait4",
        74: "fsync",
        75: "fdatasync",
        77: "ftruncate",
        82: "rename",
        83: "mkdir",
        87: "unlink",
        257: "openat",
        263: "unlinkat",
        435: "clone3",
    },
    "aarch64": {
        34: "mkdirat",
        35: "unlinkat",
        38: "renameat",
        46: "ftruncate",
        56: "openat",
        64: "write",
        66: "writev",
        68: "pwrite64",
        82: "fsync",
        83: "fdatasync",
        200: "bind",
        201: "listen",
        206: "sendto",
        211: "sendmsg",
        220: "clone",
        260: "wait4",
        435: "clone3",
    },
}[platform.machine()]
_CLONES = {"clone", "clone3"}
_WRITES = {"write", "writev"}

# linux/ptrace.h
_CONT, _SYSCALL, _SEIZE, _INTERRUPT, _GET_SYSCALL_INFO, _LISTEN = 7, 24, 0x4206, 0x4207, 0x420E, 0x4208
_TRACESYSGOOD, _TRACECLONE, _EVENT_STOP = 0x1, 0x8, 128
_ENTRY = 1
_INFO = struct.Struct("=B3xIQQQ6Q")
_WALL = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, thread: int, address: int = 0, data: object = None) -> None:
    if _libc.ptrace(request, thread, address, data) == -1:
        code = ctypes.get_errno()
        if code != errno.ESRCH:  # it is being killed
            raise OSError(code, os.strerror(code))


def _attach(pid: int) -> None:
    """To all threads: looked for until there is none that is not known."""
    known: set[int] = set()
    while new := {int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()} - known:
        for thread in new:
            _ptrace(_SEIZE, thread, 0, _TRACESYSGOOD | _TRACECLONE)
            _ptrace(_INTERRUPT, thread)
        known |= new


class _Counter:
    def __init__(self, pid: int, at: int) -> None:
        self._pid, self._at, self._count = pid, at, 0
        self._buffer = ctypes.create_string_buffer(128)

    def stopped(self, thread: int) -> None:
        """At a system call's entry or exit."""
        _ptrace(_GET_SYSCALL_INFO, thread, len(self._buffer), ctypes.cast(self._buffer, ctypes.c_void_p))
        operation, _, _, _, number, first, second, third, *_ = _INFO.unpack_from(self._buffer)
        name = _NUMBERS.get(number)
        if operation != _ENTRY or name is None or not self._changes(name, first, second, third):
            return
        self._count += 1
        print(self._count, name, self._target(name, first), flush=True)
        if self._count == self._at:
            os.kill(self._pid, signal.SIGKILL)

    def _changes(self, name: str, first: int, second: int, third: int) -> bool:
        if name == "openat":
            return bool(third & os.O_CREAT)
        if name == "clone":
            return not first & 0x10000  # CLONE_THREAD
        if name == "clone3":
            flags = struct.unpack("Q", self._memory(first, 8))[0]
            return not flags & 0x10000
        if name in _WRITES:
            return first != 2 and "eventfd" not in self._target(name, first)
        return True

    def _target(self, name: str, first: int) -> str:
        if name in ("openat", "clone", "clone3", "vfork", "fork", "wait4", "rename", "unlink", "unlinkat", "mkdir"):
            return ""
        try:
            return str(Path(f"/proc/{self._pid}/fd/{first}").readlink())
        except OSError:
            return ""

    def _memory(self, address: int, size: int) -> bytes:
        with Path(f"/proc/{self._pid}/mem").open("rb", 0) as memory:
            memory.seek(address)
            return memory.read(size)


def main() -> None:
    pid, at = int(sys.argv[1]), int(sys.argv[2])
    _attach(pid)
    counter = _Counter(pid, at)
    print("attached", flush=True)
    while True:
        try:
            thread, status = os.waitpid(-1, _WALL)
        except ChildProcessError:
            return
        if not os.WIFSTOPPED(status):
            continue  # a thread ended
        number, event = os.WSTOPSIG(status), status >> 16
        if number == signal.SIGTRAP | 0x80:
            counter.stopped(thread)
            number = 0
        elif event == _EVENT_STOP and number in (signal.SIGSTOP, signal.SIGTSTP):
            _ptrace(_LISTEN, thread)
            continue
        elif event:
            number = 0
        _ptrace(_SYSCALL, thread, 0, number)


if __name__ == "__main__":
    main()
