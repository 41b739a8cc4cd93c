"""Addresses: pools to give them out of, and a ready-made driver that does what Docker's own IPAM does.

A driver can take its own numbers from a `NumberPool`: VNIs, VLAN ids, ports.
"""

from netplugin_sdk.ipam.driver import Lease, PoolIpamDriver, PoolOptions
from netplugin_sdk.ipam.number_pool import NumberPool, Numbers, Strategy
from netplugin_sdk.ipam.pools import (
    GLOBAL_DEFAULTS,
    LOCAL_DEFAULTS,
    AddressPool,
    AddressSpace,
    DefaultPool,
    unique_local,
)

__all__ = [
    "GLOBAL_DEFAULTS",
    "LOCAL_DEFAULTS",
    "AddressPool",
    "AddressSpace",
    "DefaultPool",
    "Lease",
    "NumberPool",
    "Numbers",
    "PoolIpamDriver",
    "PoolOptions",
    "Strategy",
    "unique_local",
]
