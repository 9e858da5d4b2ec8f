"""The files of one language model as its servers read them: GGUF, or the Hugging Face layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ladderstitch.bundles import find_bundle
from ladderstitch.importers.fetch import download
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.manifest import TextManifest
from ladderstitch.text.model.config import DecoderConfig

TOKENIZER_FIELDS = {"tokenizer_class": "PreTrainedTokenizerFast"}


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A fetched model: its name, and the folder of its weights in the Hugging Face layout."""

    name: str
    folder: Path

    def gguf(self) -> Path:
        """Return the GGUF file of the same weights, downloaded once; raises `DataError`."""
        folder = self.folder.parent / "gguf"
        found = sorted(folder.rglob("*.gguf"))
        return found[0] if found else download(self.name, folder)


@contextmanager
def model_files(model: str) -> Iterator[ModelFiles]:
    """Yield the files of a fetched model, in a folder that is removed after the `with` block.

    Raises `BundleError` if the model was not fetched.
    """
    bundle = TextBundle.load(find_bundle(model))
    with TemporaryDirectory(prefix="ladderstitch-") as work:
        folder = Path(work) / model
        write_hugging_face_folder(bundle, folder)
        (Path(work) / "gguf").mkdir()
        yield ModelFiles(model, folder)


HF_NAMES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_head",
}
"""Field of Hugging Face's `config.json` -> field of `DecoderConfig`."""


def write_hugging_face_folder(bundle: TextBundle, folder: Path) -> None:
    """Write configurations, and links to the bundle's weights and tokenizer, into a new folder."""
    folder.mkdir(parents=True)
    for pattern in ("model*.safetensors", "model*.safetensors.index.json", "tokenizer.json"):
        for file in bundle.path.resolve().glob(pattern):
            (folder / file.name).symlink_to(file)
    (folder / "config.json").write_text(json.dumps(config_fields(bundle.manifest)))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_FIELDS))


def config_fields(manifest: TextManifest) -> dict[str, Any]:
    """Return the fields of Hugging Face's `config.json`; `read_architecture` reads them."""
    config = manifest.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **{name: getattr(config, ours) for name, ours in HF_NAMES.items()},
        "rope_parameters": _rope_fields(config),
        "eos_token_id": list(manifest.end_tokens) or None,
        "bos_token_id": None,
        "dtype": "float32",
    }


def _rope_fields(config: DecoderConfig) -> dict[str, Any]:
    scaling, theta = config.rope_scaling, config.rope_theta
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    fields = {"rope_type": scaling.kind, "rope_theta": theta, "factor": scaling.factor}
    if scaling.kind == "linear":
        return fields
    return fields | {
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
