"""Folders of transformers with random weights, one for each architecture and variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.hugging_face_models import OWN, make_model
from tests.support.language_models import write_byte_tokenizer

__all__ = ["LAYERS", "OWN", "POSITIONS", "write_folder", "write_llama"]

LAYERS, POSITIONS = 3, 64
"""Of the models of `write_llama`."""


def write_folder(folder: Path, name: str) -> Any:
    """Write a random model with one token per byte, as transformers does, and return it."""
    model = make_model(name)
    model.save_pretrained(folder)
    write_byte_tokenizer(folder / "tokenizer.json")
    return model


def write_llama(folder: Path, width: int, seed: int, **fields: Any) -> LlamaForCausalLM:
    """Write a random Llama model of a width with one token per byte, and return it."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": width // 8,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "eos_token_id": 256,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes | fields)).eval()
    model.save_pretrained(folder)
    write_byte_tokenizer(folder / "tokenizer.json")
    return model
