"""How long a test waits for what must come."""

PATIENCE = 60.0
"""Seconds. A long wait costs nothing if the thing comes soon; a short one would fail on a busy machine."""
