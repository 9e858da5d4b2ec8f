"""Command `fuzz`: mutated requests of all entrances, next to good callers."""

from __future__ import annotations

import asyncio
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ladderstitch.bundles import HOME_VARIABLE
from ladderstitch.cli.console import err, out, progress_bar
from ladderstitch.client import Client
from ladderstitch.text.manifest import TextManifest, write_manifest
from ladderstitch_loadtest.cli_options import OutFolder, Seed
from ladderstitch_loadtest.faults.fuzzing.campaign import (
    AllSenders,
    CampaignResult,
    run_campaign,
)
from ladderstitch_loadtest.faults.fuzzing.entrances import IMAGES, TEXT, all_entrances
from ladderstitch_loadtest.faults.fuzzing.good_callers import good_callers
from ladderstitch_loadtest.faults.fuzzing.http_sender import HttpSender
from ladderstitch_loadtest.faults.fuzzing.observations import (
    LAG,
    quantile_between,
    settled_footprint,
)
from ladderstitch_loadtest.faults.fuzzing.report import FuzzReport, group_faults, summarise_good
from ladderstitch_loadtest.faults.fuzzing.rpc_sender import RpcSender
from ladderstitch_loadtest.servers.processes import (
    OPENAI_URL,
    StartedServer,
    StartError,
    ladderstitch_server,
)
from ladderstitch_loadtest.servers.results_io import write
from ladderstitch_loadtest.servers.tiny_language import CONFIG, write_tiny

MAX_MODEL_LEN = 64
"""Context of the language model, short so that prompts over it are cheap."""
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
WARM_UP = 6000
"""Cases before memory is measured; a shorter run sends its own cases twice instead.

They start all processes that the server starts when they are first needed.
"""
WARM_UP_SEED = 1_000_003
QUIET_S, SETTLE_S = 8.0, 60.0
LOWER_PRIORITY = 5
MAX_PRINTED = 40


def fuzz(
    requests: Annotated[int, typer.Option(min=1, help="Number of requests.")] = 100_000,
    seed: Seed = 1,
    rate: Annotated[
        float, typer.Option(min=1, help="Largest number of requests/s, below an overload.")
    ] = 250.0,
    only: Annotated[
        int | None, typer.Option(min=0, help="Send the request with this index only; print it.")
    ] = None,
    timing: Annotated[
        bool,
        typer.Option(
            "--timing/--no-timing", help="Whether late good answers and a slow loop fail the run."
        ),
    ] = True,
    folder: OutFolder = None,
) -> None:
    """Send mutated requests of all protocols next to 8 good callers; exit with 1 if any is wrong.

    Equal seeds and indices make equal requests.
    """
    with fuzzed_server() as (server, http_address):
        err.print(server.ready_line)
        if only is not None:
            raise typer.Exit(_send_one(server, http_address, seed, only))
        os.nice(LOWER_PRIORITY)  # the good callers must not wait for this process
        report = run_fuzz(server, http_address, requests, seed, rate)
    failures = report.failures(timing=timing)
    out.print(_table(report))
    for count, fault, index in group_faults(report.campaign)[:MAX_PRINTED]:
        err.print(
            f"{count} x {fault} (--seed {seed} --only {index})", highlight=False, markup=False
        )
    for line in failures:
        err.print(f"[bold red]{line}[/]")
    write(folder, "fuzz", report.to_dict())
    raise typer.Exit(int(bool(failures)))


@contextmanager
def fuzzed_server(**fields: int) -> Iterator[tuple[StartedServer, str]]:
    """Run a server of an image model and a tiny language model; yield it and its HTTP address.

    `fields` are those of its configuration that differ from the defaults.
    """
    before = os.environ.get(HOME_VARIABLE)
    with tempfile.TemporaryDirectory() as home:
        write_chat_model(Path(home) / TEXT)
        config = Path(home) / "serve.yaml"
        fields = {"max_model_len": MAX_MODEL_LEN} | fields
        config.write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
        os.environ[HOME_VARIABLE] = home
        flags = ("--config", str(config), "--model", IMAGES, "--http-port", "0")
        try:
            with ladderstitch_server("--no-ray", *flags) as server:
                with Client(server.address) as client:
                    client.load_model(TEXT)
                yield server, _http_address(server)
        finally:
            os.environ.pop(HOME_VARIABLE)
            if before is not None:
                os.environ[HOME_VARIABLE] = before


def write_chat_model(path: Path) -> Path:
    """Write a tiny language model with a chat template and return its path."""
    write_tiny(path)
    manifest = TextManifest(
        name=TEXT,
        config=CONFIG,
        origin="random weights",
        licence="Apache-2.0",
        chat_template=TEMPLATE,
    )
    write_manifest(path, manifest)
    return path


def _http_address(server: StartedServer) -> str:
    found = OPENAI_URL.search(server.ready_line)
    if found is None:
        raise StartError(f"expected an HTTP address in the ready line, got {server.ready_line!r}")
    return found[1]


def _send_one(server: StartedServer, http_address: str, seed: int, index: int) -> int:
    """Send one case, print its verdict, and return the exit status."""
    found = asyncio.run(_send(server, http_address, seed, range(index, index + 1)))
    out.print(dict(found.ends), highlight=False)
    for wrong in found.wrong:
        err.print(f"{wrong.fault}\n{wrong.case}", highlight=False, markup=False)
    return int(bool(found.wrong))


def run_fuzz(
    server: StartedServer,
    http_address: str,
    requests: int,
    seed: int,
    rate: float,
    quiet_s: float = QUIET_S,
) -> FuzzReport:
    """Warm up, measure the quiet server, send all cases, and measure the server again.

    `quiet_s` is the time in seconds in which only the good callers call.
    """
    warm_up = (seed, range(requests)) if requests < WARM_UP else (WARM_UP_SEED, range(WARM_UP))
    asyncio.run(_send(server, http_address, *warm_up))
    before = settled_footprint(server.pid, None, SETTLE_S)
    with good_callers(server.address, http_address) as callers, progress_bar() as progress:
        time.sleep(quiet_s)
        page, started = server.read_metrics(), time.monotonic()
        task = progress.add_task("fuzz", total=requests)
        found = asyncio.run(
            _send(server, http_address, seed, range(requests), lambda: progress.advance(task), rate)
        )
        ended, after_page = time.monotonic(), server.read_metrics()
        samples = callers.stop()
    after = settled_footprint(server.pid, before, SETTLE_S)
    quiet, busy, late, faults = summarise_good(samples, started, ended)
    return FuzzReport(
        seed=seed,
        seconds=ended - started,
        campaign=found,
        quiet=quiet,
        busy=busy,
        late=late,
        good_faults=faults,
        before=before,
        after=after,
        lag_p99_s=quantile_between(page, after_page, LAG, 0.99),
    )


async def _send(
    server: StartedServer,
    http_address: str,
    seed: int,
    indices: range,
    advance: Callable[[], None] = lambda: None,
    rate: float = math.inf,
) -> CampaignResult:
    rpc, http = RpcSender(server.address), HttpSender(http_address)
    try:
        senders = AllSenders(rpc, http)
        return await run_campaign(senders, all_entrances(), seed, indices, advance, rate)
    finally:
        await rpc.close()
        await http.close()


def _table(report: FuzzReport) -> Table:
    found, before, after = report.campaign, report.before, report.after
    table = Table(
        "entrance",
        "ends",
        title=f"{found.requests} requests in {report.seconds:.0f} s, {found.num_wrong} wrong, "
        f"slowest {found.slowest_s:.2f} s",
        caption=f"good callers: p99 {report.quiet.p99_ms:.1f} ms quiet, {report.busy.p99_ms:.1f} "
        f"ms busy, longest {report.busy.max_ms:.1f} ms, {report.late} late, "
        f"{report.quiet.wrong + report.busy.wrong} wrong of {report.busy.answers}; "
        f"loop lag p99 {1e3 * report.lag_p99_s:.0f} ms; memory {before.memory_mb:.1f} -> "
        f"{after.memory_mb:.1f} MiB; descriptors {before.descriptors} -> {after.descriptors}",
    )
    ends: dict[str, list[str]] = {}
    for name, count in found.ends.most_common():
        entrance, _, status = name.partition(": ")
        ends.setdefault(entrance, []).append(f"{status} {count}")
    for entrance, statuses in sorted(ends.items()):
        table.add_row(entrance, ", ".join(statuses))
    return table
