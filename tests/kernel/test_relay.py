"""What reaches a published port without the firewall's help, and the process that carries it."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from ipaddress import ip_address, ip_interface
from pathlib import Path

import pytest

from netplugin_sdk import PortMapping, TransportProtocol
from netplugin_sdk.linux import ports
from netplugin_sdk.values import IPAddress, IPInterface

from ..patience import PATIENCE
from ..unit.serving import wait_for
from .lab import Namespace, run

TCP, UDP = TransportProtocol.TCP, TransportProtocol.UDP
HERE = ip_interface("127.0.0.2/8")  # where no namespace is needed, the container is the host by another address
RESET = struct.pack("ii", 1, 0)


@pytest.fixture(autouse=True)
def closed(request: pytest.FixtureRequest) -> Iterator[None]:
    request.getfixturevalue("netns")
    yield
    ports.close()


def publish(
    host_port: int, address: IPAddress | IPInterface = HERE, protocol: TransportProtocol = TCP, owner: str = "a"
) -> None:
    request = PortMapping(protocol=protocol, container_port=80, host_port=host_port)
    ports.publish(owner, [request], addresses=[address])


def free(port: int) -> bool:
    try:
        socket.create_server(("", port), reuse_port=False).close()
        socket.create_server(("::", port), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def until(true: Callable[[], object]) -> None:
    wait_for(true, "it to become so")


def relays(parent: int | None = None) -> list[int]:
    """Process ids of the relays of this process, or of another."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            arguments, status = (folder / "cmdline").read_bytes(), (folder / "status").read_text()
            if b"linux/relay.py" in arguments and f"\nPPid:\t{parent or os.getpid()}\n" in status:
                found.append(int(folder.name))
    return found


def resident(pid: int) -> int:
    """Memory in kB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def leave(pid: int, count: int) -> None:
    """Let it open so many more descriptors."""
    used = {int(each.name) for each in Path(f"/proc/{pid}/fd").iterdir()}
    spare = [number for number in range(1000) if number not in used]
    hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (spare[count], hard))


@pytest.fixture
def serve() -> Iterator[Callable[..., socket.socket]]:
    """Has a function answer each connection to 127.0.0.2:80, or to what is given, in a thread."""
    with ExitStack() as stack:

        def start(answer: Callable[[socket.socket], object], server: socket.socket | None = None) -> socket.socket:
            listener = stack.enter_context(server or listening("127.0.0.2"))

            def accept() -> None:
                with suppress(OSError):
                    while True:
                        connection, _ = listener.accept()
                        stack.callback(wake, connection)
                        threading.Thread(target=each, args=(connection,), daemon=True).start()

            def each(connection: socket.socket) -> None:
                with connection, suppress(OSError):
                    answer(connection)

            threading.Thread(target=accept, daemon=True).start()
            stack.callback(stop, listener)
            return listener

        yield start


def wake(waited_for: socket.socket) -> None:
    """The thread that waits for it."""
    with suppress(OSError):
        waited_for.shutdown(socket.SHUT_RDWR)


def stop(server: socket.socket) -> None:
    wake(server)
    server.close()


def listening(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 80), family=family, backlog=1024)


def echo(connection: socket.socket) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


def ask(address: str, port: int, text: bytes = b"hello") -> bytes:
    with socket.create_connection((address, port), timeout=PATIENCE) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        return read(connection)


def read(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


# TCP


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_connection_reaches_the_container(address: str, serve: Callable[..., socket.socket]) -> None:
    serve(echo)
    publish(8080)
    assert ask(address, 8080) == b"hello"


def test_each_side_may_end_first(serve: Callable[..., socket.socket]) -> None:
    def count(connection: socket.socket) -> None:
        connection.sendall(b"%d" % len(read(connection)))

    def greet(connection: socket.socket) -> None:
        connection.sendall(b"welcome")
        connection.shutdown(socket.SHUT_WR)
        heard.append(read(connection))

    heard: list[bytes] = []
    server = serve(count)
    publish(8080)
    assert ask("127.0.0.1", 8080, bytes(1000)) == b"1000"
    stop(server)
    serve(greet)
    with connected(8080) as connection:
        assert read(connection) == b"welcome"
        connection.sendall(b"and thanks")
    until(lambda: heard == [b"and thanks"])


def test_a_large_transfer_in_both_directions(serve: Callable[..., socket.socket]) -> None:
    serve(echo)
    publish(8080)
    data = os.urandom(1 << 20) * 16
    with connected(8080) as connection:

        def send() -> None:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        received = read(connection)
        sender.join()
    assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()


def test_a_slow_reader_slows_the_writer(serve: Callable[..., socket.socket]) -> None:
    sent = 0

    def pour(connection: socket.socket) -> None:
        nonlocal sent
        for _ in range(128):
            connection.sendall(bytes(1 << 20))
            sent += 1

    serve(pour)
    publish(8080)
    with connected(8080) as connection:
        until(lambda: sent)
        time.sleep(0.3)
        assert sent < 128
        assert resident(relays()[0]) < 14_000
        assert len(read(connection)) == 128 << 20


def test_many_connections_at_once_and_nothing_is_left_of_them(serve: Callable[..., socket.socket]) -> None:
    serve(echo)
    publish(8080)
    assert ask("127.0.0.1", 8080) == b"hello"
    (pid,) = relays()
    until(lambda: descriptors(pid) <= 8)
    before = descriptors(pid)
    with ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(("127.0.0.1", 8080))) for _ in range(500)]
        for number, connection in enumerate(connections):
            connection.sendall(b"%d" % number)
        for number, connection in enumerate(connections):
            assert connection.recv(10) == b"%d" % number
        assert descriptors(pid) == before + 1000
    until(lambda: descriptors(pid) == before)


@pytest.mark.parametrize("container", ["127.0.0.2", "192.0.2.1"], ids=["closed", "unreachable"])
def test_a_connection_that_cannot_be_made_is_refused(container: str) -> None:
    publish(8080, ip_address(container))
    for _ in range(3):
        with (
            pytest.raises(ConnectionResetError),
            connected(8080) as connection,
        ):
            connection.recv(1)


def test_a_reset_is_passed_on_both_ways(serve: Callable[..., socket.socket]) -> None:
    heard: list[str] = []
    received = threading.Event()

    def reset(connection: socket.socket) -> None:
        if connection.recv(1) == b"r":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        else:
            received.set()
            try:
                connection.recv(1)
            except ConnectionResetError:
                heard.append("reset")

    serve(reset)
    publish(8080)
    with connected(8080) as connection:
        connection.sendall(b"r")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with connected(8080) as connection:
        connection.sendall(b"x")
        assert received.wait(PATIENCE)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    until(lambda: heard)
    assert descriptors(relays()[0]) <= 8


def test_release_cuts_connections_and_the_port_is_free_at_once(serve: Callable[..., socket.socket]) -> None:
    serve(echo)
    publish(8080)
    publish(8081, owner="b")
    assert ask("127.0.0.1", 8080) == b"hello"  # of which TIME_WAIT is left
    with (
        connected(8080) as connection,
        connected(8081) as other,
    ):
        for each in (connection, other):
            each.sendall(b"x")
            assert each.recv(1) == b"x"
        ports.release("a")
        assert free(8080)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        other.sendall(b"y")
        assert other.recv(1) == b"y"
    publish(8080)
    assert ask("127.0.0.1", 8080) == b"hello"


def has_ended(port: int) -> bool:
    """Whether the relay has passed a container's end on to a client of this port, FIN-WAIT-1 or -2."""
    lines = Path("/proc/thread-self/net/tcp").read_text().splitlines()
    return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] in ("04", "05") for line in lines)


def test_what_the_container_sent_before_its_end_arrives_after_the_release(
    serve: Callable[..., socket.socket],
) -> None:
    done = threading.Event()

    def send(connection: socket.socket) -> None:
        connection.sendall(bytes(1 << 18))
        connection.close()
        done.set()

    serve(send)
    publish(8080)
    with connected(8080) as connection:
        assert done.wait(PATIENCE)
        until(lambda: has_ended(8080))
        ports.release("a")
        assert len(read(connection)) == 1 << 18


def test_again_does_not_disturb_connections(serve: Callable[..., socket.socket]) -> None:
    serve(echo)
    publish(8080)
    with connected(8080) as connection:
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        publish(8080)
        connection.sendall(b"y")
        assert connection.recv(1) == b"y"


def test_without_descriptors_clients_wait(serve: Callable[..., socket.socket]) -> None:
    serve(echo)
    publish(8080)
    assert ask("127.0.0.1", 8080) == b"hello"
    (pid,) = relays()
    until(lambda: descriptors(pid) <= 8)
    leave(pid, 5)
    with ExitStack() as stack:
        connections = [stack.enter_context(connected(8080)) for _ in range(6)]
        for connection in connections:
            connection.sendall(b"x")
        used = Path(f"/proc/{pid}/stat").read_text().split()[13:15]
        time.sleep(0.3)
        assert sum(map(int, Path(f"/proc/{pid}/stat").read_text().split()[13:15])) - sum(map(int, used)) <= 3  # 10 ms
        for connection in connections:
            assert connection.recv(1) == b"x"
            connection.close()


# UDP


@pytest.fixture
def repeater() -> Iterator[None]:
    """Answers what it gets at 127.0.0.2:80."""

    def repeat() -> None:
        while True:
            data, client = server.recvfrom(65535)
            if client is None:  # shut down
                return
            server.sendto(data, client)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.2", 80))
        thread = threading.Thread(target=repeat, daemon=True)
        thread.start()
        yield
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE)


def client(address: str) -> socket.socket:
    """A UDP socket that hears this address only, as most clients do."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(PATIENCE)
    sock.connect((address, 53))
    return sock


@pytest.mark.usefixtures("repeater")
def test_udp_is_answered_from_the_address_that_was_asked() -> None:
    run("ip", "address", "add", "192.0.2.1/24", "dev", "lo")
    run("ip", "address", "add", "192.0.2.2/24", "dev", "lo")
    run("ip", "address", "add", "2001:db8::7/64", "dev", "lo", "nodad")
    publish(53, protocol=UDP)
    for address in ("127.0.0.1", "127.0.0.9", "192.0.2.1", "192.0.2.2", "::1", "2001:db8::7"):
        with client(address) as sock:
            for data in (b"one", b"", os.urandom(20_000)):
                sock.send(data)
                assert sock.recv(65535) == data


@pytest.mark.usefixtures("repeater")
def test_two_clients_and_one_that_asks_two_addresses() -> None:
    publish(53, protocol=UDP)
    with client("127.0.0.1") as one, client("127.0.0.1") as other:
        one.send(b"one")
        other.send(b"other")
        assert (other.recv(10), one.recv(10)) == (b"other", b"one")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE)
        for address in ("127.0.0.3", "127.0.0.4", "127.0.0.3"):
            sock.sendto(b"x", (address, 53))
            assert sock.recvfrom(10) == (b"x", (address, 53))


def test_udp_to_a_container_that_does_not_listen_yet() -> None:
    publish(53, protocol=UDP)
    with client("127.0.0.1") as sock:
        for _ in range(3):
            sock.send(b"lost")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("127.0.0.2", 80))
            sock.send(b"heard")
            server.settimeout(PATIENCE)
            relay = next(address for data, address in iter(lambda: server.recvfrom(10), None) if data == b"heard")
            server.sendto(b"answer", relay)
            assert sock.recv(10) == b"answer"


@pytest.mark.usefixtures("repeater")
def test_udp_clients_are_forgotten_with_the_port() -> None:
    publish(53, protocol=UDP)
    with ExitStack() as stack:
        clients = [stack.enter_context(client("127.0.0.1")) for _ in range(20)]
        for sock in clients:
            sock.send(b"x")
            assert sock.recv(10) == b"x"
        (pid,) = relays()
        before = descriptors(pid)
        ports.release("a")
        assert descriptors(pid) == before - 22


def test_udp_to_a_container_to_which_there_is_no_way_yet() -> None:
    publish(53, ip_address("192.0.2.9"), protocol=UDP)
    with client("127.0.0.1") as sock:
        sock.settimeout(0.05)
        sock.send(b"x")
        with pytest.raises(TimeoutError):
            sock.recv(10)
        run("ip", "address", "add", "192.0.2.9/32", "dev", "lo")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("192.0.2.9", 80))
            server.settimeout(PATIENCE)
            sock.send(b"y")
            assert server.recv(10)


# Bounds


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has the next relay run with other settings."""

    def change(**settings: float) -> None:
        monkeypatch.setattr(ports.settings, "relay", settings)

    return change


@pytest.mark.usefixtures("repeater")
def test_an_idle_udp_client_is_forgotten(bounded: Callable[..., None]) -> None:
    bounded(idle=0.3, sweep=0.05)
    publish(53, protocol=UDP)
    with client("127.0.0.1") as idle, client("127.0.0.1") as busy:
        for sock in (idle, busy):
            sock.send(b"x")
            assert sock.recv(10) == b"x"
        (pid,) = relays()

        def forgotten() -> bool:
            busy.send(b"x")
            return busy.recv(10) == b"x" and descriptors(pid) == 5 + 2 + 1

        until(forgotten)
        until(lambda: descriptors(pid) == 5 + 2)


@pytest.mark.usefixtures("repeater")
def test_the_longest_idle_udp_client_makes_room(bounded: Callable[..., None]) -> None:
    bounded(clients=2)
    publish(53, protocol=UDP)
    with client("127.0.0.1") as one, client("127.0.0.1") as two, client("127.0.0.1") as three:
        for sock in (one, two, one, three, one, two, three):
            sock.send(b"x")
            assert sock.recv(10) == b"x"
        assert descriptors(relays()[0]) == 5 + 2 + 2


def test_more_connections_wait_for_room(serve: Callable[..., socket.socket], bounded: Callable[..., None]) -> None:
    bounded(connections=2)
    serve(echo)
    publish(8080)
    with ExitStack() as stack:
        connections = [stack.enter_context(connected(8080)) for _ in range(6)]
        for connection in connections:
            connection.sendall(b"x")
        for connection in connections:
            assert connection.recv(1) == b"x"
            assert descriptors(relays()[0]) <= 5 + 2 + 4
            connection.close()


# Namespaces


@pytest.fixture
def container(namespace: Callable[[], Namespace]) -> Namespace:
    """A container with IPv4 only, 172.18.0.2, whose gateway is the host, 172.18.0.1."""
    inside = namespace()
    run("ip", "link", "add", "host", "type", "veth", "peer", "name", "eth0")
    run("ip", "address", "add", "172.18.0.1/16", "dev", "host")
    run("ip", "link", "set", "host", "up")
    inside.adopt("eth0", "172.18.0.2/16", gateway="172.18.0.1")
    return inside


def test_ipv6_of_the_host_reaches_a_container_with_ipv4_only(
    container: Namespace, serve: Callable[..., socket.socket]
) -> None:
    serve(echo, container.call(lambda: listening("172.18.0.2")))
    publish(8080, ip_interface("172.18.0.2/16"))
    assert ask("::1", 8080) == b"hello"
    assert ask("127.0.0.1", 8080) == b"hello"


def test_a_container_reaches_itself_through_the_host(container: Namespace, serve: Callable[..., socket.socket]) -> None:
    serve(echo, container.call(lambda: listening("172.18.0.2")))
    publish(8080, ip_interface("172.18.0.2/16"))
    assert container.call(lambda: ask("172.18.0.1", 8080)) == b"hello"


def test_connections_to_a_container_that_vanished_end_when_it_is_released(
    container: Namespace, serve: Callable[..., socket.socket]
) -> None:
    serve(echo, container.call(lambda: listening("172.18.0.2")))
    publish(8080, ip_interface("172.18.0.2/16"))
    with connected(8080) as connection:
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        run("ip", "link", "delete", "host")
        connection.sendall(b"y")
        ports.release("a")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


# The process


def test_there_is_one_and_it_is_small() -> None:
    assert not relays()
    for owner in "abc":
        publish(0, owner=owner)
    (pid,) = relays()
    ports.release("a")  # it is up
    assert resident(pid) < 12_000


def test_publishing_does_not_wait_for_it(serve: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports.settings, "relay_timeout", 0.2)  # what waits kills it then
    serve(echo)
    publish(8080)
    (pid,) = relays()
    os.kill(pid, signal.SIGSTOP)
    publish(8081, owner="b")
    with connected(8081) as connection:
        connection.sendall(b"hello")
        connection.shutdown(socket.SHUT_WR)
        os.kill(pid, signal.SIGCONT)
        assert read(connection) == b"hello"
    assert relays() == [pid]


def test_signals_for_the_plugin_do_not_end_it() -> None:
    publish(8080)
    publish(8081)  # it is up
    (pid,) = relays()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    publish(8082)
    assert relays() == [pid]


def test_when_it_is_killed_another_has_the_same_ports(serve: Callable[..., socket.socket]) -> None:
    serve(echo)
    publish(8080)
    publish(8081, owner="b")
    (pid,) = relays()
    os.kill(pid, signal.SIGKILL)
    assert ask("127.0.0.1", 8080) == b"hello"
    assert ask("::1", 8081) == b"hello"
    assert pid not in relays()
    ports.release("a")
    assert free(8080)


def test_one_that_cannot_take_a_port_is_replaced(serve: Callable[..., socket.socket]) -> None:
    serve(echo)
    publish(8080)
    assert ask("127.0.0.1", 8080) == b"hello"
    (pid,) = relays()
    until(lambda: descriptors(pid) <= 8)
    leave(pid, 1)
    publish(8081, owner="b")
    for address, port in (("127.0.0.1", 8080), ("::1", 8080), ("127.0.0.1", 8081), ("::1", 8081)):
        assert ask(address, port) == b"hello"
    assert pid not in relays()


def test_release_while_it_is_dead() -> None:
    publish(8080)
    os.kill(relays()[0], signal.SIGKILL)
    ports.release("a")
    assert free(8080)
    ports.close()
    assert not relays()


def test_one_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports.settings, "relay_timeout", 0.2)
    publish(8080)
    (pid,) = relays()
    os.kill(pid, signal.SIGSTOP)
    ports.release("a")
    assert free(8080)
    assert pid not in relays()


PLUGIN = """
import sys
from ipaddress import ip_address
from netplugin_sdk import PortMapping, TransportProtocol
from netplugin_sdk.linux import ports

request = PortMapping(protocol=TransportProtocol.TCP, container_port=80, host_port=8080)
print(*ports.publish("a", [request], addresses=[ip_address("127.0.0.2")]), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, None], ids=["KILL", "TERM", "exit"])
def test_it_ends_with_the_plugin(number: signal.Signals | None, serve: Callable[..., socket.socket]) -> None:
    serve(echo)
    plugin = subprocess.Popen([sys.executable, "-c", PLUGIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert plugin.stdin is not None
    assert plugin.stdout is not None
    with plugin, closing(plugin.stdin):
        assert b"8080" in plugin.stdout.readline()
        assert ask("127.0.0.1", 8080) == b"hello"
        (pid,) = relays(plugin.pid)
        if number is None:
            plugin.stdin.close()
            plugin.wait(PATIENCE)
            assert not Path(f"/proc/{pid}").exists(), "an exit waits for it"
        else:
            plugin.send_signal(number)
            plugin.wait(PATIENCE)
        until(lambda: free(8080))
        until(lambda: pid not in relays(1))
