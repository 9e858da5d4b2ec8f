"""A trainable language model: it runs whole sequences, without a KV cache and without ranks.

The residual schemes are those of `text.model.residual`, written for one rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladderstitch.errors import ConfigError
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.residual import LayerPlan
from ladderstitch.text.model.rotation import rotate, rotation_tables
from ladderstitch.text.model.weight_reader import EMBEDDING, HEAD
from ladderstitch.text.model.weights import FINAL_NORM


@dataclass(frozen=True, slots=True)
class StreamState:
    """The residual stream [B, T, D] between two layers.

    `lagged` is the stream without the last sub-block's output, `last` is that output. Later layers
    depend on nothing else.
    """

    lagged: Tensor
    last: Tensor

    @property
    def full(self) -> Tensor:
        """The stream with the last sub-block's output."""
        return self.lagged + self.last


class TrainableLlama:
    """A Llama model over tensors by their names in the Hugging Face layout.

    Residual plans and adapters are arguments of each call, never state; an adapter adds to the
    tensor of its name. The stream is in float32; matrices may be in bfloat16 under
    `torch.autocast`.
    """

    def __init__(self, config: DecoderConfig, tensors: Mapping[str, Tensor]) -> None:
        if not config.is_llama:
            raise ConfigError(
                "config: expected Llama's layers, the only ones that can be trained, got others"
            )
        self.config, self.tensors = config, tensors
        cosines, sines = rotation_tables(config, config.max_positions)
        self._rotation = cosines[:, None], sines[:, None]

    def embed(self, tokens: Tensor) -> StreamState:
        """Return the stream before the first layer for tokens [B, T]."""
        x = F.embedding(tokens, self.tensors[EMBEDDING]).float()
        return StreamState(x, torch.zeros_like(x))

    def run(
        self,
        stream: StreamState,
        layers: Sequence[int],
        plans: Sequence[LayerPlan],
        adapters: Mapping[str, LowRank] | None = None,
    ) -> StreamState:
        """Return the stream after these layers, in order; `plans` has an entry for every layer."""
        adapters = adapters or {}
        for layer in layers:
            plan, prefix = plans[layer], f"model.layers.{layer}."
            for norm, block in (
                ("input_layernorm", self._attention),
                ("post_attention_layernorm", self._mlp),
            ):
                full = stream.full
                x = stream.lagged if plan.lag else full
                gain = self._gain(f"{prefix}{norm}.weight", adapters)
                normed = F.rms_norm(x, gain.shape, gain, self.config.norm_eps)
                stream = StreamState(full, block(normed, prefix, adapters))
        return stream

    def final_hidden(self, stream: StreamState) -> Tensor:
        """Return the normed stream [B, T, D] after the last layer, the input of `head`."""
        gain = self.tensors[FINAL_NORM]
        return F.rms_norm(stream.full, gain.shape, gain, self.config.norm_eps)

    @property
    def head(self) -> Tensor:
        """Weight [V, D] of the output layer."""
        return self.tensors[EMBEDDING if self.config.tied_head else HEAD]

    def logits(
        self,
        tokens: Tensor,
        plans: Sequence[LayerPlan],
        adapters: Mapping[str, LowRank] | None = None,
    ) -> Tensor:
        """Return the logits [B, T, V] of tokens [B, T]."""
        stream = self.run(self.embed(tokens), range(self.config.layers), plans, adapters)
        return F.linear(self.final_hidden(stream), self.head)

    def _attention(self, x: Tensor, prefix: str, adapters: Mapping[str, LowRank]) -> Tensor:
        """Return the causal attention's output [B, T, D] for the normed stream [B, T, D]."""
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
        """Return the MLP's output [B, T, D] for the normed stream [B, T, D]."""
        gate = self._linear(x, f"{prefix}mlp.gate_proj.weight", adapters)
        up = self._linear(x, f"{prefix}mlp.up_proj.weight", adapters)
        return self._linear(F.silu(gate) * up, f"{prefix}mlp.down_proj.weight", adapters)

    def _linear(self, x: Tensor, name: str, adapters: Mapping[str, LowRank]) -> Tensor:
        """Return x [.., K] times the named matrix [N, K] and its adapter."""
        product = F.linear(x, self.tensors[name])
        adapter = adapters.get(name)
        return product if adapter is None else product + adapter(x)

    def _gain(self, name: str, adapters: Mapping[str, LowRank]) -> Tensor:
        """Return the named norm weight [D] with its adapter."""
        adapter = adapters.get(name)
        return self.tensors[name] if adapter is None else self.tensors[name] + adapter.offset()


class LowRank(nn.Module):
    """A low-rank addition (LoRA) to a tensor, initially zero.

    The addition to a matrix [N, K] is up [N, r] @ down [r, K]. The addition to a vector [N] is `up`
    alone, with one entry per element.
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
        """Return the addition's product [.., N] with x [.., K]; only for matrices."""
        assert self.down is not None, "expected the adapter of a matrix, got that of a vector"
        return F.linear(F.linear(x, self.down), self.up)

    def offset(self) -> Tensor:
        """Return the addition in the tensor's shape."""
        return self.up if self.down is None else self.up @ self.down
