"""Replays conversations recorded from real engines to a plugin, and restarts it where the recorded one was restarted.

The recorded plugin was another program. Its two drivers are written again here, with the SDK, and record their
arguments in the terms of the wire. So the test sees every field that is lost or changed on its way to the author.
"""

from __future__ import annotations

import base64
import json
import logging
import sqlite3
from collections.abc import Iterator, Mapping
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest

from netplugin_sdk import (
    AddressRef,
    AddressRequest,
    DriverOptions,
    Endpoint,
    EndpointOptions,
    IpamData,
    IpamDriver,
    Join,
    Network,
    NetworkDriver,
    NetworkOptions,
    Plugin,
    Pool,
    PoolRequest,
    Sandbox,
    SkipGateway,
)
from netplugin_sdk.values import IPInterface, IPNetwork

FOLDER = Path(__file__).parent / "recordings"
REQUESTS = {
    "engine-20.10-day": 58,
    "engine-20.10-ipam": 90,
    "engine-26.1-day": 66,
    "engine-28.5-day": 63,
    "engine-28.5-ipam": 99,
}
RESTARTS = ("plugin killed and started again", "plugin back")
GENERIC = "com.docker.network.generic"
IPV4 = "com.docker.network.enable_ipv4"
PORT_MAP = "com.docker.network.portmap"
EXPOSED = "com.docker.network.endpoint.exposedports"
MAC = "com.docker.network.endpoint.macaddress"
NO_PROXY = "com.docker.network.driver.private.no_proxy_6to4"


# ------------------------------------------------------------------------------------- back into the words of the wire


def pool_words(data: IpamData) -> dict[str, Any]:
    words: dict[str, Any] = {"AddressSpace": data.address_space, "Pool": str(data.pool)}
    if data.gateway is not None:
        words["Gateway"] = str(data.gateway)
    if data.auxiliary_addresses:
        words["AuxAddresses"] = {name: str(address) for name, address in data.auxiliary_addresses.items()}
    return words


def option_words(options: EndpointOptions) -> dict[str, Any]:
    """The options from their typed attributes; options without one stay as they are."""
    typed: dict[str, Any] = {
        EXPOSED: [{"Proto": int(port.protocol), "Port": port.port} for port in options.exposed_ports],
        PORT_MAP: [
            {
                "Proto": int(mapping.protocol),
                "IP": str(mapping.container_address or ""),
                "Port": mapping.container_port,
                "HostIP": str(mapping.host_address or ""),
                "HostPort": mapping.host_port,
                "HostPortEnd": mapping.host_port_end,
            }
            for mapping in options.port_map
        ],
        MAC: options.mac_address and base64.b64encode(options.mac_address.packed).decode(),
        NO_PROXY: options.no_proxy_6to4,
    }
    return {key: typed.get(key, value) for key, value in options.items()}


class Notes(list[tuple[str, dict[str, Any]]]):
    """The calls to the drivers: method and request."""

    def network(self, method: str, network: Network[Any], endpoint: Endpoint | None = None, **more: Any) -> None:
        ids = {"NetworkID": network.id, **({"EndpointID": endpoint.id} if endpoint else {})}
        self.append((f"NetworkDriver.{method}", {**ids, **more}))

    def ipam(self, method: str, **request: Any) -> None:
        self.append((f"IpamDriver.{method}", request))


class Options(DriverOptions, forbid_unknown_fields=False):
    """The recorded networks have options of all kinds."""


class RecordedNetworks(NetworkDriver[Options]):
    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def create_network(self, network: Network[Options]) -> None:
        options = {
            IPV4: network.raw_options.enable_ipv4,
            "com.docker.network.enable_ipv6": network.raw_options.enable_ipv6,
            GENERIC: network.raw_options.generic,
            **({"com.docker.network.internal": True} if network.internal else {}),
        }
        pools: dict[int, list[Any]] = {4: [], 6: []}
        for data in network.ipam:
            pools[data.pool.version].append(pool_words(data))
        self.notes.network("CreateNetwork", network, Options=options, IPv4Data=pools[4], IPv6Data=pools[6])

    def delete_network(self, network: Network[Options]) -> None:
        self.notes.network("DeleteNetwork", network)

    def create_endpoint(self, network: Network[Options], endpoint: Endpoint) -> None:
        asked = endpoint.requested
        interface = {
            "Address": str(asked.address or ""),
            "AddressIPv6": str(asked.address_ipv6 or ""),
            "MacAddress": asked.mac_address or "",
        }
        options = option_words(endpoint.options)
        self.notes.network("CreateEndpoint", network, endpoint, Interface=interface, Options=options)

    def delete_endpoint(self, network: Network[Options], endpoint: Endpoint) -> None:
        self.notes.network("DeleteEndpoint", network, endpoint)

    def join(self, network: Network[Options], endpoint: Endpoint, sandbox: Sandbox) -> Join:
        options = option_words(sandbox.options)
        self.notes.network("Join", network, endpoint, SandboxKey=sandbox.key, Options=options)
        return Join(f"rc{endpoint.id[:8]}", gateways=network.gateways)

    def leave(self, network: Network[Options], endpoint: Endpoint) -> None:
        self.notes.network("Leave", network, endpoint)

    def endpoint_oper_info(self, network: Network[Options], endpoint: Endpoint) -> Mapping[str, Any]:
        self.notes.network("EndpointOperInfo", network, endpoint)
        return {}

    def program_external_connectivity(
        self, network: Network[Options], endpoint: Endpoint, options: EndpointOptions
    ) -> None:
        self.notes.network("ProgramExternalConnectivity", network, endpoint, Options=option_words(options))

    def revoke_external_connectivity(self, network: Network[Options], endpoint: Endpoint) -> None:
        self.notes.network("RevokeExternalConnectivity", network, endpoint)


class Checking(RecordedNetworks):
    """As the recorded plugin, which every engine was told to ask about gateways; those before 28 do not."""

    def gw_alloc_check(self, options: Options, request: NetworkOptions) -> SkipGateway:
        self.notes.append(("NetworkDriver.GwAllocCheck", {}))
        return SkipGateway()


class RecordedAddresses(IpamDriver):
    """Pools and addresses in the order of the recorded plugin; like it, it forgets all when it is restarted."""

    requires_mac_address = True
    requires_request_replay = True
    local_address_space = "recl"
    global_address_space = "recg"

    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self.taken: dict[str, set[str]] = {}

    def request_pool(self, request: PoolRequest) -> Pool:
        self.notes.ipam(
            "RequestPool",
            AddressSpace=request.address_space,
            Pool=str(request.pool or ""),
            SubPool=str(request.sub_pool or ""),
            Options=request.options,
            V6=request.v6,
        )
        number = len(self.taken)
        chosen: IPNetwork = ip_network(f"fd77:{number}::/64" if request.v6 else f"10.77.{number}.0/24")
        pool = request.pool or chosen
        self.taken[str(pool)] = set()
        return Pool(str(pool), pool)

    def release_pool(self, pool_id: str) -> None:
        self.notes.ipam("ReleasePool", PoolID=pool_id)
        self.taken.pop(pool_id, None)

    def request_address(self, request: AddressRequest) -> IPInterface:
        options = dict(request.options)
        if request.is_gateway:
            options["RequestAddressType"] = "com.docker.network.gateway"
        if request.mac_address is not None:
            options[MAC] = request.mac_address
        self.notes.ipam(
            "RequestAddress", PoolID=request.pool_id, Address=str(request.address or ""), Options=options or None
        )
        pool, taken = ip_network(request.pool_id), self.taken[request.pool_id]
        address = request.address or next(pool[i] for i in range(1, 100) if str(pool[i]) not in taken)
        taken.add(str(address))
        return ip_interface(f"{address}/{pool.prefixlen}")

    def release_address(self, address: AddressRef) -> None:
        self.notes.ipam("ReleaseAddress", PoolID=address.pool_id, Address=str(address.address))
        self.taken.get(address.pool_id, set()).discard(str(address.address))


# -------------------------------------------------------------------------------------------------------- what is right


def lines(recording: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{recording}.jsonl").read_text().splitlines()]


def right_answer(line: dict[str, Any], internal: set[str]) -> Any:
    """The recorded answer, with what the SDK adds to it or leaves out of it."""
    answer = line["response"]
    if line["status"] != 200:
        return {"Err": answer["Err"], "Error": answer["Err"]}
    if line["method"] != "NetworkDriver.Join":
        return answer
    if line["request"]["NetworkID"] in internal:
        gateway, gateway_ipv6 = None, None  # the recorded plugin gave one, and the container a way out
    else:
        gateway, gateway_ipv6 = answer["Gateway"] or None, answer["GatewayIPv6"] or None
    return {
        "InterfaceName": answer["InterfaceName"],
        "Gateway": gateway,
        "GatewayIPv6": gateway_ipv6,
        "StaticRoutes": [],
        "DisableGatewayService": gateway is gateway_ipv6 is None,
    }


def right_notes(asked: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arguments that the drivers must get for these requests."""
    programmed: set[str] = set()
    for line in asked:
        method, request = line["method"], line["request"]
        match method.partition(".")[2]:
            case "Activate" | "GetCapabilities" | "GetDefaultAddressSpaces":
                continue
            case "GwAllocCheck":
                yield method, {}
                continue
            case "CreateNetwork":
                # engines before 28 do not say it
                request = {**request, "Options": {IPV4: True, **request["Options"]}}
            case "ProgramExternalConnectivity":
                programmed.add(request["EndpointID"])
            case "RevokeExternalConnectivity":
                if request["EndpointID"] not in programmed:
                    continue
        yield method, request


@pytest.mark.parametrize("recording", REQUESTS)
def test_a_recorded_conversation(recording: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    notes = Notes()
    answers: list[tuple[str, int, Any]] = []
    right: list[tuple[str, int, Any]] = []
    asked: list[dict[str, Any]] = []
    internal: set[str] = set()

    def start() -> Plugin:
        networks = Checking(notes)
        drivers = (networks, RecordedAddresses(notes)) if recording.endswith("-ipam") else (networks,)
        before = len(notes)
        plugin = Plugin(*drivers, state=tmp_path)
        del notes[before:]  # from the plugin's restore
        return plugin

    plugin = start()
    for line in lines(recording):
        if (mark := line.get("mark")) is not None:
            if mark in RESTARTS:
                plugin.close()
                plugin = start()
            continue
        asked.append(line)
        assert line["raw_empty"] == (line["request"] is None)
        if (
            line["method"] == "NetworkDriver.CreateNetwork"
            and "com.docker.network.internal" in line["request"]["Options"]
        ):
            internal.add(line["request"]["NetworkID"])
        body = b"" if line["raw_empty"] else json.dumps(line["request"]).encode()
        answer = plugin.handle(f"/{line['method']}", body)
        plugin.log(answer)
        answers.append((line["method"], answer.status, json.loads(answer.body)))
        right.append((line["method"], line["status"], right_answer(line, internal)))
    plugin.close()

    assert len(answers) == REQUESTS[recording]
    assert answers == right
    assert notes == list(right_notes(asked))
    assert len([record for record in caplog.records if record.name == "netplugin_sdk.core.calls"]) == len(asked)
    # Nothing was unknown, done twice or left over.
    failed = [line["method"] for line in asked if line["status"] != 200]
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.name for record in warned] == ["netplugin_sdk", "netplugin_sdk.core.calls"] * len(failed)
    with sqlite3.connect(tmp_path / "state.db") as db:
        assert db.execute("SELECT id FROM networks UNION ALL SELECT id FROM endpoints").fetchall() == []
    db.close()


def test_every_recording_is_replayed() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(REQUESTS)
    assert sum(REQUESTS.values()) == 376


def test_every_request_of_every_recording_repeated_at_once_changes_nothing(tmp_path: Path) -> None:
    """At-least-once delivery: each answer is lost, and each request comes again."""
    for recording in REQUESTS:
        answers: list[list[Any]] = []
        for times in (1, 2):
            notes, given = Notes(), []
            with Plugin(Checking(notes), state=tmp_path / f"{recording}-{times}") as plugin:
                for line in lines(recording):
                    if "mark" in line or line["method"].startswith(("IpamDriver", "Plugin")):
                        continue
                    body = b"" if line["raw_empty"] else json.dumps(line["request"]).encode()
                    said = [plugin.handle(f"/{line['method']}", body)[:2] for _ in range(times)]
                    assert len(set(said)) == 1
                    given.append(said[0])
            asking = ("NetworkDriver.EndpointOperInfo", "NetworkDriver.GwAllocCheck")
            answers.append([given, [note for note in notes if note[0] not in asking]])
        assert answers[0] == answers[1]
