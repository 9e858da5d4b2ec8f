"""Quality against latency or arithmetic of a measured bundle, as rows and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ladderstitch.errors import BundleError
from ladderstitch.scheduling.profiles import LatencyProfile, Quality, QualityTable, frontier
from ladderstitch.vision.bundle import Bundle
from ladderstitch.vision.models.cost import stitch_cost

Over = Literal["latency", "macs"]


@dataclass(frozen=True, slots=True)
class FrontierRow:
    stitch: int
    name: str
    is_anchor: bool
    quality: Quality
    median_s: float
    p99_s: float
    macs: int
    parameters: int
    on_frontier: bool

    def price(self, over: Over) -> float:
        """Milliseconds at batch 1, or millions of multiply-accumulates."""
        return 1e3 * self.median_s if over == "latency" else self.macs / 1e6


def rows(bundle: Bundle, over: Over = "latency") -> list[FrontierRow]:
    """Every measured stitch, cheapest first, on the frontier of quality over latency or MACs.

    Raises `BundleError` if a measurement is missing.
    """
    quality, latency = measured(bundle)
    config = bundle.manifest.config
    with torch.device("meta"):
        model = config.build()
    costs = {s.id: stitch_cost(model, s, config.inputs.image_size) for s in model.stitches}
    values = {stitch: quality.value(stitch) for stitch in quality.variants}
    alone = {stitch: latency.alone_s(stitch) for stitch in latency.variants}
    price = alone if over == "latency" else {s: float(costs[s].macs) for s in alone}
    best = {point.variant for point in frontier(values, price)}
    listed = [
        FrontierRow(
            stitch=stitch.id,
            name=stitch.name,
            is_anchor=stitch.is_anchor,
            quality=quality.variants[stitch.id],
            median_s=alone[stitch.id],
            p99_s=latency.variants[stitch.id].p99_s[0],
            macs=costs[stitch.id].macs,
            parameters=costs[stitch.id].parameters,
            on_frontier=stitch.id in best,
        )
        for stitch in config.stitches()
        if stitch.id in values and stitch.id in alone
    ]
    return sorted(listed, key=lambda row: row.price(over))


def measured(bundle: Bundle) -> tuple[QualityTable, LatencyProfile]:
    """Both tables of a bundle; raises `BundleError` that names the command which makes one."""
    if bundle.quality is None:
        raise BundleError(f"{bundle.path}: no quality.json; run `ladderstitch calibrate` first")
    if bundle.latency is None:
        raise BundleError(f"{bundle.path}: no latency.json; run `ladderstitch profile` first")
    return bundle.quality, bundle.latency


def plot_frontier(bundle: Bundle, path: Path, over: Over = "latency") -> None:
    """Draw all stitches, the anchors and the frontier into a PNG file."""
    from matplotlib.figure import Figure  # a second of import that only this command needs

    quality, latency = measured(bundle)
    listed = rows(bundle, over)
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    best = [row for row in listed if row.on_frontier]
    axes.step(*_points(best, over), where="post", color="tab:blue", linewidth=1, label="frontier")
    for group, style, label in (
        ([r for r in listed if not r.is_anchor and not r.on_frontier], "0.7", "dominated stitch"),
        ([r for r in best if not r.is_anchor], "tab:blue", "stitch on the frontier"),
        ([r for r in listed if r.is_anchor], "tab:red", "anchor"),
    ):
        x, y = _points(group, over)
        spread = [
            [100 * (r.quality.value - r.quality.low) for r in group],
            [100 * (r.quality.high - r.quality.value) for r in group],
        ]
        axes.errorbar(x, y, yerr=spread, fmt="o", ms=4, lw=0.6, color=style, label=label)
    device = f"median; {latency.device}, {latency.threads} thread"
    axes.set_xlabel(
        f"latency at batch 1, ms ({device})"
        if over == "latency"
        else "millions of multiply-accumulates for one image"
    )
    axes.set_ylabel(f"{quality.metric}, % ({quality.data}, n = {quality.n:,})")
    axes.set_title(f"{bundle.manifest.name}: {len(listed)} networks in one set of weights")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)


def _points(listed: list[FrontierRow], over: Over) -> tuple[list[float], list[float]]:
    return [row.price(over) for row in listed], [100 * row.quality.value for row in listed]
