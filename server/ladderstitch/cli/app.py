"""The command line: the table of its commands, each imported when it is run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ladderstitch import __version__
from ladderstitch.cli import console

SERVE, CALL, OPERATE = "Serve", "Call a server", "Operate"
MAKE, MEASURE = "Make a family", "Measure and check"
EXIT_CODES = (
    "Exit codes: 0 success; 1 a request, check or server failed; 2 wrong usage, file or option; "
    "3 a budget was missed, with --require-met."
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the help page; `summary` is the first line of the command's docstring."""

    name: str
    module: str
    """The module in this package whose function of the same name is the command."""
    panel: str
    summary: str

    @property
    def function(self) -> str:
        """The name of the function that is the command."""
        return {"import": "import_"}.get(self.name, self.name.replace("-", "_"))


ENTRIES = (
    Entry("serve", "serve", SERVE, "Serve a model over gRPC and HTTP until Ctrl-C."),
    Entry("rank", "rank", SERVE, "Run one rank for a server on another machine."),
    Entry("gateway", "gateway", SERVE, "Forward each request to the best of several replicas."),
    Entry("load", "admin", OPERATE, "Load a model on a running server, or a new version."),
    Entry("unload", "admin", OPERATE, "Unload a model once its accepted requests have ended."),
    Entry("drain", "admin", OPERATE, "Take a replica out of service; wait for its requests."),
    Entry("health", "admin", OPERATE, "Print whether a server accepts requests."),
    Entry("doctor", "doctor", OPERATE, "Check that this machine can run a server."),
    Entry("predict", "predict", CALL, "Classify images, each within a latency budget."),
    Entry("models", "models", CALL, "List models with quality and latency of each variant."),
    Entry("schedule", "schedule", CALL, "Show or change the scheduling of a running server."),
    Entry("generate", "generate", CALL, "Continue a prompt with a language model."),
    Entry("fetch", "fetch", MAKE, "Download a data set that a recipe names, or a model."),
    Entry("train", "train", MAKE, "Train the anchors of a family from scratch."),
    Entry("stitch", "train", MAKE, "Join trained anchors into a stitchable family."),
    Entry("quantize", "quantize", MAKE, "Add low-bit forms of all variants of a bundle."),
    Entry("import", "imports", MAKE, "Make a bundle from checkpoints or ONNX files."),
    Entry("add-adapter", "adapters", MAKE, "Add a LoRA adapter to a language model as a path."),
    Entry(
        "convert-ladder",
        "convert_ladder",
        MAKE,
        "Convert a language model to ladder layers or groups.",
    ),
    Entry(
        "train-language", "train_language", MAKE, "Train small language models to compare schemes."
    ),
    Entry("train-elastic", "elastic", MAKE, "Train a stitched language family from texts."),
    Entry("make", "make", MAKE, "Stitch networks or language models into a family."),
    Entry("export", "export", MAKE, "Export a torch network to ONNX, and check the file."),
    Entry("inspect", "inspect", MAKE, "List tensors, costs and cut points of an ONNX file."),
    Entry("calibrate", "measure", MEASURE, "Measure the quality of every variant."),
    Entry("profile", "measure", MEASURE, "Measure the latency of every variant here."),
    Entry("frontier", "frontier", MEASURE, "Show the best variants by quality and cost."),
    Entry("verify", "measure", MEASURE, "Check forward passes against recorded outputs."),
)
COMMANDS = {
    entry.name: entry
    for entry in ENTRIES
    if (Path(__file__).parent / f"{entry.module}.py").exists()  # the client's package has fewer
}
"""All commands, in the order of the help page, which is printed without importing them."""


@cache
def load_command(name: str) -> Any:
    """Return a command of `COMMANDS` with its options; imports its module."""
    entry = COMMANDS[name]
    function = getattr(import_module(f".{entry.module}", __package__), entry.function)
    part = typer.Typer(rich_markup_mode="markdown")
    part.command(name, epilog=EXIT_CODES)(function)
    part.callback()(lambda: None)  # a group even of one command
    group: Any = typer.main.get_group(part)
    return group.commands[name]


class Commands(TyperGroup):
    """A group that imports the module of a command when it is called."""

    listing = False
    """Whether the help page is being printed, which shows the entries only."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, in the order of the help page."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, or None if there is none of that name."""
        if (entry := COMMANDS.get(cmd_name)) is None:
            return None
        if self.listing:
            return TyperCommand(entry.name, help=entry.summary, rich_help_panel=entry.panel)
        return load_command(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help page of the group."""
        self.listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self.listing = False


app = typer.Typer(
    name="ladderstitch",
    cls=Commands,
    rich_markup_mode="markdown",
    help="Serve elastic models under latency budgets: one set of weights holds many networks, and "
    "the server answers each request with the most accurate one that meets its budget.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
    ca: console.Ca = None,
    tls: console.Tls = False,
    certificate: console.Certificate = None,
    key: console.Key = None,
    token_file: console.TokenFile = None,
    server_name: console.ServerName = None,
) -> None:
    """Store the connection options for the command that follows."""
    context.obj = console.ConnectionOptions(ca, tls, certificate, key, token_file, server_name)
