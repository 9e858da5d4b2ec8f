"""Where a request's deadlines come from: each is optional, the earliest counts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from ladderstitch.api.status import Context
from ladderstitch.errors import InvalidArgument
from ladderstitch.scheduling.requests import Deadlines

MAX_BUDGET_US = 3_600_000_000
"""An hour: whoever means more may as well name no budget."""

METADATA_KEY = "x-latency-budget-ms"
HELD_KEY = "x-ladderstitch-held-us"
"""How long a gateway had the call before: it arrived there."""
FIRST_TOKEN_KEY = "x-llm-d-slo-ttft-ms"
TOKEN_KEY = "x-llm-d-slo-tpot-ms"


Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]
"""Of a call, as gRPC gives it."""


@dataclass(frozen=True, slots=True)
class LatencyBudget:
    """Seconds from arrival; `hard` ones are limits as well as targets."""

    seconds: float
    source: str
    hard: bool = False


def arrival_and_deadline(context: Context) -> tuple[float, float | None]:
    """When a call arrived (`time.monotonic`), and the seconds from then to its gRPC deadline.

    A gateway's waiting for a replica counts. Raises `InvalidArgument` if it is malformed.
    """
    now, remaining_s = time.monotonic(), context.time_remaining()
    held_s = 0.0
    for key, value in context.invocation_metadata():
        if key == HELD_KEY:
            held_s = _held(value)
    return now - held_s, None if remaining_s is None else remaining_s + held_s


def resolve_deadlines(arrival: float, deadlines: Iterable[LatencyBudget]) -> Deadlines:
    """Target = the earliest of all, limit = the earliest of the hard ones."""
    target = limit = math.inf
    target_source = limit_source = "none"
    for deadline in deadlines:
        if deadline.seconds < target:
            target, target_source = deadline.seconds, deadline.source
        if deadline.hard and deadline.seconds < limit:
            limit, limit_source = deadline.seconds, deadline.source
    return Deadlines(arrival + target, arrival + limit, target_source, limit_source)


def call_deadlines(
    remaining_s: float | None, metadata: Metadata, default_us: int | None
) -> list[LatencyBudget]:
    """The deadlines that every call may carry: gRPC's own, metadata, the model's default."""
    deadlines = []
    if remaining_s is not None and remaining_s < MAX_BUDGET_US / 1e6:
        deadlines.append(LatencyBudget(remaining_s, "grpc_deadline", hard=True))
    for key, value in metadata:
        if key == METADATA_KEY:
            deadlines.append(LatencyBudget(seconds_from_ms(key, value), "metadata"))
    if default_us is not None:
        deadlines.append(LatencyBudget(default_us / 1e6, "model_default"))
    return deadlines


def seconds_from_us(field: str, value: int) -> float:
    """Seconds of a budget given in microseconds; raises `InvalidArgument` outside 1 us .. 1 h."""
    if not 1 <= value <= MAX_BUDGET_US:
        raise InvalidArgument(field, f"expected 1 to {MAX_BUDGET_US} microseconds, got {value}")
    return value / 1e6


def seconds_from_ms(key: str, value: str | bytes) -> float:
    """Seconds of a budget given as metadata; raises `InvalidArgument` that names its key."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.001 <= number <= MAX_BUDGET_US / 1e3:  # NaN fails too
        raise InvalidArgument(
            key, f"expected 0.001 to {MAX_BUDGET_US // 1000} milliseconds, got {text!r}"
        )
    return number / 1e3


def token_budgets(metadata: Metadata) -> tuple[float, float]:
    """Seconds wanted to the first token and for each further one; `inf` is no wish.

    Raises `InvalidArgument` that names the key.
    """
    wanted = {FIRST_TOKEN_KEY: math.inf, TOKEN_KEY: math.inf}
    for key, value in metadata:
        if key in wanted:
            wanted[key] = min(wanted[key], seconds_from_ms(key, value))
    return wanted[FIRST_TOKEN_KEY], wanted[TOKEN_KEY]


def _held(value: str | bytes) -> float:
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    if not text.isdecimal() or int(text) > MAX_BUDGET_US:
        raise InvalidArgument(
            HELD_KEY, f"expected 0 to {MAX_BUDGET_US} microseconds, got {text[:80]!r}"
        )
    return int(text) / 1e6
