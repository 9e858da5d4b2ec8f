"""Memory benchmark: the memory that all stitches of a family take on top of one set of weights."""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ladderstitch.vision.models.executor import StitchExecutor
from ladderstitch.vision.models.snnet import SnNetConfig
from ladderstitch.vision.models.stitched import StitchedModel
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
    executor, plan_bytes = _make_executor(model)
    one_stitch, all_stitches = _resident_while_running(executor, model)
    return Memory(
        "SN-Net DeiT Ti/S/B",
        len(model.stitches),
        round(expected / MIB, 2),
        round(sum(storages.values()) / MIB, 2),
        round(plan_bytes / MIB, 3),
        round(one_stitch, 1),
        round(all_stitches, 1),
    )


def _make_executor(model: StitchedModel) -> tuple[StitchExecutor, int]:
    """Return an executor and the bytes of the plans that it makes."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    executor = StitchExecutor(model)
    plan_bytes = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return executor, plan_bytes


def _resident_while_running(executor: StitchExecutor, model: StitchedModel) -> tuple[float, float]:
    """Return the resident MiB after the anchors and one stitch ran, and after all stitches ran."""
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        for stitch in (len(model.stitches) - 1, 0, 1, 2):
            executor(images, stitch)
        gc.collect()
        one_stitch = _resident_mib()
        for each in model.stitches:
            executor(images, each.id)
    gc.collect()
    return one_stitch, _resident_mib()


def _resident_mib() -> float:
    """Return the resident memory of this process in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status: expected a line VmRSS, got none")
