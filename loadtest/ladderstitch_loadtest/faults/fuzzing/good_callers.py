"""Eight well-behaved callers in a process of their own, whose answers are known beforehand."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np

from ladderstitch.oip import grpc_service_pb2 as oip
from ladderstitch.v1 import generation_pb2, inference_pb2
from ladderstitch_loadtest.faults.fuzzing.entrances import (
    IMAGES,
    NATIVE,
    OIP,
    PIXELS,
    TEXT,
    infer_file,
)
from ladderstitch_loadtest.faults.fuzzing.http_sender import HttpSender
from ladderstitch_loadtest.faults.fuzzing.image_files import seed_files

CALLERS_PER_KIND = 2
PAUSE_S = 0.15
"""Pause between two requests of a caller."""
TIMEOUT_S = 60.0
TOLERANCE = 1e-3
"""Largest difference of two logits of one image that were computed in different batches."""
Result = Any
Ask = Callable[[], Awaitable[Result]]


@dataclass(frozen=True, slots=True)
class GoodSample:
    """One answer: the instant of its request on the monotonic clock, its latency, its fault."""

    kind: str
    at: float
    latency_s: float
    fault: str = ""


class GoodCallers:
    """The callers in their process; `stop` returns what they saw."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._samples: list[GoodSample] | None = None

    def stop(self) -> list[GoodSample]:
        """Stop the callers and return all samples; raises `EOFError` if the process has died."""
        if self._samples is None:
            self._connection.send("stop")
            self._samples = self._connection.recv()
        return self._samples


@contextmanager
def good_callers(address: str, http_address: str) -> Iterator[GoodCallers]:
    """Run eight callers during the `with` block.

    Each kind of caller takes its first answer, on a quiet server, as the right one.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(address, http_address, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        ours.recv()  # the right answers are known
        callers = GoodCallers(ours)
        yield callers
        callers.stop()
    finally:
        process.terminate()
        process.join()
        process.close()
        ours.close()


def _run(address: str, http_address: str, connection: Connection) -> None:
    samples = asyncio.run(_call_until_stopped(address, http_address, connection))
    connection.send(samples)
    connection.close()


async def _call_until_stopped(
    address: str, http_address: str, connection: Connection
) -> list[GoodSample]:
    samples: list[GoodSample] = []
    http = HttpSender(http_address, TIMEOUT_S)
    async with grpc.aio.insecure_channel(address) as channel:
        kinds = _requests(channel, http)
        right = {kind: await ask() for kind, ask in kinds.items()}
        connection.send("ready")
        stopping = asyncio.create_task(asyncio.to_thread(connection.recv))
        callers = [
            _call(kind, ask, right[kind], samples, stopping)
            for kind, ask in kinds.items()
            for _ in range(CALLERS_PER_KIND)
        ]
        await asyncio.gather(*callers, stopping)
    return samples


async def _call(
    kind: str,
    ask: Ask,
    right: Result,
    samples: list[GoodSample],
    stopping: asyncio.Task[Any],
) -> None:
    while not stopping.done():
        started, fault = time.monotonic(), ""
        try:
            found = await ask()
            if not is_same(found, right):
                fault = f"expected {str(right)[:200]}, got {str(found)[:200]}"
        except grpc.aio.AioRpcError as error:
            fault = f"{error.code().name}: {error.details()}"
        except (OSError, ValueError) as error:
            fault = repr(error)[:400]
        samples.append(GoodSample(kind, started, time.monotonic() - started, fault))
        await asyncio.sleep(PAUSE_S)


def is_same(found: Result, right: Result) -> bool:
    """Return whether two answers are equal; logits may differ a little."""
    if isinstance(right, np.ndarray):
        return found.shape == right.shape and bool(np.allclose(found, right, atol=TOLERANCE))
    return bool(found == right)


def _requests(channel: grpc.aio.Channel, http: HttpSender) -> dict[str, Ask]:
    """Return a function for each kind that sends one request and returns its answer."""
    infer = _unary(channel, NATIVE + "InferenceService/Infer", inference_pb2.InferResponse)
    model_infer = _unary(channel, OIP + "ModelInfer", oip.ModelInferResponse)
    generate: Any = channel.unary_stream(
        NATIVE + "GenerationService/Generate",
        response_deserializer=generation_pb2.GenerateResponse.FromString,
    )

    async def ask_infer() -> Result:
        request = infer_file(seed_files()[0])
        request.variant_id = 0
        response = await infer(request.SerializeToString(), timeout=TIMEOUT_S)
        return np.array([list(p.logits) for p in response.predictions])

    async def ask_oip() -> Result:
        request = oip.ModelInferRequest(model_name=IMAGES, raw_input_contents=[PIXELS.tobytes()])
        request.inputs.add(name="images", datatype="UINT8", shape=PIXELS.shape)
        request.parameters["variant_id"].int64_param = 0
        response = await model_infer(request.SerializeToString(), timeout=TIMEOUT_S)
        return np.frombuffer(response.raw_output_contents[0], "<f4")

    async def ask_generate() -> Result:
        request = generation_pb2.GenerateRequest(
            model_name=TEXT, text="good", max_tokens=6, temperature=0.9, seed=5, variant_id=0
        )
        call = generate(request.SerializeToString(), timeout=TIMEOUT_S)
        return [(response.index, response.token_id) async for response in call]

    async def ask_http() -> Result:
        body = {"model": TEXT, "prompt": "good", "max_tokens": 5, "temperature": 0}
        answer = await http.post("/v1/completions", json.dumps(body).encode())
        if answer.status != "200":
            raise ValueError(f"{answer.status} {answer.body}")
        return json.loads(answer.body[0])["choices"]

    return {"Infer": ask_infer, "OIP": ask_oip, "Generate": ask_generate, "HTTP": ask_http}


def _unary(channel: grpc.aio.Channel, method: str, response: Any) -> Any:
    return channel.unary_unary(method, response_deserializer=response.FromString)
