"""The command `export`, which writes an ONNX file of a torch network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ladderstitch.cli.console import Json, err, out, user_errors
from ladderstitch.cli.network_options import parse_shape
from ladderstitch.cli.output import print_json


def export(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder that transformers wrote, timm:NAME, or module:function of your own code, "
            "which returns a torch module."
        ),
    ],
    output: Annotated[Path, typer.Option(help="ONNX file to write.")],
    shape: Annotated[
        str | None,
        typer.Option(help="Shape of one input, e.g. 3,224,224 (default: what the source states)."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of a network of timm.", show_default=False)
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Let timm download its weights.")
    ] = False,
    outputs: Annotated[
        str | None,
        typer.Option(
            help="Outputs by name, e.g. pooler_output,last_hidden_state (default: scores, or else "
            "the embedding of an image; all of your own code)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a torch network to ONNX, and check the file.

    It has the network's preprocessing and labels. The outputs of the file and of the network must
    be equal on random inputs. transformers or timm must be installed for networks of theirs.

    Example: `ladderstitch export ./my-network --output small.onnx`
    """
    from ladderstitch.importers.export_network import export_network
    from ladderstitch.importers.torch_sources import SourceOptions

    with user_errors(), err.status("exporting"):
        options = SourceOptions(parse_shape(shape), checkpoint, pretrained)
        chosen = tuple(outputs.split(",")) if outputs is not None else ()
        report = export_network(source, output, options, chosen)
    if as_json:
        print_json(
            {
                "input": report.shape,
                "outputs": report.outputs,
                "relative_difference": report.difference,
                "files": [str(file) for file in report.files],
            }
        )
    else:
        for name, sizes in ({"input": report.shape} | report.outputs).items():
            shape = ", ".join(map(str, ("batch", *sizes)))
            out.print(f"{name}: [{shape}]", highlight=False, markup=False)
        out.print(
            f"largest difference to the network: {report.difference:.1e} of the largest output",
            highlight=False,
        )
    err.print(f"wrote {', '.join(map(str, report.files))}", soft_wrap=True)
