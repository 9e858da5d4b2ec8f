"""Fuzz cases for an image model: malformed tensors, files, budgets, names and options."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
from PIL import Image

from ladderstitch.v1 import inference_pb2 as pb
from ladderstitch.v1 import inference_pb2_grpc
from ladderstitch_loadtest.faults.fuzz_runner import (
    INFEASIBLE,
    INVALID_ARGUMENT,
    NO_MODEL,
    NO_QUALITY,
    NO_VARIANT,
    FuzzCase,
)


class ImageCases:
    """The `FuzzCases` of one image model, drawn with a seed."""

    def __init__(self, model: pb.GetModelResponse, channel: grpc.aio.Channel, seed: int) -> None:
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        inputs = model.preprocessing
        self._shape = (1, inputs.channels, inputs.height, inputs.width)
        self._variants = len(model.variants)
        self._rng = random.Random(seed)
        self._png = _encode(self._shape, "PNG")
        self._jpeg = _encode(self._shape, "JPEG")
        self._makers: list[Callable[[], FuzzCase]] = [
            self._wrong_shape,
            self._wrong_size,
            self._wrong_type,
            self._not_finite,
            self._truncated_file,
            self._garbage_file,
            self._huge_image,
            self._header_without_data,
            self._no_input,
            self._budget,
            self._metadata_budget,
            self._tight_hard_budget,
            self._unknown_name,
            self._unknown_variant,
            self._quality,
            self._priority,
            self._long_id,
            self._empty_batch,
            self._large_batch,
        ]

    async def send(self, case: FuzzCase) -> None:
        """Send a case; raise `grpc.aio.AioRpcError` if the server answers with an error."""
        await self._stub.Infer(case.request, metadata=case.metadata, timeout=30)

    async def send_good(self) -> None:
        """Send a well-formed request; raise `grpc.aio.AioRpcError` if it is not answered."""
        await self._stub.Infer(self._good(), timeout=30)

    def _good(self) -> pb.InferRequest:
        return self._request(np.zeros(self._shape, np.uint8))

    def case(self, index: int) -> FuzzCase:
        """Return case number `index`; the 19 kinds take turns."""
        return self._makers[index % len(self._makers)]()

    def _request(self, array: np.ndarray, **fields: object) -> pb.InferRequest:
        kind = pb.DATA_TYPE_UINT8 if array.dtype == np.uint8 else pb.DATA_TYPE_FP32
        tensor = pb.Tensor(data_type=kind, shape=array.shape, data=array.tobytes())
        return pb.InferRequest(tensor=tensor, **fields)  # type: ignore[arg-type] # passed through

    def _wrong_shape(self) -> FuzzCase:
        _, c, h, w = self._shape
        shape = self._rng.choice(
            [
                (),
                (h, w),
                (c, h, w),
                (1, c, h, w, 1),
                (1, c + 1, h, w),
                (1, c, h + 1, w),
                (-1, c, h, w),
                (1, c, h, -w),
                (1 << 62, c, h, w),
                (1, c, 1 << 40, 1 << 40),
            ]
        )
        request = self._good()
        request.tensor.shape[:] = shape
        return FuzzCase("wrong shape", request, INVALID_ARGUMENT)

    def _wrong_size(self) -> FuzzCase:
        request = self._good()
        data = request.tensor.data
        request.tensor.data = self._rng.choice([b"", data[:-1], data + b"\0", data * 2, b"x"])
        return FuzzCase("wrong size", request, INVALID_ARGUMENT)

    def _wrong_type(self) -> FuzzCase:
        request = self._good()
        request.tensor.data_type = self._rng.choice([0, 2, 77, -1])  # type: ignore[assignment] # wrong
        return FuzzCase("wrong type", request, INVALID_ARGUMENT)

    def _not_finite(self) -> FuzzCase:
        values = np.zeros(self._shape, np.float32)
        values.flat[self._rng.randrange(values.size)] = self._rng.choice([np.nan, np.inf, -np.inf])
        return FuzzCase("NaN or infinity", self._request(values), INVALID_ARGUMENT)

    def _truncated_file(self) -> FuzzCase:
        file = self._rng.choice([self._png, self._jpeg])
        cut = file[: self._rng.randrange(1, len(file) - 20)]
        return FuzzCase("truncated file", pb.InferRequest(encoded_image=cut), INVALID_ARGUMENT)

    def _garbage_file(self) -> FuzzCase:
        junk = self._rng.choice([b"", self._rng.randbytes(200), b"GIF89a" + bytes(64), b"<svg/>"])
        return FuzzCase("not an image", pb.InferRequest(encoded_image=junk), INVALID_ARGUMENT)

    def _huge_image(self) -> FuzzCase:
        width, height = self._rng.choice([(60_000, 60_000), (2**31 - 1, 2**31 - 1), (10**8, 1)])
        file = _png_header(width, height) + self._png[33:]
        return FuzzCase("huge image", pb.InferRequest(encoded_image=file), INVALID_ARGUMENT)

    def _header_without_data(self) -> FuzzCase:
        """Return an image whose header gives large but allowed dimensions without their data."""
        file = _png_header(3000, 3000) + self._png[33:]
        return FuzzCase(
            "header without data", pb.InferRequest(encoded_image=file), INVALID_ARGUMENT
        )

    def _no_input(self) -> FuzzCase:
        return FuzzCase("no input", pb.InferRequest(), INVALID_ARGUMENT)

    def _budget(self) -> FuzzCase:
        value = self._rng.choice([0, -1, -(2**63), 2**63 - 1, 3_600_000_001])
        request = self._good()
        request.latency_budget_us = value
        request.hard_deadline = self._rng.random() < 0.5
        return FuzzCase("budget out of range", request, INVALID_ARGUMENT)

    def _metadata_budget(self) -> FuzzCase:
        text = self._rng.choice(["nan", "inf", "-5", "0", "1e300", "soon", ""])
        return FuzzCase(
            "metadata out of range",
            self._good(),
            INVALID_ARGUMENT,
            (("x-latency-budget-ms", text),),
        )

    def _tight_hard_budget(self) -> FuzzCase:
        request = self._good()
        request.latency_budget_us, request.hard_deadline = self._rng.randint(1, 20), True
        return FuzzCase("hard budget of microseconds", request, INFEASIBLE)

    def _unknown_name(self) -> FuzzCase:
        request = self._good()
        if self._rng.random() < 0.5:
            request.model_name = self._rng.choice(["unknown", "x" * 5000, "../../etc", "\0"])
        else:
            request.model_version = self._rng.choice(["0", "2", "latest", "-1"])
        return FuzzCase("unknown model", request, NO_MODEL)

    def _unknown_variant(self) -> FuzzCase:
        variant = self._rng.choice([-1, self._variants, 2**31 - 1, -(2**31)])
        request = self._good()
        request.variant_id = variant
        return FuzzCase("unknown variant", request, NO_VARIANT)

    def _quality(self) -> FuzzCase:
        value = self._rng.choice([-0.1, 1.1, float("nan"), float("inf"), 1.0])
        request = self._good()
        request.min_quality = value
        return FuzzCase(
            "quality out of range", request, NO_QUALITY if value == 1.0 else INVALID_ARGUMENT
        )

    def _priority(self) -> FuzzCase:
        request = self._good()
        request.priority = self._rng.choice([256, 2**32 - 1])
        return FuzzCase("priority out of range", request, INVALID_ARGUMENT)

    def _long_id(self) -> FuzzCase:
        request = self._good()
        request.request_id = "i" * self._rng.choice([129, 100_000])
        return FuzzCase("long id", request, INVALID_ARGUMENT)

    def _empty_batch(self) -> FuzzCase:
        return FuzzCase(
            "empty batch",
            self._request(np.zeros((0, *self._shape[1:]), np.uint8)),
            INVALID_ARGUMENT,
        )

    def _large_batch(self) -> FuzzCase:
        images = self._rng.choice([33, 1000])
        return FuzzCase(
            "large batch",
            self._request(np.zeros((images, *self._shape[1:]), np.uint8)),
            INVALID_ARGUMENT,
        )


def _encode(shape: tuple[int, ...], kind: str) -> bytes:
    """Return a grey image of random pixels as a file of this Pillow format."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (shape[2], shape[3])).astype(np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def _png_header(width: int, height: int) -> bytes:
    """Return the signature and header chunk of an 8-bit grey PNG of this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    check = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + check
