"""How good a path is: next-token accuracy with its interval, and perplexity, on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor

from ladderstitch.scheduling.profiles import Quality
from ladderstitch.text.model.residual import LayerPlan
from ladderstitch.training.text.low_rank import LowRank
from ladderstitch.training.text.trainable_llama import TrainableLlama

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
