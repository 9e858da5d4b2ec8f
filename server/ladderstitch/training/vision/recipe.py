"""The recipe of an image family, a YAML file: shape, data and training schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ladderstitch.errors import ConfigError
from ladderstitch.vision.models.families import FamilyConfig
from ladderstitch.vision.models.vit import VitConfig


class Schedule(BaseModel):
    """Schedule of one training run: AdamW, linear warm-up, cosine to 1 % of the peak rate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(gt=0)
    batch_size: int = Field(128, gt=0)
    learning_rate: float = Field(gt=0)
    anchor_learning_rate_factor: float = Field(
        1.0, gt=0, description="stitching only: anchors' learning rate over layers'"
    )
    seed_offset: int | None = Field(
        None, ge=0, description="anchors only: added to the recipe's seed; unset: the position"
    )
    warmup_epochs: float = Field(1.0, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    distillation: float = Field(
        0.5, ge=0, le=1, description="stitching only: weight of the largest anchor's predictions"
    )


class Stitching(Schedule):
    """Schedule of the joint fine-tuning of a family's networks."""

    sampling: Literal["uniform", "by_cost", "per_pair"] = Field(
        "uniform",
        description="what a step trains: one network, uniform over all or over groups of similar "
        "cost and then within one (SN-Netv2); or one network of every pair of stitched anchors, "
        "so that small networks, which cost little, are trained as often as if they were alone",
    )
    cost_step_macs: float = Field(
        1e9, gt=0, description="by_cost: multiply-accumulates that a group spans"
    )
    frozen_batch_norm: bool = Field(
        False,
        description="keep the running statistics of the anchors, as in serving; a block gets other "
        "features in each network, and their mixture fits none of them",
    )
    low_rank: int | None = Field(
        None,
        gt=0,
        description="rank of the trained updates to the stitching layers' matrices, which are "
        "themselves kept (SN-Netv2); unset: the matrices are trained",
    )


class Pool(BaseModel):
    """Configuration of a Learngene Pool (arXiv 2312.05743): distillation from a larger model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: VitConfig
    schedule: Schedule = Field(description="schedule of the teacher")
    logits: float = Field(1.0, ge=0, description="weight of the teacher's predictions")
    blocks: float = Field(1.0, ge=0, description="weight of the mapped block outputs")
    attentions: float = Field(1.0, ge=0, description="weight of the mapped attention outputs")


class Augmentation(BaseModel):
    """Sizes of the random shifts and of the erased squares, in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shift_pixels: int = Field(2, ge=0)
    erase_pixels: int = Field(8, ge=0)


class DataSet(BaseModel):
    """The training data, and its preprocessing: (pixel / 255 - mean) / std per channel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    licence: str
    labels: tuple[str, ...] = Field(min_length=2)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation_images: int = Field(
        2000, ge=0, description="images at the end that are validated, not trained on"
    )
    augmentation: Augmentation = Augmentation()


class Recipe(BaseModel):
    """The content of a recipe file; see `examples/fashion-mnist/recipe.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    seed: int = 0
    threads: int = Field(
        2, gt=0, description="torch threads; results depend on it like on the seed"
    )
    precision: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="number format of training; convolutions on small maps need float32, because "
        "their bfloat16 gradients overflow",
    )
    data: DataSet
    family: FamilyConfig
    anchors: tuple[Schedule, ...]
    pool: Pool | None = Field(None, description="distillation of the anchors; unset: none")
    stitching: Stitching
    init_images: int = Field(
        100, gt=0, description="images for the initialisation by least squares"
    )

    @model_validator(mode="after")
    def _check_pool(self) -> Recipe:
        """Raise `ValueError` unless the anchors are ViTs whose depths divide the teacher's."""
        if self.pool is None:
            return self
        for anchor in self.family.anchors:
            if not isinstance(anchor, VitConfig) or self.pool.teacher.depth % anchor.depth:
                raise ValueError(
                    "pool: expected vision transformers whose depths divide the teacher's "
                    f"{self.pool.teacher.depth}"
                )
        return self

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Return the recipe in a YAML file.

        Raises `ConfigError` that names the field, the expected and the actual value.
        """
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()))
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise ConfigError(f"{path}: {error}") from error
