"""The plugin's folder on disk, and SQLite files in it as a plugin needs them."""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from netplugin_sdk.errors import Conflict, Unavailable

_log = logging.getLogger("netplugin_sdk")


class Folder:
    """A folder that this process alone uses, until `close`. It is made where it is missing, with mode 0700.

    Raises:
        Conflict: another process holds it.
        Unavailable: it cannot be used; the text says why.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            held = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Unavailable(f"cannot use the state folder {path}: {error.strerror}") from error
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(held, 20, 0).decode() or "another process"
            os.close(held)
            raise Conflict(f"the state folder {path} is in use by {holder}") from None
        os.ftruncate(held, 0)
        os.pwrite(held, f"pid {os.getpid()}".encode(), 0)
        self._held: int | None = held

    def close(self) -> None:
        """Let it go. May be called again."""
        if self._held is not None:
            os.close(self._held)
            self._held = None


class Database:
    """A SQLite file in a folder that this process holds, or one in memory. For one thread at a time.

    Args:
        file: its path; None keeps it in memory.
        migrations: SQL that leads from each version of the file to the next. An empty file has version 0. Released ones
            never change. A file of an older version stays beside the new one, as ``FILE.version-N``.

    Raises `Unavailable` if it cannot be used, or is newer than this SDK; then it is left as it is.
    """

    def __init__(self, file: Path | None, migrations: Sequence[str]) -> None:
        self.name = ":memory:" if file is None else str(file)
        try:
            self._db = sqlite3.connect(self.name, isolation_level=None, check_same_thread=False)
            self._prepare(migrations)
        except sqlite3.Error as error:
            self.close()
            raise Unavailable(f"cannot use the state file {self.name}: {error}") from error
        except BaseException:
            self.close()
            raise

    def _prepare(self, migrations: Sequence[str]) -> None:
        db = self._db
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if not 0 <= version <= len(migrations):
            raise Unavailable(
                f"the state file {self.name} has version {version} and this SDK knows versions up to "
                f"{len(migrations)}; it is left as it is"
            )
        db.execute("PRAGMA page_size = 1024")  # a page is the least that is written, and a row has about this size
        db.execute("PRAGMA locking_mode = EXCLUSIVE")  # the folder is locked already; spares four calls a statement
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA wal_autocheckpoint = 8000")  # 8 MB: to move them into the file waits for the disk
        # A killed process loses nothing that is in the log, synced or not; a `synced` write also survives a power cut.
        db.execute("PRAGMA synchronous = NORMAL")
        if 0 < version < len(migrations):
            kept = Path(f"{self.name}.version-{version}")
            kept.unlink(missing_ok=True)  # half of one
            db.execute("VACUUM INTO ?", (str(kept),))
            _log.warning("the state file %s becomes version %d; the old one is %s", self.name, len(migrations), kept)
        for number, script in enumerate(migrations[version:], version + 1):
            db.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT")

    def read(self, query: str) -> list[tuple[Any, ...]]:
        """The rows. Raises `Unavailable` if they cannot be read."""
        try:
            return self._db.execute(query).fetchall()
        except sqlite3.Error as error:
            raise Unavailable(f"cannot use the state file {self.name}: {error}") from error

    def write(self, statement: str, values: Sequence[object], *, synced: bool = False) -> int | None:
        """One statement, which is one transaction; the key of a row that it inserted.

        `synced`: when this returns it survives a power cut, with all that was written before.

        Raises `Unavailable` if it cannot be written; then nothing is.
        """
        try:
            if synced:
                self._db.execute("PRAGMA synchronous = FULL")
            try:
                return self._db.execute(statement, values).lastrowid
            finally:
                if synced:
                    self._db.execute("PRAGMA synchronous = NORMAL")
        except sqlite3.Error as error:
            raise Unavailable(f"cannot write the plugin's state: {error}") from error

    def close(self) -> None:
        """Close the file. Nothing can be written afterwards."""
        with suppress(AttributeError):  # it could not be opened
            self._db.close()
