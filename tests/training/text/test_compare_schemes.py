"""Tests of training small language models from scratch, for each residual scheme."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from ladderstitch.cli.app import app
from ladderstitch.text.bundle import TextBundle

RECIPE = {
    "config": {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "max_positions": 64,
        "tied_head": True,
    },
    "schemes": {"standard": {"scheme": "standard"}, "ladder": {"scheme": "ladder"}},
    "tokens": 30_720,
    "window": 32,
    "batch_windows": 8,
    "learning_rate": 1e-2,
    "warmup_steps": 5,
    "held_out_tokens": 512,
    "measure_steps": 40,
}
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "slept")


def train(folder: Path, run: str, **changes: object) -> Path:
    """Write texts and a recipe, run the command, and return the run's folder."""
    rng = random.Random(0)
    for name, count in (("train", 4000), ("held", 600)):
        # Each word is followed by one of the two words after it in the list.
        index, words = 0, []
        for _ in range(count):
            index = (index + rng.randint(1, 2)) % len(WORDS)
            words.append(WORDS[index])
        (folder / f"{name}.txt").write_text(" ".join(words) + "\n")
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE | changes))
    done = CliRunner().invoke(
        app,
        [
            "train-language",
            "--recipe",
            str(folder / "recipe.yaml"),
            "--text",
            str(folder / "train.txt"),
            "--held-out",
            str(folder / "held.txt"),
            "--run",
            str(folder / run),
        ],
    )
    assert done.exit_code == 0, done.output
    return folder / run


def test_train_language_schemes_learn_and_write_bundles(tmp_path: Path) -> None:
    run = train(tmp_path, "run")
    report = json.loads((run / "pair.json").read_text())
    for name, loss in report["held_out_loss"].items():
        assert loss < 1.3  # a uniform choice of two words has 0.69, of all tokens 5.7
        bundle = TextBundle.load(run / name)
        assert bundle.manifest.residual.scheme == name
    assert (run / "losses.png").stat().st_size > 1000


def test_train_language_stopped_run_resumes_to_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path, "whole")
    from ladderstitch.training.text import scratch

    monkeypatch.setattr(scratch, "SAVE_STEPS", 50)
    original, calls = scratch.SchemeRun.train_step, []

    def train_step(self: scratch.SchemeRun, *arguments: object) -> float:
        calls.append(1)
        if len(calls) == 150:
            raise KeyboardInterrupt
        return original(self, *arguments)  # type: ignore[arg-type] # passed through

    with monkeypatch.context() as patched:
        patched.setattr(scratch.SchemeRun, "train_step", train_step)
        with pytest.raises(AssertionError):
            train(tmp_path, "stopped")
    stopped = train(tmp_path, "stopped")
    for name in ("standard", "ladder"):
        first, again = (load_file(r / name / "model.safetensors") for r in (whole, stopped))
        assert all(bool((first[key] == again[key]).all()) for key in first)
