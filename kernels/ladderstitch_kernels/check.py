"""Correctness of the kernels on a GPU, in one run of a few minutes.

    python -m ladderstitch_kernels.check

The check compares every kernel at real sizes in float32, float16 and bfloat16 with its float32
reference, and decoders with stitches in between with a stream that is always complete. It then runs
two ranks as streams of the GPU: a ladder and a standard decoder, plain and with stitches, over
device memory and over pinned host memory, in CUDA graphs, compared with the same decoder on one
rank. It exits with 1 if a comparison fails. Without a GPU it prints the reason and exits with 0.
With TRITON_INTERPRET=1 it runs the first part at small sizes in the interpreter.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ladderstitch_kernels import reference
from ladderstitch_kernels.comm.all_reduce import AllReduce
from ladderstitch_kernels.comm.split_phase import Exchange, gemv_post, post, wait_add_norm, wait_sum
from ladderstitch_kernels.comm.symmetric import StreamRanks
from ladderstitch_kernels.comparison import SMALL, TOLERANCES, Comparison, Sizes, largest_error
from ladderstitch_kernels.crossings import crossings, whole_decoders
from ladderstitch_kernels.decoder import DecoderShape, Scheme, stitched_step
from ladderstitch_kernels.device import capture_graph, describe, missing_gpu
from ladderstitch_kernels.launch import interpreted
from ladderstitch_kernels.ops.add_rms_norm import add_rms_norm
from ladderstitch_kernels.ops.decode_attention import paged_decode_attention
from ladderstitch_kernels.ops.rope_append import rope_append
from ladderstitch_kernels.ops.stitch_linear import stitch_pending
from ladderstitch_kernels.ops.swiglu import swiglu
from ladderstitch_kernels.overlap import StreamPair


def single_rank(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Comparison]:
    """Yield a comparison for every kernel of a single rank."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    m, d, f = sizes.rows, sizes.width, sizes.ffn
    x, residual, gain = random(m, d), random(m, d), random(d)
    yield Comparison(
        "add_rms_norm",
        dtype,
        largest_error(
            add_rms_norm(x, residual, gain, 1e-5), reference.add_rms_norm(x, residual, gain, 1e-5)
        ),
    )
    gate_up = random(m, 2 * f)
    yield Comparison("swiglu", dtype, largest_error([swiglu(gate_up)], [reference.swiglu(gate_up)]))
    weight, bias, down, up = random(f, d), random(f), random(16, d), random(f, 16)
    for rows in (1, min(m - 1, 40), m):
        arguments = (x[:rows], residual[:rows], weight / d**0.5, bias, down / d**0.5, up / 4)
        yield Comparison(
            f"stitch_pending, {rows} rows",
            dtype,
            largest_error(stitch_pending(*arguments), reference.stitch_pending(*arguments)),
        )
    yield from _attention(sizes, dtype, device, random)


def _attention(
    sizes: Sizes, dtype: torch.dtype, device: str, make: Callable[..., Tensor]
) -> Iterator[Comparison]:
    h, k, d, page = sizes.heads, sizes.kv_heads, sizes.head_dim, 16
    lengths = torch.tensor([sizes.length, 1, sizes.length // 3], device=device, dtype=torch.int32)
    pages = torch.arange(3 * -(-sizes.length // page), device=device, dtype=torch.int32).view(3, -1)
    keys, values, q = (
        make(pages.numel(), page, k, d),
        make(pages.numel(), page, k, d),
        make(3, h, d),
    )
    yield Comparison(
        "paged_decode_attention",
        dtype,
        largest_error(
            [paged_decode_attention(q, keys, values, pages, lengths)],
            [reference.paged_decode_attention(q, keys, values, pages, lengths)],
        ),
    )
    angles = torch.randn(64, d // 2, device=device)
    qkv, positions = make(5, h + 2 * k, d), torch.tensor([3, 1, 63, 0, 9], device=device)
    slots = torch.tensor([7, 3, -1, 0, 31], device=device)
    copies = keys.clone(), values.clone()
    arguments = (qkv, angles.cos(), angles.sin(), positions, slots)
    got = rope_append(*arguments, keys, values)
    expected = reference.rope_append(*arguments, *copies)
    yield Comparison("rope_append", dtype, largest_error([got, keys, values], [expected, *copies]))


def split_phase(sizes: Sizes, dtype: torch.dtype, device: str, ranks: int) -> Iterator[Comparison]:
    """Yield comparisons of split-phase reductions; ranks take turns on one stream, posts first."""
    generator = torch.Generator(device).manual_seed(1)
    memories = StreamRanks.group(ranks, device)
    d, k = sizes.width, sizes.ffn // ranks // 2 * 2
    exchanges = [Exchange(memory, 16, d, dtype, device, columns=64) for memory in memories]
    weights = torch.randn(ranks, d, k, generator=generator, device=device).to(dtype) / k**0.5
    residual = torch.randn(16, d, generator=generator, device=device).to(dtype)
    gain = torch.rand(d, generator=generator, device=device).to(dtype)
    for rows in (1, 3, 16):
        x = torch.randn(ranks, rows, k, generator=generator, device=device).to(dtype)
        for rank in range(ranks):
            gemv_post(x[rank], weights[rank], exchanges[rank])
        got = [wait_add_norm(residual[:rows], gain, 1e-5, exchange) for exchange in exchanges]
        partials = [(x[r].float() @ weights[r].float().T).to(dtype) for r in range(ranks)]
        total = (residual[:rows].float() + sum(part.float() for part in partials)).to(dtype)
        expected = (total, reference.rms_norm(total, gain, 1e-5))
        errors = [largest_error(pair, expected) for pair in got]
        yield Comparison(
            f"gemv_post + wait_add_norm, {ranks} ranks, {rows} rows", dtype, max(errors)
        )
        for rank in range(ranks):
            post(partials[rank], exchanges[rank])
        sums = [wait_sum(rows, exchange) for exchange in exchanges]
        summed = sum(part.float() for part in partials)
        assert isinstance(summed, Tensor)
        yield Comparison(
            f"post + wait_sum, {ranks} ranks, {rows} rows",
            dtype,
            largest_error(sums, [summed.to(dtype)] * ranks),
        )


def all_reduces(dtype: torch.dtype, ranks: int) -> Iterator[Comparison]:
    """Yield comparisons of all-reduces between ranks that run concurrently as streams."""
    for elements in (1000, 2**16, 2**22):
        memories = StreamRanks.group(ranks, "cuda")
        parts = torch.randn(ranks, elements, device="cuda").to(dtype)
        reduces = [AllReduce(memory, elements, dtype, "cuda", programs=8) for memory in memories]
        calls = [partial(reduce, part) for reduce, part in zip(reduces, parts, strict=True)]
        graph, sums = capture_graph(calls, reduces)
        graph.replay()
        torch.cuda.synchronize()
        expected = [parts.float().sum(0).to(dtype)] * ranks
        yield Comparison(
            f"all_reduce, {ranks} ranks, {elements} elements", dtype, largest_error(sums, expected)
        )


def decoders(dtype: torch.dtype) -> Iterator[Comparison]:
    """Yield comparisons of decoders: two ranks as captured streams, and one unsharded rank."""
    shape = DecoderShape(layers=3, width=1024, heads=16, kv_heads=4, head_dim=64, ffn=2816)
    part = replace(shape, layers=2)
    narrow = replace(part, width=512, ffn=1408)
    models = {"": [shape], "stitched ": [part, narrow, part]}
    schemes: tuple[Scheme, ...] = ("standard", "ladder")
    for pinned, scheme, (kind, shapes) in itertools.product((False, True), schemes, models.items()):
        pair = StreamPair(shapes, dtype, 2, 64, pinned=pinned)
        graph, outputs = capture_graph(pair.steps(scheme), pair.exchanges)
        pair.rewind()
        whole = whole_decoders(shapes, dtype, "cuda", 2, 64)
        own = Exchange(StreamRanks.group(1, "cuda")[0], 2, shape.width, dtype, "cuda")
        error = 0.0
        for _ in range(20):
            graph.replay()
            expected = stitched_step(whole, pair.stitches, pair.x, own, scheme)
            torch.cuda.synchronize()
            error = max(error, largest_error(outputs, [expected] * 2))
        place = "pinned host" if pinned else "device"
        yield Comparison(f"{kind}{scheme} decoder, 2 ranks, {place} slots", dtype, error)


def comparisons() -> Iterator[Comparison]:
    """Yield all comparisons; in the interpreter only those of the first part."""
    if interpreted():
        for dtype in (torch.float32, torch.float16):
            yield from single_rank(SMALL, dtype, "cpu")
            yield from split_phase(SMALL, dtype, "cpu", 2)
            yield from crossings(SMALL, dtype, "cpu", 2)
        return
    for dtype in TOLERANCES:
        yield from single_rank(Sizes(), dtype, "cuda")
        for ranks in (2, 8):
            yield from split_phase(Sizes(), dtype, "cuda", ranks)
            yield from crossings(Sizes(), dtype, "cuda", ranks)
        yield from all_reduces(dtype, 2)
        yield from all_reduces(dtype, 4)
        yield from decoders(dtype)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each comparison; return 1 if one failed, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m ladderstitch_kernels.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)
    if not interpreted() and (reason := missing_gpu()):
        print(f"skipped: {reason}")  # noqa: T201
        return 0
    torch.backends.cuda.matmul.allow_tf32 = False
    print(describe() if torch.cuda.is_available() else "in Triton's interpreter")  # noqa: T201
    failed = 0
    for comparison in comparisons():
        failed += not comparison.passed
        print(comparison, flush=True)  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
