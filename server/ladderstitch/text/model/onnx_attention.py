"""Attention of sequences over their keys and values on a CPU, in ONNX Runtime.

It takes half the time of torch's. A row of the result has the same bits whatever other rows there
are: tokens that are computed one by one, in chunks of a prompt, or together with other sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from ladderstitch.runtime.graph_builder import GraphBuilder
from ladderstitch.runtime.sessions import open_rank_session

Array = NDArray[np.float32]
BOOL, FLOAT = TensorProto.BOOL, TensorProto.FLOAT
ArrayIndex = slice | NDArray[np.int64]
"""Slots of a cache; a slice if they are adjacent, with which indexing makes a view."""


@dataclass(frozen=True, slots=True)
class LoneSequence:
    """A sequence of a batch, to be attended to by itself."""

    rows: slice
    """Its new tokens among those of the batch."""
    slots: ArrayIndex
    """Cache slots of all its tokens."""
    mask: NDArray[np.bool_] | None
    """[T, S]: the positions that each new token sees; none for a single new token."""


@dataclass(frozen=True, slots=True)
class CacheIndex:
    """The places of a batch in the cache."""

    new_slots: ArrayIndex
    sequences: tuple[LoneSequence, ...]


class OnnxAttention:
    """Grouped-query attention with H query heads, K key/value heads and head width d."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        width: int,
        threads: int,
        softcap: float = 0.0,
        slopes: Array | None = None,
    ) -> None:
        """Open the graphs; scores s become softcap * tanh(s / softcap), unless that is 0.

        `slopes` [H] are what scores lose per token of distance (ALiBi).
        """
        self._kv_heads, self._width, self._slopes = kv_heads, width, slopes
        biased = slopes is not None
        token = _graph(kv_heads, kv_heads, width, softcap, FLOAT if biased else None)
        self._token = open_rank_session(token, threads)
        chunk = _graph(heads, kv_heads, width, softcap, FLOAT if biased else BOOL)
        self._chunk = open_rank_session(chunk, threads)

    def attend(self, index: CacheIndex, queries: Array, keys: Array, values: Array) -> Array:
        """Return the attention [1, T, H d] of queries [1, T, H d] over their sequences.

        `keys` and `values` are the cache of a layer, both [slots, K d].
        """
        if len(index.sequences) == 1:
            return self._attend_to(index.sequences[0], queries, keys, values)
        attended = np.empty(queries.shape, np.float32)
        for sequence in index.sequences:
            rows = sequence.rows
            attended[:, rows] = self._attend_to(sequence, queries[:, rows], keys, values)
        return attended

    def _attend_to(
        self, sequence: LoneSequence, queries: Array, keys: Array, values: Array
    ) -> Array:
        k, v = keys[None, sequence.slots], values[None, sequence.slots]
        if sequence.mask is None:
            return self._attend_token(queries, k, v)
        q = np.ascontiguousarray(queries)
        mask = sequence.mask if self._slopes is None else _bias(self._slopes, sequence.mask)
        feeds = {"q": q, "k": k, "v": v, "mask": mask}
        attended: Array = self._chunk.run(("attended",), feeds)[0]
        return attended

    def _attend_token(self, query: Array, k: Array, v: Array) -> Array:
        """Return the attention of one token, with the bits that it has in a chunk.

        The query heads of a KV head are its rows, so that its keys are read once. There are at
        least two, because a product with one row adds in another order.
        """
        rows = query.reshape(self._kv_heads, -1, self._width).swapaxes(0, 1)
        if (group := len(rows)) == 1:
            rows = rows.repeat(2, axis=0)
        q = np.ascontiguousarray(rows).reshape(1, len(rows), -1)
        feeds = {"q": q, "k": k, "v": v}
        if self._slopes is not None:
            slopes = self._slopes.reshape(self._kv_heads, group)
            slopes = slopes.repeat(len(rows) // group, axis=1)  # the row of a lone head is repeated
            ago = np.arange(1 - k.shape[1], 1, dtype=np.float32)
            feeds["mask"] = slopes[None, :, :, None] * ago
        (attended,) = self._token.run(("attended",), feeds)
        heads = attended.reshape(-1, self._kv_heads, self._width)[:group].swapaxes(0, 1)
        return np.ascontiguousarray(heads).reshape(1, 1, -1)


def _bias(slopes: Array, mask: NDArray[np.bool_]) -> Array:
    """Return what is added to scores [1, H, T, S]: ALiBi where `mask` [T, S] is true, else -inf."""
    rows, seen = mask.shape
    ago = np.arange(1 - seen, 1, dtype=np.float32) - np.arange(1 - rows, 1)[:, None]
    bias: Array = np.where(mask, slopes[:, None, None] * ago, -np.inf).astype(np.float32)[None]
    return bias


def _graph(
    heads: int, kv_heads: int, width: int, softcap: float, mask: TensorProto.DataType | None
) -> bytes:
    """Return the graph of the attention of T rows over all S tokens of their sequence.

    Its inputs are q [1, T, H d], k and v [1, S, K d], and a mask of the type
    `mask`, if any: [T, S] bool, the positions that each row sees, or [1, H, T, S] float, what is
    added to scores.
    """
    graph = GraphBuilder()
    shapes: dict[str, Sequence[int | None]] = {
        "q": (1, None, heads * width),
        "k": (1, None, kv_heads * width),
        "v": (1, None, kv_heads * width),
    }
    inputs = {name: (FLOAT, shape) for name, shape in shapes.items()}
    if mask is not None:
        shape: Sequence[int | None] = (None, None) if mask == BOOL else (1, heads, None, None)
        inputs["mask"] = (mask, shape)
    (attended,) = graph.operator(
        "Attention", list(inputs), q_num_heads=heads, kv_num_heads=kv_heads, softcap=softcap
    )
    return graph.build(inputs, {"attended": attended})
