"""A family of ONNX networks behind a real server: outputs, budgets, metrics, `GetModel`."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ladderstitch.client import Client, RequestFailed
from ladderstitch.importers.image_settings import ImageSettings
from ladderstitch.importers.onnx_bundle import write_family
from ladderstitch.importers.onnx_networks import FamilyInfo, find_sources, load_family
from ladderstitch.scheduling.profiles import Quality, QualityTable
from ladderstitch.training.vision.pairs import fit_maps, list_joints
from ladderstitch.vision.bundle import write_table
from tests.support.onnx_networks import LABELS, random_images, reference, write_network
from tests.support.servers import RunningServer, start_server, stop_server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a stitched bundle of two networks with fake qualities, and return its parent."""
    folder = tmp_path_factory.mktemp("own")
    paths = [write_network(folder, "convnext", size) for size in (4, 8)]
    info = FamilyInfo("mine", settings=ImageSettings(labels=LABELS))
    family = load_family(find_sources(paths), info)
    joints = list_joints(family.networks)[:2]
    maps = fit_maps(joints, family.networks, family.scalings, [random_images(8)])
    bundle = write_family(family, folder / "mine", joints, maps)
    table = QualityTable(
        metric="top-1 accuracy",
        data="fake",
        n=100,
        confidence=0.95,
        date="2026-01-01",
        versions={},
        variants={
            variant: Quality(value=value, low=value, high=value)
            for variant, value in enumerate((0.5, 0.9, 0.6, 0.7))
        },
    )
    write_table(bundle.path / "quality.json", table)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    """Start a server of the bundle."""
    running = start_server(folder / "mine", folder / "log")
    yield running
    assert stop_server(running) == 0


def test_served_scores_equal_those_of_the_file(server: RunningServer, folder: Path) -> None:
    images = random_images(3)
    with Client(server.address) as client:
        for variant, name in enumerate(("convnext-4", "convnext-8")):
            answer = client.predict(images, variant=variant)
            assert answer.variant_name == name
            expected = reference(folder / f"{name}.onnx", images)
            np.testing.assert_allclose(answer.logits, expected, atol=1e-4)
            assert answer.label == LABELS[int(expected[0].argmax())]
        stitched = client.predict(images, variant=2)
        assert stitched.variant_name.startswith("convnext-4[..")
        assert stitched.logits.shape == (3, 5)


def test_budgets_and_qualities_choose_networks(server: RunningServer) -> None:
    with Client(server.address) as client:
        assert client.predict(random_images(1), budget_s=300).variant == 1
        assert client.predict(random_images(1), budget_s=300, min_quality=0.8).quality == 0.9
        with pytest.raises(RequestFailed, match="QUALITY_UNAVAILABLE"):
            client.predict(random_images(1), min_quality=0.95)


def test_model_and_metrics_describe_the_networks(server: RunningServer) -> None:
    with Client(server.address) as client:
        model = client.get_model("mine")
    assert [variant.name for variant in model.variants][:2] == ["convnext-4", "convnext-8"]
    assert len(model.variants) == 4
    assert model.preprocessing.height == 32
    assert list(model.labels) == list(LABELS)
    with urllib.request.urlopen(server.metrics) as page:
        text = page.read().decode()
    assert 'model="mine"' in text
