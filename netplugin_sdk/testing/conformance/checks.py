"""The checks: what an engine relies on, one function each.

A check's id follows from its function's name, and its docstring says what it proves.
"""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

from netplugin_sdk.errors import DriverError
from netplugin_sdk.linux import links
from netplugin_sdk.protocol import messages
from netplugin_sdk.testing.conformance.model import Check, Failed, Group, Requirement
from netplugin_sdk.testing.conformance.session import Resource, Session, expect

CHECKS: dict[str, Check] = {}
"""All checks by id, in the order in which they run."""

NETWORK_DRIVER, IPAM_DRIVER = Requirement.NETWORK_DRIVER, Requirement.IPAM_DRIVER
RESTART, DATA_PLANE = Requirement.RESTART, Requirement.DATA_PLANE


def check(
    group: Group, *, requires: Sequence[Requirement] = (), after: Sequence[Check] = (), source: str, hint: str
) -> Callable[[Callable[[Session], None]], Check]:
    """Make a function a check, and add it to `CHECKS`.

    Args:
        group: its subject.
        requires: its own conditions, beside those of the checks in `after`.
        after: checks that must pass first.
        source: where Docker relies on it.
        hint: what to look at if it fails.
    """

    def register(function: Callable[[Session], None]) -> Check:
        earlier = dict.fromkeys(id_ for each in after for id_ in (*each.after, each.id))
        made = Check(
            id=function.__name__.replace("_", "-"),
            group=group,
            proves=" ".join((function.__doc__ or "").split()),
            source=source,
            hint=hint,
            function=function,
            requires=frozenset(requires).union(*(each.requires for each in after)),
            after=tuple(id_ for id_ in CHECKS if id_ in earlier),
        )
        CHECKS[made.id] = made
        return made

    return register


_CLIENT = "moby pkg/plugins/client.go"
_REMOTE = "moby daemon/libnetwork/drivers/remote/driver.go"
_IPAMS = "moby daemon/libnetwork/ipams/remote/remote.go"
_KINDS = {"NetworkDriver", "IpamDriver", "VolumeDriver", "authz", "LogDriver", "MetricsCollector", "graphdriver"}
_UNKNOWN = "f" * 64
_REACH_SECONDS = 5  # that a ping may take to be answered
_CLEANUP_SECONDS = 5.0  # that links may take to vanish after their network

# ----------------------------------------------------------------------------------------------------------- protocol


@check(
    Group.PROTOCOL,
    source="moby pkg/plugins/plugins.go",
    hint='Answer POST /Plugin.Activate, which has no body, with {"Implements": ["NetworkDriver"]}.',
)
def activate(session: Session) -> None:
    """The plugin says which kinds of driver it is."""
    answer = session.post("/Plugin.Activate", b"")
    expect(answer.status == 200, f"status {answer.status}, not 200")
    implements = answer.content.get("Implements")
    expect(
        isinstance(implements, list) and implements,
        f"Implements is {implements!r}, and must be a list of kinds of driver",
    )
    unknown = [kind for kind in implements or () if kind not in _KINDS]
    expect(not unknown, f"Implements has {unknown}, which no engine knows")


@check(
    Group.PROTOCOL,
    requires=(NETWORK_DRIVER,),
    source=_REMOTE,
    hint='Answer GetCapabilities with {"Scope": "local"} or "global"; an engine refuses the driver otherwise.',
)
def capabilities(session: Session) -> None:
    """The driver says whether its networks belong to this host or span the swarm."""
    content = session.post("/NetworkDriver.GetCapabilities", b"").content
    expect(content.get("Scope") in ("local", "global"), f"Scope is {content.get('Scope')!r}, not local or global")
    connectivity = content.get("ConnectivityScope") or "local"
    expect(connectivity in ("local", "global"), f"ConnectivityScope is {connectivity!r}, not local, global or empty")


@check(
    Group.PROTOCOL,
    requires=(NETWORK_DRIVER,),
    source=f"{_CLIENT} (IsNotFound)",
    hint='Answer 404 to a method that the plugin does not have: engines read only this status as "not supported".',
)
def unknown_method(session: Session) -> None:
    """The plugin answers 404 to a method that it does not have."""
    answer = session.ask("NetworkDriver.MethodOfTheFuture", NetworkID=_UNKNOWN)
    expect(answer.status == 404, f"status {answer.status}, not 404")


@check(
    Group.PROTOCOL,
    requires=(NETWORK_DRIVER,),
    source="Go net/http Transport: two idle connections are kept",
    hint='Serve HTTP/1.1 and leave the connection open after an answer, or say "Connection: close".',
)
def keep_alive(session: Session) -> None:
    """A connection serves the next request, unless the plugin announced that it closes."""
    try:
        with session.connection() as connection:
            for _ in range(3):
                answer = session.exchange(connection, "/NetworkDriver.GetCapabilities", b"")
                expect(answer.status == 200, f"status {answer.status}")
                if connection.sock is None:
                    return  # the plugin announced it: "Connection: close", or HTTP/1.0
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"the second request on a connection gets no answer: {error or type(error).__name__}") from error


@check(
    Group.PROTOCOL,
    requires=(NETWORK_DRIVER,),
    source="moby pkg/plugins/client.go: the Host is plugin.moby.localhost, or empty (20.10)",
    hint="Do not reject requests by their Host header.",
)
def empty_host_header(session: Session) -> None:
    """The plugin serves requests with an empty Host header, as engines before 23 send it."""
    answer = session.post("/NetworkDriver.GetCapabilities", b"", headers={"Host": ""})
    expect(answer.status == 200, f"status {answer.status}")


@check(
    Group.PROTOCOL,
    requires=(NETWORK_DRIVER,),
    source=f"{_CLIENT}: a refused connection is tried again a second later",
    hint="Listen with a backlog of some hundreds, and accept fast: each refused connection costs a second.",
)
def many_connections(session: Session) -> None:
    """The plugin accepts a hundred connections at the same time."""

    def one(_: int) -> int:
        return session.post("/NetworkDriver.GetCapabilities", b"").status

    with ThreadPoolExecutor(100) as callers:
        wrong = [status for status in callers.map(one, range(100)) if status != 200]
    expect(not wrong, f"{len(wrong)} of 100 requests get an error: {wrong[:3]}")


# ---------------------------------------------------------------------------------------------------------- lifecycle


@check(
    Group.LIFECYCLE,
    requires=(NETWORK_DRIVER,),
    source=_REMOTE,
    hint="Read the error: `docker network create` would show it.",
)
def network_lifecycle(session: Session) -> None:
    """A network can be created and deleted."""
    network = session.network()
    session.call("DeleteNetwork", NetworkID=network.id)


@check(
    Group.LIFECYCLE,
    after=(network_lifecycle,),
    source=f"{_REMOTE}: CreateEndpoint, SetIPAddress, SetMacAddress",
    hint='Answer {"Interface": {}}, with only the fields that the request left empty: engines refuse more.',
)
def create_endpoint_answer(session: Session) -> None:
    """The answer to CreateEndpoint has no address where the request had one."""
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
    Group.LIFECYCLE,
    after=(create_endpoint_answer,),
    source=f"{_REMOTE}: Join, parseStaticRoutes",
    hint="InterfaceName.SrcName is the link that the engine moves; DstPrefix is its name inside, without a number.",
)
def join_answer(session: Session) -> None:
    """The answer to Join names a link, with valid gateways and routes."""
    answer = session.join(session.endpoint(session.network()))
    names = answer.get("InterfaceName") or {}
    if source := names.get("SrcName"):
        expect(len(source.encode()) < 16, f"SrcName {source!r} is longer than the kernel's 15 bytes")
        prefix = str(names.get("DstPrefix") or "")
        expect(prefix, "SrcName is given without DstPrefix")
        expect(
            not re.search(r"\d$", prefix), f"DstPrefix {prefix!r} ends with a digit, and the engine appends a number"
        )
    for name in ("Gateway", "GatewayIPv6"):
        if answer.get(name):
            _parsed(ip_address, answer[name], name)
    for route in answer.get("StaticRoutes") or ():
        _parsed(ip_network, route.get("Destination"), "the Destination of a static route")
        expect(
            route.get("RouteType") in (0, 1),
            f"RouteType {route.get('RouteType')!r} is neither 0 (next hop) nor 1 (connected)",
        )
        if route["RouteType"] == 0:
            _parsed(ip_address, route.get("NextHop"), "the NextHop of a static route")


@check(
    Group.LIFECYCLE,
    after=(join_answer,),
    source="moby daemon/libnetwork/endpoint_info.go: DriverInfo, at each docker inspect",
    hint='Answer EndpointOperInfo with {"Value": {}}.',
)
def operational_info(session: Session) -> None:
    """EndpointOperInfo is answered for a joined endpoint."""
    endpoint = session.endpoint(session.network())
    session.join(endpoint)
    value = session.call("EndpointOperInfo", **endpoint.ids).get("Value")
    expect(value is None or isinstance(value, dict), f"Value is {value!r}, and must be an object")


@check(
    Group.LIFECYCLE,
    after=(join_answer,),
    source="moby daemon/libnetwork/endpoint.go: sbJoin, sbLeave, Delete",
    hint="Two containers come and go, and the first comes back under a new endpoint id.",
)
def endpoint_lifecycle(session: Session) -> None:
    """Endpoints join, leave and are deleted, and new ones take their addresses."""
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
    Group.LIFECYCLE,
    after=(join_answer,),
    source=f"{_REMOTE}: ProgramExternalConnectivity, RevokeExternalConnectivity",
    hint="Both methods may answer 404. RevokeExternalConnectivity also comes for endpoints that were never programmed.",
)
def external_connectivity(session: Session) -> None:
    """Published ports are programmed and revoked, or neither method is supported."""
    endpoint = session.endpoint(session.network())
    session.join(endpoint)
    revoking = session.ask("RevokeExternalConnectivity", **endpoint.ids)
    programming = session.ask("ProgramExternalConnectivity", **endpoint.ids, Options=endpoint.request["Options"])
    expect(
        (revoking.status == 404) == (programming.status == 404),
        "only one of ProgramExternalConnectivity and RevokeExternalConnectivity is supported",
    )
    if programming.status != 404:
        expect(not revoking.error, f"RevokeExternalConnectivity without ProgramExternalConnectivity: {revoking.error}")
        expect(not programming.error, f"ProgramExternalConnectivity: {programming.error}")
        session.call("RevokeExternalConnectivity", **endpoint.ids)


@check(
    Group.LIFECYCLE,
    after=(join_answer,),
    source="docs.docker.com: docker network create --internal",
    hint='An internal network has Options["com.docker.network.internal"], and its containers get no gateway.',
)
def internal_network(session: Session) -> None:
    """A container on an internal network gets no default gateway."""
    answer = session.join(session.endpoint(session.network(internal=True)))
    gateways = [answer[name] for name in ("Gateway", "GatewayIPv6") if answer.get(name)]
    expect(not gateways, f"the answer to Join has a gateway: {', '.join(gateways)}")


# ------------------------------------------------------------------------------------------------------ at least once

_RETRY = f"{_CLIENT}: a request without an answer is sent again, for 30 s"


def _twice(session: Session, method: str, request: dict[str, Any]) -> None:
    """The second request gets the same answer as the first."""
    first = session.call(method, **request)
    again = session.ask(method, **request)
    expect(not again.error, f"the repeated {method} is refused: {again.error}")
    expect(
        _same(again.content, first), f"the repeated {method} gets another answer: first {first}, then {again.content}"
    )


@check(
    Group.AT_LEAST_ONCE,
    after=(network_lifecycle,),
    source=_RETRY,
    hint="Answer success if the network exists already.",
)
def create_network_twice(session: Session) -> None:
    """A repeated CreateNetwork succeeds."""
    _twice(session, "CreateNetwork", session.new_network().request)


@check(
    Group.AT_LEAST_ONCE,
    after=(create_endpoint_answer,),
    source=_RETRY,
    hint="Answer a known endpoint with its first answer.",
)
def create_endpoint_twice(session: Session) -> None:
    """A repeated CreateEndpoint gets the same answer."""
    _twice(session, "CreateEndpoint", session.new_endpoint(session.network()).request)


@check(Group.AT_LEAST_ONCE, after=(join_answer,), source=_RETRY, hint="Answer a joined endpoint with the same link.")
def join_twice(session: Session) -> None:
    """A repeated Join gets the same answer."""
    endpoint = session.endpoint(session.network())
    _twice(session, "Join", endpoint.join_request)
    session.ask("Leave", **endpoint.ids)


@check(
    Group.AT_LEAST_ONCE,
    after=(endpoint_lifecycle,),
    source=_RETRY,
    hint="Answer success if the endpoint has left already.",
)
def leave_twice(session: Session) -> None:
    """A repeated Leave succeeds."""
    endpoint = session.endpoint(session.network())
    session.join(endpoint)
    _twice(session, "Leave", endpoint.ids)


@check(Group.AT_LEAST_ONCE, after=(endpoint_lifecycle,), source=_RETRY, hint="To delete what is gone is a success.")
def delete_endpoint_twice(session: Session) -> None:
    """A repeated DeleteEndpoint succeeds."""
    _twice(session, "DeleteEndpoint", session.endpoint(session.network()).ids)


@check(
    Group.AT_LEAST_ONCE,
    after=(network_lifecycle,),
    source=_RETRY,
    hint="To delete what is gone is a success.",
)
def delete_network_twice(session: Session) -> None:
    """A repeated DeleteNetwork succeeds."""
    _twice(session, "DeleteNetwork", {"NetworkID": session.network().id})


@check(
    Group.AT_LEAST_ONCE,
    after=(network_lifecycle,),
    source=f"{_CLIENT}: callWithRetry sends the same buffer again, which is empty by then",
    hint="A retry can come with an empty body. Answer an error, and do nothing.",
)
def retry_without_body(session: Session) -> None:
    """A request without a body is refused."""
    for method in ("CreateNetwork", "CreateEndpoint", "Join"):
        answer = session.post(f"/NetworkDriver.{method}", b"")
        expect(answer.error, f"{method} without a body succeeds")


# ------------------------------------------------------------------------------------------------------------- errors


@check(
    Group.ERRORS,
    after=(create_endpoint_answer,),
    source=_REMOTE,
    hint="Refuse requests for a network that was never created.",
)
def unknown_network(session: Session) -> None:
    """CreateEndpoint is refused for an unknown network."""
    session.expect_error("CreateEndpoint", **session.new_endpoint(Resource(_UNKNOWN, session.network().subnet)).request)


@check(Group.ERRORS, after=(join_answer,), source=_REMOTE, hint="Refuse to join an endpoint that was never created.")
def unknown_endpoint(session: Session) -> None:
    """Join is refused for an unknown endpoint."""
    session.expect_error("Join", **session.new_endpoint(session.network()).join_request)


@check(
    Group.ERRORS,
    after=(network_lifecycle,),
    source=f"{_CLIENT}: the engine shows the field Err of an answer that is not 200",
    hint='Answer a body that is not a JSON object with an error: {"Err": "…"}.',
)
def malformed_body(session: Session) -> None:
    """A body that is not a JSON object is refused."""
    for body in (b"{", b"[]", b"\xff"):
        answer = session.post("/NetworkDriver.CreateNetwork", body)
        expect(answer.error, f"CreateNetwork with the body {body!r} succeeds")


@check(
    Group.ERRORS,
    after=(unknown_endpoint,),
    source=f"{_CLIENT}: without Err, the engine shows the whole body",
    hint='Answer {"Err": "one line that says what is wrong"}: users see it after "Error response from daemon:".',
)
def readable_error(session: Session) -> None:
    """An error is one line of text in the field Err."""
    request = session.new_endpoint(session.network()).join_request
    answer = session.ask("Join", **request)
    said = answer.content.get("Err") if answer.error else "an unknown endpoint is joined"
    if not answer.error:
        return  # another check says so
    expect(isinstance(said, str) and said, f"Err is missing in {answer.body[:200]!r}")
    expect(
        "\n" not in str(said).strip() and "<html" not in str(said).lower(),
        f"Err is not one line of plain text: {said!r}",
    )


@check(
    Group.ERRORS,
    after=(network_lifecycle,),
    source="an engine keeps calling a plugin after any error",
    hint="An error in one request must not end the process or leave a lock held.",
)
def alive_after_errors(session: Session) -> None:
    """After all kinds of errors, networks can be created as before."""
    for body in (b"{", b"", b'{"NetworkID": null}', b"[" * 10000):
        with suppress(Failed):
            session.post("/NetworkDriver.CreateNetwork", body)
            session.post("/NetworkDriver.Join", body)
    network = session.network()
    session.call("DeleteNetwork", NetworkID=network.id)


# ------------------------------------------------------------------------------------------------------------ restart

_NEVER = "moby daemon/libnetwork/controller.go: an engine never sends CreateNetwork again"


@check(
    Group.RESTART,
    requires=(RESTART,),
    after=(join_answer,),
    source=_NEVER,
    hint="Write networks to disk before you answer.",
)
def network_survives(session: Session) -> None:
    """The plugin still knows a network after it was killed and started again."""
    network = session.network()
    session.restart()
    session.join(session.endpoint(network))


@check(
    Group.RESTART,
    after=(endpoint_lifecycle, network_survives),
    source=_NEVER,
    hint="Write endpoints to disk before you answer.",
)
def endpoint_survives(session: Session) -> None:
    """After it was killed and started again, the plugin lets its endpoints join, leave and be deleted."""
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
    Group.CONCURRENCY,
    after=(endpoint_lifecycle,),
    source="an engine sends each request from a goroutine of its own",
    hint="Look for state that requests share without a lock.",
)
def concurrent_networks(session: Session) -> None:
    """Ten networks with one endpoint each are created and deleted at the same time."""

    def cycle(_: int) -> None:
        network = session.network()
        endpoint = session.endpoint(network)
        session.join(endpoint)
        _end(session, endpoint)
        session.call("DeleteNetwork", NetworkID=network.id)

    _at_once(cycle, 10)


@check(
    Group.CONCURRENCY,
    after=(endpoint_lifecycle,),
    source="docker compose up: containers of one network start side by side",
    hint="Look for state of a network that requests share without a lock.",
)
def concurrent_endpoints(session: Session) -> None:
    """Ten endpoints of one network are created and deleted at the same time."""
    network = session.network()

    def cycle(_: int) -> str:
        endpoint = session.endpoint(network)
        name = (session.join(endpoint).get("InterfaceName") or {}).get("SrcName") or endpoint.id
        _end(session, endpoint)
        return str(name)

    names = _at_once(cycle, 10)
    expect(len(set(names)) == len(names), f"two answers to Join name the same link: {sorted(names)}")


# --------------------------------------------------------------------------------------------------------------- IPAM


@check(
    Group.IPAM,
    requires=(IPAM_DRIVER,),
    source=_IPAMS,
    hint="Answer GetDefaultAddressSpaces with the names of two address spaces, and GetCapabilities with two booleans.",
)
def ipam_address_spaces(session: Session) -> None:
    """The IPAM driver names its address spaces and answers GetCapabilities."""
    for name, value in session.post("/IpamDriver.GetCapabilities", b"").content.items():
        if name.startswith("Requires"):
            expect(isinstance(value, bool), f"{name} is {value!r}, not true or false")
    expect(_space(session), "LocalDefaultAddressSpace is empty")


@check(
    Group.IPAM,
    after=(ipam_address_spaces,),
    source=_IPAMS,
    hint="Pool in the request is a subnet in CIDR form, or empty.",
)
def ipam_pool(session: Session) -> None:
    """A requested pool is given, released, and can be requested again."""
    for _ in range(2):
        pool = _pool(session, "10.214.1.0/24")
        expect(
            _parsed(ip_network, pool["Pool"], "Pool") == ip_network("10.214.1.0/24"),
            f"10.214.1.0/24 was requested, and Pool is {pool['Pool']}",
        )
        session.call("IpamDriver.ReleasePool", PoolID=pool["PoolID"])


@check(
    Group.IPAM,
    after=(ipam_pool,),
    source="moby daemon/libnetwork/network.go: the engine keeps an overlapping pool and requests another one",
    hint="Never choose a pool that is in use: the engine would request pools forever.",
)
def ipam_pools_do_not_overlap(session: Session) -> None:
    """Two pools that the driver chooses do not overlap."""
    first, second = (ip_network(_pool(session, "")["Pool"]) for _ in range(2))
    expect(not first.overlaps(second), f"{first} and {second} overlap")


@check(
    Group.IPAM,
    after=(ipam_pool,),
    source=_IPAMS,
    hint="Give each address once, with the prefix length of the pool.",
)
def ipam_addresses(session: Session) -> None:
    """Twenty addresses of a pool differ, lie in the pool, and are neither its first nor its last address."""
    pool = _pool(session, "10.214.2.0/24")
    network = ip_network(pool["Pool"])
    addresses = [_address(session, pool, mac=f"02:42:00:00:00:{n:02x}") for n in range(20)]
    expect(len(set(addresses)) == 20, f"an address is given twice: {sorted(map(str, addresses))}")
    for address in addresses:
        expect(address.ip in network, f"{address} is not in {network}")
        expect(
            address.network.prefixlen == network.prefixlen, f"{address} does not have the prefix length of {network}"
        )
        expect(
            address.ip not in (network[0], network[-1]), f"{address} is the network address or the broadcast address"
        )


@check(
    Group.IPAM,
    after=(ipam_addresses,),
    source=_IPAMS,
    hint="Address in the request is the address that a user wants (--ip).",
)
def ipam_requested_address(session: Session) -> None:
    """A requested address is given once, and again after it was released."""
    pool = _pool(session, "10.214.3.0/24")
    wanted = "10.214.3.77"
    given = _address(session, pool, address=wanted, mac="02:42:00:00:00:01")
    expect(str(given.ip) == wanted, f"{wanted} was requested, and {given} is given")
    session.expect_error(
        "IpamDriver.RequestAddress", PoolID=pool["PoolID"], Address=wanted, Options=_mac("02:42:00:00:00:02")
    )
    session.call("IpamDriver.ReleaseAddress", PoolID=pool["PoolID"], Address=wanted)
    _address(session, pool, address=wanted, mac="02:42:00:00:00:03")


@check(
    Group.IPAM,
    after=(ipam_addresses,),
    source="moby daemon/libnetwork/network.go: RequestAddressType com.docker.network.gateway",
    hint="The engine requests the gateway as an address with Options RequestAddressType; else Options may be null.",
)
def ipam_gateway(session: Session) -> None:
    """The gateway's address is not given again, and a request with null Options gets an address."""
    pool = _pool(session, "10.214.4.0/29")
    asked = {"PoolID": pool["PoolID"], "Address": ""}
    gateway = session.call("IpamDriver.RequestAddress", **asked, Options=messages.GATEWAY)["Address"]
    others = [_address(session, pool, mac=f"02:42:00:00:00:{n:02x}") for n in range(4)]
    expect(ip_interface(gateway) not in others, f"the gateway's address {gateway} is given again")
    session.call("IpamDriver.RequestAddress", **asked, Options=None)


@check(
    Group.IPAM,
    after=(ipam_addresses,),
    source=f"{_IPAMS}: the field Error of an answer with status 200",
    hint='An IPAM driver\'s error is the field "Error", or a status but 200. Engines read "Err" with a 200 as success.',
)
def ipam_exhausted(session: Session) -> None:
    """A full pool is answered with an error that the engine sees."""
    pool = _pool(session, "10.214.5.0/30")
    for n in range(6):
        options = _mac(f"02:42:00:00:00:{n:02x}")
        answer = session.ask("IpamDriver.RequestAddress", PoolID=pool["PoolID"], Address="", Options=options)
        content = answer.content if answer.status == 200 else {}
        if answer.status != 200 or content.get("Error"):
            return
        expect(content.get("Address"), f"the answer has neither Address nor Error: {content}")
    raise Failed("a /30 has two addresses, and six are given")


# --------------------------------------------------------------------------------------------------------- data plane

_OSL = "moby daemon/libnetwork/osl/interface_linux.go"


@check(
    Group.DATA_PLANE,
    requires=(DATA_PLANE,),
    after=(capabilities, endpoint_lifecycle),
    source=_OSL,
    hint="The link that Join names must exist in the plugin's network namespace before Join is answered.",
)
def link_in_sandbox(session: Session) -> None:
    """The link that Join names can be moved into a sandbox, and gets its address there."""
    with session.controller() as controller:
        lan = _lan(session, controller)
        box = controller.create_sandbox("one")
        endpoint = _connected(box, lan)
        expect(endpoint.interface, "the answer to Join names no link")
        shown = box.run("ip", "-brief", "-4", "address", "show", endpoint.interface)
        expect(str(endpoint.addresses[4]) in shown, f"{endpoint.addresses[4]} is not on {endpoint.interface}: {shown}")


@check(
    Group.DATA_PLANE,
    after=(link_in_sandbox,),
    source="docs.docker.com: containers on a network reach each other",
    hint="Look at the state of the links, at their bridge, and at the packets that the firewall drops.",
)
def sandboxes_reach_each_other(session: Session) -> None:
    """Two sandboxes on one network reach each other."""
    with session.controller() as controller:
        lan = _lan(session, controller)
        one, two = (controller.create_sandbox(name) for name in ("one", "two"))
        addresses = [_connected(box, lan).addresses[4].ip for box in (one, two)]
        for box, target in ((one, addresses[1]), (two, addresses[0])):
            expect(_reaches(box, target), f"{box.name} does not reach {target}")


@check(
    Group.DATA_PLANE,
    after=(link_in_sandbox,),
    source=_OSL,
    hint="A gateway in the answer to Join must be reachable on the network.",
)
def gateway_answers(session: Session) -> None:
    """The gateway that Join names answers a ping."""
    with session.controller() as controller:
        lan = _lan(session, controller)
        box = controller.create_sandbox("one")
        endpoint = _connected(box, lan)
        if 4 in endpoint.gateways:
            expect(_reaches(box, endpoint.gateways[4]), f"the gateway {endpoint.gateways[4]} does not answer")


@check(
    Group.DATA_PLANE,
    after=(sandboxes_reach_each_other,),
    source="docker restart: a new endpoint with the old address",
    hint="Neighbours must forget the old link: MAC address, forwarding entries, rules.",
)
def sandbox_rejoins(session: Session) -> None:
    """A sandbox that leaves and joins again is reached at its old address."""
    with session.controller() as controller:
        lan = _lan(session, controller)
        one, two = (controller.create_sandbox(name) for name in ("one", "two"))
        target = _connected(one, lan).addresses[4].ip
        _connected(two, lan)
        expect(_reaches(two, target), f"{target} is not reached before it leaves")
        one.disconnect(lan)
        expect(not _reaches(two, target, within=1), f"{target} is still reached after it left")
        _connected(one, lan, address=target)
        expect(_reaches(two, target), f"{target} is not reached after it joined again")


@check(
    Group.DATA_PLANE,
    after=(link_in_sandbox,),
    source="docker network rm: the host is as it was before",
    hint="Delete the links of an endpoint in DeleteEndpoint, and those of a network in DeleteNetwork.",
)
def no_links_left(session: Session) -> None:
    """No links are left after their network is deleted."""
    before = links.names()
    with session.controller() as controller:
        lan = _lan(session, controller)
        for name in ("one", "two"):
            _connected(controller.create_sandbox(name), lan)
    until = time.monotonic() + _CLEANUP_SECONDS
    while (left := links.names() - before) and time.monotonic() < until:
        time.sleep(0.05)
    expect(not left, f"these links are left: {', '.join(sorted(left))}")


# -------------------------------------------------------------------------------------------------------------- helpers


def _parsed(parse: Callable[[str], Any], text: object, name: str) -> Any:
    try:
        return parse(str(text))
    except ValueError:
        raise Failed(f"{name} is invalid: {text!r}") from None


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _end(session: Session, endpoint: Resource) -> None:
    session.call("Leave", **endpoint.ids)
    session.call("DeleteEndpoint", **endpoint.ids)


def _at_once(function: Callable[[int], Any], number: int) -> list[Any]:
    with ThreadPoolExecutor(number) as callers:
        return list(callers.map(function, range(number)))


def _space(session: Session) -> str:
    spaces = session.post("/IpamDriver.GetDefaultAddressSpaces", b"").content
    return str(spaces.get("LocalDefaultAddressSpace") or "")


def _pool(session: Session, pool: str) -> dict[str, Any]:
    request = {"AddressSpace": _space(session), "Pool": pool, "SubPool": "", "Options": None, "V6": False}
    given = session.call("IpamDriver.RequestPool", **request)
    expect(given.get("PoolID"), f"the answer has no PoolID: {given}")
    session.call_at_close("IpamDriver.ReleasePool", PoolID=given["PoolID"])
    return given


def _mac(mac: str) -> dict[str, str]:
    return {messages.MAC_ADDRESS: mac}


def _address(session: Session, pool: dict[str, Any], *, mac: str, address: str = "") -> Any:
    request = {"PoolID": pool["PoolID"], "Address": address, "Options": _mac(mac)}
    given = session.call("IpamDriver.RequestAddress", **request).get("Address")
    found = _parsed(ip_interface, given, "Address")
    session.call_at_close("IpamDriver.ReleaseAddress", PoolID=pool["PoolID"], Address=str(found.ip))
    return found


def _lan(session: Session, controller: Any) -> Any:
    options = session.subject.options
    return controller.create_network("lan", "plugin", subnets=session.subnet(0), options=options)


def _connected(box: Any, lan: Any, address: Any = None) -> Any:
    try:
        return box.connect(lan, addresses=() if address is None else (address,))
    except DriverError as error:
        raise Failed(str(error)) from error


def _reaches(box: Any, target: object, within: int = _REACH_SECONDS) -> bool:
    """Whether a ping is answered within this many seconds: on a busy machine the kernel opens a bridge port late."""
    try:
        box.run("ping", "-c1", f"-w{within}", str(target))
    except DriverError:
        return False
    return True
