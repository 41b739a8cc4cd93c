"""The promises: requests are served, state is kept on disk, damage is repaired."""
