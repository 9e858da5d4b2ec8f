"""Cost of a change of the path within an answer: perplexity and divergence after it.

The first half of a window of text is computed on one path and the second half on another, which
reads the keys and values of the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.comm.base import SingleRankCommunicator
from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.engine.rank_models import load_models
from ladderstitch.text.messages import LogitsMode, SequenceInput, Step
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.residual import plan_layers
from ladderstitch.text.model.shard import Shard


class Paths:
    """All paths of a bundle in this process, on one cache."""

    def __init__(self, bundle: TextBundle, window: int, threads: int) -> None:
        self.config = RankConfig.of(bundle, threads=threads, max_model_len=window, sequences=1)
        config, shard = self.config, Shard.of(self.config.model, 0, 1)
        self._models = load_models(config, shard)
        self._plans = [plan_layers(path, config.model.layers, 1) for path in config.paths]
        self._cache = PagedCache(
            config.model, shard, config.blocks, config.block_tokens, config.cache_dtype
        )

    def predict(self, path: int, tokens: Tensor, start: int) -> Tensor:
        """Return the log probabilities [T, V] of tokens [T] from position `start` on."""
        blocks = range(self.config.blocks)
        step = Step((SequenceInput(tokens.tolist(), start, blocks, LogitsMode.ALL),))
        batch = Batch(step, self.config.block_tokens)
        comm = SingleRankCommunicator()
        logits = self._models[path].forward(batch, self._cache, self._plans[path], comm)
        return logits.float().log_softmax(-1)


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
    paths: Paths,
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
        found = _predict_second_halves(paths, pairs, window, middle)
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
    paths: Paths, pairs: Sequence[tuple[int, int]], window: Tensor, middle: int
) -> Mapping[tuple[int, int], Tensor]:
    """Return the log probabilities of the second half by (path of the first, of the second)."""
    found = {}
    with torch.inference_mode():
        for first, second in pairs:
            paths.predict(first, window[:middle], 0)
            found[first, second] = paths.predict(second, window[middle:-1], middle)
    return found
