"""Tools for the tests of a driver; a running plugin imports none of them."""
