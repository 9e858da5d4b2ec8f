"""Train a family's anchors from scratch, largest first, each on its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ladderstitch.errors import ConfigError, DataError
from ladderstitch.training.vision.dataset import LabelledImages
from ladderstitch.training.vision.learngene import (
    FeatureRecorder,
    Maps,
    distillation_loss,
    save_maps,
)
from ladderstitch.training.vision.loop import Loss, TrainingRun, accuracy, fit
from ladderstitch.training.vision.recipe import Pool, Recipe, Schedule
from ladderstitch.vision.models.snnet_staged import Hierarchical
from ladderstitch.vision.models.stitched import Backbone
from ladderstitch.vision.models.vit import Vit, VitConfig

AnyAnchor = VitConfig | Hierarchical


def anchor_file(folder: Path, anchor: int) -> Path:
    return folder / f"anchor-{anchor}.safetensors"


def load_anchor(recipe: Recipe, folder: Path, anchor: int) -> Backbone:
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
    trainer = Trainer(recipe, images, folder, progress)
    teacher = None if recipe.pool is None else trainer.teacher(recipe.pool)
    for anchor in reversed(range(len(recipe.anchors))):
        if not anchor_file(folder, anchor).exists():
            trainer.train(anchor, teacher)


@dataclass(frozen=True, slots=True)
class Lesson:
    """One network's training: what its files are called, what is added to the recipe's seed."""

    name: str
    seed: int
    schedule: Schedule


@dataclass(frozen=True, slots=True)
class Trainer:
    """What the training of all of a family's networks shares."""

    recipe: Recipe
    images: LabelledImages
    folder: Path
    progress: Progress

    def train(self, anchor: int, teacher: Vit | None) -> None:
        """Write one anchor, which learns from the teacher if there is one."""
        recipe = self.recipe
        lesson = Lesson(f"anchor-{anchor}", anchor, recipe.anchors[anchor])
        model = self._fresh(recipe.family.anchors[anchor], lesson)
        if recipe.pool is None or teacher is None:
            self._fit_alone(model, lesson)
        else:
            assert isinstance(model, Vit)
            maps = Maps(model, teacher)
            smoothing = lesson.schedule.label_smoothing
            loss = distillation_loss(
                FeatureRecorder(model), FeatureRecorder(teacher), maps, recipe.pool, smoothing
            )
            self._fit(model, nn.ModuleList((model, maps)), loss, lesson)
            save_maps(maps, self.folder, anchor)
        save_file(model.state_dict(), anchor_file(self.folder, anchor))

    def teacher(self, pool: Pool) -> Vit:
        """The pool's larger model, trained first."""
        lesson = Lesson("teacher", len(self.recipe.anchors), pool.schedule)
        model = self._fresh(pool.teacher, lesson)
        assert isinstance(model, Vit)
        file = self.folder / "teacher.safetensors"
        if not file.exists():
            self._fit_alone(model, lesson)
            save_file(model.state_dict(), file)
        model.load_state_dict(load_file(file))
        return model.eval().requires_grad_(False)

    def _fresh(self, config: AnyAnchor, lesson: Lesson) -> Backbone:
        torch.manual_seed(self.recipe.seed + lesson.seed)
        model = config.build(self.recipe.family.inputs)
        if isinstance(model, Vit):
            init_vit(model)
        return model

    def _fit_alone(self, model: Backbone, lesson: Lesson) -> None:
        smoothing = lesson.schedule.label_smoothing

        def loss(batch: Tensor, labels: Tensor, _rng: torch.Generator) -> Tensor:
            return F.cross_entropy(model(batch), labels, label_smoothing=smoothing)

        self._fit(model, model, loss, lesson)

    def _fit(self, model: Backbone, trained: nn.Module, loss: Loss, lesson: Lesson) -> None:
        """Fit `trained`, of which `model` is the network, or all."""
        recipe, schedule = self.recipe, lesson.schedule
        train, validation = self.images.split(recipe.data.validation_images)
        bfloat16 = recipe.precision == "bfloat16"
        seed = recipe.seed + lesson.seed
        run = TrainingRun(lesson.name, self.folder, seed, schedule, recipe.data, train, bfloat16)
        fit(
            trained,
            parameter_groups(trained, schedule.learning_rate),
            loss,
            lambda: {"validation_accuracy": accuracy(model, validation, recipe.data)},
            run,
            self.progress,
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
