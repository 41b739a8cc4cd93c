"""The root file systems of managed plugins: made small from Debian, with Python packages, and from images."""

from __future__ import annotations

import base64
import configparser
import email
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

from netplugin_sdk.errors import Unavailable
from netplugin_sdk.testing import debian

SUITE = "trixie"
"""Debian's release in a plugin."""

PACKAGES = ("python3", "iptables", "nftables")
"""The Debian packages in a plugin's root filesystem, beside their dependencies."""

_KEPT = ("base-files", "dash", "media-types")
"""Also needed: /bin → usr/bin and the like; /bin/sh, by whatever calls a program."""

_WASTE = (
    *("boot", "dev", "home", "media", "mnt", "opt", "proc", "run", "srv", "sys", "tmp"),
    *("var/backups", "var/cache", "var/lib/apt", "var/lib/dpkg", "var/log", "etc/apt", "etc/cron.daily", "etc/systemd"),
    *("usr/include", "usr/lib/systemd"),
    *(f"usr/share/{name}" for name in ("bash-completion", "bug", "doc", "info", "lintian", "locale", "man")),
    *(f"usr/share/{name}" for name in ("perl5", "pixmaps", "zoneinfo")),
)
_UNUSED = ("usr/lib/*/gconv", "usr/lib/python3.*/test", "usr/lib/python3.*/pydoc_data", "usr/lib/python3.*/_pyrepl")
_SCRIPTS = {"debconf", "dpkg"}  # only maintainers' scripts need these, and they do not run any more
_EMPTY = ("dev", "proc", "run", "sys", "tmp", "host", "var/cache", "var/lib/netplugin", "var/log")


# ------------------------------------------------------------------------------------------------------------- Debian


def require_debootstrap() -> None:
    """Raise `Unavailable` unless a root file system can be made of Debian here; it says what fixes it."""
    if os.geteuid() != 0:
        raise Unavailable("debootstrap needs root: run this with sudo, or where an engine can build, --with docker")
    if shutil.which("debootstrap") is None:
        raise Unavailable("there is no debootstrap: apt-get install debootstrap, or where an engine is, --with docker")


def base(packages: Sequence[str], told: Callable[[str], None]) -> Path:
    """A small Debian with Python and these packages, kept in the cache: a folder not to be changed.

    Raises `Unavailable` if it cannot be made.
    """
    wanted = (*PACKAGES, *sorted(set(packages) - set(PACKAGES)))
    name = "-".join((SUITE, hashlib.sha256(repr((wanted, _KEPT, _WASTE, _UNUSED)).encode()).hexdigest()[:12]))
    try:
        return debian.root_file_system(
            debian.cache() / "plugins" / name,
            SUITE,
            wanted,
            told=lambda _: told(f"Debian {SUITE} with {', '.join(wanted)}, once, about a minute"),
            finish=lambda root: _shrink(root, wanted),
        )
    except debian.DebianUnavailable as error:
        raise Unavailable(str(error)) from error


def copy(root: Path, to: Path) -> None:
    """Copy a root file system as it is; on a file system that can, without its blocks."""
    _run("cp", "--archive", "--reflink=auto", str(root), str(to))


def _shrink(root: Path, wanted: Iterable[str]) -> None:
    """Leave only what these packages depend on, and of that no documentation, lists and caches."""
    needed = _closure(root / "var/lib/dpkg/status", (*wanted, *_KEPT))
    info = root / "var/lib/dpkg/info"
    kept, gone = set[str](), set[str]()
    for listing in info.glob("*.list"):
        (kept if listing.stem.partition(":")[0] in needed else gone).update(listing.read_text().splitlines())
    for name in sorted(gone - kept, reverse=True):  # a folder after what is in it
        path = root / name.lstrip("/")
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        else:
            path.unlink(missing_ok=True)
    for path in (*(root / name for name in _WASTE), *(path for name in _UNUSED for path in root.glob(name))):
        shutil.rmtree(path, ignore_errors=True)
    for name in _EMPTY:
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "tmp").chmod(0o1777)


def _closure(status: Path, wanted: Iterable[str]) -> set[str]:
    """These packages and all that they depend on, of those that are installed (deb-control(5))."""
    depends: dict[str, list[str]] = {}
    provided: dict[str, str] = {}
    for paragraph in status.read_text().split("\n\n"):
        fields = email.message_from_string(paragraph)
        if (name := fields["Package"]) is None:
            continue
        needs = ",".join(fields.get(field, "") for field in ("Depends", "Pre-Depends"))
        depends[name] = [re.split(r"[\s(:]", need.strip())[0] for need in re.split(r"[,|]", needs) if need.strip()]
        for other in filter(None, fields.get("Provides", "").split(",")):
            provided[other.split()[0]] = name
    found, left = set[str](), list(wanted)
    while left:
        name = left.pop()
        name = name if name in depends else provided.get(name, name)
        if name in depends and name not in found and name not in _SCRIPTS:
            found.add(name)
            left.extend(depends[name])
    return found


# -------------------------------------------------------------------------------------------------------------- Python


@dataclass(frozen=True)
class Project:
    """The metadata of a wheel."""

    wheel: Path
    name: str
    version: str
    summary: str
    scripts: dict[str, str]
    """Console script → ``module:function``."""


def build(project: Path, to: Path) -> Project:
    """Build the wheel of a project into this folder.

    Raises `Unavailable` if it cannot be built.
    """
    before = set(to.glob("*.whl"))
    try:
        _pip("wheel", "--no-deps", "--wheel-dir", str(to), str(project))
    except Unavailable as error:
        raise Unavailable(f"cannot build a wheel of {project}: {error}") from error
    (wheel,) = set(to.glob("*.whl")) - before
    return describe(wheel)


def describe(wheel: Path) -> Project:
    """Read a wheel's metadata. Raises `Unavailable` if it is none."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            (about,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            fields = email.message_from_bytes(archive.read(about))
            entries = about.replace("METADATA", "entry_points.txt")
            text = archive.read(entries).decode() if entries in archive.namelist() else ""
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise Unavailable(f"{wheel} is not a wheel: {error}") from error
    parsed = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read_string(text)
    scripts = dict(parsed["console_scripts"]) if parsed.has_section("console_scripts") else {}
    return Project(wheel, fields["Name"], fields["Version"], fields.get("Summary", ""), scripts)


def sdk_wheel(to: Path) -> Path:
    """A wheel of the SDK that runs, in this folder: built from its clone, or packed again from where it is installed.

    Raises `Unavailable` if it cannot be made.
    """
    installed = metadata.distribution("netplugin-sdk")
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        return build(Path(unquote(urlsplit(origin["url"]).path)), to).wheel
    return _pack(installed, to)


def _pack(installed: metadata.Distribution, to: Path) -> Path:
    """The wheel that was installed, from its RECORD (PyPA, "Recording installed projects")."""
    (tag,) = re.findall(r"^Tag: *(\S+)", installed.read_text("WHEEL") or "", re.MULTILINE)[:1] or ["py3-none-any"]
    wheel = to / f"{installed.metadata['Name'].replace('-', '_')}-{installed.version}-{tag}.whl"
    lines, record = list[str](), ""
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in installed.files or ():
            if file.suffix == ".pyc" or ".." in file.parts:  # what the installer made
                continue
            if file.parts[0].endswith(".dist-info") and file.name in ("INSTALLER", "REQUESTED", "direct_url.json"):
                continue
            if file.name == "RECORD":
                record = str(file)
                continue
            content = file.read_binary()
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            lines.append(f"{file},sha256={digest},{len(content)}")
            archive.writestr(str(file), content)
        archive.writestr(record, "\n".join((*lines, f"{record},,", "")))
    return wheel


def install(root: Path, wheels: Sequence[Path], scripts: dict[str, str]) -> None:
    """Install wheels, and what they need from PyPI, for the Python of a root file system made of `base`.

    Args:
        root: the root file system.
        wheels: files; they satisfy each other's requirements.
        scripts: console scripts to be made in ``/usr/local/bin``: name → ``module:function``.

    Raises `Unavailable` if it cannot be done, for example as something needed has no wheel for that Python.
    """
    python = next((root / "usr/bin").glob("python3.[0-9]*")).name
    version = python.removeprefix("python")
    machine = platform.machine()
    libc = next((root / "usr/lib").glob("*-linux-gnu/libc.so.6"))
    minor = max(int(found) for found in re.findall(rb"GLIBC_2\.(\d+)\b", libc.read_bytes()))
    target = root / "usr/local/lib" / python / "dist-packages"
    _pip(
        "install",
        f"--target={target}",
        f"--python-version={version}",
        "--implementation=cp",
        f"--abi=cp{version.replace('.', '')}",
        "--abi=abi3",
        "--abi=none",
        *(f"--platform=manylinux_2_{number}_{machine}" for number in range(minor, 16, -1)),
        f"--platform=manylinux2014_{machine}",
        f"--platform=linux_{machine}",
        "--only-binary=:all:",
        "--no-compile",
        *map(str, wheels),
    )
    shutil.rmtree(target / "bin", ignore_errors=True)  # they name the Python that runs here
    programs = root / "usr/local/bin"
    programs.mkdir(parents=True, exist_ok=True)
    for name, where in scripts.items():
        module, _, function = where.partition(":")
        first = function.partition(".")[0]
        text = f"#!/usr/bin/python3\nimport sys\nfrom {module} import {first}\nsys.exit({function}())\n"
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    # Else each new version of a plugin would be slow at its first start.
    folder = f"/{target.relative_to(root)}"
    _run("chroot", str(root), f"/usr/bin/{python}", "-m", "compileall", "-q", "-j", "0", folder, failing=True)


def _pip(*arguments: str) -> None:
    _run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments)


# -------------------------------------------------------------------------------------------------------------- images


def engine_builds(docker: Sequence[str]) -> bool:
    """Whether there is a docker client, and an engine answers it."""
    return shutil.which(docker[0]) is not None and _status(*docker, "version") == 0


def from_image(
    docker: Sequence[str],
    project: Path,
    dockerfile: Path,
    to: Path,
    *,
    arguments: Sequence[str] = (),
    wheels: Sequence[Path] = (),
) -> None:
    """Build an image and unpack its file system. The engine may be on another host.

    Args:
        docker: the client, with the options that say which engine.
        project: folder that is the context of the build, but for its hidden files and what others made in it.
        dockerfile: file in it.
        to: folder, which is made.
        arguments: ``NAME=VALUE`` for the Dockerfile's ARGs.
        wheels: files that are sent along, in the folder ``wheels``.

    Raises `Unavailable` if it fails; the text ends with what the engine says.
    """
    named = [word for argument in arguments for word in ("--build-arg", argument)]
    file = str(dockerfile.relative_to(project))
    with tempfile.TemporaryFile() as context:
        # Not PAX, of which docker's client does not see that it is an archive.
        with tarfile.open(fileobj=context, mode="w", format=tarfile.GNU_FORMAT) as archive:
            archive.add(project, ".", filter=_sent)
            for wheel in wheels:
                archive.add(wheel, f"wheels/{wheel.name}")
        context.seek(0)
        image = _run(*docker, "build", "--quiet", "--file", file, *named, "-", stdin=context.fileno()).strip()
    container = _run(*docker, "create", image, "none").strip()
    try:
        to.mkdir()
        with subprocess.Popen([*docker, "export", container], stdout=subprocess.PIPE) as export:
            unpack = ["tar", "--extract", "--directory", str(to), "--numeric-owner", "--exclude=dev/*"]
            done = subprocess.run(unpack, stdin=export.stdout, stderr=subprocess.PIPE, text=True, check=False)
        if export.returncode != 0 or done.returncode != 0:
            raise Unavailable(f"cannot unpack the image: {done.stderr.strip() or 'docker export failed'}")
    finally:
        _status(*docker, "rm", "--force", container)
    (to / ".dockerenv").unlink(missing_ok=True)


def _sent(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    name = Path(member.name).name
    return None if name.startswith(".") or name in ("__pycache__", "build", "dist", "wheels") else member


def size(root: Path) -> int:
    """Bytes of all files below, each counted once."""
    seen = {(file.st_dev, file.st_ino): file.st_size for file in _files(root)}
    return sum(seen.values())


def _files(root: Path) -> Iterator[os.stat_result]:
    for folder, _, names in os.walk(root):
        for name in names:
            yield os.lstat(os.path.join(folder, name))  # noqa: PTH118  # ten thousand of them


# ------------------------------------------------------------------------------------------------------------ programs


def _run(*command: str, stdin: int = subprocess.DEVNULL, failing: bool = False) -> str:
    """The output of a program. Raises `Unavailable` with its last line if it fails, unless it may be `failing`."""
    try:
        done = subprocess.run(command, stdin=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Unavailable(f"there is no program {command[0]}") from error
    if done.returncode != 0 and not failing:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise Unavailable(" ".join(said[-6:]) or f"{command[0]} failed with status {done.returncode}")
    return done.stdout


def _status(*command: str) -> int:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
    ).returncode
