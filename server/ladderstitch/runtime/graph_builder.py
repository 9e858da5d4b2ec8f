"""ONNX graphs of a language model's operators, and products with low-bit matrices.

ONNX Runtime's `MatMulNBits` rounds activations to 8 bits, in blocks of 32. For matrices that are
`is_fine`, each row is multiplied twice: rounded to 8 bits, and what this leaves, rounded to 8 bits
in turn. The sum is as exact as activations of 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from ladderstitch.runtime.low_bit import BLOCK, LowBitMatrix
from ladderstitch.runtime.sessions import open_rank_session

INT8_ACTIVATIONS = 4
"""`accuracy_level` of the products: activations are rounded to 8 bits."""
MICROSOFT = "com.microsoft"
OPSETS = (helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1))
LARGEST_CODE = 127
"""Largest magnitude of an activation that is rounded to 8 bits, in steps."""
SMALLEST_STEP = 1e-30
"""Step of blocks of zeros."""


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
        if not matrix.is_fine:
            return self._coarse_product(x, matrix)
        both = self._coarse_product(self._split_precision(x, matrix.shape[1]), matrix)
        rounded, rest = self.operator("Split", [both], 2, axis=1, num_outputs=2)
        return self.add(rounded, rest)

    def _split_precision(self, x: str, columns: int) -> str:
        """Return the rows of x [1, T, K] rounded to 8 bits, and below them what is left of each."""
        last, shape = self.constant(np.array([3])), np.array([0, 0, -(-columns // BLOCK), BLOCK])
        if padding := -columns % BLOCK:
            pads = self.constant(np.array([0, 0, 0, 0, 0, padding]))
            (x,) = self.operator("Pad", [x, pads])
        (blocks,) = self.operator("Reshape", [x, self.constant(shape)])
        (magnitudes,) = self.operator("Abs", [blocks])
        (largest,) = self.operator("ReduceMax", [magnitudes, last], keepdims=1)
        step = self.multiply(largest, self.constant(np.array([1 / LARGEST_CODE], np.float32)))
        (step,) = self.operator("Max", [step, self.constant(np.array([SMALLEST_STEP], np.float32))])
        (steps,) = self.operator("Div", [blocks, step])
        (codes,) = self.operator("Round", [steps])
        rounded = self.multiply(codes, step)
        (rest,) = self.operator("Sub", [blocks, rounded])
        (both,) = self.operator("Concat", [rounded, rest], axis=1)
        (rows,) = self.operator(
            "Reshape", [both, self.constant(np.array([0, 0, columns + padding]))]
        )
        if not padding:
            return rows
        (kept,) = self.operator(
            "Slice", [rows, *(self.constant(np.array([n])) for n in (0, columns, 2))]
        )
        return kept

    def _coarse_product(self, x: str, matrix: LowBitMatrix) -> str:
        """Return x [1, T, K] times the matrix [N, K], transposed, with activations of 8 bits."""
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
