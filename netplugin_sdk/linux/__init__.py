"""The kernel, for drivers: interfaces, the firewall, published ports, sysctls.

Every function here brings the kernel to a state, whatever it was before, and can be run again. Nothing here knows of
plugins.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def together(*steps: Callable[[], object]) -> list[object]:
    """Run steps in parallel and return their results: most of their time they wait for the kernel.

    All steps run; then the first error is raised.
    """
    first, *others = steps
    with ThreadPoolExecutor(max(1, len(others))) as pool:
        try:
            running = [pool.submit(step) for step in others]
        except RuntimeError:  # the interpreter ends, and starts no threads any more
            return [step() for step in steps]
        mine = first()
    return [mine, *(step.result() for step in running)]
