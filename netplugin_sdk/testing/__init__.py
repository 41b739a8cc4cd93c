"""What the tests of a driver need; nothing of it is imported by a running plugin."""
