"""Tests of the engine that is simulated block by block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ladderstitch.bundles import find_bundle
from ladderstitch.scheduling.requests import Deadlines, Request
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch_loadtest.load.outcome import LoadOutcome
from ladderstitch_loadtest.load.traces import BudgetClass, Trace
from ladderstitch_loadtest.simulation.block_routes import BlockRoutes
from ladderstitch_loadtest.simulation.block_simulator import BlockOptions, BlockSimulation
from ladderstitch_loadtest.simulation.block_sweep import OPTIONS, block_scenarios, sweep_blocks
from ladderstitch_loadtest.simulation.policy_sweep import policy_settings
from ladderstitch_loadtest.simulation.profiles import Family, supernet
from ladderstitch_loadtest.simulation.scenarios import Scenario
from ladderstitch_loadtest.simulation.simulator import ONE_IMAGE, Machine, simulate

FAMILY = supernet()
ROUTES = BlockRoutes.ladder(FAMILY)


def run(trace: Trace, options: BlockOptions) -> LoadOutcome:
    """Return the outcome of a trace on the ladder."""
    simulation = BlockSimulation(FAMILY, ROUTES, policy_settings("adaptive"), options)
    return simulation.run(trace, Request("", ONE_IMAGE, 0.0, Deadlines()))


def test_without_options_blocks_are_whole_batches() -> None:
    scenario = Scenario("gamma", 0.9, 4.0, mixed=True, spread=0.0, requests=300)
    trace = scenario.trace(FAMILY, 3)
    whole = simulate(FAMILY, trace, policy_settings("adaptive"), Machine(spread=0.0))
    blocks = run(trace, BlockOptions())
    assert blocks.variant == whole.variant
    assert blocks.batch_size == whole.batch_size
    assert np.array(blocks.total_s) == pytest.approx(np.array(whole.total_s), nan_ok=True)


def test_steps_of_a_route_take_the_seconds_of_its_variant() -> None:
    bundle = VisionBundle.load(find_bundle("fashion-mnist"))
    family = Family.from_bundle(bundle)
    for one, routes in ((FAMILY, ROUTES), (family, BlockRoutes.from_bundle(bundle, family))):
        for variant, latency in one.profile.variants.items():
            profiled = {variant: [0.0, *latency.median_s]}
            assert routes.rest_s([(variant, 1)], 0, profiled) == pytest.approx(latency.median_s[0])


def test_shared_steps_of_two_variants_run_once() -> None:
    """Variants 0 and 4 share the fast anchor's first five of ten steps."""
    profiled = {v: (0.0, *latency.median_s) for v, latency in FAMILY.profile.variants.items()}
    assert ROUTES.agree(0, 4, 5)
    assert not ROUTES.agree(0, 4, 6)
    parts = [(0, 2), (4, 3)]
    together = ROUTES.step_s(parts, 0, profiled)
    apart = sum(ROUTES.step_s([part], 0, profiled) for part in parts)
    assert together < apart
    assert ROUTES.step_s(parts, 5, profiled) == pytest.approx(
        sum(ROUTES.step_s([part], 5, profiled) for part in parts)
    )


def test_preemption_saves_a_request_behind_a_long_batch() -> None:
    """A relaxed request takes 4.68 ms; a tight one after 0.5 ms has 3 ms."""
    classes = (BudgetClass("relaxed", 0.1), BudgetClass("tight", 0.003))
    trace = Trace("test", np.array([0.0, 0.0005]), np.array([0, 1]), classes)
    assert run(trace, BlockOptions()).met.tolist() == [True, False]
    outcome = run(trace, BlockOptions(preemption=True))
    assert outcome.met.tolist() == [True, True]
    assert outcome.total_s[0] > 0.00468


def test_late_binding_changes_to_a_faster_variant() -> None:
    """Five tight requests arrive while one relaxed request is in the steps that all share."""
    classes = (BudgetClass("relaxed", 0.0034), BudgetClass("tight", 0.0055))
    times, picks = np.array([0.0, *[0.0001] * 5]), np.array([0] + [1] * 5)
    trace = Trace("test", times, picks, classes)
    whole, bound = (run(trace, BlockOptions(late_binding=late)) for late in (False, True))
    assert bound.variant[0] < whole.variant[0]
    assert bound.value.sum() > whole.value.sum()


def test_sweep_reports_each_engine_with_gains_over_the_first() -> None:
    scenario = replace(block_scenarios(60)[0])
    gains = list(sweep_blocks([(FAMILY, ROUTES)], [scenario], 2, 1, lambda runs: None))
    assert [gain.engine for gain in gains] == list(OPTIONS)
    assert gains[0].quality_gain == gains[0].attainment_gain == 0.0
    for gain in gains:
        lead = 100 * (gain.effective_quality - gains[0].effective_quality)
        assert gain.quality_gain == pytest.approx(lead, abs=0.01)
