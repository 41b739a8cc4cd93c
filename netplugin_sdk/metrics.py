"""Prometheus metrics of a plugin, by prometheus-client (the extra ``netplugin-sdk[metrics]``).

=====================================  =========  =================================================================
``netplugin_calls_total``              counter    calls that were answered, by ``method`` and HTTP ``status``
``netplugin_call_errors_total``        counter    those of them that Docker reports as errors, by ``method``
``netplugin_call_duration_seconds``    histogram  from the request to its answer, by ``method``
``netplugin_calls_in_progress``        gauge      calls that are being answered
``netplugin_networks``                 gauge      networks that the plugin has
``netplugin_endpoints``                gauge      endpoints of them
``netplugin_published_ports``          gauge      port mappings that the engine has had published
``netplugin_repairs_total``            counter    what nobody called for, by ``kind`` (`netplugin_sdk.lifecycle.Repair`)
``netplugin_build_info``               gauge      1; ``plugin`` is its name, ``version`` the SDK's
=====================================  =========  =================================================================

Methods that the plugin does not have are all ``unknown``. What else the process has registered with prometheus-client
is shown too: a driver's own metrics need no more than to be made, and the process's memory and descriptors are there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from netplugin_sdk import calls
from netplugin_sdk.errors import Unavailable
from netplugin_sdk.plugin import Answer, Answerer, Plugin

_SECONDS = tuple(digit * 10.0**power for power in range(-4, 2) for digit in (1.0, 2.5, 5.0))[:-1]  # 0.1 ms to 25 s


@contextmanager
def exporting(plugin: Plugin, name: str, host: str, port: int) -> Iterator[None]:
    """Measure a plugin, and serve the figures as text at ``http://HOST:PORT/metrics``.

    Raises:
        Unavailable: it cannot listen there.
    """
    metrics = _Metrics(plugin, name)
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except OSError as error:
        raise Unavailable(f"cannot serve metrics on {host} port {port}: {error}") from error
    plugin.wrap(metrics.measured)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Metrics:
    """Counts calls, and collects at each scrape what the plugin knows anyway."""

    def __init__(self, plugin: Plugin, name: str) -> None:
        self.registry = CollectorRegistry()  # its own, since a process may have several plugins
        self._plugin, self._name = plugin, name
        self._methods = plugin.methods
        self._running: set[int] = set()  # threads; cheaper than a gauge
        self._calls = Counter("netplugin_calls", "Calls.", ["method", "status"], registry=self.registry)
        self._errors = Counter("netplugin_call_errors", "Calls that failed.", ["method"], registry=self.registry)
        durations = Histogram(
            "netplugin_call_duration_seconds", "Calls.", ["method"], registry=self.registry, buckets=_SECONDS
        )
        for method in self._methods:
            self._errors.labels(method)  # 0 from the start, so that the first error is an increase
        self._durations = {method: durations.labels(method) for method in self._methods}
        self._answered: dict[tuple[str, int], Counter] = {}
        self.registry.register(self)
        self.registry.register(REGISTRY)

    def measured(self, answer: Answerer) -> Answerer:
        """For `Plugin.wrap`."""
        running, durations, answered = self._running, self._durations, self._answered

        def measure(path: str, body: bytes) -> Answer:
            thread = threading.get_ident()
            running.add(thread)
            try:
                given = answer(path, body)
            finally:
                running.discard(thread)
            method = path[1:] if path[1:] in durations else "unknown"
            status = 503 if calls.is_given_up() else given.status
            counter = answered.get((method, status))
            if counter is None:
                counter = answered[method, status] = self._calls.labels(method, status)
            counter.inc()
            if given.error is not None or status == 503:
                self._errors.labels(method).inc()
            if method in durations:
                durations[method].observe(given.call["ms"] / 1000)
            return given

        return measure

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        networks = tuple(self._plugin.networks.values())
        endpoints = [endpoint for network in networks for endpoint in tuple(network.endpoints.values())]
        published = sum(len(external.port_map) for endpoint in endpoints if (external := endpoint.external))
        yield GaugeMetricFamily("netplugin_calls_in_progress", "Calls being answered.", len(self._running))
        yield GaugeMetricFamily("netplugin_networks", "Networks.", len(networks))
        yield GaugeMetricFamily("netplugin_endpoints", "Endpoints.", len(endpoints))
        yield GaugeMetricFamily("netplugin_published_ports", "Port mappings that are published.", published)
        repairs = CounterMetricFamily("netplugin_repairs", "What was done unasked.", labels=["kind"])
        for kind, count in self._plugin.repairs.items():
            repairs.add_metric([kind], count)
        yield repairs
        info = GaugeMetricFamily("netplugin_build_info", "Always 1.", labels=["plugin", "version"])
        info.add_metric([self._name, version("netplugin-sdk")], 1)
        yield info
