"""Make a stitchable family of trained anchors: least squares, then joint fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from ladderstitch.errors import ConfigError
from ladderstitch.training.vision.anchors import load_anchor, parameter_groups
from ladderstitch.training.vision.dataset import normalise
from ladderstitch.training.vision.image_files import load_sample
from ladderstitch.training.vision.learngene import load_maps_into
from ladderstitch.training.vision.loop import (
    Loss,
    TrainingRun,
    accuracy,
    draw_stitch,
    fit,
    groups_by_pair,
    read_cpu_seconds,
    sampling_groups,
)
from ladderstitch.training.vision.recipe import Recipe
from ladderstitch.training.vision.stitching_layers import (
    add_low_rank,
    fold_low_rank,
    initialise_stitching_layers,
)
from ladderstitch.training.vision.training_data import RunRecord, TrainingData
from ladderstitch.vision.bundle import VisionManifest, write_bundle
from ladderstitch.vision.models.families import FamilyConfig
from ladderstitch.vision.models.snnet_staged import StagedConfig
from ladderstitch.vision.models.stitched import Backbone, StitchedModel


def family_file(folder: Path) -> Path:
    """Return the file of the fine-tuned family."""
    return folder / "family.safetensors"


def assemble(recipe: Recipe, pixels: Tensor, folder: Path) -> StitchedModel:
    """Return the family of the run's trained anchors, with initial stitching layers.

    The layers come from least squares on images, uint8 [N, C, H, W], or from the maps to the
    teacher of a Learngene Pool. No labels are necessary.
    """
    rng = torch.Generator().manual_seed(recipe.seed)
    chosen = torch.randperm(len(pixels), generator=rng)[: recipe.init_images]
    inputs = recipe.preprocessing
    sample = normalise(pixels[chosen], inputs.mean, inputs.std)
    anchors = [
        load_anchor(recipe, folder, index).state_dict()
        for index in range(len(recipe.family.anchors))
    ]
    model = assemble_family(recipe.family, anchors, sample)
    if recipe.pool is not None:
        load_maps_into(model, recipe.pool, folder)
    return model.requires_grad_(True)


def stitch_unlabelled(recipe: Recipe, folder: Path, images: Path) -> StitchedModel:
    """Return the family with stitching layers fitted to images without labels, not trained further.

    `recipe` is completed by the record of the run. Raises `ConfigError` if neither has the labels,
    the mean and the standard deviation.
    """
    recipe = complete_recipe(recipe, folder)
    torch.set_num_threads(recipe.threads)
    pixels = load_sample(images, recipe.init_images, recipe.preprocessing, recipe.seed)
    return assemble(recipe, pixels, folder).eval().requires_grad_(False)


def complete_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with the labels, size, mean and deviation that a run has recorded.

    Raises `ConfigError` if they are not known.
    """
    record = RunRecord.load(folder)
    completed = recipe if record is None else record.complete(recipe)
    if None in (completed.data.labels, completed.data.mean, completed.data.std):
        raise ConfigError(
            f"run: expected {folder}/data.json of `ladderstitch train`, got none; the recipe has "
            "no labels, mean or std"
        )
    return completed


def stitch_family(data: TrainingData[Recipe], folder: Path, progress: Progress) -> StitchedModel:
    """Return the family after joint fine-tuning of all stitches (SN-Net, section 3.4).

    Each step trains one random stitch. If the family's file exists, it is loaded instead. Raises
    `ConfigError` if the run was begun with other images.
    """
    recipe, validation = data.recipe, data.validation
    data.enter(folder)
    torch.set_num_threads(recipe.threads)
    if family_file(folder).exists():
        model = recipe.family.build()
        model.load_state_dict(load_file(family_file(folder)))
        return model.eval()
    model = assemble(recipe, data.train.pixels, folder)
    teacher = load_anchor(recipe, folder, len(recipe.family.anchors) - 1)
    schedule = recipe.stitching
    usable = [stitch.id for stitch in model.stitches if stitch.usable]
    loss = _stitching_loss(recipe, model, teacher)
    if schedule.low_rank is not None:
        add_low_rank(model, schedule.low_rank)
    logged = [s.id for s in model.stitches if s.is_anchor]
    logged += [usable[len(usable) // 4], usable[3 * len(usable) // 4]]
    inputs = recipe.preprocessing

    def validate() -> dict[str, float]:
        return {
            f"validation_accuracy_{stitch}": accuracy(
                partial(model, stitch=stitch), validation, inputs
            )
            for stitch in logged
            if len(validation)
        }

    bfloat16 = recipe.precision == "bfloat16"
    seed = recipe.seed + len(usable)
    run = TrainingRun(
        "family",
        folder,
        seed,
        schedule,
        inputs,
        recipe.data.augmentation,
        data.train,
        bfloat16,
        frozen_batch_norm=schedule.frozen_batch_norm,
    )
    anchor_rate = schedule.learning_rate * schedule.anchor_learning_rate_factor
    groups = parameter_groups(model.anchors, anchor_rate)
    groups += parameter_groups(model.stitch_layers, schedule.learning_rate)
    fit(model, groups, loss, validate, run, progress)
    fold_low_rank(model)
    save_file(model.state_dict(), family_file(folder))
    run.checkpoint.unlink()
    return model.eval()


def _stitching_loss(recipe: Recipe, model: StitchedModel, teacher: Backbone) -> Loss:
    """Return the loss of random stitches, on the labels and on the teacher's predictions.

    The teacher is the largest anchor as it was before fine-tuning.
    """
    schedule = recipe.stitching
    if schedule.sampling == "per_pair":
        choices = [[group] for group in groups_by_pair(model)]
    else:
        span = schedule.cost_step_macs if schedule.sampling == "by_cost" else None
        choices = [sampling_groups(model, recipe.family.inputs.image_size, span)]

    def loss(batch: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
        with torch.no_grad():
            soft_targets = teacher(batch).float().softmax(1)
        losses = []
        for choice in choices:
            logits = model(batch, draw_stitch(choice, rng)).float()
            by_labels = F.cross_entropy(logits, labels, label_smoothing=schedule.label_smoothing)
            by_teacher = F.cross_entropy(logits, soft_targets)
            losses.append(torch.lerp(by_labels, by_teacher, schedule.distillation))
        return torch.stack(losses).mean()

    return loss


def export_family(recipe: Recipe, model: StitchedModel, run: Path, bundle: Path) -> None:
    """Write the family of a run as a bundle, with the norms of convolutional ViT stems folded."""
    config = recipe.family
    if not isinstance(config, StagedConfig):
        model.fold_batch_norm()
        anchors = [a.model_copy(update={"stem_batch_norm": False}) for a in config.anchors]
        config = config.model_copy(update={"anchors": tuple(anchors)})
    manifest = VisionManifest(
        name=recipe.name,
        family=config.family,
        config=config,
        labels=recipe.labels,
        preprocessing=recipe.preprocessing,
        origin=f"trained from scratch on {recipe.data.name} by `ladderstitch train` and `stitch`",
        licence=f"weights Apache-2.0; data {recipe.data.licence}",
        training_cpu_s=read_cpu_seconds(run),
    )
    write_bundle(bundle, manifest, model)


def assemble_family(
    config: FamilyConfig, anchors: Sequence[Mapping[str, Tensor]], images: Tensor
) -> StitchedModel:
    """Return the family in eval mode, with stitching layers from least squares.

    `anchors` are state dicts, `images` are preprocessed [B, C, H, W]. Labels are not necessary:
    each stitching layer is fitted to the features of the anchors themselves.
    """
    model: StitchedModel = config.build()
    for backbone, weights in zip(model.backbones(), anchors, strict=True):
        backbone.load_state_dict(dict(weights))
    model.eval().requires_grad_(False)
    with torch.inference_mode():
        initialise_stitching_layers(model, images)
    return model
