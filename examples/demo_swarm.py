"""The program of `make demo-swarm`: three hosts with a Docker Engine each, a swarm of them, and an overlay network.

    python examples/demo_swarm.py [--engine 26.1|20.10|28.5]

The hosts are namespaces of this machine on a link of their own, and end with the demo; nothing of this machine is
changed. It takes one minute, and two the first time. Each command stands behind the name of the host that it runs on.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from demo import Shell, Stopped, finish, say

from netplugin_sdk.testing.cluster import Cluster, Host
from netplugin_sdk.testing.engine import VERSIONS, require, wait_until

PROJECT = Path(__file__).with_name("overlay")
PLUGIN = "overlay-example"

# A page that says which host serves it. As process 1 of its container the server would ignore SIGTERM for 10 s.
SERVICE = (
    "docker service create --quiet --name web --replicas 6 --network mynet --endpoint-mode dnsrr --no-resolve-image "
    "--env VERSION=1 --update-parallelism 2 --update-monitor 1s --stop-signal KILL "
    "--hostname 'replica-{{.Task.Slot}}-on-{{.Node.Hostname}}' "
    "busybox sh -c 'echo version $VERSION of $(hostname) > /tmp/index.html; exec httpd -f -h /tmp'"
)
# Address by address: of several, the C library always takes its own container's first (RFC 3484, rule 9).
ASK_ALL = r"""sh -c 'for a in $(nslookup web | sed -n "s/^Address: *\(10[.0-9]*\)$/\1/p"); do wget -qO- $a; done'"""
LEFT = "ip -brief link | grep -E '^(ov|vx|ve|vc)-'; (iptables-save; ip6tables-save; nft list tables) | grep netplugin"


class Demo:
    """The steps, and their expected results."""

    def __init__(self, cluster: Cluster) -> None:
        self._hosts = cluster.hosts
        self._shells = {host.name: Shell(partial(run_on, host), host.name) for host in cluster.hosts}

    def run(self) -> None:
        """Create, use, update, scale, remove."""
        manager, worker, other = self._shells.values()
        manager("docker node ls")
        manager("docker plugin ls")
        say("A network over all nodes. No node has anything of it yet; the manager gives it a VXLAN identifier:")
        manager(f"docker network create --driver {PLUGIN}:latest --scope swarm --attachable mynet")

        say("Six replicas of a service on it, on all three nodes:")
        manager(SERVICE)
        replicas = self._replicas(6)
        self._show_replicas()
        say("Each node has a bridge of it now, and a VXLAN that sends what it knows no place for to the other nodes:")
        worker('bash -c \'ip -brief link | grep -E "^(ov|vx)-"; bridge fdb | grep "^00:00:00:00:00:00 dev vx-"\'')

        host, replica = replicas[0]
        say("TCP: this replica asks all that the service's name stands for:")
        self._ask_all(host, f"docker exec {replica}", 1, 6)
        say("Ping between two replicas on different nodes, by name:")
        far = next(name for other_host, name in replicas if other_host is not host)
        self._shells[host.name](f"docker exec {replica} ping -c 3 {far}")
        say("docker run on a worker, attached to the same network:")
        other("docker run --rm --network mynet busybox ping -c 3 web")
        other("docker run --rm --network mynet busybox wget -qO- http://web/")

        say("A rolling update, two replicas at a time:")
        manager("docker service update --quiet --env-add VERSION=2 web")
        self._replicas(6)
        self._show_replicas()
        self._ask_all(self._hosts[1], "docker run --rm --network mynet busybox", 2, 6)
        for direction, count in (("up", 9), ("down", 3)):
            say(f"Scale {direction}:")
            manager(f"docker service scale --detach web={count}")
            self._replicas(count)
            self._show_replicas()
            self._ask_all(self._hosts[1], "docker run --rm --network mynet busybox", 2, count)

        say("Clean up:")
        manager("docker service rm web")
        self._replicas(0)
        # The manager has the network in use until it has heard of the last task's end.
        remove = "docker network rm mynet"
        manager.show(remove, lambda: repeat(partial(run_on, self._hosts[0], remove.split())))
        say("Nothing is left on any node, as soon as the kernel has removed it (docker_gwbridge is the engine's):")
        waited_for("the nodes to have nothing left", 20, lambda: not any(map(left, self._hosts)))
        for shell in self._shells.values():
            shell("ip -brief link")

    def _replicas(self, count: int) -> list[tuple[Host, str]]:
        """Host and container of each replica, as soon as so many run."""
        found: list[tuple[Host, str]] = []

        def so_many() -> bool:
            command = "ps", "--filter", "label=com.docker.swarm.service.name=web", "--format", "{{.Names}}"
            found[:] = [(host, name) for host in self._hosts for name in host.engine.docker(*command).split()]
            return len(found) == count

        waited_for(f"{count} replicas", 60, so_many)
        return found

    def _show_replicas(self) -> None:
        columns = "table {{.Name}}\\t{{.Node}}\\t{{.CurrentState}}"
        next(iter(self._shells.values()))(f"docker service ps --filter desired-state=running --format '{columns}' web")

    def _ask_all(self, host: Host, inside: str, version: int, count: int) -> None:
        """From a container of this host; each replica is to answer once, with this version."""
        command = f"{inside} {ASK_ALL}"

        def all_answer(said: str) -> bool:
            replicas = {line.removeprefix(f"version {version} of ") for line in said.splitlines()}
            nodes = {replica.partition("-on-")[2] for replica in replicas}
            return len(replicas) == count == len(said.splitlines()) and nodes == set(self._shells)

        # The names' addresses come by gossip.
        said = self._shells[host.name].show(
            command, lambda: repeat(partial(run_on, host, shlex.split(command)), lambda done: all_answer(done.stdout))
        )
        if not all_answer(said):
            raise Stopped(f"`{command}` has no answer of version {version} of each of {count} replicas")


def run_on(host: Host, command: list[str]) -> subprocess.CompletedProcess[str]:
    """As a user of that host."""
    return host.engine.run_docker(*command[1:]) if command[0] == "docker" else host.engine.run(command)


def left(host: Host) -> str:
    """The links of the driver's networks on this host."""
    return host.engine.run(["bash", "-c", LEFT]).stdout


def waited_for(what: str, seconds: float, condition: Callable[[], bool]) -> None:
    """Wait until it holds; raise `Stopped` if it does not in time."""
    try:
        wait_until(condition, seconds, every=0.2)
    except TimeoutError:
        raise Stopped(f"waited {seconds:g} s for {what}") from None


def repeat(
    run: Callable[[], subprocess.CompletedProcess[str]],
    good: Callable[[subprocess.CompletedProcess[str]], bool] = lambda done: done.returncode == 0,
) -> subprocess.CompletedProcess[str]:
    """Run it again until it is good, for up to 20 s; what came last."""
    until = time.monotonic() + 20
    while not good(done := run()) and time.monotonic() < until:
        time.sleep(0.2)
    return done


def demonstrate(version: str) -> None:
    """Everything, with engines of this version."""
    require(version)
    netplugin = Path(sys.executable).with_name("netplugin")

    def here(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run([netplugin, *command[1:]], capture_output=True, text=True, check=False)

    with tempfile.TemporaryDirectory(prefix="netplugin-demo-") as made:
        say("A swarm takes managed plugins only. So the project examples/overlay becomes one:")
        folder = Path(made, PLUGIN)
        Shell(here)(f"netplugin bundle {PROJECT} --name {PLUGIN} --output {folder}")
        say(f"Starting three hosts with a private Docker Engine {version} each …")
        started = time.monotonic()
        with Cluster(3, version) as cluster:
            cluster.install_plugin(PLUGIN, folder)
            cluster.start_swarm()
            print(
                f"one swarm, with the plugin created and enabled on each node, after {time.monotonic() - started:.1f} s"
            )
            Demo(cluster).run()


def main() -> int:
    """Run the demo; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--engine", default="26.1", choices=list(VERSIONS), help="which Docker Engine (default: %(default)s)"
    )
    version = parser.parse_args().engine
    return finish(lambda: demonstrate(version))


if __name__ == "__main__":
    sys.exit(main())
