from __future__ import annotations

import subprocess
import sys
from importlib import resources

import pytest

import netplugin_sdk

HEAVY = (
    "pyroute2",
    "werkzeug",
    "click",
    "ssl",
    "asyncio",
    "prometheus_client",
    "opentelemetry",
    "netplugin_sdk.linux",
    "netplugin_sdk.testing",
)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, netplugin_sdk; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


def test_the_package_is_typed() -> None:
    assert resources.files(netplugin_sdk).joinpath("py.typed").is_file()


@pytest.mark.parametrize("name", netplugin_sdk.__all__)
def test_every_public_name_exists_and_is_explained(name: str) -> None:
    assert getattr(netplugin_sdk, name).__doc__


def test_public_names_are_listed_once_in_order() -> None:
    assert sorted(set(netplugin_sdk.__all__)) == netplugin_sdk.__all__
