"""The share of communication that the ladder hides, for two ranks as streams of one GPU.

Timings are of one CUDA graph that holds a decoding step of both ranks. The hidden share is
(standard - ladder) / (standard - no communication). It says nothing about scaling to more GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
)
from ladderstitch_kernels.device import capture_graph, medians_us

RANKS = 2
SHAPE = DecoderShape(layers=8, width=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336)
"""Eight layers of a Llama of 8B parameters."""


class StreamPair:
    """Both ranks of a decoder on one GPU, with slots in its memory or in pinned host memory."""

    def __init__(
        self, shape: DecoderShape, dtype: torch.dtype, rows: int, tokens: int, *, pinned: bool
    ) -> None:
        whole = random_layers(shape, 0, dtype, "cuda")
        shards: list[list[LayerWeights]] = [[] for _ in range(RANKS)]
        for layer in whole:
            for rank in range(RANKS):
                shards[rank].append(shard_layer(layer, shape, rank, RANKS))
        memories = StreamRanks.group(RANKS, "cuda", pinned=pinned)
        own = [StreamRanks.group(1, "cuda")[0] for _ in range(RANKS)]
        self.decoders = [Decoder(shape.shard(RANKS), layers, rows, tokens) for layers in shards]
        self.exchanges, self.alone = (
            [Exchange(m, rows, shape.width, dtype, "cuda") for m in places]
            for places in (memories, own)
        )
        self.x = torch.randn(rows, shape.width, device="cuda").to(dtype)

    def steps(self, scheme: Scheme, *, communicate: bool = True) -> list[Callable[[], Tensor]]:
        """Return a function for each rank that runs one decoding step.

        Without communication each rank runs the same kernels and exchanges with itself.
        """
        places = self.exchanges if communicate else self.alone
        return [
            partial(decoder.step, self.x, exchange, scheme)
            for decoder, exchange in zip(self.decoders, places, strict=True)
        ]

    def rewind(self) -> None:
        """Set the position of both ranks to the first token."""
        for decoder in self.decoders:
            decoder.position.zero_()


def measure_hidden(rows: int, *, pinned: bool, rounds: int = 50) -> dict[str, float]:
    """Return microseconds per step of each scheme, and the share that the ladder hides.

    Times are medians over `rounds` replays, for `rows` sequences. `exposed_*_us` is the time over
    no communication, per reduction.
    """
    pair = StreamPair(SHAPE, torch.bfloat16, rows, tokens=16 * (rounds + 8), pinned=pinned)
    graphs = {
        "standard": capture_graph(pair.steps("standard"), pair.exchanges)[0],
        "ladder": capture_graph(pair.steps("ladder"), pair.exchanges)[0],
        "no_communication": capture_graph(pair.steps("standard", communicate=False), pair.alone)[0],
    }
    pair.rewind()
    times = medians_us({name: graph.replay for name, graph in graphs.items()}, rounds)
    exposed = times["standard"] - times["no_communication"]
    reductions = 2 * SHAPE.layers
    return {
        **{f"{name}_us": taken for name, taken in times.items()},
        "speedup": times["standard"] / times["ladder"],
        "hidden": (times["standard"] - times["ladder"]) / exposed if exposed > 0 else 1.0,
        "exposed_standard_us": exposed / reductions,
        "exposed_ladder_us": (times["ladder"] - times["no_communication"]) / reductions,
    }
