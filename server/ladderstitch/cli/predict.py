"""Commands for callers of a running server: predict, models, and scheduling by hand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ladderstitch.cli.console import connect, err, out, user_errors
from ladderstitch.client import Prediction, RequestFailed
from ladderstitch.errors import ConfigError
from ladderstitch.scheduling.settings import PolicyName

if TYPE_CHECKING:
    from ladderstitch.v1 import inference_pb2

Address = Annotated[str, typer.Option(help="host:port of the server's gRPC endpoint.")]
DEFAULT_ADDRESS = "127.0.0.1:8001"
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_duration(text: str) -> float:
    """Seconds of "800us", "5ms", "0.5s" or plain seconds; raises `ConfigError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)?", text.strip())
    if not match:
        raise ConfigError(f"budget: expected e.g. 800us, 5ms or 0.5s, got {text!r}")
    return float(match[1]) * UNITS[match[2] or "s"]


def predict(
    context: typer.Context,
    images: Annotated[list[Path], typer.Argument(help="PNG or JPEG files.")],
    budget: Annotated[str | None, typer.Option(help="Latency budget, e.g. 800us, 5ms.")] = None,
    hard: Annotated[bool, typer.Option(help="Rather no answer than a late one.")] = False,
    min_quality: Annotated[
        float | None, typer.Option(help="Refuse rather than answer below this quality, 0 to 1.")
    ] = None,
    variant: Annotated[
        int | None, typer.Option(help="Run this variant whatever the budget.")
    ] = None,
    model: Annotated[str, typer.Option(help="Model name; default: the server's only one.")] = "",
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Classify pictures within a latency budget, each by the best variant that the budget allows."""
    table = Table()
    for column in (
        "image",
        "label",
        "p",
        "variant",
        "quality",
        "queue",
        "compute",
        "total",
        "budget",
    ):
        table.add_column(column)
    failed = 0
    with user_errors(), connect(context, address) as client:
        budget_s = parse_duration(budget) if budget else None
        for path in images:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise ConfigError(f"image: {error}") from error
            try:
                answer = client.predict(
                    content,
                    budget_s=budget_s,
                    hard=hard,
                    min_quality=min_quality,
                    variant=variant,
                    model=model,
                )
            except RequestFailed as error:
                failed += 1
                err.print(f"{path.name}: {explain(error, address)}", highlight=False)
                if error.code.name == "UNAVAILABLE":
                    break
            else:
                table.add_row(path.name, *_row(answer))
    if table.row_count:
        out.print(table)
    raise typer.Exit(1 if failed else 0)


def models(context: typer.Context, address: Address = DEFAULT_ADDRESS) -> None:
    """List a server's models, and what quality costs how much time there."""
    with reported(address), connect(context, address) as client:
        for summary in client.list_models().models:
            model = client.get_model(summary.name)
            if summary.generates_text:
                out.print(_language_line(model), highlight=False)
                continue
            table = Table(title=f"{model.name} version {model.version}: {model.quality_metric}")
            for column in ("variant", "name", "quality", "expected", "planned"):
                table.add_column(column)
            described = {variant.id: variant for variant in model.variants}
            for variant in (described[i] for i in model.frontier):
                table.add_row(
                    str(variant.id),
                    variant.name,
                    f"{variant.quality:.4f}",
                    f"{variant.latency_us / 1e3:.2f} ms",
                    f"{variant.planned_latency_us / 1e3:.2f} ms",
                )
            out.print(table)


def _language_line(model: inference_pb2.GetModelResponse) -> str:
    what = model.language
    return (
        f"{model.name} version {model.version}: language model, {what.residual} residual, "
        f"{what.layers} layers, {what.max_model_len} tokens of context, {what.tensor_parallel_size} ranks"
    )


def schedule(
    context: typer.Context,
    policy: Annotated[PolicyName | None, typer.Option(help="How variants are chosen.")] = None,
    fixed_variant: Annotated[int | None, typer.Option(help="Variant of the policy fixed.")] = None,
    pin: Annotated[int | None, typer.Option(help="Variant that overrides the policy.")] = None,
    unpin: Annotated[bool, typer.Option("--unpin", help="Take the pin away.")] = False,
    min_quality: Annotated[float | None, typer.Option(help="Floor for everyone, 0 to 1.")] = None,
    model: Annotated[str, typer.Option(help="Model name; default: the server's only one.")] = "",
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Show or change how a running server chooses variants. Takes effect in milliseconds."""
    with reported(address), connect(context, address) as client:
        changes = (policy, fixed_variant, pin, min_quality)
        if not unpin and all(change is None for change in changes):
            out.print(client.get_scheduling(model))
            return
        out.print(
            client.update_scheduling(
                model_name=model,
                policy=f"POLICY_NAME_{policy.upper()}" if policy else None,
                fixed_variant=fixed_variant,
                pinned_variant=pin,
                unpin=unpin,
                min_quality=min_quality,
            )
        )


@contextmanager
def reported(address: str) -> Iterator[None]:
    """Print a failed call as one message and exit with 1."""
    try:
        with user_errors():
            yield
    except RequestFailed as error:
        err.print(explain(error, address), highlight=False)
        raise typer.Exit(1) from None


def explain(error: RequestFailed, address: str) -> str:
    """The failure and what to do next."""
    if error.code.name == "UNAVAILABLE" and not error.reason:
        return f"[red]no server at {address}[/]; start one with `ladderstitch serve`"
    advice = ""
    if "min_feasible_us" in error.metadata:
        advice = f"; the smallest budget is {int(error.metadata['min_feasible_us']) / 1e3:.2f} ms"
    if error.retry_after_s is not None:
        advice = f"; try again in {1e3 * error.retry_after_s:.0f} ms"
    return f"[red]{error.code.name}[/] {error.message}{advice}"


def _row(answer: Prediction) -> list[str]:
    budget = "-"
    if answer.budget_s is not None:
        word = "[green]met[/]" if answer.budget_met else "[red]missed[/]"
        budget = f"{1e3 * answer.budget_s:.1f} ms {word}"
    times = (answer.queue_s, answer.compute_s, answer.total_s)
    return [
        f"[bold]{answer.label}[/]",
        f"{answer.probability:.2f}",
        f"{answer.variant} ({answer.variant_name})",
        f"{answer.quality:.4f}",
        *(f"{1e3 * seconds:.2f} ms" for seconds in times),
        budget,
    ]


def register(app: typer.Typer) -> None:
    group = "Call a server"
    app.command(rich_help_panel=group)(predict)
    app.command(rich_help_panel=group)(models)
    app.command(rich_help_panel=group)(schedule)
