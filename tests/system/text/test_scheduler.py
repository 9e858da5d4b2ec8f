"""Tests of `TextScheduler` on real ranks: many answers at once, and each ends exactly once."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import numpy as np
import pytest
import torch

from ladderstitch.errors import Draining, ExpiredInCompute, InvalidArgument, RequestError
from ladderstitch.scheduling.generation import GenerationRequest, TokenBudget, TokenChunk
from ladderstitch.scheduling.sampling import Sampling
from ladderstitch.telemetry.text_observer import NullObserver, TextObserver
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_config import GroupOptions, RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.scheduler.block_manager import BlockManager
from ladderstitch.text.scheduler.queue import SequenceQueue
from ladderstitch.text.scheduler.scheduler import TextScheduler
from ladderstitch.text.switches import SwitchTable
from ladderstitch_loadtest.benchmarks.generation_load import StaticQueue
from tests.support.language_models import TINY, one_rank_logits

TIE = 1e-4
"""Logits closer than this may change their order with the other sequences of the batch."""


@asynccontextmanager
async def running_scheduler(
    bundle: TextBundle,
    *,
    kv_cache_tokens: int = 1024,
    max_sequences: int = 32,
    make_queue: Callable[[BlockManager, int], SequenceQueue] = SequenceQueue,
    options: GroupOptions | None = None,
    observer: TextObserver | None = None,
    switches: SwitchTable | None = None,
    **fields: object,
) -> AsyncIterator[TextScheduler]:
    rank_config = RankConfig.of(
        bundle,
        max_model_len=128,
        kv_cache_tokens=kv_cache_tokens,
        block_tokens=4,
        max_batched_tokens=48,
        **fields,
    )
    group = RankGroup(rank_config, options)
    names = [variant.name for variant in bundle.manifest.variants]
    try:
        await group.start()
        scheduler = TextScheduler(
            group,
            bundle.tokenizer(),
            (),
            bundle.quality,
            names,
            max_sequences,
            observer,
            make_queue,
            switches,
        )
        await scheduler.measure()
        yield scheduler
        await scheduler.close()
    finally:
        await group.close()


def make_request(tokens: list[int], max_tokens: int = 8, **fields: object) -> GenerationRequest:
    return GenerationRequest(tuple(tokens), time.monotonic(), max_tokens, **fields)  # type: ignore[arg-type] # by name


async def collect(scheduler: TextScheduler, request: GenerationRequest) -> list[TokenChunk]:
    async with aclosing(scheduler.generate(request)) as chunks:
        return [chunk async for chunk in chunks]


def assert_greedy(bundle: TextBundle, request: GenerationRequest, chunks: list[TokenChunk]) -> None:
    """Assert that every token is the likeliest after those before it, in one pass of one rank."""
    answer = [chunk.token for chunk in chunks]
    whole = [*request.tokens, *answer]
    logits = one_rank_logits(bundle.manifest.config, bundle.weights(), whole[:-1])
    rows = logits[len(request.tokens) - 1 :]
    regret = rows.max(dim=-1).values - rows[torch.arange(len(rows)), torch.tensor(answer)]
    assert regret.max() < TIE
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert chunks[-1].finish == "length"
    assert len(chunks) == request.max_tokens


@pytest.mark.parametrize("rank_dies", [False, True])
async def test_generate_many_streams_each_ends_once(bundle: TextBundle, rank_dies: bool) -> None:
    rng = random.Random(5)
    async with running_scheduler(bundle, ranks=2, options=GroupOptions(spares=1)) as scheduler:
        ended: list[str] = []
        started = asyncio.Event()

        async def call(leave_after: int | None) -> None:
            prompt = [rng.randrange(256) for _ in range(rng.choice((1, 7, 30, 60)))]
            request = make_request(prompt, rng.choice((4, 20, 40)))
            chunks: list[TokenChunk] = []
            async with aclosing(scheduler.generate(request)) as stream:
                async for chunk in stream:
                    chunks.append(chunk)
                    started.set()
                    if chunk.index == leave_after:
                        ended.append("left")
                        return
            assert_greedy(bundle, request, chunks)
            ended.append("complete")

        calls = [call(rng.randrange(4) if number % 10 == 3 else None) for number in range(32)]
        tasks = [asyncio.create_task(one) for one in calls]
        if rank_dies:
            await started.wait()
            os.kill(scheduler.group.pids[1], signal.SIGKILL)
        await asyncio.gather(*tasks)
        assert len(ended) == 32
        assert ended.count("left") >= 2
        assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
        assert scheduler.block_manager.num_used == 0
        assert scheduler.group.restarts == int(rank_dies)


async def test_generate_with_small_cache_preempts_sequences(bundle: TextBundle) -> None:
    class PreemptionCounter(NullObserver):
        count = 0

        def observe_preemptions(self, num_sequences: int) -> None:
            self.count += num_sequences

    preemptions = PreemptionCounter()
    async with running_scheduler(bundle, kv_cache_tokens=132, observer=preemptions) as scheduler:
        requests = [make_request([n, n + 1, n + 2] * 5, 60) for n in range(6)]
        answers = await asyncio.gather(*(collect(scheduler, request) for request in requests))
        for request, chunks in zip(requests, answers, strict=True):
            assert_greedy(bundle, request, chunks)
        assert preemptions.count > 0
        assert scheduler.block_manager.num_used == 0


async def test_generate_with_shared_prefix_reuses_blocks(two_paths: TextBundle) -> None:
    shared = list(range(50))
    async with running_scheduler(two_paths) as scheduler:
        first = await collect(scheduler, make_request([*shared, 100]))
        again = await collect(scheduler, make_request([*shared, 101]))
        assert first[0].answer.reused_tokens == 0
        assert again[0].answer.reused_tokens == 48
        assert_greedy(two_paths, make_request([*shared, 101]), again)
        for changes in ({"tenant": "another"}, {"variant": 1}):
            apart = await collect(scheduler, make_request([*shared, 101], **changes))
            assert apart[0].answer.reused_tokens == 0
        third = await collect(scheduler, make_request([*shared, 101]))
        assert third[0].answer.reused_tokens == 48


async def test_generate_after_rank_loss_reuses_nothing(bundle: TextBundle) -> None:
    prompt = list(range(40))
    async with running_scheduler(bundle, ranks=2) as scheduler:
        before = await collect(scheduler, make_request(prompt))
        os.kill(scheduler.group.pids[0], signal.SIGKILL)
        after = await collect(scheduler, make_request(prompt))
        assert [chunk.token for chunk in after] == [chunk.token for chunk in before]
        assert_greedy(bundle, make_request(prompt), after)


async def test_generate_with_tight_budget_takes_the_ladder(two_paths: TextBundle) -> None:
    # Over the slow link the ladder hides the reductions of two of the three layers.
    slow = GroupOptions(latency_s=0.02)
    async with running_scheduler(two_paths, ranks=2, options=slow) as scheduler:
        standard_s, ladder_s = (scheduler.times.expected(v, 1) for v in (0, 1))
        between = TokenBudget(per_token_s=(standard_s + ladder_s) / 2)
        tight = await collect(scheduler, make_request([1, 2, 3], budget=between))
        relaxed = await collect(scheduler, make_request([1, 2, 3]))
        assert (tight[-1].answer.variant, tight[-1].answer.name) == (1, "ladder-2")
        assert (relaxed[-1].answer.variant, relaxed[-1].answer.name) == (0, "standard")
        assert tight[-1].answer.quality is not None
        assert tight[-1].answer.quality.perplexity == 11.0
        assert_greedy(two_paths, make_request([1, 2, 3]), relaxed)


async def test_generate_with_logprobs_returns_the_models_own(bundle: TextBundle) -> None:
    prompt = [5, 6, 7, 8]
    request = make_request(prompt, 5, logprobs=3, sampling=Sampling(temperature=2.0, seed=4))
    async with running_scheduler(bundle) as scheduler:
        chunks = await collect(scheduler, request)
    whole = [*prompt, *(chunk.token for chunk in chunks)]
    logits = one_rank_logits(TINY, bundle.weights(), whole[:-1])
    expected = logits.log_softmax(-1)[len(prompt) - 1 :]
    top = expected.topk(3)
    for row, chunk in enumerate(chunks):
        assert chunk.logprob == pytest.approx(float(expected[row, chunk.token]), abs=1e-4)
        got = np.array(chunk.alternatives)
        np.testing.assert_allclose(got[:, 1], top.values[row].numpy(), atol=1e-4)


async def test_generate_past_hard_deadline_frees_all_blocks(bundle: TextBundle) -> None:
    async with running_scheduler(
        bundle, ranks=2, options=GroupOptions(latency_s=0.02)
    ) as scheduler:
        request = make_request([1, 2], 120, hard_deadline=time.monotonic() + 1.0)
        with pytest.raises(ExpiredInCompute):
            await collect(scheduler, request)
        assert scheduler.block_manager.num_used == 0
        assert len(await collect(scheduler, make_request([1, 2], 3))) == 3


async def test_drain_rejects_new_requests_and_finishes_others(bundle: TextBundle) -> None:
    async with running_scheduler(bundle) as scheduler:
        answer = asyncio.create_task(collect(scheduler, make_request([1, 2], 30)))
        await asyncio.sleep(0)
        draining = asyncio.create_task(scheduler.drain())
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await collect(scheduler, make_request([1, 2]))
        await draining
        assert answer.done() or len(await answer) == 30


async def test_close_ends_every_answer(bundle: TextBundle) -> None:
    async with running_scheduler(bundle) as scheduler:
        answers = [
            asyncio.create_task(collect(scheduler, make_request([n], 100))) for n in range(4)
        ]
        await asyncio.sleep(0.05)
        await scheduler.close()
        ends = await asyncio.gather(*answers, return_exceptions=True)
    assert all(isinstance(end, RequestError | list) for end in ends)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (make_request([]), "prompt"),
        (make_request([257]), "prompt"),
        (make_request([-1]), "prompt"),
        (make_request([1], 0), "max_tokens"),
        (make_request([1] * 100, 29), "max_tokens"),
        (make_request([1], stop=("",)), "stop"),
        (make_request([1], logprobs=21), "logprobs"),
        (make_request([1], budget=TokenBudget(per_token_s=float("nan"))), "per_token_s"),
        (make_request([1], budget=TokenBudget(first_token_s=0.0)), "first_token_s"),
    ],
)
def test_check_with_invalid_request_names_the_field(
    request_: GenerationRequest, field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        request_.check(vocab_size=257, max_model_len=128)
    assert caught.value.field == field


async def test_static_queue_admits_no_request_into_a_batch(bundle: TextBundle) -> None:
    async with running_scheduler(bundle, make_queue=StaticQueue) as scheduler:
        async with aclosing(scheduler.generate(make_request([1], 60))) as first:
            await anext(first)
            second = asyncio.create_task(collect(scheduler, make_request([2], 2)))
            assert len([chunk async for chunk in first]) == 59
        assert not second.done()
        assert len(await second) == 2
