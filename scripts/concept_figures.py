"""Draw the two figures of docs/concepts.md: what a stitch is, and what a ladder layer hides."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

OUT = Path(__file__).resolve().parents[1] / "docs" / "images"
BLUE, ORANGE, GREEN, GREY = "#4477aa", "#ee7733", "#228833", "#bbbbbb"
BLOCKS = 6
ARROW = {"arrowprops": {"arrowstyle": "-|>", "color": "black"}}
ARROW_BACK = {"arrowprops": {"arrowstyle": "<|-", "color": "black"}}


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    """Draw a rounded box with its lower left corner at (x, y)."""
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=colour, ec="none"
        )
    )


def stitches() -> None:
    """Draw two anchors and one stitch that runs through both."""
    figure, axes = plt.subplots(figsize=(7.2, 2.9))
    for row, (name, height, y) in enumerate(
        (("large anchor", 1.0, 2.0), ("small anchor", 0.5, 0.4))
    ):
        axes.text(-0.3, y + height / 2, name, ha="right", va="center", fontsize=10)
        for block in range(BLOCKS):
            on_route = block < 4 if row else block >= 4
            box(axes, block, y, 0.8, height, BLUE if on_route else GREY)
    axes.annotate(
        "",
        xy=(4.35, 1.95),
        xytext=(3.45, 0.95),
        arrowprops={"arrowstyle": "-|>", "color": ORANGE, "lw": 2.5},
    )
    axes.text(4.35, 1.2, "stitching layer\n(one affine map)", color=ORANGE, fontsize=9, va="center")
    axes.annotate("image", xy=(0.4, 0.36), xytext=(0.4, -0.3), ha="center", fontsize=9, **ARROW)
    axes.annotate("label", xytext=(6.2, 2.5), xy=(5.84, 2.5), va="center", fontsize=9, **ARROW_BACK)
    axes.set_title("One stitch: 4 blocks of the small anchor, then 2 of the large one", fontsize=10)
    finish(axes, (-2.0, 6.8), (-0.5, 3.2))
    figure.tight_layout()
    figure.savefig(OUT / "stitches.svg")


def timeline(axes: Axes, y: float, name: str, *, ladder: bool) -> None:
    """Draw compute and communication of six sub-blocks on one rank."""
    axes.text(-0.2, y + 0.55, name, ha="right", va="center", fontsize=10)
    start, done = 0.0, [0.0, 0.0]
    for step in range(6):
        # a standard sub-block reads after the last reduction, a ladder one after the last but one
        start = max(start, done[-2] if ladder else done[-1])
        axes.add_patch(Rectangle((start, y + 0.6), 1.0, 0.4, fc=BLUE, ec="white"))
        axes.text(start + 0.5, y + 0.8, f"h{step + 1}", ha="center", va="center", color="white")
        axes.add_patch(Rectangle((start + 1.0, y), 0.8, 0.4, fc=ORANGE, ec="white"))
        start += 1.0
        done.append(start + 0.8)
    axes.plot([done[-1]] * 2, [y - 0.1, y + 1.1], color=GREEN, lw=2)
    axes.text(done[-1] + 0.1, y + 0.5, "done", color=GREEN, fontsize=9, va="center")


def ladder() -> None:
    """Draw the same sub-blocks with the standard and with the ladder residual."""
    figure, axes = plt.subplots(figsize=(7.2, 2.9))
    timeline(axes, 1.6, "standard", ladder=False)
    timeline(axes, 0.0, "ladder", ladder=True)
    axes.text(8.6, 0.8, "compute of sub-block h1 ... h6", color=BLUE, fontsize=9, va="center")
    axes.text(8.6, 0.2, "its all-reduce", color=ORANGE, fontsize=9, va="center")
    axes.annotate("time", xy=(11.2, -0.35), xytext=(0.0, -0.35), va="center", fontsize=9, **ARROW)
    axes.set_title("One rank: a ladder layer computes while the all-reduce runs", fontsize=10)
    finish(axes, (-1.6, 13.2), (-0.6, 2.9))
    figure.tight_layout()
    figure.savefig(OUT / "ladder.svg")


def finish(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    """Set the limits and hide the axes."""
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    axes.axis("off")


if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "ladderstitch"
    stitches()
    ladder()
