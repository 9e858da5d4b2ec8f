"""The log: lines for people, or JSON objects for machines; one a request if asked. No payloads."""

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
FACTS = "facts"
"""Attribute of a log record that carries structured fields."""

requests = logging.getLogger("ladderstitch.requests")

Fact = str | int | float | bool


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request: who, how it ended, when (nanoseconds since 1970), and what it cost."""

    method: str
    request_id: str
    model: str
    code: str
    started_ns: int
    ended_ns: int
    metadata: Mapping[str, str] = field(repr=False)
    facts: Mapping[str, Fact]


RecordSink = Callable[[RequestRecord], None]


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, the record's facts, a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, FACTS, {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(log_format: LogFormat) -> None:
    """Send this package's log to standard error in a format."""
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else plain)
    package = logging.getLogger("ladderstitch")
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(logging.INFO)


def log_request(record: RequestRecord) -> None:
    """A sink of `RequestLogInterceptor`."""
    milliseconds = (record.ended_ns - record.started_ns) / 1e6
    facts = {
        "request_id": record.request_id,
        "method": record.method,
        "model": record.model,
        "code": record.code,
        "duration_ms": round(milliseconds, 3),
        **record.facts,
    }
    told = " ".join(f"{name}={fact}" for name, fact in record.facts.items())
    requests.info(
        "%s %s %s %s in %.2f ms %s",
        record.request_id,
        record.method,
        record.model or "-",
        record.code,
        milliseconds,
        told,
        extra={FACTS: facts},
    )


def trace_sink(endpoint: str, replica: str) -> tuple[RecordSink, Callable[[], None]]:
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
