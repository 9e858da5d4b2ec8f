"""The command `models`, which lists the models of a running server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from ladderstitch.addresses import DEFAULT_ADDRESS
from ladderstitch.cli.console import Address, Json, connect, exit_on_failure, out
from ladderstitch.cli.output import (
    Column,
    Record,
    format_count,
    format_ms,
    print_fields,
    print_json,
    print_records,
)

if TYPE_CHECKING:
    from ladderstitch.v1 import inference_pb2


def models(
    context: typer.Context, as_json: Json = False, address: Address = DEFAULT_ADDRESS
) -> None:
    """List models with quality and latency of each variant.

    Of image models, the variants on the frontier. `expected` is the mean time to compute one
    request, estimated from recent batches; `planned` includes the tail of the latency, and budgets
    are compared with it. Tab-separated in a pipe.
    """
    with exit_on_failure(address), connect(context, address) as client:
        found = [client.get_model(summary.name) for summary in client.list_models().models]
    listed = [(model, _variants(model)) for model in found]
    if as_json:
        print_json(
            {"models": [_describe(model) | {"variants": records} for model, records in listed]}
        )
    elif not out.is_terminal:
        print_fields([{"model": m.name} | dict(r) for m, records in listed for r in records])
    else:
        for model, records in listed:
            columns = TEXT_COLUMNS if model.HasField("language") else VISION_COLUMNS
            print_records(records, columns, title=_title(model))


def _describe(model: inference_pb2.GetModelResponse) -> dict[str, object]:
    """Return the fields of a model without its variants."""
    is_text = model.HasField("language")
    metric = model.language.quality_metric if is_text else model.quality_metric
    described: dict[str, object] = {
        "name": model.name,
        "version": model.version,
        "kind": "text" if is_text else "image" if model.HasField("preprocessing") else "tensor",
        "quality_metric": metric or None,
        "quality_data": model.quality_data or None,
    }
    if is_text:
        described |= {
            "layers": model.language.layers,
            "max_model_len": model.language.max_model_len,
            "tensor_parallel_size": model.language.tensor_parallel_size,
        }
    return described


def _title(model: inference_pb2.GetModelResponse) -> str:
    if not model.HasField("language"):
        about = f"{model.quality_metric} on {model.quality_data}"
    else:
        text = model.language
        ranks = format_count(text.tensor_parallel_size, "rank")
        about = (
            f"{text.quality_metric or 'quality not measured'}, {text.layers} layers, "
            f"{text.max_model_len} tokens of context, {ranks}"
        )
    return f"{model.name} version {model.version}: {about}"


def _variants(model: inference_pb2.GetModelResponse) -> list[Record]:
    """Return the variants of a language model, or those of another model on its frontier."""
    records: list[Record]
    if model.HasField("language"):
        records = [
            {
                "variant": variant.variant_id,
                "name": variant.name,
                "residual": variant.residual,
                "quality": variant.quality if variant.HasField("quality") else None,
                "expected_s": None,
                "planned_s": variant.planned_token_us / 1e6,
            }
            for variant in model.language.variants
        ]
        return records
    variants = {variant.id: variant for variant in model.variants}
    return [
        {
            "variant": variant.id,
            "name": variant.name,
            "residual": None,
            "quality": variant.quality,
            "expected_s": variant.latency_us / 1e6,
            "planned_s": variant.planned_latency_us / 1e6,
        }
        for variant in (variants[number] for number in model.frontier)
    ]


def _show_quality(record: Record) -> str:
    return "-" if record["quality"] is None else f"{record['quality']:.4f}"


VISION_COLUMNS = (
    Column("variant", lambda r: str(r["variant"])),
    Column("name", lambda r: str(r["name"]), text=True),
    Column("quality", _show_quality),
    Column("expected", lambda r: format_ms(r["expected_s"])),
    Column("planned", lambda r: format_ms(r["planned_s"])),
)
TEXT_COLUMNS = (
    Column("variant", lambda r: str(r["variant"])),
    Column("name", lambda r: str(r["name"]), text=True),
    Column("residual", lambda r: str(r["residual"]), text=True, drop=1),
    Column("quality", _show_quality),
    Column("per token", lambda r: format_ms(r["planned_s"])),
)
