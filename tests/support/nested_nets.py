"""Small supernets with random weights, one of every layout."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from ladderstitch.vision.bundle import Preprocessing, VisionManifest, write_bundle
from ladderstitch.vision.models.nested.model import NestedConfig, NestedModel
from ladderstitch.vision.models.nested.sampling import sampled_config

NETS: dict[str, dict[str, object]] = {
    "ofa-resnet": {
        "stem_width": 16,
        "stage_widths": [16, 24, 32, 40],
        "base_depths": [1, 1, 1, 1],
        "depth_list": [0, 1],
        "expand_ratio_list": [0.25, 0.5],
        "width_mult_list": [0.5, 1.0],
    },
    "ofa-mbv3": {"width_mult": 0.1, "depth_list": [1, 2]},
    "autoformer": {
        "patch_size": 4,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 3,
        "head_dim": 8,
        "mlp_ratio": 2.0,
        "max_relative_position": 2,
        "embed_dims": [12, 16, 24],
        "depths": [1, 2, 3],
        "heads": [1, 2, 3],
        "mlp_ratios": [1.0, 2.0],
    },
    "thinkingvit": {
        "patch_size": 4,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 6,
        "thinking_stages": [3, 6],
    },
    "vit-resnas": {
        "patch_size": 4,
        "stem_width": 6,
        "widths": [16, 24, 40],
        "depths": [2, 2, 1],
        "heads": [3, 3, 2, 2, 4],
        "head_dims": [4, 4, 8, 8, 8],
        "hidden": [24, 24, 36, 36, 60],
        "width_choices": [[8, 12, 16], [16, 20, 24], [28, 32, 40]],
        "head_choices": [[1, 2, 3], [1, 2], [2, 3, 4]],
        "hidden_choices": [[12, 18, 24], [20, 28, 36], [30, 45, 60]],
        "skippable": [1, 3],
    },
    "attentivenas": {
        "resolution_list": [12, 16, 22],
        "width_list": [[8, 16], [8, 16], [16, 24], [16, 24], [32, 48]],
        "depth_list": [[1, 2], [1, 2], [1, 3]],
        "ks_list": [[3, 5], [3, 5, 7], [3]],
        "expand_ratio_list": [[1], [2, 3], [4]],
        "strides": [1, 2, 2],
        "se": [False, True, True],
    },
}
"""Fields of the supernets by the name of their layout."""


def make_config(kind: str, paths: int, image_size: int = 16) -> NestedConfig:
    """Return the family of a small supernet with sampled paths."""
    inputs = {"image_size": image_size, "in_channels": 1, "num_classes": 5}
    return sampled_config({"inputs": inputs, "net": {"kind": kind, **NETS[kind]}}, paths, seed=0)


def make_model(config: NestedConfig, *, recalibrated: bool = True) -> NestedModel:
    """Return a supernet with random tensors and, for every path, statistics of random images."""
    torch.manual_seed(5)
    model = config.build().eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor += 0.3 * torch.rand(tensor.shape) * (1 if name.endswith("var") else -1)
    if recalibrated:
        for stitch in model.stitches:
            batches = [torch.randn(n, *config.inputs.shape) for n in (8, 6)]
            model.recalibrate(stitch.id, batches)
    return model


def write_random_statistics(path: Path, model: NestedModel) -> None:
    """Write statistics of every path that come from no images."""
    tensors = {
        f"{stitch.id}.{norm}.{part}": torch.rand(width)
        for stitch in model.stitches
        for norm, width in model.norm_widths(stitch.id).items()
        for part in ("running_mean", "running_var")
    }
    save_file(tensors, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def write_nested(folder: Path, kind: str, paths: int) -> NestedModel:
    """Write the bundle of a small supernet without statistics of its paths; return the model."""
    config = make_config(kind, paths)
    model = make_model(config, recalibrated=False)
    size = config.inputs.image_size
    grey = {"channels": 1, "height": size, "width": size, "mean": [0.5], "std": [0.5]}
    manifest = VisionManifest(
        name="nested",
        family="nested",
        config=config,
        labels=tuple("abcde"),
        preprocessing=Preprocessing.model_validate(grey),
        origin="random weights",
        licence="none",
    )
    write_bundle(folder, manifest, model)
    return model
