"""A span for each call: in this process, and in a plugin that is served."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from netplugin_sdk import DriverError, Plugin
from netplugin_sdk.core.calls import Call
from netplugin_sdk.serving.tracing import trace_calls

from .lab import ENDPOINT, NETWORK, Docker, Recorder, create_endpoint, create_network
from .serving import Echo, connect_unix, process

# A driver that traces: what opentelemetry-instrument does with a real exporter.
CONFIGURED = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
provider = TracerProvider()
one_a_line = lambda span: span.to_json(indent=None) + "\\n"
provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(out=open(SPANS, "w"), formatter=one_a_line)))
trace.set_tracer_provider(provider)
"""


class Traced:
    def __init__(self, plugin: Plugin, driver: Recorder, exporter: InMemorySpanExporter) -> None:
        self.plugin, self.driver, self._exporter = plugin, driver, exporter
        self.docker = Docker(plugin)

    def spans(self) -> Sequence[ReadableSpan]:
        """Those that have ended, in this order."""
        return self._exporter.get_finished_spans()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traced]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)  # it can be set only once in a process
    with Plugin(driver := Recorder()) as plugin:
        trace_calls(plugin)
        yield Traced(plugin, driver, exporter)


def test_a_call_is_a_span(traced: Traced) -> None:
    traced.docker("CreateNetwork", create_network())
    traced.docker("CreateEndpoint", create_endpoint())
    _, span = traced.spans()
    assert (span.name, span.kind) == ("NetworkDriver.CreateEndpoint", trace.SpanKind.SERVER)
    assert span.attributes == {
        "http.response.status_code": 200,
        "netplugin.network": NETWORK[:12],
        "netplugin.endpoint": ENDPOINT[:12],
    }
    assert span.status.status_code is trace.StatusCode.UNSET
    assert span.parent is None


def test_what_the_driver_traces_is_a_child(traced: Traced) -> None:
    tracer = trace.get_tracer_provider().get_tracer("driver")

    def make(_network: object) -> None:
        with tracer.start_as_current_span("make a tunnel"):
            pass

    traced.driver.hooks["create_network"] = make
    traced.docker("CreateNetwork", create_network())
    inner, outer = traced.spans()
    assert (inner.name, outer.name) == ("make a tunnel", "NetworkDriver.CreateNetwork")
    assert inner.parent is not None
    assert inner.parent.span_id == outer.context.span_id


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [(DriverError("no bridge\n today"), 500, "no bridge today"), (KeyError("oh"), 500, "KeyError: 'oh'")],
)
def test_an_error_is_what_docker_prints(traced: Traced, error: Exception, status: int, text: str) -> None:
    traced.driver.fails["create_network"] = error
    traced.docker.refused("CreateNetwork", create_network())
    (span,) = traced.spans()
    assert (span.status.status_code, span.status.description) == (trace.StatusCode.ERROR, text)
    assert span.attributes is not None
    assert span.attributes["http.response.status_code"] == status


def test_a_request_that_makes_no_sense_is_a_span_too(traced: Traced) -> None:
    traced.docker.refused("CreateNetwork", {"NetworkID": 7})
    (span,) = traced.spans()
    assert span.name == "NetworkDriver.CreateNetwork"
    assert span.status.status_code is trace.StatusCode.ERROR


def test_names_from_outside_are_no_names_of_spans(traced: Traced) -> None:
    traced.plugin.handle("/made/up", b"{}")
    (span,) = traced.spans()
    assert (span.name, dict(span.attributes or {})) == ("unknown", {"http.response.status_code": 404})
    assert span.status.status_code is trace.StatusCode.UNSET, "engines ask for what is optional"


def test_a_call_that_was_given_up_is_what_the_engine_was_told(traced: Traced) -> None:
    call = Call()
    assert call.expire()
    traced.plugin.handle("/NetworkDriver.GetCapabilities", b"", call)
    (span,) = traced.spans()
    assert dict(span.attributes or {}) == {"http.response.status_code": 503}
    assert span.status.status_code is trace.StatusCode.ERROR


def test_nothing_is_traced_where_nobody_has_configured_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped: list[Any] = []
    monkeypatch.setattr(Plugin, "wrap", lambda _plugin, wrapper: wrapped.append(wrapper))
    with Plugin(Echo()) as plugin:
        trace_calls(plugin)
        monkeypatch.delitem(sys.modules, "opentelemetry.trace")
        trace_calls(plugin)
        assert "opentelemetry.trace" not in sys.modules, "it is not imported either"
    assert wrapped == []


def test_a_served_plugin_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(CONFIGURED.replace("SPANS", repr(str(tmp_path / "spans"))))
    with process(tmp_path, environment={"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}) as plugin:
        plugin.wait_serving(tmp_path / "s.sock")
        with connect_unix(tmp_path / "s.sock") as client:
            client.echo(n="1")
        plugin.signal(signal.SIGTERM)
        assert plugin.wait() == 0
    (span,) = map(json.loads, (tmp_path / "spans").read_text().splitlines())
    assert span["name"] == "NetworkDriver.AllocateNetwork"
    assert span["attributes"]["http.response.status_code"] == 200
