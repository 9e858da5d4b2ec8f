"""How good a path is: next-token accuracy with its interval, and perplexity, on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor

from ladderstitch.errors import DataError
from ladderstitch.scheduling.profiles import Quality
from ladderstitch.text.model.residual import LayerPlan
from ladderstitch.text.tokenizer import TextTokenizer
from ladderstitch.training.text.trainable_llama import LowRank, TrainableLlama

CONFIDENCE = 0.95


@torch.inference_mode()
def measure_path(
    model: TrainableLlama,
    plans: Sequence[LayerPlan],
    adapters: Mapping[str, LowRank] | None,
    held_out: Tensor,
    advance: Callable[[int], None] = lambda n: None,
) -> Quality:
    """Over windows [W, T + 1], each read from its first token on."""
    right, surprise = 0, 0.0
    for window in held_out:
        logits = model.logits(window[None, :-1], plans, adapters)[0].float()
        targets = window[1:]
        right += int((logits.argmax(-1) == targets).sum())
        surprise += float(F.cross_entropy(logits, targets, reduction="sum"))
        advance(1)
    count = held_out[:, 1:].numel()
    interval = binomtest(right, count).proportion_ci(CONFIDENCE, method="wilson")
    return Quality(
        value=right / count,
        low=interval.low,
        high=interval.high,
        perplexity=max(1.0, math.exp(surprise / count)),
    )


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
