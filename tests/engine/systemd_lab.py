"""A host with a real systemd, Docker's own units and a plugin's two. Its disk survives from one boot to the next.

It runs this machine's systemd as the first process of its own namespaces. The root is a new tree. From this machine it
has only the programs, read-only, and a copy-on-write /etc. It has none of this machine's mounts, since systemd would
unmount them at shutdown. containerd and dockerd are in a mount namespace of their own; its root is the root file
system of an engine (`netplugin_sdk.testing.engine`), and its /run is the same as outside.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from netplugin_sdk.testing.engine import ENGINE_ADDRESS, OUTSIDE_ADDRESS, root_file_system, wait_until

from ..patience import PATIENCE

SYSTEMD = Path("/lib/systemd/systemd")
ENGINE_ADDRESS6, OUTSIDE_ADDRESS6 = "2001:db8:51::1", "2001:db8:51::2"

_REPOSITORY = Path(__file__).parents[2]
_EXAMPLES = _REPOSITORY / "examples"
_DISK = ("docker", "containerd", "engine", "engine-work", "etc", "etc-work", "journal", "lib", "units")

# Nothing that would touch the machine below, as sysctls, udev and modules do.
_SYSTEM_TARGETS = (
    *("basic", "final", "local-fs", "local-fs-pre", "multi-user", "network", "network-online", "network-pre", "paths"),
    *("poweroff", "shutdown", "slices", "sockets", "swap", "sysinit", "time-set", "timers", "umount"),
)
_SYSTEM_UNITS = (
    *(f"{name}.target" for name in _SYSTEM_TARGETS),
    *("systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket"),
    "systemd-poweroff.service",
)
_DOCKER_UNITS = ("containerd.service", "docker.service", "docker.socket")
_WANTED = {
    "sysinit.target": ("systemd-journald.service",),
    "sockets.target": ("systemd-journald.socket", "systemd-journald-dev-log.socket", "docker.socket"),
    "multi-user.target": ("containerd.service", "docker.service"),
}
_LOST = "-sys_boot,-sys_module,-sys_time,-syslog"  # capabilities over what has no namespaces

# Mounts of a machine that has been in use, in a mount namespace of their own: each boot shows that they do not matter.
# A mount below another, in the place of another, hidden by another, of a file, of a namespace, of a folder on itself,
# and one with a name that mountinfo escapes.
_MOUNTS_OF_OTHERS = """
set -eu
mkdir -p "$1/others/with blank" "$1/others/hidden/below"
mount -t tmpfs tmpfs "$1/others/hidden/below"
mount -t tmpfs tmpfs "$1/others/hidden"
mount -t tmpfs tmpfs "$1/others/with blank"
mount --rbind "$1/others" /mnt
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/docker/netns /run/user/0/doc
ip netns add somebodys
: > /run/docker/netns/default
mount --bind /proc/self/ns/net /run/docker/netns/default
mount -t tmpfs tmpfs /run/user/0
mount -t tmpfs tmpfs /run/user/0
for path in /etc /etc/passwd /home /opt /tmp /usr /var/lib /var/tmp; do mount --rbind $path $path; done
mount --make-rshared /
"""

# $1 is the lab's folder. Ends when systemd does.
_POWER = """
set -eu
mount --make-rprivate /
mount -t cgroup2 cgroup2 "$1/cgroup"
mkdir "$1/cgroup/${1##*/}"
echo $$ > "$1/cgroup/${1##*/}/cgroup.procs"
setpriv --pdeathsig KILL --bounding-set "$LOST" \\
    unshare --net --mount --pid --uts --ipc --cgroup --fork --kill-child bash -c "$BOOT" boot "$@" || status=$?
echo $$ > "$1/cgroup/cgroup.procs"
find "$1/cgroup/${1##*/}" -depth -type d -exec rmdir {} +
exit ${status:-0}
"""

# Becomes systemd. $1 is the lab's folder, $2 the repository, $3 the folder of its dependencies, $4 Python's.
_BOOT = f"""
set -eu
umount "$1/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$1/tree"
cd "$1/tree"
mkdir -p .old dev etc image lab opt proc root run sys tmp usr var/lib var/log var/tmp
ln -s /run var/run
for path in /bin /sbin /lib*; do
    if [ -L $path ]; then cp --no-dereference $path .; else mkdir .$path; mount --bind -o ro $path .$path; fi
done
mount --bind -o ro /usr usr
mount --bind "$1" lab
mount --bind -o ro "$1/image" image
mount -t overlay overlay -o lowerdir=/etc,upperdir="$1/disk/etc",workdir="$1/disk/etc-work" etc
mount --bind "$1/opt" opt
mount --bind -o ro "$2" opt/repository
mount --bind -o ro "$3" opt/dependencies
mount --bind -o ro "$4" opt/python
mount -t proc proc proc
pivot_root . .old
cd /
umount -l /.old
rmdir /.old
mount -o remount,bind,ro /
for path in /proc/sys/* /proc/sysrq-trigger; do
    [ ! -e $path ] || [ $path = /proc/sys/net ] || {{ mount --bind $path $path; mount -o remount,bind,ro $path; }}
done
mount -t sysfs -o ro sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs -o mode=755 dev /dev
for device in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0; do
    IFS=: read -r name major minor <<< "$device"
    mknod -m 666 /dev/$name c $major $minor
done
mkdir /dev/pts /dev/shm
mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ln -s pts/ptmx /dev/ptmx
ln -s /proc/self/fd /dev/fd
for folder in /tmp /var/tmp; do mount -t tmpfs -o mode=1777 tmpfs $folder; done
mount -t tmpfs -o mode=755 tmpfs /etc/systemd
mkdir /etc/systemd/system
mount --bind /lab/disk/units /etc/systemd/system
mount --bind /lab/disk/lib /var/lib
mount -t tmpfs -o mode=755 tmpfs /run
mount --make-shared /run
mkdir -p /run/netns /run/log/journal
mount --bind /lab/disk/journal /run/log/journal

ip link set lo up
ip netns add outside
ip link add eth0 type veth peer name eth0 netns outside
ip addr add {ENGINE_ADDRESS}/24 dev eth0
ip -6 addr add {ENGINE_ADDRESS6}/64 dev eth0 nodad
ip link set eth0 up
ip -n outside link set lo up
ip -n outside addr add {OUTSIDE_ADDRESS}/24 dev eth0
ip -n outside -6 addr add {OUTSIDE_ADDRESS6}/64 dev eth0 nodad
ip -n outside link set eth0 up
ip route add default via {OUTSIDE_ADDRESS}
ip -6 route add default via {OUTSIDE_ADDRESS6}

unshare --mount --propagation unchanged bash -c "$ENGINE" engine &
while ! [ -e /run/engine.env ]; do sleep 0.02; kill -0 $!; done
mount --make-rshared /
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=lab SYSTEMD_UNIT_PATH=/etc/systemd/system \\
    SYSTEMD_GENERATOR_PATH=/run/none {SYSTEMD} --system
"""

# Stays, as the anchor of the engine's mount namespace.
_ENGINE = """
set -eu
cd /lab/root
mount -t overlay overlay -o lowerdir=/image,upperdir=/lab/disk/engine,workdir=/lab/disk/engine-work .
cd /lab/root
for folder in run proc sys dev; do mount --rbind /$folder $folder; done
for name in docker containerd; do mkdir -p var/lib/$name; mount --bind "/lab/disk/$name" var/lib/$name; done
mkdir -p .old
pivot_root . .old
cd /
mount --make-rprivate /.old
umount -l /.old
echo ENGINE=$$ > /run/engine.new
mv /run/engine.new /run/engine.env
exec sleep infinity
"""

# Where the unit expects it. The interpreter was built for another folder.
_PROGRAM = """#!/bin/sh
export PYTHONPATH=/opt/repository:/opt/{program}:/opt/dependencies PYTHONDONTWRITEBYTECODE=1
LD_LIBRARY_PATH=/opt/python/lib exec /opt/python/bin/python{major}.{minor} -m {module} "$@"
"""

_IMPORT_BUSYBOX = """
set -eu
image=$(mktemp -d)
mkdir -p $image/bin
cp /bin/busybox $image/bin/
$image/bin/busybox --install $image/bin
tar -C $image -c . | docker import -c 'ENV PATH=/bin' - busybox
"""


class Host:
    """It is off at first. `close` removes it.

    `example` is one of ours, or the path of another project: its units start `program`, as ``python -m MODULE`` does.
    """

    def __init__(
        self, version: str, *, example: str = "myplugin", module: str = "myplugin", program: str = "myplugin"
    ) -> None:
        image = root_file_system(version)
        labs = image.parents[1] / "labs"  # where the next PrivateEngine removes it, should we be killed
        labs.mkdir(exist_ok=True)
        with (labs / ".lock").open("w") as one_at_a_time:
            fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
            self.folder = Path(tempfile.mkdtemp(prefix=f"systemd-{version}-", dir=labs))
            self._lock = (self.folder / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._power: subprocess.Popen[bytes] | None = None
        self.booted = 0.0
        """When it was switched on last."""
        for name in ("cgroup", "others", "root", "tree", *(f"disk/{name}" for name in _DISK)):
            (self.folder / name).mkdir(parents=True)
        for name in (f"{program}/bin", "repository", "dependencies", "python"):
            (self.folder / "opt" / name).mkdir(parents=True)
        file = self.folder / "opt" / program / "bin" / program
        python = {"major": sys.version_info.major, "minor": sys.version_info.minor}
        file.write_text(_PROGRAM.format(program=program, module=module, **python))
        file.chmod(0o755)
        shutil.copytree(_EXAMPLES / example / module, self.folder / "opt" / program / module)
        (self.folder / "image").symlink_to(image)
        (self.folder / "disk/etc/group").write_text(Path("/etc/group").read_text() + "docker:x:998:\n")
        self._install(image / "lib/systemd/system", _EXAMPLES / example / "systemd")

    def _install(self, docker_units: Path, plugin_units: Path) -> None:
        """systemd's units, Docker's, and the plugin's without enabling them."""
        units = self.folder / "disk/units"
        for name in _SYSTEM_UNITS:
            shutil.copy(SYSTEMD.parent / "system" / name, units)
        for unit in plugin_units.iterdir():
            shutil.copy(unit, units)
        for name in _DOCKER_UNITS:
            text = (docker_units / name).read_text()
            (units / name).write_text(text)
            if (started := re.search(r"^ExecStart=(.*)", text, re.MULTILINE)) is not None:
                change = f"ExecStart=\nExecStart=/usr/bin/nsenter --target ${{ENGINE}} --mount -- {started[1]}\n"
                (units / f"{name}.d").mkdir()
                (units / f"{name}.d" / "engine.conf").write_text(
                    f"[Service]\nEnvironmentFile=/run/engine.env\n{change}"
                )
        (units / "default.target").symlink_to("multi-user.target")
        for target, wanted in _WANTED.items():
            (units / f"{target}.wants").mkdir()
            for name in wanted:
                (units / f"{target}.wants" / name).symlink_to(f"../{name}")

    # ---------------------------------------------------------------------------------------------------- power

    def boot(self) -> None:
        """Switch it on, and wait until all its units have started."""
        self.booted = time.time()
        folders = (str(self.folder), str(_REPOSITORY), sysconfig.get_path("purelib"), sys.base_prefix)
        power, scripts = _MOUNTS_OF_OTHERS + _POWER, {"BOOT": _BOOT, "ENGINE": _ENGINE, "LOST": _LOST}
        with (self.folder / "boot.log").open("ab") as log:
            self._power = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "bash", "-c", power, "power", *folders],
                env={**os.environ, **scripts},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_until(lambda: self._state() in ("running", "degraded"), PATIENCE, every=0.1)
        except TimeoutError:
            log_text = (self.folder / "boot.log").read_text()
            raise AssertionError(f"it does not boot ({self._state()}): {log_text}\n{self.journal()}") from None

    def _state(self) -> str:
        assert self._power is not None
        assert self._power.poll() is None, (self.folder / "boot.log").read_text()
        try:
            return self.run("systemctl", "is-system-running", check=False)
        except ProcessLookupError:
            return "off"

    def power_off(self) -> None:
        """Shut it down in order."""
        assert self._power is not None
        self.run("systemctl", "poweroff", check=False)  # it may be ended with everything else
        self._power.wait(2 * PATIENCE)
        self._power = None

    def cut_power(self) -> None:
        """End it at once."""
        if self._power is not None:
            try:
                os.kill(self._first, signal.SIGKILL)
            except ProcessLookupError:  # it is not on yet, or off already
                self._power.kill()
            self._power.wait(PATIENCE)
            self._power = None

    def close(self) -> None:
        """End it and remove its disk."""
        self.cut_power()
        shutil.rmtree(self.folder)
        self._lock.close()

    # ------------------------------------------------------------------------------------------------- programs

    @property
    def _first(self) -> int:
        """systemd's process id, as this process sees it; ProcessLookupError if there is none yet."""
        assert self._power is not None
        pid = self._power.pid
        for _ in range(2):  # bash, unshare
            try:
                pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
            except (OSError, ValueError):
                raise ProcessLookupError from None
        return pid

    def mount_points(self) -> tuple[set[str], set[str]]:
        """Those that systemd sees, and those of the machine below it."""
        assert self._power is not None
        here, below = (Path(f"/proc/{pid}/mountinfo").read_text() for pid in (self._first, self._power.pid))
        return {line.split()[4] for line in here.splitlines()}, {line.split()[4] for line in below.splitlines()}

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """The output of a program of this machine, run beside systemd. Raises AssertionError with it if it fails."""
        prefix = ["nsenter", f"--target={self._first}", "--net", "--mount", "--pid", "--"]
        environment = ["env", "-i", "SYSTEMD_UNIT_PATH=/etc/systemd/system", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
        done = subprocess.run(
            [*prefix, *environment, *command], capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout.strip()

    def in_engine(self, *command: str, timeout: float = 60) -> str:
        """As `run`, for a program of the engine's root file system."""
        anchor = Path(f"/proc/{self._first}/root/run/engine.env").read_text().strip().removeprefix("ENGINE=")
        return self.run("nsenter", f"--target={anchor}", "--mount", "--", *command, timeout=timeout)

    def docker(self, *arguments: str) -> str:
        """The output of ``docker ARGUMENTS``."""
        return self.in_engine("docker", *arguments)

    def import_busybox(self) -> None:
        """Make the image `busybox`."""
        self.in_engine("bash", "-c", _IMPORT_BUSYBOX)

    def says(self, address: str, port: int, *, outside: bool = True) -> str:
        """The text that a TCP server sends to a client, on the outside host or on this one."""
        where = ("nsenter", "--net=/run/netns/outside") if outside else ()
        ask = f"exec 3<>/dev/tcp/{address}/{port}; cat <&3"
        return self.run(*where, "timeout", "5", "bash", "-c", ask, check=False)

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--property", name, "--value", unit)

    def journal(self, *units: str, since: float | None = None) -> str:
        """The log of these units, or of all, since the last boot."""
        chosen = [f"--unit={unit}" for unit in units]
        since = self.booted if since is None else since
        return self.run("journalctl", "--no-pager", "--output=short-precise", f"--since=@{since:.6f}", *chosen)
