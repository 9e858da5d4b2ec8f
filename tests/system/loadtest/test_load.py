"""The load generator and its commands against a real server, by its own API and by OIP."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ladderstitch_loadtest.cli import app
from ladderstitch_loadtest.load.image_load import LoadRun, measure
from ladderstitch_loadtest.load.outcome import LoadOutcome
from ladderstitch_loadtest.load.targets import find_target
from ladderstitch_loadtest.load.traces import BudgetClass, Trace, poisson
from ladderstitch_loadtest.simulation.agreement import calibrate
from ladderstitch_loadtest.simulation.profiles import supernet
from tests.support.servers import RunningServer

CLASSES = [BudgetClass("tight", 0.5, 1), BudgetClass("relaxed", 2.0, 3)]


def short_trace(seed: int = 1) -> Trace:
    rng = np.random.default_rng(seed)
    return Trace.draw("short", poisson(60.0, 0.7, rng), CLASSES, rng)


@pytest.mark.parametrize(("kind", "model"), [("ladderstitch", ""), ("oip", "tiny")])
def test_measure_two_processes_reports_every_request(
    server: RunningServer, kind: str, model: str
) -> None:
    trace = short_trace()
    target = find_target(server.address, kind, model, hard=True)  # type: ignore[arg-type] # literal
    run = measure(server.address, target, trace, processes=2)
    assert run.statuses() == {"OK": len(trace)}
    total = np.array(run.outcome.total_s)
    assert (total > 0).all()
    assert (run.client_s >= total - 1e-9).all()
    assert run.client_s[0] >= run.lag_s[0] >= 0
    assert {len(trace)} == {len(run.outcome.quality), len(run.client_s), len(run.lag_s)}


def test_run_writes_json_and_html_and_checks_minimums(
    server: RunningServer, tmp_path: Path
) -> None:
    command = [
        "run",
        server.address,
        "--rate",
        "40",
        "--seconds",
        "0.5",
        "--budget",
        "a:5000",
        "--budget",
        "b:9000:2",
        "--out",
        str(tmp_path),
        "--arrivals",
        "gamma",
    ]
    passed = CliRunner().invoke(app, [*command, "--min-attainment", "0.5"])
    assert passed.exit_code == 0, passed.output
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["summary"]["attainment"] == 1.0
    assert [c["name"] for c in found["summary"]["classes"]] == ["a", "b"]
    page = (tmp_path / "load.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    missed = CliRunner().invoke(app, [*command, "--min-effective-quality", "1"])
    assert missed.exit_code == 1
    assert "effective quality: expected at least 1, got" in missed.output


@pytest.mark.parametrize("text", ["a", "a:b", "a:-1", "a:1:0", "a:1:2:3"])
def test_run_malformed_budget_exits_with_2(text: str) -> None:
    result = CliRunner().invoke(app, ["run", "127.0.0.1:1", "--budget", text])
    assert result.exit_code == 2
    assert "expected" in result.output


def test_load_run_with_large_lag_is_late() -> None:
    trace = short_trace()
    outcome, n = LoadOutcome.unanswered(trace), len(trace)
    for lag_s, late in ((0.001, False), (0.1, True)):
        run = LoadRun(outcome, ("OK",) * n, np.full(n, 0.2), np.full(n, lag_s))
        assert run.late == late


def test_calibrate_finds_slowdown_and_dispatch_overhead() -> None:
    """In this run, batches take twice their profile, and dispatch takes 1 ms."""
    trace, family = short_trace(), supernet()
    outcome = LoadOutcome.unanswered(trace)
    for i, at in enumerate(trace.arrivals_s.tolist()):
        size = 1 + i % 4
        compute_s = 2 * family.profile.variants[1].median_s[size - 1]
        outcome.answer(i, at + 0.002 + compute_s + 0.001, at + 0.002, compute_s, 1, 0.7669, size)
    n = len(trace)
    run = LoadRun(outcome, ("OK",) * n, np.zeros(n), np.zeros(n))
    slower, machine = calibrate(family, run)
    assert machine.dispatch_overhead_s == pytest.approx(0.001)
    assert slower.profile.alone_s(3) == pytest.approx(2 * family.profile.alone_s(3))
