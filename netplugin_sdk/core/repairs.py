"""Repairs, which the SDK does of its own accord: their counts, and how their failures are logged."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from netplugin_sdk.errors import DriverError

_log = logging.getLogger("netplugin_sdk")

Repair: TypeAlias = Literal["reconciled", "lost", "half_done", "container_gone", "unknown_to_docker", "failed"]
"""Work that no call asked for: all networks were compared with the kernel; an interface or address of ours vanished; a
half-done operation was finished or undone; an endpoint was deleted, since its container ended unnoticed; a network or
an endpoint was deleted, since Docker does not know it; one of these failed."""


class Repairs:
    """Counts repairs, and runs steps that no caller waits for. For any thread."""

    def __init__(self) -> None:
        self._counts: dict[Repair, int] = dict.fromkeys(get_args(Repair), 0)
        self._lock = threading.Lock()

    @property
    def counts(self) -> Mapping[Repair, int]:
        """How often each was done."""
        return MappingProxyType(self._counts)

    def count(self, repair: Repair) -> None:
        """Count one."""
        with self._lock:
            self._counts[repair] += 1

    def run_logged(self, what: str, record: object, step: Callable[[], object]) -> bool:
        """Whether `step` succeeded. An exception is logged as ``cannot WHAT RECORD`` and counted as failed."""
        try:
            step()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise  # Ctrl-C while the plugin starts
            if isinstance(error, DriverError):
                _log.error("cannot %s %r: %s", what, record, error)
            else:  # SystemExit, too: a driver's sys.exit must not end the thread that repairs
                _log.exception("cannot %s %r", what, record)
            self.count("failed")
            return False
        return True
