"""Commands `hop`, `overhead`, `switching`, `mixed`, `memory`, `real-sizes` and `smollm2`."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from ladderstitch.cli.console import err, out, progress_bar
from ladderstitch_loadtest.benchmarks import gateway_overhead
from ladderstitch_loadtest.benchmarks import memory as memory_use
from ladderstitch_loadtest.benchmarks import mixed as mixed_budgets
from ladderstitch_loadtest.benchmarks import overhead as server_overhead
from ladderstitch_loadtest.benchmarks import real_sizes as published_sizes
from ladderstitch_loadtest.benchmarks import switching as switch_cost
from ladderstitch_loadtest.cli_options import (
    Address,
    Images,
    OutFolder,
    Ray,
    Seed,
    running_server,
)
from ladderstitch_loadtest.servers.process_supervisor import (
    replicas_and_gateways,
    wait_until_serving,
)
from ladderstitch_loadtest.servers.processes import echo_server
from ladderstitch_loadtest.servers.results_io import write


def hop(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of direct and gateway calls.")] = 15,
    folder: OutFolder = None,
) -> None:
    """Measure the latency that a gateway adds for one caller, with direct and gateway in turn."""
    with err.status("starting"), replicas_and_gateways(replicas=1) as ((replica,), (gateway,)):
        wait_until_serving([gateway], 1)
        found = asyncio.run(gateway_overhead.measure(replica.address, gateway.address, rounds))
    table = Table("", "direct", "gateway", "added", title="one caller, fastest variant, one image")
    table.add_row(
        "p50", f"{found.direct_p50_ms} ms", f"{found.gateway_p50_ms} ms", f"{found.added_p50_ms} ms"
    )
    table.add_row(
        "p95", f"{found.direct_p95_ms} ms", f"{found.gateway_p95_ms} ms", f"{found.added_p95_ms} ms"
    )
    out.print(table)
    write(folder, "hop", found.to_dict())


def overhead(
    address: Address = None,
    ray: Ray = True,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of echo and server.")] = 7,
    seconds: Annotated[float, typer.Option(help="Length of each throughput run.")] = 2.0,
    folder: OutFolder = None,
) -> None:
    """Compare a server with a bare gRPC echo: latency at 1 caller, throughput at 8 and 32."""
    with running_server(address, ray) as server, echo_server() as echo:
        found = asyncio.run(server_overhead.measure(server, echo, rounds, (8, 32), seconds))
    single = found.latency
    table = Table("callers", "echo", "server", "ratio", title="server compared with a bare echo")
    table.add_row(
        "1, p50 without compute",
        f"{single.echo_ms:.2f} ms",
        f"{single.overhead_ms:.2f} ms (+ {single.compute_ms:.2f} compute)",
        f"{single.overhead_over_echo:.2f}",
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


def switching(
    address: Address = None,
    ray: Ray = False,
    calls: Annotated[int, typer.Option(min=100, help="Requests, one after another.")] = 8000,
    seed: Seed = 1,
    folder: OutFolder = None,
) -> None:
    """Measure the compute time that a change of the variant between two requests costs."""
    with running_server(address, ray) as server, progress_bar() as progress:
        task = progress.add_task("switching", total=calls)
        found = asyncio.run(
            switch_cost.measure(server, calls, seed, lambda: progress.advance(task))
        )
    table = Table(
        "compute time over the variant's median",
        "p50",
        "p99",
        title=f"{found.calls} calls, {found.variants} variants",
    )
    for name, p50, p99 in (
        ("variant kept", found.kept_excess_p50_us, found.kept_excess_p99_us),
        ("variant switched", found.switched_excess_p50_us, found.switched_excess_p99_us),
        ("difference of the quantiles", found.p50_difference_us, found.p99_difference_us),
    ):
        table.add_row(name, f"{p50:.1f} us", f"{p99:.1f} us")
    out.print(table)
    write(folder, "switching", found.to_dict())


def mixed(
    address: Address = None,
    ray: Ray = False,
    images: Images = 16,
    load: Annotated[
        float, typer.Option(help="Offered rate over what the best variant can answer.")
    ] = 2.0,
    seconds: Annotated[float, typer.Option(help="Length of each run.")] = 6.0,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each policy.")] = 3,
    seed: Seed = 1,
    folder: OutFolder = None,
) -> None:
    """Compare policies and fixed variants under Poisson load with three budgets."""
    with running_server(address, ray) as server, err.status("measuring variants ...") as status:
        found = asyncio.run(
            mixed_budgets.measure(
                server,
                images=images,
                load=load,
                seconds=seconds,
                rounds=rounds,
                seed=seed,
                policies=mixed_budgets.POLICIES,
                advance=lambda name: status.update(f"policy {name} ..."),
            )
        )
    out.print(_mixed_table(found))
    write(folder, "mixed", found.to_dict())


def _mixed_table(found: mixed_budgets.MixedResult) -> Table:
    classes = list(found.budgets_ms)
    budgets = ", ".join(f"{name} {ms:.1f} ms" for name, ms in found.budgets_ms.items())
    table = Table(
        "policy",
        "attainment",
        *classes,
        "effective quality",
        "adaptive ahead",
        "p50",
        "p99",
        "batch",
        title=f"{found.rate:.0f} requests/s of {found.images} images, budgets {budgets}",
    )
    for row in sorted(found.rows, key=lambda row: -row.effective_quality):
        table.add_row(
            row.policy,
            f"{row.attainment:.4f}",
            *(f"{row.by_class[name]:.4f}" for name in classes),
            f"{row.effective_quality:.4f}",
            f"{row.behind:+.2f} ± {row.behind_half_width:.2f}",
            f"{row.client_p50_ms:.1f} ms",
            f"{row.client_p99_ms:.1f} ms",
            f"{row.mean_batch:.2f}",
        )
    return table


def memory(folder: OutFolder = None) -> None:
    """Compare the memory of 71 stitches with that of their anchors and stitching layers."""
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


def real_sizes(folder: OutFolder = None) -> None:
    """Measure SN-Net's DeiT and Swin families at their published sizes.

    Measures memory, load time and anchors of random weights, and compares the route executor with a
    straight-line forward pass.
    """
    found = [published_sizes.measure(family) for family in published_sizes.FAMILIES]
    executor = published_sizes.executor_overhead()
    table = Table(
        "family",
        "parameters",
        "variants",
        "tensors",
        "resident",
        "ratio",
        "load",
        "anchors at batch 1",
        "over whole graphs",
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
            ", ".join(f"{ratio:.2f}x" for ratio in row.whole_ratios),
        )
    out.print(table)
    out.print(f"route executor over straight line, DeiT-S: {executor['median_ratio']}x")
    write(folder, "real-sizes", {"families": [r.to_dict() for r in found], "executor": executor})


def smollm2(
    text: Annotated[
        Path | None, typer.Option(help="Text file to measure perplexity on; unset: skip it.")
    ] = None,
    folder: OutFolder = None,
) -> None:
    """Compare SmolLM2-135M with `transformers`: tokens, ranks, perplexity, speed, memory.

    Also measures the loss of ranks. Needs `ladderstitch fetch smollm2` and takes about 5 minutes.
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
