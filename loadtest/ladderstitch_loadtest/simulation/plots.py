"""The plot of a policy sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ladderstitch_loadtest.simulation.policy_sweep import ORACLE, Comparison

COLOURS = {
    "adaptive": "tab:red",
    "slackfit": "tab:blue",
    "max_batch": "tab:green",
    "max_quality": "tab:purple",
    "model_switching": "tab:orange",
    ORACLE: "black",
}


def plot_comparisons(found: Sequence[Comparison], file: Path) -> None:
    """Write a plot of effective quality by policy: a row per scenario, a panel per family."""
    families = list(dict.fromkeys(comparison.family for comparison in found))
    figure = Figure(figsize=(7 * len(families), 0.24 * len(found) / len(families) + 2))
    panels = figure.subplots(1, len(families), squeeze=False)[0]
    for panel, family in zip(panels, families, strict=True):
        _plot_family(panel, [comparison for comparison in found if comparison.family == family])
        panel.set_title(family)
    for policy, colour in COLOURS.items():
        panels[0].plot([], [], "o", color=colour, label=policy)
    panels[0].plot([], [], "|", color="grey", markersize=11, label="best fixed variant")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def _plot_family(panel: Axes, found: Sequence[Comparison]) -> None:
    for row, comparison in enumerate(found):
        fixed = [f for f in comparison.figures if f.policy.startswith("fixed")]
        best = 100 * max(f.effective_quality for f in fixed)
        panel.plot(best, row, "|", color="grey", markersize=11, zorder=1)
        for one in comparison.figures:
            if one.policy in COLOURS:
                x = 100 * one.effective_quality
                panel.plot(x, row, "o", color=COLOURS[one.policy], markersize=4)
    panel.set_yticks(range(len(found)), [comparison.scenario for comparison in found], fontsize=7)
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.3)
    panel.set_xlabel("effective quality, %")
