"""An answer that begins elsewhere goes on as if it had never stopped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ladderstitch.errors import InvalidArgument
from ladderstitch.scheduling.generation import GenerationRequest, TokenChunk
from ladderstitch.scheduling.sampling import Sampling
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.messages import LogitsMode, Step, StepOutput
from tests.support.language_models import END
from tests.text.scheduler.stepped_group import SteppedScheduler

PROMPT = tuple(b"a prompt")
OPTIONS: list[dict[str, Any]] = [
    {"sampling": Sampling(temperature=1.2, seed=4, top_p=0.95)},
    {"sampling": Sampling(temperature=1.0, seed=2, top_k=20), "stop": ("\u00e9",)},
    {
        "sampling": Sampling(temperature=0.7, seed=1, repetition_penalty=1.5, presence_penalty=1.0),
        "ignore_end_tokens": True,
    },
    {"sampling": Sampling(frequency_penalty=1.0), "min_tokens": 20},
    {"sampling": Sampling(temperature=1.0, seed=9), "logprobs": 2, "stop_tokens": (7, 8)},
]


class FixedLogits:
    """Steps whose logits depend on the last token and its position alone."""

    async def run(self, step: Step) -> StepOutput:
        """Return the output of a step."""
        logits, best = [], []
        for part in step.inputs:
            numbered = list(enumerate(part.tokens, part.start + 1))
            rows = [
                np.random.default_rng([token, end]).normal(size=257).astype(np.float32) * 2
                for end, token in (
                    numbered if part.logits_mode == LogitsMode.ALL else numbered[-1:]
                )
            ]
            if part.logits_mode in (LogitsMode.LAST, LogitsMode.ALL):
                logits += rows
            elif part.logits_mode == LogitsMode.BEST:
                best.append(int(rows[-1].argmax()))
        found = np.array(logits, np.float32).reshape(len(logits), 257)
        return StepOutput(np.array(best, np.int64), found)


def start(bundle: TextBundle) -> SteppedScheduler:
    """Return a scheduler whose steps run at once."""
    scheduler = SteppedScheduler(bundle)
    scheduler.steps.run = FixedLogits().run  # type: ignore[method-assign]
    scheduler.end_tokens = frozenset({END})
    return scheduler


async def answer(bundle: TextBundle, request: GenerationRequest) -> list[TokenChunk]:
    """Return all chunks of an answer of a replica of its own."""
    scheduler = start(bundle)
    chunks = [chunk async for chunk in scheduler.generate(request)]
    await scheduler.close()
    return chunks


@pytest.mark.parametrize("options", OPTIONS)
async def test_rest_of_an_answer_is_the_same(
    tiny_language_bundle: TextBundle, options: dict[str, Any]
) -> None:
    request = GenerationRequest(PROMPT, 0.0, max_tokens=30, **options)
    whole = await answer(tiny_language_bundle, request)
    assert len(whole) > 4
    for known in (1, 3, len(whole) - 1):
        answered = tuple(chunk.token for chunk in whole[:known])
        rest_of = replace(request, answered=answered, first_token_s=0.25)
        rest = await answer(tiny_language_bundle, rest_of)
        for one, other in zip(rest, whole[known:], strict=True):
            fields = ("index", "token", "text", "finish", "logprob", "alternatives")
            for field in fields:
                assert getattr(one, field) == getattr(other, field)
        assert rest[-1].usage is not None
        assert rest[-1].usage.generated_tokens == len(whole)
        assert rest[-1].usage.prompt_tokens == len(PROMPT)
        assert rest[-1].usage.first_token_s == 0.25


async def test_answer_that_is_complete_cannot_go_on(tiny_language_bundle: TextBundle) -> None:
    request = GenerationRequest(PROMPT, 0.0, max_tokens=2, answered=(1, 2))
    with pytest.raises(
        InvalidArgument, match=r"answer_so_far: expected fewer than max_tokens \(2\)"
    ):
        await answer(tiny_language_bundle, request)
