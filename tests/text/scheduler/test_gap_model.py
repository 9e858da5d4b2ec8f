"""Tests of the pauses between steps, against lines that are known."""

from __future__ import annotations

import random

import pytest

from ladderstitch.text.scheduler.gap_model import GapModel


def learned(pauses: list[tuple[int, float]]) -> GapModel:
    model = GapModel()
    for num_sequences, seconds in pauses:
        model.observe(num_sequences, seconds)
    return model


def test_pauses_on_a_line_are_learned() -> None:
    choice = random.Random(1)
    sizes = [choice.randint(1, 24) for _ in range(400)]
    model = learned([(n, 3e-4 + 5e-5 * n) for n in sizes])
    for n in (1, 8, 32):
        assert model.expected(n) == pytest.approx(3e-4 + 5e-5 * n, rel=0.05)


def test_pauses_of_one_size_are_in_proportion_to_the_sequences() -> None:
    model = learned([(2, 4e-4)] * 100)
    assert model.expected(2) == pytest.approx(4e-4, rel=0.01)
    assert 4e-4 < model.expected(4) <= 8e-4 * 1.001


def test_new_pauses_replace_old_ones() -> None:
    old = [(1, 1e-3), (8, 2e-3)] * 100
    model = learned(old + [(1, 4e-4), (8, 5e-4)] * 200)
    assert model.expected(8) == pytest.approx(5e-4, rel=0.05)


def test_one_long_pause_counts_little() -> None:
    usual = [(1, 3e-4), (4, 6e-4)] * 50
    model, disturbed = learned(usual), learned([*usual, (4, 2.0)])
    assert disturbed.expected(4) < 1.1 * model.expected(4)


def test_pauses_that_fall_with_the_sequences_give_no_negative_times() -> None:
    model = learned([(1, 1e-3), (8, 1e-4)] * 50)
    assert all(model.expected(n) >= 0.0 for n in (0, 1, 8, 100))
