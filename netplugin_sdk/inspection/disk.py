"""A plugin's state on disk, read while the plugin writes; and the plugin's process."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from netplugin_sdk.core.store import Store, StoredNetwork
from netplugin_sdk.errors import DriverError, NotFound, Unavailable
from netplugin_sdk.protocol.options import DriverOptions

_TRIES = 50
_WAL_HEADER = 32  # bytes: https://www.sqlite.org/fileformat2.html#the_write_ahead_log


def read(folder: Path) -> Mapping[str, StoredNetwork[DriverOptions]]:
    """The networks by id, with their endpoints; options are to be read raw, since the driver's class is not known.

    The plugin holds SQLite's lock, so a copy is read. The log takes precedence over the file, and the log
    only grows until all of it is in the file; then it begins again, under another header. So if the header is the same
    before the file is read and after the log is, the log has all that the file has, and a torn end of it, which its
    checksums tell, is a transaction that was not complete.

    Raises:
        NotFound: there is no state file.
        Unavailable: it cannot be read, or is damaged; the text says why.
    """
    with tempfile.TemporaryDirectory(prefix="netplugin-") as name:
        copy = Path(name)
        try:
            _copy(folder, copy)
            store = Store(copy, DriverOptions)
        except FileNotFoundError:
            raise NotFound(f"there is no {folder / 'state.db'}") from None
        except OSError as error:
            raise Unavailable(f"cannot read the state folder {folder}: {error.strerror}") from error
        except DriverError as error:
            raise Unavailable(str(error).replace(name, str(folder))) from error
        store.close()
        return store.networks


def _copy(folder: Path, copy: Path) -> None:
    file, log = folder / "state.db", folder / "state.db-wal"
    for _ in range(_TRIES):
        before = _generation(file, log)
        content = file.read_bytes()
        newer = log.read_bytes() if before[1] is not None and log.exists() else b""
        if _generation(file, log) == before:
            (copy / file.name).write_bytes(content)
            if newer:
                (copy / log.name).write_bytes(newer)
            return
        time.sleep(0.02)
    raise Unavailable(f"the state file {file} changes too quickly to be read")


def _generation(file: Path, log: Path) -> tuple[int, bytes | None, int]:
    """A mark that stays the same while the log only grows; without a log, while the file is not written."""
    found = file.stat()
    try:
        with log.open("rb") as opened:
            return found.st_ino, opened.read(_WAL_HEADER), 0
    except FileNotFoundError:
        return found.st_ino, None, found.st_mtime_ns


def holder(folder: Path) -> int | None:
    """The process that serves from this state folder, by its id here; None if there is none, or it cannot be seen.

    The lock says its pid, as it is in the plugin's own PID namespace; so the process counts that has the lock open.
    """
    lock = folder / "lock"
    try:
        found, said = lock.stat(), lock.read_text().removeprefix("pid ")
    except OSError:
        return None
    here = [int(process.name) for process in Path("/proc").iterdir() if process.name.isdecimal()]
    for pid in sorted(here, key=lambda pid: str(pid) != said):
        if any(os.path.samestat(found, opened) for opened in _opened(pid)):
            return pid
    return None


def _opened(pid: int) -> Iterator[os.stat_result]:
    with suppress(OSError):  # it has ended, or is somebody else's
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                yield descriptor.stat()
