"""A private Docker Engine: a real one, of a chosen version, that leaves nothing of the host changed.

    with PrivateEngine("26.1") as engine:
        with engine.start_plugin("l2", [sys.executable, "/where/it/is/l2.py"]):
            engine.docker("network", "create", "--driver", "l2", "mynet")

The engine comes from Debian, as a root file system that is built once with debootstrap and kept. It runs in network,
mount and PID namespaces of its own, on an overlay of that root file system. All of its processes live in one PID
namespace whose first process dies with ours, so that nothing can outlive it, not even a SIGKILL:

    host            namespaces: net, pid                     the engine's mount namespace
    this process →  first process (/run and /var/lib are     dockerd, docker; / is the overlay,
                    private; the rest is the host's files)   /run is the same as at its left
                    plugins run here

The outside host is a further network namespace, joined to the engine's by a veth pair: it has no route to any container
network, so that it sees which packets are masqueraded.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from netplugin_sdk.core.engine_api import Docker
from netplugin_sdk.testing import debian

VERSIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "20.10": ("bookworm", ("docker.io", "docker-compose")),
    "26.1": ("trixie", ("docker.io", "docker-cli", "docker-compose")),
    "28.5": ("sid", ("docker.io", "docker-cli", "docker-compose")),
}
"""Engine version → Debian's suite that has it, and the packages."""

_PACKAGES = ("iptables", "nftables", "iproute2", "iputils-ping", "iperf3", "ca-certificates", "busybox-static")
_PLUGINS = "/run/docker/plugins"

ENGINE_ADDRESS = "198.51.100.1"
"""IPv4 address (RFC 5737) of the engine's host on the link to the outside host."""

OUTSIDE_ADDRESS = "198.51.100.2"
"""IPv4 address of the outside host."""

# The first process of the PID namespace. $1 is the lab's folder, $3 the host's name. It says "ready" and then reaps
# orphans.
_FIRST = f"""
set -eu
mount --make-rprivate /
mount -t overlay overlay -o lowerdir=/var/lib,upperdir="$1/lib-upper",workdir="$1/lib-work" /var/lib
mount -t tmpfs -o mode=755 tmpfs /run
mount --make-shared /run
echo "$3" > /proc/sys/kernel/hostname
mkdir -p {_PLUGINS} /run/netns
ip link set lo up
ip netns add outside
ip link add eth0 type veth peer name eth0 netns outside
ip addr add {ENGINE_ADDRESS}/24 dev eth0
ip -6 addr add 2001:db8:51::1/64 dev eth0 nodad
ip link set eth0 up
ip -n outside link set lo up
ip -n outside addr add {OUTSIDE_ADDRESS}/24 dev eth0
ip -n outside -6 addr add 2001:db8:51::2/64 dev eth0 nodad
ip -n outside link set eth0 up
ip route add default via {OUTSIDE_ADDRESS}
ip -6 route add default via 2001:db8:51::2
unshare --mount --propagation unchanged bash -c "$2" engine "$1" &
while ! [ -e /run/engine.pid ]; do sleep 0.02; kill -0 $!; done
echo ready
while :; do sleep 3600 & wait $!; done
"""

# The anchor of the engine's mount namespace: makes the overlay its root and stays. pivot_root and not chroot, since
# `docker exec` would enter the host's root.
_ANCHOR = """
set -eu
cd "$1/root"
mount -t overlay overlay -o lowerdir="$1/image",upperdir="$1/upper",workdir="$1/work" .
cd .
cd "$1/root"
mount --rbind /run run
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /sys/fs/cgroup sys/fs/cgroup
mount --rbind /dev dev
mkdir -p var/lib/docker .old
mount --bind "$1/data" var/lib/docker
pivot_root . .old
cd /
mount --make-rprivate /.old
umount -l /.old
echo $$ > /run/engine.pid.new
mv /run/engine.pid.new /run/engine.pid
exec sleep infinity
"""

_IMPORT_BUSYBOX = """
set -eu
image=$(mktemp -d)
mkdir -p $image/bin $image/tmp
cp /bin/busybox $image/bin/
$image/bin/busybox --install $image/bin
tar -C $image -c . | docker import -c 'ENV PATH=/bin' -c 'CMD ["sh"]' - busybox
rm -r $image
"""


class EngineUnavailable(Exception):
    """A private engine is impossible here; the text names the missing part, and the command that fixes it."""


class EngineError(Exception):
    """The engine, or a program beside it, did not do what it was told; the text has what it said."""


# ------------------------------------------------------------------------------------------------ root file systems


def require(version: str) -> None:
    """Raise `EngineUnavailable` unless a private engine of this version can be had here; build nothing."""
    if version not in VERSIONS:
        raise EngineUnavailable(f"there is no Engine {version} here, only {', '.join(VERSIONS)}")
    if os.geteuid() != 0:
        raise EngineUnavailable("a private Docker Engine needs root: run this as root")
    programs = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2"}
    if not debian.is_built(_root(version), _packages(version)):
        programs["debootstrap"] = "debootstrap"
    missing = sorted({package for program, package in programs.items() if shutil.which(program) is None})
    if missing:
        raise EngineUnavailable(
            f"a private Docker Engine needs {', '.join(missing)}: apt-get install {' '.join(missing)}"
        )


def root_file_system(version: str) -> Path:
    """The root file system of this engine's version, built where it is missing (30 to 60 s, one process at a time).

    It is kept under ``/var/cache/netplugin-sdk``, or ``$NETPLUGIN_CACHE``. ``$NETPLUGIN_DEBIAN_MIRROR`` names a mirror.

    Raises:
        EngineUnavailable: it cannot be built here; the text says why.
    """
    require(version)
    suite, _ = VERSIONS[version]
    try:
        return debian.root_file_system(
            _root(version),
            suite,
            _packages(version),
            told=lambda root: print(
                f"building Docker Engine {version} (Debian {suite}) in {root}, about a minute …", file=sys.stderr
            ),
        )
    except debian.DebianUnavailable as error:
        raise EngineUnavailable(str(error)) from error


def _root(version: str) -> Path:
    return debian.cache() / "engines" / version


def _packages(version: str) -> tuple[str, ...]:
    return (*VERSIONS[version][1], *_PACKAGES)


# ----------------------------------------------------------------------------------------------------------- engine


class Process:
    """A program that runs beside the engine; a context manager that stops it."""

    def __init__(self, name: str, starter: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.log = log
        """The file with what it printed."""
        self._starter = starter  # nsenter, which waits for it and ends as it ends

    @property
    def pid(self) -> int:
        """Its process id, as this process sees it. Raises `EngineError` if it has ended."""
        return _child_of(self._starter.pid)

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._starter.poll() is None

    def stop(self) -> int:
        """End it with SIGTERM and return its exit status. Raises `EngineError` if it takes over 20 s."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> int:
        with contextlib.suppress(EngineError, ProcessLookupError):  # it has ended by itself
            os.kill(self.pid, number)
        try:
            return self._starter.wait(20)
        except subprocess.TimeoutExpired:
            os.kill(self.pid, signal.SIGKILL)
            raise EngineError(f"{self.name} did not stop; its log:\n{self.log.read_text()}") from None

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class PrivateEngine:
    """A running Docker Engine with its own network, an image `busybox`, and an outside host; a context manager.

    Args:
        version: one of `VERSIONS`.
        arguments: further ones for ``dockerd``.
        hostname: of the engine's host.

    Raises:
        EngineUnavailable: it cannot be had here.
        EngineError: it did not start; the text ends with its log.
    """

    def __init__(self, version: str = "26.1", arguments: Sequence[str] = (), hostname: str = "engine") -> None:
        self.version = version
        self.hostname = hostname
        self._arguments = arguments
        image = root_file_system(version)
        labs = debian.cache() / "labs"
        labs.mkdir(parents=True, exist_ok=True)
        with (labs / ".lock").open("w") as one_at_a_time:  # a lab that is not locked yet is not stale
            fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
            _remove_stale(labs)
            self.folder = Path(tempfile.mkdtemp(prefix=f"{version}-", dir=labs))
            """The folder that it keeps its files in; removed with it."""
            self._lock = (self.folder / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._first: subprocess.Popen[bytes] | None = None
        try:
            for name in ("root", "upper", "work", "data", "lib-upper", "lib-work"):
                (self.folder / name).mkdir()
            (self.folder / "image").symlink_to(image)
            self._start_namespaces()
            self.start()
            self._in_engine(["bash", "-c", _IMPORT_BUSYBOX], timeout=60)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------------ programs

    def docker(self, *arguments: str, timeout: float = 120) -> str:
        """The output of ``docker ARGUMENTS``, without the last newline.

        Raises:
            EngineError: it failed; the text is what it wrote to standard error.
        """
        done = self.run_docker(*arguments, timeout=timeout)
        if done.returncode != 0:
            raise EngineError(f"docker {shlex.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout.rstrip("\n")

    def run_docker(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run ``docker ARGUMENTS`` with the engine's own client; the result has texts and status."""
        return self._run([*self._engine_prefix(), "docker", *arguments], timeout)

    def run(self, command: Sequence[str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a program of the host in the engine's network namespace."""
        return self._run([*self._prefix(), *command], timeout)

    def run_outside(self, command: Sequence[str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a program of the host on the outside host."""
        return self._run([*self._prefix(), "nsenter", "--net=/run/netns/outside", *command], timeout)

    def spawn(self, name: str, command: Sequence[str], *, outside: bool = False) -> Process:
        """Start a program of the host in the engine's network namespace, or `outside`; its log is ``NAME.log``."""
        log = self.folder / f"{name}.log"
        prefix = [*self._prefix(), *(["nsenter", "--net=/run/netns/outside"] if outside else [])]
        with log.open("ab") as output:
            starter = subprocess.Popen([*prefix, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        return Process(name, starter, log)

    def start_plugin(self, name: str, command: Sequence[str], timeout: float = 60) -> Process:
        """Start a plugin that serves ``/run/docker/plugins/NAME.sock``, and wait until it listens.

        Raises:
            EngineError: another one listens there; it ended, or does not listen in time, and the text has its log.
        """
        address = self.plugin_folder / f"{name}.sock"
        if listens(address):
            raise EngineError(f"another plugin listens at {_PLUGINS}/{name}.sock")
        plugin = self.spawn(name, command)
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not plugin.running or listens(address), timeout)
            if plugin.running:
                return plugin
        plugin.kill()
        raise EngineError(f"plugin {name} does not listen; its log:\n{plugin.log.read_text()}")

    @property
    def plugin_folder(self) -> Path:
        """The engine's ``/run/docker/plugins``, as this process can reach it."""
        return self.run_folder / Path(_PLUGINS).relative_to("/run")

    @property
    def run_folder(self) -> Path:
        """``/run`` of the engine and of what runs beside it, as this process can reach it."""
        return Path(f"/proc/{self._first_pid}/root/run")

    @property
    def network_namespace(self) -> Path:
        """That of the engine and of what runs beside it, as this process can reach it."""
        return Path(f"/proc/{self._first_pid}/ns/net")

    @property
    def api_socket(self) -> Path:
        """The socket of the engine's API, as this process can reach it."""
        return self.run_folder / "docker.sock"

    def api(self, timeout: float = 120) -> Docker:
        """The engine's API, on a connection of its own; a context manager."""
        return Docker(self.api_socket, timeout=timeout)

    @property
    def log(self) -> Path:
        """The file with the log of ``dockerd``."""
        return self.folder / "dockerd.log"

    # -------------------------------------------------------------------------------------------- start and stop

    def start(self) -> None:
        """Start ``dockerd`` and wait until it answers; the constructor did so already."""
        arguments = ["dockerd", f"--cgroup-parent=/{self.folder.name}", *self._arguments]
        with self.log.open("ab") as output:
            self._daemon = subprocess.Popen(
                [*self._engine_prefix(), *arguments], stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

        def answers() -> bool:
            return self._daemon.poll() is not None or self.run_docker("version", timeout=60).returncode == 0

        with contextlib.suppress(TimeoutError):
            wait_until(answers, 120, every=0.2)
            if self._daemon.poll() is None:
                return
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
        raise EngineError(f"Docker Engine {self.version} does not start; the end of its log:\n{tail}")

    def stop(self) -> None:
        """Stop ``dockerd`` with SIGTERM, as a restart of the service does."""
        os.kill(_child_of(self._daemon.pid), signal.SIGTERM)
        self._daemon.wait(60)

    def kill(self) -> None:
        """End ``dockerd`` with SIGKILL; containers may go on."""
        os.kill(_child_of(self._daemon.pid), signal.SIGKILL)
        self._daemon.wait(20)

    def close(self) -> None:
        """End all of it and remove its traces. May be called again."""
        if self._first is not None:
            with contextlib.suppress(ProcessLookupError, EngineError):
                os.kill(_child_of(self._first.pid), signal.SIGKILL)  # takes the whole PID namespace along
            self._first.wait(30)
            self._first = None
        _remove_lab(self.folder)
        self._lock.close()

    def __enter__(self) -> PrivateEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------ namespaces

    def _start_namespaces(self) -> None:
        unshare = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        first = ["bash", "-c", _FIRST, "lab", str(self.folder), _ANCHOR, self.hostname]
        with (self.folder / "namespaces.log").open("wb") as errors:
            self._first = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *unshare, *first],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for this process, which ends it in order
            )
        assert self._first.stdout is not None
        with self._first.stdout as said:
            if said.readline() != b"ready\n":
                reason = (self.folder / "namespaces.log").read_text().strip()
                raise EngineUnavailable(f"cannot make the namespaces of a private Docker Engine: {reason}")
        self._first_pid = _child_of(self._first.pid)
        self._anchor = Path(f"/proc/{self._first_pid}/root/run/engine.pid").read_text().strip()

    def _prefix(self) -> list[str]:
        return ["nsenter", f"--target={self._first_pid}", "--net", "--mount", "--pid", "--uts", "--wd=/", "--"]

    def _engine_prefix(self) -> list[str]:
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return [
            *self._prefix(),
            "nsenter",
            f"--target={self._anchor}",
            "--mount",
            "--",
            "env",
            "-i",
            path,
            "HOME=/root",
        ]

    def _in_engine(self, command: Sequence[str], timeout: float) -> str:
        done = self._run([*self._engine_prefix(), *command], timeout)
        if done.returncode != 0:
            raise EngineError(f"{shlex.join(command)}: {done.stderr.strip()}")
        return done.stdout

    @staticmethod
    def _run(command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                output, errors = process.communicate(timeout=timeout)
            except BaseException as error:
                # nsenter's child would live on
                with contextlib.suppress(ProcessLookupError, EngineError):
                    os.kill(_child_of(process.pid), signal.SIGKILL)
                process.kill()
                if isinstance(error, subprocess.TimeoutExpired):
                    raise EngineError(f"{shlex.join(command[-6:])} takes over {timeout} s") from None
                raise
            return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _child_of(pid: int) -> int:
    """The one child of a process, which nsenter and unshare start for the new PID namespace."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    if not children:
        raise EngineError(f"process {pid} has no child (any more)")
    return int(children[0])


def listens(path: Path) -> bool:
    """Whether somebody serves the unix socket of this path."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def wait_until(condition: Callable[[], bool], timeout: float, every: float = 0.02) -> None:
    """Wait until it holds; raise TimeoutError if it does not within `timeout` seconds."""
    until = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(every)


def _remove_stale(labs: Path) -> None:
    """Remove labs whose owners were killed: their locks are free."""
    for lab in labs.glob("[!.]*"):
        with contextlib.suppress(OSError), (lab / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_lab(lab)


def _remove_lab(lab: Path) -> None:
    # Managed plugins have groups of their own beside that of the lab, named by their ids.
    names = {lab.name, *(plugin.name for plugin in lab.glob("data/plugins/*"))}
    # os.walk and not Path.glob, which raises where a cgroup of another lab goes away meanwhile.
    cgroups = [Path(at, name) for at, inside, _ in os.walk("/sys/fs/cgroup") for name in names.intersection(inside)]
    for cgroup in cgroups:
        for folder, _, _ in os.walk(cgroup, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
    shutil.rmtree(lab, ignore_errors=True)
