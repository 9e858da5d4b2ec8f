"""The benchmark of families without stitches: both families hold the same networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch

from ladderstitch.bundles import EMBEDDED
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.models.executor import StitchExecutor
from ladderstitch_loadtest.benchmarks.families import PLAIN, STITCHED, draw_traces, write_families
from ladderstitch_loadtest.load.traces import BudgetClass


def test_both_families_have_the_same_anchors_and_qualities(tmp_path: Path) -> None:
    families = write_families(tmp_path)
    stitched, plain = (VisionBundle.load(families.bundles[name]) for name in (STITCHED, PLAIN))
    assert len(families.anchors) == 3
    assert len(stitched.manifest.variants()) == 14
    assert not any(variant.layers for variant in plain.manifest.variants())
    pixels = np.random.default_rng(0).standard_normal((4, 1, 28, 28), np.float32)
    embedded = StitchExecutor(VisionBundle.load(EMBEDDED).load_model())
    assert stitched.quality is not None
    assert plain.quality is not None
    ids = zip(families.anchor_ids[STITCHED], families.anchor_ids[PLAIN], strict=True)
    for of_stitched, of_plain in ids:
        assert plain.quality.value(of_plain) == stitched.quality.value(of_stitched)
        file = tmp_path / f"anchor-{of_stitched}.onnx"
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        got = session.run(None, {session.get_inputs()[0].name: pixels})[0]
        with torch.inference_mode():
            expected = embedded(torch.from_numpy(pixels), stitch=of_stitched).numpy()
        np.testing.assert_allclose(got, expected, atol=1e-4)
    served = {
        variant.id: stitched.quality.value(variant.id) for variant in stitched.manifest.variants()
    }
    assert sum(value >= families.floor for value in served.values()) == 9


def test_traces_have_three_budgets_and_a_burst_in_the_middle_third() -> None:
    classes = [BudgetClass(name, budget) for name, budget in (("a", 0.1), ("b", 0.2), ("c", 0.3))]
    mixed, burst = draw_traces(classes, {"budgets": 40.0, "burst": 200.0}, 30.0, seed=0)
    assert set(mixed.picks) == {0, 1, 2}
    assert {one.budget_s for one in burst.classes} == {0.3}
    inside = (burst.arrivals_s >= 10) & (burst.arrivals_s < 20)
    assert 1800 < inside.sum() < 2200
    assert 300 < (~inside).sum() < 500
    assert (
        draw_traces(classes, {"budgets": 40.0, "burst": 200.0}, 30.0, 0)[0].picks == mixed.picks
    ).all()
