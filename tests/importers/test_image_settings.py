"""Tests of preprocessing and labels from the files of transformers and timm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ladderstitch.errors import BundleError, ConfigError
from ladderstitch.importers.image_settings import ImageSettings, read_settings

HALF = [0.5, 0.5, 0.5]
PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vit": (
        {"size": {"height": 224, "width": 224}, "image_mean": HALF, "image_std": HALF},
        {"size": (224, 224), "crop": "whole", "mean": (0.5,) * 3, "resize": "bilinear"},
    ),
    "resnet": (
        {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3},
        {"size": (224, 224), "crop": 0.875, "resize": "bicubic"},
    ),
    "large convnext": (
        {"size": {"shortest_edge": 384}, "crop_pct": 0.875, "resample": 3},
        {"size": (384, 384), "crop": "whole"},
    ),
    "clip": (
        {
            "size": {"shortest_edge": 256},
            "crop_size": {"height": 224, "width": 224},
            "do_center_crop": True,
        },
        {"size": (224, 224), "crop": 0.875},
    ),
    "old": ({"size": 224, "resample": 2}, {"size": (224, 224), "crop": "whole"}),
    "plain pixels": (
        {"size": {"height": 32, "width": 48}, "do_normalize": False},
        {"size": (32, 48), "mean": (0.0,) * 3, "std": (1.0,) * 3},
    ),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_processor_of_transformers_is_taken_over(case: str, tmp_path: Path) -> None:
    fields, expected = PROCESSORS[case]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    settings = read_settings(tmp_path / "model.onnx")
    assert {name: getattr(settings, name) for name in expected} == expected
    assert settings.source.endswith("preprocessor_config.json")


def test_labels_of_transformers_are_in_order_of_their_ids(tmp_path: Path) -> None:
    labels = {str(i): f"label {i}" for i in reversed(range(12))}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": labels}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 64}))
    settings = read_settings(tmp_path / "model.onnx")
    assert settings.labels == tuple(f"label {i}" for i in range(12))
    assert settings.size == (64, 64)


@pytest.mark.parametrize(("mode", "crop"), [("center", 0.9), ("squash", "whole")])
def test_configuration_of_timm_is_taken_over(mode: str, crop: float | str, tmp_path: Path) -> None:
    fields = {
        "architecture": "efficientnet_lite0",
        "label_names": ["a", "b"],
        "pretrained_cfg": {
            "input_size": [3, 240, 240],
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "crop_mode": mode,
            "mean": HALF,
            "std": [0.25, 0.25, 0.25],
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    settings = read_settings(tmp_path / "model.onnx")
    assert settings == ImageSettings(
        (240, 240),
        (0.5,) * 3,
        (0.25,) * 3,
        crop,
        "bicubic",
        ("a", "b"),
        str(tmp_path / "config.json"),
    )


def test_file_with_the_name_of_the_model_comes_first(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 32}))
    (tmp_path / "small.preprocessor_config.json").write_text(json.dumps({"size": 64}))
    assert read_settings(tmp_path / "small.onnx").size == (64, 64)
    assert read_settings(tmp_path / "large.onnx").size == (32, 32)


def test_options_come_before_files(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 32, "resample": 3}))
    settings = ImageSettings(size=(64, 64), source="options").over(
        read_settings(tmp_path / "small.onnx")
    )
    assert (settings.size, settings.resize, settings.source) == ((64, 64), "bicubic", "options")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_rescale": False}, "do_rescale: expected true"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor: expected 1/255"),
        ({"resample": 1}, "interpolation: expected one of"),
        ({"size": {"shortest_edge": 224}, "do_center_crop": False}, "do_center_crop"),
        ({"size": {"longest_edge": 224}}, "shortest_edge"),
    ],
)
def test_step_that_servers_lack_is_rejected(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=message):
        read_settings(tmp_path / "model.onnx")


@pytest.mark.parametrize("text", ["[" * 5000, "[]", "{", '{"size": []}'])
def test_broken_file_is_rejected(text: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises((ConfigError, BundleError)):
        read_settings(tmp_path / "model.onnx")
