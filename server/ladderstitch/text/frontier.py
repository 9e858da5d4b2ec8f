"""Quality over latency of the paths of a measured language model, as rows and as a plot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ladderstitch.bundles.files import read_table
from ladderstitch.errors import BundleError
from ladderstitch.scheduling.profiles import LatencyProfile, Quality, frontier
from ladderstitch.text.bundle import TextBundle

LATENCY = "latency.json"


@dataclass(frozen=True, slots=True)
class PathRow:
    """One path with its quality, and the seconds of a token of one stream."""

    path: int
    name: str
    quality: Quality
    token_s: float
    on_frontier: bool

    @property
    def nats(self) -> float:
        """The held-out loss, nats per token."""
        return math.log(self.quality.perplexity or 1.0)


def read_latency(bundle: TextBundle) -> LatencyProfile | None:
    """Return the latencies that `profile` wrote into a bundle, None if there are none.

    Raises `BundleError` if they are not those of its paths.
    """
    file = bundle.path / LATENCY
    if not file.exists():
        return None
    table, count = read_table(file, LatencyProfile), len(bundle.manifest.variants)
    if set(table.variants) != set(range(count)):
        raise BundleError(f"{file}: expected paths 0 to {count - 1}, got {sorted(table.variants)}")
    return table


def path_rows(bundle: TextBundle, latency: LatencyProfile) -> list[PathRow]:
    """Return all paths, fastest first; the frontier is that of the loss in nats over latency.

    Raises `BundleError` if the bundle is not calibrated.
    """
    table = bundle.quality
    if table is None:
        raise BundleError(f"{bundle.path}: no quality.json; run `ladderstitch calibrate` first")
    paths = range(len(bundle.manifest.variants))
    alone = {path: latency.alone_s(path) for path in paths}
    gains = {path: -math.log(table.variants[path].perplexity or 1.0) for path in paths}
    best = {point.variant for point in frontier(gains, alone)}
    rows = [
        PathRow(path, variant.name, table.variants[path], alone[path], path in best)
        for path, variant in enumerate(bundle.manifest.variants)
    ]
    return sorted(rows, key=lambda row: row.token_s)


def plot_paths(bundle: TextBundle, latency: LatencyProfile, file: Path) -> None:
    """Draw the loss of all paths over the milliseconds of a token into a PNG file."""
    from matplotlib.figure import Figure  # takes a second to import; only this command needs it

    rows = path_rows(bundle, latency)
    best = [row for row in rows if row.on_frontier]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.step(
        [1e3 * row.token_s for row in best],
        [row.nats for row in best],
        where="post",
        color="tab:blue",
        linewidth=1,
        label="frontier",
    )
    for group, colour, label in (
        ([row for row in rows if not row.on_frontier], "0.7", "dominated path"),
        (best, "tab:blue", "path on frontier"),
    ):
        x, y = [1e3 * row.token_s for row in group], [row.nats for row in group]
        axes.plot(x, y, "o", markersize=4, color=colour, label=label)
    for row in best:
        at = (1e3 * row.token_s, row.nats)
        axes.annotate(row.name, at, (4, 4), textcoords="offset points", fontsize=7)
    threads = "1 thread" if latency.threads == 1 else f"{latency.threads} threads"
    axes.set_xlabel(f"median time of a token of one stream, ms ({latency.device}, {threads})")
    assert bundle.quality is not None, "checked by path_rows"
    axes.set_ylabel(f"held-out loss, nats per token ({bundle.quality.data})")
    axes.set_title(f"{bundle.manifest.name}: {len(rows)} paths in one set of weights")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(file)
