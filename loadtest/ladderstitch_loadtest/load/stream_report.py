"""HTML report of a run of streams, on the template of `report`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ladderstitch_loadtest.load.outcome import QUANTILES, format_figure
from ladderstitch_loadtest.load.report import ReportTable, plot_steps, write_page
from ladderstitch_loadtest.load.text_load import StreamRun, StreamSummary

BINS = 40


def write_stream_report(
    file: Path, title: str, run: StreamRun, summary: StreamSummary, facts: Mapping[str, object]
) -> None:
    """Write the report of a run of streams; `facts` say what was run and on what."""
    headline = {
        "offered": summary.offered,
        "attainment": f"{100 * summary.attainment:.2f} %",
        "effective quality": format_figure(100 * summary.effective_quality, unit=" %"),
        "tokens": f"{summary.tokens_per_s:.1f} /s",
        "goodput": f"{summary.goodput_tokens_per_s:.1f} tokens/s",
        "sent late, p99": f"{1e3 * run.lag_p99_s:.2f} ms",
        "variants": json.dumps(summary.variants),
        "statuses": json.dumps(summary.statuses),
    }
    plots = {"over time": _plot_timeline(run), "latency": _plot_latency(run)}
    write_page(file, title, run.late_s, headline | dict(facts), _class_table(summary), plots)


def _class_table(summary: StreamSummary) -> ReportTable:
    rows = []
    for one in summary.classes:
        name = f"{one.name}, {one.first_token_ms:g} + {one.token_ms:g} ms"
        shares = [one.attainment, one.server_attainment, one.effective_quality]
        for part, quantiles in one.latency_ms.items():
            percents = [format_figure(100 * share, unit=" %") for share in shares]
            figures = [format_figure(quantiles[q]) for q in QUANTILES]
            rows.append([name, *percents, part, *figures])
    head = ["budget class", "attainment", "counted by the server", "effective quality", "ms of"]
    return ReportTable([*head, *QUANTILES], rows)


def _plot_timeline(run: StreamRun) -> Figure:
    """Return streams, their tokens and their attainment, by the time at which they were due."""
    at = run.trace.arrivals_s
    edges = np.linspace(0.0, float(at[-1]) + 1e-9, BINS + 1)
    place = np.digitize(at, edges) - 1
    counts = np.bincount(place, minlength=BINS)[:BINS]
    tokens = np.bincount(place, [result.tokens for result in run.results], BINS)[:BINS]
    met = np.bincount(place, run.met, BINS)[:BINS]
    return plot_steps(
        edges,
        {
            "streams/s": counts / np.diff(edges),
            "their tokens/s": tokens / np.diff(edges),
            "attainment": np.where(counts > 0, met / np.maximum(counts, 1), np.nan),
        },
    )


def _plot_latency(run: StreamRun) -> Figure:
    """Return the share of streams above each time to the first token and between tokens."""
    figure = Figure(figsize=(9, 4))
    first, between = figure.subplots(1, 2, sharey=True)
    for k, budgets in enumerate(run.trace.classes):
        own = [
            result
            for result, pick in zip(run.results, run.trace.picks, strict=True)
            if pick == k and result.tokens
        ]
        for panel, times_s, budget_s in (
            (first, [result.first_s for result in own], budgets.first_s),
            (between, [r.gap_s for r in own if r.tokens > 1], budgets.per_token_s),
        ):
            if times_s:
                times = np.sort(1e3 * np.array(times_s))
                shares = 1 - np.arange(len(times)) / len(times)
                line = panel.plot(times, shares, label=budgets.name)[0]
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
