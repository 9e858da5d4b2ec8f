"""`ladderstitch-loadtest stream`: open-loop load of prompts on a server that streams text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from ladderstitch.cli.console import err, out
from ladderstitch_loadtest.load.arrival_options import (
    ArrivalFile,
    Arrivals,
    Cv2,
    Process,
    arrival_times,
)
from ladderstitch_loadtest.load.prompts import (
    Lengths,
    StreamTrace,
    TokenClass,
    draw_lengths,
    fitted,
)
from ladderstitch_loadtest.load.stream_report import write_stream_report
from ladderstitch_loadtest.load.streams import StreamRun, StreamSummary, measure_streams
from ladderstitch_loadtest.load.targets import Kind
from ladderstitch_loadtest.load.text_targets import find_text_target
from ladderstitch_loadtest.load.traces import read_lengths
from ladderstitch_loadtest.servers.results_io import write


def stream(
    address: Annotated[str, typer.Argument(help="host:port of a running server.")],
    rate: Annotated[float, typer.Option(min=0.01, help="Mean streams begun a second.")] = 2.0,
    seconds: Annotated[float, typer.Option(min=0.1)] = 30.0,
    arrivals: Arrivals = "poisson",
    cv2: Cv2 = 4.0,
    file: ArrivalFile = None,
    budget: Annotated[
        list[str],
        typer.Option(help="NAME:FIRST_MS:TOKEN_MS[:SHARE], repeatable: the mix of token budgets."),
    ] = ["tokens:1000:150"],  # noqa: B006 # typer reads it only
    prompt_tokens: Annotated[
        str | None,
        typer.Option(help="N, or A-B: each as likely. Default: 64, or what the file says."),
    ] = None,
    answer_tokens: Annotated[
        str | None,
        typer.Option(help="N, or A-B: each as likely. Default: 32, or what the file says."),
    ] = None,
    target: Annotated[Kind, typer.Option(help="`oip` for any server of that protocol.")] = (
        "ladderstitch"
    ),
    model: Annotated[str, typer.Option(help="Name; needed for `oip`.")] = "",
    processes: Annotated[int, typer.Option(min=1, help="Generators side by side.")] = 1,
    seed: Annotated[int, typer.Option(help="Of arrivals, budgets, lengths and prompts.")] = 1,
    min_attainment: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit with 1 below it.")
    ] = None,
    min_goodput: Annotated[
        float | None, typer.Option(min=0, help="Tokens a second in time; exit with 1 below it.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for streams.json and streams.html.")
    ] = None,
) -> None:
    """Open-loop load of streams: prompts leave when due, whether or not others were answered.

    Exits with 1 when a bar is missed, with 2 when the generator was the bottleneck.
    """
    rng = np.random.default_rng(seed)
    times = arrival_times(arrivals, rate, seconds, cv2, file, rng)
    if not len(times):
        raise typer.BadParameter("no stream begins in so short a time: raise --rate or --seconds")
    try:
        asked = find_text_target(address, target, model)
        classes = [TokenClass.parse(text) for text in budget]
        prompt, answer = _lengths(prompt_tokens, answer_tokens, arrivals, file, len(times), rng)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    prompt, answer = fitted(prompt, answer, asked.max_model_len)
    trace = StreamTrace.draw(arrivals, times, classes, prompt, answer, rng)
    with err.status(f"{len(trace)} streams over {times[-1]:.0f} s ..."):
        run = measure_streams(address, asked, trace, processes=processes, seed=seed)
    summary = run.summary()
    out.print(table_of(summary))
    facts: dict[str, object] = {
        "server": address,
        "arrivals": arrivals,
        "rate": rate,
        "seconds": seconds,
        "seed": seed,
        "budgets": ", ".join(budget),
        "processes": processes,
        "prompt tokens": f"{prompt.min()} to {prompt.max()}, mean {prompt.mean():.0f}",
        "answer tokens": f"{answer.min()} to {answer.max()}, mean {answer.mean():.0f}",
    }
    seen = {"late": run.late, "lag_p99_ms": round(1e3 * run.lag_p99_s, 3)}
    write(folder, "streams", {"load": facts} | seen | {"summary": summary.to_dict()})
    if folder is not None:
        write_stream_report(folder / "streams.html", f"Streams from {address}", run, summary, facts)
    raise typer.Exit(_verdict(run, summary, min_attainment, min_goodput))


def _lengths(
    prompt: str | None,
    answer: str | None,
    arrivals: Process,
    file: Path | None,
    count: int,
    rng: np.random.Generator,
) -> tuple[Lengths, Lengths]:
    """Of each stream: as the options say, or the file that is replayed. Raises `ValueError`."""
    if arrivals == "replay" and file is not None and None in (prompt, answer):
        told = np.resize(np.maximum(read_lengths(file), 1), (count, 2))
        drawn = told[:, 0], told[:, 1]
    else:
        drawn = draw_lengths("64", count, rng), draw_lengths("32", count, rng)
    return (
        drawn[0] if prompt is None else draw_lengths(prompt, count, rng),
        drawn[1] if answer is None else draw_lengths(answer, count, rng),
    )


def table_of(summary: StreamSummary) -> Table:
    table = Table(
        "budget class",
        "offered",
        "attainment",
        "effective quality",
        "first token p50, p99",
        "between tokens p50, p99",
        title=f"attainment {100 * summary.attainment:.2f} %, {summary.tokens_per_s:.1f} tokens/s, "
        f"{summary.goodput_tokens_per_s:.1f} of them in time",
        caption=", ".join(
            f"{count} {name}" for name, count in (summary.statuses | summary.paths).items()
        ),
    )
    for one in summary.classes:
        parts = [
            f"{one.ms[part]['p50']:.1f}, {one.ms[part]['p99']:.1f} ms"
            for part in ("first token", "between tokens")
        ]
        table.add_row(
            f"{one.name}, {one.first_token_ms:g} + {one.token_ms:g} ms",
            str(one.offered),
            f"{100 * one.attainment:.2f}",
            f"{100 * one.effective_quality:.2f}",
            *parts,
        )
    return table


def _verdict(
    run: StreamRun, summary: StreamSummary, attainment: float | None, goodput: float | None
) -> int:
    status = 0
    for name, bar, got in (
        ("attainment", attainment, summary.attainment),
        ("goodput", goodput, summary.goodput_tokens_per_s),
    ):
        if bar is not None and got < bar:
            err.print(f"{name}: expected at least {bar:g}, got {got:.4f}")
            status = 1
    if run.late:
        err.print(
            f"the generator was late by {1e3 * run.lag_p99_s:.2f} ms (p99): give it more "
            "--processes or cores, or a lower --rate; these figures are its limit"
        )
        status = 2
    return status
