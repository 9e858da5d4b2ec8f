"""Command `stream`: open-loop load of prompts on a server that streams text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from ladderstitch.cli.console import err, out
from ladderstitch_loadtest.cli_options import (
    MinAttainment,
    ModelName,
    Processes,
    RunningServer,
    RunSeconds,
    Target,
)
from ladderstitch_loadtest.load.arrival_options import (
    ArrivalFile,
    Arrivals,
    Cv2,
    arrival_times,
)
from ladderstitch_loadtest.load.cli import exit_status
from ladderstitch_loadtest.load.outcome import format_figure
from ladderstitch_loadtest.load.prompts import (
    Lengths,
    StreamTrace,
    TokenClass,
    draw_lengths,
    fit_context,
)
from ladderstitch_loadtest.load.stream_report import write_stream_report
from ladderstitch_loadtest.load.text_load import (
    StreamClassSummary,
    StreamRun,
    StreamSummary,
    measure_streams,
)
from ladderstitch_loadtest.load.text_targets import find_text_target
from ladderstitch_loadtest.load.traces import read_lengths
from ladderstitch_loadtest.servers.results_io import write

TokenBudgets = Annotated[
    list[str],
    typer.Option("--budget", help="Budget class as NAME:FIRST_MS:TOKEN_MS[:SHARE]; repeatable."),
]
PromptLengths = Annotated[
    str | None,
    typer.Option(
        "--prompt-tokens", help="N, or A-B for uniform lengths; unset: from the file, else 64."
    ),
]
AnswerLengths = Annotated[
    str | None,
    typer.Option(
        "--answer-tokens", help="N, or A-B for uniform lengths; unset: from the file, else 32."
    ),
]
MinGoodput = Annotated[
    float | None, typer.Option(min=0, help="Exit with 1 if fewer tokens/s meet their budgets.")
]


def stream(
    address: RunningServer,
    rate: Annotated[float, typer.Option(min=0.01, help="Mean streams started per second.")] = 2.0,
    seconds: RunSeconds = 30.0,
    arrivals: Arrivals = "poisson",
    cv2: Cv2 = 4.0,
    file: ArrivalFile = None,
    budget: TokenBudgets = ["tokens:1000:150"],  # noqa: B006 # typer reads it only
    prompt_tokens: PromptLengths = None,
    answer_tokens: AnswerLengths = None,
    target: Target = "ladderstitch",
    model: ModelName = "",
    processes: Processes = 1,
    seed: Annotated[int, typer.Option(help="Seed of arrivals, budgets, lengths, prompts.")] = 1,
    min_attainment: MinAttainment = None,
    min_goodput: MinGoodput = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for streams.json and streams.html.")
    ] = None,
) -> None:
    """Send open-loop load of text streams: each prompt is sent when due, answered or not.

    Exits with 1 if a minimum is missed, and with 2 if the generator was the bottleneck.
    """
    rng = np.random.default_rng(seed)
    times = arrival_times(arrivals, rate, seconds, cv2, file, rng)
    if not len(times):
        raise typer.BadParameter("no stream starts within --seconds: raise --rate or --seconds")
    try:
        server = find_text_target(address, target, model)
        classes = [TokenClass.parse(text) for text in budget]
        recorded = file if arrivals == "replay" else None
        prompt, answer = _draw_lengths(prompt_tokens, answer_tokens, recorded, len(times), rng)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    prompt, answer = fit_context(prompt, answer, server.max_model_len)
    trace = StreamTrace.draw(arrivals, times, classes, prompt, answer, rng)
    with err.status(f"{len(trace)} streams over {times[-1]:.0f} s ..."):
        done = measure_streams(address, server, trace, processes=processes, seed=seed)
    summary = done.summary()
    out.print(_summary_table(summary))
    facts: dict[str, object] = {
        "server": address,
        "arrivals": arrivals,
        "rate": rate,
        "seconds": seconds,
        "seed": seed,
        "budgets": ", ".join(budget),
        "processes": processes,
        "prompt tokens": _describe_lengths(prompt),
        "answer tokens": _describe_lengths(answer),
    }
    _write_results(folder, f"Streams from {address}", done, summary, facts)
    minimums = {
        "attainment": (min_attainment, summary.attainment),
        "goodput": (min_goodput, summary.goodput_tokens_per_s),
    }
    raise typer.Exit(exit_status(done.late_s, minimums))


def _draw_lengths(
    prompt: str | None, answer: str | None, file: Path | None, count: int, rng: np.random.Generator
) -> tuple[Lengths, Lengths]:
    """Return prompt and answer lengths [count], from the options or the replayed `file`.

    Raises `ValueError` for an option or a file that cannot be read.
    """
    if file is not None and None in (prompt, answer):
        recorded = np.resize(np.maximum(read_lengths(file), 1), (count, 2))
        lengths = recorded[:, 0], recorded[:, 1]
    else:
        lengths = draw_lengths("64", count, rng), draw_lengths("32", count, rng)
    return (
        lengths[0] if prompt is None else draw_lengths(prompt, count, rng),
        lengths[1] if answer is None else draw_lengths(answer, count, rng),
    )


def _describe_lengths(lengths: Lengths) -> str:
    return f"{lengths.min()} to {lengths.max()}, mean {lengths.mean():.0f}"


def _write_results(
    folder: Path | None,
    title: str,
    done: StreamRun,
    summary: StreamSummary,
    facts: dict[str, object],
) -> None:
    seen = {"late": done.late, "lag_p99_ms": round(1e3 * done.lag_p99_s, 3)}
    write(folder, "streams", {"load": facts} | seen | {"summary": summary.to_dict()})
    if folder is not None:
        write_stream_report(folder / "streams.html", title, done, summary, facts)


def _summary_table(summary: StreamSummary) -> Table:
    """Return a row for each budget class; `-` is a figure that was not measured."""
    table = Table(
        "budget class",
        "offered",
        "attainment",
        "effective quality",
        "first token p50, p99",
        "between tokens p50, p99",
        title=f"attainment {100 * summary.attainment:.2f} %, {summary.tokens_per_s:.1f} tokens/s, "
        f"{summary.goodput_tokens_per_s:.1f} of them on time",
        caption=", ".join(
            f"{count} {name}" for name, count in (summary.statuses | summary.variants).items()
        ),
    )
    for one in summary.classes:
        table.add_row(*_class_cells(one))
    return table


def _class_cells(one: StreamClassSummary) -> list[str]:
    quantiles = [
        ", ".join(format_figure(one.latency_ms[part][q], ".1f") for q in ("p50", "p99"))
        for part in ("first token", "between tokens")
    ]
    return [
        f"{one.name}, {one.first_token_ms:g} + {one.token_ms:g} ms",
        str(one.offered),
        format_figure(100 * one.attainment),
        format_figure(100 * one.effective_quality),
        *(f"{pair} ms" for pair in quantiles),
    ]
