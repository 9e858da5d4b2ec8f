"""Tests of many answers at once whose stitches change at random: each ends once, as if alone."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from ladderstitch.errors import RequestError
from ladderstitch.scheduling.generation import GenerationRequest, TokenBudget, TokenChunk
from ladderstitch.scheduling.settings import CacheMode, SchedulerSettings
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_config import GroupOptions
from ladderstitch.text.scheduler.scheduler import TextScheduler
from tests.support.elastic_models import write_elastic
from tests.support.switch_schedules import Event, RecordingQueue, Replay, comparable_tokens, record
from tests.system.text.test_elastic_answers import (
    LARGE,
    MIDDLE,
    PROMPT,
    ROUTES,
    SMALL,
    Counter,
    fixed_times,
    regrets_of_prompt,
    spans_of,
)
from tests.system.text.test_scheduler import collect, make_request, running_scheduler

STREAMS = 32
MODES: tuple[CacheMode, ...] = ("project", "write-through", "recompute", "anytime")
CACHE_TOKENS = 1280
"""Too few for all answers at a time: some of them lose their blocks and start over."""
UNIT_S = 1e-4
"""Of the fixed times of steps, 1 to 5 units; budgets are 3 to 1,000 units per token."""
LIMIT_S = 300.0
NEAR, TIE = 2e-4, 1e-3
"""Log probabilities of an answer alone differ by less than `NEAR`: sums are in another order.
Tokens whose log probabilities are closer than `TIE` may change their order."""


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> TextBundle:
    """Return a family of two anchors with eight paths."""
    return TextBundle.load(write_elastic(tmp_path_factory.mktemp("models") / "elastic"))


@asynccontextmanager
async def busy_scheduler(
    elastic: TextBundle, ranks: int, counter: Counter, options: GroupOptions | None = None
) -> AsyncIterator[TextScheduler]:
    async with running_scheduler(
        elastic,
        ranks=ranks,
        observer=counter,
        options=options,
        kv_cache_tokens=CACHE_TOKENS,
        make_queue=RecordingQueue,
    ) as scheduler:
        scheduler.times = fixed_times(UNIT_S)
        yield scheduler


class Callers:
    """Callers with random prompts and budgets; some leave, and all change the operator's pin."""

    def __init__(
        self,
        scheduler: TextScheduler,
        mode: CacheMode,
        seed: int,
        counts: tuple[int, ...] = (4, 20, 40),
    ) -> None:
        """`counts` are the lengths of answers."""
        self._scheduler, self._mode, self._random = scheduler, mode, random.Random(seed)
        self._counts = counts
        self.ends: list[str] = []
        self.answers: list[tuple[GenerationRequest, list[TokenChunk]]] = []
        self.started = asyncio.Event()

    async def run(self) -> None:
        """Run all callers at once; each of them adds one end."""
        self._pin()
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*(self._call(number) for number in range(STREAMS)))

    def _pin(self) -> None:
        pin = self._random.choice((None, None, *range(len(ROUTES))))
        self._scheduler.apply_settings(SchedulerSettings(cache_mode=self._mode, pinned_variant=pin))

    async def _call(self, number: int) -> None:
        rng = self._random
        prompt = [number, *(rng.randrange(256) for _ in range(rng.choice((1, 7, 30, 60))))]
        count = rng.choice(self._counts)
        budget = TokenBudget(per_token_s=UNIT_S * 10 ** rng.uniform(0.5, 3))
        request = make_request(
            prompt, count, budget=rng.choice((budget, budget, TokenBudget())), logprobs=2
        )
        leave_after = rng.randrange(count - 1) if number % 8 == 3 else None
        pins = set(rng.sample(range(count), 2))
        chunks: list[TokenChunk] = []
        try:
            async with aclosing(self._scheduler.generate(request)) as stream:
                async for chunk in stream:
                    chunks.append(chunk)
                    self.started.set()
                    if chunk.index in pins:
                        self._pin()
                    if chunk.index == leave_after:
                        self.ends.append("left")
                        return
        except RequestError as error:
            self.ends.append(error.code)
            return
        assert [chunk.index for chunk in chunks] == list(range(count))
        assert [chunk.finish for chunk in chunks] == [None] * (count - 1) + ["length"]
        self.answers.append((request, chunks))
        self.ends.append("complete")


async def answer_alone(
    scheduler: TextScheduler, request: GenerationRequest, variant: int
) -> list[TokenChunk]:
    """Return the answer to a request that begins on a path."""
    scheduler.apply_settings(scheduler.settings.model_copy(update={"pinned_variant": variant}))
    alone = make_request(list(request.tokens), request.max_tokens, logprobs=2)
    async with asyncio.timeout(LIMIT_S), aclosing(scheduler.generate(alone)) as stream:
        return [chunk async for chunk in stream]


def compare(got: list[TokenChunk], alone: list[TokenChunk], most: int) -> int:
    """Compare up to `most` tokens, and return how many were: none after a tie."""
    for number, (one, other) in enumerate(zip(got[:most], alone, strict=False)):
        assert one.logprob == pytest.approx(other.logprob, abs=NEAR) or one.token != other.token
        if one.token != other.token:
            (_, first), (_, second) = other.alternatives[:2]
            assert first - second < TIE, f"token {number}"
            return number
    return most


def assert_same_spans(alone: TokenChunk, got: TokenChunk, events: list[Event]) -> None:
    """Assert that the spans are equal; how the cache was found depends on reused blocks."""
    if any(event.is_restart for event in events):
        expected, found = ([span[:2] for span in spans_of(chunk)] for chunk in (got, alone))
        assert found == expected
    else:
        assert spans_of(alone) == spans_of(got)


@pytest.mark.parametrize(
    ("mode", "ranks"), [("project", 1), ("write-through", 1), ("recompute", 1), ("anytime", 2)]
)
async def test_many_changing_streams_answer_as_if_alone(
    elastic: TextBundle, mode: CacheMode, ranks: int
) -> None:
    counter = Counter()
    async with busy_scheduler(elastic, ranks, counter) as scheduler:
        schedules = record(scheduler)
        callers = Callers(scheduler, mode, seed=5)
        await callers.run()
        assert callers.ends.count("left") == STREAMS // 8
        assert callers.ends.count("complete") == STREAMS - STREAMS // 8
        assert len(callers.ends) == STREAMS
        assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
        assert scheduler.block_manager.num_used == 0
        assert counter.changes > STREAMS
        if mode in ("project", "anytime"):
            assert counter.translated > 0
        assert (counter.repaired > 0) == (mode == "anytime")
    compared = total = 0
    async with busy_scheduler(elastic, 1, Counter()) as scheduler:
        for request, chunks in callers.answers:
            events = schedules[request.tokens]
            replay = Replay(scheduler, events, mode)
            alone = await answer_alone(scheduler, request, spans_of(chunks[0])[0][0])
            replay.close()
            most = comparable_tokens(events, len(chunks))
            if most == len(chunks):
                assert_same_spans(alone[-1], chunks[-1], events)
            compared += compare(chunks, alone, most)
            total += len(chunks)
        assert scheduler.block_manager.num_used == 0
    assert compared > 0.9 * total


async def test_many_changing_streams_end_once_though_ranks_die(elastic: TextBundle) -> None:
    counter = Counter()
    options = GroupOptions(spares=1)
    async with busy_scheduler(elastic, 2, counter, options) as scheduler:
        for number, mode in enumerate(MODES):
            callers = Callers(scheduler, mode, seed=6 + number, counts=(2, 6, 12))
            running = asyncio.create_task(callers.run())
            await callers.started.wait()
            os.kill(scheduler.group.pids[number % 2], signal.SIGKILL)
            await running
            assert len(callers.ends) == STREAMS
            assert set(callers.ends) <= {"left", "complete", "UNAVAILABLE"}
            assert callers.ends.count("complete") >= STREAMS // 2
            assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
            assert scheduler.block_manager.num_used == 0
            assert scheduler.group.restarts == number + 1
        assert counter.changes > STREAMS
        scheduler.apply_settings(SchedulerSettings())
        for path in (SMALL, MIDDLE, LARGE):
            chunks = await collect(scheduler, make_request(PROMPT, 6, variant=path))
            assert regrets_of_prompt(PROMPT, chunks, path).max() < TIE
