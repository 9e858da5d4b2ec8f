"""Open-loop load of streams from several processes, and what became of each.

Time to the first token counts from when the request was due, not from when it left.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import grpc
import numpy as np
from numpy.typing import NDArray

from ladderstitch_loadtest.load.generator import LATE_SHARE
from ladderstitch_loadtest.load.outcome import QUANTILES
from ladderstitch_loadtest.load.prompts import StreamTrace, TokenClass
from ladderstitch_loadtest.load.sending import Begin, connected, send_parts, when_due
from ladderstitch_loadtest.load.text_targets import StreamRefused, TextTarget, Told


@dataclass(slots=True)
class StreamEnd:
    """One stream, seconds from when it was due; `first_s` is NaN if no token came."""

    code: str = "OK"
    lag_s: float = 0.0
    first_s: float = float("nan")
    total_s: float = float("nan")
    tokens: int = 0
    told: Told = field(default_factory=Told)

    @property
    def gap_s(self) -> float:
        """Mean time between tokens; 0 for a single one."""
        return (self.total_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else 0.0

    def kept(self, wanted: TokenClass) -> bool:
        """Whether the caller saw both budgets kept, to the end."""
        return (
            self.code == "OK"
            and self.first_s <= wanted.first_s
            and self.gap_s <= wanted.per_token_s
        )


@dataclass(frozen=True, slots=True)
class StreamPart:
    """One process's part."""

    address: str
    target: TextTarget
    trace: StreamTrace
    seed: int
    cpu: int | None = None

    async def send(self, begin: Begin) -> list[StreamEnd]:
        async with grpc.aio.insecure_channel(self.address) as channel:
            await connected(channel)
            numbers = iter(range(len(self.trace)))
            tasks = [
                asyncio.create_task(self._read(channel, next(numbers), due))
                async for due in when_due(begin(), self.trace.arrivals_s.tolist())
            ]
            return await asyncio.gather(*tasks)

    async def _read(self, channel: grpc.aio.Channel, number: int, due: float) -> StreamEnd:
        trace, end = self.trace, StreamEnd(lag_s=time.monotonic() - due)
        pieces = self.target.ask(
            channel,
            int(trace.prompt_tokens[number]),
            int(trace.answer_tokens[number]),
            trace.classes[trace.picks[number]],
            seed=self.seed + number,
        )
        try:
            async for told in pieces:
                end.total_s = time.monotonic() - due
                if not end.tokens:
                    end.first_s = end.total_s
                end.tokens += 1
                end.told = told or end.told
        except grpc.aio.AioRpcError as error:
            end.code = error.code().name
        except StreamRefused:
            end.code = "ERROR"
        return end


@dataclass(frozen=True, slots=True)
class ClassOfStreams:
    """One class; `attainment` is what callers saw, `told` what the server counted (NaN: nothing).

    `effective_quality`: the path's, 1 where the server says nothing of it, 0 where budgets were not
    kept. Milliseconds are of streams that brought a token.
    """

    name: str
    first_token_ms: float
    token_ms: float
    offered: int
    attainment: float
    attainment_told: float
    effective_quality: float
    ms: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """Shares are of offered streams; `goodput` counts tokens of streams that kept their budgets."""

    offered: int
    attainment: float
    effective_quality: float
    tokens_per_s: float
    goodput_tokens_per_s: float
    paths: dict[str, int]
    statuses: dict[str, int]
    classes: list[ClassOfStreams]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class StreamRun:
    """A trace and how each of its streams ended."""

    trace: StreamTrace
    ends: list[StreamEnd]

    @property
    def lag_p99_s(self) -> float:
        return float(np.quantile([end.lag_s for end in self.ends], 0.99))

    @property
    def late(self) -> bool:
        """Whether the generator was the bottleneck."""
        return self.lag_p99_s > LATE_SHARE * min(one.first_s for one in self.trace.classes)

    @property
    def kept(self) -> NDArray[np.bool_]:
        """[N]."""
        classes, picks = self.trace.classes, self.trace.picks
        return np.array([e.kept(classes[k]) for e, k in zip(self.ends, picks, strict=True)])

    @property
    def value(self) -> NDArray[np.float64]:
        """[N] quality where the budgets were kept; 1 where the server says nothing of it."""
        quality = [1.0 if e.told.quality is None else e.told.quality for e in self.ends]
        return np.where(self.kept, quality, 0.0)

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        ends = self.trace.arrivals_s + np.array([e.total_s for e in self.ends])
        return float(np.nanmax(ends, initial=self.trace.arrivals_s[-1]) - self.trace.arrivals_s[0])

    def summary(self) -> StreamSummary:
        kept, tokens = self.kept, np.array([end.tokens for end in self.ends])
        seconds = max(self.seconds, 1e-9)
        return StreamSummary(
            offered=len(self.ends),
            attainment=float(kept.mean()),
            effective_quality=float(self.value.mean()),
            tokens_per_s=float(tokens.sum() / seconds),
            goodput_tokens_per_s=float(tokens[kept].sum() / seconds),
            paths=dict(Counter(end.told.path for end in self.ends if end.told.path)),
            statuses=dict(Counter(end.code for end in self.ends)),
            classes=[self._of_class(k) for k in range(len(self.trace.classes))],
        )

    def _of_class(self, k: int) -> ClassOfStreams:
        wanted, mine = self.trace.classes[k], self.trace.picks == k
        ends = [end for end, own in zip(self.ends, mine, strict=True) if own]
        began = [end for end in ends if end.tokens]
        told = [end.told.kept for end in ends if end.told.kept is not None]
        return ClassOfStreams(
            name=wanted.name,
            first_token_ms=1e3 * wanted.first_s,
            token_ms=1e3 * wanted.per_token_s,
            offered=len(ends),
            attainment=_mean(self.kept[mine]),
            attainment_told=_mean(told),
            effective_quality=_mean(self.value[mine]),
            ms={
                "first token": _quantiles([end.first_s for end in began]),
                "between tokens": _quantiles([end.gap_s for end in began]),
                "whole answer": _quantiles([end.total_s for end in began]),
                "queue": _quantiles([e.told.queue_s for e in began if e.told.queue_s is not None]),
            },
        )


def _mean(values: Sequence[float] | NDArray[np.float64] | NDArray[np.bool_]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    nothing = float("nan")
    return {
        name: round(1e3 * float(np.quantile(seconds, q)), 3) if seconds else nothing
        for name, q in QUANTILES.items()
    }


def measure_streams(
    address: str, target: TextTarget, trace: StreamTrace, *, processes: int = 1, seed: int = 1
) -> StreamRun:
    """Send a trace; streams go to the processes in turn. Raises as `send_parts`."""
    parts = [
        StreamPart(address, target, trace.every(processes, k), seed=seed * 1_000_003 + k * 100_003)
        for k in range(processes)
    ]
    ends: list[StreamEnd] = [StreamEnd()] * len(trace)
    for k, mine in enumerate(send_parts(parts)):
        ends[k::processes] = mine
    return StreamRun(trace, ends)
