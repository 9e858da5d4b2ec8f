"""The `ladderstitch-loadtest` command: measurements of a running server, side by side and seeded.

Each command starts a server of its own unless `--address` names one, prints a table, and with
`--out FOLDER` writes NAME.json with the machine and the load.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import grpc
import torch
import typer
from rich.progress import Progress
from rich.table import Table

from ladderstitch.cli.console import err, out, progress_bar
from ladderstitch.v1 import inference_pb2, inference_pb2_grpc
from ladderstitch_loadtest.benchmarks import memory as memory_use
from ladderstitch_loadtest.benchmarks import mixed as mixed_budgets
from ladderstitch_loadtest.benchmarks import overhead as server_overhead
from ladderstitch_loadtest.benchmarks import real_sizes
from ladderstitch_loadtest.benchmarks import switching as switch_cost
from ladderstitch_loadtest.benchmarks.generation_cli import generation
from ladderstitch_loadtest.benchmarks.overlap_cli import overlap
from ladderstitch_loadtest.faults import fuzz_runner
from ladderstitch_loadtest.faults.cli import hop, kills
from ladderstitch_loadtest.faults.fuzz_text import TextCases
from ladderstitch_loadtest.faults.fuzz_vision import ImageCases
from ladderstitch_loadtest.faults.soak_cli import soak
from ladderstitch_loadtest.load.cli import agree, burst, run
from ladderstitch_loadtest.load.stream_cli import stream
from ladderstitch_loadtest.servers.processes import Served, echo_server, ladderstitch_server
from ladderstitch_loadtest.servers.results_io import write
from ladderstitch_loadtest.servers.tiny_language import write_tiny
from ladderstitch_loadtest.simulation.cli import compare, decisions, replay

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
for command in (
    run,
    stream,
    compare,
    decisions,
    replay,
    agree,
    burst,
    hop,
    kills,
    overlap,
    generation,
    soak,
):
    app.command()(command)

Address = Annotated[
    str | None, typer.Option(help="host:port of a running server; default: start one.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for NAME.json.")]
Ray = Annotated[bool, typer.Option("--ray/--no-ray", help="How to start the server.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


@contextmanager
def a_server(address: str | None, ray: bool) -> Iterator[tuple[str, int | None]]:
    """Address and process id of the server to measure."""
    if address is not None:
        yield address, None
        return
    with ladderstitch_server("--ray" if ray else "--no-ray") as served:
        err.print(served.ready_line)
        yield served.address, served.pid


@app.command()
def smollm2(
    text: Annotated[
        Path | None, typer.Option(help="Text file to measure perplexity on; default: skip it.")
    ] = None,
    folder: Out = None,
) -> None:
    """SmolLM2-135M beside `transformers`: tokens, ranks, perplexity, speed, dead ranks, memory.

    Needs `ladderstitch fetch smollm2`. About 5 minutes.
    """
    from ladderstitch.bundles import find_bundle
    from ladderstitch.importers.fetch import download
    from ladderstitch.text.bundle import TextBundle
    from ladderstitch_loadtest.benchmarks import language_checks, language_speed

    bundle = TextBundle.load(find_bundle("smollm2"))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as packages, progress_bar() as progress:
        file = download("smollm2", Path(packages))
        references = {
            dtype: language_checks.reference_model(file, getattr(torch, dtype))
            for dtype in ("float32", "bfloat16")
        }
        parts: dict[str, Coroutine[Any, Any, Any]] = {
            "agreement": language_checks.agreement(bundle, references["float32"]),
            "rank_counts": language_checks.rank_counts(bundle),
            "decoding": language_speed.decoding(bundle, references),
            "rank_losses": language_speed.rank_losses(bundle),
            "shards": language_checks.shards(),
        }
        if text is not None:
            parts["perplexity"] = language_checks.perplexities(bundle, text.read_text())
        task = progress.add_task("", total=len(parts))
        for name, part in parts.items():
            progress.update(task, description=name)
            found[name] = asyncio.run(part)
            progress.advance(task)
    out.print_json(json.dumps(found))
    write(folder, "smollm2", found)


@app.command()
def overhead(
    address: Address = None,
    ray: Ray = True,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of echo and server.")] = 7,
    seconds: Annotated[float, typer.Option(help="Length of each throughput run.")] = 2.0,
    folder: Out = None,
) -> None:
    """Latency at one caller and throughput at 8 and 32, beside a bare gRPC echo."""
    with a_server(address, ray) as (where, _), echo_server() as echo:
        found = asyncio.run(server_overhead.measure(where, echo, rounds, (8, 32), seconds))
    one = found.latency
    table = Table("callers", "echo", "server", "ratio", title="server beside a bare echo")
    table.add_row(
        "1, p50 without compute",
        f"{one.echo_ms:.2f} ms",
        f"{one.overhead_ms:.2f} ms (+ {one.compute_ms:.2f} compute)",
        f"{one.overhead_over_echo:.2f}",
    )
    for many in found.throughput:
        table.add_row(
            str(many.callers),
            f"{many.echo_rps:.0f} /s",
            f"{many.infer_rps:.0f} /s",
            f"{many.ratio:.2f}",
        )
    out.print(table)
    write(folder, "overhead", found.to_dict())


@app.command()
def switching(
    address: Address = None,
    ray: Ray = False,
    calls: Annotated[int, typer.Option(min=100, help="Requests, one after another.")] = 8000,
    seed: Seed = 1,
    folder: Out = None,
) -> None:
    """What changing the variant between two requests costs."""
    with a_server(address, ray) as (where, _), progress_bar() as progress:
        task = progress.add_task("switching", total=calls)
        found = asyncio.run(switch_cost.measure(where, calls, seed, lambda: progress.advance(task)))
    table = Table("", "p50", "p99", title=f"excess over the median of {found.variants} variants")
    for name, p50, p99 in (
        ("same variant", found.same_p50_us, found.same_p99_us),
        ("switched", found.switched_p50_us, found.switched_p99_us),
        ("cost of switching", found.p50_cost_us, found.p99_cost_us),
    ):
        table.add_row(name, f"{p50:.1f} us", f"{p99:.1f} us")
    out.print(table)
    write(folder, "switching", found.to_dict())


@app.command()
def memory(
    folder: Out = None,
) -> None:
    """Memory of 71 stitches at once, beside that of their anchors and stitching layers."""
    found = memory_use.measure()
    table = Table("MiB", "", title=f"{found.family}: {found.stitches} stitches in one process")
    for name in (
        "anchors_and_layers",
        "model_storages",
        "plans",
        "resident_one_stitch",
        "resident_all_stitches",
    ):
        table.add_row(name.replace("_", " "), f"{getattr(found, name):.2f}")
    out.print(table)
    write(folder, "memory", found.to_dict())


@app.command("real-sizes")
def real_sizes_(
    folder: Out = None,
) -> None:
    """SN-Net's DeiT and Swin families at their real sizes: memory, load time, anchors; and what the
    route executor costs beside a straight-line forward.
    """
    found = [real_sizes.measure(family) for family in real_sizes.FAMILIES]
    overhead = real_sizes.executor_overhead()
    table = Table(
        "family",
        "parameters",
        "variants",
        "tensors",
        "resident",
        "ratio",
        "load",
        "anchors at batch 1",
        title="random weights, 224 x 224, one thread",
    )
    for row in found:
        table.add_row(
            row.family,
            f"{row.parameters_m} M",
            str(row.stitches),
            f"{row.tensor_mib} MiB",
            f"{row.resident_mib} MiB",
            f"{row.resident_ratio}",
            f"{row.load_s} s",
            ", ".join(f"{ms:.0f} ms" for ms in row.anchors_ms),
        )
    out.print(table)
    out.print(f"route executor over straight line, DeiT-S: {overhead['median_ratio']}x")
    write(folder, "real-sizes", {"families": [r.to_dict() for r in found], "executor": overhead})


@app.command()
def mixed(
    address: Address = None,
    ray: Ray = False,
    seconds: Annotated[float, typer.Option(help="Length of each run.")] = 6.0,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each policy.")] = 3,
    seed: Seed = 1,
    folder: Out = None,
) -> None:
    """Poisson load of mixed budgets: attainment and effective quality of every policy."""
    with a_server(address, ray) as (where, _), err.status("measuring anchors alone ...") as status:
        found = asyncio.run(
            mixed_budgets.measure(
                where,
                seconds=seconds,
                rounds=rounds,
                seed=seed,
                policies=mixed_budgets.POLICIES,
                advance=lambda name: status.update(f"policy {name} ..."),
            )
        )
    classes = list(found.budgets_ms)
    table = Table(
        "policy",
        "attainment",
        *classes,
        "effective quality",
        "p50",
        "p99",
        "batch",
        title=f"{found.rate:.0f} requests/s, budgets "
        + ", ".join(f"{name} {ms:.1f} ms" for name, ms in found.budgets_ms.items()),
    )
    for row in sorted(found.rows, key=lambda row: -row.effective_quality):
        table.add_row(
            row.policy,
            f"{row.attainment:.4f}",
            *(f"{row.by_class[name]:.4f}" for name in classes),
            f"{row.effective_quality:.4f}",
            f"{row.client_p50_ms:.1f} ms",
            f"{row.client_p99_ms:.1f} ms",
            f"{row.mean_batch:.2f}",
        )
    out.print(table)
    write(folder, "mixed", found.to_dict())


@app.command()
def malformed(
    requests: Annotated[int, typer.Option(min=1, help="How many.")] = 10_000,
    text: Annotated[
        bool, typer.Option("--text", help="To a tiny language model: also cancels, deadlines.")
    ] = False,
    seed: Seed = 1,
    folder: Out = None,
) -> None:
    """Malformed requests of every kind; exits with 1 unless each gets the right status."""
    with tempfile.TemporaryDirectory() as name, progress_bar() as progress:
        flags = ("--model", str(write_tiny(Path(name) / "tiny"))) if text else ()
        with ladderstitch_server("--no-ray", *flags) as served:
            err.print(served.ready_line)
            found = asyncio.run(_malformed(served, requests, seed, progress, text=text))
    for line in found.wrong[:20]:
        err.print(line, highlight=False)
    out.print(
        f"{sum(found.kinds.values())} malformed requests of {len(found.kinds)} kinds, "
        f"{len(found.wrong)} with a wrong status; {found.good_answers} good ones in between "
        f"answered; memory {found.memory_before_mb:.1f} -> {found.memory_after_mb:.1f} MiB"
    )
    figures = {
        "requests": sum(found.kinds.values()),
        "kinds": dict(found.kinds),
        "wrong": found.wrong,
        "good_answers": found.good_answers,
        "memory_before_mb": round(found.memory_before_mb, 1),
        "memory_after_mb": round(found.memory_after_mb, 1),
    }
    write(folder, "malformed-text" if text else "malformed", figures)
    raise typer.Exit(1 if found.wrong else 0)


async def _malformed(
    served: Served, requests: int, seed: int, progress: Progress, *, text: bool
) -> fuzz_runner.FuzzOutcome:
    task = progress.add_task("malformed", total=requests)
    pids = fuzz_runner.process_tree(served.pid)
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        model = await stub.GetModel(inference_pb2.GetModelRequest())
        cases = (TextCases if text else ImageCases)(model, channel, seed)
        return await fuzz_runner.run(cases, pids, requests, lambda: progress.advance(task))
