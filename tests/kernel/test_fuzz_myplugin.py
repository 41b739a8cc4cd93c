"""Fuzzers against the whole plugin: of thousands of requests nothing is left, nor made that was not asked for.

A failure prints what was asked; malformed bytes are repeated by NETPLUGIN_FUZZ_SEED.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from netplugin_sdk.core.plugin import Answer

from ..patience import PATIENCE
from ..unit import test_fuzz
from ..unit.serving import Client, Reply, connect_unix, open_files, post, tasks, wait_for
from ..unit.test_fuzz import JSON, dribble, fuzz, go_away, is_good, places
from ..volume import volume
from .lab import SYSCTLS, run

CONVERSATIONS = volume(25, 100)
"""With each way to write the firewall; of 16 requests each."""
MALFORMED = volume(250, 1_000)
"""Requests that are none, with each."""
EVERY = volume(3, 1)
"""Of the nasty values, counted over all places of a request: each place gets some, and each value has its turn."""

SERVE = """
import sys
root, backend, socket_path, state = sys.argv[1:]
sys.path[0] = root
from myplugin.driver import BridgeDriver
from netplugin_sdk import serve
from netplugin_sdk.linux import firewall
from tests.unit.anything import LIMITS
firewall.use(backend)
places = {"socket_path": socket_path, "state": state, "docker": None}
serve(BridgeDriver(), name="fuzz", limits=LIMITS, log_level="WARNING", **places)
"""

KERNEL = re.compile(
    r"(bridge|veth|interface|sysctl) \S+: cannot |netlink socket: |firewall: |listen (tcp|udp|sctp)[46] "
)
"""How the text of a 500 begins that is the kernel's own refusal."""


# -------------------------------------------------------------------------------------------------- what is asked for

NETWORK, OTHER = "a1" * 32, "b2" * 32
ENDPOINTS = ("c3" * 32, "d4" * 32)

WORDS = (
    *("$(touch canary)", "`touch canary`", "x;touch canary;", "|touch canary", "&touch canary", "\ntouch canary\n"),
    *("../canary", "../../../../tmp/canary", "/canary", ".", "..", "a/b", "%d", "br%d", "%s%n", "*", "?", "+", "br+"),
    *("-j", "--flush", "-F", "br -j ACCEPT", "br\n-A INPUT -j ACCEPT", 'br" -j ACCEPT', "br' -j ACCEPT", "\\", '"'),
    *("} flush ruleset; {", 'br" accept comment "', "#", "br\ttab", "br\0nul", "\u202ebr", "ü" * 7, "ü" * 8, "x" * 16),
    *("", " ", "lo", "all", "default", "NETPLUGIN", "x" * 300, "=", "@", "a=b@c", "br:1", "\U0001f600", "\x7f", "١٤٠٠"),
)
NUMBERS: tuple[Any, ...] = (-1, 0, 1, 2**16, 2**31, 2**63, 2**64, 10**40, 1.5, 1e300, True, None, "80", "", [], {})
ADDRESSES = (
    *("0.0.0.0", "127.0.0.1", "255.255.255.255", "224.0.0.1", "203.0.113.7", "::", "::1", "fe80::1", "ff02::1"),
    *("fe80::1%lo", "fe80::1%$(touch canary)", "fe80::1%\n-j", "::ffff:10.9.0.1", "010.1.1.1", "1.2.3", "1.2.3.4.5"),
    *("fe80::1%\0", "fe80::1%" + "x" * 100, "::1%1"),
)
INTERFACES = (
    *(f"{address}/{length}" for address in ADDRESSES for length in (0, 24, 64, 128, 129)),
    *("10.9.0.1", "10.9.0.1/", "10.9.0.1/-1", "10.9.0.1/024", "10.9.0.1/255.255.255.0", "10.9.0.1/0.0.0.255"),
    *("10.9.0.0/24", "10.9.0.255/24", "fd09::/64", "10.9.0.1/31", "10.9.0.1/32", "fd09::1/127", "fd09::1/128"),
)
DOCKER = "com.docker.network"
OPTIONS: dict[str, tuple[str, ...]] = {
    f"{DOCKER}.bridge.name": ("fuzz0", "fuzz.1", "a=b@c", ""),
    f"{DOCKER}.driver.mtu": ("1400", "1280", "0", "68", "65535"),
    f"{DOCKER}.bridge.enable_icc": ("true", "false"),
    f"{DOCKER}.bridge.enable_ip_masquerade": ("true", "false"),
    f"{DOCKER}.host_ipv4": ("192.0.2.1", "127.0.0.1"),
    f"{DOCKER}.host_ipv6": ("2001:db8::1", "::1"),
    f"{DOCKER}.bridge.gateway_mode_ipv4": ("nat", "nat-unprotected", "routed", "isolated"),
    f"{DOCKER}.bridge.gateway_mode_ipv6": ("nat", "nat-unprotected", "routed", "isolated"),
    f"{DOCKER}.bridge.host_binding_ipv4": ("127.0.0.1", "0.0.0.0"),
    f"{DOCKER}.bridge.trusted_host_interfaces": ("lo", "eth0:eth1", "fuzz9"),
    f"{DOCKER}.bridge.inhibit_ipv4": ("true", "false"),
    f"{DOCKER}.container_iface_prefix": ("eth", "net", "ü"),
}


def mostly(*good: Any, nasty: tuple[Any, ...] = WORDS) -> st.SearchStrategy[Any]:
    """One of the good values, or now and then a nasty one."""
    times = 7 if nasty in (ADDRESSES, INTERFACES) else 40
    return st.sampled_from((*good * (times * len(nasty) // len(good) + 1), *nasty))


GENERIC = st.lists(st.sampled_from(sorted(OPTIONS)), max_size=4, unique=True).flatmap(
    lambda keys: st.fixed_dictionaries({key: mostly(*OPTIONS[key]) for key in keys})
)


def pool(*good: tuple[str, str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.sampled_from(good).flatmap(
        lambda chosen: st.fixed_dictionaries(
            {
                "AddressSpace": mostly("LocalDefault"),
                "Pool": mostly(chosen[0], nasty=INTERFACES),
                "Gateway": mostly(chosen[1], nasty=INTERFACES),
            },
            optional={
                "AuxAddresses": st.dictionaries(
                    mostly("DefaultGatewayIPv4", "host"), mostly(chosen[1], nasty=INTERFACES)
                )
            },
        )
    )


PORT_MAP = st.lists(
    st.fixed_dictionaries(
        {
            "Proto": mostly(6, 17, 132, nasty=NUMBERS),
            "IP": mostly("", "10.9.0.2", nasty=ADDRESSES),
            "Port": mostly(80, 443, 53, 65535, nasty=NUMBERS),
            "HostIP": mostly("", "0.0.0.0", "127.0.0.1", "::1", nasty=ADDRESSES),
            "HostPort": mostly(0, 8080, 8081, 65535, nasty=NUMBERS),
            "HostPortEnd": mostly(0, 8080, 8090, 65535, nasty=NUMBERS),
        }
    ),
    max_size=4,
)
ENDPOINT_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        f"{DOCKER}.portmap": PORT_MAP,
        f"{DOCKER}.endpoint.exposedports": st.lists(
            st.fixed_dictionaries({"Proto": mostly(6, 17, nasty=NUMBERS), "Port": mostly(80, 81, nasty=NUMBERS)}),
            max_size=3,
        ),
        f"{DOCKER}.endpoint.macaddress": mostly("AkIKCQAC"),
        f"{DOCKER}.driver.private.no_proxy_6to4": mostly(True, False, nasty=NUMBERS),
        "canary": mostly("x"),
    },
)
IN_A_NETWORK = {"NetworkID": mostly(*[NETWORK] * 8, OTHER)}
OF_AN_ENDPOINT = {**IN_A_NETWORK, "EndpointID": mostly(*ENDPOINTS)}
REQUESTS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "CreateNetwork": st.fixed_dictionaries(
        {
            **IN_A_NETWORK,
            "Options": st.fixed_dictionaries(
                {f"{DOCKER}.enable_ipv6": mostly(True, False, nasty=NUMBERS), f"{DOCKER}.generic": GENERIC},
                optional={f"{DOCKER}.internal": mostly(True, False, nasty=NUMBERS)},
            ),
            "IPv4Data": st.lists(pool(("10.9.0.0/24", "10.9.0.1/24"), ("10.8.0.0/16", "10.8.0.1/16")), max_size=2),
            "IPv6Data": st.lists(pool(("fd09::/64", "fd09::1/64")), max_size=1),
        }
    ),
    "CreateEndpoint": st.fixed_dictionaries(
        {
            **OF_AN_ENDPOINT,
            "Interface": st.fixed_dictionaries(
                {
                    "Address": mostly("10.9.0.2/24", "10.9.0.3/24", "", nasty=INTERFACES),
                    "AddressIPv6": mostly("fd09::2/64", "", nasty=INTERFACES),
                    "MacAddress": mostly("02:42:0a:09:00:02", "", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"),
                }
            ),
            "Options": ENDPOINT_OPTIONS,
        }
    ),
    "Join": st.fixed_dictionaries(
        {**OF_AN_ENDPOINT, "SandboxKey": mostly("/run/docker/netns/1"), "Options": ENDPOINT_OPTIONS}
    ),
    "ProgramExternalConnectivity": st.fixed_dictionaries({**OF_AN_ENDPOINT, "Options": ENDPOINT_OPTIONS}),
    "GwAllocCheck": st.fixed_dictionaries({"Options": st.fixed_dictionaries({f"{DOCKER}.generic": GENERIC})}),
    **{
        method: st.fixed_dictionaries(OF_AN_ENDPOINT)
        for method in ("RevokeExternalConnectivity", "EndpointOperInfo", "Leave", "DeleteEndpoint")
    },
    "DeleteNetwork": st.fixed_dictionaries(IN_A_NETWORK),
}
"""What an engine sends, and what it might."""


@st.composite
def requests(draw: st.DrawFn, *methods: str) -> tuple[str, bytes]:
    method = draw(st.sampled_from(methods))
    content: Any = draw(REQUESTS[method])
    if draw(st.sampled_from(range(20))) == 0:  # of another type, too
        container, key = draw(st.sampled_from(list(places(content))))
        container[key] = draw(JSON)
    return method, json.dumps(content).encode()


def rounds(*methods: str, times: int) -> st.SearchStrategy[list[tuple[str, bytes]]]:
    return st.lists(requests(*methods), min_size=times, max_size=times)


LATER = [method for method in REQUESTS if method != "CreateEndpoint"]
"""No engine gives the id of an endpoint twice. BUG: one that is made again before the rest of its deletion is lost."""
CONVERSATION = st.tuples(
    rounds("CreateNetwork", times=3),
    rounds("CreateEndpoint", times=3),
    rounds("Join", "ProgramExternalConnectivity", times=4),
    rounds(*LATER, times=4),
    rounds("Join", "ProgramExternalConnectivity", "EndpointOperInfo", "Leave", times=2),
).map(lambda parts: [request for part in parts for request in part])


NETWORK_REQUEST: dict[str, Any] = {
    "NetworkID": NETWORK,
    "Options": {
        f"{DOCKER}.enable_ipv6": True,
        f"{DOCKER}.generic": {name: values[0] for name, values in OPTIONS.items()},
        f"{DOCKER}.internal": False,
    },
    "IPv4Data": [
        {
            "Pool": "10.9.0.0/24",
            "Gateway": "10.9.0.1/24",
            "AuxAddresses": {"DefaultGatewayIPv4": "10.9.0.9/24"},
        }
    ],
    "IPv6Data": [{"Pool": "fd09::/64", "Gateway": "fd09::1/64"}],
}
PUBLISHED = {"Proto": 6, "IP": "10.9.0.2", "Port": 80, "HostIP": "127.0.0.1", "HostPort": 8080, "HostPortEnd": 8081}
OPTIONS_REQUEST = {
    f"{DOCKER}.portmap": [PUBLISHED],
    f"{DOCKER}.endpoint.exposedports": [{"Proto": 6, "Port": 80}],
    f"{DOCKER}.endpoint.macaddress": "AkIKCQAC",
    f"{DOCKER}.driver.private.no_proxy_6to4": False,
}
INTERFACE_REQUEST = {"Address": "10.9.0.2/24", "AddressIPv6": "fd09::2/64", "MacAddress": "02:42:0a:09:00:02"}


def nasty_for(good: Any) -> tuple[Any, ...]:
    if not isinstance(good, str):
        return NUMBERS
    return INTERFACES if "/" in good else ADDRESSES + WORDS if good.count(".") == 3 else WORDS


def substituted(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The request with each of its values replaced by nasty ones, in turn."""
    request, number = copy.deepcopy(request), count()
    for container, key in list(places(request)):
        good = container[key]
        for value in nasty_for(good):
            if next(number) % EVERY == 0:
                container[key] = value
                yield request
        container[key] = good


# ------------------------------------------------------------------------------------------------ what is there of it

COMMENT = re.compile(
    r'"netplugin_sdk:(?:[\w.@=-]+(?: network [0-9A-Za-z]{12})?(?: endpoint [0-9A-Za-z]{12})?)"', re.ASCII
)
INTERFACE = re.compile(r'(?:-[io]|[io]ifname(?: !=)?) "?([^" ]+)"?')
TOKEN = re.compile(r'[\w.:@=/,!\[\]-]+|"[\w.@=-]+"|[{}]|\S+;', re.ASCII)
CHAIN = re.compile(r":(DOCKER-USER|NETPLUGIN(_OUT|-([\w.@=-]+))?) - ", re.ASCII)
STRUCTURE = re.compile(
    r"""\tchain \w+ \{|\t\}|\}|\t\ttype (filter|nat) hook \w+ priority [\w +-]+; policy accept;|"""
    r"""\t\t[io]ifname "[^"]+" jump (into|out)|\t\tfib daddr type local jump publish|\t\tip6? daddr [0-9.:/]+ return"""
)


class Plugin(NamedTuple):
    """The process under test, and what there is of it."""

    process: subprocess.Popen[bytes]
    folder: Path
    backend: str

    @property
    def path(self) -> Path:
        return self.folder / "s.sock"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def ask(self, client: Client, method: str, body: bytes) -> Reply:
        client.send(post(body, method=f"NetworkDriver.{method}"))
        return client.receive()

    def must(self, client: Client, method: str, request: dict[str, Any]) -> None:
        reply = self.ask(client, method, json.dumps(request).encode())
        assert reply.status == 200, reply

    def links(self) -> set[str]:
        return {link["ifname"] for link in json.loads(run("ip", "-json", "link"))}

    def rules(self) -> list[str]:
        saves = (
            [("nft", "list", "ruleset")] if self.backend == "nftables" else [("iptables-save",), ("ip6tables-save",)]
        )
        lines = (line for save in saves for line in run(*save).splitlines())
        return [re.sub(r"\[\d+:\d+\]$", "", line) for line in lines if line and not line.startswith("#")]

    def ids(self) -> list[str]:
        """Of the networks on disk; from a copy, since the plugin holds the file."""
        copy = shutil.copytree(self.folder / "state", self.folder / "copy")
        db = sqlite3.connect(copy / "state.db")
        found = [id_ for (id_,) in db.execute("SELECT id FROM networks UNION ALL SELECT network_id FROM endpoints")]
        db.close()
        shutil.rmtree(copy)
        return found

    def held(self) -> tuple[int, Counter[str]]:
        """How many threads, and how many descriptors of each kind."""
        files = Counter[str]()
        for name, number in open_files(self.process.pid).items():
            files[name.partition(":")[0]] += number
        return len(tasks(self.process.pid)), files


def foreign(rules: list[str], before: list[str], bridges: set[str], others: set[str]) -> list[str]:
    """Lines that are no rules for these bridges. `others` are interfaces that they may name besides."""
    found, table_is_ours = [], False
    for line in rules:
        rest = COMMENT.sub("", line)
        ours = rest != line and line.startswith(("-A", "\t\t"))
        if line.startswith("table "):
            names = {f"table inet netplugin-{name.replace('@', '/40').replace('=', '/3d')} {{" for name in bridges}
            ours = table_is_ours = line in names
        elif chain := CHAIN.fullmatch(line):
            ours = chain[3] is None or chain[3] in bridges
        elif STRUCTURE.fullmatch(line) and table_is_ours:
            ours = True
        clean = all(TOKEN.fullmatch(token) for token in rest.split())
        if ours:
            ours = clean and set(INTERFACE.findall(rest)) <= bridges | others
        if not ours and line not in before and not line.startswith("*"):
            found.append(line)
    return found


@contextmanager
def serving(folder: Path, backend: str) -> Iterator[Plugin]:
    """myplugin in a process of its own, in the namespace of the test. What it writes without a path is in ``cwd``."""
    (folder / "cwd").mkdir()
    arguments = (backend.partition("-")[0], str(folder / "s.sock"), str(folder / "state"))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            (sys.executable, "-c", SERVE, str(Path(__file__).parents[2]), *arguments), cwd=folder / "cwd", stderr=log
        )
    plugin = Plugin(process, folder, backend)
    try:
        wait_for(lambda: process.poll() is not None or is_good(plugin.path), "the plugin")
        yield plugin
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(PATIENCE)


def check(answer: Answer | Reply) -> None:
    """A refusal is the SDK's or the kernel's, and no bug."""
    content = json.loads(answer.body)
    if answer.status != 200:
        assert content["Err"] == content["Error"]
        assert "\n" not in content["Err"]
        expected = answer.status in (400, 404, 405, 408, 409, 413, 422, 431)
        assert expected or (answer.status == 500 and KERNEL.match(content["Err"])), content


def sysctls() -> dict[str, str]:
    """All that can be set and stays."""
    found = {}
    for file in SYSCTLS.rglob("*"):
        with suppress(OSError):
            if file.is_file() and file.stat().st_mode & 0o200 and not file.name.endswith(("_max", "flush")):
                found[str(file)] = file.read_text()
    return found


def connected(path: Path) -> bool:
    """Whether the plugin has a connection on this socket."""
    lines = Path("/proc/thread-self/net/unix").read_text().splitlines()
    return any(line.endswith(f" {path}") and line.split()[5] == "03" for line in lines)


@contextmanager
def leaving_nothing(plugin: Plugin) -> Iterator[None]:
    """Whatever is asked inside, afterwards there is what was there before; then the plugin ends."""
    links, rules = plugin.links(), plugin.rules()

    def gone() -> bool:
        return (plugin.ids(), plugin.links(), plugin.rules()) == ([], links, rules)

    with connect_unix(plugin.path) as client:
        for _ in range(4):  # what a plugin keeps for ever, with a socket for each of the threads that speak netlink
            at = {"NetworkID": OTHER, "EndpointID": ENDPOINTS[0]}
            plugin.must(client, "CreateNetwork", {**NETWORK_REQUEST, **at})
            plugin.must(client, "CreateEndpoint", {**at, "Interface": INTERFACE_REQUEST})
            plugin.must(client, "Join", {**at, "SandboxKey": "/run/netns/1"})
            plugin.must(client, "ProgramExternalConnectivity", {**at, "Options": OPTIONS_REQUEST})
            plugin.must(client, "DeleteNetwork", at)
    wait_for(gone, "what was made once to go")
    wait_for(lambda: not connected(plugin.path), "our connection to be closed")
    threads, files = plugin.held()
    yield
    wait_for(gone, f"{plugin.ids()}, {plugin.links() - links}, {set(plugin.rules()) - set(rules)} to go")
    wait_for(lambda: plugin.held()[1] == files, f"{files} to be closed")
    wait_for(lambda: plugin.held()[0] <= threads, "threads to end")
    plugin.process.send_signal(signal.SIGTERM)
    assert plugin.process.wait(PATIENCE) == 0
    assert "Traceback" not in plugin.log, plugin.log
    assert plugin.ids() == []
    made = {str(file.relative_to(plugin.folder)) for file in plugin.folder.rglob("*") if not file.is_symlink()}
    assert made == {"cwd", "log", "state", "state/lock", "state/state.db"}


class Named:
    """What may be there of the networks and endpoints that were made."""

    def __init__(self) -> None:
        self.networks: set[str] = set()
        self.links, self.others = {"lo"}, {"lo"}

    def add(self, method: str, request: dict[str, Any]) -> None:
        if method == "CreateNetwork":
            self.networks.add(request["NetworkID"])
            options = (request["Options"] or {}).get(f"{DOCKER}.generic") or {}
            self.links.add(options.get(f"{DOCKER}.bridge.name") or f"br-{request['NetworkID'][:12]}")
            self.others.update(options.get(f"{DOCKER}.bridge.trusted_host_interfaces", "").split(":"))
        elif method == "CreateEndpoint":
            self.links.update(f"{end}-{request['EndpointID'][:12]}" for end in ("ve", "vc"))

    def check(self, plugin: Plugin, before: list[str]) -> None:
        """Only while there is a network: else something of the last one may be on its way out."""
        assert plugin.links() <= self.links
        assert foreign(plugin.rules(), before, self.links, self.others) == []


def converse(plugin: Plugin, asked: list[tuple[str, bytes]], rules: list[str], counted: Counter[str]) -> None:
    """One conversation, from nothing to nothing."""
    named = Named()
    with connect_unix(plugin.path) as client:
        for method, body in asked:
            reply = plugin.ask(client, method, body)
            note(f"{method} {body!r}: {reply.status} {reply.body!r}")
            counted[f"{method} {reply.status}"] += 1
            check(reply)
            if reply.status == 200:
                named.add(method, json.loads(body))
        if named.networks:
            named.check(plugin, rules)
        for network in named.networks:
            plugin.must(client, "DeleteNetwork", {"NetworkID": network})
    assert plugin.process.poll() is None, plugin.log
    assert "Traceback" not in plugin.log, plugin.log


def malformed(plugin: Plugin) -> Counter[str]:
    """Bytes that are no request, or hardly; then what they made is deleted."""
    with ThreadPoolExecutor(6) as clients:
        working = [clients.submit(fuzz, plugin.path, number, MALFORMED // 2) for number in range(2)]
        dribbling = [clients.submit(dribble, plugin.path, number) for number in range(4)]
        for number in range(100):
            go_away(plugin.path, number)
        for done in dribbling:
            done.result(2 * PATIENCE)
        counted = sum((done.result(10 * PATIENCE) for done in working), Counter[str]())
    with connect_unix(plugin.path) as client:
        for network in plugin.ids():
            plugin.must(client, "DeleteNetwork", {"NetworkID": network})
    return counted


def test_nothing_is_made_that_was_not_asked_for_and_nothing_is_left(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_fuzz, "check", check)
    counted, parameters = Counter[str](), sysctls()
    with serving(tmp_path, backend) as plugin:
        rules = plugin.rules()

        @settings(
            max_examples=CONVERSATIONS,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
            report_multiple_bugs=False,
        )
        @given(CONVERSATION)
        def all_conversations(asked: list[tuple[str, bytes]]) -> None:
            converse(plugin, asked, rules, counted)

        with leaving_nothing(plugin):
            all_conversations()
            counted.update(malformed(plugin))
    print(sorted(counted.items()))
    assert sysctls() == parameters


@pytest.mark.parametrize("backend", ["iptables-nft"], indirect=True)
def test_each_value_of_each_request_may_be_any(backend: str, tmp_path: Path) -> None:
    counted, parameters = Counter[str](), sysctls()
    with serving(tmp_path, backend) as plugin, leaving_nothing(plugin), connect_unix(plugin.path) as client:
        rules = plugin.rules()

        def ask(method: str, request: dict[str, Any]) -> bool:
            reply = plugin.ask(client, method, json.dumps(request).encode())
            counted[f"{method} {reply.status}"] += 1
            check(reply)
            return reply.status == 200

        for request in substituted(NETWORK_REQUEST):
            if ask("CreateNetwork", request):
                named = Named()
                named.add("CreateNetwork", request)
                named.check(plugin, rules)
                plugin.must(client, "DeleteNetwork", request)

        plugin.must(client, "CreateNetwork", NETWORK_REQUEST)
        there = {"NetworkID": NETWORK}
        for number, request in enumerate(
            substituted({**there, "EndpointID": "", "Interface": INTERFACE_REQUEST, "Options": OPTIONS_REQUEST})
        ):
            at = {**there, "EndpointID": request["EndpointID"] or f"{number:012x}"}  # no engine gives one twice
            if ask("CreateEndpoint", {**request, **at}):
                ask("Join", {**at, "SandboxKey": "/run/netns/1"})
                ask("ProgramExternalConnectivity", {**at, "Options": request["Options"]})
                plugin.must(client, "DeleteEndpoint", at)

        at = {**there, "EndpointID": ENDPOINTS[0]}
        plugin.must(client, "CreateEndpoint", {**at, "Interface": INTERFACE_REQUEST})
        for method, opposite, more in (
            ("Join", "Leave", {"SandboxKey": "/run/netns/1"}),
            ("ProgramExternalConnectivity", "RevokeExternalConnectivity", {}),
        ):
            for request in substituted({**at, "Options": OPTIONS_REQUEST, **more}):
                if ask(method, request):
                    plugin.must(client, opposite, at)
        plugin.must(client, "DeleteNetwork", there)
    print(sorted(counted.items()))
    assert sysctls() == parameters
