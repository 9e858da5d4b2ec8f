"""The forward pass of a model on one rank of a CPU, in ONNX Runtime from one attention to the next.

A segment is all that lies between the attention of a layer and that of the next one: the output
projection, the MLP, both norms, the next queries, keys and values, and their rotation. It is one
graph, because a call per operator would take as long as the operators of a single token do.
Attention itself reads and writes the paged cache, which all paths share.

Matrices have 4 or 8 bits or are float32. ONNX Runtime keeps them in its own layout, from which one
row reads float32 at 32 GB/s on an AMD EPYC (Zen 5, one thread), instead of 23 GB/s with oneDNN. A
row of a product has the same bits whatever other rows there are.

If a path has ladder layers, the residual stream has two parts: x, and the output p of the last
sub-block. A standard layer normalises x + p, a ladder layer x alone, which lags by one sub-block
(`residual.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from ladderstitch.runtime.graph_builder import GraphBuilder
from ladderstitch.runtime.linear import Matrix
from ladderstitch.runtime.low_bit import LowBitMatrix
from ladderstitch.runtime.sessions import open_rank_session
from ladderstitch.text.comm.base import Communicator
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.onnx_attention import Array
from ladderstitch.text.model.residual import LayerPlan
from ladderstitch.text.model.residual_stream import AffineMap
from ladderstitch.text.model.rotation import rotation_tables
from ladderstitch.text.model.transformer import look_up
from ladderstitch.text.model.weights import LayerWeights, RankWeights

SEGMENT_SCHEMES = frozenset({"standard", "ladder"})
"""Residual schemes that segments can run."""
FACTORS = (np.ones(1, np.float32), np.zeros(1, np.float32))
"""The factor of p in what a sub-block reads, by the lag of its layer."""
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Arrays = dict[str, Array]
Projected = tuple[Array, Array]
"""Rotated queries and keys [1, T, (H + K) d], and values [1, T, K d]."""


class SegmentedTransformer:
    """A language model with matrices of 4, 8 or 32 bits on one rank; it holds weights, no state.

    It takes the place of `transformer.Transformer` for standard and ladder layers on a CPU.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: RankWeights,
        threads: int,
        *,
        lagged: bool,
        embedding: Tensor | None = None,
    ) -> None:
        """Open the sessions of all segments; `lagged` says whether some path has ladder layers.

        `embedding` [V, D], in any dtype, takes the place of that in `weights`. If a file backs it,
        the sessions hold all that is in memory.
        """
        self.config = config
        self.embedding = weights.embedding if embedding is None else embedding
        self.weight_bytes, self._stream = weights.bytes(), ("x", "p") if lagged else ("x",)
        self._outputs = (*(f"next_{name}" for name in self._stream), "qk", "v")
        self.tables = dict(zip(("cosines", "sines"), _rotation_halves(config), strict=True))
        self._first = open_rank_session(_first_segment(weights.layers[0], config), threads)
        self._segments = [
            open_rank_session(_segment(weights, layer, config, lagged=lagged), threads)
            for layer in range(config.layers)
        ]

    @torch.inference_mode()
    def forward(
        self, batch: Batch, cache: PagedCache, plans: Sequence[LayerPlan], comm: Communicator
    ) -> Tensor:
        """Return logits [L, V] for the batch's L output rows, like `Transformer.forward`."""
        positions = self.positions(batch)
        stream, qkv = self.start(batch, positions)
        last = self.config.layers - 1
        for layer in range(last):
            attended = self.attend(layer, cache, batch, qkv)
            stream, qkv = self.advance(layer, stream, attended, positions, plans)
        return self.finish(stream, self.attend(last, cache, batch, qkv), batch, plans)

    def positions(self, batch: Batch) -> Arrays:
        """Return the positions of the new tokens, and the rotations of all positions."""
        return {"positions": batch.positions.numpy()[None], **self.tables}

    def embed(self, batch: Batch) -> Array:
        """Return the embedding [T, D] of the new tokens."""
        embedded: Array = look_up(self.embedding, batch.tokens).float().numpy()
        return embedded

    def start(self, batch: Batch, positions: Arrays) -> tuple[Arrays, Projected]:
        """Return the stream before layer 0, and what its attention reads."""
        x = self.embed(batch)[None]
        stream = {"x": x, "p": np.zeros_like(x)} if "p" in self._stream else {"x": x}
        qk, v = self._first.run(("qk", "v"), {"x": x, **positions})
        return stream, (qk, v)

    def advance(
        self,
        layer: int,
        stream: Arrays,
        attended: Array,
        positions: Arrays,
        plans: Sequence[LayerPlan],
    ) -> tuple[Arrays, Projected]:
        """Return the stream before the layer after `layer`, and what its attention reads."""
        feeds = stream | positions | self.factors(plans, layer) | {"attended": attended}
        *parts, qk, v = self._segments[layer].run(self._outputs, feeds)
        return dict(zip(self._stream, parts, strict=True)), (qk, v)

    def finish(
        self, stream: Arrays, attended: Array, batch: Batch, plans: Sequence[LayerPlan]
    ) -> Tensor:
        """Return logits [L, V] from the stream and the attention of the last layer."""
        if not batch.output_rows:
            return torch.empty(0, self.config.vocab_size)
        whole = stream | {"attended": attended}
        rows = {name: part[:, batch.output_rows] for name, part in whole.items()}
        last = self.config.layers - 1
        (logits,) = self._segments[last].run(("logits",), rows | self.factors(plans, last))
        return torch.from_numpy(logits)[0]

    def attend(self, plane: int, cache: PagedCache, batch: Batch, projected: Projected) -> Array:
        """Return the attention [1, T, H d] of rotated queries and keys, and values.

        The latter two are appended to a plane of the cache.
        """
        qk, v = projected
        width = self.config.heads * self.config.head_dim
        keys, values = cache.arrays(plane)
        index = batch.cache_index()
        keys[index.new_slots], values[index.new_slots] = qk[0, :, width:], v[0]
        attention = cache.onnx_attention(self.config.heads)
        assert attention is not None, "segments need a float32 cache on a CPU"
        return attention.attend(index, qk[..., :width], keys, values)

    def factors(self, plans: Sequence[LayerPlan], layer: int) -> dict[str, Array]:
        """Return the factors of p that the MLP of a layer and the sub-block after it read."""
        if "p" not in self._stream:
            return {}
        following = plans[layer + 1].lag if layer + 1 < self.config.layers else 0
        return {"mlp_factor": FACTORS[plans[layer].lag], "next_factor": FACTORS[following]}


def crossing_segment(map_: AffineMap, following: LayerWeights, config: DecoderConfig) -> bytes:
    """Return the graph of a stitching layer, from the stream x, p of the front anchor.

    Its outputs are the stream of the end anchor, and what the attention of its following layer
    reads. `config` is that of the end anchor.
    """
    graph = GraphBuilder()
    matrix = graph.constant(_array(map_.matrix.T.contiguous()))
    x = graph.add(graph.operator("MatMul", ["x", matrix])[0], graph.constant(_array(map_.bias)))
    (p,) = graph.operator("MatMul", ["p", matrix])
    read = graph.add(x, graph.multiply(p, "next_factor"))
    normed = graph.rms_norm(read, _array(following.attention_norm), config.norm_eps)
    front = _rows(map_.matrix.shape[1])
    inputs = {"x": front, "p": front, "next_factor": (FLOAT, (1,))} | _rotation_inputs(config)
    outputs = {"next_x": x, "next_p": p}
    return graph.build(inputs, outputs | _project(graph, normed, following, config))


def _rotation_halves(config: DecoderConfig) -> tuple[Array, Array]:
    """Return the cosines and sines of all positions and frequencies, both [positions, d / 2]."""
    cosines, signed_sines = rotation_tables(config, config.max_positions)
    half = config.head_dim // 2
    return cosines[:, :half].contiguous().numpy(), signed_sines[:, half:].contiguous().numpy()


def _first_segment(layer: LayerWeights, config: DecoderConfig) -> bytes:
    """Return the graph from the embedding x to the first attention."""
    graph = GraphBuilder()
    normed = graph.rms_norm("x", _array(layer.attention_norm), config.norm_eps)
    outputs = _project(graph, normed, layer, config)
    return graph.build({"x": _rows(config.hidden_size)} | _rotation_inputs(config), outputs)


def _segment(weights: RankWeights, layer: int, config: DecoderConfig, *, lagged: bool) -> bytes:
    """Return the graph from the attention of a layer to that of the next one, or to the logits."""
    graph, eps = GraphBuilder(), config.norm_eps
    this, is_last = weights.layers[layer], layer + 1 == config.layers
    following = None if is_last else weights.layers[layer + 1]
    gain = weights.norm if following is None else following.attention_norm
    inputs = {
        "x": _rows(config.hidden_size),
        "attended": _rows(config.heads * config.head_dim),
    }
    attended = _multiply(graph, "attended", this.output)
    assert this.ffn_norm is not None, "only parallel layers share a norm"
    if lagged:
        inputs |= {"p": inputs["x"], "mlp_factor": (FLOAT, (1,)), "next_factor": (FLOAT, (1,))}
        stream = graph.add("x", "p")
        read = graph.add(stream, graph.multiply(attended, "mlp_factor"))
        mlp = _mlp(graph, graph.rms_norm(read, _array(this.ffn_norm), eps), this)
        stream = graph.add(stream, attended)
        read = graph.add(stream, graph.multiply(mlp, "next_factor"))
        normed = graph.rms_norm(read, _array(gain), eps)
        outputs = {"next_x": stream, "next_p": mlp}
    else:
        stream, normed = graph.add_rms_norm("x", attended, _array(this.ffn_norm), eps)
        mlp = _mlp(graph, normed, this)
        stream, normed = graph.add_rms_norm(stream, mlp, _array(gain), eps)
        outputs = {"next_x": stream}
    if following is None:
        return graph.build(inputs, {"logits": _multiply(graph, normed, weights.head)})
    inputs |= _rotation_inputs(config)
    return graph.build(inputs, outputs | _project(graph, normed, following, config))


def _mlp(graph: GraphBuilder, x: str, layer: LayerWeights) -> str:
    """Return silu(x @ gate.T) * (x @ up.T), times the output matrix: [T, D]."""
    columns = layer.down.shape[1]
    gate, up = graph.split(_multiply(graph, x, layer.gate_up), (columns, columns))
    return _multiply(graph, graph.multiply(graph.silu(gate), up), layer.down)


def _project(
    graph: GraphBuilder, x: str, layer: LayerWeights, config: DecoderConfig
) -> dict[str, str]:
    """Return the rotated queries and keys `qk` [T, (H + K) d], and the values `v` [T, K d]."""
    turned, kept = (config.heads + config.kv_heads), config.kv_heads
    sizes = (turned * config.head_dim, kept * config.head_dim)
    qk, v = graph.split(_multiply(graph, x, layer.qkv), sizes)
    return {"qk": graph.rotate(qk, "positions", "cosines", "sines"), "v": v}


def _rows(width: int) -> tuple[int, tuple[int | None, ...]]:
    return FLOAT, (1, None, width)


def _rotation_inputs(config: DecoderConfig) -> dict[str, tuple[int, tuple[int | None, ...]]]:
    table = (FLOAT, (None, config.head_dim // 2))
    return {"positions": (INT64, (1, None)), "cosines": table, "sines": table}


def _array(gain: Tensor | None) -> Array:
    assert gain is not None, "only Llama's layers are computed in segments"
    values: Array = gain.float().numpy()
    return values


def _multiply(graph: GraphBuilder, x: str, matrix: Matrix) -> str:
    """Return x [1, T, K] times the matrix [N, K], transposed: [1, T, N]."""
    if isinstance(matrix, LowBitMatrix):
        return graph.product(x, matrix)
    return graph.operator("MatMul", [x, graph.constant(_array(matrix.T.contiguous()))])[0]
