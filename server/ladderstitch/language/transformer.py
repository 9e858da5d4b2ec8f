"""One rank's forward pass: reads top-down as the model is defined; a scheme is a plan per layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.language.cache import ContiguousCache
from ladderstitch.language.config import LlamaConfig
from ladderstitch.language.link import Link
from ladderstitch.language.residual import LayerPlan, Stream
from ladderstitch.language.rope import rotate, rotation_tables
from ladderstitch.language.sharding import Shard
from ladderstitch.language.weights import LayerWeights, RankWeights
from ladderstitch.models.linear import serving_linear


class Attention:
    """Causal grouped-query attention of one rank's heads: [B, T, D] -> [B, T, H_r d], which
    `output` makes a partial [B, T, D].
    """

    def __init__(
        self, layer: int, weights: LayerWeights, config: LlamaConfig, shard: Shard
    ) -> None:
        self.layer, self.width = layer, config.head_dim
        self.heads, self.kv_heads = len(shard.heads), len(shard.kv_heads)
        self.qkv, self.output = weights.qkv, weights.output
        self.linear = serving_linear(weights.qkv, cached=False)

    def __call__(
        self, x: Tensor, start: int, rotation: tuple[Tensor, Tensor], cache: ContiguousCache
    ) -> Tensor:
        batch, tokens, _ = x.shape
        turned = self.heads + self.kv_heads
        projected = self.linear(x, self.qkv).view(batch, tokens, turned + self.kv_heads, self.width)
        qk = rotate(projected[:, :, :turned], *rotation).transpose(1, 2)  # [B, H_r + K_r, T, d]
        v = projected[:, :, turned:].transpose(1, 2)  # [B, K_r, T, d]
        k, v = cache.append(self.layer, start, qk[:, self.heads :], v)
        mixed = _attend(qk[:, : self.heads], k, v)
        return mixed.reshape(batch, tokens, -1)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H, T, d] over k and v [B, K, S, d], the last T of S positions -> [B, T, H, d]."""
    batch, heads, tokens, width = q.shape
    kv_heads, seen = k.shape[1], k.shape[2]
    if tokens == 1:  # the heads of a group are so many queries over the same keys
        grouped = q.reshape(batch, kv_heads, heads // kv_heads, width)
        return F.scaled_dot_product_attention(grouped, k, v).reshape(batch, 1, heads, width)
    mask = None
    if seen > tokens:
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=q.device).tril(seen - tokens)
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != kv_heads
    )
    return mixed.transpose(1, 2)


class Mlp:
    """SwiGLU over one rank's columns: [B, T, D] -> [B, T, F_r], which `output` makes a partial."""

    def __init__(self, weights: LayerWeights) -> None:
        self.gate_up, self.output = weights.gate_up, weights.down
        self.linear = serving_linear(weights.gate_up, cached=False)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.linear(x, self.gate_up).chunk(2, dim=-1)
        return F.silu(gate) * up


class Transformer:
    """One rank of a language model. It holds weights only: what a call works on (the cache), how
    its stream flows (the plans) and whom it talks to (the link) are arguments.
    """

    def __init__(self, config: LlamaConfig, weights: RankWeights, shard: Shard) -> None:
        self.config, self.weights, self.shard = config, weights, shard
        self.attentions = [Attention(i, w, config, shard) for i, w in enumerate(weights.layers)]
        self.mlps = [Mlp(layer) for layer in weights.layers]
        self._head = serving_linear(weights.head, cached=False)
        dtype, device = weights.norm.dtype, weights.norm.device
        self._rotation = tuple(
            table.to(device, dtype)[:, None]
            for table in rotation_tables(config, config.max_positions)
        )

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        start: int,
        cache: ContiguousCache,
        plans: Sequence[LayerPlan],
        link: Link,
        *,
        last_only: bool = True,
    ) -> Tensor:
        """Logits of this rank's vocabulary rows: [B, V_r] of the last token, or [B, T, V_r].

        `tokens` [B, T] stand at positions start.. of their sequences, whose earlier tokens are in
        the cache. Raises `LinkBroken` if a peer is gone.
        """
        end = start + tokens.shape[1]
        cosines, sines = self._rotation
        rotation = cosines[start:end], sines[start:end]
        stream = Stream(self._embed(tokens, link), link)
        for layer, plan in enumerate(plans):
            self._run_layer(layer, plan, stream, start, rotation, cache)
        x = stream.read()
        if last_only:
            x = x[:, -1]
        return self._head(self._norm(x, self.weights.norm), self.weights.head)

    def _run_layer(
        self,
        layer: int,
        plan: LayerPlan,
        stream: Stream,
        start: int,
        rotation: tuple[Tensor, Tensor],
        cache: ContiguousCache,
    ) -> None:
        weights, eps = self.weights.layers[layer], self.config.norm_eps
        attention, mlp = self.attentions[layer], self.mlps[layer]
        x = stream.read_normed(plan.lag, weights.attention_norm, eps)
        mixed = attention(x, start, rotation, cache)
        if plan.fused:
            stream.add(_partial(attention, mixed) + _partial(mlp, mlp(x)))
            return
        assert weights.ffn_norm is not None, "only fused layers share a norm"
        _add(stream, attention, mixed, plan.reduce and plan.reduce[0])
        x = stream.read_normed(plan.lag, weights.ffn_norm, eps)
        _add(stream, mlp, mlp(x), plan.reduce and plan.reduce[1])

    def _embed(self, tokens: Tensor, link: Link) -> Tensor:
        """[B, T] -> [B, T, D]: each rank knows its rows of the vocabulary, the sum knows all."""
        rows = self.shard.vocabulary
        if self.shard.ranks == 1:
            return F.embedding(tokens, self.weights.embedding)
        mine = (tokens >= rows.start) & (tokens < rows.stop)
        local = (tokens - rows.start).clamp(0, len(rows) - 1)
        part = F.embedding(local, self.weights.embedding) * mine.unsqueeze(-1)
        return link.wait(link.post(part))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)


def _partial(block: Attention | Mlp, x: Tensor) -> Tensor:
    return block.linear(x, block.output)


def _add(stream: Stream, block: Attention | Mlp, x: Tensor, reduce: bool | None) -> None:
    if reduce is None:
        stream.add_product(x, block.output, block.linear)
    else:
        stream.add_desynchronised(_partial(block, x), reduce=reduce)
