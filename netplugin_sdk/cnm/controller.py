"""Docker's side of the contract: networks, endpoints and sandboxes, as libnetwork has them.

    controller ── registry ── drivers (in process, or over sockets)
        ├── networks ── endpoints ──┐
        └── sandboxes ──────────────┘ join, leave

The order of the calls, the rollbacks and the texts of errors are libnetwork's (moby ``daemon/libnetwork``,
``controller.go``).
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from netplugin_sdk.cnm import remote
from netplugin_sdk.cnm.drivers import BUILT_IN, installed
from netplugin_sdk.cnm.endpoint import Endpoint
from netplugin_sdk.cnm.network import Network
from netplugin_sdk.cnm.records import ENGINES, MIGRATIONS, NO_ADDRESSES, SPECIAL, Engine, Host, Subnet
from netplugin_sdk.cnm.registry import Driver, InProcess, Registry
from netplugin_sdk.cnm.remote import RemotePlugin
from netplugin_sdk.cnm.sandbox import Sandbox
from netplugin_sdk.core.plugin import Plugin
from netplugin_sdk.database import Database, Folder
from netplugin_sdk.driver import IpamDriver, NetworkDriver
from netplugin_sdk.errors import Conflict
from netplugin_sdk.ipam import PoolIpamDriver
from netplugin_sdk.linux import links
from netplugin_sdk.protocol.messages import Port, PortMapping

_log = logging.getLogger("netplugin_sdk")


def _remote(name: str) -> Driver:
    return RemotePlugin(remote.find(name))


class NetworkController:
    """Networks and sandboxes of a host, with drivers by their names. A context manager, which cleans up.

    Args:
        drivers: plugins in this process, by the names that networks use; each may serve networks, addresses or both.
            Beside them there are ``null``, ``host``, ``macvlan``, ``ipvlan`` and ``overlay`` (on one host), those of
            packages that are installed (entry points ``netplugin_sdk.drivers``), and the IPAM driver ``default``, a
            `PoolIpamDriver`.
        find: finds every other driver by its name; by default as an engine finds plugins.
        engine: the version to speak like.
        folder: for its state, and the files of sandboxes. A controller that is made with it again, by
            this process or another, goes on where the last one ended, and asks drivers what an engine asks after its
            start. None makes a folder, and with the controller's end everything is deleted.

    Raises `Conflict` if another process holds the folder, `NotFound` if a driver of a network is not there any more.
    """

    def __init__(
        self,
        drivers: Mapping[str, Plugin] = {},
        *,
        find: Callable[[str], Driver] = _remote,
        engine: str = "28.5",
        folder: Path | None = None,
    ) -> None:
        self._closing = ExitStack()
        self._passing = folder is None
        self.folder = folder or Path(self._closing.enter_context(tempfile.TemporaryDirectory(prefix="cnm-")))
        self.registry = Registry(drivers, lambda name: self._in_process(name) or find(name))
        self.networks: dict[str, Network] = {}
        """By name."""
        self.sandboxes: dict[str, Sandbox] = {}
        """By name."""
        self._lock = threading.Lock()
        try:
            held = Folder(self.folder)
            self._closing.callback(held.close)
            database = Database(self.folder / "cnm.db", MIGRATIONS)
            self._closing.callback(database.close)
            self._host = Host(ENGINES[engine], self.folder, self.registry, database)
            self._restore()
        except BaseException:
            self._closing.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End. Sandboxes and networks stay, if there is a folder that remembers them; else they are deleted."""
        with self._closing:
            if self._passing:
                self.cleanup()

    def cleanup(self) -> None:
        """Delete all sandboxes and networks."""
        for sandbox in tuple(self.sandboxes.values()):
            sandbox.delete()
        for network in tuple(self.networks.values()):
            network.delete()

    def _in_process(self, name: str) -> Driver | None:
        """A driver of the controller's own, or of a package that is installed, with a memory in its folder."""
        driver: NetworkDriver[Any] | IpamDriver | None
        if name in BUILT_IN:
            driver = BUILT_IN[name]()
        elif name == "default":
            driver = _default_ipam()
        else:
            driver = installed(name)
        if driver is None:
            return None
        return InProcess(self._closing.enter_context(Plugin(driver, state=self.folder / "drivers" / name)))

    # ------------------------------------------------------------------------------------------------- the disk

    @property
    def engine(self) -> Engine:
        """The engine that it speaks like."""
        return self._host.engine

    def _network_deleted(self, network: Network) -> None:
        with self._lock:
            self.networks.pop(network.name, None)

    def _sandbox_deleted(self, sandbox: Sandbox) -> None:
        with self._lock:
            self.sandboxes.pop(sandbox.name, None)

    def _restore(self) -> None:
        """Read what was there, and do what an engine does when it starts."""
        rows: dict[str, dict[str, bytes]] = {"Network": {}, "Sandbox": {}, "Endpoint": {}}
        for id_, kind, data in self._host.database.read("SELECT * FROM records"):
            rows[kind][id_] = data
        host = self._host
        networks = {
            id_: Network.restored(host, id_, data, self._network_deleted) for id_, data in rows["Network"].items()
        }
        sandboxes = {
            id_: Sandbox.restored(host, id_, data, self._sandbox_deleted) for id_, data in rows["Sandbox"].items()
        }
        self.networks = {network.name: network for network in networks.values()}
        self.sandboxes = {box.name: box for box in sandboxes.values() if box.namespace.exists}
        for id_, data in rows["Endpoint"].items():
            endpoint = Endpoint.restored(id_, data, networks, sandboxes)
            endpoint.network.endpoints[endpoint.name] = endpoint
        for network in networks.values():
            network.replay()
        for network in networks.values():
            for endpoint in tuple(network.endpoints.values()):
                if endpoint.sandbox is None or not endpoint.sandbox.namespace.exists:  # as after a reboot
                    _log.info("removing stale endpoint %s (%s)", endpoint.name, endpoint.id)
                    endpoint.sandbox = None
                    endpoint.delete()
        for box in sandboxes.values():
            if not box.namespace.exists:
                box.key.unlink(missing_ok=True)
                self._host.forget(box)

    def create_network(
        self,
        name: str,
        driver: str,
        *,
        ipam: str = "default",
        ipam_options: Mapping[str, str] = {},
        subnets: Sequence[Subnet] = (),
        ipv6: bool = False,
        internal: bool = False,
        options: Mapping[str, str] = {},
    ) -> Network:
        """``docker network create``. `options` are ``-o``, `ipam_options` ``--ipam-opt``.

        Raises:
            Conflict: there is one of this name.
            NotFound: there is no such driver.
            RemoteError: a driver refused; nothing is left of it.
        """
        with self._lock:
            if name in self.networks:
                raise Conflict(f"network with name {name} already exists")
            if driver in SPECIAL and any(network.driver.name == driver for network in self.networks.values()):
                raise Conflict(f'only one instance of "{driver}" network is allowed')
        if driver in SPECIAL:
            ipam = NO_ADDRESSES
        network = Network(
            self._host,
            name,
            driver,
            ipam,
            ipv6=ipv6,
            internal=internal,
            options=options,
            deleted=self._network_deleted,
        )
        network.create(subnets, ipam_options)
        with self._lock:
            made_meanwhile = name in self.networks
            self.networks.setdefault(name, network)
        if made_meanwhile:
            network.undo()
            raise Conflict(f"network with name {name} already exists")
        self._host.save(network)
        return network

    def create_sandbox(
        self, name: str, *, ports: Sequence[PortMapping] = (), exposed: Sequence[Port] = (), host: bool = False
    ) -> Sandbox:
        """A network namespace, as a container has. `ports` are ``-p``, `exposed` is ``--expose``.

        With `host` it is the calling thread's own, as with ``docker run --network host``.

        Raises `Conflict` if there is one of this name.
        """
        with self._lock:
            if name in self.sandboxes:
                raise Conflict(f"sandbox with name {name} already exists")
            sandbox = self.sandboxes[name] = Sandbox(self._host, name, deleted=self._sandbox_deleted)
        try:
            sandbox.create(ports, exposed, host)
            self._host.save(sandbox)
        except BaseException:
            sandbox.delete()
            raise
        return sandbox


def _default_ipam() -> PoolIpamDriver:
    """Docker's own wants no MAC addresses, so drivers choose them."""
    driver = PoolIpamDriver(occupied=links.occupied)
    driver.requires_mac_address = False
    return driver
