"""A language model on disk, checked when it is loaded.

    model.yaml            what it is: sizes, paths through it, end tokens, origin, licence
    model.safetensors     weights in the Hugging Face layout; or shards with their index
    tokenizer.json        the tokenizer
    quality.json          optional: each path's next-token accuracy and perplexity
    *.safetensors         optional: what the tensors of a path differ by (a low-rank delta)

Nothing is unpickled. What does not fit is refused with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ladderstitch.bundles import LANGUAGE_FAMILY
from ladderstitch.errors import BundleError
from ladderstitch.scheduling.profiles import QualityTable
from ladderstitch.text.model.config import LlamaConfig
from ladderstitch.text.model.residual import ResidualScheme
from ladderstitch.text.model.weight_reader import SafetensorsFolder, check_delta, load_delta
from ladderstitch.text.model.weights import check_weights, expected_shapes
from ladderstitch.text.tokenizer import TextTokenizer


class TextVariant(BaseModel):
    """One way through the weights that an answer may take: a member of an elastic family."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    residual: ResidualScheme
    delta: str | None = Field(
        None, pattern=r"^[^/]+\.safetensors$", description="file of what its tensors differ by"
    )


class TextManifest(BaseModel):
    """`model.yaml` of a language model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    version: str = Field("1", pattern=r"^[0-9]{1,9}$")
    family: Literal["llama"] = LANGUAGE_FAMILY
    config: LlamaConfig
    residual: ResidualScheme = ResidualScheme()
    paths: tuple[TextVariant, ...] = Field(
        (), description="ways to choose between; none: the only one is `residual`"
    )
    end_tokens: tuple[int, ...] = Field((), description="tokens that end an answer")
    chat_template: str | None = Field(None, description="Jinja template of a conversation")
    origin: str = Field(description="where the weights come from, for people")
    licence: str

    @model_validator(mode="after")
    def _can_be_served(self) -> TextManifest:
        if any(path.residual.scheme == "no_communication" for path in self.ways):
            raise ValueError("residual: no_communication gives wrong answers; benchmarks only")
        if len({path.residual.scheme == "parallel" for path in self.ways}) > 1:
            raise ValueError("paths: parallel layers have other tensors than the rest")
        if len({path.name for path in self.ways}) < len(self.ways):
            raise ValueError("paths: expected names that differ")
        if wrong := [t for t in self.end_tokens if not 0 <= t < self.config.vocab_size]:
            raise ValueError(f"end_tokens: expected tokens of the vocabulary, got {wrong}")
        return self

    @property
    def ways(self) -> tuple[TextVariant, ...]:
        """The paths by id; at least one."""
        return self.paths or (TextVariant(name=self.residual.scheme, residual=self.residual),)


@dataclass(frozen=True, slots=True)
class TextBundle:
    """A loaded `model.yaml`; weights are read by the ranks, each its own slice."""

    path: Path
    manifest: TextManifest
    quality: QualityTable | None = None

    @classmethod
    def load(cls, path: Path) -> TextBundle:
        """Raises `BundleError` naming the file, the field, what was expected and what came."""
        try:
            raw = yaml.safe_load((path / "model.yaml").read_text())
            manifest = TextManifest.model_validate(raw)
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise BundleError(f"{path / 'model.yaml'}: {error}") from error
        bundle = cls(path, manifest, _read_quality(path / "quality.json", manifest))
        check_weights(bundle.weights(), manifest.config, shared_norm=bundle.shared_norm)
        shapes = expected_shapes(manifest.config, shared_norm=bundle.shared_norm)
        for way in manifest.ways:
            if way.delta is not None:
                check_delta(load_delta(path / way.delta), shapes)
        return bundle

    @property
    def shared_norm(self) -> bool:
        """Whether attention and MLP of a layer share a norm."""
        return self.manifest.ways[0].residual.scheme == "parallel"

    def weights(self) -> SafetensorsFolder:
        return SafetensorsFolder(self.path)

    def delta_files(self) -> tuple[Path | None, ...]:
        """For each path what its tensors differ by; empty if no path has such a file."""
        files = tuple(
            self.path.resolve() / way.delta if way.delta else None for way in self.manifest.ways
        )
        return files if any(files) else ()

    def tokenizer(self) -> TextTokenizer:
        """Raises `BundleError` if `tokenizer.json` is missing or has tokens beyond the model's."""
        tokenizer = TextTokenizer.load(self.path / "tokenizer.json")
        if tokenizer.size > self.manifest.config.vocab_size:
            raise BundleError(
                f"{self.path / 'tokenizer.json'}: expected at most "
                f"{self.manifest.config.vocab_size} tokens, got {tokenizer.size}"
            )
        return tokenizer


def _read_quality(file: Path, manifest: TextManifest) -> QualityTable | None:
    """Several paths without their qualities could not be chosen between."""
    if not file.exists() and len(manifest.ways) == 1:
        return None
    try:
        table = QualityTable.model_validate_json(file.read_text())
    except (OSError, ValidationError) as error:
        raise BundleError(f"{file}: {error}") from error
    expected, got = set(range(len(manifest.ways))), set(table.variants)
    if got != expected:
        raise BundleError(f"{file}: expected paths {sorted(expected)}, got {sorted(got)}")
    return table


def write_manifest(path: Path, manifest: TextManifest) -> None:
    """Write `model.yaml`."""
    path.mkdir(parents=True, exist_ok=True)
    fields = manifest.model_dump(mode="json", exclude_none=True)
    (path / "model.yaml").write_text(yaml.safe_dump(fields, sort_keys=False, width=100))
