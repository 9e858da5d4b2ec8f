"""Files of a supernet's statistics of batch normalisation, which belong to single paths."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save_file

from ladderstitch.bundles.files import check_safetensors
from ladderstitch.vision.models.nested.model import NestedModel
from ladderstitch.vision.models.nested.path_statistics import (
    MEAN,
    VARIANCE,
    StatisticsFile,
    tensor_name,
)

MAX_SHARE = 0.04
"""Statistics of a file that stay in memory on the CPU, as a share of the weights."""
MIN_NUMBERS = 1 << 18
"""Numbers that stay in memory of small supernets, too: 1 MiB in float32."""


def write_statistics(path: Path, model: NestedModel) -> None:
    """Write the statistics of all paths that have some, in float32.

    An existing file is replaced and not changed: models that read from it keep theirs.
    """
    tensors = {
        tensor_name(stitch, norm, part): tensor.float().contiguous()
        for stitch, norms in model.statistics.items()
        for norm, pair in norms.items()
        for part, tensor in zip((MEAN, VARIANCE), pair, strict=True)
    }
    written = path.with_name(f"{path.name}.{os.getpid()}.new")
    save_file(tensors, written)
    written.replace(path)


def read_statistics(path: Path, model: NestedModel) -> None:
    """Let a model read the paths' statistics from a file when they are used.

    Raises `BundleError` if it cannot be read, or if its tensors are not those of the paths.
    """
    check_safetensors(path)
    widths = {stitch.id: model.norm_widths(stitch.id) for stitch in model.stitches}
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    limit = max(MIN_NUMBERS, MAX_SHARE * numbers)
    model.statistics.read_from(StatisticsFile(path, widths), limit)
