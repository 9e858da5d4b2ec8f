"""AttentiveNAS compared with a second implementation, which shares no code with the server's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from ladderstitch.importers.nested_families import import_nested, read_nested
from ladderstitch.vision.engine.nested import NestedExecutor
from ladderstitch.vision.models.executor import StitchExecutor
from ladderstitch.vision.models.nested.cost import path_costs
from ladderstitch.vision.models.nested.graphs import export_path, path_file
from ladderstitch.vision.models.nested.model import NestedConfig, NestedModel
from ladderstitch.vision.models.nested.resize import cubic_matrix
from tests.support.attentive_reference import (
    CLASSES,
    IMAGE_SIZE,
    IN_CHANNELS,
    SPACE,
    Network,
    extreme_path,
    make_checkpoint,
    single_changes,
)

PUBLISHED = {
    "resolution": 224,
    "width": [16, 16, 24, 32, 64, 112, 192, 216, 1792],
    "kernel_size": [3] * 7,
    "expand_ratio": [1, 4, 4, 4, 4, 6, 6],
    "depth": [1, 3, 3, 3, 3, 3, 1],
}


def read_config(paths: list[dict[str, Any]], **space: object) -> NestedConfig:
    """Return the family of the small search space with these paths."""
    upstream = {
        "image_size": IMAGE_SIZE,
        "in_channels": IN_CHANNELS,
        "n_classes": CLASSES,
        "supernet_config": SPACE | space,
    }
    return read_nested("attentivenas", upstream, paths)


def load(paths: list[dict[str, Any]], **space: object) -> tuple[NestedModel, list[Network]]:
    """Return a supernet with random weights, and its networks by the second implementation."""
    tensors = make_checkpoint(SPACE | space)
    model = import_nested("attentivenas", read_config(paths, **space), tensors)
    return model, [Network(tensors, SPACE | space, path) for path in paths]


def random_images(count: int, seed: int = 1) -> torch.Tensor:
    """Return random images of the family's size."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, IN_CHANNELS, IMAGE_SIZE, IMAGE_SIZE, generator=rng)


@pytest.mark.parametrize("v3_head", [True, False])
def test_every_choice_equals_the_second_implementation(v3_head: bool) -> None:
    paths = [extreme_path(SPACE, min), *single_changes(SPACE)]
    model, networks = load(paths, use_v3_head=v3_head)
    serving, images = StitchExecutor(model), random_images(3)
    answers = []
    for stitch, network in enumerate(networks):
        wanted = network(images)
        torch.testing.assert_close(serving(images, stitch), wanted, atol=1e-4, rtol=1e-4)
        answers.append(wanted)
    # every choice changes the answer, so that one which is ignored would be found
    for number, answer in enumerate(answers):
        assert all((answer - other).abs().max() > 1e-2 for other in answers[:number])


def test_recalibrated_paths_equal_the_second_implementation() -> None:
    paths = [extreme_path(SPACE, min), extreme_path(SPACE, max) | {"resolution": 22}]
    model, networks = load(paths)
    batches, images = [random_images(8, seed) for seed in (2, 3)], random_images(4)
    for stitch, network in enumerate(networks):
        before = model(images, stitch)
        model.recalibrate(stitch, batches)
        network.calibrate(batches)
        wanted = network(images)
        torch.testing.assert_close(model(images, stitch), wanted, atol=1e-4, rtol=1e-4)
        assert (before - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("copy_limit", [0, None])
def test_sessions_equal_the_second_implementation(copy_limit: float | None, tmp_path: Path) -> None:
    largest, smallest = extreme_path(SPACE, max), extreme_path(SPACE, min)
    paths = [largest | {"resolution": side} for side in (12, 16, 22)]
    paths += [smallest, smallest | {"resolution": 22, "kernel_size": [5, 5, 3, 5]}]
    model, networks = load(paths)
    for stitch in model.stitches:
        onnx.save(export_path(model, stitch.id), path_file(tmp_path, stitch.id))
    executor = NestedExecutor(model, tmp_path, 1, copy_limit)
    images = random_images(5)
    for stitch, network in enumerate(networks):
        for size in (1, 5):
            wanted = network(images[:size]).numpy()
            got = executor(images[:size].numpy(), stitch)
            np.testing.assert_allclose(got, wanted, atol=2e-4, rtol=1e-3)
    executor.close()


@pytest.mark.parametrize(("source", "target"), [(224, 192), (224, 288), (16, 22), (7, 3), (5, 5)])
def test_images_are_resized_as_torch_does(source: int, target: int) -> None:
    matrix = torch.from_numpy(cubic_matrix(source, target))
    images = torch.randn(2, 3, source, source)
    wanted = F.interpolate(images, (target, target), mode="bicubic", align_corners=False)
    torch.testing.assert_close(matrix @ images @ matrix.T, wanted, atol=1e-4, rtol=1e-4)


def test_a_path_without_resolution_has_the_familys() -> None:
    path = extreme_path(SPACE, max)
    unset = {name: value for name, value in path.items() if name != "resolution"}
    config = read_config([path, unset])
    assert [config.image_size(n) for n in (0, 1)] == [22, 16]


def test_costs_follow_from_the_resolution() -> None:
    upstream = {"n_classes": 1000}
    paths = [PUBLISHED, PUBLISHED | {"resolution": 192}]
    costs = path_costs(read_nested("attentivenas", upstream, paths))
    # The paper has 203 million for the smaller one; batch normalisation and shortcuts count here.
    resizing = 3 * (192 * 224 * 224 + 192 * 192 * 224)
    small = costs[1].macs - resizing
    assert 203e6 < small < 215e6
    assert costs[0].macs / small == pytest.approx((224 / 192) ** 2, rel=0.02)
    assert costs[0].parameters == costs[1].parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 14}, r"paths.resolution: expected values among \[12, 16, 22\], got 14"),
        ({"width": [8] * 5}, r"paths.0.width: expected 6 values, got 5"),
        ({"kernel_size": [3, 3, 5, 3]}, r"paths.0.kernel_size: expected one of \[3\], got 5"),
        ({"depth": [1, 1, 1, 1]}, r"paths.0.depth: expected one of \[2\], got 1"),
        ({"expand_ratio": [6, 2, 4, 6]}, r"paths.0.expand_ratio: expected one of \[1\], got 6"),
    ],
)
def test_wrong_paths_are_named(change: dict[str, object], message: str) -> None:
    path = extreme_path(SPACE, max)
    config = read_config([path])
    with pytest.raises(ValidationError, match=message):
        config.with_paths([path | change])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width_list": [[8]] * 5}, "width_list: expected 6 entries, got 5"),
        ({"width_list": [[8, 12]] * 6}, "width_list: expected multiples of 8, got 12"),
        ({"ks_list": [[4]] * 4}, "ks_list: expected odd sizes, got 4"),
        ({"depth_list": [[2, 1]] * 4}, "depth_list: expected ascending lists"),
        ({"expand_ratio_list": [[1, 2]] * 4}, "expand_ratio_list: expected 1 alone or none"),
        ({"resolution_list": [16, 5000]}, "resolution_list: expected ascending sides from 1 to"),
    ],
)
def test_wrong_supernets_are_named(change: dict[str, object], message: str) -> None:
    fields = read_config([extreme_path(SPACE, max)]).model_dump()
    fields["net"] |= change
    with pytest.raises(ValidationError, match=message):
        NestedConfig.model_validate(fields)
