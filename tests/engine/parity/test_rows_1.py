"""Rows P1 to P16: devices, options of networks, isolation, source addresses and published ports."""

from __future__ import annotations

import contextlib
import ipaddress
import sys
from collections.abc import Iterator

from netplugin_sdk.testing.engine import ENGINE_ADDRESS, OUTSIDE_ADDRESS, EngineError, wait_until

from ...patience import PATIENCE
from .lab import (
    ENGINE_ADDRESS_6,
    HOST,
    OUTSIDE,
    OUTSIDE_ADDRESS_6,
    Answer,
    Difference,
    Facts,
    Lab,
    ping,
    row,
    sctp,
    tcp,
    udp,
)

BRIDGE = "com.docker.network.bridge."
NAME = BRIDGE + "name="
MTU = "com.docker.network.driver.mtu="
SUBNET_6 = ("--ipv6", "--subnet", "fd00:77::/64", "--gateway", "fd00:77::1")

SECOND, SECOND_6 = "198.51.100.7", "2001:db8:51::7"
"""Further addresses of the engine's host, where a row gives it them."""


def by_whom(lab: Lab, answers: dict[str, Answer]) -> Facts:
    """For each probe: the peer that its server saw, or why nothing came back."""
    return {fact: lab.who(answer.peer) if answer else "nothing" for fact, answer in answers.items()}


# --------------------------------------------------------------------------------------------------------- P1 to P4


@row(
    "P1",
    "device, addresses, inspect",
    {
        "device": "bridge, up",
        "its addresses are the gateways": True,
        "inspect": {
            "Scope": "local",
            "EnableIPv6": False,
            "Internal": False,
            "Attachable": False,
            "Ingress": False,
            "ConfigOnly": False,
            "Options": {},
            "Labels": {},
            "IPAM driver": "default",
            "IPAM config": ["Gateway", "Subnet"],
        },
        "the first container has the second address": True,
        "prefix length": True,
        "gateway": True,
        "default route": True,
        "network inspect shows the container": True,
        "MAC of inspect is that of eth0": True,
        "a port per container": 1,
        "after rm": "no device",
    },
)
def test_p1_network(lab: Lab) -> Facts:
    lab.network()
    network = lab.inspect_network()
    (pool,) = network["IPAM"]["Config"]
    subnet = ipaddress.ip_network(pool["Subnet"])
    bridge = lab.bridge()
    link = lab.link(bridge)
    addresses = lab.addresses(bridge)
    lab.run("one")
    endpoint = lab.endpoint("one")
    eth0 = lab.link("eth0", where="one")
    shown = next(iter(lab.inspect_network()["Containers"].values()))
    shared = ("Scope", "EnableIPv6", "Internal", "Attachable", "Ingress", "ConfigOnly", "Options", "Labels")
    facts: Facts = {
        "device": f"{link['linkinfo']['info_kind']}, {'up' if 'UP' in link['flags'] else 'down'}",
        "its addresses are the gateways": addresses == [f"{pool['Gateway']}/{subnet.prefixlen}"],
        "inspect": {
            **{key: network[key] for key in shared},
            "IPAM driver": network["IPAM"]["Driver"],
            "IPAM config": sorted(pool),
        },
        "the first container has the second address": endpoint["IPAddress"] == str(subnet[2]),
        "prefix length": endpoint["IPPrefixLen"] == subnet.prefixlen,
        "gateway": endpoint["Gateway"] == pool["Gateway"] == str(subnet[1]),
        "default route": f"default via {pool['Gateway']} dev eth0" in lab.host("ip", "route", where="one"),
        "network inspect shows the container": (shown["Name"], shown["IPv4Address"], shown["MacAddress"])
        == ("one", f"{endpoint['IPAddress']}/{subnet.prefixlen}", endpoint["MacAddress"]),
        "MAC of inspect is that of eth0": endpoint["MacAddress"] == eth0["address"] != "",
        "a port per container": len(lab.ports_of()),
    }
    lab.docker("rm", "--force", "one")
    lab.docker("network", "rm", "net")
    facts["after rm"] = "no device" if lab.gone(bridge) else "still there"
    return facts


@row(
    "P1",
    "an option that no driver knows",
    {"refused": False},
    differences=[Difference("refused", True, "bridge ignores options that it does not know; myplugin names them")],
)
def test_p1_unknown_option(lab: Lab) -> Facts:
    return {"refused": bool(lab.refused_network("-o", "nonsense=1"))}


@row(
    "P2",
    "the device has that name",
    {
        "named": True,
        "br-ID": False,
        "container": True,
        "a second network of that name": "refused",
        "the first goes on": True,
        "after rm": False,
        "an empty name": "br-ID",
    },
)
def test_p2_name(lab: Lab) -> Facts:
    lab.network("-o", NAME + "fifteen-bytes-x")
    lab.run("one")
    (pool,) = lab.inspect_network()["IPAM"]["Config"]
    prefix_length = ipaddress.ip_network(pool["Subnet"]).prefixlen
    facts: Facts = {
        "named": f"{lab.gateway()}/{prefix_length}" in lab.addresses("fifteen-bytes-x"),
        "br-ID": lab.link(lab.bridge()) is not None,
        "container": len(lab.ports_of(bridge="fifteen-bytes-x")) == 1,
    }
    refused = lab.refused_network("-o", NAME + "fifteen-bytes-x", name="other")
    facts["a second network of that name"] = "refused" if refused else "accepted"
    facts["the first goes on"] = bool(lab.ask("one", ping(lab.gateway())))
    lab.docker("rm", "--force", "one")
    lab.docker("network", "rm", "net")
    facts["after rm"] = not lab.gone("fifteen-bytes-x")
    lab.network("-o", NAME)
    facts["an empty name"] = "br-ID" if lab.link(lab.bridge()) else "none"
    return facts


ADDRESS_LOST = "bridge takes from an adopted device the address that it had; myplugin gives it back as it was"


@row(
    "P2",
    "a device that exists is adopted",
    {
        "up": True,
        "gateway added": True,
        "its own address kept": False,
        "its own port kept": True,
        "container": True,
        "after rm": ["gateway", "port"],
    },
    differences=[
        Difference("its own address kept", True, ADDRESS_LOST),
        Difference("after rm", ["its own address", "port"], ADDRESS_LOST),
    ],
)
def test_p2_adopt(lab: Lab) -> Facts:
    lab.defer(lambda: lab.try_host("ip", "link", "del", "own"))
    lab.host("ip", "link", "add", "own", "type", "bridge")
    lab.host("ip", "address", "add", "10.98.0.1/24", "dev", "own")
    lab.host("ip", "link", "add", "ownport", "master", "own", "type", "veth", "peer", "name", "ownpeer")
    lab.defer(lambda: lab.try_host("ip", "link", "del", "ownport"))
    lab.network("-o", NAME + "own", "--subnet", "10.99.0.0/24", "--gateway", "10.99.0.1")
    lab.run("one")

    def has() -> dict[str, bool]:
        addresses = lab.addresses("own")
        return {
            "gateway": "10.99.0.1/24" in addresses,
            "its own address": "10.98.0.1/24" in addresses,
            "port": "ownport" in lab.ports_of(bridge="own"),
        }

    during = has()
    facts: Facts = {
        "up": "UP" in lab.link("own")["flags"],
        "gateway added": during["gateway"],
        "its own address kept": during["its own address"],
        "its own port kept": during["port"],
        "container": bool(lab.ask("one", ping("10.99.0.1"))),
    }
    lab.docker("rm", "--force", "one")
    lab.docker("network", "rm", "net")
    if lab.driver != "bridge":  # it gives it back after its answer
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not has()["gateway"], PATIENCE)
    facts["after rm"] = sorted(name for name, there in has().items() if there) if lab.link("own") else "gone"
    return facts


@row(
    "P2",
    "names that cannot be",
    {
        "16 bytes": "refused",
        "slash": "refused",
        "blank": "refused",
        "tab": "refused",
        "colon": "refused",
        "percent": "refused",
        "dot": "refused",
        "dot dot": "refused",
        "held by no bridge": "refused, named",
        "nothing left": [],
        "a template of the kernel": ["refused", "per0"],
    },
    differences=[
        Difference(
            "a template of the kernel",
            ["refused"],
            "bridge gives `per%d` to the kernel, which makes `per0` of it, and leaves that behind",
        )
    ],
)
def test_p2_bad_names(lab: Lab) -> Facts:
    lab.host("ip", "link", "add", "nobridge", "type", "veth", "peer", "name", "nobridge2")
    lab.defer(lambda: lab.host("ip", "link", "del", "nobridge"))
    before = lab.state()
    names = {
        "16 bytes": "sixteen-bytes-xx",
        "slash": "sla/sh",
        "blank": "bla nk",
        "tab": "ta\tb",
        "colon": "co:lon",
        "percent": "per%x",
        "dot": ".",
        "dot dot": "..",
        "held by no bridge": "nobridge",
    }
    facts: Facts = {}
    for fact, name in names.items():
        said = lab.refused_network("-o", NAME + name, name=f"net{len(facts)}")
        facts[fact] = "accepted" if not said else "refused" + (", named" if "nobridge" in said else "")
    facts["nothing left"] = lab.left(before)
    said = lab.refused_network("-o", NAME + "per%d", name="template")
    facts["a template of the kernel"] = ["refused" if said else "accepted", *(["per0"] if lab.link("per0") else [])]
    lab.try_host("ip", "link", "del", "per0")
    return facts


@row(
    "P3",
    "MTU of bridge, veth and container",
    {"1400": {"bridge": 1400, "veth": 1400, "eth0": 1400}, "68": 68, "0": 1500, "none given": 1500},
)
def test_p3_mtu(lab: Lab) -> Facts:
    lab.network("-o", MTU + "1400")
    lab.network("-o", MTU + "68", name="low")
    lab.network("-o", MTU + "0", name="zero")
    lab.network(name="none-given")
    networks = {"one": "net", "two": "low", "three": "zero", "four": "none-given"}
    lab.together(*(lambda c=c, n=n: lab.run(c, network=n) for c, n in networks.items()))
    (veth,) = lab.ports_of()
    return {
        "1400": {
            "bridge": lab.link(lab.bridge())["mtu"],
            "veth": lab.link(veth)["mtu"],
            "eth0": lab.link("eth0", where="one")["mtu"],
        },
        "68": lab.link("eth0", where="two")["mtu"],
        "0": lab.link("eth0", where="three")["mtu"],
        "none given": lab.link("eth0", where="four")["mtu"],
    }


@row(
    "P3",
    "MTUs that cannot be",
    {
        "none": "refused",
        "empty": "refused",
        "-1": "refused",
        "1400.5": "refused",
        "67": "refused",
        "70000": "refused",
        "devices left": 2,
    },
    on={"20.10": {"67": "refused at run", "70000": "refused at run", "devices left": 0}},
    differences=[
        Difference("devices left", 0, "bridge leaves its device behind where the kernel refuses the MTU"),
        Difference("67", "refused", "bridge of 20.10 accepts it and then starts no container", ["20.10"]),
        Difference("70000", "refused", "bridge of 20.10 accepts it and then starts no container", ["20.10"]),
    ],
)
def test_p3_bad_mtu(lab: Lab) -> Facts:
    before = set(lab.host("ip", "-brief", "link").splitlines())
    facts: Facts = {}
    for text in ("none", "", "-1", "1400.5", "67", "70000"):
        name = f"net{len(facts)}"
        if lab.refused_network("-o", MTU + text, name=name):
            facts[text or "empty"] = "refused"
        else:
            facts[text or "empty"] = "refused at run" if lab.refused_run("one", network=name) else "accepted"
            lab.docker("network", "rm", name)
    left = set(lab.host("ip", "-brief", "link").splitlines()) - before
    for line in left:
        lab.host("ip", "link", "del", line.split()[0])
    return {**facts, "devices left": len(left)}


@row(
    "P4",
    "by address and by name",
    {
        "one to two": True,
        "two to one": True,
        "by name": True,
        "back by name": True,
        "by alias": True,
        "tcp": "one",
        "udp": "one",
        "gateway": True,
        "host to container": "gateway of net",
    },
)
def test_p4_one_network(lab: Lab) -> Facts:
    lab.network()
    lab.together(lambda: lab.run("one"), lambda: lab.run("two", "--network-alias", "alias"))
    lab.serve("two", "tcp 80", "udp 80")
    one, two = lab.address("one"), lab.address("two")
    seen = lab.survey(
        {
            "one to two": ("one", ping(two)),
            "two to one": ("two", ping(one)),
            "gateway": ("one", ping(lab.gateway())),
            "tcp": ("one", tcp(two, 80)),
            "udp": ("one", udp(two, 80)),
            "host to container": (HOST, tcp(two, 80)),
        }
    )
    by_name, back, by_alias = lab.together(
        lambda: lab.pings("one", "two"), lambda: lab.pings("two", "one"), lambda: lab.pings("one", "alias")
    )
    whom = by_whom(lab, seen)
    return {
        **{fact: bool(seen[fact]) for fact in ("one to two", "two to one", "gateway")},
        "by name": by_name,
        "back by name": back,
        "by alias": by_alias,
        **{fact: whom[fact] for fact in ("tcp", "udp", "host to container")},
    }


# --------------------------------------------------------------------------------------------------------- P5 to P9


@row(
    "P5",
    "IPv4",
    {
        "ping": False,
        "tcp": False,
        "udp": False,
        "published, by container address": False,
        "published, by the host's address": True,
        "published, from outside": True,
        "from the host": True,
        "gateway": True,
        "outbound": True,
        "a value that is no bool": "refused",
    },
)
def test_p5_icc(lab: Lab) -> Facts:
    refused = lab.refused_network("-o", BRIDGE + "enable_icc=maybe", name="maybe")
    lab.network("-o", BRIDGE + "enable_icc=false")
    lab.together(lambda: lab.run("one"), lambda: lab.run("two", "-p", "8080:80"))
    lab.serve("two", "tcp 80", "tcp 81", "udp 81")
    lab.serve(OUTSIDE, "tcp 4000")
    two = lab.address("two")
    return {
        **lab.reached(
            {
                "ping": ("one", ping(two)),
                "tcp": ("one", tcp(two, 81)),
                "udp": ("one", udp(two, 81)),
                "published, by container address": ("one", tcp(two, 80)),
                "published, by the host's address": ("one", tcp(ENGINE_ADDRESS, 8080)),
                "published, from outside": (OUTSIDE, tcp(ENGINE_ADDRESS, 8080)),
                "from the host": (HOST, tcp(two, 81)),
                "gateway": ("one", ping(lab.gateway())),
                "outbound": ("one", tcp(OUTSIDE_ADDRESS, 4000)),
            }
        ),
        "a value that is no bool": "refused" if refused else "accepted",
    }


@row(
    "P5",
    "IPv6",
    {"ping": False, "tcp": False, "udp": False, "from the host": True, "gateway": True},
    since="28.5",
)
def test_p5_icc_6(lab: Lab) -> Facts:
    lab.network(*SUBNET_6, "-o", BRIDGE + "enable_icc=false")
    lab.runs("one", "two")
    lab.serve("two", "tcp 81", "udp 81")
    lab.settle("one", "two")
    two = lab.address("two", version=6)
    return lab.reached(
        {
            "ping": ("one", ping(two)),
            "tcp": ("one", tcp(two, 81)),
            "udp": ("one", udp(two, 81)),
            "from the host": (HOST, tcp(two, 81)),
            "gateway": ("one", ping("fd00:77::1")),
        }
    )


WAYS = {
    "to another network": ("one", "two"),
    "from another network": ("two", "one"),
    "to a bridge network": ("one", "three"),
    "from a bridge network": ("three", "one"),
}

ISOLATED = {
    **{f"{kind} {way}": False for way in WAYS for kind in ("ping", "tcp", "udp")},
    "tcp from the host": [True, True, True],
}


def isolation(lab: Lab, version: int, *options: tuple[str, ...]) -> Facts:
    """The traffic between networks: two of the row's driver, one of bridge's."""
    lab.network(*options[0])
    lab.network(*options[1], name="other")
    lab.network(*options[2], name="plain", driver="bridge")
    places = {"one": "net", "two": "other", "three": "plain"}
    lab.together(*(lambda c=c, n=n: lab.run(c, network=n) for c, n in places.items()))
    for container in places:
        lab.serve(container, "tcp 80", "udp 80")
    address = {container: lab.address(container, network, version) for container, network in places.items()}
    probes = {}
    for way, (source, target) in WAYS.items():
        probes[f"ping {way}"] = (source, ping(address[target]))
        probes[f"tcp {way}"] = (source, tcp(address[target], 80))
        probes[f"udp {way}"] = (source, udp(address[target], 80))
    if version == 6:
        lab.settle(*places)
    from_host = lab.reached({container: (HOST, tcp(address[container], 80)) for container in places})
    return {**lab.reached(probes), "tcp from the host": list(from_host.values())}


@row("P6", "by container address, IPv4", ISOLATED)
def test_p6_isolation(lab: Lab) -> Facts:
    return isolation(lab, 4, (), (), ())


@row(
    "P6",
    "by container address, IPv6",
    ISOLATED,
    since="28.5",
    differences=[
        Difference(
            f"{kind} to a bridge network",
            True,
            "bridge of 20.10 and 26.1 lets everybody into its networks by IPv6, myplugin nobody into its own",
            ["20.10", "26.1"],
        )
        for kind in ("ping", "tcp", "udp")
    ],
)
def test_p6_isolation_6(lab: Lab) -> Facts:
    subnets = [("--ipv6", "--subnet", f"fd00:{number}::/64") for number in (77, 78, 79)]
    return isolation(lab, 6, *subnets)


@row(
    "P6",
    "against docker0",
    {**dict.fromkeys(("to ping", "to tcp", "from ping", "from tcp"), False), "tcp from the host": [True, True]},
)
def test_p6_docker0(lab: Lab) -> Facts:
    lab.network()
    lab.together(lambda: lab.run("one"), lambda: lab.run("two", network="bridge"))
    lab.serve("one", "tcp 80")
    lab.serve("two", "tcp 80")
    one, two = lab.address("one"), lab.address("two", "bridge")
    from_host = lab.reached({address: (HOST, tcp(address, 80)) for address in (one, two)})
    seen = lab.reached(
        {
            "to ping": ("one", ping(two)),
            "to tcp": ("one", tcp(two, 80)),
            "from ping": ("two", ping(one)),
            "from tcp": ("two", tcp(one, 80)),
        }
    )
    return {**seen, "tcp from the host": list(from_host.values())}


@row(
    "P6",
    "published ports and gateways of other networks",
    {
        "published to another network": True,
        "published from another network": True,
        "published to a bridge network": True,
        "published from a bridge network": True,
        "gateway of another network": True,
        "gateway of a bridge network": True,
        "gateway from a bridge network": True,
        "both from outside": [True, True, True],
    },
)
def test_p6_published(lab: Lab) -> Facts:
    lab.network()
    lab.network(name="other")
    lab.network(name="plain", driver="bridge")
    lab.together(
        lambda: lab.run("one", "-p", "8081:80"),
        lambda: lab.run("two", "-p", "8082:80", network="other"),
        lambda: lab.run("three", "-p", "8083:80", network="plain"),
    )
    for container in ("one", "two", "three"):
        lab.serve(container, "tcp 80")
    seen = lab.reached(
        {
            "published to another network": ("one", tcp(ENGINE_ADDRESS, 8082)),
            "published from another network": ("two", tcp(ENGINE_ADDRESS, 8081)),
            "published to a bridge network": ("one", tcp(ENGINE_ADDRESS, 8083)),
            "published from a bridge network": ("three", tcp(ENGINE_ADDRESS, 8081)),
            "gateway of another network": ("one", ping(lab.gateway("other"))),
            "gateway of a bridge network": ("one", ping(lab.gateway("plain"))),
            "gateway from a bridge network": ("three", ping(lab.gateway())),
        }
    )
    outside = lab.reached({str(port): (OUTSIDE, tcp(ENGINE_ADDRESS, port)) for port in (8081, 8082, 8083)})
    return {**seen, "both from outside": list(outside.values())}


NO_IP6TABLES = "bridge of 20.10 and 26.1 sets no ip6tables rules unless dockerd is told to; myplugin does"

ANSWERS_DROPPED = (
    "bridge of 28.5 drops what comes directly to a container's address before it looks whether it is an answer, so "
    "that a network without masquerading gets none"
)


@row(
    "P7",
    "who the peer sees, IPv4",
    {
        "tcp": "host",
        "udp": "host",
        "ping": True,
        "the host itself sees": "one",
        "enable_ip_masquerade=false": ["two"],
        "enable_ip_masquerade=false, answered": True,
        "a value that is no bool": "refused",
    },
    on={"28.5": {"enable_ip_masquerade=false, answered": False}},
    differences=[Difference("enable_ip_masquerade=false, answered", True, ANSWERS_DROPPED, ["28.5"])],
)
def test_p7_masquerade(lab: Lab) -> Facts:
    refused = lab.refused_network("-o", BRIDGE + "enable_ip_masquerade=maybe", name="maybe")
    lab.network()
    lab.network("--subnet", "10.77.0.0/24", "-o", BRIDGE + "enable_ip_masquerade=false", name="plainly")
    lab.route_outside("10.77.0.0/24")
    lab.together(lambda: lab.run("one"), lambda: lab.run("two", network="plainly"))
    lab.serve(OUTSIDE, "tcp 4000", "udp 4000")
    lab.serve(HOST, "tcp 4001")
    seen = by_whom(
        lab,
        lab.survey(
            {
                "tcp": ("one", tcp(OUTSIDE_ADDRESS, 4000)),
                "udp": ("one", udp(OUTSIDE_ADDRESS, 4000)),
                "the host itself sees": ("one", tcp(ENGINE_ADDRESS, 4001)),
            }
        ),
    )
    lab.serve(OUTSIDE, "udp 4002", name="plain")
    return {
        **seen,
        "ping": bool(lab.ask("one", ping(OUTSIDE_ADDRESS))),
        "enable_ip_masquerade=false, answered": bool(lab.ask("two", udp(OUTSIDE_ADDRESS, 4002))),
        "enable_ip_masquerade=false": [lab.who(address) for address in lab.heard("plain")],
        "a value that is no bool": "refused" if refused else "accepted",
    }


@row(
    "P8",
    "host_ipv4",
    {
        "tcp": SECOND,
        "udp": SECOND,
        "with enable_ip_masquerade=false": ["two"],
        "an address that is none": "refused",
    },
)
def test_p8_host_ipv4(lab: Lab) -> Facts:
    option = "com.docker.network.host_ipv4="
    refused = lab.refused_network("-o", option + "nonsense", name="nonsense")
    lab.host_address(f"{SECOND}/24")
    lab.network("-o", option + SECOND)
    lab.network(
        "--subnet", "10.77.0.0/24", "-o", option + SECOND, "-o", BRIDGE + "enable_ip_masquerade=false", name="off"
    )
    lab.route_outside("10.77.0.0/24")
    lab.together(lambda: lab.run("one"), lambda: lab.run("two", network="off"))
    lab.serve(OUTSIDE, "tcp 4000", "udp 4000")
    seen = by_whom(
        lab,
        lab.survey(
            {
                "tcp": ("one", tcp(OUTSIDE_ADDRESS, 4000)),
                "udp": ("one", udp(OUTSIDE_ADDRESS, 4000)),
            }
        ),
    )
    lab.serve(OUTSIDE, "udp 4002", name="plain")
    lab.ask("two", udp(OUTSIDE_ADDRESS, 4002))
    seen["with enable_ip_masquerade=false"] = [lab.who(address) for address in lab.heard("plain")]
    return {**seen, "an address that is none": "refused" if refused else "accepted"}


@row("P8", "host_ipv6", {"tcp": SECOND_6, "udp": SECOND_6, "an address that is none": "refused"}, since="28.5")
def test_p8_host_ipv6(lab: Lab) -> Facts:
    option = "com.docker.network.host_ipv6="
    refused = lab.refused_network(*SUBNET_6, "-o", option + "nonsense", name="nonsense")
    if not refused:
        lab.docker("network", "rm", "nonsense")
    lab.host_address(f"{SECOND_6}/64")
    lab.network(*SUBNET_6, "-o", option + SECOND_6)
    lab.run("one")
    lab.serve(OUTSIDE, "tcp 4000", "udp 4000")
    lab.settle("one")
    seen = by_whom(
        lab,
        lab.survey({"tcp": ("one", tcp(OUTSIDE_ADDRESS_6, 4000)), "udp": ("one", udp(OUTSIDE_ADDRESS_6, 4000))}),
    )
    return {**seen, "an address that is none": "refused" if refused else "accepted"}


@row(
    "P9",
    "its own network only",
    {
        "neighbour": True,
        "neighbour, IPv6": True,
        "by name": True,
        "default route": "",
        "default route, IPv6": "",
        "inspect's gateway": "",
        "outbound": False,
        "outbound, IPv6": False,
        "inbound to the container's address": False,
        "inbound, IPv6": False,
        "to another network": False,
        "from another network": False,
        "gateway": True,
        "the host's other address": False,
        "from the host": "gateway of net",
        "published, listening": [],
        "published, from outside": False,
        "inspect's ports": {},
    },
    on={
        "20.10": {
            "default route": "via gateway",
            "default route, IPv6": "via gateway",
            "inspect's gateway": "gateway of net",
            "the host's other address": True,
            "outbound, IPv6": True,
            "inbound, IPv6": True,
        }
    },
    differences=[
        *(
            Difference(fact, value, "bridge of 20.10 gives containers of internal networks a default route", ["20.10"])
            for fact, value in {
                "default route": "",
                "default route, IPv6": "",
                "inspect's gateway": "",
                "the host's other address": False,
            }.items()
        ),
        *(Difference(fact, False, NO_IP6TABLES, ["20.10"]) for fact in ("outbound, IPv6", "inbound, IPv6")),
    ],
)
def test_p9_internal(lab: Lab) -> Facts:
    before = lab.listening()
    lab.network("--internal", *SUBNET_6)
    lab.network(name="other")
    lab.together(
        lambda: lab.run("one"), lambda: lab.run("two", "-p", "8080:80"), lambda: lab.run("three", network="other")
    )
    one, two, three = lab.address("one"), lab.address("two"), lab.address("three", "other")
    two_6 = lab.address("two", version=6)
    (subnet,) = [pool["Subnet"] for pool in lab.inspect_network()["IPAM"]["Config"] if ":" not in pool["Subnet"]]
    lab.route_outside(subnet)
    lab.route_outside("fd00:77::/64")
    for container in ("one", "two", "three"):
        lab.serve(container, "tcp 80")
    lab.settle("one", "two")
    lab.serve(OUTSIDE, "tcp 4000")
    lab.serve(HOST, "tcp 4001")
    listening = sorted(lab.listening() - before)
    seen = lab.survey(
        {
            "neighbour": ("one", tcp(two, 80)),
            "neighbour, IPv6": ("one", tcp(two_6, 80)),
            "outbound": ("one", tcp(OUTSIDE_ADDRESS, 4000)),
            "outbound, IPv6": ("one", tcp(OUTSIDE_ADDRESS_6, 4000)),
            "inbound to the container's address": (OUTSIDE, tcp(two, 80)),
            "inbound, IPv6": (OUTSIDE, tcp(two_6, 80)),
            "to another network": ("one", tcp(three, 80)),
            "from another network": ("three", tcp(one, 80)),
            "gateway": ("one", ping(lab.gateway())),
            "the host's other address": ("one", tcp(ENGINE_ADDRESS, 4001)),
            "published, from outside": (OUTSIDE, tcp(ENGINE_ADDRESS, 8080)),
        }
    )

    def default(*family: str) -> str:
        route = lab.host("ip", *family, "route", "show", "default", where="one")
        return "via gateway" if route else ""

    return {
        **{fact: bool(answer) for fact, answer in seen.items()},
        "from the host": lab.who(lab.ask(HOST, tcp(two, 80)).peer),
        "by name": lab.pings("one", "two"),
        "default route": default(),
        "default route, IPv6": default("-6"),
        "inspect's gateway": lab.who(lab.endpoint("one")["Gateway"]),
        "published, listening": [name for name in listening if ":4001" not in name],
        "inspect's ports": lab.inspect("two")["NetworkSettings"]["Ports"],
    }


# ------------------------------------------------------------------------------------------------------- P10 to P14

WHERE_FROM = {
    "from outside": "outside",
    "from the host, its address": "host",
    "from the host, the gateway": "gateway of net",
    "from the host, 127.0.0.1": "gateway of net",
    "from the host, ::1": "gateway of net",
    "from itself": "gateway of net",
    "from a neighbour": "gateway of net",
    "from a neighbour, the gateway": "gateway of net",
}
"""The peer that the container sees; if that is the gateway, docker-proxy is between."""


HAIRPIN = ("from itself", "from a neighbour")
WRONG_SOURCE = "docker-proxy of 20.10 and 26.1 answers UDP of its own host's containers from another address than asked"


@row(
    "P10",
    "tcp and udp",
    {
        **{f"{kind} {where}": who for kind in ("tcp", "udp") for where, who in WHERE_FROM.items()},
        "a port that is not published": "nothing",
        "tcp listening": ["0.0.0.0:8080", "[::]:8080"],
        "udp listening": ["0.0.0.0:8080", "[::]:8080"],
        "two publications of one port": True,
    },
    on={old: {f"udp {where}": "nothing" for where in HAIRPIN} for old in ("20.10", "26.1")},
    differences=[Difference(f"udp {where}", "gateway of net", WRONG_SOURCE, ["20.10", "26.1"]) for where in HAIRPIN],
)
def test_p10_published(lab: Lab) -> Facts:
    lab.network()
    lab.together(lambda: lab.run("one", "-p", "8080:80", "-p", "8080:80/udp", "-p", "8090:80"), lambda: lab.run("two"))
    lab.serve("one", "tcp 80", "udp 80", "tcp 81")
    targets = {
        "from outside": (OUTSIDE, ENGINE_ADDRESS),
        "from the host, its address": (HOST, ENGINE_ADDRESS),
        "from the host, the gateway": (HOST, lab.gateway()),
        "from the host, 127.0.0.1": (HOST, "127.0.0.1"),
        "from the host, ::1": (HOST, "::1"),
        "from itself": ("one", ENGINE_ADDRESS),
        "from a neighbour": ("two", ENGINE_ADDRESS),
        "from a neighbour, the gateway": ("two", lab.gateway()),
    }
    probes = {}
    for fact, (where, host) in targets.items():
        probes[f"tcp {fact}"] = (where, tcp(host, 8080))
        probes[f"udp {fact}"] = (where, udp(host, 8080))
    probes["a port that is not published"] = (OUTSIDE, tcp(ENGINE_ADDRESS, 81))
    return {
        **by_whom(lab, lab.survey(probes)),
        "tcp listening": sorted(name for name in lab.listening("tcp") if name.endswith(":8080")),
        "udp listening": sorted(name for name in lab.listening("udp") if name.endswith(":8080")),
        "two publications of one port": bool(lab.ask(OUTSIDE, tcp(ENGINE_ADDRESS, 8090))),
    }


NO_SCTP = (
    "bridge opens an SCTP socket for each SCTP port, with and without docker-proxy, and this kernel has none; "
    "myplugin leaves SCTP to netfilter alone (tried with one INIT chunk of a raw socket)"
)


@row(
    "P10",
    "sctp, on a kernel without SCTP sockets",
    {"docker says": "protocol not supported", "from outside": "nothing", "left of it": [], "left at the end": []},
    differences=[Difference("docker says", "", NO_SCTP), Difference("from outside", "outside", NO_SCTP)],
)
def test_p10_sctp(lab: Lab) -> Facts:
    lab.network()
    before = lab.state()
    facts: Facts = {"docker says": "", "from outside": "nothing", "left of it": []}
    try:
        lab.run("one", "-p", "8080:80/sctp")
    except EngineError as error:
        unsupported = "protocol not supported"
        facts["docker says"] = unsupported if unsupported in str(error) else lab.plain(str(error))
        facts["left of it"] = lab.left(before)
    else:
        lab.serve("one", "sctp 80")
        facts |= by_whom(lab, lab.survey({"from outside": (OUTSIDE, sctp(ENGINE_ADDRESS, 8080))}))
    lab.docker("rm", "--force", "one")
    return {**facts, "left at the end": lab.left(before)}


@row(
    "P11",
    "-p ADDRESS:PORT:PORT",
    {
        "127.0.0.1, udp": True,
        "127.0.0.1, tcp": True,
        "127.0.0.1, from the host's address": False,
        "127.0.0.1, from outside": False,
        "127.0.0.1, from a neighbour": False,
        "127.0.0.1, ::1": False,
        "one address": "outside",
        "another address": False,
        "one address, ::1": False,
        "listening": ["127.0.0.1:8081", f"{ENGINE_ADDRESS}:8082"],
        "an address that the host has not": "cannot assign requested address",
        "nothing left": [],
    },
)
def test_p11_address(lab: Lab) -> Facts:
    lab.host_address(f"{SECOND}/24")
    lab.network()
    before = lab.state()
    said = lab.refused_run("three", "-p", "10.1.2.3:8070:80").lower()
    nothing_left = lab.left(before)
    options = ("-p", "127.0.0.1:8081:81/udp", "-p", "127.0.0.1:8081:81", "-p", f"{ENGINE_ADDRESS}:8082:82")
    lab.together(lambda: lab.run("one", *options), lambda: lab.run("two"))
    lab.serve("one", "tcp 81", "udp 81", "tcp 82")
    seen = lab.reached(
        {
            "127.0.0.1, udp": (HOST, udp("127.0.0.1", 8081)),
            "127.0.0.1, tcp": (HOST, tcp("127.0.0.1", 8081)),
            "127.0.0.1, from the host's address": (HOST, udp(ENGINE_ADDRESS, 8081)),
            "127.0.0.1, from outside": (OUTSIDE, udp(ENGINE_ADDRESS, 8081)),
            "127.0.0.1, from a neighbour": ("two", udp(lab.gateway(), 8081)),
            "127.0.0.1, ::1": (HOST, udp("::1", 8081)),
            "another address": (OUTSIDE, tcp(SECOND, 8082)),
            "one address, ::1": (HOST, tcp("::1", 8082)),
        }
    )
    cannot = "cannot assign requested address"
    return {
        **seen,
        "one address": lab.who(lab.ask(OUTSIDE, tcp(ENGINE_ADDRESS, 8082)).peer),
        "listening": sorted(name for name in lab.listening() if name.rpartition(":")[2] in ("8081", "8082")),
        "an address that the host has not": cannot if cannot in said else said or "accepted",
        "nothing left": nothing_left,
    }


@row(
    "P11",
    "host_binding_ipv4",
    {
        "that address": "outside",
        "another address": False,
        "127.0.0.1": False,
        "IPv6": False,
        "-p with an address": True,
        "listening": [f"{SECOND}:8080", "127.0.0.1:8081"],
        "an address that is none": "refused",
    },
)
def test_p11_host_binding(lab: Lab) -> Facts:
    option = BRIDGE + "host_binding_ipv4="
    refused = lab.refused_network("-o", option + "nonsense", name="nonsense")
    lab.host_address(f"{SECOND}/24")
    lab.network("-o", option + SECOND)
    lab.run("one", "-p", "8080:80", "-p", "127.0.0.1:8081:80")
    lab.serve("one", "tcp 80")
    seen = lab.survey(
        {
            "that address": (OUTSIDE, tcp(SECOND, 8080)),
            "another address": (OUTSIDE, tcp(ENGINE_ADDRESS, 8080)),
            "127.0.0.1": (HOST, tcp("127.0.0.1", 8080)),
            "IPv6": (OUTSIDE, tcp(ENGINE_ADDRESS_6, 8080)),
            "-p with an address": (HOST, tcp("127.0.0.1", 8081)),
        }
    )
    return {
        **{fact: bool(answer) for fact, answer in seen.items()},
        "that address": lab.who(seen["that address"].peer),
        "listening": sorted((n for n in lab.listening() if n.rpartition(":")[2] in ("8080", "8081")), reverse=True),
        "an address that is none": "refused" if refused else "accepted",
    }


NOT_SHOWN = (
    "docker port, docker ps and NetworkSettings.Ports know only ports of drivers inside of dockerd: the engine takes "
    "them from a value of a Go type, which no remote driver can give (moby daemon/network.go getEndpointPortMapInfo)"
)


def new_ports(lab: Lab, before: set[str], kind: str = "tcp") -> list[int]:
    """The ports of new listeners of the host."""
    return sorted({int(name.rpartition(":")[2]) for name in lab.listening(kind) - before})


def shown_ports(lab: Lab, container: str) -> dict[str, list[str]]:
    """Host's addresses and ports as inspect shows them, of what is published."""
    ports = lab.inspect(container)["NetworkSettings"]["Ports"] or {}
    return {port: [f"{b['HostIp']} {b['HostPort']}" for b in bound] for port, bound in ports.items() if bound}


def both(port: int) -> list[str]:
    """A port on all addresses, as inspect shows it."""
    return [f"0.0.0.0 {port}", f":: {port}"]


@row(
    "P12",
    "-p 80",
    {
        "one port is chosen": True,
        "from the ephemeral range": True,
        "tcp": "outside",
        "udp": "outside",
        "tcp, ::1": "gateway of net",
        "another container gets another port": True,
        "inspect and docker port show it": True,
    },
    differences=[Difference("inspect and docker port show it", False, NOT_SHOWN)],
)
def test_p12_any_port(lab: Lab) -> Facts:
    before, before_udp = lab.listening(), lab.listening("udp")
    lab.network()
    lab.run("one", "-p", "80", "-p", "81/udp")
    ports, udp_ports = new_ports(lab, before), new_ports(lab, before_udp, "udp")
    lab.run("two", "-p", "80")
    lab.serve("one", "tcp 80", "udp 81")
    if len(ports) != 1 or len(udp_ports) != 1:
        return {"one port is chosen": False}
    low, high = map(int, lab.sysctl("net.ipv4.ip_local_port_range").split())
    seen = by_whom(
        lab,
        lab.survey(
            {
                "tcp": (OUTSIDE, tcp(ENGINE_ADDRESS, ports[0])),
                "udp": (OUTSIDE, udp(ENGINE_ADDRESS, udp_ports[0])),
                "tcp, ::1": (HOST, tcp("::1", ports[0])),
            }
        ),
    )
    said = lab.engine.run_docker("port", "one", "80").stdout
    return {
        "one port is chosen": True,
        "from the ephemeral range": low <= ports[0] <= high and low <= udp_ports[0] <= high,
        **seen,
        "another container gets another port": len(new_ports(lab, before)) == 2,
        "inspect and docker port show it": f"0.0.0.0:{ports[0]}" in said
        and shown_ports(lab, "one") == {"80/tcp": both(ports[0]), "81/udp": both(udp_ports[0])},
    }


@row(
    "P12",
    "-p 8000-8001:80, -p 8010-8011:90-91",
    {
        "first": [8000, 8010, 8011],
        "first works": [True, True, True],
        "second": [8001],
        "second works": True,
        "third": "refused",
        "nothing left": [],
        "inspect shows them": True,
    },
    differences=[Difference("inspect shows them", False, NOT_SHOWN)],
)
def test_p12_range(lab: Lab) -> Facts:
    before = lab.listening()
    lab.network()
    lab.run("one", "-p", "8000-8001:80", "-p", "8010-8011:90-91")
    first = new_ports(lab, before)
    between = lab.listening()
    lab.run("two", "-p", "8000-8001:80")
    second = new_ports(lab, between)
    state = lab.state()
    third = lab.refused_run("three", "-p", "8000-8001:80")
    nothing_left = lab.left(state)
    lab.serve("one", "tcp 80", "tcp 90", "tcp 91")
    lab.serve("two", "tcp 80")
    works = lab.survey({str(p): (OUTSIDE, tcp(ENGINE_ADDRESS, p)) for p in (8000, 8010, 8011, 8001)})
    shown = {"80/tcp": both(8000), "90/tcp": both(8010), "91/tcp": both(8011)}
    return {
        "first": first,
        "first works": [works[str(p)].by == "one" for p in (8000, 8010, 8011)],
        "second": second,
        "second works": works["8001"].by == "two",
        "third": "refused" if third else "accepted",
        "nothing left": nothing_left,
        "inspect shows them": (shown_ports(lab, "one"), shown_ports(lab, "two")) == (shown, {"80/tcp": both(8001)}),
    }


@row(
    "P12",
    "-P",
    {
        "tcp ports": 1,
        "udp ports": 1,
        "tcp": "outside",
        "udp": "outside",
        "inspect and docker port show them": True,
    },
    differences=[Difference("inspect and docker port show them", False, NOT_SHOWN)],
)
def test_p12_all(lab: Lab) -> Facts:
    before, before_udp = lab.listening(), lab.listening("udp")
    lab.network()
    lab.run("one", "-P", "--expose", "99", "--expose", "98/udp")
    ports, udp_ports = new_ports(lab, before), new_ports(lab, before_udp, "udp")
    if len(ports) != 1 or len(udp_ports) != 1:
        return {"tcp ports": len(ports), "udp ports": len(udp_ports)}
    lab.serve("one", "tcp 99", "udp 98")
    seen = lab.survey(
        {"tcp": (OUTSIDE, tcp(ENGINE_ADDRESS, ports[0])), "udp": (OUTSIDE, udp(ENGINE_ADDRESS, udp_ports[0]))}
    )
    said = lab.docker("port", "one")
    return {
        "tcp ports": len(ports),
        "udp ports": len(udp_ports),
        **by_whom(lab, seen),
        "inspect and docker port show them": f"0.0.0.0:{ports[0]}" in said
        and shown_ports(lab, "one") == {"99/tcp": both(ports[0]), "98/udp": both(udp_ports[0])},
    }


@contextlib.contextmanager
def process_on(lab: Lab, address: str, port: int) -> Iterator[None]:
    """A process of the host that listens there."""
    family = "socket.AF_INET6" if ":" in address else "socket.AF_INET"
    program = f"import socket, time; s = socket.create_server(({address!r}, {port}), family={family}); time.sleep(600)"
    with lab.engine.spawn("process", [sys.executable, "-c", program]):
        wait_until(lambda: any(name.endswith(f":{port}") for name in lab.listening()), PATIENCE)
        yield


IN_USE = "address already in use"
ALLOCATED = "port is already allocated"


def why(said: str) -> str:
    """Which of docker's reasons a refusal gives."""
    return next((reason for reason in (ALLOCATED, IN_USE) if reason in said.lower()), said or "accepted")


@row(
    "P13",
    "taken by a container or a process",
    {
        "by a container": ALLOCATED,
        "with the port": True,
        "by a process": IN_USE,
        "by a process on 127.0.0.1": IN_USE,
        "by a process on IPv6": IN_USE,
        "nothing left": [[], [], [], []],
        "the first goes on": "outside",
        "a host process, tcp": "Address already in use",
        "a host process, one address": "Address already in use",
        "a host process, udp": "Address already in use",
        "a host process, IPv6": "Address already in use",
        "another protocol": "",
    },
)
def test_p13_taken(lab: Lab) -> Facts:
    lab.network()
    lab.run("one", "-p", "8080:80", "-p", "8081:80/udp")
    lab.serve("one", "tcp 80")
    facts: Facts = {}
    nothing_left: list[list[str]] = []

    def refused(fact: str, port: int) -> str:
        before = lab.state()
        said = lab.refused_run("two", "-p", f"{port}:80")
        facts[fact] = why(said)
        nothing_left.append(lab.left(before))
        return said

    facts["with the port"] = ":8080" in refused("by a container", 8080)
    with process_on(lab, "0.0.0.0", 8090):
        refused("by a process", 8090)
    with process_on(lab, "127.0.0.1", 8091):
        refused("by a process on 127.0.0.1", 8091)
    with process_on(lab, "::", 8092):
        refused("by a process on IPv6", 8092)
    cannot = lab.cannot_bind(
        HOST,
        tcp("0.0.0.0", 8080),
        tcp(ENGINE_ADDRESS, 8080),
        udp("0.0.0.0", 8081),
        tcp("::", 8080),
        udp("0.0.0.0", 8080),
    )
    return {
        **facts,
        "nothing left": nothing_left,
        "the first goes on": lab.who(lab.ask(OUTSIDE, tcp(ENGINE_ADDRESS, 8080)).peer),
        "a host process, tcp": cannot[0],
        "a host process, one address": cannot[1],
        "a host process, udp": cannot[2],
        "a host process, IPv6": cannot[3],
        "another protocol": cannot[4],
    }


@row(
    "P13",
    "two networks, and a network of bridge's",
    {
        "a bridge network has it": "refused",
        "a bridge network wants it": "refused",
        "another network wants it": ALLOCATED,
        "nothing left": [],
        "all go on": [True, True],
        "one port on two addresses": ["one", "two"],
    },
)
def test_p13_networks(lab: Lab) -> Facts:
    lab.network()
    lab.network(name="other")
    lab.network(name="plain", driver="bridge")
    lab.host_address(f"{SECOND}/24")
    lab.together(
        lambda: lab.run("one", "-p", "8080:80", "-p", f"{ENGINE_ADDRESS}:8085:80"),
        lambda: lab.run("two", "-p", f"{SECOND}:8085:80", network="other"),
        lambda: lab.run("three", "-p", "8081:80", network="plain"),
    )
    for container in ("one", "two", "three"):
        lab.serve(container, "tcp 80")
    before = lab.state()
    has = lab.refused_run("four", "-p", "8081:80")
    wants = lab.refused_run("four", "-p", "8080:80", network="plain")
    other = lab.refused_run("four", "-p", "8080:80", network="other")
    seen = lab.survey(
        {
            "one": (OUTSIDE, tcp(ENGINE_ADDRESS, 8080)),
            "three": (OUTSIDE, tcp(ENGINE_ADDRESS, 8081)),
            "first": (OUTSIDE, tcp(ENGINE_ADDRESS, 8085)),
            "second": (OUTSIDE, tcp(SECOND, 8085)),
        }
    )
    return {
        "a bridge network has it": "refused" if has else "accepted",
        "a bridge network wants it": "refused" if wants else "accepted",
        "another network wants it": why(other),
        "nothing left": lab.left(before),
        "all go on": [bool(seen["one"]), bool(seen["three"])],
        "one port on two addresses": [seen["first"].by, seen["second"].by],
    }


@row(
    "P14",
    "released and taken again",
    {
        "running": "one",
        "stopped: host can bind": ["", ""],
        "stopped: another can have it": True,
        "stopped: from outside": "Connection refused",
        "started: from outside": "one",
        "started: host cannot bind": "Address already in use",
        "restarted": "one",
        "killed: host can bind": "",
        "removed: another has it at once": "two",
        "nothing left": [],
    },
)
def test_p14_release(lab: Lab) -> Facts:
    lab.network()
    before = lab.state()
    lab.run("one", "-p", "8080:80", "-p", "8080:80/udp")
    ports = (tcp("0.0.0.0", 8080), udp("0.0.0.0", 8080))
    published = (OUTSIDE, tcp(ENGINE_ADDRESS, 8080))

    def answers(container: str) -> str:
        lab.serve(container, "tcp 80")
        return lab.ask(*published).by

    facts: Facts = {"running": answers("one")}
    lab.docker("stop", "one")
    facts["stopped: host can bind"] = lab.cannot_bind(HOST, *ports)
    facts["stopped: from outside"] = lab.ask(*published).failed
    facts["stopped: another can have it"] = not lab.refused_run("two", "-p", "8080:80")
    lab.docker("start", "one")
    facts["started: from outside"] = answers("one")
    facts["started: host cannot bind"] = lab.cannot_bind(HOST, ports[0])[0]
    lab.docker("restart", "one")
    facts["restarted"] = answers("one")
    lab.docker("kill", "one")
    wait_until(lambda: not lab.inspect("one")["State"]["Running"], PATIENCE)
    facts["killed: host can bind"] = lab.cannot_bind(HOST, ports[0])[0]
    lab.docker("start", "one")
    lab.docker("rm", "--force", "one")
    lab.run("two", "-p", "8080:80")
    facts["removed: another has it at once"] = answers("two")
    lab.docker("rm", "--force", "two")
    facts["nothing left"] = lab.left(before)
    return facts


# ------------------------------------------------------------------------------------------------------- P15 to P16


@row(
    "P15",
    "dual stack: addresses, neighbours",
    {
        "bridge has the gateway": True,
        "address": "fd00:77::2/64",
        "default route": "via fd00:77::1",
        "inspect's gateway": "fd00:77::1",
        "ping": True,
        "back": True,
        "tcp": "one",
        "udp": "one",
        "gateway": True,
        "host to container": "gateway of net",
        "IPv4 too": True,
    },
)
def test_p15_dual_stack(lab: Lab) -> Facts:
    lab.network(*SUBNET_6)
    lab.run("one")
    lab.run("two")
    lab.serve("two", "tcp 80", "udp 80")
    lab.settle("one", "two")
    two = lab.address("two", version=6)
    endpoint = lab.endpoint("one")
    route = lab.host("ip", "-6", "route", "show", "default", where="one").split()
    seen = lab.survey(
        {
            "ping": ("one", ping(two)),
            "back": ("two", ping("fd00:77::2")),
            "gateway": ("one", ping("fd00:77::1")),
            "IPv4 too": ("one", ping(lab.address("two"))),
            "tcp": ("one", tcp(two, 80)),
            "udp": ("one", udp(two, 80)),
            "host to container": (HOST, tcp(two, 80)),
        }
    )
    whom = by_whom(lab, seen)
    return {
        **{fact: bool(seen[fact]) for fact in ("ping", "back", "gateway", "IPv4 too")},
        **{fact: whom[fact] for fact in ("tcp", "udp", "host to container")},
        "bridge has the gateway": "fd00:77::1/64" in lab.addresses(lab.bridge()),
        "address": f"{endpoint['GlobalIPv6Address']}/{endpoint['GlobalIPv6PrefixLen']}",
        "default route": " ".join(route[1:3]),
        "inspect's gateway": endpoint["IPv6Gateway"],
    }


@row(
    "P15",
    "IPv6 outbound",
    {"tcp": "host", "udp": "host", "ping": True, "enable_ip_masquerade=false": ["two"]},
    since="28.5",
)
def test_p15_outbound(lab: Lab) -> Facts:
    lab.network(*SUBNET_6)
    lab.network("--ipv6", "--subnet", "fd00:78::/64", "-o", BRIDGE + "enable_ip_masquerade=false", name="off")
    lab.route_outside("fd00:78::/64")
    lab.together(lambda: lab.run("one"), lambda: lab.run("two", network="off"))
    lab.serve(OUTSIDE, "tcp 4000", "udp 4000")
    lab.settle("one", "two")
    seen = lab.survey(
        {
            "tcp": ("one", tcp(OUTSIDE_ADDRESS_6, 4000)),
            "udp": ("one", udp(OUTSIDE_ADDRESS_6, 4000)),
        }
    )
    lab.serve(OUTSIDE, "udp 4002", name="plain")
    lab.ask("two", udp(OUTSIDE_ADDRESS_6, 4002))
    return {
        **by_whom(lab, seen),
        "ping": bool(lab.ask("one", ping(OUTSIDE_ADDRESS_6))),
        "enable_ip_masquerade=false": [lab.who(address) for address in lab.heard("plain")],
    }


@row(
    "P15",
    "IPv6-only",
    {
        "bridge's addresses": ["gateway"],
        "inspect's IPv4 address": "",
        "container has IPv4": False,
        "ping": True,
        "by name": True,
        "outbound": "host",
        "published, from outside": "outside",
        "published, from the host": "host",
        "published, ::1": "gateway of net",
        "published, from a neighbour": "gateway of net",
        "published, IPv4": False,
        "listening": ["[::]:8080"],
        "other network": False,
    },
    engine_since="28.5",
)
def test_p15_six_only(lab: Lab) -> Facts:
    lab.network("--ipv4=false", *SUBNET_6)
    lab.network("--ipv4=false", "--ipv6", name="other")  # a subnet of the engine's choice
    lab.together(
        lambda: lab.run("one", "-p", "8080:80"), lambda: lab.run("two"), lambda: lab.run("three", network="other")
    )
    lab.serve("one", "tcp 80")
    lab.serve(OUTSIDE, "tcp 4000")
    lab.settle("one", "two", "three")
    one = lab.address("one", version=6)
    seen = lab.survey(
        {
            "outbound": ("one", tcp(OUTSIDE_ADDRESS_6, 4000)),
            "published, from outside": (OUTSIDE, tcp(ENGINE_ADDRESS_6, 8080)),
            "published, from the host": (HOST, tcp(ENGINE_ADDRESS_6, 8080)),
            "published, ::1": (HOST, tcp("::1", 8080)),
            "published, from a neighbour": ("two", tcp(ENGINE_ADDRESS_6, 8080)),
        }
    )
    shown = lab.host("ip", "-4", "address", "show", "eth0", where="one")
    addresses = [lab.who(address.partition("/")[0]) for address in lab.addresses(lab.bridge())]
    return {
        **by_whom(lab, seen),
        **lab.reached(
            {
                "ping": ("two", ping(one)),
                "published, IPv4": (OUTSIDE, tcp(ENGINE_ADDRESS, 8080)),
                "other network": ("three", tcp(one, 80)),
            }
        ),
        "bridge's addresses": [name.removesuffix(" of net") for name in addresses],
        "inspect's IPv4 address": lab.address("one"),
        "container has IPv4": shown != "",
        "by name": lab.exec("two", "nslookup", "-type=aaaa", "one", "127.0.0.11").returncode == 0,
        "listening": sorted(name for name in lab.listening() if name.endswith(":8080")),
    }


SOURCE_KEPT = {"from outside": "outside", "from the host": "host"}


@row(
    "P16",
    "dual stack container by the host's IPv6 address",
    {
        **{f"{kind} from outside": "outside" for kind in ("tcp", "udp")},
        **{f"{kind} from the host": "host" for kind in ("tcp", "udp")},
        **{f"{kind} ::1": "gateway of net" for kind in ("tcp", "udp")},
        **{f"{kind} from itself": "gateway of net" for kind in ("tcp", "udp")},
        **{f"{kind} from a neighbour": "gateway of net" for kind in ("tcp", "udp")},
        "IPv4 from outside": "outside",
        "[::1] only, ::1": True,
        "[::1] only, 127.0.0.1": False,
        "[::1] only, from outside": False,
        "listening": ["0.0.0.0:8080", "[::1]:8081", "[::]:8080"],
    },
    on={
        old: {
            **{f"{kind} {where}": "gateway of net" for kind in ("tcp", "udp") for where in SOURCE_KEPT},
            **{f"udp {where}": "nothing" for where in HAIRPIN},
        }
        for old in ("20.10", "26.1")
    },
    differences=[
        *(
            Difference(f"{kind} {where}", who, NO_IP6TABLES, ["20.10", "26.1"])
            for kind in ("tcp", "udp")
            for where, who in SOURCE_KEPT.items()
        ),
        *(Difference(f"udp {where}", "gateway of net", WRONG_SOURCE, ["20.10", "26.1"]) for where in HAIRPIN),
    ],
)
def test_p16_dual_stack(lab: Lab) -> Facts:
    lab.network(*SUBNET_6)
    options = ("-p", "8080:80", "-p", "8080:80/udp", "-p", "[::1]:8081:80")
    lab.together(lambda: lab.run("one", *options), lambda: lab.run("two"))
    lab.serve("one", "tcp 80", "udp 80")
    lab.settle("one", "two")
    probes = {}
    for kind, target in (("tcp", tcp), ("udp", udp)):
        probes[f"{kind} from outside"] = (OUTSIDE, target(ENGINE_ADDRESS_6, 8080))
        probes[f"{kind} from the host"] = (HOST, target(ENGINE_ADDRESS_6, 8080))
        probes[f"{kind} ::1"] = (HOST, target("::1", 8080))
        probes[f"{kind} from itself"] = ("one", target(ENGINE_ADDRESS_6, 8080))
        probes[f"{kind} from a neighbour"] = ("two", target(ENGINE_ADDRESS_6, 8080))
    probes["IPv4 from outside"] = (OUTSIDE, tcp(ENGINE_ADDRESS, 8080))
    return {
        **by_whom(lab, lab.survey(probes)),
        **lab.reached(
            {
                "[::1] only, ::1": (HOST, tcp("::1", 8081)),
                "[::1] only, 127.0.0.1": (HOST, tcp("127.0.0.1", 8081)),
                "[::1] only, from outside": (OUTSIDE, tcp(ENGINE_ADDRESS_6, 8081)),
            }
        ),
        "listening": sorted(n for n in lab.listening() if n.rpartition(":")[2] in ("8080", "8081")),
    }


@row(
    "P16",
    "v4-only container by the host's IPv6 address",
    {
        "tcp from outside": "gateway of net",
        "udp from outside": "gateway of net",
        "tcp from the host": "gateway of net",
        "udp from the host": "gateway of net",
        "tcp ::1": "gateway of net",
        "udp ::1": "gateway of net",
    },
)
def test_p16_v4_only(lab: Lab) -> Facts:
    lab.network()
    lab.run("one", "-p", "8080:80", "-p", "8080:80/udp")
    lab.serve("one", "tcp 80", "udp 80")
    probes = {}
    for kind, target in (("tcp", tcp), ("udp", udp)):
        probes[f"{kind} from outside"] = (OUTSIDE, target(ENGINE_ADDRESS_6, 8080))
        probes[f"{kind} from the host"] = (HOST, target(ENGINE_ADDRESS_6, 8080))
        probes[f"{kind} ::1"] = (HOST, target("::1", 8080))
    return by_whom(lab, lab.survey(probes))
