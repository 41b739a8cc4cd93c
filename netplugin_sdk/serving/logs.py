"""The log of a process that serves a plugin: standard error, as text or JSON."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, Literal

import msgspec


def configure(form: Literal["text", "json"], level: str) -> None:
    """Log to standard error in this form, from this level of the standard library's `logging` on."""
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(_TextFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Neither form shows them ("Optimization" in the documentation of `logging`).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


class _TextFormatter(logging.Formatter):
    """The standard library's, but the time is formatted once per second and not for each line."""

    _second = 0
    _text = ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002
        second = int(record.created)
        if second != self._second:  # the handler's lock is held
            self._second, self._text = second, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        return f"{self._text},{int(record.msecs):03d}"


class _JsonFormatter(logging.Formatter):
    """One JSON object per line: time (Unix seconds), level, message, and a call's fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {"time": round(record.created, 6), "level": record.levelname}
        fields |= getattr(record, "call", None) or {"message": record.getMessage()}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()
