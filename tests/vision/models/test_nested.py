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
from ladderstitch.vision.models.nested.path_statistics import StatisticsFile
from ladderstitch.vision.models.nested.sampling import sampled_config
from ladderstitch.vision.models.nested.statistics import read_statistics, write_statistics
from tests.support.nested_nets import (
    NETS,
    make_config,
    make_model,
    write_nested,
    write_random_statistics,
)


def real_mobilenet(paths: int) -> NestedConfig:
    """Return OFA MobileNetV3 in its published size."""
    inputs = {"image_size": 224, "in_channels": 3, "num_classes": 1000}
    return sampled_config({"inputs": inputs, "net": {"kind": "ofa-mbv3"}}, paths, seed=0)


def storage_bytes() -> int:
    """Return the bytes of all tensors of this process, shared memory once."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("kind", ["ofa-mbv3", "autoformer", "thinkingvit", "vit-resnas"])
def test_thirty_paths_take_the_memory_of_the_largest(kind: str) -> None:
    config = make_config(kind, 32)
    before = storage_bytes()
    model = make_model(config, recalibrated=False)
    largest = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    executor = StitchExecutor(model)
    assert len(executor.plans) == len(config.net.paths) >= (6 if kind == "thinkingvit" else 30)
    assert storage_bytes() - before <= 1.05 * largest + 2 * 8 * 17**2  # relative positions


def test_thirty_recalibrated_mobilenets_take_the_memory_of_the_largest(tmp_path: Path) -> None:
    config = real_mobilenet(32)
    before = storage_bytes()
    model = config.build().eval().requires_grad_(False)
    largest = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    write_random_statistics(tmp_path / "statistics.safetensors", model)
    of_paths = (tmp_path / "statistics.safetensors").stat().st_size
    read_statistics(tmp_path / "statistics.safetensors", model)
    executor = StitchExecutor(model)
    for stitch in model.stitches:
        assert len(model.statistics[stitch.id]) > 20
        assert executor.plans[stitch.id].blocks
    assert of_paths > 0.09 * largest
    assert storage_bytes() - before <= 1.05 * largest


@pytest.mark.parametrize("kind", ["ofa-resnet", "ofa-mbv3"])
def test_statistics_read_again_are_the_same(tmp_path: Path, kind: str) -> None:
    model = make_model(make_config(kind, 5))
    images = torch.randn(3, *model.config.inputs.shape)
    wanted = [model(images, stitch.id) for stitch in model.stitches]
    write_statistics(tmp_path / "statistics.safetensors", model)
    widths = {stitch.id: model.norm_widths(stitch.id) for stitch in model.stitches}
    model.statistics.read_from(StatisticsFile(tmp_path / "statistics.safetensors", widths), 0)
    executor = StitchExecutor(model)
    for _ in range(2):
        for stitch in model.stitches:
            assert torch.equal(executor(images, stitch.id), wanted[stitch.id])
    assert model.statistics[4] is model.statistics[4]
    first = model.statistics[0]
    assert model.statistics[4].keys()
    assert model.statistics[0] is not first


def test_statistics_on_a_device_stay_in_place(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    model = make_model(make_config("ofa-mbv3", 4), recalibrated=False)
    write_random_statistics(path, model)
    widths = {stitch.id: model.norm_widths(stitch.id) for stitch in model.stitches}
    model.statistics.read_from(StatisticsFile(path, widths), 0)
    model.to("meta")
    used = [model.statistics[stitch.id] for stitch in model.stitches]
    for stitch, norms in zip(model.stitches, used, strict=True):
        assert model.statistics[stitch.id] is norms
        assert all(mean.device.type == "meta" for mean, _ in norms.values())


def test_replaced_statistics_stay_and_changed_ones_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    model = make_model(make_config("ofa-mbv3", 4))
    wanted = model.statistics[3]
    write_statistics(path, model)
    read_statistics(path, model)
    other = make_model(make_config("ofa-mbv3", 4), recalibrated=False)
    write_random_statistics(path, other)
    for name, (mean, variance) in model.statistics[3].items():
        assert torch.equal(mean, wanted[name][0])
        assert torch.equal(variance, wanted[name][1])
    read_statistics(path, model)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)
    with pytest.raises(BundleError, match="changed since it was loaded"):
        model(torch.randn(1, *model.config.inputs.shape), 3)


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


def test_statistics_of_another_type_are_rejected(tmp_path: Path) -> None:
    write_nested(tmp_path, "ofa-mbv3", 2)
    bundle = VisionBundle.load(tmp_path)
    write_statistics(bundle.statistics_path, make_model(make_config("ofa-mbv3", 2)))
    tensors = {name: t.half() for name, t in load_file(bundle.statistics_path).items()}
    save_file(tensors, bundle.statistics_path)
    with pytest.raises(BundleError, match="expected F32, got F16"):
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
