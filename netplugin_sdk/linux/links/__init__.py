"""Bridges, veth pairs, macvlans, VLANs and routes in the plugin's own network namespace, over netlink.

Every function brings the interface to a state, whatever it was before, so it can be run again after a crash at any
point. A name that is not valid raises `InvalidRequest` before the kernel is asked; a refusal of the kernel raises
`LinkError`.
All functions may be called from any number of threads.

`netplugin_sdk.losses` publishes changes by others to an interface that was made here.
"""

from netplugin_sdk.linux.links.addresses import delete_route, ensure_route, occupied
from netplugin_sdk.linux.links.devices import (
    Link,
    attach,
    close,
    delete,
    describe,
    ensure_bridge,
    ensure_ipvlan,
    ensure_macvlan,
    ensure_veth,
    ensure_vlan,
    ensure_vxlan,
    exists,
    move,
    names,
    restore_link,
    set_up,
    with_address,
)
from netplugin_sdk.linux.links.fdb import (
    add_flood_destination,
    delete_flood_destination,
    ensure_fdb_entry,
    set_flood_destinations,
)
from netplugin_sdk.linux.links.netlink import LinkError

__all__ = [
    "Link",
    "LinkError",
    "add_flood_destination",
    "attach",
    "close",
    "delete",
    "delete_flood_destination",
    "delete_route",
    "describe",
    "ensure_bridge",
    "ensure_fdb_entry",
    "ensure_ipvlan",
    "ensure_macvlan",
    "ensure_route",
    "ensure_veth",
    "ensure_vlan",
    "ensure_vxlan",
    "exists",
    "move",
    "names",
    "occupied",
    "restore_link",
    "set_flood_destinations",
    "set_up",
    "with_address",
]
