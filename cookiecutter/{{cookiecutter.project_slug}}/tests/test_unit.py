"""The driver's answers, without root and without a kernel: calls as the engine sends them, to a WSGI application."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from netplugin_sdk import Plugin
from netplugin_sdk.linux import firewall, links
from werkzeug.test import Client

from {{ cookiecutter.package_name }}.driver import Driver, Options

NETWORK = "ca75b6ab4104197bca40854b04bbec109626cb90c9d7510b4828a78878da6253"
ENDPOINT = "a8de4ba19c93688b6575aede7b50db8e825d043e1d6629a287613810ea43982e"


def create_network(**options: str) -> dict[str, Any]:
    return {
        "NetworkID": NETWORK,
        "Options": {"com.docker.network.generic": options},
        "IPv4Data": [{"AddressSpace": "LocalDefault", "Pool": "172.18.0.0/16", "Gateway": "172.18.0.1/16"}],
        "IPv6Data": [],
    }


def create_endpoint() -> dict[str, Any]:
    interface = {"Address": "172.18.0.2/16", "AddressIPv6": "", "MacAddress": ""}
    return {"NetworkID": NETWORK, "EndpointID": ENDPOINT, "Interface": interface, "Options": {}}


def join() -> dict[str, Any]:
    return {"NetworkID": NETWORK, "EndpointID": ENDPOINT, "SandboxKey": "/run/docker/netns/1", "Options": {}}


@pytest.fixture
def docker() -> Iterator[Client]:
    with Plugin(Driver()) as plugin:
        yield Client(plugin)


def test_it_is_a_network_driver(docker: Client) -> None:
    assert docker.post("/Plugin.Activate").json == {"Implements": ["NetworkDriver"]}


def test_options_have_defaults() -> None:
    assert Options.parse({}) == Options(mtu=1500)
    assert Options.parse({"mtu": "9000"}).mtu == 9000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mtu": "1279"}, "option mtu='1279': expected int >= 1280"),
        ({"mtu": "big"}, "option mtu='big': expected int"),
        ({"vlan": "7"}, "unknown option 'vlan'; known options: mtu"),
    ],
)
def test_a_wrong_option_is_refused(docker: Client, options: dict[str, str], said: str) -> None:
    answer = docker.post("/NetworkDriver.CreateNetwork", json=create_network(**options))
    assert answer.status_code == 400
    assert said in answer.text


@pytest.mark.usefixtures("any_interface")
def test_the_mtu_is_that_of_bridge_and_pair(docker: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []
    monkeypatch.setattr(firewall, "ensure", lambda policy: None)
    monkeypatch.setattr(links, "ensure_bridge", lambda name, *, addresses, mtu: made.append((name, mtu)))
    monkeypatch.setattr(links, "ensure_veth", lambda outside, inside, *, master, mtu: made.append((outside, mtu)))
    assert docker.post("/NetworkDriver.CreateNetwork", json=create_network(mtu="1400")).status_code == 200
    assert docker.post("/NetworkDriver.CreateEndpoint", json=create_endpoint()).status_code == 200
    joined = json.loads(docker.post("/NetworkDriver.Join", json=join()).text)
    assert joined["InterfaceName"] == {"SrcName": f"vc-{ENDPOINT[:12]}", "DstPrefix": "eth"}
    assert joined["Gateway"] == "172.18.0.1"
    assert made == [(f"br-{NETWORK[:12]}", 1400), (f"ve-{ENDPOINT[:12]}", 1400)]
