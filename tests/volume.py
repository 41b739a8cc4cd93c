"""How much of a thing a test does: by default what finds a fault soon, with NETPLUGIN_FULL=1 what a release deserves.

The property is the same in both. Only the number of its cases, cycles or rows differs.
"""

from __future__ import annotations

import os

FULL = os.environ.get("NETPLUGIN_FULL", "") not in ("", "0")
"""`make test-all` sets it: full volume, and every engine test on every engine."""


def volume(usual: int, full: int) -> int:
    """How many: `usual`, or `full` with NETPLUGIN_FULL."""
    return full if FULL else usual
