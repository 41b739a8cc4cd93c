"""The program of `make demo ENGINE=none`: myplugin without Docker, step by step.

    unshare --net --mount python examples/without_docker.py

The plugin is a process of its own and is found by its socket, as by Docker; `NetworkController` is Docker's side.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from demo import BOLD, RESET, say

from netplugin_sdk.cnm import NetworkController, Subnet
from netplugin_sdk.protocol.messages import PortMapping
from netplugin_sdk.testing.engine import listens, wait_until
from netplugin_sdk.values import TransportProtocol

SOCKET = Path("/run/docker/plugins/myplugin.sock")


def show(line: str, *results: object) -> None:
    """A step, and its outcome."""
    print(f"{BOLD}>>> {line}{RESET}", *results, sep="\n", flush=True)


def run(*command: str) -> str:
    """The output of a command, here, where the bridge is."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip()


def main() -> None:
    """The steps."""
    began = time.monotonic()
    for folder in ("/run/docker", "/var/lib/netplugin"):  # of this mount namespace alone
        Path(folder).mkdir(parents=True, exist_ok=True)
        run("mount", "-t", "tmpfs", "none", folder)
    run("ip", "link", "set", "lo", "up")
    say("The plugin runs, and waits at its socket:")
    log = SOCKET.parent.with_name("myplugin.log")
    with log.open("w") as output, subprocess.Popen([sys.executable, "-m", "myplugin"], stderr=output) as plugin:
        try:
            wait_until(lambda: plugin.poll() is not None or listens(SOCKET), 60)
            if plugin.poll() is not None:
                sys.exit(log.read_text())
            show(str(SOCKET), f"ready after {time.monotonic() - began:.1f} s")
            demonstrate()
        finally:
            plugin.terminate()
    say("What the plugin logged:")
    print(log.read_text(), end="")
    print(f"\nAll of it took {time.monotonic() - began:.1f} s.")


def demonstrate() -> None:
    """A network, two sandboxes, and the traffic between them."""
    with NetworkController() as controller:
        say("A network of it is a Linux bridge with the gateway's address:")
        lan = controller.create_network("lan", "myplugin", subnets=[Subnet.parse("10.1.0.0/24")])
        show('lan = controller.create_network("lan", "myplugin", …)', run("ip", "-brief", "-4", "address"))
        say("Two sandboxes on it, one with a published port:")
        ports = [PortMapping(protocol=TransportProtocol.TCP, container_port=80, host_port=8080)]
        web, client = controller.create_sandbox("web", ports=ports), controller.create_sandbox("client")
        for sandbox in (web, client):
            endpoint = sandbox.connect(lan)
            address = sandbox.run("ip", "-brief", "-4", "address", "show", str(endpoint.interface))
            show(f"{sandbox.name}.connect(lan)", address.rstrip())
        say("They reach each other by name:")
        show('client.run("ping", "-c", "2", "web")', client.run("ping", "-c", "2", "-i", "0.2", "web").rstrip())
        say("What `docker inspect` would show of the port, from the plugin:")
        show("endpoint.operational_info()", json.dumps(web.endpoints[0].operational_info(), indent=2))
        say("Clean up:")
        web.delete()
        client.delete()
        lan.delete()
    wait_until(lambda: "br-" not in run("ip", "-brief", "link"), 60)
    show("ip -brief link", run("ip", "-brief", "link"))


if __name__ == "__main__":
    main()
