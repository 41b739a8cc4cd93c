"""Root file systems of Debian, built once by debootstrap and kept in a cache."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_BUILT = "etc/netplugin-packages"  # in a root file system: its packages


class DebianUnavailable(Exception):
    """A root file system cannot be built here: why, and the command that fixes it."""


def cache() -> Path:
    """Where all is kept that takes long to make: ``/var/cache/netplugin-sdk``, or ``$NETPLUGIN_CACHE``."""
    return Path(os.environ.get("NETPLUGIN_CACHE", "/var/cache/netplugin-sdk"))


def is_built(root: Path, packages: Sequence[str]) -> bool:
    """Whether there is a root file system with these packages."""
    built = root / _BUILT
    return built.is_file() and built.read_text() == ",".join(packages)


def root_file_system(
    root: Path,
    suite: str,
    packages: Sequence[str],
    *,
    told: Callable[[str], None],
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """`root` with a minimal Debian, built where it is missing or was built with others (30 to 60 s, one at a time).

    Args:
        root: the folder, which is replaced as a whole; beside it are a lock and a log.
        suite: Debian's name of the release. ``$NETPLUGIN_DEBIAN_MIRROR`` names a mirror.
        packages: those beyond debootstrap's ``minbase``.
        told: is called before something takes long, with the folder.
        finish: changes what was built, before it is kept.

    Raises:
        DebianUnavailable: it cannot be built; the text says why.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    with (root.parent / f".{root.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_built(root, packages):
            return root
        if shutil.which("debootstrap") is None:
            raise DebianUnavailable("there is no debootstrap: apt-get install debootstrap")
        mirror = os.environ.get("NETPLUGIN_DEBIAN_MIRROR", "http://deb.debian.org/debian")
        told(str(root))
        building = root.with_name(f".{root.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}"]
        if _KEYRING.exists():
            command.append(f"--keyring={_KEYRING}")
        log = root.with_name(f"{root.name}.log")
        with log.open("wb") as output:
            done = subprocess.run([*command, suite, building, mirror], stdout=output, stderr=output, check=False)
        if done.returncode != 0:
            tail = " ".join(log.read_text(errors="replace").splitlines()[-3:])
            raise DebianUnavailable(f"debootstrap of Debian {suite} failed, see {log}: {tail}")
        if finish is not None:
            finish(building)
        (building / _BUILT).write_text(",".join(packages))
        shutil.rmtree(root, ignore_errors=True)
        building.rename(root)
        return root
