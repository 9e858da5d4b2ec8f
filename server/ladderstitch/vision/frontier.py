"""Quality over latency or arithmetic of a measured bundle, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from ladderstitch.errors import BundleError
from ladderstitch.scheduling.profiles import LatencyProfile, Quality, QualityTable, frontier
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.models.cost import Cost, stitch_cost
from ladderstitch.vision.models.nested.cost import path_costs
from ladderstitch.vision.models.nested.model import NestedConfig
from ladderstitch.vision.models.route import Precision
from ladderstitch.vision.networks.config import OnnxConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOGARITHMIC_FROM = 20.0
"""Ratio of the highest to the lowest cost in a plot from which on its axis is logarithmic."""
CostMetric = Literal["latency", "macs"]
OTHER_COLOURS = ("tab:orange", "tab:green", "tab:purple")


@dataclass(frozen=True, slots=True)
class FrontierRow:
    """One stitch with its quality, cost and latency at batch size 1, in seconds."""

    stitch: int
    name: str
    is_anchor: bool
    precision: Precision
    quality: Quality
    median_s: float
    p99_s: float
    macs: int
    parameters: int
    on_frontier: bool
    image_size: int | None
    """Side in pixels of the images that it computes on; None for networks of ONNX files."""

    def cost(self, metric: CostMetric) -> float:
        """Return milliseconds at batch size 1, or millions of multiply-accumulates."""
        return 1e3 * self.median_s if metric == "latency" else self.macs / 1e6


def frontier_rows(bundle: VisionBundle, metric: CostMetric = "latency") -> list[FrontierRow]:
    """Return every measured stitch, cheapest first, with the frontier of quality over the metric.

    Raises `BundleError` if the bundle lacks a measurement.
    """
    quality, latency = load_measurements(bundle)
    costs = variant_costs(bundle)
    values = {stitch: quality.value(stitch) for stitch in quality.variants}
    alone_s = {stitch: latency.alone_s(stitch) for stitch in latency.variants}
    cost = alone_s if metric == "latency" else {s: float(costs[s].macs) for s in alone_s}
    best = {point.variant for point in frontier(values, cost)}
    rows = [
        FrontierRow(
            stitch=stitch.id,
            name=stitch.name,
            is_anchor=stitch.is_anchor,
            precision=stitch.precision,
            quality=quality.variants[stitch.id],
            median_s=alone_s[stitch.id],
            p99_s=latency.variants[stitch.id].p99_s[0],
            macs=costs[stitch.id].macs,
            parameters=costs[stitch.id].parameters,
            on_frontier=stitch.id in best,
            image_size=_image_size(bundle, stitch.id),
        )
        for stitch in bundle.manifest.variants()
        if stitch.id in values and stitch.id in alone_s
    ]
    return sorted(rows, key=lambda row: row.cost(metric))


def variant_costs(bundle: VisionBundle) -> dict[int, Cost]:
    """Return the multiply-accumulates and parameters of every variant."""
    config, variants = bundle.manifest.config, bundle.manifest.variants()
    if isinstance(config, OnnxConfig):
        return {variant.id: Cost(*config.cost(variant)) for variant in variants}
    if isinstance(config, NestedConfig):
        return path_costs(config)
    with torch.device("meta"):
        model = config.build()
    return {v.id: stitch_cost(model, v, config.inputs.image_size) for v in variants}


def _image_size(bundle: VisionBundle, variant: int) -> int | None:
    """Return the side of the images that a variant computes on."""
    config = bundle.manifest.config
    if isinstance(config, OnnxConfig):
        return None
    if isinstance(config, NestedConfig):
        return config.image_size(variant)
    return config.inputs.image_size


def load_measurements(bundle: VisionBundle) -> tuple[QualityTable, LatencyProfile]:
    """Return the quality and latency tables of a bundle.

    Raises `BundleError` that names the command which makes a missing table.
    """
    if bundle.quality is None:
        raise BundleError(f"{bundle.path}: no quality.json; run `ladderstitch calibrate` first")
    if bundle.latency is None:
        raise BundleError(f"{bundle.path}: no latency.json; run `ladderstitch profile` first")
    return bundle.quality, bundle.latency


def training_note(bundle: VisionBundle) -> tuple[str, ...]:
    """Return the training time as text, or nothing for a bundle that does not record it."""
    spent = bundle.manifest.training_cpu_s
    return () if spent is None else (f"trained in {spent:,.0f} s of CPU time",)


def plot_frontier(
    bundle: VisionBundle,
    path: Path,
    metric: CostMetric = "latency",
    others: Sequence[VisionBundle] = (),
) -> None:
    """Draw all stitches, the anchors and the frontier into a PNG file.

    Of `others`, which should have been measured on the same data, only the frontiers are drawn.
    Raises `BundleError` for a bundle that lacks a measurement.
    """
    from matplotlib.figure import Figure  # takes a second to import; only this command needs it

    quality, latency = load_measurements(bundle)
    rows = frontier_rows(bundle, metric)
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    best = [row for row in rows if row.on_frontier]
    label = ", ".join(("frontier", *training_note(bundle)))
    axes.step(*_points(best, metric), where="post", color="tab:blue", linewidth=1, label=label)
    for precision, marker in (("float32", "o"), ("int8", "^")):
        _plot_points(axes, [row for row in rows if row.precision == precision], metric, marker)
    for number, other in enumerate(others):
        _plot_other(axes, other, metric, OTHER_COLOURS[number % len(OTHER_COLOURS)])
    threads = "1 thread" if latency.threads == 1 else f"{latency.threads} threads"
    device = f"{latency.device}, {threads}"
    axes.set_xlabel(
        f"median latency at batch size 1, ms ({device})"
        if metric == "latency"
        else "multiply-accumulates per image, millions"
    )
    lowest, highest = axes.dataLim.intervalx
    if highest > LOGARITHMIC_FROM * lowest > 0:
        axes.set_xscale("log")
    axes.set_ylabel(f"{quality.metric}, % ({quality.data}, n = {quality.n:,})")
    axes.set_title(f"{bundle.manifest.name}: {len(rows)} networks in one set of weights")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)


def _plot_other(axes: Axes, bundle: VisionBundle, metric: CostMetric, colour: str) -> None:
    """Draw the frontier of another bundle."""
    quality, _ = load_measurements(bundle)
    best = [row for row in frontier_rows(bundle, metric) if row.on_frontier]
    notes = (f"n = {quality.n:,}", *training_note(bundle))
    label = f"{bundle.manifest.name} ({quality.data}, {', '.join(notes)})"
    axes.step(*_points(best, metric), where="post", color=colour, linewidth=1)
    axes.plot(*_points(best, metric), "s", color=colour, ms=4, label=label)


def _plot_points(axes: Axes, rows: list[FrontierRow], metric: CostMetric, marker: str) -> None:
    """Draw the networks of one number format with their confidence intervals."""
    suffix = ", int8" if marker == "^" else ""
    for group, colour, label in (
        ([r for r in rows if not r.is_anchor and not r.on_frontier], "0.7", "dominated stitch"),
        ([r for r in rows if not r.is_anchor and r.on_frontier], "tab:blue", "stitch on frontier"),
        ([r for r in rows if r.is_anchor], "tab:red", "anchor"),
    ):
        if not group:
            continue
        x, y = _points(group, metric)
        interval = [
            [100 * (r.quality.value - r.quality.low) for r in group],
            [100 * (r.quality.high - r.quality.value) for r in group],
        ]
        axes.errorbar(
            x, y, yerr=interval, fmt=marker, ms=4, lw=0.6, color=colour, label=label + suffix
        )


def _points(rows: list[FrontierRow], metric: CostMetric) -> tuple[list[float], list[float]]:
    """Return the costs and the qualities in percent."""
    return [row.cost(metric) for row in rows], [100 * row.quality.value for row in rows]
