"""Tests of answers whose precision changes between two tokens, on real ranks.

The scheduler plans with fixed times of up to 1,000,000 s a step, so that the speed of the machine
does not matter: a budget of 1,500 s per token is met or missed by these times alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from ladderstitch.scheduling.generation import GenerationRequest, TokenBudget, TokenChunk
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.text_observer import NullObserver
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.comm.base import SingleRankCommunicator
from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.engine.rank_models import load_models
from ladderstitch.text.manifest import TextVariant
from ladderstitch.text.messages import LogitsMode, SequenceInput, Step, StepOutput
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.residual import ResidualScheme, plan_layers
from ladderstitch.text.model.shard import Shard
from ladderstitch.text.scheduler.scheduler import TextScheduler
from tests.support.fixed_times import FixedTimes
from tests.support.language_models import write_tiny
from tests.system.text.test_scheduler import collect, make_request, running_scheduler

STANDARD, INT8, INT4 = 0, 1, 2
LADDER = ResidualScheme(scheme="ladder", ladder_layers=2)
PATHS = (
    TextVariant(name="standard", residual=ResidualScheme()),
    TextVariant(name="standard-int8", residual=ResidualScheme(), precision="int8"),
    TextVariant(name="standard-int4", residual=ResidualScheme(), precision="int4"),
    TextVariant(name="ladder-int4", residual=LADDER, precision="int4"),
)
SECONDS = (1e3, 1e6, 1.0, 0.5)
"""Of a step of each path: an answer that shares the ranks with int8 misses its budget."""
PROMPT = [5, 80, 13, 200, 7, 91, 33]
COUNT = 24
BUDGET = TokenBudget(per_token_s=1500.0)


class ChangeCounter(NullObserver):
    """An observer that counts changes of variants."""

    count = 0

    def observe_variant_changes(self, num_sequences: int) -> None:
        self.count += num_sequences


class ComputedTokens:
    """The number of tokens that the ranks of a scheduler compute."""

    def __init__(self, scheduler: TextScheduler) -> None:
        self.count = 0
        self._run = scheduler.group.run
        scheduler.group.run = self._count  # type: ignore[method-assign] # an instance's method

    async def _count(self, step: Step) -> StepOutput:
        self.count += step.num_tokens
        return await self._run(step)


@pytest.fixture(scope="module")
def precisions(tmp_path_factory: pytest.TempPathFactory) -> TextBundle:
    """Return a bundle with three precisions of one scheme, and a path of another scheme."""
    path: Path = tmp_path_factory.mktemp("models") / "precisions"
    return TextBundle.load(write_tiny(path, paths=PATHS))


@pytest.fixture
async def scheduler(precisions: TextBundle) -> AsyncIterator[TextScheduler]:
    async with running_scheduler(precisions, observer=ChangeCounter()) as running:
        running.times = FixedTimes(SECONDS)
        running.apply_settings(SchedulerSettings())
        yield running


def answer_in_process(bundle: TextBundle, prompt: list[int], variants: list[int]) -> list[int]:
    """Return the greedy answer whose tokens these variants compute, one by one, on one cache."""
    config = RankConfig.of(bundle, max_model_len=128)
    shard = Shard.of(config.model, 0, 1)
    models = load_models(config, shard)
    cache = PagedCache(config.model, shard, 8, 16)
    comm, answer, new, start = SingleRankCommunicator(), list[int](), prompt, 0
    for variant in variants:
        plans = plan_layers(config.paths[variant], config.model.layers, 1)
        step = Step((SequenceInput(new, start, range(8), LogitsMode.LAST),))
        logits = models[variant].forward(Batch(step, 16), cache, plans, comm)
        start, new = start + len(new), [int(logits[-1].argmax())]
        answer += new
    return answer


def spans_of(chunk: TokenChunk) -> list[tuple[int, int]]:
    return [(span.variant, span.num_tokens) for span in chunk.answer.spans]


def variants_of(chunk: TokenChunk) -> list[int]:
    return [v for v, count in spans_of(chunk) for _ in range(count)]


@pytest.mark.parametrize(
    ("budget", "variant"),
    [
        (TokenBudget(per_token_s=2.0), INT4),
        (TokenBudget(answer_s=COUNT * 2.0), INT4),
        (TokenBudget(per_token_s=2000.0), STANDARD),
        (TokenBudget(), STANDARD),
    ],
)
async def test_generate_takes_the_best_precision_of_the_budget(
    scheduler: TextScheduler, precisions: TextBundle, budget: TokenBudget, variant: int
) -> None:
    chunks = await collect(scheduler, make_request(PROMPT, 6, budget=budget))
    assert spans_of(chunks[-1])[0][0] == variant
    expected = answer_in_process(precisions, PROMPT, variants_of(chunks[-1]))
    assert [chunk.token for chunk in chunks] == expected


async def test_generate_with_lead_on_budget_changes_to_better(scheduler: TextScheduler) -> None:
    budget = TokenBudget(per_token_s=600.0)  # the lead of the first tokens pays for a better one
    chunks = await collect(scheduler, make_request(PROMPT, COUNT, budget=budget))
    (first, _), (second, _), *_ = spans_of(chunks[-1])
    assert (first, second) == (INT4, STANDARD)


async def test_generate_under_new_load_changes_precision(
    scheduler: TextScheduler, precisions: TextBundle
) -> None:
    # The first answer is so far ahead after 20 tokens that the other one has its turn.
    computed, prompt_of_other, count = ComputedTokens(scheduler), [9, 9, 9], 60
    urgent = TokenBudget(first_token_s=0.01)
    chunks: list[TokenChunk] = []
    other: asyncio.Task[list[TokenChunk]] | None = None
    request = make_request(PROMPT, count, budget=BUDGET)
    async with aclosing(scheduler.generate(request)) as stream:
        async for chunk in stream:
            chunks.append(chunk)
            if chunk.index == 5:
                slow = make_request(prompt_of_other, 6, variant=INT8, budget=urgent)
                other = asyncio.create_task(collect(scheduler, slow))
    assert other is not None
    others = await other
    spans = spans_of(chunks[-1])
    assert [variant for variant, _ in spans] == [STANDARD, INT4, STANDARD]
    assert len(chunks) == sum(num_tokens for _, num_tokens in spans) == count
    assert spans_of(others[-1]) == [(INT8, 6)]  # its request names the variant
    tokens = [chunk.token for chunk in chunks]
    assert tokens == answer_in_process(precisions, PROMPT, variants_of(chunks[-1]))
    before = spans[0][1]
    alone = answer_in_process(precisions, PROMPT, [STANDARD] * before)
    assert tokens[:before] == alone
    assert computed.count == len(PROMPT) + count - 1 + len(prompt_of_other) + 6 - 1
    assert scheduler._observer.count == 2  # type: ignore[attr-defined] # a `ChangeCounter`


async def test_generate_after_change_reports_mean_quality(
    scheduler: TextScheduler, precisions: TextBundle
) -> None:
    budget = TokenBudget(per_token_s=600.0)
    last = (await collect(scheduler, make_request(PROMPT, COUNT, budget=budget)))[-1]
    table, counts = precisions.quality, spans_of(last)
    assert table is not None
    assert last.answer.quality is not None
    assert len(counts) > 1
    mean = sum(table.value(variant) * count for variant, count in counts) / COUNT
    assert last.answer.quality.value == pytest.approx(mean)
    assert table.value(INT4) < mean < table.value(STANDARD)


async def test_generate_after_change_caches_nothing_mixed(scheduler: TextScheduler) -> None:
    """A later prompt finds only blocks that its own variant has computed from the start."""
    budget = TokenBudget(per_token_s=600.0)
    first = await collect(scheduler, make_request(PROMPT, COUNT, budget=budget))
    computed_by_int4 = len(PROMPT) + spans_of(first[-1])[0][1] - 1
    whole = [*PROMPT, *(chunk.token for chunk in first), 3]
    for variant, most in ((INT4, computed_by_int4), (STANDARD, 0)):
        again = await collect(scheduler, make_request(whole, 2, variant=variant))
        assert again[-1].answer.reused_tokens == most // 4 * 4


async def test_generate_keeps_the_floor_and_the_scheme(scheduler: TextScheduler) -> None:
    tight = TokenBudget(per_token_s=0.7)
    floor = await collect(scheduler, make_request(PROMPT, 6, budget=tight, min_quality=0.55))
    assert spans_of(floor[-1]) == [(STANDARD, 6)]
    ladder = await collect(scheduler, make_request(PROMPT, 6, budget=tight))
    assert spans_of(ladder[-1]) == [(3, 6)]  # no other path has its scheme


async def test_pin_by_operator_changes_answers_in_progress(scheduler: TextScheduler) -> None:
    chunks = []
    request: GenerationRequest = make_request(PROMPT, COUNT)
    async with aclosing(scheduler.generate(request)) as stream:
        async for chunk in stream:
            chunks.append(chunk)
            if chunk.index == 5:
                scheduler.apply_settings(SchedulerSettings(pinned_variant=INT4))
    assert [variant for variant, _ in spans_of(chunks[-1])] == [STANDARD, INT4]
