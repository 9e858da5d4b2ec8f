"""Load of text streams from several worker processes, and the result of each stream.

`image_load` does the same for images, which have one budget and one answer each.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field

import grpc
import numpy as np
from numpy.typing import NDArray

from ladderstitch_loadtest.load.image_load import MAX_LAG_SHARE
from ladderstitch_loadtest.load.outcome import mean, quantiles_ms
from ladderstitch_loadtest.load.pacing import due_times
from ladderstitch_loadtest.load.prompts import StreamTrace, TokenClass
from ladderstitch_loadtest.load.text_targets import ServerReport, StreamError, TextTarget
from ladderstitch_loadtest.load.workers import (
    SPIN_S,
    WaitForStart,
    merge_in_turn,
    run_workers,
    wait_until_connected,
)


@dataclass(slots=True)
class StreamResult:
    """The result of one stream, in seconds from when it was due.

    `code` is `OK`, the gRPC status or `ERROR`; `first_s` is NaN if no token came.
    """

    code: str = "OK"
    lag_s: float = 0.0
    first_s: float = float("nan")
    total_s: float = float("nan")
    tokens: int = 0
    report: ServerReport = field(default_factory=ServerReport)

    @property
    def gap_s(self) -> float:
        """The mean time between tokens in seconds; 0 for a single token."""
        return (self.total_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else 0.0

    def meets(self, budgets: TokenClass) -> bool:
        """Return whether the caller saw both budgets met and the stream complete."""
        return (
            self.code == "OK"
            and self.first_s <= budgets.first_s
            and self.gap_s <= budgets.per_token_s
        )


@dataclass(frozen=True, slots=True)
class StreamLoad:
    """One worker's streams; stream n of its trace uses seed `seed` + n."""

    address: str
    target: TextTarget
    trace: StreamTrace
    seed: int
    cpu: int | None = None

    async def send(self, wait_for_start: WaitForStart) -> list[StreamResult]:
        """Connect, wait for the start, send, and return the results in order of the trace."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            await wait_until_connected(channel)
            numbers = iter(range(len(self.trace)))
            times = self.trace.arrivals_s.tolist()
            tasks = [
                asyncio.create_task(self._read_stream(channel, next(numbers), due))
                async for due in due_times(wait_for_start(), times, spin_s=SPIN_S)
            ]
            return await asyncio.gather(*tasks)

    async def _read_stream(
        self, channel: grpc.aio.Channel, number: int, due: float
    ) -> StreamResult:
        result = StreamResult(lag_s=time.monotonic() - due)
        try:
            async for report in self._start_stream(channel, number):
                result.total_s = time.monotonic() - due
                if not result.tokens:
                    result.first_s = result.total_s
                result.tokens += 1
                result.report = report or result.report
        except grpc.aio.AioRpcError as error:
            result.code = error.code().name
        except StreamError:
            result.code = "ERROR"
        return result

    def _start_stream(
        self, channel: grpc.aio.Channel, number: int
    ) -> AsyncIterator[ServerReport | None]:
        trace = self.trace
        return self.target.generate(
            channel,
            int(trace.prompt_tokens[number]),
            int(trace.answer_tokens[number]),
            trace.classes[trace.picks[number]],
            seed=self.seed + number,
        )


@dataclass(frozen=True, slots=True)
class StreamClassSummary:
    """One budget class; `latency_ms` holds quantiles over streams that brought a token.

    `attainment` is what callers saw, `server_attainment` what the server counted.
    `effective_quality` is the mean quality of the variants, where a stream that missed a budget
    counts 0. A figure is NaN if the server does not report it, or if the class has no streams.
    """

    name: str
    first_token_ms: float
    token_ms: float
    offered: int
    attainment: float
    server_attainment: float
    effective_quality: float
    latency_ms: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """Figures of a run; shares are of offered streams.

    Goodput counts the tokens of streams that met their budgets. `effective_quality` is NaN if the
    quality of a variant is not known.
    """

    offered: int
    attainment: float
    effective_quality: float
    tokens_per_s: float
    goodput_tokens_per_s: float
    variants: dict[str, int]
    statuses: dict[str, int]
    classes: list[StreamClassSummary]

    def to_dict(self) -> dict[str, object]:
        """Return the fields for a result file."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class StreamRun:
    """A trace of N streams and the result of each."""

    trace: StreamTrace
    results: list[StreamResult]

    @property
    def late_s(self) -> float | None:
        """The lag at p99 in seconds if the generator was the bottleneck; None if it was not."""
        return self.lag_p99_s if self.late else None

    @property
    def lag_p99_s(self) -> float:
        """The p99 of the seconds by which requests were sent late."""
        return float(np.quantile([result.lag_s for result in self.results], 0.99))

    @property
    def late(self) -> bool:
        """Whether the generator was the bottleneck."""
        return self.lag_p99_s > MAX_LAG_SHARE * min(one.first_s for one in self.trace.classes)

    @property
    def met(self) -> NDArray[np.bool_]:
        """Whether the caller saw the budgets of each stream met, [N]."""
        classes, picks = self.trace.classes, self.trace.picks
        return np.array([r.meets(classes[k]) for r, k in zip(self.results, picks, strict=True)])

    @property
    def value(self) -> NDArray[np.float64]:
        """The quality of streams that met their budgets, NaN if not reported; 0 for others, [N]."""
        reported = np.array([result.report.quality for result in self.results], np.float64)
        return np.where(self.met, reported, 0.0)

    @property
    def seconds(self) -> float:
        """The time from the first arrival to the last token, in seconds."""
        ends = self.trace.arrivals_s + np.array([result.total_s for result in self.results])
        return float(np.nanmax(ends, initial=self.trace.arrivals_s[-1]) - self.trace.arrivals_s[0])

    def summary(self) -> StreamSummary:
        """Return the figures over all streams and per budget class."""
        met, tokens = self.met, np.array([result.tokens for result in self.results])
        seconds = max(self.seconds, 1e-9)
        variants = [result.report.variant for result in self.results]
        return StreamSummary(
            offered=len(self.results),
            attainment=float(met.mean()),
            effective_quality=float(self.value.mean()),
            tokens_per_s=float(tokens.sum() / seconds),
            goodput_tokens_per_s=float(tokens[met].sum() / seconds),
            variants=dict(Counter(variant for variant in variants if variant)),
            statuses=dict(Counter(result.code for result in self.results)),
            classes=[self._class_summary(k) for k in range(len(self.trace.classes))],
        )

    def _class_summary(self, k: int) -> StreamClassSummary:
        budgets, own = self.trace.classes[k], self.trace.picks == k
        results = [result for result, mine in zip(self.results, own, strict=True) if mine]
        return StreamClassSummary(
            name=budgets.name,
            first_token_ms=1e3 * budgets.first_s,
            token_ms=1e3 * budgets.per_token_s,
            offered=len(results),
            attainment=mean(self.met[own]),
            server_attainment=mean([r.report.met for r in results if r.report.met is not None]),
            effective_quality=mean(self.value[own]),
            latency_ms=_latency_ms([result for result in results if result.tokens]),
        )


def _latency_ms(began: list[StreamResult]) -> dict[str, dict[str, float]]:
    """Return the quantiles of each part of the streams that brought a token."""
    queued_s = [r.report.queue_s for r in began if r.report.queue_s is not None]
    return {
        "first token": quantiles_ms([r.first_s for r in began]),
        "between tokens": quantiles_ms([r.gap_s for r in began]),
        "whole answer": quantiles_ms([r.total_s for r in began]),
        "queue": quantiles_ms(queued_s),
    }


def measure_streams(
    address: str, target: TextTarget, trace: StreamTrace, *, processes: int = 1, seed: int = 1
) -> StreamRun:
    """Send a trace to a server, its streams dealt to `processes` workers in turn.

    Raises `RuntimeError` if a worker does not connect.
    """
    loads = [
        StreamLoad(address, target, trace.split(processes, k), seed * 1_000_003 + k * 100_003)
        for k in range(processes)
    ]
    return StreamRun(trace, merge_in_turn(run_workers(loads)))
