"""A shortcut for frames between the ports of a bridge, past the bridge and the firewall.

Where ``net.bridge.bridge-nf-call-iptables`` is 1, as on a host of Docker, each frame that a bridge forwards goes
through the host's iptables and its connection tracking: some 3 µs each time. A frame to a MAC address whose port is
known needs neither if all ports may talk to each other. It is forwarded where it comes in (nftables, family netdev,
hook ingress, ``fwd``):

    port ── ingress ──┬─ to a MAC address of a port ────────────────────→ that port
                      ├─ to any other of `MacAddress.of`, from a port ──→ the uplink
                      └─ all else: broadcasts, other MAC addresses ─────→ bridge and firewall

Without the shortcut, frames take the normal path. So it is no error if the kernel or nft cannot make it.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Mapping

from netplugin_sdk.errors import Unavailable
from netplugin_sdk.linux import links
from netplugin_sdk.linux.programs import run
from netplugin_sdk.values import MacAddress

_log = logging.getLogger("netplugin_sdk")


def ensure(bridge: str, ports: Mapping[MacAddress, str], uplink: str) -> bool:
    """Have exactly these ports, by MAC address, and the uplink forward frames by themselves; in one transaction.

    Ports that do not exist here are left out. It takes 5 ms if nothing has to be changed, else 15 to 80: the kernel
    waits for its readers.

    Returns:
        Whether the shortcut exists. False if this kernel or nft cannot make it, or there is no `uplink`; then an
        earlier one is removed.
    """
    here = links.names()
    ports = {mac: port for mac, port in ports.items() if port in here}
    if uplink in here:
        listed = _nft("list", "table", "netdev", _table(bridge), quietly=True)
        if listed is not None and _is_so(listed, ports, uplink):
            return True
        if _nft("-f", "-", stdin=_text(bridge, ports, uplink)) is not None:
            return True
    delete(bridge)
    return False


def delete(bridge: str) -> None:
    """Remove the shortcut of a bridge, if there is one."""
    _nft("-f", "-", stdin=f"add table netdev {_table(bridge)}\ndelete table netdev {_table(bridge)}\n")


def _is_so(listed: str, ports: Mapping[MacAddress, str], uplink: str) -> bool:
    """Whether the listed table is as wanted. The name of a deleted interface is not listed any more."""
    known = dict(re.findall(r'ether daddr ([0-9a-f]{2}(?::[0-9a-f]{2}){5}) fwd to "([^"]+)"', listed))
    hooked = re.findall(r'hook ingress device "([^"]+)"', listed)
    return known == ports and sorted(hooked) == sorted((uplink, *ports.values())) and _beyond(uplink) in listed


def _beyond(uplink: str) -> str:
    # The octets are those of `MacAddress.of`.
    return f'ether daddr & ff:ff:00:00:00:00 == 02:42:00:00:00:00 fwd to "{uplink}"'


def _text(bridge: str, ports: Mapping[MacAddress, str], uplink: str) -> str:
    table = _table(bridge)
    # One rule per address, not a map: listing a map that a newer nft made crashes the nft of Debian 12.
    known = " ".join(f'ether daddr {mac} fwd to "{port}";' for mac, port in ports.items())
    chains = [
        f"chain known {{ {known} }}",
        f"chain others {{ jump known; {_beyond(uplink)}; }}",
        _ingress(uplink, "known"),
        *(_ingress(port, "others") for port in ports.values()),
    ]
    return (
        f"add table netdev {table}\ndelete table netdev {table}\ntable netdev {table} {{\n"
        + "\n".join(chains)
        + "\n}\n"
    )


def _ingress(port: str, target: str) -> str:
    return f'chain {_name(port)} {{ type filter hook ingress device "{port}" priority 0; jump {target}; }}'


def _table(bridge: str) -> str:
    return f"netplugin-{_name(bridge)}"


def _name(interface: str) -> str:
    """The name of an interface as a name of a table or a chain for nft."""
    return "i" + re.sub(r"[^A-Za-z0-9_.-]", lambda match: f"/{ord(match[0]):x}", interface)


def _nft(*arguments: str, stdin: str = "", quietly: bool = False) -> str | None:
    """The output of nft; None if it fails."""
    try:
        status, output, errors = run(deque(maxlen=1), "nftables", "nft", *arguments, stdin=stdin)
    except Unavailable as error:
        status, output, errors = 1, "", str(error)
    if status and not quietly:
        _log.info("no shortcut past bridges: nft: %s", errors.strip().partition("\n")[0])
    return None if status else output
