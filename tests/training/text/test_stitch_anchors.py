"""Tests of `make` for language models: a stitched family from two folders of transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from ladderstitch.cli.app import app
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.messages import LogitsMode
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.family import DecoderFamily
from ladderstitch.training.text.calibrate import open_runner
from ladderstitch.training.text.evaluate import read_tokens, split_windows
from ladderstitch.training.text.family_routes import Route
from ladderstitch.training.text.stitch_anchors import choose_routes
from tests.support.hugging_face_folders import LAYERS, POSITIONS, write_llama

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "slept")


class Folders:
    """Two models of transformers and two texts."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.small = write_llama(root / "small", 16, 1)
        self.large = write_llama(root / "large", 32, 2, tie_word_embeddings=False)
        rng = random.Random(0)
        for name, count in (("train", 2000), ("held", 300)):
            (root / f"{name}.txt").write_text(" ".join(rng.choices(WORDS, k=count)))

    def make(self, *models: str, into: str = "made", options: tuple[object, ...] = ()) -> Result:
        """Run `make` on folders."""
        arguments = ["make", *(self.root / model for model in models), "--name", "pair"]
        arguments += ["--text", self.root / "train.txt", "--held-out", self.root / "held.txt"]
        arguments += ["--into", self.root / into, "--rounds", 2, *options]
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    def error(self, *models: str) -> str:
        """Run `make`, which must fail, and return its message in one line."""
        result = self.make(*models, into="failed")
        assert result.exit_code == 2, result.output
        assert not (self.root / "failed").exists()
        return " ".join(result.output.split())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Return two models that can be stitched, and the family `made` of them."""
    made = Folders(tmp_path_factory.mktemp("anchors"))
    result = made.make("large", "small")
    assert result.exit_code == 0, result.output
    return made


def test_anchors_of_family_answer_as_in_transformers(folders: Folders) -> None:
    bundle = TextBundle.load(folders.root / "made")
    runner = open_runner(bundle, 1)
    tokens = torch.tensor([5, 80, 13, 200, 7, 91, 33])
    names = [variant.name for variant in bundle.manifest.variants]
    assert names == ["small", "large", *(f"small-{n}+large" for n in (1, 2))] + [
        f"large-{n}+small" for n in (1, 2)
    ]
    for path, model in enumerate((folders.small, folders.large)):
        with torch.no_grad():
            expected = model(input_ids=tokens[None]).logits[0]
        got = runner.run(path, tokens, 0, LogitsMode.ALL)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_maps_are_the_least_squares_of_the_streams_of_transformers(folders: Folders) -> None:
    bundle = TextBundle.load(folders.root / "made")
    tokens = read_tokens(folders.root / "train.txt", bundle.tokenizer())
    windows = split_windows(tokens, POSITIONS)[:, :-1]
    streams = []
    for model in (folders.small, folders.large):
        with torch.no_grad():
            hidden = model(input_ids=windows, output_hidden_states=True).hidden_states
        streams.append([h.flatten(0, 1).double().numpy() for h in hidden])
    stored = load_file(folders.root / "made" / "model.safetensors")
    for front, end in ((0, 1), (1, 0)):
        for layer in range(1, LAYERS):
            x, y = streams[front][layer], streams[end][layer]
            design = np.concatenate([x, np.ones((len(x), 1))], axis=1)
            best = np.linalg.lstsq(design, y, rcond=None)[0]
            name = f"stitches.{front}.{end}.{layer}"
            weight, bias = (
                stored[f"{name}.{kind}"].double().numpy() for kind in ("weight", "bias")
            )
            least, got = (np.square(f - y).sum() for f in (design @ best, x @ weight.T + bias))
            assert got < 1.001 * least
            assert least < np.square(y - y.mean(0)).sum()


def test_models_of_different_depths_are_stitched(folders: Folders) -> None:
    deep = write_llama(folders.root / "deep", 16, 5, num_hidden_layers=5)
    result = folders.make("deep", "large", into="uneven")
    assert result.exit_code == 0, result.output
    bundle = TextBundle.load(folders.root / "uneven")
    names = [variant.name for variant in bundle.manifest.variants]
    assert names == [
        "deep",
        "large",
        "deep-2+large",
        "deep-4+large",
        "large-1+deep",
        "large-2+deep",
    ]
    runner, tokens = open_runner(bundle, 1), torch.tensor([5, 80, 13, 200, 7, 91, 33])
    for path, model in enumerate((deep, folders.large)):
        with torch.no_grad():
            expected = model(input_ids=tokens[None]).logits[0]
        got = runner.run(path, tokens, 0, LogitsMode.ALL)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_make_measures_everything(folders: Folders) -> None:
    bundle = TextBundle.load(folders.root / "made")
    assert bundle.quality is not None
    assert bundle.switches is not None
    assert set(bundle.quality.variants) == set(range(6))
    assert bundle.quality.data == "held.txt"
    assert {(p.source, p.target) for p in bundle.switches.penalties} == {
        (a, b) for a in range(6) for b in range(6) if a != b
    }
    assert bundle.manifest.end_tokens == (256,)
    for name in ("latency.json", "frontier.png", "tokenizer.json", "tokenizer_config.json"):
        assert (folders.root / "made" / name).exists()


def test_training_changes_the_maps_only(folders: Folders) -> None:
    result = folders.make("small", "large", into="trained", options=("--minutes", 0.02))
    assert result.exit_code == 0, result.output
    before, after = (
        load_file(folders.root / name / "model.safetensors") for name in ("made", "trained")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != name.startswith("stitches."), name
    assert not (folders.root / "trained" / "work").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 300}, "vocab_size: expected 257, as in large, got 300"),
        ({"num_key_value_heads": 2}, "kv_heads: expected 1, as in large, got 2"),
        ({"head_dim": 16}, "head_dim: expected 8, as in large, got 16"),
        ({"rope_theta": 5e5}, "rope_theta: expected 10000.0, as in large, got 500000.0"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    folders: Folders, fields: dict[str, Any], message: str
) -> None:
    name = f"other-{next(iter(fields))}".replace("_", "-")
    write_llama(folders.root / name, 16, 3, **fields)
    assert f"{name[:24]}: {message}" in folders.error(name, "large")


def test_other_tokenizer_is_refused(folders: Folders) -> None:
    folder = folders.root / "other-tokens"
    write_llama(folder, 16, 3)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    swapped = {**vocabulary, "a": vocabulary["b"], "b": vocabulary["a"]}
    tokenizer = Tokenizer(models.BPE(swapped, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    found = folders.error("other-tokens", "large")
    assert "other-tokens: tokenizer: expected that of large, got" in found
    assert "is 'b' instead of 'a'" in found


def test_single_model_and_family_are_refused(folders: Folders) -> None:
    assert "networks: expected two or more models, got 1" in folders.error("large")
    assert "expected another size" in folders.error("large", "large")
    assert "expected a single model, got a family" in folders.error("made", "large")


def test_short_text_is_refused(folders: Folders) -> None:
    (folders.root / "short.txt").write_text("the cat")
    result = folders.make(
        "small", "large", into="failed", options=("--text", folders.root / "short.txt")
    )
    assert result.exit_code == 2
    assert "expected more than 128 tokens" in " ".join(result.output.split())


def family_of(*depths: int) -> DecoderFamily:
    """Return a family of tiny anchors by their numbers of layers."""
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "heads": 1, "kv_heads": 1}
    return DecoderFamily(
        tuple(
            DecoderConfig(layers=layers, head_dim=8, max_positions=8, **sizes) for layers in depths
        )
    )


def test_routes_are_spread_evenly() -> None:
    pair = family_of(9, 9)
    assert choose_routes(pair, 0) == (Route.of_anchor(0), Route.of_anchor(1))
    few = choose_routes(pair, 4)
    assert [(route.front, route.layer) for route in few[2:]] == [(0, 3), (0, 7), (1, 3), (1, 7)]
    assert len(choose_routes(pair, 64)) == 2 + 2 * 8
    assert len(set(choose_routes(family_of(5, 5, 5), 12))) == 3 + 12
    assert len(choose_routes(family_of(4, 9), 64)) == 2 + 2 * 3
