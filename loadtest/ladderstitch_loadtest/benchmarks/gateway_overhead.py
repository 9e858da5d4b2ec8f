"""The latency that a gateway adds: the same calls directly to a replica and through a gateway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median

import grpc

from ladderstitch_loadtest.benchmarks.overhead import INFER, Call, make_payload, time_calls

CALLS = 200


@dataclass(frozen=True, slots=True)
class GatewayOverhead:
    """Latency of one caller in milliseconds: the median over the rounds of a round's quantile.

    `added` is the median of the rounds' differences, gateway minus direct.
    """

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
        """Return the fields for a result file."""
        return asdict(self)


async def measure(direct: str, gateway: str, rounds: int) -> GatewayOverhead:
    """Return the latencies of a replica at `direct` and of the same one behind `gateway`.

    The two take turns within a round, in alternating order, so that a disturbance affects both.
    """
    async with (
        grpc.aio.insecure_channel(direct) as direct_channel,
        grpc.aio.insecure_channel(gateway) as gateway_channel,
    ):
        payload, _, _ = await make_payload(direct_channel)
        calls = {
            "direct": direct_channel.unary_unary(INFER),
            "gateway": gateway_channel.unary_unary(INFER),
        }
        times = await _time_in_turn(calls, payload, rounds)
    return _combine(times, len(payload), rounds)


async def _time_in_turn(
    calls: Mapping[str, Call], payload: bytes, rounds: int
) -> dict[str, list[list[float]]]:
    """Return the sorted milliseconds of the calls of each round, by name."""
    for call in calls.values():
        await time_calls(call, payload, CALLS)
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in sorted(calls, reverse=bool(turn % 2)):
            times[name].append(
                sorted(ms for ms, _ in await time_calls(calls[name], payload, CALLS))
            )
    return times


def _combine(
    times: dict[str, list[list[float]]], request_bytes: int, rounds: int
) -> GatewayOverhead:
    p50 = {name: [median(one) for one in each] for name, each in times.items()}
    p95 = {name: [one[int(0.95 * CALLS)] for one in each] for name, each in times.items()}
    added = [b - a for a, b in zip(p50["direct"], p50["gateway"], strict=True)]
    added_p95 = [b - a for a, b in zip(p95["direct"], p95["gateway"], strict=True)]
    return GatewayOverhead(
        direct_p50_ms=round(median(p50["direct"]), 3),
        gateway_p50_ms=round(median(p50["gateway"]), 3),
        added_p50_ms=round(median(added), 3),
        direct_p95_ms=round(median(p95["direct"]), 3),
        gateway_p95_ms=round(median(p95["gateway"]), 3),
        added_p95_ms=round(median(added_p95), 3),
        added_p50_worst_round_ms=round(max(added), 3),
        request_bytes=request_bytes,
        rounds=rounds,
    )
