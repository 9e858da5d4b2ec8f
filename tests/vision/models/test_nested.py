"""Tests of supernets: one set of weights, statistics per path, costs; `verify` has the outputs."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ladderstitch.errors import BundleError
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.models.executor import StitchExecutor
from ladderstitch.vision.models.nested.cost import path_costs
from ladderstitch.vision.models.nested.model import NestedConfig
from ladderstitch.vision.models.nested.statistics import write_statistics
from tests.support.nested_nets import NETS, make_config, make_model, write_nested


def storage_bytes() -> int:
    """Return the bytes of all tensors of this process, shared memory once."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("kind", ["ofa-mbv3", "autoformer", "thinkingvit"])
def test_thirty_paths_take_the_memory_of_the_largest(kind: str) -> None:
    config = make_config(kind, 32)
    before = storage_bytes()
    model = make_model(config, recalibrated=False)
    largest = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    executor = StitchExecutor(model)
    assert len(executor.plans) == len(config.net.paths) >= (6 if kind == "thinkingvit" else 30)
    assert storage_bytes() - before <= 1.05 * largest + 2 * 8 * 17**2  # relative positions


@pytest.mark.parametrize("kind", NETS)
def test_paths_differ_and_share_no_state(kind: str) -> None:
    model = make_model(make_config(kind, 6))
    images = torch.randn(3, *model.config.inputs.shape)
    first = [model(images, stitch.id) for stitch in model.stitches]
    again = [model(images, stitch.id) for stitch in reversed(model.stitches)][::-1]
    for number, (logits, repeated) in enumerate(zip(first, again, strict=True)):
        assert torch.equal(logits, repeated)
        assert all(not torch.equal(logits, other) for other in first[:number])
    with pytest.raises(KeyError):
        model(images, len(model.stitches))


def test_recalibrated_statistics_normalise_what_the_path_sees() -> None:
    model = make_model(make_config("ofa-resnet", 4), recalibrated=False)
    images = torch.randn(64, *model.config.inputs.shape)
    model.recalibrate(1, [images])
    model.train()
    wanted = model(images, 1)  # normalised with the batch's own statistics
    model.eval()
    torch.testing.assert_close(model(images, 1), wanted, atol=1e-4, rtol=1e-4)
    assert 0 not in model.statistics


def test_statistics_survive_a_bundle(tmp_path: Path) -> None:
    write_nested(tmp_path, "ofa-resnet", 5)
    bundle = VisionBundle.load(tmp_path)
    model, digest = bundle.load_nested(), bundle.digest()
    images = torch.randn(8, *model.config.inputs.shape)
    for stitch in model.stitches:
        model.recalibrate(stitch.id, [images])
    write_statistics(bundle.statistics_path, model)
    assert bundle.digest() != digest
    loaded = bundle.load_nested()
    for stitch in model.stitches:
        assert torch.equal(loaded(images, stitch.id), model(images, stitch.id))
    moved = loaded.to(torch.float64)
    assert moved(images.double(), 2).dtype == torch.float64


def test_statistics_of_other_paths_are_rejected(tmp_path: Path) -> None:
    write_nested(tmp_path, "ofa-resnet", 5)
    bundle = VisionBundle.load(tmp_path)
    model = make_model(make_config("ofa-resnet", 5))
    write_statistics(bundle.statistics_path, model)
    tensors = load_file(bundle.statistics_path)
    tensors["0.input_stem.0.bn.bn.running_var"] = torch.ones(3)
    save_file(tensors, bundle.statistics_path)
    with pytest.raises(BundleError, match=r"0\.input_stem\.0\.bn\.bn\.running_var: expected"):
        bundle.load_model()


def test_costs_follow_from_the_sizes() -> None:
    config = make_config("autoformer", 2)
    smallest = path_costs(config)[0]
    width, tokens, heads, hidden = 12, 17, 8, 12
    block = width * 3 * heads + heads * width + 2 * width * hidden
    attention = 4 * tokens**2 * heads  # scores, sums, and relative positions of both
    norms = 3 * 5 * tokens * width
    macs = 16 * 16 * width + tokens * block + attention + norms + width * 5
    assert smallest.macs == macs


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("ofa-resnet", {"d": [0, 0, 0], "e": [0.5] * 8, "w": [0] * 6}, "paths.d: expected 5"),
        ("ofa-resnet", {"d": [0] * 5, "e": [0.3] * 8, "w": [0] * 6}, "paths.e: expected values"),
        ("ofa-mbv3", {"ks": [9] * 10, "e": [3] * 10, "d": [1] * 5}, "paths.ks: expected values"),
        ("thinkingvit", {"stages": [2, 6], "stage": 1}, "paths.stages: expected"),
    ],
)
def test_wrong_paths_are_named(kind: str, path: dict[str, object], message: str) -> None:
    config = make_config(kind, 2)
    with pytest.raises(ValidationError, match=message):
        config.with_paths([path])


def test_names_of_paths_are_different() -> None:
    config: NestedConfig = make_config("thinkingvit", 2)
    path = {"name": "x", "stages": [3], "stage": 0}
    with pytest.raises(ValidationError, match="expected different names"):
        config.with_paths([path, path])
