"""What the server costs beyond computing, beside a bare echo of the same bytes."""

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
    """One caller, medians over the rounds of each round's p50, milliseconds."""

    echo_ms: float
    total_ms: float
    compute_ms: float
    overhead_ms: float
    overhead_over_echo: float


@dataclass(frozen=True, slots=True)
class Throughput:
    """Closed loop, medians over the rounds, answers per second."""

    callers: int
    echo_rps: float
    infer_rps: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Overhead:
    latency: Latency
    throughput: list[Throughput]
    image: tuple[int, ...]
    variant: int
    rounds: int

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


async def measure(
    address: str, echo_address: str, rounds: int, callers: tuple[int, ...], seconds: float
) -> Overhead:
    """Echo and server take turns, `rounds` times, so that a disturbance meets both."""
    async with (
        grpc.aio.insecure_channel(address) as channel,
        grpc.aio.insecure_channel(echo_address) as echo_channel,
    ):
        payload, image, variant = await payload_of(channel)
        infer, echo = channel.unary_unary(INFER), echo_channel.unary_unary(METHOD)
        await latencies(echo, payload, 200)
        await latencies(infer, payload, 200)
        one: list[tuple[float, float, float]] = []
        many: dict[int, list[tuple[float, float]]] = {n: [] for n in callers}
        for _ in range(rounds):
            echo_ms = median(total for total, _ in await latencies(echo, payload, 300))
            pairs = await latencies(infer, payload, 300)
            computes = [_compute_ms(answer) for _, answer in pairs]
            rests = [total - c for (total, _), c in zip(pairs, computes, strict=True)]
            one.append((echo_ms, median(rests), median(computes)))
            for n in callers:
                many[n].append(
                    (
                        await _rate(echo, payload, n, seconds),
                        await _rate(infer, payload, n, seconds),
                    )
                )
    return Overhead(
        _latency(one), [_throughput(n, rates) for n, rates in many.items()], image, variant, rounds
    )


def _latency(one: list[tuple[float, float, float]]) -> Latency:
    echo_ms, rest_ms, compute_ms = (median(column) for column in zip(*one, strict=True))
    ratio = median(rest / echo for echo, rest, _ in one)
    return Latency(
        round(echo_ms, 3),
        round(rest_ms + compute_ms, 3),
        round(compute_ms, 3),
        round(rest_ms, 3),
        round(ratio, 2),
    )


def _throughput(callers: int, rates: list[tuple[float, float]]) -> Throughput:
    ratio = median(infer / echo for echo, infer in rates)
    echo, infer = (median(column) for column in zip(*rates, strict=True))
    return Throughput(callers, round(echo), round(infer), round(ratio, 2))


async def image_shape_of(channel: grpc.aio.Channel) -> tuple[int, int, int]:
    """[C, H, W] of the server's only model."""
    return _shape(await _model(channel))


async def _model(channel: grpc.aio.Channel) -> inference_pb2.GetModelResponse:
    get = channel.unary_unary("/ladderstitch.v1.InferenceService/GetModel")
    return inference_pb2.GetModelResponse.FromString(await get(b""))


def _shape(model: inference_pb2.GetModelResponse) -> tuple[int, int, int]:
    inputs = model.preprocessing
    return inputs.channels, inputs.height, inputs.width


async def payload_of(channel: grpc.aio.Channel) -> tuple[bytes, tuple[int, ...], int]:
    """One image as pixels, pinned to the fastest variant of the server's only model."""
    model = await _model(channel)
    shape = (1, *_shape(model))
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    variant = model.frontier[0]
    return infer_request(pixels, variant=variant).SerializeToString(), shape, variant


async def latencies(call: Call, payload: bytes, n: int) -> list[tuple[float, bytes]]:
    """Milliseconds and answer of `n` calls, one after another."""
    seen = []
    for _ in range(n):
        started = time.perf_counter()
        answer = await call(payload)
        seen.append((1e3 * (time.perf_counter() - started), answer))
    return seen


def _compute_ms(answer: bytes) -> float:
    return inference_pb2.InferResponse.FromString(answer).accounting.compute_us / 1e3


async def _rate(call: Call, payload: bytes, callers: int, seconds: float) -> float:
    """Answers per second of so many callers, each with one call in flight."""
    count, end = 0, time.perf_counter() + seconds

    async def caller() -> None:
        nonlocal count
        while time.perf_counter() < end:
            await call(payload)
            count += 1

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return count / (time.perf_counter() - started)
