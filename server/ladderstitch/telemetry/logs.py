"""Records of finished requests and their sinks: the log, and traces through OpenTelemetry.

The log has text lines for people or JSON objects for machines. Records hold what a request cost,
never its payload.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

import ladderstitch
from ladderstitch.errors import ConfigError

LogFormat = Literal["text", "json"]
FIELDS = "fields"
"""Attribute of a log record that carries structured fields."""

requests = logging.getLogger("ladderstitch.requests")

FieldValue = str | int | float | bool


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One finished request: its identity, its status, its duration and its cost."""

    method: str
    request_id: str
    model: str
    code: str
    """Name of the gRPC status."""
    started_ns: int
    """Nanoseconds since 1970, as `ended_ns`."""
    ended_ns: int
    metadata: Mapping[str, str] = field(repr=False)
    fields: Mapping[str, FieldValue]
    """Accounting of the answer; empty if there is none."""


RecordSink = Callable[[RequestRecord], None]


class JsonFormatter(logging.Formatter):
    """A formatter that writes one JSON object per log record.

    An object has the time, the level, the logger, the message, the fields of the record, and the
    traceback if there is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, FIELDS, {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(log_format: LogFormat) -> None:
    """Write the log of this package to standard error, from level INFO on."""
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else plain)
    package = logging.getLogger("ladderstitch")
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(logging.INFO)


def log_request(record: RequestRecord) -> None:
    """Log a finished request; a `RecordSink`."""
    fields = {
        "request_id": record.request_id,
        "method": record.method,
        "model": record.model,
        "code": record.code,
        "duration_ms": round((record.ended_ns - record.started_ns) / 1e6, 3),
        **record.fields,
    }
    listed = " ".join(f"{name}={value}" for name, value in fields.items())
    requests.info("request %s", listed, extra={FIELDS: fields})


def trace_sink(endpoint: str, replica: str) -> tuple[RecordSink, Callable[[], None]]:
    """Return a sink that exports spans to `endpoint`, and a function that flushes and stops it.

    Raises `ConfigError` if the extra `telemetry` is not installed.
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
                **{f"ladderstitch.{name}": value for name, value in record.fields.items()},
            },
        )
        if record.code != "OK":
            span.set_status(Status(StatusCode.ERROR, record.code))
        span.end(record.ended_ns)

    return sink, provider.shutdown
