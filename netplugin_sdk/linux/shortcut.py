"""Frames between the ports of a bridge, past the bridge and past the firewall.

Where ``net.bridge.bridge-nf-call-iptables`` is 1, as on a host of Docker, each frame that a bridge forwards goes
through the host's iptables and its connection tracking: some 3 µs each time. A frame to a MAC address whose port is
known needs neither if all on the bridge may talk to all. It is handed on where it comes in (nftables, family netdev,
hook ingress, ``fwd``):

    port ── ingress ──┬─ to a MAC address of a port ────────────────────→ that port
                      ├─ to any other of `MacAddress.of`, from a port ──→ the uplink
                      └─ all else: broadcasts, other MAC addresses ─────→ bridge and firewall

It is nothing but a shortcut: without it everything goes the long way. So what cannot be had is no error.
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
    """Have exactly these ports, by MAC address, and the uplink hand on frames themselves; in one transaction.

    Ports that are not here, or not any more, are left out. It takes 5 ms if it is so already, else 15 to 80: the kernel
    waits for its readers.

    Returns:
        Whether it is so. Not if this kernel or nft cannot do it, or there is no `uplink`; then nothing is left of an
        earlier one.
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
    """Undo `ensure`; nothing there is no error."""
    _nft("-f", "-", stdin=f"add table netdev {_table(bridge)}\ndelete table netdev {_table(bridge)}\n")


def _is_so(listed: str, ports: Mapping[MacAddress, str], uplink: str) -> bool:
    """Of an interface that was deleted the name is not listed any more."""
    known = dict(re.findall(r'ether daddr ([0-9a-f]{2}(?::[0-9a-f]{2}){5}) fwd to "([^"]+)"', listed))
    hooked = re.findall(r'hook ingress device "([^"]+)"', listed)
    return known == ports and sorted(hooked) == sorted((uplink, *ports.values())) and _beyond(uplink) in listed


def _beyond(uplink: str) -> str:
    # The octets are those of `MacAddress.of`.
    return f'ether daddr & ff:ff:00:00:00:00 == 02:42:00:00:00:00 fwd to "{uplink}"'


def _text(bridge: str, ports: Mapping[MacAddress, str], uplink: str) -> str:
    table = _table(bridge)
    # A rule for each, and no map: one that a newer nft has made crashes that of Debian 12, which has it listed.
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
    """As nft takes it for a table or a chain."""
    return "i" + re.sub(r"[^A-Za-z0-9_.-]", lambda match: f"/{ord(match[0]):x}", interface)


def _nft(*arguments: str, stdin: str = "", quietly: bool = False) -> str | None:
    """What it prints; None if it fails."""
    try:
        status, output, errors = run(deque(maxlen=1), "nftables", "nft", *arguments, stdin=stdin)
    except Unavailable as error:
        status, output, errors = 1, "", str(error)
    if status and not quietly:
        _log.info("no shortcut past bridges: nft: %s", errors.strip().partition("\n")[0])
    return None if status else output
