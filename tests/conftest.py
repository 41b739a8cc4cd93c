"""What holds for every test: in CI (NETPLUGIN_NO_SKIP) a skipped test is a failure that says what is missing."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import TypeVar

import pytest

from netplugin_sdk.testing.engine import VERSIONS

pytest_plugins = ["pytester"]

ReportT = TypeVar("ReportT", pytest.TestReport, pytest.CollectReport)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engine",
        action="append",
        choices=list(VERSIONS),
        metavar="VERSION",
        help=f"run tests/engine with this Docker Engine only; may be repeated (default: {', '.join(VERSIONS)})",
    )


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
