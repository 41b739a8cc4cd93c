"""Measure the time for a network and two joined sandboxes with the controller, beside the kernel's own time for them.

    python benchmarks/cnm.py [--rounds 30] [--many]

The kernel's own time is for the same namespaces, bridge, pairs, moves, addresses and routes, by plain netlink requests,
one after the other. "In process" calls myplugin's class, "socket" a myplugin in a process of its own. They run in turn:
A B C, A B C, … The results are the median, and the median of the rounds' differences to the kernel. --many also makes
500 sandboxes on one network, and 200 networks, and shows the times of the first and the last. Everything is in a
network namespace that ends with the program.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from myplugin.driver import BridgeDriver
from pyroute2 import IPRoute

from netplugin_sdk import Plugin
from netplugin_sdk.cnm import NetworkController, RemotePlugin, Subnet
from netplugin_sdk.cnm.remote import Address
from netplugin_sdk.linux import firewall, links, namespaces
from netplugin_sdk.linux.namespaces import Namespace
from netplugin_sdk.testing.engine import listens, wait_until

SERVE = """
import sys
from myplugin.driver import BridgeDriver
from netplugin_sdk import serve
serve(BridgeDriver(), name="myplugin", socket_path=sys.argv[1], state=sys.argv[2], docker=None, log_level="ERROR")
"""


def bare(folder: Path) -> Iterator[None]:
    """A bridge, two namespaces with a pair each, an address and a route; then all of it gone."""
    with IPRoute() as ipr:
        ipr.link("add", ifname="br", kind="bridge")
        (bridge,) = ipr.link_lookup(ifname="br")
        ipr.addr("add", index=bridge, address="10.1.0.1", prefixlen=24)
        ipr.link("set", index=bridge, state="up")
        boxes = [Namespace.create(folder / f"{n}") for n in (2, 3)]
        for n, box in enumerate(boxes, 2):
            ipr.link("add", ifname=f"v{n}", kind="veth", peer={"ifname": f"p{n}"}, master=bridge, state="up")
            (inside,) = ipr.link_lookup(ifname=f"p{n}")
            with box.path.open() as there:
                ipr.link("set", index=inside, net_ns_fd=there.fileno(), ifname="eth0")
            box.call(lambda n=n: configure(n))  # type: ignore[misc]
        yield
        for box in boxes:
            box.remove()
        for n in (2, 3):
            if found := ipr.link_lookup(ifname=f"v{n}"):
                ipr.link("del", index=found[0])
        ipr.link("del", index=bridge)


def configure(n: int) -> None:
    with IPRoute() as ipr:
        (index,) = ipr.link_lookup(ifname="eth0")
        ipr.link("set", index=index, address=f"02:00:00:00:00:{n:02x}")
        ipr.addr("add", index=index, address=f"10.1.0.{n}", prefixlen=24)
        ipr.link("set", index=index, state="up")
        ipr.route("add", dst="0.0.0.0/0", gateway="10.1.0.1")


def controlled(controller: NetworkController) -> Iterator[None]:
    lan = controller.create_network("lan", "myplugin", subnets=[Subnet.parse("10.1.0.0/24")])
    boxes = [controller.create_sandbox(name) for name in ("one", "two")]
    for box in boxes:
        box.connect(lan)
    yield
    for box in boxes:
        box.delete()
    lan.delete()


@contextmanager
def over_a_socket(folder: Path) -> Iterator[NetworkController]:
    socket = folder / "myplugin.sock"
    with subprocess.Popen([sys.executable, "-c", SERVE, str(socket), str(folder / "state")]) as process:
        wait_until(lambda: listens(socket), 10)
        address = Address("myplugin", f"unix://{socket}")
        with RemotePlugin(address) as plugin, NetworkController(find=lambda _: plugin) as controller:
            yield controller
        process.terminate()


def timed(lives: Callable[[], Iterator[None]]) -> float:
    """Milliseconds until it is there."""
    life = lives()
    began = time.perf_counter()
    next(life)
    took = (time.perf_counter() - began) * 1000
    next(life, None)
    time.sleep(0.1)  # the kernel removes after the answer
    return took


def many(controller: NetworkController) -> None:
    def ends(took: list[float]) -> str:
        tenth = len(took) // 10
        return f"the first {tenth} {median(took[:tenth]):.1f} ms each, the last {median(took[-tenth:]):.1f}"

    lan = controller.create_network("lan", "myplugin", subnets=[Subnet.parse("10.1.0.0/16")])
    took = []
    for n in range(500):
        began = time.perf_counter()
        controller.create_sandbox(f"{n}").connect(lan)
        took.append((time.perf_counter() - began) * 1000)
    print(f"500 sandboxes on one network: {sum(took) / 1000:.1f} s; {ends(took)}")
    began = time.perf_counter()
    controller.cleanup()
    print(f"  deleted in {time.perf_counter() - began:.1f} s")
    took.clear()
    for n in range(200):
        began = time.perf_counter()
        controller.create_network(f"{n}", "myplugin", subnets=[Subnet.parse(f"10.{n}.0.0/24")])
        took.append((time.perf_counter() - began) * 1000)
    print(f"200 networks: {sum(took) / 1000:.1f} s; {ends(took)}")
    controller.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--many", action="store_true", help="500 sandboxes, 200 networks (a minute)")
    arguments = parser.parse_args()
    namespaces.unshare()
    took: dict[str, list[float]] = {"kernel": [], "in process": [], "socket": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        Plugin(BridgeDriver()) as bridge,
        NetworkController({"myplugin": bridge}) as local,
        over_a_socket(Path(folder)) as remote,
    ):
        contenders: dict[str, Any] = {
            "kernel": lambda: bare(Path(folder) / "bare"),
            "in process": lambda: controlled(local),
            "socket": lambda: controlled(remote),
        }
        for number in range(arguments.rounds + 1):
            for name, lives in contenders.items():
                figure = timed(lives)
                if number:  # the first loads modules
                    took[name].append(figure)
        print(f"a network and two joined sandboxes, {arguments.rounds} rounds, median ms:")
        for name, figures in took.items():
            beyond = median(a - b for a, b in zip(figures, took["kernel"], strict=True))
            print(f"  {name:<12} {median(figures):6.1f}" + (f"   beyond the kernel {beyond:+.1f}" if beyond else ""))
        if arguments.many:
            many(local)
    firewall.close()
    links.close()


if __name__ == "__main__":
    main()
