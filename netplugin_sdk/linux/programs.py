"""Programs that write firewall rules."""

from __future__ import annotations

import subprocess
from collections import deque

from netplugin_sdk.errors import Unavailable


def run(pids: deque[int], package: str, *argv: str, stdin: str = "") -> tuple[int, str, str]:
    """Status, output and errors of a program of this Debian package; its process id is added to `pids`.

    Raises `Unavailable` if it is not installed.
    """
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="surrogateescape",  # comments of other rules may hold any bytes
        )
    except FileNotFoundError as error:
        raise Unavailable(f"firewall: no {argv[0]} here: install the package {package}") from error
    with process:
        pids.append(process.pid)
        output, errors = process.communicate(stdin)
    return process.returncode, output, errors
