"""A Docker network driver: one network over all nodes of a swarm, by VXLAN, like the built-in overlay."""
