"""What drivers ask of the kernel: interfaces, the firewall, published ports, sysctls.

Everything here makes it so if it is not so, and can be run again. It knows nothing of plugins.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def together(*steps: Callable[[], object]) -> list[object]:
    """Run steps side by side and return their results: the kernel makes each of them wait, not work.

    All of them are run; then the first error is raised.
    """
    first, *others = steps
    with ThreadPoolExecutor(max(1, len(others))) as pool:
        try:
            running = [pool.submit(step) for step in others]
        except RuntimeError:  # the interpreter ends, and starts no threads any more
            return [step() for step in steps]
        mine = first()
    return [mine, *(step.result() for step in running)]
