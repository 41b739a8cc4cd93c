"""What really gets through: a host with bridges, containers on them, and a world outside that has routes to them."""

from __future__ import annotations

import errno
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import ip_address, ip_interface, ip_network
from itertools import cycle

import pytest

from netplugin_sdk.linux import firewall, links
from netplugin_sdk.linux.firewall import Mode, Policy
from netplugin_sdk.linux.ports import Published
from netplugin_sdk.testing.engine import wait_until
from netplugin_sdk.values import IPNetwork, TransportProtocol

from ..patience import PATIENCE
from .lab import SYSCTLS, Namespace, run

BR_NETFILTER = (SYSCTLS / "bridge").exists()
"""Without it, what goes from port to port of one bridge is seen by no firewall."""

fast = pytest.mark.parametrize("backend", ["iptables-nft", "nftables"], indirect=True)

HOST, HOST6, OUTSIDE, OUTSIDE6 = "192.0.2.1", "fd00:ff::1", "192.0.2.2", "fd00:ff::2"


def subnets(number: int) -> tuple[IPNetwork, IPNetwork]:
    return ip_network(f"10.{number}.0.0/24"), ip_network(f"fd00:{number}::/64")


def port(protocol: str, host: str, host_port: int, address: str, number: int) -> Published:
    return Published(
        protocol=TransportProtocol[protocol.upper()],
        host_address=ip_address(host),
        host_port=host_port,
        address=ip_address(address),
        port=number,
    )


PUBLISHED = {
    "web": (
        port("tcp", "0.0.0.0", 8080, "10.1.0.2", 80),
        port("udp", "0.0.0.0", 8080, "10.1.0.2", 80),
        port("tcp", "::", 8080, "fd00:1::2", 80),
        port("udp", "::", 8080, "fd00:1::2", 80),
        port("tcp", "127.0.0.1", 8081, "10.1.0.2", 81),  # the relay's
    )
}


def policy(number: int = 1, *, bridge: str = "", **fields: object) -> Policy:
    return Policy(bridge=bridge or f"br-{number}", **({"subnets": subnets(number)} | fields))  # type: ignore[arg-type]


class Server:
    """On ports 80 and 81, TCP and UDP, IPv4 and IPv6, whoever asks is told by which address it is known."""

    def __init__(self, namespace: Namespace) -> None:
        self._sockets = namespace.call(lambda: [self._socket(kind, number) for kind in _KINDS for number in (80, 81)])
        self._end, self._ended = socket.socketpair()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @staticmethod
    def _socket(kind: str, number: int) -> socket.socket:
        made = socket.socket(socket.AF_INET6, _KINDS[kind])
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        made.bind(("::", number))
        if kind == "tcp":
            made.listen()
        return made

    def _serve(self) -> None:
        while True:
            for ready in select.select([self._ended, *self._sockets], [], [])[0]:
                if ready is self._ended:
                    return
                with suppress(OSError):
                    if ready.type == socket.SOCK_STREAM:
                        client, address = ready.accept()
                        with client:
                            client.send(_plain(address[0]))
                    else:
                        _, address = ready.recvfrom(16)
                        ready.sendto(_plain(address[0]), address)

    def close(self) -> None:
        self._end.close()
        self._thread.join()
        for each in (self._ended, *self._sockets):
            each.close()


_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


def _plain(address: str) -> bytes:
    return address.removeprefix("::ffff:").encode()


_ports = cycle(range(20_000, 60_000))


def ask(client: Namespace | None, *targets: str, within: float = 0.1) -> dict[str, str]:
    """Those of these servers (such as ``tcp 192.0.2.1 80``) that answer, and by which address they know the client.

    All are asked at once. Without a namespace it is the host that asks.
    """

    def go() -> dict[str, str]:
        answers: dict[str, str] = {}
        asked: dict[int, tuple[str, socket.socket]] = {}
        poll = select.poll()
        for target in targets:
            kind, address, number = target.split()
            made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, _KINDS[kind])
            _bind(made)
            made.setblocking(False)
            made.connect_ex((address, int(number)))
            if kind == "udp":
                with suppress(OSError):
                    made.send(b"hello")
            asked[made.fileno()] = target, made
            poll.register(made, select.POLLIN)
        end = time.monotonic() + within
        while len(answers) < len(targets) and (left := end - time.monotonic()) > 0 and asked:
            for fd, _ in poll.poll(left * 1000):
                target, made = asked.pop(fd)
                poll.unregister(fd)
                with made, suppress(OSError):
                    answers[target] = made.recv(64).decode()
        for _, made in asked.values():
            made.close()
        return answers

    return go() if client is None else client.call(go)


def _bind(client: socket.socket) -> None:
    """To a port that it had not before: an earlier flow of the same ports is tracked, and passes whatever the rules."""
    for port in _ports:
        try:
            client.bind(("", port))
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise


def answers(client: Namespace | None, *targets: str) -> dict[str, str]:
    """As `ask`, until all have answered: a link that is new carries nothing yet."""
    found: dict[str, str] = {}
    until = time.monotonic() + PATIENCE
    while len(found) < len(targets) and time.monotonic() < until:
        found |= ask(client, *(target for target in targets if target not in found), within=1.5)
    return found


def reached(client: Namespace | None, *targets: str) -> bool:
    """Whether all answer; they have time."""
    return answers(client, *targets).keys() == set(targets)


def both(address4: str, address6: str, number: int) -> list[str]:
    return [f"{kind} {address} {number}" for kind in _KINDS for address in (address4, address6)]


def _without_dad() -> None:
    """A new interface has its link-local address, and so can ask for its neighbours, at once and not after 2 s."""
    (SYSCTLS / "ipv6/conf/default/accept_dad").write_text("0")
    (SYSCTLS / "ipv6/conf/default/dad_transmits").write_text("0")


class Site:
    def __init__(self, namespace: Callable[[], Namespace]) -> None:
        self._namespace = namespace
        self._servers: list[Server] = []
        _without_dad()
        self.outside = self._machine()
        links.ensure_veth("uplink", "far")
        run("ip", "address", "add", f"{HOST}/24", "dev", "uplink")
        run("ip", "address", "add", f"{HOST6}/64", "dev", "uplink", "nodad")
        self.outside.adopt("far", f"{OUTSIDE}/24", f"{OUTSIDE6}/64", gateway=HOST)
        self.outside.run("ip", "route", "add", "default", "via", HOST6)

    def bridge(self, number: int, *, name: str | None = None) -> list[Namespace]:
        """A new bridge with two containers, N.2 and N.3."""
        name = name or f"br-{number}"
        gateways = [ip_interface(f"10.{number}.0.1/24"), ip_interface(f"fd00:{number}::1/64")]
        links.ensure_bridge(name, addresses=gateways, group=None if name == "docker0" else firewall.GROUP)
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(lambda host: self._container(name, number, host), (2, 3)))

    def _container(self, bridge: str, number: int, host: int) -> Namespace:
        container = self._machine()
        host_end, inside = f"ve{number}.{host}h", f"ve{number}.{host}i"
        links.ensure_veth(host_end, inside, master=bridge)
        container.adopt(inside, f"10.{number}.0.{host}/24", f"fd00:{number}::{host}/64", gateway=f"10.{number}.0.1")
        container.run("ip", "route", "add", "default", "via", f"fd00:{number}::1")
        return container

    def group(self, number: int) -> list[Namespace]:
        """Two containers, N.2 and N.3, without a bridge: the host routes between its ends of their pairs."""
        return [self._routed(number, host) for host in (2, 3)]

    def _routed(self, number: int, host: int) -> Namespace:
        container = self._machine()
        host_end, inside = f"ve{number}.{host}h", f"ve{number}.{host}i"
        gateways = [ip_interface(f"10.{number}.0.1/32"), ip_interface(f"fd00:{number}::1/128")]
        addresses = [f"10.{number}.0.{host}/32", f"fd00:{number}::{host}/128"]
        links.ensure_veth(host_end, inside)
        links.set_up(host_end, addresses=gateways, group=number)
        for address in addresses:
            links.ensure_route(ip_network(address), host_end)
        container.adopt(inside, *addresses)
        for gateway in gateways:
            container.run("ip", "route", "add", str(gateway), "dev", inside)
            container.run("ip", "route", "add", "default", "via", str(gateway.ip))
        return container

    def _machine(self) -> Namespace:
        machine = self._namespace()
        machine.call(_without_dad)
        self._servers.append(Server(machine))
        return machine

    def close(self) -> None:
        for server in self._servers:
            server.close()


@pytest.fixture
def site(backend: str, namespace: Callable[[], Namespace]) -> Iterator[Site]:  # it is there first
    made = Site(namespace)
    yield made
    made.close()


OUT = ["tcp 192.0.2.2 80", "udp fd00:ff::2 80"]
"""Some of what is outside."""
TO_1 = [*both("10.1.0.2", "fd00:1::2", 80), *both("10.1.0.2", "fd00:1::2", 81)]
"""All of the first container on br-1, by its own address."""
PUBLIC = both(HOST, HOST6, 8080)


def forward_policy(kind: str, policy: str) -> None:
    if kind != "nftables":
        for command in ("iptables", "ip6tables"):
            run(command, "-P", "FORWARD", policy)


# --------------------------------------------------------------------------------------------------- inside and outside


def test_neighbours_reach_each_other_only_with_it(site: Site, backend: str) -> None:
    _, second = site.bridge(1)
    if BR_NETFILTER and backend != "nftables":
        assert not ask(second, "tcp 10.1.0.2 80")
    firewall.ensure(policy())
    assert reached(second, *TO_1)
    assert second.reaches("10.1.0.2", "fd00:1::2")
    firewall.delete("br-1")
    if BR_NETFILTER and backend != "nftables":
        assert not ask(second, *TO_1)


@fast
def test_a_bridge_without_subnets_carries_both_families(site: Site) -> None:
    _, second = site.bridge(1)
    firewall.ensure(policy(subnets=()))
    assert reached(second, *TO_1)
    assert answers(second, *OUT) == {OUT[0]: "10.1.0.3", OUT[1]: "fd00:1::3"}, "not known what to masquerade"
    assert not ask(site.outside, *TO_1)


@fast
def test_outbound_is_masqueraded_and_inbound_does_not_begin(site: Site, backend: str) -> None:
    first, _ = site.bridge(1)
    firewall.ensure(policy())
    for forward in ("DROP", "ACCEPT"):
        forward_policy(backend, forward)
        assert answers(first, *both(OUTSIDE, OUTSIDE6, 80)) == {
            "tcp 192.0.2.2 80": HOST,
            "udp 192.0.2.2 80": HOST,
            "tcp fd00:ff::2 80": HOST6,
            "udp fd00:ff::2 80": HOST6,
        }
        assert not ask(site.outside, *TO_1)
    assert not site.outside.answering("10.1.0.2", "fd00:1::2")


@fast
def test_without_masquerade_the_container_is_seen(site: Site) -> None:
    first, _ = site.bridge(1)
    firewall.ensure(policy(masquerade=False))
    assert answers(first, *OUT) == {"tcp 192.0.2.2 80": "10.1.0.2", "udp fd00:ff::2 80": "fd00:1::2"}
    assert not ask(site.outside, *TO_1)


@fast
def test_the_source_that_was_chosen_is_seen(site: Site) -> None:
    run("ip", "address", "add", "192.0.2.9/24", "dev", "uplink")
    run("ip", "address", "add", "fd00:ff::9/64", "dev", "uplink", "nodad")
    first, _ = site.bridge(1)
    firewall.ensure(policy(sources=(ip_address("192.0.2.9"), ip_address("fd00:ff::9")), published=PUBLISHED))
    assert answers(first, *OUT) == {"tcp 192.0.2.2 80": "192.0.2.9", "udp fd00:ff::2 80": "fd00:ff::9"}
    assert reached(site.outside, *PUBLIC)


@fast
def test_internal(site: Site, backend: str) -> None:
    first, second = site.bridge(1)
    for each in (
        policy(published=PUBLISHED, internal=True),
        policy(published=PUBLISHED, mode4=Mode.ISOLATED, mode6=Mode.ISOLATED),
    ):
        firewall.ensure(policy())
        firewall.ensure(each)
        for forward in ("DROP", "ACCEPT"):
            forward_policy(backend, forward)
            with ThreadPoolExecutor(1) as thread:
                from_outside = thread.submit(ask, site.outside, *TO_1, *PUBLIC)
                assert not ask(first, *OUT)
                assert not from_outside.result()
        assert reached(second, *TO_1)


@fast
def test_without_icc(site: Site) -> None:
    first, second = site.bridge(1)
    firewall.ensure(policy(icc=False, published=PUBLISHED))
    if BR_NETFILTER:
        assert not ask(second, *TO_1)
        assert not second.answering("10.1.0.2", "fd00:1::2")
    assert reached(first, *OUT)
    assert reached(second, *OUT, *PUBLIC)
    assert reached(site.outside, *PUBLIC)


@pytest.mark.skipif(not BR_NETFILTER, reason="the kernel does not filter what is bridged: no module br_netfilter")
# ---------------------------------------------------------------------------------------- a group, without a bridge


def test_a_group_is_as_a_bridge(site: Site, backend: str) -> None:
    first, second = site.group(1)
    firewall.ensure(policy(bridge="pt-1", group=1, published=PUBLISHED))
    for forward in ("DROP", "ACCEPT"):
        forward_policy(backend, forward)
        assert reached(second, *TO_1)
        assert answers(first, *OUT) == {OUT[0]: HOST, OUT[1]: HOST6}
        assert not ask(site.outside, *TO_1)
    assert reached(site.outside, *PUBLIC)
    assert reached(second, *PUBLIC), "a neighbour by the host's address"
    firewall.ensure(policy(bridge="pt-1", group=1, internal=True))
    firewall.wait_until_applied()
    assert reached(second, *TO_1)
    assert not ask(first, *OUT)
    assert not ask(site.outside, *TO_1, *PUBLIC)
    firewall.ensure(policy(bridge="pt-1", group=1, icc=False))
    firewall.wait_until_applied()
    assert not ask(second, *TO_1)
    assert reached(second, *OUT)


@fast
def test_groups_and_bridges_do_not_reach_each_other(site: Site) -> None:
    first, _ = site.group(1)
    second, _ = site.group(2)
    on_a_bridge, _ = site.bridge(3)
    for each in (policy(3), policy(bridge="pt-1", group=1), policy(2, bridge="pt-2", group=2)):
        firewall.ensure(each)
    with ThreadPoolExecutor(3) as threads:
        asked = (
            threads.submit(ask, second, *TO_1),
            threads.submit(ask, on_a_bridge, *TO_1),
            threads.submit(ask, first, *both("10.2.0.2", "fd00:2::2", 80), *both("10.3.0.2", "fd00:3::2", 80)),
        )
        assert not any(each.result() for each in asked)
    assert all(reached(each, *OUT) for each in (first, second, on_a_bridge))


@fast
def test_without_icc_where_the_outside_is_let_in(site: Site) -> None:
    _, second = site.bridge(1)
    for mode in (Mode.ROUTED, Mode.UNPROTECTED):
        firewall.ensure(policy(icc=False, published=PUBLISHED, mode4=mode, mode6=mode))
        assert not ask(second, *TO_1)
        assert not second.answering("10.1.0.2", "fd00:1::2")
    assert reached(second, *PUBLIC)
    assert reached(site.outside, *TO_1, *PUBLIC)


# ------------------------------------------------------------------------------------------------------------ isolation


def test_two_bridges_do_not_reach_each_other_whichever_came_first(site: Site) -> None:
    on_one, on_two = site.bridge(1)[0], site.bridge(2)[0]
    firewall.ensure(policy(1))
    firewall.ensure(policy(2))
    assert not ask(on_one, *(target.replace("10.1", "10.2").replace("fd00:1", "fd00:2") for target in TO_1))
    assert not ask(on_two, *TO_1)
    assert reached(on_one, *OUT)
    assert reached(on_two, *OUT)


@fast
def test_a_published_port_is_reached_from_another_bridge_by_the_hosts_address(site: Site) -> None:
    site.bridge(1)
    on_two = site.bridge(2)[0]
    firewall.ensure(policy(1, published=PUBLISHED))
    firewall.ensure(policy(2))
    assert reached(on_two, *PUBLIC)
    assert not ask(on_two, *TO_1)
    firewall.ensure(policy(2, internal=True))
    assert not ask(on_two, *PUBLIC)


@fast
def test_a_bridge_that_lets_the_outside_in_does_not_let_in_other_bridges(site: Site) -> None:
    on_one, on_two = site.bridge(1)[0], site.bridge(2)[0]
    firewall.ensure(policy(1))
    firewall.ensure(policy(2, mode4=Mode.UNPROTECTED, mode6=Mode.UNPROTECTED))
    assert not ask(on_two, *TO_1)
    assert not ask(on_one, *(target.replace("10.1", "10.2").replace("fd00:1", "fd00:2") for target in TO_1))
    assert reached(site.outside, "tcp 10.2.0.2 80", "udp fd00:2::2 81")


@pytest.mark.parametrize(
    ("backend", "chain"),
    [
        ("iptables-nft", "DOCKER-ISOLATION-STAGE-2"),
        ("iptables-nft", "DOCKER-BRIDGE"),
        ("iptables-legacy", "DOCKER-BRIDGE"),
    ],
    indirect=["backend"],
)
def test_dockers_own_bridges_and_ours(site: Site, chain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an engine that starts after us."""
    monkeypatch.setattr(firewall.keeper, "poll", 0.1)
    ours, dockers = site.bridge(1)[0], site.bridge(2, name="docker0")[0]
    firewall.ensure(policy())
    for command in ("iptables", "ip6tables"):
        run(command, "-D", "FORWARD", "-m", "comment", "--comment", "netplugin_sdk:DOCKER-USER", "-j", "DOCKER-USER")
        run(command, "-I", "FORWARD", "-j", "DOCKER-USER")
        run(command, "-N", chain)
        run(command, "-A", chain, "-o", "docker0", "-j", "DROP")
        run(command, "-A", "FORWARD", "-i", "docker0", "!", "-o", "docker0", "-j", "ACCEPT")
        run(command, "-A", "FORWARD", "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT")
    wait_until(lambda: all(f"-j {chain}" in run(f"{command}-save") for command in ("iptables", "ip6tables")), PATIENCE)
    assert not ask(dockers, *TO_1)
    assert not ask(ours, *both("10.2.0.2", "fd00:2::2", 80))
    assert reached(ours, *OUT)
    assert reached(dockers, "tcp 192.0.2.2 80")
    # A port that Docker has published.
    run("iptables", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "99", "-j", "DNAT", "--to", "10.2.0.2:80")
    run("iptables", "-I", chain, "-d", "10.2.0.2", "-p", "tcp", "--dport", "80", "-j", "ACCEPT")
    assert reached(ours, f"tcp {HOST} 99")


@pytest.mark.parametrize("backend", ["nftables"], indirect=True)
def test_dockers_own_bridges_where_it_writes_with_nft(site: Site) -> None:
    ours, dockers = site.bridge(1)[0], site.bridge(2, name="docker0")[0]
    for family in ("ip", "ip6"):
        chain = "filter-FORWARD { type filter hook forward priority filter; policy accept; }"
        run("nft", f"add table {family} docker-bridges; add chain {family} docker-bridges {chain}")
        run("nft", f"add rule {family} docker-bridges filter-FORWARD ct state established,related accept")
        run("nft", f"add rule {family} docker-bridges filter-FORWARD iifname != docker0 oifname docker0 drop")
    firewall.use(None)
    firewall.ensure(policy())
    assert "table inet netplugin-br-1" in run("nft", "list", "tables"), "found out by itself"
    assert not ask(dockers, *TO_1)
    assert not ask(ours, *both("10.2.0.2", "fd00:2::2", 80))
    assert reached(ours, *OUT)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("backend", ["iptables-nft"], indirect=True)
def test_a_users_drop_wins(site: Site, old: bool) -> None:
    first, _ = site.bridge(1)
    run("iptables", "-N", "DOCKER-USER")
    run("iptables", "-I", "FORWARD", "-j", "DOCKER-USER")
    if old:
        run("iptables", "-A", "DOCKER-USER", "-j", "RETURN")
    run("iptables", "-I", "DOCKER-USER", "-d", OUTSIDE, "-j", "DROP")
    firewall.ensure(policy())
    assert not ask(first, f"tcp {OUTSIDE} 80")
    assert reached(first, f"tcp {OUTSIDE6} 80", "tcp 10.1.0.3 80")
    # One that is added behind ours takes effect as well.
    run("iptables", "-D", "DOCKER-USER", "-d", OUTSIDE, "-j", "DROP")
    run("iptables", "-A", "DOCKER-USER", "-d", "192.0.2.0/24", "-p", "udp", "-j", "DROP")
    wait_until(lambda: not ask(first, f"udp {OUTSIDE} 80") or old, PATIENCE)
    assert reached(first, f"tcp {OUTSIDE} 80")


# ------------------------------------------------------------------------------------------------------ published ports


def test_a_published_port_from_outside_from_the_host_and_no_other_way(site: Site) -> None:
    first, _ = site.bridge(1)
    firewall.ensure(policy(published=PUBLISHED))
    assert set(answers(site.outside, *PUBLIC).values()) == {OUTSIDE, OUTSIDE6}, "as itself, not translated"
    assert reached(None, *PUBLIC), "the host by its own address"
    assert not ask(site.outside, *TO_1), "not past the host's address"
    # Nothing listens on the host's own addresses here: what would be answered has been translated.
    assert not ask(None, "tcp 127.0.0.1 8080", "udp ::1 8080", "tcp 127.0.0.1 8081"), "the relay's"
    assert not ask(first, *PUBLIC), "its own port: the relay's"
    assert not ask(site.outside, f"tcp {HOST} 8081"), "published on another address"
    firewall.ensure(policy())
    firewall.wait_until_applied()
    assert not ask(site.outside, *PUBLIC)
    assert not ask(None, *PUBLIC)


@fast
def test_a_port_on_one_address_of_the_host(site: Site) -> None:
    run("ip", "address", "add", "192.0.2.9/24", "dev", "uplink")
    site.bridge(1)
    ports = {"web": (port("tcp", "192.0.2.9", 8080, "10.1.0.2", 80), port("udp", HOST6, 9000, "fd00:1::2", 81))}
    firewall.ensure(policy(published=ports))
    assert reached(site.outside, "tcp 192.0.2.9 8080", f"udp {HOST6} 9000")
    assert not ask(site.outside, f"tcp {HOST} 8080", "udp 192.0.2.9 8080")


@pytest.mark.parametrize("bridged", [False, True])
@fast
def test_a_neighbour_by_the_hosts_address(site: Site, bridged: bool) -> None:
    if BR_NETFILTER:
        for name in ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables"):
            (SYSCTLS / "bridge" / name).write_text(str(int(bridged)))
    elif bridged:
        pytest.skip("the kernel does not filter what is bridged: no module br_netfilter")
    _, second = site.bridge(1)
    firewall.ensure(policy(published=PUBLISHED))
    assert reached(second, *PUBLIC)
    assert reached(second, *both("10.1.0.1", "fd00:1::1", 8080)), "the gateway is an address of the host as well"


@fast
def test_trusted_interfaces(site: Site) -> None:
    site.bridge(1)
    firewall.ensure(policy(published=PUBLISHED, trusted=("uplink",)))
    assert reached(site.outside, *both("10.1.0.2", "fd00:1::2", 80), *PUBLIC)
    assert reached(site.outside, "tcp 10.1.0.2 81"), "what is published on the loopback only is published too"
    assert not ask(site.outside, "udp 10.1.0.2 81", *both("fd00:1::2", "10.1.0.3", 81), "tcp 10.1.0.3 80")


@fast
def test_unprotected(site: Site) -> None:
    first, _ = site.bridge(1)
    on_two = site.bridge(2)[0]
    firewall.ensure(policy(published=PUBLISHED, mode4=Mode.UNPROTECTED, mode6=Mode.UNPROTECTED))
    firewall.ensure(policy(2))
    assert reached(site.outside, *TO_1, *PUBLIC)
    assert site.outside.reaches("10.1.0.2")
    assert answers(first, OUT[0]) == {OUT[0]: HOST}
    assert reached(on_two, *PUBLIC)


@fast
def test_routed(site: Site) -> None:
    first, _ = site.bridge(1)
    firewall.ensure(policy(published=PUBLISHED, mode4=Mode.ROUTED, mode6=Mode.ROUTED))
    assert reached(site.outside, *both("10.1.0.2", "fd00:1::2", 80))
    assert site.outside.reaches("10.1.0.2", "fd00:1::3")
    assert not ask(site.outside, "udp 10.1.0.2 81", "tcp fd00:1::2 81", "tcp 10.1.0.3 80", *PUBLIC)
    assert answers(first, *OUT) == {"tcp 192.0.2.2 80": "10.1.0.2", "udp fd00:ff::2 80": "fd00:1::2"}


@fast
def test_each_family_has_its_mode(site: Site) -> None:
    first, _ = site.bridge(1)
    firewall.ensure(policy(published=PUBLISHED, mode6=Mode.ROUTED))
    assert reached(site.outside, f"tcp {HOST} 8080", "tcp fd00:1::2 80")
    assert not ask(site.outside, f"tcp {HOST6} 8080", "tcp 10.1.0.2 80")
    assert answers(first, *OUT) == {"tcp 192.0.2.2 80": HOST, "udp fd00:ff::2 80": "fd00:1::2"}


@fast
def test_a_connection_survives_a_change_of_its_policy(site: Site) -> None:
    """Another container's port comes and goes: nothing is interrupted."""
    first, _ = site.bridge(1)
    firewall.ensure(policy(published=PUBLISHED))
    with first.call(lambda: socket.create_server(("10.1.0.2", 90))) as server:
        more = {"web": (*PUBLISHED["web"], port("tcp", "0.0.0.0", 9090, "10.1.0.2", 90))}
        firewall.ensure(policy(published=more))
        with site.outside.call(lambda: socket.create_connection((HOST, 9090), PATIENCE)) as client:
            client.settimeout(PATIENCE)
            accepted, _ = server.accept()
            accepted.settimeout(PATIENCE)
            with accepted:
                for ports in (more | {"b": (port("tcp", "::", 9, "fd00:1::3", 9),)}, more):
                    firewall.ensure(policy(published=ports))
                    firewall.wait_until_applied()
                    client.send(b"ping")
                    assert accepted.recv(4) == b"ping"
                    accepted.send(b"pong")
                    assert client.recv(4) == b"pong"
