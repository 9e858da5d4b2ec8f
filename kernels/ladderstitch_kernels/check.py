"""Everything that a GPU can prove of these kernels, in one run of a few minutes.

    python -m ladderstitch_kernels.check

runs every kernel at real sizes in float32, float16 and bfloat16 against its float32 reference, then
two ranks as streams of the GPU: a ladder and a standard decoder, over device memory and over pinned
host memory, in CUDA graphs, against the same decoder on one rank. It exits 1 if anything is off,
and says why and exits 0 where there is no GPU. With TRITON_INTERPRET=1 it runs the first part at
small sizes in the interpreter.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ladderstitch_kernels import reference
from ladderstitch_kernels.comm.all_reduce import AllReduce
from ladderstitch_kernels.comm.split_phase import Exchange, gemv_post, post, wait_add_norm, wait_sum
from ladderstitch_kernels.comm.symmetric import StreamRanks
from ladderstitch_kernels.decoder import Decoder, DecoderShape, Scheme, random_layers
from ladderstitch_kernels.device import captured, describe, missing_gpu
from ladderstitch_kernels.launch import interpreted
from ladderstitch_kernels.ops.add_rms_norm import add_rms_norm
from ladderstitch_kernels.ops.decode_attention import paged_decode_attention
from ladderstitch_kernels.ops.rope_append import rope_append
from ladderstitch_kernels.ops.stitch_linear import stitch_pending
from ladderstitch_kernels.ops.swiglu import swiglu
from ladderstitch_kernels.overlap import Pair

TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of the largest difference over the largest element."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One comparison."""

    name: str
    dtype: torch.dtype
    error: float

    @property
    def holds(self) -> bool:
        return self.error <= TOLERANCES[self.dtype]

    def __str__(self) -> str:
        verdict = "ok" if self.holds else f"FAILED: more than {TOLERANCES[self.dtype]:.1e}"
        kind = str(self.dtype).partition(".")[2]
        return f"{self.name:44}{kind:10}{self.error:9.1e}  {verdict}"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How big things are; powers of ten apart between a GPU and the interpreter."""

    rows: int = 333
    width: int = 8192
    ffn: int = 14336
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 128
    length: int = 8192


SMALL = Sizes(rows=3, width=48, ffn=80, heads=4, kv_heads=2, head_dim=16, length=40)


def worst(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference over the largest element; infinite for what is not a number."""
    errors = []
    for a, b in zip(got, expected, strict=True):
        difference = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-9)
        errors.append(difference.nan_to_num(nan=float("inf")).item())
    return max(errors)


def single_rank(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Finding]:
    """Every kernel that one rank runs by itself."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    m, d, f = sizes.rows, sizes.width, sizes.ffn
    x, residual, gain = random(m, d), random(m, d), random(d)
    yield Finding(
        "add_rms_norm",
        dtype,
        worst(
            add_rms_norm(x, residual, gain, 1e-5), reference.add_rms_norm(x, residual, gain, 1e-5)
        ),
    )
    gate_up = random(m, 2 * f)
    yield Finding("swiglu", dtype, worst([swiglu(gate_up)], [reference.swiglu(gate_up)]))
    weight, bias, down, up = random(f, d), random(f), random(16, d), random(f, 16)
    for rows in (1, min(m, 40), m):
        arguments = (x[:rows], residual[:rows], weight / d**0.5, bias, down / d**0.5, up / 4)
        yield Finding(
            f"stitch_pending, {rows} rows",
            dtype,
            worst(stitch_pending(*arguments), reference.stitch_pending(*arguments)),
        )
    yield from _attention(sizes, dtype, device, random)


def _attention(
    sizes: Sizes, dtype: torch.dtype, device: str, make: Callable[..., Tensor]
) -> Iterator[Finding]:
    h, k, d, page = sizes.heads, sizes.kv_heads, sizes.head_dim, 16
    lengths = torch.tensor([sizes.length, 1, sizes.length // 3], device=device, dtype=torch.int32)
    pages = torch.arange(3 * -(-sizes.length // page), device=device, dtype=torch.int32).view(3, -1)
    keys, values, q = (
        make(pages.numel(), page, k, d),
        make(pages.numel(), page, k, d),
        make(3, h, d),
    )
    yield Finding(
        "paged_decode_attention",
        dtype,
        worst(
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
    yield Finding("rope_append", dtype, worst([got, keys, values], [expected, *copies]))


def split_phase(sizes: Sizes, dtype: torch.dtype, device: str, ranks: int) -> Iterator[Finding]:
    """Ranks taking turns on one stream: posts first, then waits."""
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
        errors = [worst(pair, expected) for pair in got]
        yield Finding(f"gemv_post + wait_add_norm, {rows} rows", dtype, max(errors))
        for rank in range(ranks):
            post(partials[rank], exchanges[rank])
        sums = [wait_sum(rows, exchange) for exchange in exchanges]
        summed = sum(part.float() for part in partials)
        assert isinstance(summed, Tensor)
        yield Finding(
            f"post + wait_sum, {rows} rows", dtype, worst(sums, [summed.to(dtype)] * ranks)
        )


def all_reduces(dtype: torch.dtype, ranks: int) -> Iterator[Finding]:
    """Ranks as streams, all spinning at once."""
    for elements in (1000, 2**16, 2**22):
        memories = StreamRanks.group(ranks, "cuda")
        parts = torch.randn(ranks, elements, device="cuda").to(dtype)
        graph, sums = captured(
            [
                partial(AllReduce(memory, elements, dtype, "cuda", programs=8), part)
                for memory, part in zip(memories, parts, strict=True)
            ]
        )
        graph.replay()
        torch.cuda.synchronize()
        expected = [parts.float().sum(0).to(dtype)] * ranks
        yield Finding(
            f"all_reduce, {ranks} ranks, {elements} elements", dtype, worst(sums, expected)
        )


def decoders(dtype: torch.dtype) -> Iterator[Finding]:
    """Two ranks as streams, captured and replayed, against one rank that holds everything."""
    shape = DecoderShape(layers=3, width=1024, heads=16, kv_heads=4, head_dim=64, ffn=2816)
    schemes: tuple[Scheme, ...] = ("standard", "ladder")
    for pinned, scheme in itertools.product((False, True), schemes):
        pair = Pair(shape, dtype, 2, 64, pinned=pinned)
        graph, outputs = captured(pair.steps(scheme))
        pair.rewind()
        whole = Decoder(shape, list(random_layers(shape, 0, dtype, "cuda")), 2, 64)
        own = Exchange(StreamRanks.group(1, "cuda")[0], 2, shape.width, dtype, "cuda")
        error = 0.0
        for _ in range(20):
            graph.replay()
            expected = whole.step(pair.x, own, scheme)
            torch.cuda.synchronize()
            error = max(error, worst(outputs, [expected] * 2))
        place = "pinned host" if pinned else "device"
        yield Finding(f"{scheme} decoder, 2 ranks, {place} slots", dtype, error)


def findings() -> Iterator[Finding]:
    """Everything, in order."""
    if interpreted():
        for dtype in (torch.float32, torch.float16):
            yield from single_rank(SMALL, dtype, "cpu")
            yield from split_phase(SMALL, dtype, "cpu", 2)
        return
    for dtype in TOLERANCES:
        yield from single_rank(Sizes(), dtype, "cuda")
        for ranks in (2, 8):
            yield from split_phase(Sizes(), dtype, "cuda", ranks)
        yield from all_reduces(dtype, 2)
        yield from all_reduces(dtype, 4)
        yield from decoders(dtype)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print a line for each comparison, and count what is off."""
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
    for finding in findings():
        failed += not finding.holds
        print(finding, flush=True)  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
