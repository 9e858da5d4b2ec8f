"""Speed of the kernels on this GPU, compared with torch, torch.compile and the copy bandwidth.

    python -m ladderstitch_kernels.bench --out kernels/results

Times are medians of interleaved calls with a cold L2 cache. The bandwidth of a kernel, from the
bytes that it must move, is given as a share of the copy bandwidth that the same run measures.
Overlap is measured with two ranks as streams. Writes DEVICE.json and DEVICE.md. Without a GPU it
prints the reason and exits with 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch_kernels.comm.split_phase import Exchange, gemv_post, post, wait_add_norm
from ladderstitch_kernels.comm.symmetric import StreamRanks
from ladderstitch_kernels.device import describe, medians_us, missing_gpu
from ladderstitch_kernels.ops.add_rms_norm import add_rms_norm
from ladderstitch_kernels.ops.decode_attention import paged_decode_attention
from ladderstitch_kernels.ops.stitch_linear import stitch_linear, stitch_pending
from ladderstitch_kernels.ops.swiglu import swiglu
from ladderstitch_kernels.overlap import SHAPE, STITCHED, measure_hidden

DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Timing:
    """The time of one kernel at one size, and of torch and torch.compile for the same op."""

    name: str
    us: float
    bytes: int
    bandwidth_share: float
    """Achieved bandwidth as a share of the copy bandwidth measured in the same run."""
    torch_us: float | None = None
    compiled_us: float | None = None


def random(*shape: int) -> Tensor:
    """Return normally distributed values on the GPU, in bfloat16."""
    return torch.randn(*shape, device="cuda").to(DTYPE)


def copy_bytes_per_s() -> float:
    """Return the bytes read and written per second by the driver's copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / (medians_us({"copy": lambda: target.copy_(source)})["copy"] * 1e-6)


class Bench:
    """The cases of the benchmark; `bandwidth` is the copy bandwidth in bytes/s."""

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = bandwidth

    def timing(
        self,
        name: str,
        moved_bytes: int,
        kernel: Callable[[], object],
        eager: Callable[[], object] | None = None,
        before: Callable[[], object] | None = None,
        after: Callable[[], object] | None = None,
    ) -> Timing:
        """Time a kernel, and the torch function `eager` if given, both eager and compiled.

        `moved_bytes` is what the kernel must read and write. `before` and `after` run around each
        call of the kernel and are not timed.
        """
        torch.compiler.reset()  # else the limit on recompilations of one function is reached
        calls: dict[str, Callable[[], object]] = {"kernel": kernel}
        if eager is not None:
            calls |= {"torch": eager, "compiled": torch.compile(eager, dynamic=False)}
        times = medians_us(
            calls,
            before={} if before is None else {"kernel": before},
            after={} if after is None else {"kernel": after},
        )
        share = moved_bytes / (times["kernel"] * 1e-6) / self.bandwidth
        return Timing(
            name, times["kernel"], moved_bytes, share, times.get("torch"), times.get("compiled")
        )

    def streams(self) -> Iterator[Timing]:
        """Time the kernels that are bound by memory bandwidth, at 8192 x 8192."""
        m = n = 8192
        x, residual, gain = random(m, n), random(m, n), random(n)
        size = m * n * DTYPE.itemsize

        def eager_norm() -> tuple[Tensor, Tensor]:
            total = residual + x
            return total, F.rms_norm(total, (n,), gain, 1e-5)

        yield self.timing(
            "add_rms_norm 8192 x 8192",
            4 * size,
            lambda: add_rms_norm(x, residual, gain, 1e-5),
            eager_norm,
        )
        gate_up = random(m, 2 * n)

        def eager_gate() -> Tensor:
            gate, up = gate_up.chunk(2, -1)
            return F.silu(gate) * up

        yield self.timing("swiglu 8192 x 8192", 3 * size, lambda: swiglu(gate_up), eager_gate)
        exchange = Exchange(StreamRanks.group(1, "cuda")[0], m, n, DTYPE, "cuda")
        yield self.timing(
            "wait_add_norm 8192 x 8192, arrived",
            4 * size,
            lambda: wait_add_norm(residual, gain, 1e-5, exchange),
            eager_norm,
            before=lambda: post(x, exchange),
        )

    def products(self) -> Iterator[Timing]:
        """Time row-parallel products of decoding a 70B Llama on 8 ranks, pushed to one rank."""
        for k in (1024, 3584):
            weight, gain = random(8192, k), random(8192)
            for rows in (1, 8, 16):
                x, residual = random(rows, k), random(rows, 8192)
                exchange = Exchange(StreamRanks.group(1, "cuda")[0], rows, 8192, DTYPE, "cuda")

                yield self.timing(
                    f"gemv_post {rows} x {k} -> 8192",
                    weight.nbytes,
                    partial(gemv_post, x, weight, exchange),
                    partial(F.linear, x, weight),
                    after=partial(wait_add_norm, residual, gain, 1e-5, exchange),
                )

    def attention(self) -> Iterator[Timing]:
        """Time decode attention with 32 heads, 8 KV heads and 8,192 tokens per sequence."""
        length, heads, kv_heads, d, page = 8192, 32, 8, 128, 16
        for batch in (1, 8, 32):
            pages = torch.arange(batch * length // page, dtype=torch.int32, device="cuda")
            pages = pages.view(batch, -1)
            lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
            q = random(batch, heads, d)
            keys, values = random(2, pages.numel(), page, kv_heads, d)
            k, v = (c.view(batch, length, kv_heads, d).transpose(1, 2) for c in (keys, values))

            def kernel(q=q, keys=keys, values=values, pages=pages, n=lengths) -> Tensor:
                return paged_decode_attention(q, keys, values, pages, n)

            def eager(q=q, k=k, v=v) -> Tensor:
                return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

            yield self.timing(
                f"paged_decode_attention {batch} x 8192", keys.nbytes + values.nbytes, kernel, eager
            )

    def crossings(self) -> Iterator[Timing]:
        """Time stitching layers that map the stream and a sum in flight, to half the width."""
        for m, k, n in ((1, 8192, 4096), (16, 8192, 4096), (16, 4096, 2048)):
            x, pending, weight, bias = (random(*shape) for shape in ((m, k), (m, k), (n, k), (n,)))

            def eager(x=x, pending=pending, w=weight, b=bias) -> tuple[Tensor, Tensor]:
                return F.linear(x, w, b), F.linear(pending, w)

            yield self.timing(
                f"stitch_pending {m} x {k} -> {n}",
                weight.nbytes + 2 * (x.nbytes + m * n * 2),
                partial(stitch_pending, x, pending, weight, bias),
                eager,
            )

    def stitches(self) -> Iterator[Timing]:
        """Time stitching layers between widths of DeiT and of Llama, plain and with rank 16."""
        for m, k, n in (
            (197, 384, 768),
            (197 * 32, 384, 768),
            (16, 4096, 8192),
            (2048, 4096, 8192),
        ):
            x, weight, bias, down, up = (
                random(*shape) for shape in ((m, k), (n, k), (n,), (16, k), (n, 16))
            )
            moved_bytes = x.nbytes + weight.nbytes + m * n * 2
            yield self.timing(
                f"stitch_linear {m} x {k} -> {n}",
                moved_bytes,
                partial(stitch_linear, x, weight, bias),
                partial(F.linear, x, weight, bias),
            )

            def eager(x=x, w=weight, b=bias, down=down, up=up) -> Tensor:
                return F.linear(x, w, b) + F.linear(F.linear(x, down), up)

            yield self.timing(
                f"stitch_linear {m} x {k} -> {n}, rank 16",
                moved_bytes,
                partial(stitch_linear, x, weight, bias, down, up),
                eager,
            )


def results() -> Iterator[dict[str, object]]:
    """Run all benchmarks and yield the figures after each part, with a line on stderr for each."""
    bandwidth = copy_bytes_per_s()
    bench = Bench(bandwidth)
    timings: list[dict[str, object]] = []
    overlaps: dict[str, dict[str, float]] = {}
    found = {
        **describe(),
        "copy_bytes_per_s": bandwidth,
        "kernels": timings,
        "two_ranks_as_streams": overlaps,
    }
    for part in (bench.streams, bench.products, bench.attention, bench.stitches, bench.crossings):
        print(part.__doc__, file=sys.stderr, flush=True)  # noqa: T201
        timings += [asdict(timing) for timing in part()]
        torch.cuda.empty_cache()
        yield found
    print("Time two ranks as streams.", file=sys.stderr, flush=True)  # noqa: T201
    models = {"": [SHAPE], ", stitched": STITCHED}
    for (kind, shapes), pinned, rows in itertools.product(models.items(), (True, False), (1, 8)):
        name = f"{rows} rows, {'pinned host' if pinned else 'device'} slots{kind}"
        overlaps[name] = measure_hidden(rows, shapes, pinned=pinned)
        yield found


def markdown(found: Mapping[str, object]) -> str:
    """Return the results as a page of two Markdown tables."""
    lines = [
        f"# {found['device']}, driver {found['driver']}, CUDA {found['cuda']}, "
        f"torch {found['torch']}, triton {found['triton']}",
        "",
        f"Copy bandwidth {float(str(found['copy_bytes_per_s'])) / 1e12:.2f} TB/s.",
        "",
        "| kernel | us | of bandwidth | torch | torch.compile |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    kernels, overlaps = found["kernels"], found["two_ranks_as_streams"]
    assert isinstance(kernels, list)
    assert isinstance(overlaps, dict)
    for row in kernels:
        ratios = [
            "" if row[key] is None else f"{row[key] / row['us']:.2f}x"
            for key in ("torch_us", "compiled_us")
        ]
        lines.append(
            f"| {row['name']} | {row['us']:.1f} | {row['bandwidth_share']:.0%} | {ratios[0]} "
            f"| {ratios[1]} |"
        )
    lines += [
        "",
        "| two ranks as streams | standard us | ladder us | no comm. us | speed-up | hidden |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in overlaps.items():
        lines.append(
            f"| {name} | {row['standard_us']:.0f} | {row['ladder_us']:.0f} "
            f"| {row['no_communication_us']:.0f} | {row['speedup']:.2f}x | {row['hidden']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all benchmarks, print the table and write both files; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ladderstitch_kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("kernels/results"))
    options = parser.parse_args(arguments)
    if reason := missing_gpu():
        print(f"skipped: {reason}")  # noqa: T201
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    table = ""
    for found in results():
        name = str(found["device"]).lower().replace(" ", "-")
        (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        table = markdown(found)
        (options.out / f"{name}.md").write_text(table)
    print(table)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
