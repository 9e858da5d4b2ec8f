"""Write deploy/monitoring/dashboard.json from the metrics' definitions, or check that it fits."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import Metric

from ladderstitch.gateway.metrics import GatewayMetrics
from ladderstitch.telemetry.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "deploy" / "monitoring" / "dashboard.json"
GRAFANA_SCHEMA = 39
"""Of Grafana 11."""

CHOSEN = "{model=~'$model'}"

Query = tuple[str, str]
"""PromQL and legend; `$model` and `$__rate_interval` are Grafana's."""
Entry = tuple[str, str, list[Query]]
"""Title, unit, queries."""

OVERVIEW: list[Entry] = [
    ("Budgets met", "percentunit", [("ladderstitch:attainment:ratio_rate1m@", "{{model}}")]),
    ("Answers and refusals", "reqps", [("ladderstitch:requests:rate1m@", "{{model}} {{code}}")]),
    (
        "Quality spent: 0 best variant, 1 fastest",
        "percentunit",
        [("ladderstitch:quality_spent:ratio1m@", "{{model}}")],
    ),
    (
        "Served quality, and what there is",
        "percentunit",
        [
            ("ladderstitch:served_quality:mean1m@", "{{model}} served"),
            ("max by (model, end) (ladderstitch_frontier_quality@)", "{{model}} {{end}}"),
        ],
    ),
    (
        "Arrival to answer, p99",
        "s",
        [("ladderstitch:request_duration_seconds:p99_1m@", "{{model}}")],
    ),
    (
        "Variants in use",
        "reqps",
        [
            (
                "sum by (variant) (rate(ladderstitch_requests_total"
                "{model=~'$model',code='OK'}[$__rate_interval])) > 0",
                "{{variant}}",
            )
        ],
    ),
]
"""What to look at first; `@` stands for the choice of models."""

SCALING: list[Entry] = [
    ("What the autoscaler does", "short", [("ray_ladderstitch_scaling", "{{state}}")]),
    (
        "Replicas: wanted, and ready",
        "short",
        [
            ("ray_ladderstitch_wanted_replicas", "wanted"),
            ("sum by (model) (ladderstitch_model_ready@)", "ready {{model}}"),
        ],
    ),
]
"""The series called `ray_` are there only under Ray, with its autoscaler."""


def panels_of_metrics(metrics: Metrics | GatewayMetrics) -> Iterator[Entry]:
    """One panel a metric, by its kind; a metric that is added gets one by itself."""
    for metric in metrics.registry.collect():
        yield metric.documentation.rstrip("."), _unit(metric), _queries(metric, metrics)


def _queries(metric: Metric, metrics: Metrics | GatewayMetrics) -> list[Query]:
    name, by = metric.name, _labels(metric, metrics)
    by.sort(key=lambda label: label != "model")
    chosen = "@" if "model" in by else ""
    group, legend = ", ".join(by), " ".join(f"{{{{{label}}}}}" for label in by)
    rate = "[$__rate_interval]"
    if metric.type == "counter":
        return [(f"sum by ({group}) (rate({name}_total{chosen}{rate}))", legend)]
    if metric.type == "gauge":
        return [(f"max by ({group}) ({name}{chosen})", legend)]
    buckets = f"sum by (le, {group}) (rate({name}_bucket{chosen}{rate}))"
    return [
        (f"histogram_quantile({q}, {buckets})", f"{legend} p{100 * q:.0f}") for q in (0.5, 0.99)
    ]


def _labels(metric: Metric, metrics: Metrics | GatewayMetrics) -> list[str]:
    """Names of the labels; a metric without children yet has no samples that tell them."""
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
    rows = [
        ("Overview", OVERVIEW),
        ("Scaling", SCALING),
        ("Gateways", list(panels_of_metrics(GatewayMetrics()))),
        ("Every metric", list(panels_of_metrics(Metrics()))),
    ]
    panels: list[dict[str, Any]] = []
    top = 0
    for title, entries in rows:
        panels.append(_row(len(panels) + 1, title, top))
        top += 1
        for place, entry in enumerate(entries):
            panels.append(
                _panel(len(panels) + 1, *entry, x=12 * (place % 2), y=top + 8 * (place // 2))
            )
        top += 8 * ((len(entries) + 1) // 2)
    return {
        "title": "ladderstitch",
        "uid": "ladderstitch",
        "schemaVersion": GRAFANA_SCHEMA,
        "editable": False,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "templating": {"list": [_datasource(), _models()]},
        "panels": panels,
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus"}


def _models() -> dict[str, Any]:
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


def _panel(
    number: int, title: str, unit: str, queries: list[Query], *, x: int, y: int
) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "gridPos": {"h": 8, "w": 12, "x": x, "y": y},
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "expr": expression.replace("@", CHOSEN),
                "legendFormat": legend,
            }
            for i, (expression, legend) in enumerate(queries)
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
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
