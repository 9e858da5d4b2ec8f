"""Paths of several resolutions behind a real server: mixed requests get the answers of theirs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from ladderstitch.client import Client
from ladderstitch.importers.import_bundle import BundleInfo, build_manifest
from ladderstitch.importers.nested_families import import_nested, read_nested
from ladderstitch.scheduling.profiles import Quality, QualityTable
from ladderstitch.vision.bundle import VisionBundle, write_bundle, write_table
from ladderstitch.vision.models.nested.statistics import write_statistics
from tests.support.attentive_reference import (
    CLASSES,
    IMAGE_SIZE,
    SPACE,
    Network,
    extreme_path,
    make_checkpoint,
)
from tests.support.servers import start_server, stop_server

CHANNELS, REQUESTS = 3, 24


def write_networks(folder: Path) -> list[Network]:
    """Write a bundle with paths of three resolutions; return its networks, written again."""
    # the numbers of bundles have half precision
    tensors = {
        name: tensor.half().float() if tensor.ndim > 0 else tensor
        for name, tensor in make_checkpoint(SPACE, CHANNELS).items()
    }
    largest = extreme_path(SPACE, max)
    paths = [extreme_path(SPACE, min), *(largest | {"resolution": side} for side in (16, 12, 22))]
    upstream = {"image_size": IMAGE_SIZE, "n_classes": CLASSES, "supernet_config": SPACE}
    config = read_nested("attentivenas", upstream, paths)
    model = import_nested("attentivenas", config, tensors)
    write_bundle(folder, build_manifest(config, BundleInfo("net", "none"), "random"), model)
    networks = [Network(tensors, SPACE, path) for path in paths]
    batches = [torch.randn(8, CHANNELS, IMAGE_SIZE, IMAGE_SIZE) for _ in range(2)]
    for stitch, network in enumerate(networks):
        model.recalibrate(stitch, batches)
        network.calibrate(batches)
    write_statistics(VisionBundle.load(folder).statistics_path, model)
    table = QualityTable(
        metric="top-1 accuracy",
        data="fake",
        n=100,
        confidence=0.95,
        date="2026-01-01",
        versions={},
        variants={n: Quality(value=0.5, low=0.4, high=0.6) for n in range(len(paths))},
    )
    write_table(folder / "quality.json", table)
    return networks


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_mixed_resolutions_get_the_answers_of_their_paths(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    networks = write_networks(tmp_path / "net")
    rng = np.random.default_rng(0)
    shape = (REQUESTS, 1, CHANNELS, IMAGE_SIZE, IMAGE_SIZE)
    images = rng.standard_normal(shape).astype(np.float32)
    server = start_server(tmp_path / "net", tmp_path / "log", "--runtime", runtime)
    try:
        with Client(server.address) as client, ThreadPoolExecutor(REQUESTS) as pool:
            calls = [
                pool.submit(client.predict, image, variant=number % len(networks))
                for number, image in enumerate(images)
            ]
            answers = [call.result() for call in calls]
    finally:
        code = stop_server(server)
    assert code == 0
    for number, (image, answer) in enumerate(zip(images, answers, strict=True)):
        wanted = networks[number % len(networks)](torch.from_numpy(image)).numpy()
        np.testing.assert_allclose(answer.logits, wanted, atol=5e-4, rtol=1e-3)
