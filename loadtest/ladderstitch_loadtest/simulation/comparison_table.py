"""The comparison table: policies on scenarios as a page of Markdown, with a summary."""

from __future__ import annotations

from collections.abc import Sequence

from ladderstitch_loadtest.simulation.policy_sweep import ORACLE, Comparison, PolicyFigures

TOLERANCE_POINTS = 0.1
"""Difference of effective quality, in points, up to which two policies count as equal."""

HEADER = """\
# Policies in simulation

Means over {seeds} paired seeds: effective quality in percent, with attainment in brackets. `ahead`
is the lead of `adaptive` in points, with its 95 % interval. The best other policy is chosen after
the fact, for each trace, from slackfit, max_batch, max_quality, model_switching and every fixed
variant of the frontier. Written by `ladderstitch-loadtest compare`.
"""


def format_page(found: Sequence[Comparison]) -> str:
    """Return the page; either all comparisons have an oracle or none has."""
    head = column_names(found)
    lines = [
        HEADER.format(seeds=found[0].seeds),
        *_format_summary(found),
        "",
        _format_row(head),
        _format_row(["---"] * len(head)),
        *(_format_row(row_cells(comparison)) for comparison in found),
    ]
    return "\n".join(lines) + "\n"


def _format_summary(found: Sequence[Comparison]) -> list[str]:
    margins = [comparison.margin for comparison in found]
    behind = [c for c in found if c.margin < -TOLERANCE_POINTS]
    certain = [c for c in behind if _upper_margin(c) < -TOLERANCE_POINTS]
    over_slackfit = [comparison.figures_of("slackfit").behind for comparison in found]
    mixed = [comparison.margin for comparison in found if comparison.mixed]
    return [
        f"- At most {TOLERANCE_POINTS} points behind the best other on "
        f"{len(found) - len(behind)} of "
        f"{len(found)} traces, beyond chance on {len(certain)} of the other {len(behind)}; the "
        f"worst {min(margins):+.2f}.",
        f"- Ahead of slackfit on {sum(gap > 0 for gap in over_slackfit)}, by "
        f"{min(over_slackfit):+.2f} to {max(over_slackfit):+.2f} points.",
        f"- Ahead of the best other on {sum(margin > 0 for margin in mixed)} of {len(mixed)} "
        "traces with mixed budgets.",
        *_format_oracle_summary(found),
    ]


def _format_oracle_summary(found: Sequence[Comparison]) -> list[str]:
    pairs = [
        (c.figures_of("adaptive"), best) for c in found if (best := _oracle_figures(c)) is not None
    ]
    if not pairs:
        return []
    quality = [100 * (one.effective_quality - best.effective_quality) for one, best in pairs]
    met = [100 * (one.attainment - best.attainment) for one, best in pairs]
    return [
        f"- Compared with the oracle, which knows the future: {min(quality):+.2f} to "
        f"{max(quality):+.2f} points of effective quality, {min(met):+.2f} to "
        f"{max(met):+.2f} of attainment."
    ]


def column_names(found: Sequence[Comparison]) -> list[str]:
    """Return the names of the cells of `row_cells`."""
    names = ["family", "trace", "adaptive", "best other", "ahead", "slackfit", "ahead"]
    return names if _oracle_figures(found[0]) is None else [*names, ORACLE]


def row_cells(comparison: Comparison) -> list[str]:
    """Return a row: effective quality in percent, with attainment in brackets."""
    best, slackfit = _best_other(comparison), comparison.figures_of("slackfit")
    row = [
        comparison.family,
        comparison.scenario,
        _format_figures(comparison.figures_of("adaptive")),
        f"{best.policy} {_format_figures(best)}",
        _format_lead(best),
        _format_figures(slackfit),
        _format_lead(slackfit),
    ]
    limit = _oracle_figures(comparison)
    return row if limit is None else [*row, _format_figures(limit)]


def _format_figures(one: PolicyFigures) -> str:
    return f"{100 * one.effective_quality:.2f} ({100 * one.attainment:.1f})"


def _format_lead(other: PolicyFigures) -> str:
    return f"{other.behind:+.2f} ± {other.behind_half_width:.2f}"


def _upper_margin(comparison: Comparison) -> float:
    """Return the upper end of the 95 % interval of the lead over the best other policy."""
    best = _best_other(comparison)
    return best.behind + best.behind_half_width


def _best_other(comparison: Comparison) -> PolicyFigures:
    return next(f for f in comparison.figures if f.policy not in ("adaptive", ORACLE))


def _oracle_figures(comparison: Comparison) -> PolicyFigures | None:
    return next((f for f in comparison.figures if f.policy == ORACLE), None)


def _format_row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"
