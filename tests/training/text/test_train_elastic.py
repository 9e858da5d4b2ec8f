"""Tests of `train-elastic`: from texts to the bundle of a stitched family."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Mapping
from itertools import permutations
from pathlib import Path
from statistics import fmean

import pytest
import torch
import yaml
from click.testing import Result
from rich.progress import Progress
from safetensors.torch import load_file
from typer.testing import CliRunner

from ladderstitch.cli.app import app
from ladderstitch.errors import ConfigError
from ladderstitch.scheduling.profiles import QualityTable
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.residual import ResidualScheme, plan_layers
from ladderstitch.text.model.weights import expected_shapes
from ladderstitch.text.switches import SwitchTable
from ladderstitch.training.text import scratch, switch_training
from ladderstitch.training.text.calibrate import Sample, calibrate
from ladderstitch.training.text.elastic_recipe import ElasticRecipe, SwitchMeasure
from ladderstitch.training.text.evaluate import read_tokens, split_windows
from ladderstitch.training.text.family_routes import Route, all_routes
from ladderstitch.training.text.measure_family import switch_divergence
from ladderstitch.training.text.switch_training import FamilyRun, draw_spans
from ladderstitch.training.text.trainable_family import TrainableFamily

SMALL = {"hidden_size": 16, "intermediate_size": 32, "heads": 2, "learning_rate": 1e-2}
LARGE = {"hidden_size": 32, "intermediate_size": 64, "heads": 4, "learning_rate": 1e-2}
RECIPE: dict[str, object] = {
    "name": "tiny-elastic",
    "sizes": {
        "vocab_size": 300,
        "layers": 3,
        "kv_heads": 2,
        "head_dim": 8,
        "max_positions": 64,
    },
    "anchors": {"small": SMALL, "large": LARGE},
    "training": {
        "tokens": 20_480,
        "window": 32,
        "batch_windows": 8,
        "warmup_steps": 5,
        "measure_steps": 40,
    },
    "stitching": {
        "fit_tokens": 2048,
        "tokens": 10_240,
        "window": 32,
        "batch_windows": 8,
        "segment": 8,
        "learning_rate": 3e-3,
        "warmup_steps": 5,
        "translation": 0.1,
        "measure_steps": 20,
        "threads": 1,
    },
    "switch": {"context": 24, "tokens": 8, "windows": 8},
    "held_out_tokens": 512,
    "licence": "Apache-2.0",
}
WIDE = {"hidden_size": 32, "intermediate_size": 64, "heads": 4}
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "slept")


def train(
    folder: Path, into: str, work: str = "work", recipe: Mapping[str, object] = RECIPE
) -> Result:
    """Write texts and a recipe, and run the command."""
    rng = random.Random(0)
    for name, count in (("train", 4000), ("held", 900)):
        # Each word is followed by one of the two words after it in the list.
        index, words = 0, []
        for _ in range(count):
            index = (index + rng.randint(1, 2)) % len(WORDS)
            words.append(WORDS[index])
        (folder / f"{name}.txt").write_text(" ".join(words) + "\n")
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    arguments = ["train-elastic", folder / "recipe.yaml", "--text", folder / "train.txt"]
    arguments += ["--held-out", folder / "held.txt"]
    arguments += ["--into", folder / into, "--work", folder / work]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished training, with `bundle` and `work`."""
    folder = tmp_path_factory.mktemp("elastic")
    done = train(folder, "bundle")
    assert done.exit_code == 0, done.output
    return folder


def test_bundle_has_documented_manifest(trained: Path) -> None:
    manifest = yaml.safe_load((trained / "bundle" / "model.yaml").read_text())
    assert manifest["config"]["hidden_size"] == 32
    assert [anchor["hidden_size"] for anchor in manifest["anchors"]] == [16]
    DecoderConfig.model_validate(manifest["anchors"][0])
    paths = {path["name"]: path for path in manifest["paths"]}
    assert list(paths) == [
        "small",
        "large",
        "small-1+large",
        "small-2+large",
        "large-1+small",
        "large-2+small",
    ]
    assert paths["small-2+large"]["route"] == [
        {"anchor": 0, "first": 0, "last": 1},
        {"anchor": 1, "first": 2, "last": 2},
    ]
    assert all(path["residual"]["scheme"] == "ladder" for path in paths.values())
    quality = json.loads((trained / "bundle" / "quality.json").read_text())
    assert len(QualityTable.model_validate(quality).variants) == 6
    tokenizer = json.loads((trained / "bundle" / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<end>"


def load_family(bundle: Path) -> TrainableFamily:
    """Return the family of a bundle, read by the names in its manifest."""
    manifest = yaml.safe_load((bundle / "model.yaml").read_text())
    configs = [
        DecoderConfig.model_validate(fields)
        for fields in (*manifest["anchors"], manifest["config"])
    ]
    tensors = {n: t.float() for n, t in load_file(bundle / "model.safetensors").items()}
    return TrainableFamily(configs, tensors, plan_layers(ResidualScheme(scheme="ladder"), 3, 1))


def test_bundle_has_documented_tensors(trained: Path) -> None:
    tensors = load_file(trained / "bundle" / "model.safetensors")
    family = load_family(trained / "bundle")
    small, large = (expected_shapes(model.config) for model in family.models)
    expected = large | {f"anchors.0.{name}": shape for name, shape in small.items()}
    for layer in (1, 2):
        expected |= {f"stitches.0.1.{layer}.weight": (32, 16), f"stitches.0.1.{layer}.bias": (32,)}
        expected |= {f"stitches.1.0.{layer}.weight": (16, 32), f"stitches.1.0.{layer}.bias": (16,)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_all_paths_learn(trained: Path) -> None:
    """A uniform choice of two words has 0.69 nats, a uniform choice of all tokens has 5.7."""
    report = json.loads((trained / "work" / "elastic.json").read_text())
    assert len(report["trained"]["paths"]) == 6
    for path in report["trained"]["paths"].values():
        assert path["loss_nats"] < 1.5
    for switch in ("small to large", "large to small"):
        assert report["trained"]["switches"][switch]["divergence_nats"] < 0.05
    rows = (trained / "work" / "family" / "log.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 41))


def test_served_paths_equal_trained_ones(trained: Path, tmp_path: Path) -> None:
    """The engine measures each path as in training, and changes between them with its own cache."""
    bundle = tmp_path / "bundle"
    shutil.copytree(trained / "bundle", bundle)
    expected = QualityTable.model_validate_json((bundle / "quality.json").read_text())
    loaded = TextBundle.load(bundle)
    assert loaded.switches is not None
    changes = {(penalty.source, penalty.target) for penalty in loaded.switches.penalties}
    assert changes == set(permutations(range(6), 2))
    with Progress(disable=True) as progress:
        table = calibrate(loaded, trained / "held.txt", Sample(512, 32, 4), 1, progress)
    for path, quality in expected.variants.items():
        assert table.variants[path].perplexity == pytest.approx(quality.perplexity, rel=1e-4)
    served = SwitchTable.model_validate_json((bundle / "switches.json").read_text())
    tokens = read_tokens(trained / "held.txt", loaded.tokenizer())
    length = served.context + served.tokens
    windows = split_windows(tokens, length, served.windows)[:, :length]
    measure = SwitchMeasure(context=served.context, tokens=served.tokens, windows=served.windows)
    family = load_family(bundle)
    routes = all_routes(family.decoders)
    assert served.penalties
    for penalty in served.penalties:
        before, after = routes[penalty.source], routes[penalty.target]
        curve = switch_divergence(family, before, after, windows, measure)
        assert penalty.nats == pytest.approx(fmean(curve), rel=1e-2, abs=1e-6)


def test_anchors_of_different_depths_learn_and_are_served(tmp_path: Path) -> None:
    """The large anchor has four layers, the small one has two."""
    anchors = {"small": SMALL | {"layers": 2}, "large": LARGE | {"layers": 4}}
    training, stitching = (
        {**RECIPE[part], "tokens": tokens}  # type: ignore[dict-item] # a dict
        for part, tokens in (("training", 10_240), ("stitching", 2_560))
    )
    recipe = RECIPE | {"anchors": anchors, "training": training, "stitching": stitching}
    done = train(tmp_path, "bundle", recipe=recipe)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "work" / "elastic.json").read_text())
    explained = report["least_squares"]["explained_variance"]
    names = ["0.1.1", "0.1.1-2", "0.1.1-3", "1.0.2-1"]
    assert list(explained) == [f"stitches.{name}" for name in names]
    assert min(explained.values()) > 0.5
    assert list(report["trained"]["paths"]) == ["small", "large", "small-1+large", "large-2+small"]
    loaded = TextBundle.load(tmp_path / "bundle")
    with Progress(disable=True) as progress:
        table = calibrate(loaded, tmp_path / "held.txt", Sample(256, 32, 2), 1, progress)
    for number, path in enumerate(report["trained"]["paths"].values()):
        assert path["loss_nats"] < 3  # a uniform choice of all tokens has 5.7
        perplexity = table.variants[number].perplexity
        assert perplexity is not None
        assert abs(math.log(perplexity) - path["loss_nats"]) < 0.2  # other windows of the text


def test_stopped_training_resumes_to_same_weights(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "SAVE_STEPS", 10)
    monkeypatch.setattr(switch_training, "SAVE_STEPS", 10)
    for run, step in ((scratch.SchemeRun, 35), (FamilyRun, 25)):
        with monkeypatch.context() as patched:
            patched.setattr(run, "train_step", stop_at(run.train_step, step))
            assert train(tmp_path, "bundle").exit_code != 0
        assert not (tmp_path / "bundle").exists()
    assert train(tmp_path, "bundle").exit_code == 0
    first, again = (
        load_file(folder / "bundle" / "model.safetensors") for folder in (trained, tmp_path)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)


def stop_at(original: Callable[..., object], step: int) -> Callable[..., object]:
    """Return a training step that is interrupted at the given call."""
    calls: list[int] = []

    def train_step(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return original(*arguments)

    return train_step


def test_spans_contain_every_route() -> None:
    recipe = ElasticRecipe.model_validate(RECIPE)
    schedule = recipe.stitching
    seen: set[Route] = set()
    lengths: set[int] = set()
    for seed in range(200):
        spans = draw_spans(schedule, recipe.family, torch.Generator().manual_seed(seed))
        assert sum(span.tokens for span in spans) == schedule.window
        seen |= {span.route for span in spans}
        lengths.add(len(spans))
    assert seen == set(all_routes(recipe.family))
    assert lengths == {2, 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "anchors": {
                    **RECIPE["anchors"],
                    "third": {"hidden_size": 8, "intermediate_size": 8, "heads": 1},
                }
            },
            "ascending hidden sizes",
        ),  # type: ignore[dict-item] # a dict
        ({"switch": {"context": 60, "tokens": 8}}, "max_positions: expected at least 68"),
        (
            {
                "anchors": {"small": SMALL, "large": LARGE | {"layers": 4}},
                "residual": {"scheme": "ladder", "ladder_layers": 1},
            },
            "residual.ladder_layers: expected none for anchors of different depths, got 1",
        ),
        ({"residual": {"scheme": "parallel"}}, "expected standard or ladder, got parallel"),
    ],
)
def test_wrong_recipe_is_rejected(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(RECIPE | changes))
    with pytest.raises(ConfigError, match=message):
        ElasticRecipe.load(file)
