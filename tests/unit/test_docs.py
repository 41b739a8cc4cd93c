"""The documentation is whole: it builds without a warning, no link is dead, nothing public is left out, code is code.

That commands do what is shown below them is for tests/engine/test_tutorial.py.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from sphinx.util.inventory import InventoryFile

from .pages import DOCS, PAGES, ROOT, blocks, files

PUBLIC = [
    "netplugin_sdk",
    "netplugin_sdk.cnm",
    "netplugin_sdk.ipam",
    "netplugin_sdk.linux",
    *(f"netplugin_sdk.linux.{name}" for name in ("conntrack", "firewall", "links", "namespaces", "ports", "sysctls")),
    "netplugin_sdk.testing.conformance",
    "netplugin_sdk.testing.engine",
    "netplugin_sdk.testing.kit",
]
"""Modules that authors import from."""
OUR_OWN = {"any_interface", "listens", "own_namespace", "running_engine", "serving", "wait_until"}
"""Names in them that are not for authors."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    options = ["--fail-on-warning", "--keep-going", "--quiet", "-b", "html", "-d", f"{folder}/doctrees"]
    build = [sys.executable, "-m", "sphinx", *options, str(DOCS), f"{folder}/html"]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


class Page(HTMLParser):
    """Where a page leads, what it loads, and what can be linked to in it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.ids.add(given.get("id", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif url := given.get("src") or (tag == "link" and given.get("href")):
            self.loads.append(url)


@pytest.fixture(scope="module")
def html(site: Path) -> dict[Path, Page]:
    return {file: Page(file) for file in site.rglob("*.html")}


def test_no_link_is_dead(html: dict[Path, Page]) -> None:
    def dead(file: Path, link: str) -> bool:
        url = urlsplit(link)
        if url.scheme:
            return url.scheme not in {"https", "mailto"}  # nothing is fetched
        target = (file.parent / unquote(url.path)).resolve() if url.path else file
        return not target.exists() or bool(url.fragment and target in html and url.fragment not in html[target].ids)

    found = [
        (file.name, link) for file, page in html.items() for link in (*page.links, *page.loads) if dead(file, link)
    ]
    assert not found
    assert len(html) > len(PAGES)


def test_pages_load_nothing_from_elsewhere(site: Path, html: dict[Path, Page]) -> None:
    assert not [(file.name, url) for file, page in html.items() for url in page.loads if urlsplit(url).netloc]
    styles = [
        file for file in site.rglob("*.css") if re.search(r"(@import|url\()\s*[\"']?(https?:)?//", file.read_text())
    ]
    assert not styles


def public_names() -> Iterator[str]:
    for module in map(import_module, PUBLIC):
        names = getattr(module, "__all__", None) or [
            name
            for name, found in vars(module).items()
            if not name.startswith("_") and getattr(found, "__module__", "") == module.__name__
        ]
        for name in names:
            of_use = inspect.isclass(vars(module)[name]) or inspect.isroutine(vars(module)[name])
            if of_use and name not in OUR_OWN and not name.startswith("pytest_"):
                yield f"{module.__name__}.{name}"


def test_every_public_name_is_documented(site: Path) -> None:
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    documented = {name for kind, names in inventory.data.items() if kind.startswith("py:") for name in names}
    names = list(public_names())
    assert len(names) > 100
    assert not [name for name in names if name not in documented]


def test_every_command_is_documented(site: Path) -> None:
    from netplugin_sdk.cli import _COMMANDS

    ids = Page(site / "cli.html").ids
    assert not [name for name in _COMMANDS if f"netplugin-{name}" not in ids]


def test_links_between_files_of_the_repository() -> None:
    """As GitHub shows them."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("examples/*/*.md"), *PAGES]
    dead = [
        (page.name, link)
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        if not urlsplit(link).scheme and not (page.parent / link).exists()
    ]
    assert not dead


OF_SPHINX = {"{toctree}", "{eval-rst}", "{include}"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_block_is_run_or_says_why_not(page: Path) -> None:
    commands = r"^ {4,}(docker|ip|make|netplugin|pip|python|systemctl) [^→\n]*$"
    text = page.read_text()
    for block in blocks(page):
        text = text.replace(block.text, "")
    assert not (loose := re.search(commands, text, re.MULTILINE)), f"outside of a block: {loose}"
    for block in blocks(page):
        written = block.file or block.changes
        assert block.language, f"a block of no language: {block.text}"
        if block.language == "console" and not block.not_run:
            assert block.text.startswith("$ "), block.text
        elif block.language not in {"python", *OF_SPHINX}:  # Python has the right types at least: see below
            assert written or block.not_run, f"neither a file nor run, and no reason given: {block.text}"


def test_python_blocks_have_the_right_types(tmp_path: Path) -> None:
    """All of them, also those that run."""
    sources: dict[str, str] = {}
    for page in PAGES:
        loose = [block.text for block in blocks(page) if block.language == "python" and not block.file]
        made = {name: text for name, text in files(page).items() if name.endswith(".py")}
        made |= {f"{page.stem.replace('-', '_')}_{number}.py": text for number, text in enumerate(loose)}
        assert not sources.keys() & made.keys(), "two pages have a file of one name, and mypy takes them together"
        sources |= made
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    options = ["--strict", "--allow-untyped-defs", "--allow-untyped-calls", f"--config-file={ROOT / 'pyproject.toml'}"]
    check = [sys.executable, "-m", "mypy", *options, f"--cache-dir={ROOT / '.mypy_cache'}", *sources]
    done = subprocess.run(check, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "l2.py" in sources
