"""A host that others have used before: with their firewall rules, links, routes, sysctls, namespaces and containers.

The host is in namespaces that nobody else uses. So a test's changes are visible, and this machine does not matter.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from netplugin_sdk.testing import debian
from netplugin_sdk.testing.engine import PrivateEngine, Process, wait_until

from ..patience import PATIENCE
from . import snapshot
from .snapshot import Snapshot, difference

REPOSITORY = Path(__file__).parents[2]
CLIENT = "/run/client"
"""The folder of its `docker`, which is not in PATH."""

ENVIRONMENT = (
    "HOME",
    "LANG",
    "PATH",
    "NETPLUGIN_CACHE",
    "NETPLUGIN_DEBIAN_MIRROR",
    "NETPLUGIN_NO_SKIP",
)

# Folders for files that pass are the host's own, and so is that of the labs, $2, which is $1. What else is named stays.
_FOLDERS = """
set -eu
mkdir -p /run/below "$2"
mount --bind "$1" "$2"
mount --rbind /tmp /run/below
for folder in /tmp /var/tmp /dev/shm; do mount -t tmpfs -o mode=1777 tmpfs $folder; done
shift
for path; do
    case $path in /tmp/*) mkdir -p "$path"; mount --rbind "/run/below${path#/tmp}" "$path" ;; esac
done
umount -l /run/below
rmdir /run/below
"""

# Docker decides with iptables-nft here. Whatever it forwards passes the others' rules, too: for bridges they let it.
_FIREWALLS = r"""
set -eu
for version in iptables ip6tables; do
    for kind in nft legacy; do
        rule() { $version-$kind --wait --table "$@"; }
        rule raw --append PREROUTING --protocol udp --dport 9 --jump DROP
        rule mangle --append POSTROUTING --match mark --mark 0x77 --jump MARK --set-mark 0x78
        rule nat --append PREROUTING --protocol tcp --dport 8088 --jump REDIRECT --to-ports 8080
        rule nat --append POSTROUTING --out-interface virbr0 --jump MASQUERADE
        rule security --append OUTPUT --protocol udp --dport 9 --jump DROP
        rule filter --new-chain somebodys-input
        rule filter --append somebodys-input --protocol tcp --match multiport --dports 22,8080 --jump ACCEPT
        rule filter --append INPUT --in-interface lo --jump ACCEPT
        rule filter --append INPUT --match conntrack --ctstate RELATED,ESTABLISHED --jump ACCEPT
        rule filter --append INPUT --jump somebodys-input
        rule filter --append INPUT --in-interface br-+ --jump ACCEPT
        rule filter --policy INPUT DROP
        rule filter --append FORWARD --match conntrack --ctstate INVALID --jump DROP
        [ $kind = nft ] || rule filter --append FORWARD --in-interface br-+ --jump ACCEPT
        [ $kind = nft ] || rule filter --append FORWARD --out-interface br-+ --jump ACCEPT
        rule filter --policy FORWARD DROP
    done
done
iptables-nft --wait --insert DOCKER-USER --source 203.0.113.0/24 --jump DROP
nft --file - <<'END'
table inet somebodys {
    set blocked { type ipv4_addr; flags interval; elements = { 203.0.113.0/24, 192.0.2.7 } }
    map doors { type inet_service : verdict; elements = { 22 : accept, 8080 : accept } }
    chain input {
        type filter hook input priority filter + 10; policy drop;
        iifname { "lo", "virbr0" } accept
        iifname "br-*" accept
        ct state established,related accept
        meta l4proto { icmp, ipv6-icmp } accept
        tcp dport vmap @doors
    }
    chain forward {
        type filter hook forward priority filter + 10; policy drop;
        ip saddr @blocked counter drop
        iifname "br-*" accept
        oifname "br-*" accept
    }
    chain output {
        type filter hook output priority filter; policy accept;
        ip daddr @blocked reject
    }
    chain postrouting {
        type nat hook postrouting priority srcnat;
        oifname "virbr0" masquerade
    }
}
table bridge somebodys {
    chain forward { type filter hook forward priority 0; policy accept; ether daddr 02:00:00:00:00:99 drop; }
}
table arp somebodys {
    chain input { type filter hook input priority 0; policy accept; arp saddr ip 192.0.2.7 drop; }
}
table netdev somebodys {
    chain ingress { type filter hook ingress device eth0 priority 0; policy accept; ip saddr 192.0.2.7 drop; }
}
table ip empty { }
END
"""

_LINKS = """
set -eu
ip netns add somebodys
ip link add virbr0 type bridge
ip link add somebody0 group 77 mtu 1400 type veth peer name eth0 netns somebodys
ip link set somebody0 master virbr0 up alias "not yours"
ip link set virbr0 up
ip link add br-0123456789ab address 02:00:00:00:00:01 type bridge
ip link add mac0 link eth0 type macvlan mode bridge
ip link add vxlan77 type vxlan id 77 dstport 4789 dev eth0
bridge fdb append 00:00:00:00:00:00 dev vxlan77 dst 198.51.100.77
ip link property add dev virbr0 altname somebodys-bridge
ip address add 192.168.122.1/24 dev virbr0
ip address add 192.168.122.77/32 dev lo
ip address add fd00:122::1/64 dev virbr0 nodad
ip -n somebodys link set eth0 up
ip -n somebodys address add 192.168.122.2/24 dev eth0
ip neigh add 192.168.122.9 lladdr 02:00:00:00:00:09 dev virbr0 nud permanent
ip neigh add proxy 192.168.122.10 dev virbr0
ip route add 10.66.0.0/16 via 192.168.122.2
ip route add blackhole 10.67.0.0/16
ip route add default via 192.168.122.2 table 77
ip -6 route add fd00:66::/64 via fd00:122::2
ip -6 route add blackhole fd00:67::/64
ip rule add fwmark 0x77 lookup 77
ip -6 rule add from fd00:66::/64 lookup 77
tc qdisc replace dev somebody0 root pfifo limit 77
cd /proc/sys/net
echo 1 | tee ipv4/conf/all/route_localnet ipv4/ip_nonlocal_bind ipv4/conf/virbr0/proxy_arp > /dev/null
echo 2 | tee ipv4/conf/all/rp_filter ipv4/conf/default/arp_ignore > /dev/null
echo 1 > ipv6/conf/default/accept_ra
echo 1 > ipv6/conf/all/forwarding
echo "20000 60000" > ipv4/ip_local_port_range
echo 77 > core/somaxconn
"""

_CLIENT = """
set -eu
mkdir "$1"
printf '#!/bin/sh\\nexec nsenter --target="$(cat /run/engine.pid)" --mount /usr/bin/docker "$@"\\n' > "$1/docker"
chmod +x "$1/docker"
"""

# A server on a port, and files that outlive the process that made them.
_SOMEBODY = """
import pathlib, signal, socket
servers = [socket.create_server((address, 22), family=family)
           for address, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6))]
for path in ("/tmp/somebodys", "/run/somebodys.pid", "/run/netns/stale", "/run/somebodys.ready"):
    pathlib.Path(path).touch()
signal.pause()
"""

# A plugin that is made with the same SDK.
_OTHER_PLUGIN = """
from myplugin.driver import BridgeDriver
from netplugin_sdk import serve
serve(BridgeDriver(), name="somebodys", docker=None)
"""


def _mounts_here() -> set[tuple[str, ...]]:
    """Where, and what of the file system, of each mount of this process."""
    return {(target, root) for _, _, _, root, target, *_ in map(str.split, Path("/proc/self/mountinfo").open())}


_PLUGIN = re.compile(r"/[0-9a-f]{64}$")  # the group of a managed plugin, which does not say in which lab


class LivedOnHost:
    """A context manager. `run` starts programs on it with this Python, and `unchanged` says whether they left anything.

    Its Docker is a `PrivateEngine`, `engine`.
    """

    def __init__(self, version: str) -> None:
        below = _mounts_here()  # a namespace begins with them, and loses what is deleted below it
        self.engine = PrivateEngine(version, hostname="lived-on")
        self._inherited = below | _mounts_here()
        try:
            (self.engine.folder / "labs").mkdir()
            (self.engine.folder / "labs/.lock").touch()  # labs have been here before
            stay = (REPOSITORY, debian.cache(), sys.prefix, sys.base_prefix, sysconfig.get_path("purelib"))
            labs = (self.engine.folder / "labs", debian.cache() / "labs")
            self.run("bash", "-c", _FOLDERS, "folders", *map(str, (*labs, *stay)))
            self.run("bash", "-c", _LINKS)
            self.run("bash", "-c", _FIREWALLS)
            self.engine.spawn("somebody", [sys.executable, "-c", _SOMEBODY])
            self.engine.start_plugin("somebodys", [sys.executable, "-c", _OTHER_PLUGIN], timeout=60)
            self._use_docker()
            self.run("bash", "-c", _CLIENT, "client", CLIENT)
            wait_until((self.engine.run_folder / "somebodys.ready").exists, PATIENCE)
            wait_until(self._has_its_addresses, PATIENCE, every=0.2)
        except BaseException:
            self.close()
            raise

    def _use_docker(self) -> None:
        docker = self.engine.docker
        docker("network", "create", "--ipv6", "--subnet=10.78.0.0/24", "--subnet=fd00:78::/64", "theirs")
        docker("network", "create", "--internal", "inside")
        docker("network", "create", "--driver=somebodys", "plugged")
        plugged = ("--publish=8081:80", "busybox", "httpd", "-f")
        docker("run", "--detach", "--name=plugged", "--network=plugged", *plugged)
        web = ("--restart=always", "--publish=8080:80", "--publish=8053:53/udp", "busybox", "httpd", "-f")
        docker("run", "--detach", "--name=web", "--network=theirs", *web)
        docker("run", "--detach", "--name=inside", "--network=inside", "busybox", "sleep", "100000")
        docker("run", "--detach", "--name=host", "--network=host", "busybox", "sleep", "100000")
        docker("create", "--name=never", "--volume=data:/data", "busybox")

    def _has_its_addresses(self) -> bool:
        """Whether no IPv6 address is tentative any more: its routes come when it is not."""
        shown = "for pid in self $(docker inspect --format={{.State.Pid}} web inside plugged); do "
        shown += "nsenter --net=/proc/$pid/ns/net ip -6 address show tentative; done"
        return self.run("sh", "-ec", f"PATH={CLIENT}:$PATH; {shown}") == ""

    def close(self) -> None:
        """End all of it."""
        self.engine.close()

    def __enter__(self) -> LivedOnHost:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _environment() -> list[str]:
        kept = [f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ]
        return ["env", "-i", f"--chdir={REPOSITORY}", "PYTHONDONTWRITEBYTECODE=1", *kept]

    def try_to_run(self, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """A program of this machine."""
        return self.engine.run([*self._environment(), *command], timeout)

    def run(self, *command: str, timeout: float = 120) -> str:
        """Its output. Raises AssertionError with the complete output if it fails."""
        done = self.try_to_run(*command, timeout=timeout)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def spawn(self, name: str, *command: str) -> Process:
        """Start a program of this machine, with a session of its own."""
        return self.engine.spawn(name, ["setsid", *self._environment(), *command])

    def snapshot(self) -> Snapshot:
        """The host's state, without the machine's mounts, and without others' cgroups, which have no namespace."""
        anchor = (self.engine.run_folder / "engine.pid").read_text().strip()
        nft = f"nsenter --target={anchor} --mount nft"  # an older nft ends at a newer one's tables
        folders = (*snapshot.FOLDERS, str(debian.cache() / "labs"))
        others = self._others()
        # The checkout may be below one of them, and Python and pytest write their caches into it.
        options = ("--nft", nft, "--except", str(REPOSITORY))
        taken: Snapshot = json.loads(self.run(sys.executable, snapshot.__file__, *options, *folders))
        others |= self._others()
        taken["cgroups"] = [
            path for path in taken["cgroups"] if not others.intersection(Path(path).parts) and not _PLUGIN.search(path)
        ]
        mounts = taken["mounts of the host"]
        taken["mounts of the host"] = [line for line in mounts if tuple(line.split()[:2]) not in self._inherited]
        return taken

    def _others(self) -> set[str]:
        """Labs beside it, those of other hosts that have been lived on, and whatever made this process a group."""
        labs = {lab for lab in self.engine.folder.parent.iterdir() if lab != self.engine.folder}
        own = {line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()}
        manager = {Path(group).parts[1] for group in own if group != "/"}
        return manager | {lab.name for lab in labs | {inner for lab in labs for inner in lab.glob("labs/*")}}

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Whatever is done meanwhile, all is as it was; AssertionError with the difference."""
        before = self.snapshot()
        yield
        with contextlib.suppress(TimeoutError):  # the kernel and Docker remove some things a little later
            wait_until(lambda: not difference(before, self.snapshot()), PATIENCE, every=0.5)
        assert not (changed := difference(before, self.snapshot())), f"left behind, or taken away:\n{changed}"
