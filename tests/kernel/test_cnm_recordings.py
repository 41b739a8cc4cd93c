"""The controller asks a plugin what real engines asked it, from the same commands: the recorded days, once more.

What the engine chooses anew each time has its place in the order of appearance instead: ids, and names made of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from netplugin_sdk import Plugin
from netplugin_sdk.cnm import NetworkController, Sandbox, Subnet
from netplugin_sdk.cnm.registry import Driver
from netplugin_sdk.errors import NotFound
from netplugin_sdk.ipam import PoolIpamDriver
from netplugin_sdk.linux import links
from netplugin_sdk.protocol.messages import Port, PortMapping, encode
from netplugin_sdk.values import MacAddress, TransportProtocol

RECORDINGS = Path(__file__).parent.parent / "wire/recordings"
TCP, UDP = TransportProtocol.TCP, TransportProtocol.UDP
PORTS = [
    PortMapping(protocol=UDP, container_port=81, host_address=ip_address("127.0.0.1"), host_port=18081),
    PortMapping(protocol=TCP, container_port=80, host_port=18080),
]
EXPOSED = [Port(TCP, 99)]
Call = tuple[str, dict[str, Any]]


class Recorder:
    """Answers as the recorded plugin did, and makes the links that it says it made."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def activate(self, kind: str) -> None:
        assert kind == "NetworkDriver"

    def call(self, method: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        request = {} if content is None else json.loads(encode(content))
        self.calls.append((method, request))
        match method.partition(".")[2]:
            case "GetCapabilities":
                return {"Scope": "local", "ConnectivityScope": "local", "GwAllocChecker": True}
            case "CreateEndpoint":
                return {"Interface": {}}
            case "EndpointOperInfo":
                return {"Value": {}}
            case "Join":
                name = f"rc{request['EndpointID'][:8]}"
                links.ensure_veth(f"h{name}", name)
                return {"InterfaceName": {"SrcName": name, "DstPrefix": "eth"}, **self.gateways(request)}
            case "DeleteEndpoint":
                links.delete(f"hrc{request['EndpointID'][:8]}")
        return {}

    def gateways(self, joined: Mapping[str, Any]) -> dict[str, str]:
        (created,) = (
            request
            for method, request in self.calls
            if method.endswith("CreateNetwork") and request["NetworkID"] == joined["NetworkID"]
        )
        found = {}
        for field, data in (("Gateway", "IPv4Data"), ("GatewayIPv6", "IPv6Data")):
            found[field] = next((pool["Gateway"].partition("/")[0] for pool in created[data]), "")
        return found


def recorded(version: str) -> list[Call]:
    lines = map(json.loads, (RECORDINGS / f"engine-{version}-day.jsonl").read_text().splitlines())
    calls = [(line["method"].strip("/"), line["request"] or {}) for line in lines if "mark" not in line]
    return [call for call in calls if call[0] != "Plugin.Activate"]


def compared(calls: list[Call]) -> list[Call]:
    """With ids by their order, and lists of ports sorted, whose order is Go's for maps."""
    known: dict[str, str] = {}

    def normal(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: normal(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return sorted(map(normal, value), key=json.dumps)
        if isinstance(value, str) and (re.fullmatch("[0-9a-f]{64}", value) or value.startswith("/")):
            return known.setdefault(value, f"<{len(known)}>")
        return value

    return [(method, normal(request)) for method, request in calls]


def by_endpoint(calls: list[Call]) -> dict[str, list[Call]]:
    """Containers that are removed together are asked for side by side: the order is that of each endpoint."""
    found: dict[str, list[Call]] = {}
    for method, request in calls:
        found.setdefault(request.get("EndpointID", "networks"), []).append((method, request))
    return found


def day(controller: NetworkController) -> None:
    """The commands that were recorded."""
    create, version = controller.create_network, controller.engine.version
    a = create("a", "recorder")
    b = create(
        "b",
        "recorder",
        subnets=[
            Subnet.parse(
                "10.123.0.0/24", range="10.123.0.128/25", gateway="10.123.0.254", auxiliary={"host1": "10.123.0.200"}
            )
        ],
        options={"com.docker.network.driver.mtu": "1400", "my.opt": "7"},
    )
    c = create("c", "recorder", internal=True)
    d = create("d", "recorder", subnets=[Subnet.parse("fd00:123::/64")], ipv6=True)

    def start() -> Sandbox:
        web = controller.create_sandbox("web", ports=PORTS, exposed=EXPOSED)
        web.connect(a)
        return web

    web = start()
    others = []
    if version != "20.10":  # there it was refused
        fixed = controller.create_sandbox("fixed")
        fixed.connect(b, addresses=[ip_address("10.123.0.77")], mac=MacAddress("02:42:0a:7b:00:4d"))
        others.append(fixed)
    six = controller.create_sandbox("six")
    six.connect(d, addresses=[ip_address("fd00:123::44")])
    web.connect(b, options={"k": "v"})
    web.disconnect(b)
    for _ in range(2):
        web.delete()
        web = start()
    inner = controller.create_sandbox("inner")
    inner.connect(c)
    inner.delete()
    for sandbox in (web, six, *others):
        sandbox.delete()
    for network in (a, b, c, d):
        network.delete()


@pytest.fixture
def default() -> Iterator[Plugin]:
    """Docker's own addresses: it had the first of its networks, for its own bridge."""
    driver = PoolIpamDriver()
    driver.requires_mac_address = False
    with Plugin(driver) as plugin:
        plugin.handle("/IpamDriver.RequestPool", b'{"AddressSpace": "LocalDefault", "Pool": "172.17.0.0/16"}')
        yield plugin


@pytest.mark.usefixtures("netns")
@pytest.mark.parametrize("version", ["20.10", "26.1", "28.5"])
def test_a_recorded_day(version: str, default: Plugin, tmp_path: Path) -> None:
    recorder = Recorder()

    def find(name: str) -> Driver:
        if name != "recorder":
            raise NotFound(name)
        return recorder

    with NetworkController({"default": default}, find=find, engine=version, folder=tmp_path) as controller:
        day(controller)
    ours, theirs = by_endpoint(compared(recorder.calls)), by_endpoint(compared(recorded(version)))
    assert list(ours) == list(theirs)
    for endpoint, calls in theirs.items():
        assert ours[endpoint] == calls, endpoint
