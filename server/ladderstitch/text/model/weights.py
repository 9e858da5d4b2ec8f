"""One rank's shard of a checkpoint: which part it is, its tensors, and how they are read.

Tensor names are those of the Hugging Face layout. Related matrices are fused into one, so that a
layer has few large products. Only the rank's shard is ever in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ladderstitch.bundles import check_tensors
from ladderstitch.runtime.linear import Matrix, store
from ladderstitch.runtime.low_bit import quantise
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.shard import Shard
from ladderstitch.text.model.weight_reader import EMBEDDING, HEAD, Weights

FINAL_NORM, FINAL_NORM_BIAS = "model.norm.weight", "model.norm.bias"
Parts = Sequence[tuple[str, Sequence[range]]]
"""Matrices and their rows, in the order in which they are fused."""
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

    attention_norm: Tensor | None  # [D]; none where only outputs are normed
    qkv: Matrix  # [(H_r + 2 K_r) d, D]: queries, keys, values
    output: Matrix  # [D, H_r d]
    ffn_norm: Tensor | None  # [D]; none where attention and MLP share a norm
    gate_up: Matrix  # [2 F_r, D], or [F_r, D] without a gate
    down: Matrix  # [D, F_r]
    attention_norm_bias: Tensor | None = None  # [D]
    ffn_norm_bias: Tensor | None = None  # [D]
    attention_output_norm: Tensor | None = None  # [D]
    mlp_output_norm: Tensor | None = None  # [D]
    q_norm: Tensor | None = None  # [d], or [H_r d] if over all heads
    k_norm: Tensor | None = None  # [d], or [K_r d]
    qkv_bias: Tensor | None = None  # [(H_r + 2 K_r) d]
    output_bias: Tensor | None = None  # [D]; of the first rank only, as ranks are summed
    gate_up_bias: Tensor | None = None  # as the rows of gate_up
    down_bias: Tensor | None = None  # [D]; of the first rank only


@dataclass(frozen=True, slots=True)
class RankWeights:
    """All tensors of one rank, which has V_r rows of the vocabulary."""

    embedding: Matrix  # [V_r, D]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [D]
    head: Matrix  # [V_r, D]; the embedding itself if tied
    norm_bias: Tensor | None = None  # [D]

    def bytes(self) -> int:
        """Return the memory of the weights in bytes; a tied head counts once."""
        found: set[Matrix | None] = {self.embedding, self.norm, self.head, self.norm_bias}
        for layer in self.layers:
            found |= {getattr(layer, field.name) for field in fields(layer)}
        return sum(matrix.nbytes for matrix in found if matrix is not None)


def expected_shapes(
    config: DecoderConfig, *, shared_norm: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a checkpoint of this model has."""
    d, width, ffn = config.head_dim, config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, width)}
    matrices = {
        "self_attn.q_proj": (config.heads * d, width),
        "self_attn.k_proj": (config.kv_heads * d, width),
        "self_attn.v_proj": (config.kv_heads * d, width),
        "self_attn.o_proj": (width, config.heads * d),
        "mlp.gate_proj": (ffn, width),
        "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
    }
    if not config.gated:
        del matrices["mlp.gate_proj"]
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in matrices.items()}
        shapes |= {
            f"{prefix}{name}.bias": shape[:1]
            for name, shape in matrices.items()
            if _has_bias(name, config)
        }
        for name in _layer_norms(config, shared_norm=shared_norm):
            shapes |= _norm_shapes(prefix + name, config)
        shapes |= {
            f"{prefix}self_attn.{name}_norm.weight": (d if config.qk_norm == "head" else size,)
            for name, size in (("q", config.heads * d), ("k", config.kv_heads * d))
            if config.qk_norm != "none"
        }
    shapes |= _norm_shapes(FINAL_NORM.removesuffix(".weight"), config)
    if not config.tied_head:
        shapes[HEAD] = (config.vocab_size, width)
    return shapes


def _has_bias(matrix: str, config: DecoderConfig) -> bool:
    if matrix.startswith("mlp."):
        return config.mlp_bias
    return config.output_bias if matrix.endswith("o_proj") else config.qkv_bias


def _layer_norms(config: DecoderConfig, *, shared_norm: bool) -> list[str]:
    """Return the names of a layer's norms, without those of queries and keys."""
    names = []
    if config.norm_place != "after":
        names += ["input_layernorm"]
        if not shared_norm or config.parallel_norms == 2:
            names += ["post_attention_layernorm"]
    if config.norm_place != "before":
        names += ["attention_output_norm", "mlp_output_norm"]
    return names


def _norm_shapes(name: str, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    kinds = ("weight", "bias") if config.norm_bias else ("weight",)
    return {f"{name}.{kind}": (config.hidden_size,) for kind in kinds}


def check_weights(weights: Weights, config: DecoderConfig, *, shared_norm: bool = False) -> None:
    """Raise `BundleError` naming every missing, unknown and mis-shaped tensor."""
    expected, found = expected_shapes(config, shared_norm=shared_norm), set(weights.names())
    found -= {name for name in found if name.endswith("rotary_emb.inv_freq")}
    if config.tied_head:
        found.discard(HEAD)
    check_tensors(expected, {name: weights.shape(name) for name in found}, where="weights")


def load_rank(
    weights: Weights,
    config: DecoderConfig,
    shard: Shard,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    shared_norm: bool = False,
    bits: int | None = None,
    layers: Sequence[int] | None = None,
) -> RankWeights:
    """Return one rank's tensors; raises `BundleError` naming every tensor that does not fit.

    `layers` are those to read; unset: all. With `bits` (4 or 8), each weight of the layers'
    matrices has that many; embedding and head have 8, and norms are of `dtype`.
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
    read = [
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
        for layer in (range(config.layers) if layers is None else layers)
    ]
    head = embedding
    if not config.tied_head:
        head = store(vocabulary(HEAD), vocabulary_bits, is_fine=is_fine)
    norm_bias = whole(FINAL_NORM_BIAS) if config.norm_bias else None
    return RankWeights(embedding, tuple(read), whole(FINAL_NORM), head, norm_bias)


def load_layer(
    weights: Weights,
    layer: int,
    config: DecoderConfig,
    shard: Shard,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    shared_norm: bool = False,
    bits: int | None = None,
) -> LayerWeights:
    """Return one rank's tensors of one layer, as `load_rank` does."""
    return _LayerReader(weights, layer, config, shard, dtype, device, shared_norm, bits).read()


@dataclass(frozen=True, slots=True)
class _LayerReader:
    weights: Weights
    layer: int
    config: DecoderConfig
    shard: Shard
    dtype: torch.dtype
    device: torch.device | str
    shared_norm: bool
    bits: int | None

    def read(self) -> LayerWeights:
        config, shard, d = self.config, self.shard, self.config.head_dim
        queries = range(shard.heads.start * d, shard.heads.stop * d)
        kv_rows = [range(head * d, (head + 1) * d) for head in shard.kv_heads]
        qkv = [
            ("self_attn.q_proj", [queries]),
            ("self_attn.k_proj", kv_rows),
            ("self_attn.v_proj", kv_rows),
        ]
        gate_up = [(f"mlp.{name}_proj", shard.ffn) for name in ("gate", "up")]
        gate_up = gate_up if config.gated else gate_up[1:]
        norms = _layer_norms(config, shared_norm=self.shared_norm)

        def norm(name: str, kind: str = "weight") -> Tensor | None:
            exists = name in norms and (kind == "weight" or config.norm_bias)
            return self._vector(f"{name}.{kind}") if exists else None

        is_first, has_qk_norm = shard.rank == 0, config.qk_norm != "none"
        return LayerWeights(
            attention_norm=norm("input_layernorm"),
            qkv=self._rows(qkv),
            output=self._columns("self_attn.o_proj", [queries]),
            ffn_norm=norm("post_attention_layernorm"),
            gate_up=self._rows(gate_up),
            down=self._columns("mlp.down_proj", shard.ffn),
            attention_norm_bias=norm("input_layernorm", "bias"),
            ffn_norm_bias=norm("post_attention_layernorm", "bias"),
            attention_output_norm=norm("attention_output_norm"),
            mlp_output_norm=norm("mlp_output_norm"),
            q_norm=self._head_norm("self_attn.q_norm", [queries]) if has_qk_norm else None,
            k_norm=self._head_norm("self_attn.k_norm", kv_rows) if has_qk_norm else None,
            qkv_bias=self._bias(qkv) if config.qkv_bias else None,
            output_bias=(
                self._vector("self_attn.o_proj.bias") if config.output_bias and is_first else None
            ),
            gate_up_bias=self._bias(gate_up) if config.mlp_bias else None,
            down_bias=(
                self._vector("mlp.down_proj.bias") if config.mlp_bias and is_first else None
            ),
        )

    def _name(self, name: str) -> str:
        return f"model.layers.{self.layer}.{name}"

    def _vector(self, name: str) -> Tensor:
        return self.weights.read(self._name(name)).to(self.device, self.dtype)

    def _head_norm(self, name: str, rows: Sequence[range]) -> Tensor:
        """Return the weight of a norm of each head, or the rank's rows of one over all heads."""
        if self.config.qk_norm == "head":
            return self._vector(f"{name}.weight")
        read = [self.weights.read(self._name(f"{name}.weight"), rows=part) for part in rows]
        return torch.cat(read).to(self.device, self.dtype)

    def _rows(self, parts: Parts) -> Matrix:
        """Return the rows of several matrices as one, which is never in memory twice."""
        height = sum(len(part) for _, ranges in parts for part in ranges)
        shape = height, self.config.hidden_size
        fused = torch.empty(shape, dtype=self.dtype, device=self.device)
        at = 0
        for name, ranges in parts:
            for part in ranges:
                read = self.weights.read(self._name(f"{name}.weight"), rows=part)
                fused[at : at + len(part)] = read
                at += len(part)
        return self._store(fused, self.bits, is_fine=self.bits == FINE_BITS)

    def _columns(self, name: str, parts: Sequence[range]) -> Matrix:
        read = [self.weights.read(self._name(f"{name}.weight"), columns=part) for part in parts]
        whole = read[0] if len(read) == 1 else torch.cat(read, dim=1)
        return self._store(whole.to(self.device, self.dtype).contiguous(), self.bits)

    def _store(self, matrix: Tensor, bits: int | None, *, is_fine: bool = False) -> Matrix:
        """Return the matrix as products read it; slices of nested MLPs need plain tensors."""
        if bits is None and self.config.nested_ffn:
            return matrix
        return store(matrix, bits, is_fine=is_fine)

    def _bias(self, parts: Parts) -> Tensor:
        read = [
            self.weights.read(self._name(f"{name}.bias"), rows=part)
            for name, ranges in parts
            for part in ranges
        ]
        return torch.cat(read).to(self.device, self.dtype)
