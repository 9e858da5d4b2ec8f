"""The command `predict`, which sends images or other inputs to a running server."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ladderstitch.addresses import DEFAULT_ADDRESS
from ladderstitch.cli.console import (
    MISSED,
    Address,
    Json,
    MinQuality,
    ModelName,
    Priority,
    RequireMet,
    Variant,
    connect,
    err,
    exit_on_failure,
    format_failure,
    parse_duration,
)
from ladderstitch.cli.output import (
    Column,
    Record,
    format_budget,
    format_ms,
    format_total,
    print_json,
    print_records,
)
from ladderstitch.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ladderstitch.client import Client, Prediction, RequestFailed
    from ladderstitch.client.messages import InferOptions

NO_BUDGET = "grpc_deadline"
"""The source of the budget of a request without one: the deadline of the call."""


def predict(
    context: typer.Context,
    images: Annotated[
        list[Path], typer.Argument(help="PNG or JPEG files, or .npy files of inputs [batch, ...].")
    ],
    budget: Annotated[
        str | None, typer.Option(help="Latency budget with its unit, e.g. 800us or 5ms.")
    ] = None,
    hard: Annotated[
        bool,
        typer.Option(
            "--hard", help="Treat the budget as a hard deadline: fail instead of answering late."
        ),
    ] = False,
    min_quality: MinQuality = None,
    variant: Variant = None,
    priority: Priority = 0,
    model: ModelName = "",
    output: Annotated[
        Path | None,
        typer.Option(help="NPZ file for all outputs by name, of all files along the first axis."),
    ] = None,
    min_confidence: Annotated[
        float | None,
        typer.Option(
            help="Confidence, 0 to 1, from which the answer of a cheap variant suffices; only "
            "images that it is less sure of go on to a better one."
        ),
    ] = None,
    require_met: RequireMet = False,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Classify images, each within a latency budget.

    Each is answered by the most accurate variant that meets the budget. Of models that return
    tensors, shape and range of each output are printed. Tab-separated in a pipe.
    """
    options: InferOptions = {
        "hard": hard,
        "min_quality": min_quality,
        "variant": variant,
        "priority": priority,
        "min_confidence": min_confidence,
        "model": model,
    }
    with exit_on_failure(address):
        options["budget_s"] = parse_duration(budget) if budget is not None else None
        with connect(context, address) as client:
            answers, failures = _ask(client, images, options, address)
            _print_answers(answers, failures, as_json=as_json)
            if answers and output is not None:
                from ladderstitch.cli.tensors import write_outputs

                write_outputs(output, [answer for _, answer in answers])
            missed = [answer for _, answer in answers if answer.budget_met is False]
            if missed:
                err.print(_advise(client, model, answers), highlight=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)
    raise typer.Exit(MISSED if missed and require_met else 0)


Answers = list[tuple[str, "Prediction"]]
"""The names of files with their answers."""


def _ask(
    client: Client, images: list[Path], options: InferOptions, address: str
) -> tuple[Answers, list[Record]]:
    """Return the answers, and a record of each file without one; stops if there is no server."""
    from ladderstitch.client import RequestFailed

    answers: Answers = []
    failures: list[Record] = []
    for path in images:
        try:
            answers.append((path.name, client.predict(_read(path), **options)))
        except RequestFailed as error:
            failures.append(_failure_record(path.name, error))
            message = format_failure(error, address)
            err.print(f"{path.name}: {message}", highlight=False, soft_wrap=True)
            if error.code.name == "UNAVAILABLE":
                break
    return answers, failures


def _failure_record(name: str, error: RequestFailed) -> Record:
    return {
        "file": name,
        "code": error.code.name,
        "reason": error.reason or None,
        "message": error.message,
    }


def _print_answers(answers: Answers, failures: list[Record], *, as_json: bool) -> None:
    """Print the answers as a table, or answers and failures as one document."""
    if answers and answers[0][1].response.outputs:
        from ladderstitch.cli.tensors import TENSOR_COLUMNS, tensor_records

        records = tensor_records(answers)
        columns: tuple[Column, ...] = TENSOR_COLUMNS
    else:
        records = [_answer_record(*answer) for answer in answers]
        columns = tuple(c for c in ANSWER_COLUMNS if c is not CONFIDENCE or _any_sure(records))
    if as_json:
        print_json({"answers": records, "failures": failures})
    elif records:
        rows = [{key: value for key, value in r.items() if key != "top"} for r in records]
        print_records(rows, columns)


def _advise(client: Client, model: str, answers: Answers) -> str:
    """Return what would have been possible when budgets were missed."""
    missed = [answer for _, answer in answers if answer.budget_met is False]
    details = client.get_model(model)
    planned_us = {v.id: v.planned_latency_us for v in details.variants if v.id in details.frontier}
    around_s = median(answer.total_s - answer.compute_s for _, answer in answers)
    fastest_ms, best_ms = (
        us / 1e3 + 1e3 * around_s for us in (min(planned_us.values()), max(planned_us.values()))
    )
    return (
        f"{len(missed)} of {len(answers)} budgets were missed; an idle server keeps "
        f"{fastest_ms:.1f} ms with its fastest variant and {best_ms:.1f} ms with its best one"
    )


def _read(path: Path) -> bytes | NDArray[Any]:
    """Return the bytes of an image file, or the array of a .npy file in a type that models take."""
    try:
        if path.suffix != ".npy":
            return path.read_bytes()
        import numpy as np

        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"image: {path}: {reason}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ConfigError(f"image: {path}: expected a .npy file of numbers")
    return array if array.dtype == np.uint8 else array.astype(np.float32)


def cost_fields(answer: Prediction) -> dict[str, Any]:
    """Return variant, quality, times and budget of an answer; without a budget, None for it."""
    has_budget = answer.budget_source != NO_BUDGET
    return {
        "variant": answer.variant,
        "variant_name": answer.variant_name,
        "quality": answer.quality,
        "quality_metric": answer.quality_metric,
        "queue_s": answer.queue_s,
        "compute_s": answer.compute_s,
        "total_s": answer.total_s,
        "batch_size": answer.batch_size,
        "budget_s": answer.budget_s if has_budget else None,
        "budget_met": answer.budget_met if has_budget else None,
    }


def _answer_record(name: str, answer: Prediction) -> Record:
    top = [
        [{"label": label, "probability": share} for label, share in image] for image in answer.all
    ]
    own = {"file": name, "label": answer.label, "probability": answer.probability}
    certainty = {"confidence": answer.confidence, "stages": list(answer.stages) or None}
    return own | cost_fields(answer) | certainty | {"top": top}


def show_total(record: Record) -> str:
    """Return the time of an answer, with enough digits to differ from its budget."""
    return format_total(record["total_s"], record["budget_s"])


def _any_sure(records: list[Record]) -> bool:
    return any(record["confidence"] is not None for record in records)


def show_confidence(record: Record) -> str:
    """Return the calibrated confidence of an answer; `-` if the request asked for none."""
    return "-" if record["confidence"] is None else f"{record['confidence']:.3f}"


def show_budget(record: Record) -> Text:
    """Return the budget and whether it was met; `-` if the request had none."""
    if record["budget_s"] is None:
        return Text("-")
    result = ("met", "green") if record["budget_met"] else ("missed", "red")
    return Text.assemble(f"{format_budget(record['budget_s'])} ", result)


CONFIDENCE = Column("sure", show_confidence, drop=6)
"""Shown if a request has `min_confidence`."""
ANSWER_COLUMNS = (
    Column("image", lambda r: str(r["file"]), text=True),
    Column("label", lambda r: Text(r["label"], style="bold"), text=True),
    Column("p", lambda r: f"{r['probability']:.2f}", drop=2),
    Column("id", lambda r: str(r["variant"]), drop=4),
    Column("variant", lambda r: str(r["variant_name"]), text=True, drop=1),
    Column("quality", lambda r: f"{r['quality']:.4f}"),
    CONFIDENCE,
    Column("queue", lambda r: format_ms(r["queue_s"]), drop=5),
    Column("compute", lambda r: format_ms(r["compute_s"]), drop=3),
    Column("total", show_total),
    Column("budget", show_budget),
)
