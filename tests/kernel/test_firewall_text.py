"""What goes into iptables-restore, as text. Needs no kernel."""

from __future__ import annotations

from ipaddress import ip_network

from netplugin_sdk.linux import firewall

NOTE = '-m comment --comment "netplugin_sdk:br-1"'
TO_OURS = '-m comment --comment "netplugin_sdk:NETPLUGIN" -j NETPLUGIN'
TO_USERS = '-m comment --comment "netplugin_sdk:DOCKER-USER" -j DOCKER-USER'
SUBNETS = [ip_network("10.9.0.0/24"), ip_network("10.8.0.0/16")]

BARE = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n"


def saved(*rules: str, chains: tuple[str, ...] = ()) -> str:
    lines = ["*filter", ":FORWARD DROP [0:0]", *(f":{chain} - [0:0]" for chain in chains), *rules, "COMMIT", ""]
    return "\n".join(lines)


def docker(*users: str, more: tuple[str, ...] = ()) -> str:
    """As after a start of the engine, with these rules in DOCKER-USER."""
    rules = ["-A FORWARD -j DOCKER-USER", *(f"-A DOCKER-USER {rule}" for rule in users), *more]
    return saved(*rules, chains=("DOCKER-USER", "NETPLUGIN"))


def users_part(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("-I DOCKER-USER", "-D DOCKER-USER"))]


def test_a_bridge_before_the_engine_ever_started() -> None:
    text = firewall._with_bridge(BARE, bridge="br-1", sources=SUBNETS, internal=False)
    assert text.splitlines() == [
        "*filter",
        "-N DOCKER-USER",
        "-N NETPLUGIN",
        f"-I FORWARD 1 {TO_USERS}",
        f"-I DOCKER-USER 1 {TO_OURS}",
        ":NETPLUGIN-br-1 - [0:0]",
        f"-A NETPLUGIN-br-1 -i br-1 {NOTE} -j ACCEPT",
        f"-A NETPLUGIN-br-1 -m conntrack --ctstate RELATED,ESTABLISHED {NOTE} -j ACCEPT",
        f"-A NETPLUGIN-br-1 {NOTE} -j DROP",
        f"-I NETPLUGIN 1 -o br-1 {NOTE} -j NETPLUGIN-br-1",
        f"-A NETPLUGIN -i br-1 {NOTE} -j ACCEPT",
        "COMMIT",
        "*nat",
        f"-A POSTROUTING -s 10.9.0.0/24 ! -o br-1 {NOTE} -j MASQUERADE",
        f"-A POSTROUTING -s 10.8.0.0/16 ! -o br-1 {NOTE} -j MASQUERADE",
        "COMMIT",
    ]


def test_an_internal_bridge_beside_an_engine() -> None:
    text = firewall._with_bridge(docker(TO_OURS), bridge="br-1", sources=[], internal=True)
    assert text.splitlines() == [
        "*filter",
        ":NETPLUGIN-br-1 - [0:0]",
        f"-A NETPLUGIN-br-1 -i br-1 {NOTE} -j ACCEPT",
        f"-A NETPLUGIN-br-1 {NOTE} -j DROP",
        f"-I NETPLUGIN 1 -i br-1 ! -o br-1 {NOTE} -j DROP",
        f"-I NETPLUGIN 1 -o br-1 {NOTE} -j NETPLUGIN-br-1",
        "COMMIT",
    ]


def test_what_is_so_already_is_not_touched() -> None:
    before = saved(
        "-A FORWARD -j DOCKER-USER",
        f"-A DOCKER-USER {TO_OURS}",
        f"-A NETPLUGIN -o br-1 {NOTE} -j NETPLUGIN-br-1",
        f"-A NETPLUGIN -i br-1 ! -o br-1 {NOTE} -j DROP",
        f"-A NETPLUGIN-br-1 -i br-1 {NOTE} -j ACCEPT",
        f"-A NETPLUGIN-br-1 {NOTE} -j DROP",
        chains=("DOCKER-USER", "NETPLUGIN", "NETPLUGIN-br-1"),
    )
    assert firewall._with_bridge(before, bridge="br-1", sources=[], internal=True) == ""


def test_the_null_ipam_drivers_pool_is_no_subnet_to_masquerade() -> None:
    text = firewall._with_bridge(BARE, bridge="br-1", sources=[ip_network("0.0.0.0/0")], internal=False)
    assert "MASQUERADE" not in text


def test_our_jump_stands_after_the_users_rules_and_before_a_plain_return() -> None:
    def changes(*users: str) -> list[str]:
        return users_part(firewall._with_bridge(docker(*users), bridge="br-1", sources=[], internal=False))

    drop, later = "-s 192.0.2.0/24 -j DROP", "-p tcp -j DROP"
    assert changes() == [f"-I DOCKER-USER 1 {TO_OURS}"]
    assert changes(drop) == [f"-I DOCKER-USER 2 {TO_OURS}"]
    assert changes(drop, "-j RETURN") == [f"-I DOCKER-USER 2 {TO_OURS}"]
    assert changes("-i eth0 -j RETURN") == [f"-I DOCKER-USER 2 {TO_OURS}"], "not a plain one"
    assert changes(drop, TO_OURS) == []
    assert changes(drop, TO_OURS, "-j RETURN") == []
    assert changes(TO_OURS, "-j RETURN", drop) == [], "nothing after a plain RETURN is ever reached"
    assert changes(TO_OURS, drop) == [f"-D DOCKER-USER {TO_OURS}", f"-I DOCKER-USER 2 {TO_OURS}"]
    assert changes("-j RETURN", TO_OURS) == [f"-D DOCKER-USER {TO_OURS}", f"-I DOCKER-USER 1 {TO_OURS}"]
    assert changes(TO_OURS, later, TO_OURS) == [f"-D DOCKER-USER {TO_OURS}"] * 2 + [f"-I DOCKER-USER 2 {TO_OURS}"]


def test_delete_of_one_of_two_leaves_the_other() -> None:
    other = '-o br-12 -m comment --comment "netplugin_sdk:br-12" -j NETPLUGIN-br-12'
    mine = f"-o br-1 {NOTE} -j NETPLUGIN-br-1"
    before = saved(
        "-A FORWARD -j DOCKER-USER",
        f"-A DOCKER-USER {TO_OURS}",
        f"-A NETPLUGIN {other}",
        f"-A NETPLUGIN {mine}",
        chains=("DOCKER-USER", "NETPLUGIN", "NETPLUGIN-br-1", "NETPLUGIN-br-12"),
    )
    assert firewall._without_bridge(before, bridge="br-1").splitlines() == [
        "*filter",
        f"-D NETPLUGIN {mine}",
        "-F NETPLUGIN-br-1",
        "-X NETPLUGIN-br-1",
        "COMMIT",
    ]


def test_delete_where_nothing_is_does_nothing() -> None:
    assert firewall._without_bridge("", bridge="br-1") == ""
    assert firewall._without_bridge(BARE, bridge="br-1") == ""
    assert firewall._without_bridge(docker(TO_OURS), bridge="br-1") == ""
