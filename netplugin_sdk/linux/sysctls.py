"""Kernel parameters, below ``/proc/sys`` of the caller's network namespace.

A name is written with slashes, as `sysctl` also takes it, since names of interfaces may have dots:
``net/ipv4/conf/br-1/forwarding``.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from netplugin_sdk.errors import DriverError, InvalidRequest

_ROOT = Path("/proc/sys")

_MANAGED = Path("/host/proc/sys")
"""The same in a managed plugin, whose ``/proc/sys`` is read-only: `netplugin bundle` has the engine mount it."""


class SysctlError(DriverError):
    """A kernel parameter cannot be read or set. The text names it and the reason."""


def read(name: str) -> str | None:
    """The value of a parameter, without white space around it; None if this kernel has no such parameter.

    Raises `SysctlError` if it cannot be read.
    """
    path = _path(name)
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SysctlError(f"sysctl {name}: cannot read: {_reason(error)}") from error


def ensure(name: str, value: str | int) -> str:
    """Set a parameter, unless it has this value already: that works with a read-only ``/proc/sys`` too.

    Returns:
        The former value; attach it (`Network.attach`) to restore it later.

    Raises:
        SysctlError: it is not there, or the kernel refuses.
    """
    before = read(name)
    if before is None:
        raise SysctlError(f"sysctl {name}: this kernel has no such parameter{_module(name)}")
    if before != str(value):
        try:
            _write(_path(name), str(value))
        except OSError as error:
            raise SysctlError(f"sysctl {name}: cannot set it from {before} to {value}: {_reason(error)}") from error
    return before


def _write(path: Path, value: str) -> None:
    try:
        path.write_text(value)
    except OSError as error:
        writable = _MANAGED / path.relative_to(_ROOT)
        if error.errno != errno.EROFS or not writable.exists():
            raise
        writable.write_text(value)


def _path(name: str) -> Path:
    parts = name.split("/")
    if not all(parts) or {".", ".."} & set(parts) or not name.isprintable():
        raise InvalidRequest(f"{name!r} cannot be the name of a sysctl")
    return _ROOT / name


def _module(name: str) -> str:
    return "; load it with: modprobe br_netfilter" if name.startswith("net/bridge/") else ""


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
