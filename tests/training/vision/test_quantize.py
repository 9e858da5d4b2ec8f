"""Tests of 8-bit variants: their outputs, ids, files, and the commands that make them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ladderstitch.errors import BundleError
from ladderstitch.importers.stitched_families import read_config
from ladderstitch.training.vision.quantize import equalise_ranges, quantize
from ladderstitch.vision.bundle import Preprocessing, VisionBundle, VisionManifest, write_bundle
from ladderstitch.vision.engine.startup import make_config, open_executor, served_variants
from ladderstitch.vision.models.families import FamilyConfig
from tests.vision.models.test_families import SHEETS, build_with_random_norms

TOLERANCE = 0.12
"""Largest mean error of logits in 8 bits over their standard deviation in float32."""


def ignore_progress(done: int, total: int) -> None:
    """Report nothing."""


def write_random_bundle(path: Path, config: FamilyConfig) -> VisionBundle:
    """Return a bundle of random weights."""
    inputs = config.inputs
    manifest = VisionManifest(
        name="random",
        family=config.family,
        config=config,
        labels=tuple(f"label-{i}" for i in range(inputs.num_classes)),
        preprocessing=Preprocessing.model_validate(
            {
                "channels": inputs.in_channels,
                "height": inputs.image_size,
                "width": inputs.image_size,
                "mean": [0.5] * inputs.in_channels,
                "std": [0.25] * inputs.in_channels,
            }
        ),
        origin="random weights",
        licence="Apache-2.0",
    )
    write_bundle(path, manifest, build_with_random_norms(config))
    return VisionBundle.load(path)


def random_images(bundle: VisionBundle, count: int, seed: int) -> np.ndarray:
    """Return random images of the bundle's shape."""
    inputs = bundle.manifest.preprocessing
    shape = (count, inputs.channels, inputs.height, inputs.width)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("sheet", SHEETS.values(), ids=SHEETS.keys())
def test_int8_variants_are_close_to_float32(sheet: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    bundle = write_random_bundle(tmp_path, read_config(sheet["family"], sheet["config"]))
    quantize(bundle, random_images(bundle, 32, seed=1), ignore_progress)
    bundle = VisionBundle.load(tmp_path)
    executor, images = open_executor(bundle, 1, ignore_progress), random_images(bundle, 16, seed=2)
    stitches = [s for s in bundle.manifest.config.stitches() if s.usable]
    by_id = {variant.id: variant for variant in bundle.manifest.variants()}
    count = len(bundle.manifest.config.stitches())
    for stitch in stitches:
        int8 = by_id[stitch.id + count]
        assert (int8.segments, int8.precision) == (stitch.segments, "int8")
        exact, rounded = executor(images, stitch.id), executor(images, int8.id)
        error = np.abs(rounded - exact).mean() / exact.std()
        assert 0 < error < TOLERANCE, stitch.name
    some = [stitch.id + count for stitch in stitches[:3]]
    apart = [executor(images, variant) for variant in some]
    assert executor.join(some) == some
    for variant, expected in zip(some, apart, strict=True):
        error = np.abs(executor(images, variant) - expected).mean() / expected.std()
        assert error < TOLERANCE / 4


def test_joined_edges_have_one_range() -> None:
    ranges = {
        "a": {"x": (-1.0, 1.0), "y": (0.0, 2.0)},
        "b": {"x": (0.0, 1.0), "y": (0.0, 5.0)},
        "c": {"x": (0.0, 4.0)},
        "d": {"z": (0.0, 9.0)},
    }
    equalise_ranges(ranges, [("a", "b", "c"), ("a", "c", "d")])
    assert ranges["a"]["y"] == ranges["b"]["x"] == ranges["b"]["y"] == ranges["c"]["x"] == (0, 5)
    assert ranges["a"]["x"] == (-1, 1)
    assert ranges["d"] == {"z": (0, 9)}


def test_output_of_an_activation_stays_non_negative() -> None:
    ranges = {"a": {"y": (0.0, 2.0)}, "layer": {"y": (-3.0, 4.0)}, "b": {"x": (-3.0, 5.0)}}
    equalise_ranges(ranges, [("a", "b"), ("layer", "b")])
    assert ranges == {"a": {"y": (0, 2)}, "layer": {"y": (-3, 5)}, "b": {"x": (-3, 5)}}


def test_torch_runtime_serves_float32_only(tiny_bundle: VisionBundle) -> None:
    quantize(tiny_bundle, random_images(tiny_bundle, 8, seed=0), ignore_progress)
    bundle = VisionBundle.load(tiny_bundle.path)
    fields = {"device": "cpu", "dtype": "float32", "threads": 1, "max_batch_size": 4}
    compiled = make_config(bundle, runtime="onnx", **fields)
    eager = make_config(bundle, runtime="torch", **fields)
    float32 = bundle.manifest.config.stitches()
    assert served_variants(bundle, eager) == float32
    assert len(served_variants(bundle, compiled)) == 2 * len(float32)


def test_second_run_drops_old_int8_measurements(tiny_bundle: VisionBundle) -> None:
    images = random_images(tiny_bundle, 8, seed=0)
    quantize(tiny_bundle, images, ignore_progress)
    digest = VisionBundle.load(tiny_bundle.path).digest()
    quantize(VisionBundle.load(tiny_bundle.path), 2 * images, ignore_progress)
    bundle = VisionBundle.load(tiny_bundle.path)
    assert bundle.digest() != digest
    assert bundle.quality is not None
    assert bundle.quality.variants.keys() == {s.id for s in bundle.manifest.config.stitches()}


def test_int8_without_graphs_is_rejected(tiny_bundle: VisionBundle) -> None:
    manifest = tiny_bundle.path / "model.yaml"
    manifest.write_text(manifest.read_text() + "precisions: [float32, int8]\n")
    with pytest.raises(BundleError, match="int8: expected graphs, got none"):
        VisionBundle.load(tiny_bundle.path)


def test_unreadable_int8_graph_is_rejected(tiny_bundle: VisionBundle) -> None:
    quantize(tiny_bundle, random_images(tiny_bundle, 8, seed=0), ignore_progress)
    bundle = VisionBundle.load(tiny_bundle.path)
    sorted(bundle.int8_folder.glob("*.onnx"))[0].write_bytes(b"no graph")
    with pytest.raises(BundleError, match="expected readable graphs"):
        open_executor(bundle, 1, ignore_progress)


@pytest.mark.parametrize("formats", ["[int8]", "[float32, float32]", "[float32, int4]", "[]"])
def test_wrong_precisions_are_rejected(tiny_bundle: VisionBundle, formats: str) -> None:
    manifest = tiny_bundle.path / "model.yaml"
    manifest.write_text(manifest.read_text() + f"precisions: {formats}\n")
    with pytest.raises(BundleError, match="precisions"):
        VisionBundle.load(tiny_bundle.path)
