"""The share of communication that the ladder hides, for two ranks as streams of one GPU.

Timings are of one CUDA graph that holds a decoding step of both ranks. The hidden share is
(standard - ladder) / (standard - no communication). It says nothing about scaling to more GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ladderstitch_kernels.comm.split_phase import Exchange
from ladderstitch_kernels.comm.symmetric import StreamRanks
from ladderstitch_kernels.decoder import (
    Decoder,
    DecoderShape,
    LayerWeights,
    Scheme,
    random_layers,
    shard_layer,
    stitched_step,
)
from ladderstitch_kernels.device import capture_graph, medians_us
from ladderstitch_kernels.stream import random_stitch

RANKS = 2
SHAPE = DecoderShape(layers=8, width=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336)
"""Eight layers of a Llama of 8B parameters."""
HALF = replace(SHAPE, layers=4)
STITCHED = (HALF, replace(HALF, width=2048, ffn=8192))
"""The first four of these layers, and four of half the width, with a stitch in between."""


class StreamPair:
    """Both ranks of a decoder on one GPU, with slots in its memory or in pinned host memory.

    A decoder of several shapes has a part of each, and a stitch between each two.
    """

    def __init__(
        self,
        shapes: Sequence[DecoderShape],
        dtype: torch.dtype,
        rows: int,
        tokens: int,
        *,
        pinned: bool,
    ) -> None:
        self.parts: list[list[Decoder]] = [[] for _ in range(RANKS)]
        for seed, shape in enumerate(shapes):
            shards: list[list[LayerWeights]] = [[] for _ in range(RANKS)]
            for layer in random_layers(shape, seed, dtype, "cuda"):
                for rank in range(RANKS):
                    shards[rank].append(shard_layer(layer, shape, rank, RANKS))
            for parts, layers in zip(self.parts, shards, strict=True):
                parts.append(Decoder(shape.shard(RANKS), layers, rows, tokens))
        self.stitches = [
            random_stitch(front.width, end.width, seed, dtype, "cuda")
            for seed, (front, end) in enumerate(pairwise(shapes))
        ]
        memories = StreamRanks.group(RANKS, "cuda", pinned=pinned)
        own = [StreamRanks.group(1, "cuda")[0] for _ in range(RANKS)]
        width = max(shape.width for shape in shapes)
        self.exchanges, self.alone = (
            [Exchange(m, rows, width, dtype, "cuda") for m in places] for places in (memories, own)
        )
        self.x = torch.randn(rows, shapes[0].width, device="cuda").to(dtype)

    def steps(self, scheme: Scheme, *, communicate: bool = True) -> list[Callable[[], Tensor]]:
        """Return a function for each rank that runs one decoding step.

        Without communication each rank runs the same kernels and exchanges with itself.
        """
        places = self.exchanges if communicate else self.alone
        return [
            partial(stitched_step, parts, self.stitches, self.x, exchange, scheme)
            for parts, exchange in zip(self.parts, places, strict=True)
        ]

    def rewind(self) -> None:
        """Set the position of both ranks to the first token."""
        for part in (part for parts in self.parts for part in parts):
            part.position.zero_()


def measure_hidden(
    rows: int,
    shapes: Sequence[DecoderShape] = (SHAPE,),
    *,
    pinned: bool,
    rounds: int = 50,
) -> dict[str, float]:
    """Return microseconds per step of each scheme, and the share that the ladder hides.

    Times are medians over `rounds` replays, for `rows` sequences. `exposed_*_us` is the time over
    no communication, per reduction.
    """
    pair = StreamPair(shapes, torch.bfloat16, rows, tokens=16 * (rounds + 8), pinned=pinned)
    graphs = {
        "standard": capture_graph(pair.steps("standard"), pair.exchanges)[0],
        "ladder": capture_graph(pair.steps("ladder"), pair.exchanges)[0],
        "no_communication": capture_graph(pair.steps("standard", communicate=False), pair.alone)[0],
    }
    pair.rewind()
    times = medians_us({name: graph.replay for name, graph in graphs.items()}, rounds)
    exposed = times["standard"] - times["no_communication"]
    reductions = 2 * sum(shape.layers for shape in shapes)
    return {
        **{f"{name}_us": taken for name, taken in times.items()},
        "speedup": times["standard"] / times["ladder"],
        "hidden": (times["standard"] - times["ladder"]) / exposed if exposed > 0 else 1.0,
        "exposed_standard_us": exposed / reductions,
        "exposed_ladder_us": (times["ladder"] - times["no_communication"]) / reductions,
    }
