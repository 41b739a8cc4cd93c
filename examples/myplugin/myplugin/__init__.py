"""A Docker network driver like the built-in bridge, written with netplugin_sdk."""
