"""The commands `predict`, `models` and `schedule`, which call a running server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ladderstitch.cli.console import (
    Address,
    MinQuality,
    ModelName,
    Variant,
    connect,
    err,
    exit_on_failure,
    format_failure,
    out,
    parse_duration,
    plain_table,
)
from ladderstitch.client import Prediction, RequestFailed
from ladderstitch.client.calls import DEFAULT_ADDRESS
from ladderstitch.errors import ConfigError
from ladderstitch.scheduling.settings import PolicyName

if TYPE_CHECKING:
    from rich.table import Table

    from ladderstitch.client.messages import InferOptions
    from ladderstitch.v1 import inference_pb2

WIDE_COLUMNS = 100
"""Width of the terminal, in columns, from which `predict` prints all columns."""


def predict(
    context: typer.Context,
    images: Annotated[list[Path], typer.Argument(help="PNG or JPEG files.")],
    budget: Annotated[str | None, typer.Option(help="Latency budget, e.g. 800us or 5ms.")] = None,
    hard: Annotated[
        bool,
        typer.Option(
            "--hard", help="Treat the budget as a hard deadline: fail instead of answering late."
        ),
    ] = False,
    min_quality: MinQuality = None,
    variant: Variant = None,
    model: ModelName = "",
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Classify images, each with the most accurate variant that meets the latency budget."""
    answers: list[tuple[str, Prediction]] = []
    with exit_on_failure(address), connect(context, address) as client:
        options: InferOptions = {
            "budget_s": parse_duration(budget) if budget else None,
            "hard": hard,
            "min_quality": min_quality,
            "variant": variant,
            "model": model,
        }
        for path in images:
            try:
                answers.append((path.name, client.predict(_read(path), **options)))
            except RequestFailed as error:
                err.print(f"{path.name}: {format_failure(error, address)}", highlight=False)
                if error.code.name == "UNAVAILABLE":
                    break
    if answers:
        out.print(_answer_table(answers))
    raise typer.Exit(int(len(answers) < len(images)))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"image: {error}") from error


def _answer_table(answers: list[tuple[str, Prediction]]) -> Table:
    """Return a table of answers; a narrow terminal shows neither variant ids nor latency parts."""
    wide = out.width >= WIDE_COLUMNS
    latencies = ("queue", "compute", "total") if wide else ("total",)
    columns = ("image", "label", "p", "variant", "quality", *latencies, "budget")
    table = plain_table(*columns, text=("image", "label", "variant"))
    for name, answer in answers:
        variant = f"{answer.variant} ({answer.variant_name})" if wide else answer.variant_name
        parts = (answer.queue_s, answer.compute_s) if wide else ()
        table.add_row(
            name,
            f"[bold]{answer.label}[/]",
            f"{answer.probability:.2f}",
            variant,
            f"{answer.quality:.4f}",
            *(f"{1e3 * seconds:.2f} ms" for seconds in (*parts, answer.total_s)),
            _format_budget(answer),
        )
    return table


def _format_budget(answer: Prediction) -> str:
    if answer.budget_s is None:
        return "-"
    result = "[green]met[/]" if answer.budget_met else "[red]missed[/]"
    return f"{1e3 * answer.budget_s:.1f} ms {result}"


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
    table = plain_table("variant", "name", "quality", "expected", "planned", text=("name",))
    variants = {variant.id: variant for variant in model.variants}
    for variant in (variants[number] for number in model.frontier):
        table.add_row(
            str(variant.id),
            variant.name,
            f"{variant.quality:.4f}",
            f"{variant.latency_us / 1e3:.2f} ms",
            f"{variant.planned_latency_us / 1e3:.2f} ms",
        )
    return table


def _text_variants(model: inference_pb2.GetModelResponse) -> Table:
    """Return a table of the variants of a language model."""
    columns = ("variant", "name", "residual", "quality", "per token")
    table = plain_table(*columns, text=("name", "residual"))
    for variant in model.language.variants:
        table.add_row(
            str(variant.variant_id),
            variant.name,
            variant.residual,
            f"{variant.quality:.4f}" if variant.HasField("quality") else "-",
            f"{variant.planned_token_us / 1e3:.2f} ms",
        )
    return table


def schedule(
    context: typer.Context,
    policy: Annotated[
        PolicyName | None, typer.Option(help="How variants and batches are chosen.")
    ] = None,
    fixed_variant: Annotated[
        int | None,
        typer.Option(help="Id of the variant of the policy `fixed`; implies that policy."),
    ] = None,
    pin: Annotated[
        int | None, typer.Option(help="Id of a variant that overrides the policy.")
    ] = None,
    unpin: Annotated[bool, typer.Option("--unpin", help="Remove the pinned variant.")] = False,
    min_quality: Annotated[
        float | None, typer.Option(help="Minimum quality of every answer, 0 to 1.")
    ] = None,
    model: ModelName = "",
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Show or change how a running server chooses variants; changes apply to the next batch."""
    if fixed_variant is not None and policy is None:
        policy = "fixed"
    changes = (policy, pin, min_quality)
    with exit_on_failure(address), connect(context, address) as client:
        if not unpin and all(change is None for change in changes):
            out.print(client.get_scheduling(model))
            return
        scheduling = client.update_scheduling(
            model,
            policy=f"POLICY_NAME_{policy.upper()}" if policy else None,
            fixed_variant=fixed_variant,
            pinned_variant=pin,
            unpin=unpin,
            min_quality=min_quality,
        )
        out.print(scheduling)


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    group = "Call a server"
    app.command(rich_help_panel=group)(predict)
    app.command(rich_help_panel=group)(models)
    app.command(rich_help_panel=group)(schedule)
