"""The server's latency without compute and its throughput, compared with a bare gRPC echo."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from statistics import median

import grpc
import numpy as np

from ladderstitch.client import infer_request
from ladderstitch.v1 import inference_pb2
from ladderstitch_loadtest.benchmarks.echo import METHOD

INFER = "/ladderstitch.v1.InferenceService/Infer"
Call = Callable[[bytes], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Latency:
    """Latency of one caller in milliseconds: the median over the rounds of a round's p50.

    `overhead_ms` is the server's latency without compute.
    """

    echo_ms: float
    total_ms: float
    compute_ms: float
    overhead_ms: float
    overhead_over_echo: float


@dataclass(frozen=True, slots=True)
class Throughput:
    """Answers/s to `callers` with one call in flight each: medians over the rounds."""

    callers: int
    echo_rps: float
    infer_rps: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Overhead:
    """The whole measurement: server and echo, for one image of shape `image` and one variant."""

    latency: Latency
    throughput: list[Throughput]
    image: tuple[int, ...]
    variant: int
    rounds: int

    def to_dict(self) -> dict[str, object]:
        """Return the fields for a result file."""
        return asdict(self)


async def measure(
    address: str, echo_address: str, rounds: int, callers: tuple[int, ...], seconds: float
) -> Overhead:
    """Return latency and throughput of server and echo at each number of `callers`.

    Echo and server take turns, `rounds` times, so that a disturbance affects both. `seconds` is the
    length of each throughput run.
    """
    async with (
        grpc.aio.insecure_channel(address) as channel,
        grpc.aio.insecure_channel(echo_address) as echo_channel,
    ):
        payload, image, variant = await make_payload(channel)
        infer, echo = channel.unary_unary(INFER), echo_channel.unary_unary(METHOD)
        await time_calls(echo, payload, 200)
        await time_calls(infer, payload, 200)
        medians: list[tuple[float, float, float]] = []
        rates: dict[int, list[tuple[float, float]]] = {n: [] for n in callers}
        for _ in range(rounds):
            medians.append(await _medians_ms(echo, infer, payload))
            for n, pairs in rates.items():
                pairs.append(await _measure_rates(echo, infer, payload, n, seconds))
    throughput = [_throughput(n, pairs) for n, pairs in rates.items()]
    return Overhead(_latency(medians), throughput, image, variant, rounds)


async def _medians_ms(echo: Call, infer: Call, payload: bytes) -> tuple[float, float, float]:
    """Return the medians of 300 calls: of the echo, and of the server's overhead and compute."""
    echo_ms = median(total for total, _ in await time_calls(echo, payload, 300))
    replies = await time_calls(infer, payload, 300)
    compute_ms = [_compute_ms(reply) for _, reply in replies]
    overhead_ms = [total - c for (total, _), c in zip(replies, compute_ms, strict=True)]
    return echo_ms, median(overhead_ms), median(compute_ms)


def _latency(medians: list[tuple[float, float, float]]) -> Latency:
    echo_ms, overhead_ms, compute_ms = (median(column) for column in zip(*medians, strict=True))
    ratio = median(overhead / echo for echo, overhead, _ in medians)
    return Latency(
        round(echo_ms, 3),
        round(overhead_ms + compute_ms, 3),
        round(compute_ms, 3),
        round(overhead_ms, 3),
        round(ratio, 2),
    )


def _throughput(callers: int, rates: list[tuple[float, float]]) -> Throughput:
    ratio = median(infer / echo for echo, infer in rates)
    echo, infer = (median(column) for column in zip(*rates, strict=True))
    return Throughput(callers, round(echo), round(infer), round(ratio, 2))


async def get_image_shape(channel: grpc.aio.Channel) -> tuple[int, int, int]:
    """Return the image shape [C, H, W] of the server's only model."""
    return _image_shape(await _get_model(channel))


async def _get_model(channel: grpc.aio.Channel) -> inference_pb2.GetModelResponse:
    get = channel.unary_unary("/ladderstitch.v1.InferenceService/GetModel")
    return inference_pb2.GetModelResponse.FromString(await get(b""))


def _image_shape(model: inference_pb2.GetModelResponse) -> tuple[int, int, int]:
    inputs = model.preprocessing
    return inputs.channels, inputs.height, inputs.width


async def make_payload(channel: grpc.aio.Channel) -> tuple[bytes, tuple[int, ...], int]:
    """Return a serialised request for one image, the image's shape [1, C, H, W], and the variant.

    The request is pinned to the fastest variant of the server's only model.
    """
    model = await _get_model(channel)
    shape = (1, *_image_shape(model))
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    variant = model.frontier[0]
    return infer_request(pixels, variant=variant).SerializeToString(), shape, variant


async def time_calls(call: Call, payload: bytes, n: int) -> list[tuple[float, bytes]]:
    """Make `n` calls one after another and return the milliseconds and the reply of each."""
    timed = []
    for _ in range(n):
        started = time.perf_counter()
        reply = await call(payload)
        timed.append((1e3 * (time.perf_counter() - started), reply))
    return timed


def _compute_ms(reply: bytes) -> float:
    return inference_pb2.InferResponse.FromString(reply).accounting.compute_us / 1e3


async def _measure_rates(
    echo: Call, infer: Call, payload: bytes, callers: int, seconds: float
) -> tuple[float, float]:
    """Return the replies/s of the echo and of the server."""
    echo_rps = await _measure_rate(echo, payload, callers, seconds)
    return echo_rps, await _measure_rate(infer, payload, callers, seconds)


async def _measure_rate(call: Call, payload: bytes, callers: int, seconds: float) -> float:
    """Return the replies/s to `callers` with one call in flight each."""
    count, end = 0, time.perf_counter() + seconds

    async def caller() -> None:
        nonlocal count
        while time.perf_counter() < end:
            await call(payload)
            count += 1

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return count / (time.perf_counter() - started)
