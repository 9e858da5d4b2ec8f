"""The part of `make` for language models: a family from trained models of one tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ladderstitch.bundles import find_bundle, models_home
from ladderstitch.cli.console import err, out, progress_bar
from ladderstitch.errors import ConfigError

NETWORK_SUFFIXES = (".onnx", ".yaml", ".yml")
"""Of files that list or are networks for images or tensors."""


@dataclass(frozen=True, slots=True)
class LanguageOptions:
    """The options of `make` that apply to language models."""

    name: str
    text: Path | None
    held_out: Path | None
    into: Path | None
    plot: Path | None
    paths: int
    minutes: float
    licence: str
    rounds: int
    threads: int
    seed: int
    replace: bool


def are_language_models(networks: Sequence[Path]) -> bool:
    """Return whether the arguments of `make` are folders or names of models, not ONNX files."""
    return not any(path.is_file() or path.suffix.lower() in NETWORK_SUFFIXES for path in networks)


def make_language_family(
    models: Sequence[Path], options: LanguageOptions, *, as_json: bool
) -> None:
    """Stitch language models, measure the family, draw its frontier, and print what to do next.

    Raises `ConfigError`, `BundleError` and `DataError` for models and texts that do not fit.
    """
    from ladderstitch.cli.frontier import print_paths
    from ladderstitch.importers.make_target import MakeTarget
    from ladderstitch.text.bundle import TextBundle
    from ladderstitch.text.frontier import LATENCY
    from ladderstitch.training.text.calibrate import DEFAULT_SAMPLE, calibrate
    from ladderstitch.training.text.profile import profile
    from ladderstitch.training.text.source_anchors import SourceAnchors
    from ladderstitch.training.text.stitch_anchors import StitchOptions, stitch_anchors
    from ladderstitch.vision.bundle import write_table

    text = _given("text", options.text, "a text to fit the stitching layers on")
    held_out = _given("held-out", options.held_out, "another text to measure all paths on")
    folder = options.into or models_home() / options.name
    target = MakeTarget(folder, options.name, options.plot, options.replace)
    target.check()
    sources = [find_bundle(str(model)) for model in models]
    anchors = SourceAnchors.check([TextBundle.load(path, calibrated=False) for path in sources])
    stitching = StitchOptions(
        text,
        options.name,
        options.licence,
        options.paths,
        options.minutes,
        options.seed,
        options.threads,
    )
    with target.staged() as made:
        with progress_bar() as progress:
            explained = stitch_anchors(anchors, stitching, made, progress)
            bundle = TextBundle.load(made, calibrated=False)
            calibrate(bundle, held_out, DEFAULT_SAMPLE, options.threads, progress)
            table = profile(bundle, options.rounds, options.threads, progress)
            write_table(made / LATENCY, table)
        drawn = options.plot or made / "frontier.png"
        print_paths(made, drawn, as_json=as_json, shown=folder)
    shares = sorted(explained.values())
    err.print(
        f"stitching layers explain {shares[0]:.0%} to {shares[-1]:.0%} of the variance",
        highlight=False,
    )
    drawn = options.plot or folder / "frontier.png"
    err.print(f"wrote {folder} and {drawn}", soft_wrap=True)
    served = options.name if options.into is None else folder
    if not as_json:
        out.print(f"ladderstitch serve --model {served}", highlight=False, soft_wrap=True)


def _given(option: str, file: Path | None, meaning: str) -> Path:
    if file is None:
        raise ConfigError(f"{option}: expected {meaning}, got none")
    if not file.is_file():
        raise ConfigError(f"{option}: expected a file, got {file}")
    return file
