"""Quality of a path on held-out text: next-token accuracy with its interval, and perplexity."""

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
METRIC = "next-token accuracy"


@torch.inference_mode()
def measure_quality(
    predict: Callable[[Tensor], Tensor],
    held_out: Tensor,
    on_progress: Callable[[int], None] = lambda n: None,
) -> Quality:
    """Return the quality of a model over W windows [W, T + 1], each without earlier context.

    `predict` returns the logits [T, V] of tokens [T]. `on_progress` is called with 1 after each
    window.
    """
    correct, loss = 0, 0.0
    for window in held_out:
        logits = predict(window[:-1]).float()
        targets = window[1:]
        correct += int((logits.argmax(-1) == targets).sum())
        loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        on_progress(1)
    count = held_out[:, 1:].numel()
    interval = binomtest(correct, count).proportion_ci(CONFIDENCE, method="wilson")
    return Quality(
        value=correct / count,
        low=interval.low,
        high=interval.high,
        perplexity=max(1.0, math.exp(loss / count)),
    )


def measure_path(
    model: TrainableLlama,
    plans: Sequence[LayerPlan],
    adapters: Mapping[str, LowRank] | None,
    held_out: Tensor,
    on_progress: Callable[[int], None] = lambda n: None,
) -> Quality:
    """Return the quality of a path of a model that is being trained, as `measure_quality` does."""
    return measure_quality(
        lambda tokens: model.logits(tokens[None], plans, adapters)[0], held_out, on_progress
    )


PIECE_CHARACTERS = 200_000
"""Approximate size of the pieces in which texts are tokenised, cut at ends of lines."""


def read_tokens(file: Path, tokenizer: TextTokenizer) -> Tensor:
    """Return the tokens [T] of a text file; raises `DataError` if it cannot be read."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}") from error
    ids: list[int] = []
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE_CHARACTERS)
        end = len(text) if end < 0 else end + 1
        ids += tokenizer.encode(text[start:end])
        start = end
    return torch.tensor(ids)


def split_windows(
    tokens: Tensor, length: int, max_windows: int | None = None, seed: int = 0
) -> Tensor:
    """Return windows [W, length + 1] of tokens [T] whose targets do not overlap.

    If there are more than `max_windows`, the seed selects a random subset; unset returns all.
    Raises `DataError` if the text is too short for one window.
    """
    count = (len(tokens) - 1) // length
    if not count:
        raise DataError(f"text: expected more than {length} tokens, got {len(tokens)}")
    windows = tokens[: count * length + 1].unfold(0, length + 1, length)
    if max_windows is None or max_windows >= count:
        return windows.contiguous()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return windows[order[:max_windows].sort().values].contiguous()
