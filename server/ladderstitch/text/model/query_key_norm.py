"""RMS norms of queries and keys, of each head or over the heads of all ranks.

Shapes are those of `transformer.py`: T new tokens, H_r query and K_r key/value heads of this rank,
d head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.shard import Shard

SumOverRanks = Callable[[Tensor], Tensor]
"""A function that returns the sum over ranks of a tensor."""


class QueryKeyNorm:
    """The norms of queries and keys by `DecoderConfig.qk_norm`, if there are any.

    Norms over all heads of several ranks need the sums of squares of all of them: one reduction of
    [T, 2] numbers in float32.
    """

    def __init__(
        self, q_gain: Tensor | None, k_gain: Tensor | None, config: DecoderConfig, shard: Shard
    ) -> None:
        """`q_gain` is [d] and `k_gain` is [d], or [H_r d] and [K_r d] if over all heads."""
        self._gains = None if q_gain is None or k_gain is None else (q_gain, k_gain)
        self._heads = (len(shard.heads), len(shard.kv_heads))
        self._eps, self._width = config.norm_eps, config.head_dim
        self._needs_sum = config.qk_norm == "all" and shard.ranks > 1
        if q_gain is not None:
            sizes = (config.heads * config.head_dim, config.kv_heads * config.head_dim)
            self._sizes = torch.tensor(sizes, dtype=torch.float32, device=q_gain.device)
            owned = torch.tensor(shard.owned_kv_heads(config), dtype=torch.float32)
            self._owned = owned.to(q_gain.device)

    def __call__(self, projected: Tensor, sum_over_ranks: SumOverRanks) -> Tensor:
        """Return [T, H_r + 2 K_r, d] with normed queries and keys; values are as they were."""
        if self._gains is None:
            return projected
        heads, kv_heads = self._heads
        q, k, v = projected.split((heads, kv_heads, kv_heads), dim=1)
        if self._needs_sum:
            return torch.cat([*self._norm_over_ranks(q, k, sum_over_ranks), v], dim=1)
        normed = [
            F.rms_norm(part.reshape(len(part), -1, len(gain)), gain.shape, gain, self._eps)
            for part, gain in zip((q, k), self._gains, strict=True)
        ]
        return torch.cat([part.view(len(v), -1, self._width) for part in normed] + [v], dim=1)

    def _norm_over_ranks(
        self, q: Tensor, k: Tensor, sum_over_ranks: SumOverRanks
    ) -> tuple[Tensor, Tensor]:
        """Return the normed q and k; key heads that several ranks have count once."""
        of_keys = k.float().square().sum(-1) @ self._owned
        squares = torch.stack((q.float().square().sum((1, 2)), of_keys), dim=-1)
        scales = torch.rsqrt(sum_over_ranks(squares) / self._sizes + self._eps)
        q_gain, k_gain = (gain.view(-1, self._width).float() for gain in self._gains or ())
        normed_q = q.float() * scales[:, 0, None, None] * q_gain
        normed_k = k.float() * scales[:, 1, None, None] * k_gain
        return normed_q.to(q.dtype), normed_k.to(k.dtype)
