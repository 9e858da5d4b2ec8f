"""The choice between ONNX Runtime and torch for float32 products, measured on this processor."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from ladderstitch.runtime.graph_builder import GraphBuilder
from ladderstitch.runtime.linear import open_product
from ladderstitch.runtime.sessions import open_rank_session

Library = Literal["onnxruntime", "torch"]
ROWS = 1
"""Rows of the products that decide: those of one sequence that decodes."""
NUM_MATRICES = 8
"""Matrices that are multiplied in turn, so that few of them stay in a cache."""
NUM_REPEATS = 5
MIN_GAIN = 1.2
"""Seconds of ONNX Runtime over those of torch from which torch is chosen.

ONNX Runtime computes a row alike in every batch, so that it has to be clearly slower.
"""


@dataclass(frozen=True, slots=True)
class ProductTimes:
    """Seconds of one product with a row and a matrix that no cache holds."""

    onnxruntime_s: float
    torch_s: float

    @property
    def chosen(self) -> Library:
        """The library to compute with."""
        return "torch" if self.onnxruntime_s > MIN_GAIN * self.torch_s else "onnxruntime"

    def describe(self) -> str:
        """Return the choice and the times, for the log."""
        times = f"onnxruntime {1e3 * self.onnxruntime_s:.3f} ms, torch {1e3 * self.torch_s:.3f} ms"
        return f"float32 products in {self.chosen} (a row: {times})"


def measure_products(matrices: Sequence[Tensor], threads: int) -> ProductTimes:
    """Measure products with the first of the float32 matrices [N, K], which have one shape.

    Return the shortest of `NUM_REPEATS` measurements of each library, per product.
    """
    matrices = matrices[:NUM_MATRICES]
    columns = matrices[0].shape[1]
    row = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(0))
    graph = GraphBuilder()
    outputs = {
        f"y{number}": graph.operator("MatMul", ["x", graph.constant(_transposed(matrix))])[0]
        for number, matrix in enumerate(matrices)
    }
    model = graph.build({"x": (TensorProto.FLOAT, (1, None, columns))}, outputs)
    session, names = open_rank_session(model, threads), tuple(outputs)
    products = [open_product(matrix, threads) for matrix in matrices]
    feeds = {"x": row.numpy()[None]}
    onnxruntime_s = _shortest(lambda: session.run(names, feeds))
    with torch.inference_mode():
        torch_s = _shortest(lambda: [product(row) for product in products])
    return ProductTimes(onnxruntime_s / len(matrices), torch_s / len(matrices))


def _transposed(matrix: Tensor) -> np.ndarray:
    values: np.ndarray = matrix.T.contiguous().numpy()
    return values


def _shortest(run: Callable[[], object]) -> float:
    run()  # the first run is slower
    seconds = []
    for _ in range(NUM_REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
