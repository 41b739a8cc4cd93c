"""Mistakes in a driver's class, found before the plugin starts: one line that names the class and the method."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

from netplugin_sdk.driver import IpamDriver, NetworkDriver, overridden
from netplugin_sdk.errors import InvalidDriver
from netplugin_sdk.protocol.messages import Scope
from netplugin_sdk.protocol.options import check_types

_ALIKE = 0.75  # of `difflib`: `joni` is 0.75 of `join`
_EVERYDAY = ("open", "close")  # helpers of an author's own look like these: opened, reopen, clone


def check_driver(driver: NetworkDriver[Any] | IpamDriver) -> None:
    """Raise `InvalidDriver` if a method has a misspelt name or cannot be called with what the SDK gives it.

    A public method that looks like one of the SDK's is taken for it unless the driver defines that one, too; one that
    looks like `open` or `close`, only if letters are missing or in another order.
    """
    base: type = NetworkDriver if isinstance(driver, NetworkDriver) else IpamDriver
    methods = {
        name: method for name, method in vars(base).items() if inspect.isfunction(method) and not name.startswith("_")
    }
    for name, member in vars(base).items():
        if (name == "bind" or isinstance(member, property)) and overridden(driver, name):
            raise InvalidDriver(f"{_name(driver)}.{name} is the SDK's own: call yours by another name")
    _check_names(driver, base, methods.keys() - {"bind"})
    for name, method in methods.items():
        if overridden(driver, name):
            _check_method(driver, name, len(inspect.signature(method).parameters) - 1, method)
    if isinstance(driver, NetworkDriver):
        if overridden(driver, "program_external_connectivity") != overridden(driver, "revoke_external_connectivity"):
            raise InvalidDriver(f"{_name(driver)} defines only one of program_ and revoke_external_connectivity")
        scope: object = driver.scope
        if not isinstance(scope, Scope):
            raise InvalidDriver(f"{_name(driver)}.scope must be Scope.LOCAL or Scope.GLOBAL, got {scope!r}")
        check_types(driver.options_type)


def _check_names(driver: NetworkDriver[Any] | IpamDriver, base: type, methods: set[str]) -> None:
    import difflib  # noqa: PLC0415  # 2 ms that only a start needs

    own = [cls for cls in type(driver).__mro__ if cls.__module__.partition(".")[0] != "netplugin_sdk"]
    for cls in own:
        for name, member in vars(cls).items():
            is_method = inspect.isfunction(member) or isinstance(member, staticmethod | classmethod)
            if name.startswith("_") or not is_method or hasattr(base, name):
                continue
            for meant in difflib.get_close_matches(name, methods, n=1, cutoff=_ALIKE):
                own_word = meant in _EVERYDAY and not Counter(name) <= Counter(meant)
                if not own_word and not overridden(driver, meant):
                    raise InvalidDriver(
                        f"{cls.__name__}.{name} is not a method of {base.__name__}: did you mean {meant}? "
                        f"(a method of your own may be called _{name})"
                    )


def _check_method(driver: NetworkDriver[Any] | IpamDriver, name: str, count: int, wanted: Any) -> None:
    method = getattr(driver, name)
    if not callable(method):
        raise InvalidDriver(f"{_name(driver)}.{name} must be a method, got {method!r}")
    if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method) or inspect.isgeneratorfunction(method):
        raise InvalidDriver(f"{_name(driver)}.{name} must be a plain method, without async and yield")
    try:
        inspect.signature(method).bind(*[None] * count)
    except TypeError:
        parameters = ", ".join(list(inspect.signature(wanted).parameters)[1:])
        given = inspect.signature(method).parameters.values()
        takes = inspect.Signature([parameter.replace(annotation=inspect.Parameter.empty) for parameter in given])
        raise InvalidDriver(f"{_name(driver)}.{name} must take ({parameters}), it takes {takes}") from None
    except ValueError:
        return  # a function of C, which tells nothing


def _name(driver: object) -> str:
    return type(driver).__name__
