"""Errors that a driver raises, and how each reaches Docker.

An error is its own answer: `status` is the HTTP status of the reply and ``str(error)`` the one line that
`docker` prints after the method's name. The engine reads any non-200 reply as an error and shows the body's
``Err`` (moby ``pkg/plugins/client.go``); it never looks at the number, except that **404 means "method not
supported"** for the two ExternalConnectivity methods. So no error here is a 404.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import ClassVar


class DriverError(Exception):
    """A failure that the user should read: its text is shown by `docker` as one line.

    Raise it, or one of its subclasses, from any driver method. Any other exception reaches Docker too, as its
    type and text, and is logged with its traceback as a bug.
    """

    status: ClassVar[int] = 500

    def __init_subclass__(cls) -> None:
        """Check the status, since the engine shows only the text of an answer that it can read.

        Raises TypeError: it is not an error status of HTTP, or 404.
        """
        super().__init_subclass__()
        status: object = cls.status
        if not isinstance(status, int) or not 400 <= status <= 599 or status not in set(HTTPStatus):
            raise TypeError(
                f"{cls.__name__}.status must be an error status of HTTP, such as 409 or 500, not {status!r}"
            )
        if status == HTTPStatus.NOT_FOUND:
            raise TypeError(f'{cls.__name__}.status must not be 404, which says "method not supported" to Docker')

    def __str__(self) -> str:
        # Docker prints the answer as it is: keep it one line.
        return " ".join(super().__str__().split())


class InvalidRequest(DriverError):
    """The request is not what the protocol says: empty, not JSON, a field missing or of the wrong type."""

    status = 400


class InvalidOption(InvalidRequest):
    """A ``-o`` option that is unknown or has a value that cannot be used."""


class NotFound(DriverError):
    """The network, endpoint, pool or address is unknown here."""

    status = 422  # not 404: see the module's text


class Conflict(DriverError):
    """It exists already with other content, or it is in use."""

    status = 409


class Unsupported(DriverError):
    """The driver cannot do what was asked for, and no repetition will change that."""

    status = 501


class Unavailable(DriverError):
    """Something that the driver needs is not there now; a later try may succeed."""

    status = 503


class InvalidReturn(DriverError):
    """A driver's method returned something that Docker cannot use: a mistake of the driver's author.

    The text names the method, the field, the value and what was expected.
    """


class InvalidDriver(TypeError):
    """A driver's class has a mistake, found before the plugin starts. The text names the class and the method."""
