"""Tests of the simulator, the policy sweep, the scenarios and the oracle."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from ladderstitch.bundles import EMBEDDED, find_bundle
from ladderstitch.scheduling.load_report import PUSH_S
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch_loadtest.load.traces import BudgetClass, Trace, gamma, step
from ladderstitch_loadtest.simulation.oracle import MAX_REQUESTS, oracle
from ladderstitch_loadtest.simulation.policy_sweep import (
    count_runs,
    policy_settings,
    sweep_policies,
)
from ladderstitch_loadtest.simulation.profiles import Family, supernet
from ladderstitch_loadtest.simulation.scenarios import Scenario, grid, short_grid
from ladderstitch_loadtest.simulation.simulator import Machine, simulate

DISPATCH_S = 0.001
"""Overhead of a batch in addition to compute."""
FAMILY = supernet()


def trace_of(times: list[float], *budgets_s: float) -> Trace:
    """Return a trace of these arrivals, which get the budgets in turn."""
    classes = tuple(BudgetClass(str(b), b) for b in budgets_s)
    picks = np.arange(len(times)) % len(classes)
    return Trace("test", np.array(times), picks, classes)


def test_simulate_batches_take_their_profiled_seconds() -> None:
    """Variant 0 takes 1.05 + 0.36 n ms; arrivals during a batch share the next one."""
    trace = trace_of([0.0, 0.0001, 0.0002, 0.01], 0.1)
    got = simulate(FAMILY, trace, policy_settings("fixed 0"), Machine(dispatch_overhead_s=0.0005))
    assert got.total_s == pytest.approx(
        [0.00141 + 0.0005]
        + [0.00141 + 0.0005 + 0.00177 + 0.0005 - at for at in (1e-4, 2e-4)]
        + [0.00141 + 0.0005]
    )
    assert got.batch_size == [1, 2, 2, 1]
    assert got.queue_s[1] == pytest.approx(0.00191 - 0.0001)
    summary = got.summary()
    assert summary.attainment == 1.0
    assert summary.effective_quality == pytest.approx(0.7382)
    assert summary.mean_batch == pytest.approx(4 / 3)


def test_simulate_drops_hard_and_answers_soft_late() -> None:
    trace = trace_of([0.0, 0.0001], 0.0015)
    hard = simulate(FAMILY, trace, policy_settings("fixed 0"), Machine())
    soft = simulate(FAMILY, trace, policy_settings("fixed 0"), Machine(), hard=False)
    assert hard.met.tolist() == soft.met.tolist() == [True, False]
    assert hard.variant == [0, -1]
    assert soft.variant == [0, 0]


def test_simulate_with_the_same_seed_is_deterministic() -> None:
    scenario = Scenario("gamma", 0.6, 4.0, mixed=True, replicas=3)
    machine = Machine(replicas=3, spread=1.0)
    family = noisy(FAMILY)
    runs = [
        simulate(family, scenario.trace(family, 5), policy_settings("adaptive"), machine, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert runs[0].variant == runs[1].variant
    assert np.array_equal(runs[0].total_s, runs[1].total_s, equal_nan=True)
    assert runs[0].total_s != runs[2].total_s


def test_simulate_routes_to_the_replica_with_most_slack() -> None:
    trace = trace_of([0.0, 0.0001, 0.0002], 0.1)
    got = simulate(FAMILY, trace, policy_settings("fixed 0"), Machine(replicas=3))
    assert got.batch_size == [1, 1, 1]
    assert max(got.queue_s) == 0.0


def test_simulate_with_delayed_reports_costs_little() -> None:
    scenario = Scenario("gamma", 0.5, 8.0, mixed=True, replicas=2)
    known, delayed = (
        [
            simulate(
                FAMILY,
                scenario.trace(FAMILY, seed),
                policy_settings("adaptive"),
                Machine(replicas=2, push_s=push_s),
            ).summary()
            for seed in range(4)
        ]
        for push_s in (0.0, PUSH_S)
    )
    for figure in ("attainment", "effective_quality"):
        best, got = (np.mean([getattr(run, figure) for run in runs]) for runs in (known, delayed))
        assert got > best - 0.005


def test_simulate_recovers_from_a_noisy_neighbour() -> None:
    """Batches take three times as long from 1 s to 2 s; attainment is restored before 3 s."""
    rng = np.random.default_rng(1)
    budgets = [BudgetClass("shared", 0.036)]
    trace = Trace.draw("neighbour", gamma(250.0, 1.0, 4.0, rng), budgets, rng)
    machine = Machine(slow=((1.0, 2.0, 3.0),))
    got = simulate(noisy(FAMILY), trace, policy_settings("adaptive"), machine)
    at = trace.arrivals_s
    assert got.met[at < 1].mean() > 0.99
    assert got.met[(at > 1.3) & (at < 2)].mean() > 0.97
    assert got.met[at > 2.1].mean() > 0.99
    quality = np.array(got.quality)
    assert quality[(at > 1.3) & (at < 2)].mean() < quality[at < 1].mean()
    assert quality[at > 3].mean() == pytest.approx(quality[at < 1].mean(), abs=0.005)


@pytest.mark.parametrize("cv2", [0.0, 8.0])
def test_adaptive_beats_slackfit_on_mixed_budgets(cv2: float) -> None:
    scenario = Scenario("gamma", 0.5, cv2, mixed=True, replicas=2)
    trace, machine = scenario.trace(FAMILY, 0), Machine(replicas=2)
    ours, theirs = (
        simulate(FAMILY, trace, policy_settings(policy), machine).summary()
        for policy in ("adaptive", "slackfit")
    )
    assert ours.attainment > 0.99
    assert ours.effective_quality > theirs.effective_quality + 0.015


def test_adaptive_under_overload_uses_the_capacity() -> None:
    scenario = Scenario("gamma", 1.5, 1.0)
    summary = simulate(
        FAMILY, scenario.trace(FAMILY, 0), policy_settings("adaptive"), Machine()
    ).summary()
    assert summary.attainment > 0.9 / 1.5


@pytest.mark.parametrize("seed", range(4))
def test_oracle_is_the_best_of_all_plans(seed: int) -> None:
    """The reference tries every split of four requests into batches, in any order."""
    rng = np.random.default_rng(seed)
    times = np.sort(rng.random(4) * 0.004)
    trace = trace_of(times.tolist(), 0.003, 0.009)
    best = oracle(FAMILY, trace)
    assert best.effective_quality == pytest.approx(brute_force(trace) / len(trace))


def brute_force(trace: Trace) -> float:
    """Return the best value over every assignment to at most four ordered batches or to none."""
    arrivals, dues = trace.arrivals_s, trace.arrivals_s + trace.budgets_s
    profile = FAMILY.profile.variants

    def run(batches: list[list[int]], free: float) -> float:
        if not batches:
            return 0.0
        batch, rest = batches[0], batches[1:]
        if not batch:
            return run(rest, free)
        start, value = max(free, max(arrivals[batch])), float("-inf")
        for variant in FAMILY.frontier:
            end = start + profile[variant].median_s[len(batch) - 1]
            earned = FAMILY.quality[variant] * sum(end <= dues[i] for i in batch)
            value = max(value, earned + run(rest, end))
        return value

    n = len(trace)
    return max(
        run([[i for i in range(n) if places[i] == k] for k in range(n)], 0.0)
        for places in product(range(n + 1), repeat=n)
    )


def test_oracle_is_never_beaten_and_rejects_long_traces() -> None:
    scenario = replace(next(short_grid()), requests=30)
    (comparison,) = sweep_policies(
        [(FAMILY, scenario)], seeds=2, workers=1, advance=lambda runs: None
    )
    best = comparison.figures_of("oracle")
    assert comparison.figures[0] == best
    assert count_runs(FAMILY, scenario, 2) == 2 * len(comparison.figures)
    assert comparison.figures_of("adaptive").behind == 0.0
    long = trace_of([i / 1e3 for i in range(MAX_REQUESTS + 1)], 0.1)
    with pytest.raises(ValueError, match="got 1 and 151"):
        oracle(FAMILY, long)


def test_every_scenario_has_its_load() -> None:
    for scenario in grid(replicas=2):
        trace = scenario.trace(FAMILY, 3)
        rate = len(trace) / (trace.arrivals_s[-1] or 1.0)
        expected = scenario.load * 2 * FAMILY.capacity_rps
        assert rate == pytest.approx(expected, rel=0.25), scenario.name


def noisy(family: Family) -> Family:
    """Return the family with a 99th percentile 20 % above the median."""
    variants = {
        variant: latency.model_copy(update={"p99_s": tuple(1.2 * s for s in latency.median_s)})
        for variant, latency in family.profile.variants.items()
    }
    return replace(family, profile=family.profile.model_copy(update={"variants": variants}))


@pytest.mark.parametrize("images", [1, 4, 16])
def test_adaptive_keeps_budgets_of_requests_with_several_images(images: int) -> None:
    """A tenfold burst to 0.7 of the fastest variant's capacity, which counts images."""
    profile = FAMILY.profile
    fastest = min(profile.variants, key=lambda v: profile.variants[v].median_s[0])
    batch_s = profile.variants[fastest].median_s[-1] + DISPATCH_S
    peak = 0.7 * profile.max_batch_size / images / batch_s
    rng = np.random.default_rng(2)
    times = step(0.1 * peak, peak, 1.0, 2.0, 3.0, rng)
    trace = Trace.draw("burst", times, [BudgetClass("all", 0.2)], rng)
    machine = Machine(dispatch_overhead_s=DISPATCH_S, images=images)
    ours, lowest = (
        simulate(FAMILY, trace, policy_settings(policy), machine).summary()
        for policy in ("adaptive", f"fixed {fastest}")
    )
    assert ours.attainment > 0.99
    assert ours.effective_quality > lowest.effective_quality + 0.01


def test_cascades_keep_budgets_and_are_deterministic() -> None:
    family = Family.from_bundle(VisionBundle.load(find_bundle(str(EMBEDDED))))
    assert family.cascades.cascades
    trace = Scenario("gamma", 0.1, requests=400).trace(family, seed=1)
    machine, settings = Machine(min_confidence=0.9), policy_settings("adaptive")
    found = simulate(family, trace, settings, machine, seed=1)
    again = simulate(family, trace, settings, machine, seed=1)
    without = simulate(family, trace, settings, Machine(), seed=1)
    assert found.total_s == again.total_s
    assert found.variant == again.variant
    assert found.met.mean() >= without.met.mean()
    lasts = {cascade.last for cascade in family.cascades.cascades}
    firsts = {cascade.first for cascade in family.cascades.cascades}
    assert len(set(found.variant) & (firsts - lasts)) > 0
    busy = [sum(outcome.compute_s) for outcome in (found, without)]
    assert busy[0] < busy[1]
