"""Findings of `netplugin doctor`: the faults of this host for network plugins, and the commands that fix them."""

from __future__ import annotations

import enum
import json
import os
import platform
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from netplugin_sdk.cnm import remote
from netplugin_sdk.core.engine_api import SOCKET, Docker, DockerError
from netplugin_sdk.errors import DriverError, NotFound, Unavailable
from netplugin_sdk.inspection import disk
from netplugin_sdk.linux import firewall, namespaces, sysctls
from netplugin_sdk.serving.settings import STATE_FOLDER
from netplugin_sdk.serving.sockets import PLUGIN_FOLDER
from netplugin_sdk.testing.forwarder import Place

_DAEMON_FILE = Path("/etc/docker/daemon.json")
_BUILT_IN = frozenset(("bridge", "host", "null", "none", "overlay", "macvlan", "ipvlan"))
_OLDEST = (20, 10)
_PROGRAM_TIMEOUT = 15.0  # seconds for a program or an answer
_RULES = (
    ("-N", "NETPLUGIN-doctor"),
    ("-A", "FORWARD", "-m", "comment", "--comment", "x", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT"),
    ("-t", "nat", "-A", "PREROUTING", "-m", "addrtype", "--dst-type", "LOCAL", "-j", "RETURN"),
    ("-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE"),
)
"""Of each kind that `linux.iptables` writes."""
_TABLE = (
    "add table inet x; add chain inet x y { type nat hook postrouting priority srcnat; }; "
    'add rule inet x y ct state established meta nfproto ipv4 masquerade comment "x"; '
    "add rule inet x y fib daddr type local return"
)


class Level(enum.StrEnum):
    """How a finding is to be taken."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    UNKNOWN = "not seen"


class Finding(msgspec.Struct, frozen=True):
    """One line: the subject, the finding, and the command that fixes a fault."""

    topic: str
    level: Level
    text: str
    fix: str | None = None


_ROOT = "sudo netplugin doctor"


def examine() -> Iterator[Finding]:
    """All findings, topic by topic."""
    yield from _versions()
    yield from _kernel()
    yield from _sysctls()
    yield from _firewall()
    engine = _Engine()
    yield from engine.findings()
    yield from _sockets(PLUGIN_FOLDER)
    yield from _specs(remote.DOCKER.specs)
    yield from _states(STATE_FOLDER)
    yield from engine.networks()


# ------------------------------------------------------------------------------------------------ Python and the SDK


def _versions() -> Iterator[Finding]:
    topic = "Python"
    text = f"Python {platform.python_version()}, {sys.executable}"
    fits = sys.version_info >= (3, 11)
    yield Finding(topic, Level.OK if fits else Level.PROBLEM, text, None if fits else "install Python 3.11 or newer")
    packages = ", ".join(f"{name} {version(name)}" for name in ("netplugin-sdk", "pyroute2", "msgspec", "httptools"))
    yield Finding(topic, Level.OK, packages)


# ------------------------------------------------------------------------------------------------------------ kernel


def _kernel() -> Iterator[Finding]:
    topic = "Kernel"
    yield Finding(topic, Level.OK, f"Linux {platform.release()} {platform.machine()}")
    with ThreadPoolExecutor(1) as thread:  # the namespace ends with it
        yield from thread.submit(lambda: list(_tried(topic))).result()


def _tried(topic: str) -> Iterator[Finding]:
    try:
        namespaces.unshare()
    except OSError as error:
        if os.geteuid() != 0:
            yield Finding(topic, Level.UNKNOWN, f"what it can do cannot be tried without root: {error.strerror}", _ROOT)
        else:
            fix = "sysctl -w user.max_net_namespaces=15000, or run it with CAP_SYS_ADMIN"
            yield Finding(topic, Level.PROBLEM, f"no network namespace can be made: {error.strerror}", fix)
        return
    yield Finding(topic, Level.OK, "network namespaces")
    with IPRoute() as ipr:
        yield _link(ipr, topic, "bridge", Level.PROBLEM, "networks of most drivers")
        yield _link(ipr, topic, "veth", Level.PROBLEM, "containers of most drivers", peer={"ifname": "np-peer"})
        parent = ipr.link_lookup(ifname="np-veth")
        upon = {"link": parent[0]} if parent else {}
        yield _link(ipr, topic, "macvlan", Level.WARNING, "drivers that put containers on the LAN", **upon)
        if upon:
            ipr.link("del", ifname="np-macvlan")  # a parent has one or the other
        yield _link(ipr, topic, "ipvlan", Level.WARNING, "drivers that share a MAC address", **upon, ipvlan_mode=0)
        options = {"vxlan_id": 7, "vxlan_port": 4789}
        yield _link(ipr, topic, "vxlan", Level.WARNING, "networks over several hosts", **options)
    yield _ipv6(topic)
    yield _sctp(topic)
    yield from _filters(topic)


def _link(ipr: Any, topic: str, kind: str, level: Level, needs: str, **attributes: object) -> Finding:
    try:
        ipr.link("add", kind=kind, ifname=f"np-{kind}", **attributes)
    except (NetlinkError, OSError) as error:
        reason = os.strerror(error.args[0]) if isinstance(error.args[0], int) else str(error)
        return Finding(topic, level, f"no {kind} ({needs}): {reason}", _module(kind))
    return Finding(topic, Level.OK, kind)


def _module(name: str) -> str:
    """How to get a module of the kernel: it can be there and not loaded, or in a package of its own."""
    folder = Path("/lib/modules") / platform.release()
    if any(folder.glob(f"kernel/**/{name}.ko*")):
        return f"modprobe {name}"
    extra = f"linux-modules-extra-{platform.release()}"
    return f"modprobe {name}; if there is no such module: apt-get install {extra}, or a kernel that has it"


def _ipv6(topic: str) -> Finding:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM):
            return Finding(topic, Level.OK, "IPv6")
    except OSError as error:
        fix = "boot without ipv6.disable=1"
        return Finding(topic, Level.WARNING, f"no IPv6 (networks with --ipv6): {error.strerror}", fix)


def _sctp(topic: str) -> Finding:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP):
            return Finding(topic, Level.OK, "SCTP")
    except OSError as error:
        text = f"no SCTP sockets: published SCTP ports are not kept from other programs: {error.strerror}"
        return Finding(topic, Level.WARNING, text, _module("sctp"))


def _filters(topic: str) -> Iterator[Finding]:
    used = firewall.detect()
    for program, family in (("iptables", "IPv4"), ("ip6tables", "IPv6")):
        level = Level.PROBLEM if used == "iptables" and family == "IPv4" else Level.WARNING
        if shutil.which(program) is None:
            yield Finding(topic, level, f"no {program}: no firewall for {family}", "apt-get install iptables")
            continue
        failed = next((said for rule in _RULES if (said := _fails(program, *rule))), None)
        if failed:
            fix = "modprobe -a nf_tables nft_compat xt_conntrack xt_addrtype xt_comment xt_MASQUERADE iptable_nat"
            yield Finding(topic, level, f"{program} cannot write the rules of plugins: {failed}", fix)
        else:
            yield Finding(topic, Level.OK, f"{program} filters and translates")
    level = Level.PROBLEM if used == "nftables" else Level.WARNING
    if shutil.which("nft") is None:
        yield Finding(topic, level, "no nft: Docker's nftables mode cannot be used", "apt-get install nftables")
    elif failed := _fails("nft", _TABLE):
        fix = "modprobe -a nf_tables nft_fib_inet nft_masq nft_ct"
        yield Finding(topic, level, f"nft cannot write the rules of plugins: {failed}", fix)
    else:
        yield Finding(topic, Level.OK, "nft filters and translates")


def _run(*command: str) -> tuple[int, str, str]:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROGRAM_TIMEOUT, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, "", str(error)
    return done.returncode, done.stdout, done.stderr


def _fails(*command: str) -> str | None:
    """The complaint of a program that fails; None if it succeeds."""
    status, _, errors = _run(*command)
    return (errors.strip().splitlines() or [f"status {status}"])[0] if status else None


# ----------------------------------------------------------------------------------------------------------- sysctls


def _sysctls() -> Iterator[Finding]:
    topic = "Sysctls"
    yield _sysctl(topic, "net/ipv4/ip_forward", lambda v: v == 1, 1, "containers do not reach other networks")
    text = "containers do not reach other networks by IPv6"
    yield _sysctl(topic, "net/ipv6/conf/all/forwarding", lambda v: v == 1, 1, text)
    text = "what goes from one port of a bridge to another is not filtered: icc=false and --internal do not isolate"
    yield _sysctl(topic, "net/bridge/bridge-nf-call-iptables", lambda v: v == 1, 1, text)
    text = "an engine that calls many times at once waits a second where the backlog is full"
    yield _sysctl(topic, "net/core/somaxconn", lambda v: v >= 1024, 4096, text)
    yield _sysctl(topic, "user/max_net_namespaces", lambda v: v >= 128, 15000, "containers get no network namespace")


def _sysctl(topic: str, name: str, fits: Callable[[int], bool], wanted: int, otherwise: str) -> Finding:
    dotted = name.replace("/", ".")
    fix = f"sysctl -w {dotted}={wanted}, and for good: echo {dotted}={wanted} > /etc/sysctl.d/90-netplugin.conf"
    try:
        value = sysctls.read(name)
    except DriverError as error:
        return Finding(topic, Level.UNKNOWN, str(error), _ROOT)
    if value is None:
        module = "modprobe br_netfilter" if name.startswith("net/bridge/") else None
        return Finding(topic, Level.WARNING, f"no {dotted}: {otherwise}", module)
    if fits(int(value)):
        return Finding(topic, Level.OK, f"{dotted} = {value}")
    return Finding(topic, Level.WARNING, f"{dotted} = {value}: {otherwise}", fix)


# ---------------------------------------------------------------------------------------------------------- firewall


def _firewall() -> Iterator[Finding]:
    topic = "Firewall"
    _, said, _ = _run("iptables", "--version")
    kind = match[1] if (match := re.search(r"\((\w+)\)", said)) else "legacy"
    if said:
        yield Finding(topic, Level.OK, f"{said.strip()}: rules are kept in {'nf_tables' if kind != 'legacy' else 'xt'}")
    if os.geteuid() != 0:
        yield Finding(topic, Level.UNKNOWN, "rules cannot be read without root", _ROOT)
        return
    yield Finding(topic, Level.OK, f"Docker writes with {firewall.detect()} here, and so do plugins")
    other = "iptables-legacy-save" if kind != "legacy" else "iptables-nft-save"
    if shutil.which(other):
        # By this alone it would load the modules of the other kind, were they not there.
        names = Path("/proc/net/ip_tables_names")
        has = other != "iptables-legacy-save" or (names.exists() and names.read_text().strip())
        rules = _run(other)[1].count("\n-A ") if has else 0
        if rules:
            text = (
                f"{rules} rules were written with {other.removesuffix('-save')}: both kinds filter, whatever one says"
            )
            yield Finding(topic, Level.WARNING, text, f"{other} shows them; {other.removesuffix('-save')} -F removes")
    policy = re.search(r"^-P FORWARD (\w+)", _run("iptables", "-S", "FORWARD")[1], re.MULTILINE)
    if policy:
        yield Finding(topic, Level.OK, f"what no rule accepts is {'dropped' if policy[1] == 'DROP' else 'forwarded'}")


# ------------------------------------------------------------------------------------------------------------ Docker


class _Engine:
    """The engine of this host, asked once."""

    def __init__(self) -> None:
        self.info: dict[str, Any] = {}
        self.listed: list[dict[str, Any]] = []
        self.managed: list[dict[str, Any]] = []
        self.failed: str | None = None
        try:
            with Docker(timeout=_PROGRAM_TIMEOUT) as docker:
                self.info = docker.call("GET", "/info")
                self.listed = list(docker.networks().values())
                self.managed = docker.call("GET", "/plugins") or []
        except (Unavailable, DockerError) as error:
            self.failed = str(error)

    def findings(self) -> Iterator[Finding]:
        topic = "Docker"
        if self.failed is not None:
            if "Permission denied" in self.failed:
                yield Finding(topic, Level.UNKNOWN, f"cannot be asked without root: {self.failed}", _ROOT)
            else:
                fix = "systemctl start docker, or set DOCKER_HOST=unix:///… to where it listens"
                yield Finding(topic, Level.PROBLEM, f"does not answer: {self.failed}", fix)
        else:
            yield from self._told(topic)
        yield from self._configured(topic)

    def _told(self, topic: str) -> Iterator[Finding]:
        info = self.info
        told = str(info["ServerVersion"])
        numbers = tuple(int(number) for number in re.findall(r"\d+", told)[:2])
        if numbers >= _OLDEST:
            yield Finding(topic, Level.OK, f"Engine {told} on {info['OperatingSystem']}")
        else:
            yield Finding(topic, Level.WARNING, f"Engine {told}: tested are 20.10 and newer", "install a newer engine")
        security = " ".join(info.get("SecurityOptions") or ())
        if "name=rootless" in security:
            text = "it runs rootless: plugins are to run in its namespaces, and their sockets are elsewhere"
            yield Finding(topic, Level.WARNING, text, "nsenter -U -n -m -t $(cat $XDG_RUNTIME_DIR/docker.pid) PLUGIN")
        live = "containers go on without it (live-restore)" if info.get("LiveRestoreEnabled") else "no live-restore"
        yield Finding(topic, Level.OK, live)
        backend = (info.get("FirewallBackend") or {}).get("Driver")
        if backend:
            yield Finding(topic, Level.OK, f"firewall back end: {backend}")
        for warning in info.get("Warnings") or ():
            # Of cgroups and the like, but for those of bridges.
            if "bridge" in warning or "forward" in warning:
                yield Finding(topic, Level.WARNING, warning.removeprefix("WARNING: "), "modprobe br_netfilter")
        if Path("/run/firewalld").is_dir() and _run("firewall-cmd", "--state")[0] == 0:
            text = "firewalld runs: when it reloads rules vanish for a moment, and plugins put theirs back"
            yield Finding(topic, Level.OK, text)

    def _configured(self, topic: str) -> Iterator[Finding]:
        settings: dict[str, Any] = {}
        try:
            settings = json.loads(_DAEMON_FILE.read_text())
            if not isinstance(settings, dict):
                raise ValueError("it is not an object")
        except FileNotFoundError:
            pass
        except OSError as error:
            yield Finding(topic, Level.UNKNOWN, f"{_DAEMON_FILE} cannot be read: {error.strerror}", _ROOT)
        except ValueError as error:
            settings = {}
            fix = f"dockerd --validate --config-file {_DAEMON_FILE}"
            yield Finding(topic, Level.PROBLEM, f"{_DAEMON_FILE} is malformed: {error}", fix)
        command = _dockerd()
        for name, off in (
            ("iptables", "it writes no rules: DOCKER-USER and its FORWARD policy are yours, and plugins write theirs"),
            ("ip6tables", "it writes no rules for IPv6"),
        ):
            if settings.get(name) is False or f"--{name}=false" in command:
                fix = f"remove {name}=false from {_DAEMON_FILE} or its command line, and restart it"
                yield Finding(topic, Level.WARNING, f"{name} is off: {off}", fix)
        if settings.get("userland-proxy") is False or "--userland-proxy=false" in command:
            yield Finding(topic, Level.OK, "no userland proxy: published ports of its bridges are not reached by ::1")

    def networks(self) -> Iterator[Finding]:
        """Find networks whose driver is not there."""
        topic = "Networks"
        enabled = {plugin["Name"].removesuffix(":latest") for plugin in self.managed if plugin["Enabled"]}
        for network in self.listed:
            driver = network["Driver"].removesuffix(":latest")
            if driver in _BUILT_IN or driver in enabled or network["Scope"] == "swarm":
                continue
            name = network["Name"]
            fix = f"start {driver}, or: docker network rm {shlex.quote(name)}"
            try:
                url = remote.find(driver).url
            except NotFound:
                yield Finding(topic, Level.PROBLEM, f"{name} wants the plugin {driver}, and there is none", fix)
            except DriverError as error:
                yield Finding(topic, Level.PROBLEM, f"{name} wants the plugin {driver}: {error}", fix)
            else:
                if url.startswith("unix://") and _listens(Path(url.removeprefix("unix://"))) is False:
                    text = f"{name} wants the plugin {driver}, and nobody serves it"
                    yield Finding(topic, Level.PROBLEM, text, fix)
                else:
                    yield Finding(topic, Level.OK, f"{name} by {driver}")


def _dockerd() -> list[str]:
    """The arguments of the engine that runs here (``dockerd --pidfile``)."""
    try:
        pid = int(SOCKET.with_suffix(".pid").read_text())
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (OSError, ValueError):
        return []


# ----------------------------------------------------------------------------------------------------------- folders


def _sockets(folder: Path) -> Iterator[Finding]:
    topic = "Plugins"
    try:
        mode = folder.stat().st_mode
        entries = sorted(folder.iterdir())
    except FileNotFoundError:
        yield Finding(topic, Level.OK, f"no {folder} yet: the first plugin makes it")
        return
    except PermissionError:
        yield Finding(topic, Level.UNKNOWN, f"{folder} cannot be read without root", _ROOT)
        return
    if mode & stat.S_IWOTH:
        text = f"everybody may write to {folder}, and so be a plugin of the engine"
        yield Finding(topic, Level.PROBLEM, text, f"chmod o-w {folder}")
    folders = [entry for entry in entries if entry.is_dir() and not entry.is_symlink()]
    places = {entry: Place.of(entry) for entry in folders}
    inside = [each for entry, place in places.items() if place is None for each in _inside(entry)]
    traced = {place.path: place for place in places.values() if place is not None}
    for path in (*entries, *inside):
        if not path.is_socket():
            continue
        listens = _listens(path)
        if listens is None:
            yield Finding(topic, Level.UNKNOWN, f"{path} cannot be tried without root", _ROOT)
        elif listens:
            under = ", under a trace" if path in traced else ""
            yield Finding(topic, Level.OK, f"{path.stem} listens at {path}{under}")
        elif path in traced and _listens(traced[path].plugin):
            text = f"a trace of {path.stem} was killed: Docker's calls end at it, while the plugin listens"
            place = traced[path]
            fix = f"{shlex.join(('mv', str(place.plugin), str(path)))} && rm -r {shlex.quote(str(place.folder))}"
            yield Finding(topic, Level.PROBLEM, text, fix)
        else:
            text = f"{path} is stale: nobody listens, and Docker waits in vain"
            fix = f"systemctl start {path.stem} (or its program), or: rm {shlex.quote(str(path))}"
            yield Finding(topic, Level.WARNING, text, fix)
    for place in traced.values():
        if not _listens(place.path) and not _listens(place.plugin):
            fix = f"rm -r {shlex.quote(str(place.folder))}"
            yield Finding(topic, Level.WARNING, f"{place.folder} is left of a trace of {place.path.stem}", fix)


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _listens(path: Path) -> bool | None:
    """None where that cannot be tried."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2)
        try:
            probe.connect(str(path))
        except PermissionError:
            return None
        except OSError:
            return False
    return True


def _specs(folders: Iterable[Path]) -> Iterator[Finding]:
    topic = "Plugins"
    for folder in folders:
        for path in sorted(path for path in folder.glob("**/*") if path.suffix in (".spec", ".json")):
            # Looked for there alone, so that no other file of its name is found first.
            alone = remote.Folders(sockets=Path("/nonexistent"), specs=(path.parent,))
            try:
                address = remote.find(path.stem, folders=alone)
            except DriverError as error:
                fix = f"rm {shlex.quote(str(path))}, or correct it: unix:///…, tcp://HOST:PORT or a JSON object"
                yield Finding(topic, Level.PROBLEM, f"{path} is malformed: {error}", fix)
                continue
            where = address.url.removeprefix("unix://")
            if where != address.url and _listens(Path(where)) is False:
                text = f"{path.stem} by {path} is at {where}, where nobody listens"
                yield Finding(topic, Level.WARNING, text, f"start {path.stem}, or: rm {shlex.quote(str(path))}")
            else:
                yield Finding(topic, Level.OK, f"{path.stem} is at {address.url}, by {path}")


def _states(folder: Path) -> Iterator[Finding]:
    topic = "State"
    try:
        entries = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    except FileNotFoundError:
        return
    except PermissionError:
        yield Finding(topic, Level.UNKNOWN, f"{folder} cannot be read without root", _ROOT)
        return
    for entry in entries:
        try:
            networks = len(disk.read(entry))
        except NotFound:
            continue  # an IPAM driver's, or none yet
        except Unavailable as error:
            denied = not os.access(entry, os.R_OK | os.X_OK)
            fix = _ROOT if denied else f"mv {shlex.quote(str(entry))} elsewhere; the plugin then begins again"
            yield Finding(topic, Level.UNKNOWN if denied else Level.PROBLEM, str(error), fix)
            continue
        what = f"{networks} network{'' if networks == 1 else 's'}"
        if (pid := disk.holder(entry)) is not None:
            yield Finding(topic, Level.OK, f"{entry.name} knows {what} and runs as pid {pid}")
        elif networks:
            fix = f"start {entry.name}; or if it is gone for good: rm -r {shlex.quote(str(entry))}"
            yield Finding(topic, Level.WARNING, f"{entry} knows {what}, and no plugin runs with it", fix)
        else:
            yield Finding(topic, Level.OK, f"{entry} knows no network; its plugin does not run")
