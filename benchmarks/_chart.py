"""Bars and lines in SVG, for engine.py: two contestants side by side, and how the second compares to the first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

COLOURS = ("#9aa4b2", "#1f6feb")
VERDICTS: Mapping[str, str] = {"better": "#1a7f37", "worse": "#cf222e"}
WIDTH = 1000
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-size: 17px; font-weight: 600 } .panel { font-weight: 600 } .small { font-size: 10.5px; fill: #59636e }
.ratio { font-weight: 600 } .grid { stroke: #e4e8ed } .axis { stroke: #8c959f }
"""


@dataclass(frozen=True)
class Group:
    """A place on the axis: a value for each contestant (None: not measured), and how they compare."""

    label: str
    values: Sequence[float | None]
    ratio: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Box:
    """The place of a panel; `y` counts from the end of what is there, and `extend` makes room."""

    x: float
    width: float
    height: float
    y: float = 0


@dataclass
class Drawing:
    """An SVG that grows downwards; its panels are placed by the caller."""

    names: Sequence[str]
    height: float = 12
    _parts: list[str] = field(default_factory=list)

    def title(self, text: str, detail: str) -> None:
        self.height += 20
        self._text(20, self.height, text, "title")
        x = WIDTH - 20.0
        for name, colour in reversed(list(zip(self.names, COLOURS, strict=True))):
            x -= 8 * len(name) + 26
            self._parts.append(f'<rect x="{x:.0f}" y="{self.height - 10:.0f}" width="12" height="12" fill="{colour}"/>')
            self._text(x + 17, self.height, name)
        self.height += 18
        self._text(20, self.height, detail, "small")
        self.height += 8

    def bars(self, box: Box, title: str, groups: Sequence[Group]) -> None:
        """A panel of bars, with how they compare above them."""
        plot = self._frame(box, title, [value for group in groups for value in group.values])
        step = plot.width / max(len(groups), 1)
        bar = min(step * 0.3, 34)
        for i, group in enumerate(groups):
            centre = plot.x + step * (i + 0.5)
            top = plot.bottom
            for j, (value, colour) in enumerate(zip(group.values, COLOURS, strict=True)):
                left = centre + (j - 1) * bar
                if value is None:
                    self._text(left + bar / 2, plot.bottom - 4, "-", "small", anchor="middle")
                    continue
                length = value * plot.scale
                top = min(top, plot.bottom - length)
                self._parts.append(
                    f'<rect x="{left:.1f}" y="{plot.bottom - length:.1f}" width="{bar - 1:.1f}" '
                    f'height="{length:.1f}" fill="{colour}"/>'
                )
                # Labels of two bars of one height would meet: the left one ends and the right one begins in the middle.
                anchor = "end" if j == 0 else "start"
                self._text(
                    centre + (-1 if j == 0 else 1), plot.bottom - length - 3, figure(value), "small", anchor=anchor
                )
            if group.ratio:
                self._text(
                    centre, top - 16, group.ratio, "ratio", anchor="middle", colour=VERDICTS.get(group.verdict, "")
                )
            for k, line in enumerate(group.label.split("\n")):
                self._text(centre, plot.bottom + 14 + 12 * k, line, "small", anchor="middle")

    def lines(self, box: Box, title: str, groups: Sequence[Group]) -> None:
        """A panel of one line for each contestant; the labels of the groups are numbers and stand to scale."""
        plot = self._frame(box, title, [value for group in groups for value in group.values])
        last = max((float(group.label) for group in groups), default=1)
        places = [plot.x + 14 + (plot.width - 28) * float(group.label) / last for group in groups]
        for j, colour in enumerate(COLOURS):
            points = []
            for place, group in zip(places, groups, strict=True):
                value, other = group.values[j], group.values[1 - j]
                if value is None:
                    continue
                level = plot.bottom - value * plot.scale
                points.append(f"{place:.1f},{level:.1f}")
                self._parts.append(f'<circle cx="{place:.1f}" cy="{level:.1f}" r="3" fill="{colour}"/>')
                # The figure of the upper line above it, that of the lower one below.
                above = other is None or value > other or (value == other and j == 0)
                self._text(place, level + (-6 if above else 14), figure(value), "small", anchor="middle")
            self._parts.append(
                f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>'
            )
        for place, group in zip(places, groups, strict=True):
            self._text(place, plot.bottom + 14, group.label, "small", anchor="middle")

    def extend(self, height: float) -> None:
        self.height += height

    def notes(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.height += 14
            self._text(20, self.height, line, "small")
        self.height += 16

    def __str__(self) -> str:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height + 8:.0f}" width="{WIDTH}">'
        paper = '<rect width="100%" height="100%" rx="6" fill="#ffffff"/>'
        return "\n".join((head, f"<style>{STYLE}</style>", paper, *self._parts, "</svg>\n"))

    def _frame(self, box: Box, title: str, values: Sequence[float | None]) -> _Plot:
        top = self.height + box.y
        self._text(box.x, top + 14, title, "panel")
        plot = _Plot(box.x + 34, top + box.height - 30, box.width - 40, 0)
        ticks = _ticks(max((value for value in values if value is not None), default=1))
        plot.scale = (box.height - 30 - 50) / ticks[-1]
        for tick in ticks:
            level = plot.bottom - tick * plot.scale
            kind = "grid" if tick else "axis"
            self._parts.append(
                f'<line class="{kind}" x1="{plot.x:.0f}" x2="{plot.x + plot.width:.0f}" '
                f'y1="{level:.1f}" y2="{level:.1f}"/>'
            )
            self._text(plot.x - 5, level + 4, f"{tick:g}", "small", anchor="end")
        return plot

    def _text(self, x: float, y: float, text: str, kind: str = "", *, anchor: str = "start", colour: str = "") -> None:
        style = f' style="fill: {colour}"' if colour else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}"{style}>{escape(text)}</text>'
        )


@dataclass
class _Plot:
    x: float
    bottom: float
    width: float
    scale: float


def _ticks(largest: float) -> list[float]:
    """Round numbers from 0 until at least the largest value."""
    rough = max(largest, 1e-9) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    return [step * i for i in range(math.ceil(largest / step) + 1)]


def figure(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
