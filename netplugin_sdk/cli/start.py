#!/usr/bin/python3 -I
"""Start a managed plugin. `netplugin bundle` copies this file into its root file system; it imports nothing of ours.

    start.py SOCKET PROGRAM ARGUMENT…

It listens before the program has started, and hands the socket over as systemd does (sd_listen_fds(3)). An engine looks
for somebody who listens 0.5, 3.5, 6.5 and 9.5 s after it has started a plugin, and then disables it for good (moby,
daemon/pkg/plugin/manager_linux.go, pluginPostStart); a plugin with many networks may take longer to bring them back
after a reboot. So its calls wait in the socket, as they do with a service of systemd's.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

BACKLOG = 4096  # the kernel caps it at net.core.somaxconn
FIRST_FD = 3
LEGACY = "/usr/lib/netplugin/legacy"
LOCK = "/host/run/xtables.lock"


def main() -> None:
    """Become the program."""
    path, program, *arguments = sys.argv[1:]
    listener = listen(path)
    os.dup2(listener.fileno(), FIRST_FD)
    os.set_inheritable(FIRST_FD, True)  # which dup2 does not do where it is that one already
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
    if docker_has_legacy_rules():
        os.environ.update(PATH=f"{LEGACY}:{os.environ['PATH']}", XTABLES_LOCKFILE=LOCK)
    os.execv(program, [program, *arguments])


def listen(path: str) -> socket.socket:
    """Listen on this path, root alone; what a predecessor left there is replaced."""
    Path(path).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    os.fchmod(listener.fileno(), 0o600)
    listener.bind(path)
    listener.listen(BACKLOG)
    return listener


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
