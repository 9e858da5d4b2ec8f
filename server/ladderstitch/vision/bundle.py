"""Read, check and write the bundle of an image family: a directory with these files.

    model.yaml            manifest: family, labels, preprocessing, origin, licence
    weights.safetensors   every anchor and stitching layer, under the published key names
    networks/NAME.onnx    instead of anchors: the networks of the family `onnx`
    statistics.safetensors   supernets, optional: batch normalisation per path (`calibrate`)
    quality.json          optional: score per stitch (`ladderstitch calibrate`)
    latency.json          optional: seconds per stitch and batch size (`ladderstitch profile`)
    int8/UNIT.onnx        optional: graphs with 8-bit weights (`ladderstitch quantize`)

Nothing is unpickled. An inconsistent bundle is rejected with an error that names the reason.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.modules.batchnorm import _BatchNorm

from ladderstitch.bundles import MAX_LISTED, check_tensors, shapes_of
from ladderstitch.bundles.files import check_safetensors, read_table, read_yaml, validate
from ladderstitch.errors import BundleError
from ladderstitch.scheduling.profiles import LatencyProfile, QualityTable
from ladderstitch.vision.models.families import AnyConfig
from ladderstitch.vision.models.nested.model import NestedModel
from ladderstitch.vision.models.nested.statistics import read_statistics
from ladderstitch.vision.models.route import Precision, Stitch
from ladderstitch.vision.models.stitched import StitchedModel
from ladderstitch.vision.networks.config import (
    OnnxConfig,
    TensorInputs,
    raise_without_modules,
)
from ladderstitch.vision.networks.export import NetworkFiles
from ladderstitch.vision.networks.outputs import OutputEntry, row_size
from ladderstitch.vision.size_limits import check_sizes

NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"
"""The pattern of a model's name."""
Table = TypeVar("Table", QualityTable, LatencyProfile)


class Preprocessing(BaseModel):
    """The steps from an image to a model input: resize, scale to [0, 1], normalise per channel."""

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
        description="side of the centred square that is kept, as a share of the shorter side; "
        "unset: the whole image is stretched to the model's size",
    )
    background: Literal["white", "black", "mean"] = Field(
        "white", description="colour behind transparent pixels; mean: the one of `mean`"
    )

    @property
    def background_colour(self) -> tuple[int, int, int]:
        """The colour behind transparent pixels, red, green and blue from 0 to 255."""
        if self.background == "mean":
            red, green, blue = (self.mean * 3)[:3]
            shares = (red, green, blue)
        else:
            shares = (1.0,) * 3 if self.background == "white" else (0.0,) * 3
        red, green, blue = (round(255 * min(max(share, 0.0), 1.0)) for share in shares)
        return red, green, blue

    @model_validator(mode="after")
    def _check_channel_values(self) -> Preprocessing:
        """Raise `ValueError` unless mean and std have one value per channel and std is positive."""
        for field in ("mean", "std"):
            if (got := len(getattr(self, field))) != self.channels:
                raise ValueError(f"{field}: expected {self.channels} values, got {got}")
        if min(self.std) <= 0:
            raise ValueError(f"std: expected positive values, got {self.std}")
        return self


class VisionManifest(BaseModel):
    """The content of `model.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    name: str = Field(pattern=NAME)
    version: str = Field("1", pattern=r"^[0-9]{1,9}$")
    family: Literal["snnet", "snnet-staged", "snnetv2", "nested", "onnx"] = "snnet"
    config: AnyConfig
    precisions: tuple[Precision, ...] = Field(
        ("float32",), description="number formats in which every network is offered"
    )
    labels: tuple[str, ...] = Field((), description="none if the model has no class scores")
    image_preprocessing: Preprocessing | None = Field(
        None, alias="preprocessing", description="unset if the model takes tensors, not images"
    )
    origin: str = Field(description="where the weights come from, as free text")
    licence: str
    training_cpu_s: float | None = Field(
        None, ge=0, description="CPU time of the training, of all threads; unset: not recorded"
    )
    default_budget_us: int | None = Field(None, gt=0, description="budget of requests without one")

    @model_validator(mode="before")
    @classmethod
    def _copy_family_into_config(cls, fields: Any) -> Any:
        """Return the fields with the family name at both levels; older files lack the inner one."""
        if isinstance(fields, dict) and isinstance(config := fields.get("config"), dict):
            family = fields.get("family", config.get("family", "snnet"))
            return fields | {"family": family, "config": {"family": family} | config}
        return fields

    @field_validator("config", mode="before")
    @classmethod
    def _check_sizes(cls, config: Any) -> Any:
        """Raise `ValueError` for sizes with which networks could not even be listed."""
        check_sizes(config, "config")
        return config

    @field_validator("precisions")
    @classmethod
    def _check_precisions(cls, precisions: tuple[Precision, ...]) -> tuple[Precision, ...]:
        """Raise `ValueError` unless float32 is the first and each format is listed once."""
        if precisions[:1] != ("float32",) or len(set(precisions)) < len(precisions):
            raise ValueError(f"expected float32 first and each format once, got {precisions}")
        return precisions

    def variants(self, among: Collection[Precision] | None = None) -> tuple[Stitch, ...]:
        """Return every network in every number format, or only in those `among` them.

        The ids of float32 are the family's own; with K networks, the n-th further format has the
        ids from n * K on.
        """
        stitches = self.config.stitches()
        return tuple(
            replace(stitch, id=number * len(stitches) + stitch.id, precision=precision)
            for number, precision in enumerate(self.precisions)
            if among is None or precision in among
            for stitch in stitches
        )

    @property
    def takes_images(self) -> bool:
        """Whether requests may hold image files and pixels, not only tensors."""
        return self.image_preprocessing is not None

    @property
    def preprocessing(self) -> Preprocessing:
        """The steps from an image to an input; raises `BundleError` for a model without any."""
        if self.image_preprocessing is None:
            raise BundleError(
                f"{self.name}: expected a model of images, got one of tensors "
                f"{list(self.config.inputs.shape)}"
            )
        return self.image_preprocessing

    @property
    def outputs(self) -> tuple[OutputEntry, ...]:
        """The outputs of a model that returns tensors; none if it classifies."""
        return self.config.outputs if isinstance(self.config, OnnxConfig) else ()

    @property
    def row_size(self) -> int:
        """The number of float32 values that an engine returns for one image."""
        return row_size(self.outputs) if self.outputs else len(self.labels)

    @model_validator(mode="after")
    def _check_model_fits(self) -> VisionManifest:
        """Raise `ValueError` unless family, labels and input shape agree with the model's."""
        if self.config.family != self.family:
            raise ValueError(f"family: expected {self.config.family}, got {self.family}")
        inputs, images = self.config.inputs, self.image_preprocessing
        if len(self.labels) != (inputs.num_classes or 0):
            raise ValueError(f"labels: expected {inputs.num_classes}, got {len(self.labels)}")
        if isinstance(inputs, TensorInputs):
            if images is not None:
                raise ValueError(f"preprocessing: expected none for tensors {list(inputs.shape)}")
            return self
        if images is None:
            raise ValueError(
                f"preprocessing: expected shape {inputs.shape} from the model, got none"
            )
        got = (images.channels, images.height, images.width)
        if got != inputs.shape:
            raise ValueError(
                f"preprocessing: expected shape {inputs.shape} from the model, got {got}"
            )
        return self


@dataclass(frozen=True, slots=True)
class VisionBundle:
    """The manifest and the measurements of a bundle; `load_model` reads the weights."""

    path: Path
    manifest: VisionManifest
    quality: QualityTable | None
    latency: LatencyProfile | None

    @classmethod
    def load(cls, path: Path) -> VisionBundle:
        """Return the bundle in the folder `path`.

        Raises `BundleError` with the file, the field, the expected and the actual value.
        """
        file = path / "model.yaml"
        manifest = validate(file, VisionManifest, read_yaml(file))
        quality = _read_table(path / "quality.json", QualityTable)
        latency = _read_table(path / "latency.json", LatencyProfile)
        known = {variant.id for variant in manifest.variants()}
        for name, table in (("quality", quality), ("latency", latency)):
            if table is not None and (unknown := table.variants.keys() - known):
                raise BundleError(f"{path / name}.json: {describe_unknown(unknown)}")
        cascades = () if quality is None else quality.cascades
        if unknown := {variant for cascade in cascades for variant in cascade.variants} - known:
            raise BundleError(f"{path / 'quality'}.json: {describe_unknown(unknown)}")
        bundle = cls(path, manifest, quality, latency)
        if "int8" in manifest.precisions and not any(bundle.int8_folder.glob("*.onnx")):
            raise BundleError(f"{bundle.int8_folder}: expected graphs, got none")
        return bundle

    def load_model(self, dtype: torch.dtype = torch.float32) -> StitchedModel | NestedModel:
        """Return the model on the CPU in `dtype`, in eval mode and without gradients.

        Batch normalisation is folded into the layers before it; that of supernets has the paths'
        own statistics. Raises `BundleError` if the weights cannot be read, if a tensor is missing,
        unknown or has another shape, or if the family has no torch modules.
        """
        if isinstance(self.manifest.config, OnnxConfig):
            raise_without_modules()
        weights = self.weights_path
        check_safetensors(weights)
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
        if isinstance(model, NestedModel) and self.statistics_path.exists():
            read_statistics(self.statistics_path, model)
        return model.to(dtype)

    def load_stitched(self) -> StitchedModel:
        """Return the model of a stitched family in float32; raises as `load_model` does."""
        model = self.load_model()
        assert isinstance(model, StitchedModel)
        return model

    def load_nested(self) -> NestedModel:
        """Return the model of a supernet in float32; raises as `load_model` does."""
        model = self.load_model()
        assert isinstance(model, NestedModel)
        return model

    def digest(self) -> str:
        """Return a SHA-256 of the weights and the architecture, in hexadecimal digits.

        Raises `BundleError` if the weights cannot be read.
        """
        digest = hashlib.sha256()
        for path in self.weight_files:
            try:
                status = path.stat()
                digest.update(_file_digest(path, status.st_mtime_ns, status.st_size))
            except OSError as error:
                raise BundleError(f"{path}: {error}") from error
        digest.update(self.manifest.config.model_dump_json().encode())
        for path in sorted(self.int8_folder.glob("*.onnx")):
            status = path.stat()
            digest.update(path.name.encode())
            digest.update(_file_digest(path, status.st_mtime_ns, status.st_size))
        return digest.hexdigest()

    @property
    def weights_path(self) -> Path:
        """The file of the weights."""
        return self.path / "weights.safetensors"

    @property
    def statistics_path(self) -> Path:
        """The file of a supernet's statistics of batch normalisation per path."""
        return self.path / "statistics.safetensors"

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """All files that hold weights in float32."""
        config = self.manifest.config
        if not isinstance(config, OnnxConfig):
            own = (self.statistics_path,) if self.statistics_path.exists() else ()
            return (self.weights_path, *own)
        networks = tuple(self.network_files.network_path(entry) for entry in config.networks)
        return (*networks, self.weights_path) if config.paths else networks

    @property
    def network_files(self) -> NetworkFiles:
        """The files of the networks of a family `onnx`."""
        images, config = self.manifest.image_preprocessing, self.manifest.config
        assert isinstance(config, OnnxConfig)
        if images is None:
            return NetworkFiles(self.path, config, (), ())
        return NetworkFiles(self.path, config, images.mean, images.std, images.resize)

    @property
    def int8_folder(self) -> Path:
        """The folder of the graphs with 8-bit weights, which exists in quantised bundles only."""
        return self.path / "int8"


@functools.cache
def _file_digest(path: Path, modified_ns: int, size: int) -> bytes:
    """Return the SHA-256 of a file, which takes half a second for the largest family."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def write_bundle(path: Path, manifest: VisionManifest, model: StitchedModel | NestedModel) -> None:
    """Write `model.yaml` and half-precision weights, and remove measurements of older weights.

    Batch normalisation keeps its precision: variances may leave the range of half precision.
    """
    path.mkdir(parents=True, exist_ok=True)
    kept_precise = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for key in module.state_dict()
    }
    tensors = {
        name: (tensor if name in kept_precise else tensor.half()).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, path / "weights.safetensors")
    write_manifest(path, manifest)


def write_manifest(path: Path, manifest: VisionManifest) -> None:
    """Write `model.yaml`, and remove measurements of older weights."""
    fields = manifest.model_dump(mode="json", exclude_none=True, by_alias=True)
    (path / "model.yaml").write_text(yaml.safe_dump(fields, sort_keys=False, width=100))
    for stale in ("quality.json", "latency.json", "statistics.safetensors"):
        (path / stale).unlink(missing_ok=True)
    shutil.rmtree(path / "int8", ignore_errors=True)


def write_table(path: Path, table: QualityTable | LatencyProfile) -> None:
    """Write `quality.json` or `latency.json` with one line per stitch, so that diffs are short."""
    fields = table.model_dump(mode="json", exclude_none=True)
    variants, cascades = fields.pop("variants"), fields.pop("cascades", ())
    head = json.dumps(fields, indent=1)[:-2]
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in variants.items())
    more = ",\n".join(f"  {json.dumps(cascade)}" for cascade in cascades)
    tail = f',\n "cascades": [\n{more}\n ]' if more else ""
    path.write_text(f'{head},\n "variants": {{\n{lines}\n }}{tail}\n}}\n')


def _read_table(path: Path, kind: type[Table]) -> Table | None:
    """Return the table in the file, or None if the file does not exist."""
    return read_table(path, kind) if path.exists() else None


def describe_unknown(variants: Collection[int]) -> str:
    """Return the message about variants that a table has and the model lacks."""
    more = len(variants) - MAX_LISTED
    suffix = f" and {more} more" if more > 0 else ""
    return f"unknown variants {sorted(variants)[:MAX_LISTED]}{suffix}"
