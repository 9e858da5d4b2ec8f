"""Train a family's anchors from scratch, largest first, each on its own."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ladderstitch.errors import ConfigError, DataError
from ladderstitch.models.staged import Hierarchical
from ladderstitch.models.trunk import Trunk
from ladderstitch.models.vit import InputShape, Vit, VitConfig
from ladderstitch.training.data import LabelledImages
from ladderstitch.training.learngene import Maps, Watched, distillation_loss, save_maps
from ladderstitch.training.loop import Loss, Run, accuracy, fit
from ladderstitch.training.recipe import Pool, Recipe, Schedule

AnyAnchor = VitConfig | Hierarchical


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
    teacher = (
        None if recipe.pool is None else _teacher(recipe, recipe.pool, images, folder, progress)
    )
    for anchor in reversed(range(len(recipe.anchors))):
        if anchor_file(folder, anchor).exists():
            continue
        torch.manual_seed(recipe.seed + anchor)
        model = _fresh(recipe.family.anchors[anchor], recipe.family.inputs)
        schedule, name = recipe.anchors[anchor], f"anchor-{anchor}"
        if recipe.pool is None or teacher is None:
            _train_alone(recipe, model, schedule, name, anchor, images, folder, progress)
        else:
            assert isinstance(model, Vit)
            maps = Maps(model, teacher)
            loss = distillation_loss(
                Watched(model), Watched(teacher), maps, recipe.pool, schedule.label_smoothing
            )
            both = nn.ModuleList((model, maps))
            _train(recipe, model, both, loss, schedule, name, anchor, images, folder, progress)
            save_maps(maps, folder, anchor)
        save_file(model.state_dict(), anchor_file(folder, anchor))


def _teacher(
    recipe: Recipe, pool: Pool, images: LabelledImages, folder: Path, progress: Progress
) -> Vit:
    """The pool's larger model, trained first."""
    torch.manual_seed(recipe.seed + len(recipe.anchors))
    model = _fresh(pool.teacher, recipe.family.inputs)
    assert isinstance(model, Vit)
    file = folder / "teacher.safetensors"
    if not file.exists():
        seed = len(recipe.anchors)
        _train_alone(recipe, model, pool.schedule, "teacher", seed, images, folder, progress)
        save_file(model.state_dict(), file)
    model.load_state_dict(load_file(file))
    return model.eval().requires_grad_(False)


def _fresh(config: AnyAnchor, inputs: InputShape) -> Trunk:
    model = config.build(inputs)
    if isinstance(model, Vit):
        init_vit(model)
    return model


def _train_alone(
    recipe: Recipe,
    model: Trunk,
    schedule: Schedule,
    name: str,
    seed: int,
    images: LabelledImages,
    folder: Path,
    progress: Progress,
) -> None:
    def loss(batch: Tensor, labels: Tensor, _rng: torch.Generator) -> Tensor:
        return F.cross_entropy(model(batch), labels, label_smoothing=schedule.label_smoothing)

    _train(recipe, model, model, loss, schedule, name, seed, images, folder, progress)


def _train(
    recipe: Recipe,
    model: Trunk,
    trained: nn.Module,
    loss: Loss,
    schedule: Schedule,
    name: str,
    seed: int,
    images: LabelledImages,
    folder: Path,
    progress: Progress,
) -> None:
    """Fit `trained`, of which `model` is the network, or all."""
    train, validation = images.split(recipe.data.validation_images)
    bfloat16 = recipe.precision == "bfloat16"
    run = Run(name, folder, recipe.seed + seed, schedule, recipe.data, train, bfloat16)
    fit(
        trained,
        parameter_groups(trained, schedule.learning_rate),
        loss,
        lambda: {"validation_accuracy": accuracy(model, validation, recipe.data)},
        run,
        progress,
    )
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
        if not parameter.requires_grad:
            continue
        embedding = name.endswith(("cls_token", "pos_embed"))
        (plain if parameter.ndim < 2 or embedding else decayed).append(parameter)
    return [
        {"params": decayed, "lr": learning_rate},
        {"params": plain, "lr": learning_rate, "weight_decay": 0.0},
    ]
