"""Matrices with 4 or 8 bits per weight, and ONNX graphs that multiply with them.

A row is cut into blocks of 32 weights. A block has a scale s and an integer zero point z, and a
weight is w = s (c - z) with a code c of 4 or 8 bits. ONNX Runtime's `MatMulNBits` multiplies with
such matrices as they are stored. It rounds activations to 8 bits, in blocks of 32, too.

Weights that had 4 bits before (GGUF's Q4_1 and Q4_K) lie on grids that do not contain 0, so that
blocks have an offset o in addition: w = s (c - z) + o. As an offset multiplies the sum of a block's
activations, the offsets are further columns of the matrix, and the sums further activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from ladderstitch.runtime.sessions import open_rank_session

LowBitPrecision: TypeAlias = Literal["int8", "int4"]
"""Name of the number format of a path's matrices."""
BITS: Mapping[LowBitPrecision, int] = {"int8": 8, "int4": 4}
"""Bits of a weight in each precision."""
BLOCK = 32
"""Weights of a row that share a scale and a zero point."""
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of a block's range that `quantise` tries with 4 bits; less than 1 clips a few weights."""
SAMPLE_ROWS = 8
"""Rows that decide whether the others may lie on grids, too."""
GRID_TOLERANCE = 1e-2
"""Largest distance of a weight from its grid, in steps."""
INT8_ACTIVATIONS = 4
"""`accuracy_level` of the products: activations are rounded to 8 bits."""
MICROSOFT = "com.microsoft"
OPSETS = (helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1))


@dataclass(frozen=True, slots=True, eq=False)
class LowBitMatrix:
    """A matrix [N, K] with `bits` bits per weight.

    A row has B = ceil(K / 32) blocks of weights and, if `has_offsets`, ceil(B / 32) more blocks
    with the offsets of those; P blocks in all.
    """

    bits: int
    columns: int
    codes: NDArray[np.uint8]  # [N, P, 4 bits]: two codes a byte if they have 4 bits, low one first
    scales: NDArray[np.float32]  # [N, P]
    zeros: NDArray[np.uint8]  # [N, ceil(P bits / 8)], packed like codes
    has_offsets: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows N and columns K."""
        return len(self.codes), self.columns

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes

    @property
    def num_sums(self) -> int:
        """The number of blocks of activations whose sums are further activations; 0 for none."""
        return -(-self.columns // BLOCK) if self.has_offsets else 0

    def dequantise(self) -> Tensor:
        """Return the weights [N, K] in float32."""
        rows, blocks = self.scales.shape
        codes = _unpack(self.codes.reshape(rows, -1), self.bits).reshape(rows, blocks, BLOCK)
        zeros = _unpack(self.zeros, self.bits)[:, :blocks, None]
        values = (codes.astype(np.float32) - zeros) * self.scales[..., None]
        flat = values.reshape(rows, -1)
        weights = flat[:, : self.columns].copy()
        if self.has_offsets:
            offsets = flat[:, self.columns : self.columns + self.num_sums]
            weights += np.repeat(offsets, BLOCK, axis=1)
        return torch.from_numpy(weights)

    def rows(self, indices: Tensor) -> Tensor:
        """Return the rows with these indices [T], in float32 [T, K]."""
        at = indices.numpy()
        codes, scales, zeros = self.codes[at], self.scales[at], self.zeros[at]
        return replace(self, codes=codes, scales=scales, zeros=zeros).dequantise()


class LowBitProduct:
    """The product with one low-bit matrix [N, K], on `threads` threads; callable like `Linear`."""

    def __init__(self, matrix: LowBitMatrix, threads: int) -> None:
        graph = GraphBuilder()
        inputs = {"x": (TensorProto.FLOAT, (1, None, matrix.columns))}
        model = graph.build(inputs, {"y": graph.product("x", matrix)})
        self._session = open_rank_session(model, threads)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product [T, N] with x [T, K], both float32."""
        (product,) = self._session.run(("y",), {"x": x.numpy()[None]})
        return torch.from_numpy(product)[0]


def quantise(weight: Tensor, bits: int) -> LowBitMatrix:
    """Return a matrix [N, K] with `bits` bits per weight, 4 or 8.

    Blocks of 32 weights that have at most 16 equidistant values keep their distances with 4 bits;
    offsets are kept to 1/30 of the range of 32 of them. For other weights, the range of each
    block is the one of `SHRINKS` with the smallest squared error.
    """
    rows, columns = weight.shape
    blocks = _blocks(weight.float())
    grid = _find_grid(blocks) if bits == 4 and columns % BLOCK == 0 else None
    if grid is None:
        shrinks = SHRINKS if bits == 4 else SHRINKS[:1]
        parts = [(blocks, *_choose_ranges(blocks, bits, shrinks))]
    else:
        scale, zero, offset = grid
        parts = [(blocks - offset[..., None], scale, zero)]
        if (offset.abs() > GRID_TOLERANCE * scale).any():
            offsets = _blocks(offset)
            parts.append((offsets, *_choose_ranges(offsets, bits, SHRINKS[:1])))
    scale, zero = (torch.cat([part[n] for part in parts], 1) for n in (1, 2))
    codes = torch.cat([_codes(*part, 2**bits - 1) for part in parts], 1).to(torch.uint8)
    return LowBitMatrix(
        bits,
        columns,
        _pack(codes.reshape(rows, -1).numpy(), bits).reshape(rows, -1, BLOCK * bits // 8),
        scale.numpy(),
        _pack(zero.to(torch.uint8).numpy(), bits),
        has_offsets=len(parts) > 1,
    )


def _blocks(rows: Tensor) -> Tensor:
    """Return rows [N, K] as blocks [N, ceil(K / 32), 32], padded with zeros."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK))
    return padded.reshape(len(rows), -1, BLOCK)


def _choose_ranges(blocks: Tensor, bits: int, shrinks: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point of blocks [N, B, 32] with the smallest squared error."""
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    top = 2**bits - 1
    error, scale, zero = torch.full_like(low, torch.inf), low, low
    for shrink in shrinks:
        tried = _nonzero((high - low) * (shrink / top))
        point = (-low * shrink / tried).round().clamp(0, top)
        rounded = (_codes(blocks, tried, point, top) - point[..., None]) * tried[..., None]
        squared = (rounded - blocks).square().sum(-1)
        better = squared < error
        error = torch.where(better, squared, error)
        scale, zero = torch.where(better, tried, scale), torch.where(better, point, zero)
    return scale, zero


def _find_grid(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return scale, zero point and offset that keep all weights [N, B, 32]; None if there are none.

    The smallest and the largest weight of a block are some number of steps apart, 15 for Q4_1.
    """
    if len(blocks) > SAMPLE_ROWS and _find_grid(blocks[:SAMPLE_ROWS]) is None:
        return None
    low = blocks.amin(-1)
    reach = blocks.amax(-1) - low
    scale = _nonzero(low.abs())  # for blocks of equal weights
    missing = reach > 0
    for steps in range(15, 0, -1):
        step = _nonzero(reach / steps)
        codes = (blocks - low[..., None]) / step[..., None]
        fits = (codes - codes.round()).abs().amax(-1) < GRID_TOLERANCE
        scale = torch.where(missing & fits, step, scale)
        missing &= ~fits
        if not missing.any():
            break
    else:
        return None
    zero = (-low / scale).round().clamp(0, 15)
    offset = low + scale * zero
    # weights that are all positive: whole steps are part of the codes if these have room
    room = 15 - (reach / scale).round() - zero
    whole_steps = torch.minimum((offset / scale).round().clamp(min=0), room.clamp(min=0))
    return scale, zero, offset - scale * whole_steps


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _codes(blocks: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Return the codes [N, B, 32] of weights, as floating-point numbers."""
    return (blocks / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, top)


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return codes [N, K] as bytes, two in each if they have 4 bits."""
    if bits == 8:
        return codes
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    packed: NDArray[np.uint8] = even[:, ::2] | even[:, 1::2] << np.uint8(4)
    return packed


def _unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return the codes in bytes, one in each; the inverse of `_pack` up to its padding."""
    if bits == 8:
        return packed
    return np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)


@dataclass(slots=True)
class GraphBuilder:
    """An ONNX graph under construction; methods add operators and return names of their results."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)

    def operator(
        self, kind: str, inputs: Sequence[str], outputs: int = 1, domain: str = "", **fields: Any
    ) -> list[str]:
        """Add an operator with this number of outputs; returns their names."""
        names = [f"{kind}-{len(self.nodes)}-{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, domain=domain, **fields))
        return names

    def constant(self, value: NDArray[Any]) -> str:
        """Add a constant; returns its name."""
        name = f"constant-{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def add(self, x: str, y: str) -> str:
        """Return x + y."""
        return self.operator("Add", [x, y])[0]

    def multiply(self, x: str, y: str) -> str:
        """Return x times y, element by element."""
        return self.operator("Mul", [x, y])[0]

    def split(self, x: str, sizes: Sequence[int]) -> list[str]:
        """Return consecutive columns of x [1, T, N], of these numbers."""
        return self.operator("Split", [x, self.constant(np.array(sizes))], len(sizes), axis=2)

    def rotate(self, x: str, positions: str, cosines: str, sines: str) -> str:
        """Return the heads in x [1, T, H d], of which each pair (i, i + d/2) is rotated.

        `positions` [1, T] are rows of the tables `cosines` and `sines`, both [P, d / 2].
        """
        inputs = [x, positions, cosines, sines]
        return self.operator("RotaryEmbedding", inputs, domain=MICROSOFT)[0]

    def product(self, x: str, matrix: LowBitMatrix) -> str:
        """Return x [1, T, K] times the matrix [N, K], transposed: [1, T, N]."""
        rows, columns = matrix.shape
        if matrix.has_offsets:
            shape = self.constant(np.array([0, 0, matrix.num_sums, BLOCK]))
            (blocks,) = self.operator("Reshape", [x, shape])
            last = self.constant(np.array([3]))
            (sums,) = self.operator("ReduceSum", [blocks, last], keepdims=0)
            (x,) = self.operator("Concat", [x, sums], axis=2)
        parts = (matrix.codes, matrix.scales.reshape(-1), matrix.zeros.reshape(-1))
        (name,) = self.operator(
            "MatMulNBits",
            [x, *(self.constant(part) for part in parts)],
            domain=MICROSOFT,
            K=columns + matrix.num_sums,
            N=rows,
            bits=matrix.bits,
            block_size=BLOCK,
            accuracy_level=INT8_ACTIVATIONS,
        )
        return name

    def rms_norm(self, x: str, gain: NDArray[np.float32], eps: float) -> str:
        """Return the RMS norm of x [1, T, D]."""
        inputs = [x, self.constant(gain)]
        return self.operator("SimplifiedLayerNormalization", inputs, axis=-1, epsilon=eps)[0]

    def add_rms_norm(
        self, x: str, y: str, gain: NDArray[np.float32], eps: float
    ) -> tuple[str, str]:
        """Return x + y and the RMS norm of this sum, both [1, T, D]."""
        kind, inputs = "SkipSimplifiedLayerNormalization", [x, y, self.constant(gain)]
        normed, total = f"{kind}-{len(self.nodes)}", f"sum-{len(self.nodes)}"
        outputs = [normed, "", "", total]
        node = helper.make_node(kind, inputs, outputs, domain=MICROSOFT, epsilon=eps)
        self.nodes.append(node)
        return total, normed

    def silu(self, x: str) -> str:
        """Return x sigmoid(x)."""
        return self.operator("QuickGelu", [x], domain=MICROSOFT, alpha=1.0)[0]

    def build(
        self, inputs: Mapping[str, tuple[int, Sequence[int | None]]], outputs: Mapping[str, str]
    ) -> bytes:
        """Return the serialised model.

        `inputs` has the element type (`TensorProto.FLOAT`, ..) and the shape of each input,
        `outputs` the name of a float32 result [1, T, N] by the name of the output.
        """
        named = [helper.make_node("Identity", [of], [name]) for name, of in outputs.items()]
        graph = helper.make_graph(
            [*self.nodes, *named],
            "graph",
            [helper.make_tensor_value_info(n, kind, s) for n, (kind, s) in inputs.items()],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, None, None]) for n in outputs],
            self.constants,
        )
        model: bytes = helper.make_model(
            graph, opset_imports=OPSETS, ir_version=10
        ).SerializeToString()
        return model
