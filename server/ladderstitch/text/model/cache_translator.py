"""The translation of keys and values from one anchor to another in ONNX Runtime.

One graph has all layers of the end anchor, because a call per layer would take as long as the
operators of a single token do. Layers that a call does not need get streams of no tokens.

The keys and values of a mapped stream y = S x + b are W_kv (g y) / rms(y). With w = (x, 1) and
M = (S, b), they are (W_kv g M) w / rms(M w). M = Q R, and Q keeps lengths, so that
rms(M w) = |R w| / sqrt(D_end). A narrow front anchor thus needs two products with x that no
longer depend on the width of the end anchor: W_kv g M, with 2 K d rows, and R, with D_front + 1
rows. The matrices are multiplied in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from ladderstitch.runtime.graph_builder import GraphBuilder
from ladderstitch.runtime.sessions import open_rank_session
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.onnx_attention import Array
from ladderstitch.text.model.residual_stream import AffineMap
from ladderstitch.text.model.weights import LayerWeights

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Tables = Mapping[str, Array]
"""The rotations of all positions: `cosines` and `sines`, both [positions, d / 2]."""


class CacheTranslator:
    """The keys and values of all layers of an end anchor, from the streams of a front anchor."""

    def __init__(
        self,
        maps: Mapping[int, AffineMap],
        layers: Sequence[LayerWeights],
        config: DecoderConfig,
        threads: int,
    ) -> None:
        """Open the session; `maps` are by layer, and a layer without one reads its embedding.

        `layers` and `config` are those of the end anchor.
        """
        graph = GraphBuilder()
        table = (FLOAT, (None, config.head_dim // 2))
        inputs: dict[str, tuple[int, Sequence[int | None]]] = {"cosines": table, "sines": table}
        outputs: dict[str, str] = {}
        self._widths: list[int] = []
        for number, layer in enumerate(layers):
            width = maps[number].matrix.shape[1] if number in maps else config.hidden_size
            x, positions = f"x-{number}", f"positions-{number}"
            inputs |= {x: (FLOAT, (1, None, width)), positions: (INT64, (1, None))}
            projection = _Projection(graph, layer, config)
            k, v = projection.keys_values(x, maps.get(number))
            k = graph.rotate(k, positions, "cosines", "sines")
            outputs |= {f"k-{number}": k, f"v-{number}": v}
            self._widths.append(width)
        self.weight_bytes = sum(len(constant.raw_data) for constant in graph.constants)
        self._session = open_rank_session(graph.build(inputs, outputs), threads)

    def translate(
        self, streams: Mapping[int, Array], positions: Array, tables: Tables
    ) -> dict[int, tuple[Array, Array]]:
        """Return rotated keys and values, both [T, K d], by layer of the end anchor.

        `streams` [T, D] are what the layers of the front anchor read, or for a layer without a map
        its embedding; `positions` are [T].
        """
        feeds: dict[str, Array | np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = {**tables}
        for layer, width in enumerate(self._widths):
            x = streams.get(layer)
            feeds[f"x-{layer}"] = np.empty((1, 0, width), np.float32) if x is None else x[None]
            feeds[f"positions-{layer}"] = positions[None, : 0 if x is None else len(x)]
        names = [f"{kind}-{layer}" for layer in streams for kind in "kv"]
        found = iter(self._session.run(names, feeds))
        return {layer: (next(found)[0], next(found)[0]) for layer in streams}


@dataclass(frozen=True, slots=True)
class _Projection:
    """The keys and values of one layer as operators of a graph."""

    graph: GraphBuilder
    layer: LayerWeights
    config: DecoderConfig

    def keys_values(self, x: str, map_: AffineMap | None) -> list[str]:
        """Return keys and values of x [1, T, D_front], both [1, T, K d], not rotated."""
        width = self.config.kv_heads * self.config.head_dim
        end = self.config.hidden_size
        if map_ is None:
            both = self._project_normed(x)
        else:
            front = map_.matrix.shape[1]
            folded = front * (2 * width + front + 1)
            is_narrow = folded < front * end + end * 2 * width
            both = self._fold(x, map_) if is_narrow else self._project_mapped(x, map_)
        return self.graph.split(both, (width, width))

    @property
    def _matrix(self) -> Tensor:
        """The rows of keys and values [2 K d, D] of the fused matrix."""
        qkv = self.layer.qkv
        assert isinstance(qkv, Tensor), "families have no low-bit matrices"
        return qkv[self.config.heads * self.config.head_dim :]

    @property
    def _gain(self) -> Tensor:
        gain = self.layer.attention_norm
        assert gain is not None, "only Llama's layers can be stitched"
        return gain

    def _project_normed(self, x: str) -> str:
        normed = self.graph.rms_norm(x, _array(self._gain), self.config.norm_eps)
        return self._multiply(normed, self._matrix)

    def _project_mapped(self, x: str, map_: AffineMap) -> str:
        mapped = self._multiply(x, map_.matrix)
        return self._project_normed(self.graph.add(mapped, self._constant(map_.bias)))

    def _fold(self, x: str, map_: AffineMap) -> str:
        """Return the keys and values by products that do not depend on the end anchor's width."""
        graph, end = self.graph, self.config.hidden_size
        both = torch.cat((map_.matrix, map_.bias[:, None]), dim=1).double()
        projected = (self._matrix.double() * self._gain.double()) @ both
        root = torch.linalg.qr(both, mode="r").R / end**0.5
        kv, part = (
            graph.add(self._multiply(x, m[:, :-1]), self._constant(m[:, -1]))
            for m in (projected, root)
        )
        last = graph.constant(np.array([2]))
        (square,) = graph.operator("ReduceSumSquare", [part, last], keepdims=1)
        eps = graph.constant(np.array([self.config.norm_eps], np.float32))
        (rms,) = graph.operator("Sqrt", [graph.add(square, eps)])
        return graph.operator("Div", [kv, rms])[0]

    def _multiply(self, x: str, matrix: Tensor) -> str:
        return self.graph.operator("MatMul", [x, self._constant(matrix.T)])[0]

    def _constant(self, values: Tensor) -> str:
        return self.graph.constant(_array(values))


def _array(values: Tensor) -> Array:
    array: Array = values.float().contiguous().numpy()
    return array
