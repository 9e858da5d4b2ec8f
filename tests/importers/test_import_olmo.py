"""Tests of importing MatFormer-OLMo: a folder of a checkpoint becomes a bundle that is served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from ladderstitch.cli import app
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.messages import LogitsMode
from ladderstitch.training.text.calibrate import open_runner
from tests.conftest import GOLDEN
from tests.support.language_models import write_byte_tokenizer

CASE = GOLDEN / "matformer_olmo.safetensors"
FACTORS = (1, 2, 4, 8)


def write_checkpoint(folder: Path, **changes: object) -> Path:
    """Write the recorded model as upstream saves a checkpoint: `config.yaml` and `model.pt`."""
    folder.mkdir()
    recorded = json.loads(CASE.with_suffix(".json").read_text())["config"]
    sizes = {name: value for name, value in recorded.items() if name != "prefill_length"}
    document = {"run_name": "tiny", "model": sizes | {"eos_token_id": 7} | changes}
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    prefix = "weights."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in load_file(CASE).items()
        if name.startswith(prefix)
    }
    torch.save(tensors, folder / "model.pt")
    write_byte_tokenizer(folder / "tokenizer.json")
    return folder


def run_import(folder: Path, into: Path) -> tuple[int, str]:
    arguments = ["import", str(folder), "--into", str(into), "--family", "matformer-olmo"]
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, "".join(done.output.split())  # lines are wrapped anywhere


def test_imported_paths_give_the_recorded_logits(tmp_path: Path) -> None:
    code, output = run_import(write_checkpoint(tmp_path / "tiny"), tmp_path / "bundle")
    assert code == 0, output
    assert "4paths;next:ladderstitchcalibrate" in output
    bundle = TextBundle.load(tmp_path / "bundle", calibrated=False)
    names = [variant.name for variant in bundle.manifest.variants]
    assert names == ["ffn-256", "ffn-128", "ffn-64", "ffn-32"]
    assert bundle.manifest.end_tokens == (7,)
    assert (bundle.path / "tokenizer_config.json").exists()
    recorded, runner = load_file(CASE), open_runner(bundle, 1)
    for path, factor in enumerate(FACTORS):
        for tokens, expected in zip(
            recorded["input"], recorded[f"output.factor{factor}"], strict=True
        ):
            logits = runner.run(path, tokens, 0, LogitsMode.ALL)
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_type": "swiglu"}, "model.activation_type: expected gelu, got 'swiglu'"),
        ({"alibi": False}, "model.alibi: expected True, got False"),
        ({"n_layers": 0}, "model.n_layers: expected a number of at least 1, got 0"),
        ({"d_model": 40}, "wrong tensors"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused_by_field(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    code, output = run_import(write_checkpoint(tmp_path / "tiny", **change), tmp_path / "bundle")
    assert code == 2
    assert message.replace(" ", "") in output
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("missing", ["model.pt", "tokenizer.json", "config.yaml"])
def test_missing_files_are_named(tmp_path: Path, missing: str) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    (folder / missing).unlink()
    code, output = run_import(folder, tmp_path / "bundle")
    assert code == 2
    assert missing in output
