"""The recipe of an image family, a YAML file: shape, data and training schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ladderstitch.errors import ConfigError
from ladderstitch.vision.bundle import Preprocessing
from ladderstitch.vision.models.families import FamilyConfig
from ladderstitch.vision.models.nested.model import NestedConfig
from ladderstitch.vision.models.nested.sampling import sampled_config
from ladderstitch.vision.models.vit import VitConfig

OWN_PICTURES = Path(__file__).with_name("pictures.yaml")
"""The recipe for pictures of one's own, used if none is given."""


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
    labels: tuple[str, ...] | None = Field(
        None, min_length=2, description="unset: the names of the classes of the pictures"
    )
    mean: tuple[float, ...] | None = Field(None, description="unset: that of the training images")
    std: tuple[float, ...] | None = Field(None, description="unset: that of the training images")
    resize: Literal["bilinear", "bicubic"] = "bilinear"
    crop: float | None = Field(
        None,
        gt=0,
        le=1,
        description="side of the centred square of a picture that is kept, as a share of the "
        "shorter side; unset: the whole picture is stretched",
    )
    validation_images: int | None = Field(
        None,
        ge=0,
        description="images that are validated, not trained on; unset: a fifth, at most 2000",
    )
    validation_split: Literal["shuffled", "last"] = Field(
        "shuffled",
        description="shuffled: random images of every class, by the recipe's seed; last: those at "
        "the end, which need classes in random order (IDX files only)",
    )
    augmentation: Augmentation = Augmentation()


class AnyRecipe(BaseModel):
    """What the recipes of stitched and of nested families have in common."""

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
    family: FamilyConfig | NestedConfig

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        """Raise `ValueError` unless labels and channels agree with the family's inputs."""
        inputs, data = self.family.inputs, self.data
        if data.labels is not None and len(data.labels) != inputs.num_classes:
            raise ValueError(
                f"data.labels: expected {inputs.num_classes} from family.inputs.num_classes, got "
                f"{len(data.labels)}"
            )
        for field in ("mean", "std"):
            values = getattr(data, field)
            if values is not None and len(values) != inputs.in_channels:
                raise ValueError(
                    f"data.{field}: expected {inputs.in_channels} values, one per channel, got "
                    f"{len(values)}"
                )
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels; raises `ConfigError` if neither the recipe nor the data has named them."""
        if self.data.labels is None:
            raise ConfigError("data.labels: expected the names of the classes, got none")
        return self.data.labels

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of the bundle.

        A mean and a standard deviation that are not known yet are 0 and 1. Raises `ConfigError` for
        inputs that a server does not have.
        """
        inputs, data = self.family.inputs, self.data
        fields = {
            "channels": inputs.in_channels,
            "height": inputs.image_size,
            "width": inputs.image_size,
            "mean": data.mean or (0.0,) * inputs.in_channels,
            "std": data.std or (1.0,) * inputs.in_channels,
            "resize": data.resize,
            "crop": data.crop,
        }
        try:
            return Preprocessing.model_validate(fields)
        except ValidationError as error:
            raise ConfigError(f"recipe: {error}") from error

    def completed(
        self, *, image_size: int | None = None, num_classes: int | None = None, **data: Any
    ) -> Self:
        """Return the recipe with other inputs and fields of the data, checked again.

        Raises `ConfigError` for values that do not fit.
        """
        inputs = self.family.inputs.model_dump()
        inputs |= {"image_size": image_size} if image_size is not None else {}
        inputs |= {"num_classes": num_classes} if num_classes is not None else {}
        fields = self.model_dump()
        fields["family"] |= {"inputs": inputs}
        fields["data"] |= data
        try:
            return type(self).model_validate(fields)
        except ValidationError as error:
            raise ConfigError(f"recipe: {error}") from error

    def renamed(self, name: str, seed: int) -> Self:
        """Return the recipe with another name and seed; raises `ConfigError` for a wrong name."""
        try:
            return type(self).model_validate(self.model_dump() | {"name": name, "seed": seed})
        except ValidationError as error:
            raise ConfigError(f"name: expected lower-case letters and digits: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the recipe in a YAML file.

        Raises `ConfigError` that names the field, the expected and the actual value.
        """
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()))
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise ConfigError(f"{path}: {error}") from error


class Recipe(AnyRecipe):
    """The content of a recipe file; see `examples/fashion-mnist/recipe.yaml`."""

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


class NestedTraining(Schedule):
    """Schedule of a supernet: the sandwich rule with in-place distillation.

    Each step trains the largest path on the labels, and the smallest and `random_paths` others on
    the predictions of the largest one in the same step.
    """

    random_paths: int = Field(2, ge=0, description="random listed paths in each step")


class NestedRecipe(AnyRecipe):
    """The content of a recipe file of a supernet; see `examples/nested/recipe.yaml`."""

    family: NestedConfig
    paths: int = Field(40, ge=2, description="paths that are listed, if `family.net` lists none")
    training: NestedTraining

    @model_validator(mode="before")
    @classmethod
    def _sample_paths(cls, fields: Any) -> Any:
        """Return the fields with sampled paths if the supernet has none."""
        match fields:
            case {"family": {"net": {"paths": _}}}:
                return fields
            case {"family": {"net": {"kind": _}, "inputs": _}}:
                count, seed = fields.get("paths", 40), fields.get("seed", 0)
                if isinstance(count, int) and count >= 2:
                    return {**fields, "family": sampled_config(fields["family"], count, seed)}
        return fields
