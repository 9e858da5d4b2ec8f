"""Malformed requests of every kind get their status while well-formed ones are answered.

`ladderstitch-loadtest malformed` sends 10,000 of them and measures memory; these tests send fewer.
"""

from __future__ import annotations

from pathlib import Path

import grpc

from ladderstitch.v1 import inference_pb2, inference_pb2_grpc
from ladderstitch_loadtest.faults.fuzz_runner import FuzzOutcome, process_tree, run
from ladderstitch_loadtest.faults.fuzz_text import TextCases
from ladderstitch_loadtest.faults.fuzz_vision import ImageCases
from tests.support.language_models import write_tiny
from tests.support.servers import RunningServer, start_server, stop_server


async def send_cases(
    server: RunningServer, cases: type[ImageCases | TextCases], requests: int
) -> FuzzOutcome:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        model = await stub.GetModel(inference_pb2.GetModelRequest())
        fuzz_cases = cases(model, channel, 3)
        return await run(fuzz_cases, process_tree(server.process.pid), requests, lambda: None)


async def test_malformed_image_requests_get_their_status(server: RunningServer) -> None:
    outcome = await send_cases(server, ImageCases, 570)
    assert outcome.wrong == []
    assert min(outcome.kinds.values()) == 30
    assert outcome.good_answers == 57
    assert "error_id" not in server.log.read_text()


async def test_malformed_text_requests_get_their_status(tmp_path: Path) -> None:
    """The cases include deadlines of milliseconds, disconnects, and prompts of maximum length."""
    server = start_server(write_tiny(tmp_path / "tiny"), tmp_path / "log")
    outcome = await send_cases(server, TextCases, 440)
    assert outcome.wrong == []
    assert min(outcome.kinds.values()) == 20
    assert outcome.good_answers == 44
    assert stop_server(server) == 0
    assert "error_id" not in (tmp_path / "log").read_text()
