"""Measure the embedded model's quality anew on the whole test set; compare with what it says."""

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
from ladderstitch.vision.bundle import Bundle

TOLERANCE = 0.0005
"""Five images of 10,000: other processors round differently."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of gzipped IDX files")
    data = parser.parse_args().data
    said = Bundle.load(EMBEDDED).quality
    assert said is not None, "the embedded bundle is calibrated"
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        copy = Path(folder) / "bundle"
        shutil.copytree(EMBEDDED, copy)
        (copy / "quality.json").unlink()
        images = load_idx_folder(data, "t10k")
        measured = calibrate(Bundle.load(copy), images, said.data, 100, progress)
    worst = 0.0
    for variant, quality in said.variants.items():
        worst = max(worst, abs(measured.value(variant) - quality.value))
    sys.stdout.write(
        f"{len(said.variants)} variants on {len(images)} images: "
        f"largest difference {worst:.4f}, allowed {TOLERANCE}\n"
    )
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
