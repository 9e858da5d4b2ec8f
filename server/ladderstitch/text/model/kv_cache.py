"""Keys and values of the tokens seen so far, in blocks that sequences hold by table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.text.model.attention_batch import Batch, Group, Span
from ladderstitch.text.model.config import LlamaConfig
from ladderstitch.text.model.weights import Shard


class PagedCache:
    """[layers, 2, blocks, P, K_r, d]: blocks of P tokens, this rank's K_r key/value heads.

    Paged attention (arXiv 2309.06180). On a CPU blocks are gathered, but for a sequence by itself
    whose blocks are neighbours; on a GPU a kernel follows the block table.
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
        self._gathered = (self._memory.new_empty(0), self._memory.new_empty(0))
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
        mixed = torch.empty_like(q)
        for group in batch.groups:
            mixed[group.rows] = self._attend_together(keys, values, q[group.rows], group)
        for span in batch.spans:
            rows = slice(span.begin, span.end)
            mixed[rows] = _attend(q[rows], keys[span.slots], values[span.slots], span)
        return mixed

    def _attend_together(self, keys: Tensor, values: Tensor, q: Tensor, group: Group) -> Tensor:
        """q [b, H, d] over the group's blocks; as q."""
        count, heads, width = q.shape
        kv_heads = keys.shape[1]
        k, v = (
            self._gather(side, cached, group.blocks).view(count, -1, kv_heads, width)
            for side, cached in enumerate((keys, values))
        )
        grouped = q.reshape(count, kv_heads, heads // kv_heads, width)
        unseen = group.unseen.to(q.dtype)
        mixed = F.scaled_dot_product_attention(
            grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=unseen
        )
        return mixed.reshape(q.shape)

    def _gather(self, side: int, cached: Tensor, blocks: Tensor) -> Tensor:
        """Blocks side by side, in memory that the next layer uses again."""
        paged = cached.view(-1, self.block_tokens * cached[0].numel())
        size = len(blocks) * paged.shape[1]
        if len(self._gathered[side]) < size:
            self._gathered = (cached.new_empty(size), cached.new_empty(size))
        out = self._gathered[side][:size].view(len(blocks), -1)
        return torch.index_select(paged, 0, blocks, out=out)


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
