"""Answers that change their stitch, compared with answers that keep it, under equal arrivals."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace

import numpy as np

from ladderstitch.errors import RequestError
from ladderstitch.scheduling.generation import GenerationRequest, TokenChunk
from ladderstitch.scheduling.profiles import QualityTable
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.messages import LogitsMode, Step, StepOutput
from ladderstitch.text.scheduler.scheduler import TextScheduler
from ladderstitch.text.scheduler.step_times import StepTimes
from ladderstitch.text.switches import SwitchTable
from ladderstitch.text.tokenizer import TextTokenizer
from ladderstitch_loadtest.benchmarks.elastic_plans import LONG_TOKENS, Arrival, Stitches

SETTINGS = {
    "kept": SchedulerSettings(change_variants=False),
    "changed": SchedulerSettings(change_variants=True),
}
"""Whether the stitch of an answer is fixed when it starts."""
BOOTSTRAPS = 2000


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the caller of one request got; quality is the mean over its tokens."""

    met: bool
    quality: float
    changes: int


class SimulatedRanks:
    """A group whose steps take the times that the scheduler expects, and compute nothing."""

    def __init__(self, rank_config: RankConfig, times: StepTimes, seed: int, noise: float) -> None:
        self.rank_config, self._times = rank_config, times
        self._random, self._noise = np.random.default_rng(seed), noise

    async def run(self, step: Step) -> StepOutput:
        """Wait for the duration of a step, which varies at random, and return token 1 for all."""
        cached = sum(part.start for part in step.inputs)
        seconds = self._times.expected(step.path, max(1, step.num_tokens), len(step.inputs), cached)
        for translation in step.translations:
            source, target = (
                self.rank_config.path_routes[path]
                for path in (translation.source, translation.target)
            )
            planes = len(self.rank_config.family.missing_planes(source, target))
            seconds += self._times.translation_s(len(translation.tokens), planes)
        noise = math.exp(self._noise * self._random.standard_normal())
        await asyncio.sleep(seconds * noise)
        count = sum(part.logits_mode == LogitsMode.BEST for part in step.inputs)
        return StepOutput(np.ones(count, np.int64), np.zeros((0, 2), np.float32))

    async def wait_ready(self) -> None:
        """Return at once."""


async def run_plan(scheduler: TextScheduler, plan: Sequence[Arrival]) -> list[Outcome]:
    """Send the requests of a plan and return the outcomes of those with a budget."""
    start = time.monotonic() + 0.2
    outcomes = await asyncio.gather(*(_send(scheduler, arrival, start) for arrival in plan))
    return [o for o, a in zip(outcomes, plan, strict=True) if a.request.budget.is_set]


async def _send(scheduler: TextScheduler, arrival: Arrival, start: float) -> Outcome:
    due = start + arrival.due_s
    await asyncio.sleep(max(0.0, due - time.monotonic()))
    try:
        last = await _last_chunk(scheduler, replace(arrival.request, arrival=due))
    except RequestError:
        return Outcome(met=False, quality=0.0, changes=0)
    assert last.usage is not None, "the last chunk has the usage"
    quality = last.answer.quality.value if last.answer.quality else 0.0
    return Outcome(bool(last.usage.met), quality, len(last.answer.spans) - 1)


async def _last_chunk(scheduler: TextScheduler, request: GenerationRequest) -> TokenChunk:
    last = None
    async with aclosing(scheduler.generate(request)) as chunks:
        async for chunk in chunks:
            last = chunk
    assert last is not None, "a complete answer has a last chunk"
    return last


@dataclass(frozen=True, slots=True)
class Difference:
    """Changed minus kept, the mean of paired runs, with its 95 % interval (bootstrap)."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]], seed: int = 0) -> Difference:
        """Return the difference of (kept, changed) pairs."""
        values = np.array([changed - kept for kept, changed in pairs])
        random = np.random.default_rng(seed)
        means = random.choice(values, (BOOTSTRAPS, len(values))).mean(axis=1)
        low, high = np.quantile(means, (0.025, 0.975))
        return cls(round(float(values.mean()), 4), round(float(low), 4), round(float(high), 4))


def summarise(rounds: Sequence[dict[str, list[Outcome]]]) -> dict[str, object]:
    """Return attainment and quality of both ways, and their differences over the paired rounds.

    Quality is the mean over the answers that met their budgets: a late answer is worth nothing.
    """

    def attainment(outcomes: Sequence[Outcome]) -> float:
        return sum(o.met for o in outcomes) / len(outcomes)

    def quality(outcomes: Sequence[Outcome]) -> float:
        met = [o.quality for o in outcomes if o.met]
        return sum(met) / max(1, len(met))

    def effective(outcomes: Sequence[Outcome]) -> float:
        return sum(o.quality for o in outcomes if o.met) / len(outcomes)

    figures: dict[str, object] = {"rounds": len(rounds)}
    for name in SETTINGS:
        together = [outcome for found in rounds for outcome in found[name]]
        figures[name] = {
            "answers": len(together),
            "attainment": round(attainment(together), 4),
            "quality_of_met": round(quality(together), 4),
            "effective_quality": round(effective(together), 4),
            "changes_per_answer": round(sum(o.changes for o in together) / len(together), 2),
        }
    for label, measure in (
        ("attainment", attainment),
        ("quality_of_met", quality),
        ("effective_quality", effective),
    ):
        pairs = [(measure(found["kept"]), measure(found["changed"])) for found in rounds]
        figures[f"{label}_difference"] = asdict(Difference.of(pairs))
    return figures


@dataclass(frozen=True, slots=True)
class Workload:
    """What a run needs of a model: its prompts and its scheduler."""

    prompts: Sequence[int]
    make_scheduler: Callable[[], TextScheduler]

    async def stitches(self) -> Stitches:
        """Return the seconds per token of answers alone on the fastest and on the best stitch."""
        scheduler, seconds = self.make_scheduler(), []
        fastest, *_, best = scheduler.candidates.frontier
        for variant in (fastest, best):
            request = GenerationRequest(
                tuple(self.prompts[:64]), time.monotonic(), LONG_TOKENS, variant=variant
            )
            last = await _last_chunk(scheduler, request)
            assert last.usage is not None, "the last chunk has the usage"
            seconds.append(last.usage.mean_token_s)
        await scheduler.close()
        return Stitches(best, *seconds)

    async def run(self, plan: Sequence[Arrival], settings: SchedulerSettings) -> list[Outcome]:
        """Return the outcomes of a plan under some settings, on a scheduler of its own."""
        scheduler = self.make_scheduler()
        scheduler.apply_settings(settings)
        outcomes = await run_plan(scheduler, plan)
        await scheduler.close()
        return outcomes


def simulated_scheduler(
    config: RankConfig,
    times: StepTimes,
    tokenizer: TextTokenizer,
    quality: QualityTable,
    switches: SwitchTable | None,
    seed: int,
    noise: float = 0.1,
) -> TextScheduler:
    """Return a scheduler whose ranks are simulated; to be used within `run_simulated`."""
    ranks = SimulatedRanks(config, times, seed, noise)
    scheduler = TextScheduler(
        ranks,  # type: ignore[arg-type] # what a scheduler uses of a group
        tokenizer,
        (),
        quality,
        switches=switches,
    )
    scheduler.times = times.copy()
    scheduler.apply_settings(SchedulerSettings())
    return scheduler
