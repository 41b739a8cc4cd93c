"""Prometheus metrics of a plugin, by prometheus-client (the extra ``netplugin-sdk[metrics]``).

=====================================  =========  =================================================================
``netplugin_calls_total``              counter    calls that were answered, by ``method`` and HTTP ``status``
``netplugin_call_errors_total``        counter    those of them that Docker reports as errors, by ``method``
``netplugin_call_duration_seconds``    histogram  from the request to its answer, by ``method``
``netplugin_calls_in_progress``        gauge      calls that are being answered
``netplugin_networks``                 gauge      networks that the plugin has
``netplugin_endpoints``                gauge      endpoints of them
``netplugin_published_ports``          gauge      port mappings that the engine has had published
``netplugin_repairs_total``            counter    work that no call asked for, by ``kind`` (see below)
``netplugin_build_info``               gauge      1; ``plugin`` is its name, ``version`` the SDK's
=====================================  =========  =================================================================

Kinds of repairs: ``reconciled``, all networks were compared with the kernel, as at each start; ``lost``, an interface
or address of ours vanished; ``half_done``, an operation that a crash or a failure left half done was finished or
undone; ``container_gone``, an endpoint was deleted, since its container ended unnoticed; ``unknown_to_docker``, a
network or an endpoint was deleted, since Docker does not know it any more; ``failed``, one of these failed.

Methods that the plugin does not have are all ``unknown``. Everything else that the process has registered with
prometheus-client is shown, too: a driver's own metrics once they are made, and the process's memory and descriptors.
"""

from __future__ import annotations

import logging
import socket
import threading
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import accumulate

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from netplugin_sdk.core.plugin import Answer, Answerer, Plugin
from netplugin_sdk.errors import Unavailable

_log = logging.getLogger("netplugin_sdk")

_SECONDS = tuple(digit * 10.0**power for power in range(-4, 2) for digit in (1.0, 2.5, 5.0))[:-1]  # 0.1 ms to 25 s
_BOUNDS = (*map(str, _SECONDS), "+Inf")


@contextmanager
def exporting(plugin: Plugin, name: str, host: str, port: int) -> Iterator[None]:
    """Measure a plugin, and serve the figures as text at ``http://HOST:PORT/metrics``.

    Raises:
        Unavailable: it cannot listen there.
    """
    metrics, registry = _Metrics(plugin, name), CollectorRegistry()  # its own: a process may have several plugins
    registry.register(metrics)
    registry.register(REGISTRY)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise Unavailable(f"cannot serve metrics on {host} port {port}: {error}") from error
    plugin.wrap(metrics.measured)
    _log.info("metrics at http://%s:%d/metrics", f"[{host}]" if ":" in host else host, server.server_port)
    try:
        yield
    finally:
        stopping = threading.Thread(target=server.shutdown)
        stopping.start()
        server.socket.shutdown(socket.SHUT_RDWR)  # else it looks only every half second whether it is to stop
        stopping.join()
        thread.join()
        server.server_close()


class _Metrics:
    """Counts calls, and collects at each scrape that and what the plugin knows anyway.

    It keeps plain numbers behind one lock: prometheus-client has a lock for each, and takes twice as long.
    """

    def __init__(self, plugin: Plugin, name: str) -> None:
        self._plugin, self._name = plugin, name
        self._running: set[int] = set()  # the threads of the calls that run
        self._lock = threading.Lock()  # of the numbers below, all by method
        self._answered = {(method, 200): 0 for method in plugin.methods}  # and status
        self._failed = dict.fromkeys(plugin.methods, 0)
        self._durations = {method: [0] * (len(_SECONDS) + 1) for method in plugin.methods}
        self._seconds = dict.fromkeys(plugin.methods, 0.0)

    def measured(self, answer: Answerer) -> Answerer:
        """For `Plugin.wrap`."""
        running = self._running

        def measure(path: str, body: bytes) -> Answer:
            thread = threading.get_ident()
            running.add(thread)
            try:
                given = answer(path, body)
            finally:
                running.discard(thread)
            self._count(path[1:], given)
            return given

        return measure

    def _count(self, method: str, given: Answer) -> None:
        status = given.status
        if method not in self._durations:
            method = "unknown"
        with self._lock:
            self._answered[method, status] = self._answered.get((method, status), 0) + 1
            if method == "unknown":
                return
            if status != 200:
                self._failed[method] += 1
            seconds = given.call["ms"] / 1000
            self._durations[method][bisect_left(_SECONDS, seconds)] += 1
            self._seconds[method] += seconds

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        with self._lock:
            answered, failed, seconds = dict(self._answered), dict(self._failed), dict(self._seconds)
            durations = {method: list(accumulate(counts)) for method, counts in self._durations.items()}
        made = CounterMetricFamily("netplugin_calls", "Calls that were answered.", labels=["method", "status"])
        for (method, status), count in answered.items():
            made.add_metric([method, str(status)], count)
        errors = CounterMetricFamily("netplugin_call_errors", "Calls that failed.", labels=["method"])
        for method, count in failed.items():
            errors.add_metric([method], count)
        lasted = HistogramMetricFamily("netplugin_call_duration_seconds", "How long they took.", labels=["method"])
        for method, counts in durations.items():
            if counts[-1]:
                lasted.add_metric([method], list(zip(_BOUNDS, counts, strict=True)), seconds[method])
        networks = tuple(self._plugin.networks.values())
        endpoints = [endpoint for network in networks for endpoint in tuple(network.endpoints.values())]
        published = sum(len(external.port_map) for endpoint in endpoints if (external := endpoint.external))
        repairs = CounterMetricFamily("netplugin_repairs", "What was done unasked.", labels=["kind"])
        for kind, count in self._plugin.repairs.items():
            repairs.add_metric([kind], count)
        info = GaugeMetricFamily("netplugin_build_info", "Always 1.", labels=["plugin", "version"])
        info.add_metric([self._name, version("netplugin-sdk")], 1)
        yield from (
            made,
            errors,
            lasted,
            GaugeMetricFamily("netplugin_calls_in_progress", "Calls that are being answered.", len(self._running)),
            GaugeMetricFamily("netplugin_networks", "Networks.", len(networks)),
            GaugeMetricFamily("netplugin_endpoints", "Endpoints.", len(endpoints)),
            GaugeMetricFamily("netplugin_published_ports", "Port mappings that are published.", published),
            repairs,
            info,
        )
