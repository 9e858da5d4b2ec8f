"""Tests of cut points: which tensors are cuts, and that prefix and suffix equal the whole."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from ladderstitch.errors import BundleError
from ladderstitch.vision.networks.order import DataFlow
from ladderstitch.vision.networks.reader import read_network
from ladderstitch.vision.networks.units import Network, Scaling
from tests.support.onnx_networks import (
    SHAPE,
    export,
    network_bytes,
    random_images,
    reference,
    run,
    write_network,
)

TOLERANCE = 1e-4
BLOCKS = {"resnet": 4, "vit": 4, "convnext": 3, "swin": 3}
"""Sums at the ends of residual blocks, each of which is a cut at least."""


@pytest.mark.parametrize("kind", BLOCKS)
def test_prefix_and_suffix_equal_whole_network(kind: str, tmp_path: Path) -> None:
    path = write_network(tmp_path, kind, 8)
    network = Network(path, SHAPE)
    images = random_images(4)
    expected = reference(path, images)
    scale = np.abs(expected).max()
    assert sum(cut.operator == "Add" for cut in network.info.cuts) >= BLOCKS[kind]
    chosen = network.info.cuts[:: max(1, len(network.cuts) // 6)]
    for cut in (*chosen, network.info.cuts[-1]):
        features = run(network.unit(None, cut.name, None), images)
        assert features.shape == (4, *cut.shape)
        scores = run(network.unit(cut.name, None, None), features)
        np.testing.assert_allclose(scores, expected, atol=TOLERANCE * scale)


def test_three_units_equal_whole_network(tmp_path: Path) -> None:
    path = write_network(tmp_path, "swin", 8)
    network = Network(path, SHAPE)
    first, second = network.info.cuts[3].name, network.info.cuts[-5].name
    x = images = random_images(3)
    for start, end in ((None, first), (first, second), (second, None)):
        x = run(network.unit(start, end, None), x)
    np.testing.assert_allclose(x, reference(path, images), atol=TOLERANCE)


def test_units_hold_every_weight_once(tmp_path: Path) -> None:
    path = write_network(tmp_path, "convnext", 8)
    network = Network(path, SHAPE)
    cuts = [None, *(cut.name for cut in network.info.cuts[2:12:4]), None]
    units = [network.unit(a, b, None) for a, b in pairwise(cuts)]
    total = sum(unit.ByteSize() for unit in units)
    weights = sum(len(tensor.raw_data) for tensor in network.model.graph.initializer)
    held = sum(len(tensor.raw_data) for unit in units for tensor in unit.graph.initializer)
    assert weights <= held < 1.01 * weights  # a few vectors of zeros are shared between blocks
    assert total < 2 * path.stat().st_size


class Skips(nn.Module):
    """A network with a connection from its first layer to its last one, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores."""
        x = first = self.layers[0](x)
        for layer in list(self.layers)[1:]:
            x = layer(x).relu()
        scores: Tensor = self.head((x + first).mean((2, 3)))
        return scores


def test_long_skip_connection_leaves_no_cut_below_it(tmp_path: Path) -> None:
    path = tmp_path / "skips.onnx"
    path.write_bytes(export(Skips()))
    operators = [cut.operator for cut in Network(path, SHAPE).info.cuts]
    assert operators == ["Conv", "Add", "ReduceMean"]


class Shapes(nn.Module):
    """A network whose last layers need the batch size and a side of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, stride=4)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores."""
        batch, _, height, _ = x.shape
        y = self.norm(self.conv(x)).relu()
        tokens = y.view(batch * 2, -1)
        scores: Tensor = self.head(tokens.view(batch, -1)) + float(height)
        return scores


def test_shape_of_images_does_not_hide_cuts(tmp_path: Path) -> None:
    path = tmp_path / "shapes.onnx"
    path.write_bytes(export(Shapes()))
    network = Network(path, SHAPE)
    assert "Relu" in [cut.operator for cut in network.info.cuts]
    images = random_images(7)
    for cut in network.info.cuts:
        features = run(network.unit(None, cut.name, None), images)
        scores = run(network.unit(cut.name, None, None), features)
        np.testing.assert_allclose(scores, reference(path, images), atol=TOLERANCE)


def test_cuts_with_batch_in_another_place_are_not_listed(tmp_path: Path) -> None:
    path = tmp_path / "shapes.onnx"
    path.write_bytes(export(Shapes()))
    network = Network(path, SHAPE)
    assert all(cut.shape != (128,) for cut in network.info.cuts)


def test_cuts_are_the_same_in_any_order_of_the_file(tmp_path: Path) -> None:
    path = write_network(tmp_path, "resnet", 8)
    expected = DataFlow(read_network(path).graph).cuts()
    model = onnx.load(path)
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)
    assert DataFlow(read_network(path).graph).cuts() == expected


def test_costs_equal_those_of_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, groups=1, bias=False), nn.Flatten(), nn.Linear(8 * 32 * 32, 5)
    )
    path = tmp_path / "plain.onnx"
    path.write_bytes(export(layers))
    info = Network(path, SHAPE).info
    assert info.macs == 8 * 32 * 32 * 27 + 8 * 32 * 32 * 5
    assert info.parameters == sum(p.numel() for p in layers.parameters())


def test_unit_scales_images_to_those_of_the_network(tmp_path: Path) -> None:
    path = write_network(tmp_path, "resnet", 8)
    scaling = Scaling(factor=(0.5, 2.0, 1.0), shift=(0.1, -0.3, 0.0))
    images = random_images(2)
    scaled = images * np.array(scaling.factor, np.float32).reshape(1, 3, 1, 1)
    scaled += np.array(scaling.shift, np.float32).reshape(1, 3, 1, 1)
    got = run(Network(path, SHAPE).unit(None, None, scaling), images)
    np.testing.assert_allclose(got, reference(path, scaled), atol=TOLERANCE)


def test_unit_with_names_like_its_own_ends_is_right(tmp_path: Path) -> None:
    model = onnx.load_from_string(network_bytes("resnet", 8))
    renamed = onnx.compose.add_prefix(model, "n")
    cut = DataFlow(renamed.graph).cuts()[3]
    for node in renamed.graph.node:  # an inner tensor is called `x`, and another one `y`
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = {cut: "y", "npixels": "x"}.get(name, name)
    renamed.graph.input[0].name = "x"
    path = tmp_path / "names.onnx"
    onnx.save(renamed, path)
    network, images = Network(path, SHAPE), random_images(2)
    features = run(network.unit(None, "y", None), images)
    scores = run(network.unit("y", None, None), features)
    np.testing.assert_allclose(scores, reference(path, images), atol=TOLERANCE)


def test_network_of_one_image_is_served_in_batches(tmp_path: Path) -> None:
    path = write_network(tmp_path, "resnet", 8, batch=False)
    images = random_images(3)
    got = run(Network(path, SHAPE).unit(None, None, None), images)
    alone = np.concatenate([reference(path, images[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(got, alone, atol=TOLERANCE)


def test_unknown_cut_is_rejected(tmp_path: Path) -> None:
    network = Network(write_network(tmp_path, "resnet", 8), SHAPE)
    with pytest.raises(BundleError, match="expected the name of a cut, got 'nothing'"):
        network.unit(None, "nothing", None)
    first, second = network.info.cuts[2].name, network.info.cuts[5].name
    with pytest.raises(BundleError, match=r"expected cut .* before"):
        network.unit(second, first, None)
