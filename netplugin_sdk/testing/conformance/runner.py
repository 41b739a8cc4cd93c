"""Runs checks against a plugin, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress

from netplugin_sdk.errors import DriverError
from netplugin_sdk.testing.conformance.checks import CHECKS
from netplugin_sdk.testing.conformance.model import Check, Failed, Outcome, Requirement, Result, Subject
from netplugin_sdk.testing.conformance.report import Report
from netplugin_sdk.testing.conformance.session import Session


def run(
    subject: Subject, checks: Iterable[Check] | None = None, *, on_result: Callable[[Result], object] = lambda _: None
) -> Report:
    """Run all checks, or only `checks`, one after the other. `on_result` is called with each result as it comes."""
    implements, is_global = _activate(subject)
    results: dict[str, Result] = {}
    for check in CHECKS.values() if checks is None else checks:
        reason = _reason_to_skip(check, subject, implements, results)
        result = Result(check, Outcome.SKIPPED, reason, 0.0, ()) if reason else _run_one(check, subject, is_global)
        results[check.id] = result
        on_result(result)
    return Report(subject, tuple(results.values()))


def _activate(subject: Subject) -> tuple[Sequence[str], bool]:
    """The kinds of driver that the plugin implements, and whether its networks span a swarm."""
    implements: Sequence[str] = ()
    with closing(Session(subject)) as session, suppress(Failed, TypeError, AttributeError):
        implements = tuple(session.post("/Plugin.Activate", b"").content.get("Implements") or ())
        if Requirement.NETWORK_DRIVER in implements:
            capabilities = session.post("/NetworkDriver.GetCapabilities", b"").content
            return implements, capabilities.get("Scope") == "global"
    return implements, False


def _run_one(check: Check, subject: Subject, is_global: bool) -> Result:
    began = time.monotonic()
    with closing(Session(subject, is_global=is_global)) as session:
        outcome, message = Outcome.PASSED, ""
        try:
            check.function(session)
        except (Failed, DriverError) as error:
            outcome, message = Outcome.FAILED, str(error)
        conversation = tuple(session.conversation)
    return Result(check, outcome, message, time.monotonic() - began, conversation)


def _reason_to_skip(check: Check, subject: Subject, implements: Sequence[str], results: Mapping[str, Result]) -> str:
    """Why the check cannot be run; "" if it can."""
    for kind in (Requirement.NETWORK_DRIVER, Requirement.IPAM_DRIVER):
        if kind in check.requires and kind not in implements:
            return f"the plugin does not implement {kind}"
    if Requirement.RESTART in check.requires and subject.restart is None:
        return "no command to restart the plugin was given"
    if Requirement.DATA_PLANE in check.requires and not subject.data_plane:
        return "the plugin's links are not in this network namespace"
    for id_ in check.after:
        if id_ in results and results[id_].outcome is not Outcome.PASSED:
            return f"the check {id_} must pass first"
    return ""
