"""What the gateway adds to a request: the same calls straight to a replica and through the hop."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from statistics import median

import grpc

from ladderstitch_loadtest.benchmarks.overhead import INFER, latencies, payload_of

CALLS = 200


@dataclass(frozen=True, slots=True)
class Hop:
    """One caller, milliseconds: medians over the rounds of each round's quantile."""

    direct_p50_ms: float
    gateway_p50_ms: float
    added_p50_ms: float
    direct_p95_ms: float
    gateway_p95_ms: float
    added_p95_ms: float
    added_p50_worst_round_ms: float
    request_bytes: int
    rounds: int
    calls_a_round: int = CALLS

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


async def measure(direct: str, gateway: str, rounds: int) -> Hop:
    """The two take turns within a round, in alternating order, so that a disturbance meets both."""
    async with (
        grpc.aio.insecure_channel(direct) as straight,
        grpc.aio.insecure_channel(gateway) as around,
    ):
        payload, _, _ = await payload_of(straight)
        calls = {"direct": straight.unary_unary(INFER), "gateway": around.unary_unary(INFER)}
        for call in calls.values():
            await latencies(call, payload, CALLS)
        p50: dict[str, list[float]] = {name: [] for name in calls}
        p95: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds):
            for name in sorted(calls, reverse=bool(turn % 2)):
                seen = sorted(ms for ms, _ in await latencies(calls[name], payload, CALLS))
                p50[name].append(median(seen))
                p95[name].append(seen[int(0.95 * CALLS)])
            await asyncio.sleep(0)
    added = [b - a for a, b in zip(p50["direct"], p50["gateway"], strict=True)]
    added_p95 = [b - a for a, b in zip(p95["direct"], p95["gateway"], strict=True)]
    return Hop(
        direct_p50_ms=round(median(p50["direct"]), 3),
        gateway_p50_ms=round(median(p50["gateway"]), 3),
        added_p50_ms=round(median(added), 3),
        direct_p95_ms=round(median(p95["direct"]), 3),
        gateway_p95_ms=round(median(p95["gateway"]), 3),
        added_p95_ms=round(median(added_p95), 3),
        added_p50_worst_round_ms=round(max(added), 3),
        request_bytes=len(payload),
        rounds=rounds,
    )
