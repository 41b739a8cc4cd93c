"""The program of `make demo`: a real Docker Engine uses myplugin, command by command, with the output of each.

    python examples/demo.py [--engine 26.1|20.10|28.5|host|none]

With a version, a private engine of that version is started in namespaces of its own and ended again; nothing of this
machine is changed. With `host`, the Docker of this machine is used: the plugin runs here, and everything that was made
is removed. With `none` there is no Docker: the SDK's own network controller asks the plugin what Docker would ask it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from netplugin_sdk.testing.engine import (
    ENGINE_ADDRESS,
    OUTSIDE_ADDRESS,
    VERSIONS,
    EngineError,
    EngineUnavailable,
    PrivateEngine,
    listens,
    wait_until,
)

PLUGIN = [sys.executable, "-m", "myplugin"]
STATE = Path("/var/lib/netplugin/myplugin")
PREFIX = "netplugin-demo-"  # of what is made in a Docker that is not ours
PORT = "4000"
# The outside host tells each caller which address it sees.
OUTSIDE_SERVER = f"""
import socketserver
class Tell(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"hello from outside; I see you as " + self.client_address[0].encode() + b"\\n")
socketserver.ThreadingTCPServer(("{OUTSIDE_ADDRESS}", {PORT}), Tell).serve_forever()
"""

# wget, which not every machine has.
FETCH = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode(), end='')"

BOLD, DIM, RESET = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")


class Stopped(Exception):
    """A step of the demo did not work."""


def say(text: str) -> None:
    """Explain the next step."""
    print(f"\n{DIM}# {text}{RESET}", flush=True)


class Shell:
    """Shows a command as a user would type it, behind the prompt of its host, runs it, and shows what it prints."""

    def __init__(self, run: Callable[[list[str]], subprocess.CompletedProcess[str]], host: str = "") -> None:
        self._run = run
        self._prompt = f"{host}$"

    def __call__(self, command: str) -> str:
        """Run the command; raise `Stopped` if it fails."""
        return self.show(command, lambda: self._run(shlex.split(command)))

    def show(self, command: str, run: Callable[[], subprocess.CompletedProcess[str]]) -> str:
        """The same, where what runs is not quite what is shown."""
        print(f"{BOLD}{self._prompt} {command}{RESET}", flush=True)
        done = run()
        print(done.stdout, end="", flush=True)
        if done.returncode != 0:
            raise Stopped(f"`{command}` failed: {done.stderr.strip() or f'status {done.returncode}'}")
        return done.stdout


def demonstrate(
    shell: Shell, name: str, publish: str, inbound: Callable[[], None], outbound: Callable[[], None]
) -> None:
    """The steps; `name` begins the name of all that they make."""
    network, web, client = f"{name}mynet", f"{name}web", f"{name}client"
    say("The plugin runs. Docker finds it by its socket:")
    shell("ls -l /run/docker/plugins")
    say("A network of it is a Linux bridge with the gateway's address:")
    shell(f"docker network create --driver myplugin {network}")
    shell("docker network ls")
    say("Two containers on it, one with a published port:")
    serve = "sh -c 'echo hello from web > /tmp/index.html; httpd -f -h /tmp'"
    shell(f"docker run --detach --name {web} --network {network} --publish {publish}:80 busybox {serve}")
    shell(f"docker run --detach --name {client} --network {network} busybox sleep 600")
    shell(f"docker network inspect {network}")
    say("They reach each other by name:")
    shell(f"docker exec {client} ping -c 3 {web}")
    inbound()
    outbound()
    say("Clean up:")
    shell(f"docker rm --force {web} {client}")
    shell(f"docker network rm {network}")


def on_private_engine(version: str) -> None:
    """The demo on a private engine."""
    say(f"Starting a private Docker Engine {version} …")
    started = time.monotonic()
    with PrivateEngine(version) as engine, engine.start_plugin("myplugin", PLUGIN) as plugin:
        print(f"ready after {time.monotonic() - started:.1f} s")

        def run(command: list[str]) -> subprocess.CompletedProcess[str]:
            return engine.run_docker(*command[1:]) if command[0] == "docker" else engine.run(command)

        shell = Shell(run)

        def inbound() -> None:
            url = f"http://{ENGINE_ADDRESS}:8080/"
            say("The outside host reaches the published port:")
            shell.show(f"wget -qO- {url}", lambda: engine.run_outside([sys.executable, "-c", FETCH, url]))

        def outbound() -> None:
            say(f"They reach the outside; {OUTSIDE_ADDRESS} has no route to them and sees the host's address:")
            with engine.spawn("outside", [sys.executable, "-c", OUTSIDE_SERVER], outside=True):
                listening = ["ss", "-Hltn", f"sport = :{PORT}"]
                wait_until(lambda: engine.run_outside(listening).stdout != "", 60)
                shell(f"docker exec client nc {OUTSIDE_ADDRESS} {PORT}")

        demonstrate(shell, "", "8080", inbound, outbound)
        say("Nothing is left of them on the host, as soon as the kernel has removed it:")
        wait_until(lambda: "br-" not in engine.run(["ip", "-brief", "link"]).stdout, 60)
        shell("ip -brief link")
        plugin.stop()
        say("What the plugin logged:")
        print(plugin.log.read_text(), end="")


def on_host() -> None:
    """The demo on the Docker of this machine."""

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=False)

    if os.geteuid() != 0:
        raise Stopped("the plugin needs root: run this as root")
    try:
        reachable = run(["docker", "version"])
    except FileNotFoundError:
        raise Stopped("there is no `docker` command here") from None
    if reachable.returncode != 0:
        raise Stopped(f"this machine's Docker cannot be reached: {reachable.stderr.strip()}")
    shell = Shell(run)

    def inbound() -> None:
        url = "http://127.0.0.1:18080/"
        say("The host reaches the published port:")
        shell.show(f"wget -qO- {url}", lambda: run([sys.executable, "-c", FETCH, url]))

    def outbound() -> None:
        say("They reach the host, here by their network's gateway:")
        gateway = run(
            ["docker", "network", "inspect", f"{PREFIX}mynet", "--format", "{{(index .IPAM.Config 0).Gateway}}"]
        )
        shell(f"docker exec {PREFIX}client ping -c 2 {gateway.stdout.strip()}")

    with host_plugin(), removed_afterwards(run):
        demonstrate(shell, PREFIX, "127.0.0.1:18080", inbound, outbound)


def without_docker() -> None:
    """The demo with a controller, in network and mount namespaces of its own."""
    if os.geteuid() != 0:
        raise Stopped("network namespaces need root: run this as root")
    program = Path(__file__).with_name("without_docker.py")
    done = subprocess.run(["unshare", "--net", "--mount", sys.executable, program], check=False)
    if done.returncode != 0:
        raise Stopped(f"{program.name} ended with status {done.returncode}")


@contextlib.contextmanager
def host_plugin() -> Iterator[None]:
    """myplugin on this machine. Its state on disk is removed, too, if there was none before."""
    new = [folder for folder in (STATE, STATE.parent) if not folder.exists()]
    with (
        tempfile.NamedTemporaryFile(prefix="myplugin-", suffix=".log") as log,
        subprocess.Popen(PLUGIN, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            wait_until(lambda: listens(Path("/run/docker/plugins/myplugin.sock")) or process.poll() is not None, 60)
            if process.poll() is not None:
                raise Stopped(Path(log.name).read_text().strip())
            yield
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(20)
                say("What the plugin logged:")
                print(Path(log.name).read_text(), end="")
            for folder in new:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def removed_afterwards(run: Callable[[list[str]], subprocess.CompletedProcess[str]]) -> Iterator[None]:
    """Remove the demo's containers and network, whatever happens."""
    try:
        yield
    finally:
        run(["docker", "rm", "--force", f"{PREFIX}web", f"{PREFIX}client"])
        run(["docker", "network", "rm", f"{PREFIX}mynet"])


def main() -> int:
    """Run the demo; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--engine", default="26.1", choices=[*VERSIONS, "host", "none"], help="which Docker (default: 26.1)"
    )
    engine = parser.parse_args().engine
    steps = {"host": on_host, "none": without_docker}.get(engine, lambda: on_private_engine(engine))
    return finish(steps)


def finish(steps: Callable[[], None]) -> int:
    """Run a demo's steps; the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        steps()
    except (Stopped, EngineError, EngineUnavailable, TimeoutError) as error:
        print(f"\nThe demo stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; everything is removed again.", file=sys.stderr)
        return 128 + signal.SIGINT
    print(f"\n{BOLD}Done.{RESET} Your own driver: see README.md.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
