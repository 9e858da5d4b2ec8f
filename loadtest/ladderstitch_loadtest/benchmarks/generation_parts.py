"""Benchmarks of one language model: prefix reuse, variants by budget, and `transformers`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import numpy as np

from ladderstitch.scheduling.generation import GenerationRequest, TokenBudget, TokenChunk
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_config import GroupOptions, RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.scheduler.scheduler import TextScheduler

T = TypeVar("T")
PREFIX_TOKENS = 512
PREFIX_ROUNDS = 5
PROMPTS_PER_PREFIX = 4
OFFLINE_PROMPTS = 8
OFFLINE_TOKENS = 16


@asynccontextmanager
async def _measured_scheduler(
    bundle: TextBundle, options: GroupOptions | None = None, **fields: Any
) -> AsyncIterator[TextScheduler]:
    """Start a group of ranks and a scheduler that has measured its steps; close both at exit.

    `fields` are those of `RankConfig`.
    """
    group = RankGroup(RankConfig.of(bundle, **fields), options)
    names = [variant.name for variant in bundle.manifest.variants]
    try:
        await group.start()
        scheduler = TextScheduler(group, bundle.tokenizer(), (), bundle.quality, names)
        await scheduler.measure()
        yield scheduler
        await scheduler.close()
    finally:
        await group.close()


async def _collect(
    scheduler: TextScheduler, request: GenerationRequest
) -> tuple[list[TokenChunk], float]:
    """Return all chunks of an answer, and the seconds to the first one."""
    first_s = 0.0
    chunks: list[TokenChunk] = []
    async with aclosing(scheduler.generate(request)) as stream:
        async for chunk in stream:
            if not chunks:
                first_s = time.monotonic() - request.arrival
            chunks.append(chunk)
    return chunks, first_s


def _random_prompt(rng: np.random.Generator, num_tokens: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(int(token) for token in rng.integers(0, vocab_size, num_tokens))


@dataclass(frozen=True, slots=True)
class PrefixTimes:
    """Seconds to the first token of prompts whose prefix is new, and of later ones."""

    first_s: list[float]
    later_s: list[float]
    reused_tokens: set[int]

    def add(self, new_prefix: bool, chunks: list[TokenChunk], first_token_s: float) -> None:
        """Add one answer."""
        (self.first_s if new_prefix else self.later_s).append(first_token_s)
        if not new_prefix:
            self.reused_tokens.add(chunks[0].answer.reused_tokens)

    def to_dict(self) -> dict[str, object]:
        """Return the medians, their ratio, and the distinct numbers of reused tokens."""
        first, later = median(self.first_s), median(self.later_s)
        return {
            "first_token_s": round(first, 4),
            "first_token_of_later_s": round(later, 4),
            "ratio": round(first / later, 1),
            "reused_tokens": sorted(self.reused_tokens),
        }


async def prefix_reuse(
    bundle: TextBundle, dtype: str, prefix_tokens: int = PREFIX_TOKENS
) -> dict[str, object]:
    """Measure the seconds to the first token with and without a cached prefix.

    Every prompt is a prefix and 16 tokens of its own. The first prompt of a prefix computes it;
    later ones reuse it.
    """
    max_model_len = prefix_tokens + 32
    rng, vocab_size = np.random.default_rng(0), bundle.manifest.config.vocab_size
    found = PrefixTimes([], [], set())
    async with _measured_scheduler(
        bundle,
        dtype=dtype,
        max_model_len=max_model_len,
        kv_cache_tokens=8 * max_model_len,
        max_batched_tokens=min(256, max_model_len),
    ) as scheduler:
        for _ in range(PREFIX_ROUNDS):
            prefix = _random_prompt(rng, prefix_tokens, vocab_size)
            for number in range(PROMPTS_PER_PREFIX):
                prompt = prefix + _random_prompt(rng, 16, vocab_size)
                request = GenerationRequest(prompt, time.monotonic(), max_tokens=2)
                found.add(number == 0, *await _collect(scheduler, request))
    return {"dtype": dtype} | found.to_dict()


async def variants_by_budget(bundle: TextBundle, latency_s: float, dtype: str) -> dict[str, object]:
    """Count the variants that tight and relaxed budgets get on two ranks over an emulated link.

    The tight budget per token lies between the seconds per token of two variants without load.
    """
    names = [variant.name for variant in bundle.manifest.variants]
    async with _measured_scheduler(
        bundle,
        GroupOptions(latency_s=latency_s),
        ranks=2,
        dtype=dtype,
        max_model_len=256,
        kv_cache_tokens=2048,
        max_batched_tokens=64,
    ) as scheduler:
        planned = [scheduler.times.expected(variant, 1) for variant in range(len(names))]
        tight = TokenBudget(per_token_s=(min(planned) + planned[0]) / 2)
        budgets = {"tight": tight, "relaxed": TokenBudget(per_token_s=1.0)}
        answers = await _answer_in_turn(scheduler, budgets, bundle.manifest.config.vocab_size)
    return {
        "dtype": dtype,
        "ranks": 2,
        "emulated_link_ms": 1e3 * latency_s,
        "planned_token_ms": {n: round(1e3 * s, 2) for n, s in zip(names, planned, strict=True)},
        "tight_budget_ms": round(1e3 * tight.per_token_s, 2),
    } | {name: _summarise(rows) for name, rows in answers.items()}


async def _answer_in_turn(
    scheduler: TextScheduler, budgets: Mapping[str, TokenBudget], vocab_size: int
) -> dict[str, list[dict[str, Any]]]:
    """Return eight answers for each budget, which take turns."""
    rng = np.random.default_rng(0)
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in budgets}
    for _ in range(8):
        for name, budget in budgets.items():
            prompt = _random_prompt(rng, 32, vocab_size)
            answers[name].append(await _measure_answer(scheduler, prompt, budget))
    return answers


async def _measure_answer(
    scheduler: TextScheduler, prompt: tuple[int, ...], budget: TokenBudget
) -> dict[str, Any]:
    request = GenerationRequest(prompt, time.monotonic(), max_tokens=24, budget=budget)
    chunks, first_s = await _collect(scheduler, request)
    mean_s = (time.monotonic() - request.arrival - first_s) / (len(chunks) - 1)
    info = chunks[-1].answer
    return {
        "variant": info.name,
        "perplexity": info.quality.perplexity if info.quality else None,
        "token_ms": 1e3 * mean_s,
        "met": mean_s <= budget.per_token_s,
    }


def _summarise(rows: list[dict[str, Any]]) -> dict[str, object]:
    names = [row["variant"] for row in rows]
    return {
        "answers": len(rows),
        "variants": {name: names.count(name) for name in sorted(set(names))},
        "perplexity_reported": sorted({round(row["perplexity"], 2) for row in rows}),
        "token_ms_p50": round(median(row["token_ms"] for row in rows), 2),
        "met": sum(row["met"] for row in rows),
    }


async def compare_with_transformers(
    bundle: TextBundle, reference: Any, dtype: str
) -> dict[str, object]:
    """Measure tokens/s of this server and of the continuous batching of `transformers`, in turns.

    All prompts are submitted at the start. The result has the number of answers on which the two
    implementations agree.
    """
    rng, vocab_size = np.random.default_rng(0), bundle.manifest.config.vocab_size
    prompts = [list(_random_prompt(rng, 40, vocab_size)) for _ in range(OFFLINE_PROMPTS)]
    seconds: list[tuple[float, float]] = []
    agree = 0
    async with _measured_scheduler(
        bundle, dtype=dtype, max_model_len=128, kv_cache_tokens=2048, max_batched_tokens=256
    ) as scheduler:
        for tenant in ("first", "second"):
            answers, ours_s = await _timed(_answer_all(scheduler, prompts, tenant))
            expected, theirs_s = await _timed(
                asyncio.to_thread(_reference_answers, reference, prompts)
            )
            seconds.append((ours_s, theirs_s))
            agree = sum(a == b for a, b in zip(answers, expected, strict=True))
    rates = [
        OFFLINE_PROMPTS * OFFLINE_TOKENS / min(column) for column in zip(*seconds, strict=True)
    ]
    return {
        "dtype": dtype,
        "prompts": OFFLINE_PROMPTS,
        "tokens_each": OFFLINE_TOKENS,
        "tokens_per_s": round(rates[0], 1),
        "transformers_tokens_per_s": round(rates[1], 1),
        "answers_that_agree": agree,
    }


async def _timed(work: Awaitable[T]) -> tuple[T, float]:
    started = time.monotonic()
    return await work, time.monotonic() - started


async def _answer_all(
    scheduler: TextScheduler, prompts: list[list[int]], tenant: str
) -> list[list[int]]:
    """Return the tokens of greedy answers; a new tenant reuses no prefix of another one."""
    return await asyncio.gather(*(_answer(scheduler, prompt, tenant) for prompt in prompts))


async def _answer(scheduler: TextScheduler, prompt: list[int], tenant: str) -> list[int]:
    request = GenerationRequest(tuple(prompt), time.monotonic(), OFFLINE_TOKENS, tenant=tenant)
    chunks, _ = await _collect(scheduler, request)
    return [chunk.token for chunk in chunks]


def _reference_answers(reference: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Return the tokens that `transformers` generates, in the order of the prompts."""
    from transformers import GenerationConfig

    settings: Any = GenerationConfig(  # type: ignore[no-untyped-call] # of the library
        max_new_tokens=OFFLINE_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    generated = reference.generate_batch(
        inputs=prompts, generation_config=settings, progress_bar=False
    )
    return [generated[key].generated_tokens for key in sorted(generated, key=_number)]


def _number(key: str) -> int:
    """Return the number at the end of a request id of `transformers`."""
    return int(key.rsplit("_", 1)[-1])
