"""Answers that change their stitch, compared with answers that keep it, under equal arrivals.

Two scenarios run in the simulator and on real ranks. In `mixed`, answers of several lengths and
budgets arrive at a varying rate. In `tightening`, long answers begin on an idle server, and a burst
of others arrives in the middle of each.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from ladderstitch.errors import RequestError
from ladderstitch.scheduling.profiles import QualityTable
from ladderstitch.scheduling.requests import GenerationRequest, TokenBudget
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.messages import LogitsMode, Step, StepOutput
from ladderstitch.text.scheduler.scheduler import TextScheduler
from ladderstitch.text.scheduler.step_times import StepTimes
from ladderstitch.text.switches import SwitchTable
from ladderstitch.text.tokenizer import TextTokenizer

Scenario = Literal["mixed", "tightening"]
SETTINGS = {
    "kept": SchedulerSettings(change_variants=False),
    "changed": SchedulerSettings(change_variants=True),
}
"""Whether the stitch of an answer is fixed when it starts."""
BOOTSTRAPS = 2000


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request, the second of the run at which it is sent, and whether its result counts."""

    due_s: float
    request: GenerationRequest
    counts: bool = True


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
        await asyncio.sleep(seconds * math.exp(self._noise * self._random.standard_normal()))
        count = sum(part.logits_mode == LogitsMode.BEST for part in step.inputs)
        return StepOutput(np.ones(count, np.int64), np.zeros((0, 2), np.float32))

    async def wait_ready(self) -> None:
        """Return at once."""


def mixed_arrivals(
    prompts: Sequence[int], token_s: tuple[float, float], seconds: float, seed: int
) -> list[Arrival]:
    """Return answers with budgets between the fastest and 4 times the best stitch's `token_s`.

    The rate alternates between a half and six times of what the best stitch serves one by one, for
    the time of 20 answers each.
    """
    fast_s, best_s = token_s
    random, plan, now = np.random.default_rng(seed), list[Arrival](), 0.0
    mean_tokens, spread = 96, (32, 64, 192)
    while now < seconds:
        is_busy = int(now / (20 * mean_tokens * best_s)) % 2 == 1
        rate = (6.0 if is_busy else 0.5) / (best_s * mean_tokens)
        now += random.exponential(1 / rate)
        budget = TokenBudget(
            first_token_s=100 * best_s,
            per_token_s=float(np.exp(random.uniform(np.log(2 * fast_s), np.log(4 * best_s)))),
        )
        plan.append(_arrival(now, prompts, 64, int(random.choice(spread)), budget, random))
    return plan


def tightening_arrivals(
    prompts: Sequence[int], token_s: tuple[float, float], count: int, seed: int
) -> list[Arrival]:
    """Return long answers whose budget the best stitch meets alone, each with a burst midway.

    The budget is 1.2 to 1.5 times what they take alone, and 4 to 8 others arrive. These have
    budgets of their own, and do not count.
    """
    _, best_s = token_s
    random, plan, now = np.random.default_rng(seed), list[Arrival](), 0.0
    tokens = 256
    for _ in range(count):
        budget = TokenBudget(answer_s=random.uniform(1.2, 1.5) * best_s * tokens)
        plan.append(_arrival(now, prompts, 64, tokens, budget, random))
        for _ in range(random.integers(4, 9)):
            due_s = now + (0.4 + 0.02 * random.random()) * tokens * best_s
            urgent = TokenBudget(per_token_s=4 * best_s)
            burst = _arrival(due_s, prompts, 64, 64, urgent, random)
            plan.append(replace(burst, counts=False))
        now += 3.5 * best_s * tokens
    return sorted(plan, key=lambda arrival: arrival.due_s)


def _arrival(
    due_s: float,
    prompts: Sequence[int],
    prompt_tokens: int,
    max_tokens: int,
    budget: TokenBudget,
    random: np.random.Generator,
) -> Arrival:
    at = int(random.integers(0, len(prompts) - prompt_tokens))
    request = GenerationRequest(
        tokens=tuple(prompts[at : at + prompt_tokens]),
        arrival=0.0,
        max_tokens=max_tokens,
        budget=budget,
    )
    return Arrival(due_s, request)


async def run_plan(scheduler: TextScheduler, plan: Sequence[Arrival]) -> list[Outcome]:
    """Send the requests of a plan and return the outcomes of those that count."""
    start = time.monotonic() + 0.2
    tasks = [asyncio.create_task(_send(scheduler, arrival, start)) for arrival in plan]
    outcomes = await asyncio.gather(*tasks)
    return [o for o, arrival in zip(outcomes, plan, strict=True) if arrival.counts]


async def _send(scheduler: TextScheduler, arrival: Arrival, start: float) -> Outcome:
    due = start + arrival.due_s
    await asyncio.sleep(max(0.0, due - time.monotonic()))
    request = replace(arrival.request, arrival=due)
    last = None
    try:
        async with aclosing(scheduler.generate(request)) as chunks:
            async for chunk in chunks:
                last = chunk
    except RequestError:
        return Outcome(met=False, quality=0.0, changes=0)
    assert last is not None, "a complete answer has a last chunk"
    assert last.usage is not None, "the last chunk has the usage"
    quality = last.answer.quality.value if last.answer.quality else 0.0
    return Outcome(bool(last.usage.met), quality, len(last.answer.spans) - 1)


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
    """What a run needs of a model: its prompts, the times of its stitches, its scheduler."""

    prompts: Sequence[int]
    times: StepTimes
    make_scheduler: Callable[[], TextScheduler]

    def plan(self, scenario: Scenario, seed: int, seconds: float) -> list[Arrival]:
        """Return the arrivals of a scenario, of about `seconds`."""
        frontier = self.make_scheduler().candidates.frontier
        token_s = (self.times.expected(frontier[0], 1), self.times.expected(frontier[-1], 1))
        if scenario == "mixed":
            return mixed_arrivals(self.prompts, token_s, seconds, seed)
        count = max(2, round(seconds / (3.5 * token_s[1] * 256)))
        return tightening_arrivals(self.prompts, token_s, count, seed)

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
