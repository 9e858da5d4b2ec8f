"""Measure the embedded model's quality again on the whole test set; compare with its bundle."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from rich.progress import Progress

from ladderstitch.bundles import EMBEDDED
from ladderstitch.training.vision.calibrate import calibrate
from ladderstitch.training.vision.dataset import load_idx_folder
from ladderstitch.vision.bundle import VisionBundle

TOLERANCE = 0.0005
"""Largest allowed difference: 5 images of 10,000, because processors round differently."""


def main() -> int:
    """Return 1 if a variant's quality differs by more than `TOLERANCE`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of gzipped IDX files")
    data = parser.parse_args().data
    stated = VisionBundle.load(EMBEDDED).quality
    assert stated is not None, "the embedded bundle is calibrated"
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        copy = Path(folder) / "bundle"
        shutil.copytree(EMBEDDED, copy)
        (copy / "quality.json").unlink()
        images = load_idx_folder(data, "t10k", (1, 28, 28), 10)
        measured = calibrate(VisionBundle.load(copy), images, stated.data, 100, progress)
    largest = 0.0
    for variant, quality in stated.variants.items():
        largest = max(largest, abs(measured.value(variant) - quality.value))
    sys.stdout.write(
        f"{len(stated.variants)} variants on {len(images)} images: "
        f"largest difference {largest:.4f}, allowed {TOLERANCE}\n"
    )
    return int(largest > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
