"""What keeps the promises: requests, what is on disk, and what is repaired."""
