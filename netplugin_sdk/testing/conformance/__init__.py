"""Check whether a Docker network plugin, in any language, keeps to Docker's contract.

    report = run(Subject("unix:///run/docker/plugins/x.sock"))
    print(report.text())

Each check sends the requests that an engine would send, with networks and endpoints of its own, and removes them. The
checks of the data plane need root, and the network namespace that the plugin works in.
"""

from netplugin_sdk.testing.conformance.checks import CHECKS
from netplugin_sdk.testing.conformance.model import Check, Group, Outcome, Requirement, Result, Subject
from netplugin_sdk.testing.conformance.report import Report
from netplugin_sdk.testing.conformance.runner import run

__all__ = ["CHECKS", "Check", "Group", "Outcome", "Report", "Requirement", "Result", "Subject", "run"]
