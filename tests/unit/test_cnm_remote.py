"""Docker's side of the wire: against our own server, against one that misbehaves, and against what engines sent."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from netplugin_sdk.cnm.remote import (
    TLS,
    Address,
    Folders,
    MethodNotSupported,
    Patience,
    PluginNotFound,
    RemoteError,
    RemotePlugin,
    find,
    installed,
)
from netplugin_sdk.errors import DriverError, Unavailable

from ..patience import PATIENCE
from .serving import METHOD, NETWORK, nothing_left, serving_unix
from .test_server_tcp import HOST, Authority, Keys, serving_tcp

RECORDINGS = sorted((Path(__file__).parents[1] / "wire" / "recordings").glob("*.jsonl"))
JOIN = "NetworkDriver.Join"
CONTENT = {"NetworkID": NETWORK}
BODY = json.dumps(CONTENT, separators=(",", ":")).encode() + b"\n"
CHUNKED = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\n{"a":1\r\n1\r\n}\r\n0\r\n\r\n'


# -------------------------------------------------------------------------------------------------------- discovery


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path / "run", (tmp_path / "etc", tmp_path / "usr"))


def put(path: Path, content: str | None = None) -> Path:
    """A file, or without content a socket that nobody serves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    else:
        path.write_text(content)
    return path


def test_the_order_in_which_an_engine_looks(folders: Folders) -> None:
    put(folders.sockets / "not-this.sock")
    places = [put(folders.sockets / "x.sock"), put(folders.sockets / "x" / "x.sock")]
    for folder in folders.specs:
        places += [put(folder / place, f"tcp://{folder.name}:{n}") for n, place in enumerate(("x.spec", "x/x.spec"))]
        places += [
            put(folder / place, json.dumps({"Addr": f"http://{folder.name}:{n}"}))
            for n, place in enumerate(("x.json", "x/x.json"))
        ]
    found = []
    for place in places:
        found.append(find("x", folders=folders).url)
        place.unlink()
    assert found == [
        f"unix://{folders.sockets}/x.sock",
        f"unix://{folders.sockets}/x/x.sock",
        *("tcp://etc:0", "tcp://etc:1", "http://etc:0", "http://etc:1"),
        *("tcp://usr:0", "tcp://usr:1", "http://usr:0", "http://usr:1"),
    ]
    with pytest.raises(PluginNotFound):
        find("x", folders=folders)


def test_what_is_no_socket_is_passed_over_and_a_link_to_one_is_not(folders: Folders) -> None:
    put(folders.sockets / "x.sock", "a file")
    put(folders.specs[1] / "x.spec", "unix:///there.sock")
    assert find("x", folders=folders).url == "unix:///there.sock"
    (folders.sockets / "x").mkdir()
    (folders.sockets / "x" / "x.sock").symlink_to(put(folders.sockets / "elsewhere"))
    assert find("x", folders=folders).url == f"unix://{folders.sockets}/x/x.sock"


def test_no_plugin_is_an_error_in_the_engines_words(folders: Folders) -> None:
    with pytest.raises(PluginNotFound) as caught:
        find("x", folders=folders)
    assert str(caught.value) == f'plugin "x" not found (in {folders.sockets}, {folders.specs[0]}, {folders.specs[1]})'


@pytest.mark.parametrize(
    ("content", "address"),
    [
        ('{"Name": "y", "Addr": "https://h:1"}', Address("x", "https://h:1")),
        ('{"Addr": "https://h:1", "TLSConfig": null} and more', Address("x", "https://h:1")),
        ('{"addr": "https://h:1", "TLSConfig": {}}', Address("x", "https://h:1", TLS(insecure=True))),
        (
            '{"Addr": "https://h:1", "TLSConfig": {"CertFile": "c", "KeyFile": "k", "InsecureSkipVerify": false}}',
            Address("x", "https://h:1", TLS(certificate="c", key="k", insecure=True)),
        ),
        ('{"Addr": "https://h:1", "TLSConfig": {"CAFile": "a"}}', Address("x", "https://h:1", TLS(ca="a"))),
    ],
)
def test_a_json_file(folders: Folders, content: str, address: Address) -> None:
    put(folders.specs[0] / "x.json", content)
    assert find("x", folders=folders) == address


def test_a_spec_file(folders: Folders) -> None:
    put(folders.specs[0] / "x.spec", "\n https://h:1 \n")
    assert find("x", folders=folders) == Address("x", "https://h:1", TLS(insecure=True))


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("x.spec", "", "Unknown protocol"),
        ("x.spec", "127.0.0.1:80", "Unknown protocol"),
        ("x.spec", "localhost:80", "'localhost:80' names no host"),
        ("x.spec", "tcp://h:port", "port"),
        ("x.spec", "unix://", 'unix socket path "" is too short'),
        ("x.spec", "unix:///" + "x" * 108, "is too long"),
        ("x.json", "", "EOF"),
        ("x.json", "tcp://h:1", "invalid character 't' looking for beginning of value"),
        ("x.json", '{"Addr": "tcp:', "unexpected EOF"),
        ("x.json", '{"Addr": 1}', "json: cannot unmarshal number into Go struct field Addr of type string"),
        ("x.json", "[]", "json: cannot unmarshal array"),
        ("x.json", "{}", "Unknown protocol"),
        ("x.json", '{"Addr": "https://h", "TLSConfig": {"InsecureSkipVerify": "no"}}', "of type bool"),
    ],
)
def test_a_malformed_file_is_named(folders: Folders, file: str, content: str, said: str) -> None:
    path = put(folders.specs[0] / file, content)
    with pytest.raises(DriverError) as caught:
        find("x", folders=folders)
    assert str(caught.value).startswith(f"legacy plugin: {path}: ")
    assert said in str(caught.value)


def test_a_folder_of_a_files_name_is_an_error(folders: Folders) -> None:
    (folders.specs[0] / "x.spec").mkdir(parents=True)
    with pytest.raises(DriverError, match=r"/x\.spec: is a directory$"):
        find("x", folders=folders)


def test_names_are_listed_as_the_engine_lists_them(folders: Folders) -> None:
    assert installed(folders) == []
    for path in ("b.sock", "a/a.sock", "other.ending", "none/some.sock"):
        put(folders.sockets / path)
    put(folders.sockets / "file.sock", "")
    (folders.sockets / "link.sock").symlink_to(folders.sockets / "b.sock")
    (folders.sockets / "c").mkdir()
    (folders.sockets / "c" / "c.sock").symlink_to(folders.sockets / "b.sock")
    etc, usr = folders.specs
    for path in ("b.spec", "d/d.json", "e.json", "hidden/hidden.conf", "hidden/hidden.spec", "no.txt", "no/y.spec"):
        put(etc / path, "")
    put(usr / "e.json", "")
    assert installed(folders) == ["a", "b", "c", "other", "b", "d", "e", "e"]


def test_a_folder_that_is_none_cannot_be_listed(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(DriverError, match=r"error reading dir entries: open .*: not a directory"):
        installed(replace(folders, sockets=put(tmp_path / "file", "")))


# ------------------------------------------------------------------------------------------------ against our server


def test_our_server_over_a_unix_socket(tmp_path: Path) -> None:
    with serving_unix(tmp_path) as served:
        address = find("s", folders=Folders(tmp_path, ()))
        with RemotePlugin(address) as plugin:
            assert plugin.implements is None
            assert plugin.activate("NetworkDriver") == ("NetworkDriver",)
            assert plugin.call("NetworkDriver.GetCapabilities")["Scope"] == "global"
            for text in ("1", "<ü&\u2028>"):
                answer = plugin.call(METHOD, {**CONTENT, "Options": {"n": text}})
                assert answer["Options"] == {"n": text}
            with pytest.raises(RemoteError) as caught:
                plugin.call(METHOD, {**CONTENT, "Options": {"fail": "no room"}})
            assert str(caught.value) == f"{METHOD}: no room"
            with pytest.raises(MethodNotSupported) as unsupported:
                plugin.call("NetworkDriver.Sing", {})
            assert str(unsupported.value).startswith("NetworkDriver.Sing: ")
            assert unsupported.value.http_status == 404
        assert served.driver.calls == 3


def test_many_threads_get_their_own_answers(tmp_path: Path) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        for call in range(20):
            options = {"n": f"{number} {call}"}
            answer = plugin.call(METHOD, {"NetworkID": f"{number:064x}", "Options": options})
            if answer["Options"] != options:
                wrong.append(answer)

    with serving_unix(tmp_path) as served, RemotePlugin(Address("s", f"unix://{served.path}")) as plugin:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert served.driver.calls == 8 * 20
    assert not wrong


def test_our_server_over_plain_tcp(tmp_path: Path) -> None:
    with serving_tcp(tmp_path), RemotePlugin(find("echo", folders=Folders(tmp_path, (tmp_path,)))) as plugin:
        assert plugin.activate() == ("NetworkDriver",)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    plugins, engines = Authority(folder / "plugins", "CA of plugins"), Authority(folder / "engines", "CA of engines")
    return Keys(plugins, engines, plugins.issue("plugin"), engines.issue("engine"))


def test_our_server_over_tls(tmp_path: Path, keys: Keys) -> None:
    folders = Folders(tmp_path, (tmp_path,))
    with serving_tcp(tmp_path, tls=keys.files) as served, RemotePlugin(find("echo", folders=folders)) as plugin:
        assert plugin.activate("NetworkDriver") == ("NetworkDriver",)
        for number in range(3):
            options = {"large": "y" * 1_000_000, "number": str(number)}
            assert plugin.call(METHOD, {**CONTENT, "Options": options})["Options"] == options
        assert served.driver.calls == 3


def test_who_does_not_know_the_plugins_ca_does_not_send_it_anything(tmp_path: Path, keys: Keys) -> None:
    with serving_tcp(tmp_path, tls=keys.files) as served:
        found = find("echo", folders=Folders(tmp_path, (tmp_path,)))
        assert found.tls is not None
        for ca in ("", str(keys.engines.file)):
            tls = replace(found.tls, ca=ca)
            with (
                RemotePlugin(replace(found, tls=tls), patience=Patience(0)) as plugin,
                pytest.raises(Unavailable, match=f'^Post "https://{HOST}:{served.port}/Net.*": .*verify failed'),
            ):
                plugin.call(METHOD, CONTENT)
        with RemotePlugin(replace(found, tls=replace(found.tls, ca="", insecure=True))) as plugin:
            plugin.call(METHOD, {**CONTENT, "Options": {}})
        assert served.driver.calls == 1


def test_the_cas_of_the_host_are_trusted(tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(keys.plugins.file))
    with serving_tcp(tmp_path, tls=keys.files) as served:
        url, pair = f"https://{HOST}:{served.port}", keys.engine
        for ca in ("", str(keys.engines.file)):
            tls = TLS(ca=ca, certificate=str(pair.certificate), key=str(pair.key))
            with RemotePlugin(Address("echo", url, tls)) as plugin:
                assert plugin.activate() == ("NetworkDriver",)


def test_who_has_no_certificate_is_not_served(tmp_path: Path, keys: Keys) -> None:
    with serving_tcp(tmp_path, tls=keys.files) as served:
        address = Address("echo", f"https://{HOST}:{served.port}", TLS(ca=str(keys.plugins.file)))
        with RemotePlugin(address, patience=Patience(0)) as plugin, pytest.raises(Unavailable):
            plugin.call(METHOD, CONTENT)
        assert served.driver.calls == 0


def test_a_key_with_a_password_is_refused_and_nobody_asked_for_it(tmp_path: Path, keys: Keys) -> None:
    key = serialization.load_pem_private_key(keys.engine.key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    encryption = serialization.BestAvailableEncryption(b"secret")
    locked.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    with pytest.raises(DriverError, match=r"^legacy plugin: could not load X509 key pair"):
        RemotePlugin(
            Address("x", "https://127.0.0.1:1", TLS(certificate=str(keys.engine.certificate), key=str(locked)))
        )


@pytest.mark.parametrize(
    ("tls", "said"),
    [
        (TLS(ca="/no/ca"), 'could not read CA certificate "/no/ca": no such file or directory'),
        (TLS(certificate="/no/c", key="/no/k"), "could not load X509 key pair: /no/c, /no/k: no such file"),
        (TLS(ca=__file__), "could not read CA certificate"),
    ],
)
def test_tls_files_that_cannot_be_used(tls: TLS, said: str) -> None:
    with pytest.raises(DriverError, match=f"^legacy plugin: {said}"):
        RemotePlugin(Address("x", "https://127.0.0.1:1", tls))
    RemotePlugin(Address("x", "tcp://127.0.0.1:1", tls))  # TLS is only for https, whatever the file says


# --------------------------------------------------------------------------------------- against one that misbehaves


class Request:
    """As it came, byte by byte."""

    def __init__(self, head: bytes, body: bytes) -> None:
        self.head, self.body = head, body
        first, *lines = head.decode().split("\r\n")
        self.method = first.removeprefix("POST /").removesuffix(" HTTP/1.1")
        self.headers = dict(line.split(": ", 1) for line in lines)


def receive(client: socket.socket) -> Request | None:
    """The next request, or None where there is none."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = client.recv(65536)
        if not more:
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += client.recv(65536)
    return Request(head, body)


def reply(body: bytes = b"{}", status: int = 200, *headers: str) -> bytes:
    lines = (f"HTTP/1.1 {status} Word", f"Content-Length: {len(body)}", *headers, "", "")
    return "\r\n".join(lines).encode() + body


class Raw:
    """A server that does with each connection what the test says; the last of `scripts` goes for all further ones."""

    def __init__(self, listener: socket.socket, scripts: tuple[Callable[[Raw, socket.socket], None], ...]) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self._listener, self._scripts = listener, scripts
        self._threads: list[threading.Thread] = []
        self._clients: list[socket.socket] = []

    def run(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.settimeout(PATIENCE)
                script = self._scripts[min(self.connections, len(self._scripts) - 1)]
                self.connections += 1
                self._clients.append(client)
                self._threads.append(threading.Thread(target=self._serve, args=(script, client)))
                self._threads[-1].start()

    def _serve(self, script: Callable[[Raw, socket.socket], None], client: socket.socket) -> None:
        with client, suppress(OSError):
            script(self, client)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for client in self._clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)


@contextmanager
def raw(
    path: Path, *scripts: Callable[[Raw, socket.socket], None], listener: socket.socket | None = None
) -> Iterator[Raw]:
    before = nothing_left() if listener is None else ExitStack()
    with before, listener or socket.socket(socket.AF_UNIX) as listening:
        if listener is None:
            listening.bind(str(path))
            listening.listen()
        server = Raw(listening, scripts)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield server
        finally:
            server.close()
            thread.join(PATIENCE)


def answering(*replies: bytes) -> Callable[[Raw, socket.socket], None]:
    """Answers the requests of a connection with these, and further ones with the last."""

    def script(server: Raw, client: socket.socket) -> None:
        left = list(replies)
        while request := receive(client):
            server.requests.append(request)
            client.sendall(left.pop(0) if len(left) > 1 else left[0])

    return script


def hanging_up(server: Raw, client: socket.socket) -> None:
    """Reads the request and goes."""
    if request := receive(client):
        server.requests.append(request)


def not_reading(_: Raw, client: socket.socket) -> None:
    """Goes at once."""


class Clock:
    """Passes only while somebody sleeps, and then calls `before` with how often that was so."""

    def __init__(self, before: Callable[[int], None] = lambda _: None) -> None:
        self.time = 100.0
        self.pauses: list[float] = []
        self._before = before

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.time += seconds
        self._before(len(self.pauses))

    @property
    def patience(self) -> Patience:
        return Patience(now=lambda: self.time, sleep=self.sleep)


def at(path: Path) -> Address:
    return Address("x", f"unix://{path}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.sock"


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: path.stem)
def test_requests_are_those_that_engines_sent(path: Path, recording: Path) -> None:
    recorded = [line for line in map(json.loads, recording.read_text().splitlines()) if "mark" not in line]
    assert len(recorded) > 40
    host = "" if "engine-20.10" in recording.name else None
    with raw(path, answering(reply())) as server, RemotePlugin(at(path), host=host) as plugin:
        for line in recorded:
            plugin.call(line["method"], line["request"])
        assert server.connections == 1
        assert len(server.requests) == len(recorded)
        for request, line in zip(server.requests, recorded, strict=True):
            assert request.method == line["method"]
            assert list(request.headers.items()) == list(line["headers"].items())  # the body's length among them
            if line["request"] is None:
                assert request.body == b""
            else:
                assert request.body.endswith(b"}\n")
                assert json.loads(request.body) == line["request"]


def test_text_is_written_as_go_writes_it(path: Path) -> None:
    with raw(path, answering(reply())) as server, RemotePlugin(at(path)) as plugin:
        plugin.call(JOIN, {"a": "<b>&ü\u2028\u2029", "c": None, "d": {}})
        assert server.requests[0].body == '{"a":"\\u003cb\\u003e\\u0026ü\\u2028\\u2029","c":null,"d":{}}\n'.encode()
        plugin.call(JOIN, {})
        assert server.requests[1].body == b"{}\n"


def test_requests_over_tcp_ask_for_gzip(tmp_path: Path) -> None:
    packed = reply(gzip.compress(b'{"a": 1}'), 200, "Content-Encoding: gzip")
    listener = socket.create_server((HOST, 0))
    name = f"{HOST}:{listener.getsockname()[1]}"
    with (
        raw(tmp_path, answering(reply(), packed), listener=listener) as server,
        RemotePlugin(Address("x", f"tcp://{name}", TLS(insecure=True))) as plugin,
    ):
        assert plugin.call(JOIN, {}) == {}
        assert plugin.call(JOIN, {}) == {"a": 1}
        assert list(server.requests[0].headers.items()) == [
            ("Host", name),
            ("User-Agent", "Go-http-client/1.1"),
            ("Content-Length", "3"),
            ("Accept", "application/vnd.docker.plugins.v1.2+json"),
            ("Accept-Encoding", "gzip"),
        ]


@pytest.mark.parametrize(
    ("method", "body", "decoded"),
    [
        (JOIN, b'{"Gateway": "10.0.0.1"}', {"Gateway": "10.0.0.1"}),
        (JOIN, b' \n{"a": 1} and more', {"a": 1}),
        (JOIN, b"null", {}),
        (JOIN, b'{"Err": "", "err": null}', {"Err": "", "err": None}),
        (JOIN, b'{"Error": "not read"}', {"Error": "not read"}),
        ("IpamDriver.RequestPool", b'{"Err": "not read"}', {"Err": "not read"}),
        ("Plugin.Activate", b'{"Err": "not read"}', {"Err": "not read"}),
        (JOIN, b'{"a": "\xff"}', {"a": "\ufffd"}),
    ],
)
def test_answers_that_are_taken(path: Path, method: str, body: bytes, decoded: dict[str, Any]) -> None:
    with raw(path, answering(reply(body))), RemotePlugin(at(path)) as plugin:
        assert plugin.call(method, {}) == decoded


@pytest.mark.parametrize(
    ("method", "status", "body", "said"),
    [
        (JOIN, 200, b'{"Err": "no"}', "remote: no"),
        (JOIN, 200, b'{"err": "two\\nlines"}', "remote: two\nlines"),
        ("IpamDriver.RequestPool", 200, b'{"Error": "no"}', "remote: no"),
        (JOIN, 200, b"", "EOF"),
        (JOIN, 200, b'{"a": 1', "unexpected EOF"),
        (JOIN, 200, b'{"a": "1', "unexpected EOF"),
        (JOIN, 200, b"<html>", "invalid character '<' looking for beginning of value"),
        (JOIN, 200, b'{"a": NaN}', "invalid character 'N' looking for beginning of value"),
        (JOIN, 200, b"[" * 100_000, "exceeded max depth"),
        (JOIN, 200, b'["no"]', "json: cannot unmarshal array into Go value"),
        (JOIN, 200, b'{"Err": 5}', "json: cannot unmarshal number into Go struct field Err of type string"),
        (JOIN, 500, b'{"Err": "no"}', f"{JOIN}: no"),
        ("IpamDriver.RequestPool", 500, b'{"Err": "no"}', "IpamDriver.RequestPool: no"),
        ("IpamDriver.RequestPool", 500, b'{"Error": "no"}', 'IpamDriver.RequestPool: {"Error": "no"}'),
        (JOIN, 500, b"in words\n", f"{JOIN}: in words\n"),
        (JOIN, 500, b'{"Err": 5}', f'{JOIN}: {{"Err": 5}}'),
        (JOIN, 500, b'{"Err": "no"} and more', f'{JOIN}: {{"Err": "no"}} and more'),
        (JOIN, 201, b"{}", f"{JOIN}: {{}}"),
        (JOIN, 500, b"", f"{JOIN}: "),
    ],
)
def test_answers_that_are_errors(path: Path, method: str, status: int, body: bytes, said: str) -> None:
    with raw(path, answering(reply(body, status), reply())) as server, RemotePlugin(at(path)) as plugin:
        with pytest.raises(RemoteError) as caught:
            plugin.call(method, {})
        assert (str(caught.value), caught.value.http_status) == (said, status)
        assert type(caught.value) is RemoteError
        assert plugin.call(method, {}) == {}
        assert server.connections == 1  # which is none the worse for it


def test_what_is_not_found_is_not_supported(path: Path) -> None:
    with raw(path, answering(reply(b"404 page not found\n", 404))), RemotePlugin(at(path)) as plugin:
        with pytest.raises(MethodNotSupported) as caught:
            plugin.call("NetworkDriver.RevokeExternalConnectivity", {})
        assert str(caught.value) == "NetworkDriver.RevokeExternalConnectivity: 404 page not found\n"


def test_a_huge_answer_is_taken_since_the_engine_has_no_limit(path: Path) -> None:
    with raw(path, answering(reply(b'{"a": "%s"}' % (b"x" * 20_000_000)))), RemotePlugin(at(path)) as plugin:
        assert len(plugin.call(JOIN, {})["a"]) == 20_000_000


def test_a_chunked_answer(path: Path) -> None:
    with raw(path, answering(CHUNKED)) as server, RemotePlugin(at(path)) as plugin:
        assert [plugin.call(JOIN, {}) for _ in range(2)] == [{"a": 1}] * 2
        assert server.connections == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (reply(b'{"a": 1}')[:-3], "unexpected EOF"),
        (reply(b"in words", 500)[:-3], f"{JOIN}: unexpected EOF"),
        (CHUNKED[:-10], "unexpected EOF"),
        (CHUNKED[:-11], "unexpected EOF"),
        (CHUNKED[:-7], "unexpected EOF"),
    ],
)
def test_an_answer_that_is_cut_is_not_asked_for_again(path: Path, answer: bytes, said: str) -> None:
    def cutting(server: Raw, client: socket.socket) -> None:
        hanging_up(server, client)
        client.sendall(answer)

    clock = Clock()
    with raw(path, cutting) as server, RemotePlugin(at(path), patience=clock.patience) as plugin:
        with pytest.raises(RemoteError) as caught:
            plugin.call(JOIN, CONTENT)
        assert (str(caught.value), len(server.requests), clock.pauses) == (said, 1, [])


def test_activation_is_asked_for_once_and_tells_kinds_apart(path: Path) -> None:
    manifest = reply(b'{"Implements": ["NetworkDriver"]}')
    with raw(path, answering(manifest)) as server, RemotePlugin(at(path)) as plugin:
        for _ in range(2):
            assert plugin.activate("NetworkDriver") == ("NetworkDriver",)
        with pytest.raises(RemoteError) as caught:
            plugin.activate("IpamDriver")
        assert str(caught.value) == (
            "legacy plugin: Plugin does not implement the requested driver: "
            'plugin="x", requested implementation="IpamDriver"'
        )
        assert [(request.method, request.body) for request in server.requests] == [("Plugin.Activate", b"")]


def test_an_activation_that_fails_is_tried_again(path: Path) -> None:
    replies = reply(b"busy", 500), reply(b'{"Implements": 5}'), reply(b"{}")
    with raw(path, answering(*replies)), RemotePlugin(at(path)) as plugin:
        for said in ("Plugin.Activate: busy", "json: cannot unmarshal number"):
            with pytest.raises(RemoteError, match=f"^legacy plugin: {said}"):
                plugin.activate()
            assert plugin.implements is None
        assert plugin.activate() == ()


# Trying again


@pytest.mark.parametrize(
    ("url", "address", "words"),
    [
        ("tcp://h:1", ("h", 1), "h:1"),
        ("http://h", ("h", 80), "h:80"),
        ("https://h", ("h", 443), "h:443"),
        ("tcp://[::1]:1", ("::1", 1), "[::1]:1"),
    ],
)
def test_a_host_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, url: str, address: tuple[str, int], words: str
) -> None:
    def connect(where: tuple[str, int], timeout: float) -> socket.socket:
        assert (where, timeout) == (address, 10)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", connect)
    with RemotePlugin(Address("x", url), patience=Patience(0)) as plugin, pytest.raises(Unavailable) as caught:
        plugin.call(JOIN, {})
    assert str(caught.value).endswith(f'": dial tcp {words}: i/o timeout')


def test_a_url_with_two_slashes_is_a_file_of_the_working_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    with raw(path, answering(reply())), RemotePlugin(Address("x", f"unix://{path.name}/run/y.sock")) as plugin:
        assert plugin.call(JOIN, {}) == {}


def test_a_plugin_that_is_not_there_is_tried_for_15_seconds(path: Path) -> None:
    clock = Clock()
    with RemotePlugin(at(path), patience=clock.patience) as plugin, pytest.raises(Unavailable) as caught:
        plugin.call(JOIN, CONTENT)
    assert clock.pauses == [1, 2, 4, 8]
    assert str(caught.value) == (
        f'Post "http://plugin.moby.localhost/{JOIN}": dial unix {path}: connect: no such file or directory'
    )


def test_a_request_that_found_no_connection_keeps_its_body(path: Path) -> None:
    servers: list[Raw] = []
    with ExitStack() as stack:

        def start(pauses: int) -> None:
            if pauses == 2:
                servers.append(stack.enter_context(raw(path, answering(reply()))))

        clock = Clock(start)
        with RemotePlugin(at(path), patience=clock.patience) as plugin:
            plugin.call(JOIN, CONTENT)
        assert clock.pauses == [1, 2]
        assert [request.body for request in servers[0].requests] == [BODY]


@pytest.mark.parametrize("script", [hanging_up, not_reading])
def test_a_request_that_found_one_has_lost_its_body(path: Path, script: Callable[[Raw, socket.socket], None]) -> None:
    clock = Clock()
    with (
        raw(path, script, script, answering(reply())) as server,
        RemotePlugin(at(path), patience=clock.patience) as plugin,
    ):
        plugin.call(JOIN, CONTENT)
        assert clock.pauses == [1, 2]
        bodies = [request.body for request in server.requests]
        assert bodies == ([BODY, b"", b""] if script is hanging_up else [b""])
        assert server.requests[-1].headers["Content-Length"] == "0"


def reading_some(_: Raw, client: socket.socket) -> None:
    read = 0
    while read < 100_000 and (data := client.recv(10_000)):
        read += len(data)


def test_of_a_large_request_that_was_cut_the_end_is_sent(path: Path) -> None:
    content = {"large": "".join(map(str, range(200_000)))}
    whole = json.dumps(content, separators=(",", ":")).encode() + b"\n"
    clock = Clock()
    with (
        raw(path, reading_some, answering(reply())) as server,
        RemotePlugin(at(path), patience=clock.patience) as plugin,
    ):
        plugin.call(JOIN, content)
        assert clock.pauses == [1]
        rest = server.requests[0].body
        assert whole.endswith(rest)
        head = len(server.requests[0].head) + len("\r\n\r\n") + len(str(len(whole))) - len(str(len(rest)))
        chunks, less = divmod(head + len(whole) - len(rest) - 4096, 32 * 1024)
        assert chunks > 1
        assert less == 0


def test_a_request_that_is_not_read_is_unavailable_in_the_end(path: Path) -> None:
    said = f"write unix @->{path}: write: (broken pipe|connection reset by peer)$"
    with (
        raw(path, reading_some),
        RemotePlugin(at(path), patience=Patience(0)) as plugin,
        pytest.raises(Unavailable, match=said),
    ):
        plugin.call(JOIN, {"large": "x" * 2_000_000})


def test_a_kept_connection_that_takes_nothing_is_replaced_at_once_and_nothing_is_lost(path: Path) -> None:
    def answering_once(server: Raw, client: socket.socket) -> None:
        hanging_up(server, client)
        client.shutdown(socket.SHUT_RD)
        client.sendall(reply())
        closed.wait(PATIENCE)

    closed, clock = threading.Event(), Clock()
    with (
        raw(path, answering_once, answering(reply())) as server,
        RemotePlugin(at(path), patience=clock.patience) as plugin,
    ):
        plugin.call(JOIN, {})
        plugin.call(JOIN, CONTENT)
        closed.set()
        assert (server.connections, clock.pauses) == (2, [])
        assert server.requests[-1].body == BODY


def test_what_makes_no_sense_is_tried_again(path: Path) -> None:
    clock = Clock()
    with raw(path, answering(b"nonsense\r\n\r\n")) as server, RemotePlugin(at(path), patience=clock.patience) as plugin:
        with pytest.raises(Unavailable, match="malformed HTTP response nonsense"):
            plugin.call(JOIN, {})
        assert server.connections == 5
        assert len(clock.pauses) == 4


def test_a_plugin_that_hangs_up_is_unavailable_in_the_end(path: Path) -> None:
    clock = Clock()
    with raw(path, hanging_up), RemotePlugin(at(path), patience=clock.patience) as plugin:
        with pytest.raises(Unavailable) as caught:
            plugin.call(JOIN, CONTENT)
        assert str(caught.value) == f'Post "http://plugin.moby.localhost/{JOIN}": EOF'
        assert clock.pauses == [1, 2, 4, 8]


@pytest.mark.parametrize("end", [1, len("HTTP/1.1 200"), len("HTTP/1.1 200 Word\r\nContent-Length: 2"), -len("\r\n{}")])
def test_an_answer_whose_head_is_cut_is_asked_for_again(path: Path, end: int) -> None:
    def cutting(server: Raw, client: socket.socket) -> None:
        hanging_up(server, client)
        client.sendall(reply()[:end])

    clock = Clock()
    with raw(path, cutting) as server, RemotePlugin(at(path), patience=clock.patience) as plugin:
        with pytest.raises(Unavailable, match=r'": unexpected EOF$'):
            plugin.call(JOIN, CONTENT)
        assert server.connections == 5


def test_a_plugin_that_hangs_is_waited_for_as_long_as_wanted(path: Path) -> None:
    def hanging(server: Raw, client: socket.socket) -> None:
        hanging_up(server, client)
        client.recv(1)

    with raw(path, hanging), RemotePlugin(at(path), timeout=0.05, patience=Patience(0)) as plugin:
        with pytest.raises(Unavailable) as caught:
            plugin.call(JOIN, CONTENT)
        assert str(caught.value).endswith("exceeded (Client.Timeout exceeded while awaiting headers)")


def test_a_full_backlog_is_an_error_and_not_a_wait(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as stack:
        listener.bind(str(path))
        listener.listen(0)
        with suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(str(path))
        clock = Clock(lambda _: listener.accept()[0].close())
        for patience, said in (
            (Patience(0), f"dial unix {path}: connect: resource temporarily unavailable"),
            (replace(clock.patience, total=1.5), "context deadline exceeded"),  # it gets in, where nobody answers
        ):
            with (
                RemotePlugin(at(path), timeout=0.05, patience=patience) as plugin,
                pytest.raises(Unavailable, match=said),
            ):
                plugin.call(JOIN, CONTENT)
        assert clock.pauses == [1]


# Connections


def test_a_kept_connection_that_the_plugin_ended_is_not_used(path: Path) -> None:
    clock, gone = Clock(), threading.Event()

    def answering_once(server: Raw, client: socket.socket) -> None:
        hanging_up(server, client)
        client.sendall(reply())
        client.close()
        gone.set()

    with raw(path, answering_once) as server, RemotePlugin(at(path), patience=clock.patience) as plugin:
        for _ in range(3):
            gone.clear()
            plugin.call(JOIN, CONTENT)
            assert gone.wait(PATIENCE)
        assert [request.body for request in server.requests] == [BODY] * 3
        assert clock.pauses == []


def test_what_a_plugin_says_unasked_is_no_answer(path: Path) -> None:
    told, said = threading.Event(), threading.Event()

    def talking(server: Raw, client: socket.socket) -> None:
        hanging_up(server, client)
        client.sendall(reply())
        told.wait(PATIENCE)
        client.sendall(reply(b'{"Err": "too late"}'))
        said.set()
        client.recv(1)

    with raw(path, talking, answering(reply())) as server, RemotePlugin(at(path)) as plugin:
        plugin.call(JOIN, {})
        told.set()
        assert said.wait(PATIENCE)
        assert plugin.call(JOIN, {}) == {}
        assert server.connections == 2


def test_a_connection_is_not_kept_when_the_plugin_says_so(path: Path) -> None:
    with (
        raw(path, answering(reply(b"{}", 200, "Connection: close"))) as server,
        RemotePlugin(at(path)) as plugin,
    ):
        for _ in range(3):
            plugin.call(JOIN, {})
        assert server.connections == 3


def test_an_idle_connection_is_used_for_30_seconds(path: Path) -> None:
    clock = Clock()
    with raw(path, answering(reply())) as server, RemotePlugin(at(path), patience=clock.patience) as plugin:
        for seconds, connections in ((0, 1), (29, 1), (29, 1), (30, 2)):
            clock.time += seconds
            plugin.call(JOIN, {})
            assert server.connections == connections


def test_two_connections_are_kept(path: Path) -> None:
    together = threading.Barrier(3)

    def answering_together(_: Raw, client: socket.socket) -> None:
        while receive(client):
            together.wait(PATIENCE)
            client.sendall(reply())

    def three_calls() -> None:
        threads = [threading.Thread(target=plugin.call, args=(JOIN, {})) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)

    with raw(path, answering_together) as server, RemotePlugin(at(path)) as plugin:
        for connections in (3, 4, 5):
            three_calls()
            assert server.connections == connections
        plugin.close()
        three_calls()
        assert server.connections == 8
