"""Tests of the translation of keys and values in ONNX Runtime, against numpy in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.messages import LogitsMode, SequenceInput, Step
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.cache_translator import CacheTranslator
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.residual import plan_layers
from ladderstitch.text.model.residual_stream import AffineMap
from ladderstitch.text.model.stitched_segments import SegmentedPath
from ladderstitch.text.model.weights import LayerWeights
from ladderstitch.training.text.calibrate import open_runner
from tests.support.elastic_models import (
    LADDER,
    Definition,
    ThreadedSum,
    paths,
    random_family,
    run_ranks,
    write_elastic,
)

Doubles = NDArray[np.float64]
LAYERS, HEADS, KV_HEADS, WIDTH, POSITIONS = 3, 4, 2, 6, 50
WIDTHS = [(5, 64), (24, 40), (40, 24), (64, 5), (32, 32)]
"""Widths of front and end: the first two are folded, the others are not."""


class RandomPair:
    """A translator between random anchors of some widths, with what it was made from."""

    def __init__(self, front: int, end: int) -> None:
        self.config = DecoderConfig(
            vocab_size=9,
            hidden_size=end,
            intermediate_size=8,
            layers=LAYERS,
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_dim=WIDTH,
            max_positions=POSITIONS,
            norm_eps=1e-3,  # as large as to matter
        )
        random = torch.Generator().manual_seed(front)
        rows = (HEADS + 2 * KV_HEADS) * WIDTH

        def draw(*shape: int) -> torch.Tensor:
            return 0.3 * torch.randn(*shape, generator=random)

        self.layers = [
            LayerWeights(draw(end), draw(rows, end), draw(end, 24), None, draw(16, end), draw(end))
            for _ in range(LAYERS)
        ]
        self.maps = {n: AffineMap(draw(end, front), draw(end)) for n in range(1, LAYERS)}
        self.translator = CacheTranslator(self.maps, self.layers, self.config, 1)
        self.streams = {n: draw(20, front if n else end).numpy() for n in range(LAYERS)}
        self.positions = np.arange(7, 27)
        angles = np.outer(np.arange(POSITIONS), 10_000.0 ** (-np.arange(3) / 3))
        self.tables = {
            "cosines": np.cos(angles).astype(np.float32),
            "sines": np.sin(angles).astype(np.float32),
        }

    def expected(self, layer: int) -> tuple[Doubles, Doubles]:
        """Return rotated keys and values, both [T, K d], by their definition."""
        x = self.streams[layer].astype(np.float64)
        if layer:
            map_ = self.maps[layer]
            x = x @ map_.matrix.double().numpy().T + map_.bias.double().numpy()
        gain, qkv = self.layers[layer].attention_norm, self.layers[layer].qkv
        assert gain is not None
        assert isinstance(qkv, torch.Tensor)
        normed = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-3) * gain.double().numpy()
        projected = normed @ qkv.double().numpy().T
        _, keys, values = np.split(projected, [HEADS * WIDTH, (HEADS + KV_HEADS) * WIDTH], axis=1)
        pairs = keys.reshape(20, KV_HEADS, 2, 3)
        turned = (pairs[:, :, 0] + 1j * pairs[:, :, 1]) * np.exp(
            1j * np.outer(self.positions, 10_000.0 ** (-np.arange(3) / 3))
        )[:, None]
        return np.stack((turned.real, turned.imag), 2).reshape(20, -1), values


@pytest.mark.parametrize("chosen", [(0, 1, 2), (0,), (2,), (1, 2)])
@pytest.mark.parametrize(("front", "end"), WIDTHS)
def test_translated_keys_and_values_equal_definition(
    front: int, end: int, chosen: tuple[int, ...]
) -> None:
    pair = RandomPair(front, end)
    streams = {layer: pair.streams[layer] for layer in chosen}
    found = pair.translator.translate(streams, pair.positions, pair.tables)
    assert tuple(found) == chosen
    for layer, arrays in found.items():
        for got, want in zip(arrays, pair.expected(layer), strict=True):
            assert abs(got - want).max() <= 2e-6 * abs(want).max()


@pytest.mark.parametrize(("front", "end"), WIDTHS)
def test_translation_of_a_token_has_the_same_bits_in_any_batch(front: int, end: int) -> None:
    pair = RandomPair(front, end)
    whole = pair.translator.translate(pair.streams, pair.positions, pair.tables)
    for begin, stop in ((0, 1), (5, 6), (3, 5), (2, 19)):
        part = {layer: x[begin:stop] for layer, x in pair.streams.items()}
        found = pair.translator.translate(part, pair.positions[begin:stop], pair.tables)
        for layer, arrays in found.items():
            for got, all_rows in zip(arrays, whole[layer], strict=True):
                np.testing.assert_array_equal(got, all_rows[begin:stop])


def test_write_through_in_segments_equals_definition(tmp_path: Path) -> None:
    """The blocks of the sequence are not adjacent, and every token takes another route."""
    runner = open_runner(TextBundle.load(write_elastic(tmp_path / "elastic")), 1)
    blocks, config = [5, 2, 4, 1], runner.config
    tokens, routes = [3 * n % 256 for n in range(40)], [path.route for path in paths()]
    order = [(3 * n) % len(routes) for n in range(40)]
    plans = plan_layers(LADDER, config.model.layers, 1)

    def run(rank: int, comm: ThreadedSum) -> torch.Tensor:
        rows = []
        for position, (token, path) in enumerate(zip(tokens, order, strict=True)):
            sequence = SequenceInput([token], position, blocks, LogitsMode.ALL)
            batch, model = Batch(Step((sequence,)), config.block_tokens), runner.models[path]
            assert isinstance(model, SegmentedPath)
            rows.append(model.forward(batch, runner.cache, plans, comm))
            model.model.translate_all(batch, runner.cache, model.route, comm)
        return torch.cat(rows)

    (found,) = run_ranks(1, run)
    expected = Definition(random_family(), lag=1).logits(tokens, [routes[n] for n in order])
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
