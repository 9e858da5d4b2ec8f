"""The request log and the traces: their fields, and that they hold no payload."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from ladderstitch.client import AsyncClient, RequestFailed, infer_request
from ladderstitch.config import ServerConfig
from ladderstitch.oip import grpc_service_pb2 as oip
from ladderstitch.oip import grpc_service_pb2_grpc
from ladderstitch.replica.replica import Replica
from ladderstitch.telemetry.logs import JsonFormatter
from ladderstitch.vision.bundle import VisionBundle
from tests.support.language_models import write_tiny
from tests.support.servers import pixels


class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc] # untyped
    """An OpenTelemetry collector that keeps the spans it receives."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()


def attributes(span: Any) -> dict[str, Any]:
    """Return the attributes of a span by name, without the prefix."""
    return {
        pair.key.removeprefix("ladderstitch."): getattr(pair.value, pair.value.WhichOneof("value"))
        for pair in span.attributes
    }


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """Return a function that returns the lines of the JSON log so far."""
    caplog.set_level(logging.INFO, "ladderstitch.requests")
    formatter = JsonFormatter()
    return lambda: [
        json.loads(formatter.format(record))
        for record in caplog.records
        if record.name == "ladderstitch.requests"
    ]


@pytest.fixture
async def replica(tiny_bundle: VisionBundle) -> AsyncIterator[Replica]:
    config = ServerConfig(bundle=tiny_bundle.path, port=0, metrics_port=0, log_requests=True)
    replica = Replica(config)
    await replica.start()
    yield replica
    await replica.stop()


async def test_request_log_has_one_line_per_request(replica: Replica, lines: Any) -> None:
    async with AsyncClient(f"127.0.0.1:{replica.port}") as client:
        request = infer_request(pixels(), budget_s=5.0)
        request.request_id = "mine-1"
        call = client.inference.Infer(request)
        response = await call
        with pytest.raises(RequestFailed):
            await client.predict(b"not a picture, but a secret")
        raw = oip.ModelInferRequest(model_name="tiny", id="mine-2")
        raw.inputs.add(name="images", datatype="UINT8", shape=[1, 1, 8, 8])
        raw.raw_input_contents.append(pixels().tobytes())
        stub: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(client.channel)
        await stub.ModelInfer(raw)
    first, second, third = lines()
    assert dict(await call.initial_metadata())["x-request-id"] == "mine-1"
    assert (first["request_id"], first["code"], first["method"]) == ("mine-1", "OK", "Infer")
    assert first["variant_id"] == response.accounting.variant_id
    assert first["slack_us"] == first["budget_us"] - first["total_us"]
    assert first["budget_met"] is True
    assert second["code"] == "INVALID_ARGUMENT"
    assert len(second["request_id"]) == 32
    assert (third["request_id"], third["method"]) == ("mine-2", "ModelInfer")
    assert third["total_us"] > 0
    assert "secret" not in json.dumps(lines())


async def test_request_log_cleans_ids_that_headers_cannot_hold(
    replica: Replica, lines: Any
) -> None:
    async with AsyncClient(f"127.0.0.1:{replica.port}") as client:
        request = infer_request(pixels())
        request.request_id = "naïve\r\nid"
        assert (await client.inference.Infer(request)).request_id == "naïve\r\nid"
    assert lines()[0]["request_id"] == "naveid"


async def test_request_log_reports_streams_when_they_end(tmp_path: Path, lines: Any) -> None:
    config = ServerConfig(
        bundle=write_tiny(tmp_path / "tiny"), port=0, metrics_port=0, log_requests=True
    )
    replica = Replica(config)
    await replica.start()
    async with AsyncClient(f"127.0.0.1:{replica.port}") as client:
        chunks = [chunk async for chunk in client.generate("my secret prompt", max_tokens=4)]
        stream = client.generate("my secret prompt", max_tokens=100)
        await anext(stream)
        await stream.aclose()
    await replica.stop()
    first, second = lines()
    assert (first["method"], first["code"]) == ("Generate", "OK")
    assert first["generated_tokens"] == len(chunks)
    assert second["code"] == "CANCELLED"
    assert "secret" not in json.dumps(lines())


async def test_trace_has_budget_variant_slack_and_parent(
    tiny_bundle: VisionBundle,
) -> None:
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    config = ServerConfig(
        bundle=tiny_bundle.path, port=0, metrics_port=0, otlp_endpoint=f"http://127.0.0.1:{port}"
    )
    replica = Replica(config, name="replica-7")
    await replica.start()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with AsyncClient(f"127.0.0.1:{replica.port}") as client:
        request = infer_request(pixels(), budget_s=5.0)
        metadata = (("traceparent", parent),)
        response = await client.inference.Infer(request, metadata=metadata)
        with pytest.raises(RequestFailed):
            await client.predict(b"broken")
    await replica.stop()
    await asyncio.to_thread(lambda: server.stop(0).wait())
    good, bad = collector.spans
    assert good.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert good.parent_span_id.hex() == "b7ad6b7169203331"
    fields = attributes(good)
    assert fields["variant_id"] == response.accounting.variant_id
    assert fields["budget_us"] == 5_000_000
    assert fields["slack_us"] == 5_000_000 - fields["total_us"]
    assert good.end_time_unix_nano - good.start_time_unix_nano >= 1000 * fields["compute_us"]
    assert attributes(bad)["code"] == "INVALID_ARGUMENT"
    assert bad.status.code == 2
