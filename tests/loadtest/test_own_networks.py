"""The check of networks of published architectures, on one that needs no other packages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ladderstitch.client import Client
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine.startup import open_executor
from ladderstitch_loadtest.benchmarks.own_networks import (
    Prepared,
    failures,
    prepare,
    serve,
)
from ladderstitch_loadtest.benchmarks.own_networks_oracle import apply_map, difference
from ladderstitch_loadtest.benchmarks.own_networks_zoo import ARCHITECTURES


class ExecutorClient:
    """A client that computes what a server of a bundle answers; `error` is added to it."""

    def __init__(self, bundle: VisionBundle, error: float = 0.0) -> None:
        self._executor, self._error = open_executor(bundle, 1, lambda done, total: None), error

    def predict(self, inputs: np.ndarray, *, variant: int, **options: object) -> Any:
        """Return the scores of a variant."""
        return SimpleNamespace(outputs={}, logits=self._executor(inputs, variant) + self._error)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Return the exported and stitched networks of one architecture."""
    folder = tmp_path_factory.mktemp("zoo")
    (beit,) = (a for a in ARCHITECTURES if a.name == "BEiT")
    return prepare(beit, folder, folder / "home", lambda text: None)


def test_beit_is_cut_at_its_blocks_and_stitched(prepared: Prepared) -> None:
    assert [(n.blocks_cut, n.blocks) for n in prepared.networks] == [(3, 3), (5, 5)]
    assert all(n.cuts > n.blocks for n in prepared.networks)
    assert (prepared.pair.paths, prepared.pair.reason) == (4, "")
    serve(prepared, cast(Client, ExecutorClient(prepared.bundle)))
    assert not failures(prepared.networks, [prepared.pair])
    assert max(n.served_difference for n in prepared.networks) < 1e-5


def test_wrong_answers_are_found(prepared: Prepared) -> None:
    assert failures(prepared.networks, [prepared.pair]) == []
    serve(prepared, cast(Client, ExecutorClient(prepared.bundle, error=0.01)))
    lines = failures(prepared.networks, [prepared.pair])
    assert [line.partition(":")[0] for line in lines] == [n.network for n in prepared.networks] + [
        "BEiT"
    ]


def test_difference_is_relative_and_infinite_for_what_proves_nothing() -> None:
    expected = np.array([[2.0, -4.0]], np.float32)
    assert difference([expected + 0.5], [expected]) == 0.125
    for got, other in ((expected[:, :1], expected), (expected * np.nan, expected)):
        assert difference([got], [other]) == float("inf")
    assert difference([np.zeros((1, 2))], [np.zeros((1, 2))]) == float("inf")  # proves nothing


def test_map_multiplies_channels_and_resizes_maps() -> None:
    features = np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)
    weight = np.array([[1, 0], [0, 2], [1, 1]], np.float32)
    bias = np.array([0, 0, 10], np.float32)
    mapped = apply_map(features, (1, 3, 2, 2), weight, bias)
    first, second = features[0]
    np.testing.assert_allclose(mapped[0], [first, 2 * second, first + second + 10])
    resized = apply_map(features, (1, 3, 4, 4), weight, bias)
    assert resized.shape == (1, 3, 4, 4)
    np.testing.assert_allclose(resized[0, 0, 0], [0.0, 0.25, 0.75, 1.0])
