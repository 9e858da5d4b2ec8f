"""Folders of transformers with random weights, one for each architecture and variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.hugging_face_models import OWN, make_model
from tests.support.language_models import write_byte_tokenizer

__all__ = ["OWN", "write_folder"]


def write_folder(folder: Path, name: str) -> Any:
    """Write a random model with one token per byte, as transformers does, and return it."""
    model = make_model(name)
    model.save_pretrained(folder)
    write_byte_tokenizer(folder / "tokenizer.json")
    return model
