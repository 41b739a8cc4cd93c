"""The units of examples/dhcp/systemd, as they are, under a real systemd beside Docker's own units."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from netplugin_sdk.testing.engine import OUTSIDE_ADDRESS, wait_until

from ..patience import PATIENCE
from .systemd_lab import SYSTEMD, Host

pytestmark = pytest.mark.one_engine

# The LAN's server does not start with the host, but it is there when Docker asks.
LAN_UNIT = """
[Unit]
Before=docker.service

[Service]
ExecStart=/usr/bin/nsenter --net=/run/netns/outside /usr/sbin/dnsmasq --keep-in-foreground --conf-file=/dev/null \\
    --port=0 --user=root --pid-file= --interface=eth0 --bind-interfaces --no-ping --log-facility=/run/dnsmasq.log \\
    --dhcp-range=198.51.100.100,198.51.100.150,255.255.255.0,1h --dhcp-leasefile=/run/leases \\
    --dhcp-option=option:T1,3 --dhcp-option=option:T2,4
"""


@pytest.fixture(scope="module")
def host(version: str) -> Iterator[Host]:
    """With a container that is always to run, on the LAN that the host's eth0 is on."""
    if not SYSTEMD.exists():
        pytest.skip("needs systemd, not as the init of this machine: apt-get install systemd")
    host = Host(version, example="dhcp", module="netplugin_dhcp", program="netplugin-dhcp")
    units = host.folder / "disk/units"
    (units / "lan.service").write_text(LAN_UNIT)
    (units / "multi-user.target.wants/lan.service").symlink_to("../lan.service")
    try:
        host.boot()
        host.import_busybox()
        host.run("systemctl", "enable", "--now", "netplugin-dhcp.socket", "netplugin-dhcp.service")
        host.docker("network", "create", "--driver=dhcp", "--ipam-driver=null", "-o", "parent=eth0", "lan")
        forever = ("--restart=always", "--stop-timeout=1", "busybox", "sleep", "1000000")
        host.docker("run", "--detach", "--name=web", "--network=lan", *forever)
        yield host
    finally:
        host.close()


def address(host: Host) -> str:
    return host.docker("inspect", "-f", "{{.NetworkSettings.Networks.lan.IPAddress}}", "web")


def renewals(host: Host) -> int:
    return host.run("cat", "/run/dnsmasq.log").count(f"DHCPACK(eth0) {address(host)}")


def test_systemd_finds_nothing_wrong_with_them(host: Host) -> None:
    assert host.run("systemd-analyze", "verify", "netplugin-dhcp.service", "netplugin-dhcp.socket") == ""


def test_all_works_with_what_the_unit_leaves_to_root(host: Host) -> None:
    wait_until(lambda: "web" in host.run("cat", "/run/leases"), PATIENCE, every=0.2)
    before = renewals(host)
    wait_until(lambda: renewals(host) >= before + 2, PATIENCE, every=0.2)
    assert "1 packets received" in host.docker("exec", "web", "ping", "-c1", "-W2", OUTSIDE_ADDRESS)
    status = host.run("cat", f"/proc/{host.show('netplugin-dhcp.service', 'MainPID')}/status")
    can = [line.split()[1] for line in status.splitlines() if line.startswith(("CapEff", "CapBnd"))]
    assert {int(mask, 16) for mask in can} == {1 << 12 | 1 << 13 | 1 << 21}, "NET_ADMIN, NET_RAW, SYS_ADMIN"
    assert "Seccomp:\t2" in status


def test_a_killed_plugin_comes_back_and_goes_on_with_the_lease(host: Host) -> None:
    kept = address(host)
    host.run("systemctl", "kill", "--signal=KILL", "netplugin-dhcp.service")
    before = renewals(host)
    wait_until(lambda: renewals(host) >= before + 2, PATIENCE, every=0.2)
    assert address(host) == kept
    assert "WARNING" not in host.journal("netplugin-dhcp.service")


def test_a_reboot(host: Host) -> None:
    host.power_off()
    host.boot()
    wait_until(lambda: host.docker("ps", "--quiet") != "", PATIENCE, every=0.2)
    wait_until(lambda: "web" in host.run("cat", "/run/leases"), PATIENCE, every=0.2)
    assert "1 packets received" in host.docker("exec", "web", "ping", "-c1", "-W2", OUTSIDE_ADDRESS)
