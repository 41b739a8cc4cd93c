from __future__ import annotations

import resource
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface
from pathlib import Path

import msgspec
import pytest

from netplugin_sdk import PortMapping, TransportProtocol, Unavailable
from netplugin_sdk.errors import Conflict
from netplugin_sdk.linux import ports
from netplugin_sdk.linux.ports import PortError, PortInUse, Published
from netplugin_sdk.protocol.messages import encode
from netplugin_sdk.protocol.options import from_text
from netplugin_sdk.values import IPAddress

from .lab import SYSCTLS

TCP, UDP, SCTP = TransportProtocol.TCP, TransportProtocol.UDP, TransportProtocol.SCTP
V4, V6 = ip_interface("172.18.0.2/16"), ip_interface("fd00::2/64")
BOTH = (V4, V6)
ANY4, ANY6 = IPv4Address("0.0.0.0"), IPv6Address("::")


@pytest.fixture(autouse=True)
def closed(request: pytest.FixtureRequest) -> Iterator[None]:
    request.getfixturevalue("netns")
    yield
    ports.close()


def p(
    host_port: int = 0,
    port: int = 80,
    *,
    end: int = 0,
    host: str | None = None,
    protocol: TransportProtocol = TCP,
) -> PortMapping:
    return PortMapping(
        protocol=protocol,
        container_port=port,
        host_address=None if host is None else ip_address(host),
        host_port=host_port,
        host_port_end=end,
    )


def shown(published: tuple[Published, ...]) -> list[str]:
    return [str(each) for each in published]


def hold(address: str, port: int, protocol: TransportProtocol = TCP) -> socket.socket:
    """What another process does that serves this port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM if protocol is TCP else socket.SOCK_DGRAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        if protocol is TCP:
            sock.listen()
    except OSError:
        sock.close()
        raise
    return sock


def free(port: int, protocol: TransportProtocol = TCP) -> bool:
    try:
        hold("0.0.0.0", port, protocol).close()
        hold("::", port, protocol).close()
    except OSError:
        return False
    return True


# Which bindings a request is


@pytest.mark.parametrize(
    ("request_", "addresses", "expected"),
    [
        (p(8080), BOTH, ["0.0.0.0:8080->172.18.0.2:80/tcp", "[::]:8080->[fd00::2]:80/tcp"]),
        (p(53, 53, protocol=UDP), BOTH, ["0.0.0.0:53->172.18.0.2:53/udp", "[::]:53->[fd00::2]:53/udp"]),
        (p(8080), (V4,), ["0.0.0.0:8080->172.18.0.2:80/tcp", "[::]:8080->172.18.0.2:80/tcp"]),
        (p(8080), (V6,), ["[::]:8080->[fd00::2]:80/tcp"]),
        (p(8080, host="127.0.0.1"), BOTH, ["127.0.0.1:8080->172.18.0.2:80/tcp"]),
        (p(8080, host="127.0.0.1"), (V6,), []),
        (p(8080, host="0.0.0.0"), BOTH, ["0.0.0.0:8080->172.18.0.2:80/tcp"]),
        (p(8080, host="::1"), BOTH, ["[::1]:8080->[fd00::2]:80/tcp"]),
        (p(8080, host="::1"), (V4,), ["[::1]:8080->172.18.0.2:80/tcp"]),
        (p(8080), (), []),
    ],
)
def test_a_request_is_these_bindings(
    request_: PortMapping, addresses: tuple[IPAddress, ...], expected: list[str]
) -> None:
    assert shown(ports.publish("a", [request_], addresses=addresses)) == expected


def test_plain_addresses_will_do() -> None:
    assert shown(ports.publish("a", [p(8080)], addresses=[V6.ip])) == ["[::]:8080->[fd00::2]:80/tcp"]


def test_without_six_to_four_ipv6_leads_to_ipv6_only() -> None:
    requests = [p(8080), p(8081, host="::1")]
    assert shown(ports.publish("a", requests, addresses=[V4], six_to_four=False)) == ["0.0.0.0:8080->172.18.0.2:80/tcp"]


@pytest.mark.parametrize(
    ("default", "expected"),
    [
        ("0.0.0.0", ["0.0.0.0:8080->172.18.0.2:80/tcp", "[::]:8080->[fd00::2]:80/tcp"]),
        ("127.0.0.1", ["127.0.0.1:8080->172.18.0.2:80/tcp"]),
        ("::", ["[::]:8080->[fd00::2]:80/tcp"]),
    ],
)
def test_a_default_host_address_is_for_requests_without_one(default: str, expected: list[str]) -> None:
    requests = [p(8080), p(8081, host="127.0.0.3")]
    published = ports.publish("a", requests, addresses=BOTH, default_host=ip_address(default))
    assert shown(published) == [*expected, "127.0.0.3:8081->172.18.0.2:80/tcp"]


def test_a_host_without_ipv6_publishes_ipv4() -> None:
    (SYSCTLS / "ipv6/conf/all/disable_ipv6").write_text("1")
    assert shown(ports.publish("a", [p(8080)], addresses=BOTH)) == ["0.0.0.0:8080->172.18.0.2:80/tcp"]
    with pytest.raises(PortError, match=r"^listen tcp6 \[::1\]:8081: bind: cannot assign requested address$"):
        ports.publish("a", [p(8081, host="::1")], addresses=BOTH)


@pytest.mark.parametrize("protocol", TransportProtocol)
def test_the_kernel_picks_one_port_for_both_families(protocol: TransportProtocol) -> None:
    four, six = ports.publish("a", [p(protocol=protocol)], addresses=BOTH)
    assert (four.host_address, six.host_address) == (ANY4, ANY6)
    assert four.host_port == six.host_port > 1024
    other, _ = ports.publish("b", [p(protocol=protocol)], addresses=BOTH)
    assert other.host_port != four.host_port


def test_a_range_is_its_first_port_that_is_free_in_both_families() -> None:
    with hold("0.0.0.0", 8000), hold("::1", 8001):
        assert {each.host_port for each in ports.publish("a", [p(8000, end=8009)], addresses=BOTH)} == {8002}
    assert {each.host_port for each in ports.publish("b", [p(8000, end=8009)], addresses=BOTH)} == {8000}


def test_several_requests_for_one_container_port() -> None:
    published = ports.publish("a", [p(8000, end=8001), p(9000)], addresses=[V4], six_to_four=False)
    assert {each.host_port for each in published} == {8000, 9000}


def test_a_range_leaves_the_ports_that_others_need() -> None:
    requests = [p(81, 81), p(0, 82), p(8000, end=8002), p(8000, 83), p(8001, 84, end=8001)]
    published = ports.publish("a", requests, addresses=[V4], six_to_four=False)
    assert {each.port: each.host_port for each in published if each.port != 82} == {
        80: 8002,
        81: 81,
        83: 8000,
        84: 8001,
    }


def test_requests_that_differ_in_the_hosts_address_have_one_port() -> None:
    requests = [p(host="127.0.0.1"), p(host="127.0.0.2"), p(host="::1")]
    assert len({each.host_port for each in ports.publish("a", requests, addresses=BOTH)}) == 1


def test_a_thousand_ports() -> None:
    published = ports.publish("a", [p(n, n) for n in range(8000, 9000)], addresses=BOTH)
    assert len(published) == 2000
    ports.release("a")
    assert free(8000)
    assert free(8999)


def test_more_ports_than_the_soft_limit_of_descriptors() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        ports.publish("a", [p(n, n) for n in range(8000, 8200)], addresses=BOTH)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# Conflicts


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (p(8080), p(8080), "Bind for 0.0.0.0:8080 failed: port is already allocated"),
        (p(8080), p(8080, host="127.0.0.1"), "Bind for 0.0.0.0:8080 failed: port is already allocated"),
        (p(8080, host="127.0.0.1"), p(8080), "Bind for 127.0.0.1:8080 failed: port is already allocated"),
        (p(8080, host="::1"), p(8080), "Bind for ::1:8080 failed: port is already allocated"),
        (p(8080, host="::"), p(8080, host="::1"), "Bind for :::8080 failed: port is already allocated"),
        (p(53, protocol=UDP), p(53, protocol=UDP), "Bind for 0.0.0.0:53 failed: port is already allocated"),
        (p(53, protocol=SCTP), p(53, protocol=SCTP), "Bind for 0.0.0.0:53 failed: port is already allocated"),
        (p(8080, end=8081), p(8080, end=8080), "Bind for 0.0.0.0:8080 failed: port is already allocated"),
    ],
)
def test_a_port_of_another_owner(first: PortMapping, second: PortMapping, text: str) -> None:
    ports.publish("a", [first], addresses=BOTH)
    with pytest.raises(PortInUse) as caught:
        ports.publish("b", [second], addresses=BOTH)
    assert str(caught.value) == text
    assert isinstance(caught.value, Conflict)
    ports.release("a")
    ports.publish("b", [second], addresses=BOTH)


def test_what_is_no_conflict() -> None:
    ports.publish("a", [p(8080, host="127.0.0.1")], addresses=BOTH)
    ports.publish("b", [p(8080, host="127.0.0.2"), p(8080, host="::"), p(8080, protocol=UDP)], addresses=BOTH)
    ports.publish("c", [p(8080, protocol=SCTP)], addresses=BOTH)


@pytest.mark.parametrize(
    ("address", "protocol", "text"),
    [
        ("0.0.0.0", TCP, "listen tcp4 0.0.0.0:8080: bind: address already in use"),
        ("127.0.0.1", TCP, "listen tcp4 0.0.0.0:8080: bind: address already in use"),
        ("::", TCP, "listen tcp6 [::]:8080: bind: address already in use"),
        ("0.0.0.0", UDP, "listen udp4 0.0.0.0:8080: bind: address already in use"),
        ("::1", UDP, "listen udp6 [::]:8080: bind: address already in use"),
    ],
)
def test_a_port_of_another_process(address: str, protocol: TransportProtocol, text: str) -> None:
    with hold(address, 8080, protocol):
        with pytest.raises(PortInUse) as caught:
            ports.publish("a", [p(8080, protocol=protocol)], addresses=BOTH)
        assert str(caught.value) == text
    ports.publish("a", [p(8080, protocol=protocol)], addresses=BOTH)


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_a_published_port_cannot_be_taken_by_a_process(protocol: TransportProtocol) -> None:
    ports.publish("a", [p(8080, protocol=protocol)], addresses=BOTH)
    for address in ("0.0.0.0", "127.0.0.1", "::", "::1"):
        with pytest.raises(OSError, match="already in use"):
            hold(address, 8080, protocol)


def test_a_range_that_is_taken() -> None:
    ports.publish("a", [p(8000), p(8001, 81)], addresses=BOTH)
    with hold("0.0.0.0", 8002), pytest.raises(PortInUse) as caught:
        ports.publish("b", [p(8000, end=8002)], addresses=BOTH)
    assert str(caught.value) == "Bind for 0.0.0.0:8000-8002 failed: all ports are allocated"


def test_an_address_that_the_host_does_not_have() -> None:
    for host_port in (8080, 0):
        with pytest.raises(PortError) as caught:
            ports.publish("a", [p(host_port, host="192.0.2.7")], addresses=BOTH)
        assert str(caught.value) == f"listen tcp4 192.0.2.7:{host_port}: bind: cannot assign requested address"
        assert not isinstance(caught.value, Conflict)


def test_a_relay_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nonexistent")
        with pytest.raises(Unavailable, match="relay"):
            ports.publish("a", [p(8080)], addresses=BOTH)
        assert free(8080)
    ports.publish("a", [p(8080)], addresses=BOTH)


# The same owner again


def inodes(port: int) -> set[str]:
    """The kernel's names for the TCP sockets that listen on it."""
    tables = [Path(f"/proc/thread-self/net/{name}").read_text() for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table.splitlines()[1:]]
    return {fields[9] for fields in lines if fields[1].endswith(f":{port:04X}") and fields[3] == "0A"}


def test_again_is_the_same_with_the_same_sockets() -> None:
    requests = [p(8080), p(0, 81), p(8000, 82, end=8009), p(53, 53, protocol=UDP)]
    first = ports.publish("a", requests, addresses=BOTH)
    before = inodes(8080)
    assert len(before) == 2
    assert ports.publish("a", requests, addresses=BOTH) == first
    assert inodes(8080) == before


def test_what_is_not_asked_for_again_is_free_and_the_rest_stays() -> None:
    ports.publish("a", [p(8080), p(8081, 81)], addresses=BOTH)
    before = inodes(8080)
    ports.publish("a", [p(8080), p(8082, 82)], addresses=BOTH)
    assert (inodes(8080), free(8081), free(8082)) == (before, True, False)
    ports.publish("a", [], addresses=BOTH)
    assert free(8080)


def test_an_error_leaves_everything_as_it_was() -> None:
    first = ports.publish("a", [p(8080), p(8081, 81)], addresses=BOTH)
    before = inodes(8080)
    ports.publish("b", [p(9000)], addresses=BOTH)
    for _ in range(2):
        with pytest.raises(PortInUse):
            ports.publish("a", [p(8080), p(8083, 83), p(9000, 90)], addresses=BOTH)
        with pytest.raises(PortError):
            ports.publish("c", [p(8083), p(1, 1, host="192.0.2.7")], addresses=BOTH)
        assert (inodes(8080), free(8081), free(8083)) == (before, False, True)
    assert ports.publish("a", [p(8080), p(8081, 81)], addresses=BOTH) == first


def test_a_port_moves_from_all_addresses_to_one_and_back() -> None:
    ports.publish("a", [p(8080)], addresses=BOTH)
    ports.publish("a", [p(8080, host="127.0.0.1")], addresses=BOTH)
    with hold("127.0.0.2", 8080), hold("::", 8080):
        with pytest.raises(PortInUse, match=r"^listen tcp4 0\.0\.0\.0:8080: "):
            ports.publish("a", [p(8080)], addresses=BOTH)
        with pytest.raises(OSError, match="already in use"):
            hold("127.0.0.1", 8080)  # again as before
    ports.publish("a", [p(8080)], addresses=BOTH)
    ports.publish("a", [p(8080, 81)], addresses=BOTH)  # to another port of the container
    ports.release("a")
    assert free(8080)


def test_two_requests_for_one_host_port() -> None:
    text = r"^Bind for 0\.0\.0\.0:8080 failed: port is already allocated$"
    for before in ([], [p(8080)]):
        ports.publish("a", before, addresses=BOTH)
        for other in (p(8080, 81), p(8080, host="127.0.0.1")):
            with pytest.raises(PortInUse, match=text):
                ports.publish("a", [p(8080), other], addresses=BOTH)


def test_after_a_restart_the_same_ports_are_preferred() -> None:
    requests = [p(), p(8000, 81, end=8009), p(53, protocol=UDP)]
    with hold("0.0.0.0", 8000):
        first = ports.publish("a", requests, addresses=BOTH)
    ports.close()
    assert ports.publish("a", requests, addresses=BOTH, keep=first) == first
    ports.close()
    with hold("0.0.0.0", first[-1].host_port):
        again = ports.publish("a", [p()], addresses=BOTH, keep=first)
        assert again[0].host_port != first[-1].host_port
    ports.close()
    # What does not fit the request is not wanted.
    assert ports.publish("a", [p(7000, 81)], addresses=BOTH, keep=first)[0].host_port == 7000


@dataclass(frozen=True)
class Kept:
    bindings: tuple[Published, ...]


def test_bindings_can_be_attached() -> None:
    kept = Kept(ports.publish("a", [p(8080), p(53, protocol=UDP)], addresses=BOTH))
    assert len(kept.bindings) == 4
    text = encode({"Kept": kept})  # as attach() and attached() do
    assert msgspec.json.decode(text, type=dict[str, Kept], dec_hook=from_text) == {"Kept": kept}


# Release


def test_releasing_twice_or_nothing_is_no_error() -> None:
    ports.release("a")
    ports.publish("a", [p(8080)], addresses=BOTH)
    ports.release("a")
    ports.release("a")
    assert free(8080)


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_a_released_port_can_be_bound_at_once(protocol: TransportProtocol) -> None:
    for _ in range(20):
        ports.publish("a", [p(8080, protocol=protocol)], addresses=BOTH)
        ports.release("a")
        assert free(8080, protocol)


def test_after_close_everything_is_free_and_can_begin_again() -> None:
    ports.publish("a", [p(8080)], addresses=BOTH)
    ports.close()
    assert free(8080)
    ports.close()
    ports.publish("b", [p(8080)], addresses=BOTH)


def test_no_descriptor_and_no_thread_is_left() -> None:
    descriptors, threads = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    for _ in range(5):
        first = ports.publish("a", [p(8080), p(), p(53, protocol=UDP)], addresses=BOTH)
        ports.publish("a", [p(8080), p(8081, 81)], addresses=BOTH, keep=first)
        with pytest.raises(PortInUse):
            ports.publish("b", [p(8082), p(8080, end=8081)], addresses=BOTH)
        with pytest.raises(PortInUse):
            ports.publish("b", [p(8080)], addresses=BOTH)
        ports.close()
    # Not fewer than before: those of an earlier test may have ended meanwhile.
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors
    assert threading.active_count() <= threads


def test_owners_come_and_go_in_many_threads() -> None:
    errors: list[BaseException] = []
    ports.publish("main", [p(7000)], addresses=BOTH)  # so the relay is in this namespace

    def owner(name: str) -> None:
        try:
            for _ in range(10):
                ports.publish(name, [p(), p(8000, 81, end=8009)], addresses=BOTH)
                ports.release(name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=owner, args=(str(n),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert free(8000)
