"""Small models of several residual schemes: trained side by side, compared, written as bundles."""

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

from ladderstitch.text.bundle import TextManifest, write_manifest
from ladderstitch.text.tokenizer import TextTokenizer
from ladderstitch.training.text.evaluate import tokenise, windows
from ladderstitch.training.text.scratch import (
    SchemeRun,
    ScratchRecipe,
    train_side_by_side,
    train_tokenizer,
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A recipe, texts to train on and to hold out, and a folder for everything that comes of it."""

    recipe: ScratchRecipe
    texts: Sequence[Path]
    held_out: Sequence[Path]
    folder: Path


def compare(comparison: Comparison, progress: Progress) -> dict[str, object]:
    """Train, write a bundle for each scheme, `losses.png` and `pair.json`; what came of it.

    Raises `DataError` for a text. Resumes.
    """
    recipe, folder, started = comparison.recipe, comparison.folder, time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tokenizer.json"
    if not file.exists():
        train_tokenizer(comparison.texts, recipe.config.vocab_size).save(str(file))
    tokenizer = TextTokenizer.load(file)
    text = torch.cat([tokenise(path, tokenizer) for path in comparison.texts])
    unseen = torch.cat([tokenise(path, tokenizer) for path in comparison.held_out])
    most = recipe.held_out_tokens // recipe.window
    held_out = windows(unseen, recipe.window, most, recipe.seed)
    apprentices = train_side_by_side(
        recipe, windows(text, recipe.window), held_out, folder, progress
    )
    for name, apprentice in apprentices.items():
        _write_bundle(comparison, name, apprentice)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    plot_losses(rows, tuple(apprentices), folder / "losses.png")
    last, tensors = rows[-1], next(iter(apprentices.values())).model.tensors
    found: dict[str, object] = {
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "text_tokens": len(text),
        "trained_tokens": recipe.steps * recipe.batch_windows * recipe.window,
        "held_out_tokens": held_out[:, 1:].numel(),
        "held_out_loss": {name: last[f"{name}_held_out"] for name in apprentices},
        "training_seconds": {
            name: round(sum(r[f"{name}_s"] for r in rows)) for name in apprentices
        },
        "seconds_of_this_call": round(time.monotonic() - started),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__},
    }
    (folder / "pair.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def _write_bundle(comparison: Comparison, name: str, apprentice: SchemeRun) -> None:
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
    tensors = {n: t.detach().half().contiguous() for n, t in apprentice.model.tensors.items()}
    save_file(tensors, into / "model.safetensors")
    (into / "tokenizer.json").write_bytes((comparison.folder / "tokenizer.json").read_bytes())


def plot_losses(rows: Sequence[dict[str, float]], names: Sequence[str], path: Path) -> None:
    """Held-out loss over steps, a line a scheme."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name in names:
        measured = [(r["step"], r[f"{name}_held_out"]) for r in rows if f"{name}_held_out" in r]
        axes.plot(*zip(*measured, strict=True), marker=".", label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
