"""Benchmark of decoding speed, and of what the death of a rank costs the callers."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import aclosing
from statistics import median
from typing import Any

import numpy as np
import torch

from ladderstitch.scheduling.generation import GenerationRequest
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_config import GroupOptions, RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.scheduler.scheduler import TextScheduler

PROMPT = "The history of the bicycle begins"
STEPS = 16
ROUNDS = 7


async def decoding(bundle: TextBundle, references: dict[str, Any]) -> dict[str, object]:
    """Return tokens/s at batch 1 on one thread, compared with `transformers` in each dtype.

    The rounds are interleaved. Our time includes the messages to the rank's process; both decode
    greedily with a cache.
    """
    torch.set_num_threads(1)
    found: dict[str, object] = {"memory_bandwidth_gb_s": round(read_bandwidth() / 1e9, 1)}
    for dtype, theirs in references.items():
        group = RankGroup(RankConfig.of(bundle, dtype=dtype, max_model_len=1024))
        try:
            await group.start()
            found[dtype] = await _compare_rates(bundle, group, theirs)
        finally:
            await group.close()
    return found


async def _compare_rates(bundle: TextBundle, group: RankGroup, theirs: Any) -> dict[str, object]:
    prompt = bundle.tokenizer().encode(PROMPT)
    rates = [
        (await _our_rate(group, prompt), _their_rate(theirs, prompt)) for _ in range(ROUNDS + 1)
    ]
    ours, other = (median(column) for column in zip(*rates[1:], strict=True))
    weight_bytes = group.loaded[0]["weight_bytes"]
    return {
        "tokens_per_s": round(ours, 1),
        "transformers_tokens_per_s": round(other, 1),
        "ratio": round(median(a / b for a, b in rates[1:]), 2),
        "bytes_per_token": weight_bytes,
        "read_gb_s": round(weight_bytes * ours / 1e9, 1),
    }


async def _our_rate(group: RankGroup, prompt: list[int]) -> float:
    logits = await group.forward(np.array([prompt]), 0)
    started = time.perf_counter()
    for step in range(STEPS):
        token = int(logits[0].argmax())
        logits = await group.forward(np.array([[token]]), len(prompt) + step)
    return STEPS / (time.perf_counter() - started)


@torch.inference_mode()
def _their_rate(model: Any, prompt: list[int]) -> float:
    state = model(torch.tensor([prompt]), use_cache=True)
    started = time.perf_counter()
    for _ in range(STEPS):
        token = state.logits[:, -1:].argmax(-1)
        state = model(token, past_key_values=state.past_key_values, use_cache=True)
    return STEPS / (time.perf_counter() - started)


def read_bandwidth() -> float:
    """Return the bytes per second that one thread reads from memory."""
    data = torch.ones(100_000_000)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - started)
    return data.nbytes / min(seconds)


async def rank_losses(bundle: TextBundle) -> dict[str, object]:
    """Return what `kill -9` of one of two ranks costs open streams, with and without a spare."""
    return {f"{spares} spares": await _lose_a_rank(bundle, spares) for spares in (1, 0)}


async def _lose_a_rank(bundle: TextBundle, spares: int) -> dict[str, object]:
    rank_config = RankConfig.of(bundle, ranks=2, max_model_len=512)
    group = RankGroup(rank_config, GroupOptions(spares=spares))
    tokens = tuple(bundle.tokenizer().encode(PROMPT))
    try:
        await group.start()
        scheduler = TextScheduler(group, bundle.tokenizer(), ())
        undisturbed = await _stream(scheduler, tokens, asyncio.Event())
        answers = await _kill_under_streams(group, scheduler, tokens)
    finally:
        await group.close()
    complete = [answer for answer in answers if not isinstance(answer, BaseException)]
    return {
        "accepted": len(answers),
        "lost": len(answers) - len(complete),
        "with_other_tokens": sum(answer[0] != undisturbed[0] for answer in complete),
        "longest_gap_s": round(max(answer[1] for answer in complete), 2),
        "longest_gap_undisturbed_s": round(undisturbed[1], 3),
    }


async def _kill_under_streams(
    group: RankGroup, scheduler: TextScheduler, tokens: tuple[int, ...]
) -> list[tuple[list[int], float] | BaseException]:
    """Kill a rank when the first of eight streams has eight tokens; return how each ended."""
    started = asyncio.Event()
    streams = [asyncio.create_task(_stream(scheduler, tokens, started)) for _ in range(8)]
    await started.wait()
    os.kill(group.pids[1], signal.SIGKILL)
    return await asyncio.gather(*streams, return_exceptions=True)


async def _stream(
    scheduler: TextScheduler, tokens: tuple[int, ...], started: asyncio.Event
) -> tuple[list[int], float]:
    """Return the tokens of an answer and the longest time between two of them, seconds."""
    request = GenerationRequest(tokens, time.monotonic(), max_tokens=48)
    answer, gap, last = [], 0.0, None
    async with aclosing(scheduler.generate(request)) as chunks:
        async for chunk in chunks:
            now = time.monotonic()
            gap = max(gap, now - last) if last is not None else gap
            last = now
            answer.append(chunk.token)
            if len(answer) == 8:
                started.set()
    return answer, gap
