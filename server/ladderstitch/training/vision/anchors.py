"""Train a family's anchors from scratch, one after another, largest first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ladderstitch.errors import ConfigError, DataError
from ladderstitch.training.vision.learngene import (
    FeatureRecorder,
    TeacherMaps,
    distillation_loss,
    save_maps,
)
from ladderstitch.training.vision.loop import Loss, TrainingRun, accuracy, fit
from ladderstitch.training.vision.recipe import Pool, Recipe, Schedule
from ladderstitch.training.vision.training_data import TrainingData
from ladderstitch.vision.models.snnet_staged import Hierarchical
from ladderstitch.vision.models.stitched import Backbone
from ladderstitch.vision.models.vit import Vit, VitConfig

AnyAnchor = VitConfig | Hierarchical


def anchor_file(folder: Path, anchor: int) -> Path:
    """Return the file of a trained anchor."""
    return folder / f"anchor-{anchor}.safetensors"


def load_anchor(recipe: Recipe, folder: Path, anchor: int) -> Backbone:
    """Return a trained anchor in eval mode.

    Raises `DataError` if `ladderstitch train` has not finished it.
    """
    path = anchor_file(folder, anchor)
    if not path.exists():
        raise DataError(
            f"{path}: expected a trained anchor, got none; run `ladderstitch train` first"
        )
    model = recipe.family.anchors[anchor].build(recipe.family.inputs)
    model.load_state_dict(load_file(path))
    return model.eval()


def train_anchors(data: TrainingData[Recipe], folder: Path, progress: Progress) -> None:
    """Train each anchor and write its `anchor-{a}.safetensors` (float32, upstream's names).

    Anchors whose file exists are skipped. Raises `ConfigError` unless the recipe has a schedule for
    every anchor, or if the run was begun with other images.
    """
    recipe = data.recipe
    if len(recipe.anchors) != len(recipe.family.anchors):
        raise ConfigError(
            f"anchors: expected {len(recipe.family.anchors)} schedules, one per anchor, "
            f"got {len(recipe.anchors)}"
        )
    data.enter(folder)
    torch.set_num_threads(recipe.threads)
    trainer = Trainer(data, folder, progress)
    teacher = None if recipe.pool is None else trainer.train_teacher(recipe.pool)
    for anchor in reversed(range(len(recipe.anchors))):
        if not anchor_file(folder, anchor).exists():
            trainer.train_anchor(anchor, teacher)


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """The training of one network: stem of its files, offset to the recipe's seed, schedule."""

    name: str
    seed: int
    schedule: Schedule


@dataclass(frozen=True, slots=True)
class Trainer:
    """The trainer of all networks of a family, with the data and the recipe that they share."""

    data: TrainingData[Recipe]
    folder: Path
    progress: Progress

    @property
    def recipe(self) -> Recipe:
        """The recipe, with what the data state."""
        return self.data.recipe

    def train_anchor(self, anchor: int, teacher: Vit | None) -> None:
        """Train one anchor, with distillation if there is a teacher, and write its file."""
        recipe = self.recipe
        schedule = recipe.anchors[anchor]
        offset = anchor if schedule.seed_offset is None else schedule.seed_offset
        job = TrainingJob(f"anchor-{anchor}", offset, schedule)
        model = self._create(recipe.family.anchors[anchor], job)
        if recipe.pool is None or teacher is None:
            self._fit_labels(model, job)
        else:
            assert isinstance(model, Vit)
            maps = TeacherMaps(model, teacher)
            smoothing = job.schedule.label_smoothing
            loss = distillation_loss(
                FeatureRecorder(model), FeatureRecorder(teacher), maps, recipe.pool, smoothing
            )
            self._fit(model, nn.ModuleList((model, maps)), loss, job)
            save_maps(maps, self.folder, anchor)
        save_file(model.state_dict(), anchor_file(self.folder, anchor))

    def train_teacher(self, pool: Pool) -> Vit:
        """Return the pool's teacher, trained if its file does not exist, without gradients."""
        job = TrainingJob("teacher", len(self.recipe.anchors), pool.schedule)
        model = self._create(pool.teacher, job)
        assert isinstance(model, Vit)
        file = self.folder / "teacher.safetensors"
        if not file.exists():
            self._fit_labels(model, job)
            save_file(model.state_dict(), file)
        model.load_state_dict(load_file(file))
        return model.eval().requires_grad_(False)

    def _create(self, config: AnyAnchor, job: TrainingJob) -> Backbone:
        """Return an anchor with seeded initial weights."""
        torch.manual_seed(self.recipe.seed + job.seed)
        model = config.build(self.recipe.family.inputs)
        if isinstance(model, Vit):
            init_vit(model)
        return model

    def _fit_labels(self, model: Backbone, job: TrainingJob) -> None:
        """Train a network on the labels only."""
        smoothing = job.schedule.label_smoothing

        def loss(batch: Tensor, labels: Tensor, _rng: torch.Generator) -> Tensor:
            return F.cross_entropy(model(batch), labels, label_smoothing=smoothing)

        self._fit(model, model, loss, job)

    def _fit(self, model: Backbone, trained: nn.Module, loss: Loss, job: TrainingJob) -> None:
        """Train `trained`, which is `model` or contains it, and validate `model`."""
        recipe, schedule = self.recipe, job.schedule
        validation, inputs = self.data.validation, recipe.preprocessing
        run = TrainingRun(
            job.name,
            self.folder,
            recipe.seed + job.seed,
            schedule,
            inputs,
            recipe.data.augmentation,
            self.data.train,
            recipe.precision == "bfloat16",
        )

        def validate() -> dict[str, float]:
            if not len(validation):
                return {}
            return {"validation_accuracy": accuracy(model, validation, inputs)}

        groups = parameter_groups(trained, schedule.learning_rate)
        fit(trained, groups, loss, validate, run, self.progress)
        run.checkpoint.unlink()


def init_vit(model: Vit) -> None:
    """Initialise like DeiT: truncated normal (0.02) for matrices and embeddings, zero biases."""
    nn.init.trunc_normal_(model.cls_token, std=0.02)
    nn.init.trunc_normal_(model.pos_embed, std=0.02)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def parameter_groups(module: nn.Module, learning_rate: float) -> list[dict[str, object]]:
    """Return optimizer groups: weight decay for matrices, none for vectors and embeddings.

    Vectors are biases and the weights of norms.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        embedding = name.endswith(("cls_token", "pos_embed"))
        (undecayed if parameter.ndim < 2 or embedding else decayed).append(parameter)
    return [
        {"params": decayed, "lr": learning_rate},
        {"params": undecayed, "lr": learning_rate, "weight_decay": 0.0},
    ]
