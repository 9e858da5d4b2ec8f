"""A trainable language model: it runs whole sequences, without a KV cache and without ranks.

The residual schemes are those of `text.model.residual`, written for one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ladderstitch.errors import ConfigError
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.residual import LayerPlan, split_groups
from ladderstitch.text.model.rotation import rotate, rotation_tables
from ladderstitch.text.model.weight_reader import EMBEDDING, HEAD
from ladderstitch.text.model.weights import FINAL_NORM

ATTENTION_NORM, MLP_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"


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

    def read(self, lag: int) -> Tensor:
        """Return the stream as a sub-block reads it: without the last one if it lags."""
        return self.lagged if lag else self.full


@dataclass(frozen=True, slots=True)
class Context:
    """What T tokens of a run see of S tokens, some of which are not in the run.

    `positions` [T] are those of the run's tokens in the text. `exchange` returns keys and values
    [B, S, K, d] of all tokens that are seen, from those [B, T, K, d] of the run. `mask` [T, S] is
    true where a token sees another.
    """

    positions: Tensor
    exchange: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    mask: Tensor


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
        context: Context | None = None,
    ) -> StreamState:
        """Return the stream after these layers, in order; `plans` has an entry for every layer.

        Without a context, each token sees those before it, from position 0 on.
        """
        adapters = adapters or {}
        for group in split_groups(layers, plans):
            if plans[group[0]].fused:
                both = self.parallel_layer(stream.full, group[0], adapters, context)
                stream = StreamState(stream.full, both)
                continue
            prefixes, lag = [f"model.layers.{layer}." for layer in group], plans[group[0]].lag
            read = stream.read(lag)
            mixed = (
                self._attention(
                    self._normed(read, f"{prefix}{ATTENTION_NORM}", adapters),
                    prefix,
                    adapters,
                    context,
                )
                for prefix in prefixes
            )
            stream = StreamState(stream.full, _total(mixed))
            read = stream.read(lag)
            normed = (self._normed(read, f"{p}{MLP_NORM}", adapters) for p in prefixes)
            outputs = (self._mlp(x, p, adapters) for x, p in zip(normed, prefixes, strict=True))
            stream = StreamState(stream.full, _total(outputs))
        return stream

    def parallel_layer(
        self,
        x: Tensor,
        layer: int,
        adapters: Mapping[str, LowRank],
        context: Context | None = None,
    ) -> Tensor:
        """Return attention plus MLP of the norm that both share, [B, T, D] (parallel)."""
        prefix = f"model.layers.{layer}."
        normed = self._normed(x, f"{prefix}{ATTENTION_NORM}", adapters)
        attended = self._attention(normed, prefix, adapters, context)
        return attended + self._mlp(normed, prefix, adapters)

    def attention_input(self, x: Tensor, layer: int) -> Tensor:
        """Return the normed stream [B, T, D] that a layer's attention multiplies."""
        return self._normed(x, f"model.layers.{layer}.{ATTENTION_NORM}", {})

    def mlp_input(self, x: Tensor, layer: int) -> Tensor:
        """Return the normed stream [B, T, D] that a layer's MLP multiplies."""
        return self._normed(x, f"model.layers.{layer}.{MLP_NORM}", {})

    def attention(
        self, x: Tensor, layer: int, adapters: Mapping[str, LowRank] | None = None
    ) -> Tensor:
        """Return the output [B, T, D] of a layer's attention for the stream [B, T, D]."""
        prefix, adapters = f"model.layers.{layer}.", adapters or {}
        normed = self._normed(x, f"{prefix}{ATTENTION_NORM}", adapters)
        return self._attention(normed, prefix, adapters, None)

    def mlp(self, x: Tensor, layer: int) -> Tensor:
        """Return the output [B, T, D] of a layer's MLP for the stream [B, T, D]."""
        return self._mlp(self.mlp_input(x, layer), f"model.layers.{layer}.", {})

    def keys_values(self, read: Tensor, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotated keys and the values [B, T, K, d] of a layer.

        `read` [B, T, D] is the stream as the layer's attention reads it (`StreamState.read`), of
        tokens at `positions` [T].
        """
        prefix = f"model.layers.{layer}."
        normed = self.attention_input(read, layer)
        keys, values = (self._heads(normed, prefix, name, {}) for name in "kv")
        return self._rotate(keys, positions), values

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

    def _attention(
        self, x: Tensor, prefix: str, adapters: Mapping[str, LowRank], context: Context | None
    ) -> Tensor:
        """Return the causal attention's output [B, T, D] for the normed stream [B, T, D]."""
        q, k, v = (self._heads(x, prefix, name, adapters) for name in "qkv")
        positions = torch.arange(x.shape[1]) if context is None else context.positions
        q, k = self._rotate(q, positions), self._rotate(k, positions)
        if context is not None:
            k, v = context.exchange(k, v)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if context is None else context.mask,
            is_causal=context is None,
            enable_gqa=self.config.heads != self.config.kv_heads,
        )
        joined = mixed.transpose(1, 2).flatten(2)
        return self._linear(joined, f"{prefix}self_attn.o_proj.weight", adapters)

    def _heads(self, x: Tensor, prefix: str, name: str, adapters: Mapping[str, LowRank]) -> Tensor:
        """Return the queries, keys or values (`name` q, k or v) [B, T, H, d] before rotation."""
        product = self._linear(x, f"{prefix}self_attn.{name}_proj.weight", adapters)
        return product.view(*product.shape[:-1], -1, self.config.head_dim)

    def _rotate(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Return heads [B, T, H, d] rotated by their positions [T]."""
        cosines, sines = (table[positions].to(heads.dtype) for table in self._rotation)
        return rotate(heads, cosines, sines)

    def _normed(self, x: Tensor, name: str, adapters: Mapping[str, LowRank]) -> Tensor:
        """Return the RMS norm of x [.., D] with the named weight."""
        gain = self._gain(name, adapters)
        return F.rms_norm(x, gain.shape, gain, self.config.norm_eps)

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


def _total(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum of at least one tensor; of one, the tensor itself."""
    return reduce(torch.add, parts)


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

    @torch.no_grad()
    def set_product(self, addition: Tensor, root: Tensor) -> None:
        """Set up @ down to the nearest matrix to `addition` [N, K] that has the rank.

        Near are those whose products with inputs are, where `root` [K, K] is the Cholesky factor of
        the inputs' second moments. Up and down get columns and rows of equal norms.
        """
        assert self.down is not None, "expected the adapter of a matrix, got that of a vector"
        left, sizes, right = torch.linalg.svd(addition @ root, full_matrices=False)
        rank = min(len(self.down), len(sizes))
        up = left[:, :rank] * sizes[:rank]
        down = torch.linalg.solve_triangular(root, right[:rank], upper=False, left=False)
        balance = (down.norm(dim=1) / up.norm(dim=0).clamp_min(1e-12)).sqrt()
        self.up[:, :rank] = up * balance
        self.down[:rank] = down / balance[:, None]

    def offset(self) -> Tensor:
        """Return the addition in the tensor's shape."""
        return self.up if self.down is None else self.up @ self.down
