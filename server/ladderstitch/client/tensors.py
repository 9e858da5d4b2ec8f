"""Scores and outputs of an answer as arrays of numpy, which is imported when it is needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ladderstitch.v1 import inference_pb2

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

OUTPUT_TYPES: dict[int, str] = {
    inference_pb2.DATA_TYPE_UINT8: "u1",
    inference_pb2.DATA_TYPE_FP32: "<f4",
    inference_pb2.DATA_TYPE_INT64: "<i8",
    inference_pb2.DATA_TYPE_INT32: "<i4",
    inference_pb2.DATA_TYPE_BOOL: "?",
}
"""The types of output tensors, by the names of numpy."""


def _import_numpy() -> Any:
    """Return numpy; the error without it says what needs it."""
    try:
        import numpy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "logits and outputs of an answer are arrays, which need numpy: pip install numpy",
            name="numpy",
        ) from error
    return numpy


def read_output(output: inference_pb2.OutputTensor) -> NDArray[numpy.generic]:
    """Return an output [B, ...] of an answer."""
    np = _import_numpy()
    values = np.frombuffer(output.data, np.dtype(OUTPUT_TYPES[output.data_type]))
    shaped: NDArray[numpy.generic] = values.reshape(output.shape)
    return shaped


def read_logits(predictions: Iterable[inference_pb2.Prediction]) -> NDArray[numpy.float32]:
    """Return the scores [B, classes] of an answer, [0, 0] without any."""
    np = _import_numpy()
    rows = [prediction.logits for prediction in predictions]
    logits: NDArray[numpy.float32] = (
        np.array(rows, np.float32) if rows else np.zeros((0, 0), np.float32)
    )
    return logits
