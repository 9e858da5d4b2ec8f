"""Tests of supernets in ONNX Runtime: equal to torch, on weights that exist once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from ladderstitch.vision.engine.nested import NestedExecutor
from ladderstitch.vision.models.nested.graphs import bound_names, export_path, path_file
from ladderstitch.vision.models.nested.model import NestedModel
from tests.support.nested_nets import NETS, make_config, make_model


def open_paths(model: NestedModel, folder: Path, copy_limit: float | None = 0) -> NestedExecutor:
    """Export all paths and open them."""
    for stitch in model.stitches:
        onnx.save(export_path(model, stitch.id), path_file(folder, stitch.id))
    return NestedExecutor(model, folder, 1, copy_limit)


@pytest.mark.parametrize("kind", NETS)
def test_sessions_equal_torch(kind: str, tmp_path: Path) -> None:
    model = make_model(make_config(kind, 3))
    executor = open_paths(model, tmp_path)
    images = torch.randn(5, *model.config.inputs.shape)
    ids = [stitch.id for stitch in model.stitches]
    for joined in (False, True):
        if joined:
            assert executor.join(ids) == ids
        for stitch in ids:
            wanted = model(images, stitch).numpy()
            for size in (1, 3, 5):
                got = executor(images[:size].numpy(), stitch)
                np.testing.assert_allclose(got, wanted[:size], atol=2e-4, rtol=1e-3)
    executor.close()


def test_sessions_read_the_models_own_weights_until_they_are_joined(tmp_path: Path) -> None:
    model = make_model(make_config("ofa-resnet", 3))
    executor = open_paths(model, tmp_path)
    images = torch.randn(2, *model.config.inputs.shape)
    before = executor(images.numpy(), 2)
    executor.join([2])
    kernel = model.get_parameter("input_stem.0.conv.conv.weight")
    kernel.data.mul_(-1)
    changed = executor(images.numpy(), 1)
    np.testing.assert_allclose(changed, model(images, 1).numpy(), atol=2e-4, rtol=1e-3)
    np.testing.assert_allclose(executor(images.numpy(), 2), before, atol=1e-5)
    executor.close()


def test_small_supernets_are_copied_at_once(tmp_path: Path) -> None:
    model = make_model(make_config("autoformer", 2))
    executor = open_paths(model, tmp_path, copy_limit=None)
    images = torch.randn(2, *model.config.inputs.shape)
    wanted = model(images, 1).numpy()
    model.get_parameter("head.weight").data.zero_()
    assert executor.all_copied
    assert executor.join([1, 0]) == [1, 0]
    np.testing.assert_allclose(executor(images.numpy(), 1), wanted, atol=2e-4, rtol=1e-3)
    executor.close()


def test_graphs_hold_no_weights(tmp_path: Path) -> None:
    model = make_model(make_config("ofa-resnet", 2))
    graph = export_path(model, 1)
    used = {name for name in bound_names(graph) if name.endswith("conv.weight")}
    assert len(used) == len([n for n in model.state_dict() if n.endswith("conv.weight")])
    held = sum(int(np.prod(t.dims)) for t in graph.graph.initializer if t.data_location == 0)
    widths = sum(model.norm_widths(1).values())
    assert 2 * widths <= held < 2 * widths + 200  # statistics, and bounds of slices
