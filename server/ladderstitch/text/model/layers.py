"""The layers of a decoder on one rank: attention, MLP and norms, as `DecoderConfig` has them.

Shapes are those of `transformer.py`: T new tokens, D model width, H_r query and K_r key/value
heads of this rank, d head width, F_r feed-forward columns.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.mlp import Mlp, NarrowMlp
from ladderstitch.text.model.products import matrix_for_kernels, open_biased
from ladderstitch.text.model.query_key_norm import QueryKeyNorm, SumOverRanks
from ladderstitch.text.model.residual import LayerPlan
from ladderstitch.text.model.residual_stream import AffineMap, ResidualStream
from ladderstitch.text.model.rotation import rotate
from ladderstitch.text.model.shard import Shard
from ladderstitch.text.model.weights import LayerWeights


class Norm:
    """RMSNorm, or LayerNorm with or without a bias, of [.., D]; `gain` [D] is its weight."""

    def __init__(self, gain: Tensor, bias: Tensor | None, config: DecoderConfig) -> None:
        self.gain, self.eps, self._bias = gain, config.norm_eps, bias
        self.is_rms = config.norm == "rms"

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of x."""
        if self.is_rms:
            return F.rms_norm(x, self.gain.shape, self.gain, self.eps)
        return F.layer_norm(x, self.gain.shape, self.gain, self._bias, self.eps)


class Attention:
    """Causal grouped-query attention of one rank's heads: [T, D] -> [T, H_r d].

    The product with `output` [D, H_r d] is this rank's partial [T, D].
    """

    def __init__(
        self,
        layer: int,
        weights: LayerWeights,
        config: DecoderConfig,
        shard: Shard,
        threads: int,
    ) -> None:
        self.layer, self.width = layer, config.head_dim
        self.heads, self.kv_heads = len(shard.heads), len(shard.kv_heads)
        self._norm = QueryKeyNorm(weights.q_norm, weights.k_norm, config, shard)
        self.output_matrix = matrix_for_kernels(weights.output, weights.output_bias)
        self._qkv = weights.qkv
        self.project = open_biased(weights.qkv, weights.qkv_bias, threads)
        self.output = open_biased(weights.output, weights.output_bias, threads)

    def __call__(
        self,
        x: Tensor,
        batch: Batch,
        rotation: tuple[Tensor, Tensor],
        cache: PagedCache,
        sum_over_ranks: SumOverRanks,
    ) -> Tensor:
        """Return the heads' outputs [T, H_r d] of x [T, D]; adds keys and values to the cache.

        `rotation` has the rows of the batch's tokens for `rotate`, or whole tables for
        `PagedCache.rotate_and_append` if the cache uses kernels.
        """
        q = self.append_keys(x, batch, rotation, cache, sum_over_ranks)
        return cache.attend(self.layer, batch, q).reshape(len(x), -1)

    def append_keys(
        self,
        x: Tensor,
        batch: Batch,
        rotation: tuple[Tensor, Tensor],
        cache: PagedCache,
        sum_over_ranks: SumOverRanks,
    ) -> Tensor:
        """Add keys and values of x [T, D] to the cache; return the rotated queries [T, H_r, d]."""
        turned = self.heads + self.kv_heads
        projected = self.project(x).view(len(x), turned + self.kv_heads, self.width)
        projected = self._norm(projected, sum_over_ranks)
        if cache.uses_kernels:
            return cache.rotate_and_append(self.layer, batch, projected, rotation)
        qk = rotate(projected[:, :turned], *rotation)
        cache.append(self.layer, batch, qk[:, self.heads :], projected[:, turned:])
        return qk[:, : self.heads]

    def append_keys_only(
        self, x: Tensor, batch: Batch, rotation: tuple[Tensor, Tensor], cache: PagedCache
    ) -> None:
        """Add keys and values of x [T, D] to the cache, without queries.

        For matrices that are tensors, without biases and without norms of keys.
        """
        if cache.uses_kernels:
            self.append_keys(x, batch, rotation, cache, _sum_nothing)
            return
        assert isinstance(self._qkv, Tensor), "only tensors have rows of their own"
        rows = self._qkv[self.heads * self.width :]
        projected = F.linear(x, rows).view(len(x), 2 * self.kv_heads, self.width)
        k, v = projected.split(self.kv_heads, dim=1)
        cache.append(self.layer, batch, rotate(k, *rotation), v)


def _sum_nothing(part: Tensor) -> Tensor:
    """Raise `AssertionError`: layers without norms over all heads sum nothing over ranks."""
    raise AssertionError("expected no norm of keys over all heads")


class Layer:
    """One decoder layer: attention, MLP, and up to four norms."""

    def __init__(
        self, number: int, weights: LayerWeights, config: DecoderConfig, shard: Shard, threads: int
    ) -> None:
        def norm(gain: Tensor | None, bias: Tensor | None = None) -> Norm | None:
            return None if gain is None else Norm(gain, bias, config)

        self.attention = Attention(number, weights, config, shard, threads)
        self.mlp = Mlp(weights, threads, config.activation, gated=config.gated)
        self._narrow = {
            width: NarrowMlp(weights, shard.num_first_columns(width), config)
            for width in config.nested_ffn
            if isinstance(weights.down, Tensor)
        }
        self._attention_norm = norm(weights.attention_norm, weights.attention_norm_bias)
        self._mlp_norm = norm(weights.ffn_norm, weights.ffn_norm_bias)
        self._attention_output_norm = norm(weights.attention_output_norm)
        self._mlp_output_norm = norm(weights.mlp_output_norm)

    def __call__(
        self,
        plan: LayerPlan,
        stream: ResidualStream,
        batch: Batch,
        rotation: tuple[Tensor, Tensor],
        cache: PagedCache,
        outgoing: AffineMap | None = None,
    ) -> None:
        """Run the layer: read the stream, and add to it what `plan` says.

        With `outgoing`, a stitching layer maps the stream after the layer.
        """
        mlp = self.mlp_of(plan.ffn_width)
        x = _read(stream, plan.lag, self._attention_norm)
        mixed = self.attention(x, batch, rotation, cache, stream.sum_over_ranks)
        if plan.fused:
            y = x if self._mlp_norm is None else _read(stream, plan.lag, self._mlp_norm)
            both = self.attention.output(mixed) + mlp.output(mlp(y))
            if outgoing is None:
                stream.add(both)
            else:
                stream.add_and_cross(both, outgoing)
            return
        reduce = plan.reduce or (None, None)
        _add(stream, self.attention, mixed, reduce[0], self._attention_output_norm)
        x = _read(stream, plan.lag, self._mlp_norm)
        if outgoing is not None:
            stream.add_and_cross(mlp.output(mlp(x)), outgoing)
            return
        _add(stream, mlp, mlp(x), reduce[1], self._mlp_output_norm)

    def mlp_of(self, width: int | None) -> Mlp | NarrowMlp:
        """Return the MLP with the first `width` columns of all ranks; None: with all columns."""
        return self.mlp if width is None else self._narrow[width]

    def attend(
        self,
        stream: ResidualStream,
        batch: Batch,
        rotation: tuple[Tensor, Tensor],
        cache: PagedCache,
    ) -> Tensor:
        """Return the attention's partial [T, D] for the complete stream, without adding it."""
        x = _read(stream, 0, self._attention_norm)
        mixed = self.attention(x, batch, rotation, cache, stream.sum_over_ranks)
        return self.attention.output(mixed)

    def transform(self, stream: ResidualStream, width: int | None) -> Tensor:
        """Return the MLP's partial [T, D] for the complete stream, without adding it."""
        mlp = self.mlp_of(width)
        return mlp.output(mlp(_read(stream, 0, self._mlp_norm)))

    def append_keys(
        self, x: Tensor, batch: Batch, rotation: tuple[Tensor, Tensor], cache: PagedCache
    ) -> None:
        """Add keys and values to the cache for the stream x [T, D] that the layer would read."""
        normed = x if self._attention_norm is None else self._attention_norm(x)
        self.attention.append_keys_only(normed, batch, rotation, cache)


def run_group(
    layers: Sequence[Layer],
    plans: Sequence[LayerPlan],
    stream: ResidualStream,
    batch: Batch,
    rotations: Sequence[tuple[Tensor, Tensor]],
    cache: PagedCache,
) -> None:
    """Run layers as a group: all attentions read one stream and share one reduction, then all MLPs.

    `plans` and `rotations` have an entry for each layer. Norms of outputs are not supported.
    """
    attended = [
        layer.attend(stream, batch, rotation, cache)
        for layer, rotation in zip(layers, rotations, strict=True)
    ]
    stream.add(functools.reduce(torch.add, attended))
    transformed = [
        layer.transform(stream, plan.ffn_width) for layer, plan in zip(layers, plans, strict=True)
    ]
    stream.add(functools.reduce(torch.add, transformed))


def _read(stream: ResidualStream, lag: int, norm: Norm | None) -> Tensor:
    """Return the stream [T, D], normed if there is a norm."""
    if norm is None:
        return stream.read(lag)
    if norm.is_rms:
        return stream.read_normed(lag, norm.gain, norm.eps)
    return norm(stream.read(lag))


def _add(
    stream: ResidualStream,
    block: Attention | Mlp | NarrowMlp,
    x: Tensor,
    reduce: bool | None,
    output_norm: Norm | None,
) -> None:
    """Add the output of a sub-block to the stream; a norm of it needs the complete sum."""
    if output_norm is not None:
        stream.add_normed(block.output(x), output_norm)
    elif reduce is None:
        stream.add_product(x, block.output_matrix, block.output)
    else:
        stream.add_desynchronised(block.output(x), reduce=reduce)
