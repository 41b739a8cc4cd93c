"""What is released: built reproducibly, complete, and of the licence that it says."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

REPOSITORY = Path(__file__).parents[2]
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]


def tracked() -> set[str]:
    """The files of the last commit."""
    listing = ["git", "-C", str(REPOSITORY), "ls-tree", "-r", "-z", "--name-only", "HEAD"]
    return set(subprocess.run(listing, check=True, capture_output=True, text=True).stdout.rstrip("\0").split("\0"))


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist of the last commit; `tools/release` fails if two builds differ."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("no clone of the repository: nothing to release")
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [REPOSITORY / "tools/release", folder],
        env={**os.environ, "VENV": sys.prefix},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel(dist: Path) -> None:
    with ZipFile(dist / f"netplugin_sdk-{VERSION}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        metadata = email.message_from_bytes(wheel.read(f"netplugin_sdk-{VERSION}.dist-info/METADATA"))
        (times,) = {entry.date_time for entry in wheel.infolist()}
    assert times != (2020, 2, 2, 0, 0, 0), "the commit's time, not hatchling's"
    of_package = {name for name in tracked() if name.startswith("netplugin_sdk/")}
    of_template = {
        name.replace("cookiecutter/", "netplugin_sdk/cli/template/", 1)
        for name in tracked()
        if name.startswith("cookiecutter/")
    }
    assert of_template
    assert names - (of_package | of_template) == {
        f"netplugin_sdk-{VERSION}.dist-info/{name}"
        for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    }
    assert of_package | of_template <= names
    assert (metadata["Version"], metadata["License-Expression"]) == (VERSION, "MIT")


def test_the_sdist(dist: Path) -> None:
    with tarfile.open(dist / f"netplugin_sdk-{VERSION}.tar.gz") as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert names == {name for name in tracked() if not name.startswith(".ci/")} | {"PKG-INFO"}


def test_nothing_else_is_left(dist: Path) -> None:
    assert len(list(dist.iterdir())) == 2
