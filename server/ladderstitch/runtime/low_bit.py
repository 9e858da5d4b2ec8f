"""Matrices with 4 or 8 bits per weight, and ONNX graphs that multiply with them.

A row is cut into blocks of 32 weights. A block has a scale s, an integer zero point z and an offset
o, and a weight is w = s (c - z) + o with a code c of 4 or 8 bits. ONNX Runtime's `MatMulNBits`
multiplies with the first term as it is stored. It rounds activations to 8 bits, in blocks of 32,
too. The offsets multiply the sums of the activations of a block; they are not zero only for weights
that had 4 bits before, which they keep exactly (GGUF's Q4_1 and Q4_K).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
OPSETS = (helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1))


@dataclass(frozen=True, slots=True, eq=False)
class LowBitMatrix:
    """A matrix [N, K] with `bits` bits per weight, B = ceil(K / 32) blocks in a row."""

    bits: int
    columns: int
    codes: NDArray[np.uint8]  # [N, B, 4 bits]: two codes a byte if they have 4 bits, low one first
    scales: NDArray[np.float32]  # [N, B]
    zeros: NDArray[np.uint8]  # [N, ceil(B bits / 8)], packed like codes
    offsets: NDArray[np.float32] | None = None  # [N, B]; None: all are zero

    @property
    def shape(self) -> tuple[int, int]:
        """Rows N and columns K."""
        return len(self.codes), self.columns

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        parts = (self.codes, self.scales, self.zeros, self.offsets)
        return sum(part.nbytes for part in parts if part is not None)

    def dequantise(self) -> Tensor:
        """Return the weights [N, K] in float32."""
        rows, blocks = self.scales.shape
        codes = _unpack(self.codes.reshape(rows, -1), self.bits).reshape(rows, blocks, BLOCK)
        zeros = _unpack(self.zeros, self.bits)[:, :blocks, None]
        weights = (codes.astype(np.float32) - zeros) * self.scales[..., None]
        if self.offsets is not None:
            weights += self.offsets[..., None]
        return torch.from_numpy(weights.reshape(rows, -1)[:, : self.columns].copy())

    def rows(self, indices: Tensor) -> Tensor:
        """Return the rows with these indices [T], in float32 [T, K]."""
        chosen = indices.numpy()
        part = LowBitMatrix(
            self.bits,
            self.columns,
            self.codes[chosen],
            self.scales[chosen],
            self.zeros[chosen],
            None if self.offsets is None else self.offsets[chosen],
        )
        return part.dequantise()


class LowBitProduct:
    """The product with one low-bit matrix [N, K], on `threads` threads; callable like `Linear`."""

    def __init__(self, matrix: LowBitMatrix, threads: int) -> None:
        graph = GraphBuilder()
        inputs = {"x": (TensorProto.FLOAT, (None, matrix.columns))}
        model = graph.build(inputs, {"y": graph.product("x", matrix)})
        self._session = open_rank_session(model, threads)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product [T, N] with x [T, K], both float32."""
        (product,) = self._session.run(("y",), {"x": x.numpy()})
        return torch.from_numpy(product)


def quantise(weight: Tensor, bits: int) -> LowBitMatrix:
    """Return a matrix [N, K] with `bits` bits per weight, 4 or 8.

    Blocks of 32 weights that have at most 16 equidistant values keep them exactly with 4 bits. For
    others, the range of each block is the one of `SHRINKS` with the smallest squared error.
    """
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK))
    blocks = padded.reshape(rows, -1, BLOCK)
    grid = _find_grid(blocks) if bits == 4 else None
    scale, zero, offset = _choose_ranges(blocks, bits) if grid is None else grid
    centred = blocks if offset is None else blocks - offset[..., None]
    codes = _codes(centred, scale, zero, 2**bits - 1).to(torch.uint8).reshape(rows, -1).numpy()
    return LowBitMatrix(
        bits,
        columns,
        _pack(codes, bits).reshape(rows, -1, BLOCK * bits // 8),
        scale.numpy(),
        _pack(zero.to(torch.uint8).numpy(), bits),
        None if offset is None else offset.numpy(),
    )


Ranges = tuple[Tensor, Tensor, Tensor | None]
"""Scale, zero point and offset of each block, all [N, B]."""


def _choose_ranges(blocks: Tensor, bits: int) -> Ranges:
    """Return the ranges of blocks [N, B, 32] with the smallest squared error."""
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    top = 2**bits - 1
    error, scale, zero = torch.full_like(low, torch.inf), low, low
    for shrink in SHRINKS if bits == 4 else SHRINKS[:1]:
        tried = _nonzero((high - low) * (shrink / top))
        point = (-low * shrink / tried).round().clamp(0, top)
        rounded = (_codes(blocks, tried, point, top) - point[..., None]) * tried[..., None]
        squared = (rounded - blocks).square().sum(-1)
        better = squared < error
        error = torch.where(better, squared, error)
        scale, zero = torch.where(better, tried, scale), torch.where(better, point, zero)
    return scale, zero, None


def _find_grid(blocks: Tensor) -> Ranges | None:
    """Return ranges that keep all weights [N, B, 32] exactly; None if there are none.

    The smallest and the largest weight of a block are some number of steps apart, 15 for Q4_1.
    """
    if len(blocks) > SAMPLE_ROWS and _find_grid(blocks[:SAMPLE_ROWS]) is None:
        return None
    low = blocks.amin(-1)
    reach = blocks.amax(-1) - low
    scale = torch.ones_like(low)
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
    is_symmetric = bool((offset.abs() <= GRID_TOLERANCE * scale).all())
    return scale, zero, None if is_symmetric else offset


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
        """Return consecutive columns of x [T, N], of these numbers."""
        return self.operator("Split", [x, self.constant(np.array(sizes))], len(sizes), axis=1)

    def rotate(self, x: str, positions: str, cosines: str, sines: str) -> str:
        """Return the heads in x [T, H d], of which each pair (i, i + d/2) is rotated.

        `positions` [1, T] are rows of the tables `cosines` and `sines`, both [P, d / 2].
        """
        first_axis = self.constant(np.zeros(1, np.int64))
        (one_batch,) = self.operator("Unsqueeze", [x, first_axis])
        (turned,) = self.operator(
            "RotaryEmbedding", [one_batch, positions, cosines, sines], domain=MICROSOFT
        )
        return self.operator("Squeeze", [turned, first_axis])[0]

    def product(self, x: str, matrix: LowBitMatrix) -> str:
        """Return x [T, K] times the matrix [N, K], transposed: [T, N]."""
        rows, columns = matrix.shape
        parts = (matrix.codes, matrix.scales.reshape(-1), matrix.zeros.reshape(-1))
        (name,) = self.operator(
            "MatMulNBits",
            [x, *(self.constant(part) for part in parts)],
            domain=MICROSOFT,
            K=columns,
            N=rows,
            bits=matrix.bits,
            block_size=BLOCK,
            accuracy_level=INT8_ACTIVATIONS,
        )
        if matrix.offsets is None:
            return name
        shape = np.array([0, matrix.offsets.shape[1], BLOCK])
        (blocks,) = self.operator("Reshape", [x, self.constant(shape)])
        (sums,) = self.operator("ReduceSum", [blocks, self.constant(np.array([2]))], keepdims=0)
        offsets = self.constant(np.ascontiguousarray(matrix.offsets.T))
        return self.operator("Gemm", [sums, offsets, name])[0]

    def rms_norm(self, x: str, gain: NDArray[np.float32], eps: float) -> str:
        """Return the RMS norm of x [T, D]."""
        inputs = [x, self.constant(gain)]
        return self.operator("SimplifiedLayerNormalization", inputs, axis=-1, epsilon=eps)[0]

    def add_rms_norm(
        self, x: str, y: str, gain: NDArray[np.float32], eps: float
    ) -> tuple[str, str]:
        """Return x + y and the RMS norm of this sum, both [T, D]."""
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
        `outputs` the name of a float32 result [T, N] by the name of the output.
        """
        named = [helper.make_node("Identity", [of], [name]) for name, of in outputs.items()]
        graph = helper.make_graph(
            [*self.nodes, *named],
            "graph",
            [helper.make_tensor_value_info(n, kind, s) for n, (kind, s) in inputs.items()],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, None]) for n in outputs],
            self.constants,
        )
        model: bytes = helper.make_model(
            graph, opset_imports=OPSETS, ir_version=10
        ).SerializeToString()
        return model
