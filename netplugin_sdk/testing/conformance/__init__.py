"""Whether a Docker network plugin, in whatever language, keeps to Docker's contract.

    report = run(Subject("unix:///run/docker/plugins/x.sock"))
    print(report.text())

Each check asks the plugin what an engine would ask it, makes networks and endpoints of its own, and removes them. Those
of the data plane need root, and the network namespace that the plugin works in.
"""

from netplugin_sdk.testing.conformance import checks as _checks  # noqa: F401  # each registers itself
from netplugin_sdk.testing.conformance.report import Report
from netplugin_sdk.testing.conformance.session import CHECKS, Check, Group, Outcome, Result, Subject, run

__all__ = ["CHECKS", "Check", "Group", "Outcome", "Report", "Result", "Subject", "run"]
