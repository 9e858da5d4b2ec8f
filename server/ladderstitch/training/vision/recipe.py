"""The committed file that a family is made from: its shape, its data, how long it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ladderstitch.errors import ConfigError
from ladderstitch.vision.models.families import FamilyConfig
from ladderstitch.vision.models.vit import VitConfig


class Schedule(BaseModel):
    """One optimisation run: AdamW, linear warm-up, then a cosine to 1 % of the peak rate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(gt=0)
    batch_size: int = Field(128, gt=0)
    learning_rate: float = Field(gt=0)
    anchor_learning_rate_factor: float = Field(
        1.0, gt=0, description="stitching only: the anchors' rate over the stitching layers'"
    )
    warmup_epochs: float = Field(1.0, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    distillation: float = Field(
        0.5, ge=0, le=1, description="stitching only: weight of the largest anchor's soft answers"
    )


class Stitching(Schedule):
    """How a family's networks are tuned together."""

    sampling: Literal["uniform", "by_cost"] = Field(
        "uniform",
        description="which network a step trains: any, or any of a group of like cost (SN-Netv2)",
    )
    cost_step_macs: float = Field(
        1e9, gt=0, description="by_cost: a group spans so many multiply-accumulates"
    )
    low_rank: int | None = Field(
        None,
        gt=0,
        description="keep stitching layers' least-squares matrices and train their biases and "
        "updates of this rank (SN-Netv2)",
    )


class Pool(BaseModel):
    """A Learngene Pool (arXiv 2312.05743): anchors learn from one larger model, block by block."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: VitConfig
    schedule: Schedule = Field(description="how the teacher is trained")
    logits: float = Field(1.0, ge=0, description="weight of the teacher's soft answers")
    blocks: float = Field(1.0, ge=0, description="weight of block outputs, linearly mapped")
    attentions: float = Field(1.0, ge=0, description="weight of attention outputs, likewise")


class Augmentation(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    shift_pixels: int = Field(2, ge=0)
    erase_pixels: int = Field(8, ge=0)


class DataSet(BaseModel):
    """Which images, and how pixels become model inputs: (pixel / 255 - mean) / std."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    licence: str
    labels: tuple[str, ...] = Field(min_length=2)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation_images: int = Field(2000, ge=0, description="held out of training, for the log")
    augmentation: Augmentation = Augmentation()


class Recipe(BaseModel):
    """A YAML file; see `examples/fashion-mnist/recipe.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    seed: int = 0
    threads: int = Field(2, gt=0, description="torch threads; part of what a seed determines")
    precision: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="of training; float32 for convolutions on small maps, whose gradients overflow",
    )
    data: DataSet
    family: FamilyConfig
    anchors: tuple[Schedule, ...]
    pool: Pool | None = Field(None, description="distil the anchors from a larger model")
    stitching: Stitching
    init_images: int = Field(100, gt=0, description="images for the least-squares start")

    @model_validator(mode="after")
    def _pool_fits_the_anchors(self) -> Recipe:
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
        """Raises `ConfigError` that names the field, what was expected and what came."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()))
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise ConfigError(f"{path}: {error}") from error
