"""The command `inspect`, which lists what is in an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ladderstitch.cli.console import Json, out, user_errors
from ladderstitch.cli.network_options import ImageSize
from ladderstitch.cli.output import Column, print_json, print_records


def inspect(
    model: Annotated[Path, typer.Argument(help="ONNX file.")],
    image_size: ImageSize = None,
    as_json: Json = False,
) -> None:
    """List tensors, costs and cut points of an ONNX file.

    A cut is a float32 tensor with the batch first through which all data of the network pass.

    Example: `ladderstitch inspect small.onnx`
    """
    from ladderstitch.importers.inspect_network import inspect_network

    with user_errors():
        report = inspect_network(model, image_size)
    tensors = [dict(zip(TENSOR_FIELDS, row, strict=True)) for row in report.tensors]
    cuts = [dict(zip(CUT_FIELDS, row, strict=True)) for row in report.cuts]
    if as_json:
        print_json(
            {
                "file": str(model),
                "parameters": report.parameters,
                "macs": report.macs,
                "summary": report.summary,
                "tensors": tensors,
                "cuts": cuts,
            }
        )
        return
    costs = f"parameters: {report.parameters:,}; MACs per image: {report.macs}"
    note = f"{costs}\ncut points: {report.summary}"
    print_records(tensors, _text_columns(TENSOR_FIELDS), title=model.name, note=note)
    if cuts:
        out.print()
        print_records(cuts, _text_columns(CUT_FIELDS))


TENSOR_FIELDS = ("tensor", "name", "type", "shape")
CUT_FIELDS = ("cut", "shape", "mmacs_before", "mmacs_after", "tensor")


def _text_columns(fields: tuple[str, ...]) -> list[Column]:
    """Return columns of texts, which the fields are."""
    return [
        Column(field, lambda record, field=field: str(record[field]), text=True)  # type: ignore[misc]
        for field in fields
    ]
