"""Text as windows of tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ladderstitch.errors import DataError
from ladderstitch.text.tokenizer import TextTokenizer

PIECE_CHARACTERS = 200_000
"""Texts are tokenised in pieces of about this, cut at ends of lines."""


def tokenise(file: Path, tokenizer: TextTokenizer) -> Tensor:
    """All tokens of a file [N]; raises `DataError`."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}") from error
    ids: list[int] = []
    at = 0
    while at < len(text):
        end = text.find("\n", at + PIECE_CHARACTERS)
        end = len(text) if end < 0 else end + 1
        ids += tokenizer.encode(text[at:end])
        at = end
    return torch.tensor(ids)


def windows(tokens: Tensor, length: int, most: int | None = None, seed: int = 0) -> Tensor:
    """[W, length + 1]: windows whose targets do not overlap; `most` of them, drawn by the seed.

    Raises `DataError` if the text is too short for one.
    """
    count = (len(tokens) - 1) // length
    if not count:
        raise DataError(f"text: expected more than {length} tokens, got {len(tokens)}")
    whole = tokens[: count * length + 1].unfold(0, length + 1, length)
    if most is None or most >= count:
        return whole.contiguous()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return whole[order[:most].sort().values].contiguous()
