"""What holds for every test: in CI (NETPLUGIN_NO_SKIP) a skipped test is a failure that says what is missing."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from netplugin_sdk.testing.engine import VERSIONS

from .volume import FULL

pytest_plugins = ["pytester"]

# No bound of time for an example, nor for making one: a machine may be busy.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

ReportT = TypeVar("ReportT", pytest.TestReport, pytest.CollectReport)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engine",
        action="append",
        choices=list(VERSIONS),
        metavar="VERSION",
        help=f"run tests/engine with this Docker Engine only; may be repeated (default: {', '.join(VERSIONS)})",
    )
    parser.addoption("--sample", type=int, metavar="N", help="run N tests of each module only, spread over it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [item for item in items if FULL or not item.get_closest_marker("release")]
    if (wanted := config.getoption("sample")) is not None:
        modules: dict[Path, list[pytest.Item]] = {}
        for item in chosen:
            modules.setdefault(item.path, []).append(item)
        chosen = [item for tests in modules.values() for item in tests[:: -(-len(tests) // wanted)]]
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen


class ByEngine(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """A module's tests, with one engine where they have one, stay with one worker: they share what they have set up."""

    def _split_scope(self, nodeid: str) -> str:
        module, _, test = nodeid.partition("::")
        version = re.search(rf"\[({'|'.join(map(re.escape, VERSIONS))})", test)
        return f"{module} {version[1] if version else ''}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByEngine | None:
    return ByEngine(config, log) if config.getoption("dist") == "loadscope" else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _no_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _no_skip((yield))


def _no_skip(report: ReportT) -> ReportT:
    if os.environ.get("NETPLUGIN_NO_SKIP") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped, and with NETPLUGIN_NO_SKIP that is a failure. {reason}"
    return report
