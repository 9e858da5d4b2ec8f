"""One rank's shard of a checkpoint: which part it is, its tensors, and how they are read.

Tensor names are those of the Hugging Face layout. Related matrices are fused into one, so that a
layer has few large products. Only the rank's shard is ever in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ladderstitch.bundles import check_tensors
from ladderstitch.errors import ConfigError
from ladderstitch.runtime.linear import Matrix, store
from ladderstitch.runtime.low_bit import quantise
from ladderstitch.text.model.config import LlamaConfig
from ladderstitch.text.model.weight_reader import EMBEDDING, HEAD, Weights

FINAL_NORM = "model.norm.weight"
VOCABULARY_BITS = 8
"""Bits per weight of embedding and head where layers have 4 or 8: these two need more than 4."""

FINE_BITS = 8
"""Bits per weight of the layers with which those products round activations to 16 bits that read
the residual stream: they cause most of the error of 8 bits, and the time of 16 is the smallest."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The tensors of one layer on one rank.

    The rank has H_r query and K_r key/value heads of width d and F_r feed-forward columns; the
    model width is D. `runtime.linear.open_product` multiplies with the matrices.
    """

    attention_norm: Tensor  # [D]
    qkv: Matrix  # [(H_r + 2 K_r) d, D]: queries, keys, values
    output: Matrix  # [D, H_r d]
    ffn_norm: Tensor | None  # [D]; none where attention and MLP share a norm
    gate_up: Matrix  # [2 F_r, D]
    down: Matrix  # [D, F_r]


@dataclass(frozen=True, slots=True)
class RankWeights:
    """All tensors of one rank, which has V_r rows of the vocabulary."""

    embedding: Matrix  # [V_r, D]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [D]
    head: Matrix  # [V_r, D]; the embedding itself if tied

    def bytes(self) -> int:
        """Return the memory of the weights in bytes; a tied head counts once."""
        found: set[Matrix | None] = {self.embedding, self.norm, self.head}
        for layer in self.layers:
            found |= {layer.attention_norm, layer.qkv, layer.output, layer.gate_up, layer.down}
            found.add(layer.ffn_norm)
        return sum(matrix.nbytes for matrix in found if matrix is not None)


def expected_shapes(
    config: LlamaConfig, *, shared_norm: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a checkpoint of this model has."""
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
    """Raise `BundleError` naming every missing, unknown and mis-shaped tensor."""
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
    bits: int | None = None,
) -> RankWeights:
    """Return one rank's tensors; raises `BundleError` naming every tensor that does not fit.

    With `bits` (4 or 8), each weight of the layers' matrices has that many; embedding and head
    have 8, and norms are of `dtype`.
    """
    check_weights(weights, config, shared_norm=shared_norm)

    def whole(name: str) -> Tensor:
        return weights.read(name).to(device, dtype)

    def vocabulary(name: str) -> Tensor:
        return weights.read(name, rows=shard.vocabulary).to(device, dtype)

    vocabulary_bits, is_fine = None if bits is None else VOCABULARY_BITS, bits == FINE_BITS
    rows = vocabulary(EMBEDDING)
    embedding = (
        rows if vocabulary_bits is None else quantise(rows, vocabulary_bits, is_fine=is_fine)
    )
    layers = [
        load_layer(
            weights,
            layer,
            config,
            shard,
            dtype,
            device,
            shared_norm=shared_norm,
            bits=bits,
        )
        for layer in range(config.layers)
    ]
    head = embedding
    if not config.tied_head:
        head = store(vocabulary(HEAD), vocabulary_bits, is_fine=is_fine)
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
    bits: int | None = None,
) -> LayerWeights:
    """Return one rank's tensors of one layer, as `load_rank` does."""
    d, prefix = config.head_dim, f"model.layers.{layer}."
    queries = range(shard.heads.start * d, shard.heads.stop * d)
    kv_rows = [range(head * d, (head + 1) * d) for head in shard.kv_heads]

    def norm(name: str) -> Tensor:
        return weights.read(prefix + name).to(device, dtype)

    def rows(*parts: tuple[str, Sequence[range]]) -> Matrix:
        height = sum(len(part) for _, ranges in parts for part in ranges)
        fused = torch.empty(height, config.hidden_size, dtype=dtype, device=device)
        at = 0
        for name, ranges in parts:
            for part in ranges:
                fused[at : at + len(part)] = weights.read(f"{prefix}{name}.weight", rows=part)
                at += len(part)
        return store(fused, bits, is_fine=bits == FINE_BITS)

    def columns(name: str, part: range) -> Matrix:
        read = weights.read(f"{prefix}{name}.weight", columns=part)
        return store(read.to(device, dtype).contiguous(), bits)

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
    """The part of a model that one of R ranks holds: heads, columns and vocabulary rows.

    `heads` are query heads. `kv_heads` lists the rank's key/value heads, each of which serves
    `len(heads) / len(kv_heads)` consecutive query heads.
    """

    rank: int
    ranks: int
    heads: range
    kv_heads: tuple[int, ...]
    ffn: range
    vocabulary: range

    @classmethod
    def of(cls, config: LlamaConfig, rank: int, ranks: int) -> Shard:
        """Return the shard of one rank.

        With at most as many ranks as KV heads, each rank gets whole KV groups, if necessary an
        unequal number of them (9 query and 3 KV heads on 2 ranks: 2 + 1 groups). With more ranks,
        KV heads are replicated. Raises `ConfigError` if the heads cannot be split.
        """
        if not 0 <= rank < ranks:
            raise ConfigError(f"rank: expected 0 to {ranks - 1}, got {rank}")
        group = config.heads // config.kv_heads
        if ranks <= config.kv_heads:
            groups = _split(config.kv_heads, rank, ranks)
            heads = range(groups.start * group, groups.stop * group)
            kv_heads = tuple(groups)
        elif config.heads % ranks == 0:
            heads = _split(config.heads, rank, ranks)
            kv_heads = _replicate_kv_heads(heads, group)
        else:
            raise ConfigError(
                f"ranks: expected at most {config.kv_heads} (the KV heads) or a divisor of "
                f"{config.heads} (the query heads), got {ranks}"
            )
        ffn, vocabulary = (
            _split(size, rank, ranks) for size in (config.intermediate_size, config.vocab_size)
        )
        return cls(rank, ranks, heads, kv_heads, ffn, vocabulary)


def _split(size: int, rank: int, ranks: int) -> range:
    """Return the rank's contiguous part of range(size); the first parts are larger by at most 1."""
    share, rest = divmod(size, ranks)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))


def _replicate_kv_heads(heads: range, group: int) -> tuple[int, ...]:
    """Return one KV head per run of query heads that share it.

    If the runs have different lengths, return one KV head per query head.
    """
    serving = [head // group for head in heads]
    distinct = tuple(dict.fromkeys(serving))
    even = all(serving.count(kv) * len(distinct) == len(serving) for kv in distinct)
    return distinct if even else tuple(serving)
