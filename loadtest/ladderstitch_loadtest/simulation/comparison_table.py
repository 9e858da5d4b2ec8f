"""A comparison of policies as a page of Markdown: what was won and lost, and every row."""

from __future__ import annotations

from collections.abc import Sequence

from ladderstitch_loadtest.simulation.policy_sweep import ORACLE, Comparison, Figure

BEHIND = 0.1
"""Points of effective quality that are taken for equal."""


def standings(found: Sequence[Comparison]) -> str:
    """`found` has the oracle in all rows or in none."""
    head = columns(found)
    lines = [
        "# Policies in simulation",
        "",
        "Effective quality in percent (attainment in brackets), means over "
        f"{found[0].seeds} paired seeds; points that",
        "`adaptive` is ahead, with 95 % intervals. The best other is chosen after the fact, for "
        "each trace, from",
        "slackfit, max_batch, max_quality, model_switching and every fixed variant of the frontier.",
        "Written by `ladderstitch-loadtest compare`.",
        "",
        *_summary(found),
        "",
        _line(head),
        _line(["---"] * len(head)),
        *(_line(cells(comparison)) for comparison in found),
    ]
    return "\n".join(lines) + "\n"


def _summary(found: Sequence[Comparison]) -> list[str]:
    margins = [comparison.margin for comparison in found]
    behind = [c for c in found if c.margin < -BEHIND]
    surely = [c for c in behind if _best(c).behind + _best(c).behind_half_width < -BEHIND]
    over_slackfit = [comparison.figure("slackfit").behind for comparison in found]
    mixed = [comparison.margin for comparison in found if comparison.mixed]
    lines = [
        f"- At most {BEHIND} points behind the best other on {len(found) - len(behind)} of "
        f"{len(found)} traces, beyond chance on {len(surely)} of the other {len(behind)}; the "
        f"worst {min(margins):+.2f}.",
        f"- Ahead of slackfit on {sum(gap > 0 for gap in over_slackfit)}, by "
        f"{min(over_slackfit):+.2f} to {max(over_slackfit):+.2f} points.",
        f"- Ahead of the best other on {sum(margin > 0 for margin in mixed)} of {len(mixed)} "
        "traces with mixed budgets.",
    ]
    limits = [(c.figure("adaptive"), limit) for c in found if (limit := _oracle(c)) is not None]
    if limits:
        quality = [100 * (one.effective_quality - limit.effective_quality) for one, limit in limits]
        met = [100 * (one.attainment - limit.attainment) for one, limit in limits]
        lines.append(
            f"- Beside the oracle, which knows the future: {min(quality):+.2f} to "
            f"{max(quality):+.2f} points of effective quality, {min(met):+.2f} to "
            f"{max(met):+.2f} of attainment."
        )
    return lines


def columns(found: Sequence[Comparison]) -> list[str]:
    """Names of what `cells` gives."""
    names = ["family", "trace", "adaptive", "best other", "ahead", "slackfit", "ahead"]
    return names if _oracle(found[0]) is None else [*names, ORACLE]


def cells(comparison: Comparison) -> list[str]:
    """A row: effective quality in percent and, in brackets, attainment."""
    best, slackfit = _best(comparison), comparison.figure("slackfit")
    row = [
        comparison.family,
        comparison.scenario,
        _figure(comparison.figure("adaptive")),
        f"{best.policy} {_figure(best)}",
        _ahead(best),
        _figure(slackfit),
        _ahead(slackfit),
    ]
    limit = _oracle(comparison)
    return row if limit is None else [*row, _figure(limit)]


def _figure(one: Figure) -> str:
    return f"{100 * one.effective_quality:.2f} ({100 * one.attainment:.1f})"


def _ahead(other: Figure) -> str:
    return f"{other.behind:+.2f} ± {other.behind_half_width:.2f}"


def _best(comparison: Comparison) -> Figure:
    return next(f for f in comparison.figures if f.policy not in ("adaptive", ORACLE))


def _oracle(comparison: Comparison) -> Figure | None:
    return next((f for f in comparison.figures if f.policy == ORACLE), None)


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"
