"""Quality against latency of a measured bundle, as rows and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ladderstitch.bundle import Bundle
from ladderstitch.errors import BundleError
from ladderstitch.measurements import LatencyProfile, Quality, QualityTable, frontier


@dataclass(frozen=True, slots=True)
class FrontierRow:
    stitch: int
    name: str
    is_anchor: bool
    quality: Quality
    median_s: float
    p99_s: float
    on_frontier: bool


def rows(bundle: Bundle) -> list[FrontierRow]:
    """Every measured stitch, fastest first; raises `BundleError` if a measurement is missing."""
    quality, latency = measured(bundle)
    values = {stitch: quality.value(stitch) for stitch in quality.stitches}
    alone = {stitch: latency.alone_s(stitch) for stitch in latency.stitches}
    best = {point.stitch for point in frontier(values, alone)}
    listed = [
        FrontierRow(
            stitch=stitch.id,
            name=stitch.name,
            is_anchor=stitch.is_anchor,
            quality=quality.stitches[stitch.id],
            median_s=alone[stitch.id],
            p99_s=latency.stitches[stitch.id].p99_s[0],
            on_frontier=stitch.id in best,
        )
        for stitch in bundle.manifest.config.stitches()
        if stitch.id in values and stitch.id in alone
    ]
    return sorted(listed, key=lambda row: row.median_s)


def measured(bundle: Bundle) -> tuple[QualityTable, LatencyProfile]:
    """Both tables of a bundle; raises `BundleError` that names the command which makes one."""
    if bundle.quality is None:
        raise BundleError(f"{bundle.path}: no quality.json; run `ladderstitch calibrate` first")
    if bundle.latency is None:
        raise BundleError(f"{bundle.path}: no latency.json; run `ladderstitch profile` first")
    return bundle.quality, bundle.latency


def plot_frontier(bundle: Bundle, path: Path) -> None:
    """Draw all stitches, the anchors and the frontier into a PNG file."""
    from matplotlib.figure import Figure  # a second of import that only this command needs

    quality, latency = measured(bundle)
    listed = rows(bundle)
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    best = [row for row in listed if row.on_frontier]
    axes.step(*_points(best), where="post", color="tab:blue", linewidth=1, label="frontier")
    for group, style, label in (
        ([r for r in listed if not r.is_anchor and not r.on_frontier], "0.7", "dominated stitch"),
        ([r for r in best if not r.is_anchor], "tab:blue", "stitch on the frontier"),
        ([r for r in listed if r.is_anchor], "tab:red", "anchor"),
    ):
        x, y = _points(group)
        spread = [
            [100 * (r.quality.value - r.quality.low) for r in group],
            [100 * (r.quality.high - r.quality.value) for r in group],
        ]
        axes.errorbar(x, y, yerr=spread, fmt="o", ms=4, lw=0.6, color=style, label=label)
    axes.set_xlabel(f"latency at batch 1, ms (median; {latency.device}, {latency.threads} thread)")
    axes.set_ylabel(f"{quality.metric}, % ({quality.data}, n = {quality.n:,})")
    axes.set_title(f"{bundle.manifest.name}: {len(listed)} networks in one set of weights")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)


def _points(listed: list[FrontierRow]) -> tuple[list[float], list[float]]:
    return [1e3 * row.median_s for row in listed], [100 * row.quality.value for row in listed]
