"""Tests of image bundles: a round trip through files, and errors that name the wrong part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ladderstitch.errors import BundleError
from ladderstitch.vision.bundle import VisionBundle


def test_bundle_round_trip_keeps_half_precision_weights(tiny_bundle: VisionBundle) -> None:
    stored = load_file(tiny_bundle.path / "weights.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    loaded = tiny_bundle.load_model().state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in stored.items())


def test_load_model_wrong_tensors_names_each(tiny_bundle: VisionBundle) -> None:
    path = tiny_bundle.path / "weights.safetensors"
    tensors = load_file(path)
    del tensors["anchors.0.norm.bias"]
    tensors["anchors.9.extra"] = torch.zeros(1)
    tensors["anchors.1.head.bias"] = torch.zeros(5)
    save_file(tensors, path)
    with pytest.raises(BundleError) as raised:
        tiny_bundle.load_model()
    for part in (
        "missing anchors.0.norm.bias",
        "unknown anchors.9.extra",
        "anchors.1.head.bias: expected (4,), got (5,)",
    ):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("labels", ["one"], "labels: expected 4, got 1"),
        ("format", 2, "format"),
        ("surprise", 1, "surprise"),
        (
            "preprocessing",
            {"channels": 3, "height": 8, "width": 8, "mean": [0], "std": [1]},
            "mean",
        ),
    ],
)
def test_load_inconsistent_manifest_raises_bundle_error(
    tiny_bundle: VisionBundle, field: str, value: object, message: str
) -> None:
    path = tiny_bundle.path / "model.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {field: value}))
    with pytest.raises(BundleError, match=message):
        VisionBundle.load(tiny_bundle.path)


def test_load_quality_of_other_family_raises_bundle_error(tiny_bundle: VisionBundle) -> None:
    path = tiny_bundle.path / "quality.json"
    path.write_text(path.read_text().replace('"0":', '"99":'))
    with pytest.raises(BundleError, match=r"unknown variants \[99\]"):
        VisionBundle.load(tiny_bundle.path)


def test_load_absent_bundle_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"model\.yaml"):
        VisionBundle.load(tmp_path)
