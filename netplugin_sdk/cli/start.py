#!/usr/bin/python3 -I
"""Start a managed plugin. `netplugin bundle` copies this file into its root file system; it imports nothing of ours.

    start.py SOCKET PROGRAM ARGUMENT…

The socket is made here and handed over as systemd does (sd_listen_fds(3)), and it listens before the program starts. An
engine looks for a listener 0.5, 3.5, 6.5 and 9.5 s after it has started a plugin, and then disables it for
good (moby, daemon/pkg/plugin/manager_linux.go, pluginPostStart); a plugin with many networks may take longer to bring
them back after a reboot, and one that dies again between two looks is not started again. So calls wait in the socket,
as they do with a service of systemd's.

A plugin that cannot start at all must be disabled, else the engine waits for its answers, even at boot. So after ten
starts in a minute the socket does not listen before the program is ready.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

BACKLOG = 4096  # the kernel caps it at net.core.somaxconn
FIRST_FD = 3
STARTS = Path("/run/netplugin-starts")
BURST, INTERVAL = 10, 60.0
LEGACY = "/usr/lib/netplugin/legacy"
LOCK = "/host/run/xtables.lock"


def main() -> None:
    """Become the program."""
    path, program, *arguments = sys.argv[1:]
    bound = bind(path)
    if not starts_too_often(time.time()):
        bound.listen(BACKLOG)
    os.dup2(bound.fileno(), FIRST_FD)
    os.set_inheritable(FIRST_FD, True)  # which dup2 does not do where it is that one already
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
    if docker_has_legacy_rules():
        os.environ.update(PATH=f"{LEGACY}:{os.environ['PATH']}", XTABLES_LOCKFILE=LOCK)
    os.execv(program, [program, *arguments])


def bind(path: str) -> socket.socket:
    """A socket of this path, for root alone; a predecessor's is replaced."""
    Path(path).unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX)
    os.fchmod(bound.fileno(), 0o600)
    bound.bind(path)
    return bound


def starts_too_often(now: float) -> bool:
    """Count this start. Whether there were too many lately."""
    try:
        before = [float(line) for line in STARTS.read_text().splitlines()]
    except (OSError, ValueError):
        before = []
    starts = [then for then in before if now - INTERVAL < then <= now][-BURST:]
    STARTS.write_text("".join(f"{then}\n" for then in (*starts, now)))
    return len(starts) == BURST


def docker_has_legacy_rules() -> bool:
    """Whether the engine's iptables is the legacy one: rules must stand beside its own, or its DROP takes all."""
    try:
        tables = Path("/proc/net/ip_tables_names").read_text().split()
    except OSError:
        return False
    if "filter" not in tables:
        return False
    command = ["iptables-legacy", "--table=filter", "--list-rules"]
    return "-N DOCKER" in subprocess.run(command, capture_output=True, text=True, check=False).stdout


if __name__ == "__main__":
    main()
