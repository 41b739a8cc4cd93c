"""OpenTelemetry: a span for each call, where the process has a tracer provider.

The driver's method runs within the span, so that spans of its own, and of libraries that it uses, are children of it.
A span is called as its method, ``NetworkDriver.Join``, and has the attributes ``http.response.status_code`` and, where
they are known, ``netplugin.network`` and ``netplugin.endpoint``: the ids, as short as in the log. A refused call
has the status ERROR and the line that Docker prints.
"""

from __future__ import annotations

import sys

from netplugin_sdk.core.plugin import Answer, Answerer, Plugin


def trace_calls(plugin: Plugin) -> None:
    """Make each call of the plugin a span, if this process has configured a tracer provider; `serve` does so itself.

    A process that has configured one has imported OpenTelemetry. So nothing more is imported here.
    """
    if "opentelemetry.trace" not in sys.modules:
        return
    from opentelemetry import trace  # noqa: PLC0415

    if isinstance(provider := trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return  # nobody has
    tracer, methods = provider.get_tracer("netplugin_sdk"), plugin.methods

    def traced(answer: Answerer) -> Answerer:
        def answer_in_span(path: str, body: bytes) -> Answer:
            method = path[1:]
            name = method if method in methods else "unknown"
            with tracer.start_as_current_span(name, kind=trace.SpanKind.SERVER) as span:
                answered = answer(path, body)
                span.set_attribute("http.response.status_code", answered.status)
                for part in ("network", "endpoint"):
                    if part in answered.call:
                        span.set_attribute(f"netplugin.{part}", answered.call[part])
                if answered.error is not None:
                    span.set_status(trace.StatusCode.ERROR, answered.error)
                return answered

        return answer_in_span

    plugin.wrap(traced)
