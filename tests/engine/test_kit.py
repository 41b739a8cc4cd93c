"""The test kit's real engine, as authors of drivers use it."""

from __future__ import annotations

import sys

import pytest

pytestmark = pytest.mark.one_engine

TEST = f"""
def test_a_container(docker_engine):
    with docker_engine.start_plugin("myplugin", [{sys.executable!r}, "-m", "myplugin"]):
        docker_engine.docker("network", "create", "--driver", "myplugin", "lan")
        shown = docker_engine.docker("run", "--rm", "--network", "lan", "busybox", "ip", "address")
        assert "eth0" in shown
        docker_engine.docker("network", "rm", "lan")
"""


def test_a_private_engine(version: str, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TEST)
    pytester.runpytest_subprocess("-p", "no:cacheprovider", "--docker-engine", version).assert_outcomes(passed=1)
