"""A supernet behind a real server: every path, its own statistics, budgets; both runtimes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.client import Client
from ladderstitch.scheduling.profiles import Quality, QualityTable
from ladderstitch.vision.bundle import VisionBundle, write_table
from ladderstitch.vision.models.nested.model import NestedModel
from ladderstitch.vision.models.nested.statistics import write_statistics
from tests.support.coloured_pictures import write_pictures
from tests.support.masked_vit import (
    Network,
    masked_logits,
    random_network,
    random_weights,
    small_network,
)
from tests.support.nested_nets import write_nested
from tests.support.servers import start_server, stop_server

PATHS = 4


def write_measured(folder: Path) -> NestedModel:
    """Write a bundle with statistics and fake qualities that rise with the id; return the model."""
    write_nested(folder, "ofa-resnet", PATHS)
    bundle = VisionBundle.load(folder)
    model = bundle.load_nested()
    torch.manual_seed(3)
    for stitch in model.stitches:
        model.recalibrate(stitch.id, [torch.randn(16, *model.config.inputs.shape)])
    write_statistics(bundle.statistics_path, model)
    values = {n: Quality(value=v, low=v, high=v) for n, v in enumerate((0.5, 0.6, 0.7, 0.8))}
    table = QualityTable(
        metric="top-1 accuracy",
        data="fake",
        n=100,
        confidence=0.95,
        date="2026-01-01",
        versions={},
        variants=values,
    )
    write_table(folder / "quality.json", table)
    return model


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_served_paths_equal_the_model(runtime: str, tmp_path: Path) -> None:
    model = write_measured(tmp_path / "net")
    images = np.random.default_rng(0).standard_normal((3, 1, 16, 16)).astype(np.float32)
    server = start_server(tmp_path / "net", tmp_path / "log", "--runtime", runtime)
    try:
        with Client(server.address) as client:
            for stitch in model.stitches:
                answer = client.predict(images, variant=stitch.id)
                assert answer.variant_name == stitch.name
                wanted = model(torch.from_numpy(images), stitch.id).numpy()
                np.testing.assert_allclose(answer.logits, wanted, atol=2e-4, rtol=1e-3)
            # no path is fast enough for the first budget, and every one for the second
            rushed = client.predict(images[:1], budget_s=1e-6)
            relaxed = client.predict(images[:1], budget_s=60.0)
    finally:
        code = stop_server(server)
    assert code == 0
    assert rushed.quality <= relaxed.quality == 0.8


def import_vit(folder: Path, networks: list[Network]) -> dict[str, torch.Tensor]:
    """Import listed networks of a small ViT-ResNAS and measure them; return its weights."""
    net = small_network(classes=3)
    # bundles have half precision
    weights = {
        name: tensor.half().float() if tensor.is_floating_point() else tensor
        for name, tensor in random_weights(net, 16, 4, channels=3).items()
    }
    torch.save({"model": weights}, folder / "supernet.pth")
    listed = [{"name": f"net-{n}", "network_def": str(path)} for n, path in enumerate(networks)]
    config = {"image_size": 16, "num_classes": 3, "patch_size": 4, "network_def": str(net)}
    (folder / "config.json").write_text(json.dumps(config | {"paths": listed}))
    (folder / "labels.txt").write_text("blue\ngreen\nred\n")
    photos, into = write_pictures(folder / "photos", 8), str(folder / "net")
    options = ["--config", str(folder / "config.json"), "--labels", str(folder / "labels.txt")]
    checkpoint = str(folder / "supernet.pth")
    for command in (
        ["import", checkpoint, "--family", "vit-resnas", "--into", into, *options],
        ["calibrate", into, "--data", str(photos)],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    return weights


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_an_imported_vit_resnas_is_served(runtime: str, tmp_path: Path) -> None:
    rng = random.Random(1)
    networks = [random_network(small_network(classes=3), rng), small_network(classes=3)]
    weights = import_vit(tmp_path, networks)
    assert not VisionBundle.load(tmp_path / "net").statistics_path.exists()
    images = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    server = start_server(tmp_path / "net", tmp_path / "log", "--runtime", runtime)
    try:
        with Client(server.address) as client:
            for number, network in enumerate(networks):
                answer = client.predict(images, variant=number)
                assert answer.variant_name == f"net-{number}"
                wanted = masked_logits(weights, network, torch.from_numpy(images)).numpy()
                np.testing.assert_allclose(answer.logits, wanted, atol=2e-4, rtol=1e-3)
            relaxed = client.predict(images[:1], budget_s=60.0)
    finally:
        code = stop_server(server)
    assert code == 0
    table = VisionBundle.load(tmp_path / "net").quality
    assert table is not None
    assert relaxed.quality == pytest.approx(max(q.value for q in table.variants.values()))
