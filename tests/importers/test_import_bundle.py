"""Tests of `ladderstitch import`: foreign checkpoints become bundles that load and answer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.models.executor import StitchExecutor
from tests.conftest import GOLDEN

runner = CliRunner()


def hf_vit(folder: Path, width: int, depth: int = 3) -> nn.Module:
    torch.manual_seed(width)
    config = hf.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=2 * width,
        num_labels=5,
    )
    model = hf.ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        noise = rng.integers(0, 256, (9, 11, 3), np.uint8)
        Image.fromarray(noise).resize((90, 70)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("pickled", [True, False])
def test_import_of_a_released_family_gives_recorded_outputs(tmp_path: Path, pickled: bool) -> None:
    case = load_file(GOLDEN / "snnet_deit_k3s2.safetensors")
    sheet = json.loads((GOLDEN / "snnet_deit_k3s2.json").read_text())
    weights = {k.removeprefix("weights."): v for k, v in case.items() if k.startswith("weights.")}
    file = tmp_path / "released.pth"
    torch.save({"model": weights, "args": argparse.Namespace(lr=1.0)} if pickled else weights, file)
    (tmp_path / "sizes.json").write_text(json.dumps(sheet["config"]))
    arguments = ["import", str(file), "--family", "snnet-deit", "--into", str(tmp_path / "bundle")]
    result = runner.invoke(app, [*arguments, "--config", str(tmp_path / "sizes.json")])
    assert result.exit_code == 0, result.output
    assert "43 networks" in " ".join(result.output.split())
    bundle = VisionBundle.load(tmp_path / "bundle")
    model = StitchExecutor(bundle.load_model())
    with torch.inference_mode():
        for stitch in (0, 2, 7, 40):
            wanted = case[f"output.{stitch}"]
            difference = (model(case["input"], stitch) - wanted).abs().max()
            assert (
                difference < 0.02 * wanted.abs().max()
            )  # the bundle's weights are in half precision


def test_import_of_anchors_stitches_them_on_photographs(tmp_path: Path, photographs: Path) -> None:
    models = [hf_vit(tmp_path / "small", 16), hf_vit(tmp_path / "large", 24)]
    files = [str(tmp_path / size / "model.safetensors") for size in ("small", "large")]
    (tmp_path / "labels.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    result = runner.invoke(
        app,
        [
            "import",
            *files,
            "--into",
            str(tmp_path / "bundle"),
            "--images",
            str(photographs),
            "--labels",
            str(tmp_path / "labels.txt"),
            "--name",
            "zoo",
            "--mean",
            "0.5,0.5,0.5",
            "--std",
            "0.5,0.25,0.5",
        ],
    )
    assert result.exit_code == 0, result.output
    bundle = VisionBundle.load(tmp_path / "bundle")
    assert (bundle.manifest.name, bundle.manifest.labels[2]) == ("zoo", "cat")
    assert bundle.manifest.preprocessing.mean == (0.5, 0.5, 0.5)
    assert bundle.manifest.preprocessing.std == (0.5, 0.25, 0.5)
    serving = StitchExecutor(bundle.load_model())
    assert len(serving.plans) == 2 + 7
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        for anchor, model in enumerate(models):
            expected = model(images).logits
            assert (serving(images, anchor) - expected).abs().max() < 0.01
        assert serving(images, 8).isfinite().all()


def test_import_of_anchors_of_unequal_depth_is_snnetv2(tmp_path: Path, photographs: Path) -> None:
    hf_vit(tmp_path / "small", 16, depth=2)
    hf_vit(tmp_path / "large", 24, depth=4)
    files = [str(tmp_path / size / "model.safetensors") for size in ("small", "large")]
    arguments = ["import", *files, "--into", str(tmp_path / "b"), "--images", str(photographs)]
    assert runner.invoke(app, arguments).exit_code == 0
    assert VisionBundle.load(tmp_path / "b").manifest.family == "snnetv2"


def test_import_that_fails_reports_the_reason(tmp_path: Path) -> None:
    hf_vit(tmp_path / "small", 16)
    hf_vit(tmp_path / "large", 24)
    files = [str(tmp_path / size / "model.safetensors") for size in ("small", "large")]
    into = ["--into", str(tmp_path / "bundle")]

    def error_of(*arguments: str) -> str:
        result = runner.invoke(app, ["import", *arguments, *into])
        assert result.exit_code == 2
        return " ".join(result.output.split())

    assert "images: expected a folder of photographs" in error_of(*files)
    assert "checkpoints: expected one file for snnet-deit, got 2" in error_of(
        *files, "--family", "snnet-deit"
    )
    assert "expected one of ['learngene-pool'" in error_of(
        files[0], "--family", "nonsense", "--config", str(tmp_path / "small" / "config.json")
    )
    assert "snnet-levit has no published configuration" in error_of(
        files[0], "--family", "snnet-levit"
    )
    assert "wrong tensors: missing anchors.0.blocks.0" in error_of(
        files[0], "--family", "snnet-deit"
    )
    assert "No such file" in error_of(files[0], "--labels", str(tmp_path / "none.txt"))
    assert "mean: expected numbers such as 0.5,0.5,0.5, got grey" in error_of(
        files[0], "--mean", "grey"
    )
    assert "mean: expected 3 values" in error_of(files[0], "--mean", "0.5")
    assert not (tmp_path / "bundle").exists()
