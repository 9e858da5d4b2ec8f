"""Tests of affine maps: the graph of a map equals the map on aligned rows, for all layouts."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from ladderstitch.vision.networks.maps import Features, aligned_rows, feature_rows, map_graph
from tests.support.onnx_networks import run

SHAPES: dict[str, tuple[int, ...]] = {
    "vector": (6,),
    "tokens with a class token": (17, 6),
    "tokens": (16, 6),
    "more tokens": (64, 5),
    "map": (6, 4, 4),
    "wide map": (5, 4, 6),
    "large map": (5, 8, 8),
    "grid": (4, 4, 6),
    "large grid": (8, 8, 3),
}
VOLUMES: dict[str, tuple[int, ...]] = {
    "volume": (6, 2, 4, 4),
    "large volume": (5, 3, 8, 8),
    "volume with channels last": (2, 4, 4, 6),
}
ALONE = ("vector", "tokens with a class token")
"""Layouts that are mapped to themselves only."""
GRIDS = [name for name in SHAPES if name not in ALONE]
MAPPED = [*((name, name) for name in ALONE), *((a, b) for a in GRIDS for b in GRIDS)]


def with_opset(version: int) -> onnx.ModelProto:
    """Return a model without a graph for these operators."""
    model = onnx.ModelProto(ir_version=8)
    model.opset_import.append(onnx.helper.make_opsetid("", version))
    return model


@pytest.mark.parametrize("opset", [11, 17, 21])
@pytest.mark.parametrize(("front", "end"), MAPPED)
def test_graph_equals_map_on_rows(front: str, end: str, opset: int) -> None:
    check_map(SHAPES[front], SHAPES[end], opset)


@pytest.mark.parametrize("opset", [11, 17, 21])
@pytest.mark.parametrize("front", VOLUMES)
@pytest.mark.parametrize("end", VOLUMES)
def test_graph_equals_map_of_volumes(front: str, end: str, opset: int) -> None:
    check_map(VOLUMES[front], VOLUMES[end], opset)


def check_map(front: tuple[int, ...], end: tuple[int, ...], opset: int) -> None:
    """Compare the graph of a random map with the map on aligned rows."""
    x, y = Features.of(front), Features.of(end)
    assert x is not None
    assert y is not None
    assert x.can_map_to(y)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(y.width, x.width)).astype(np.float32)
    bias = rng.normal(size=y.width).astype(np.float32)
    features = rng.normal(size=(3, *front)).astype(np.float32)
    got = run(map_graph(weight, bias, x, y, with_opset(opset)), features)
    assert got.shape == (3, *end)
    expected = aligned_rows(features, x, y).numpy() @ weight.T + bias
    np.testing.assert_allclose(feature_rows(got, y).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("front", "end"),
    [
        ("vector", "map"),
        ("map", "vector"),
        ("tokens", "tokens with a class token"),
        ("tokens with a class token", "map"),
        ("volume", "map"),
        ("tokens", "volume"),
    ],
)
def test_layouts_without_a_map_are_known(front: str, end: str) -> None:
    x, y = (Features.of((SHAPES | VOLUMES)[name]) for name in (front, end))
    assert x is not None
    assert y is not None
    assert not x.can_map_to(y)


def test_features_of_more_dimensions_have_no_layout() -> None:
    assert Features.of((4, 4, 4, 4, 4)) is None
    assert Features.of(()) is None
