"""``netplugin bundle``: a project as a managed plugin, ready for ``docker plugin create``."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from netplugin_sdk.cli import rootfs
from netplugin_sdk.errors import InvalidRequest, Unavailable

_NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")  # what Docker takes as the last part of a reference
_START = Path(__file__).with_name("start.py")
_START_INSIDE = "/usr/lib/netplugin/start.py"
_LEGACY_INSIDE = "usr/lib/netplugin/legacy"
_NETPLUGIN = "/usr/local/bin/netplugin"
_ENVIRONMENT = [
    {"name": name, "description": description, "settable": ["value"], "value": value}
    for name, description, value in (
        ("NETPLUGIN_LOG_LEVEL", "DEBUG, INFO, WARNING or ERROR.", "INFO"),
        ("NETPLUGIN_LOG_FORMAT", "text, or json for one object per line.", "text"),
        ("NETPLUGIN_METRICS", "ADDRESS:PORT of metrics for Prometheus.", None),
    )
]
_PATH = ("usr/local/sbin", "usr/local/bin", "usr/sbin", "usr/bin", "sbin", "bin")  # moby, DefaultPathEnv
_DRIVER = re.compile(r"[\w.]+:\w+")


@dataclass(frozen=True)
class _Order:
    """The request; all paths are absolute."""

    project: Path
    name: str
    run: str | None
    ipam: bool
    packages: tuple[str, ...]
    dockerfile: Path | None
    arguments: tuple[str, ...]
    docker: tuple[str, ...]
    wheel: Path | None


@click.command(short_help="Make a managed plugin (docker plugin create) of a project.")
@click.argument("project", type=click.Path(exists=True, file_okay=False, path_type=Path), default=".")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="The folder to make: config.json and rootfs.",
)
@click.option("--name", help="The plugin's name for Docker; default: the project's.")
@click.option(
    "--run",
    metavar="SCRIPT|MODULE:DRIVER",
    help="What serves the driver: a console script of the project, with arguments, or a class for 'netplugin serve'; "
    "default: the project's only console script. Not where the project has a config.json.",
)
@click.option("--ipam", is_flag=True, help="It is an IPAM driver too (docker network create --ipam-driver).")
@click.option(
    "--with",
    "builder",
    type=click.Choice(["docker", "debootstrap"]),
    help="How to make the root file system: from the project's Dockerfile by an engine, or of Debian, as root; "
    "default: docker if there are a Dockerfile and an engine, else debootstrap.",
)
@click.option(
    "--package", "packages", multiple=True, help="Debian package that the driver needs; with debootstrap. Repeatable."
)
@click.option("--build-arg", "arguments", multiple=True, metavar="NAME=VALUE", help="For the Dockerfile. Repeatable.")
@click.option("--docker", metavar="HOST", help="The engine that builds (unix://…, tcp://…); default: DOCKER_HOST.")
@click.option(
    "--wheel",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The SDK's wheel that goes into it; default: one of the SDK that runs now.",
)
def bundle(
    *,
    project: Path,
    output: Path,
    name: str | None,
    run: str | None,
    ipam: bool,
    builder: str | None,
    packages: tuple[str, ...],
    arguments: tuple[str, ...],
    docker: str | None,
    wheel: Path | None,
) -> None:
    """Make a managed plugin of PROJECT, a Python project with a pyproject.toml (default: this folder).

    DIR gets a config.json and a rootfs: 'docker plugin create NAME DIR' makes a plugin of them that the engine
    starts, watches and stops by itself. PROJECT's own managed/config.json and managed/Dockerfile, or those beside
    pyproject.toml, are used if there are any. Nothing is left of DIR if it cannot be made.

    A Dockerfile finds wheels of the project and of the SDK in the folder 'wheels' of its context, which is PROJECT.

    Exit status: 0 if DIR is there, 1 if it could not be made.
    """
    if not (project / "pyproject.toml").is_file():
        raise InvalidRequest(f"{project} has no pyproject.toml: it is not a project that can be installed")
    if output.exists() or output.is_symlink():
        raise InvalidRequest(f"{output} exists already: remove it, or choose another folder")
    client = ("docker", *(("--host", docker) if docker else ()))
    dockerfile = _first(project, "managed/Dockerfile", "Dockerfile")
    if builder is None:
        builder = "docker" if dockerfile and rootfs.engine_builds(client) else "debootstrap"
    if builder == "docker":
        if dockerfile is None:
            raise InvalidRequest(f"{project} has no Dockerfile, neither in managed/ nor beside pyproject.toml")
        if packages:
            raise click.UsageError("--package is for debootstrap; here the Dockerfile says what is installed")
        if not rootfs.engine_builds(client):
            raise Unavailable(f"no engine answers {shlex.join((*client, 'version'))}")
    else:
        rootfs.require_debootstrap()
    with _made(output.absolute()) as folder, tempfile.TemporaryDirectory(prefix="netplugin-") as wheels:
        _tell("wheels of the project and of the SDK")
        described = rootfs.build(project.absolute(), Path(wheels))
        order = _Order(
            project.absolute(),
            name or described.name.lower().replace("_", "-"),
            run,
            ipam,
            packages,
            dockerfile.absolute() if builder == "docker" and dockerfile else None,
            arguments,
            client,
            wheel.absolute() if wheel else None,
        )
        if not _NAME.fullmatch(order.name):
            raise InvalidRequest(f"{order.name!r} cannot be a plugin's name for Docker: lower-case letters and digits")
        config = _make(order, described, Path(wheels), folder)
        bytes_ = rootfs.size(folder / "rootfs")
    _tell(f"{output}: rootfs of {bytes_ / 1e6:.0f} MB for {described.name} {described.version}")
    click.echo(_next(order.name, output, config))


def _make(order: _Order, described: rootfs.Project, wheels: Path, folder: Path) -> dict[str, Any]:
    """Fill the folder; the config that it gets."""
    root, config = folder / "rootfs", _own_config(order.project) or _config(order, described)
    sdk = rootfs.describe(order.wheel or rootfs.sdk_wheel(wheels))
    if order.dockerfile is None:
        start = rootfs.base(order.packages, _tell)
        _tell("copy of Debian, with the project and what it needs from PyPI")
        rootfs.copy(start, root)
        rootfs.install(root, [sdk.wheel, described.wheel], {**sdk.scripts, **described.scripts})
    else:
        _tell(f"image of {order.dockerfile.relative_to(order.project)}")
        sent = (sdk.wheel, described.wheel)
        rootfs.from_image(order.docker, order.project, order.dockerfile, root, arguments=order.arguments, wheels=sent)
    _prepare(root)
    _check(config, root)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return config


def _prepare(root: Path) -> None:
    """Write the files that `_config` relies on."""
    inside = root / _START_INSIDE.lstrip("/")
    inside.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(_START, inside)
    inside.chmod(0o755)
    legacy = root / _LEGACY_INSIDE
    legacy.mkdir(exist_ok=True)
    for program in ("iptables", "ip6tables"):
        for what in ("", "-save", "-restore"):
            link = legacy / f"{program}{what}"
            if not link.is_symlink():
                link.symlink_to("/usr/sbin/xtables-legacy-multi")
    run = root / "run"
    if not (run / "docker.sock").is_symlink():
        run.mkdir(exist_ok=True)
        (run / "docker.sock").symlink_to("/host/run/docker.sock")


# ------------------------------------------------------------------------------------------------------------- config


def _own_config(project: Path) -> dict[str, Any] | None:
    path = _first(project, "managed/config.json", "config.json")
    if path is None:
        return None
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except ValueError as error:
        raise InvalidRequest(f"{path}: {error}") from error
    return config


def _config(order: _Order, described: rootfs.Project) -> dict[str, Any]:
    """The least that does; docs/managed.md says why each is there."""
    types = ["docker.networkdriver/1.0", *(["docker.ipamdriver/1.0"] if order.ipam else [])]
    socket = f"{order.name}.sock"
    program = _program(order, described)
    return {
        "description": described.summary or f"{described.name} {described.version}",
        "entrypoint": [
            "python3",
            "-I",
            _START_INSIDE,
            f"/run/docker/plugins/{socket}",
            *_program(order, described),
        ],
        "args": {"name": "args", "description": "Further arguments.", "settable": ["value"], "value": []},
        **({"env": _ENVIRONMENT} if program[0] == _NETPLUGIN else {}),
        "interface": {"types": types, "socket": socket},
        "network": {"type": "host"},
        "linux": {"capabilities": ["CAP_NET_ADMIN"]},
        "mounts": [
            _mount("run", "The engine's socket, to ask it what it has.", "/run", "ro"),
            _mount("sysctls", "Kernel parameters of the network.", "/proc/sys/net", "rw"),
        ],
        "propagatedMount": "/var/lib/netplugin",
    }


def _mount(name: str, description: str, path: str, mode: str) -> dict[str, Any]:
    return {
        "name": name,
        "description": description,
        "source": path,
        "destination": f"/host{path}",
        "type": "bind",
        "options": ["bind", mode, "private"],
        "settable": ["source"],
    }


def _program(order: _Order, described: rootfs.Project) -> list[str]:
    words = shlex.split(order.run or "")
    if words and _DRIVER.fullmatch(words[0]):
        return [_NETPLUGIN, "serve", *words, "--name", order.name]
    names = ", ".join(described.scripts)
    if not words:
        if len(described.scripts) != 1:
            there = f"several console scripts, {names}" if names else "no console script"
            raise InvalidRequest(f"{described.name} has {there}: say with --run what serves the driver")
        words = list(described.scripts)
    if words[0] not in described.scripts:
        raise InvalidRequest(f"{described.name} has no console script {words[0]!r}; it has {names or 'none'}")
    return [f"/usr/local/bin/{words[0]}", *words[1:]]


def _check(config: dict[str, Any], root: Path) -> None:
    """Find the faults that Docker would find only when the plugin is enabled."""
    entrypoint, interface = config.get("entrypoint") or [], config.get("interface") or {}
    if not entrypoint or not interface.get("socket") or not interface.get("types"):
        raise InvalidRequest("config.json must have an entrypoint, interface.socket and interface.types")
    program = str(entrypoint[0])
    if not any(os.path.lexists(root / folder / program.lstrip("/")) for folder in ("", *_PATH)):
        raise InvalidRequest(f"config.json: the root file system has no {program}")


# --------------------------------------------------------------------------------------------------------------- words


def _first(project: Path, *names: str) -> Path | None:
    return next((project / name for name in names if (project / name).is_file()), None)


@contextmanager
def _made(output: Path) -> Iterator[Path]:
    """A folder beside, which becomes `output` if all goes well, and is removed if not."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tell(step: str) -> None:
    click.echo(f"• {step}", err=True)


def _next(name: str, output: Path, config: dict[str, Any]) -> str:
    ipam = "docker.ipamdriver/1.0" in config["interface"]["types"]
    commands = (
        f"docker plugin create {name} {shlex.quote(str(output))}",
        f"docker plugin enable {name}",
        f"docker network create --driver {name}:latest{f' --ipam-driver {name}:latest' if ipam else ''} mynet",
        "docker run --rm -it --network mynet busybox",
    )
    return "\n".join(("\nNext, on the host of a Docker Engine:\n", *(f"    {command}" for command in commands)))
