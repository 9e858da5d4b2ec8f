"""A run as one HTML file that needs nothing else: figures, tables, plots."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ladderstitch_loadtest.load.generator import Measured
from ladderstitch_loadtest.load.outcome import QUANTILES, Summary

BINS = 60
STYLE = """body{font:15px system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .7em}
td{text-align:right}td:first-child,th{text-align:left}img{max-width:100%}.bad{color:#b00}"""


def write_report(
    file: Path, title: str, run: Measured, summary: Summary, facts: Mapping[str, object]
) -> None:
    """`facts` go into a table of what was run on what."""
    headline = {
        "offered": summary.offered,
        "attainment": f"{100 * summary.attainment:.2f} %",
        "effective quality": f"{100 * summary.effective_quality:.2f} %",
        "goodput": f"{summary.goodput_rps:.1f} /s",
        "mean batch": f"{summary.mean_batch:.2f}",
        "left late, p99": f"{1e3 * run.lag_p99_s:.2f} ms",
        "statuses": json.dumps(run.statuses()),
    }
    late_s = run.lag_p99_s if run.late else None
    write_page(file, title, late_s, headline | dict(facts), [_classes(summary)], _plots(run))


def write_page(
    file: Path,
    title: str,
    late_s: float | None,
    headline: Mapping[str, object],
    tables: Sequence[str],
    plots: Mapping[str, Figure],
) -> None:
    """`late_s` is how late the generator was, if that spoils the figures; plots go by their
    names."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>",
    ]
    if late_s is not None:
        parts.append(
            f"<p class=bad>The generator was late by {1e3 * late_s:.2f} ms (p99): "
            "what follows is its limit, not the server's.</p>"
        )
    parts.append(table(["", ""], [[name, str(value)] for name, value in headline.items()]))
    parts += tables
    parts += [f"<img alt='{name}' src='{_png(plot)}'>" for name, plot in plots.items()]
    file.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _classes(summary: Summary) -> str:
    rows = []
    for one in summary.classes:
        for part, quantiles in one.latency_ms.items():
            figures = [f"{quantiles[name]:.3f}" for name in QUANTILES]
            share = [f"{100 * one.attainment:.2f} %", f"{100 * one.effective_quality:.2f} %"]
            rows.append([f"{one.name}, {one.budget_ms:g} ms", *share, part, *figures])
    head = ["budget class", "attainment", "effective quality", "ms of", *QUANTILES]
    return table(head, rows)


def _plots(run: Measured) -> dict[str, Figure]:
    return {"over time": _timeline(run), "latency": _latency(run)}


def _timeline(run: Measured) -> Figure:
    """Rate, attainment and quality of what was due in each slice of the run."""
    outcome = run.outcome
    at = outcome.trace.arrivals_s
    edges = np.linspace(0.0, float(at[-1]) + 1e-9, BINS + 1)
    place = np.digitize(at, edges) - 1
    counts = np.bincount(place, minlength=BINS)[:BINS]
    some = np.maximum(counts, 1)
    figure = Figure(figsize=(9, 6))
    panels = figure.subplots(3, 1, sharex=True)
    answered = np.array(outcome.quality) > 0
    quality = np.bincount(place, np.array(outcome.quality), BINS)[:BINS] / np.maximum(
        np.bincount(place, answered, BINS)[:BINS], 1
    )
    series = {
        "requests/s": counts / np.diff(edges),
        "attainment": np.bincount(place, outcome.met, BINS)[:BINS] / some,
        "quality of answers": np.where(quality > 0, quality, np.nan),
    }
    for panel, (name, values) in zip(panels, series.items(), strict=True):
        panel.step(edges[:-1], values, where="post")
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("seconds")
    figure.tight_layout()
    return figure


def _latency(run: Measured) -> Figure:
    """Share of answers above each latency, by budget class, as the caller saw them."""
    figure = Figure(figsize=(9, 4))
    panel = figure.subplots()
    trace = run.outcome.trace
    for k, one in enumerate(trace.classes):
        times = np.sort(1e3 * run.client_s[trace.picks == k])
        if len(times):
            line = panel.plot(times, 1 - np.arange(len(times)) / len(times), label=one.name)[0]
            panel.axvline(1e3 * one.budget_s, color=line.get_color(), linestyle=":")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("ms from when it was due to the answer; dotted: the budget")
    panel.set_ylabel("share of requests above")
    panel.legend()
    panel.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def _png(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As HTML."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f"<table>{line(head, 'th')}\n{body}</table>"
