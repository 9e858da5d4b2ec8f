"""Write deploy/monitoring/dashboard.json from the metrics' definitions, or compare it with them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import Metric

from ladderstitch.gateway.metrics import GatewayMetrics
from ladderstitch.telemetry.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "deploy" / "monitoring" / "dashboard.json"
GRAFANA_SCHEMA = 39
"""Schema version of Grafana 11."""

MODEL_FILTER = "{model=~'$model'}"
BUILD_INFO = "ladderstitch_build_info"

Query = tuple[str, str]
"""PromQL and legend; `@` becomes `MODEL_FILTER`, and Grafana fills in its variables."""


@dataclass(frozen=True)
class Panel:
    """A panel with one time series per query; `unit` is Grafana's name of a unit."""

    title: str
    unit: str
    queries: list[Query]
    description: str


OVERVIEW = [
    Panel(
        "SLO attainment",
        "percentunit",
        [("ladderstitch:attainment:ratio_rate1m@", "{{model}}")],
        "Share of the requests with a budget whose budget was met, over the last minute.",
    ),
    Panel(
        "Requests by status",
        "reqps",
        [("ladderstitch:requests:rate1m@", "{{model}} {{code}}")],
        "Requests ended a second, by gRPC status, over the last minute.",
    ),
    Panel(
        "Quality spent (0: best variant, 1: fastest)",
        "percentunit",
        [("ladderstitch:quality_spent:ratio1m@", "{{model}}")],
        "Where the mean served quality lies between the best and the fastest variant's.",
    ),
    Panel(
        "Served quality and the frontier",
        "percentunit",
        [
            ("ladderstitch:served_quality:mean1m@", "{{model}} served"),
            ("max by (model, end) (ladderstitch_frontier_quality@)", "{{model}} {{end}}"),
        ],
        "Mean quality of the answers of the last minute, between the fastest and the best variant.",
    ),
    Panel(
        "p99 request duration",
        "s",
        [("ladderstitch:request_duration_seconds:p99_1m@", "{{model}}")],
        "Arrival to answer of all but the slowest hundredth, over the last minute.",
    ),
    Panel(
        "Requests by variant",
        "reqps",
        [
            (
                "sum by (variant) (rate(ladderstitch_requests_total"
                "{model=~'$model',code='OK'}[$__rate_interval])) > 0",
                "{{variant}}",
            )
        ],
        "Requests answered a second, by the variant that answered.",
    ),
]
"""Panels of the first row."""

SCALING = [
    Panel(
        "Autoscaler state",
        "short",
        [("ray_ladderstitch_scaling", "{{state}}")],
        "1 for the state that the autoscaler is in, 0 for the others.",
    ),
    Panel(
        "Desired and ready replicas",
        "short",
        [
            ("ray_ladderstitch_desired_replicas", "desired"),
            ("sum by (model) (ladderstitch_model_ready@)", "ready {{model}}"),
        ],
        "Replicas that the autoscaler wants, and those whose model is ready.",
    ),
]
"""Panels of the autoscaler; series with the prefix `ray_` exist only if it runs."""

WORDS = {
    "kv": "KV",
    "slo": "SLO",
    "queue_seconds": "queue time",
    "compute_seconds": "compute time",
    "turnaround_seconds": "turnaround time",
}
"""Terms in titles for words in metrics' names; other names only lose `_seconds`."""


def panels_of(metrics: Metrics | GatewayMetrics) -> Iterator[Panel]:
    """Yield one panel per metric, with queries that suit its type."""
    for metric in metrics.registry.collect():
        if isinstance(metrics, GatewayMetrics) and metric.name == BUILD_INFO:
            continue  # replicas have it too, and their panel shows both
        queries = _queries(metric, metrics)
        yield Panel(_title(metric), _unit(metric), queries, metric.documentation)


def _title(metric: Metric) -> str:
    """Return the metric's name in words, e.g. "p50 and p99 request duration"."""
    name = metric.name.removeprefix("ladderstitch_").removeprefix("gateway_")
    name = WORDS.get(name, name.removesuffix("_seconds"))
    title = " ".join(WORDS.get(word, word) for word in name.split("_"))
    return f"p50 and p99 {title}" if metric.type == "histogram" else title[0].upper() + title[1:]


def _queries(metric: Metric, metrics: Metrics | GatewayMetrics) -> list[Query]:
    name, labels = metric.name, _labels(metric, metrics)
    labels.sort(key=lambda label: label != "model")
    model = "@" if "model" in labels else ""
    group, legend = ", ".join(labels), " ".join(f"{{{{{label}}}}}" for label in labels)
    rate = "[$__rate_interval]"
    if metric.type == "counter":
        return [(f"sum by ({group}) (rate({name}_total{model}{rate}))", legend)]
    if metric.type == "gauge":
        return [(f"max by ({group}) ({name}{model})", legend)]
    buckets = f"sum by (le, {group}) (rate({name}_bucket{model}{rate}))"
    return [
        (f"histogram_quantile({q}, {buckets})", f"{legend} p{100 * q:.0f}") for q in (0.5, 0.99)
    ]


def _labels(metric: Metric, metrics: Metrics | GatewayMetrics) -> list[str]:
    """Return the label names of a metric, also of one that has no samples yet."""
    return next(
        list(wrapper._labelnames)
        for wrapper in vars(metrics).values()
        if getattr(wrapper, "_name", None) == metric.name
    )


def _unit(metric: Metric) -> str:
    if metric.name.endswith("_seconds"):
        return "s"
    if metric.name.endswith(("_quality", "_usage_ratio")):
        return "percentunit"
    return "reqps" if metric.type == "counter" else "short"


def dashboard() -> dict[str, Any]:
    """Return the dashboard in Grafana's JSON model."""
    rows = [
        ("Overview", OVERVIEW),
        ("Scaling", SCALING),
        ("Gateways", list(panels_of(GatewayMetrics()))),
        ("All metrics", list(panels_of(Metrics()))),
    ]
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in rows:
        panels.append(_row(len(panels) + 1, title, top))
        top += 1
        for i, panel in enumerate(row):
            x, y = 12 * (i % 2), top + 8 * (i // 2)
            panels.append(_panel(len(panels) + 1, panel, x, y))
        top += 8 * ((len(row) + 1) // 2)
    return {
        "title": "ladderstitch",
        "uid": "ladderstitch",
        "schemaVersion": GRAFANA_SCHEMA,
        "editable": False,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "templating": {"list": [_datasource_variable(), _model_variable()]},
        "panels": panels,
    }


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus"}


def _model_variable() -> dict[str, Any]:
    query = "label_values(ladderstitch_model_ready, model)"
    return {
        "name": "model",
        "type": "query",
        "datasource": {"uid": "$datasource"},
        "query": query,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _row(number: int, title: str, y: int) -> dict[str, Any]:
    place = {"h": 1, "w": 24, "x": 0, "y": y}
    return {"id": number, "type": "row", "title": title, "gridPos": place, "panels": []}


def _panel(number: int, panel: Panel, x: int, y: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "gridPos": {"h": 8, "w": 12, "x": x, "y": y},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "expr": expression.replace("@", MODEL_FILTER),
                "legendFormat": legend,
            }
            for i, (expression, legend) in enumerate(panel.queries)
        ],
    }


def main() -> int:
    """Write the dashboard; with `--check` return 1 if the file is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    fresh = json.dumps(dashboard(), indent=1) + "\n"
    if not parser.parse_args().check:
        PATH.write_text(fresh)
        return 0
    if PATH.is_file() and PATH.read_text() == fresh:
        return 0
    sys.stderr.write(f"stale: {PATH.relative_to(ROOT)}; run `make manifests`\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
