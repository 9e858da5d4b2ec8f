"""Bundles: what is written is what is read, and what does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ladderstitch.errors import BundleError
from ladderstitch.vision.bundle import Bundle


def test_weights_survive_a_round_trip_in_half_precision(tiny_bundle: Bundle) -> None:
    stored = load_file(tiny_bundle.path / "weights.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    loaded = tiny_bundle.load_model().state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in stored.items())


def test_every_wrong_tensor_is_named(tiny_bundle: Bundle) -> None:
    path = tiny_bundle.path / "weights.safetensors"
    tensors = load_file(path)
    del tensors["anchors.0.norm.bias"]
    tensors["anchors.9.extra"] = torch.zeros(1)
    tensors["anchors.1.head.bias"] = torch.zeros(5)
    save_file(tensors, path)
    with pytest.raises(BundleError) as refused:
        tiny_bundle.load_model()
    for part in (
        "missing anchors.0.norm.bias",
        "unknown anchors.9.extra",
        "anchors.1.head.bias: expected (4,), got (5,)",
    ):
        assert part in str(refused.value)


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
def test_a_manifest_that_does_not_fit_is_refused(
    tiny_bundle: Bundle, field: str, value: object, message: str
) -> None:
    path = tiny_bundle.path / "model.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {field: value}))
    with pytest.raises(BundleError, match=message):
        Bundle.load(tiny_bundle.path)


def test_measurements_of_another_family_are_refused(tiny_bundle: Bundle) -> None:
    path = tiny_bundle.path / "quality.json"
    path.write_text(path.read_text().replace('"0":', '"99":'))
    with pytest.raises(BundleError, match=r"unknown variants \[99\]"):
        Bundle.load(tiny_bundle.path)


def test_an_absent_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"model\.yaml"):
        Bundle.load(tmp_path)
