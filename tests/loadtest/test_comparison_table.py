"""Tests of the comparison table on comparisons with given figures."""

from __future__ import annotations

from ladderstitch_loadtest.simulation.comparison_table import format_page
from ladderstitch_loadtest.simulation.policy_sweep import Comparison, PolicyFigures


def make_comparison(
    quality: float, ahead: float, half: float, slackfit: float, oracle: float | None = None
) -> Comparison:
    """Return figures of adaptive, of one fixed variant, of slackfit and, if given, the oracle."""
    figures = [
        PolicyFigures("adaptive", 0.99, quality, {}, 0.0, 0.0),
        PolicyFigures("fixed 1", 1.0, quality - ahead / 100, {}, ahead, half),
        PolicyFigures("slackfit", 0.9, quality - slackfit / 100, {}, slackfit, 0.1),
    ]
    if oracle is not None:
        figures.append(PolicyFigures("oracle", 1.0, oracle, {}, 100 * (quality - oracle), 0.0))
    figures.sort(key=lambda one: -one.effective_quality)
    return Comparison("f", "a trace", ahead > 0, 1, 10, figures)


def test_format_page_counts_losses_beyond_chance() -> None:
    page = format_page(
        [
            make_comparison(0.9, 0.5, 0.1, 2.0),
            make_comparison(0.9, -0.05, 0.01, 1.0),  # within the tolerance
            make_comparison(0.9, -0.4, 0.6, 3.0),  # within the interval of chance
            make_comparison(0.9, -0.4, 0.2, 0.5),
        ]
    )
    assert "At most 0.1 points behind the best other on 2 of 4 traces" in page
    assert "beyond chance on 1 of the other 2; the worst -0.40" in page
    assert "Ahead of slackfit on 4, by +0.50 to +3.00 points" in page
    assert "Ahead of the best other on 1 of 1 traces with mixed budgets" in page
    assert "oracle" not in page
    row = "| f | a trace | 90.00 (99.0) | fixed 1 89.50 (100.0) | +0.50 ± 0.10 | 88.00 (90.0) |"
    assert row in page


def test_format_page_compares_with_the_oracle() -> None:
    page = format_page([make_comparison(0.9, 0.5, 0.1, 2.0, oracle=0.92)])
    assert "-2.00 to -2.00 points of effective quality, -1.00 to -1.00 of attainment" in page
    assert page.rstrip().endswith("| 92.00 (100.0) |")
