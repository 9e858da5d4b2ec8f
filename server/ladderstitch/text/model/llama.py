"""The serving forward pass of one rank of a Llama model, top-down in the order of execution.

A residual scheme is data, one `LayerPlan` per layer, so all schemes share this code.

The repository has three forward passes of the same architecture, because their needs differ:

- Serving (this module) has a paged cache, tensor-parallel ranks and split-phase reductions, and no
  gradients.
- Training (`training/text/trainable_llama.py`) needs gradients over whole sequences on one rank,
  without a cache.
- The kernels package (`ladderstitch_kernels/decoder.py`) imports nothing of the server; it proves
  the overlap of reductions and compute on a minimal decoder.

Shapes: T new tokens of the batch, D model width, H_r query and K_r key/value heads of this rank,
d head width, F_r feed-forward columns, V_r vocabulary rows of this rank.

On CUDA, Triton kernels rotate and store keys, attend, gate the MLP, and add before a norm. They
compute the formulas of the CPU's code in float32 and round once, to the dtype of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.runtime.linear import Matrix, open_product
from ladderstitch.runtime.low_bit import LowBitMatrix
from ladderstitch.text.comm.base import Communicator
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.config import LlamaConfig, RopeScaling
from ladderstitch.text.model.residual import LayerPlan, ResidualStream
from ladderstitch.text.model.weights import LayerWeights, RankWeights, Shard


class Attention:
    """Causal grouped-query attention of one rank's heads: [T, D] -> [T, H_r d].

    The product with `output` [D, H_r d] is this rank's partial [T, D].
    """

    def __init__(
        self,
        layer: int,
        weights: LayerWeights,
        config: LlamaConfig,
        shard: Shard,
        threads: int,
    ) -> None:
        self.layer, self.width = layer, config.head_dim
        self.heads, self.kv_heads = len(shard.heads), len(shard.kv_heads)
        self.output_matrix = tensor_or_none(weights.output)
        self.project = open_product(weights.qkv, threads)
        self.output = open_product(weights.output, threads)

    def __call__(
        self, x: Tensor, batch: Batch, rotation: tuple[Tensor, Tensor], cache: PagedCache
    ) -> Tensor:
        """Return the heads' outputs [T, H_r d] of x [T, D]; adds keys and values to the cache.

        `rotation` has the rows of the batch's tokens for `rotate`, or whole tables for
        `PagedCache.rotate_and_append` if the cache uses kernels.
        """
        turned = self.heads + self.kv_heads
        projected = self.project(x).view(len(x), turned + self.kv_heads, self.width)
        if cache.uses_kernels:
            q = cache.rotate_and_append(self.layer, batch, projected, rotation)
        else:
            qk = rotate(projected[:, :turned], *rotation)
            cache.append(self.layer, batch, qk[:, self.heads :], projected[:, turned:])
            q = qk[:, : self.heads]
        return cache.attend(self.layer, batch, q).reshape(len(x), -1)


class Mlp:
    """SwiGLU over one rank's columns: [T, D] -> [T, F_r].

    The product with `output` [D, F_r] is this rank's partial [T, D].
    """

    def __init__(self, weights: LayerWeights, threads: int) -> None:
        self.output_matrix = tensor_or_none(weights.down)
        self.gate_up = open_product(weights.gate_up, threads)
        self.output = open_product(weights.down, threads)
        self.uses_kernels = weights.attention_norm.is_cuda

    def __call__(self, x: Tensor) -> Tensor:
        """Return silu(x @ gate.T) * (x @ up.T), [T, F_r], of x [T, D]."""
        gate_up = self.gate_up(x)
        if self.uses_kernels:
            from ladderstitch_kernels.ops.swiglu import swiglu

            return swiglu(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


class Transformer:
    """One rank of a language model; it holds weights and no state of a request.

    The cache, the residual plans and the communicator are arguments of each forward pass.
    """

    def __init__(
        self, config: LlamaConfig, weights: RankWeights, shard: Shard, threads: int = 1
    ) -> None:
        """Prepare the products with all matrices; those of low-bit matrices use `threads`."""
        self.config, self.shard, self.weight_bytes = config, shard, weights.bytes()
        self._embedding, self._norm_gain = weights.embedding, weights.norm
        self._norms = [(layer.attention_norm, layer.ffn_norm) for layer in weights.layers]
        self.attentions = [
            Attention(i, layer, config, shard, threads) for i, layer in enumerate(weights.layers)
        ]
        self.mlps = [Mlp(layer, threads) for layer in weights.layers]
        self._head = open_product(weights.head, threads)
        dtype, device = weights.norm.dtype, weights.norm.device
        self._rotation = tuple(
            table.to(device, dtype)[:, None]
            for table in rotation_tables(config, config.max_positions)
        )

    @torch.inference_mode()
    def forward(
        self, batch: Batch, cache: PagedCache, plans: Sequence[LayerPlan], comm: Communicator
    ) -> Tensor:
        """Return logits [L, V_r] of this rank's vocabulary for the batch's L output rows.

        The cache must hold the earlier tokens of all sequences. Raises `PeerLost` if a peer died.
        """
        cosines, sines = self._rotation
        rotation = (
            self._kernel_rotation
            if cache.uses_kernels
            else (cosines[batch.positions], sines[batch.positions])
        )
        stream = ResidualStream(self._embed(batch.tokens, comm), comm)
        for layer, plan in enumerate(plans):
            self._run_layer(layer, plan, stream, batch, rotation, cache)
        x = stream.read()
        if len(batch.output_rows) < len(x):
            x = x[batch.output_rows]
        return self._head(self._norm(x, self._norm_gain))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._norm_gain.device

    @cached_property
    def _kernel_rotation(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines [positions, d / 2]: kernels index them by position themselves."""
        cosines, signed_sines = self._rotation
        half = self.config.head_dim // 2
        return cosines[:, 0, :half].contiguous(), signed_sines[:, 0, half:].contiguous()

    def _run_layer(
        self,
        layer: int,
        plan: LayerPlan,
        stream: ResidualStream,
        batch: Batch,
        rotation: tuple[Tensor, Tensor],
        cache: PagedCache,
    ) -> None:
        (attention_norm, ffn_norm), eps = self._norms[layer], self.config.norm_eps
        attention, mlp = self.attentions[layer], self.mlps[layer]
        x = stream.read_normed(plan.lag, attention_norm, eps)
        mixed = attention(x, batch, rotation, cache)
        if plan.fused:
            stream.add(attention.output(mixed) + mlp.output(mlp(x)))
            return
        assert ffn_norm is not None, "only fused layers share a norm"
        _add(stream, attention, mixed, plan.reduce and plan.reduce[0])
        x = stream.read_normed(plan.lag, ffn_norm, eps)
        _add(stream, mlp, mlp(x), plan.reduce and plan.reduce[1])

    def _embed(self, tokens: Tensor, comm: Communicator) -> Tensor:
        """Return [T, D] of tokens [T]: the sum over ranks, as each rank has a part of the rows."""
        rows = self.shard.vocabulary
        if self.shard.ranks == 1:
            return look_up(self._embedding, tokens)
        mine = (tokens >= rows.start) & (tokens < rows.stop)
        local = (tokens - rows.start).clamp(0, len(rows) - 1)
        part = look_up(self._embedding, local).masked_fill(~mine.unsqueeze(-1), 0.0)
        return comm.wait(comm.all_reduce_async(part))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)


def tensor_or_none(matrix: Matrix) -> Tensor | None:
    """Return a matrix that kernels can read; low-bit ones belong to their sessions alone."""
    return matrix if isinstance(matrix, Tensor) else None


def look_up(embedding: Matrix, tokens: Tensor) -> Tensor:
    """Return the rows [T, D] of an embedding."""
    if isinstance(embedding, LowBitMatrix):
        return embedding.rows(tokens)
    return F.embedding(tokens, embedding)


def _add(stream: ResidualStream, block: Attention | Mlp, x: Tensor, reduce: bool | None) -> None:
    if reduce is None:
        stream.add_product(x, block.output_matrix, block.output)
    else:
        stream.add_desynchronised(block.output(x), reduce=reduce)


def rotation_tables(config: LlamaConfig, positions: int) -> tuple[Tensor, Tensor]:
    """Return cosines and signed sines for `rotate`, both [positions, d] float32."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies = config.rope_theta**-half
    if config.rope_scaling is not None:
        frequencies = _scale_frequencies(frequencies, config.rope_scaling)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    sines = angles.sin()
    cosines = torch.cat((angles.cos(), angles.cos()), dim=-1)
    return cosines.float(), torch.cat((-sines, sines), dim=-1).float()


def rotate(x: Tensor, cosines: Tensor, signed_sines: Tensor) -> Tensor:
    """Return x [T, H, d] with each pair (i, i + d/2) rotated; the tables are [T, 1, d]."""
    return x * cosines + x.roll(x.shape[-1] // 2, -1) * signed_sines


def _scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Return the frequencies [d/2] divided by the factor: all of them, or Llama 3's selection.

    Llama 3 keeps the frequencies that turn often enough within the original context.
    """
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return blend * frequencies + (1 - blend) * slow
