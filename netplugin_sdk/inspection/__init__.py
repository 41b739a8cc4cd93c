"""A running plugin looked at from outside: its state on disk, the kernel and Docker, side by side.

`looking.take` looks and compares; `drawing` makes pictures of what it returns. Nothing here changes anything.
"""
