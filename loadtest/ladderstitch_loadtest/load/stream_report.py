"""A run of streams as one HTML file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ladderstitch_loadtest.load.outcome import QUANTILES
from ladderstitch_loadtest.load.report import table, write_page
from ladderstitch_loadtest.load.streams import StreamRun, StreamSummary

BINS = 40


def write_stream_report(
    file: Path, title: str, run: StreamRun, summary: StreamSummary, facts: Mapping[str, object]
) -> None:
    """`facts` go into a table of what was run on what."""
    headline = {
        "offered": summary.offered,
        "attainment": f"{100 * summary.attainment:.2f} %",
        "effective quality": f"{100 * summary.effective_quality:.2f} %",
        "tokens": f"{summary.tokens_per_s:.1f} /s",
        "goodput": f"{summary.goodput_tokens_per_s:.1f} tokens/s",
        "left late, p99": f"{1e3 * run.lag_p99_s:.2f} ms",
        "paths": json.dumps(summary.paths),
        "statuses": json.dumps(summary.statuses),
    }
    late_s = run.lag_p99_s if run.late else None
    plots = {"over time": _timeline(run), "latency": _latency(run)}
    write_page(file, title, late_s, headline | dict(facts), [_classes(summary)], plots)


def _classes(summary: StreamSummary) -> str:
    rows = []
    for one in summary.classes:
        name = f"{one.name}, {one.first_token_ms:g} + {one.token_ms:g} ms"
        shares = [one.attainment, one.attainment_told, one.effective_quality]
        for part, quantiles in one.ms.items():
            figures = [f"{quantiles[q]:.2f}" for q in QUANTILES]
            rows.append([name, *(f"{100 * share:.2f} %" for share in shares), part, *figures])
    head = ["budget class", "attainment", "as the server counts", "effective quality", "ms of"]
    return table([*head, *QUANTILES], rows)


def _timeline(run: StreamRun) -> Figure:
    """Streams begun, tokens of them and attainment, by when they were due."""
    at = run.trace.arrivals_s
    edges = np.linspace(0.0, float(at[-1]) + 1e-9, BINS + 1)
    place = np.digitize(at, edges) - 1
    counts = np.bincount(place, minlength=BINS)[:BINS]
    tokens = np.bincount(place, [end.tokens for end in run.ends], BINS)[:BINS]
    met = np.bincount(place, run.kept, BINS)[:BINS]
    series = {
        "streams/s": counts / np.diff(edges),
        "their tokens/s": tokens / np.diff(edges),
        "attainment": np.where(counts > 0, met / np.maximum(counts, 1), np.nan),
    }
    figure = Figure(figsize=(9, 6))
    panels = figure.subplots(3, 1, sharex=True)
    for panel, (name, values) in zip(panels, series.items(), strict=True):
        panel.step(edges[:-1], values, where="post")
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("seconds")
    figure.tight_layout()
    return figure


def _latency(run: StreamRun) -> Figure:
    """Share of streams above each time, by budget class: first token, and between tokens."""
    figure = Figure(figsize=(9, 4))
    first, between = figure.subplots(1, 2, sharey=True)
    for k, wanted in enumerate(run.trace.classes):
        mine = [
            end
            for end, pick in zip(run.ends, run.trace.picks, strict=True)
            if pick == k and end.tokens
        ]
        for panel, times_s, budget_s in (
            (first, [end.first_s for end in mine], wanted.first_s),
            (between, [end.gap_s for end in mine if end.tokens > 1], wanted.per_token_s),
        ):
            if times_s:
                times = np.sort(1e3 * np.array(times_s))
                shares = 1 - np.arange(len(times)) / len(times)
                line = panel.plot(times, shares, label=wanted.name)[0]
                panel.axvline(1e3 * budget_s, color=line.get_color(), linestyle=":")
    for panel, name in ((first, "ms from due to the first token"), (between, "ms between tokens")):
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel(f"{name}; dotted: the budget")
        panel.grid(alpha=0.3)
    first.set_ylabel("share of streams above")
    first.legend()
    figure.tight_layout()
    return figure
