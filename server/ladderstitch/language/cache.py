"""Keys and values of the tokens seen so far, in blocks that sequences hold by table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.language.batch import Batch, Span
from ladderstitch.language.config import LlamaConfig
from ladderstitch.language.sharding import Shard


class PagedCache:
    """[layers, 2, blocks, P, K_r, d]: blocks of P tokens, this rank's K_r key/value heads.

    Paged attention (arXiv 2309.06180). On a CPU a sequence whose blocks are neighbours is read in
    place, another one is gathered; on a GPU a kernel follows the block table.
    """

    def __init__(
        self,
        config: LlamaConfig,
        shard: Shard,
        blocks: int,
        block_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        kv_heads = len(shard.kv_heads)
        shape = (config.layers, 2, blocks * block_tokens, kv_heads, config.head_dim)
        self._memory = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = [(layer[0], layer[1]) for layer in self._memory.unbind(0)]
        self.block_tokens = block_tokens
        self.follows_tables = self._memory.is_cuda

    @property
    def bytes(self) -> int:
        return self._memory.nbytes

    def append(self, layer: int, batch: Batch, k: Tensor, v: Tensor) -> None:
        """Put the fresh tokens' k and v [N, K_r, d] where their blocks are."""
        keys, values = self._layers[layer]
        keys[batch.fresh] = k
        values[batch.fresh] = v

    def attend(self, layer: int, batch: Batch, q: Tensor) -> Tensor:
        """Causal attention of the fresh tokens' queries [N, H, d] over their sequences; as q."""
        keys, values = self._layers[layer]
        if self.follows_tables and batch.decodes:
            from ladderstitch_kernels.ops.decode_attention import paged_decode_attention

            paged = (-1, self.block_tokens, *keys.shape[1:])
            return paged_decode_attention(
                q, keys.view(paged), values.view(paged), batch.pages, batch.lengths
            )
        parts = [
            _attend(q[span.begin : span.end], keys[span.slots], values[span.slots], span)
            for span in batch.spans
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _attend(q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
    """q [T, H, d] over k and v [S, K, d], the last T of S positions -> [T, H, d]."""
    tokens, heads, width = q.shape
    kv_heads = k.shape[1]
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    if tokens == 1:  # the heads of a group are so many queries over the same keys
        grouped = q.reshape(1, kv_heads, heads // kv_heads, width)
        return F.scaled_dot_product_attention(grouped, k, v).reshape(1, heads, width)
    mixed = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k,
        v,
        attn_mask=span.mask,
        is_causal=span.mask is None,
        enable_gqa=heads != kv_heads,
    )
    return mixed[0].transpose(0, 1)
