"""Compares an interface with how it was left, and watches all that were made here."""

from __future__ import annotations

from netplugin_sdk.linux.links.addresses import addresses_of
from netplugin_sdk.linux.links.netlink import IFF_UP, message_of, operation
from netplugin_sdk.linux.watch import Made, Watch


@operation
def diagnose(name: str, made: Made) -> str | None:
    """How an interface differs from its state as made here, in words such as ``is down``; None if it does not."""
    present = addresses_of(name, made.index) if made.addresses else ()
    message = message_of(name)
    if message is None or message["index"] != made.index:
        return "is gone"
    if not message["flags"] & IFF_UP:
        return "is down"
    if made.master is not None and message.get("master") != made.master:
        return "is not a port of its bridge any more"
    if lost := [str(address) for address in made.addresses if address not in present]:
        return f"has lost {', '.join(lost)}"
    return None


watch = Watch(diagnose)
