"""An author's first day: the SDK's wheel in a fresh environment, a project from `netplugin new`, and an engine.

Nothing here uses this repository.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from netplugin_sdk.cli import main
from netplugin_sdk.testing.engine import OUTSIDE_ADDRESS, PrivateEngine

from .conftest import plugin_beside
from .systemd_lab import SYSTEMD, Host

REPOSITORY = Path(__file__).parents[2]
PLUGIN = "my-driver"

# Packages that are already here are not installed again, and we are root.
SUDO = '#!/bin/sh\n[ "$1" = apt-get ] || exec "$@"\n'

pytestmark = pytest.mark.one_engine

Shell = Callable[[str, Path], str]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Runs a command in a folder, with the programs of a fresh environment that has the SDK's wheel."""
    dist, home = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("home")
    programs = home / "venv/bin"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment = {**kept, "HOME": str(home), "PATH": f"{programs}:{kept['PATH']}"}

    def run(command: str, folder: Path) -> str:
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    build = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(dist), str(REPOSITORY))
    subprocess.run(build, check=True, capture_output=True)
    run(f"{sys.executable} -m venv venv && python -m pip install {dist}/*.whl", home)
    (programs / "sudo").write_text(SUDO)
    (programs / "sudo").chmod(0o755)
    return run


@pytest.fixture(scope="module")
def project(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project, made by the wheel's `netplugin new`."""
    folder = tmp_path_factory.mktemp("work")
    assert "netplugin check" in shell("netplugin check --help", folder)  # without pytest and all that comes with it
    shell(f"netplugin new {PLUGIN} --no-input", folder)
    return folder / PLUGIN


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_has_the_template(shell: Shell, tmp_path: Path) -> None:
    """And pip, which compiles what it installs, has not added to it."""
    shell(f"mkdir wheel && netplugin new {PLUGIN} --no-input --output wheel", tmp_path)
    here = CliRunner().invoke(main, ["new", PLUGIN, "--no-input", "--output", str(tmp_path)])
    assert here.exit_code == 0, here.output
    assert files(tmp_path / "wheel" / PLUGIN) == files(tmp_path / PLUGIN)


def test_its_workflow_is_green(project: Path, shell: Shell, version: str) -> None:
    """Each command of it, once: linters, and its own tests: unit, with packets and conformance, with an engine."""
    jobs = yaml.safe_load((project / ".github/workflows/test.yml").read_text())["jobs"]
    commands = dict.fromkeys(step["run"] for job in jobs.values() for step in job["steps"] if "run" in step)
    said = {command: shell(command.replace("${{ matrix.engine }}", version), project) for command in commands}
    tests = [text for command, text in said.items() if "pytest" in command]
    assert len(tests) == 3
    for text in tests:
        assert " passed in " in text
        assert "skipped" not in text, text


@pytest.fixture
def plugin(engine: PrivateEngine, project: Path, shell: Shell) -> Iterator[None]:
    """The project's command, beside the engine."""
    command = shell(f"pip install -q {project} && command -v {PLUGIN}", project).splitlines()[-1]
    for _ in plugin_beside(engine, PLUGIN, [command]):
        yield


@pytest.mark.usefixtures("plugin")
def test_an_engine_uses_it(engine: PrivateEngine) -> None:
    engine.docker("network", "create", "--driver", PLUGIN, "-o", "mtu=1400", "mynet")
    engine.docker("run", "--detach", "--name", "web", "--network", "mynet", "busybox", "sleep", "600")
    engine.docker("run", "--rm", "--network", "mynet", "busybox", "ping", "-c2", "web")  # an error if none answers
    engine.docker("exec", "web", "ping", "-c2", OUTSIDE_ADDRESS)


@pytest.mark.usefixtures("plugin")
def test_the_wheels_check_finds_nothing_wrong(engine: PrivateEngine, shell: Shell, tmp_path: Path) -> None:
    netplugin = shell("command -v netplugin", tmp_path).strip()
    done = engine.run([netplugin, "check", PLUGIN, "--json"], timeout=120)
    assert done.returncode == 0, done.stdout
    checks = json.loads(done.stdout)["checks"]
    assert {check["outcome"] for check in checks} == {"passed", "skipped"}
    assert any(check["group"] == "data plane" and check["outcome"] == "passed" for check in checks)


def test_systemd_runs_it_by_its_units(project: Path, version: str) -> None:
    if not SYSTEMD.exists():
        pytest.skip("needs systemd, not as the init of this machine: apt-get install systemd")
    host = Host(version, example=str(project), module="my_driver", program=PLUGIN)
    units = (f"{PLUGIN}.socket", f"{PLUGIN}.service")
    try:
        host.boot()
        host.import_busybox()
        assert host.run("systemd-analyze", "verify", *units) == ""
        host.run("systemctl", "enable", "--now", *units)
        host.docker("network", "create", "--driver", PLUGIN, "--ipv6", "--subnet", "fd00:77::/64", "mynet")
        ping = ("run", "--rm", "--network", "mynet", "busybox", "ping", "-c2")
        host.docker(*ping, OUTSIDE_ADDRESS)
        host.run("systemctl", "restart", f"{PLUGIN}.service")
        host.docker(*ping, OUTSIDE_ADDRESS)
        host.docker("network", "rm", "mynet")
        calls = [line for line in host.journal(f"{PLUGIN}.service").splitlines() if "method=" in line]
        assert calls
        assert [line for line in calls if not line.endswith(("status=200", "status=404"))] == []
    finally:
        host.close()
