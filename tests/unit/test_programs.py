from __future__ import annotations

import os
import signal
from collections import deque
from pathlib import Path

import pytest

from netplugin_sdk import Unavailable
from netplugin_sdk.linux import programs


def test_a_program_says_what_it_says() -> None:
    pids: deque[int] = deque()
    assert programs.run(pids, "coreutils", "sh", "-c", "cat; echo no >&2; exit 3", stdin="yes") == (3, "yes", "no\n")
    assert len(pids) == 1


def test_a_program_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for may_not_be_run in (False, True):  # as where a folder of PATH is somebody else's alone
        if may_not_be_run:
            (tmp_path / "program-of-nobody").touch(0o644)
        with pytest.raises(Unavailable, match=r"no program-of-nobody here: install the package nobodys"):
            programs.run(deque(), "nobodys", "program-of-nobody")


def test_a_program_that_does_not_end_is_ended() -> None:
    """As iptables where another process holds its lock for ever."""
    pids: deque[int] = deque()
    with pytest.raises(Unavailable, match=r"firewall: sleep has not ended after 0\.2 s"):
        programs.run(pids, "coreutils", "sleep", "3600", timeout=0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], signal.SIG_DFL)
