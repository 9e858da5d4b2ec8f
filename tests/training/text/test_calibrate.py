"""Tests of `quantize` and `calibrate` for language models, by the commands."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ladderstitch.cli.app import app
from ladderstitch.errors import BundleError
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.model.residual import ResidualScheme, plan_layers
from ladderstitch.training.text.evaluate import measure_path, read_tokens, split_windows
from ladderstitch.training.text.trainable_llama import TrainableLlama
from tests.support.language_models import TINY, random_tensors, write_tiny

WINDOW = TINY.max_positions


@pytest.fixture
def text(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(3)
    letters = torch.randint(97, 123, (5 * WINDOW + 1,), generator=generator).tolist()
    path = tmp_path / "held.txt"
    path.write_text(bytes(letters).decode())
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny")


def run(*arguments: object, code: int = 0) -> str:
    """Run a command, check its exit code, and return its output."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done.output


def squeeze(text: str) -> str:
    """Return a text without blanks and frames: messages are wrapped anywhere, also within paths."""
    return "".join(text.replace("│", "").split())


def test_quantize_adds_a_measured_path(tiny: Path, text: Path) -> None:
    output = run("quantize", tiny, "--text", text)
    bundle = TextBundle.load(tiny)
    assert [v.name for v in bundle.manifest.variants] == ["standard", "standard-int4"]
    assert bundle.precisions() == (None, "int4")
    assert bundle.quality is not None
    assert bundle.quality.n == 5 * WINDOW
    assert "standard-int4" in output
    float32, int4 = bundle.quality.variants[0], bundle.quality.variants[1]
    assert float32.perplexity != int4.perplexity
    run("quantize", tiny, "--text", text, "--precision", "int8")
    assert TextBundle.load(tiny).precisions() == (None, "int4", "int8")


def test_calibrate_measures_what_training_measures(tiny: Path, text: Path) -> None:
    run("calibrate", tiny, "--text", text)
    bundle = TextBundle.load(tiny)
    assert bundle.quality is not None
    windows = split_windows(read_tokens(text, bundle.tokenizer()), WINDOW)
    plans = plan_layers(ResidualScheme(), TINY.layers, 1)
    expected = measure_path(TrainableLlama(TINY, random_tensors(TINY)), plans, None, windows)
    got = bundle.quality.variants[0]
    assert got.value == pytest.approx(expected.value, abs=2 / (5 * WINDOW))
    assert got.perplexity == pytest.approx(expected.perplexity, rel=1e-4)


def test_quantize_reports_what_is_wrong_and_leaves_the_bundle(tiny: Path, text: Path) -> None:
    manifest = (tiny / "model.yaml").read_text()
    for arguments, message in (
        ((), "text: expected a held-out text"),
        (("--text", tiny / "absent.txt"), "absent.txt"),
        (("--text", text, "--precision", "int3"), "'int3' is not one of 'int4', 'int8'"),
    ):
        assert squeeze(message) in squeeze(run("quantize", tiny, *arguments, code=2))
        assert (tiny / "model.yaml").read_text() == manifest
        assert not (tiny / "quality.json").exists()
    run("quantize", tiny, "--text", text)
    again = run("quantize", tiny, "--text", text, code=2)
    assert squeeze("expected one that the bundle lacks") in squeeze(again)


def test_a_path_without_quality_is_refused_until_it_is_calibrated(tiny: Path, text: Path) -> None:
    run("quantize", tiny, "--text", text)
    (tiny / "quality.json").unlink()
    with pytest.raises(BundleError, match=r"quality\.json"):
        TextBundle.load(tiny)
    run("calibrate", tiny, "--text", text)
    assert TextBundle.load(tiny).quality is not None


def test_quantize_measures_anew_whatever_was_measured_before(tiny: Path, text: Path) -> None:
    manifest = (tiny / "model.yaml").read_text()
    run("quantize", tiny, "--text", text)
    (tiny / "model.yaml").write_text(manifest)  # the model was fetched again
    run("quantize", tiny, "--text", text)
    assert TextBundle.load(tiny).precisions() == (None, "int4")
