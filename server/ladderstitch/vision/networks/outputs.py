"""The outputs of networks that do not classify, as data, and how they travel through an engine.

An engine returns one float32 row for each image. The row holds all outputs of the image, flattened
and joined in order, so that batches, checks of rows and schedulers are those of class scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ladderstitch.errors import InternalError

DataType = Literal["FP32", "INT64", "INT32", "UINT8", "BOOL"]
NUMPY_TYPES: dict[DataType, np.dtype[np.generic]] = {
    "FP32": np.dtype("<f4"),
    "INT64": np.dtype("<i8"),
    "INT32": np.dtype("<i4"),
    "UINT8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
SERVED_TYPES: dict[str, DataType] = {
    "tensor(float)": "FP32",
    "tensor(float16)": "FP32",
    "tensor(double)": "FP32",
    "tensor(int64)": "INT64",
    "tensor(int32)": "INT32",
    "tensor(uint8)": "UINT8",
    "tensor(bool)": "BOOL",
}
"""Types of outputs by ONNX Runtime's names, and how they are served."""
MAX_INTEGER = 1 << 24
"""Magnitude up to which float32 rows hold integers exactly."""


class OutputEntry(BaseModel):
    """One output of a network that does not classify: its name, and its shape for one image.

    `scores` are class scores, whose first axis counts the labels, at each place of the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    shape: tuple[int, ...] = Field(max_length=16)
    kind: Literal["scores", "tensor"] = "tensor"
    data_type: DataType = "FP32"

    @property
    def size(self) -> int:
        """The number of elements for one image."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """The bytes of one image's output in an answer."""
        return self.size * NUMPY_TYPES[self.data_type].itemsize


def row_size(outputs: Iterable[OutputEntry]) -> int:
    """Return the number of elements of the row of one image."""
    return sum(output.size for output in outputs)


def split_rows(
    rows: NDArray[np.float32], outputs: Sequence[OutputEntry]
) -> dict[str, NDArray[np.generic]]:
    """Return the outputs [B, ...] in rows [B, N] by their names, in their own types.

    Raises `InternalError` for an integer that a row does not hold exactly.
    """
    found: dict[str, NDArray[np.generic]] = {}
    first = 0
    for output in outputs:
        values = rows[:, first : first + output.size].reshape(len(rows), *output.shape)
        first += output.size
        if output.data_type != "FP32" and values.size and np.abs(values).max() >= MAX_INTEGER:
            raise InternalError(
                f"{output.name}: expected integers below {MAX_INTEGER}, got larger ones, which "
                "answers cannot hold exactly"
            )
        found[output.name] = values.astype(NUMPY_TYPES[output.data_type], copy=False)
    return found


def join_outputs(graph: onnx.GraphProto, outputs: Sequence[str], result: str) -> None:
    """Let a graph write `result`, the rows [B, N] of its outputs, instead of the outputs."""
    rows = []
    for number, name in enumerate(outputs):
        flat, row = f"output-{number}/flat", f"output-{number}/row"
        graph.node.append(onnx.helper.make_node("Flatten", [name], [flat], axis=1))
        graph.node.append(onnx.helper.make_node("Cast", [flat], [row], to=onnx.TensorProto.FLOAT))
        rows.append(row)
    if len(rows) > 1:
        graph.node.append(onnx.helper.make_node("Concat", rows, [result], axis=1))
    else:
        graph.node.append(onnx.helper.make_node("Identity", rows, [result]))
