"""The bundle of a language model: a folder that is checked completely when it is loaded.

    model.yaml            the manifest: sizes, paths, end tokens, origin, licence
    model.safetensors     weights in the Hugging Face layout, or shards with their index
    tokenizer.json        the tokenizer
    quality.json          optional: each path's next-token accuracy and perplexity
    switches.json         optional: the changes of path within an answer, and what they cost
    *.safetensors         optional: the low-rank delta (LoRA) of a path
    tokenizer_config.json, special_tokens_map.json
                          optional: the special tokens that the chat template names; programs that
                          read the tokenizer with transformers need the first of them

A folder of transformers with a `config.json` and no `model.yaml` is a bundle with one path, and its
weights may also be in `pytorch_model.bin` (`hugging_face/`). Only tensors are unpickled. A bundle
that does not fit is rejected with the reason.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ladderstitch.bundles.files import read_table
from ladderstitch.errors import BundleError, ConfigError
from ladderstitch.runtime.low_bit import LowBitPrecision
from ladderstitch.scheduling.profiles import QualityTable
from ladderstitch.text.chat_template import ChatTemplate
from ladderstitch.text.hugging_face.torch_files import INDEX as TORCH_INDEX
from ladderstitch.text.hugging_face.torch_files import SINGLE as TORCH_SINGLE
from ladderstitch.text.hugging_face.torch_files import TorchFolder
from ladderstitch.text.manifest import TextManifest, read_manifest
from ladderstitch.text.model.family_weights import check_family_weights
from ladderstitch.text.model.layout import LaidOutWeights
from ladderstitch.text.model.weight_reader import (
    INDEX,
    SINGLE,
    SafetensorsFolder,
    Weights,
    check_delta,
    load_delta,
)
from ladderstitch.text.model.weights import check_weights, expected_shapes
from ladderstitch.text.switches import SwitchTable
from ladderstitch.text.tokenizer import TextTokenizer
from ladderstitch.text.tokenizer_files import (
    TOKENIZER,
    read_special_tokens,
    write_tokenizer_config,
)

log = logging.getLogger(__name__)

QUALITY, SWITCHES = "quality.json", "switches.json"
TORCH_FILES = (TORCH_SINGLE, TORCH_INDEX)


@dataclass(frozen=True, slots=True)
class TextBundle:
    """A checked bundle; every rank reads its own slices of the weights later."""

    path: Path
    manifest: TextManifest
    quality: QualityTable | None = None
    switches: SwitchTable | None = None

    @classmethod
    def load(cls, path: Path, *, calibrated: bool = True) -> TextBundle:
        """Return the bundle of a folder; without `calibrated`, its qualities are not read.

        Raises `BundleError` that names the file, the field, the expected and the actual value.
        """
        manifest = read_manifest(path)
        quality = _read_quality(path / QUALITY, manifest) if calibrated else None
        switches = _read_switches(path / SWITCHES, manifest) if calibrated else None
        bundle = cls(path, manifest, quality, switches)
        files = bundle.open_files()
        weights = LaidOutWeights(files, manifest.layout, manifest.config)
        if manifest.anchors:
            check_family_weights(weights, manifest.decoder_family)
        else:
            check_weights(weights, manifest.config, shared_norm=bundle.shared_norm)
        for name, stored in list(files.renamed.items())[:1]:
            count = len(files.renamed)
            log.info("%s: read %d tensors by other names: %s as %s", path, count, stored, name)
        shapes = expected_shapes(manifest.config, shared_norm=bundle.shared_norm)
        for variant in manifest.variants:
            if variant.delta is not None:
                check_delta(load_delta(path / variant.delta), shapes)
        return bundle

    @property
    def shared_norm(self) -> bool:
        """Whether attention and MLP of a layer share one norm (the parallel scheme)."""
        return self.manifest.variants[0].residual.scheme == "parallel"

    def weights(self) -> Weights:
        """Return a reader for the weights; raises `BundleError` if a file is missing."""
        return LaidOutWeights(self.open_files(), self.manifest.layout, self.manifest.config)

    def open_files(self) -> SafetensorsFolder | TorchFolder:
        """Return a reader for the stored tensors; raises `BundleError` if a file is missing."""
        tied = self.manifest.config.tied_head
        has_safetensors = any((self.path / name).exists() for name in (SINGLE, INDEX))
        if not has_safetensors and any((self.path / name).exists() for name in TORCH_FILES):
            return TorchFolder(self.path, tied=tied)
        return SafetensorsFolder(self.path, tied=tied)

    def delta_files(self) -> tuple[Path | None, ...]:
        """Return the delta file of each path, or an empty tuple if no path has one."""
        files = tuple(
            self.path.resolve() / variant.delta if variant.delta else None
            for variant in self.manifest.variants
        )
        return files if any(files) else ()

    def precisions(self) -> tuple[LowBitPrecision | None, ...]:
        """Return the precision of each path, or an empty tuple if no path has one."""
        found = tuple(variant.precision for variant in self.manifest.variants)
        return found if any(found) else ()

    def ffn_widths(self) -> tuple[tuple[int, ...], ...]:
        """Return the widths of each path's MLPs, or an empty tuple if all have all columns."""
        found = tuple(variant.ffn_widths for variant in self.manifest.variants)
        return found if any(found) else ()

    def with_paths(self, names: Sequence[str]) -> TextBundle:
        """Return the bundle with only the paths of these names, in their own order.

        Raises `ConfigError` for a name that the bundle lacks.
        """
        present = {variant.name: number for number, variant in enumerate(self.manifest.variants)}
        if unknown := [name for name in names if name not in present]:
            raise ConfigError(f"paths: expected some of {list(present)}, got {unknown}")
        kept = sorted({present[name] for name in names})
        paths = tuple(self.manifest.variants[number] for number in kept)
        quality, switches = self.quality, self.switches
        if quality is not None:
            variants = {new: quality.variants[old] for new, old in enumerate(kept)}
            quality = quality.model_copy(update={"variants": variants})
        if switches is not None:
            switches = switches.with_paths(kept)
        manifest = self.manifest.model_copy(update={"paths": paths})
        return replace(self, manifest=manifest, quality=quality, switches=switches)

    def tokenizer(self) -> TextTokenizer:
        """Return the tokenizer; raises `BundleError` if `tokenizer.json` is missing or damaged.

        Checkpoints may have fewer rows than the tokenizer has tokens: prompts with a token that has
        no row are rejected.
        """
        tokenizer, rows = (
            TextTokenizer.load(self.path / TOKENIZER),
            self.manifest.config.vocab_size,
        )
        if tokenizer.size > rows:
            log.warning(
                "%s: %d tokens, but the model has %d rows: prompts with the others are rejected",
                self.path / TOKENIZER,
                tokenizer.size,
                rows,
            )
        return tokenizer

    def chat_template(self, tokenizer: TextTokenizer) -> ChatTemplate | None:
        """Return the chat template, None without one; it is to be closed.

        Raises `BundleError` if it is not valid, or if it renders no conversation.
        """
        if self.manifest.chat_template is None:
            return None
        special_tokens = self.special_tokens(tokenizer)
        template = ChatTemplate(self.manifest.chat_template, tokenizer, special_tokens)
        try:
            template.check(self.manifest.config.vocab_size)
        except BaseException as error:
            template.close()
            if isinstance(error, BundleError):
                raise BundleError(f"{self.path / 'model.yaml'}: {error}") from error
            raise
        return template

    def special_tokens(self, tokenizer: TextTokenizer) -> dict[str, str]:
        """Return the special tokens that a chat template may name.

        They are those of the manifest, of the checkpoint's own files if they were copied into the
        bundle, or else the first end token and the token that begins every text. Raises
        `BundleError` if a file is not valid.
        """
        found = _usual_tokens(self.manifest, tokenizer)
        found |= read_special_tokens(self.path)
        found |= self.manifest.special_tokens
        return {name: token for name, token in found.items() if token is not None}


def _usual_tokens(manifest: TextManifest, tokenizer: TextTokenizer) -> dict[str, str | None]:
    """Return the token that begins every text, and the first end token."""
    tokens: dict[str, str | None] = {"bos_token": tokenizer.bos_token(manifest.end_tokens)}
    if manifest.end_tokens:
        tokens["eos_token"] = tokenizer.token(manifest.end_tokens[0])
    return tokens


def _read_quality(file: Path, manifest: TextManifest) -> QualityTable | None:
    """Return the quality of each path; a bundle whose budgets have one choice may lack the file.

    The scheduler cannot choose between paths of unknown quality.
    """
    if not file.exists() and len(manifest.variants) - len(manifest.adapters) == 1:
        return None
    table = read_table(file, QualityTable)
    expected, got = set(range(len(manifest.variants))), set(table.variants)
    if got != expected:
        raise BundleError(f"{file}: expected paths {sorted(expected)}, got {sorted(got)}")
    return table


def _read_switches(file: Path, manifest: TextManifest) -> SwitchTable | None:
    """Return the measured changes of path, None if the bundle has none."""
    if not file.exists():
        return None
    table = read_table(file, SwitchTable)
    last = len(manifest.variants) - 1
    named = {path for p in table.penalties for path in (p.source, p.target)}
    if wrong := sorted(path for path in named if path > last):
        raise BundleError(f"{file}: expected paths 0 to {last}, got {wrong}")
    return table


def write_tokenizer(path: Path, source: Path, manifest: TextManifest) -> None:
    """Copy a `tokenizer.json` into a bundle, with the file that transformers needs to read it.

    Raises `BundleError` if the source is missing or damaged.
    """
    if source != path / TOKENIZER:
        shutil.copyfile(source, path / TOKENIZER)
    tokens = _usual_tokens(manifest, TextTokenizer.load(path / TOKENIZER))
    tokens |= manifest.special_tokens
    named = {name: token for name, token in tokens.items() if token is not None}
    write_tokenizer_config(path, named, manifest.config.max_positions)
