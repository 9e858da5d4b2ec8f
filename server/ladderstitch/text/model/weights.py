"""One rank's tensors of a Llama checkpoint, read slice by slice and fused for few large products.

Names are those of the Hugging Face layout. Nothing but the rank's share is ever in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ladderstitch.bundles import check_tensors
from ladderstitch.errors import ConfigError
from ladderstitch.runtime.linear import pack
from ladderstitch.text.model.config import LlamaConfig
from ladderstitch.text.model.weight_reader import Weights

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """H_r query and K_r key/value heads of width d, F_r feed-forward columns; model width D.

    Matrices may be packed (`models.linear.pack`): only `serving_linear` reads those.
    """

    attention_norm: Tensor  # [D]
    qkv: Tensor  # [(H_r + 2 K_r) d, D]: queries, keys, values
    output: Tensor  # [D, H_r d]
    ffn_norm: Tensor | None  # [D]; none where attention and MLP share a norm
    gate_up: Tensor  # [2 F_r, D]
    down: Tensor  # [D, F_r]


@dataclass(frozen=True, slots=True)
class RankWeights:
    """Everything that one rank holds; V_r vocabulary rows."""

    embedding: Tensor  # [V_r, D]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [D]
    head: Tensor  # [V_r, D]; the embedding itself if tied

    def bytes(self) -> int:
        """Memory of the weights, a tied head counted once."""
        tensors = {self.embedding, self.norm, self.head}
        for layer in self.layers:
            tensors |= {layer.attention_norm, layer.qkv, layer.output, layer.gate_up, layer.down}
            if layer.ffn_norm is not None:
                tensors.add(layer.ffn_norm)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def expected_shapes(
    config: LlamaConfig, *, shared_norm: bool = False
) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this model holds."""
    d, width, ffn = config.head_dim, config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, width)}
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (width,),
            prefix + "self_attn.q_proj.weight": (config.heads * d, width),
            prefix + "self_attn.k_proj.weight": (config.kv_heads * d, width),
            prefix + "self_attn.v_proj.weight": (config.kv_heads * d, width),
            prefix + "self_attn.o_proj.weight": (width, config.heads * d),
            prefix + "mlp.gate_proj.weight": (ffn, width),
            prefix + "mlp.up_proj.weight": (ffn, width),
            prefix + "mlp.down_proj.weight": (width, ffn),
        }
        if not shared_norm:
            shapes[prefix + "post_attention_layernorm.weight"] = (width,)
    shapes[FINAL_NORM] = (width,)
    if not config.tied_head:
        shapes[HEAD] = (config.vocab_size, width)
    return shapes


def check_weights(weights: Weights, config: LlamaConfig, *, shared_norm: bool = False) -> None:
    """Raise `BundleError` that names every missing, unknown and mis-shaped tensor."""
    expected, found = expected_shapes(config, shared_norm=shared_norm), set(weights.names())
    found -= {name for name in found if name.endswith("rotary_emb.inv_freq")}
    if config.tied_head:
        found.discard(HEAD)
    check_tensors(expected, {name: weights.shape(name) for name in found}, where="weights")


def load_rank(
    weights: Weights,
    config: LlamaConfig,
    shard: Shard,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    shared_norm: bool = False,
) -> RankWeights:
    """Read one rank's share. Raises `BundleError` naming every tensor that is wrong."""
    check_weights(weights, config, shared_norm=shared_norm)

    def whole(name: str) -> Tensor:
        return weights.read(name).to(device, dtype)

    def vocabulary(name: str) -> Tensor:
        return weights.read(name, rows=shard.vocabulary).to(device, dtype)

    embedding = vocabulary(EMBEDDING)
    layers = [
        load_layer(weights, layer, config, shard, dtype, device, shared_norm=shared_norm)
        for layer in range(config.layers)
    ]
    head = embedding if config.tied_head else pack(vocabulary(HEAD))
    return RankWeights(embedding, tuple(layers), whole(FINAL_NORM), head)


def load_layer(
    weights: Weights,
    layer: int,
    config: LlamaConfig,
    shard: Shard,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    shared_norm: bool = False,
) -> LayerWeights:
    """One rank's share of one layer."""
    d, prefix = config.head_dim, f"model.layers.{layer}."
    queries = range(shard.heads.start * d, shard.heads.stop * d)
    kv_rows = [range(head * d, (head + 1) * d) for head in shard.kv_heads]

    def norm(name: str) -> Tensor:
        return weights.read(prefix + name).to(device, dtype)

    def rows(*parts: tuple[str, Sequence[range]]) -> Tensor:
        height = sum(len(part) for _, ranges in parts for part in ranges)
        fused = torch.empty(height, config.hidden_size, dtype=dtype, device=device)
        at = 0
        for name, ranges in parts:
            for part in ranges:
                fused[at : at + len(part)] = weights.read(f"{prefix}{name}.weight", rows=part)
                at += len(part)
        return pack(fused)

    def columns(name: str, part: range) -> Tensor:
        read = weights.read(f"{prefix}{name}.weight", columns=part)
        return pack(read.to(device, dtype).contiguous())

    return LayerWeights(
        attention_norm=norm("input_layernorm.weight"),
        qkv=rows(
            ("self_attn.q_proj", [queries]),
            ("self_attn.k_proj", kv_rows),
            ("self_attn.v_proj", kv_rows),
        ),
        output=columns("self_attn.o_proj", queries),
        ffn_norm=None if shared_norm else norm("post_attention_layernorm.weight"),
        gate_up=rows(("mlp.gate_proj", [shard.ffn]), ("mlp.up_proj", [shard.ffn])),
        down=columns("mlp.down_proj", shard.ffn),
    )


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank r's share of a model split over R ranks.

    `heads` are its query heads; `kv_heads` lists the key/value heads that it holds, each of which
    serves `len(heads) / len(kv_heads)` consecutive query heads.
    """

    rank: int
    ranks: int
    heads: range
    kv_heads: tuple[int, ...]
    ffn: range
    vocabulary: range

    @classmethod
    def of(cls, config: LlamaConfig, rank: int, ranks: int) -> Shard:
        """Raises `ConfigError` with the reason if the heads cannot be split so.

        Up to as many ranks as KV groups, whole groups are split, unevenly if need be (9 query and
        3 KV heads on 2 ranks: 2 + 1 groups). Beyond that, KV heads are replicated.
        """
        if not 0 <= rank < ranks:
            raise ConfigError(f"rank: expected 0 to {ranks - 1}, got {rank}")
        group = config.heads // config.kv_heads
        if ranks <= config.kv_heads:
            groups = _part(config.kv_heads, rank, ranks)
            heads = range(groups.start * group, groups.stop * group)
            kv_heads = tuple(groups)
        elif config.heads % ranks == 0:
            heads = _part(config.heads, rank, ranks)
            kv_heads = _replicated(heads, group)
        else:
            raise ConfigError(
                f"ranks: expected at most {config.kv_heads} (the KV heads) or a divisor of "
                f"{config.heads} (the query heads), got {ranks}"
            )
        ffn, vocabulary = (
            _part(size, rank, ranks) for size in (config.intermediate_size, config.vocab_size)
        )
        return cls(rank, ranks, heads, kv_heads, ffn, vocabulary)


def _part(size: int, rank: int, ranks: int) -> range:
    """Contiguous, in rank order; the first ranks get one more where it does not divide."""
    share, rest = divmod(size, ranks)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))


def _replicated(heads: range, group: int) -> tuple[int, ...]:
    """One KV head for each run of heads that share it; one a query head if runs are uneven."""
    serving = [head // group for head in heads]
    distinct = tuple(dict.fromkeys(serving))
    even = all(serving.count(kv) * len(distinct) == len(serving) for kv in distinct)
    return distinct if even else tuple(serving)
