"""What `netplugin bundle` refuses, and its parts; tests/engine/test_managed.py has what it makes."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from netplugin_sdk import InvalidRequest, Unavailable
from netplugin_sdk.cli import bundle, main, rootfs, start

STATUS = """\
Package: python3
Depends: python3.13 (>= 3.13.3-1~), libpython3-stdlib (= 3.13.5-1) | nobody

Package: python3.13
Pre-Depends: libc6 (>= 2.36)
Depends: debconf, c-shell

Package: libpython3-stdlib

Package: libc6

Package: csh
Provides: c-shell (= 1), other

Package: debconf
Depends: perl-base

Package: perl-base
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "pyproject.toml").write_text('[project]\nname = "l2"\nversion = "1"\n')
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bundle", *map(str, arguments)])


def refuses(text: str, *arguments: object, status: int = 1) -> None:
    done = run(*arguments)
    assert (done.exit_code, text in done.stderr) == (status, True), done.output
    if status == 1:
        assert done.stderr.count("\n") == 1, "one line"


def described(**scripts: str) -> rootfs.Project:
    return rootfs.Project(Path("l2-1-py3-none-any.whl"), "l2", "1", "Layer 2.", scripts)


def order(project: Path, **changes: Any) -> bundle._Order:
    values: dict[str, Any] = dict.fromkeys(bundle._Order.__dataclass_fields__)
    return bundle._Order(**values | {"project": project, "name": "l2", "ipam": False} | changes)


# ------------------------------------------------------------------------------------------------ what it refuses


def test_a_folder_that_is_no_project(tmp_path: Path) -> None:
    refuses("has no pyproject.toml", tmp_path, "-o", tmp_path / "out")


def test_a_folder_that_exists_already(project: Path) -> None:
    refuses("exists already: remove it", project, "-o", project)


def test_docker_without_a_dockerfile(project: Path, tmp_path: Path) -> None:
    refuses("has no Dockerfile", project, "-o", tmp_path / "out", "--with", "docker")


def test_docker_without_an_engine(project: Path, tmp_path: Path) -> None:
    (project / "Dockerfile").write_text("FROM scratch\n")
    nowhere = ("--docker", f"unix://{tmp_path}/docker.sock")
    refuses("no engine answers docker --host unix:///", project, "-o", tmp_path / "out", "--with", "docker", *nowhere)


def test_packages_and_a_dockerfile(project: Path, tmp_path: Path) -> None:
    (project / "Dockerfile").write_text("FROM scratch\n")
    more = ("--with", "docker", "--package", "dnsmasq")
    refuses("here the Dockerfile says what is installed", project, "-o", tmp_path / "out", *more, status=2)


def test_debootstrap_needs_root(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    refuses("needs root: run this with sudo", project, "-o", tmp_path / "out", "--with", "debootstrap")


def test_debootstrap_that_is_not_there(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    refuses("apt-get install debootstrap", project, "-o", tmp_path / "out")


def test_nothing_is_left_of_what_fails(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "pyproject.toml").write_text("[build-system]\nrequires = []\nbuild-backend = 'nobody'\n")
    monkeypatch.setattr(rootfs, "require_debootstrap", lambda: None)
    before = sorted(tmp_path.rglob("*"))
    done = run(project, "-o", tmp_path / "deep" / "out")
    assert done.exit_code == 1
    assert "cannot build a wheel of" in done.stderr
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before] == [tmp_path / "deep"]


# ---------------------------------------------------------------------------------------------------------- config.json


def test_the_only_console_script_serves_the_driver(project: Path) -> None:
    config = bundle._config(order(project), described(l2d="l2:main"))
    assert config["entrypoint"][-2:] == ["/run/docker/plugins/l2.sock", "/usr/local/bin/l2d"]
    assert config["interface"] == {"types": ["docker.networkdriver/1.0"], "socket": "l2.sock"}
    assert config["linux"] == {"capabilities": ["CAP_NET_ADMIN"]}
    assert config["description"] == "Layer 2."
    assert "env" not in config, "of a program of the author's we do not know what it reads"


def test_a_script_with_arguments(project: Path) -> None:
    config = bundle._config(order(project, run="b --name 'x y'", ipam=True), described(a="l2:a", b="l2:b"))
    assert config["entrypoint"][-3:] == ["/usr/local/bin/b", "--name", "x y"]
    assert config["interface"]["types"] == ["docker.networkdriver/1.0", "docker.ipamdriver/1.0"]


def test_a_driver_is_served_by_netplugin_serve(project: Path) -> None:
    config = bundle._config(order(project, run="l2.driver:L2"), described())
    assert config["entrypoint"][-5:] == ["/usr/local/bin/netplugin", "serve", "l2.driver:L2", "--name", "l2"]
    assert {variable["name"] for variable in config["env"]} >= {"NETPLUGIN_LOG_LEVEL", "NETPLUGIN_LOG_FORMAT"}


@pytest.mark.parametrize(
    ("wanted", "scripts", "text"),
    [
        (None, {}, "l2 has no console script: say with --run"),
        (None, {"a": "l2:a", "b": "l2:b"}, "l2 has several console scripts, a, b: say with --run"),
        ("c", {"a": "l2:a"}, "l2 has no console script 'c'; it has a"),
    ],
)
def test_nobody_knows_what_serves_the_driver(
    project: Path, wanted: str | None, scripts: dict[str, str], text: str
) -> None:
    with pytest.raises(InvalidRequest, match=text):
        bundle._config(order(project, run=wanted), described(**scripts))


def test_the_projects_own_config(project: Path) -> None:
    assert bundle._own_config(project) is None
    (project / "config.json").write_text('{"entrypoint": ["/bin/other"]}')
    (project / "managed").mkdir()
    (project / "managed/config.json").write_text('{"entrypoint": ["/bin/l2"]}')
    assert bundle._own_config(project) == {"entrypoint": ["/bin/l2"]}
    (project / "managed/config.json").write_text("{")
    with pytest.raises(InvalidRequest, match=r"managed/config\.json: Expecting property name"):
        bundle._own_config(project)


def test_a_config_that_docker_would_refuse_when_it_is_enabled(tmp_path: Path) -> None:
    interface = {"types": ["docker.networkdriver/1.0"], "socket": "l2.sock"}
    with pytest.raises(InvalidRequest, match=r"must have an entrypoint, interface\.socket and interface\.types"):
        bundle._check({"interface": interface}, tmp_path)
    with pytest.raises(InvalidRequest, match="the root file system has no /usr/bin/l2"):
        bundle._check({"interface": interface, "entrypoint": ["/usr/bin/l2"]}, tmp_path)
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/l2").symlink_to("/nowhere/but/inside")
    for program in ("/usr/bin/l2", "l2"):
        bundle._check({"interface": interface, "entrypoint": [program]}, tmp_path)


# --------------------------------------------------------------------------------------------------------------- parts


def test_what_packages_depend_on(tmp_path: Path) -> None:
    (tmp_path / "status").write_text(STATUS)
    found = rootfs._closure(tmp_path / "status", ["python3"])
    assert found == {"python3", "python3.13", "libpython3-stdlib", "libc6", "csh"}, (
        "no scripts run any more: no debconf"
    )


def test_a_wheel_says_what_it_is(tmp_path: Path) -> None:
    wheel = tmp_path / "l2-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("l2-1.dist-info/METADATA", "Name: l2\nVersion: 1\nSummary: Layer 2.\n")
        archive.writestr("l2-1.dist-info/entry_points.txt", "[console_scripts]\nL2:x = l2.main:run\n[other]\na = b:c\n")
    assert rootfs.describe(wheel) == rootfs.Project(wheel, "l2", "1", "Layer 2.", {"L2:x": "l2.main:run"})
    wheel.write_text("no")
    with pytest.raises(Unavailable, match="is not a wheel"):
        rootfs.describe(wheel)


def test_an_installed_package_is_packed_again(tmp_path: Path) -> None:
    """As pip wants it: every file with its hash in RECORD."""
    wheel = rootfs._pack(metadata.distribution("click"), tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (record,) = (name for name in names if name.endswith("/RECORD"))
        lines = list(csv.reader(archive.read(record).decode().splitlines()))
        assert {name for name, *_ in lines} == names
        for name, digest, size in lines:
            if name != record:
                content = archive.read(name)
                wanted = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                assert (digest, size) == (f"sha256={wanted}", str(len(content)))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
    subprocess.run([*command, tmp_path / "target", wheel], check=True, capture_output=True)
    assert (tmp_path / "target/click/core.py").read_bytes() == Path(
        sys.modules["click.core"].__file__ or ""
    ).read_bytes()


def test_a_program_gets_a_socket_that_listens_already(tmp_path: Path) -> None:
    """As systemd hands it over; what was there is replaced. But not a program that is started again and again."""
    path = tmp_path / "l2.sock"
    path.write_text("of the predecessor")
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, os, socket, sys\n"
        "listener = socket.socket(fileno=3)\n"
        "mine = os.environ['LISTEN_PID'] == str(os.getpid()), os.environ['LISTEN_FDS']\n"
        "listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)\n"
        "print(json.dumps([listener.getsockname(), *mine, listens, sys.argv[1:]]))\n"
    )
    program.chmod(0o755)
    burst = 2
    script = (
        f"from netplugin_sdk.cli import start; start.STARTS = start.Path({str(tmp_path / 'starts')!r});"
        f"start.BURST = {burst}; start.main()"
    )
    for number in range(burst + 1):
        said = subprocess.run(
            [sys.executable, "-c", script, str(path), str(program), "--name", "x y"],
            close_fds=number % 2 == 0,  # the listener is descriptor 3 by itself, or not
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert json.loads(said) == [str(path), True, "1", int(number < burst), ["--name", "x y"]]
        assert path.stat().st_mode & 0o777 == 0o600


def test_starts_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "STARTS", tmp_path / "starts")
    assert [start.starts_too_often(float(now)) for now in range(12)] == [False] * 10 + [True] * 2
    assert not start.starts_too_often(64.0)
    assert not start.starts_too_often(5.0), "the clock was set back"
    start.STARTS.write_text("half a li")
    assert not start.starts_too_often(6.0)
