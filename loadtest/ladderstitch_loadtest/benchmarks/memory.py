"""Memory benchmark: the memory that all stitches of a family take on top of one set of weights."""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ladderstitch.vision.models.executor import StitchExecutor
from ladderstitch.vision.models.snnet import SnNetConfig
from ladderstitch.vision.models.vit import InputShape, VitConfig

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a family in MiB.

    `resident_one_stitch` and `resident_all_stitches` are the resident memory of the process before
    and after all stitches ran.
    """

    family: str
    stitches: int
    anchors_and_layers: float
    model_storages: float
    plans: float
    resident_one_stitch: float
    resident_all_stitches: float

    def to_dict(self) -> dict[str, object]:
        """Return the fields for the result file."""
        return asdict(self)


def deit_family(image_size: int) -> SnNetConfig:
    """Return SN-Net's published DeiT family: Ti, S and B, 71 stitches (arXiv 2302.06586)."""
    widths = ((192, 3), (384, 6), (768, 12))
    anchors = tuple(VitConfig(embed_dim=d, depth=12, num_heads=h) for d, h in widths)
    return SnNetConfig(inputs=InputShape(image_size=image_size, num_classes=1000), anchors=anchors)


def measure() -> Memory:
    """Return the memory of random weights of the published sizes.

    Images have 32 pixels per side, which changes only the size of the position tables.
    """
    torch.manual_seed(0)
    config = deit_family(image_size=32)
    model = config.build().eval().requires_grad_(False)
    expected = sum(
        p.numel() * 4 for part in (model.anchors, model.stitch_layers) for p in part.parameters()
    )
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
    }
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    serving = StitchExecutor(model)
    plans = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        serving(images, len(model.stitches) - 1)
        serving(images, 0), serving(images, 1), serving(images, 2)
        gc.collect()
        one_stitch = _resident_mib()
        for stitch in model.stitches:
            serving(images, stitch.id)
    gc.collect()
    return Memory(
        "SN-Net DeiT Ti/S/B",
        len(model.stitches),
        round(expected / MIB, 2),
        round(sum(storages.values()) / MIB, 2),
        round(plans / MIB, 3),
        round(one_stitch, 1),
        round(_resident_mib(), 1),
    )


def _resident_mib() -> float:
    """Return the resident memory of this process in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status: expected a line VmRSS, got none")
