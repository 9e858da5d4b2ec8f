"""The commands `predict`, `models` and `schedule`, which call a running server."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.text import Text

from ladderstitch.cli.console import (
    Address,
    MinQuality,
    ModelName,
    Priority,
    Variant,
    connect,
    err,
    exit_on_failure,
    format_failure,
    format_ms,
    out,
    parse_duration,
    plain_table,
)
from ladderstitch.cli.options import with_config_options
from ladderstitch.cli.tensors import tensor_table, write_outputs
from ladderstitch.client import Client, Prediction, RequestFailed, scheduling_settings
from ladderstitch.client.calls import DEFAULT_ADDRESS
from ladderstitch.errors import ConfigError
from ladderstitch.scheduling.settings import SchedulerSettings

if TYPE_CHECKING:
    from rich.table import Table

    from ladderstitch.client.messages import InferOptions
    from ladderstitch.v1 import admin_pb2, inference_pb2

WIDE_COLUMNS = 100
"""Width of the terminal, in columns, from which `predict` prints all columns."""


def predict(
    context: typer.Context,
    images: Annotated[
        list[Path], typer.Argument(help="PNG or JPEG files, or .npy files of inputs [batch, ...].")
    ],
    budget: Annotated[str | None, typer.Option(help="Latency budget, e.g. 800us or 5ms.")] = None,
    hard: Annotated[
        bool,
        typer.Option(
            "--hard", help="Treat the budget as a hard deadline: fail instead of answering late."
        ),
    ] = False,
    min_quality: MinQuality = None,
    variant: Variant = None,
    priority: Priority = 0,
    min_confidence: Annotated[
        float | None,
        typer.Option(
            help="Confidence, 0 to 1, from which the answer of a cheap variant suffices; only "
            "images that it is less sure of go on to a better one."
        ),
    ] = None,
    model: ModelName = "",
    output: Annotated[
        Path | None,
        typer.Option(help="NPZ file for all outputs by name, of all files along the first axis."),
    ] = None,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Classify images, each with the most accurate variant that meets the latency budget.

    Of models that return tensors, shape and range of each output are printed.
    """
    answers: list[tuple[str, Prediction]] = []
    with exit_on_failure(address), connect(context, address) as client:
        options: InferOptions = {
            "budget_s": parse_duration(budget) if budget else None,
            "hard": hard,
            "min_quality": min_quality,
            "variant": variant,
            "priority": priority,
            "min_confidence": min_confidence,
            "model": model,
        }
        for path in images:
            try:
                answers.append((path.name, client.predict(_read(path), **options)))
            except RequestFailed as error:
                err.print(f"{path.name}: {format_failure(error, address)}", highlight=False)
                if error.code.name == "UNAVAILABLE":
                    break
        if answers and answers[0][1].outputs:
            out.print(tensor_table(answers))
        elif answers:
            out.print(_answer_table(answers))
        if answers and output is not None:
            write_outputs(output, [answer for _, answer in answers])
        if advice := _advise(client, model, [answer for _, answer in answers]):
            err.print(advice, highlight=False)
    raise typer.Exit(int(len(answers) < len(images)))


def _advise(client: Client, model: str, answers: list[Prediction]) -> str:
    """Return what would have been possible if budgets were missed, and nothing otherwise."""
    missed = [answer for answer in answers if answer.budget_met is False]
    if not missed:
        return ""
    details = client.get_model(model)
    planned_us = {v.id: v.planned_latency_us for v in details.variants if v.id in details.frontier}
    around_s = median(answer.total_s - answer.compute_s for answer in answers)
    fastest, best = format_ms(
        *(us / 1e6 + around_s for us in (min(planned_us.values()), max(planned_us.values())))
    )
    return (
        f"{len(missed)} of {len(answers)} budgets were missed; an idle server keeps "
        f"{fastest} with its fastest variant and {best} with its best one"
    )


def _read(path: Path) -> bytes | NDArray[Any]:
    """Return the bytes of an image file, or the array of a .npy file in a type that models take."""
    try:
        if path.suffix != ".npy":
            return path.read_bytes()
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"image: {path}: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ConfigError(f"image: {path}: expected a .npy file of numbers")
    return array if array.dtype == np.uint8 else array.astype(np.float32)


def _answer_table(answers: list[tuple[str, Prediction]]) -> Table:
    """Return a table of answers; a narrow terminal shows neither variant ids nor latency parts."""
    wide = out.width >= WIDE_COLUMNS
    latencies = ("queue", "compute", "total") if wide else ("total",)
    sure = any(answer.confidence is not None for _, answer in answers)
    certainty = ("confidence", "stages") if sure else ()
    columns = ("image", "label", "p", "variant", "quality", *certainty, *latencies, "budget")
    cells = [_answer_cells(name, answer, wide=wide, sure=sure) for name, answer in answers]
    return plain_table(columns, cells, text=("image", "label", "variant"))


def _answer_cells(
    name: str, answer: Prediction, *, wide: bool, sure: bool
) -> tuple[str | Text, ...]:
    variant = f"{answer.variant} ({answer.variant_name})" if wide else answer.variant_name
    parts = (answer.queue_s, answer.compute_s) if wide else ()
    confidence = "-" if answer.confidence is None else f"{answer.confidence:.3f}"
    certainty = (confidence, "+".join(map(str, answer.stages)) or "-") if sure else ()
    budget_s = answer.total_s if answer.budget_s is None else answer.budget_s
    total, budget = format_ms(answer.total_s, budget_s)
    return (
        name,
        Text(answer.label, style="bold"),
        f"{answer.probability:.2f}",
        variant,
        f"{answer.quality:.4f}",
        *certainty,
        *(f"{1e3 * seconds:.2f} ms" for seconds in parts),
        total,
        _format_budget(answer, budget),
    )


def _format_budget(answer: Prediction, budget: str) -> Text:
    """Return the caller's budget and whether it was met; `-` if the caller gave none."""
    if answer.budget_s is None or answer.budget_source != "field":
        return Text("-")
    result = ("met", "green") if answer.budget_met else ("missed", "red")
    return Text.assemble(f"{budget} ", result)


def models(context: typer.Context, address: Address = DEFAULT_ADDRESS) -> None:
    """List models with the quality and latency of each variant."""
    with exit_on_failure(address), connect(context, address) as client:
        for summary in client.list_models().models:
            model = client.get_model(summary.name)
            title = f"{model.name} version {model.version}: {_describe(model)}"
            out.print(f"[bold]{title}[/]", highlight=False)
            if summary.generates_text:
                out.print(_text_variants(model))
            else:
                out.print(_vision_variants(model))


def _describe(model: inference_pb2.GetModelResponse) -> str:
    if not model.HasField("language"):
        return f"{model.quality_metric} on {model.quality_data}"
    text = model.language
    return (
        f"{text.quality_metric or 'quality not measured'}, {text.layers} layers, "
        f"{text.max_model_len} tokens of context, {text.tensor_parallel_size} ranks"
    )


def _vision_variants(model: inference_pb2.GetModelResponse) -> Table:
    """Return a table of the variants on the frontier of quality over latency."""
    columns = ("variant", "name", "quality", "expected", "planned")
    variants = {variant.id: variant for variant in model.variants}
    cells = [
        (
            str(variant.id),
            variant.name,
            f"{variant.quality:.4f}",
            f"{variant.latency_us / 1e3:.2f} ms",
            f"{variant.planned_latency_us / 1e3:.2f} ms",
        )
        for variant in (variants[number] for number in model.frontier)
    ]
    return plain_table(columns, cells, text=("name",))


def _text_variants(model: inference_pb2.GetModelResponse) -> Table:
    """Return a table of the variants of a language model."""
    columns = ("variant", "name", "residual", "quality", "per token")
    cells = [
        (
            str(variant.variant_id),
            variant.name,
            variant.residual,
            f"{variant.quality:.4f}" if variant.HasField("quality") else "-",
            f"{variant.planned_token_us / 1e3:.2f} ms",
        )
        for variant in model.language.variants
    ]
    return plain_table(columns, cells, text=("name", "residual"))


@with_config_options(SchedulerSettings, skip=("pinned_variant",), show_defaults=False)
def schedule(
    context: typer.Context,
    given: dict[str, Any],
    pin: Annotated[
        int | None, typer.Option(help="Id of a variant that overrides the policy.")
    ] = None,
    unpin: Annotated[bool, typer.Option("--unpin", help="Remove the pinned variant.")] = False,
    model: Annotated[
        str,
        typer.Option(help="Model whose variants are meant (default: the server's only one)."),
    ] = "",
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Show the scheduling settings of a running server, or change those that are given.

    They apply to all models and all replicas of a deployment, from the next batch on.
    `--fixed-variant` implies the policy `fixed`.
    """
    if "fixed_variant" in given:
        given.setdefault("policy", "fixed")
    with exit_on_failure(address), connect(context, address) as client:
        if given or unpin or pin is not None:
            scheduling = client.update_scheduling(model, **given, pinned_variant=pin, unpin=unpin)
        else:
            scheduling = client.get_scheduling(model)
    _print_settings(scheduling)


def _print_settings(scheduling: admin_pb2.Scheduling) -> None:
    for name, value in scheduling_settings(scheduling).items():
        out.print(f"{name}: {'-' if value is None else value}", highlight=False)
    if scheduling.unfit_models:
        names = ", ".join(scheduling.unfit_models)
        err.print(f"these settings do not fit {names}: the last ones that did apply there")


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    group = "Call a server"
    app.command(rich_help_panel=group)(predict)
    app.command(rich_help_panel=group)(models)
    app.command(rich_help_panel=group)(schedule)
