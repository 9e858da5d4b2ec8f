"""Encoded images by the front door: costly, broken and odd ones harm no other request."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ladderstitch.client import AsyncClient, Client, RequestFailed
from ladderstitch.oip import grpc_service_pb2 as pb
from ladderstitch.oip import grpc_service_pb2_grpc
from ladderstitch_loadtest.faults.fuzz_runner import process_tree
from tests.support.pictures import (
    BAD_RATIONAL,
    add_chunks,
    chunk,
    colourful,
    encode,
    many_scans,
    png,
)
from tests.support.servers import RunningServer, picture, pixels

Stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub
TURNED = colourful(12, 8)
REJECTED = {
    "scans": (many_scans((256, 256), 3_000), "at most 64 scans in a JPEG file, got 3000"),
    "pixels": (png((10_000, 10_000), 8, 2, b"\0"), "at most 50000000 pixels, got 10000 x 10000"),
    "side": (png((70_000, 2), 8, 2, b"\0"), "at most 65535 pixels on each side, got 70000 x 2"),
    "compressed bytes": (
        add_chunks(picture(), chunk(b"IDAT", bytes(90_000))),
        "compressed bytes for 8 x 8 pixels",
    ),
    "bytes": (encode(colourful(9, 9), "JPEG") + bytes(33 << 20), "expected at most 33554432 bytes"),
    "other format": (encode(colourful(9, 9), "GIF"), "expected a PNG or JPEG file, got bytes"),
    "Postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n" * 50, "expected a PNG or JPEG file, got bytes"),
    "truncated PNG": (encode(colourful(300, 300))[:900], "expected a whole PNG file"),
    "truncated JPEG": (encode(colourful(300, 300), "JPEG")[:3_000], "expected a readable image"),
    "no pixels": (b"\xff\xd8\xff\xd9", "expected a whole JPEG file"),
}
DECODER = b"ladderstitch.vision.images.worker"


def decoders(server: RunningServer) -> list[int]:
    """Return the ids of the server's processes that decode images."""
    found = []
    for pid in process_tree(server.process.pid):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if DECODER in command:
            found.append(pid)
    return found


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """Stop the processes for a while."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def file_request(number: int, *files: bytes) -> pb.ModelInferRequest:
    """Return a request whose id is `number`."""
    request = pb.ModelInferRequest(model_name="tiny", id=str(number))
    request.inputs.add(name="images", datatype="BYTES", shape=[len(files)])
    raw = b"".join(len(file).to_bytes(4, "little") + file for file in files)
    request.raw_input_contents.append(raw)
    request.parameters["variant_id"].int64_param = 4
    return request


async def test_others_are_answered_before_a_costly_image(server: RunningServer) -> None:
    """While no process decodes, health, a tensor and a cheap image are answered."""
    costly = many_scans((2_000, 2_000), 64)
    async with (
        AsyncClient(server.address) as client,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        expected = (await client.predict(costly, variant=4)).logits
        pids = decoders(server)
        assert pids
        with stopped(pids):
            waiting = asyncio.create_task(client.predict(costly, variant=4))
            health = health_pb2_grpc.HealthStub(channel)
            for _ in range(20):
                await health.Check(health_pb2.HealthCheckRequest())
                await client.predict(pixels())
                await client.predict(picture((28, 28)))
            assert not waiting.done()
        np.testing.assert_array_equal((await waiting).logits, expected)


@pytest.mark.parametrize("kind", REJECTED)
def test_rejected_image_says_what_was_expected(client: Client, oip: Stub, kind: str) -> None:
    file, reason = REJECTED[kind]
    with pytest.raises(RequestFailed) as failed:
        client.predict(file)
    assert failed.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert "encoded_image: expected" in failed.value.message
    assert reason in failed.value.message
    with pytest.raises(grpc.RpcError) as refused:
        oip.ModelInfer(file_request(1, picture(), file))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert reason in (refused.value.details() or "")


@pytest.mark.parametrize("kind", REJECTED)
def test_stream_rejected_image_ends_its_own_item(oip: Stub, kind: str) -> None:
    file, reason = REJECTED[kind]
    files = [file if number == 10 else picture() for number in range(21)]
    requests = (file_request(number, file) for number, file in enumerate(files))
    responses = list(oip.ModelStreamInfer(requests))
    for response in responses:
        assert response.infer_response.parameters["triton_final_response"].bool_param
    answers = {answer.infer_response.id: answer.error_message for answer in responses}
    assert sorted(map(int, answers)) == list(range(21))
    assert reason in answers.pop("10")
    assert set(answers.values()) == {""}


def test_stream_image_with_broken_exif_is_turned(client: Client, oip: Stub) -> None:
    odd = encode(TURNED, "JPEG", exif=BAD_RATIONAL)
    files = [odd if number == 10 else picture() for number in range(21)]
    requests = (file_request(number, file) for number, file in enumerate(files))
    answers = {answer.infer_response.id: answer for answer in oip.ModelStreamInfer(requests)}
    assert len(answers) == 21
    assert not any(answer.error_message for answer in answers.values())
    found = np.frombuffer(answers["10"].infer_response.raw_output_contents[0], "<f4")
    decoded = Image.open(io.BytesIO(encode(TURNED, "JPEG")))
    upright = decoded.transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_allclose(
        client.predict(encode(upright), variant=4).logits[0], found, atol=1e-5
    )
    np.testing.assert_allclose(client.predict(odd, variant=4).logits[0], found, atol=1e-5)


def test_large_metadata_are_skipped(client: Client) -> None:
    image = colourful(40, 40)
    text = PngInfo()
    text.add_text("Comment", "x" * 2_000_000)
    text.add_text("Compressed", "x" * 5_000_000, zip=True)
    expected = client.predict(encode(image), variant=4).logits
    for options in ({"pnginfo": text}, {"icc_profile": bytes(1_500_000)}):
        found = client.predict(encode(image, **options), variant=4).logits
        np.testing.assert_array_equal(found, expected)
    expected = client.predict(encode(image, "JPEG"), variant=4).logits
    found = client.predict(encode(image, "JPEG", icc_profile=bytes(1_500_000)), variant=4).logits
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_hidden_colour_has_no_effect(client: Client, oip: Stub, mode: str) -> None:
    """Transparent pixels have the documented white background, over both protocols."""

    def file(hidden: int) -> bytes:
        image = Image.new("RGB", (8, 8), (hidden,) * 3)
        image.paste((90, 90, 90), (2, 2, 6, 6))
        alpha = Image.new("L", (8, 8), 0)
        alpha.paste(255, (2, 2, 6, 6))
        image.putalpha(alpha)
        return encode(image.convert(mode) if mode != "P" else image.quantize(16))

    white = Image.new("L", (8, 8), 255)
    white.paste(90, (2, 2, 6, 6))
    expected = client.predict(encode(white), variant=4).logits[0]
    for hidden in (0, 127, 255):
        assert np.array_equal(client.predict(file(hidden), variant=4).logits[0], expected)
        raw = oip.ModelInfer(file_request(1, file(hidden))).raw_output_contents[0]
        np.testing.assert_array_equal(np.frombuffer(raw, "<f4"), expected)
