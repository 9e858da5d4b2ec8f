"""Arrivals of answers whose stitch may change.

In `mixed`, answers of several lengths and budgets arrive at a varying rate. In `bursts`, long
answers begin on an idle server, and a burst of others with budgets arrives in the middle of each.
In `tightening`, requests arrive there that have no budget and name the best stitch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ladderstitch.scheduling.generation import NO_BUDGET, GenerationRequest, TokenBudget

Scenario = Literal["mixed", "bursts", "tightening"]
LONG_TOKENS = 256
"""Tokens of a long answer."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request, and the second of the run at which it is sent."""

    due_s: float
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class Stitches:
    """The best stitch, and the seconds per token of an answer alone on it and on the fastest."""

    best: int
    fastest_s: float
    best_s: float


def mixed_plan(
    prompts: Sequence[int], stitches: Stitches, seconds: float, seed: int
) -> list[Arrival]:
    """Return answers with budgets between the fastest and 4 times the best stitch's seconds.

    The rate alternates between a half and three times of what the best stitch serves one by one,
    for the time of 20 answers each.
    """
    fast_s, best_s = stitches.fastest_s, stitches.best_s
    random, plan, now = np.random.default_rng(seed), list[Arrival](), 0.0
    mean_tokens, spread = 96, (32, 64, 192)
    while now < seconds:
        is_busy = int(now / (20 * mean_tokens * best_s)) % 2 == 1
        rate = (3.0 if is_busy else 0.5) / (best_s * mean_tokens)
        now += random.exponential(1 / rate)
        budget = TokenBudget(
            first_token_s=100 * best_s,
            per_token_s=float(np.exp(random.uniform(np.log(2 * fast_s), np.log(4 * best_s)))),
        )
        plan.append(_arrival(now, prompts, 64, int(random.choice(spread)), budget, random))
    return plan


def bursts_plan(
    prompts: Sequence[int], stitches: Stitches, seconds: float, seed: int
) -> list[Arrival]:
    """Return long answers whose budget the best stitch meets alone, each with a burst midway.

    The budget is 1.2 to 1.5 times what they take alone, and 4 to 8 others arrive, with budgets of
    their own.
    """
    random, plan = np.random.default_rng(seed), list[Arrival]()
    best_s = stitches.best_s
    for answer in _long_answers(prompts, best_s, seconds, random):
        plan.append(answer)
        for _ in range(random.integers(4, 9)):
            due_s = answer.due_s + (0.4 + 0.02 * random.random()) * LONG_TOKENS * best_s
            urgent = TokenBudget(per_token_s=4 * best_s)
            plan.append(_arrival(due_s, prompts, 64, 64, urgent, random))
    return sorted(plan, key=_due)


def tightening_plan(
    prompts: Sequence[int], stitches: Stitches, seconds: float, seed: int
) -> list[Arrival]:
    """Return long answers whose budget the best stitch meets alone, and requests without one.

    From a third of an answer on, 8 to 12 requests without a budget arrive that name the best
    stitch. On that stitch, they share all steps of the answer, which become longer.
    """
    random, plan = np.random.default_rng(seed), list[Arrival]()
    alone_s = LONG_TOKENS * stitches.best_s
    for answer in _long_answers(prompts, stitches.best_s, seconds, random):
        plan.append(answer)
        for _ in range(random.integers(8, 13)):
            due_s = answer.due_s + random.uniform(0.3, 0.4) * alone_s
            plan.append(_arrival(due_s, prompts, 64, 128, NO_BUDGET, random, variant=stitches.best))
    return sorted(plan, key=_due)


def _due(arrival: Arrival) -> float:
    return arrival.due_s


def _long_answers(
    prompts: Sequence[int], best_s: float, seconds: float, random: np.random.Generator
) -> list[Arrival]:
    """Return long answers one after the other, with 1.2 to 1.5 times their undisturbed seconds."""
    answers = []
    for number in range(max(2, round(seconds / (3.5 * best_s * LONG_TOKENS)))):
        budget = TokenBudget(answer_s=random.uniform(1.2, 1.5) * best_s * LONG_TOKENS)
        due_s = 3.5 * best_s * LONG_TOKENS * number
        answers.append(_arrival(due_s, prompts, 64, LONG_TOKENS, budget, random))
    return answers


def _arrival(
    due_s: float,
    prompts: Sequence[int],
    prompt_tokens: int,
    max_tokens: int,
    budget: TokenBudget,
    random: np.random.Generator,
    variant: int | None = None,
) -> Arrival:
    at = int(random.integers(0, len(prompts) - prompt_tokens))
    request = GenerationRequest(
        tokens=tuple(prompts[at : at + prompt_tokens]),
        arrival=0.0,
        max_tokens=max_tokens,
        budget=budget,
        variant=variant,
    )
    return Arrival(due_s, request)


PLANS: dict[Scenario, Callable[[Sequence[int], Stitches, float, int], list[Arrival]]] = {
    "mixed": mixed_plan,
    "bursts": bursts_plan,
    "tightening": tightening_plan,
}
"""The arrivals of a scenario, of prompts, stitches, seconds of the run, and a seed."""
