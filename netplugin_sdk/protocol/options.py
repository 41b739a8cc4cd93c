"""A driver's own ``-o`` options: a typed class, parsed and validated before the author's method runs."""

from __future__ import annotations

import enum
import ipaddress
import re
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar

import msgspec
from typing_extensions import dataclass_transform

from netplugin_sdk.errors import InvalidOption

_NATIVE: dict[type, str] = {
    ipaddress.IPv4Address: "IPv4 address",
    ipaddress.IPv6Address: "IPv6 address",
    ipaddress.IPv4Interface: "IPv4 address with prefix length",
    ipaddress.IPv6Interface: "IPv6 address with prefix length",
    ipaddress.IPv4Network: "IPv4 network",
    ipaddress.IPv6Network: "IPv6 network",
}
_COLLECTIONS = (list, tuple, set, frozenset)
_UNIONS = (typing.Union, types.UnionType)
_TEXTUAL = (str, int, float, bool, types.NoneType, Any, *_NATIVE)
_STANDARD = {  # classes that msgspec reads from text, by name: most plugins need not import them
    "datetime": ("date", "datetime", "time", "timedelta"),
    "decimal": ("Decimal",),
    "uuid": ("UUID",),
}
_MISSING_FIELD = re.compile(r"Object missing required field `(.*)`")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class DriverOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of ``docker network create -o KEY=VALUE`` that a driver knows, one field each.

    Subclass it and name it in the driver's type: ``class L2(NetworkDriver[L2Options])``. Then every
    `Network.options` is an instance::

        class L2Options(DriverOptions):
            mtu: Annotated[int, Meta(ge=68, le=65535)] = field(name="com.docker.network.driver.mtu", default=1500)
            parent: str | None = None

    `field` and `Meta` are msgspec's: ``name`` is the key on the wire where it is not the field's own, ``Meta``
    holds bounds, a pattern, a description. Docker sends every value as a string (protocol: ``CreateNetwork``,
    ``Options["com.docker.network.generic"]``); it is converted to the field's type: str, int, float, bool (true,
    false, 1, 0), an enum, an `ipaddress` type, the SDK's `IPAddress`, `IPInterface` and `IPNetwork` for either
    version, a class with a ``parse(text)`` class method, a list, tuple or set of these (``-o dns=10.0.0.1,10.0.0.2``),
    or any of these with ``| None``. A field without default is an option that must be given.

    A driver that names no class knows no option: any ``-o`` is refused, for nothing is ignored silently. To accept
    what you do not know, subclass with ``forbid_unknown_fields=False`` and read `Network.raw_options`.
    """

    def __init_subclass__(cls) -> None:
        """Raise TypeError if an option has a type that no text can be converted to."""
        super().__init_subclass__()
        with suppress(NameError):  # a name that comes later in the file; the driver's class asks again
            check_types(cls)

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> Self:
        """The options of `given`, converted and checked.

        Raises:
            InvalidOption: one is unknown, missing or cannot be converted; the text lists the known ones.
        """
        check_types(cls)
        unknown = given.keys() - set(cls.__struct_encode_fields__)
        if unknown and cls.__struct_config__.forbid_unknown_fields:
            raise InvalidOption(f"unknown option {min(unknown)!r}; {cls._known()}")
        try:
            values = {name: _split(text) if name in _lists(cls) else text for name, text in given.items()}
            return msgspec.convert(values, cls, strict=False, dec_hook=from_text)
        except msgspec.ValidationError as error:
            raise InvalidOption(_explain(str(error), given, cls)) from None

    @classmethod
    def _known(cls) -> str:
        names = sorted(cls.__struct_encode_fields__)
        return f"known options: {', '.join(names)}" if names else "this driver has no options"


@cache
def check_types(options: type[DriverOptions]) -> None:
    """Raise TypeError if a field has a type that no text can be converted to.

    Raises NameError if a type names something that is not defined yet.
    """
    for name, kind in typing.get_type_hints(options, include_extras=True).items():
        if typing.get_origin(kind) is ClassVar or kind is ClassVar:
            continue
        if (wrong := _unconvertible(kind)) is not None:
            shown = getattr(wrong, "__name__", str(wrong))
            raise TypeError(
                f"{options.__name__}.{name}: no option can be a {shown}, since Docker sends texts; "
                "a class with a class method parse(text) can"
            )
        try:
            msgspec.json.Decoder(kind)  # msgspec refuses some unions and enumerations
        except TypeError as error:
            shown = kind.__name__ if isinstance(kind, type) else str(kind)
            reason = str(error).partition(" - type ")[0]
            raise TypeError(f"{options.__name__}.{name}: no option can be a {shown}: {reason}") from None


def _bare(kind: Any) -> Any:
    """The type that stands behind Annotated, Final, a NewType or ``type Name = ...``."""
    while True:
        if typing.get_origin(kind) in (Annotated, Final):
            kind = typing.get_args(kind)[0]
        elif isinstance(kind, typing.NewType):
            kind = kind.__supertype__
        elif hasattr(kind, "__value__"):  # Python 3.12
            kind = kind.__value__
        else:
            return kind


def _unconvertible(kind: Any, *, inside: bool = False) -> Any:
    """The part of a field's type that no text can be converted to; None if there is none."""
    kind = _bare(kind)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS or ((origin or kind) in _COLLECTIONS and not inside):
        inside = inside or origin not in _UNIONS
        found = (_unconvertible(part, inside=inside) for part in parts if part is not Ellipsis)
        return next((wrong for wrong in found if wrong is not None), None)
    if isinstance(kind, type):
        textual = kind in _TEXTUAL or issubclass(kind, enum.Enum) or hasattr(kind, "parse")
        return None if textual or kind.__name__ in _STANDARD.get(kind.__module__, ()) else kind
    return None if origin is Literal or kind is Any or isinstance(kind, TypeVar) else kind


@cache
def _lists(options: type[DriverOptions]) -> frozenset[str]:
    """The names of options that are lists, on the wire."""
    return frozenset(f.encode_name for f in msgspec.structs.fields(options) if _is_list(f.type))


def _is_list(kind: Any) -> bool:
    kind = _bare(kind)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
        return any(_is_list(part) for part in parts)
    return (origin or kind) in _COLLECTIONS


def _split(text: Any) -> Any:
    return [part.strip() for part in text.split(",")] if isinstance(text, str) and text else []


def from_text(wanted: type, text: Any) -> Any:
    """The value of `text` as a `wanted`: a hook of msgspec, for types that it does not know."""
    if (what := _NATIVE.get(wanted)) is not None:
        try:
            return wanted(text)
        except ValueError as error:
            raise ValueError(f"expected an {what}: {error}") from None
    if parse := getattr(wanted, "parse", None):
        return parse(text)
    raise NotImplementedError(f"{wanted.__name__} cannot be made from text: it has no class method parse(text)")


def _explain(reason: str, given: Mapping[str, str], options: type[DriverOptions]) -> str:
    # msgspec ends its text with the field's place: "Expected `int` >= 68 - at `$.com.docker.network.driver.mtu`".
    reason, _, place = reason.partition(" - at `$.")
    name = re.sub(r"\[[0-9.]*\]$", "", place.rstrip("`"))  # of an option that is a list
    if name in given:
        wanted = reason.removesuffix(", got `str`").replace("`bool`", "true or false").replace("`", "")
        (kind,) = (field.type for field in msgspec.structs.fields(options) if field.encode_name == name)
        if values := [str(member.value) for enumeration in _enums(kind) for member in enumeration]:
            wanted = f"expected {', '.join(values[:-1])} or {values[-1]}"
        text = repr(given[name])
        return f"option {name}={text if len(text) <= 80 else text[:77] + '...'}: {wanted[:1].lower()}{wanted[1:]}"
    if match := _MISSING_FIELD.match(reason):
        return f"option {match[1]!r} must be given; {options._known()}"
    return reason


def _enums(kind: Any) -> list[type[enum.Enum]]:
    """The enumerations in a field's type, such as ``Mode | None``."""
    kind = _bare(kind)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [kind]
    return [found for part in typing.get_args(kind) for found in _enums(part)]
