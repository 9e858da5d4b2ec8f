"""Tests of the metrics page: names, units, counts and bounded labels."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ladderstitch.scheduling.requests import Deadlines, ImageAnswer, Request
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.model_metrics import VisionMetrics
from ladderstitch.telemetry.text_metrics import TextMetrics

NO_LOGITS = np.zeros((1, 10), np.float32)


def make_request(soft_deadline: float = float("inf")) -> Request:
    return Request("r", np.zeros((1, 1, 2, 2), np.float32), 10.0, Deadlines(soft_deadline))


def value(metrics: Metrics, name: str, **labels: str) -> float:
    got = metrics.registry.get_sample_value(f"ladderstitch_{name}", {"model": "m", **labels})
    return got or 0.0


def test_vision_metrics_of_answered_requests_are_counted() -> None:
    metrics = Metrics()
    model = VisionMetrics(metrics, "m", range(3))
    on_time, late, free = make_request(10.02), make_request(10.001), make_request()
    model.set_queue_length(3)
    model.observe_dispatch([on_time, late, free], now=10.002, num_waiting=0)
    model.observe_batch(1, batch_size=3, compute_s=0.004, error=1.25, slowdown=1.5, tail=1.2)
    model.observe_batch(2, batch_size=1, compute_s=0.001, error=1.0, slowdown=1.5, tail=1.2)
    for request in (on_time, late, free):
        model.observe_completion(
            request, ImageAnswer(NO_LOGITS, 1, 0.9, 0.002, 0.004, 3), now=10.007
        )
    assert value(metrics, "requests_total", variant="1", code="OK") == 3
    assert value(metrics, "slo_requests_total", met="true") == 1
    assert value(metrics, "slo_requests_total", met="false") == 1
    assert value(metrics, "queue_requests") == 0
    assert value(metrics, "queue_seconds_sum") == pytest.approx(0.006)
    assert value(metrics, "compute_seconds_sum") == pytest.approx(0.005)
    assert value(metrics, "request_duration_seconds_sum") == pytest.approx(0.021)
    assert value(metrics, "batch_size_sum") == 4
    assert value(metrics, "latency_predictions_total", within_plan="false") == 1
    assert value(metrics, "served_quality_sum") == pytest.approx(2.7)
    assert value(metrics, "variant_switches_total") == 1
    assert value(metrics, "latency_actual_over_predicted_ratio_sum") == pytest.approx(2.25)
    assert value(metrics, "latency_slowdown_ratio") == 1.5
    # The slack is 18 ms and -1 ms; a request without a deadline has none.
    assert value(metrics, "dispatch_slack_seconds_bucket", le="0.0") == 1
    assert value(metrics, "dispatch_slack_seconds_bucket", le="+Inf") == 2


KNOWN_LABELS = {
    *("model", "variant", "code", "met", "within_plan", "end", "reason", "le", "process"),
    *("version", "python", "platform"),
}


@pytest.mark.parametrize(
    ("code", "missed"),
    [
        ("RESOURCE_EXHAUSTED", 1),
        ("DEADLINE_EXCEEDED", 1),
        ("FAILED_PRECONDITION", 1),
        ("INTERNAL", 1),
        ("INVALID_ARGUMENT", 0),
        ("NOT_FOUND", 0),
    ],
)
def test_observe_rejection_unless_callers_error_misses_budget(code: str, missed: int) -> None:
    metrics = Metrics()
    model = VisionMetrics(metrics, "m", range(3))
    model.observe_rejection(code, make_request(11.0))
    model.observe_rejection(code, make_request())
    model.observe_rejection(code)
    assert value(metrics, "requests_total", variant="none", code=code) == 3
    assert value(metrics, "slo_requests_total", met="false") == missed


def test_metrics_of_two_replicas_are_separate() -> None:
    first, second = Metrics(), Metrics()
    VisionMetrics(first, "m", range(3)).restarts.inc()
    VisionMetrics(second, "m", range(3))
    assert value(first, "engine_restarts_total") == 1
    assert value(second, "engine_restarts_total") == 0


def test_expose_serves_a_page_that_prometheus_reads() -> None:
    metrics = Metrics()
    model = VisionMetrics(metrics, "m", range(3))
    model.observe_completion(make_request(), ImageAnswer(NO_LOGITS, 1, 0.9, 0.0, 0.0, 1), now=10.1)
    port, close = metrics.expose(0, "127.0.0.1")
    address = f"http://127.0.0.1:{port}/metrics"
    try:
        with urllib.request.urlopen(address, timeout=300) as page:
            families = list(text_string_to_metric_families(page.read().decode()))
    finally:
        close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address, timeout=300)
    names = {family.name for family in families}
    for noun in ("queue", "compute", "request_duration", "dispatch_slack"):
        assert f"ladderstitch_{noun}_seconds" in names
    for family in families:
        assert family.name.startswith(("ladderstitch_", "process_"))
        assert family.documentation
        for sample in family.samples:
            assert sample.labels.keys() <= KNOWN_LABELS
    edges = sorted(
        float(sample.labels["le"])
        for family in families
        if family.name == "ladderstitch_request_duration_seconds"
        for sample in family.samples
        if sample.name.endswith("_bucket")
    )
    assert edges[0] == 0.0005
    assert edges[-2:] == [600.0, float("inf")]


def series(metrics: Metrics) -> set[str]:
    """Return all samples that name a model."""
    return {
        f"{sample.name}{sorted(sample.labels.items())}"
        for family in metrics.registry.collect()
        for sample in family.samples
        if "model" in sample.labels
    }


def test_remove_model_removes_its_series_only() -> None:
    metrics = Metrics()
    VisionMetrics(metrics, "kept", range(3))
    before = series(metrics)
    for model in (VisionMetrics(metrics, "m", range(3)), TextMetrics(metrics, "m", range(2))):
        model.observe_batch(1, batch_size=3, compute_s=0.004, error=1.0, slowdown=1.0, tail=1.0)
    assert series(metrics) > before
    metrics.remove_model("m")
    assert series(metrics) == before
    metrics.remove_model("m")
    VisionMetrics(metrics, "m", range(3)).restarts.inc()
    assert value(metrics, "engine_restarts_total") == 1


def processes(metrics: Metrics, name: str) -> dict[str, float]:
    """Return the value of a metric `process_*` of each process."""
    return {
        sample.labels["process"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == f"process_{name}"
    }


def test_process_metrics_cover_processes_that_this_one_started() -> None:
    metrics = Metrics()
    _, close = metrics.expose(0, "127.0.0.1")
    close()
    command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", "-m", "a.b"]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)
    ]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    resident = processes(metrics, "resident_memory_bytes")
    assert {"replica", "b-0", "b-1"} <= resident.keys()
    assert min(resident.values()) > 1 << 20
    for name in ("cpu_seconds_total", "open_fds", "max_fds", "threads", "start_time_seconds"):
        assert processes(metrics, name).keys() == resident.keys()
    before = processes(metrics, "open_fds")["replica"]
    with open(os.devnull):
        assert processes(metrics, "open_fds")["replica"] == before + 1
    for process in started:
        process.communicate()
    assert not {"b-0", "b-1"} & processes(metrics, "open_fds").keys()
