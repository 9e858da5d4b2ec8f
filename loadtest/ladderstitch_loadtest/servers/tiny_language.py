"""A language model with random weights, so small that compute takes a negligible share of time."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ladderstitch.text.manifest import TextManifest, write_manifest
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.weights import expected_shapes

CONFIG = DecoderConfig(
    vocab_size=256,
    hidden_size=48,
    intermediate_size=96,
    layers=2,
    heads=6,
    kv_heads=3,
    head_dim=8,
    max_positions=256,
    tied_head=True,
)


def write_tiny(path: Path) -> Path:
    """Write a bundle with one token per byte and return its path."""
    manifest = TextManifest(
        name="tiny", config=CONFIG, origin="random weights", licence="Apache-2.0"
    )
    write_manifest(path, manifest)
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=random) * 0.3
        for name, shape in expected_shapes(CONFIG).items()
    }
    save_file(tensors, path / "model.safetensors")
    write_byte_tokenizer(path / "tokenizer.json")
    return path


def write_byte_tokenizer(file: Path) -> None:
    """Write a tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(file))
