"""Programs that write firewall rules."""

from __future__ import annotations

import subprocess
from collections import deque

from netplugin_sdk.errors import Unavailable


def run(pids: deque[int], package: str, *argv: str, stdin: str = "", timeout: float = 15.0) -> tuple[int, str, str]:
    """Run a program of this Debian package; its process id is added to `pids`. Returns status, output and errors.

    `timeout` is in seconds, less than a call of the engine may take, so that the call's error names the program.

    Raises `Unavailable` if it is not installed, or does not end: it may wait for a lock that nobody releases.
    """
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="surrogateescape",  # comments of other rules may have any bytes
        )
    except (FileNotFoundError, PermissionError) as error:  # the latter: a folder of PATH that it may not look into
        raise Unavailable(f"firewall: no {argv[0]} here: install the package {package}") from error
    with process:
        pids.append(process.pid)
        try:
            output, errors = process.communicate(stdin, timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Unavailable(f"firewall: {argv[0]} has not ended after {timeout:g} s") from None
    return process.returncode, output, errors
