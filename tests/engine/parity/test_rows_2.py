"""Rows P17 to P32: gateway modes, addresses, several networks, restarts of everything, inspect, sysctls, compose."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

from netplugin_sdk.testing.engine import ENGINE_ADDRESS, OUTSIDE_ADDRESS, EngineError, PrivateEngine, wait_until

from ...patience import PATIENCE
from ..conftest import state_of_host
from .lab import (
    ENGINE_ADDRESS_6,
    HOST,
    OUTSIDE,
    OUTSIDE_ADDRESS_6,
    Agent,
    Difference,
    Facts,
    Lab,
    Target,
    ping,
    row,
    tcp,
)

BRIDGE = "com.docker.network.bridge"
ANSWER = ("nc", "-ll", "-p", "80", "-e", "printf")
"""Command of a container that answers each connection to port 80 with the word that follows."""


# ---------------------------------------------------------------------------------------------------------- helpers


def option(key: str, value: str) -> tuple[str, str]:
    return "-o", f"{BRIDGE}.{key}={value}"


def says(text: str, *words: str) -> bool | str:
    """Whether docker refused, and its error names all of these; otherwise its output."""
    if not text:
        return "not refused"
    return all(word.lower() in text.lower() for word in words) or text


def answers(name: str) -> tuple[str, ...]:
    return (*ANSWER, name)


def default_routes(lab: Lab, container: str, version: int = 4) -> list[str]:
    """Whose addresses the container's default routes go to."""
    shown = json.loads(lab.host("ip", f"-{version}", "-json", "route", "show", "default", where=container) or "[]")
    return [lab.who(route.get("gateway", route["dev"])) for route in shown]


def interfaces(lab: Lab, container: str) -> list[str]:
    shown = json.loads(lab.host("ip", "-json", "link", where=container))
    return sorted(link["ifname"] for link in shown if link["ifname"] != "lo")


def interface_of(lab: Lab, container: str, network: str = "net") -> str:
    """Name in the container of its interface on a network, found by its address there."""
    shown = json.loads(lab.host("ip", "-json", "address", where=container))
    wanted = lab.address(container, network)
    return str(next(link["ifname"] for link in shown if wanted in [a["local"] for a in link["addr_info"]]))


def settled(lab: Lab, wanted: str, patience: float = 3) -> list[str]:
    """The difference between the host's state and `wanted`, after at most so many seconds."""

    def differences() -> list[str]:
        now, then = set(state_of_host(lab.engine).splitlines()), set(wanted.splitlines())
        return [*(f"left: {line}" for line in sorted(now - then)), *(f"gone: {line}" for line in sorted(then - now))]

    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not differences(), patience, every=0.1)
    return differences()


def eventually(lab: Lab, where: str, target: Target, timeout: float = 8) -> str:
    """The server that answers there, within that time."""
    found = ""

    def asked() -> bool:
        nonlocal found
        with contextlib.suppress(EngineError):  # the container is not running yet
            found = lab.ask(where, target, 1).by
        return found != ""

    with contextlib.suppress(TimeoutError):
        wait_until(asked, timeout, every=0.1)
    return found


def wait_for_ipv6(lab: Lab) -> None:
    """Wait until the host may use its bridges' IPv6 addresses: before engine 28, bridge leaves them to DAD."""
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: lab.host("ip", "-6", "address", "show", "scope", "global", "tentative") == "", 4, every=0.1)


def running(lab: Lab, container: str) -> bool:
    inspected = lab.inspect(container)
    return bool(inspected) and bool(inspected["State"]["Running"]) and not inspected["State"]["Restarting"]


def runs_as_another(lab: Lab, container: str, pid: int) -> bool:
    return running(lab, container) and lab.inspect(container)["State"]["Pid"] != pid


def later(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def kill_plugin(lab: Lab) -> None:
    """With SIGKILL; nothing for bridge, which is part of dockerd."""
    if lab.plugin is not None and lab.plugin.running:
        lab.plugin.kill()


@contextlib.contextmanager
def own_engine(lab: Lab, *arguments: str) -> Iterator[Lab]:
    """A lab with an engine of its own, which may be stopped and killed; dockerd has these arguments too."""
    with PrivateEngine(lab.engine.version, arguments) as engine:
        agent = Agent(engine)
        own = Lab(engine, lab.driver, agent, lab.patience)
        try:
            own.start_plugin()
            yield own
        finally:
            if own.plugin is not None and own.plugin.running:
                own.plugin.stop()
            agent.close()


def left_after(own: Lab, before: str) -> list[str]:
    """Remove all containers and networks of a private engine; return the leftovers."""
    own.clean_up()
    return settled(own, before)


# ------------------------------------------------------------------------------------------------ P17 gateway modes

NOTHING_DIRECT = {"ping": False, "published": False, "unpublished": False}


def modes(mode: str, **more: object) -> Facts:
    return {f"{mode} IPv{version} {fact}": value for version in (4, 6) for fact, value in more.items()}


@row(
    "P17",
    "nat, nat-unprotected and routed: from outside by direct routing, by the host's port, and outbound",
    {
        **modes("nat", **NOTHING_DIRECT, host_port="nat", outbound="host", host="nat"),
        **modes(
            "nat-unprotected",
            ping=True,
            published=True,
            unpublished=True,
            host_port="nat-unprotected",
            outbound="host",
            host="nat-unprotected",
        ),
        **modes(
            "routed",
            ping=True,
            published=True,
            unpublished=False,
            host_port="",
            outbound="routed",
            host="routed",
        ),
        **modes("nat-unprotected", **{"from nat, published": False, "from nat, unpublished": False}),
        **modes("routed", **{"from nat, published": True, "from nat, unpublished": False}),
        "routed takes the host's port": False,
    },
    since="28.0",
)
def test_p17_modes(lab: Lab) -> Facts:
    all_modes = {"nat": 1, "nat-unprotected": 2, "routed": 3}

    def start(mode: str, number: int) -> None:
        lab.network(
            "--ipv6",
            *("--subnet", f"10.17.{number}.0/24", "--subnet", f"fd17:{number}::/64"),
            *option("gateway_mode_ipv4", mode),
            *option("gateway_mode_ipv6", mode),
            name=f"net-{mode}",
        )
        lab.run(mode, "-p", f"808{number}:80", network=f"net-{mode}")
        lab.serve(mode, "tcp 80", "tcp 81")
        lab.route_outside(f"10.17.{number}.0/24")
        lab.route_outside(f"fd17:{number}::/64")

    lab.together(*(partial(start, mode, number) for mode, number in all_modes.items()))
    lab.serve(OUTSIDE, "tcp 4000")
    wait_for_ipv6(lab)
    probes: dict[str, tuple[str, Target]] = {}
    for mode, number in all_modes.items():
        for version, host, outside in ((4, ENGINE_ADDRESS, OUTSIDE_ADDRESS), (6, ENGINE_ADDRESS_6, OUTSIDE_ADDRESS_6)):
            of = f"{mode} IPv{version}"
            address = lab.address(mode, f"net-{mode}", version)
            probes[f"{of} ping"] = OUTSIDE, ping(address)
            probes[f"{of} published"] = OUTSIDE, tcp(address, 80)
            probes[f"{of} unpublished"] = OUTSIDE, tcp(address, 81)
            probes[f"{of} host_port"] = OUTSIDE, tcp(host, 8080 + number)
            probes[f"{of} outbound"] = mode, tcp(outside, 4000)
            if mode != "nat":
                probes[f"{of} from nat, published"] = "nat", tcp(address, 80)
                probes[f"{of} from nat, unpublished"] = "nat", tcp(address, 81)
            probes[f"{of} host"] = HOST, tcp(address, 81)
    facts: Facts = {}
    for fact, answer in lab.survey(probes).items():
        kind = fact.split()[-1]
        if kind == "outbound":
            facts[fact] = lab.who(answer.peer)
        else:
            facts[fact] = bool(answer) if kind in NOTHING_DIRECT else answer.by
    facts["routed takes the host's port"] = lab.cannot_bind(HOST, tcp(ENGINE_ADDRESS, 8083)) != [""]
    return facts


@row(
    "P17",
    "nat IPv4 with routed IPv6",
    {
        "IPv4 direct": False,
        "IPv4 host port": "mixed",
        "IPv4 outbound": "host",
        "IPv6 direct": True,
        "IPv6 unpublished": False,
        "IPv6 outbound": "mixed",
    },
    since="28.0",
)
def test_p17_mixed(lab: Lab) -> Facts:
    lab.network("--ipv6", "--subnet", "10.17.4.0/24", "--subnet", "fd17:4::/64", *option("gateway_mode_ipv6", "routed"))
    lab.run("mixed", "-p", "8080:80")
    lab.serve("mixed", "tcp 80", "tcp 81")
    lab.serve(OUTSIDE, "tcp 4000")
    wait_for_ipv6(lab)
    lab.route_outside("10.17.4.0/24")
    lab.route_outside("fd17:4::/64")
    four, six = lab.address("mixed"), lab.address("mixed", version=6)
    seen = lab.survey(
        {
            "four": (OUTSIDE, tcp(four, 80)),
            "port": (OUTSIDE, tcp(ENGINE_ADDRESS, 8080)),
            "out": ("mixed", tcp(OUTSIDE_ADDRESS, 4000)),
            "six": (OUTSIDE, tcp(six, 80)),
            "six closed": (OUTSIDE, tcp(six, 81)),
            "out6": ("mixed", tcp(OUTSIDE_ADDRESS_6, 4000)),
        }
    )
    return {
        "IPv4 direct": bool(seen["four"]),
        "IPv4 host port": seen["port"].by,
        "IPv4 outbound": lab.who(seen["out"].peer),
        "IPv6 direct": bool(seen["six"]),
        "IPv6 unpublished": bool(seen["six closed"]),
        "IPv6 outbound": lab.who(seen["out6"].peer),
    }


@row(
    "P17",
    "isolated: the bridge has no address",
    {
        "addresses": [],
        "link-local addresses": 0,
        "gateways in inspect": ["", ""],
        "default routes": [],
        "neighbours": True,
        "neighbours IPv6": True,
        "host": False,
        "outbound": False,
        "published": False,
    },
    on={version: {"gateways in inspect": ["10.17.5.1", "fd17:5::1"]} for version in ("20.10", "26.1")},
    since="28.0",
)
def test_p17_isolated(lab: Lab) -> Facts:
    isolated = (*option("gateway_mode_ipv4", "isolated"), *option("gateway_mode_ipv6", "isolated"))
    four: tuple[str, ...] = ("--subnet", "10.17.5.0/24")
    six: tuple[str, ...] = ("--subnet", "fd17:5::/64")
    if lab.version < (
        28,
    ):  # where the engine always takes gateway addresses, it shows them only if they were asked for
        four, six = (*four, "--gateway", "10.17.5.1"), (*six, "--gateway", "fd17:5::1")
    lab.network("--internal", "--ipv6", *four, *six, *isolated)
    lab.together(lambda: lab.run("one"), lambda: lab.run("two", "-p", "8080:80"))
    lab.serve("two", "tcp 80")
    link = lab.link(lab.bridge())
    reached = lab.reached(
        {
            "neighbours": ("one", tcp(lab.address("two"), 80)),
            "neighbours IPv6": ("one", tcp(lab.address("two", version=6), 80)),
            "host": (HOST, tcp(lab.address("two"), 80)),
            "outbound": ("one", ping(OUTSIDE_ADDRESS)),
            "published": (OUTSIDE, tcp(ENGINE_ADDRESS, 8080)),
        }
    )
    return {
        "addresses": lab.addresses(lab.bridge()),
        "link-local addresses": len([a for a in link["addr_info"] if a["local"].startswith("fe80:")]),
        "gateways in inspect": [lab.gateway(), lab.gateway(version=6)],
        "default routes": [*default_routes(lab, "one"), *default_routes(lab, "one", 6)],
        **reached,
    }


@row(
    "P17",
    "isolated: a /31 has room for two",
    {"addresses": ["10.17.6.0", "10.17.6.1"], "ping": True},
    engine_since="28.0",
)
def test_p17_point_to_point(lab: Lab) -> Facts:
    lab.network("--internal", "--subnet", "10.17.6.0/31", *option("gateway_mode_ipv4", "isolated"))
    lab.run("one")
    lab.run("two")
    return {
        "addresses": [lab.address("one"), lab.address("two")],
        "ping": bool(lab.ask("one", ping(lab.address("two")))),
    }


@row(
    "P17",
    "gateway modes that cannot be",
    {"isolated, not internal": True, "unknown": True, "unknown IPv6": True},
    since="28.0",
)
def test_p17_refused(lab: Lab) -> Facts:
    def refused(key: str, mode: str, name: str, *words: str) -> bool | str:
        return says(lab.refused_network(*option(f"gateway_mode_{key}", mode), name=name), *words)

    return {
        "isolated, not internal": refused("ipv4", "isolated", "net1", "isolated", "internal"),
        "unknown": refused("ipv4", "bad", "net2", "gateway_mode_ipv4", "bad"),
        "unknown IPv6": refused("ipv6", "bad", "net3", "gateway_mode_ipv6", "bad"),
    }


# ------------------------------------------------------------------------------------------------- P18 inhibit_ipv4


@row(
    "P18",
    "inhibit_ipv4=true",
    {
        "addresses": [],
        "bridge is up": True,
        "default routes": ["10.18.1.1"],
        "neighbours": True,
        "host": False,
        "outbound": False,
        "dual stack addresses": ["fd18:2::1/64"],
        "dual stack IPv6": "host",
        "false": ["10.18.3.1/24"],
        "maybe": True,
    },
)
def test_p18_inhibit(lab: Lab) -> Facts:
    lab.network("--subnet", "10.18.1.0/24", *option("inhibit_ipv4", "true"))
    lab.network(
        *("--ipv6", "--subnet", "10.18.2.0/24", "--subnet", "fd18:2::/64"), *option("inhibit_ipv4", "true"), name="dual"
    )
    lab.network("--subnet", "10.18.3.0/24", *option("inhibit_ipv4", "false"), name="plain")
    lab.together(lambda: lab.run("one"), lambda: lab.run("two"), lambda: lab.run("three", network="dual"))
    lab.serve("two", "tcp 80")
    lab.serve(HOST, "tcp 4000", name="host")
    seen = lab.survey(
        {
            "neighbours": ("one", tcp(lab.address("two"), 80)),
            "host": (HOST, tcp(lab.address("two"), 80)),
            "outbound": ("one", ping(OUTSIDE_ADDRESS)),
        }
    )
    return {
        "addresses": lab.addresses(lab.bridge()),
        "bridge is up": lab.link(lab.bridge())["operstate"] == "UP",
        "default routes": [lab.host("ip", "route", "show", "default", where="one").split()[2]],
        "neighbours": bool(seen["neighbours"]),
        "host": bool(seen["host"]),
        "outbound": bool(seen["outbound"]),
        "dual stack addresses": lab.addresses(lab.bridge("dual")),
        "dual stack IPv6": eventually(lab, "three", tcp("fd18:2::1", 4000), 3),
        "false": lab.addresses(lab.bridge("plain")),
        "maybe": says(lab.refused_network(*option("inhibit_ipv4", "maybe"), name="x"), "inhibit_ipv4", "maybe"),
    }


@row(
    "P18",
    "inhibit_ipv4 with --internal: no gateway address is reserved",
    {"addresses": [], "first container": "10.18.4.1", "neighbours": True},
    on={version: {"first container": "10.18.4.2"} for version in ("20.10", "26.1")},
)
def test_p18_internal(lab: Lab) -> Facts:
    lab.network("--internal", "--subnet", "10.18.4.0/24", *option("inhibit_ipv4", "true"))
    lab.run("one")
    lab.run("two")
    return {
        "addresses": lab.addresses(lab.bridge()),
        "first container": lab.address("one"),
        "neighbours": bool(lab.ask("one", ping(lab.address("two")))),
    }


# --------------------------------------------------------------------------------------- P19 container_iface_prefix


@row(
    "P19",
    "container_iface_prefix=foo",
    {
        "first": ["foo0"],
        "all": ["eth0", "foo0", "foo1"],
        "which is which": ["foo0", "foo1", "eth0"],
        "reached": "one",
        "disconnected": ["eth0", "foo1"],
        "connected again": ["eth0", "foo0", "foo1"],
        "restarted": ["eth0", "foo0", "foo1"],
    },
    on={version: {"connected again": ["eth0", "foo1", "foo2"]} for version in ("20.10", "26.1")},
)
def test_p19_prefix(lab: Lab) -> Facts:
    foo = ("-o", "com.docker.network.container_iface_prefix=foo")
    lab.together(lambda: lab.network(*foo), lambda: lab.network(*foo, name="second"), lambda: lab.network(name="third"))
    lab.together(lambda: lab.run("one"), lambda: lab.run("two"))
    first = interfaces(lab, "one")
    lab.docker("network", "connect", "second", "one")
    lab.docker("network", "connect", "third", "one")
    lab.serve("one", "tcp 80")
    facts: Facts = {
        "first": first,
        "all": interfaces(lab, "one"),
        "which is which": [interface_of(lab, "one", network) for network in ("net", "second", "third")],
        "reached": lab.ask("two", tcp(lab.address("one"), 80)).by,
    }
    lab.docker("network", "disconnect", "net", "one")
    facts["disconnected"] = interfaces(lab, "one")
    lab.docker("network", "connect", "net", "one")
    facts["connected again"] = interfaces(lab, "one")
    lab.docker("restart", "one")  # the engine connects the networks in any order then
    facts["restarted"] = interfaces(lab, "one")
    return facts


@row(
    "P19",
    "prefixes that no interface can have",
    {"a/b": True, "too long": True, "a b": True, "empty": ["eth0"]},
)
def test_p19_refused(lab: Lab) -> Facts:
    def refused(prefix: str, name: str) -> bool:
        """By ``network create``, or by the container's start as bridge does."""
        set_to = ("-o", f"com.docker.network.container_iface_prefix={prefix}")
        return bool(lab.refused_network(*set_to, name=name) or lab.refused_run(f"c{name}", network=name))

    facts: Facts = {
        "a/b": refused("a/b", "net1"),
        "too long": refused("averyveryverylongprefix", "net2"),
        "a b": refused("a b", "net3"),
    }
    lab.network("-o", "com.docker.network.container_iface_prefix=", name="net4")
    lab.run("one", network="net4")
    facts["empty"] = interfaces(lab, "one")
    return facts


# ------------------------------------------------------------------------------------------------ P20 as asked for

POOLS = (
    *("--ipv6", "--subnet", "10.20.0.0/24", "--gateway", "10.20.0.254", "--ip-range", "10.20.0.64/26"),
    *("--aux-address", "first=10.20.0.64", "--aux-address", "other=10.20.0.5"),
    *("--subnet", "fd20::/64", "--gateway", "fd20::ff"),
)


@row(
    "P20",
    "--ip, --ip6, --mac-address, --link-local-ip",
    {
        "MAC": "02:11:22:33:44:55",
        "addresses": ["10.20.0.9/24", "169.254.8.8/16", "fd20::9/64"],
        "IPv6 link-local": True,
        "routes": ["10.20.0.254", "fd20::ff"],
        "inspect": ["10.20.0.9", "fd20::9", "02:11:22:33:44:55"],
        "from the range, not an aux address": "10.20.0.65",
        "connected": ["10.20.0.20/24", "fd20::20/64"],
        "one to two": "two",
        "one to two, link-local": False,
        "one to two, IPv6": "two",
        "connected to two": "two",
        "after restart": ["10.20.0.9", "fd20::9", "02:11:22:33:44:55"],
    },
)
def test_p20_as_asked(lab: Lab) -> Facts:
    lab.network(*POOLS)
    lab.network(name="other")
    asked = ("--ip", "10.20.0.9", "--ip6", "fd20::9", "--mac-address", "02:11:22:33:44:55")
    lab.together(
        lambda: lab.run("one"),
        lambda: lab.run("two", *asked, "--link-local-ip", "169.254.8.8", "--link-local-ip", "fe80::8"),
        lambda: lab.run("three", network="other"),
    )
    lab.docker("network", "connect", "--ip", "10.20.0.20", "--ip6", "fd20::20", "net", "three")
    lab.serve("two", "tcp 80")
    link = lab.link("eth0", "two")
    seen = lab.survey(
        {
            "one to two": ("one", tcp("10.20.0.9", 80)),
            "one to two, link-local": ("one", ping("169.254.8.8")),
            "one to two, IPv6": ("one", tcp("fd20::9", 80)),
            "connected to two": ("three", tcp("10.20.0.9", 80)),
        }
    )

    def inspected() -> list[str]:
        endpoint = lab.endpoint("two")
        return [endpoint["IPAddress"], endpoint["GlobalIPv6Address"], endpoint["MacAddress"]]

    facts: Facts = {
        "MAC": link["address"],
        "addresses": sorted(lab.addresses("eth0", "two")),
        "IPv6 link-local": "fe80::8" in [a["local"] for a in link["addr_info"]],
        "routes": [
            lab.host("ip", f"-{version}", "route", "show", "default", where="two").split()[2] for version in (4, 6)
        ],
        "inspect": inspected(),
        "from the range, not an aux address": lab.address("one"),
        "connected": lab.addresses("eth1", "three"),
        **{fact: answer.by for fact, answer in seen.items()},
        "one to two, link-local": bool(seen["one to two, link-local"]),
    }
    lab.docker("restart", "two")
    facts["after restart"] = inspected()
    return facts


IN_USE = "Address already in use"


@row(
    "P20",
    "addresses and MACs that are refused",
    {
        "taken": True,
        "taken IPv6": True,
        "gateway": True,
        "elsewhere": True,
        "subnet not of the user": True,
        "multicast MAC": True,
        "zero MAC": True,
        "same MAC twice": "",
        "same MAC, both reached": [True, True],
        "all given up": True,
        "devices": 2,
    },
)
def test_p20_refused(lab: Lab) -> Facts:
    lab.together(
        lambda: lab.network(*POOLS),
        lambda: lab.network("--subnet", "10.20.1.0/30", name="tiny"),
        lambda: lab.network(name="auto"),
    )
    mac = "02:11:22:33:44:55"
    lab.run("one", "--ip", "10.20.0.9", "--ip6", "fd20::9", "--mac-address", mac)
    lab.run("full", network="tiny")
    cases: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "taken": (("--ip", "10.20.0.9"), (IN_USE,)),
        "taken IPv6": (("--ip6", "fd20::9"), (IN_USE,)),
        "gateway": (("--ip", "10.20.0.254"), (IN_USE,)),
        "elsewhere": (("--ip", "10.99.0.1"), ("10.99.0.1",)),
        "multicast MAC": (("--mac-address", "01:11:22:33:44:55"), ("01:11:22:33:44:55",)),
        "zero MAC": (("--mac-address", "00:00:00:00:00:00"), ("00:00:00:00:00:00",)),
    }
    said = lab.together(
        *(partial(lab.refused_run, f"refused{number}", *asked) for number, (asked, _) in enumerate(cases.values())),
        lambda: lab.refused_run("refused-auto", "--ip", "172.18.0.77", network="auto"),
        lambda: lab.refused_run("refused-tiny", network="tiny"),
    )
    facts: Facts = {fact: says(text, *cases[fact][1]) for fact, text in zip(cases, said, strict=False)}
    facts["subnet not of the user"] = says(said[-2], "user configured subnets")
    facts["same MAC twice"] = lab.refusal(*lab._run("two", ("--mac-address", mac), "net"), "sleep", "600")
    facts["same MAC, both reached"] = [bool(lab.ask(HOST, ping(lab.address(name)), 1)) for name in ("one", "two")]
    facts["all given up"] = says(said[-1], "no available")
    facts["devices"] = len(lab.ports_of())
    return facts


@row(
    "P20",
    "aux addresses DefaultGatewayIPv4, DefaultGatewayIPv6",
    {"bridge": ["10.20.2.1/24", "fd20:2::1/64"], "routes": ["10.20.2.5", "fd20:2::5"], "outbound": False, "host": True},
)
def test_p20_default_gateway(lab: Lab) -> Facts:
    lab.network(
        *("--ipv6", "--subnet", "10.20.2.0/24", "--subnet", "fd20:2::/64"),
        *("--aux-address", "DefaultGatewayIPv4=10.20.2.5", "--aux-address", "DefaultGatewayIPv6=fd20:2::5"),
    )
    lab.run("one")
    return {
        "bridge": lab.addresses(lab.bridge()),
        "routes": [
            lab.host("ip", f"-{version}", "route", "show", "default", where="one").split()[2] for version in (4, 6)
        ],
        **lab.reached({"outbound": ("one", ping(OUTSIDE_ADDRESS)), "host": (HOST, ping(lab.address("one")))}),
    }


# ---------------------------------------------------------------------------------------------------- P21 MACs, ARP


@row(
    "P21",
    "MAC when none asked",
    {"local unicast": True, "unique": 4, "inspect shows them": True, "local unicast after restart": True},
)
def test_p21_mac(lab: Lab) -> Facts:
    lab.network()
    names = ["one", "two", "three", "four"]
    lab.runs(*names)

    def is_local_unicast(mac: str) -> bool:
        return int(mac[:2], 16) & 3 == 2

    shown = [lab.endpoint(name)["MacAddress"] for name in names]
    real = [lab.link("eth0", name)["address"] for name in names]
    lab.docker("restart", "one")
    again = lab.endpoint("one")["MacAddress"]
    return {
        "local unicast": all(map(is_local_unicast, real)),
        "unique": len(set(real)),
        "inspect shows them": shown == real,
        "local unicast after restart": is_local_unicast(again) and again == lab.link("eth0", "one")["address"],
    }


@row(
    "P21",
    "an address used again: neighbours' ARP and NDP are not stale",
    {
        **{f"{who}{family} first": "two" for who in ("neighbour", "host") for family in ("", " IPv6")},
        **{f"{who}{family} then": "three" for who in ("neighbour", "host") for family in ("", " IPv6")},
        "published": "three",
    },
)
def test_p21_used_again(lab: Lab) -> Facts:
    lab.network("--ipv6", "--subnet", "10.21.0.0/24", "--subnet", "fd21::/64")
    same = ("--ip", "10.21.0.9", "--ip6", "fd21::9", "-p", "8080:80")
    lab.together(lambda: lab.run("one"), lambda: lab.run("two", *same))
    lab.serve("two", "tcp 80")
    probes = {
        "neighbour": ("one", tcp("10.21.0.9", 80)),
        "host": (HOST, tcp("10.21.0.9", 80)),
        "neighbour IPv6": ("one", tcp("fd21::9", 80)),
        "host IPv6": (HOST, tcp("fd21::9", 80)),
    }
    first = {fact: eventually(lab, *probe, 4) for fact, probe in probes.items()}  # its bridge may be in DAD
    lab.docker("rm", "--force", "two")
    lab.run("three", *same)
    lab.serve("three", "tcp 80")
    then = lab.survey({**probes, "published": (OUTSIDE, tcp(ENGINE_ADDRESS, 8080))}, 1)
    return {
        **{f"{fact} first": answer for fact, answer in first.items()},
        **{f"{fact} then" if fact in first else fact: answer.by for fact, answer in then.items()},
    }


# --------------------------------------------------------------------------------------------- P22 several networks


@row(
    "P22",
    "connect and disconnect a running container",
    {
        "before": False,
        "connected": True,
        "by name": True,
        "two interfaces": ["eth0", "eth1"],
        "disconnected": False,
        "one interface": ["eth0"],
        "connected again": True,
        "first network left": ["eth1"],
        "still reached": True,
        "devices of the first": 0,
        "twice": True,
        "not there": True,
    },
    on={version: {"first network left": ["eth2"]} for version in ("20.10", "26.1")},
)
def test_p22_connect(lab: Lab) -> Facts:
    lab.together(lambda: lab.network(name="aa"), lambda: lab.network(name="bb"))
    lab.together(lambda: lab.run("one", network="bb"), lambda: lab.run("two", network="aa"))
    lab.serve("two", "tcp 80")
    to_two = "one", tcp(lab.address("two", "aa"), 80)
    facts: Facts = {"before": bool(lab.ask(*to_two))}
    lab.docker("network", "connect", "aa", "one")
    facts["connected"] = bool(lab.ask(*to_two))
    facts["by name"] = lab.pings("one", "two") and lab.pings("two", "one")
    facts["two interfaces"] = interfaces(lab, "one")
    facts["twice"] = says(lab.refusal("network", "connect", "aa", "one"), "already")
    lab.docker("network", "disconnect", "aa", "one")
    facts["disconnected"] = bool(lab.ask(*to_two))
    facts["one interface"] = interfaces(lab, "one")
    facts["not there"] = says(lab.refusal("network", "disconnect", "aa", "one"), "not connected")
    lab.docker("network", "connect", "aa", "one")
    facts["connected again"] = bool(lab.ask(*to_two))
    lab.docker("network", "disconnect", "bb", "one")
    facts["first network left"] = interfaces(lab, "one")
    facts["still reached"] = bool(lab.ask(*to_two))
    facts["devices of the first"] = len(lab.ports_of("bb"))
    return facts


@row(
    "P22",
    "which network's gateway and ports",
    {
        "bb": [["gateway of bb"], [], "one"],
        "bb, aa": [["gateway of aa"], ["gateway of aa"], "one"],
        "bb, aa, internal a0": [["gateway of aa"], ["gateway of aa"], "one"],
        "aa, internal a0": [["gateway of aa"], ["gateway of aa"], "one"],
        "internal a0, bb": [["gateway of bb"], [], "one"],
        "restarted": [["gateway of bb"], [], "one"],
        "outbound": "host",
    },
)
def test_p22_gateway(lab: Lab) -> Facts:
    lab.together(
        lambda: lab.network("--internal", name="a0"),
        lambda: lab.network(
            *("--ipv6", "--subnet", "10.22.0.0/24", "--gateway", "10.22.0.1"),
            *("--subnet", "fd22::/64", "--gateway", "fd22::1"),
            name="aa",
        ),
        lambda: lab.network(name="bb"),
    )
    lab.run("one", "-p", "8080:80", network="bb", command=answers("one"))
    lab.serve(OUTSIDE, "tcp 4000")
    eventually(lab, OUTSIDE, tcp(ENGINE_ADDRESS, 8080))

    def now() -> list[object]:
        published = lab.ask(OUTSIDE, tcp(ENGINE_ADDRESS, 8080))
        return [default_routes(lab, "one"), default_routes(lab, "one", 6), published.by]

    facts: Facts = {"bb": now()}
    lab.docker("network", "connect", "aa", "one")
    facts["bb, aa"] = now()
    lab.docker("network", "connect", "a0", "one")
    facts["bb, aa, internal a0"] = now()
    lab.docker("network", "disconnect", "bb", "one")
    facts["aa, internal a0"] = now()
    lab.docker("network", "disconnect", "aa", "one")
    lab.docker("network", "connect", "bb", "one")
    facts["internal a0, bb"] = now()
    lab.docker("restart", "one")
    eventually(lab, OUTSIDE, tcp(ENGINE_ADDRESS, 8080), 3)
    facts["restarted"] = now()
    facts["outbound"] = lab.who(lab.ask("one", tcp(OUTSIDE_ADDRESS, 4000)).peer)
    return facts


@row(
    "P22",
    "gw-priority",
    {
        "run with bb 1": [["gateway of bb"], "one"],
        "aa connected with 2": [["gateway of aa"], "one"],
        "aa disconnected": [["gateway of bb"], "one"],
    },
    engine_since="28.0",
)
def test_p22_priority(lab: Lab) -> Facts:
    lab.together(*(partial(lab.network, name=name) for name in ("aa", "bb", "cc")))
    lab.run("one", "--network", "cc", "-p", "8080:80", network="name=bb,gw-priority=1", command=answers("one"))

    def now() -> list[object]:
        return [default_routes(lab, "one"), eventually(lab, OUTSIDE, tcp(ENGINE_ADDRESS, 8080), 2)]

    facts: Facts = {"run with bb 1": now()}
    lab.docker("network", "connect", "--gw-priority", "2", "aa", "one")
    facts["aa connected with 2"] = now()
    lab.docker("network", "disconnect", "aa", "one")
    facts["aa disconnected"] = now()
    return facts


# ------------------------------------------------------------------------------------------- P23 life of a container


@row(
    "P23",
    "stop, start, restart, pause, kill, rm -f",
    {
        "run": "one",
        "stop leaves": [],
        "start": "one",
        "restart": "one",
        "devices": 1,
        "pause": True,
        "unpause": "one",
        "kill leaves": [],
        "after kill": "one",
        "its process killed leaves": [],
        "rm -f of a running one leaves": [],
        "a new one": "one",
    },
)
def test_p23_life(lab: Lab) -> Facts:
    def start() -> None:
        lab.run("one", "-p", "8080:80", command=answers("one"))

    lab.network("--ipv6", "--subnet", "10.23.0.0/24", "--subnet", "fd23::/64")
    before = state_of_host(lab.engine)
    published = OUTSIDE, tcp(ENGINE_ADDRESS, 8080)
    start()
    facts: Facts = {"run": eventually(lab, *published)}
    lab.docker("stop", "one")
    facts["stop leaves"] = settled(lab, before)
    lab.docker("start", "one")
    facts["start"] = eventually(lab, *published)
    lab.docker("restart", "one")
    facts["restart"] = eventually(lab, *published)
    facts["devices"] = len(lab.ports_of())
    lab.docker("pause", "one")
    facts["pause"] = bool(lab.ask(HOST, ping(lab.address("one")))) and not lab.ask(*published, 0.5)
    lab.docker("unpause", "one")
    facts["unpause"] = eventually(lab, *published)
    lab.docker("kill", "one")
    facts["kill leaves"] = settled(lab, before)
    lab.docker("start", "one")
    facts["after kill"] = eventually(lab, *published)
    lab.host("kill", "-9", str(lab.inspect("one")["State"]["Pid"]))
    facts["its process killed leaves"] = settled(lab, before)
    lab.docker("start", "one")
    lab.docker("rm", "--force", "one")
    facts["rm -f of a running one leaves"] = settled(lab, before)
    start()
    facts["a new one"] = eventually(lab, *published)
    return facts


@row(
    "P23",
    "--restart always, killed three times; --rm",
    {"comes back": ["one", "one", "one"], "devices": 1, "--rm leaves": [], "rm -f leaves": []},
)
def test_p23_restart_always(lab: Lab) -> Facts:
    lab.network()
    before = state_of_host(lab.engine)
    lab.run("one", "-p", "8080:80", "--restart", "always", command=answers("one"))
    back = []
    for _ in range(3):
        eventually(lab, OUTSIDE, tcp(ENGINE_ADDRESS, 8080))
        pid = lab.inspect("one")["State"]["Pid"]
        lab.host("kill", "-9", str(pid))
        with contextlib.suppress(TimeoutError):
            wait_until(partial(runs_as_another, lab, "one", pid), PATIENCE)
        back.append(eventually(lab, OUTSIDE, tcp(ENGINE_ADDRESS, 8080)))
    facts: Facts = {"comes back": back, "devices": len(lab.ports_of())}
    lab.docker("rm", "--force", "one")
    facts["rm -f leaves"] = settled(lab, before)
    lab.docker("run", "--rm", "--network", "net", "-p", "8080:80", "busybox", "true")
    facts["--rm leaves"] = settled(lab, before)
    return facts


@row(
    "P23",
    "a container that cannot start leaves nothing",
    {"no such command": True, "leaves": [], "the port is free": "two"},
)
def test_p23_no_start(lab: Lab) -> Facts:
    lab.network()
    before = state_of_host(lab.engine)
    refused = lab.refusal(
        "run", "--detach", "--name", "one", "--network", "net", "-p", "8080:80", "busybox", "/nothing"
    )
    facts: Facts = {"no such command": says(refused, "/nothing"), "leaves": settled(lab, before)}
    lab.run("two", "-p", "8080:80", command=answers("two"))
    facts["the port is free"] = eventually(lab, OUTSIDE, tcp(ENGINE_ADDRESS, 8080))
    return facts


# ------------------------------------------------------------------------------------------------------ P24 engine


def project_of_three(own: Lab) -> None:
    """A dual stack network with a published server that is always restarted, one that is not, and a client."""
    own.network("--ipv6", "--subnet", "10.24.0.0/24", "--subnet", "fd24::/64")
    always = ("--restart", "always")
    own.together(
        lambda: own.run("web", "-p", "8080:80", *always, command=answers("web")),
        lambda: own.run("client", *always),
        lambda: own.run("once", "-p", "8081:80", command=answers("once")),
    )
    eventually(own, OUTSIDE, tcp(ENGINE_ADDRESS, 8080))


def works(own: Lab) -> list[object]:
    """The servers at the published port (IPv4, IPv6) and at the container's address; whether the client gets out."""
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: running(own, "web") and running(own, "client"), PATIENCE, every=0.1)
    return [
        eventually(own, OUTSIDE, tcp(ENGINE_ADDRESS, 8080)),
        eventually(own, OUTSIDE, tcp(ENGINE_ADDRESS_6, 8080)),
        eventually(own, "client", tcp(own.address("web"), 80)),
        bool(own.ask("client", ping(OUTSIDE_ADDRESS), 2)),
    ]


WORKS: list[object] = ["web", "web", "web", True]


@row(
    "P24",
    "engine restart, kill -9",
    {
        "at first": WORKS,
        "after restart": WORKS,
        "once runs after restart": False,
        "once is started": "once",
        "after kill -9": WORKS,
        "devices": 2,
        "new network and container": "new",
        "left": [],
    },
)
def test_p24_engine(lab: Lab) -> Facts:
    with own_engine(lab) as own:
        before = state_of_host(own.engine)
        project_of_three(own)
        facts: Facts = {"at first": works(own)}
        own.engine.stop()
        own.engine.start()
        facts["after restart"] = works(own)
        facts["once runs after restart"] = running(own, "once")
        own.docker("start", "once")
        facts["once is started"] = eventually(own, OUTSIDE, tcp(ENGINE_ADDRESS, 8081))
        own.engine.kill()
        own.engine.start()
        facts["after kill -9"] = works(own)
        facts["devices"] = len(own.ports_of())
        own.network(name="new")
        own.run("new", "-p", "8082:80", network="new", command=answers("new"))
        facts["new network and container"] = eventually(own, OUTSIDE, tcp(ENGINE_ADDRESS, 8082))
        facts["left"] = left_after(own, before)
    return facts


@row(
    "P24",
    "live-restore",
    {
        "at first": WORKS,
        "while stopped": ["web", "web", True],
        "after restart": WORKS,
        "while killed": ["web", "web", True],
        "after kill -9": WORKS,
        "same processes": True,
        "addresses as before": True,
        "new container": ["new", "new"],
        "stop and start": WORKS,
        "port is free after rm -f": "other",
        "left": [],
    },
)
def test_p24_live_restore(lab: Lab) -> Facts:
    names = ("web", "client", "once")
    with own_engine(lab, "--live-restore") as own:
        before = state_of_host(own.engine)
        project_of_three(own)
        facts: Facts = {"at first": works(own)}
        pids = [own.inspect(name)["State"]["Pid"] for name in names]
        web = own.address("web")
        addresses = [own.address(name) for name in names]
        client = f"/proc/{pids[1]}/ns/net"

        def without_engine() -> list[object]:
            def asked(where: str, target: Target) -> list[str]:
                (answer,) = own._agent.do(do="ask", patience=2.0, probes=[(where, *target)])
                return [str(part) for part in answer]

            return [
                asked("/run/netns/outside", tcp(ENGINE_ADDRESS, 8080))[0],
                asked(client, tcp(web, 80))[0],
                asked(client, ping(OUTSIDE_ADDRESS))[0] != "",
            ]

        own.engine.stop()
        facts["while stopped"] = without_engine()
        own.engine.start()
        facts["after restart"] = works(own)
        own.engine.kill()
        facts["while killed"] = without_engine()
        own.engine.start()
        facts["after kill -9"] = works(own)
        facts["same processes"] = pids == [own.inspect(name)["State"]["Pid"] for name in names]
        facts["addresses as before"] = addresses == [own.address(name) for name in names]
        own.run("new", "-p", "8082:80", command=answers("new"))
        facts["new container"] = [
            eventually(own, OUTSIDE, tcp(ENGINE_ADDRESS, 8082)),
            eventually(own, "client", tcp(own.address("new"), 80)),
        ]
        own.docker("stop", "web")
        own.docker("start", "web")
        facts["stop and start"] = works(own)
        own.docker("rm", "--force", "web")
        own.run("other", "-p", "8080:80", command=answers("other"))
        facts["port is free after rm -f"] = eventually(own, OUTSIDE, tcp(ENGINE_ADDRESS, 8080))
        facts["left"] = left_after(own, before)
    return facts


# ------------------------------------------------------------------------------------------------------ P25 plugin


@row(
    "P25",
    "plugin restart, kill -9",
    {
        "while away": WORKS,
        "after kill -9": WORKS,
        "after restart": WORKS,
        "new container": ["new", "new"],
        "web restarted": WORKS,
        "new network": "other",
        "removed while away, leaves": [],
        "its port again": "again",
    },
)
def test_p25_plugin(lab: Lab) -> Facts:
    project_of_three(lab)
    kill_plugin(lab)
    facts: Facts = {"while away": works(lab)}
    lab.start_plugin()
    facts["after kill -9"] = works(lab)
    if lab.plugin is not None:
        lab.plugin.stop()
    lab.start_plugin()
    facts["after restart"] = works(lab)
    lab.run("new", "-p", "8082:80", command=answers("new"))
    facts["new container"] = [
        eventually(lab, OUTSIDE, tcp(ENGINE_ADDRESS, 8082)),
        eventually(lab, "client", tcp(lab.address("new"), 80)),
    ]
    lab.docker("restart", "web")
    facts["web restarted"] = works(lab)
    lab.docker("rm", "--force", "new")
    before = state_of_host(lab.engine)
    lab.network(name="other")
    lab.run("other", "-p", "8083:80", network="other", command=answers("other"))
    facts["new network"] = eventually(lab, OUTSIDE, tcp(ENGINE_ADDRESS, 8083))
    process = f"/proc/{lab.inspect('other')['State']['Pid']}"
    kill_plugin(lab)
    removal = later(lambda: lab.docker("rm", "--force", "other"))
    wait_until(lambda: lab.try_host("test", "-e", process).returncode != 0, PATIENCE)
    lab.start_plugin()
    removal.join()
    lab.docker("network", "rm", "other")
    facts["removed while away, leaves"] = settled(lab, before)
    lab.run("again", "-p", "8083:80", command=answers("again"))
    facts["its port again"] = eventually(lab, OUTSIDE, tcp(ENGINE_ADDRESS, 8083))
    return facts


NEW = ("new1", "new2")


@row(
    "P25",
    "plugin kill -9 while it is asked",
    {"each run ends": True, "afterwards": "two", "leaves": []},
)
def test_p25_killed_at_work(lab: Lab) -> Facts:
    lab.network()
    before = state_of_host(lab.engine)
    ended = []
    for number, moment in enumerate((0.02, 0.08, 0.2)):
        name = f"c{number}"

        def run(name: str = name) -> None:
            with contextlib.suppress(EngineError):  # it may fail, and must not leave anything then
                lab.run(name, "-p", "8080:80", "--restart", "no")

        user = later(run)
        time.sleep(moment)
        kill_plugin(lab)
        lab.start_plugin()
        user.join(60)
        ended.append(not user.is_alive())
        lab.docker("rm", "--force", name)
    makers = [later(partial(lab.engine.run_docker, "network", "create", "-d", lab.driver, name)) for name in NEW]
    time.sleep(0.06)
    kill_plugin(lab)
    lab.start_plugin()
    for maker in makers:
        maker.join(60)
    if made := [network["Name"] for network in lab.api("/networks") if network["Name"] in NEW]:
        lab.docker("network", "rm", *made)
    # A network whose answer was lost, and that docker gave up, is removed after half a minute.
    facts: Facts = {"each run ends": all(ended), "leaves": settled(lab, before, 60)}
    lab.run("two", "-p", "8080:80", command=answers("two"))
    facts["afterwards"] = eventually(lab, OUTSIDE, tcp(ENGINE_ADDRESS, 8080))
    return facts


WIPE = """
for device in $(ip -brief link | awk '{print $1}' | cut -d@ -f1 | grep -vE '^(lo|eth0)$'); do
    ip link del "$device"
done
for tool in iptables ip6tables; do
    for table in raw mangle nat filter; do $tool -t $table -F; $tool -t $table -X; done
    for chain in INPUT FORWARD OUTPUT; do $tool -P $chain ACCEPT; done
done
nft flush ruleset 2>/dev/null
cd /proc/sys/net
echo 0 > ipv4/ip_forward
echo 0 > ipv6/conf/all/forwarding
echo 0 > bridge/bridge-nf-call-iptables
echo 0 > bridge/bridge-nf-call-ip6tables
conntrack -F 2>/dev/null
true
"""
"""The kernel's state that a reboot removes, except the lab's own link to the outside host."""


def reboot(own: Lab, power_cut: bool) -> None:
    """Engine, plugin and containers end, all kernel state is gone, then plugin and engine start."""
    if power_cut:
        kill_plugin(own)
        pids = [str(own.inspect(c["Id"])["State"]["Pid"]) for c in own.api("/containers/json")]
        own.engine.kill()
        own.host("kill", "-9", *pids)
    else:
        own.engine.stop()
        if own.plugin is not None:
            own.plugin.stop()
    own.host("bash", "-c", WIPE)
    own.start_plugin()
    own.engine.start()


@row(
    "P25",
    "host reboot, power cut: all kernel state is gone",
    {
        "at first": WORKS,
        "after reboot": WORKS,
        "bridge": ["10.24.0.1/24", "fd24::1/64"],
        "mtu": 1400,
        "once is started": "once",
        "isolation": False,
        "after power cut": WORKS,
        "devices": 2,
        "left": [],
    },
)
def test_p25_reboot(lab: Lab) -> Facts:
    with own_engine(lab) as own:
        before = state_of_host(own.engine)
        own.network("-o", "com.docker.network.driver.mtu=1400", name="small")
        project_of_three(own)
        own.run("apart", "--restart", "always", network="small")
        facts: Facts = {"at first": works(own)}
        own.docker("rm", "--force", "once")
        reboot(own, power_cut=False)
        facts["after reboot"] = works(own)
        facts["bridge"] = own.addresses(own.bridge())
        wait_until(lambda: running(own, "apart"), PATIENCE)
        facts["mtu"] = own.link(own.bridge("small"))["mtu"]
        own.run("once", "-p", "8081:80", command=answers("once"))
        facts["once is started"] = eventually(own, OUTSIDE, tcp(ENGINE_ADDRESS, 8081))
        facts["isolation"] = bool(own.ask("apart", tcp(own.address("web"), 80)))
        reboot(own, power_cut=True)
        facts["after power cut"] = works(own)
        own.docker("rm", "--force", "once")
        facts["devices"] = len(own.ports_of())
        facts["left"] = left_after(own, before)
    return facts


# ------------------------------------------------------------------------------------------------ P26, P27 networks


@row(
    "P26",
    "network rm with endpoints, prune",
    {
        "in use": True,
        "still works": "one",
        "two at once": [True, ["net"]],
        "prune": ["net"],
        "after disconnect -f": ["spare"],
        "bridge is gone": True,
        "prune with a stopped container": [],
        "its start": True,
        "not there": True,
        "taken name": True,
    },
)
def test_p26_rm(lab: Lab) -> Facts:
    def networks() -> list[str]:
        return sorted(n["Name"] for n in lab.api("/networks") if n["Name"] not in ("bridge", "host", "none"))

    lab.together(*(partial(lab.network, name=name) for name in ("net", "other", "x1", "x2")))
    lab.run("one", "-p", "8080:80", command=answers("one"))
    bridge = lab.bridge()
    facts: Facts = {
        "in use": says(lab.refusal("network", "rm", "net"), "has active endpoints"),
        "still works": eventually(lab, OUTSIDE, tcp(ENGINE_ADDRESS, 8080)),
        "taken name": says(lab.refused_network(), "network with name net already exists"),
    }
    refused = says(lab.refusal("network", "rm", "other", "net"), "has active endpoints")
    facts["two at once"] = [refused, [name for name in networks() if not name.startswith("x")]]
    lab.docker("network", "prune", "--force")
    facts["prune"] = networks()
    lab.network(name="spare")
    lab.docker("network", "disconnect", "--force", "net", "one")
    lab.docker("network", "rm", "net")
    facts["after disconnect -f"] = networks()
    facts["bridge is gone"] = lab.gone(bridge)
    lab.run("two", network="spare")
    lab.docker("stop", "two")
    lab.docker("network", "prune", "--force")
    facts["prune with a stopped container"] = networks()
    facts["its start"] = says(lab.refusal("start", "two"), "network", "not found")
    facts["not there"] = says(lab.refusal("network", "rm", "nothing"), "nothing")
    return facts


OVERLAPS = "Pool overlaps with other one on this address space"


@row(
    "P27",
    "two networks with the same subnet",
    {
        "same": True,
        "within": True,
        "around": True,
        "IPv6": True,
        "that of a bridge network": True,
        "a bridge network's": True,
        "left": [],
        "once it is free": True,
    },
)
def test_p27_same_subnet(lab: Lab) -> Facts:
    lab.network("--subnet", "10.27.0.0/24", name="n1")
    lab.network("--subnet", "10.27.1.0/24", name="b1", driver="bridge")
    lab.network("--ipv6", "--subnet", "10.27.2.0/24", "--subnet", "fd27::/64", name="n2")
    before = state_of_host(lab.engine)
    six = ("--ipv6", "--subnet", "10.27.3.0/24", "--subnet", "fd27::/64")
    facts: Facts = {
        "same": says(lab.refused_network("--subnet", "10.27.0.0/24"), OVERLAPS),
        "within": says(lab.refused_network("--subnet", "10.27.0.128/25"), OVERLAPS),
        "around": says(lab.refused_network("--subnet", "10.27.0.0/16"), OVERLAPS),
        "IPv6": says(lab.refused_network(*six), OVERLAPS),
        "that of a bridge network": says(lab.refused_network("--subnet", "10.27.1.0/24"), OVERLAPS),
        "a bridge network's": says(
            lab.refusal("network", "create", "-d", "bridge", "--subnet", "10.27.0.0/24", "net"), OVERLAPS
        ),
        "left": settled(lab, before),
    }
    lab.docker("network", "rm", "n1")
    lab.network("--subnet", "10.27.0.0/24")
    facts["once it is free"] = lab.addresses(lab.bridge()) == ["10.27.0.1/24"]
    return facts


# ------------------------------------------------------------------------------------------- P28 what inspect shows


@row(
    "P28",
    "what inspect and ps show",
    {
        "addresses": ["10.28.0.2", 24, "10.28.0.1", "fd28::2", 64, "fd28::1"],
        "MAC is the interface's": True,
        "port bindings": {"80/tcp": [{"HostIp": "", "HostPort": "8080"}]},
        "exposed ports": ["80/tcp", "90/udp"],
        "networks": ["net"],
        "ps": ["net", "running"],
        "sandbox": True,
        "network's containers": {"one": ["10.28.0.2/24", "fd28::2/64", True]},
        "network": ["local", False, True, False, "10.28.0.0/24", "10.28.0.1"],
        "options": {"com.docker.network.driver.mtu": "1400"},
        "labels": {"key": "value"},
        "stopped": ["", "", "", ""],
        "network's containers when stopped": {},
        "disconnected": [],
    },
)
def test_p28_inspect(lab: Lab) -> Facts:
    lab.network(
        *("--ipv6", "--subnet", "10.28.0.0/24", "--gateway", "10.28.0.1", "--subnet", "fd28::/64"),
        *("--gateway", "fd28::1", "--label", "key=value", "-o", "com.docker.network.driver.mtu=1400"),
    )
    lab.run("one", "-p", "8080:80", "--expose", "90/udp", "--ip", "10.28.0.2", "--ip6", "fd28::2")
    inspected, endpoint, network = lab.inspect("one"), lab.endpoint("one"), lab.inspect_network()
    mac = lab.link("eth0", "one")["address"]
    facts: Facts = {
        "addresses": [
            endpoint[key]
            for key in (
                *("IPAddress", "IPPrefixLen", "Gateway"),
                *("GlobalIPv6Address", "GlobalIPv6PrefixLen", "IPv6Gateway"),
            )
        ],
        "MAC is the interface's": endpoint["MacAddress"] == mac,
        "port bindings": inspected["HostConfig"]["PortBindings"],
        "exposed ports": sorted(inspected["Config"]["ExposedPorts"]),
        "networks": list(inspected["NetworkSettings"]["Networks"]),
        "ps": lab.docker("ps", "--format", "{{.Networks}} {{.State}}", "--filter", "name=one").split(),
        "sandbox": inspected["NetworkSettings"]["SandboxKey"].startswith("/var/run/docker/netns/"),
        "network's containers": {
            c["Name"]: [c["IPv4Address"], c["IPv6Address"], c["MacAddress"] == mac]
            for c in network["Containers"].values()
        },
        "network": [
            *(network[key] for key in ("Scope", "Internal", "EnableIPv6", "Attachable")),
            *(network["IPAM"]["Config"][0][key] for key in ("Subnet", "Gateway")),
        ],
        "options": network["Options"],
        "labels": network["Labels"],
    }
    lab.docker("stop", "one")
    endpoint = lab.endpoint("one")
    facts["stopped"] = [endpoint[key] for key in ("IPAddress", "GlobalIPv6Address", "Gateway", "EndpointID")]
    facts["network's containers when stopped"] = lab.inspect_network()["Containers"]
    lab.docker("start", "one")
    lab.docker("network", "disconnect", "net", "one")
    facts["disconnected"] = list(lab.inspect("one")["NetworkSettings"]["Networks"])
    return facts


# ------------------------------------------------------------------------------------------------------ P29 sysctls

FORWARDING = "net/ipv4/ip_forward"
FORWARDING_6 = ("net/ipv6/conf/all/forwarding", "net/ipv6/conf/default/forwarding")
FILTER = ("net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables")
PER_DEVICE_4 = ("rp_filter", "route_localnet", "accept_local", "arp_ignore", "arp_announce", "proxy_arp")
PER_DEVICE_6 = ("disable_ipv6", "accept_ra", "autoconf", "accept_dad", "addr_gen_mode", "proxy_ndp")
OTHERS = (
    *("net/ipv4/conf/all/rp_filter", "net/ipv4/conf/default/rp_filter", "net/ipv4/conf/all/route_localnet"),
    *("net/ipv6/conf/all/disable_ipv6", "net/ipv6/conf/default/disable_ipv6", "net/ipv6/conf/all/accept_ra"),
    "net/bridge/bridge-nf-call-arptables",
)


def write_sysctls(lab: Lab, values: dict[str, str]) -> None:
    script = "\n".join(f"echo {value} > /proc/sys/{name}" for name, value in values.items())
    lab.host("sh", "-c", f"set -e\n{script}")


def change(lab: Lab, values: dict[str, str]) -> None:
    """Set them until the row's end, together with the policy of FORWARD, which is ACCEPT until then."""
    old = {name: lab.sysctl(name) for name in values}
    policies = {tool: forward_policy(lab, tool) for tool in ("iptables", "ip6tables")}

    def restore() -> None:
        write_sysctls(lab, old)
        for tool, policy in policies.items():
            lab.host(tool, "-P", "FORWARD", policy)

    lab.defer(restore)
    for tool in policies:
        lab.host(tool, "-P", "FORWARD", "ACCEPT")
    write_sysctls(lab, values)


def forward_policy(lab: Lab, tool: str) -> str:
    return lab.host(tool, "-S", "FORWARD").splitlines()[0].split()[-1]


def device_sysctls(lab: Lab, device: str) -> dict[str, str]:
    names = [
        *(f"net/ipv4/conf/{device}/{name}" for name in PER_DEVICE_4),
        *(f"net/ipv6/conf/{device}/{name}" for name in PER_DEVICE_6),
    ]
    shown = lab.host("sh", "-c", "cd /proc/sys; cat " + " ".join(names)).splitlines()
    return dict(zip([name.rpartition("/")[2] for name in names], shown, strict=True))


BRIDGE_SYSCTLS = {
    **dict.fromkeys((*PER_DEVICE_4, *PER_DEVICE_6), "0"),
    "rp_filter": "1",  # the default that the row sets
    "autoconf": "1",
    "accept_dad": "1",
}
VETH_SYSCTLS = {**BRIDGE_SYSCTLS, "accept_ra": "1"}


@row(
    "P29",
    "sysctls of the bridge and of the host's end of the pair",
    {
        "bridge": BRIDGE_SYSCTLS,
        "bridge, IPv6": BRIDGE_SYSCTLS,
        "bridge, internal": BRIDGE_SYSCTLS,
        "veth": VETH_SYSCTLS,
        "veth, IPv6": VETH_SYSCTLS,
        "hairpin": [False, False],
        "bridge's link-local address": [1, True],
        "others change": {},
    },
)
def test_p29_devices(lab: Lab) -> Facts:
    change(lab, {"net/ipv4/conf/default/rp_filter": "1"})
    others = {name: lab.sysctl(name) for name in OTHERS}
    lab.together(
        lab.network,
        lambda: lab.network("--ipv6", "--subnet", "10.29.0.0/24", "--subnet", "fd29::/64", name="six"),
        lambda: lab.network("--internal", name="internal"),
    )
    lab.together(lambda: lab.run("one"), lambda: lab.run("two", network="six"))
    (veth,), (veth6,) = lab.ports_of(), lab.ports_of("six")

    def link_local(network: str) -> int:
        return len([a for a in lab.link(lab.bridge(network))["addr_info"] if a["local"].startswith("fe80:")])

    now = {name: lab.sysctl(name) for name in OTHERS}
    return {
        "bridge": device_sysctls(lab, lab.bridge()),
        "bridge, IPv6": device_sysctls(lab, lab.bridge("six")),
        "bridge, internal": device_sysctls(lab, lab.bridge("internal")),
        "veth": device_sysctls(lab, veth),
        "veth, IPv6": device_sysctls(lab, veth6),
        "hairpin": [lab.link(device)["linkinfo"]["info_slave_data"]["hairpin"] for device in (veth, veth6)],
        "bridge's link-local address": [link_local("net"), link_local("six") >= 1],
        "others change": {name: value for name, value in now.items() if value != others[name]},
    }


@row(
    "P29",
    "forwarding is turned on, and what is not Docker's is not forwarded then",
    {
        "IPv4 network": ["1", "0", "0", "DROP", "ACCEPT"],
        "internal": ["1", "0", "0", "DROP", "ACCEPT"],
        "IPv6 network": ["1", "1", "1", "DROP", "DROP"],
        "outbound": "host",
    },
    since="28.0",
)
def test_p29_forwarding(lab: Lab) -> Facts:
    def now() -> list[str]:
        sysctls = [lab.sysctl(name) for name in (FORWARDING, *FORWARDING_6)]
        return [*sysctls, forward_policy(lab, "iptables"), forward_policy(lab, "ip6tables")]

    change(lab, dict.fromkeys((FORWARDING, *FORWARDING_6), "0"))
    lab.network()
    facts: Facts = {"IPv4 network": now()}
    lab.host("sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward; iptables -P FORWARD ACCEPT")
    lab.network("--internal", name="internal")
    facts["internal"] = now()
    lab.network("--ipv6", "--subnet", "10.29.1.0/24", "--subnet", "fd29:1::/64", name="six")
    facts["IPv6 network"] = now()
    lab.run("one")
    lab.serve(OUTSIDE, "tcp 4000")
    facts["outbound"] = lab.who(lab.ask("one", tcp(OUTSIDE_ADDRESS, 4000)).peer)
    return facts


@row(
    "P29",
    "bridge-nf-call-iptables is turned on where enable_icc=false needs it",
    {
        "icc": ["0", "0"],
        "no icc": ["1", "0"],
        "no icc, IPv6": ["1", "1"],
        "one to two": False,
    },
)
def test_p29_filter(lab: Lab) -> Facts:
    def now() -> list[str]:
        return [lab.sysctl(name) for name in FILTER]

    no_icc = option("enable_icc", "false")
    change(lab, {**dict.fromkeys((FORWARDING, *FORWARDING_6), "1"), **dict.fromkeys(FILTER, "0")})
    lab.network("--ipv6", "--subnet", "10.29.2.0/24", "--subnet", "fd29:2::/64")
    facts: Facts = {"icc": now()}
    lab.network(*no_icc, name="four")
    facts["no icc"] = now()
    lab.network("--ipv6", "--subnet", "10.29.3.0/24", "--subnet", "fd29:3::/64", *no_icc, name="six")
    facts["no icc, IPv6"] = now()
    lab.runs("one", "two", network="six")
    lab.serve("two", "tcp 80")
    facts["one to two"] = bool(lab.ask("one", tcp(lab.address("two", "six"), 80)))
    return facts


# --------------------------------------------------------------------------------------- P30 trusted_host_interfaces


@row(
    "P30",
    "trusted_host_interfaces",
    {
        **{f"trusted{family} published": "one" for family in ("", " IPv6")},
        **{f"trusted{family} unpublished": "" for family in ("", " IPv6")},
        **{f"trusted{family} ping": False for family in ("", " IPv6")},
        **{f"not trusted{family} published": "" for family in ("", " IPv6")},
        "host port": ["one", "two"],
    },
    since="28.2",
)
def test_p30_trusted(lab: Lab) -> Facts:
    def start(name: str, number: int, trusted: str) -> None:
        lab.network(
            *("--ipv6", "--subnet", f"10.30.{number}.0/24", "--subnet", f"fd30:{number}::/64"),
            *option("trusted_host_interfaces", trusted),
            name=f"net-{name}",
        )
        lab.run(name, "-p", f"808{number}:80", network=f"net-{name}")
        lab.serve(name, "tcp 80", "tcp 81")
        lab.route_outside(f"10.30.{number}.0/24")
        lab.route_outside(f"fd30:{number}::/64")

    lab.together(lambda: start("one", 1, "eth7:eth0"), lambda: start("two", 2, "eth7:eth8"))
    wait_for_ipv6(lab)
    probes = {
        "host port 1": (OUTSIDE, tcp(ENGINE_ADDRESS, 8081)),
        "host port 2": (OUTSIDE, tcp(ENGINE_ADDRESS, 8082)),
    }
    for family, version in (("", 4), (" IPv6", 6)):
        one, two = lab.address("one", "net-one", version), lab.address("two", "net-two", version)
        probes[f"trusted{family} published"] = OUTSIDE, tcp(one, 80)
        probes[f"trusted{family} unpublished"] = OUTSIDE, tcp(one, 81)
        probes[f"trusted{family} ping"] = OUTSIDE, ping(one)
        probes[f"not trusted{family} published"] = OUTSIDE, tcp(two, 80)
        lab.ask(OUTSIDE, tcp(one, 80), 2)  # the first packet waits for the neighbour's MAC
    seen = lab.survey(probes)
    ports = [seen.pop("host port 1").by, seen.pop("host port 2").by]
    return {
        **{fact: bool(answer) if "ping" in fact else answer.by for fact, answer in seen.items()},
        "host port": ports,
    }


# ------------------------------------------------------------------------------------------ P31 sysctls of containers


@row(
    "P31",
    "--sysctl, endpoint sysctls, endpoint ifname",
    {
        "--sysctl": "1234",
        "endpoint sysctls": ["1", "0"],
        "of a later connect": "1",
        "after restart": ["1", "1"],
        "a wrong one": True,
        "the network works": "one",
    },
    on={
        version: {
            "endpoint sysctls": ["0", "0"],
            "of a later connect": "0",
            "after restart": ["0", "0"],
            "a wrong one": "not refused",
        }
        for version in ("20.10", "26.1")
    },
)
def test_p31_sysctls(lab: Lab) -> Facts:
    def endpoint(value: str, name: str = "net") -> str:
        return f"name={name},driver-opt=com.docker.network.endpoint.sysctls=net.ipv4.conf.IFNAME.{value}"

    lab.network()
    lab.network(name="other")
    unprivileged = "net/ipv4/ip_unprivileged_port_start"
    martians = ["net/ipv4/conf/eth0/log_martians", "net/ipv4/conf/eth1/log_martians"]
    lab.run("one", "--sysctl", "net.ipv4.ip_unprivileged_port_start=1234", network=endpoint("log_martians=1"))
    lab.run("two")
    facts: Facts = {
        "--sysctl": lab.sysctl(unprivileged, "one"),
        "endpoint sysctls": [lab.sysctl(martians[0], where) for where in ("one", "two")],
    }
    opt = "com.docker.network.endpoint.sysctls=net.ipv4.conf.IFNAME.log_martians=1"
    lab.docker("network", "connect", "--driver-opt", opt, "other", "one")
    facts["of a later connect"] = lab.sysctl(martians[1], "one")
    lab.docker("restart", "one")
    facts["after restart"] = [lab.sysctl(name, "one") for name in martians]
    facts["a wrong one"] = says(lab.refused_run("three", network=endpoint("nonsense=1")), "nonsense")
    lab.serve("one", "tcp 80")
    facts["the network works"] = lab.ask("two", tcp(lab.address("one"), 80)).by
    return facts


NAME_IS_DROPPED = (
    "the engine has no way for a remote driver to name an interface: moby libnetwork/drivers/remote/driver.go, Join, "
    'SetNames(SrcName, DstPrefix, "")'
)


@row(
    "P31",
    "endpoint ifname",
    {
        "run": ["lan0"],
        "connect": ["eth0", "lan0", "wan7"],
        "restart": ["lan0", "wan7"],
        "taken": True,
        "reached": "one",
    },
    differences=[
        Difference(fact, seen, NAME_IS_DROPPED, ["28.5"])
        for fact, seen in {
            "run": ["eth0"],
            "connect": ["eth0", "eth1", "eth2"],
            "restart": ["eth0", "eth1"],
            "taken": False,
        }.items()
    ],
    on={
        version: {"run": ["eth0"], "connect": ["eth0", "eth1", "eth2"], "restart": ["eth0", "eth1"], "taken": False}
        for version in ("20.10", "26.1")
    },
)
def test_p31_ifname(lab: Lab) -> Facts:
    name = "com.docker.network.endpoint.ifname"
    lab.network()
    lab.network(name="other")
    lab.network(name="third")
    lab.run("one", network=f"name=net,driver-opt={name}=lan0")
    facts: Facts = {"run": interfaces(lab, "one")}
    lab.docker("network", "connect", "--driver-opt", f"{name}=wan7", "other", "one")
    lab.run("two")
    lab.serve("one", "tcp 80")
    facts["reached"] = lab.ask("two", tcp(lab.address("one"), 80)).by
    lab.docker("restart", "one")
    facts["restart"] = interfaces(lab, "one")
    lab.docker("network", "connect", "third", "one")
    facts["connect"] = interfaces(lab, "one")
    facts["taken"] = lab.refusal("network", "connect", "--driver-opt", f"{name}=eth0", "other", "two") != ""
    return facts


# ------------------------------------------------------------------------------------------------------ P32 compose

COMPOSE = """
services:
  web:
    image: busybox
    container_name: web
    command: ["nc", "-ll", "-p", "80", "-e", "printf", "web"]
    stop_signal: KILL
    ports: ["8080:80", "127.0.0.1:8081:80"]
    networks:
      front:
        ipv4_address: 10.32.1.9
        ipv6_address: fd32::9
        aliases: [site]
      back: {}
  database:
    image: busybox
    container_name: database
    command: ["nc", "-ll", "-p", "80", "-e", "printf", "database"]
    stop_signal: KILL
    ports: ["8082:80"]
    networks: [back]
networks:
  front:
    name: front
    driver: DRIVER
    enable_ipv6: true
    driver_opts:
      com.docker.network.driver.mtu: "1400"
      com.docker.network.bridge.enable_icc: "true"
    ipam:
      config:
        - subnet: 10.32.1.0/24
          gateway: 10.32.1.254
        - subnet: fd32::/64
  back:
    name: back
    driver: DRIVER
    internal: true
"""


class Project:
    """A folder with a compose file, and its commands."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        folder = lab.engine.run_folder / "project"
        folder.mkdir(exist_ok=True)
        (folder / "docker-compose.yml").write_text(COMPOSE.replace("DRIVER", lab.driver))
        lab.defer(lambda: subprocess.run(["rm", "-r", str(folder)], check=True))

    def __call__(self, *arguments: str) -> str:
        """Run ``docker-compose`` where the engine's own one is; raises `EngineError` if it fails."""
        engine = self._lab.engine
        command = [*engine._engine_prefix(), "docker-compose", "-f", "/run/project/docker-compose.yml", *arguments]
        done = engine._run(command, 120)
        if done.returncode != 0:
            raise EngineError(f"docker-compose {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout


@row(
    "P32",
    "a project with two networks and published ports",
    {
        "published": ["web", "web"],
        "on loopback only": ["web", False],
        "internal is not published": False,
        "by name": "database",
        "alias": True,
        "address": ["10.32.1.9", "fd32::9"],
        "mtu": 1400,
        "default routes": ["gateway of front"],
        "database outbound": False,
        "web outbound": "host",
        "up again": "web",
        "restart": "web",
        "down leaves": [],
    },
)
def test_p32_compose(lab: Lab) -> Facts:
    before = state_of_host(lab.engine)
    compose = Project(lab)
    compose("up", "-d")
    lab.serve(OUTSIDE, "tcp 4000")
    eventually(lab, OUTSIDE, tcp(ENGINE_ADDRESS_6, 8080))
    seen = lab.survey(
        {
            "published": (OUTSIDE, tcp(ENGINE_ADDRESS, 8080)),
            "published IPv6": (OUTSIDE, tcp(ENGINE_ADDRESS_6, 8080)),
            "loopback": (HOST, tcp("127.0.0.1", 8081)),
            "not on loopback": (OUTSIDE, tcp(ENGINE_ADDRESS, 8081)),
            "internal": (OUTSIDE, tcp(ENGINE_ADDRESS, 8082)),
            "database outbound": ("database", ping(OUTSIDE_ADDRESS)),
            "web outbound": ("web", tcp(OUTSIDE_ADDRESS, 4000)),
        }
    )
    facts: Facts = {
        "published": [seen["published"].by, seen["published IPv6"].by],
        "on loopback only": [seen["loopback"].by, bool(seen["not on loopback"])],
        "internal is not published": bool(seen["internal"]),
        "by name": lab.exec("web", "timeout", "20", "nc", "database", "80").stdout.strip(),
        "alias": lab.exec("web", "timeout", "20", "nslookup", "site").returncode == 0,
        "address": [lab.address("web", "front"), lab.address("web", "front", 6)],
        "mtu": lab.link(interface_of(lab, "web", "front"), "web")["mtu"],
        "default routes": default_routes(lab, "web"),
        "database outbound": bool(seen["database outbound"]),
        "web outbound": lab.who(seen["web outbound"].peer),
    }
    compose("up", "-d", "--force-recreate", "--timeout", "1", "web")
    facts["up again"] = eventually(lab, OUTSIDE, tcp(ENGINE_ADDRESS, 8080))
    compose("restart", "--timeout", "1")
    facts["restart"] = eventually(lab, OUTSIDE, tcp(ENGINE_ADDRESS, 8080))
    compose("down", "--timeout", "1")
    facts["down leaves"] = settled(lab, before)
    return facts
