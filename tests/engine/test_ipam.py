"""PoolIpamDriver on real engines, as myplugin serves it: it works like Docker's own IPAM driver, and has more options.

Then both sides restart and are killed: the driver gives out no address twice, and finds leaked ones again.
"""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from ipaddress import ip_address, ip_network
from itertools import count
from random import Random
from shutil import copy
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import pytest

from netplugin_sdk import DriverError
from netplugin_sdk.core.engine_api import Docker, DockerError
from netplugin_sdk.testing.engine import PrivateEngine, Process, wait_until

from ..patience import PATIENCE
from ..volume import volume
from . import test_faults
from .conftest import MYPLUGIN, plugin_beside, remove_all
from .test_faults import EMPTY, FIRST, KILL_AT

pytestmark = pytest.mark.one_engine

STEP = volume(18, 1)
"""Of the points at which the plugin is killed."""

each_driver = pytest.mark.parametrize("driver", ["bridge", "myplugin"])

SUBNET = ("--subnet", "10.77.0.0/24")
SUBNET6 = ("--ipv6", "--subnet", "fd00:77::/64")

TAKEN = "IpamDriver.RequestAddress: Address already in use"
NONE_LEFT = "IpamDriver.RequestAddress: no available addresses on this pool"
OVERLAPS = "IpamDriver.RequestPool: Pool overlaps with other one on this address space"
NO_POOL_LEFT = "IpamDriver.RequestPool: all predefined address pools have been fully subnetted"

OWN = """
import time
from netplugin_sdk import serve
from netplugin_sdk.ipam import DefaultPool, PoolIpamDriver
from netplugin_sdk.linux import links
class Own(PoolIpamDriver):
    def request_address(self, request):
        print("asked with:", *request.options, flush=True)
        if "10.66.0.0" in request.pool_id:
            time.sleep(1)
        return super().request_address(request)
pools = map(DefaultPool.parse, ("10.90.0.0/22 size 24", "fd00:90::/63 size 64"))
serve(Own(local=list(pools), occupied=links.occupied), name="own")
"""
FAULTY = """
import time
from netplugin_sdk import Timings, serve
from netplugin_sdk.ipam import PoolIpamDriver
from netplugin_sdk.linux import links
SHORT = Timings(missing_grace=3.0, engine_grace=3.0)
def linger(pool_id):
    time.sleep(0.1 if "10.77.9.0" in pool_id else 0)
class Faulty(PoolIpamDriver):
    def request_address(self, request):
        given = super().request_address(request)
        linger(request.pool_id)
        return given
    def release_address(self, address):
        linger(address.pool_id)
        super().release_address(address)
serve(Faulty(occupied=links.occupied, missing_grace=3.0), name="faulty", timings=SHORT)
"""
FORGETFUL = """
import logging, signal
from pathlib import Path
from netplugin_sdk import Plugin, Server
from netplugin_sdk.ipam import PoolIpamDriver
from netplugin_sdk.linux import links
logging.basicConfig(level=logging.INFO)
with Plugin(PoolIpamDriver(occupied=links.occupied)) as plugin, Server(plugin) as server:
    server.listen_unix(Path("/run/docker/plugins/forgetful.sock"))
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    server.run()
"""


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


@pytest.fixture(scope="module")
def myplugin(engine: PrivateEngine) -> Iterator[Process]:
    """One for all tests here."""
    yield from plugin_beside(engine, "myplugin", MYPLUGIN)


@pytest.fixture(scope="module")
def own(engine: PrivateEngine) -> Iterator[Process]:
    """Has four networks of its own to choose, and two of IPv6; tells what it is asked with; slow in 10.66.0.0."""
    yield from plugin_beside(engine, "own", program(OWN))


@pytest.fixture(autouse=True)
def nothing_stays(engine: PrivateEngine, myplugin: Process) -> Iterator[None]:
    """With its networks myplugin forgets all that it gave out, on disk too."""
    yield
    assert myplugin.running
    remove_all(engine)
    wait_until(lambda: rows(engine) == [], PATIENCE)


def on_disk(engine: PrivateEngine, plugin: str, query: str) -> list[Any]:
    """The first column of the plugin's state. Of a copy, since nobody else reads the file."""
    with TemporaryDirectory() as folder:
        for file in (engine.run_folder.parent / f"var/lib/netplugin/{plugin}").glob("ipam.db*"):
            copy(file, folder)
        with closing(sqlite3.connect(f"{folder}/ipam.db")) as db:
            return [first for first, *_ in db.execute(query)]


def rows(engine: PrivateEngine, plugin: str = "myplugin") -> list[str]:
    """Its state on disk: networks, and addresses in use or held."""
    networks = on_disk(engine, plugin, "SELECT network FROM networks")
    addresses = on_disk(engine, plugin, "SELECT address FROM addresses")
    return sorted([*networks, *(str(ip_address(packed)) for packed in addresses)])


def create(
    engine: PrivateEngine, *options: str, driver: str = "bridge", ipam: str = "myplugin", name: str = "mynet"
) -> None:
    engine.docker("network", "create", "--driver", driver, "--ipam-driver", ipam, *options, name)


def run(engine: PrivateEngine, name: str, *options: str, network: str = "mynet") -> None:
    options = ("--network", network, "--stop-signal", "KILL", *options)
    engine.docker("run", "--detach", "--name", name, *options, "busybox", "sleep", "600")


def passing(engine: PrivateEngine, *options: str, network: str = "mynet") -> str:
    """The IPv4 address of a container that is gone again."""
    shown = engine.docker(
        "run", "--rm", "--network", network, *options, "busybox", "ip", "-4", "address", "show", "eth0"
    )
    (found,) = re.findall("inet (.*?)/", shown)
    return str(found)


def address(engine: PrivateEngine, container: str, field: str = "IPAddress", network: str = "mynet") -> str:
    return engine.docker("inspect", "-f", f"{{{{.NetworkSettings.Networks.{network}.{field}}}}}", container)


def subnets(engine: PrivateEngine, name: str) -> list[str]:
    (network,) = json.loads(engine.docker("network", "inspect", name))
    return sorted(config["Subnet"] for config in network["IPAM"]["Config"])


def refused(engine: PrivateEngine, *arguments: str) -> str:
    """The text of docker's error: one line, without the hint at help and the client's own messages."""
    done = engine.run_docker(*arguments)
    assert done.returncode != 0, done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line and not re.search("^time=|docker run --help", line)]
    return line


def no_run(engine: PrivateEngine, *options: str, network: str = "mynet") -> str:
    return refused(engine, "run", "--rm", "--network", network, *options, "busybox", "true")


def no_network(engine: PrivateEngine, *options: str, driver: str = "bridge", ipam: str = "myplugin") -> str:
    return refused(engine, "network", "create", "--driver", driver, "--ipam-driver", ipam, *options, "other")


def pings(engine: PrivateEngine, container: str, target: str) -> bool:
    return engine.run_docker("exec", container, "ping", "-c1", "-W1", target).returncode == 0


# ------------------------------------------------------------------------------------------- what users ask for


@pytest.mark.each_engine
@each_driver
def test_addresses_in_a_range_and_those_that_are_asked_for(engine: PrivateEngine, driver: str) -> None:
    options = ("--ip-range", "10.77.0.128/30", "--gateway", "10.77.0.254", "--aux-address", "printer=10.77.0.129")
    create(engine, *SUBNET, *options, driver=driver)
    run(engine, "one")
    run(engine, "two")
    assert [address(engine, name) for name in ("one", "two")] == ["10.77.0.128", "10.77.0.130"]
    assert pings(engine, "one", "two")
    assert pings(engine, "one", "10.77.0.254")
    assert passing(engine, "--ip", "10.77.0.7") == "10.77.0.7"  # not in the range: Docker's own gives it too
    for taken in ("10.77.0.129", "10.77.0.130", "10.77.0.254"):
        assert TAKEN in no_run(engine, "--ip", taken)
    assert passing(engine) == "10.77.0.131"
    run(engine, "three", "--ip", "10.77.0.131")
    assert NONE_LEFT in no_run(engine)
    done = engine.run_docker("run", "--rm", "--network", "mynet", "--ip", "10.78.0.7", "busybox", "true")
    assert re.search(r"(Invalid address 10\.78\.0\.7: It does not|no configured subnet .* 10\.78\.0\.7)", done.stderr)
    assert rows(engine) == ["10.77.0.0/24", *(f"10.77.0.{n}" for n in (128, 129, 130, 131, 254))]


@each_driver
def test_dual_stack(engine: PrivateEngine, driver: str) -> None:
    create(engine, *SUBNET, *SUBNET6, driver=driver)
    run(engine, "one", "--ip", "10.77.0.77", "--ip6", "fd00:77::77")
    run(engine, "two")
    fields = ("IPAddress", "Gateway", "GlobalIPv6Address", "IPv6Gateway", "GlobalIPv6PrefixLen")
    for container, four, six in (("one", "10.77.0.77", "fd00:77::77"), ("two", "10.77.0.2", "fd00:77::2")):
        seen = [address(engine, container, field) for field in fields]
        assert seen == [four, "10.77.0.1", six, "fd00:77::1", "64"]
    assert pings(engine, "two", "10.77.0.77")
    # busybox has no ping for IPv6 here: a connection does as well
    engine.docker("exec", "--detach", "one", "nc", "-ll", "-p", "80", "-e", "echo", "hello")
    wait_until(lambda: ":80 " in engine.docker("exec", "one", "netstat", "-ltn"), PATIENCE)
    # Again, since on a busy machine the kernel may open a bridge's port later than neighbours are asked for.
    ask = ("exec", "two", "timeout", "20", "nc", "fd00:77::77", "80")
    try:
        wait_until(lambda: engine.run_docker(*ask).stdout == "hello\n", PATIENCE)
    except TimeoutError:
        looks: list[tuple[str, ...]] = [
            ("exec", box, "ip", *what) for box in ("one", "two") for what in (("-6", "addr"), ("-6", "neigh"))
        ]
        looks += [("exec", "one", "netstat", "-ltn"), ("exec", "one", "ps"), ask]
        raise AssertionError([(look, engine.run_docker(*look)) for look in looks]) from None
    before = rows(engine)
    assert len(before) == 2 + 6
    assert TAKEN in no_run(engine, "--ip6", "fd00:77::2")
    # Engines do not give back the IPv4 address that they have got before; so it is with Docker's own IPAM.
    assert set(rows(engine)) - set(before) == {"10.77.0.3"}


@pytest.mark.each_engine
@each_driver
def test_what_overlaps(engine: PrivateEngine, driver: str) -> None:
    """A network that is refused takes nothing from the one that is there."""
    create(engine, *SUBNET, driver=driver)
    before = rows(engine)
    for other in ("10.77.0.0/24", "10.77.0.128/25", "10.77.0.0/16"):
        assert OVERLAPS in no_network(engine, "--subnet", other, driver=driver)
    # Another range, which the drivers refuse; and Docker's own IPAM, which knows nothing of ours.
    for options, ipam in ((("--ip-range", "10.77.0.64/26"), "myplugin"), ((), "default")):
        assert "conflicts with" in no_network(engine, *SUBNET, *options, driver=driver, ipam=ipam)
    assert rows(engine) == before
    assert passing(engine) == "10.77.0.2"
    engine.docker("network", "rm", "mynet")
    create(engine, "--subnet", "10.77.0.0/16", driver=driver)


def test_two_ranges_of_one_subnet(engine: PrivateEngine) -> None:
    """macvlan has nothing against it: the two networks share the addresses."""
    parents = ("parent1", "parent2")
    try:
        for number, parent in enumerate(parents):
            assert engine.run(["ip", "link", "add", parent, "type", "bridge"]).returncode == 0
            options = ("--ip-range", f"10.77.0.{number * 64}/26", "--gateway", f"10.77.0.{253 + number}")
            create(engine, *SUBNET, *options, "-o", f"parent={parent}", driver="macvlan", name=parent)
            run(engine, f"on-{parent}", network=parent)
        found = [address(engine, f"on-{parent}", network=parent) for parent in parents]
        assert found == ["10.77.0.1", "10.77.0.64"]
        for taken in (found[0], "10.77.0.253"):
            assert TAKEN in no_run(engine, "--ip", taken, network="parent2")
        assert OVERLAPS in no_network(engine, *SUBNET, driver="macvlan")
        engine.docker("rm", "--force", "on-parent1", "on-parent2")
        engine.docker("network", "rm", "parent1")
        assert rows(engine) == ["10.77.0.0/24", "10.77.0.254"]
    finally:
        remove_all(engine)
        for parent in parents:
            engine.run(["ip", "link", "delete", parent])


def test_no_addresses_at_all(engine: PrivateEngine) -> None:
    """The null IPAM driver: myplugin needs no addresses, Docker's bridge says that it does."""
    create(engine, driver="myplugin", ipam="null")
    shown = engine.docker("run", "--rm", "--network", "mynet", "busybox", "ip", "-4", "address")
    assert re.findall("inet (.*?)/", shown) == ["127.0.0.1"]
    assert "ipv4 pool is empty" in no_network(engine, ipam="null")


CASES = (
    ("--subnet", "10.61.0.0/29", "--aux-address", "a=10.61.0.2", "--aux-address", "b=10.61.0.4"),
    ("--subnet", "10.61.0.0/24", "--ip-range", "10.61.0.64/26"),
    ("--subnet", "10.61.0.0/24", "--ipv6", "--subnet", "fd00:61::/64", "--ip-range", "fd00:61::f00/120"),
)


def test_the_addresses_are_those_that_dockers_own_ipam_gives(engine: PrivateEngine) -> None:
    fields = ("IPAddress", "IPPrefixLen", "Gateway", "GlobalIPv6Address", "IPv6Gateway")
    template = " ".join(f"{{{{.NetworkSettings.Networks.mynet.{field}}}}}" for field in fields)
    for container in ("one", "two"):
        run(engine, container, network="bridge")

    def given(ipam: str, options: Sequence[str]) -> list[str]:
        create(engine, *options, ipam=ipam)
        with engine.api() as docker:
            for verb, container in (("connect", "one"), ("connect", "two"), ("disconnect", "one"), ("connect", "one")):
                docker.call("POST", f"/networks/mynet/{verb}", {"Container": container})
            found = engine.docker("inspect", "-f", template, "one", "two").splitlines()
            for container in ("one", "two"):
                docker.call("POST", "/networks/mynet/disconnect", {"Container": container})
        engine.docker("network", "rm", "mynet")
        return found

    for options in CASES:
        assert given("myplugin", options) == given("default", options), options


@pytest.mark.each_engine
def test_a_subnet_that_is_written_with_an_address(engine: PrivateEngine) -> None:
    """Newer engines refuse it themselves; 20.10 takes the network that it is in."""

    def status(ipam: str) -> int:
        done = engine.run_docker("network", "create", "--ipam-driver", ipam, "--subnet", "10.61.0.5/24", "mynet")
        engine.run_docker("network", "rm", "mynet")
        return done.returncode

    assert status("myplugin") == status("default")


# ---------------------------------------------------------------------------------------------- the default pools


@pytest.mark.usefixtures("own")
@each_driver
def test_networks_that_are_chosen(engine: PrivateEngine, driver: str) -> None:
    """Beside the host's networks, those of Docker's own IPAM and each other, while there are some."""
    try:
        engine.run(["ip", "link", "add", "lan", "type", "bridge"])
        engine.run(["ip", "address", "add", "10.90.2.77/24", "dev", "lan"])
        engine.run(["ip", "link", "set", "lan", "up"])
        create(engine, "--subnet", "10.90.0.0/24", ipam="default", name="theirs")
        create(engine, driver=driver, ipam="own", name="first")
        create(engine, driver=driver, ipam="own", name="second")
        assert [subnets(engine, name) for name in ("first", "second")] == [["10.90.1.0/24"], ["10.90.3.0/24"]]
        assert NO_POOL_LEFT in no_network(engine, driver=driver, ipam="own")
        assert passing(engine, network="second") == "10.90.3.2"
        engine.docker("network", "rm", "first", "theirs")
        create(engine, "--ipv6", driver=driver, ipam="own", name="first")
        create(engine, driver=driver, ipam="own", name="third")
        assert subnets(engine, "first") == ["10.90.0.0/24", "fd00:90::/64"]
        assert subnets(engine, "third") == ["10.90.1.0/24"]
    finally:
        remove_all(engine)
        engine.run(["ip", "link", "delete", "lan"])
    assert rows(engine, "own") == []


def test_ipv6_that_is_chosen(engine: PrivateEngine) -> None:
    """Engines before 27 want a subnet with Docker's own IPAM."""
    create(engine, "--ipv6")
    four, six = map(ip_network, subnets(engine, "mynet"))
    assert (four.prefixlen, six.prefixlen) == (16, 64)
    assert six[0] in ip_network("fd00::/8")
    run(engine, "one")
    assert ip_address(address(engine, "one", "GlobalIPv6Address")) == six[2]


def test_myplugin_chooses_as_docker_does(engine: PrivateEngine) -> None:
    """The first is docker0's. Docker's own driver goes round: its choice depends on the one before."""
    create(engine)
    create(engine, driver="myplugin", name="other")
    create(engine, ipam="default", name="theirs")
    ours = [subnets(engine, name) for name in ("mynet", "other")]
    assert ours == [["172.18.0.0/16"], ["172.19.0.0/16"]]
    (theirs,) = subnets(engine, "theirs")
    assert not ip_network(theirs).overlaps(ip_network("172.18.0.0/15"))


# ------------------------------------------------------------------------------------------------------- options


def mac(number: int) -> tuple[str, str]:
    return "--mac-address", f"02:00:00:00:00:{number:02x}"


def option(text: str) -> tuple[str, str]:
    return "--ipam-opt", text


TWO = ("--ip-range", "10.77.0.4/31", "--gateway", "10.77.0.1")
"""Addresses."""


def test_serial(engine: PrivateEngine) -> None:
    create(engine, *SUBNET, *TWO, *option("strategy=serial"))
    assert [passing(engine) for _ in range(3)] == ["10.77.0.4", "10.77.0.5", "10.77.0.4"]


def test_hashed_is_by_mac_address(engine: PrivateEngine) -> None:
    create(engine, *SUBNET, *option("strategy=hashed"))
    first, other = (passing(engine, *mac(n)) for n in (1, 2))
    assert first != other
    engine.docker("network", "rm", "mynet")
    create(engine, *SUBNET, *option("strategy=hashed"))
    assert passing(engine, *mac(2)) == other


def test_quarantine(engine: PrivateEngine) -> None:
    create(engine, *SUBNET, *TWO, *option("quarantine=60"))
    assert [passing(engine) for _ in range(3)] == ["10.77.0.4", "10.77.0.5", "10.77.0.4"]  # the third is in need
    engine.docker("network", "rm", "mynet")
    create(engine, *SUBNET, *TWO, *option("quarantine=0.1"))
    for _ in range(2):
        assert passing(engine) == "10.77.0.4"
        time.sleep(0.2)


def test_an_address_is_kept_for_a_mac_address(engine: PrivateEngine) -> None:
    create(engine, *SUBNET, *option("lease=mac"), *option("lease_time=3600"))
    run(engine, "web", *mac(1))
    engine.docker("rm", "--force", "web")
    assert [passing(engine, *whose) for whose in ((), mac(2))] == ["10.77.0.3", "10.77.0.4"]
    run(engine, "web", *mac(1))
    engine.docker("restart", "--time", "0", "web")
    assert address(engine, "web") == "10.77.0.2"
    assert [passing(engine, *whose) for whose in ((), mac(2))] == ["10.77.0.5", "10.77.0.4"]


def tells_names(engine: PrivateEngine) -> bool:
    return int(engine.version.partition(".")[0]) >= 29


def test_an_address_is_kept_for_a_name_where_engines_tell_it(engine: PrivateEngine) -> None:
    create(engine, *SUBNET, *option("lease=name"))
    kept = ["10.77.0.2", "10.77.0.3"] if tells_names(engine) else ["10.77.0.2", "10.77.0.2"]
    assert [passing(engine, "--name", name) for name in ("web", "db")] == kept


def test_what_engines_tell_with_a_request(engine: PrivateEngine, own: Process) -> None:
    create(engine, *SUBNET, "--aux-address", "a=10.77.0.2", ipam="own")
    run(engine, "one")
    *_, gateway, auxiliary, container = re.findall("^asked with:(.*)", own.log.read_text(), re.MULTILINE)
    assert (gateway, auxiliary) == (" RequestAddressType", "")
    name = ["com.docker.network.endpoint.name"] if tells_names(engine) else []
    assert sorted(container.split()) == ["com.docker.network.endpoint.macaddress", *name]


BAD = {
    "strategy=best": "option strategy='best': expected first-free, serial or hashed",
    "quarantine=soon": "option quarantine='soon': expected float",
    "quarantine=-1": "option quarantine='-1': expected float >= 0",
    "lease=ip": "option lease='ip': expected none, mac or name",
    "lease_time=0": "option lease_time='0': expected float > 0",
    "ttl=5": "unknown option 'ttl'; known options: lease, lease_time, quarantine, strategy",
}


def test_options_that_are_none(engine: PrivateEngine) -> None:
    for given, said in BAD.items():
        assert f"IpamDriver.RequestPool: {said}" in no_network(engine, *option(given))


# ---------------------------------------------------------------------------------------------- two want the same


@pytest.mark.each_engine
def test_two_containers_with_one_mac_address(engine: PrivateEngine) -> None:
    """They are one for an IPAM driver, which cannot tell the second from a request that is repeated."""
    create(engine, *SUBNET)
    for name in ("one", "two"):
        run(engine, name, *mac(1))
    assert address(engine, "one") == address(engine, "two") == "10.77.0.2"


@pytest.mark.usefixtures("own")
def test_two_networks_that_want_one_subnet_at_the_same_time(engine: PrivateEngine) -> None:
    """One of them gets it, and keeps it."""

    def attempt(name: str) -> bool:
        options = ("--ipam-driver", "own", "--subnet", "10.66.0.0/24")
        return engine.run_docker("network", "create", *options, name).returncode == 0

    with ThreadPoolExecutor(2) as users:
        (made,) = [name for name, done in zip("ab", users.map(attempt, "ab"), strict=True) if done]
    run(engine, "one", network=made)


# ------------------------------------------------------------------------------------------- the engine restarts


def always(engine: PrivateEngine, ipam: str, *drivers: str) -> dict[str, str]:
    """Two containers on a network of each driver, and a network that is chosen; the containers' addresses."""
    create(engine, ipam=ipam, name="chosen")
    for number, driver in enumerate(drivers):
        four, six, name = f"10.77.{number}.", f"fd00:77:{number}::", f"on-{driver}"
        create(
            engine, "--ipv6", "--subnet", f"{four}0/24", "--subnet", f"{six}/64", driver=driver, ipam=ipam, name=name
        )
        run(engine, f"{driver}-one", "--restart", "always", network=name)
        run(engine, f"{driver}-two", "--restart", "always", "--ip", f"{four}99", "--ip6", f"{six}99", network=name)
    return addresses(engine)


def addresses(engine: PrivateEngine) -> dict[str, str]:
    """Of what runs, by name."""
    shown = "{{.Name}} {{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}}{{end}}"
    if not (running := engine.docker("ps", "--quiet").split()):
        return {}
    lines = engine.docker("inspect", "-f", shown, *running).splitlines()
    return {name: given for name, _, given in (line[1:].partition(" ") for line in lines)}


def restart(engine: PrivateEngine, end: Callable[[], None], before: Mapping[str, str]) -> None:
    """The same containers run with the same addresses, and the next gets another."""
    logged = engine.log.stat().st_size
    end()
    engine.start()
    with suppress(TimeoutError):
        wait_until(lambda: addresses(engine) == before, PATIENCE, every=0.1)
    assert addresses(engine) == before
    assert "overlaps" not in engine.log.read_bytes()[logged:].decode()
    assert passing(engine, network="on-bridge") == "10.77.0.3"


def asked(plugin: Process, method: str) -> int:
    return plugin.log.read_text().count(f"method=IpamDriver.{method} ")


@pytest.mark.each_engine
def test_a_plugin_with_a_disk_is_not_asked_again(engine: PrivateEngine, myplugin: Process) -> None:
    before = always(engine, "myplugin", "bridge", "myplugin")
    assert before["myplugin-one"] == "10.77.1.2 fd00:77:1::2"
    pools, held = asked(myplugin, "RequestPool"), rows(engine)
    given_back = asked(myplugin, "ReleaseAddress") + 2 * 2 * (len(before) + 1)  # also by the engine that was killed
    for end in (engine.stop, engine.kill):
        restart(engine, end, before)
        assert rows(engine) == held
    wait_until(lambda: asked(myplugin, "ReleaseAddress") == given_back, PATIENCE)
    assert asked(myplugin, "RequestPool") == pools
    assert pings(engine, "bridge-one", "10.77.0.99")
    assert pings(engine, "myplugin-one", "10.77.1.99")


@pytest.mark.each_engine
def test_a_plugin_without_a_disk_is_asked_again(engine: PrivateEngine) -> None:
    """Whether it was restarted with the engine or not."""
    forgetful = engine.start_plugin("forgetful", program(FORGETFUL))

    def both() -> None:
        nonlocal forgetful
        engine.stop()
        forgetful.kill()
        forgetful = engine.start_plugin("forgetful", program(FORGETFUL))

    try:
        before = always(engine, "forgetful", "bridge")
        pools = asked(forgetful, "RequestPool")
        for end in (engine.kill, both):
            seen = asked(forgetful, "RequestPool")
            restart(engine, end, before)
            assert asked(forgetful, "RequestPool") == seen + pools
        assert OVERLAPS in no_network(engine, *SUBNET, ipam="forgetful")
        assert TAKEN in no_run(engine, "--ip", "10.77.0.1", network="on-bridge")
    finally:
        remove_all(engine)
        forgetful.stop()


@pytest.mark.each_engine
def test_a_plugin_without_a_disk_is_asked_again_for_addresses_of_others(engine: PrivateEngine) -> None:
    forgetful = engine.start_plugin("forgetful", program(FORGETFUL))
    try:
        create(engine, *SUBNET, "--aux-address", "a=10.77.0.2", ipam="forgetful")
        engine.stop()
        engine.start()
        assert passing(engine) == "10.77.0.3"
    finally:
        remove_all(engine)
        forgetful.stop()


# ------------------------------------------------------------------------------------------- the plugin is killed


class Supervisor(test_faults.Supervisor):
    """Starts the plugin again when it has ended, as systemd does."""

    def _start(self) -> Process:
        return self._engine.start_plugin("faulty", program(FAULTY))


@pytest.fixture
def faulty(engine: PrivateEngine) -> Iterator[Supervisor]:
    with closing(Supervisor(engine)) as supervisor:
        yield supervisor
        wait_until(lambda: supervisor.plugin.running, PATIENCE)
        remove_all(engine)


class User:
    """Asks an engine, and notes what it refuses."""

    def __init__(self, docker: Docker) -> None:
        self._docker = docker
        self.refusals: list[str] = []

    def __call__(self, method: str, path: str, content: Mapping[str, Any] | None = None) -> bool:
        try:
            self._docker.call(method, path, content)
        except DockerError as error:
            self.refusals.append(f"{method} {path}: {error}")
            return False
        return True

    def run(self, name: str, network: str) -> bool:
        container = {"Image": "busybox", "Cmd": ["sleep", "600"], "HostConfig": {"NetworkMode": network}}
        return self("POST", f"/containers/create?name={name}", container) and self("POST", f"/containers/{name}/start")

    def remove(self, name: str) -> None:
        self("DELETE", f"/containers/{name}?force=1")

    def network(self, name: str, *subnets: str) -> bool:
        pool = {"Driver": "faulty", "Config": [{"Subnet": subnet} for subnet in subnets]}
        return self("POST", "/networks/create", {"Name": name, "Driver": "bridge", "IPAM": pool})

    def addresses(self, network: str) -> list[str]:
        """Of the containers on it."""
        containers = self._docker.call("GET", f"/networks/{network}")["Containers"]
        return [container["IPv4Address"].partition("/")[0] for container in containers.values()]


def life(user: User) -> list[str]:
    """Of two networks, and of a container on a network that stays; the addresses on that."""
    for name, *subnets in (("asked", "10.77.7.0/24"), ("chosen",)):
        if user.network(name, *subnets):
            user("DELETE", f"/networks/{name}")
    user.run("guest", "keeper")
    found = user.addresses("keeper")
    user.remove("guest")
    return found


def test_killed_at_points_of_what_an_engine_asks_for(engine: PrivateEngine, faulty: Supervisor) -> None:
    """A request that was lost with the plugin fails, and the next one gets the same pool or address."""
    lost, leaked, kills = list[str](), list[str](), 0
    with engine.api() as docker:
        user = User(docker)
        assert user.network("keeper", "10.77.8.0/24")
        assert user.run("resident", "keeper")
        right = rows(engine, "faulty")
        for point in count(FIRST[engine.version], STEP):
            wait_until(lambda: faulty.plugin.running, PATIENCE)
            plugin, user = faulty.plugin, User(docker)
            command = [sys.executable, "-I", str(KILL_AT), str(plugin.pid), str(point)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killer:
                assert killer.stdout is not None
                assert killer.stdout.readline() == "attached\n"
                found = life(user)
                killer.send_signal(signal.SIGKILL)
            assert len(found) == len(set(found)), f"point {point}: given out twice: {found}"
            lost += [f"point {point}: {said}" for said in user.refusals if EMPTY not in said]
            if plugin.running:
                break
            kills += 1
            wait_until(lambda: faulty.plugin.running, PATIENCE)
            leaks = set(rows(engine, "faulty")) - {*right, *leaked}
            assert len(leaks) <= 1, f"point {point}: {leaks}"
            leaked += leaks
        user = User(docker)
        assert len(set(life(user))) == 2
        assert not user.refusals
    print(f"Engine {engine.version}: {kills} kills at points, leaked: {', '.join(leaked) or 'nothing'}")
    wait_until(lambda: rows(engine, "faulty") == right, PATIENCE)
    assert not lost, "\n".join(lost)
    assert kills > 36 // STEP


def test_killed_and_restarted_under_load(engine: PrivateEngine, faulty: Supervisor) -> None:
    """It is slow, so that something is lost: an address that was given out, or given back, unheard."""
    twice, over, kills, started = list[str](), Event(), 0, Counter[int]()
    drawn = Random(engine.version)

    def work(number: int) -> list[str]:
        mine = list[str]()
        with engine.api() as docker:
            user = User(docker)
            for turn in count():
                if over.is_set():
                    return user.refusals
                name = f"worker{number}-{turn}"
                if user.run(name, "busy"):
                    mine.append(name)
                    started[number] += 1
                if len(mine) > 3:
                    user.remove(mine.pop(0))
        raise AssertionError

    def watch() -> None:
        with engine.api() as docker:
            while not over.wait(0.05):
                found = User(docker).addresses("busy")
                twice.extend({address for address in found if found.count(address) > 1})

    with engine.api() as docker, ThreadPoolExecutor() as threads:
        user = User(docker)
        assert user.network("busy", "10.77.9.0/24")
        watching = threads.submit(watch)
        working = [threads.submit(work, number) for number in range(3)]
        try:
            for end in ("kill", "stop", "kill", "kill"):
                before = started.total()
                wait_until(lambda before=before: started.total() >= before + 3, PATIENCE)  # type: ignore[misc]
                time.sleep(drawn.uniform(0, 0.3))  # at any moment of a start
                getattr(faulty.plugin, end)()
                kills += end == "kill"
                wait_until(lambda: faulty.plugin.running, PATIENCE)
            wait_until(lambda: len(user.addresses("busy")) > 3, PATIENCE)
        finally:
            over.set()
        watching.result()
        refusals = [said for worker in working for said in worker.result()]
        running = user.addresses("busy")
        right = {*running, "10.77.9.1"}

        def known() -> set[str]:
            return {row for row in rows(engine, "faulty") if row.startswith("10.77.9.") and "/" not in row}

        leaked = known() - right
        assert right <= known()
        wait_until(lambda: known() == right, PATIENCE)
    print(
        f"Engine {engine.version}: {kills} kills under load, {len(running)} containers run, {len(refusals)} refusals; "
        f"leaked for a while: {', '.join(sorted(leaked)) or 'nothing'}"
    )
    assert not twice
    assert len(running) == len(set(running)) > 3
    assert len(leaked) <= kills * len(working)
    assert [said for said in refusals if EMPTY not in said] == []


def test_what_is_given_back_while_the_plugin_is_down(engine: PrivateEngine) -> None:
    """The engine tells nobody; the plugin finds it when it starts."""
    stays, goes = (["--subnet", f"10.77.{n}.0/24"] for n in (8, 7))
    with engine.start_plugin("faulty", program(FAULTY)):
        for name, subnet in (("stays", stays), ("goes", goes)):
            create(engine, *subnet, ipam="faulty", name=name)
        run(engine, "guest", network="stays")
        run(engine, "resident", network="stays")
        # It would not miss a pool that it has not seen in the engine yet.
        wait_until(lambda: None not in on_disk(engine, "faulty", "SELECT engine FROM pools"), PATIENCE)
    with ThreadPoolExecutor() as users:  # Docker tries for a while
        users.submit(engine.docker, "rm", "--force", "guest")
        users.submit(engine.docker, "network", "rm", "goes")
    kept = ["10.77.8.0/24", "10.77.8.1", "10.77.8.2", "10.77.8.3"]
    assert rows(engine, "faulty") == ["10.77.7.0/24", "10.77.7.1", *kept]
    with engine.start_plugin("faulty", program(FAULTY)):
        wait_until(lambda: rows(engine, "faulty") == kept, PATIENCE)
        create(engine, *goes, ipam="faulty", name="goes")
        kept.remove("10.77.8.2")
        wait_until(lambda: set(kept) == {row for row in rows(engine, "faulty") if row.startswith("10.77.8.")}, PATIENCE)
        assert passing(engine, network="stays") == "10.77.8.2"
        remove_all(engine)


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(1, id="before"),
        pytest.param(4, id="midway"),
    ],
)
def test_killed_while_it_takes_back_a_pool_with_addresses_that_are_held(engine: PrivateEngine, point: int) -> None:
    """The requests are an engine's, one by one."""
    name = f"torn{point}"
    served = program(FAULTY.replace("faulty", name))
    address = engine.plugin_folder / f"{name}.sock"
    with engine.start_plugin(name, served) as plugin, Docker(address) as torn:
        pool = {"AddressSpace": "LocalDefault", "Pool": "10.77.0.0/24", "Options": {"quarantine": "60"}}
        pool_id = {"PoolID": torn.call("POST", "/IpamDriver.RequestPool", pool)["PoolID"]}
        torn.call("POST", "/IpamDriver.RequestAddress", {**pool_id, "Address": "10.77.0.1"})
        torn.call("POST", "/IpamDriver.ReleaseAddress", {**pool_id, "Address": "10.77.0.1"})
        command = [sys.executable, "-I", str(KILL_AT), str(plugin.pid), str(point)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killer:
            assert killer.stdout is not None
            assert killer.stdout.readline() == "attached\n"
            with pytest.raises(DriverError):
                torn.call("POST", "/IpamDriver.ReleasePool", pool_id)
    with engine.start_plugin(name, served):
        create(engine, *SUBNET, ipam=name)
        remove_all(engine)
