"""HTML reports of a run: one self-contained file with figures, tables and plots."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure

from ladderstitch_loadtest.load.image_load import LoadRun
from ladderstitch_loadtest.load.outcome import QUANTILES, Summary, format_figure

BINS = 60
TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body{font:15px system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .7em}
td{text-align:right}td:first-child,th{text-align:left}img{max-width:100%}.bad{color:#b00}
</style>
<h1>{{ title }}</h1>
{% if late_ms is not none %}
<p class="bad">The generator sent requests late by {{ "%.2f"|format(late_ms) }} ms (p99).
The figures below are the limit of the generator, not of the server.</p>
{% endif %}
{% for table in tables %}
<table>
<tr>{% for cell in table.head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
{% for name, source in plots.items() %}
<img alt="{{ name }}" src="{{ source }}">
{% endfor %}
</html>
"""
"""The one template of all reports; every value is escaped."""


@dataclass(frozen=True, slots=True)
class ReportTable:
    """A table of text: the column heads and the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_report(
    file: Path, title: str, run: LoadRun, summary: Summary, facts: Mapping[str, object]
) -> None:
    """Write the report of a run of images; `facts` say what was run and on what."""
    headline = {
        "offered": summary.offered,
        "attainment": f"{100 * summary.attainment:.2f} %",
        "effective quality": f"{100 * summary.effective_quality:.2f} %",
        "goodput": f"{summary.goodput_rps:.1f} /s",
        "mean batch": f"{summary.mean_batch:.2f}",
        "sent late, p99": f"{1e3 * run.lag_p99_s:.2f} ms",
        "statuses": json.dumps(run.statuses()),
    }
    plots = {"over time": _plot_timeline(run), "latency": _plot_latency(run)}
    write_page(file, title, run.late_s, headline | dict(facts), _class_table(summary), plots)


def write_page(
    file: Path,
    title: str,
    late_s: float | None,
    headline: Mapping[str, object],
    classes: ReportTable,
    plots: Mapping[str, Figure],
) -> None:
    """Write a report: title, headline figures, a table of budget classes, and plots by name.

    `late_s` is the lag of the generator in seconds if the generator was the bottleneck.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    overview = ReportTable(["", ""], [[name, str(value)] for name, value in headline.items()])
    page = environment.from_string(TEMPLATE).render(
        title=title,
        late_ms=None if late_s is None else 1e3 * late_s,
        tables=[overview, classes],
        plots={name: _png_source(plot) for name, plot in plots.items()},
    )
    file.write_text(page + "\n", encoding="utf-8")


def _class_table(summary: Summary) -> ReportTable:
    rows = []
    for one in summary.classes:
        for part, quantiles in one.latency_ms.items():
            figures = [format_figure(quantiles[name], ".3f") for name in QUANTILES]
            shares = [one.attainment, one.effective_quality]
            percents = [format_figure(100 * share, unit=" %") for share in shares]
            rows.append([f"{one.name}, {one.budget_ms:g} ms", *percents, part, *figures])
    return ReportTable(
        ["budget class", "attainment", "effective quality", "ms of", *QUANTILES], rows
    )


def _plot_timeline(run: LoadRun) -> Figure:
    """Return rate, attainment and quality of the requests due in each slice of the run."""
    outcome = run.outcome
    edges = np.linspace(0.0, float(outcome.trace.arrivals_s[-1]) + 1e-9, BINS + 1)
    place = np.digitize(outcome.trace.arrivals_s, edges) - 1
    counts = np.bincount(place, minlength=BINS)[:BINS]
    answers = np.bincount(place, np.array(outcome.quality) > 0, BINS)[:BINS]
    quality = np.bincount(place, np.array(outcome.quality), BINS)[:BINS] / np.maximum(answers, 1)
    return plot_steps(
        edges,
        {
            "requests/s": counts / np.diff(edges),
            "attainment": np.bincount(place, outcome.met, BINS)[:BINS] / np.maximum(counts, 1),
            "quality of answers": np.where(quality > 0, quality, np.nan),
        },
    )


def plot_steps(edges: np.ndarray, series: Mapping[str, np.ndarray]) -> Figure:
    """Return a figure with one panel per series of values between `edges`, in seconds."""
    figure = Figure(figsize=(9, 6))
    panels = figure.subplots(len(series), 1, sharex=True)
    for panel, (name, values) in zip(panels, series.items(), strict=True):
        panel.step(edges[:-1], values, where="post")
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("seconds")
    figure.tight_layout()
    return figure


def _plot_latency(run: LoadRun) -> Figure:
    """Return the share of requests above each latency that callers saw, by budget class."""
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
    panel.set_xlabel("ms from when the request was due to its answer; dotted: the budget")
    panel.set_ylabel("share of requests above")
    panel.legend()
    panel.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def _png_source(figure: Figure) -> str:
    """Return a plot as a data URL."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
