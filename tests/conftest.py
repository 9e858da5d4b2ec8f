"""Fixtures that test packages share: golden cases, tiny bundles, one torch thread."""

from __future__ import annotations

import tests.support.interpreted_kernels  # noqa: F401  (the first import of triton)

# isort: split

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from ladderstitch.runtime.device import device_name, versions
from ladderstitch.scheduling.profiles import Latency, LatencyProfile, Quality, QualityTable
from ladderstitch.vision.bundle import (
    Preprocessing,
    VisionBundle,
    VisionManifest,
    write_bundle,
    write_table,
)
from ladderstitch.vision.models.snnet import SnNetConfig
from ladderstitch.vision.models.vit import InputShape, VitConfig
from tests.support.language_models import tiny_language_bundle

__all__ = ["tiny_language_bundle"]

# No test may depend on chance, nor on how fast the machine is (by default, 200 ms for an example).
settings.register_profile("ladderstitch", deadline=None, derandomize=True)
settings.load_profile("ladderstitch")

GOLDEN = Path(__file__).parent / "golden"
SIZES = (1, 2, 4, 8, 16, 32)
"""All batch sizes of a server's default profile, so that scaling keeps the fake latencies."""


@pytest.fixture(autouse=True, scope="session")
def _use_a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LADDERSTITCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _use_one_torch_thread() -> None:
    torch.set_num_threads(1)


def golden_cases(family: str) -> list[Path]:
    """Return the golden cases of a family.

    They are those in the repository, and those in the folder that LADDERSTITCH_GOLDEN names.
    """
    extra = os.environ.get("LADDERSTITCH_GOLDEN")
    folders = [GOLDEN, Path(extra)] if extra else [GOLDEN]
    found = {p.stem: p for folder in folders for p in sorted(folder.glob("*.safetensors"))}
    descriptions = {
        path: json.loads(path.with_suffix(".json").read_text()) for path in found.values()
    }
    return [path for path, found in descriptions.items() if found["family"] == family]


def tiny_config(depth: int = 3, anchors: int = 3) -> SnNetConfig:
    """Return a family of small vision transformers on 8x8 grey images with 4 labels."""
    widths = [(8, 2), (12, 2), (16, 4)][:anchors]
    return SnNetConfig(
        inputs=InputShape(image_size=8, in_channels=1, num_classes=4),
        anchors=tuple(
            VitConfig(embed_dim=d, depth=depth, num_heads=h, patch_size=4) for d, h in widths
        ),
    )


@pytest.fixture
def tiny_bundle(tmp_path: Path) -> VisionBundle:
    """Return a bundle with 3 random anchors on 8x8 grey images with 4 labels."""
    return make_tiny_bundle(tmp_path / "tiny")


def make_tiny_bundle(path: Path) -> VisionBundle:
    """Write the bundle of `tiny_bundle`; its qualities and latencies are fake."""
    torch.manual_seed(0)
    config = tiny_config()
    manifest = VisionManifest(
        name="tiny",
        config=config,
        labels=("ankle", "bag", "coat", "dress"),
        preprocessing=Preprocessing(channels=1, height=8, width=8, mean=(0.5,), std=(0.25,)),
        origin="random weights",
        licence="Apache-2.0",
    )
    write_bundle(path, manifest, config.build())
    ids = [variant.id for variant in config.stitches()]
    write_table(
        path / "quality.json",
        QualityTable(
            metric="top-1 accuracy",
            data="fake",
            n=100,
            confidence=0.95,
            date="2026-01-01",
            versions={},
            variants={i: Quality(value=0.5 + i / 100, low=0.4, high=0.9) for i in ids},
        ),
    )
    write_table(
        path / "latency.json",
        LatencyProfile(
            device=device_name(torch.device("cpu")),  # so that servers do not measure
            threads=1,
            date="2026-01-01",
            versions=versions(),
            batch_sizes=SIZES,
            variants={
                i: Latency(
                    median_s=tuple((1 + i / 10) * 1e-3 * b**0.5 for b in SIZES),
                    p99_s=tuple((1 + i / 10) * 1.3e-3 * b**0.5 for b in SIZES),
                )
                for i in ids
            },
        ),
    )
    return VisionBundle.load(path)
