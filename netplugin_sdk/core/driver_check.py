"""Mistakes in a driver's class, found before the plugin starts: one line that names the class and the method."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection
from typing import Any

from netplugin_sdk.driver import IpamDriver, NetworkDriver
from netplugin_sdk.errors import InvalidDriver
from netplugin_sdk.protocol.messages import Scope
from netplugin_sdk.protocol.options import check_types

_ALIKE = 0.75  # of `difflib`: `joni` is 0.75 of `join`
_EVERYDAY = ("open", "close")  # helpers of an author's own look like these: opened, reopen, clone


def check_driver(driver: NetworkDriver[Any] | IpamDriver) -> frozenset[str]:
    """The members of the SDK's class that the driver's class defines itself, such as optional methods.

    Raises `InvalidDriver` if a method has a misspelt name or cannot be called with what the SDK gives it. A public
    method that looks like one of the SDK's is taken for it unless the driver defines that one, too; one that looks like
    `open` or `close`, only if letters are missing or in another order.
    """
    base: type = NetworkDriver if isinstance(driver, NetworkDriver) else IpamDriver
    members = {name: member for name, member in vars(base).items() if not name.startswith("_")}
    defined = frozenset(name for name, member in members.items() if getattr(type(driver), name) is not member)
    methods = {name: member for name, member in members.items() if inspect.isfunction(member) and name != "bind"}
    for name, member in members.items():
        if (name == "bind" or isinstance(member, property)) and name in defined:
            raise InvalidDriver(f"{_name(driver)}.{name} is the SDK's own: call yours by another name")
    _check_names(type(driver), base, methods.keys(), defined)
    for name in methods.keys() & defined:
        _check_method(driver, name, methods[name])
    if isinstance(driver, NetworkDriver):
        if len(defined & {"program_external_connectivity", "revoke_external_connectivity"}) == 1:
            raise InvalidDriver(f"{_name(driver)} defines only one of program_ and revoke_external_connectivity")
        scope: object = driver.scope
        if not isinstance(scope, Scope):
            raise InvalidDriver(f"{_name(driver)}.scope must be Scope.LOCAL or Scope.GLOBAL, got {scope!r}")
        check_types(driver.options_type)
    return defined


def _check_names(kind: type, base: type, methods: Collection[str], defined: frozenset[str]) -> None:
    import difflib  # noqa: PLC0415  # 2 ms that only a start needs

    for cls in kind.__mro__:
        if cls.__module__.partition(".")[0] == "netplugin_sdk":
            continue
        for name, member in vars(cls).items():
            is_method = inspect.isfunction(member) or isinstance(member, staticmethod | classmethod)
            if name.startswith("_") or not is_method or hasattr(base, name):
                continue
            for meant in difflib.get_close_matches(name, methods, n=1, cutoff=_ALIKE):
                own_word = meant in _EVERYDAY and not Counter(name) <= Counter(meant)
                if not own_word and meant not in defined:
                    raise InvalidDriver(
                        f"{cls.__name__}.{name} is not a method of {base.__name__}: did you mean {meant}? "
                        f"(a method of your own may be called _{name})"
                    )


def _check_method(driver: object, name: str, wanted: Any) -> None:
    method = getattr(driver, name)
    if not callable(method):
        raise InvalidDriver(f"{_name(driver)}.{name} must be a method, got {method!r}")
    if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method) or inspect.isgeneratorfunction(method):
        raise InvalidDriver(f"{_name(driver)}.{name} must be a plain method, without async and yield")
    try:
        inspect.signature(method).bind(*[None] * (len(inspect.signature(wanted).parameters) - 1))
    except TypeError:
        parameters = ", ".join(list(inspect.signature(wanted).parameters)[1:])
        given = inspect.signature(method).parameters.values()
        takes = inspect.Signature([parameter.replace(annotation=inspect.Parameter.empty) for parameter in given])
        raise InvalidDriver(f"{_name(driver)}.{name} must take ({parameters}), it takes {takes}") from None
    except ValueError:
        return  # a function of C, which tells nothing


def _name(driver: object) -> str:
    return type(driver).__name__
