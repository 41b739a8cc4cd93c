"""The check of each test here is right: it sees what a test leaves."""

from __future__ import annotations

import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from netplugin_sdk.linux import links
from netplugin_sdk.linux.namespaces import Namespace, unshare

from .lab import things


def test_what_is_left_is_seen(home: Path, tmp_path: Path) -> None:
    before = things(home)
    end = threading.Event()
    with ExitStack() as stack:
        stack.callback(end.set)
        threading.Thread(target=end.wait).start()
        stack.enter_context(subprocess.Popen("true"))
        stack.enter_context(tempfile.NamedTemporaryFile())
        stack.callback(Namespace.create(tmp_path / "box").remove)
        links.ensure_bridge("br-left")
        stack.callback(links.delete, "br-left")
        found = things(home)
        left = {kind for kind in before if found[kind] - before[kind]}
    links.close()
    assert left == before.keys() - {"namespaces"}


def test_a_test_that_does_not_come_back_is_seen(home: Path) -> None:
    before = things(home)["namespaces"]
    with ThreadPoolExecutor(1) as thread:

        def leave() -> bool:
            unshare()
            return things(home)["namespaces"] != before

        assert thread.submit(leave).result()
