"""What sharing does for a language model: prefixes, paths by budget, beside `transformers`."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from statistics import median
from typing import Any

import numpy as np

from ladderstitch.scheduling.requests import GenerationRequest, TokenBudget, TokenChunk
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_config import GroupOptions, RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.scheduler.scheduler import TextScheduler

PREFIX_TOKENS = 512
PREFIX_ROUNDS = 5
OFFLINE_PROMPTS = 8
OFFLINE_TOKENS = 16


async def _collect(
    generator: TextScheduler, request: GenerationRequest
) -> tuple[list[TokenChunk], float]:
    """The pieces, and seconds to the first one."""
    first_s = 0.0
    pieces: list[TokenChunk] = []
    async with aclosing(generator.generate(request)) as coming:
        async for piece in coming:
            if not pieces:
                first_s = time.monotonic() - request.arrival
            pieces.append(piece)
    return pieces, first_s


def _random_prompt(rng: np.random.Generator, tokens: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(int(token) for token in rng.integers(0, vocabulary, tokens))


async def prefix_reuse(
    bundle: TextBundle, dtype: str, prefix_tokens: int = PREFIX_TOKENS
) -> dict[str, object]:
    """Seconds to the first token of a new prefix, and of later prompts that share it and go on
    with 16 tokens of their own."""
    context = prefix_tokens + 32
    group = RankGroup(
        RankConfig.of(
            bundle,
            dtype=dtype,
            max_model_len=context,
            kv_cache_tokens=8 * context,
            max_batched_tokens=min(256, context),
        )
    )
    rng, vocabulary = np.random.default_rng(0), bundle.manifest.config.vocab_size
    fresh: list[float] = []
    shared: list[float] = []
    reused: set[int] = set()
    try:
        await group.start()
        generator = TextScheduler(group, bundle.tokenizer())
        await generator.measure()
        for _ in range(PREFIX_ROUNDS):
            prefix = _random_prompt(rng, prefix_tokens, vocabulary)
            for number in range(4):
                prompt = prefix + _random_prompt(rng, 16, vocabulary)
                request = GenerationRequest(prompt, time.monotonic(), max_tokens=2)
                pieces, first_s = await _collect(generator, request)
                (shared if number else fresh).append(first_s)
                if number:
                    reused.add(pieces[0].answer.reused_tokens)
        await generator.close()
    finally:
        await group.close()
    return {
        "dtype": dtype,
        "first_token_s": round(median(fresh), 4),
        "first_token_of_later_s": round(median(shared), 4),
        "ratio": round(median(fresh) / median(shared), 1),
        "reused_tokens": sorted(reused),
    }


async def paths_by_budget(bundle: TextBundle, latency_s: float, dtype: str) -> dict[str, object]:
    """Two ranks over an emulated slow link: which path tight and relaxed budgets get.

    The tight budget per token lies between what the two paths take alone.
    """
    names = [way.name for way in bundle.manifest.ways]
    group = RankGroup(
        RankConfig.of(
            bundle,
            ranks=2,
            dtype=dtype,
            max_model_len=256,
            kv_cache_tokens=2048,
            max_batched_tokens=64,
        ),
        GroupOptions(latency_s=latency_s),
    )
    rng, vocabulary = np.random.default_rng(0), bundle.manifest.config.vocab_size
    answers: dict[str, list[dict[str, Any]]] = {"tight": [], "relaxed": []}
    try:
        await group.start()
        generator = TextScheduler(group, bundle.tokenizer(), (), bundle.quality, names, 8)
        await generator.measure()
        planned = [generator.times.expected(path, 1) for path in range(len(names))]
        tight = TokenBudget(per_token_s=(min(planned) + planned[0]) / 2)
        for _ in range(8):
            for kind, budget in (("tight", tight), ("relaxed", TokenBudget(per_token_s=1.0))):
                request = GenerationRequest(
                    _random_prompt(rng, 32, vocabulary),
                    time.monotonic(),
                    max_tokens=24,
                    budget=budget,
                )
                pieces, first_s = await _collect(generator, request)
                mean_s = (time.monotonic() - request.arrival - first_s) / (len(pieces) - 1)
                answer = pieces[-1].answer
                answers[kind].append(
                    {
                        "path": answer.name,
                        "perplexity": answer.quality.perplexity if answer.quality else None,
                        "token_ms": 1e3 * mean_s,
                        "met": mean_s <= budget.per_token_s,
                    }
                )
        await generator.close()
    finally:
        await group.close()
    return {
        "dtype": dtype,
        "ranks": 2,
        "emulated_link_ms": 1e3 * latency_s,
        "planned_token_ms": {n: round(1e3 * s, 2) for n, s in zip(names, planned, strict=True)},
        "tight_budget_ms": round(1e3 * tight.per_token_s, 2),
    } | {kind: _told(rows) for kind, rows in answers.items()}


def _told(rows: list[dict[str, Any]]) -> dict[str, object]:
    paths = [row["path"] for row in rows]
    return {
        "answers": len(rows),
        "paths": {name: paths.count(name) for name in sorted(set(paths))},
        "perplexity_told": sorted({round(row["perplexity"], 2) for row in rows}),
        "token_ms_p50": round(median(row["token_ms"] for row in rows), 2),
        "met": sum(row["met"] for row in rows),
    }


async def beside_transformers(bundle: TextBundle, reference: Any, dtype: str) -> dict[str, object]:
    """A batch of prompts that are all there from the start: tokens/s of ours and of the continuous
    batching that `transformers` has, in turns; and on how many answers the two agree."""
    from transformers import GenerationConfig

    rng, vocabulary = np.random.default_rng(0), bundle.manifest.config.vocab_size
    prompts = [list(_random_prompt(rng, 40, vocabulary)) for _ in range(OFFLINE_PROMPTS)]
    settings: Any = GenerationConfig(  # type: ignore[no-untyped-call] # of the library
        max_new_tokens=OFFLINE_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    group = RankGroup(
        RankConfig.of(
            bundle, dtype=dtype, max_model_len=128, kv_cache_tokens=2048, max_batched_tokens=256
        )
    )
    try:
        await group.start()
        generator = TextScheduler(group, bundle.tokenizer())
        await generator.measure()
        ours_s, theirs_s, agree = [], [], 0
        for _ in range(2):
            started = time.monotonic()
            answers = await asyncio.gather(
                *(
                    _collect(
                        generator,
                        GenerationRequest(
                            tuple(prompt), time.monotonic(), OFFLINE_TOKENS, tenant=str(started)
                        ),
                    )
                    for prompt in prompts
                )
            )
            ours_s.append(time.monotonic() - started)
            started = time.monotonic()
            made = await asyncio.to_thread(
                reference.generate_batch,
                inputs=prompts,
                generation_config=settings,
                progress_bar=False,
            )
            theirs_s.append(time.monotonic() - started)
            theirs = [made[key].generated_tokens for key in sorted(made, key=_number)]
            ours = [[piece.token for piece in pieces] for pieces, _ in answers]
            agree = sum(a == b for a, b in zip(ours, theirs, strict=True))
        await generator.close()
    finally:
        await group.close()
    tokens = OFFLINE_PROMPTS * OFFLINE_TOKENS
    return {
        "dtype": dtype,
        "prompts": OFFLINE_PROMPTS,
        "tokens_each": OFFLINE_TOKENS,
        "tokens_per_s": round(tokens / min(ours_s), 1),
        "transformers_tokens_per_s": round(tokens / min(theirs_s), 1),
        "answers_that_agree": agree,
    }


def _number(key: str) -> int:
    return int(key.rsplit("_", 1)[-1])
