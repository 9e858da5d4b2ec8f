"""Comparison of batching variants under open-loop load of prompts with mixed token budgets.

The variants are one answer after another, static batches and continuous batching. They get the
same arrivals, prompts and budgets on the same ranks, at rising rates, in turns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ladderstitch.errors import RequestError
from ladderstitch.scheduling.generation import GenerationRequest, TokenBudget
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.scheduler.block_manager import BlockManager
from ladderstitch.text.scheduler.queue import SequenceQueue
from ladderstitch.text.scheduler.scheduler import TextScheduler
from ladderstitch.text.scheduler.step_times import StepTimes

BUDGETS = (
    TokenBudget(first_token_s=0.5, per_token_s=0.08),
    TokenBudget(first_token_s=1.0, per_token_s=0.15),
    TokenBudget(first_token_s=4.0, per_token_s=0.3),
)
"""Each budget is drawn for a third of the requests."""
PROMPT_TOKENS = (16, 64, 160)
ANSWER_TOKENS = (16, 32, 64)
TARGET_ATTAINMENT = 0.95
"""Attainment at which rates are compared."""
MIN_ATTAINMENT = 0.6
"""Attainment below which a variant is not measured at higher rates."""


class StaticQueue(SequenceQueue):
    """A queue for static batching: it admits a batch when all answers of the last are complete."""

    def admit(self, times: StepTimes, now: float) -> None:
        """Activate waiting sequences, but only if none is active."""
        if not self.active:
            super().admit(times, now)


@dataclass(frozen=True, slots=True)
class BatchingVariant:
    """One way to batch the same requests."""

    name: str
    max_sequences: int
    make_queue: Callable[[BlockManager, int], SequenceQueue] = SequenceQueue


VARIANTS = (
    BatchingVariant("one after another", 1),
    BatchingVariant("static batches of 16", 16, StaticQueue),
    BatchingVariant("continuous, 16", 16),
)


@dataclass(frozen=True, slots=True)
class BatchingRow:
    """The result of one variant at one rate.

    `attainment` is the share of requests whose answer was complete and met its budgets; `rejected`
    is the number of requests that ended with an error.
    """

    variant: str
    offered_per_s: float
    offered: int
    attainment: float
    tokens_per_s: float
    first_token_p50_s: float
    first_token_p95_s: float
    rejected: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request and the second of the run at which it is sent."""

    due_s: float
    request: GenerationRequest


def arrivals(prompts: Sequence[int], rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Return Poisson arrivals, in order; their prompts are random parts of the tokens `prompts`."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, round(2 * rate * seconds) + 8))
    plan = []
    for due_s in times[times < seconds]:
        length = int(rng.choice(PROMPT_TOKENS))
        at = int(rng.integers(0, len(prompts) - length))
        request = GenerationRequest(
            tokens=tuple(prompts[at : at + length]),
            arrival=0.0,
            max_tokens=int(rng.choice(ANSWER_TOKENS)),
            budget=BUDGETS[rng.integers(len(BUDGETS))],
        )
        plan.append(Arrival(float(due_s), request))
    return plan


@dataclass(slots=True)
class Outcome:
    """What the caller of one request got."""

    first_s: float = float("nan")
    tokens: int = 0
    met: bool = False
    rejected: bool = False


async def _send(scheduler: TextScheduler, arrival: Arrival, start: float) -> Outcome:
    due = start + arrival.due_s
    await asyncio.sleep(max(0.0, due - time.monotonic()))
    request, outcome = replace(arrival.request, arrival=due), Outcome()
    try:
        async with aclosing(scheduler.generate(request)) as chunks:
            async for chunk in chunks:
                now = time.monotonic()
                outcome.tokens += 1
                if chunk.index == 0:
                    outcome.first_s = now - due
                if chunk.finish is not None:
                    mean_s = (now - due - outcome.first_s) / max(1, chunk.index)
                    budget = request.budget
                    outcome.met = (
                        outcome.first_s <= budget.first_token_s and mean_s <= budget.per_token_s
                    )
    except RequestError:
        outcome.rejected = True
    return outcome


async def run_plan(
    scheduler: TextScheduler, variant: str, plan: Sequence[Arrival], rate: float, seconds: float
) -> BatchingRow:
    """Send the requests of a plan and return the result.

    Answers that are not complete after twice the length of the plan are cancelled.
    """
    start = time.monotonic() + 0.2
    tasks = [asyncio.create_task(_send(scheduler, arrival, start)) for arrival in plan]
    _, late = await asyncio.wait(tasks, timeout=2 * seconds)
    took = time.monotonic() - start
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    outcomes = [task.result() for task in tasks if not task.cancelled()]
    return _summarise(variant, outcomes, len(plan), rate, took)


def _summarise(
    variant: str, outcomes: Sequence[Outcome], offered: int, rate: float, took_s: float
) -> BatchingRow:
    firsts = np.array([o.first_s for o in outcomes if o.tokens] or [float("nan")])
    return BatchingRow(
        variant=variant,
        offered_per_s=round(rate, 2),
        offered=offered,
        attainment=round(sum(o.met for o in outcomes) / max(1, offered), 4),
        tokens_per_s=round(sum(o.tokens for o in outcomes) / took_s, 1),
        first_token_p50_s=round(float(np.quantile(firsts, 0.5)), 3),
        first_token_p95_s=round(float(np.quantile(firsts, 0.95)), 3),
        rejected=sum(o.rejected for o in outcomes),
    )


async def compare_batching(
    bundle: TextBundle,
    text: str,
    rates: Sequence[float],
    seconds: float,
    dtype: str,
    on_row: Callable[[BatchingRow], None],
) -> dict[str, object]:
    """Measure every variant at every rate until it falls below `MIN_ATTAINMENT`.

    `on_row` is called with each result as soon as it is known.
    """
    prompts = bundle.tokenizer().encode(text[:400_000])
    group = RankGroup(
        RankConfig.of(
            bundle,
            dtype=dtype,
            max_model_len=min(512, bundle.manifest.config.max_positions),
            kv_cache_tokens=8192,
            max_batched_tokens=128,
        )
    )
    rows: list[BatchingRow] = []
    try:
        await group.start()
        remaining = list(VARIANTS)
        for number, rate in enumerate(rates):
            plan = arrivals(prompts, rate, seconds, seed=number)
            for variant in tuple(remaining):
                scheduler = _make_scheduler(group, bundle, variant)
                await scheduler.measure()
                row = await run_plan(scheduler, variant.name, plan, rate, seconds)
                await scheduler.close()
                rows.append(row)
                on_row(row)
                if row.attainment < MIN_ATTAINMENT:
                    remaining.remove(variant)
    finally:
        await group.close()
    return {"dtype": dtype, "rows": [asdict(row) for row in rows]} | sustained(rows)


def _make_scheduler(
    group: RankGroup, bundle: TextBundle, variant: BatchingVariant
) -> TextScheduler:
    return TextScheduler(
        group,
        bundle.tokenizer(),
        (),
        bundle.quality,
        (),
        variant.max_sequences,
        make_queue=variant.make_queue,
    )


def sustained(rows: Sequence[BatchingRow]) -> dict[str, object]:
    """Return the highest rate at which each variant has the target attainment, and its tokens/s."""
    best = {
        variant.name: max(
            (r for r in rows if r.variant == variant.name and r.attainment >= TARGET_ATTAINMENT),
            key=lambda row: row.offered_per_s,
            default=None,
        )
        for variant in VARIANTS
    }
    summary = {
        name: row and {"offered_per_s": row.offered_per_s, "tokens_per_s": row.tokens_per_s}
        for name, row in best.items()
    }
    return {"sustained": summary, "continuous_over_one_after_another": _speedup(rows)}


def _speedup(rows: Sequence[BatchingRow]) -> float | None:
    """Return tokens/s of continuous batching over one answer after another at equal attainment.

    Each result of one answer after another is compared with the highest tokens/s that continuous
    batching has with at least the same attainment. The smallest of these ratios counts.
    """
    sequential = [row for row in rows if row.variant == VARIANTS[0].name]
    continuous = [row for row in rows if row.variant == VARIANTS[-1].name]
    ratios = [
        max((c.tokens_per_s for c in continuous if c.attainment >= row.attainment), default=0.0)
        / row.tokens_per_s
        for row in sequential
    ]
    return round(min(ratios), 2) if ratios else None


def plot(found: dict[str, object], path: Path) -> None:
    """Plot attainment and tokens/s over the offered rate, one line per variant, to a file."""
    from matplotlib.figure import Figure

    rows = found["rows"]
    assert isinstance(rows, list)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for variant in VARIANTS:
        mine = [row for row in rows if row["variant"] == variant.name]
        x = [row["offered_per_s"] for row in mine]
        panels[0].plot(x, [row["attainment"] for row in mine], marker="o", label=variant.name)
        panels[1].plot(x, [row["tokens_per_s"] for row in mine], marker="o")
    panels[0].axhline(TARGET_ATTAINMENT, color="grey", linestyle=":")
    panels[0].set_ylabel("attainment")
    panels[1].set_ylabel("tokens/s")
    for panel in panels:
        panel.set_xlabel("offered requests/s")
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=110)
