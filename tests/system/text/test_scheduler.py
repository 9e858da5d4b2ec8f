"""Many answers at once over real ranks: each as if alone, each ending in exactly one way."""

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
from ladderstitch.scheduling.requests import (
    GenerationRequest,
    Sampling,
    TokenBudget,
    TokenChunk,
)
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_config import GroupOptions, RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.scheduler.block_manager import BlockManager
from ladderstitch.text.scheduler.queue import SequenceQueue
from ladderstitch.text.scheduler.scheduler import NullObserver, StepObserver, TextScheduler
from ladderstitch_loadtest.benchmarks.generation_load import StaticQueue
from tests.support.language_models import TINY, one_rank_logits

TIE = 1e-4
"""Logits closer than this may come in either order, by what else is in the batch."""


@asynccontextmanager
async def generating(
    bundle: TextBundle,
    *,
    kv_cache_tokens: int = 1024,
    max_sequences: int = 32,
    make_roster: Callable[[BlockManager, int], SequenceQueue] = SequenceQueue,
    options: GroupOptions | None = None,
    observer: StepObserver | None = None,
    **fields: object,
) -> AsyncIterator[TextScheduler]:
    job = RankConfig.of(
        bundle,
        max_model_len=128,
        kv_cache_tokens=kv_cache_tokens,
        block_tokens=4,
        max_batched_tokens=48,
        **fields,
    )
    group = RankGroup(job, options)
    names = [path.name for path in bundle.manifest.ways]
    try:
        await group.start()
        generator = TextScheduler(
            group,
            bundle.tokenizer(),
            (),
            bundle.quality,
            names,
            max_sequences,
            observer,
            make_roster,
        )
        await generator.measure()
        yield generator
        await generator.close()
    finally:
        await group.close()


def asked(tokens: list[int], most: int = 8, **fields: object) -> GenerationRequest:
    return GenerationRequest(tuple(tokens), time.monotonic(), most, **fields)  # type: ignore[arg-type] # by name


async def collect(generator: TextScheduler, request: GenerationRequest) -> list[TokenChunk]:
    async with aclosing(generator.generate(request)) as pieces:
        return [piece async for piece in pieces]


def assert_greedy(bundle: TextBundle, request: GenerationRequest, pieces: list[TokenChunk]) -> None:
    """Every token is the likeliest after those before it, in one pass of one rank."""
    answer = [piece.token for piece in pieces]
    whole = [*request.tokens, *answer]
    logits = one_rank_logits(bundle.manifest.config, bundle.weights(), whole[:-1])
    rows = logits[len(request.tokens) - 1 :]
    given_up = rows.max(dim=-1).values - rows[torch.arange(len(rows)), torch.tensor(answer)]
    assert given_up.max() < TIE
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    assert pieces[-1].finish == "length"
    assert len(pieces) == request.max_tokens


@pytest.mark.parametrize("killed", [False, True])
async def test_many_streams_with_callers_who_leave(bundle: TextBundle, killed: bool) -> None:
    rng = random.Random(5)
    async with generating(bundle, ranks=2, options=GroupOptions(spares=1)) as generator:
        ended: list[str] = []
        begun = asyncio.Event()

        async def stream(leaves_after: int | None) -> None:
            prompt = [rng.randrange(256) for _ in range(rng.choice((1, 7, 30, 60)))]
            request = asked(prompt, rng.choice((4, 20, 40)))
            pieces: list[TokenChunk] = []
            async with aclosing(generator.generate(request)) as coming:
                async for piece in coming:
                    pieces.append(piece)
                    begun.set()
                    if piece.index == leaves_after:
                        ended.append("left")
                        return
            assert_greedy(bundle, request, pieces)
            ended.append("complete")

        streams = [stream(rng.randrange(4) if number % 10 == 3 else None) for number in range(32)]
        tasks = [asyncio.create_task(one) for one in streams]
        if killed:
            await begun.wait()
            os.kill(generator.group.pids[1], signal.SIGKILL)
        await asyncio.gather(*tasks)
        assert len(ended) == 32
        assert ended.count("left") >= 2
        assert (generator.running, generator.waiting, generator.pool.used) == (0, 0, 0)
        assert generator.group.restarts == int(killed)


async def test_a_short_cache_preempts_instead_of_refusing(bundle: TextBundle) -> None:
    class Watch(NullObserver):
        times = 0

        def preempted(self, sequences: int) -> None:
            self.times += sequences

    watch = Watch()
    async with generating(bundle, kv_cache_tokens=132, observer=watch) as generator:
        requests = [asked([n, n + 1, n + 2] * 5, 60) for n in range(6)]
        answers = await asyncio.gather(*(collect(generator, request) for request in requests))
        for request, pieces in zip(requests, answers, strict=True):
            assert_greedy(bundle, request, pieces)
        assert watch.times > 0
        assert generator.pool.used == 0


async def test_prompts_that_begin_alike_are_computed_once(two_paths: TextBundle) -> None:
    shared = list(range(50))
    async with generating(two_paths) as generator:
        first = await collect(generator, asked([*shared, 100]))
        again = await collect(generator, asked([*shared, 101]))
        assert first[0].answer.reused_tokens == 0
        assert again[0].answer.reused_tokens == 48
        assert_greedy(two_paths, asked([*shared, 101]), again)
        for changes in ({"tenant": "another"}, {"variant": 1}):
            apart = await collect(generator, asked([*shared, 101], **changes))
            assert apart[0].answer.reused_tokens == 0
        whole = await collect(generator, asked([*shared, 101]))  # the answer's blocks serve, too
        assert whole[0].answer.reused_tokens == 48


async def test_nothing_of_a_lost_cache_is_found_again(bundle: TextBundle) -> None:
    prompt = list(range(40))
    async with generating(bundle, ranks=2) as generator:
        before = await collect(generator, asked(prompt))
        os.kill(generator.group.pids[0], signal.SIGKILL)
        after = await collect(generator, asked(prompt))
        assert [piece.token for piece in after] == [piece.token for piece in before]
        assert_greedy(bundle, asked(prompt), after)


async def test_budgets_choose_the_path_and_the_answer_says_so(two_paths: TextBundle) -> None:
    """Over a slow link: the ladder hides two of three layers' reductions."""
    slow = GroupOptions(latency_s=0.02)
    async with generating(two_paths, ranks=2, options=slow) as generator:
        standard_s, ladder_s = (generator.times.expected(path, 1) for path in (0, 1))
        between = TokenBudget(per_token_s=(standard_s + ladder_s) / 2)
        tight = await collect(generator, asked([1, 2, 3], budget=between))
        relaxed = await collect(generator, asked([1, 2, 3]))
        assert (tight[-1].answer.path, tight[-1].answer.name) == (1, "ladder-2")
        assert (relaxed[-1].answer.path, relaxed[-1].answer.name) == (0, "standard")
        assert tight[-1].answer.quality is not None
        assert tight[-1].answer.quality.perplexity == 11.0
        assert_greedy(two_paths, asked([1, 2, 3]), relaxed)


async def test_log_probabilities_are_the_models_own(bundle: TextBundle) -> None:
    prompt = [5, 6, 7, 8]
    request = asked(prompt, 5, logprobs=3, sampling=Sampling(temperature=2.0, seed=4))
    async with generating(bundle) as generator:
        pieces = await collect(generator, request)
    whole = [*prompt, *(piece.token for piece in pieces)]
    logits = one_rank_logits(TINY, bundle.weights(), whole[:-1])
    expected = logits.log_softmax(-1)[len(prompt) - 1 :]
    top = expected.topk(3)
    for row, piece in enumerate(pieces):
        assert piece.logprob == pytest.approx(float(expected[row, piece.token]), abs=1e-4)
        got = np.array(piece.alternatives)
        np.testing.assert_allclose(got[:, 1], top.values[row].numpy(), atol=1e-4)


async def test_past_its_limit_an_answer_ends_and_holds_nothing(bundle: TextBundle) -> None:
    async with generating(bundle, ranks=2, options=GroupOptions(latency_s=0.02)) as generator:
        request = asked([1, 2], 120, hard_deadline=time.monotonic() + 1.0)
        with pytest.raises(ExpiredInCompute):
            await collect(generator, request)
        assert generator.pool.used == 0
        assert len(await collect(generator, asked([1, 2], 3))) == 3


async def test_draining_lets_answers_end_and_nobody_in(bundle: TextBundle) -> None:
    async with generating(bundle) as generator:
        answer = asyncio.create_task(collect(generator, asked([1, 2], 30)))
        await asyncio.sleep(0)
        draining = asyncio.create_task(generator.drain())
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await collect(generator, asked([1, 2]))
        await draining
        assert answer.done() or len(await answer) == 30


async def test_closing_ends_every_answer(bundle: TextBundle) -> None:
    async with generating(bundle) as generator:
        answers = [asyncio.create_task(collect(generator, asked([n], 100))) for n in range(4)]
        await asyncio.sleep(0.05)
        await generator.close()
        ends = await asyncio.gather(*answers, return_exceptions=True)
    assert all(isinstance(end, RequestError | list) for end in ends)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (asked([]), "prompt"),
        (asked([257]), "prompt"),
        (asked([-1]), "prompt"),
        (asked([1], 0), "max_tokens"),
        (asked([1] * 100, 29), "max_tokens"),
        (asked([1], stop=("",)), "stop"),
        (asked([1], logprobs=21), "logprobs"),
        (asked([1], budget=TokenBudget(per_token_s=float("nan"))), "per_token_s"),
        (asked([1], budget=TokenBudget(first_token_s=0.0)), "first_token_s"),
    ],
)
def test_wrong_requests_name_their_field(request_: GenerationRequest, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        request_.check(vocabulary=257, most_tokens=128)
    assert caught.value.field == field


async def test_static_batches_let_nobody_join(bundle: TextBundle) -> None:
    async with generating(bundle, make_roster=StaticQueue) as generator:
        async with aclosing(generator.generate(asked([1], 60))) as long:
            await anext(long)
            short = asyncio.create_task(collect(generator, asked([2], 2)))
            assert len([piece async for piece in long]) == 59
        assert not short.done()
        assert len(await short) == 2
