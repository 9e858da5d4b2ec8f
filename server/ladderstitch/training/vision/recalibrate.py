"""Statistics of batch normalisation for every path of a supernet, measured on a few batches.

What reaches a normalisation differs between paths, so that the supernet's own statistics fit none
of them: without recalibration most paths are no better than chance.
"""

from __future__ import annotations

import torch
from rich.progress import Progress
from torch import Tensor

from ladderstitch.training.vision.dataset import normalise
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.models.nested.model import NestedConfig, NestedModel
from ladderstitch.vision.models.nested.statistics import write_statistics

IMAGES, BATCH = 1000, 100
"""Images that the statistics are averaged over, and images in a batch."""


def needs_statistics(bundle: VisionBundle) -> bool:
    """Return whether a bundle is a supernet whose paths lack statistics of their own."""
    config = bundle.manifest.config
    if not isinstance(config, NestedConfig) or bundle.statistics_path.exists():
        return False
    return bool(config.net.sizes(config.inputs).path_norms)


def recalibrate(bundle: VisionBundle, pixels: Tensor, progress: Progress) -> None:
    """Write the statistics of all paths of a bundle that needs them, from uint8 [N, C, H, W].

    They come from random images, whose labels are not used.
    """
    if not needs_statistics(bundle):
        return
    model = bundle.load_nested()
    scaling = bundle.manifest.preprocessing
    rng = torch.Generator().manual_seed(0)
    chosen = pixels[torch.randperm(len(pixels), generator=rng)[:IMAGES]]
    images = normalise(chosen, scaling.mean, scaling.std)
    recalibrate_model(model, images, progress)
    write_statistics(bundle.statistics_path, model)


def recalibrate_model(model: NestedModel, images: Tensor, progress: Progress) -> None:
    """Set the statistics of all paths of a model from preprocessed images [N, C, H, W]."""
    for stitch in progress.track(model.stitches, description="recalibrate"):
        model.recalibrate(stitch.id, torch.split(images, BATCH))
