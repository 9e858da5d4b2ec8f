"""Pictures whose class is their colour, in folders by class, and a recipe that learns them fast."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}
RECIPE: dict[str, Any] = {
    "name": "toy",
    "threads": 1,
    "precision": "float32",
    "data": {
        "name": "coloured pictures",
        "licence": "none",
        "augmentation": {"shift_pixels": 1, "erase_pixels": 4},
    },
    "family": {
        "family": "snnet-staged",
        "inputs": {"image_size": 16, "in_channels": 3, "num_classes": 2},
        "stages": [1],
        "joints": "after",
        "anchors": [
            {
                "kind": "resnet",
                "block": "BasicBlock",
                "stem": "small",
                "depths": [1, 1, 1, 1],
                "width": width,
            }
            for width in (4, 6)
        ],
    },
    "anchors": [{"epochs": 6, "batch_size": 8, "learning_rate": 0.01}] * 2,
    "stitching": {"epochs": 2, "batch_size": 8, "learning_rate": 0.002, "frozen_batch_norm": True},
    "init_images": 16,
}
"""Two residual networks for pictures of 16 x 16."""


def write_pictures(
    folder: Path, count: int, *, names: Mapping[str, str] | None = None, seed: int = 0
) -> Path:
    """Write noisy PNG files of many sizes, `count` of each colour, and return the folder.

    `names` are the subfolders by colour; the default is a subfolder for each colour.
    """
    rng = np.random.default_rng(seed)
    for colour, name in (names or {colour: colour for colour in COLOURS}).items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            height, width = rng.integers(12, 60, 2)
            noise = rng.normal(0, 20, (height, width, 3))
            pixels = (np.asarray(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:04d}.png")
    return folder
