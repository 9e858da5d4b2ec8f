"""Tests of the comparison of batching variants under load with token budgets."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ladderstitch.text.bundle import TextBundle
from ladderstitch_loadtest.benchmarks.generation_load import (
    BUDGETS,
    PROMPT_TOKENS,
    VARIANTS,
    BatchingRow,
    arrivals,
    compare_batching,
    plot,
    sustained,
)
from ladderstitch_loadtest.benchmarks.generation_parts import prefix_reuse
from ladderstitch_loadtest.servers.tiny_language import write_tiny


def row(variant: str, rate: float, attainment: float, tokens_per_s: float) -> BatchingRow:
    return BatchingRow(variant, rate, 100, attainment, tokens_per_s, 0.1, 0.2, 0)


def test_arrivals_with_seed_are_poisson_parts_of_the_text() -> None:
    text = list(range(5000))
    plan = arrivals(text, rate=50.0, seconds=40.0, seed=3)
    assert plan == arrivals(text, rate=50.0, seconds=40.0, seed=3)
    assert plan != arrivals(text, rate=50.0, seconds=40.0, seed=4)
    gaps = np.diff([arrival.due_s for arrival in plan])
    assert abs(len(plan) / 2000 - 1) < 0.1
    assert abs(gaps.std() / gaps.mean() - 1) < 0.1
    for arrival in plan:
        tokens = arrival.request.tokens
        assert tokens == tuple(range(tokens[0], tokens[0] + len(tokens)))
    assert {len(arrival.request.tokens) for arrival in plan} == set(PROMPT_TOKENS)
    assert {arrival.request.budget for arrival in plan} == set(BUDGETS)


def test_sustained_compares_rates_at_equal_attainment() -> None:
    sequential, static, continuous = (variant.name for variant in VARIANTS)
    found = sustained(
        [
            row(sequential, 1, 0.99, 30),
            row(sequential, 2, 0.9, 50),
            row(static, 1, 0.5, 30),
            row(continuous, 1, 1.0, 31),
            row(continuous, 4, 0.96, 120),
            row(continuous, 6, 0.8, 140),
        ]
    )
    assert found["sustained"] == {
        sequential: {"offered_per_s": 1, "tokens_per_s": 30},
        static: None,
        continuous: {"offered_per_s": 4, "tokens_per_s": 120},
    }
    # At attainment 0.99 the ratio is 31 / 30, at 0.9 it is 120 / 50.
    assert found["continuous_over_one_after_another"] == round(31 / 30, 2)


async def test_compare_batching_with_tiny_model_measures_all_variants(tmp_path: Path) -> None:
    bundle = TextBundle.load(write_tiny(tmp_path / "tiny"))
    text = "some words to cut prompts from " * 20
    rows: list[BatchingRow] = []
    found = await compare_batching(bundle, text, [3.0], 2.0, "float32", rows.append)
    assert [result.variant for result in rows] == [variant.name for variant in VARIANTS]
    assert len({result.offered for result in rows}) == 1
    assert all(result.tokens_per_s > 0 for result in rows)
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


async def test_prefix_reuse_with_tiny_model_reuses_the_prefix(tmp_path: Path) -> None:
    bundle = TextBundle.load(write_tiny(tmp_path / "tiny"))
    found = await prefix_reuse(bundle, "float32", prefix_tokens=160)
    assert found["reused_tokens"] == [160]
