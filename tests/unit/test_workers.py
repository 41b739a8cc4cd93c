"""When a question to the engine is asked again: by a clock that passes only while somebody waits."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from netplugin_sdk.core import workers
from netplugin_sdk.core.engine_api import Docker, DockerError
from netplugin_sdk.core.timings import Timings
from netplugin_sdk.core.workers import EngineQueries

from ..patience import PATIENCE


class Lab:
    """EngineQueries, and what time it was at each question."""

    def __init__(self, path: Path) -> None:
        self.now = 0.0
        self.asked: list[float] = []
        self.queries = EngineQueries(path, Timings())
        self.queries._changed = self.Waiting(self)

    class Waiting(threading.Condition):
        def __init__(self, lab: Lab) -> None:
            super().__init__()
            self._lab = lab

        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            assert timeout > 0
            self._lab.now += timeout
            return False

    def times_of(
        self, *, answered_at: float = float("inf"), recurring: bool = False, broken: bool = False
    ) -> list[float]:
        """When it is asked, until an answer at the time or until it is given up."""

        def question(_: Docker) -> bool:
            self.asked.append(round(self.now, 3))
            if broken and len(self.asked) <= 100:
                raise DockerError("not yet", 503)
            return self.now >= answered_at or len(self.asked) > 100

        self.queries.ask(question, recurring=recurring)
        thread = self.queries._thread
        assert thread is not None
        thread.join(PATIENCE)
        assert not thread.is_alive()
        return self.asked


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    lab = Lab(tmp_path / "docker.sock")
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: lab.now))
    return lab


def pauses(times: list[float]) -> list[float]:
    return [round(after - before, 3) for before, after in pairwise(times)]


GROWING = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6]


@pytest.mark.parametrize("broken", [False, True], ids=["refused", "broken"])
def test_a_question_is_asked_less_and_less_often_and_given_up_after_a_minute(lab: Lab, broken: bool) -> None:
    times = lab.times_of(broken=broken)
    assert pauses(times) == pytest.approx(GROWING + [2.0] * 28)
    assert 58 < times[-1] <= 60


def test_one_that_is_recurring_is_asked_on_slowly(lab: Lab) -> None:
    times = lab.times_of(recurring=True, answered_at=200)
    assert pauses(times) == GROWING + [2.0] * 29 + [30.0] * 5
