"""Tests of training small language models from scratch, for each residual scheme."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from ladderstitch.cli.app import app
from ladderstitch.importers.verify_text import GoldenRun, run_case
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.model.residual import ResidualScheme
from ladderstitch.text.model.weight_reader import MemoryWeights
from ladderstitch.training.text.scratch import SchemeRun, ScratchRecipe

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
OTHER_SCHEMES = {
    "parallel": {"scheme": "parallel"},
    "desync": {"scheme": "desync", "reduce_after": [[False, True], [True, True]], "ranks": 2},
    "groups": {"scheme": "groups", "groups": [[0, 2]]},
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
        assert (bundle.path / "tokenizer_config.json").exists()
    assert (run / "losses.png").stat().st_size > 1000


def test_train_language_trains_every_scheme(tmp_path: Path) -> None:
    run = train(tmp_path, "run", schemes=OTHER_SCHEMES)
    report = json.loads((run / "pair.json").read_text())
    assert set(report["held_out_loss"]) == set(OTHER_SCHEMES)
    for name, loss in report["held_out_loss"].items():
        assert loss < 1.3
        assert TextBundle.load(run / name).manifest.residual.scheme == name


@pytest.mark.parametrize("name", OTHER_SCHEMES)
def test_trained_schemes_are_those_that_ranks_serve(name: str) -> None:
    recipe = ScratchRecipe.model_validate(RECIPE | {"schemes": OTHER_SCHEMES})
    residual = ResidualScheme.model_validate(OTHER_SCHEMES[name])
    run = SchemeRun.create(recipe, residual)
    tokens = torch.arange(2 * 20).view(2, 20)
    with torch.inference_mode():
        for tensor in run.model.tensors.values():
            tensor += 0.1 * torch.randn(
                tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())
            )
        trained = run.logits(tokens)
    weights = MemoryWeights(run.model.tensors)
    served = GoldenRun(name, residual, (2,), incremental=False)
    expected = run_case(recipe.config, weights, tokens, served, 2, 9)
    torch.testing.assert_close(trained, expected, atol=1e-4, rtol=1e-4)
    if name == "groups":
        other = GoldenRun(name, ResidualScheme(), (2,), incremental=False)
        assert (run_case(recipe.config, weights, tokens, other, 2, 9) - trained).abs().max() > 0.01


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
