"""The messages of the wire, and the options in them."""
