"""A language model on disk, checked when it is loaded.

    model.yaml            what it is: sizes, residual scheme, end tokens, origin, licence
    model.safetensors     weights in the Hugging Face layout; or shards with their index
    tokenizer.json        the tokenizer

Nothing is unpickled. What does not fit is refused with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ladderstitch.errors import BundleError
from ladderstitch.language.checkpoint import SafetensorsFolder
from ladderstitch.language.config import LlamaConfig
from ladderstitch.language.residual import Residual
from ladderstitch.language.tokens import TextTokenizer
from ladderstitch.language.weights import check_weights

FAMILY: Final = "llama"


class LanguageManifest(BaseModel):
    """`model.yaml` of a language model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    version: str = Field("1", pattern=r"^[0-9]{1,9}$")
    family: Literal["llama"] = FAMILY
    config: LlamaConfig
    residual: Residual = Residual()
    end_tokens: tuple[int, ...] = Field((), description="tokens that end an answer")
    chat_template: str | None = Field(None, description="Jinja template of a conversation")
    origin: str = Field(description="where the weights come from, for people")
    licence: str

    @model_validator(mode="after")
    def _can_be_served(self) -> LanguageManifest:
        if self.residual.scheme == "no_communication":
            raise ValueError("residual: no_communication gives wrong answers; benchmarks only")
        if wrong := [t for t in self.end_tokens if not 0 <= t < self.config.vocab_size]:
            raise ValueError(f"end_tokens: expected tokens of the vocabulary, got {wrong}")
        return self


@dataclass(frozen=True, slots=True)
class LanguageBundle:
    """A loaded `model.yaml`; weights are read by the ranks, each its own slice."""

    path: Path
    manifest: LanguageManifest

    @classmethod
    def load(cls, path: Path) -> LanguageBundle:
        """Raises `BundleError` naming the file, the field, what was expected and what came."""
        try:
            raw = yaml.safe_load((path / "model.yaml").read_text())
            bundle = cls(path, LanguageManifest.model_validate(raw))
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise BundleError(f"{path / 'model.yaml'}: {error}") from error
        shared_norm = bundle.manifest.residual.scheme == "parallel"
        check_weights(bundle.weights(), bundle.manifest.config, shared_norm=shared_norm)
        return bundle

    def weights(self) -> SafetensorsFolder:
        return SafetensorsFolder(self.path)

    def tokenizer(self) -> TextTokenizer:
        """Raises `BundleError` if `tokenizer.json` is missing or has tokens beyond the model's."""
        tokenizer = TextTokenizer.load(self.path / "tokenizer.json")
        if tokenizer.size > self.manifest.config.vocab_size:
            raise BundleError(
                f"{self.path / 'tokenizer.json'}: expected at most "
                f"{self.manifest.config.vocab_size} tokens, got {tokenizer.size}"
            )
        return tokenizer


def is_language_bundle(path: Path) -> bool:
    """Whether a bundle's `model.yaml` names this family; raises `BundleError` if unreadable."""
    try:
        raw = yaml.safe_load((path / "model.yaml").read_text())
    except (OSError, yaml.YAMLError) as error:
        raise BundleError(f"{path / 'model.yaml'}: {error}") from error
    return isinstance(raw, dict) and raw.get("family") == FAMILY


def write_manifest(path: Path, manifest: LanguageManifest) -> None:
    """Write `model.yaml`."""
    path.mkdir(parents=True, exist_ok=True)
    fields = manifest.model_dump(mode="json", exclude_none=True)
    (path / "model.yaml").write_text(yaml.safe_dump(fields, sort_keys=False, width=100))
