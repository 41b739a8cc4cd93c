"""`netplugin new`, compared with cookiecutter itself; and what comes of it, as far as it can be told unrun."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import yaml
from click.testing import CliRunner, Result
from cookiecutter.exceptions import FailedHookException
from cookiecutter.main import cookiecutter
from packaging.requirements import Requirement

from netplugin_sdk.cli import main
from netplugin_sdk.serving.settings import _NAME

REPOSITORY = Path(__file__).parents[2]
TEMPLATE = REPOSITORY / "cookiecutter"

ANSWERS: dict[str, dict[str, str]] = {
    "defaults": {},
    "awkward": {
        "project_name": "Größtes Netz & Co. <1>",
        "project_slug": "a.b-c_1",
        "plugin_name": "X.1_y-Z",
        "package_name": "match",
        "description": "It's 100 % {braces}, $dollars & <tags>, 'quotes' and ümläute: #1.",
        "author": "Zoë 🐍 O'Neil",
        "email": "zoe.x+y@xn--r8jz45g.example",
        "license": "BSD-3-Clause",
    },
    "longest": {
        "project_slug": "s" * 64,
        "plugin_name": "P" * 64,
        "package_name": "p" * 64,
        "project_name": "n" * 90,
        "description": "d" * 90,
        "author": "a" * 90,
        "license": "Apache-2.0",
    },
    "shortest": {
        "project_name": "N",
        "project_slug": "n",
        "plugin_name": "n",
        "package_name": "n",
        "description": "D",
        "license": "none",
    },
}

BAD = {
    "project_slug": ("", "My", "a b", "-a", "a-", "a--b", "../a", "/a", "s" * 65, "netplugin-sdk", "ü"),
    "plugin_name": ("", "a b", "-a", "a/b", "ü", "n" * 65, "bridge", "null", "x\n"),
    "package_name": ("", "A", "1a", "a-b", "_a", "class", "json", "test", "tests", "msgspec", "p" * 65),
    "description": ("", '"', "\\", "two\nlines", " x", "x ", "d" * 91, "\udcff"),
    "email": ("you", "a b@c", "<a@b>", "a@b@c", "a..b@c", "zoë@c", "a@b\n"),
    "author": ('A "B" C',),
    "project_name": ("'''\"; import os",),
}


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> tuple[int, str]:
    """The status of a program, and what it says."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout


def netplugin_new(output: Path, answers: dict[str, str], *arguments: str, stdin: str | None = None) -> Result:
    pairs = [argument for key, value in answers.items() for argument in ("--set", f"{key}={value}")]
    return CliRunner().invoke(main, ["new", "--output", str(output), *pairs, *arguments], input=stdin)


def made(output: Path, answers: dict[str, str]) -> Path:
    result = netplugin_new(output, answers, "--no-input")
    assert result.exit_code == 0, result.output
    (project,) = output.iterdir()
    return project


@pytest.fixture
def cookiecutters(tmp_path: Path) -> Path:
    """A configuration that keeps cookiecutter out of the home folder."""
    config = tmp_path / "cookiecutter.yaml"
    config.write_text(f"cookiecutters_dir: {tmp_path / 'cookiecutters'}\nreplay_dir: {tmp_path / 'replay'}\n")
    return config


def contents(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mode, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


@pytest.fixture(params=ANSWERS)
def answers(request: pytest.FixtureRequest) -> dict[str, str]:
    return ANSWERS[request.param]


def test_it_makes_what_cookiecutter_makes(answers: dict[str, str], tmp_path: Path, cookiecutters: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    made(ours, answers)
    cookiecutter(
        str(TEMPLATE), no_input=True, extra_context=answers, output_dir=str(theirs), config_file=str(cookiecutters)
    )
    assert contents(ours) == contents(theirs)
    assert len(contents(ours)) > 20


def test_cookiecutters_command_finds_the_template(tmp_path: Path, cookiecutters: Path) -> None:
    command = (sys.executable, "-m", "cookiecutter", REPOSITORY, "--directory", "cookiecutter", "--no-input")
    assert run(*command, "--config-file", cookiecutters, "-o", tmp_path / "out")[0] == 0
    assert (tmp_path / "out/my-driver/pyproject.toml").is_file()


def test_a_project_is_clean_and_packs(answers: dict[str, str], tmp_path: Path) -> None:
    project = made(tmp_path, answers)
    for command in (("check",), ("format", "--check", "--diff")):
        ruff = (sys.executable, "-m", "ruff", *command, "--no-cache", "--config", "pyproject.toml", ".")
        status, said = run(*ruff, cwd=project)
        assert status == 0, said

    declared = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert declared["description"] == answers.get("description", "A Docker network driver.")
    assert declared["authors"][0]["name"] == answers.get("author", "Your Name")
    plugin = answers.get("plugin_name", "my-driver")
    assert declared["scripts"].keys() == {plugin}
    config = json.loads((project / "managed/config.json").read_text())
    assert config["interface"]["socket"] == f"{plugin}.sock"
    assert yaml.safe_load((project / ".github/workflows/test.yml").read_text())["jobs"].keys() == {
        *("lint", "unit", "kernel", "engine")
    }

    build = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "dist", project)
    status, said = run(*build)
    assert status == 0, said
    (wheel,) = (tmp_path / "dist").iterdir()
    with ZipFile(wheel) as archive:
        package = answers.get("package_name", "my_driver")
        assert {f"{package}/{name}.py" for name in ("__init__", "__main__", "driver")} < set(archive.namelist())
        (licence,) = (name for name in archive.namelist() if name.endswith("/licenses/LICENSE"))
        assert answers.get("author", "Your Name") in archive.read(licence).decode() or "Apache" in declared["license"]


def test_the_docker_named_driver_and_ours_agree_on_names(answers: dict[str, str]) -> None:
    assert _NAME.fullmatch(answers.get("plugin_name", "my-driver"))
    hook = (TEMPLATE / "hooks/pre_gen_project.py").read_text()
    assert f'r"{_NAME.pattern}"' in hook, "the hook has the pattern that `serve` has"


def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze: apt-get install systemd")
    units = made(tmp_path, {}) / "systemd"
    service = units / "my-driver.service"
    service.write_text(service.read_text().replace("/opt/my-driver/bin/my-driver", "/bin/true"))
    _, said = run("systemd-analyze", "verify", *units.iterdir())
    assert [line for line in said.splitlines() if "my-driver" in line] == []


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_a_bad_answer_is_refused_in_one_line(key: str, value: str, tmp_path: Path) -> None:
    result = netplugin_new(tmp_path, {"project_name": "fine", key: value}, "--no-input")
    assert result.exit_code == 1, result.output
    (line,) = result.output.splitlines()
    assert line.startswith(f"Error: {key} cannot be ")
    assert "Allowed: " in line
    assert list(tmp_path.iterdir()) == []


def test_cookiecutter_refuses_it_too(tmp_path: Path, cookiecutters: Path, capfd: pytest.CaptureFixture[str]) -> None:
    extra = {"package_name": "class"}
    with pytest.raises(FailedHookException):
        cookiecutter(
            str(TEMPLATE),
            no_input=True,
            extra_context=extra,
            output_dir=str(tmp_path / "out"),
            config_file=str(cookiecutters),
        )
    assert "package_name cannot be 'class'. Allowed: a lower-case letter," in capfd.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_it_asks_for_what_is_not_given(tmp_path: Path) -> None:
    result = netplugin_new(tmp_path, {"author": "Me"}, "my-driver", stdin="\nmine\n\n\nme@example.com\nnone\n")
    assert result.exit_code == 0, result.output
    asked = [line for line in result.output.splitlines() if line.endswith("]: ") or "]: " in line]
    assert len(asked) == 6
    assert "What 'docker network create --driver' gets [my-driver]: " in result.output
    project = tmp_path / "my-driver"
    assert '"mine" = "my_driver.__main__:main"' in (project / "pyproject.toml").read_text()
    assert "Me. All rights reserved" in (project / "LICENSE").read_text()


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "my-driver").mkdir()
    result = netplugin_new(tmp_path, {}, "my-driver", "--no-input")
    assert (result.exit_code, result.output) == (1, f"Error: {tmp_path}/my-driver exists already\n")
    assert list((tmp_path / "my-driver").iterdir()) == []


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("colour=red", "is not a KEY=VALUE with one of the keys project_name, project_slug, plugin_name,"),
        ("author", "is not a KEY=VALUE"),
        ("_jinja2_env_vars=x", "is not a KEY=VALUE"),
        ("license=GPL", "license is one of MIT, Apache-2.0, BSD-3-Clause, none"),
    ],
)
def test_a_wrong_pair_is_a_usage_error(pair: str, said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["new", "--output", str(tmp_path), "--no-input", "--set", pair])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.untraced
def test_a_disk_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the licence is over it."""
    command = ("new", "x", "--no-input", "--set", "license=Apache-2.0", "--output", tmp_path)
    program = (sys.executable, "-c", "from netplugin_sdk.cli import main; main()")
    status, said = run(
        "prlimit", "--fsize=8192", *program, *command, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    )
    assert (status, len(said.splitlines())) == (1, 1), said
    assert re.fullmatch(r"Error: .*/x cannot be made: .*File too large.*\n", said)
    assert list(tmp_path.iterdir()) == []


def test_the_projects_want_this_sdk() -> None:
    """The template names the versions that it fits: it is to be raised with ours."""
    sdk: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = re.search(
        r'"(netplugin-sdk[^"]*)"', (TEMPLATE / "{{cookiecutter.project_slug}}/pyproject.toml").read_text()
    )
    assert wanted is not None
    assert Requirement(wanted[1]).specifier.contains(sdk["version"])


def test_its_types_are_right(tmp_path: Path) -> None:
    """By mypy --strict, with the SDK that is installed here."""
    project = made(tmp_path, {})
    status, said = run(
        sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), ".", cwd=project
    )
    assert status == 0, said
