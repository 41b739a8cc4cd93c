"""Kernel parameters, of a network namespace that the test makes."""

from __future__ import annotations

import pytest

from netplugin_sdk.errors import InvalidRequest
from netplugin_sdk.linux import links, sysctls
from netplugin_sdk.linux.sysctls import SysctlError

pytestmark = pytest.mark.usefixtures("netns")

FORWARD = "net/ipv4/ip_forward"


def test_what_was_before_is_returned_to_be_put_back() -> None:
    before = sysctls.read(FORWARD)
    assert before in ("0", "1")
    other = "1" if before == "0" else "0"
    assert sysctls.ensure(FORWARD, int(other)) == before
    assert sysctls.read(FORWARD) == other
    assert sysctls.ensure(FORWARD, other) == other
    assert sysctls.ensure(FORWARD, before) == other


def test_an_interface_with_a_dot() -> None:
    links.ensure_bridge("br.1")
    sysctls.ensure("net/ipv6/conf/br.1/accept_ra", 0)
    assert sysctls.read("net/ipv6/conf/br.1/accept_ra") == "0"


def test_what_is_not_there_is_none_and_cannot_be_set() -> None:
    assert sysctls.read("net/ipv4/conf/nowhere/forwarding") is None
    with pytest.raises(SysctlError, match=r"^sysctl net/ipv4/conf/nowhere/forwarding: this kernel has no such param"):
        sysctls.ensure("net/ipv4/conf/nowhere/forwarding", 1)
    with pytest.raises(SysctlError, match="load it with: modprobe br_netfilter"):
        sysctls.ensure("net/bridge/bridge-nf-call-whatever", 1)


def test_what_the_kernel_refuses_is_named_with_its_values() -> None:
    before = sysctls.read(FORWARD)
    with pytest.raises(SysctlError, match=f"^sysctl {FORWARD}: cannot set it from {before} to many: Invalid argument$"):
        sysctls.ensure(FORWARD, "many")
    assert sysctls.read(FORWARD) == before


@pytest.mark.parametrize("name", ["", "/etc/passwd", "net/../../etc/passwd", "net//ipv4", "net/./ipv4", "net/ipv4\n"])
def test_a_name_that_leads_elsewhere(name: str) -> None:
    with pytest.raises(InvalidRequest):
        sysctls.ensure(name, 1)


def test_a_directory_is_no_parameter() -> None:
    with pytest.raises(SysctlError, match="cannot read: Is a directory"):
        sysctls.read("net/ipv4")
