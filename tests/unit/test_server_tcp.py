from __future__ import annotations

import ipaddress
import json
import os
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from netplugin_sdk import Plugin, TLSFiles, Unavailable
from netplugin_sdk.serving import systemd
from netplugin_sdk.serving.http import Limits
from netplugin_sdk.serving.loop import Server

from ..patience import PATIENCE
from .serving import Client, Echo, Served, connect_tcp, echo, nothing_left, open_files, serving, wait_for

OTHER = "fedcba9876543210" * 4
HOST = "127.0.0.1"


def serving_tcp(
    folder: Path, *, host: str = HOST, tls: TLSFiles | None = None, limits: Limits | None = None
) -> AbstractContextManager[Served]:
    return serving(lambda server: server.listen_tcp(host, 0, name="echo", tls=tls, folder=folder), limits)


def listen(folder: Path, host: str, port: int = 0, *, tls: TLSFiles | None = None, plain: bool = False) -> None:
    """Listen without serving. Whatever comes of it, nothing is left."""
    with nothing_left(), Plugin(Echo()) as plugin, Server(plugin) as server:
        server.listen_tcp(host, port, name="echo", tls=tls, plain=plain, folder=folder)


# Plain TCP


def test_plain_tcp_on_the_loopback(tmp_path: Path) -> None:
    with serving_tcp(tmp_path) as served:
        client = served.connect()
        for number in range(3):
            assert client.echo(n=str(number)) == {"n": str(number)}


def test_engines_find_plain_tcp_by_a_spec_file_while_it_is_served(tmp_path: Path) -> None:
    folder = tmp_path / "etc" / "docker" / "plugins"
    with serving_tcp(folder) as served:
        assert (folder / "echo.spec").read_text() == f"tcp://127.0.0.1:{served.port}"
        assert [file.name for file in folder.iterdir()] == ["echo.spec"]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["localhost", "127.1.2.3"])
def test_other_names_of_the_loopback_are_served_too(tmp_path: Path, name: str) -> None:
    with serving_tcp(tmp_path, host=name) as served, connect_tcp(served.port, name) as client:
        assert client.echo(n="1") == {"n": "1"}
        assert (tmp_path / "echo.spec").read_text() == f"tcp://{name}:{served.port}"


def test_the_address_in_a_spec_file_is_in_brackets_for_ipv6(tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with serving_tcp(tmp_path, host="::1") as served, connect_tcp(served.port, "::1") as client:
        assert client.echo(n="1") == {"n": "1"}
        assert (tmp_path / "echo.spec").read_text() == f"tcp://[::1]:{served.port}"


def test_a_wanted_port_is_the_one(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as free:
        port = int(free.getsockname()[1])
    with serving(lambda server: server.listen_tcp(HOST, port, name="echo", folder=tmp_path)) as served:
        assert served.port == port
        assert served.connect().echo(n="1") == {"n": "1"}


def test_a_spec_file_that_is_left_over_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "echo.spec").write_text("tcp://127.0.0.1:1")
    with serving_tcp(tmp_path) as served:
        assert (tmp_path / "echo.spec").read_text().endswith(f":{served.port}")
    assert list(tmp_path.iterdir()) == []


def test_a_spec_file_that_somebody_else_has_put_there_stays(tmp_path: Path) -> None:
    with serving_tcp(tmp_path):
        other = tmp_path / "other"
        other.write_text("tcp://127.0.0.1:1")
        other.rename(tmp_path / "echo.spec")
    assert (tmp_path / "echo.spec").read_text() == "tcp://127.0.0.1:1"


@pytest.mark.parametrize("host", ["192.0.2.1", "0.0.0.0", "::", "2001:db8::1", "plugins.example", "::ffff:192.0.2.1"])
def test_plain_tcp_beyond_the_loopback_is_refused(tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: object, **__: object) -> None:
        raise AssertionError("it was bound, or looked up")

    monkeypatch.setattr(socket, "create_server", touched)
    monkeypatch.setattr(socket, "getaddrinfo", touched)
    monkeypatch.setattr(socket.socket, "bind", touched)
    with pytest.raises(Unavailable, match=f"refusing to serve plain TCP on {host}: give TLS files, or insist"):
        listen(tmp_path, host)
    assert list(tmp_path.iterdir()) == []


def test_plain_tcp_beyond_the_loopback_is_tried_by_who_insists(tmp_path: Path) -> None:
    # An address that no machine has: nothing is opened to anybody, but it must have been tried.
    with pytest.raises(Unavailable, match=r"cannot listen on 192\.0\.2\.1 port 0"):
        listen(tmp_path, "192.0.2.1", plain=True)
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_in_use_is_an_error(tmp_path: Path) -> None:
    with serving_tcp(tmp_path / "first") as served:
        with pytest.raises(Unavailable, match=f"cannot listen on 127.0.0.1 port {served.port}"):
            listen(tmp_path / "second", HOST, served.port)
        assert served.connect().echo(n="1") == {"n": "1"}
    assert not (tmp_path / "second" / "echo.spec").exists()


def test_a_spec_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match=r"cannot write .*echo\.spec"):
        listen(tmp_path / "file", HOST)


def test_a_slow_call_does_not_hold_up_others_on_tcp(tmp_path: Path) -> None:
    with serving_tcp(tmp_path) as served:
        gate, slow = served.driver.gate(), served.connect()
        slow.send(echo(gate="gate"))
        gate.wait_entered()
        assert served.connect().echo(network=OTHER, n="1") == {"n": "1"}
        gate.open()
        assert slow.receive().options == {"gate": "gate"}


def test_a_connection_that_is_reset_changes_nothing(tmp_path: Path) -> None:
    with serving_tcp(tmp_path) as served:
        gate, client = served.driver.gate(), served.connect()
        client.send(echo(gate="gate"))
        gate.wait_entered()
        # Linger 0: close() sends a reset.
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        gate.open()
        gate.wait_left()
        assert served.connect().echo(n="1") == {"n": "1"}


def test_the_port_is_free_afterwards(tmp_path: Path) -> None:
    with serving_tcp(tmp_path) as served:
        served.connect().echo(n="1")
        served.server.stop()
        served.wait_stopped()
        with pytest.raises(ConnectionRefusedError):
            connect_tcp(served.port)
        listen(tmp_path, HOST, served.port)


# TLS


class Authority:
    """A certificate authority and its PEM files."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir()
        self._folder = folder
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.file = folder / "ca.pem"
        self.file.write_bytes(_pem(self._sign(self._name, self._key, is_authority=True)))

    def issue(self, name: str, *, days: int = 1) -> Pair:
        """A certificate for the loopback, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        pair = Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        pair.certificate.write_bytes(_pem(self._sign(subject, key, days=days)))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return pair

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, days: int = 1, is_authority: bool = False
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        public = key.public_key()
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=10))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(_key_usage(is_authority), critical=True)  # Python 3.13 insists
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def _key_usage(is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


class Pair(NamedTuple):
    certificate: Path
    key: Path


class Keys(NamedTuple):
    """Who trusts whom: the plugin shows `plugin` and wants a client of `engines`."""

    plugins: Authority
    engines: Authority
    plugin: Pair
    engine: Pair

    @property
    def files(self) -> TLSFiles:
        return TLSFiles(
            certificate=self.plugin.certificate,
            key=self.plugin.key,
            client_ca=self.engines.file,
            engine_ca=self.plugins.file,
            engine_certificate=self.engine.certificate,
            engine_key=self.engine.key,
        )

    def context(self, pair: Pair | None) -> ssl.SSLContext:
        """A client's, that shows this certificate."""
        context = ssl.create_default_context(cafile=self.plugins.file)
        if pair is not None:
            context.load_cert_chain(pair.certificate, pair.key)
        return context

    def connect(self, served: Served) -> Client:
        """As a good engine, for as long as the test."""
        client = served.connect()
        client.socket = self.context(self.engine).wrap_socket(client.socket, server_hostname=HOST)
        return client


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    plugins, engines = Authority(folder / "plugins", "CA of plugins"), Authority(folder / "engines", "CA of engines")
    return Keys(plugins, engines, plugins.issue("plugin"), engines.issue("engine"))


def test_an_engine_with_a_certificate_is_served_over_tls(tmp_path: Path, keys: Keys) -> None:
    with serving_tcp(tmp_path, tls=keys.files) as served:
        client = keys.connect(served)
        for number in range(10):
            assert client.echo(n=str(number)) == {"n": str(number)}


def test_large_bodies_and_answers_over_tls(tmp_path: Path, keys: Keys) -> None:
    with serving_tcp(tmp_path, tls=keys.files) as served:
        client = keys.connect(served)
        for size in (1, 16_384, 65_536, 100_000, 4_000_000):
            assert client.echo(large="y" * size) == {"large": "y" * size}


def test_pipelined_requests_over_tls(tmp_path: Path, keys: Keys) -> None:
    """What TLS has decrypted already, no selector tells of."""
    with serving_tcp(tmp_path, tls=keys.files) as served:
        client = keys.connect(served)
        for batch in range(5):
            client.send(b"".join(echo(n=f"{batch} {number}") for number in range(300)))
            assert [client.receive().options["n"] for _ in range(300)] == [f"{batch} {n}" for n in range(300)]


def test_a_request_byte_by_byte_over_tls(tmp_path: Path, keys: Keys) -> None:
    with serving_tcp(tmp_path, tls=keys.files) as served:
        client = keys.connect(served)
        for byte in echo(n="1"):
            client.send(bytes([byte]))
        assert client.receive().options == {"n": "1"}


def test_requests_behind_a_slow_one_over_tls(tmp_path: Path, keys: Keys) -> None:
    with serving_tcp(tmp_path, tls=keys.files) as served:
        gate, slow = served.driver.gate(), keys.connect(served)
        slow.send(echo(gate="gate") + echo(network=OTHER, n="1"))
        gate.wait_entered()
        slow.send(echo(network=OTHER, n="2"))
        assert keys.connect(served).echo(network=OTHER, n="0") == {"n": "0"}
        gate.open()
        assert slow.receive().options == {"gate": "gate"}
        assert [slow.receive().options["n"] for _ in range(2)] == ["1", "2"]


def test_many_engines_at_once_over_tls(tmp_path: Path, keys: Keys) -> None:
    problems: list[str] = []

    def work(number: int) -> None:
        network = f"{number:064x}"
        client = keys.connect(served)
        for call in range(20):
            if client.echo(network=network, n=f"{number} {call}") != {"n": f"{number} {call}"}:
                problems.append(f"call {call} of client {number}")

    with serving_tcp(tmp_path, tls=keys.files) as served:
        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert not problems
        assert served.driver.calls == 8 * 20


def test_what_engines_find_tls_by_is_as_docker_wants_it(tmp_path: Path, keys: Keys) -> None:
    with serving_tcp(tmp_path, tls=keys.files) as served:
        assert json.loads((tmp_path / "echo.json").read_text()) == {
            "Name": "echo",
            "Addr": f"https://127.0.0.1:{served.port}",
            "TLSConfig": {
                "InsecureSkipVerify": False,
                "CAFile": str(keys.plugins.file),
                "CertFile": str(keys.engine.certificate),
                "KeyFile": str(keys.engine.key),
            },
        }
        assert [file.name for file in tmp_path.iterdir()] == ["echo.json"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=["none", "other CA", "the plugin's own CA", "self-signed", "expired"])
def stranger(request: pytest.FixtureRequest, tmp_path: Path, keys: Keys) -> Pair | None:
    """A certificate that must not be served."""
    if request.param == "none":
        return None
    if request.param == "the plugin's own CA":
        return keys.plugin
    if request.param == "expired":
        return keys.engines.issue("expired", days=-1)
    own = Authority(tmp_path / "strangers", "CA of engines" if request.param == "other CA" else "self")
    return own.issue("self" if request.param == "self-signed" else "stranger")


def test_who_has_no_good_certificate_gets_nothing(tmp_path: Path, keys: Keys, stranger: Pair | None) -> None:
    with serving_tcp(tmp_path / "etc", tls=keys.files) as served:
        with served.connect() as client, suppress(ssl.SSLError, ConnectionError):
            # With TLS 1.3 the client's handshake ends before the server has seen its certificate.
            client.socket = keys.context(stranger).wrap_socket(client.socket, server_hostname=HOST)
            client.send(echo(n="1"))
            assert client.socket.recv(1000) == b""
        assert served.driver.calls == 0
        assert keys.connect(served).echo(n="2") == {"n": "2"}


@pytest.mark.parametrize(
    "data", [echo(n="1"), b"\x16\x03\x01\x00\x05hello", b"\0" * 1000], ids=["HTTP", "TLS", "zeros"]
)
def test_who_does_not_speak_tls_gets_no_http(tmp_path: Path, keys: Keys, data: bytes) -> None:
    with serving_tcp(tmp_path, tls=keys.files) as served:
        with served.connect() as client:
            client.send(data)
            assert b"HTTP/1.1" not in everything(client)
        assert served.driver.calls == 0
        assert keys.connect(served).echo(n="2") == {"n": "2"}


def test_a_handshake_that_stalls_is_ended_after_request_time(tmp_path: Path, keys: Keys) -> None:
    with serving_tcp(tmp_path, tls=keys.files, limits=Limits(request_time=0.3)) as served:
        silent, half = served.connect(), served.connect()
        half.send(client_hello()[:50])
        for client in (silent, half):
            assert b"HTTP/1.1" not in everything(client)
        assert keys.connect(served).echo(n="1") == {"n": "1"}


def test_a_handshake_that_dribbles_is_ended_after_request_time(tmp_path: Path, keys: Keys) -> None:
    hello = client_hello()
    with serving_tcp(tmp_path, tls=keys.files, limits=Limits(request_time=0.3)) as served, served.connect() as client:
        sent = 0
        with suppress(BrokenPipeError, ConnectionResetError):
            while not client.readable(0.02):
                client.send(hello[sent : sent + 1])
                sent += 1
                assert sent < len(hello), "the whole handshake was waited for"
        assert b"HTTP/1.1" not in everything(client)


def test_handshakes_that_stall_do_not_hold_up_others(tmp_path: Path, keys: Keys) -> None:
    limits = Limits(request_time=10 * PATIENCE, drain_time=0.3)
    with serving_tcp(tmp_path, tls=keys.files, limits=limits) as served:
        for _ in range(10):
            served.connect()
            served.connect().send(client_hello()[:50])
        assert keys.connect(served).echo(n="1") == {"n": "1"}


def test_stop_does_not_wait_for_a_handshake(tmp_path: Path, keys: Keys) -> None:
    limits = Limits(request_time=10 * PATIENCE, drain_time=0.3)
    with serving_tcp(tmp_path, tls=keys.files, limits=limits) as served:
        served.connect().send(client_hello()[:50])
        assert keys.connect(served).echo(n="1") == {"n": "1"}
        served.server.stop()
        served.wait_stopped()


def test_stop_lets_a_running_call_end_over_tls(tmp_path: Path, keys: Keys) -> None:
    with serving_tcp(tmp_path, tls=keys.files) as served:
        gate, busy, idle = served.driver.gate(), keys.connect(served), keys.connect(served)
        idle.echo(n="1")
        busy.send(echo(gate="gate", size="1000000"))
        gate.wait_entered()
        served.server.stop()
        wait_for(lambda: not (tmp_path / "echo.json").exists(), "the file to go")
        gate.open()
        reply = busy.receive()
        assert len(reply.options["large"]) == 1_000_000
        assert reply.closes
        served.wait_stopped()
        expect_tls_end(idle)


def test_an_idle_connection_over_tls_is_closed_after_idle_time(tmp_path: Path, keys: Keys) -> None:
    with serving_tcp(tmp_path, tls=keys.files, limits=Limits(idle_time=0.3)) as served:
        client = keys.connect(served)
        assert client.echo(n="1") == {"n": "1"}
        expect_tls_end(client)


def test_a_request_over_tls_that_stops_half_way_is_refused(tmp_path: Path, keys: Keys) -> None:
    with serving_tcp(tmp_path, tls=keys.files, limits=Limits(request_time=0.5)) as served:
        client = keys.connect(served)
        client.send(echo(n="1")[:-5])
        assert client.receive().status == 408


def test_who_sends_too_large_a_body_over_tls_reads_the_refusal(tmp_path: Path, keys: Keys) -> None:
    with serving_tcp(tmp_path, tls=keys.files, limits=Limits(body=2_000)) as served:
        client = keys.connect(served)
        client.send(echo(large="y" * 1_000_000))
        assert client.receive().status == 413


def test_an_engine_that_reads_nothing_over_tls_does_not_hold_up_others(tmp_path: Path, keys: Keys) -> None:
    with serving_tcp(tmp_path, tls=keys.files, limits=Limits(request_time=0.5)) as served:
        deaf = keys.connect(served)
        deaf.send(echo(size="16000000"))
        assert deaf.readable(PATIENCE)
        assert keys.connect(served).echo(network=OTHER, n="1") == {"n": "1"}
        # The end of a TCP connection stays behind what was not read; what is seen of it is the server's descriptor.
        before = open_files().total()
        wait_for(lambda: open_files().total() < before, "the connection to be cut")


@pytest.mark.parametrize("file", ["certificate", "key", "client_ca"])
@pytest.mark.parametrize("content", [None, "nonsense"])
def test_tls_files_that_cannot_be_used_are_an_error(tmp_path: Path, keys: Keys, file: str, content: str | None) -> None:
    bad = tmp_path / "bad.pem"
    if content is not None:
        bad.write_text(content)
    files = {name: getattr(keys.files, name) for name in keys.files.__struct_fields__} | {file: bad}
    with pytest.raises(Unavailable, match="cannot listen on"):
        listen(tmp_path / "etc", HOST, tls=TLSFiles(**files))
    assert not (tmp_path / "etc").exists()


# Sockets of systemd's


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """Hands this process a TCP socket as systemd does; its port."""

    def give(host: str) -> int:
        with socket.create_server((host, 0)) as made:
            port = int(made.getsockname()[1])
            monkeypatch.setattr(systemd, "FIRST_SYSTEMD_FD", os.dup(made.fileno()))
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", "1")
        return port

    return give


def test_a_socket_of_systemds_is_served_over_tls(given: Callable[[str], int], keys: Keys) -> None:
    port = given("0.0.0.0")

    def take(server: Server) -> int:
        assert server.listen_systemd(tls=keys.files)
        return port

    with serving(take) as served:
        assert keys.connect(served).echo(n="1") == {"n": "1"}
        assert "LISTEN_FDS" not in os.environ, "not for child processes"


@pytest.mark.parametrize(
    ("host", "plain", "refused"), [("0.0.0.0", False, True), ("0.0.0.0", True, False), (HOST, False, False)]
)
def test_a_socket_of_systemds_without_tls_is_for_this_host_unless_insisted(
    given: Callable[[str], int], host: str, plain: bool, refused: bool
) -> None:
    with nothing_left():
        given(host)
        with Plugin(Echo()) as plugin, Server(plugin) as taker:
            if refused:
                with pytest.raises(Unavailable, match=r"refusing to serve plain TCP on 0\.0\.0\.0"):
                    taker.listen_systemd(plain=plain)
            else:
                assert taker.listen_systemd(plain=plain)


def test_a_socket_of_systemds_whose_tls_files_cannot_be_used(
    given: Callable[[str], int], keys: Keys, tmp_path: Path
) -> None:
    files = {name: getattr(keys.files, name) for name in keys.files.__struct_fields__} | {"key": tmp_path / "none"}
    with nothing_left():
        given(HOST)
        with (
            Plugin(Echo()) as plugin,
            Server(plugin) as taker,
            pytest.raises(Unavailable, match="cannot use the TLS files"),
        ):
            taker.listen_systemd(tls=TLSFiles(**files))


def client_hello() -> bytes:
    """How a TLS client begins."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


def everything(client: Client) -> bytes:
    """What the server sends until it ends the connection."""
    received = b""
    try:
        while data := client.socket.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def expect_tls_end(client: Client) -> None:
    """The connection ends, with or without TLS's own word for it, but not with an error that it tells of."""
    with suppress(ssl.SSLEOFError, ConnectionResetError):
        assert client.socket.recv(1) == b""
