"""The documentation's pages and their code blocks.

A block can have a marker above it, a comment of HTML: ``file: NAME`` and ``change: NAME`` say what the reader is to
write where, ``not run: REASON`` why a block is not run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
_BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<marker>[^\n]*) -->\n *)?```(?P<language>\S*)\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    page: Path
    language: str
    text: str
    file: str = ""
    """What it is to be written to."""
    changes: str = ""
    """What it is a change of, as a diff."""
    not_run: str = ""

    def applied_to(self, text: str) -> str:
        lines = self.text.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] != left_out) for left_out in "+-")
        assert text.count(old) == 1, f"the change does not fit: {self.text}"
        return text.replace(old, new)


def blocks(page: Path) -> Iterator[Block]:
    for found in _BLOCK.finditer(page.read_text()):
        kind, _, what = (found["marker"] or "").partition(": ")
        text = re.sub(f"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
        given = {"file": "file", "change": "changes", "not run": "not_run"}.get(kind)
        yield Block(page, found["language"], text, **({given: what} if given else {}))


def files(page: Path) -> dict[str, str]:
    """What a reader has written in the end, by names."""
    made: dict[str, str] = {}
    for block in blocks(page):
        if block.file:
            made[block.file] = block.text
        elif block.changes:
            made[block.changes] = block.applied_to(made[block.changes])
    return made
