"""A model bundle: the directory that a family is kept in, checked when it is loaded.

    model.yaml            what it is: family, labels, preprocessing, origin, licence
    weights.safetensors   every anchor and stitching layer, under the published key names
    quality.json          optional: score per stitch (`ladderstitch calibrate`)
    latency.json          optional: seconds per stitch and batch size (`ladderstitch profile`)

Nothing is unpickled. A bundle that does not fit itself is refused with the reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.modules.batchnorm import _BatchNorm

from ladderstitch.bundles import check_tensors, shapes_of
from ladderstitch.errors import BundleError
from ladderstitch.scheduling.profiles import LatencyProfile, QualityTable
from ladderstitch.vision.models.families import FamilyConfig
from ladderstitch.vision.models.stitched import StitchedModel

"""The bundle inside the package: what `serve` loads unless told otherwise."""

Table = TypeVar("Table", QualityTable, LatencyProfile)


class Preprocessing(BaseModel):
    """How a picture becomes a model input: resize, scale to [0, 1], normalise per channel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    channels: Literal[1, 3]
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Literal["bilinear", "bicubic"] = "bilinear"
    crop: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the shorter side that a centred square takes; "
        "unset: the whole picture, stretched",
    )

    @model_validator(mode="after")
    def _one_value_a_channel(self) -> Preprocessing:
        for field in ("mean", "std"):
            if len(getattr(self, field)) != self.channels:
                raise ValueError(f"{field}: expected {self.channels} values, one a channel")
        if min(self.std) <= 0:
            raise ValueError(f"std: expected positive values, got {self.std}")
        return self


class Manifest(BaseModel):
    """`model.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    version: str = Field("1", pattern=r"^[0-9]{1,9}$")
    family: Literal["snnet", "snnet-staged", "snnetv2"] = "snnet"
    config: FamilyConfig
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    origin: str = Field(description="where the weights come from, for people")
    licence: str
    default_budget_us: int | None = Field(None, gt=0, description="for requests that name none")

    @model_validator(mode="before")
    @classmethod
    def _family_is_the_configs(cls, fields: Any) -> Any:
        """One word says what the configuration is of; older files have it outside only."""
        if isinstance(fields, dict) and isinstance(config := fields.get("config"), dict):
            family = fields.get("family", config.get("family", "snnet"))
            return fields | {"family": family, "config": {"family": family} | config}
        return fields

    @model_validator(mode="after")
    def _labels_and_pixels_fit_the_model(self) -> Manifest:
        if self.config.family != self.family:
            raise ValueError(f"family: expected {self.config.family}, got {self.family}")
        inputs = self.config.inputs
        if len(self.labels) != inputs.num_classes:
            raise ValueError(f"labels: expected {inputs.num_classes}, got {len(self.labels)}")
        got = (self.preprocessing.channels, self.preprocessing.height, self.preprocessing.width)
        expected = (inputs.in_channels, inputs.image_size, inputs.image_size)
        if got != expected:
            raise ValueError(f"preprocessing: expected shape {expected} from the model, got {got}")
        return self


@dataclass(frozen=True, slots=True)
class Bundle:
    """A loaded `model.yaml` and its measurements; weights are read by `load_model`."""

    path: Path
    manifest: Manifest
    quality: QualityTable | None
    latency: LatencyProfile | None

    @classmethod
    def load(cls, path: Path) -> Bundle:
        """Raises `BundleError` naming the file, the field, what was expected and what came."""
        try:
            raw = yaml.safe_load((path / "model.yaml").read_text())
            manifest = Manifest.model_validate(raw)
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise BundleError(f"{path / 'model.yaml'}: {error}") from error
        quality = _read_table(path / "quality.json", QualityTable)
        latency = _read_table(path / "latency.json", LatencyProfile)
        known = {stitch.id for stitch in manifest.config.stitches()}
        for name, table in (("quality", quality), ("latency", latency)):
            if table is not None and (unknown := table.variants.keys() - known):
                raise BundleError(f"{path / name}.json: unknown variants {sorted(unknown)}")
        return cls(path, manifest, quality, latency)

    def load_model(self, dtype: torch.dtype = torch.float32) -> StitchedModel:
        """The model in `dtype` on the CPU, in eval mode, without gradients; batch normalisation is
        folded into the layers before it.
        """
        weights = self.path / "weights.safetensors"
        try:
            tensors = load_file(weights)
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{weights}: {error}") from error
        with torch.device("meta"):
            model = self.manifest.config.build()
        check_tensors(shapes_of(model.state_dict()), shapes_of(tensors), where=str(weights))
        tensors = {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}
        model.load_state_dict(tensors, assign=True)
        model.eval().requires_grad_(False).fold_batch_norm()
        return model.to(dtype)

    @property
    def weight_bytes(self) -> int:
        return (self.path / "weights.safetensors").stat().st_size


def write_bundle(path: Path, manifest: Manifest, model: StitchedModel) -> None:
    """Write `model.yaml` and half-precision weights; measurements of older weights are removed.

    Batch normalisation stays as it is: variances may leave the range of half precision.
    """
    path.mkdir(parents=True, exist_ok=True)
    kept = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for key in module.state_dict()
    }
    tensors = {
        name: (tensor if name in kept else tensor.half()).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, path / "weights.safetensors")
    fields = manifest.model_dump(mode="json", exclude_none=True)
    (path / "model.yaml").write_text(yaml.safe_dump(fields, sort_keys=False, width=100))
    for stale in ("quality.json", "latency.json"):
        (path / stale).unlink(missing_ok=True)


def write_table(path: Path, table: QualityTable | LatencyProfile) -> None:
    """Write `quality.json` or `latency.json` so that a diff shows one stitch a line."""
    fields = table.model_dump(mode="json")
    variants = fields.pop("variants")
    head = json.dumps(fields, indent=1)[:-2]
    rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in variants.items())
    path.write_text(f'{head},\n "variants": {{\n{rows}\n }}\n}}\n')


def _read_table(path: Path, kind: type[Table]) -> Table | None:
    if not path.exists():
        return None
    try:
        return kind.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise BundleError(f"{path}: {error}") from error
