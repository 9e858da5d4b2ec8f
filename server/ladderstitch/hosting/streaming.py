"""A language model's answers, timed and counted, whoever asks: the same for every protocol."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from ladderstitch.errors import RequestError
from ladderstitch.hosting.registry import TextModel
from ladderstitch.scheduling.requests import GenerationRequest, TokenChunk


@dataclass(frozen=True, slots=True)
class GenerationUsage:
    """What a complete answer cost, from its arrival on; a `met` is None without a budget."""

    prompt_tokens: int
    generated_tokens: int
    queue_s: float
    first_token_s: float
    total_s: float
    first_token_met: bool | None
    token_met: bool | None
    answer_met: bool | None

    @property
    def mean_token_s(self) -> float:
        """Between the tokens after the first; 0 for a single one."""
        return (self.total_s - self.first_token_s) / max(1, self.generated_tokens - 1)

    @property
    def met(self) -> bool | None:
        """Whether all budgets that there were have been met."""
        known = [
            m for m in (self.first_token_met, self.token_met, self.answer_met) if m is not None
        ]
        return all(known) if known else None


async def answer(
    model: TextModel, request: GenerationRequest
) -> AsyncGenerator[tuple[TokenChunk, GenerationUsage | None]]:
    """The pieces of an answer, the last one with its account; closing it ends the work.

    Raises what `TextScheduler.generate` raises; counts that, too.
    """
    metrics, budgeted = model.metrics, _budgeted(request)
    first_at = last_at = 0.0
    try:
        async with aclosing(model.scheduler.generate(request)) as pieces:
            async for piece in pieces:
                now = time.monotonic()
                if piece.index == 0:
                    first_at = now
                    metrics.first_token(piece.answer.queue_s, now - request.arrival)
                else:
                    metrics.next_token(now - last_at)
                last_at = now
                if piece.finish is None:
                    yield piece, None
                    continue
                account = _account(request, piece, first_at, now)
                made = piece.answer
                quality = made.quality.value if made.quality else None
                metrics.completed(
                    made.path, quality, made.reused_tokens, account.total_s, account.met
                )
                yield piece, account
    except RequestError as error:
        metrics.refused(error.code, had_budget=budgeted)
        raise
    except (asyncio.CancelledError, GeneratorExit):
        metrics.refused("CANCELLED", had_budget=budgeted)
        raise


def _account(
    request: GenerationRequest, last: TokenChunk, first_at: float, now: float
) -> GenerationUsage:
    budget, generated = request.budget, last.index + 1
    first_s, total_s = first_at - request.arrival, now - request.arrival
    mean_s = (now - first_at) / max(1, generated - 1)
    return GenerationUsage(
        prompt_tokens=len(request.tokens),
        generated_tokens=generated,
        queue_s=last.answer.queue_s,
        first_token_s=first_s,
        total_s=total_s,
        first_token_met=_met(first_s, budget.first_token_s),
        token_met=_met(mean_s, budget.per_token_s) if generated > 1 else None,
        answer_met=_met(total_s, budget.answer_s),
    )


def _met(seconds: float, wanted: float) -> bool | None:
    return None if math.isinf(wanted) else seconds <= wanted


def _budgeted(request: GenerationRequest) -> bool:
    budget = request.budget
    return not all(
        math.isinf(s) for s in (budget.first_token_s, budget.per_token_s, budget.answer_s)
    )
