"""Open-loop load of prompts with mixed token budgets: what continuous batching is worth.

The same arrivals, prompts and budgets go to one answer after another, to static batches and to
continuous batching on the same ranks, at rising rates, in turns.
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
from ladderstitch.scheduling.requests import GenerationRequest, TokenBudget
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
"""A third of the requests each."""
PROMPT_TOKENS = (16, 64, 160)
ANSWER_TOKENS = (16, 32, 64)
WANTED = 0.95
"""Attainment at which rates are compared."""
GIVE_UP = 0.6
"""Attainment below which a variant is not tried at higher rates."""


class StaticQueue(SequenceQueue):
    """Static batching, for comparison: nobody joins until all answers of a batch are complete."""

    def admit(self, times: StepTimes, now: float) -> None:
        if not self.active:
            super().admit(times, now)


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    max_sequences: int
    make_roster: Callable[[BlockManager, int], SequenceQueue] = SequenceQueue


VARIANTS = (
    Variant("one after another", 1),
    Variant("static batches of 16", 16, StaticQueue),
    Variant("continuous, 16", 16),
)


@dataclass(frozen=True, slots=True)
class BatchingRow:
    """One variant at one rate. A request whose answer missed a budget, or never came, is missed."""

    variant: str
    offered_per_s: float
    offered: int
    attainment: float
    tokens_per_s: float
    first_token_p50_s: float
    first_token_p95_s: float
    refused: int


@dataclass(frozen=True, slots=True)
class Arrival:
    due_s: float
    request: GenerationRequest


def arrivals(prompts: Sequence[int], rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Poisson arrivals; prompts are cut from a text's tokens, no two alike."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, round(2 * rate * seconds) + 8))
    made = []
    for due_s in times[times < seconds]:
        length = int(rng.choice(PROMPT_TOKENS))
        at = int(rng.integers(0, len(prompts) - length))
        request = GenerationRequest(
            tokens=tuple(prompts[at : at + length]),
            arrival=0.0,
            max_tokens=int(rng.choice(ANSWER_TOKENS)),
            budget=BUDGETS[rng.integers(len(BUDGETS))],
        )
        made.append(Arrival(float(due_s), request))
    return made


@dataclass(slots=True)
class Ending:
    first_s: float = float("nan")
    tokens: int = 0
    met: bool = False
    refused: bool = False


async def _answer(generator: TextScheduler, arrival: Arrival, start: float) -> Ending:
    due = start + arrival.due_s
    await asyncio.sleep(max(0.0, due - time.monotonic()))
    request, end = replace(arrival.request, arrival=due), Ending()
    try:
        async with aclosing(generator.generate(request)) as pieces:
            async for piece in pieces:
                now = time.monotonic()
                end.tokens += 1
                if piece.index == 0:
                    end.first_s = now - due
                if piece.finish is not None:
                    mean_s = (now - due - end.first_s) / max(1, piece.index)
                    budget = request.budget
                    end.met = end.first_s <= budget.first_token_s and mean_s <= budget.per_token_s
    except RequestError:
        end.refused = True
    return end


async def offer(
    generator: TextScheduler, variant: str, plan: Sequence[Arrival], rate: float, seconds: float
) -> BatchingRow:
    """Run a plan; answers that are not complete twice its length after its start are cut off."""
    start = time.monotonic() + 0.2
    tasks = [asyncio.create_task(_answer(generator, one, start)) for one in plan]
    _, late = await asyncio.wait(tasks, timeout=2 * seconds)
    took = time.monotonic() - start
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    ends = [task.result() for task in tasks if not task.cancelled()]
    firsts = np.array([end.first_s for end in ends if end.tokens] or [float("nan")])
    return BatchingRow(
        variant=variant,
        offered_per_s=round(rate, 2),
        offered=len(plan),
        attainment=round(sum(end.met for end in ends) / max(1, len(plan)), 4),
        tokens_per_s=round(sum(end.tokens for end in ends) / took, 1),
        first_token_p50_s=round(float(np.quantile(firsts, 0.5)), 3),
        first_token_p95_s=round(float(np.quantile(firsts, 0.95)), 3),
        refused=sum(end.refused for end in ends),
    )


async def compare_batching(
    bundle: TextBundle,
    text: str,
    rates: Sequence[float],
    seconds: float,
    dtype: str,
    advance: Callable[[BatchingRow], None],
) -> dict[str, object]:
    """Every variant at every rate until it falls below `GIVE_UP`."""
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
        trying = list(VARIANTS)
        for number, rate in enumerate(rates):
            plan = arrivals(prompts, rate, seconds, seed=number)
            for variant in tuple(trying):
                generator = TextScheduler(
                    group,
                    bundle.tokenizer(),
                    (),
                    bundle.quality,
                    (),
                    variant.max_sequences,
                    make_roster=variant.make_roster,
                )
                await generator.measure()
                row = await offer(generator, variant.name, plan, rate, seconds)
                await generator.close()
                rows.append(row)
                advance(row)
                if row.attainment < GIVE_UP:
                    trying.remove(variant)
    finally:
        await group.close()
    return {"dtype": dtype, "rows": [asdict(row) for row in rows]} | sustained(rows)


def sustained(rows: Sequence[BatchingRow]) -> dict[str, object]:
    """The highest rate that each variant answers with the attainment wanted, and its tokens/s."""
    best = {
        variant.name: max(
            (row for row in rows if row.variant == variant.name and row.attainment >= WANTED),
            key=lambda row: row.offered_per_s,
            default=None,
        )
        for variant in VARIANTS
    }
    told = {
        name: {"offered_per_s": row.offered_per_s, "tokens_per_s": row.tokens_per_s}
        if row
        else None
        for name, row in best.items()
    }
    return {"sustained": told, "continuous_over_one_after_another": _ahead(rows)}


def _ahead(rows: Sequence[BatchingRow]) -> float | None:
    """Tokens/s of continuous batching over one answer after another at equal attainment.

    Each rate that the latter was offered is held against the most that the former makes with at
    least the same attainment; the smallest of these ratios.
    """
    alone = [row for row in rows if row.variant == VARIANTS[0].name]
    shared = [row for row in rows if row.variant == VARIANTS[-1].name]
    ratios = [
        max((s.tokens_per_s for s in shared if s.attainment >= one.attainment), default=0.0)
        / one.tokens_per_s
        for one in alone
    ]
    return round(min(ratios), 2) if ratios else None


def plot(found: dict[str, object], path: Path) -> None:
    """Attainment and tokens/s over the offered rate, a line a variant."""
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
    panels[0].axhline(WANTED, color="grey", linestyle=":")
    panels[0].set_ylabel("attainment")
    panels[1].set_ylabel("tokens/s")
    for panel in panels:
        panel.set_xlabel("offered requests/s")
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=110)
