"""Train a supernet: the sandwich rule with in-place distillation (BigNAS, arXiv 2003.11142)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from ladderstitch.training.vision.anchors import parameter_groups
from ladderstitch.training.vision.dataset import normalise
from ladderstitch.training.vision.loop import Loss, TrainingRun, accuracy, fit, read_cpu_seconds
from ladderstitch.training.vision.recalibrate import BATCH, IMAGES
from ladderstitch.training.vision.recipe import NestedRecipe
from ladderstitch.training.vision.training_data import TrainingData
from ladderstitch.vision.bundle import VisionBundle, VisionManifest, write_bundle
from ladderstitch.vision.models.nested.cost import path_costs
from ladderstitch.vision.models.nested.model import NestedConfig, NestedModel
from ladderstitch.vision.models.nested.statistics import write_statistics


def train_nested(data: TrainingData[NestedRecipe], folder: Path, progress: Progress) -> NestedModel:
    """Return the trained supernet, every path with its own statistics of batch normalisation.

    If the supernet's file exists, it is loaded instead. Raises `ConfigError` if the run was begun
    with other images.
    """
    recipe = data.recipe
    data.enter(folder)
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    model = recipe.family.build()
    file = folder / "supernet.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file))
    else:
        _fit(model, data, folder, progress)
        save_file(model.state_dict(), file)
    model.eval().requires_grad_(False)
    images = sample_images(data)
    for stitch in progress.track(model.stitches, description="recalibrate"):
        model.recalibrate(stitch.id, torch.split(images, BATCH))
    return model


def sample_images(data: TrainingData[NestedRecipe]) -> Tensor:
    """Return preprocessed training images [N, C, H, W] for statistics of batch normalisation."""
    inputs, pixels = data.recipe.preprocessing, data.train.pixels
    rng = torch.Generator().manual_seed(data.recipe.seed)
    chosen = torch.randperm(len(pixels), generator=rng)[:IMAGES]
    return normalise(pixels[chosen], inputs.mean, inputs.std)


def _fit(
    model: NestedModel, data: TrainingData[NestedRecipe], folder: Path, progress: Progress
) -> None:
    """Train a supernet in place; a run that was interrupted goes on."""
    recipe, validation = data.recipe, data.validation
    inputs, schedule = recipe.preprocessing, recipe.training
    order = paths_by_cost(recipe.family)
    logged = {"smallest": order[0], "middle": order[len(order) // 2], "largest": order[-1]}
    images = sample_images(data)

    def validate() -> dict[str, float]:
        found = {}
        for name, path in logged.items():
            model.recalibrate(path, torch.split(images, BATCH))
            if len(validation):
                found[f"validation_accuracy_{name}"] = accuracy(
                    partial(model, stitch=path), validation, inputs
                )
        return found

    run = TrainingRun(
        "supernet",
        folder,
        recipe.seed,
        schedule,
        inputs,
        recipe.data.augmentation,
        data.train,
        recipe.precision == "bfloat16",
    )
    groups = parameter_groups(model, schedule.learning_rate)
    fit(model, groups, sandwich_loss(recipe, model, order), validate, run, progress)
    run.checkpoint.unlink()


def paths_by_cost(config: NestedConfig) -> list[int]:
    """Return the ids of the paths, from the fewest to the most multiply-accumulates."""
    costs = path_costs(config)
    return sorted(costs, key=lambda path: (costs[path].macs, path))


def sandwich_loss(recipe: NestedRecipe, model: NestedModel, order: list[int]) -> Loss:
    """Return the loss of the largest path on the labels and of others on its predictions.

    `order` has the paths from the smallest to the largest. Random ones are among those between.
    """
    schedule, between = recipe.training, order[1:-1] or order

    def loss(batch: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
        logits = model(batch, order[-1]).float()
        losses = [F.cross_entropy(logits, labels, label_smoothing=schedule.label_smoothing)]
        targets = logits.detach().softmax(1)
        drawn = torch.randint(len(between), (schedule.random_paths,), generator=rng)
        for path in (order[0], *(between[i] for i in drawn.tolist())):
            student = model(batch, path).float()
            by_labels = F.cross_entropy(student, labels, label_smoothing=schedule.label_smoothing)
            by_teacher = F.cross_entropy(student, targets)
            losses.append(torch.lerp(by_labels, by_teacher, schedule.distillation))
        return torch.stack(losses).mean()

    return loss


def export_nested(recipe: NestedRecipe, model: NestedModel, run: Path, bundle: Path) -> None:
    """Write the supernet of a run and the statistics of its paths as a bundle."""
    manifest = VisionManifest(
        name=recipe.name,
        family="nested",
        config=recipe.family,
        labels=recipe.labels,
        preprocessing=recipe.preprocessing,
        origin=f"trained from scratch on {recipe.data.name} by `ladderstitch train --nested`",
        licence=f"weights Apache-2.0; data {recipe.data.licence}",
        training_cpu_s=read_cpu_seconds(run),
    )
    write_bundle(bundle, manifest, model)
    if model.norm_names:
        write_statistics(VisionBundle.load(bundle).statistics_path, model)
