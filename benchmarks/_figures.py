"""Figures of two contestants side by side, for engine.py and overlay.py: samples, their ratios, and a table."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from _chart import figure


@dataclass
class Row:
    """One figure: a value for each contestant and round, in this order of rounds."""

    section: str
    name: str
    unit: str = "ms"
    at: int | None = None  # containers of a burst, networks of scale
    paired: bool = True
    more_is_better: bool = False
    samples: dict[str, list[float]] = field(default_factory=dict)

    def add(self, contestant: str, value: float) -> None:
        self.samples.setdefault(contestant, []).append(value)

    def median(self, contestant: str) -> float | None:
        values = self.samples.get(contestant)
        return statistics.median(values) if values else None

    def compare(self, first: str, second: str) -> Comparison:
        """The second beside the first."""
        a, b = self.median(first), self.median(second)
        result = Comparison(b / a if a and b is not None else None)
        if result.ratio is None or not self.paired:
            return result
        ratios = sorted(y / x for x, y in zip(self.samples[first], self.samples[second], strict=False))
        result.paired = statistics.median(ratios)
        skipped = outside_interval(len(ratios))
        result.interval = ratios[skipped], ratios[-1 - skipped]
        if len(ratios) >= 6 and not result.interval[0] <= 1 <= result.interval[1]:
            result.verdict = "better" if (result.paired > 1) == self.more_is_better else "worse"
        return result


@dataclass
class Comparison:
    ratio: float | None
    paired: float | None = None
    interval: tuple[float, float] | None = None
    verdict: str = ""


def outside_interval(count: int) -> int:
    """How many of so many sorted values to leave out at each end, for the interval to have the median with 95 %."""
    skipped, below = 0, 0.5**count  # the chance that the median is under the smallest value
    while True:
        below += math.comb(count, skipped + 1) * 0.5**count
        if below > 0.025:
            return skipped
        skipped += 1


@dataclass
class Report:
    """The measurements on one engine."""

    engine: str  # as asked for
    version: str  # as it says
    machine: str
    contestants: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def row(self, section: str, name: str, **further: Any) -> Row:
        """The row of this name, made where there is none."""
        for row in self.rows:
            if (row.section, row.name, row.at) == (section, name, further.get("at")):
                return row
        self.rows.append(Row(section, name, **further))
        return self.rows[-1]

    def of(self, section: str) -> list[Row]:
        return [row for row in self.rows if row.section == section]

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {
            "rows": [
                vars(row)
                | {"median": {name: row.median(name) for name in self.contestants}}
                | vars(row.compare(*self.contestants))
                for row in self.rows
            ]
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Report:
        fields = Row.__dataclass_fields__
        rows = [Row(**{key: row[key] for key in fields}) for row in content.pop("rows")]
        return cls(**content, rows=rows)


def print_section(report: Report, section: str, heading: str = "") -> None:
    """The table of its rows, if there are any; `heading` says of what there are as many as a row's `at`."""
    first, second = report.contestants
    if rows := report.of(section):
        print(
            f"\n{section:32} {heading:>10} {'unit':>7} {first:>9} {second:>9} "
            f"{'ratio':>6} {'paired':>7} {'95 % interval':>14} {'n':>4}"
        )
    for row in rows:
        print(text_of(row, first, second))


def text_of(row: Row, first: str, second: str) -> str:
    compared = row.compare(first, second)
    medians = [row.median(name) for name in (first, second)]
    values = " ".join(f"{'-' if value is None else figure(value):>9}" for value in medians)
    ratio = f"{compared.ratio:.2f}" if compared.ratio is not None else ""
    paired = f"{compared.paired:.2f}" if compared.paired is not None else ""
    interval = "{:.2f} - {:.2f}".format(*compared.interval) if compared.interval else ""
    count = max((len(values) for values in row.samples.values()), default=0)
    at = "" if row.at is None else str(row.at)
    return (
        f"{row.name:32} {at:>10} {row.unit:>7} {values} {ratio:>6} {paired:>7} {interval:>14} {count:4}  "
        f"{compared.verdict}".rstrip()
    )


def turns(contestants: Sequence[str], rounds: int, say: Callable[[str], None], settle: float) -> Iterator[str]:
    """The contestants in turn, so many times, in one order and then in the other, `settle` seconds after each."""
    for number in range(rounds):
        for contestant in contestants[:: -1 if number % 2 else 1]:
            say(f"round {number + 1} of {rounds}, {contestant}")
            yield contestant
            time.sleep(settle)
