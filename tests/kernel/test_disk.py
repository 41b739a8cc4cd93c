"""A disk that is full, or cannot be written: an error to Docker, and what is known stays as it is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# In a mount namespace of its own, on a small file system.
PROGRAM = """
import json, os, resource, sys
from pathlib import Path
from netplugin_sdk import DriverError, Join, NetworkDriver, Plugin

folder = Path(sys.argv[1])


def fill():
    with (folder / "filler").open("ab", 0) as filler:
        size = 65536
        while size:
            try:
                filler.write(b"x" * size)
            except OSError:
                size //= 2


def free():
    (folder / "filler").unlink()


def fail(failing=True):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0 if failing else hard, hard))


class Driver(NetworkDriver):
    def __init__(self):
        self.made, self.midway = set(), lambda: None

    def create_network(self, network):
        self.made.add(network.id)
        self.midway()

    def delete_network(self, network):
        self.made.discard(network.id)

    def create_endpoint(self, network, endpoint):
        self.made.add(endpoint.id)
        self.midway()

    def delete_endpoint(self, network, endpoint):
        self.made.discard(endpoint.id)

    def join(self, network, endpoint, sandbox):
        self.midway()
        return Join()

    def leave(self, network, endpoint):
        pass


class Engine:
    def __init__(self):
        self.driver = Driver()
        self.plugin = Plugin(self.driver, state=folder / "state")

    def __call__(self, method, network="a", endpoint="b"):
        request = {"NetworkID": network * 64, "EndpointID": endpoint * 64, "SandboxKey": "/", "Options": {},
                   "Interface": {"Address": "10.0.0.2/24"}}
        answer = self.plugin.handle(f"/NetworkDriver.{method}", json.dumps(request).encode())
        return [answer.status, json.loads(answer.body).get("Err", "")]

    def made(self):
        return sorted(id_[0] for id_ in self.driver.made)

    def again(self):
        self.plugin.close()
        engine = Engine()
        known = [n.id[0] for n in engine.driver.networks.values()]
        known += [e.id[0] for n in engine.driver.networks.values() for e in n.endpoints.values()]
        return engine, sorted(known)
"""
FULL = [503, "cannot write the plugin's state: database or disk is full"]
FAILED = [503, "cannot write the plugin's state: disk I/O error"]
DONE = [200, ""]


def run(script: str, folder: Path, mount: str = "mount -t tmpfs -o size=512k tmpfs") -> Any:
    """What the script prints, as JSON, with this mounted on its folder."""
    if not shutil.which("unshare"):
        pytest.skip("not installed: unshare (package util-linux)")
    command = ["unshare", "--mount", "sh", "-c", f'{mount} "$2" && exec "$0" -c "$1" "$2"']
    done = subprocess.run(
        [*command, sys.executable, f"{PROGRAM}\n{script}", str(folder)], capture_output=True, text=True, check=False
    )
    if "must be superuser" in done.stderr or "unshare failed" in done.stderr:
        pytest.skip(f"cannot mount (CAP_SYS_ADMIN is missing): {done.stderr}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_while_the_disk_is_full_nothing_new_is_made_and_nothing_known_is_lost(tmp_path: Path) -> None:
    found = run(
        """
engine = Engine()
said = [engine("CreateNetwork"), engine("CreateEndpoint")]
fill()
while engine("CreateNetwork", "e")[0] == engine("DeleteNetwork", "e")[0] == 200:
    pass  # to the end of the last block
said += [engine("CreateNetwork", "c"), engine("CreateEndpoint", "a", "d"), engine("DeleteEndpoint"), engine("Join")]
said.append([made for made in engine.made() if made != "e"])
free()
engine("DeleteNetwork", "e")
said += [engine("Join"), engine("CreateNetwork", "c"), engine("DeleteEndpoint"), engine.made()]
said.append(engine.again()[1])
print(json.dumps(said))
""",
        tmp_path,
    )
    assert found == [DONE, DONE, FULL, FULL, FULL, FULL, ["a", "b"], DONE, DONE, DONE, ["a", "c"], ["a", "c"]]


@pytest.mark.parametrize("killed", [False, True])
def test_what_is_made_when_writing_fails_is_undone(tmp_path: Path, killed: bool) -> None:
    found = run(
        f"""
engine = Engine()
said = [engine("CreateNetwork")]
engine.driver.midway = fail
said += [engine("CreateNetwork", "c"), engine.made()]
fail(False)
if {killed}:
    engine, known = engine.again()
    said.append(known)
else:
    said.append([n.id[0] for n in engine.driver.networks.values() if n.row.intent is None])
engine.driver.midway = fail
said += [engine("CreateEndpoint"), engine.made()]
fail(False)
engine.driver.midway = lambda: None
said += [engine("CreateEndpoint"), engine("CreateNetwork", "c"), engine.made()]
fail()
said += [engine("DeleteNetwork"), engine("DeleteEndpoint"), engine.made()]
fail(False)
said += [engine("DeleteEndpoint"), engine.again()[1]]
print(json.dumps(said))
""",
        tmp_path,
    )
    assert found[:7] == [DONE, FAILED, ["a"], ["a"], FAILED, ["a"], DONE]
    assert found[7:] == [DONE, ["a", "b", "c"], FAILED, FAILED, ["a", "b", "c"], DONE, ["a", "c"]]


def test_a_file_system_that_is_read_only_is_named_at_the_start(tmp_path: Path) -> None:
    found = run(
        """
try:
    Engine()
except DriverError as error:
    print(json.dumps(str(error)))
""",
        tmp_path,
        mount="mount -t tmpfs -o ro tmpfs",
    )
    assert found == f"cannot use the state folder {tmp_path}/state: Read-only file system"
