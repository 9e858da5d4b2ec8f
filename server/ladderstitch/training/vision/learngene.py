"""Learngene Pool (arXiv 2312.05743): shallow anchors distilled from one deep model, block by block.

Block i of a student with d blocks learns from block (i + 1) D / d - 1 of a teacher with D blocks. A
learned linear map takes the student's width to the teacher's, one for the block's output and one
for its attention's output. If an end anchor has the teacher's width, the stitching layers into it
are initialised with the mean of the front anchor's block maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ladderstitch.training.vision.recipe import Pool
from ladderstitch.training.vision.stitching_layers import stitched_pairs
from ladderstitch.vision.models.stitched import StitchedModel
from ladderstitch.vision.models.vit import Block, Vit


class TeacherMaps(nn.Module):
    """The linear maps from the student's width to the teacher's, two per block of the student."""

    def __init__(self, student: Vit, teacher: Vit) -> None:
        super().__init__()
        widths = student.head.in_features, teacher.head.in_features
        depth = len(student.blocks)
        self.blocks = nn.ModuleList(nn.Linear(*widths) for _ in range(depth))
        self.attentions = nn.ModuleList(nn.Linear(*widths) for _ in range(depth))


class FeatureRecorder:
    """A transformer that records the outputs of its blocks and attentions in each forward pass."""

    def __init__(self, model: Vit) -> None:
        self.model = model
        self.blocks: list[Tensor] = []
        self.attentions: list[Tensor] = []
        for block in model.blocks:
            assert isinstance(block, Block)
            block.register_forward_hook(self._append_to(self.blocks))
            block.attn.register_forward_hook(self._append_to(self.attentions))

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits [B, num_classes] of images [B, C, H, W]; record this pass only."""
        self.blocks.clear()
        self.attentions.clear()
        logits: Tensor = self.model(images)
        return logits

    @staticmethod
    def _append_to(outputs: list[Tensor]) -> Callable[[nn.Module, object, Tensor], None]:
        """Return a forward hook that appends the output to the list."""
        return lambda _module, _inputs, output: outputs.append(output)


def distillation_loss(
    student: FeatureRecorder,
    teacher: FeatureRecorder,
    maps: TeacherMaps,
    pool: Pool,
    smoothing: float,
) -> Callable[[Tensor, Tensor, torch.Generator], Tensor]:
    """Return the loss function (images, labels, random source) -> scalar.

    The loss sums the cross-entropies with the labels and with the teacher's predictions, and the
    weighted distances of block and attention outputs.
    """
    ratio = len(teacher.model.blocks) // len(student.model.blocks)

    def loss(images: Tensor, labels: Tensor, _rng: torch.Generator) -> Tensor:
        with torch.no_grad():
            soft_targets = teacher(images).float().softmax(1)
        logits = student(images).float()
        total = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        total = total + pool.logits * F.cross_entropy(logits, soft_targets)
        for weight, outputs, targets, layers in (
            (pool.blocks, student.blocks, teacher.blocks, maps.blocks),
            (pool.attentions, student.attentions, teacher.attentions, maps.attentions),
        ):
            total = total + weight * _feature_distance(outputs, targets[ratio - 1 :: ratio], layers)
        return total

    return loss


def _feature_distance(
    outputs: Sequence[Tensor], targets: Sequence[Tensor], layers: nn.ModuleList
) -> Tensor:
    """Return the mean squared distance of mapped outputs from the targets.

    It is relative to the targets' mean square, so that it does not depend on the width.
    """
    distances = [
        F.mse_loss(layer(x.float()).float(), y.float()) / y.float().square().mean().clamp(min=1e-6)
        for x, y, layer in zip(outputs, targets, layers, strict=True)
    ]
    return torch.stack(distances).mean()


def maps_file(folder: Path, anchor: int) -> Path:
    """Return the file of an anchor's maps to the teacher."""
    return folder / f"anchor-{anchor}.maps.safetensors"


def save_maps(maps: TeacherMaps, folder: Path, anchor: int) -> None:
    """Write an anchor's maps to the teacher."""
    save_file(maps.state_dict(), maps_file(folder, anchor))


def load_maps_into(model: StitchedModel, pool: Pool, folder: Path) -> None:
    """Initialise the stitching layers into anchors of the teacher's width from the learned maps."""
    backbones = model.backbones()
    for layer, pairs in stitched_pairs(model.stitches).items():
        front, _, end, _ = pairs[0]
        target = backbones[end]
        assert isinstance(target, Vit)
        if target.head.in_features != pool.teacher.embed_dim:
            continue
        learned = load_file(maps_file(folder, front))
        blocks = sorted({last for _, last, _, _ in pairs})
        affine = model.affine(layer)
        assert affine.bias is not None
        with torch.no_grad():
            for part, parameter in (("weight", affine.weight), ("bias", affine.bias)):
                maps = torch.stack([learned[f"blocks.{block}.{part}"] for block in blocks])
                parameter.copy_(maps.mean(0))
