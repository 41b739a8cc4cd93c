"""A Docker network driver: containers on the LAN, with addresses from its DHCP server."""
