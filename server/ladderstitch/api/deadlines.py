"""The deadlines of a request: from its fields, its metadata, gRPC and the model's default."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from google.protobuf.duration_pb2 import Duration

from ladderstitch.api.status import Context
from ladderstitch.errors import InvalidArgument
from ladderstitch.scheduling.requests import Deadlines

MAX_BUDGET_US = 3_600_000_000
"""Maximum budget: one hour."""

MAX_ANNOUNCE_S = 3600
"""Maximum time in seconds between the announcement of a drain and the drain."""

LATENCY_BUDGET_KEY = "x-latency-budget-ms"
HELD_KEY = "x-ladderstitch-held-us"
"""Metadata of gateways: microseconds between a call's arrival there and its forwarding."""
TTFT_BUDGET_KEY = "x-llm-d-slo-ttft-ms"
TPOT_BUDGET_KEY = "x-llm-d-slo-tpot-ms"


Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]
"""The metadata of a call, as gRPC returns it."""


@dataclass(frozen=True, slots=True)
class LatencyBudget:
    """One latency budget in seconds from arrival; a `hard` one is a hard deadline, too."""

    seconds: float
    source: str
    hard: bool = False


def arrival_and_deadline(context: Context) -> tuple[float, float | None]:
    """Return a call's arrival (`time.monotonic`) and the seconds from then to its gRPC deadline.

    The time that a gateway held the call counts. Raises `InvalidArgument` if the metadata that
    reports it is malformed.
    """
    now, remaining_s = time.monotonic(), context.time_remaining()
    held_s = held_seconds(context.invocation_metadata())
    return now - held_s, None if remaining_s is None else remaining_s + held_s


def held_seconds(metadata: Metadata) -> float:
    """Return the seconds that a gateway held a call, 0 if the metadata reports none.

    Raises `InvalidArgument` if it is malformed.
    """
    held_s = 0.0
    for key, value in metadata:
        if key == HELD_KEY:
            held_s = _parse_held_seconds(value)
    return held_s


def resolve_deadlines(arrival: float, budgets: Iterable[LatencyBudget]) -> Deadlines:
    """Return the soft deadline, the earliest of all, and the hard one, the earliest hard one."""
    soft = hard = math.inf
    soft_source = hard_source = "none"
    for budget in budgets:
        if budget.seconds < soft:
            soft, soft_source = budget.seconds, budget.source
        if budget.hard and budget.seconds < hard:
            hard, hard_source = budget.seconds, budget.source
    return Deadlines(arrival + soft, arrival + hard, soft_source, hard_source)


def call_deadlines(
    remaining_s: float | None, metadata: Metadata, default_us: int | None
) -> list[LatencyBudget]:
    """Return the budgets that any call may have, whatever its message holds.

    They are the gRPC deadline, the metadata `x-latency-budget-ms` and the model's default.
    """
    budgets = []
    if remaining_s is not None and remaining_s < MAX_BUDGET_US / 1e6:
        budgets.append(LatencyBudget(remaining_s, "grpc_deadline", hard=True))
    for key, value in metadata:
        if key == LATENCY_BUDGET_KEY:
            budgets.append(LatencyBudget(seconds_from_ms(key, value), "metadata"))
    if default_us is not None:
        budgets.append(LatencyBudget(default_us / 1e6, "model_default"))
    return budgets


def message_budgets(budget_us: int | None, hard: bool) -> list[LatencyBudget]:
    """Return the budget in the fields `latency_budget_us` and `hard_deadline` of a message.

    Raises `InvalidArgument` if `hard_deadline` is set without a budget.
    """
    if budget_us is not None:
        seconds = seconds_from_us("latency_budget_us", budget_us)
        return [LatencyBudget(seconds, "latency_budget_us", hard)]
    if hard:
        raise InvalidArgument("hard_deadline", "expected latency_budget_us to be set along with it")
    return []


def seconds_from_us(field: str, value: int) -> float:
    """Return the seconds of a budget in microseconds.

    Raises `InvalidArgument` that names `field` outside 1 microsecond to 1 hour.
    """
    if not 1 <= value <= MAX_BUDGET_US:
        raise InvalidArgument(field, f"expected 1 to {MAX_BUDGET_US} microseconds, got {value}")
    return value / 1e6


def seconds_from_ms(key: str, value: str | bytes) -> float:
    """Return the seconds of a budget in milliseconds that is given as metadata.

    Raises `InvalidArgument` that names `key` outside 1 microsecond to 1 hour.
    """
    text = _decode(value)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.001 <= number <= MAX_BUDGET_US / 1e3:  # NaN fails too
        raise InvalidArgument(
            key, f"expected 0.001 to {MAX_BUDGET_US // 1000} milliseconds, got {text!r}"
        )
    return number / 1e3


def announce_seconds(announce: Duration) -> float:
    """Return the seconds that a drain is announced; raises `InvalidArgument` outside 0 to 1 h."""
    seconds = announce.ToMicroseconds() / 1e6
    if not 0 <= seconds <= MAX_ANNOUNCE_S:
        raise InvalidArgument("announce", f"expected 0 to {MAX_ANNOUNCE_S} seconds, got {seconds}")
    return seconds


def token_budgets(metadata: Metadata) -> tuple[float, float]:
    """Return the budgets of the first token and of each further one, in seconds.

    A budget is `inf` unless the metadata sets it. Raises `InvalidArgument` that names the key of a
    malformed one.
    """
    budgets = {TTFT_BUDGET_KEY: math.inf, TPOT_BUDGET_KEY: math.inf}
    for key, value in metadata:
        if key in budgets:
            budgets[key] = min(budgets[key], seconds_from_ms(key, value))
    return budgets[TTFT_BUDGET_KEY], budgets[TPOT_BUDGET_KEY]


def _parse_held_seconds(value: str | bytes) -> float:
    text = _decode(value)
    if not (text.isdecimal() and len(text) <= 20) or int(text) > MAX_BUDGET_US:
        raise InvalidArgument(
            HELD_KEY, f"expected 0 to {MAX_BUDGET_US} microseconds, got {text[:80]!r}"
        )
    return int(text) / 1e6


def _decode(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
