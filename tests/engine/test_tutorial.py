"""Runs every console block of the documentation on a real engine, and compares the output with the page.

A page is one shell session, as root on the engine's host, in a folder of its own; unit/pages.py describes the markers
of its blocks. The test runs each line of a ``console`` block that begins with ``$ `` (a backslash at its end continues
it on the next line). The output must equal the lines below the command. Ids, times and process ids may differ, and
``…`` stands for any text, or, on a line of its own, for any lines.

With ``NETPLUGIN_DOCS=write`` the test writes the real output into the page where it differs, for you to review.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from netplugin_sdk.testing.engine import PrivateEngine, wait_until

from ..patience import PATIENCE
from ..unit.pages import DOCS, PAGES, ROOT, blocks, files
from .conftest import remove_all, state_of
from .test_minimal import source

pytestmark = pytest.mark.one_engine

TUTORIAL = DOCS / "tutorial.md"
SESSIONS = [page for page in PAGES if any(one.language == "console" and not one.not_run for one in blocks(page))]

VARIABLE = (  # text that differs from run to run, and its replacement
    (r"\b[0-9a-f]{64}\b", "ID"),
    (r"\b[0-9a-f]{12}\b", "ID"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", "TIME"),
    (r"\b\d\d:\d\d:\d\d\.\d{3}\b", "TIME"),
    (r"(?<![\d.])\d+\.\d\d(?![\d.])", "NUMBER"),
    (r"\b(ms|time|in|pid)([= ])[\d.]+", r"\1\2NUMBER"),
    (r"= [\d.]+(/[\d.]+)+ ms", "= TIMES ms"),
    (r"(@if|^)\d+(?=[:\W])", r"\1INDEX"),
    (r"\b([0-9a-f]{2}:){5}[0-9a-f]{2}\b", "MAC"),
)
# A reader waits a second for a start, or a repair. Here that ends when the plugin serves, or the trace is
# between, and lasts longer where that is so already: a machine that runs tests may be slow.
SLEEP = """sleep() {
    for waited in {0..99}; do
        grep -qE ' serves | kept conn' "$(ls -t *.log | head -1)" && break
        command sleep 0.1
    done 2>&-
    [ $waited -gt 0 ] || command sleep $(($1 * 2))
}"""
# bash says so in a script; to a terminal it says `[1]+ Killed`.
# It comes at any moment, also behind the mark between two commands.
KILLED = re.compile(r"(?:^|(?<=\036))\S+: line \d+: +\d+ (Killed|Terminated) .*\n", re.MULTILINE)


@dataclass(eq=False)
class Command:
    text: str
    shown: str
    came: str = ""

    def as_shown(self) -> bool:
        wanted = re.escape(same_for_all(self.shown))
        wanted = re.sub(r"(?<=\n)…\\\n", r"(?:.*\n)?", wanted).replace("…", ".*")
        return re.fullmatch(wanted, same_for_all(self.came), re.DOTALL) is not None


def same_for_all(text: str) -> str:
    for pattern, instead in VARIABLE:
        text = re.sub(pattern, instead, text, flags=re.MULTILINE)
    return re.sub(r"[ \t]+", " ", text).strip() + "\n"


def commands(block: str) -> list[Command]:
    found: list[Command] = []
    continued = False
    for line in block.splitlines(keepends=True):
        if continued:
            found[-1].text += line
        elif line.startswith("$ "):
            found.append(Command(line[2:], ""))
        else:
            found[-1].shown += line
            continue
        continued = line.endswith("\\\n")
    return found


def session(page: Path) -> tuple[list[str], list[Command]]:
    """The shell script of a page, and its commands in order."""
    script, run, made = ["exec 2>&1", SLEEP], list[Command](), dict[str, str]()
    for block in blocks(page):
        if name := block.file or block.changes:
            made[name] = block.text if block.file else block.applied_to(made[name])
            script.append(f"cat > {name} <<'END OF FILE'\n{made[name]}END OF FILE")
        elif block.language == "console" and not block.not_run:
            for command in commands(block.text):
                script.append(f"printf '\\036'\n{command.text.rstrip()}")
                run.append(command)
    script.append("printf '\\036'\nkill $(jobs -p) 2>/dev/null; wait")
    return script, run


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SDK's wheel, made from here, and all that it and pytest need: a lab has no way to PyPI."""
    folder = tmp_path_factory.mktemp("wheels")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", folder, ROOT, "pytest"], check=True)
    return folder


@pytest.fixture
def nothing_left(engine: PrivateEngine) -> Iterator[None]:
    before = state_of(engine)
    # Start as a reader's host does: settings of an earlier test's driver stay on.
    engine.run(["sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/all/forwarding"])
    yield
    remove_all(engine)
    wait_until(lambda: state_of(engine) == before, PATIENCE)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("page", SESSIONS, ids=lambda page: page.stem)
def test_a_page(engine: PrivateEngine, wheels: Path, tmp_path: Path, page: Path) -> None:
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text('#!/bin/sh\nexec nsenter --target="$(cat /run/engine.pid)" --mount docker "$@"\n')
    docker.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    if page != TUTORIAL:  # the other pages use what has been written in it
        (work / "l2.py").write_text(files(TUTORIAL)["l2.py"])
    script, run = session(page)
    (tmp_path / "script").write_text("\n".join(script) + "\n")
    environment = (
        f"PATH={docker.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PIP_NO_INDEX=1",
        f"PIP_FIND_LINKS={wheels}",
        "COLUMNS=100",
    )
    start = ["env", f"--chdir={work}", *environment, "bash", "--norc", str(tmp_path / "script")]
    said = KILLED.sub("", engine.run(start, timeout=300).stdout)
    for command, came in zip(run, said.split("\036")[1:], strict=False):
        command.came = came
    wrong = [command for command in run if not command.as_shown()]
    if os.environ.get("NETPLUGIN_DOCS") == "write":
        text, place = page.read_text(), 0
        for command in run:
            place = text.index(f"$ {command.text}{command.shown}", place) + len(f"$ {command.text}")
            if command in wrong:
                text = text[:place] + command.came.rstrip("\n") + "\n" + text[place + len(command.shown) :]
        page.write_text(text)
    assert not wrong, "\n".join(f"$ {one.text}--- shown\n{one.shown}--- came\n{one.came}" for one in wrong)


def test_the_tutorial_ends_with_the_driver_of_the_readme() -> None:
    (driver,) = (block.text for block in blocks(TUTORIAL) if block.file == "l2.py")
    assert driver == source()


def test_the_tutorial_begins_with_examples_null() -> None:
    assert files(TUTORIAL)["nullnet.py"] == (ROOT / "examples" / "null" / "nullnet.py").read_text()
