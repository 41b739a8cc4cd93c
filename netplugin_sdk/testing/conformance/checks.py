"""What an engine relies on, check by check."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

from netplugin_sdk.errors import DriverError
from netplugin_sdk.linux import links
from netplugin_sdk.protocol import messages
from netplugin_sdk.testing.conformance.session import Failed, Group, Made, Session, check, expect

# What checks need beside the plugin: others that it has passed, so that what is reported is the cause.
_DRIVER = ("NetworkDriver",)
_NETWORK = (*_DRIVER, "network")
_ENDPOINT = (*_NETWORK, "create-endpoint-answer")
_JOIN = (*_ENDPOINT, "join-answer")
_DAY = (*_JOIN, "a-day")
_LINK = (*_DAY, "capabilities", "data plane")
_IPAM = ("IpamDriver",)
_POOL = (*_IPAM, "ipam-spaces", "ipam-pool")
_ADDRESS = (*_POOL, "ipam-addresses")
_CLIENT = "moby pkg/plugins/client.go"
_REMOTE = "moby daemon/libnetwork/drivers/remote/driver.go"
_IPAMS = "moby daemon/libnetwork/ipams/remote/remote.go"
_KINDS = {"NetworkDriver", "IpamDriver", "VolumeDriver", "authz", "LogDriver", "MetricsCollector", "graphdriver"}
_UNKNOWN = "f" * 64

# ----------------------------------------------------------------------------------------------------------- protocol


@check(
    "activate",
    Group.PROTOCOL,
    needs=(),
    source="moby pkg/plugins/plugins.go",
    hint='Answer POST /Plugin.Activate, which has no body, with {"Implements": ["NetworkDriver"]}.',
)
def _(session: Session) -> None:
    """The plugin says which kinds of driver it is."""
    answer = session.post("/Plugin.Activate", b"")
    expect(answer.status == 200, f"status {answer.status}")
    implements = answer.content.get("Implements")
    expect(isinstance(implements, list) and implements, f"Implements is {implements!r}, and must be a list of kinds")
    unknown = [kind for kind in implements or () if kind not in _KINDS]
    expect(not unknown, f"Implements has {unknown}, which no engine knows")


@check(
    "capabilities",
    Group.PROTOCOL,
    needs=_DRIVER,
    source=_REMOTE,
    hint='Answer GetCapabilities with {"Scope": "local"} or "global"; an engine refuses the driver otherwise.',
)
def _(session: Session) -> None:
    """The driver says whether its networks are of this host or of the swarm."""
    content = session.post("/NetworkDriver.GetCapabilities", b"").content
    expect(content.get("Scope") in ("local", "global"), f"Scope is {content.get('Scope')!r}: local or global")
    connectivity = content.get("ConnectivityScope") or "local"
    expect(connectivity in ("local", "global"), f"ConnectivityScope is {connectivity!r}: local, global or empty")


@check(
    "unknown-method",
    Group.PROTOCOL,
    needs=_DRIVER,
    source=f"{_CLIENT} (IsNotFound)",
    hint='Answer 404 to a method that the plugin does not have: engines take only that for "not supported".',
)
def _(session: Session) -> None:
    """A method that the plugin does not have is a 404, as optional methods may be."""
    answer = session.ask("NetworkDriver.MethodOfTheFuture", NetworkID=_UNKNOWN)
    expect(answer.status == 404, f"status {answer.status}, not 404")


@check(
    "keep-alive",
    Group.PROTOCOL,
    needs=_DRIVER,
    source="Go net/http Transport: two idle connections are kept",
    hint='Serve HTTP/1.1 and leave the connection open after an answer, or say "Connection: close".',
)
def _(session: Session) -> None:
    """A connection that is not said to be closed serves the next request."""
    try:
        with session.connection() as connection:
            for _ in range(3):
                answer = session.exchange(connection, "/NetworkDriver.GetCapabilities", b"")
                expect(answer.status == 200, f"status {answer.status}")
                if connection.sock is None:
                    return  # it was said: "Connection: close", or HTTP/1.0
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"the second request on a connection gets no answer: {error or type(error).__name__}") from error


@check(
    "host-header",
    Group.PROTOCOL,
    needs=_DRIVER,
    source="moby pkg/plugins/client.go: the Host is plugin.moby.localhost, or empty (20.10)",
    hint="Do not reject requests by their Host header.",
)
def _(session: Session) -> None:
    """An empty Host header is served, as engines before 23 send it."""
    answer = session.post("/NetworkDriver.GetCapabilities", b"", headers={"Host": ""})
    expect(answer.status == 200, f"status {answer.status}")


@check(
    "many-connections",
    Group.PROTOCOL,
    needs=_DRIVER,
    source=f"{_CLIENT}: a connection that is refused is tried again a second later",
    hint="Listen with a backlog of some hundreds, and accept fast: each connection that is refused costs a second.",
)
def _(session: Session) -> None:
    """A hundred connections at the same time are all accepted."""

    def one(_: int) -> int:
        return session.post("/NetworkDriver.GetCapabilities", b"").status

    with ThreadPoolExecutor(100) as callers:
        wrong = [status for status in callers.map(one, range(100)) if status != 200]
    expect(not wrong, f"{len(wrong)} of 100 get an error: {wrong[:3]}")


# ---------------------------------------------------------------------------------------------------------- lifecycle


@check(
    "network",
    Group.LIFECYCLE,
    needs=_DRIVER,
    source=_REMOTE,
    hint="See the error: it is what `docker network create` would show.",
)
def _(session: Session) -> None:
    """A network is created and deleted."""
    network = session.network()
    session.call("DeleteNetwork", NetworkID=network.id)


@check(
    "create-endpoint-answer",
    Group.LIFECYCLE,
    needs=_NETWORK,
    source=f"{_REMOTE}: CreateEndpoint, SetIPAddress, SetMacAddress",
    hint='Answer {"Interface": {}}, with only what the request left empty: engines refuse more.',
)
def _(session: Session) -> None:
    """The answer to CreateEndpoint holds no address that the request held."""
    network = session.network()
    endpoint = session.new_endpoint(network)
    endpoint.request["Interface"]["MacAddress"] = "02:42:0a:d5:00:07"
    answer = session.call("CreateEndpoint", **endpoint.request)
    interface = answer.get("Interface") or {}
    for name, value in endpoint.request["Interface"].items():
        expect(
            not (value and interface.get(name)),
            f"the request has {name} {value}, and the answer {interface.get(name)!r}",
        )
    for name in ("Address", "AddressIPv6"):
        if interface.get(name):
            _parsed(ip_interface, interface[name], f"Interface.{name}")


@check(
    "join-answer",
    Group.LIFECYCLE,
    needs=_ENDPOINT,
    source=f"{_REMOTE}: Join, parseStaticRoutes",
    hint="InterfaceName.SrcName is the link that the engine moves, DstPrefix its name inside without a number.",
)
def _(session: Session) -> None:
    """The answer to Join names a link, and gateways and routes that can be read."""
    answer = session.join(session.endpoint(session.network()))
    names = answer.get("InterfaceName") or {}
    if source := names.get("SrcName"):
        expect(len(source.encode()) < 16, f"SrcName {source!r} is longer than the kernel's 15 bytes")
        prefix = str(names.get("DstPrefix") or "")
        expect(prefix, "there is no DstPrefix beside SrcName")
        expect(not re.search(r"\d$", prefix), f"DstPrefix {prefix!r} ends with a number, and gets another")
    for name in ("Gateway", "GatewayIPv6"):
        if answer.get(name):
            _parsed(ip_address, answer[name], name)
    for route in answer.get("StaticRoutes") or ():
        _parsed(ip_network, route.get("Destination"), "the Destination of a static route")
        expect(
            route.get("RouteType") in (0, 1), f"RouteType {route.get('RouteType')!r} is neither 0, a next hop, nor 1"
        )
        if route["RouteType"] == 0:
            _parsed(ip_address, route.get("NextHop"), "the NextHop of a static route")


@check(
    "operational-info",
    Group.LIFECYCLE,
    needs=_JOIN,
    source="moby daemon/libnetwork/endpoint_info.go: DriverInfo, at each docker inspect",
    hint='Answer EndpointOperInfo with {"Value": {}}.',
)
def _(session: Session) -> None:
    """What the driver knows of an endpoint can be asked for."""
    endpoint = session.endpoint(session.network())
    session.join(endpoint)
    value = session.call("EndpointOperInfo", **endpoint.ids).get("Value")
    expect(value is None or isinstance(value, dict), f"Value is {value!r}, and must be an object")


@check(
    "a-day",
    Group.LIFECYCLE,
    needs=_JOIN,
    source="moby daemon/libnetwork/endpoint.go: sbJoin, sbLeave, Delete",
    hint="Two containers come and go, and the first comes back under a new endpoint id.",
)
def _(session: Session) -> None:
    """Endpoints join, leave and are deleted, and new ones take their places."""
    network = session.network()
    first, second = session.endpoint(network), session.endpoint(network)
    for endpoint in (first, second):
        session.join(endpoint)
    _end(session, first)
    again = session.new_endpoint(network)
    again.request["Interface"]["Address"] = first.request["Interface"]["Address"]
    session.call("CreateEndpoint", **again.request)
    session.join(again)
    for endpoint in (second, again):
        _end(session, endpoint)
    session.call("DeleteNetwork", NetworkID=network.id)


@check(
    "external-connectivity",
    Group.LIFECYCLE,
    needs=_JOIN,
    source=f"{_REMOTE}: ProgramExternalConnectivity, RevokeExternalConnectivity",
    hint="Both methods may be a 404; RevokeExternalConnectivity also comes for what was never programmed.",
)
def _(session: Session) -> None:
    """Published ports are programmed and revoked, or both methods are not there."""
    endpoint = session.endpoint(session.network())
    session.join(endpoint)
    revoking = session.ask("RevokeExternalConnectivity", **endpoint.ids)
    programming = session.ask("ProgramExternalConnectivity", **endpoint.ids, Options=endpoint.request["Options"])
    expect(
        (revoking.status == 404) == (programming.status == 404),
        "only one of ProgramExternalConnectivity and RevokeExternalConnectivity is there",
    )
    if programming.status != 404:
        expect(not revoking.error, f"revoking what was never programmed: {revoking.error}")
        expect(not programming.error, f"programming: {programming.error}")
        session.call("RevokeExternalConnectivity", **endpoint.ids)


@check(
    "internal-network",
    Group.LIFECYCLE,
    needs=_JOIN,
    source="docs.docker.com: docker network create --internal",
    hint='An internal network has Options["com.docker.network.internal"], and its containers no gateway.',
)
def _(session: Session) -> None:
    """A container on an internal network gets no default gateway."""
    answer = session.join(session.endpoint(session.network(internal=True)))
    gateways = [answer[name] for name in ("Gateway", "GatewayIPv6") if answer.get(name)]
    expect(not gateways, f"the answer to Join names the gateway {', '.join(gateways)}")


# ------------------------------------------------------------------------------------------------------ at least once

_RETRY = f"{_CLIENT}: a request whose answer is lost is sent again, for 30 s"


def _twice(session: Session, method: str, request: dict[str, Any]) -> None:
    """The second is answered as the first."""
    first = session.call(method, **request)
    again = session.ask(method, **request)
    expect(not again.error, f"the same {method} once more: {again.error}")
    expect(
        _same(again.content, first), f"the same {method} once more is answered otherwise: {first}, then {again.content}"
    )


@check(
    "create-network-twice",
    Group.AT_LEAST_ONCE,
    needs=_NETWORK,
    source=_RETRY,
    hint="A network that is there already is a success.",
)
def _(session: Session) -> None:
    """A CreateNetwork that is repeated succeeds."""
    _twice(session, "CreateNetwork", session.new_network().request)


@check(
    "create-endpoint-twice",
    Group.AT_LEAST_ONCE,
    needs=_ENDPOINT,
    source=_RETRY,
    hint="Answer a known endpoint with what it got.",
)
def _(session: Session) -> None:
    """A CreateEndpoint that is repeated gets the same answer."""
    _twice(session, "CreateEndpoint", session.new_endpoint(session.network()).request)


@check("join-twice", Group.AT_LEAST_ONCE, needs=_JOIN, source=_RETRY, hint="Answer a known join with the same link.")
def _(session: Session) -> None:
    """A Join that is repeated gets the same answer."""
    endpoint = session.endpoint(session.network())
    _twice(session, "Join", endpoint.joining)
    session.ask("Leave", **endpoint.ids)


@check("leave-twice", Group.AT_LEAST_ONCE, needs=_DAY, source=_RETRY, hint="To leave what has left is a success.")
def _(session: Session) -> None:
    """A Leave that is repeated succeeds."""
    endpoint = session.endpoint(session.network())
    session.join(endpoint)
    _twice(session, "Leave", endpoint.ids)


@check(
    "delete-endpoint-twice", Group.AT_LEAST_ONCE, needs=_DAY, source=_RETRY, hint="To delete what is gone is a success."
)
def _(session: Session) -> None:
    """A DeleteEndpoint that is repeated succeeds."""
    _twice(session, "DeleteEndpoint", session.endpoint(session.network()).ids)


@check(
    "delete-network-twice",
    Group.AT_LEAST_ONCE,
    needs=_NETWORK,
    source=_RETRY,
    hint="To delete what is gone is a success.",
)
def _(session: Session) -> None:
    """A DeleteNetwork that is repeated succeeds."""
    _twice(session, "DeleteNetwork", {"NetworkID": session.network().id})


@check(
    "empty-retry",
    Group.AT_LEAST_ONCE,
    needs=_NETWORK,
    source=f"{_CLIENT}: callWithRetry sends a buffer that is drained",
    hint="A retry can come with an empty body. It says nothing: answer an error, and do nothing.",
)
def _(session: Session) -> None:
    """A request that has lost its body is refused."""
    for method in ("CreateNetwork", "CreateEndpoint", "Join"):
        answer = session.post(f"/NetworkDriver.{method}", b"")
        expect(answer.error, f"{method} without a body succeeds")


# ------------------------------------------------------------------------------------------------------------- errors


@check(
    "unknown-network",
    Group.ERRORS,
    needs=_ENDPOINT,
    source=_REMOTE,
    hint="Refuse what is about a network that was never created.",
)
def _(session: Session) -> None:
    """An endpoint of a network that is unknown is refused."""
    session.refused("CreateEndpoint", **session.new_endpoint(Made(_UNKNOWN, session.network().subnet)).request)


@check("unknown-endpoint", Group.ERRORS, needs=_JOIN, source=_REMOTE, hint="Refuse to join what was never created.")
def _(session: Session) -> None:
    """To join an endpoint that is unknown is refused."""
    session.refused("Join", **session.new_endpoint(session.network()).joining)


@check(
    "malformed",
    Group.ERRORS,
    needs=_NETWORK,
    source=f"{_CLIENT}: the engine shows the field Err of an answer that is not 200",
    hint='Answer what is no JSON object with an error: {"Err": "…"}.',
)
def _(session: Session) -> None:
    """What is no JSON object is refused."""
    for body in (b"{", b"[]", b"\xff"):
        answer = session.post("/NetworkDriver.CreateNetwork", body)
        expect(answer.error, f"{body!r} succeeds as CreateNetwork")


@check(
    "readable-error",
    Group.ERRORS,
    needs=(*_JOIN, "unknown-endpoint"),
    source=f"{_CLIENT}: what is not in Err is shown as the whole body",
    hint='Answer {"Err": "one line that says what is wrong"}: users see it behind "Error response from daemon:".',
)
def _(session: Session) -> None:
    """An error is one line of text in the field Err."""
    request = session.new_endpoint(session.network()).joining
    answer = session.ask("Join", **request)
    said = answer.content.get("Err") if answer.error else "an unknown endpoint is joined"
    if not answer.error:
        return  # another check says so
    expect(isinstance(said, str) and said, f"there is no Err in {answer.body[:200]!r}")
    expect("\n" not in str(said).strip() and "<html" not in str(said).lower(), f"Err is no line of text: {said!r}")


@check(
    "alive-after-errors",
    Group.ERRORS,
    needs=_NETWORK,
    source="an engine goes on with a plugin whatever it refused",
    hint="An error in one request must not end the process, nor leave a lock held.",
)
def _(session: Session) -> None:
    """After all kinds of errors networks are created as before."""
    for body in (b"{", b"", b'{"NetworkID": null}', b"[" * 10000):
        with suppress(Failed):
            session.post("/NetworkDriver.CreateNetwork", body)
            session.post("/NetworkDriver.Join", body)
    network = session.network()
    session.call("DeleteNetwork", NetworkID=network.id)


# ------------------------------------------------------------------------------------------------------------ restart

_NEVER = "moby daemon/libnetwork/controller.go: an engine never sends CreateNetwork again"


@check(
    "network-survives",
    Group.RESTART,
    needs=(*_JOIN, "restart"),
    source=_NEVER,
    hint="Keep networks on disk, before the answer.",
)
def _(session: Session) -> None:
    """A network is known after the plugin was killed and started again."""
    network = session.network()
    session.restart()
    session.join(session.endpoint(network))


@check(
    "endpoint-survives",
    Group.RESTART,
    needs=(*_DAY, "restart", "network-survives"),
    source=_NEVER,
    hint="Keep endpoints on disk, before the answer.",
)
def _(session: Session) -> None:
    """An endpoint is known after the plugin was killed and started again, and can be joined, left and deleted."""
    network = session.network()
    created, joined = session.endpoint(network), session.endpoint(network)
    session.join(joined)
    session.restart()
    session.join(created)
    for endpoint in (created, joined):
        session.call("EndpointOperInfo", **endpoint.ids)
        _end(session, endpoint)
    session.call("DeleteNetwork", NetworkID=network.id)


# -------------------------------------------------------------------------------------------------------- concurrency


@check(
    "networks-at-once",
    Group.CONCURRENCY,
    needs=_DAY,
    source="an engine calls from as many goroutines as it has requests",
    hint="Look for state that requests share without a lock.",
)
def _(session: Session) -> None:
    """Ten networks with an endpoint each come and go at the same time."""

    def life(_: int) -> None:
        network = session.network()
        endpoint = session.endpoint(network)
        session.join(endpoint)
        _end(session, endpoint)
        session.call("DeleteNetwork", NetworkID=network.id)

    _at_once(life, 10)


@check(
    "endpoints-at-once",
    Group.CONCURRENCY,
    needs=_DAY,
    source="docker compose up: containers of one network start side by side",
    hint="Look for state of a network that requests share without a lock.",
)
def _(session: Session) -> None:
    """Ten endpoints of one network come and go at the same time."""
    network = session.network()

    def life(_: int) -> str:
        endpoint = session.endpoint(network)
        name = (session.join(endpoint).get("InterfaceName") or {}).get("SrcName") or endpoint.id
        _end(session, endpoint)
        return str(name)

    names = _at_once(life, 10)
    expect(len(set(names)) == len(names), f"two joins name the same link: {sorted(names)}")


# --------------------------------------------------------------------------------------------------------------- IPAM


@check(
    "ipam-spaces",
    Group.IPAM,
    needs=_IPAM,
    source=_IPAMS,
    hint="Answer GetDefaultAddressSpaces with the names of two address spaces, and GetCapabilities with two booleans.",
)
def _(session: Session) -> None:
    """The IPAM driver names its address spaces, and says what it wants."""
    for name, value in session.post("/IpamDriver.GetCapabilities", b"").content.items():
        if name.startswith("Requires"):
            expect(isinstance(value, bool), f"{name} is {value!r}: true or false")
    expect(_space(session), "LocalDefaultAddressSpace is empty")


@check(
    "ipam-pool",
    Group.IPAM,
    needs=(*_IPAM, "ipam-spaces"),
    source=_IPAMS,
    hint="A pool is asked for with Pool in CIDR form, or empty.",
)
def _(session: Session) -> None:
    """A pool that is asked for is given, and taken back, and can be had again."""
    for _ in range(2):
        pool = _pool(session, "10.214.1.0/24")
        expect(_parsed(ip_network, pool["Pool"], "Pool") == ip_network("10.214.1.0/24"), f"Pool is {pool['Pool']}")
        session.call("IpamDriver.ReleasePool", PoolID=pool["PoolID"])


@check(
    "ipam-pools-differ",
    Group.IPAM,
    needs=_POOL,
    source="moby daemon/libnetwork/network.go: a pool that overlaps is held, another asked for",
    hint="Never give out the same pool of your own choice twice, or an engine asks for ever.",
)
def _(session: Session) -> None:
    """Two pools of the driver's choice do not overlap."""
    first, second = (ip_network(_pool(session, "")["Pool"]) for _ in range(2))
    expect(not first.overlaps(second), f"{first} and {second} overlap")


@check(
    "ipam-addresses",
    Group.IPAM,
    needs=_POOL,
    source=_IPAMS,
    hint="Give each address once, with the pool's prefix length.",
)
def _(session: Session) -> None:
    """Twenty addresses of a pool are different, in it, and neither its first nor its last."""
    pool = _pool(session, "10.214.2.0/24")
    network = ip_network(pool["Pool"])
    addresses = [_address(session, pool, mac=f"02:42:00:00:00:{n:02x}") for n in range(20)]
    expect(len(set(addresses)) == 20, f"one is given twice: {sorted(map(str, addresses))}")
    for address in addresses:
        expect(address.ip in network, f"{address} is not in {network}")
        expect(address.network.prefixlen == network.prefixlen, f"{address} has not the prefix length of {network}")
        expect(address.ip not in (network[0], network[-1]), f"{address} is the network's own or its broadcast address")


@check(
    "ipam-wanted-address",
    Group.IPAM,
    needs=_ADDRESS,
    source=_IPAMS,
    hint="Address is the address that a user wants (--ip).",
)
def _(session: Session) -> None:
    """An address that is asked for is given, once, and can be had again when it is taken back."""
    pool = _pool(session, "10.214.3.0/24")
    wanted = "10.214.3.77"
    given = _address(session, pool, address=wanted, mac="02:42:00:00:00:01")
    expect(str(given.ip) == wanted, f"{given} is given for {wanted}")
    session.refused(
        "IpamDriver.RequestAddress", PoolID=pool["PoolID"], Address=wanted, Options=_mac("02:42:00:00:00:02")
    )
    session.call("IpamDriver.ReleaseAddress", PoolID=pool["PoolID"], Address=wanted)
    _address(session, pool, address=wanted, mac="02:42:00:00:00:03")


@check(
    "ipam-gateway",
    Group.IPAM,
    needs=_ADDRESS,
    source="moby daemon/libnetwork/network.go: RequestAddressType com.docker.network.gateway",
    hint="The gateway is asked for as an address, with Options RequestAddressType; Options may be null for others.",
)
def _(session: Session) -> None:
    """The gateway's address is given to nobody else, and an address is given where Options is null."""
    pool = _pool(session, "10.214.4.0/29")
    asked = {"PoolID": pool["PoolID"], "Address": ""}
    gateway = session.call("IpamDriver.RequestAddress", **asked, Options=messages.GATEWAY)["Address"]
    others = [_address(session, pool, mac=f"02:42:00:00:00:{n:02x}") for n in range(4)]
    expect(ip_interface(gateway) not in others, f"the gateway's {gateway} is given out again")
    session.call("IpamDriver.RequestAddress", **asked, Options=None)


@check(
    "ipam-exhausted",
    Group.IPAM,
    needs=_ADDRESS,
    source=f"{_IPAMS}: the field Error of an answer with status 200",
    hint='An IPAM driver\'s error is the field "Error", or any status but 200; "Err" with 200 is taken for success.',
)
def _(session: Session) -> None:
    """A pool without addresses is an error that the engine sees."""
    pool = _pool(session, "10.214.5.0/30")
    for n in range(6):
        options = _mac(f"02:42:00:00:00:{n:02x}")
        answer = session.ask("IpamDriver.RequestAddress", PoolID=pool["PoolID"], Address="", Options=options)
        content = answer.content if answer.status == 200 else {}
        if answer.status != 200 or content.get("Error"):
            return
        expect(content.get("Address"), f"neither an Address nor an Error: {content}")
    raise Failed("a /30 has two addresses, and six are given out")


# --------------------------------------------------------------------------------------------------------- data plane

_OSL = "moby daemon/libnetwork/osl/interface_linux.go"


@check(
    "link",
    Group.DATA_PLANE,
    needs=_LINK,
    source=_OSL,
    hint="The link that Join names must be in the plugin's network namespace when it is answered.",
)
def _(session: Session) -> None:
    """The link that Join names is there to be moved into a sandbox, and has its address inside."""
    with session.controller() as controller:
        lan = _lan(session, controller)
        box = controller.create_sandbox("one")
        endpoint = _connected(box, lan)
        expect(endpoint.interface, "Join names no link")
        shown = box.run("ip", "-brief", "-4", "address", "show", endpoint.interface)
        expect(str(endpoint.addresses[4]) in shown, f"{endpoint.addresses[4]} is not on {endpoint.interface}: {shown}")


@check(
    "reach",
    Group.DATA_PLANE,
    needs=(*_LINK, "link"),
    source="docs.docker.com: containers on a network reach each other",
    hint="Look at the links' state, their bridge, and what the firewall drops.",
)
def _(session: Session) -> None:
    """Two sandboxes on a network reach each other, both ways."""
    with session.controller() as controller:
        lan = _lan(session, controller)
        one, two = (controller.create_sandbox(name) for name in ("one", "two"))
        addresses = [_connected(box, lan).addresses[4].ip for box in (one, two)]
        for box, target in ((one, addresses[1]), (two, addresses[0])):
            expect(_reaches(box, target), f"{box.name} does not reach {target}")


@check(
    "gateway",
    Group.DATA_PLANE,
    needs=(*_LINK, "link"),
    source=_OSL,
    hint="If Join names a gateway, it must answer on the network.",
)
def _(session: Session) -> None:
    """The gateway that Join names answers."""
    with session.controller() as controller:
        lan = _lan(session, controller)
        box = controller.create_sandbox("one")
        endpoint = _connected(box, lan)
        if 4 in endpoint.gateways:
            expect(_reaches(box, endpoint.gateways[4]), f"the gateway {endpoint.gateways[4]} does not answer")


@check(
    "come-back",
    Group.DATA_PLANE,
    needs=(*_LINK, "link", "reach"),
    source="docker restart: a new endpoint with the old address",
    hint="Neighbours must not keep what belonged to the link that is gone.",
)
def _(session: Session) -> None:
    """A sandbox that is left and joined again is reached at its old address."""
    with session.controller() as controller:
        lan = _lan(session, controller)
        one, two = (controller.create_sandbox(name) for name in ("one", "two"))
        target = _connected(one, lan).addresses[4].ip
        _connected(two, lan)
        expect(_reaches(two, target), f"{target} is not reached before")
        one.disconnect(lan)
        expect(not _reaches(two, target, within=1), f"{target} is reached though it has left")
        _connected(one, lan, address=target)
        expect(_reaches(two, target), f"{target} is not reached when it is back")


@check(
    "nothing-left",
    Group.DATA_PLANE,
    needs=(*_LINK, "link"),
    source="docker network rm: the host is as before",
    hint="Delete the links of an endpoint with it, and those of a network with it.",
)
def _(session: Session) -> None:
    """With their network all its links are gone."""
    before = links.names()
    with session.controller() as controller:
        lan = _lan(session, controller)
        for name in ("one", "two"):
            _connected(controller.create_sandbox(name), lan)
    until = time.monotonic() + 5
    while (left := links.names() - before) and time.monotonic() < until:
        time.sleep(0.05)
    expect(not left, f"left behind: {', '.join(sorted(left))}")


# -------------------------------------------------------------------------------------------------------------- helpers


def _parsed(parse: Callable[[str], Any], text: object, what: str) -> Any:
    try:
        return parse(str(text))
    except ValueError:
        raise Failed(f"{what} cannot be read: {text!r}") from None


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _end(session: Session, endpoint: Made) -> None:
    session.call("Leave", **endpoint.ids)
    session.call("DeleteEndpoint", **endpoint.ids)


def _at_once(life: Callable[[int], Any], number: int) -> list[Any]:
    with ThreadPoolExecutor(number) as users:
        return list(users.map(life, range(number)))


def _space(session: Session) -> str:
    spaces = session.post("/IpamDriver.GetDefaultAddressSpaces", b"").content
    return str(spaces.get("LocalDefaultAddressSpace") or "")


def _pool(session: Session, pool: str) -> dict[str, Any]:
    request = {"AddressSpace": _space(session), "Pool": pool, "SubPool": "", "Options": None, "V6": False}
    given = session.call("IpamDriver.RequestPool", **request)
    expect(given.get("PoolID"), f"there is no PoolID in {given}")
    session.later("IpamDriver.ReleasePool", PoolID=given["PoolID"])
    return given


def _mac(mac: str) -> dict[str, str]:
    return {messages.MAC_ADDRESS: mac}


def _address(session: Session, pool: dict[str, Any], *, mac: str, address: str = "") -> Any:
    request = {"PoolID": pool["PoolID"], "Address": address, "Options": _mac(mac)}
    given = session.call("IpamDriver.RequestAddress", **request).get("Address")
    found = _parsed(ip_interface, given, "Address")
    session.later("IpamDriver.ReleaseAddress", PoolID=pool["PoolID"], Address=str(found.ip))
    return found


def _lan(session: Session, controller: Any) -> Any:
    options = session.subject.options
    return controller.create_network("lan", "plugin", subnets=session.subnet(0), options=options)


def _connected(box: Any, lan: Any, address: Any = None) -> Any:
    try:
        return box.connect(lan, addresses=() if address is None else (address,))
    except DriverError as error:
        raise Failed(str(error)) from error


def _reaches(box: Any, target: object, within: int = 5) -> bool:
    """Whether one ping is answered in so many seconds: on a busy machine the kernel opens a bridge's port late."""
    try:
        box.run("ping", "-c1", f"-w{within}", str(target))
    except DriverError:
        return False
    return True
