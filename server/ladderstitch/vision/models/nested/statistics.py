"""Files of a supernet's statistics of batch normalisation, which belong to single paths."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ladderstitch.bundles import check_tensors, shapes_of
from ladderstitch.bundles.files import check_safetensors
from ladderstitch.errors import BundleError
from ladderstitch.vision.models.nested.model import NestedModel
from ladderstitch.vision.models.nested.slices import Statistics

MEAN, VARIANCE = "running_mean", "running_var"


def write_statistics(path: Path, model: NestedModel) -> None:
    """Write the statistics of all paths that have some, in float32."""
    tensors = {
        f"{stitch}.{norm}.{part}": tensor.float().contiguous()
        for stitch, norms in model.statistics.items()
        for norm, pair in norms.items()
        for part, tensor in zip((MEAN, VARIANCE), pair, strict=True)
    }
    save_file(tensors, path)


def read_statistics(path: Path, model: NestedModel) -> None:
    """Set the paths' statistics of a model from a file.

    Raises `BundleError` if it cannot be read, or if its tensors are not those of the paths.
    """
    check_safetensors(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path}: {error}") from error
    widths = {stitch.id: model.norm_widths(stitch.id) for stitch in model.stitches}
    expected = {
        f"{stitch}.{norm}.{part}": (width,)
        for stitch, norms in widths.items()
        for norm, width in norms.items()
        for part in (MEAN, VARIANCE)
    }
    check_tensors(expected, shapes_of(tensors), where=str(path))
    for stitch, norms in widths.items():
        found: Statistics = {
            norm: (tensors[f"{stitch}.{norm}.{MEAN}"], tensors[f"{stitch}.{norm}.{VARIANCE}"])
            for norm in norms
        }
        model.statistics[stitch] = found
