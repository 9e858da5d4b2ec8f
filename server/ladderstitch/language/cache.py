"""Keys and values of the tokens seen so far: one contiguous block a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ladderstitch.language.config import LlamaConfig
from ladderstitch.language.sharding import Shard


class ContiguousCache:
    """[layers, 2, B, K_r, S, d]: B sequences of up to S tokens, this rank's K_r key/value heads."""

    def __init__(
        self,
        config: LlamaConfig,
        shard: Shard,
        sequences: int,
        tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.layers, 2, sequences, len(shard.kv_heads), tokens, config.head_dim)
        self._blocks = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = [(block[0], block[1]) for block in self._blocks.unbind(0)]
        self.tokens = tokens

    @property
    def bytes(self) -> int:
        return self._blocks.nbytes

    def append(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v [B, K_r, T, d] at positions start.. ; all so far, [B, K_r, start + T, d]."""
        keys, values = self._layers[layer]
        batch, end = k.shape[0], start + k.shape[2]
        keys[:batch, :, start:end] = k
        values[:batch, :, start:end] = v
        return keys[:batch, :, :end], values[:batch, :, :end]
