"""Compare residual schemes: train a small model of each, and write their bundles and losses."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor

from ladderstitch.text.bundle import write_tokenizer
from ladderstitch.text.manifest import TextManifest, write_manifest
from ladderstitch.text.tokenizer import TextTokenizer
from ladderstitch.text.tokenizer_files import TOKENIZER
from ladderstitch.training.text.evaluate import read_tokens, split_windows
from ladderstitch.training.text.scratch import (
    SchemeRun,
    ScratchRecipe,
    train_schemes,
    train_tokenizer,
)


@dataclass(frozen=True, slots=True)
class SchemeComparison:
    """The inputs of a comparison: recipe, training texts, held-out texts, and a result folder."""

    recipe: ScratchRecipe
    texts: Sequence[Path]
    held_out: Sequence[Path]
    folder: Path


def compare_schemes(comparison: SchemeComparison, progress: Progress) -> dict[str, object]:
    """Train a model of each scheme; write their bundles, `losses.png` and `pair.json`.

    Returns the content of `pair.json`: sizes, held-out losses and times. Training continues from
    the folder's checkpoint if there is one. Raises `DataError` for a text that cannot be read or
    is too short.
    """
    recipe, folder, started = comparison.recipe, comparison.folder, time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    text, held_out = _read_texts(comparison)
    train_windows = split_windows(text, recipe.window)
    runs = train_schemes(recipe, train_windows, held_out, folder, progress)
    for name, run in runs.items():
        _write_bundle(comparison, name, run)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    plot_losses(rows, tuple(runs), folder / "losses.png")
    last, tensors = rows[-1], next(iter(runs.values())).model.tensors
    report: dict[str, object] = {
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "text_tokens": len(text),
        "trained_tokens": recipe.steps * recipe.batch_windows * recipe.window,
        "held_out_tokens": held_out[:, 1:].numel(),
        "held_out_loss": {name: last[f"{name}_held_out"] for name in runs},
        "training_seconds": {name: round(sum(r[f"{name}_s"] for r in rows)) for name in runs},
        "seconds_of_this_call": round(time.monotonic() - started),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__},
    }
    (folder / "pair.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _read_texts(comparison: SchemeComparison) -> tuple[Tensor, Tensor]:
    """Return the training tokens [T] and the held-out windows [W, window + 1].

    The tokenizer is trained on the training texts unless the folder has one.
    """
    recipe, file = comparison.recipe, comparison.folder / TOKENIZER
    if not file.exists():
        train_tokenizer(comparison.texts, recipe.config.vocab_size).save(str(file))
    tokenizer = TextTokenizer.load(file)
    text = torch.cat([read_tokens(path, tokenizer) for path in comparison.texts])
    held_out = torch.cat([read_tokens(path, tokenizer) for path in comparison.held_out])
    max_windows = recipe.held_out_tokens // recipe.window
    return text, split_windows(held_out, recipe.window, max_windows, recipe.seed)


def _write_bundle(comparison: SchemeComparison, name: str, run: SchemeRun) -> None:
    """Write the bundle of a trained model into the folder named after its scheme."""
    recipe, into = comparison.recipe, comparison.folder / name
    manifest = TextManifest(
        name=name,
        config=recipe.config,
        residual=recipe.schemes[name],
        end_tokens=(0,),
        origin="trained from scratch: " + ", ".join(path.name for path in comparison.texts),
        licence="Apache-2.0",
    )
    write_manifest(into, manifest)
    tensors = {n: t.detach().half().contiguous() for n, t in run.model.tensors.items()}
    save_file(tensors, into / "model.safetensors")
    write_tokenizer(into, comparison.folder / TOKENIZER, manifest)


def plot_losses(rows: Sequence[dict[str, float]], names: Sequence[str], path: Path) -> None:
    """Draw the held-out loss over the steps, one line per scheme."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name in names:
        measured = [(r["step"], r[f"{name}_held_out"]) for r in rows if f"{name}_held_out" in r]
        axes.plot(*zip(*measured, strict=True), marker=".", label=name)
    axes.set_xlabel("training step")
    axes.set_ylabel("held-out loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
