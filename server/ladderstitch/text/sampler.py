"""From logits to the next token: greedy, or drawn with temperature, top-k and top-p."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ladderstitch.scheduling.requests import Sampling


class Sampler:
    """Draws the tokens of one answer; the same seed draws the same."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def pick(self, logits: NDArray[np.float32]) -> int:
        """A token from logits [V]."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / self.sampling.temperature
        kept = self._kept(scaled)
        powers = np.exp(scaled[kept] - scaled[kept].max())
        return int(self._random.choice(kept, p=powers / powers.sum()))

    def _kept(self, scaled: NDArray[np.float64]) -> NDArray[np.int64]:
        """The most probable tokens, best first: `top_k` of them, then `top_p` of their mass."""
        k = min(self.sampling.top_k or len(scaled), len(scaled))
        if k == len(scaled) and self.sampling.top_p == 1:
            return np.arange(len(scaled))
        best = np.argpartition(-scaled, k - 1)[:k]
        best = best[np.argsort(-scaled[best], kind="stable")]
        powers = np.exp(scaled[best] - scaled[best[0]])
        mass_before = np.cumsum(powers) - powers
        return best[mass_before < self.sampling.top_p * powers.sum()]
