"""One rank of a tiny family as on a GPU: every place that has a kernel calls it."""

from __future__ import annotations

import torch
from torch import Tensor

from ladderstitch.text.comm.base import Communicator
from ladderstitch.text.messages import LogitsMode, SequenceInput, Step
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.family import Route
from ladderstitch.text.model.family_weights import anchor_weights, stitch_weights
from ladderstitch.text.model.residual import ResidualScheme, plan_layers
from ladderstitch.text.model.residual_stream import ResidualStream
from ladderstitch.text.model.shard import Shard
from ladderstitch.text.model.stitched import (
    BoundaryCache,
    StitchedModel,
    StitchedPath,
    load_maps,
)
from ladderstitch.text.model.transformer import Transformer
from ladderstitch.text.model.weight_reader import MemoryWeights
from ladderstitch.text.model.weights import load_rank
from tests.support.elastic_models import FAMILY, LARGE, paths, random_family

ROUTES = {path.name: path.route for path in paths()}
BLOCKS, BLOCK_TOKENS = [3, 1, 0, 5, 4, 2], 4


class KernelStream(ResidualStream):
    """A residual stream as on a GPU."""

    def __init__(self, x: Tensor, comm: Communicator) -> None:
        super().__init__(x, comm)
        self.uses_kernels = True


class KernelRank:
    """One rank of the family in float32 with its cache; every step is of one sequence.

    Attention and MLP call their kernels if `all_kernels` is set.
    """

    def __init__(
        self, comm: Communicator, residual: ResidualScheme, *, all_kernels: bool = True
    ) -> None:
        self.comm = comm
        weights = MemoryWeights(random_family())
        shards = [Shard.of(anchor, comm.rank, comm.ranks) for anchor in FAMILY.anchors]
        parts = zip(FAMILY.anchors, anchor_weights(weights, 2), shards, strict=True)
        anchors = [
            Transformer(anchor, load_rank(part, anchor, s), s, 1, FAMILY.plane_number(number))
            for number, (anchor, part, s) in enumerate(parts)
        ]
        for layer in (layer for anchor in anchors for layer in anchor.layers):
            layer.mlp.uses_kernels = all_kernels
        maps = load_maps(stitch_weights(weights), FAMILY, torch.float32, "cpu")
        boundaries = BoundaryCache(FAMILY, len(BLOCKS) * BLOCK_TOKENS)
        self.model = StitchedModel(FAMILY, anchors, maps, boundaries)
        self.cache = PagedCache(
            LARGE,
            shards[-1],
            len(BLOCKS),
            BLOCK_TOKENS,
            planes=FAMILY.num_planes,
            query_heads=[len(shard.heads) for shard in shards],
        )
        self.cache.uses_kernels = all_kernels
        self.plans = plan_layers(residual, LARGE.layers, comm.ranks)

    def batch(self, tokens: list[int], start: int) -> Batch:
        """Return the batch of some tokens of the sequence."""
        step = Step((SequenceInput(tokens, start, BLOCKS, LogitsMode.ALL),))
        return Batch(step, BLOCK_TOKENS)

    def run(self, tokens: list[int], start: int, route: Route) -> Tensor:
        """Return this rank's logits [T, V_r] of tokens of the sequence."""
        path = StitchedPath(self.model, route)
        return path.forward(self.batch(tokens, start), self.cache, self.plans, self.comm)

    def decode(self, tokens: list[int], prompt: int, route: Route) -> Tensor:
        """Return the logits [T, V_r] of a prompt of `prompt` tokens, and of one token at a time."""
        parts = [self.run(tokens[:prompt], 0, route)]
        parts += [self.run(tokens[n : n + 1], n, route) for n in range(prompt, len(tokens))]
        return torch.cat(parts)


def random_tokens(count: int) -> list[int]:
    """Return random tokens of the family's vocabulary."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, LARGE.vocab_size, (count,), generator=generator).tolist()
