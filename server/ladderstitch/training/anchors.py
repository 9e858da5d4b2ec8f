"""Train a family's anchors from scratch, largest first, each on its own."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ladderstitch.errors import ConfigError, DataError
from ladderstitch.models.trunk import Trunk
from ladderstitch.models.vit import Vit
from ladderstitch.training.data import LabelledImages
from ladderstitch.training.loop import Run, accuracy, fit
from ladderstitch.training.recipe import Recipe


def anchor_file(folder: Path, anchor: int) -> Path:
    return folder / f"anchor-{anchor}.safetensors"


def load_anchor(recipe: Recipe, folder: Path, anchor: int) -> Trunk:
    """A trained anchor; raises `DataError` if `ladderstitch train` has not finished it."""
    path = anchor_file(folder, anchor)
    if not path.exists():
        raise DataError(f"{path}: no such anchor; run `ladderstitch train` first")
    model = recipe.family.anchors[anchor].build(recipe.family.inputs)
    model.load_state_dict(load_file(path))
    return model.eval()


def train_anchors(recipe: Recipe, images: LabelledImages, folder: Path, progress: Progress) -> None:
    """Write `anchor-{a}.safetensors` (float32, upstream's names) for each not yet there."""
    if len(recipe.anchors) != len(recipe.family.anchors):
        raise ConfigError(
            f"anchors: expected one schedule for each of {len(recipe.family.anchors)} anchors, "
            f"got {len(recipe.anchors)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(recipe.threads)
    for anchor in reversed(range(len(recipe.anchors))):
        if not anchor_file(folder, anchor).exists():
            _train_anchor(recipe, anchor, images, folder, progress)


def _train_anchor(
    recipe: Recipe, anchor: int, images: LabelledImages, folder: Path, progress: Progress
) -> None:
    train, validation = images.split(recipe.data.validation_images)
    torch.manual_seed(recipe.seed + anchor)
    model = recipe.family.anchors[anchor].build(recipe.family.inputs)
    if isinstance(model, Vit):
        init_vit(model)
    schedule = recipe.anchors[anchor]
    run = Run(f"anchor-{anchor}", folder, recipe.seed + anchor, schedule, recipe.data, train)

    def loss(batch: Tensor, labels: Tensor, _rng: torch.Generator) -> Tensor:
        return F.cross_entropy(model(batch), labels, label_smoothing=schedule.label_smoothing)

    fit(
        model,
        parameter_groups(model, schedule.learning_rate),
        loss,
        lambda: {"validation_accuracy": accuracy(model, validation, recipe.data)},
        run,
        progress,
    )
    save_file(model.state_dict(), anchor_file(folder, anchor))
    run.checkpoint.unlink()


def init_vit(model: Vit) -> None:
    """DeiT's start: truncated normal of 0.02 for linear maps and embeddings, zero biases."""
    nn.init.trunc_normal_(model.cls_token, std=0.02)
    nn.init.trunc_normal_(model.pos_embed, std=0.02)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def parameter_groups(module: nn.Module, learning_rate: float) -> list[dict[str, object]]:
    """Matrices decay, vectors (biases, norms) and embeddings do not."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        embedding = name.endswith(("cls_token", "pos_embed"))
        (plain if parameter.ndim < 2 or embedding else decayed).append(parameter)
    return [
        {"params": decayed, "lr": learning_rate},
        {"params": plain, "lr": learning_rate, "weight_decay": 0.0},
    ]
