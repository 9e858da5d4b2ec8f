"""Learngene Pool (arXiv 2312.05743): shallow anchors distilled from one deep model, block by block.

Student block i of d is matched with teacher block (i + 1) D / d - 1 of D: a learned linear map
takes the student's width to the teacher's, once for what leaves the block and once for what leaves
its attention. Where an end anchor has the teacher's width, the mean of the front's block maps
starts the stitching layers into it.
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


class Maps(nn.Module):
    """Student to teacher, for each of the student's blocks."""

    def __init__(self, student: Vit, teacher: Vit) -> None:
        super().__init__()
        widths = student.head.in_features, teacher.head.in_features
        depth = len(student.blocks)
        self.blocks = nn.ModuleList(nn.Linear(*widths) for _ in range(depth))
        self.attentions = nn.ModuleList(nn.Linear(*widths) for _ in range(depth))


class FeatureRecorder:
    """A transformer that remembers, for one pass at a time, what left its blocks and attentions."""

    def __init__(self, model: Vit) -> None:
        self.model = model
        self.blocks: list[Tensor] = []
        self.attentions: list[Tensor] = []
        for block in model.blocks:
            assert isinstance(block, Block)
            block.register_forward_hook(self._remember(self.blocks))
            block.attn.register_forward_hook(self._remember(self.attentions))

    def __call__(self, images: Tensor) -> Tensor:
        self.blocks.clear()
        self.attentions.clear()
        logits: Tensor = self.model(images)
        return logits

    @staticmethod
    def _remember(into: list[Tensor]) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: into.append(output)


def distillation_loss(
    student: FeatureRecorder, teacher: FeatureRecorder, maps: Maps, pool: Pool, smoothing: float
) -> Callable[[Tensor, Tensor, torch.Generator], Tensor]:
    """(images, labels, random source) -> labels, soft answers, block and attention outputs."""
    ratio = len(teacher.model.blocks) // len(student.model.blocks)

    def loss(images: Tensor, labels: Tensor, _rng: torch.Generator) -> Tensor:
        with torch.no_grad():
            wanted = teacher(images).float().softmax(1)
        logits = student(images).float()
        total = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        total = total + pool.logits * F.cross_entropy(logits, wanted)
        for weight, own, theirs, mapped in (
            (pool.blocks, student.blocks, teacher.blocks, maps.blocks),
            (pool.attentions, student.attentions, teacher.attentions, maps.attentions),
        ):
            total = total + weight * _apart(own, theirs[ratio - 1 :: ratio], mapped)
        return total

    return loss


def _apart(own: Sequence[Tensor], theirs: Sequence[Tensor], mapped: nn.ModuleList) -> Tensor:
    """Mean squared distance over the teacher's mean square, so that widths do not matter."""
    distances = [
        F.mse_loss(layer(x.float()).float(), y.float()) / y.float().square().mean().clamp(min=1e-6)
        for x, y, layer in zip(own, theirs, mapped, strict=True)
    ]
    return torch.stack(distances).mean()


def maps_file(folder: Path, anchor: int) -> Path:
    return folder / f"anchor-{anchor}.maps.safetensors"


def save_maps(maps: Maps, folder: Path, anchor: int) -> None:
    save_file(maps.state_dict(), maps_file(folder, anchor))


def start_from_maps(model: StitchedModel, pool: Pool, folder: Path) -> None:
    """Set the stitching layers into anchors of the teacher's width from what was learned."""
    trunks = model.trunks()
    for layer, pairs in stitched_pairs(model.stitches).items():
        front, _, end, _ = pairs[0]
        target = trunks[end]
        assert isinstance(target, Vit)
        if target.head.in_features != pool.teacher.embed_dim:
            continue
        learned = load_file(maps_file(folder, front))
        blocks = sorted({last for _, last, _, _ in pairs})
        affine = model.affine(layer)
        assert affine.bias is not None
        with torch.no_grad():
            for part, parameter in (("weight", affine.weight), ("bias", affine.bias)):
                own = torch.stack([learned[f"blocks.{block}.{part}"] for block in blocks])
                parameter.copy_(own.mean(0))
