"""Small runs of the benchmarks against a real server, and the figures that they report."""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import generate_latest
from typer.testing import CliRunner

from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.model_metrics import VisionMetrics
from ladderstitch_loadtest.benchmarks import memory, mixed, overhead, switching
from ladderstitch_loadtest.cli import app
from ladderstitch_loadtest.load.in_process import poisson
from ladderstitch_loadtest.servers.processes import echo_server, histogram_quantile
from tests.support.servers import RunningServer


def test_poisson_arrivals_have_rate_and_depend_on_seed() -> None:
    first, second = (poisson(200.0, 100.0, np.random.default_rng(4)) for _ in range(2))
    assert first == second
    gaps = np.diff(first)
    assert len(first) == pytest.approx(20_000, rel=0.05)
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.05)  # exponential gaps


async def test_mixed_reports_every_request_of_every_policy(server: RunningServer) -> None:
    found = await mixed.measure(
        server.address,
        images=2,
        load=0.5,
        seconds=0.3,
        rounds=1,
        seed=2,
        policies=("adaptive",),
        advance=lambda name: None,
    )
    names = [row.policy for row in found.rows]
    assert names[0] == "adaptive"
    assert all(name.startswith("fixed ") for name in names[1:])
    assert len({row.offered for row in found.rows}) == 1  # the same arrivals for all
    for row in found.rows:
        assert 0 <= row.effective_quality <= row.attainment <= 1
        assert row.by_class.keys() == {"tight", "middle", "relaxed"}
    budgets_ms = list(found.budgets_ms.values())
    assert budgets_ms == sorted(budgets_ms)
    largest_ms = max(found.unloaded_p99_ms.values())
    assert found.budgets_ms["relaxed"] == pytest.approx(3 * largest_ms, rel=0.5)


def test_budget_class_names_follow_the_order_of_budgets() -> None:
    largest = mixed.UnloadedLatency(2, total_p99_s=0.0046, compute_median_s=0.003)
    for fastest_s, middle_s, expected_ms in (
        (0.001, 0.002, [4.0, 5.0, 13.8]),  # twice the middle anchor's p99 is the tightest
        (0.001, 0.003, [5.0, 6.0, 13.8]),
    ):
        fastest = mixed.UnloadedLatency(0, fastest_s, 0.0005)
        middle = mixed.UnloadedLatency(1, middle_s, 0.0015)
        classes = mixed.budget_classes(fastest, middle, largest)
        assert [one.name for one in classes] == ["tight", "middle", "relaxed"]
        assert [1e3 * one.budget_s for one in classes] == pytest.approx(expected_ms)


async def test_overhead_and_switching_report_figures(server: RunningServer) -> None:
    with echo_server() as echo:
        cost = await overhead.measure(server.address, echo, 1, (4,), 0.2)
    assert cost.latency.overhead_ms > 0
    assert cost.latency.total_ms > cost.latency.compute_ms > 0
    assert cost.throughput[0].infer_rps > 0
    switched = await switching.measure(server.address, 200, 1, lambda: None)
    assert switched.variants >= 1
    assert switched.kept_excess_p50_us == pytest.approx(0.0, abs=1000)


def test_memory_of_71_stitches_equals_that_of_their_parts(tmp_path: Path) -> None:
    config = memory.deit_family(32)
    assert len(config.stitches()) == 71
    result = CliRunner().invoke(app, ["memory", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["stitches"] == 71
    assert found["model_storages"] == found["anchors_and_layers"]
    assert found["plans"] < 1.0


def test_histogram_quantile_is_upper_edge_of_its_bucket() -> None:
    metrics = Metrics()
    for model, times in (("a", [0.00015] * 98 + [0.0004]), ("b", [0.05])):
        for seconds in times:
            VisionMetrics(metrics, model, {0: 0.9}).turnaround.observe(seconds)
    page = generate_latest(metrics.registry).decode()
    name = "ladderstitch_turnaround_seconds"
    found = [histogram_quantile(page, name, share) for share in (0.5, 0.98, 0.99, 1.0)]
    assert found == [0.0002, 0.0002, 0.0005, 0.1]
    assert isnan(histogram_quantile("", name, 0.5))
