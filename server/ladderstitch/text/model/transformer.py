"""The serving forward pass of one rank of a decoder, top-down in the order of execution.

A residual scheme is data, one `LayerPlan` per layer, and an architecture is data, a
`DecoderConfig`; so all of them share this code.

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

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.runtime.linear import Matrix, open_product
from ladderstitch.runtime.low_bit import LowBitMatrix
from ladderstitch.text.comm.base import Communicator
from ladderstitch.text.model.attention import PagedCache, soft_cap
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.layers import Layer, Norm, run_group
from ladderstitch.text.model.residual import LayerPlan, split_groups
from ladderstitch.text.model.residual_stream import ResidualStream
from ladderstitch.text.model.rotation import rotation_tables
from ladderstitch.text.model.shard import Shard
from ladderstitch.text.model.weights import RankWeights


class Transformer:
    """One rank of a language model; it holds weights and no state of a request.

    The cache, the residual plans and the communicator are arguments of each forward pass.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: RankWeights,
        shard: Shard,
        threads: int = 1,
        first_plane: int = 0,
    ) -> None:
        """Prepare the products with all matrices; those of low-bit matrices use `threads`.

        Keys and values of layer i are in plane `first_plane` + i of the cache.
        """
        self.config, self.shard, self.weight_bytes = config, shard, weights.bytes()
        self._embedding = weights.embedding
        self._norm = Norm(weights.norm, weights.norm_bias, config)
        self.layers = [
            Layer(first_plane + number, layer, config, shard, threads)
            for number, layer in enumerate(weights.layers)
        ]
        self._head = open_product(weights.head, threads)
        dtype, device = weights.norm.dtype, weights.norm.device
        self._rotations = {
            kind: tuple(
                table.to(device, dtype)[:, None]
                for table in rotation_tables(config, config.max_positions, kind)
            )
            for kind in set(config.layer_rotations)
        }

    @torch.inference_mode()
    def forward(
        self, batch: Batch, cache: PagedCache, plans: Sequence[LayerPlan], comm: Communicator
    ) -> Tensor:
        """Return logits [L, V_r] of this rank's vocabulary for the batch's L output rows.

        The cache must hold the earlier tokens of all sequences. Raises `PeerLost` if a peer died.
        """
        rotations = self.rotations(batch, cache)
        stream = ResidualStream(self.embed(batch.tokens, comm), comm)
        kinds = self.config.layer_rotations
        for group in split_groups(range(len(self.layers)), plans):
            layers, turns = [self.layers[n] for n in group], [rotations[kinds[n]] for n in group]
            if len(group) > 1:
                run_group(layers, [plans[n] for n in group], stream, batch, turns, cache)
            else:
                layers[0](plans[group[0]], stream, batch, turns[0], cache)
        return self.logits(stream, batch)

    def rotations(self, batch: Batch, cache: PagedCache) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return cosines and sines by kind of layer, for `Attention`."""
        if cache.uses_kernels:
            return self._kernel_rotations
        return {
            kind: (cosines[batch.positions], sines[batch.positions])
            for kind, (cosines, sines) in self._rotations.items()
        }

    def logits(self, stream: ResidualStream, batch: Batch) -> Tensor:
        """Return logits [L, V_r] of the batch's L output rows from the stream after all layers."""
        x = stream.read()
        if len(batch.output_rows) < len(x):
            x = x[batch.output_rows]
        return self._finish_logits(self._head(self._norm(x)))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._norm.gain.device

    @cached_property
    def _kernel_rotations(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Cosines and sines [positions, d / 2]: kernels index them by position themselves."""
        half = self.config.head_dim // 2
        return {
            kind: (cosines[:, 0, :half].contiguous(), signed_sines[:, 0, half:].contiguous())
            for kind, (cosines, signed_sines) in self._rotations.items()
        }

    def _finish_logits(self, logits: Tensor) -> Tensor:
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        return soft_cap(logits, self.config.logit_softcap)

    def embed(self, tokens: Tensor, comm: Communicator) -> Tensor:
        """Return [T, D] of tokens [T]: the sum over ranks, as each rank has a part of the rows."""
        rows = self.shard.vocabulary
        if self.shard.ranks == 1:
            return self._scale(look_up(self._embedding, tokens))
        mine = (tokens >= rows.start) & (tokens < rows.stop)
        local = (tokens - rows.start).clamp(0, len(rows) - 1)
        part = look_up(self._embedding, local).masked_fill(~mine.unsqueeze(-1), 0.0)
        return self._scale(comm.wait(comm.all_reduce_async(part)))

    def _scale(self, x: Tensor) -> Tensor:
        return x if self.config.embedding_scale == 1.0 else x * self.config.embedding_scale


def look_up(embedding: Matrix, tokens: Tensor) -> Tensor:
    """Return the rows [T, D] of an embedding."""
    if isinstance(embedding, LowBitMatrix):
        return embedding.rows(tokens)
    return F.embedding(tokens, embedding)
