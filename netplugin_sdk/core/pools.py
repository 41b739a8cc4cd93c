"""Requests of the IPAM driver; and reports of an engine's pools, for a driver that wants them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from netplugin_sdk.core import answers, calls
from netplugin_sdk.core.engine_api import Docker
from netplugin_sdk.core.lifecycle import Routes
from netplugin_sdk.core.timings import Timings
from netplugin_sdk.core.workers import EngineQueries, Locks
from netplugin_sdk.driver import IpamDriver
from netplugin_sdk.errors import Unavailable
from netplugin_sdk.protocol import messages
from netplugin_sdk.values import IPNetwork

_log = logging.getLogger("netplugin_sdk")

_DONE = b"{}"


class UsageReport:
    """Tells an IPAM driver which pools and addresses an engine has. With `docker` None it asks nobody."""

    def __init__(self, driver: IpamDriver, docker: Path | None, timings: Timings) -> None:
        self._driver = driver
        self._timings = timings
        self._queries = None if docker is None else EngineQueries(docker, timings)

    def ask(self, delay: float = 0.0) -> None:
        """Ask the engine in `delay` seconds, and again every few minutes."""
        if self._queries is not None:
            self._queries.ask(self._tell, delay, recurring=True)

    def ask_soon(self) -> None:
        """Ask the engine once it has had time to finish its own work."""
        self.ask(self._timings.engine_grace)

    def close(self) -> None:
        """Ask nothing more."""
        if self._queries is not None:
            self._queries.close()

    def _tell(self, docker: Docker) -> bool:
        engine = docker.call("GET", "/info")["ID"]
        soon = answers.yes_or_no("engine_has", self._driver.engine_has(engine, docker.pools()))
        self.ask(self._timings.missing_grace if soon else self._timings.compare_every)
        return True


class IpamLifecycle:
    """Serves the ``IpamDriver`` methods with a driver."""

    def __init__(self, driver: IpamDriver, locks: Locks, report: UsageReport) -> None:
        self._driver = driver
        self._locks = locks
        self._report = report
        self._pools: dict[str, IPNetwork] = {}
        """The pools that were given out in this life of the plugin, by their ids."""

    def routes(self) -> Routes:
        """All methods."""
        m = messages
        return {
            "GetCapabilities": (m.Nothing, self._get_capabilities),
            "GetDefaultAddressSpaces": (m.Nothing, self._get_default_address_spaces),
            "RequestPool": (m.PoolRequest, self._request_pool),
            "ReleasePool": (m.PoolRef, self._release_pool),
            "RequestAddress": (m.AddressRequest, self._request_address),
            "ReleaseAddress": (m.AddressRef, self._release_address),
        }

    def _get_capabilities(self, _request: messages.Nothing, _body: bytes) -> bytes:
        self._driver.engine_starts()
        self._report.ask_soon()
        return messages.encode(
            {
                "RequiresMACAddress": self._driver.requires_mac_address,
                "RequiresRequestReplay": self._driver.requires_request_replay,
            }
        )

    def _get_default_address_spaces(self, _request: messages.Nothing, _body: bytes) -> bytes:
        return messages.encode(
            {
                "LocalDefaultAddressSpace": self._driver.local_address_space,
                "GlobalDefaultAddressSpace": self._driver.global_address_space,
            }
        )

    def _request_pool(self, request: messages.PoolRequest, _body: bytes) -> bytes:
        self._report.ask_soon()
        with self._locks.hold(""):  # the pool has no id yet
            calls.refuse_if_late()  # it has waited
            pool = answers.request_pool(self._driver.request_pool(request))
            self._commit(lambda: self._driver.release_pool(pool.pool_id))
            self._pools[pool.pool_id] = pool.pool
            return messages.encode(pool)

    def _release_pool(self, request: messages.PoolRef, _body: bytes) -> bytes:
        with self._locks.hold(request.pool_id), self._locks.hold(""):
            self._driver.release_pool(request.pool_id)
            self._pools.pop(request.pool_id, None)
            return _DONE

    def _request_address(self, request: messages.AddressRequest, _body: bytes) -> bytes:
        with self._locks.hold(request.pool_id):
            calls.refuse_if_late()  # it has waited
            given = self._driver.request_address(request)
            address = answers.request_address(given, pool=self._pools.get(request.pool_id))
            self._commit(lambda: self._driver.release_address(messages.AddressRef(request.pool_id, address.ip)))
            return messages.encode({"Address": address, "Data": {}})

    def _release_address(self, request: messages.AddressRef, _body: bytes) -> bytes:
        with self._locks.hold(request.pool_id):
            self._driver.release_address(request)
            return _DONE

    @staticmethod
    def _commit(undo: Callable[[], None]) -> None:
        """Take back a pool or an address that was given too late. Raises `Unavailable` then."""
        try:
            calls.commit()
        except Unavailable:
            try:
                undo()
            except BaseException:
                _log.exception("cannot take back a pool or an address that was given too late")
            raise


class Pools:
    """The IPAM half of a plugin: a driver with its requests."""

    def __init__(
        self,
        driver: IpamDriver,
        defined: frozenset[str],
        folder: Path | None,
        docker: Path | None,
        timings: Timings,
    ) -> None:
        self._driver = driver
        self._folder = folder
        self._is_open = False
        self._report = UsageReport(driver, docker if "engine_has" in defined else None, timings)
        self.routes: Routes = IpamLifecycle(driver, Locks(timings.call_lock), self._report).routes()
        """The methods that can be called, by name."""

    def start(self) -> None:
        """Before the first call: open the driver."""
        self._driver.open(self._folder)
        self._is_open = True
        self._report.ask()

    def reconcile(self) -> None:
        """Tell the driver about the engine's pools."""
        self._report.ask()

    def ask_soon(self) -> None:
        """The same, soon: a request was lost."""
        self._report.ask_soon()

    def close(self) -> None:
        """After the last call: end the background work, and close the driver."""
        self._report.close()
        if self._is_open:
            self._driver.close()
