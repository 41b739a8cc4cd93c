"""A pytest plugin: a driver under test with real sandboxes, in a second and without Docker.

    def test_neighbours(lab):
        one, two = lab.containers(MyDriver(), "one", "two")
        one.run("ping", "-c1", "two")

pytest finds it where netplugin_sdk is installed. Its fixtures are `lab`, and `docker_engine` for a real one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # every run of pytest loads this module: it imports little
    from netplugin_sdk import IpamDriver, NetworkDriver, Plugin, Timings
    from netplugin_sdk.cnm import Network, NetworkController, Sandbox
    from netplugin_sdk.linux.namespaces import Namespace
    from netplugin_sdk.testing.conformance import Report
    from netplugin_sdk.testing.engine import PrivateEngine

HOST, OUTSIDE = "198.51.100.1/24", "198.51.100.2/24"
HOST_IPV6, OUTSIDE_IPV6 = "2001:db8:51::1/64", "2001:db8:51::2/64"


class Lab:
    """A host of the test's own: a network namespace with a controller, and drivers in it. All ends with the test.

    The test runs in the namespace, and so do programs that it starts. `folder` is for files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._closing = ExitStack()
        self._plugins: dict[str, Plugin] = {}
        self._controller: NetworkController | None = None
        self._outside: Namespace | None = None

    def close(self) -> None:
        """Delete what was made, and end the plugins."""
        with self._closing:
            if self._controller is not None:
                with self._controller as controller:
                    controller.cleanup()

    @property
    def controller(self) -> NetworkController:
        """Docker's side, with the drivers of the lab by their names, and with installed plugins."""
        from netplugin_sdk.cnm import NetworkController  # noqa: PLC0415

        if self._controller is None:
            self._controller = NetworkController(self._plugins, folder=self.folder / "controller")
        return self._controller

    def plugin(
        self, *drivers: NetworkDriver[Any] | IpamDriver, name: str = "driver", timings: Timings | None = None
    ) -> Plugin:
        """A plugin in this process, with its state on disk, that the controller knows by this name."""
        from netplugin_sdk import Plugin  # noqa: PLC0415

        plugin = self._closing.enter_context(Plugin(*drivers, state=self.folder / name, timings=timings))
        self._plugins[name] = plugin
        if self._controller is not None:
            self._controller.registry.add(name, plugin)
        return plugin

    def network(self, driver: NetworkDriver[Any], name: str = "lan", **arguments: Any) -> Network:
        """A network of a driver; arguments are those of `NetworkController.create_network`."""
        self.plugin(driver, name=name)
        return self.controller.create_network(name, name, **arguments)

    def containers(self, driver: NetworkDriver[Any], *names: str, **arguments: Any) -> list[Sandbox]:
        """Sandboxes on a new network of a driver; arguments are those of the network."""
        network = self.network(driver, **arguments)
        sandboxes = [self.controller.create_sandbox(name) for name in names]
        for sandbox in sandboxes:
            sandbox.connect(network)
        return sandboxes

    def served(self, plugin: Plugin) -> AbstractContextManager[Path]:
        """A plugin on a unix socket, served by a thread: for what asks it as an engine does."""
        return serving(plugin, self.folder / f"{len(list(self.folder.glob('*.sock')))}.sock")

    def conformance(self, *drivers: NetworkDriver[Any] | IpamDriver, **subject: Any) -> Report:
        """All checks of `netplugin_sdk.testing.conformance`; `subject` are further arguments of `Subject`."""
        from netplugin_sdk.testing.conformance import Subject, run  # noqa: PLC0415

        with self.served(self.plugin(*drivers, name="conformance")) as path:
            return run(Subject(f"unix://{path}", **subject))

    @property
    def outside(self) -> Namespace:
        """A further host, joined to the lab's by a link, that knows no container network: it sees what is masqueraded.

        The lab's host is 198.51.100.1 and 2001:db8:51::1 for it, and it is the .2 of both.
        """
        from ipaddress import ip_interface  # noqa: PLC0415

        from netplugin_sdk.linux import links  # noqa: PLC0415
        from netplugin_sdk.linux.namespaces import Namespace  # noqa: PLC0415

        if self._outside is None:
            self._outside = Namespace.create(self.folder / "outside")
            self._closing.callback(self._outside.remove)
            links.ensure_veth("uplink", "far")
            for address in (HOST, HOST_IPV6):
                nodad = ["nodad"] if ":" in address else []
                subprocess.run(["ip", "address", "add", address, "dev", "uplink", *nodad], check=True)
            self._outside.take("far", "eth0", map(ip_interface, (OUTSIDE, OUTSIDE_IPV6)))
        return self._outside


@contextmanager
def serving(plugin: Plugin, path: Path) -> Iterator[Path]:
    """A plugin on this unix socket, served by a thread."""
    from netplugin_sdk import Server  # noqa: PLC0415

    with Server(plugin) as server:
        server.listen_unix(path)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield path
        finally:
            server.stop()
            thread.join()


@contextmanager
def own_namespace() -> Iterator[None]:
    """A new network namespace around this thread, with the loopback up. Where it cannot be had, the test is skipped."""
    from netplugin_sdk.linux import links, namespaces  # noqa: PLC0415

    if missing := [tool for tool in ("ip", "nsenter", "unshare") if not shutil.which(tool)]:
        pytest.skip(f"not installed: {', '.join(missing)} (packages iproute2, util-linux)")
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    links.close()
    try:
        namespaces.unshare()
    except OSError as error:
        os.close(home)
        pytest.skip(f"cannot make a network namespace (CAP_SYS_ADMIN is missing): {error.strerror}")
    try:
        namespaces.up("lo")
        yield
    finally:
        links.close()
        namespaces.enter(f"/proc/self/fd/{home}")
        os.close(home)


@pytest.fixture
def any_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interfaces that `join` names count as there: for tests of a driver without a kernel."""
    from netplugin_sdk.core import answers  # noqa: PLC0415

    monkeypatch.setattr(answers, "interface_exists", lambda _name: True)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A host of the test's own. It needs root; without, the test is skipped."""
    from netplugin_sdk.linux import firewall, ports  # noqa: PLC0415

    with own_namespace():
        try:
            with closing(Lab(tmp_path)) as made:
                yield made
        finally:
            ports.close()
            firewall.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which engines `docker_engine` gives."""
    parser.addoption(
        "--docker-engine",
        action="append",
        metavar="VERSION",
        help="version of the private Docker Engine for the fixture docker_engine; may be repeated (default: 26.1)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Once for each engine."""
    if "docker_engine" in metafunc.fixturenames:
        versions = metafunc.config.getoption("--docker-engine") or ["26.1"]
        metafunc.parametrize("docker_engine", versions, indirect=True, scope="session")


def running_engine(version: str) -> Iterator[PrivateEngine]:
    """A real Docker Engine, for a fixture. Where it cannot be had, the test is skipped."""
    from netplugin_sdk.testing.engine import EngineUnavailable, PrivateEngine  # noqa: PLC0415

    try:
        engine = PrivateEngine(version)
    except EngineUnavailable as error:
        pytest.skip(str(error))
    with engine:
        yield engine


@pytest.fixture(scope="session")
def docker_engine(request: pytest.FixtureRequest) -> Iterator[PrivateEngine]:
    """A real Docker Engine in namespaces of its own, for all tests; start a plugin beside it with `start_plugin`."""
    yield from running_engine(request.param)
