"""The kernel's table of connections (nf_conntrack)."""

from __future__ import annotations

import errno
import socket

from pyroute2 import NFCTSocket
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import IPS_DST_NAT, NFCTAttrTuple

from netplugin_sdk.errors import DriverError
from netplugin_sdk.values import IPAddress


class ConntrackError(DriverError):
    """The kernel's table of connections cannot be read or changed."""


def forget_published(address: IPAddress) -> int:
    """Delete the entries of UDP flows from published ports to this container. Returns how many there were.

    An entry, with its translation, lasts as long as the flow: without this, a client that does not pause would still
    send to a deleted container after another one has got the port.

    Raises `ConntrackError` if the kernel refuses.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    found = 0
    try:
        with NFCTSocket(nfgen_family=family) as table:
            # The kernel filters by status since 5.15, and ignores the filter before.
            for entry in tuple(table.dump(status=IPS_DST_NAT, status_mask=IPS_DST_NAT)):
                reply = NFCTAttrTuple.from_netlink(family, entry.get_attr("CTA_TUPLE_REPLY"))
                if reply.proto == socket.IPPROTO_UDP and reply.saddr == str(address):
                    original = NFCTAttrTuple.from_netlink(family, entry.get_attr("CTA_TUPLE_ORIG"))
                    try:
                        table.entry("del", tuple_orig=original)
                        found += 1
                    except NetlinkError as error:
                        if error.code != errno.ENOENT:  # it ended meanwhile
                            raise
    except (NetlinkError, OSError) as error:
        raise ConntrackError(f"connections to {address}: cannot forget them: {error}") from error
    return found
