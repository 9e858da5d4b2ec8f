"""Tests of `overlap`: a table of all residual schemes, with losses, and one of a bundle's paths."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ladderstitch.text.manifest import TextVariant
from ladderstitch.text.model.residual import ResidualScheme
from ladderstitch_loadtest.cli import app
from tests.support.language_models import made_up_quality, write_tiny

SIZES = ("--width", "24", "--ffn", "32", "--heads", "2", "--layers", "5")
PAIR = ResidualScheme(scheme="groups", groups=((0, 2),))


def measure(folder: Path, *arguments: str) -> dict[str, object]:
    """Run the command on two ranks without latency; return the written document."""
    fixed = ("overlap", "--latency", "0ms", "--rounds", "3", "--out", str(folder))
    done = CliRunner().invoke(app, [*fixed, *arguments])
    assert done.exit_code == 0, done.output
    (file,) = folder.glob("*.json")
    assert file.with_suffix(".png").stat().st_size > 1000
    document: dict[str, object] = json.loads(file.read_text())
    return document


def test_overlap_lists_all_schemes_with_reductions_and_losses(tmp_path: Path) -> None:
    losses = tmp_path / "pair.json"
    losses.write_text(json.dumps({"held_out_loss": {"standard": 4.25, "groups": 4.5}}))
    document = measure(tmp_path / "out", *SIZES, "--losses", str(losses))
    assert document["held_out_nats"] == {"standard": 4.25, "groups": 4.5}
    (row,) = document["rows"]  # type: ignore[misc] # a list of one row
    assert row["reductions"] == {
        "standard": 10,
        "ladder": 10,
        "parallel": 5,
        "desync": 5,
        "groups": 6,  # two pairs, and the last layer alone
        "no_communication": 0,
    }
    assert all(speed > 0 for speed in row["tokens_per_s"].values())
    assert row["over_standard"]["standard"] == 1.0
    table = (tmp_path / "out/overlap-shared_memory.md").read_text()
    assert "| groups | 4.500 | 6 |" in table


def test_overlap_measures_the_paths_of_a_bundle(tmp_path: Path) -> None:
    paths = (
        TextVariant(name="standard", residual=ResidualScheme()),
        TextVariant(name="standard-int8", residual=ResidualScheme(), precision="int8"),
        TextVariant(name="pair", residual=PAIR),
    )
    bundle = write_tiny(tmp_path / "tiny", paths=paths)
    document = measure(tmp_path / "out", "--model", str(bundle))
    (row,) = document["rows"]  # type: ignore[misc] # a list of one row
    assert row["reductions"] == {"standard": 6, "pair": 4, "no_communication": 0}
    nats = {n: math.log(q.perplexity or 0) for n, q in made_up_quality(3).variants.items()}
    measured: dict[str, float] = document["held_out_nats"]  # type: ignore[assignment]
    assert measured["pair"] == pytest.approx(nats[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--losses", "missing.json"), "losses: missing.json: expected held_out_loss by scheme"),
        (("--model", "x", "--front-width", "12"), "model: expected none with --front-width"),
    ],
)
def test_overlap_refuses_what_does_not_fit(arguments: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(app, ["overlap", *SIZES, *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
