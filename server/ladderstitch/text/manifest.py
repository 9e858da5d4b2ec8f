"""The manifest of a language model's bundle, `model.yaml`: sizes, paths, end tokens, licence."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ladderstitch.bundles import LANGUAGE_FAMILY
from ladderstitch.bundles.files import read_yaml, validate
from ladderstitch.runtime.low_bit import LowBitPrecision
from ladderstitch.text.hugging_face.folder import CONFIG, read_folder
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.family import DecoderFamily, Route
from ladderstitch.text.model.layout import TensorLayout
from ladderstitch.text.model.residual import ResidualScheme, find_group_problem

MANIFEST = "model.yaml"


class TextVariant(BaseModel):
    """A path of a language model: a residual scheme, a low-rank delta if any, and a precision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._+-]{0,62}$")
    residual: ResidualScheme
    delta: str | None = Field(
        None,
        pattern=r"^[^/]+\.safetensors$",
        description="file with the low-rank (LoRA) additions to some tensors; unset: no additions",
    )
    precision: LowBitPrecision | None = Field(
        None, description="number format of the matrices; unset: the server's `dtype`"
    )
    route: Route = Field(
        (), description="layers of the anchors that it runs; empty: all of the largest anchor"
    )
    ffn_widths: tuple[int, ...] = Field(
        (),
        description="columns of the MLP of each layer, or one number for all layers, from "
        "`nested_ffn`; empty: all columns",
    )
    by_name: bool = Field(
        False, description="whether only requests that name the path get it, as an adapter's"
    )

    def find_problem(self, config: DecoderConfig) -> str | None:
        """Return why the path does not fit a model of this configuration; None if it does."""
        if (problem := config.find_width_problem(self.ffn_widths)) is not None:
            return f"paths: {problem}"
        if self.ffn_widths and self.precision:
            return f"paths: ffn_widths: expected none with a precision, got {self.ffn_widths}"
        problem = find_group_problem(self.residual.groups or (), config.layers)
        return None if problem is None else f"residual.{problem}"


class SamplingDefaults(BaseModel):
    """The sampling that the authors of a model recommend; it applies to OpenAI's API only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(1.0, ge=0, le=100)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)


class TextManifest(BaseModel):
    """The content of `model.yaml` for a language model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    version: str = Field("1", pattern=r"^[0-9]{1,9}$")
    family: Literal["llama"] = LANGUAGE_FAMILY
    config: DecoderConfig = Field(description="the model, or the largest anchor of a family")
    anchors: tuple[DecoderConfig, ...] = Field(
        (), description="the smaller anchors of a family with stitching layers"
    )
    layout: TensorLayout = Field(
        TensorLayout(), description="how the weights are stored; unset: as those of Llama"
    )
    residual: ResidualScheme = ResidualScheme()
    paths: tuple[TextVariant, ...] = Field(
        (), description="paths that an answer may take; empty: only `residual`"
    )
    end_tokens: tuple[int, ...] = Field((), description="tokens that end an answer")
    sampling: SamplingDefaults = Field(
        SamplingDefaults(), description="options of OpenAI requests that do not state them"
    )
    chat_template: str | None = Field(None, description="Jinja template of a conversation")
    special_tokens: dict[str, str] = Field(
        {}, description="special tokens by their names in the template: bos_token, eos_token, ..."
    )
    origin: str = Field(description="source of the weights, for readers")
    licence: str

    @model_validator(mode="after")
    def _check_schemes(self) -> TextManifest:
        """Raise `ValueError` unless the paths' schemes fit each other and the model's norms."""
        if any(variant.residual.scheme == "no_communication" for variant in self.variants):
            raise ValueError(
                "residual: expected a scheme with correct outputs, got no_communication "
                "(for benchmarks only)"
            )
        if len({variant.residual.scheme == "parallel" for variant in self.variants}) > 1:
            raise ValueError(
                "paths: expected all schemes or none to be parallel, got both "
                "(parallel layers have other tensors)"
            )
        schemes = {variant.residual.scheme for variant in self.variants}
        late = schemes & {"ladder", "desync", "groups"}
        if late and (self.config.norm_place != "before" or self.config.qk_norm == "all"):
            raise ValueError(
                "residual: expected standard, as norms of outputs or over all heads need complete "
                f"sums, got {late}"
            )
        return self

    @model_validator(mode="after")
    def _check_family(self) -> TextManifest:
        """Raise `ValueError` unless the paths fit the model or the family of anchors."""
        for variant in self.variants:
            if (problem := variant.find_problem(self.config)) is not None:
                raise ValueError(problem)
        routes = {variant.name: variant.route for variant in self.variants}
        if (problem := self.decoder_family.find_problem(routes)) is not None:
            raise ValueError(problem)
        if self.anchors and any(v.delta or v.precision or v.ffn_widths for v in self.variants):
            raise ValueError(
                "paths: expected no delta, no precision and no ffn_widths in a family of anchors"
            )
        schemes = {variant.residual.scheme for variant in self.variants}
        if self.anchors and (other := schemes - {"standard", "ladder"}):
            raise ValueError(f"residual: expected standard or ladder in a family, got {other}")
        in_part = any(v.residual.ladder_layers is not None for v in self.variants)
        if in_part and len(set(self.decoder_family.depths)) > 1:
            raise ValueError(
                "residual.ladder_layers: expected none in a family of anchors of different depths, "
                "all of whose layers are of one kind"
            )
        return self

    @model_validator(mode="after")
    def _check_names_and_tokens(self) -> TextManifest:
        """Raise `ValueError` unless names and end tokens fit, and one path needs no name."""
        if all(variant.by_name for variant in self.variants):
            raise ValueError("paths: expected one without by_name, for requests that name none")
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ValueError(f"paths: expected distinct names, got {names}")
        if wrong := [t for t in self.end_tokens if not 0 <= t < self.config.vocab_size]:
            raise ValueError(f"end_tokens: expected 0 to {self.config.vocab_size - 1}, got {wrong}")
        return self

    @property
    def decoder_family(self) -> DecoderFamily:
        """All anchors; a plain model has one."""
        return DecoderFamily((*self.anchors, self.config))

    @property
    def variants(self) -> tuple[TextVariant, ...]:
        """The paths in the order of their ids; at least one."""
        return self.paths or (TextVariant(name=self.residual.scheme, residual=self.residual),)

    @property
    def adapters(self) -> dict[int, str]:
        """The names of the paths that only requests which name them get, by id."""
        return {n: variant.name for n, variant in enumerate(self.variants) if variant.by_name}


def read_manifest(path: Path) -> TextManifest:
    """Return the manifest of a bundle, or of a folder of transformers without one.

    Raises `BundleError` that names the file, the field, the expected and the actual value.
    """
    file = path / MANIFEST
    if file.exists() or not (path / CONFIG).exists():
        return validate(file, TextManifest, read_yaml(file))
    architecture, fields = read_folder(path)
    own = {
        "config": architecture.config.model_dump(exclude_unset=True),
        "layout": architecture.layout.model_dump(exclude_unset=True),
        "residual": architecture.residual.model_dump(exclude_unset=True),
    }
    return validate(path / CONFIG, TextManifest, fields | own)


def write_manifest(path: Path, manifest: TextManifest) -> None:
    """Write `model.yaml` into a folder, which is created if it does not exist."""
    path.mkdir(parents=True, exist_ok=True)
    fields = manifest.model_dump(mode="json", exclude_none=True)
    (path / MANIFEST).write_text(yaml.safe_dump(fields, sort_keys=False, width=100))
