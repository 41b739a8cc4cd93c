"""Everything on a host that a network driver, or a test of one, could change, as text.

`difference` compares two snapshots: it is empty, or lists the facts that are gone and new. As a program, this file
prints one as JSON, for a host in namespaces: ``python snapshot.py [--nft COMMAND] [--except FOLDER] [FOLDER …]``.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from netplugin_sdk.core.engine_api import SOCKET, Docker
from netplugin_sdk.linux import namespaces

Snapshot = dict[str, list[str]]
"""The kind of object, and its place → a line for each fact, sorted unless the order has a meaning."""

FOLDERS = ("/run", "/tmp", "/var/tmp", "/dev/shm", "/var/lib/netplugin")

_SHOWN = 15  # lines for each kind of thing
_NAMES = (Path("/run/netns"), Path("/run/docker/netns"))

# Facts that change by themselves: timers, and effects of traffic.
_TICKS = re.compile(
    r" (\w+_timer|lastuse|expires|used|age) \S+| \[\d+:\d+\]|counter packets \d+ bytes \d+ ?| hoplimit \d+"
)
_UNSTEADY_LINK = {"operstate", "info_slave_data", "stats", "stats64"}
_UNSTEADY_SYSCTLS = re.compile(r"/(nf_conntrack_count|stable_secret|flush|dev_snmp6)$|/neigh/[^/]+/gc_")


def difference(before: Snapshot, after: Snapshot) -> str:
    """Facts that are gone (-) and new (+), kind by kind; empty if there are none."""
    text = []
    for kind in sorted(before.keys() | after.keys()):
        old, new = before.get(kind, []), after.get(kind, [])
        if "namespace " in kind and not (old and new):  # with all that is in it
            text += [f"{kind}: {'-' if old else '+'}{len(old or new)} lines"] if old or new else []
            continue
        changes = difflib.unified_diff(_short(kind, old, new), _short(kind, new, old), lineterm="", n=0)
        if lines := [line for line in changes if not line.startswith(("--- ", "+++ ", "@@ "))]:
            text += [f"{kind}:", *(f"  {line}" for line in lines[:_SHOWN])]
            if len(lines) > _SHOWN:
                text.append(f"  and {len(lines) - _SHOWN} more")
    return "\n".join(text)


def _short(kind: str, lines: list[str], other: list[str]) -> list[str]:
    """Of an interface that the other has not, the first line says enough."""
    if not kind.startswith(("links", "sysctls")):
        return lines
    known, said, kept = {_interface(line) for line in other}, set[str](), []
    for line in lines:
        if (of := _interface(line)) in known or of not in said:
            kept.append(line)
            said.add(of)
    return kept


def _interface(line: str) -> str:
    """The interface or the folder that a line about links or sysctls is about."""
    subject, _, _ = line.partition(" ")
    return str(Path(subject).parent) if subject.startswith("/") else subject


def take(folders: Sequence[str] = FOLDERS, nft: str = "nft", but: str | None = None) -> Snapshot:
    """The host as this process sees it, and all network namespaces that processes are in or that have names.

    Of the files those below `folders`, but not those below `but`.
    """
    here = {str(Path(f"/proc/self/ns/{kind}").readlink()): "the host" for kind in ("mnt", "net")}
    snapshot: Snapshot = {"processes": sorted(_processes()), "cgroups": sorted(_cgroups())}
    for inode, path in _mount_namespaces().items():
        where = here.get(inode, f"namespace {inode}")
        snapshot[f"mounts of {where}"] = _mounts(path)
    snapshot["files"] = [line for folder in folders for line in _files(Path(folder), but)]
    snapshot["names of namespaces"] = sorted(
        f"{path} {path.stat().st_ino}" for folder in _NAMES if folder.is_dir() for path in folder.iterdir()
    )
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for inode, path in _network_namespaces().items():
            namespaces.enter(path)
            where = here.get(inode, f"namespace {inode}")
            snapshot |= {f"{kind} of {where}": lines for kind, lines in _network(nft)}
    finally:
        namespaces.enter(f"/proc/self/fd/{home}")
        os.close(home)
    if SOCKET.exists():
        snapshot["docker"] = sorted(_docker())
    return snapshot


# ------------------------------------------------------------------------------------------------ of the whole host


def _processes() -> Iterator[str]:
    """Each with its namespaces, but this one. Kernel threads come and go."""
    for pid in _pids():
        try:
            command = (
                (Path("/proc") / pid / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            )
            inside = " ".join(str((Path("/proc") / pid / "ns" / kind).readlink()) for kind in ("net", "mnt", "pid"))
        except OSError:  # it has ended meanwhile
            continue
        if command and int(pid) != os.getpid():
            yield f"{pid} {command[:200]!r} {inside}"


def _pids() -> list[str]:
    return [path.name for path in Path("/proc").iterdir() if path.name.isdigit()]


def _mount_namespaces() -> dict[str, Path]:
    """Inode → the table of a process in it."""
    return _by_namespace("mnt", "mountinfo")


def _network_namespaces() -> dict[str, Path]:
    """Inode → a file that leads into it."""
    found = _by_namespace("net", "ns/net")
    for folder in _NAMES:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if (path.stat().st_dev, path.is_file()) == (Path("/proc/self/ns/net").stat().st_dev, True):
                found.setdefault(f"net:[{path.stat().st_ino}]", path)
    return found


def _by_namespace(kind: str, file: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for pid in sorted(_pids(), key=int):
        process = Path("/proc") / pid
        try:
            found.setdefault(str((process / "ns" / kind).readlink()), process / file)
        except OSError:
            continue
    return found


def _mounts(table: Path) -> list[str]:
    """In their order, without the numbers that the kernel gives them."""
    lines = []
    for line in table.read_text().splitlines():
        own, _, rest = line.partition(" - ")
        _, _, _, root, target, options, *optional = own.split()
        lines.append(f"{target} {root} {options} {' '.join(re.sub(':.*', '', flag) for flag in optional)} {rest}")
    return lines


def _cgroups() -> Iterator[str]:
    """All but those of the machine's own systemd, which come and go."""
    for folder, inside, _ in os.walk("/sys/fs/cgroup"):
        inside[:] = [name for name in inside if not name.endswith((".slice", ".scope", ".service"))]
        yield from (f"{folder}/{name}" for name in inside)


def _files(folder: Path, but: str | None) -> Iterator[str]:
    """The files below it, and the time of their last change."""
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if f"{at}/{name}" != but)
        for path in (Path(at), *(Path(at, name) for name in sorted(files))):
            try:
                found = path.lstat()
            except OSError:
                continue
            what = f"{path} {stat.filemode(found.st_mode)} {found.st_uid}:{found.st_gid} inode={found.st_ino}"
            empty = not stat.S_ISREG(found.st_mode) or not found.st_size  # a lock, as a rule
            yield what if empty else f"{what} size={found.st_size} modified={found.st_mtime_ns}"


def _docker() -> Iterator[str]:
    docker = Docker(SOCKET)
    try:
        for container in docker.call("GET", "/containers/json?all=1"):
            networks = container["NetworkSettings"]["Networks"]
            yield f"container {container['Id']} {container['Names']} {container['State']} {networks}"
        for network in docker.networks().values():
            addresses = network["IPAM"]["Config"]
            yield f"network {network['Id']} {network['Name']} {network['Driver']} {addresses} {network['Options']}"
        for volume in docker.call("GET", "/volumes")["Volumes"] or ():
            yield f"volume {volume['Name']}"
        for image in docker.call("GET", "/images/json"):
            yield f"image {image['Id']} {image['RepoTags']}"
    finally:
        docker.close()


# ------------------------------------------------------------------------------------- of this thread's namespace


def _network(nft: str) -> Iterator[tuple[str, list[str]]]:
    yield "links", list(_links())
    yield "addresses", sorted(_addresses())
    for family in ("-4", "-6"):
        yield f"routes {family}", sorted(_output("ip", family, "route", "show", "table", "all"))
        yield f"routing rules {family}", _output("ip", family, "rule")
        yield f"neighbours {family}", sorted(_output("ip", family, "neigh", "show", "nud", "permanent"))
    fdb = _output("bridge", "fdb") if shutil.which("bridge") else []
    yield "fdb", sorted(line for line in fdb if "permanent" in line or "static" in line)
    yield "queueing", sorted(_output("tc", "qdisc")) if shutil.which("tc") else []
    for program in ("iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"):
        if shutil.which(f"{program}-save"):
            yield program, [line for line in _output(f"{program}-save") if not line.startswith("#")]
    if shutil.which(shlex.split(nft)[0]):
        yield "nftables", _output(*shlex.split(nft), "--stateless", "list", "ruleset")
    yield "sockets", sorted(_sockets())
    yield "sysctls", sorted(_sysctls())


def _output(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}: status {done.returncode} {done.stderr.strip()}")
    return [_TICKS.sub("", line).rstrip() for line in done.stdout.splitlines()]


def _links() -> Iterator[str]:
    for link in json.loads("\n".join(_output("ip", "-details", "-json", "link")) or "[]"):
        name = link.pop("ifname")
        flags = link.pop("flags", [])
        yield f"{name} flags={[flag for flag in flags if flag not in ('NO-CARRIER', 'LOWER_UP')]}"
        info = link.pop("linkinfo", {})
        values = {"kind": info.get("info_kind"), **link, **info.get("info_data", {})}
        for key, value in values.items():
            if key not in _UNSTEADY_LINK and not key.endswith("_timer") and not key.startswith("topology_change"):
                yield f"{name} {key}={value}"


def _addresses() -> Iterator[str]:
    for link in json.loads("\n".join(_output("ip", "-json", "address")) or "[]"):
        for address in link.get("addr_info", ()):
            known = {
                key: value for key, value in address.items() if not key.endswith("life_time") and key != "tentative"
            }
            yield f"{link['ifname']} {known}"


def _sockets() -> Iterator[str]:
    for line in _output(
        "ss", "--no-header", "--listening", "--numeric", "--tcp", "--udp", "--raw", "--packet", "--unix"
    ):
        kind, state, _receive, _send, *rest = line.split()
        yield " ".join((kind, state, *rest))


def _sysctls() -> Iterator[str]:
    for folder, _, files in os.walk("/proc/sys/net"):
        for path in (f"{folder}/{name}" for name in files):
            if not _UNSTEADY_SYSCTLS.search(path):
                try:
                    yield f"{path} {Path(path).read_text().strip()}"
                except OSError:  # only to be written
                    continue


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nft", default="nft")
    parser.add_argument("--except", dest="but")
    parser.add_argument("folders", nargs="*", default=FOLDERS)
    arguments = parser.parse_args()
    print(json.dumps(take(arguments.folders, arguments.nft, arguments.but)))


if __name__ == "__main__":
    main()
