"""The ready-made IPAM driver, asked as an engine asks: over the plugin's table of methods, with its file on disk."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest

from netplugin_sdk import Plugin
from netplugin_sdk.ipam import DefaultPool, PoolIpamDriver, Strategy
from netplugin_sdk.values import IPNetwork, UsedPool

MAC, OTHER_MAC = "02:42:ac:11:00:02", "02:42:ac:11:00:03"
GATEWAY = {"RequestAddressType": "com.docker.network.gateway"}


class Engine:
    """Asks a plugin, which it can start again on the same disk."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.now = 1_000_000.0
        self.occupied: list[IPNetwork] = []
        self._start()

    def _start(self) -> None:
        defaults = [DefaultPool.parse("172.16.0.0/14 size 16"), DefaultPool.parse("fd00::/62 size 64")]
        self.driver = PoolIpamDriver(local=defaults, occupied=lambda: self.occupied, clock=lambda: self.now)
        self.plugin = Plugin(self.driver, state=self.folder)

    def engine_has(self, *pools: tuple[str, Sequence[str]], engine: str = "engine") -> bool:
        """Tell the driver: pools by their ids, and addresses of endpoints."""

        def used(pool: str, addresses: Sequence[str]) -> UsedPool:
            network, length, *part = pool.split("/")[1:]
            return UsedPool(
                ip_network(f"{network}/{length}"),
                ip_network("/".join(part)) if part else None,
                frozenset(ip_interface(address).ip for address in addresses),
            )

        return self.driver.engine_has(engine, [used(*pool) for pool in pools])

    def restart_plugin(self) -> None:
        self.plugin.close()
        self._start()

    def ask(self, method: str, **content: Any) -> tuple[int, Any]:
        answer = self.plugin.handle(f"/IpamDriver.{method}", json.dumps(content).encode())
        return answer.status, json.loads(answer.body)

    def __call__(self, method: str, **content: Any) -> Any:
        status, answer = self.ask(method, **content)
        assert status == 200, answer
        return answer

    def refused(self, method: str, **content: Any) -> str:
        status, answer = self.ask(method, **content)
        assert status != 200, answer
        return str(answer["Error"])

    def pool(
        self, pool: str = "", sub_pool: str = "", space: str = "LocalDefault", v6: bool = False, **opt: str
    ) -> str:
        request = {"AddressSpace": space, "Pool": pool, "SubPool": sub_pool, "Options": opt, "V6": v6}
        answer = self("RequestPool", **request)
        assert answer["Data"] == {}
        return str(answer["PoolID"])

    def address(self, pool: str, mac: str = "", address: str = "", name: str = "", **options: str) -> str:
        options |= {"com.docker.network.endpoint.macaddress": mac} if mac else {}
        options |= {"com.docker.network.endpoint.name": name} if name else {}
        return str(self("RequestAddress", PoolID=pool, Address=address, Options=options)["Address"])

    def gateway(self, pool: str, address: str = "") -> str:
        return self.address(pool, address=address, **GATEWAY)

    def release(self, pool: str, address: str) -> None:
        assert self("ReleaseAddress", PoolID=pool, Address=address.partition("/")[0]) == {}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    engine.plugin.close()


# A day


def test_a_network_and_a_container(engine: Engine) -> None:
    assert engine("GetCapabilities") == {"RequiresMACAddress": True, "RequiresRequestReplay": False}
    pool = engine.pool("10.1.0.0/24")
    assert pool == "LocalDefault/10.1.0.0/24"
    assert engine.gateway(pool) == "10.1.0.1/24"
    assert engine.address(pool, address="10.1.0.5") == "10.1.0.5/24"  # --aux-address
    assert engine.address(pool, MAC) == "10.1.0.2/24"
    assert engine.address(pool, OTHER_MAC, address="10.1.0.9") == "10.1.0.9/24"
    assert engine.refused("RequestAddress", PoolID=pool, Address="10.1.0.9") == "Address already in use"
    assert engine.refused("RequestAddress", PoolID=pool, Address="10.2.0.9") == "requested address is out of range"
    for address in ("10.1.0.9", "10.1.0.2", "10.1.0.5", "10.1.0.1"):
        engine.release(pool, address)
    assert engine("ReleasePool", PoolID=pool) == {}
    assert rows(engine, "addresses") == rows(engine, "pools") == rows(engine, "networks") == 0


def rows(engine: Engine, table: str) -> int:
    """In a copy of the file, since nobody else reads it."""
    engine.restart_plugin()
    engine.plugin.close()
    assert engine.folder is not None
    with closing(sqlite3.connect(engine.folder / "ipam.db")) as db:
        (count,) = db.execute(f"SELECT count(*) FROM {table}").fetchone()
    engine._start()
    return int(count)


def test_pools_of_its_own_choice_avoid_each_other_and_the_host(engine: Engine) -> None:
    engine.occupied = [ip_network("172.17.3.0/24"), ip_network("fd00:0:0:1::/64")]
    assert [engine.pool() for _ in range(2)] == ["LocalDefault/172.16.0.0/16", "LocalDefault/172.18.0.0/16"]
    assert [engine.pool(v6=True) for _ in range(2)] == ["LocalDefault/fd00::/64", "LocalDefault/fd00:0:0:2::/64"]
    assert engine.pool("0.0.0.0/24") == "LocalDefault/172.17.0.0/24"
    assert engine.pool() == "LocalDefault/172.19.0.0/16"
    assert "fully subnetted" in engine.refused("RequestPool", AddressSpace="LocalDefault")
    engine("ReleasePool", PoolID="LocalDefault/172.18.0.0/16")
    assert engine.pool() == "LocalDefault/172.18.0.0/16"


def test_spaces_know_nothing_of_each_other(engine: Engine) -> None:
    assert engine.pool("10.0.0.0/24") != engine.pool("10.0.0.0/24", space="GlobalDefault")
    assert engine.pool(space="GlobalDefault") == "GlobalDefault/10.0.1.0/24"
    assert engine.refused("RequestPool", AddressSpace="Mars") == "invalid address space 'Mars'"


def test_parts_of_a_network(engine: Engine) -> None:
    one, two = engine.pool("10.0.0.0/16", "10.0.1.0/24"), engine.pool("10.0.0.0/16", "10.0.2.0/24")
    assert engine.gateway(one) == "10.0.1.0/16"
    assert engine.gateway(two) == "10.0.2.0/16"
    assert [engine.address(one), engine.address(two)] == ["10.0.1.1/16", "10.0.2.1/16"]
    assert engine.refused("RequestAddress", PoolID=two, Address="10.0.1.1") == "Address already in use"
    engine("ReleasePool", PoolID=one)
    assert engine.refused("RequestAddress", PoolID=two, Address="10.0.2.1") == "Address already in use"
    assert engine.refused("RequestAddress", PoolID=one) == f"cannot find address pool for poolID:{one}"
    engine("ReleasePool", PoolID=two)
    assert engine.address(engine.pool("10.0.0.0/16")) == "10.0.0.1/16"


def test_what_overlaps(engine: Engine) -> None:
    pool = engine.pool("10.0.0.0/16")
    engine.gateway(pool)
    for other in ("10.0.0.0/16", "10.0.0.0/15", "10.0.3.0/24", "10.0.0.0/8"):
        assert engine.refused("RequestPool", AddressSpace="LocalDefault", Pool=other) == OVERLAPS


# Asked again


def test_who_asks_again_gets_the_same_address(engine: Engine) -> None:
    pool = engine.pool("10.1.0.0/24")
    assert {engine.gateway(pool) for _ in range(3)} == {"10.1.0.1/24"}
    assert {engine.address(pool, MAC) for _ in range(3)} == {"10.1.0.2/24"}
    assert {engine.address(pool, OTHER_MAC, address="10.1.0.9") for _ in range(3)} == {"10.1.0.9/24"}
    assert {engine.gateway(pool, "10.1.0.1") for _ in range(3)} == {"10.1.0.1/24"}
    engine.restart_plugin()
    assert engine.gateway(pool) == "10.1.0.1/24"
    assert engine.address(pool, MAC) == "10.1.0.2/24"
    assert rows(engine, "addresses") == 3


OVERLAPS = "Pool overlaps with other one on this address space"


def test_a_pool_whose_answer_was_lost_with_the_plugin_is_given_again(engine: Engine) -> None:
    def asked_again() -> bool:
        status, answer = engine.ask("RequestPool", AddressSpace="LocalDefault", Pool="10.1.0.0/24", Options=serial)
        assert status == 200 or answer["Error"] == OVERLAPS
        return status == 200

    serial = {"strategy": "serial"}
    pool = engine.pool("10.1.0.0/24")
    assert not asked_again()
    engine.restart_plugin()
    assert asked_again()
    assert not asked_again()
    assert rows(engine, "pools") == 1
    engine.release(pool, engine.address(pool, MAC))
    assert engine.address(pool, OTHER_MAC) == "10.1.0.2/24"  # the options are those of the second
    engine.restart_plugin()
    assert not asked_again()  # there is an address
    engine.release(pool, "10.1.0.2")
    engine.engine_has((pool, []))
    engine.restart_plugin()
    assert not asked_again()  # a network has it


def test_a_pool_whose_answer_came_is_not_given_again_though_the_plugin_restarted(engine: Engine) -> None:
    pool = engine.pool("10.1.0.0/24")
    engine.restart_plugin()
    assert engine.gateway(pool) == "10.1.0.1/24"
    refused = engine.refused("RequestPool", AddressSpace="LocalDefault", Pool="10.1.0.0/24")
    assert refused == OVERLAPS


def test_a_pool_of_its_own_choice_is_never_given_twice(engine: Engine) -> None:
    first = engine.pool()
    engine.restart_plugin()
    assert engine.pool() != first


def test_what_is_given_back_twice_is_given_back(engine: Engine) -> None:
    pool = engine.pool("10.1.0.0/24")
    engine.address(pool, MAC)
    engine.release(pool, "10.1.0.2")
    engine.release(pool, "10.1.0.1")
    engine.release(pool, "10.1.0.1")
    engine.release("LocalDefault/10.9.0.0/24", "10.9.0.1")
    for _ in range(2):
        assert engine("ReleasePool", PoolID=pool) == {}


def test_a_plugin_without_a_disk_is_asked_again_by_the_engine() -> None:
    engine = Engine(None)
    assert engine("GetCapabilities")["RequiresRequestReplay"] is True
    pool = engine.pool("10.1.0.0/24")
    assert engine.gateway(pool) == "10.1.0.1/24"
    assert engine.address(pool, MAC) == "10.1.0.2/24"
    assert "overlaps" in engine.refused("RequestPool", AddressSpace="LocalDefault", Pool="10.1.0.0/24")
    engine("GetCapabilities")  # an engine that starts
    assert engine.pool("10.1.0.0/24") == pool
    assert "overlaps" in engine.refused("RequestPool", AddressSpace="LocalDefault", Pool="10.1.0.0/24"), "once"
    assert engine.gateway(pool, "10.1.0.1") == "10.1.0.1/24"
    assert engine.address(pool, OTHER_MAC) == "10.1.0.3/24"
    assert "overlaps" in engine.refused("RequestPool", AddressSpace="LocalDefault", Pool="10.1.0.0/24")
    engine.restart_plugin()  # and with it a plugin that has forgotten
    engine("GetCapabilities")
    assert engine.pool("10.1.0.0/24") == pool
    assert engine.gateway(pool, "10.1.0.1") == "10.1.0.1/24"
    engine.plugin.close()


def test_a_plugin_without_a_disk_is_asked_again_for_each_address() -> None:
    """As engines do: without the MAC address, without telling what an address is for."""
    engine = Engine(None)
    pool = engine.pool("10.1.0.0/24")
    assert engine.gateway(pool, "10.1.0.254") == "10.1.0.254/24"
    assert engine.address(pool, address="10.1.0.5") == "10.1.0.5/24"  # --aux-address
    assert engine.address(pool, MAC) == "10.1.0.1/24"
    engine("GetCapabilities")
    assert engine.pool("10.1.0.0/24") == pool
    assert engine.gateway(pool, "10.1.0.254") == "10.1.0.254/24"
    for address in ("10.1.0.5", "10.1.0.1"):
        assert engine.address(pool, address=address) == f"{address}/24"
        assert engine.refused("RequestAddress", PoolID=pool, Address=address) == "Address already in use"
    assert engine.address(pool, MAC) == "10.1.0.1/24"
    engine.release(pool, "10.1.0.1")
    assert engine.address(pool, OTHER_MAC) == "10.1.0.1/24"
    engine.plugin.close()


# What an engine has


@pytest.fixture
def with_addresses(engine: Engine) -> tuple[str, str]:
    """Two pools: one with a gateway, an auxiliary address and two endpoints, and an empty one."""
    pool = engine.pool("10.1.0.0/24")
    engine.gateway(pool)
    engine.address(pool, address="10.1.0.9")
    engine.address(pool, MAC)
    engine.address(pool, OTHER_MAC)
    return pool, engine.pool()


MINUTE = 61.0
ENDPOINTS = ["10.1.0.2/24", "10.1.0.3/24"]


def test_what_an_engine_has_stays(engine: Engine, with_addresses: tuple[str, str]) -> None:
    pool, chosen = with_addresses
    for _ in range(3):
        assert not engine.engine_has((pool, ENDPOINTS), (chosen, []))
        engine.now += MINUTE
    assert rows(engine, "pools") == 2
    assert rows(engine, "addresses") == 4


def test_the_address_of_an_endpoint_that_an_engine_does_not_have_is_taken_back(
    engine: Engine, with_addresses: tuple[str, str]
) -> None:
    pool, chosen = with_addresses
    assert engine.engine_has((pool, ENDPOINTS[:1]), (chosen, []))  # it may come
    engine.now += MINUTE
    assert not engine.engine_has((pool, ENDPOINTS[:1]), (chosen, []))
    assert rows(engine, "addresses") == 3  # the gateway and what is for others are never listed
    assert engine.address(pool, "02:42:00:00:00:09") == ENDPOINTS[1]


def test_an_address_that_is_asked_for_again_is_not_taken_back(engine: Engine, with_addresses: tuple[str, str]) -> None:
    pool, _ = with_addresses
    assert engine.engine_has((pool, ENDPOINTS[:1]))
    engine.now += MINUTE
    assert engine.address(pool, OTHER_MAC) == ENDPOINTS[1]
    assert engine.engine_has((pool, ENDPOINTS[:1]))
    assert rows(engine, "addresses") == 4


def test_the_pool_of_a_network_that_is_gone_is_taken_back(engine: Engine, with_addresses: tuple[str, str]) -> None:
    """At once, since the engine had it before."""
    pool, chosen = with_addresses
    engine.engine_has((pool, ENDPOINTS), (chosen, []))
    engine.restart_plugin()
    assert not engine.engine_has()
    assert rows(engine, "pools") == rows(engine, "networks") == rows(engine, "addresses") == 0
    assert engine.pool("10.1.0.0/16") != pool


def test_a_pool_that_no_network_got_is_taken_back_after_a_while(
    engine: Engine, with_addresses: tuple[str, str]
) -> None:
    pool, _ = with_addresses
    assert engine.engine_has((pool, ENDPOINTS))
    engine.now += MINUTE
    assert not engine.engine_has((pool, ENDPOINTS))
    assert rows(engine, "pools") == 1


def test_an_engine_that_has_nothing_of_ours_may_be_another(engine: Engine, with_addresses: tuple[str, str]) -> None:
    pool, chosen = with_addresses
    for _ in range(3):
        assert not engine.engine_has()
        assert not engine.engine_has(("LocalDefault/10.200.0.0/16", []))
        engine.now += MINUTE
    assert rows(engine, "pools") == 2
    engine.engine_has((pool, ENDPOINTS), (chosen, []))
    for _ in range(3):
        assert not engine.engine_has(engine="another")
        engine.now += MINUTE
    assert rows(engine, "pools") == 2


def test_a_part_of_a_network_is_taken_back_alone(engine: Engine) -> None:
    one, two = (engine.pool("10.0.0.0/16", f"10.0.{n}.0/24") for n in (1, 2))
    addresses = engine.address(one, MAC), engine.address(two, OTHER_MAC)
    assert not engine.engine_has((one, addresses[:1]), (two, addresses[1:]))
    assert engine.engine_has((two, addresses[1:]))
    assert engine.refused("RequestAddress", PoolID=one) == f"cannot find address pool for poolID:{one}"
    engine.now += MINUTE
    assert not engine.engine_has((two, addresses[1:]))  # its address goes a minute later
    assert rows(engine, "pools") == rows(engine, "addresses") == 1


def test_what_is_given_out_in_a_swarm_is_not_asked_for(engine: Engine, with_addresses: tuple[str, str]) -> None:
    pool, chosen = with_addresses
    engine.pool(space="GlobalDefault")
    for _ in range(3):
        assert not engine.engine_has((pool, ENDPOINTS), (chosen, []))
        engine.now += MINUTE
    assert rows(engine, "pools") == 3


# Options


def test_the_gateway_is_the_first_whatever_the_strategy(engine: Engine) -> None:
    for strategy in ("serial", "hashed"):
        pool = engine.pool("10.1.0.0/24", strategy=strategy)
        assert engine.gateway(pool) == "10.1.0.1/24"
        engine("ReleasePool", PoolID=pool)


def test_serial(engine: Engine) -> None:
    pool = engine.pool("10.1.0.0/29", strategy="serial")
    assert engine.address(pool, MAC) == "10.1.0.1/29"
    engine.release(pool, "10.1.0.1")
    assert engine.address(pool, MAC) == "10.1.0.2/29"


def test_hashed_follows_from_the_mac_address(engine: Engine) -> None:
    pool = engine.pool("10.0.0.0/8", strategy="hashed")
    mine = engine.address(pool, MAC)
    engine.release(pool, mine)
    assert engine.address(pool, OTHER_MAC) != mine
    assert engine.address(pool, MAC) == mine


def test_hashed_follows_from_the_name_where_that_is_whom_addresses_are_kept_for(engine: Engine) -> None:
    pool = engine.pool("10.0.0.0/8", strategy="hashed", lease="name", lease_time="1")
    mine = engine.address(pool, MAC, name="web")
    engine.release(pool, mine)
    engine.now += 2
    assert engine.address(pool, OTHER_MAC, name="db") != mine
    assert engine.address(pool, "02:42:ac:11:00:04", name="web") == mine


@pytest.mark.parametrize("restarted", [False, True])
def test_quarantine(engine: Engine, restarted: bool) -> None:
    pool = engine.pool("10.1.0.0/29", quarantine="60")
    assert engine.address(pool, MAC) == "10.1.0.1/29"
    engine.release(pool, "10.1.0.1")
    if restarted:
        engine.restart_plugin()
    assert [engine.address(pool) for _ in range(5)] == [f"10.1.0.{n}/29" for n in range(2, 7)]
    assert engine.address(pool) == "10.1.0.1/29"  # in need
    engine.release(pool, "10.1.0.1")
    engine.release(pool, "10.1.0.2")
    engine.now += 61
    if restarted:
        engine.restart_plugin()
    assert engine.address(pool) == "10.1.0.1/29"
    assert rows(engine, "addresses") == 5


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize(
    ("lease", "who", "other"),
    [("mac", {"mac": MAC}, {"mac": OTHER_MAC}), ("name", {"name": "web"}, {"name": "db"})],
    ids=["mac", "name"],
)
def test_an_address_is_kept_for_who_comes_back(
    engine: Engine, lease: str, who: dict[str, str], other: dict[str, str], restarted: bool
) -> None:
    pool = engine.pool("10.1.0.0/29", lease=lease, lease_time="100")
    engine.gateway(pool)
    mine = engine.address(pool, **who)
    engine.release(pool, mine)
    if restarted:
        engine.restart_plugin()
    assert engine.address(pool, **other) != mine
    engine.now += 50
    assert engine.address(pool, **who) == mine
    engine.release(pool, mine)
    engine.now += 101
    assert engine.address(pool) == mine  # not for ever


def test_an_address_in_use_is_kept_afterwards_though_the_plugin_restarted_meanwhile(engine: Engine) -> None:
    pool = engine.pool("10.1.0.0/29", lease="mac", lease_time="100")
    mine = engine.address(pool, MAC)
    engine.restart_plugin()
    engine.release(pool, mine)
    assert engine.address(pool, OTHER_MAC) != mine
    assert engine.address(pool, MAC) == mine


def test_an_address_is_not_kept_for_who_had_it_before_the_last(engine: Engine) -> None:
    pool = engine.pool("10.1.0.0/29", lease="mac", lease_time="100")
    address = engine.address(pool, MAC)
    engine.release(pool, address)
    engine.now += 101
    assert engine.address(pool, address="10.1.0.1") == address  # --aux-address: of nobody in particular
    engine.release(pool, address)
    assert engine.address(pool) == address


def test_a_name_that_is_in_use_is_no_reason_to_share_an_address(engine: Engine) -> None:
    pool = engine.pool("10.1.0.0/29", lease="name")
    first = engine.address(pool, MAC, name="web")
    second = engine.address(pool, OTHER_MAC, name="web")  # before the first one's was given back
    assert first != second
    engine.release(pool, first)
    engine.release(pool, second)
    assert engine.address(pool, "02:42:ac:11:00:09", name="web") == second  # the last that it had


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "best"}, "option strategy='best': expected first-free, serial or hashed"),
        ({"quarantine": "-1"}, "option quarantine='-1': expected"),
        ({"lease_time": "0"}, "option lease_time='0': expected"),
        ({"lease": "you"}, "option lease='you': expected none, mac or name"),
        ({"what": "1"}, "unknown option 'what'; known options: lease, lease_time, quarantine, strategy"),
    ],
)
def test_options_that_are_none(engine: Engine, options: dict[str, str], said: str) -> None:
    refused = engine.refused("RequestPool", AddressSpace="LocalDefault", Pool="10.1.0.0/24", Options=options)
    assert refused.startswith(said)
    engine.pool("10.1.0.0/24")


def test_quarantine_is_not_for_what_is_not_given_to_others(engine: Engine) -> None:
    pool = engine.pool("10.1.0.0/29", quarantine="60")
    assert engine.gateway(pool) == "10.1.0.1/29"
    for address in ("10.1.0.1", "10.1.0.0", "10.1.0.7"):
        engine.release(pool, address)
    engine.now += 61
    assert [engine.address(pool) for _ in range(6)] == [f"10.1.0.{n}/29" for n in range(1, 7)]
    assert "no available addresses" in engine.refused("RequestAddress", PoolID=pool)


# The disk


@pytest.mark.parametrize("writes", range(4))
def test_killed_while_it_takes_back_a_pool(engine: Engine, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """The other one stays, and the number of what is gone is nobody's."""
    from netplugin_sdk.database import Database

    pool, other = engine.pool("10.1.0.0/24"), engine.pool("10.2.0.0/24")
    engine.address(pool, MAC)
    engine.address(other, MAC)
    left, write = writes, Database.write

    def killed(*arguments: Any, **options: Any) -> int | None:
        nonlocal left
        left -= 1
        return write(*arguments, **options) if left >= 0 else None

    with monkeypatch.context() as broken:
        broken.setattr(Database, "write", killed)
        engine("ReleasePool", PoolID=pool)
    engine.restart_plugin()
    assert engine.address(other, MAC) == "10.2.0.1/24"
    if not writes:  # nothing was written
        engine("ReleasePool", PoolID=pool)
    again = engine.pool("10.1.0.0/24")
    assert engine.address(again, OTHER_MAC) == "10.1.0.1/24"
    assert rows(engine, "networks") == rows(engine, "addresses") == 2


def test_all_is_on_disk_when_it_is_answered(engine: Engine) -> None:
    pools = [engine.pool("10.1.0.0/24", strategy="serial"), engine.pool("fd00:9::/64"), engine.pool()]
    before = [engine.address(pool, MAC) for pool in pools]
    engine.restart_plugin()
    assert [engine.address(pool, MAC) for pool in pools] == before
    assert engine.address(pools[0]) == "10.1.0.2/24"
    assert "overlaps" in engine.refused("RequestPool", AddressSpace="LocalDefault", Pool="10.1.0.0/25")


def test_what_cannot_be_written_is_not_given_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from netplugin_sdk import Unavailable
    from netplugin_sdk.database import Database

    pool = engine.pool("10.1.0.0/24")
    with monkeypatch.context() as broken:

        def fail(*_: object, **__: object) -> None:
            raise Unavailable("cannot write the plugin's state: disk I/O error")

        broken.setattr(Database, "write", fail)
        for method, content in (
            ("RequestAddress", {"PoolID": pool, "Options": {"com.docker.network.endpoint.macaddress": MAC}}),
            ("RequestPool", {"AddressSpace": "LocalDefault", "Pool": "10.2.0.0/24"}),
            ("ReleasePool", {"PoolID": pool}),
        ):
            assert "disk I/O error" in engine.refused(method, **content)
    assert engine.address(pool, OTHER_MAC) == "10.1.0.1/24"
    engine.pool("10.2.0.0/24")


# At once: what moby's parallel_test.go describes


@pytest.mark.parametrize("strategy", [strategy.value for strategy in Strategy])
@pytest.mark.parametrize("part", ["", "10.1.3.128/25"], ids=["network", "part"])
def test_all_addresses_are_given_out_and_back_at_once(engine: Engine, strategy: str, part: str) -> None:
    """Each once; all, those in odd places, those in even places come back, and are given out again."""
    pool = engine.pool("10.1.0.0/22", part, strategy=strategy)
    hosts = set(map(str, ip_network(part or "10.1.0.0/22"))) - {"10.1.0.0", "10.1.3.255"}
    numbers = itertools.count(1)

    def give(_: object) -> str:
        return engine.address(pool, next(numbers).to_bytes(6).hex(":")).partition("/")[0]

    with ThreadPoolExecutor(8) as users:
        given = list(users.map(give, hosts))
        assert sorted(given) == sorted(hosts)
        assert "no available addresses" in engine.refused("RequestAddress", PoolID=pool)
        for back in (given, given[1::2], given[::2]):
            list(users.map(lambda address: engine.release(pool, address), back))
            assert sorted(users.map(give, back)) == sorted(back)
        assert "no available addresses" in engine.refused("RequestAddress", PoolID=pool)
    assert rows(engine, "addresses") == len(hosts)


def test_pools_that_are_asked_for_at_once(engine: Engine) -> None:
    """All are different; what comes back is given out again."""

    def give(_: object) -> str:
        return engine.pool("0.0.0.0/20")

    with ThreadPoolExecutor(8) as users:
        given = list(users.map(give, range(64)))
        assert len(set(given)) == 64
        assert "fully subnetted" in engine.refused("RequestPool", AddressSpace="LocalDefault", Pool="0.0.0.0/20")
        list(users.map(lambda pool: engine("ReleasePool", PoolID=pool), given[::3]))
        assert sorted(users.map(give, given[::3])) == sorted(given[::3])
    assert rows(engine, "pools") == 64
