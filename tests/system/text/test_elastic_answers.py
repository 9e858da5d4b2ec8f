"""Tests of answers whose stitch changes between two tokens, on real ranks.

The scheduler plans with fixed times, so that the speed of the machine does not matter. Expected
tokens come from a definition in float64 that computes token by token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
import torch

from ladderstitch.errors import InternalError
from ladderstitch.scheduling.generation import GenerationRequest, TokenBudget, TokenChunk
from ladderstitch.scheduling.settings import CacheMode, SchedulerSettings
from ladderstitch.telemetry.text_observer import NullObserver
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.manifest import TextVariant
from ladderstitch.text.messages import LogitsMode, Step, StepOutput
from ladderstitch.text.model.residual import ResidualScheme
from ladderstitch.text.scheduler.scheduler import TextScheduler
from ladderstitch.text.switches import Penalty, SwitchTable
from tests.support.elastic_models import Definition, paths, random_family, write_elastic
from tests.support.fixed_times import FixedTimes
from tests.support.language_models import write_tiny
from tests.system.text.test_scheduler import collect, make_request, running_scheduler

NAMES = [path.name for path in paths()]
ROUTES = [path.route for path in paths()]
SMALL, MIDDLE, LARGE, BACK = 0, 2, 4, 6
SECONDS = (1.0, 2.0, 3.0, 4.0, 5.0, 4.5, 3.5, 2.5)
"""Of a step of each path."""
PROMPT = [5, 80, 13, 200, 7, 91, 33]
COUNT, CHANGE_AT = 30, 9
TIE = 1e-3


def fixed_times(unit_s: float = 1.0) -> FixedTimes:
    """Return step times of `SECONDS`, in units."""
    return FixedTimes([unit_s * seconds for seconds in SECONDS], translation_s=1e-3 * unit_s)


class Counter(NullObserver):
    """An observer that counts changes, translated tokens and repaired tokens."""

    def __init__(self) -> None:
        self.changes = self.translated = self.repaired = 0

    def observe_variant_changes(self, num_sequences: int) -> None:
        self.changes += num_sequences

    def observe_translation(self, num_tokens: int) -> None:
        self.translated += num_tokens

    def observe_repair(self, num_tokens: int, seconds: float) -> None:
        self.repaired += num_tokens


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> TextBundle:
    """Return a family of two anchors with eight paths."""
    return TextBundle.load(write_elastic(tmp_path_factory.mktemp("models") / "elastic"))


@pytest.fixture
async def scheduler(
    elastic: TextBundle, request: pytest.FixtureRequest
) -> AsyncIterator[TextScheduler]:
    ranks = getattr(request, "param", 1)
    async with running_scheduler(elastic, ranks=ranks, observer=Counter()) as running:
        running.times = fixed_times()
        running.apply_settings(SchedulerSettings())
        yield running


@pytest.fixture
def counter(scheduler: TextScheduler) -> Counter:
    observer = scheduler._observer
    assert isinstance(observer, Counter)
    return observer


async def change(
    scheduler: TextScheduler, mode: CacheMode, before: int, after: int, prompt: list[int] = PROMPT
) -> list[TokenChunk]:
    """Return an answer during which the operator pins another path."""
    scheduler.apply_settings(SchedulerSettings(cache_mode=mode, pinned_variant=before))
    chunks = []
    request: GenerationRequest = make_request(prompt, COUNT)
    async with aclosing(scheduler.generate(request)) as stream:
        async for chunk in stream:
            chunks.append(chunk)
            if chunk.index == CHANGE_AT:
                settings = SchedulerSettings(cache_mode=mode, pinned_variant=after)
                scheduler.apply_settings(settings)
    return chunks


def spans_of(chunk: TokenChunk) -> list[tuple[int, int, str]]:
    return [(span.variant, span.num_tokens, span.cache) for span in chunk.answer.spans]


def regrets(chunks: list[TokenChunk], computed_by: list[int]) -> torch.Tensor:
    """Return for each token how far its logit is below the largest one.

    `computed_by` has the path of every token that was put into the model.
    """
    answer = [chunk.token for chunk in chunks]
    tokens = [*PROMPT, *answer[:-1]]
    routes = [ROUTES[path] for path in computed_by]
    logits = Definition(random_family(), lag=1).logits(tokens, routes)[len(PROMPT) - 1 :]
    return logits.max(dim=-1).values - logits[torch.arange(len(answer)), torch.tensor(answer)]


def paths_of(chunks: list[TokenChunk]) -> list[int]:
    """Return the path that computed each token that was put into the model."""
    by_token = [variant for variant, count, _ in spans_of(chunks[-1]) for _ in range(count)]
    return [by_token[0]] * (len(PROMPT) - 1) + by_token


@pytest.mark.parametrize(
    ("mode", "use"), [("project", "projected"), ("write-through", "written-through")]
)
@pytest.mark.parametrize(
    ("scheduler", "before", "after"),
    [(2, SMALL, LARGE), (1, MIDDLE, SMALL), (1, BACK, MIDDLE)],
    indirect=["scheduler"],
)
async def test_translated_cache_gives_the_defined_tokens(
    scheduler: TextScheduler, counter: Counter, mode: CacheMode, use: str, before: int, after: int
) -> None:
    chunks = await change(scheduler, mode, before, after)
    (first, _, none), (second, _, cache) = spans_of(chunks[-1])
    assert (first, second, none, cache) == (before, after, "", use)
    assert regrets(chunks, paths_of(chunks)).max() < TIE
    changed_at = spans_of(chunks[-1])[0][1]
    expected = len(PROMPT) + changed_at - 1 if mode == "project" else 0
    assert (counter.changes, counter.translated) == (1, expected)


@pytest.mark.parametrize(("mode", "use"), [("recompute", "recomputed"), ("catch-up", "caught-up")])
async def test_cache_computed_again_equals_never_changing(
    scheduler: TextScheduler, counter: Counter, mode: CacheMode, use: str
) -> None:
    chunks = await change(scheduler, mode, SMALL, LARGE)
    (_, before, _), (_, _, cache) = spans_of(chunks[-1])
    assert cache == use
    never = regrets(chunks, [LARGE] * (len(PROMPT) + COUNT - 1))
    assert never[before:].max() < TIE
    assert counter.translated == 0
    assert chunks[-1].answer.spans[1].penalty_nats == 0.0


async def test_idle_time_repairs_a_translated_cache(
    scheduler: TextScheduler, counter: Counter
) -> None:
    scheduler.times = fixed_times(1e-6)  # every step leaves time until the next deadline
    chunks = await change(scheduler, "anytime", SMALL, LARGE)
    (_, before, _), (_, _, cache) = spans_of(chunks[-1])
    assert cache == "projected"
    assert counter.translated == len(PROMPT) + before - 1
    assert counter.repaired >= counter.translated
    never = regrets(chunks, [LARGE] * (len(PROMPT) + COUNT - 1))
    assert never[before + 2 :].max() < TIE  # one step repairs all tokens, and the next ones


async def test_change_there_and_back_catches_up_only_what_is_missing(
    scheduler: TextScheduler, counter: Counter
) -> None:
    scheduler.apply_settings(SchedulerSettings(cache_mode="project", pinned_variant=LARGE))
    chunks: list[TokenChunk] = []
    async with aclosing(scheduler.generate(make_request(PROMPT, COUNT))) as stream:
        async for chunk in stream:
            chunks.append(chunk)
            if chunk.index in (8, 14):
                pin = SMALL if chunk.index == 8 else LARGE
                settings = SchedulerSettings(cache_mode="project", pinned_variant=pin)
                scheduler.apply_settings(settings)
    (_, first, _), (_, second, _), (_, _, _) = spans_of(chunks[-1])
    assert [variant for variant, _, _ in spans_of(chunks[-1])] == [LARGE, SMALL, LARGE]
    assert counter.translated == len(PROMPT) + first - 1 + second
    assert regrets(chunks, paths_of(chunks)).max() < TIE


async def test_budget_per_token_picks_and_changes_the_stitch(
    scheduler: TextScheduler, counter: Counter
) -> None:
    # The lead of the first tokens, which take no time, pays for better paths later on.
    budget = TokenBudget(per_token_s=2.5)
    chunks = await collect(scheduler, make_request(PROMPT, COUNT, budget=budget))
    variants = [variant for variant, _, _ in spans_of(chunks[-1])]
    assert variants[0] == 1  # the best path of at most 2.5 s
    assert len(variants) > 1
    assert max(variants) <= LARGE  # the ways back are not on the frontier
    assert counter.changes == len(variants) - 1


async def test_floor_holds_for_every_token(scheduler: TextScheduler) -> None:
    budget = TokenBudget(per_token_s=0.1)
    request = make_request(PROMPT, COUNT, budget=budget, min_quality=0.35)
    chunks = await collect(scheduler, request)
    assert {variant for variant, _, _ in spans_of(chunks[-1])} == {MIDDLE}


async def test_changed_blocks_are_not_found_by_other_prompts(scheduler: TextScheduler) -> None:
    chunks = await change(scheduler, "anytime", SMALL, LARGE)
    whole = [*PROMPT, *(chunk.token for chunk in chunks), 3]
    scheduler.apply_settings(SchedulerSettings())
    for path in range(len(ROUTES)):
        again = await collect(scheduler, make_request(whole, 2, variant=path))
        fresh = regrets_of_prompt(whole, again, path)
        assert fresh.max() < TIE


def regrets_of_prompt(prompt: list[int], chunks: list[TokenChunk], path: int) -> torch.Tensor:
    answer = [chunk.token for chunk in chunks]
    tokens = [*prompt, *answer[:-1]]
    definition = Definition(random_family(), lag=1)
    logits = definition.logits(tokens, [ROUTES[path]] * len(tokens))[len(prompt) - 1 :]
    return logits.max(dim=-1).values - logits[torch.arange(len(answer)), torch.tensor(answer)]


async def test_failed_repair_ends_only_the_answer_that_it_repairs(
    scheduler: TextScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = scheduler.group.run

    async def fail_repairs(step: Step) -> StepOutput:
        if step.inputs[0].logits_mode == LogitsMode.NONE:  # prompts are computed in one step
            raise InternalError("the forward pass failed")
        return await run(step)

    scheduler.times = fixed_times(1e-6)
    monkeypatch.setattr(scheduler.group, "run", fail_repairs)
    other = asyncio.create_task(collect(scheduler, make_request(PROMPT, 60, variant=MIDDLE)))
    with pytest.raises(InternalError):
        await change(scheduler, "anytime", SMALL, LARGE)
    chunks = await other
    assert spans_of(chunks[-1]) == [(MIDDLE, 60, "")]


@pytest.mark.parametrize(
    ("mode", "use"), [("recompute", "recomputed"), ("catch-up", "caught-up"), ("project", "shared")]
)
async def test_paths_with_the_same_planes_are_computed_again_if_asked(
    tmp_path: Path, mode: CacheMode, use: str
) -> None:
    ladder = ResidualScheme(scheme="ladder", ladder_layers=2)
    both = (
        TextVariant(name="standard", residual=ResidualScheme()),
        TextVariant(name="ladder", residual=ladder),
    )
    bundle = TextBundle.load(write_tiny(tmp_path / "tiny", paths=both))
    penalties = (
        Penalty(source=0, target=1, nats=0.25),
        Penalty(source=1, target=0, nats=0.125),
    )
    table = SwitchTable(
        data="none", date="", versions={}, context=1, tokens=1, windows=1, penalties=penalties
    )
    async with running_scheduler(bundle, switches=table) as running:
        chunks = await change(running, mode, 0, 1)
        whole = [*PROMPT, *(chunk.token for chunk in chunks)]
        (_, before, _), (_, _, cache) = spans_of(chunks[-1])
        assert cache == use
        assert chunks[-1].answer.spans[1].penalty_nats == (0.25 if use == "shared" else 0.0)
        if use != "shared":
            tail = len(PROMPT) + before
            alone = make_request(whole[:tail], COUNT - before, variant=1)
            again = await collect(running, alone)
            assert [c.token for c in again] == [c.token for c in chunks[before:]]
