"""Convert the raw tensors of requests to model inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from ladderstitch.errors import InvalidArgument
from ladderstitch.scheduling.requests import Pixels

NUMPY_TYPES: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4")}
"""Little-endian types of raw tensors."""
Normalise = Callable[[NDArray[np.uint8]], Pixels]
"""Function from uint8 pixels [B, ...] to model inputs."""
NonFiniteInputs = Literal["compute", "refuse"]
"""What is done with inputs of the Open Inference Protocol that hold NaN or infinity."""


class TensorReader:
    """The reader of tensors of one shape, the batch excluded.

    Tensors are float32 model inputs and, if the model has a function that normalises pixels, UINT8
    pixels. `datatypes` names the accepted types.
    """

    def __init__(
        self,
        shape: Sequence[int],
        non_finite: NonFiniteInputs = "compute",
        normalise: Normalise | None = None,
    ) -> None:
        self.shape, self.non_finite, self._normalise = tuple(shape), non_finite, normalise
        self.datatypes = ("FP32",) if normalise is None else ("UINT8", "FP32")

    def read_tensor(
        self,
        field: str,
        datatype: str,
        shape: Sequence[int],
        data: bytes,
        *,
        finite: bool = True,
    ) -> Pixels:
        """Return model inputs [B, ...] from raw little-endian bytes.

        UINT8 data are pixels in 0 .. 255; FP32 data are already preprocessed. Raises
        `InvalidArgument` that names the wrong part of `field`; NaN and infinity are wrong unless
        `finite` is unset.
        """
        self.check_tensor(field, datatype, shape, data)
        values = np.frombuffer(data, NUMPY_TYPES[datatype]).reshape(shape)
        if datatype == "UINT8" and self._normalise is not None:
            return self._normalise(values)
        return self.check_finite(field, values) if finite else values

    def check_tensor(self, field: str, datatype: str, shape: Sequence[int], data: bytes) -> None:
        """Raise `InvalidArgument` unless type, shape and number of bytes of a tensor are right."""
        if datatype not in self.datatypes:
            expected = " or ".join(self.datatypes)
            raise InvalidArgument(f"{field}.datatype", f"expected {expected}, got {datatype!r}")
        if len(shape) != len(self.shape) + 1 or tuple(shape[1:]) != self.shape or shape[0] < 1:
            wanted = ["N >= 1", *self.shape]
            raise InvalidArgument(f"{field}.shape", f"expected {wanted}, got {list(shape)}")
        expected_bytes = math.prod(shape) * NUMPY_TYPES[datatype].itemsize
        if len(data) != expected_bytes:
            raise InvalidArgument(
                f"{field}.data",
                f"expected {expected_bytes} bytes for {datatype} {list(shape)}, got {len(data)}",
            )

    def check_finite(self, field: str, values: Pixels) -> Pixels:
        """Return `values`; raises `InvalidArgument` if one is NaN or infinite."""
        if not np.isfinite(values).all():
            raise InvalidArgument(f"{field}.data", "expected finite numbers, got NaN or infinity")
        return values

    def check_bytes(self, field: str, num_bytes: int) -> None:
        """Raise `InvalidArgument` for an encoded image of any size, which is no tensor."""
        self._refuse_image(field)

    async def read_encoded(self, field: str, data: bytes) -> Pixels:
        """Raise `InvalidArgument`: the model does not take images."""
        self._refuse_image(field)

    def _refuse_image(self, field: str) -> NoReturn:
        shape = ["N >= 1", *self.shape]
        raise InvalidArgument(field, f"expected a tensor FP32 {shape}, got an encoded image")

    def close(self) -> None:
        """Do nothing: tensors are read without other processes."""
