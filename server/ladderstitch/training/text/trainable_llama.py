"""A language model that gradients flow through: whole sequences, no cache, no ranks.

The residual schemes are those of `language.residual`, spelled out for one rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladderstitch.text.model.config import LlamaConfig
from ladderstitch.text.model.llama import rotate, rotation_tables
from ladderstitch.text.model.residual import LayerPlan
from ladderstitch.text.model.weights import EMBEDDING, FINAL_NORM, HEAD


@dataclass(frozen=True, slots=True)
class StreamState:
    """The residual stream between two layers: without its last sub-block's output, and that
    output; both [B, T, D]. What comes after a layer depends on nothing else."""

    settled: Tensor
    last: Tensor

    @property
    def whole(self) -> Tensor:
        return self.settled + self.last


class TrainableLlama:
    """Tensors by their names in the Hugging Face layout, and what they compute.

    `adapters` change some of them; everything is an argument but the tensors. The stream is in
    float32; matrices may be in bfloat16 under `torch.autocast`.
    """

    def __init__(self, config: LlamaConfig, tensors: Mapping[str, Tensor]) -> None:
        self.config, self.tensors = config, tensors
        cosines, sines = rotation_tables(config, config.max_positions)
        self._rotation = cosines[:, None], sines[:, None]

    def embed(self, tokens: Tensor) -> StreamState:
        """[B, T] -> the stream before the first layer."""
        x = F.embedding(tokens, self.tensors[EMBEDDING]).float()
        return StreamState(x, torch.zeros_like(x))

    def run(
        self,
        flow: StreamState,
        layers: Sequence[int],
        plans: Sequence[LayerPlan],
        adapters: Mapping[str, LowRank] | None = None,
    ) -> StreamState:
        """Through some layers in order; `plans` are those of all layers."""
        adapters = adapters or {}
        for layer in layers:
            plan, prefix = plans[layer], f"model.layers.{layer}."
            for norm, block in (
                ("input_layernorm", self._attention),
                ("post_attention_layernorm", self._mlp),
            ):
                whole = flow.whole
                seen = flow.settled if plan.lag else whole
                gain = self._gain(f"{prefix}{norm}.weight", adapters)
                normed = F.rms_norm(seen, gain.shape, gain, self.config.norm_eps)
                flow = StreamState(whole, block(normed, prefix, adapters))
        return flow

    def finish(self, flow: StreamState) -> Tensor:
        """The stream after the last layer, normed: [B, T, D], what `head` reads."""
        gain = self.tensors[FINAL_NORM]
        return F.rms_norm(flow.whole, gain.shape, gain, self.config.norm_eps)

    @property
    def head(self) -> Tensor:
        """[V, D]."""
        return self.tensors[EMBEDDING if self.config.tied_head else HEAD]

    def logits(
        self,
        tokens: Tensor,
        plans: Sequence[LayerPlan],
        adapters: Mapping[str, LowRank] | None = None,
    ) -> Tensor:
        """[B, T] -> [B, T, V]."""
        flow = self.run(self.embed(tokens), range(self.config.layers), plans, adapters)
        return F.linear(self.finish(flow), self.head)

    def _attention(self, x: Tensor, prefix: str, adapters: Mapping[str, LowRank]) -> Tensor:
        config, (batch, tokens, _) = self.config, x.shape
        q, k, v = (
            self._linear(x, f"{prefix}self_attn.{name}_proj.weight", adapters).view(
                batch, tokens, -1, config.head_dim
            )
            for name in "qkv"
        )
        rotation = tuple(table[:tokens].to(x.dtype) for table in self._rotation)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=config.heads != config.kv_heads,
        )
        joined = mixed.transpose(1, 2).flatten(2)
        return self._linear(joined, f"{prefix}self_attn.o_proj.weight", adapters)

    def _mlp(self, x: Tensor, prefix: str, adapters: Mapping[str, LowRank]) -> Tensor:
        gate = self._linear(x, f"{prefix}mlp.gate_proj.weight", adapters)
        up = self._linear(x, f"{prefix}mlp.up_proj.weight", adapters)
        return self._linear(F.silu(gate) * up, f"{prefix}mlp.down_proj.weight", adapters)

    def _linear(self, x: Tensor, name: str, adapters: Mapping[str, LowRank]) -> Tensor:
        product = F.linear(x, self.tensors[name])
        adapter = adapters.get(name)
        return product if adapter is None else product + adapter(x)

    def _gain(self, name: str, adapters: Mapping[str, LowRank]) -> Tensor:
        adapter = adapters.get(name)
        return self.tensors[name] if adapter is None else self.tensors[name] + adapter.offset()


class LowRank(nn.Module):
    """up [N, r] @ down [r, K] beside a matrix [N, K]; of a vector [N], `up` alone.

    It begins as nothing: `up` is zero.
    """

    def __init__(self, shape: Sequence[int], rank: int, random: torch.Generator) -> None:
        super().__init__()
        self.down: nn.Parameter | None = None
        if len(shape) == 1:
            self.up = nn.Parameter(torch.zeros(shape[0]))
            return
        height, width = shape
        self.up = nn.Parameter(torch.zeros(height, rank))
        self.down = nn.Parameter(torch.randn(rank, width, generator=random) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] through the addition: [.., N]."""
        assert self.down is not None, "vectors have no product"
        return F.linear(F.linear(x, self.down), self.up)

    def offset(self) -> Tensor:
        """The addition itself, in the tensor's shape."""
        return self.up if self.down is None else self.up @ self.down
