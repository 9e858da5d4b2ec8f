"""Tests of ladder conversion: served logits equal trained ones, and training reduces divergence."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ladderstitch.cli.app import app
from ladderstitch.errors import BundleError, ConfigError, DataError
from ladderstitch.importers.fetch import add_paths, read_lazy_load
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.model.residual import ResidualScheme, plan_layers
from ladderstitch.text.model.weight_reader import DeltaWeights, MemoryWeights, check_delta
from ladderstitch.text.model.weights import expected_shapes
from ladderstitch.training.text.distil import (
    ConversionRecipe,
    create_adapters,
    delta_tensors,
    divergence,
)
from ladderstitch.training.text.evaluate import split_windows
from ladderstitch.training.text.trainable_llama import LowRank, TrainableLlama
from tests.support.language_models import TINY, made_up_quality, random_tensors, write_tiny

LADDER = ResidualScheme(scheme="ladder", ladder_layers=2)
TOKENS = torch.arange(1, 25)[None]


def random_adapters() -> dict[str, LowRank]:
    """Return adapters with random values that half precision represents exactly."""
    adapters = create_adapters(expected_shapes(TINY), range(1, 3), rank=4, seed=0)
    generator = torch.Generator().manual_seed(1)
    for adapter in adapters.values():
        drawn = 0.1 * torch.randn(adapter.up.shape, generator=generator)
        adapter.up.data = drawn.half().float()
        if adapter.down is not None:
            adapter.down.data = adapter.down.data.half().float()
    return adapters


@pytest.mark.parametrize("ranks", [1, 2])
async def test_rank_group_equals_trainable_model(tmp_path: Path, ranks: int) -> None:
    """Both paths share the weights; the ladder path adds the delta."""
    bundle = TextBundle.load(write_tiny(tmp_path / "tiny"))
    adapters = random_adapters()
    save_file(delta_tensors(adapters), tmp_path / "delta.safetensors")
    model = TrainableLlama(TINY, random_tensors(TINY))
    with torch.inference_mode():
        standard = model.logits(TOKENS, plan_layers(ResidualScheme(), TINY.layers, 1))
        plans = plan_layers(LADDER, TINY.layers, 1)
        ladder = model.logits(TOKENS, plans, adapters)
    rank_config = RankConfig.of(
        bundle,
        ranks=ranks,
        max_model_len=32,
        paths=(ResidualScheme(), LADDER),
        deltas=(None, tmp_path / "delta.safetensors"),
    )
    group = RankGroup(rank_config)
    try:
        await group.start()
        for path, expected in enumerate((standard, ladder)):
            got = await group.forward(TOKENS.numpy(), 0, path, last_only=False)
            error = (torch.from_numpy(got.copy()) - expected).abs().max() / expected.abs().max()
            assert error < 1e-5
    finally:
        await group.close()
    assert (standard - ladder).abs().max() > 0.1 * standard.abs().max()


def test_divergence_gradient_equals_autograd() -> None:
    generator = torch.Generator().manual_seed(2)
    head = torch.randn(31, 6, generator=generator)
    ladder = torch.randn(2, 150, 6, generator=generator, requires_grad=True)
    standard = torch.randn(2, 150, 6, generator=generator)
    value, gradient = divergence(ladder.detach(), standard, head)
    log_q, log_p = (torch.log_softmax(x @ head.T, -1) for x in (ladder, standard))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    expected.backward()
    assert value == pytest.approx(
        float(expected.detach()), rel=0.03
    )  # matrix products are in bfloat16
    assert ladder.grad is not None
    assert (gradient - ladder.grad).norm() < 0.02 * ladder.grad.norm()


RECIPE = {
    "name": "ladder-2",
    "ladder_layers": 2,
    "rank": 8,
    "tokens": 4096,
    "window": 32,
    "batch_windows": 8,
    "epochs": 3,
    "learning_rate": 5e-3,
    "held_out_tokens": 512,
    "held_out_window": 32,
    "untrained": [1],
}


def run_conversion(folder: Path, into: str = "out") -> dict[str, object]:
    """Convert the tiny model by the command, on random letters; return the report."""
    write_tiny(folder / "tiny")
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    generator = torch.Generator().manual_seed(3)
    for name, count in (("train", 6000), ("held", 1000)):
        letters = torch.randint(97, 123, (count,), generator=generator).tolist()
        (folder / f"{name}.txt").write_text(bytes(letters).decode())
    done = CliRunner().invoke(
        app,
        [
            "convert-ladder",
            str(folder / "tiny"),
            "--recipe",
            str(folder / "recipe.yaml"),
            "--text",
            str(folder / "train.txt"),
            "--held-out",
            f"held={folder / 'held.txt'}",
            "--into",
            str(folder / into),
            "--work",
            str(folder / "work"),
            "--report",
            str(folder / "report.json"),
        ],
    )
    assert done.exit_code == 0, done.output
    report: dict[str, object] = json.loads((folder / "report.json").read_text())
    return report


def test_convert_ladder_reduces_divergence(tmp_path: Path) -> None:
    run_conversion(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "work/log.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 4096 // (8 * 32)
    first, last = rows[0]["divergence"], rows[-1]["divergence"]
    assert last < 0.8 * first
    bundle = TextBundle.load(tmp_path / "out")
    assert [variant.name for variant in bundle.manifest.variants] == ["standard", "ladder-2"]
    assert bundle.quality is not None
    assert bundle.quality.metric == "next-token accuracy"
    assert bundle.quality.n == 512


def test_convert_ladder_again_reuses_finished_work(tmp_path: Path) -> None:
    """A second conversion trains no step and writes the same delta."""
    run_conversion(tmp_path)
    first = load_file(tmp_path / "out/ladder-2.safetensors")
    lines = (tmp_path / "work/log.jsonl").read_text()
    run_conversion(tmp_path, "again")
    again = load_file(tmp_path / "again/ladder-2.safetensors")
    assert (tmp_path / "work/log.jsonl").read_text() == lines
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_delta_weights_slice_equals_slice_of_sum() -> None:
    tensors = random_tensors(TINY)
    adapters = random_adapters()
    delta = delta_tensors(adapters)
    weights = DeltaWeights(MemoryWeights(tensors), delta)
    name = "model.layers.2.mlp.down_proj.weight"
    whole = weights.read(name)
    assert (whole - tensors[name]).abs().max() > 0.01
    part = weights.read(name, rows=range(5, 20), columns=range(30, 77))
    torch.testing.assert_close(part, whole[5:20, 30:77])
    untouched = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(weights.read(untouched), tensors[untouched])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.9.x.weight.up": (4,)}, "unknown model.layers.9.x.weight.up"),
        ({"model.layers.1.mlp.up_proj.weight.up": (100, 3)}, "expected factors of"),
        ({"model.layers.0.mlp.up_proj.weight.down": (4, 48)}, "expected `up` and"),
        ({"model.layers.1.input_layernorm.weight.up": (3,)}, r"expected \(48,\), got \(3,\)"),
    ],
)
def test_check_delta_wrong_shapes_raise(
    tmp_path: Path, change: dict[str, tuple[int, ...]], message: str
) -> None:
    delta = delta_tensors(random_adapters())
    delta |= {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(BundleError, match=message):
        check_delta(delta, expected_shapes(TINY))


def test_split_windows_do_not_overlap_and_use_seed() -> None:
    tokens = torch.arange(101)
    windows = split_windows(tokens, 10)
    assert windows[:, 1:].flatten().tolist() == list(range(1, 101))
    subset = split_windows(tokens, 10, max_windows=4, seed=1)
    assert len(subset) == 4
    assert torch.equal(subset, split_windows(tokens, 10, max_windows=4, seed=1))
    with pytest.raises(DataError, match="expected more than 200 tokens, got 101"):
        split_windows(tokens, 200)


def test_ladder_recipe_wrong_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE | {"rank": 0}))
    with pytest.raises(ConfigError, match="rank"):
        ConversionRecipe.load(tmp_path / "recipe.yaml")


def test_read_lazy_load_returns_strings() -> None:
    def vector(*lines: bytes) -> bytes:
        packed = b"X\n" + struct.pack(">IIII", 3, 0x40201, 0x30500, 5) + b"UTF-8"
        packed += struct.pack(">II", 16, len(lines))
        for line in lines:
            packed += struct.pack(">II", 0x40009, len(line)) + line
        return struct.pack(">I", len(packed)) + zlib.compress(packed)

    assert read_lazy_load(vector(b"one", b"") + vector(b"two")) == [["one", ""], ["two"]]
    with pytest.raises(DataError, match="not a lazy-load file"):
        read_lazy_load(b"\0\0\0\4what")


def test_add_paths_adds_family_or_raises(tmp_path: Path) -> None:
    family = tmp_path / "family"
    family.mkdir()
    (family / "paths.yaml").write_text(
        "[{name: standard, residual: {}}, {name: ladder-2, delta: d.safetensors, "
        "residual: {scheme: ladder, ladder_layers: 2}}]"
    )
    (family / "quality.json").write_text(made_up_quality(2).model_dump_json())
    save_file(delta_tensors(random_adapters()), family / "d.safetensors")
    add_paths(write_tiny(tmp_path / "tiny"), family)
    bundle = TextBundle.load(tmp_path / "tiny")
    assert [variant.name for variant in bundle.manifest.variants] == ["standard", "ladder-2"]
    assert bundle.delta_files() == (None, bundle.path / "d.safetensors")
    (family / "quality.json").write_text(made_up_quality(1).model_dump_json())
    with pytest.raises(BundleError, match=r"expected paths \[0, 1\], got \[0\]"):
        add_paths(write_tiny(tmp_path / "other"), family)
    (tmp_path / "tiny/d.safetensors").unlink()
    with pytest.raises(BundleError, match=r"d\.safetensors"):
        TextBundle.load(tmp_path / "tiny")
