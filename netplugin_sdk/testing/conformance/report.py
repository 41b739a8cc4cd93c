"""The results of all checks as text, as JUnit XML and as an HTML page."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from html import escape
from xml.etree import ElementTree

from netplugin_sdk.testing.conformance.model import Outcome, Result, Subject

_MARKS = {Outcome.PASSED: "✓", Outcome.FAILED: "✗", Outcome.SKIPPED: "-"}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; width: 100% }
td { border-top: 1px solid #ddd; padding: .35em .6em; vertical-align: top }
.passed td:first-child { color: #08712b } .failed td:first-child { color: #b3001b } .skipped { color: #777 }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6em; font-size: 12px }
"""


def line(result: Result) -> str:
    """The result as one line of text."""
    message = f": {result.message}" if result.message else ""
    return f"{_MARKS[result.outcome]} {result.check.id}{message}"


@dataclass(frozen=True)
class Report:
    """The results of a run."""

    subject: Subject
    results: tuple[Result, ...]

    @property
    def failed(self) -> tuple[Result, ...]:
        """The results of the checks that failed."""
        return tuple(result for result in self.results if result.outcome is Outcome.FAILED)

    @property
    def summary(self) -> str:
        """Such as ``41 passed, 2 skipped``."""
        counts = Counter(result.outcome for result in self.results)
        return ", ".join(f"{counts[outcome]} {outcome}" for outcome in Outcome if counts[outcome])

    def text(self) -> str:
        """One line per check. A failed check also shows its source, a hint and its conversation."""
        lines = [f"{self.subject.url}: {self.summary}"]
        group = None
        for result in self.results:
            if result.check.group is not group:
                group = result.check.group
                lines += ["", group]
            lines.append(f"  {line(result)}")
            if result.outcome is Outcome.FAILED:
                lines += [f"      proves: {result.check.proves}", f"      source: {result.check.source}"]
                lines += [f"      hint:   {result.check.hint}"]
                lines += [f"      {part}" for each in result.conversation for part in str(each).splitlines()]
        return "\n".join(lines) + "\n"

    def junit(self) -> str:
        """JUnit XML, which build servers read."""
        suite = ElementTree.Element("testsuite", name=f"conformance of {self.subject.url}")
        suite.set("tests", str(len(self.results)))
        suite.set("failures", str(len(self.failed)))
        suite.set("skipped", str(sum(result.outcome is Outcome.SKIPPED for result in self.results)))
        for result in self.results:
            case = ElementTree.SubElement(suite, "testcase", classname=str(result.check.group), name=result.check.id)
            case.set("time", f"{result.seconds:.3f}")
            if result.outcome is Outcome.SKIPPED:
                ElementTree.SubElement(case, "skipped", message=_printable(result.message))
            elif result.outcome is Outcome.FAILED:
                failure = ElementTree.SubElement(case, "failure", message=_printable(result.message))
                failure.text = _printable(_details(result))
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)

    def html(self) -> str:
        """An HTML page."""
        rows = []
        for result in self.results:
            details = ""
            if result.outcome is Outcome.FAILED:
                details = f"<br><b>{escape(result.message)}</b><pre>{escape(_details(result))}</pre>"
            elif result.message:
                details = f"<br>{escape(result.message)}"
            cells = (
                f"{_MARKS[result.outcome]} {escape(result.check.id)}",
                escape(str(result.check.group)),
                f"{escape(result.check.proves)}{details}",
                f"{result.seconds:.2f} s",
            )
            rows.append(f'<tr class="{result.outcome}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        title = escape(f"Conformance of {self.subject.url}")
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
            f"<h1>{title}</h1><p>{escape(self.summary)}</p><table>{''.join(rows)}</table></html>\n"
        )


def _details(result: Result) -> str:
    lines = [f"source: {result.check.source}", f"hint: {result.check.hint}", ""]
    return "\n".join([*lines, *map(str, result.conversation)])


def _printable(text: str) -> str:
    """The text with control characters escaped, which XML cannot hold."""
    return "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in text)
