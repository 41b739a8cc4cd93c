"""myplugin on real engines, used as Docker's bridge is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from myplugin.options import Options

from netplugin_sdk.testing.engine import (
    ENGINE_ADDRESS,
    OUTSIDE_ADDRESS,
    EngineError,
    PrivateEngine,
    Process,
    wait_until,
)

from ..patience import PATIENCE
from .conftest import MYPLUGIN, state_of

pytestmark = [pytest.mark.one_engine, pytest.mark.usefixtures("myplugin")]

# The outside host tells each caller which address it sees.
TELL = f"""
import socketserver
class Tell(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(self.client_address[0].encode())
socketserver.TCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(("{OUTSIDE_ADDRESS}", 4000), Tell).serve_forever()
"""


@pytest.fixture
def outside(engine: PrivateEngine) -> Iterator[None]:
    with engine.spawn("tell", [sys.executable, "-c", TELL], outside=True):
        wait_until(lambda: engine.run_outside(["ss", "-Hltn", "sport = :4000"]).stdout != "", PATIENCE)
        yield


def create(engine: PrivateEngine, *options: str, name: str = "mynet") -> str:
    """Its bridge."""
    return "br-" + engine.docker("network", "create", "--driver", "myplugin", *options, name)[:12]


def run(engine: PrivateEngine, name: str, *options: str, network: str = "mynet") -> None:
    engine.docker("run", "--detach", "--name", name, "--network", network, *options, "busybox", "sleep", "600")


def pings(engine: PrivateEngine, container: str, target: str) -> bool:
    return engine.run_docker("exec", container, "ping", "-c1", "-W1", target).returncode == 0


def address(engine: PrivateEngine, container: str, network: str = "mynet") -> str:
    return engine.docker("inspect", "-f", f"{{{{.NetworkSettings.Networks.{network}.IPAddress}}}}", container)


def test_the_bridge_has_the_gateway_and_its_containers_reach_each_other(engine: PrivateEngine) -> None:
    bridge = create(engine, "--subnet", "10.77.0.0/24", "--gateway", "10.77.0.254")
    assert "10.77.0.254/24" in engine.run(["ip", "-brief", "address", "show", bridge]).stdout
    run(engine, "one", "--ip", "10.77.0.7")
    run(engine, "two", "--mac-address", "02:00:00:00:00:07")
    assert pings(engine, "two", "one")
    assert pings(engine, "one", address(engine, "two"))
    assert pings(engine, "two", "10.77.0.7")
    assert "02:00:00:00:00:07" in engine.docker("exec", "two", "ip", "link", "show", "eth0")
    assert "default via 10.77.0.254" in engine.docker("exec", "two", "ip", "route")


def test_mtu_is_that_of_bridge_pair_and_container(engine: PrivateEngine) -> None:
    bridge = create(engine, "-o", "com.docker.network.driver.mtu=1400")
    run(engine, "one")
    for shown in (
        engine.run(["ip", "link", "show", bridge]).stdout,
        engine.run(["ip", "link", "show", "master", bridge]).stdout,
        engine.docker("exec", "one", "ip", "link", "show", "eth0"),
    ):
        assert " mtu 1400 " in shown


@pytest.mark.usefixtures("outside")
def test_what_leaves_has_the_hosts_address(engine: PrivateEngine) -> None:
    create(engine)
    seen = engine.docker("run", "--rm", "--network", "mynet", "busybox", "nc", OUTSIDE_ADDRESS, "4000")
    assert seen == ENGINE_ADDRESS


@pytest.mark.usefixtures("outside")
def test_without_masquerading_it_has_its_own(engine: PrivateEngine) -> None:
    create(engine, "--subnet", "10.77.0.0/24", "-o", "com.docker.network.bridge.enable_ip_masquerade=false")
    ask = ("run", "--rm", "--ip", "10.77.0.7", "--network", "mynet", "busybox", "timeout", "20", "nc", OUTSIDE_ADDRESS)
    engine.run_outside(["ip", "route", "add", "10.77.0.0/24", "via", ENGINE_ADDRESS])
    try:
        assert engine.docker(*ask, "4000") == "10.77.0.7"
    finally:
        engine.run_outside(["ip", "route", "del", "10.77.0.0/24"])


def test_internal(engine: PrivateEngine) -> None:
    create(engine, "--internal")
    run(engine, "one")
    run(engine, "two")
    assert pings(engine, "one", "two")
    assert not pings(engine, "one", OUTSIDE_ADDRESS)
    assert "default" not in engine.docker("exec", "one", "ip", "route")


def test_networks_do_not_reach_each_other(engine: PrivateEngine) -> None:
    create(engine)
    create(engine, name="other")
    run(engine, "one")
    run(engine, "two", network="other")
    run(engine, "three", network="bridge")
    assert not pings(engine, "one", address(engine, "two", "other"))
    assert not pings(engine, "two", address(engine, "one"))
    assert not pings(engine, "three", address(engine, "one"))


def test_ipv6(engine: PrivateEngine) -> None:
    create(engine, "--ipv6", "--subnet", "fd00:77::/64", "--gateway", "fd00:77::1")
    run(engine, "one")
    run(engine, "two")
    six = engine.docker("inspect", "-f", "{{.NetworkSettings.Networks.mynet.GlobalIPv6Address}}", "two")
    assert six.startswith("fd00:77::")
    # busybox has no ping for IPv6 here: a connection does as well
    engine.docker("exec", "--detach", "two", "nc", "-ll", "-p", "80", "-e", "echo", "hello")
    wait_until(lambda: ":80 " in engine.docker("exec", "two", "netstat", "-ltn"), PATIENCE)
    # Again, since on a busy machine the kernel may open a bridge's port later than neighbours are asked for.
    ask = ("exec", "one", "timeout", "20", "nc", six, "80")
    wait_until(lambda: engine.run_docker(*ask).stdout == "hello\n", PATIENCE)


def test_connect_and_disconnect_a_running_container(engine: PrivateEngine) -> None:
    create(engine)
    create(engine, name="other")
    run(engine, "one")
    run(engine, "two", network="other")
    engine.docker("network", "connect", "other", "one")
    assert pings(engine, "one", "two")
    engine.docker("network", "disconnect", "other", "one")
    assert not pings(engine, "one", address(engine, "two", "other"))
    engine.docker("network", "connect", "other", "one")
    assert pings(engine, "one", "two")


def test_a_container_that_is_restarted_and_killed(engine: PrivateEngine) -> None:
    create(engine)
    before = state_of(engine)
    run(engine, "one")
    engine.docker("restart", "--time", "0", "one")
    engine.docker("kill", "one")
    engine.docker("start", "one")
    run(engine, "two")
    assert pings(engine, "two", "one")
    engine.docker("rm", "--force", "one", "two")
    wait_until(lambda: state_of(engine) == before, PATIENCE)


def test_many_at_once(engine: PrivateEngine) -> None:
    networks = [f"net{number}" for number in range(4)]
    with ThreadPoolExecutor(8) as users:
        list(users.map(lambda name: create(engine, name=name), networks))
        list(users.map(lambda number: run(engine, f"c{number}", network=networks[number % 4]), range(8)))
        reached = list(users.map(lambda number: pings(engine, f"c{number}", f"c{(number + 4) % 8}"), range(8)))
    assert reached == [True] * 8


def test_a_network_in_use_cannot_be_removed(engine: PrivateEngine) -> None:
    create(engine)
    run(engine, "one")
    assert "has active endpoints" in engine.run_docker("network", "rm", "mynet").stderr
    assert pings(engine, "one", OUTSIDE_ADDRESS)


NOT_A_NAME = "cannot be the name of an interface"
BAD = [
    ("driver.mtu", "none", "expected 68 to 65535, or 0 for 1500"),
    ("driver.mtu", "67", "expected 68 to 65535, or 0 for 1500"),
    ("bridge.name", "a b", NOT_A_NAME),
    ("bridge.name", "sixteen-bytes-xx", NOT_A_NAME),
    ("bridge.name", "lo", "a physical or loopback interface has this name"),
    ("bridge.enable_icc", "maybe", "expected true or false"),
    ("bridge.enable_ip_masquerade", "", "expected true or false"),
    ("bridge.inhibit_ipv4", "2", "expected true or false"),
    ("bridge.gateway_mode_ipv4", "bad", "expected nat, nat-unprotected, routed or isolated"),
    ("bridge.gateway_mode_ipv6", "NAT", "expected nat, nat-unprotected, routed or isolated"),
    ("bridge.gateway_mode_ipv4", "isolated", "can only be used for an internal network"),
    ("bridge.host_binding_ipv4", "::1", "expected an IPv4 address"),
    ("bridge.trusted_host_interfaces", "eth0:a+", NOT_A_NAME),
    ("host_ipv4", "nowhere", "expected an IPv4 address"),
    ("host_ipv6", "192.0.2.1", "expected an IPv6 address"),
    ("container_iface_prefix", "a/b", "expected up to 12 bytes without white space"),
    ("nonsense", "1", "unknown option 'com.docker.network.nonsense'; known options: com.docker.network"),
]


def test_every_option_has_a_bad_value_here() -> None:
    assert {f"com.docker.network.{key}" for key, _, _ in BAD} > set(Options.__struct_encode_fields__)


@pytest.mark.parametrize(("key", "value", "said"), BAD)
def test_a_network_that_cannot_be_leaves_nothing(engine: PrivateEngine, key: str, value: str, said: str) -> None:
    before = state_of(engine)
    option = f"com.docker.network.{key}={value}"
    done = engine.run_docker("network", "create", "--driver", "myplugin", "-o", option, "mynet")
    assert done.returncode != 0
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    wait_until(lambda: state_of(engine) == before, PATIENCE)


def test_ipv6_needs_an_mtu_of_1280(engine: PrivateEngine) -> None:
    options = ("--ipv6", "--subnet", "fd00:77::/64", "-o", "com.docker.network.driver.mtu=1279")
    done = engine.run_docker("network", "create", "--driver", "myplugin", *options, "mynet")
    assert "mtu=1279: IPv6 needs 1280" in done.stderr


def test_the_lab_starts_no_plugin_where_another_listens(engine: PrivateEngine, myplugin: Process) -> None:
    with pytest.raises(EngineError, match=r"another plugin listens at /run/docker/plugins/myplugin\.sock"):
        engine.start_plugin("myplugin", MYPLUGIN)
    assert myplugin.running


def test_the_plugin_may_be_restarted_under_running_containers(engine: PrivateEngine, myplugin: Process) -> None:
    create(engine)
    run(engine, "one")
    myplugin.kill()
    with engine.start_plugin("myplugin", MYPLUGIN):
        run(engine, "two")
        assert pings(engine, "two", "one")
        engine.docker("rm", "--force", "one", "two")
        engine.docker("network", "rm", "mynet")
        wait_until(lambda: "br-" not in engine.run(["ip", "-brief", "link"]).stdout, PATIENCE)


def test_the_engine_may_be_restarted(engine: PrivateEngine) -> None:
    create(engine)
    run(engine, "one", "--restart", "always", "--stop-timeout", "1")
    engine.stop()
    engine.start()
    wait_until(lambda: "one" in engine.docker("ps", "--format", "{{.Names}}"), PATIENCE)
    run(engine, "two")
    assert pings(engine, "two", "one")


def test_inspect_shows_what_the_container_has(engine: PrivateEngine) -> None:
    create(engine)
    run(engine, "one")
    (container,) = json.loads(engine.docker("inspect", "one"))
    seen = container["NetworkSettings"]["Networks"]["mynet"]
    shown = engine.docker("exec", "one", "ip", "address", "show", "eth0")
    assert seen["MacAddress"] in shown
    assert f"{seen['IPAddress']}/{seen['IPPrefixLen']}" in shown
    assert f"default via {seen['Gateway']}" in engine.docker("exec", "one", "ip", "route")
