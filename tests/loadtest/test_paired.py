"""Differences of paired runs: values from a textbook formula, computed by hand."""

from __future__ import annotations

import pytest

from ladderstitch_loadtest.load.paired import paired_difference


def test_paired_difference_is_students() -> None:
    # differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975; 2) = 4.3027
    mean, half_width = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert mean == pytest.approx(2)
    assert half_width == pytest.approx(4.3027 / 3**0.5, rel=1e-4)


def test_paired_difference_of_one_pair_has_no_interval() -> None:
    assert paired_difference([0.75], [0.5]) == (0.25, 0.0)


def test_paired_difference_of_unequal_lengths_fails() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
