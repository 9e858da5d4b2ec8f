"""Tests of the instants at which an answer needs its tokens."""

from __future__ import annotations

import math

import pytest

from ladderstitch.scheduling.generation import NO_BUDGET, GenerationRequest, TokenBudget
from ladderstitch.text.scheduler.pace import DEFAULT_TPOT_S, DEFAULT_TTFT_S, PACE_TOKENS, Pace


def pace_of(budget: TokenBudget, max_tokens: int, tokens_at: list[float]) -> Pace:
    """Return the pace of an answer that arrived at 5 s and got tokens at some instants."""
    request = GenerationRequest((1,), arrival=5.0, max_tokens=max_tokens, budget=budget)
    pace = Pace(request)
    for instant in tokens_at:
        pace.add_token(instant)
    return pace


def test_deadlines_follow_the_first_token() -> None:
    budget = TokenBudget(first_token_s=1.0, per_token_s=0.1)
    assert pace_of(budget, 10, []).deadline(0.01) == 6.0
    assert pace_of(budget, 10, [5.5, 5.51, 5.9]).deadline(0.01) == pytest.approx(5.8)
    assert pace_of(NO_BUDGET, 10, []).deadline(0.01) == 5.0 + DEFAULT_TTFT_S
    whole = TokenBudget(answer_s=2.0)
    assert pace_of(whole, 11, []).deadline(0.1) == pytest.approx(6.0)  # 10 tokens follow
    assert pace_of(whole, 11, [6.0] * 5).deadline(0.1) == pytest.approx(6.5)
    assert not math.isinf(pace_of(NO_BUDGET, 2000, [6.0] * 1000).deadline(0.1))


def test_affordable_time_spreads_what_is_left() -> None:
    whole = pace_of(TokenBudget(answer_s=2.0), 11, [5.5])
    assert whole.affordable_token_s(6.0) == pytest.approx(0.1)  # 1 s for 10 tokens
    assert whole.affordable_token_s(8.0) < 0.0
    behind = pace_of(TokenBudget(per_token_s=0.1), 100, [5.0, 5.1, 5.4])
    assert behind.affordable_token_s(5.4) == pytest.approx(0.1 - 0.2 / PACE_TOKENS)
    assert math.isinf(pace_of(NO_BUDGET, 10, [5.5]).affordable_token_s(6.0))


def test_period_is_bounded() -> None:
    assert pace_of(NO_BUDGET, 10, [5.5]).period_s(6.0, 0.01) == DEFAULT_TPOT_S
    late = pace_of(TokenBudget(answer_s=2.0), 11, [5.5])
    assert late.period_s(8.0, 0.01) == 0.01
    assert late.period_s(6.0, 0.01) == pytest.approx(0.1)


def test_continued_answer_keeps_its_first_token() -> None:
    request = GenerationRequest(
        (1,),
        arrival=5.0,
        max_tokens=10,
        budget=TokenBudget(per_token_s=0.1),
        answered=(7, 8),
        first_token_s=0.5,
    )
    assert Pace(request).num_left == 8
    assert Pace(request).deadline(0.01) == pytest.approx(5.7)
