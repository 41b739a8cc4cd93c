"""A managed plugin of global scope in a swarm of one node: the managers' allocations reach the node, and survive."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import netplugin_sdk
from netplugin_sdk.testing.engine import ENGINE_ADDRESS, PrivateEngine, wait_until

from ..patience import PATIENCE

pytestmark = pytest.mark.one_engine

# The bridge has the number that was allocated in its name: so it came with CreateNetwork.
DRIVER = """
from netplugin_sdk import DriverOptions, Join, NetworkDriver, Scope, serve
from netplugin_sdk.linux import links

class Options(DriverOptions):
    vni: int
    mtu: int = 1500

class Global(NetworkDriver[Options]):
    scope = Scope.GLOBAL
    cluster_numbers = {"vni": range(4096, 1 << 24)}
    def create_network(self, network):
        assert self.this_node is not None
        links.ensure_bridge(f"b{network.options.vni}", addresses=network.gateways, mtu=network.options.mtu)
    def delete_network(self, network):
        links.delete(f"b{network.options.vni}")
    def create_endpoint(self, network, endpoint): pass
    def delete_endpoint(self, network, endpoint):
        links.delete(endpoint.interface_name("ve"))
    def join(self, network, endpoint, sandbox):
        outside, inside = endpoint.interface_name("ve"), endpoint.interface_name("vc")
        links.ensure_veth(outside, inside, master=f"b{network.options.vni}", mtu=network.options.mtu)
        return Join(inside, gateways=network.gateways)
    def leave(self, network, endpoint): pass

serve(Global(), name="global")
"""
CONFIG = {
    "description": "a driver of global scope",
    "documentation": "",
    "interface": {"types": ["docker.networkdriver/1.0"], "socket": "global.sock"},
    "network": {"type": "host"},
    "linux": {"capabilities": ["CAP_NET_ADMIN", "CAP_SYS_ADMIN"], "devices": None},
    "mounts": [],
    "workdir": "/",
}


def libraries(programs: Iterable[Path]) -> set[Path]:
    done = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False)
    words = done.stdout.replace("\t", " ").split()
    return {Path(word) for word in words if word.startswith("/") and not word.endswith(":")}


def copy(path: Path, root: Path) -> None:
    target = root / path.relative_to("/")
    if path.is_dir():
        unused = ("test", "lib2to3", "pydoc_data", "idlelib", "ensurepip", "tkinter", "config-*", "site-packages")
        ignored = shutil.ignore_patterns(*unused)
        shutil.copytree(path, target, symlinks=True, ignore=ignored, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def make_plugin(folder: Path) -> None:
    """The folder of a managed plugin, with the Python that runs this."""
    root = folder / "rootfs"
    python = Path(sys.executable).resolve()
    standard, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("platlib"))
    wanted = [packages / name for name in ("msgspec", "httptools", "pyroute2", "typing_extensions.py")]
    wanted += [python, standard, Path(netplugin_sdk.__file__).parent]
    wanted += libraries([python, *standard.glob("lib-dynload/*.so"), *packages.glob("msgspec/*.so")])
    for path in wanted:
        copy(path, root)
    for empty in ("dev", "proc", "sys", "tmp", "run/docker/plugins", "var/lib/netplugin"):
        (root / empty).mkdir(parents=True, exist_ok=True)
    (root / "driver.py").write_text(DRIVER)
    found = f"PYTHONPATH={packages}:{Path(netplugin_sdk.__file__).parent.parent}"
    environment = [{"name": name, "value": value} for name, _, value in (found.partition("="),)]
    (folder / "config.json").write_text(
        json.dumps({**CONFIG, "entrypoint": [str(python), "/driver.py"], "env": environment})
    )


@pytest.fixture
def swarm(version: str) -> Iterator[PrivateEngine]:
    """An engine of its own, since a swarm leaves chains and a bridge behind."""
    with PrivateEngine(version) as engine:
        make_plugin(engine.folder / "data" / "global")
        engine.docker("plugin", "create", "global", "/var/lib/docker/global")
        engine.docker("plugin", "enable", "global")
        engine.docker("swarm", "init", "--advertise-addr", ENGINE_ADDRESS)
        yield engine


def create(engine: PrivateEngine, name: str, *options: str) -> str:
    """Make a network of the swarm; its number, when it is allocated."""
    create = ("network", "create", "--driver", "global:latest", "--scope", "swarm", "--attachable", *options, name)
    engine.docker(*create)
    wait_until(lambda: number(engine, name) != "", PATIENCE)
    return number(engine, name)


def number(engine: PrivateEngine, name: str) -> str:
    (network,) = json.loads(engine.docker("network", "inspect", name))
    return str((network["Options"] or {}).get("vni", ""))


def run(engine: PrivateEngine, name: str, network: str, *command: str) -> str:
    return engine.docker("run", "--rm", "--name", name, "--network", network, "busybox", *command)


def bridges(engine: PrivateEngine) -> set[str]:
    links = json.loads(engine.run(["ip", "-json", "link", "show", "type", "bridge"]).stdout)
    return {link["ifname"] for link in links} - {"docker0", "docker_gwbridge"}


def test_what_a_manager_allocates(swarm: PrivateEngine) -> None:
    one = create(swarm, "one", "--opt", "mtu=1400")
    assert int(one) in range(4096, 1 << 24)
    assert not bridges(swarm)  # until a container of this node needs it
    swarm.docker("run", "--detach", "--name", "server", "--network", "one", "busybox", "sleep", "1000")
    assert bridges(swarm) == {f"b{one}"}
    assert "mtu 1400" in swarm.docker("exec", "server", "ip", "link", "show", "eth0")
    assert "1 packets received" in swarm.docker("exec", "server", "ping", "-c", "1", "-W", "2", "10.0.1.1")

    chosen = create(swarm, "two", "--opt", "vni=5000")
    assert chosen == "5000"
    swarm.docker("network", "create", "--driver", "global:latest", "--scope", "swarm", "--opt", "vni=5000", "refused")
    wait_until(lambda: "vni cannot be had: 5000 is in use" in swarm.log.read_text(), PATIENCE)
    swarm.docker("network", "rm", "refused")

    # Enabled again it is asked for nothing again, and remembers.
    swarm.docker("plugin", "disable", "--force", "global")
    swarm.docker("plugin", "enable", "global")
    three = create(swarm, "three")
    assert three not in (one, chosen)
    assert bridges(swarm) == {f"b{one}"}

    # The leader that starts asks for all again, and is told the same.
    swarm.docker("rm", "--force", "server")
    swarm.stop()
    swarm.start()
    wait_until(lambda: "Active" in swarm.docker("node", "ls"), PATIENCE)
    wait_until(lambda: swarm.log.read_text().count("method=NetworkDriver.AllocateNetwork") >= 7, PATIENCE)
    assert [number(swarm, name) for name in ("one", "two", "three")] == [one, chosen, three]
    wait_until(lambda: "eth0" in run(swarm, "again", "two", "ip", "link"), PATIENCE)

    swarm.docker("network", "rm", "one", "two", "three")
    wait_until(lambda: not bridges(swarm), PATIENCE)
    assert create(swarm, "again", "--opt", "vni=5000") == "5000"  # it was freed

    # An engine that is killed forgets the network, and says nothing. As a manager it goes on listing it.
    swarm.docker("run", "--detach", "--stop-signal", "KILL", "--network", "again", "busybox", "sleep", "1000")
    network = swarm.docker("network", "inspect", "--format", "{{.Id}}", "again")
    with swarm.api() as docker:
        assert docker.runs(network)
    swarm.kill()
    swarm.start()
    wait_until(lambda: "Active" in swarm.docker("node", "ls"), PATIENCE)
    with swarm.api() as docker:
        assert network in docker.networks()
        assert not docker.runs(network)
    assert bridges(swarm) == {"b5000"}
