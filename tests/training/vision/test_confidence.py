"""Temperatures, calibration errors and cascades from logits whose truth is known."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

from ladderstitch.errors import BundleError
from ladderstitch.scheduling.cascades import THRESHOLDS, confidences
from ladderstitch.training.vision.calibrate import calibrate
from ladderstitch.training.vision.confidence import (
    calibration_error,
    fit_confidence,
    fit_temperature,
    held_out,
    measure_cascade,
)
from ladderstitch.training.vision.dataset import LabelledImages
from ladderstitch.vision.bundle import VisionBundle, write_table
from tests.conftest import make_tiny_bundle

IMAGES, CLASSES = 20_000, 10


def draw(temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [N, K], and labels [N] drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.0, 3.0, (IMAGES, CLASSES))
    noisy = logits / temperature + rng.gumbel(size=logits.shape)  # the Gumbel maximum trick
    return logits.astype(np.float32), noisy.argmax(axis=1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_fitted_temperature_is_that_of_the_labels(temperature: float) -> None:
    logits, labels = draw(temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.03)


def test_calibration_removes_overconfidence() -> None:
    logits, labels = draw(3.0)
    raw = confidences(logits, 1.0)
    right = logits.argmax(axis=1) == labels
    assert calibration_error(raw, right) > 0.3
    assert fit_confidence(logits, labels).calibration_error < 0.02


def test_calibration_error_is_the_weighted_gap_of_fifteen_bins() -> None:
    rng = np.random.default_rng(1)
    confidence, right = rng.uniform(0.1, 1.0, 500), rng.random(500) < 0.7
    expected, edges = 0.0, np.linspace(0, 1, 16)
    for low, high in itertools.pairwise(edges):
        among = (confidence >= low) & (confidence < high)
        if among.any():
            gap = abs(confidence[among].mean() - right[among].mean())
            expected += among.mean() * gap
    assert calibration_error(confidence, right) == pytest.approx(expected, abs=1e-5)


def test_error_and_cascade_come_from_images_that_were_not_fitted_on() -> None:
    logits, labels = draw(1.0)
    fitted = ~held_out(len(labels))
    spoilt = labels.copy()
    spoilt[fitted] = (spoilt[fitted] + 1) % CLASSES
    spoilt_found = fit_confidence(logits, spoilt, temperature=1.0)
    assert spoilt_found.calibration_error == fit_confidence(logits, labels, 1.0).calibration_error


def test_cascade_states_shares_and_accuracies_of_its_parts() -> None:
    logits, labels = draw(1.0)
    better = logits.copy()
    better[np.arange(IMAGES), labels] += 4.0
    one, other = fit_confidence(logits, labels, 1.0), fit_confidence(better, labels, 1.0)
    cascade = measure_cascade(one, other, 3, 7, 0.25)
    judged = held_out(IMAGES)
    for threshold in (0.5, 0.9):
        unsure = one.confidence[judged] < threshold
        final = np.where(unsure, other.right[judged], one.right[judged])
        assert cascade.going_on(threshold) == pytest.approx(unsure.mean(), abs=1e-4)
        assert cascade.quality(threshold) == pytest.approx(final.mean(), abs=1e-4)
        place = THRESHOLDS.index(threshold)
        expected = one.right[judged][unsure].mean()
        assert cascade.unsure_quality[place] == pytest.approx(expected, abs=1e-4)
    assert cascade.going_on(0.0) == 0.0


def make_images(count: int) -> LabelledImages:
    """Return random images of the tiny family with random labels."""
    import torch

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return LabelledImages(pixels, torch.randint(2, (count,), generator=generator))


def test_calibrate_writes_temperatures_and_loadable_cascades(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "tiny")
    (bundle.path / "quality.json").unlink()
    bundle = VisionBundle.load(bundle.path)
    with Progress(disable=True) as progress:
        calibrate(bundle, make_images(200), "random", 50, progress)
    table = VisionBundle.load(bundle.path).quality
    assert table is not None
    assert table.cascade_set.temperatures.keys() == table.variants.keys()
    assert all(q.calibration_error is not None for q in table.variants.values())
    for cascade in table.cascades:
        assert table.value(cascade.first) < table.value(cascade.last)


def test_few_images_calibrate_no_confidence(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "tiny")
    (bundle.path / "quality.json").unlink()
    with Progress(disable=True) as progress:
        table = calibrate(VisionBundle.load(bundle.path), make_images(50), "random", 50, progress)
    assert not table.cascade_set.temperatures
    assert not table.cascades


def test_bundle_with_a_cascade_of_an_unknown_variant_is_rejected(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "tiny")
    assert bundle.quality is not None
    logits, labels = draw(1.0)
    one = fit_confidence(logits, labels, 1.0)
    wrong = measure_cascade(one, one, 0, 999, 0.0)
    write_table(
        bundle.path / "quality.json", bundle.quality.model_copy(update={"cascades": (wrong,)})
    )
    with pytest.raises(BundleError, match="unknown variants"):
        VisionBundle.load(bundle.path)
