"""One OpenTelemetry span a request, a child of the caller's, sent by OTLP over gRPC."""

from __future__ import annotations

from collections.abc import Callable

import ladderstitch
from ladderstitch.errors import ConfigError
from ladderstitch.telemetry.logs import RequestRecord, Sink


def trace_sink(endpoint: str, replica: str) -> tuple[Sink, Callable[[], None]]:
    """Where to put records, and a function that sends what is left and stops.

    Raises `ConfigError` without the extra `telemetry`.
    """
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError as error:
        raise ConfigError(
            f"otlp_endpoint: traces need `pip install 'ladderstitch[telemetry]'` ({error})"
        ) from error

    resource = Resource.create({"service.name": "ladderstitch", "service.instance.id": replica})
    provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https"))
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
    tracer = provider.get_tracer("ladderstitch", ladderstitch.__version__)
    propagator = TraceContextTextMapPropagator()

    def sink(record: RequestRecord) -> None:
        span = tracer.start_span(
            record.method,
            context=propagator.extract(dict(record.metadata)),
            kind=SpanKind.SERVER,
            start_time=record.started_ns,
            attributes={
                "rpc.system": "grpc",
                "rpc.method": record.method,
                "ladderstitch.request_id": record.request_id,
                "ladderstitch.model": record.model,
                "ladderstitch.code": record.code,
                **{f"ladderstitch.{name}": fact for name, fact in record.facts.items()},
            },
        )
        if record.code != "OK":
            span.set_status(Status(StatusCode.ERROR, record.code))
        span.end(record.ended_ns)

    return sink, provider.shutdown
