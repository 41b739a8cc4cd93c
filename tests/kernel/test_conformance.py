"""The conformance suite is right about plugins: good ones pass, and each wrong one fails the check meant for it.

For each check there is a plugin that breaks this one promise, and no other check may fail for it.
"""

from __future__ import annotations

import json
import re
import socketserver
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from myplugin.driver import BridgeDriver

from netplugin_sdk import (
    Endpoint,
    EndpointInterface,
    EndpointOptions,
    Join,
    MacAddress,
    Network,
    NetworkDriver,
    Plugin,
    Sandbox,
)
from netplugin_sdk.cli import main
from netplugin_sdk.core.calls import Call
from netplugin_sdk.core.plugin import Answer
from netplugin_sdk.ipam import PoolIpamDriver
from netplugin_sdk.linux import firewall, links, ports
from netplugin_sdk.testing.conformance import CHECKS, Group, Outcome, Report, Subject, run
from netplugin_sdk.testing.engine import listens, wait_until
from netplugin_sdk.testing.kit import Lab, serving

from .lab import run as command

Request = Mapping[str, Any]


class Paper(NetworkDriver):
    """A good driver without a kernel."""

    def create_network(self, network: Network) -> None:
        pass

    def delete_network(self, network: Network) -> None:
        pass

    def create_endpoint(self, network: Network, endpoint: Endpoint) -> EndpointInterface | None:
        return None if endpoint.requested.mac_address else EndpointInterface(mac_address=MacAddress.random())

    def delete_endpoint(self, network: Network, endpoint: Endpoint) -> None:
        pass

    def join(self, network: Network, endpoint: Endpoint, sandbox: Sandbox) -> Join:
        return Join(endpoint.interface_name("vc"), gateways=network.gateways)

    def leave(self, network: Network, endpoint: Endpoint) -> None:
        pass

    def program_external_connectivity(self, network: Network, endpoint: Endpoint, options: EndpointOptions) -> None:
        pass

    def revoke_external_connectivity(self, network: Network, endpoint: Endpoint) -> None:
        pass


pytestmark = pytest.mark.usefixtures("any_interface")
"""Else the SDK itself catches links that are not there, and a good driver without a kernel has none."""


class Wrong(Plugin):
    """A plugin whose answers are changed by one who is told the path, the body, and how to get the right answer."""

    wrong: Any = None

    def handle(self, path: str, body: bytes, call: Call | None = None) -> Answer:
        def right() -> Answer:
            return super(Wrong, self).handle(path, body, call)

        answer = self.wrong(path.rpartition(".")[2], body, right)
        return right() if answer is None else answer


def answered(content: Any, status: int = 200) -> Answer:
    return Answer(status, content if isinstance(content, bytes) else json.dumps(content).encode(), {})


def changed(answer: Answer, **fields: Any) -> Answer:
    return answered({**json.loads(answer.body), **fields}, answer.status)


NO = answered({"Err": "no", "Error": "no"}, 500)


def request_of(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


# ------------------------------------------------------------------------------------------------------- wrong answers

Right = Callable[[], Answer]
"""Gets the right answer."""
Answering = Callable[[str, bytes, Right], Answer | None]
"""Takes the method, the body, and what gets the right answer; None leaves it at that."""
WRONG: dict[str, Callable[[], Answering]] = {}


def breaks(check: str) -> Callable[[Callable[[], Answering]], Callable[[], Answering]]:
    """A function that makes, for one plugin, what changes its answers."""

    def register(make: Callable[[], Answering]) -> Callable[[], Answering]:
        WRONG[check] = make
        return make

    return register


def instead(check: str, method: str, answer: Any) -> None:
    """One method is answered like this, always; a function makes it from the request and the right answer."""

    def make() -> Answering:
        def wrong(asked: str, body: bytes, right: Right) -> Answer | None:
            if asked != method:
                return None
            if isinstance(answer, Answer):
                return answer
            found: Answer | None = answer(request_of(body), right())
            return found

        return wrong

    WRONG[check] = make


def the_second_time(check: str, method: str, answer: Callable[[Answer], Answer]) -> None:
    """The same request once more is answered like this."""

    def make() -> Answering:
        seen: set[bytes] = set()

        def wrong(asked: str, body: bytes, right: Right) -> Answer | None:
            if asked != method or body not in seen:
                seen.add(body if asked == method else b"")
                return None
            return answer(right())

        return wrong

    WRONG[check] = make


instead("activate", "/Plugin.Activate".rpartition(".")[2], answered({"Implements": "NetworkDriver"}))
instead("capabilities", "GetCapabilities", lambda _, right: changed(right, Scope="everywhere"))
instead("unknown-method", "MethodOfTheFuture", answered({}))
instead("network-lifecycle", "CreateNetwork", NO)


def echoed(asked: dict[str, Any], right: Answer) -> Answer:
    return changed(right, Interface=asked["Interface"]) if right.status == 200 else right


instead("create-endpoint-answer", "CreateEndpoint", echoed)
instead("join-answer", "Join", lambda _, right: changed(right, Gateway="there") if right.status == 200 else right)
instead("operational-info", "EndpointOperInfo", answered({"Value": ["a", "list"]}))
instead("external-connectivity", "RevokeExternalConnectivity", answered({"Err": "not supported"}, 404))
the_second_time("create-network-twice", "CreateNetwork", lambda _: NO)
the_second_time("create-endpoint-twice", "CreateEndpoint", lambda _: NO)
the_second_time("join-twice", "Join", lambda right: changed(right, InterfaceName={"SrcName": "x1", "DstPrefix": "eth"}))
the_second_time("leave-twice", "Leave", lambda _: NO)
the_second_time("delete-endpoint-twice", "DeleteEndpoint", lambda _: NO)
the_second_time("delete-network-twice", "DeleteNetwork", lambda _: NO)
instead("ipam-address-spaces", "GetDefaultAddressSpaces", answered({"LocalDefaultAddressSpace": ""}))


def quietly(check: str, method: str, when: Callable[[bytes, Answer], bool], content: Any) -> None:
    """What is refused is answered as a success."""

    def make() -> Answering:
        def wrong(asked: str, body: bytes, right: Right) -> Answer | None:
            answer = right()
            return answered(content) if asked == method and when(body, answer) else answer

        return wrong

    WRONG[check] = make


quietly("unknown-network", "CreateEndpoint", lambda body, right: right.status != 200 and b"f" * 64 in body, {})
quietly("unknown-endpoint", "Join", lambda body, right: right.status != 200 and body != b"", {})
quietly("malformed-body", "CreateNetwork", lambda body, right: right.status == 400 and body != b"", {})


@breaks("retry-without-body")
def _() -> Answering:
    return lambda _method, body, _right: answered({}) if body == b"" and "C" in _method[:2] and "t" in _method else None


@breaks("endpoint-lifecycle")
def _() -> Answering:
    """Addresses are never free again."""
    used: dict[tuple[str, str], str] = {}

    def wrong(method: str, body: bytes, right: Right) -> Answer | None:
        asked = request_of(body)
        if method != "CreateEndpoint" or "EndpointID" not in asked:
            return None
        address = asked["Interface"]["Address"]
        return (
            NO if used.setdefault((asked["NetworkID"], address), asked["EndpointID"]) != asked["EndpointID"] else None
        )

    return wrong


@breaks("internal-network")
def _() -> Answering:
    inner: set[str] = set()

    def wrong(method: str, body: bytes, right: Right) -> Answer | None:
        asked = request_of(body)
        if method == "CreateNetwork" and (asked.get("Options") or {}).get("com.docker.network.internal"):
            inner.add(asked["NetworkID"])
        return changed(right(), Gateway="10.213.0.1") if method == "Join" and asked.get("NetworkID") in inner else None

    return wrong


@breaks("readable-error")
def _() -> Answering:
    def wrong(method: str, body: bytes, right: Right) -> Answer | None:
        answer = right()
        return answered(b"<html>\nTraceback\n</html>", 500) if method == "Join" and answer.status != 200 else answer

    return wrong


@breaks("alive-after-errors")
def _() -> Answering:
    """What is nested deeply ends it, until somebody starts it again."""
    ended = threading.Event()

    def wrong(method: str, body: bytes, right: Right) -> Answer | None:
        if body.startswith(b"[["):
            ended.set()
        elif method == "CreateNetwork" and ended.is_set() and request_of(body).get("IPv4Data"):
            ended.clear()
            return NO
        return None

    return wrong


def not_at_once(check: str, method: str, key: Callable[[dict[str, Any]], str]) -> None:
    def make() -> Answering:
        busy: Counter[str] = Counter()
        guard = threading.Lock()

        def wrong(asked: str, body: bytes, right: Right) -> Answer | None:
            if asked != method:
                return None
            where = key(request_of(body))
            with guard:
                busy[where] += 1
                crowded = busy[where] > 1
            time.sleep(0.03)
            with guard:
                busy[where] -= 1
            return NO if crowded else None

        return wrong

    WRONG[check] = make


not_at_once("concurrent-networks", "CreateNetwork", lambda _: "all")
not_at_once("concurrent-endpoints", "CreateEndpoint", lambda asked: str(asked.get("NetworkID")))


@breaks("ipam-pool")
def _() -> Answering:
    """It never takes one back."""
    given: set[str] = set()

    def wrong(method: str, body: bytes, right: Right) -> Answer | None:
        pool = request_of(body).get("Pool")
        if method != "RequestPool" or not pool:
            return None
        again = pool in given
        given.add(pool)
        return NO if again else None

    return wrong


instead(
    "ipam-pools-do-not-overlap",
    "RequestPool",
    lambda asked, right: right if asked["Pool"] else changed(right, Pool="172.31.0.0/16"),
)


@breaks("ipam-addresses")
def _() -> Answering:
    """Every tenth is one that somebody has."""
    given: list[Answer] = []

    def wrong(method: str, body: bytes, right: Right) -> Answer | None:
        if method != "RequestAddress":
            return None
        given.append(right())
        return given[-2] if len(given) % 10 == 0 else given[-1]

    return wrong


instead(
    "ipam-requested-address",
    "RequestAddress",
    lambda asked, right: answered({"Address": f"{asked['Address']}/24", "Data": {}}) if asked["Address"] else right,
)


@breaks("ipam-gateway")
def _() -> Answering:
    """The gateway's address is given to the next as well."""
    gateways: dict[str, Answer] = {}

    def wrong(method: str, body: bytes, right: Right) -> Answer | None:
        asked = request_of(body)
        if method != "RequestAddress":
            return None
        answer = right()
        if "RequestAddressType" in (asked.get("Options") or {}):
            gateways[asked["PoolID"]] = answer
            return answer
        given: Answer = gateways.pop(str(asked["PoolID"]), answer)
        return given

    return wrong


instead(
    "ipam-exhausted",
    "RequestAddress",
    lambda asked, right: (
        answered({"Err": "none left"}) if "10.214.5." in asked["PoolID"] and right.status != 200 else right
    ),
)


# ------------------------------------------------------------------------------------------------ wrong in the kernel


class NoLink(BridgeDriver):
    def join(self, network: Any, endpoint: Endpoint, sandbox: Sandbox) -> Join:
        return Join(f"x{super().join(network, endpoint, sandbox).interface}"[:15], gateways=network.gateways)


def isolate(endpoint: Endpoint) -> None:
    """Of all other ports of its bridge, but not of the bridge itself."""
    for link in json.loads(command("ip", "-json", "link", "show", "type", "veth")):
        if endpoint.id[:6] in link["ifname"] and link.get("master"):
            command("bridge", "link", "set", "dev", link["ifname"], "isolated", "on")


class Apart(BridgeDriver):
    def join(self, network: Any, endpoint: Endpoint, sandbox: Sandbox) -> Join:
        joined = super().join(network, endpoint, sandbox)
        isolate(endpoint)
        return joined


class NoGateway(BridgeDriver):
    def join(self, network: Any, endpoint: Endpoint, sandbox: Sandbox) -> Join:
        joined = super().join(network, endpoint, sandbox)
        return Join(joined.interface, gateways=[network.subnets[0][254]] if network.subnets else ())


class NoReturn(BridgeDriver):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def join(self, network: Any, endpoint: Endpoint, sandbox: Sandbox) -> Join:
        joined = super().join(network, endpoint, sandbox)
        if (network.id, endpoint.addresses) in self.seen:
            for other in network.endpoints.values():
                isolate(other)
        self.seen.add((network.id, endpoint.addresses))
        return joined


class Untidy(BridgeDriver):
    made: ClassVar = iter(range(1000))

    def create_network(self, network: Any) -> None:
        super().create_network(network)
        command("ip", "link", "add", f"left{next(self.made)}", "type", "bridge")


WRONG_DRIVERS: dict[str, type[BridgeDriver]] = {
    "link-in-sandbox": NoLink,
    "sandboxes-reach-each-other": Apart,
    "gateway-answers": NoGateway,
    "sandbox-rejoins": NoReturn,
    "no-links-left": Untidy,
}


# ------------------------------------------------------------------------------------------------------ wrong servers


def http(plugin: Plugin, protocol: str, refuses: str = "") -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = protocol

        def do_POST(self) -> None:
            answer = plugin.handle(self.path, self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            status = 400 if refuses == "empty host" and not self.headers.get("Host") else answer.status
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)
            self.close_connection = refuses == "a second request"

        def address_string(self) -> str:
            return "unix"

        def log_message(self, *_: object) -> None:
            pass

    return Handler


class Slow(socketserver.ThreadingUnixStreamServer):
    """Accepts a hundred a second, and has no room for those that wait."""

    request_queue_size = 12
    daemon_threads = True

    def get_request(self) -> Any:
        time.sleep(0.01)
        return super().get_request()


class Quick(socketserver.ThreadingUnixStreamServer):
    request_queue_size = 1000
    daemon_threads = True


SERVERS: dict[str, tuple[type[socketserver.ThreadingUnixStreamServer], str, str]] = {
    "keep-alive": (Quick, "HTTP/1.1", "a second request"),
    "empty-host-header": (Quick, "HTTP/1.1", "empty host"),
    "many-connections": (Slow, "HTTP/1.1", ""),
}


# ---------------------------------------------------------------------------------------------------------- processes

FORGETFUL = """
import sys
from pathlib import Path
from netplugin_sdk import Plugin, Server
from netplugin_sdk.core import answers
from tests.kernel.test_conformance import Paper
answers.interface_exists = lambda name: True
with Plugin(Paper()) as plugin, Server(plugin) as server:
    server.listen_unix(Path(sys.argv[1]))
    server.run()
"""
LOSING_ENDPOINTS = """
import sqlite3, sys
from pathlib import Path
from netplugin_sdk import serve
from netplugin_sdk.core import answers
from tests.kernel.test_conformance import Paper
answers.interface_exists = lambda name: True
if (file := Path(sys.argv[2]) / "state.db").exists():
    db = sqlite3.connect(file)
    for table in ("endpoints", "joins"):
        db.execute(f"DELETE FROM {table}")
    db.commit()
    db.close()
serve(Paper(), name="x", socket_path=sys.argv[1], state=sys.argv[2], docker=None)
"""
PROGRAMS = {"network-survives": FORGETFUL, "endpoint-survives": LOSING_ENDPOINTS}
MYPLUGIN = """
import sys
from myplugin.driver import BridgeDriver
from netplugin_sdk import serve
from netplugin_sdk.ipam import PoolIpamDriver
serve(BridgeDriver(), PoolIpamDriver(), name="x", socket_path=sys.argv[1], state=sys.argv[2], docker=None)
"""


class Running:
    """A plugin in a process of its own, in the test's network namespace."""

    def __init__(self, program: str, folder: Path) -> None:
        self.socket = folder / "plugin.sock"
        self._command = [sys.executable, "-c", program, str(self.socket), str(folder / "state")]
        self._log = (folder / "log").open("a")
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(self._command, stderr=self._log)
        wait_until(lambda: listens(self.socket) or self._process.poll() is not None, 20)
        assert self._process.poll() is None, Path(self._log.name).read_text()

    def restart(self) -> None:
        self._process.kill()
        self._process.wait()
        self._start()

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._log.close()

    @property
    def subject(self) -> Subject:
        return Subject(f"unix://{self.socket}", restart=self.restart)


# ---------------------------------------------------------------------------------------------------------------- tests


def caught(report: Report) -> list[str]:
    return [result.check.id for result in report.failed]


def is_exact(report: Report, check: str) -> None:
    """Only this one fails. What is skipped says why."""
    assert caught(report) == [check], report.text()
    (result,) = report.failed
    assert result.message
    for other in report.results:
        if other.outcome is Outcome.SKIPPED:
            assert other.message


def test_every_check_has_a_plugin_that_fails_it() -> None:
    assert sorted([*WRONG, *WRONG_DRIVERS, *SERVERS, *PROGRAMS]) == sorted(CHECKS)
    for check in CHECKS.values():
        assert check.proves.endswith(".")
        assert check.source
        assert check.hint


@pytest.mark.parametrize("check", list(WRONG))
def test_wrong_answers_are_caught(check: str, tmp_path: Path) -> None:
    plugin = Wrong(Paper(), PoolIpamDriver())
    plugin.wrong = WRONG[check]()
    with plugin, serving(plugin, tmp_path / "plugin.sock") as path:
        is_exact(run(Subject(f"unix://{path}", data_plane=False)), check)


@pytest.mark.parametrize("check", list(SERVERS))
def test_wrong_servers_are_caught(check: str, tmp_path: Path) -> None:
    kind, protocol, refuses = SERVERS[check]
    path = tmp_path / "plugin.sock"
    with Plugin(Paper(), PoolIpamDriver()) as plugin, kind(str(path), http(plugin, protocol, refuses)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            is_exact(run(Subject(f"unix://{path}", data_plane=False)), check)
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("check", list(PROGRAMS))
def test_what_a_plugin_forgets_is_caught(check: str, tmp_path: Path) -> None:
    with closing(Running(PROGRAMS[check], tmp_path)) as plugin:
        subject = Subject(plugin.subject.url, restart=plugin.restart, data_plane=False)
        is_exact(run(subject), check)


@pytest.mark.usefixtures("iptables")
@pytest.mark.parametrize("check", list(WRONG_DRIVERS))
def test_wrong_links_are_caught(check: str, tmp_path: Path) -> None:
    try:
        with Plugin(WRONG_DRIVERS[check]()) as plugin, serving(plugin, tmp_path / "plugin.sock") as path:
            is_exact(run(Subject(f"unix://{path}")), check)
    finally:
        ports.close()
        firewall.close()
        links.close()


@pytest.mark.usefixtures("iptables")
def test_myplugin_passes(tmp_path: Path) -> None:
    with closing(Running(MYPLUGIN, tmp_path)) as plugin:
        report = run(plugin.subject)
    assert {result.outcome for result in report.results} == {Outcome.PASSED}, report.text()
    assert len(report.results) == len(CHECKS)


def test_the_minimal_driver_of_the_readme_passes(tmp_path: Path, iptables: None) -> None:
    source = (Path(__file__).parents[2] / "README.md").read_text()
    (lines,) = re.findall(r"<!-- minimal driver[^\n]*-->\n```python\n(.*?)```", source, re.DOTALL)
    where = "socket_path=sys.argv[1], state=sys.argv[2]"
    program = lines.replace('name="l2"', f'name="l2", {where}')
    with closing(Running(f"import sys\n{program}", tmp_path)) as plugin:
        report = run(plugin.subject)
    assert not report.failed, report.text()
    assert {result.check.group for result in report.results if result.outcome is Outcome.SKIPPED} == {Group.IPAM}


# Plugins that are not ours

DOCKER_PLUGIN_API = """
import sys
import flask
from docker_plugin_api.NetworkDriverEntities import EndpointCreateEntity, JoinEntity, NetworkCreateEntity
from docker_plugin_api.Plugin import InputValidationException, app, functions
from werkzeug.serving import run_simple

functions.append("NetworkDriver")
networks, endpoints = {}, {}

def known(things, id_):
    if id_ not in things:
        raise InputValidationException(f"{id_} is unknown")
    return things[id_]

@app.route("/NetworkDriver.GetCapabilities", methods=["POST"])
def capabilities():
    return {"Scope": "local", "ConnectivityScope": "local"}

@app.route("/NetworkDriver.CreateNetwork", methods=["POST"])
def create_network():
    entity = NetworkCreateEntity(**flask.request.get_json(force=True))
    if entity.NetworkID in networks:
        raise InputValidationException("network exists")
    networks[entity.NetworkID] = entity
    return {}

@app.route("/NetworkDriver.DeleteNetwork", methods=["POST"])
def delete_network():
    networks.pop(known(networks, flask.request.get_json(force=True)["NetworkID"]).NetworkID)
    return {}

@app.route("/NetworkDriver.CreateEndpoint", methods=["POST"])
def create_endpoint():
    entity = EndpointCreateEntity(**flask.request.get_json(force=True))
    known(networks, entity.NetworkID)
    endpoints[entity.EndpointID] = entity
    return {"Interface": {}}

@app.route("/NetworkDriver.EndpointOperInfo", methods=["POST"])
def info():
    return {"Value": {}}

@app.route("/NetworkDriver.DeleteEndpoint", methods=["POST"])
def delete_endpoint():
    endpoints.pop(flask.request.get_json(force=True)["EndpointID"], None)
    return {}

@app.route("/NetworkDriver.Join", methods=["POST"])
def join():
    entity = JoinEntity(**flask.request.get_json(force=True))
    known(endpoints, entity.EndpointID)
    return {"InterfaceName": {"SrcName": "ve-" + entity.EndpointID[:8], "DstPrefix": "eth"}}

@app.route("/NetworkDriver.Leave", methods=["POST"])
def leave():
    return {}

flask_app = flask.Flask("driver")
flask_app.register_blueprint(app)
run_simple(f"unix://{sys.argv[1]}", 0, flask_app, threaded=True)
"""


def test_a_driver_on_docker_plugin_api(tmp_path: Path) -> None:
    """As its authors write them: in memory, served by Werkzeug's development server."""
    with closing(Running(DOCKER_PLUGIN_API, tmp_path)) as plugin:
        report = run(Subject(plugin.subject.url, restart=plugin.restart, data_plane=False))
    # Its driver keeps nothing on disk, and refuses what it has done already.
    assert caught(report) == ["create-network-twice", "delete-network-twice", "network-survives"], report.text()


def test_reports(tmp_path: Path) -> None:
    plugin = Wrong(Paper())
    plugin.wrong = WRONG["readable-error"]()
    told: list[str] = []
    with plugin, serving(plugin, tmp_path / "plugin.sock") as path:
        report = run(Subject(f"unix://{path}", data_plane=False), on_result=lambda result: told.append(result.check.id))
    assert told == list(CHECKS)
    skipped = sum(result.outcome is Outcome.SKIPPED for result in report.results)
    assert report.summary == f"{len(CHECKS) - skipped - 1} passed, 1 failed, {skipped} skipped"
    text = report.text()
    for part in (
        "✗ readable-error",
        "hint:   Answer",
        "NetworkDriver.Join {",
        "→ 500 <html>",
        "the plugin does not implement IpamDriver",
    ):
        assert part in text
    suite = ElementTree.fromstring(report.junit())
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == (str(len(CHECKS)), "1", str(skipped))
    assert len(suite.findall("testcase/failure")) == 1
    page = report.html()
    assert "&lt;html&gt;" in page
    assert page.count("<tr") == len(CHECKS)


def test_the_command_line_joins_sandboxes(lab: Lab) -> None:
    with lab.served(lab.plugin(BridgeDriver(), PoolIpamDriver(), name="myplugin")) as path:
        result = CliRunner().invoke(main, ["check", str(path), "--json"])
    assert result.exit_code == 0
    outcomes = {each["check"]: each["outcome"] for each in json.loads(result.stdout)["checks"]}
    assert {outcomes[id_] for id_, check in CHECKS.items() if check.group == Group.DATA_PLANE} == {"passed"}
