"""Comparisons of sums in flight that cross a stitch with a stream that is always complete."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from ladderstitch_kernels import reference
from ladderstitch_kernels.comm.split_phase import Exchange
from ladderstitch_kernels.comm.symmetric import StreamRanks
from ladderstitch_kernels.comparison import Comparison, Sizes, largest_error
from ladderstitch_kernels.decoder import (
    Decoder,
    DecoderShape,
    Scheme,
    random_layers,
    run_parts,
    stitched_step,
)
from ladderstitch_kernels.stream import Stitch, Stream, random_stitch


def crossings(sizes: Sizes, dtype: torch.dtype, device: str, ranks: int) -> Iterator[Comparison]:
    """Yield comparisons of one crossing over ranks, and of whole decoders on one rank.

    Ranks take turns on one stream, all of them send before one waits.
    """
    for width, end in ((sizes.width, sizes.width // 2), (sizes.width // 2, sizes.width)):
        kind = "down" if end < width else "up"
        stitch = random_stitch(width, end, 2, dtype, device)
        error = _crossing_error(sizes, stitch, dtype, device, ranks)
        yield Comparison(f"sum crosses a stitch {kind}, {ranks} ranks", dtype, error)
    schemes: tuple[Scheme, ...] = ("standard", "ladder")
    for scheme in schemes:
        error = _decoder_error(sizes, scheme, dtype, device)
        yield Comparison(f"stitched {scheme} decoder, 1 rank", dtype, error)


def _crossing_error(
    sizes: Sizes, stitch: Stitch, dtype: torch.dtype, device: str, ranks: int
) -> float:
    """Return the error of streams after a stitch that two sums cross in turn."""
    generator = torch.Generator(device).manual_seed(3)
    rows, (end, front), k = 3, stitch.weight.shape, sizes.ffn // ranks // 2 * 2

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    memories = StreamRanks.group(ranks, device)
    exchanges = [Exchange(m, rows, sizes.width, dtype, device, columns=64) for m in memories]
    start, x = random(rows, front), random(ranks, rows, k)
    weights, after = random(ranks, front, k) / k**0.5, random(ranks, end, k) / k**0.5
    streams = [Stream(start, exchange, 1) for exchange in exchanges]
    for rank, stream in enumerate(streams):
        stream.add_and_cross(x[rank], weights[rank], stitch)
    for rank, stream in enumerate(streams):
        stream.add_product(x[rank], after[rank])
    got = [stream.drain() for stream in streams]
    whole = reference.CompleteStream(start, 1)
    together = x.transpose(0, 1).flatten(1)
    whole.add_and_cross(together, weights.transpose(0, 1).flatten(1), stitch)
    whole.add_product(together, after.transpose(0, 1).flatten(1))
    return largest_error(got, [whole.drain()] * ranks)


def _decoder_error(sizes: Sizes, scheme: Scheme, dtype: torch.dtype, device: str) -> float:
    """Return the error of a decoder of three widths over three tokens, on one rank."""
    rows, tokens = 2, 3
    part = DecoderShape(
        1, sizes.width // 2, sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.ffn // 2
    )
    shapes = [part, replace(part, width=sizes.width), part]
    stitches = [
        random_stitch(front.width, end.width, seed, dtype, device)
        for seed, (front, end) in enumerate(pairwise(shapes))
    ]
    carried, complete = (whole_decoders(shapes, dtype, device, rows, tokens) for _ in range(2))
    exchange = Exchange(StreamRanks.group(1, device)[0], rows, sizes.width, dtype, device)
    generator = torch.Generator(device).manual_seed(4)
    error = 0.0
    for _ in range(tokens):
        x = torch.randn(rows, part.width, generator=generator, device=device).to(dtype)
        got = stitched_step(carried, stitches, x, exchange, scheme)
        stream = reference.CompleteStream(x, 1 if scheme == "ladder" else 0)
        run_parts(complete, stitches, stream)
        error = max(error, largest_error([got], [stream.drain()]))
    return error


def whole_decoders(
    shapes: Sequence[DecoderShape], dtype: torch.dtype, device: str, rows: int, tokens: int
) -> list[Decoder]:
    """Return the parts of a decoder on one rank, with random weights."""
    return [
        Decoder(shape, list(random_layers(shape, seed, dtype, device)), rows, tokens)
        for seed, shape in enumerate(shapes)
    ]
