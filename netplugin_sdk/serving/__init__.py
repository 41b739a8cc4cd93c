"""A plugin as a process: sockets, HTTP, signals, logs, metrics and traces."""
