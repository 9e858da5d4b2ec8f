"""Outputs of models that return tensors, as arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ladderstitch.v1 import inference_pb2

OUTPUT_TYPES: dict[int, np.dtype[np.generic]] = {
    inference_pb2.DATA_TYPE_UINT8: np.dtype("u1"),
    inference_pb2.DATA_TYPE_FP32: np.dtype("<f4"),
    inference_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
    inference_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
    inference_pb2.DATA_TYPE_BOOL: np.dtype("?"),
}


def read_output(output: inference_pb2.OutputTensor) -> NDArray[np.generic]:
    """Return an output [B, ...] of an answer."""
    values = np.frombuffer(output.data, OUTPUT_TYPES[output.data_type])
    return values.reshape(output.shape)
