"""Attention over a paged cache of keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.text.model.batch import Batch, Span
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.onnx_attention import Array, OnnxAttention
from ladderstitch.text.model.shard import Shard


class PagedCache:
    """The paged cache of one rank: [layers, 2, blocks, P, K_r, d].

    A block has P tokens; the rank has K_r key/value heads of width d. Source: paged attention
    (arXiv 2309.06180). On a GPU, kernels write the slots and read the block table. On a CPU, each
    sequence is attended to by itself, so that it reads no memory of others and has the same bits in
    every batch; blocks that are not adjacent are copied first.
    """

    def __init__(
        self,
        config: DecoderConfig,
        shard: Shard,
        blocks: int,
        block_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        threads: int = 1,
        planes: int | None = None,
        query_heads: Sequence[int] = (),
    ) -> None:
        """Allocate the cache; attention on a CPU uses `threads`, those of ONNX Runtime.

        A family of several anchors has more `planes` than layers, and anchors with other numbers of
        `query_heads` on this rank.
        """
        kv_heads, planes = len(shard.kv_heads), planes or config.layers
        shape = (planes, 2, blocks * block_tokens, kv_heads, config.head_dim)
        self._memory = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = [(layer[0], layer[1]) for layer in self._memory.unbind(0)]
        self.block_tokens = block_tokens
        self._slopes: Tensor | None = None
        if config.alibi_slopes is not None:
            slopes = config.alibi_slopes[shard.heads.start : shard.heads.stop]
            self._slopes = torch.tensor(slopes, device=device)
        self._attentions: dict[int, OnnxAttention] = {}
        self._arrays: list[tuple[Array, Array]] = []
        if self._memory.device.type == "cpu" and dtype == torch.float32:
            softcap = config.attention_softcap or 0.0
            per_head = None if self._slopes is None else self._slopes.numpy()
            self._attentions = {
                heads: OnnxAttention(heads, kv_heads, config.head_dim, threads, softcap, per_head)
                for heads in {len(shard.heads), *query_heads}
            }
            self._arrays = [(keys, values) for keys, values in self._memory.flatten(3).numpy()]
        self.uses_kernels = self._memory.is_cuda
        self._softcap = config.attention_softcap
        self._windows = [config.window_of(plane % config.layers) for plane in range(planes)]

    @property
    def bytes(self) -> int:
        """Memory of the cache in bytes."""
        return self._memory.nbytes

    def append(self, layer: int, batch: Batch, k: Tensor, v: Tensor) -> None:
        """Store the new tokens' k and v, both [T, K_r, d], in the slots of their blocks."""
        keys, values = self._layers[layer]
        keys[batch.new_slots] = k.to(keys.dtype)
        values[batch.new_slots] = v.to(values.dtype)

    def has_finite_slots(self, batch: Batch, planes: Sequence[int] | None = None) -> Tensor:
        """Return [T] bool: whether the keys and values of each new token are finite.

        `planes` are those that were written, unset: all. Others read only blocks whose tokens are
        finite: a masked position has the weight 0, and 0 times infinity is NaN.
        """
        written = self._memory[:, :, batch.new_slots]  # before planes, which are copied
        if planes is not None:
            written = written[list(planes)]
        return written.abs().amax(dim=(0, 1, 3, 4)).isfinite()

    def onnx_attention(self, query_heads: int) -> OnnxAttention | None:
        """Return the attention of that many query heads in ONNX Runtime; None: torch computes."""
        return self._attentions.get(query_heads)

    def arrays(self, layer: int) -> tuple[Array, Array]:
        """Return the keys and the values of a layer, [slots, K_r d], as arrays in the same memory.

        For float32 caches on a CPU only.
        """
        return self._arrays[layer]

    def rotate_and_append(
        self, layer: int, batch: Batch, qkv: Tensor, tables: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the rotated queries [T, H_r, d] of qkv [T, H_r + 2 K_r, d], and store the rest.

        One kernel rotates queries and keys by `tables`, cosines and sines [positions, d / 2], and
        stores keys and values like `append`.
        """
        from ladderstitch_kernels.ops.rope_append import rope_append

        return rope_append(
            qkv, *tables, batch.positions, batch.new_slot_numbers, *self._pages(layer)
        )

    def attend(self, layer: int, batch: Batch, q: Tensor) -> Tensor:
        """Return the causal attention of queries q [T, H_r, d] over their sequences; as q.

        It is computed in the cache's dtype, which paths of other dtypes share.
        """
        (keys, values), window = self._layers[layer], self._windows[layer]
        has_plain_scores = self._softcap is None and self._slopes is None
        is_plain = window is None and has_plain_scores
        if self.uses_kernels and batch.is_decode_only and is_plain:
            from ladderstitch_kernels.ops.decode_attention import paged_decode_attention

            pages = self._pages(layer)
            return paged_decode_attention(q, *pages, batch.block_table, batch.sequence_lengths)
        if (attention := self.onnx_attention(q.shape[1])) is not None:
            queries = q.float().numpy().reshape(1, len(q), -1)
            attended = attention.attend(batch.cache_index(window), queries, *self._arrays[layer])
            return torch.from_numpy(attended).view(q.shape).to(q.dtype)
        parts = []
        for span in batch.sequences(window):
            part = q[span.begin : span.end].to(keys.dtype)
            k, v = keys[span.slots], values[span.slots]
            if has_plain_scores:
                parts.append(_attend_span(part, k, v, span))
            else:
                parts.append(_attend_by_scores(part, k, v, span, self._softcap, self._slopes))
        return torch.cat(parts).to(q.dtype)

    def _pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of a layer by block, both [blocks, P, K_r, d]."""
        keys, values = self._layers[layer]
        paged = (-1, self.block_tokens, *keys.shape[1:])
        return keys.view(paged), values.view(paged)


def _attend_span(q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
    """Return the attention of q [T, H_r, d], the last T of S positions, over k, v [S, K_r, d]."""
    tokens, heads, width = q.shape
    kv_heads = k.shape[1]
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    if tokens == 1:  # the heads of a KV group are independent queries over the same keys
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


def _attend_by_scores(
    q: Tensor, k: Tensor, v: Tensor, span: Span, softcap: float | None, slopes: Tensor | None
) -> Tensor:
    """Return the attention as `_attend_span` does, in float32.

    Scores are capped, and lose `slopes` [H_r] per token of distance.
    """
    tokens, heads, width = q.shape
    grouped = q.float().view(tokens, k.shape[1], -1, width)
    scores = soft_cap(torch.einsum("tkgd,skd->kgts", grouped, k.float()) * width**-0.5, softcap)
    if slopes is not None:
        places = torch.arange(1 - len(k), 1, device=q.device)
        ago = places - places[-tokens:, None]  # [T, S], at most 0 for what a token sees
        scores = scores + slopes.view(k.shape[1], -1, 1, 1) * ago
    mask = span.mask
    if mask is None and tokens > 1:
        mask = torch.ones(tokens, len(k), dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    mixed = torch.einsum("kgts,skd->tkgd", scores.softmax(-1), v.float())
    return mixed.reshape(tokens, heads, width).to(q.dtype)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Return cap * tanh(x / cap), which lies between -cap and cap; x itself without a cap."""
    return x if cap is None else cap * torch.tanh(x / cap)
