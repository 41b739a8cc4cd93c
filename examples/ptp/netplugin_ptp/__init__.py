"""A Docker network driver: routed containers, without a bridge."""
