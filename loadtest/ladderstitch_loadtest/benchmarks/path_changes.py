"""Cost of a change of the path within an answer: perplexity and divergence after it.

The first half of a window of text is computed on one path and the second half on another, which
reads the keys and values of the first, translated if its own differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.text.messages import LogitsMode
from ladderstitch.training.text.switches import PathRunner


@dataclass(frozen=True, slots=True)
class ChangeCost:
    """The second half of all windows after a first half on the path `first`.

    `nats` is the mean loss per token. `divergence` is the mean KL divergence, in nats per token,
    from the same path after a first half of its own.
    """

    first: str
    second: str
    nats: float
    divergence: float

    def to_dict(self, alone: ChangeCost) -> dict[str, object]:
        """Return the figures, with the perplexity over that of `alone`, which never changes."""
        return {
            "first": self.first,
            "second": self.second,
            "perplexity": round(math.exp(self.nats), 3),
            "perplexity_over_alone": round(math.exp(self.nats - alone.nats), 5),
            "kl_nats_per_token": round(self.divergence, 6),
        }


def measure(
    runner: PathRunner,
    names: Sequence[str],
    windows: Tensor,
    on_window: Callable[[], None] = lambda: None,
) -> list[dict[str, object]]:
    """Return the cost of every change between two paths, over windows [W, T + 1] of text."""
    middle = (windows.shape[1] - 1) // 2
    numbers = range(len(names))
    pairs = [(first, second) for first in numbers for second in numbers]
    nats, divergences = dict.fromkeys(pairs, 0.0), dict.fromkeys(pairs, 0.0)
    for window in windows:
        found = _predict_second_halves(runner, pairs, window, middle)
        for (first, second), predicted in found.items():
            own, targets = found[second, second], window[middle + 1 :]
            nats[first, second] += float(F.nll_loss(predicted, targets)) / len(windows)
            divergence = F.kl_div(predicted, own, log_target=True, reduction="sum") / len(targets)
            divergences[first, second] += float(divergence) / len(windows)
        on_window()
    costs = {
        (a, b): ChangeCost(names[a], names[b], nats[a, b], divergences[a, b]) for a, b in pairs
    }
    return [costs[a, b].to_dict(costs[b, b]) for a, b in pairs]


def _predict_second_halves(
    runner: PathRunner, pairs: Sequence[tuple[int, int]], window: Tensor, middle: int
) -> Mapping[tuple[int, int], Tensor]:
    """Return the log probabilities of the second half by (path of the first, of the second)."""
    found = {}
    with torch.inference_mode():
        for first, second in pairs:
            runner.run(first, window[:middle], 0, LogitsMode.NONE)
            runner.translate(first, second, window[:middle])
            logits = runner.run(second, window[middle:-1], middle, LogitsMode.ALL)
            found[first, second] = logits.float().log_softmax(-1)
    return found
