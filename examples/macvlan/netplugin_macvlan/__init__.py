"""A Docker network driver: containers on the LAN of a parent interface, like the built-in macvlan."""
