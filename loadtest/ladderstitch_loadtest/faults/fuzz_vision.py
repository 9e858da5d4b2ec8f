"""Requests to an image model that are wrong in every way we could think of."""

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
    BAD_INPUT,
    INFEASIBLE,
    NO_MODEL,
    NO_QUALITY,
    NO_VARIANT,
    Case,
)


class ImageCases:
    """A `FuzzCases` of requests to one image model, by seed."""

    def __init__(self, model: pb.GetModelResponse, channel: grpc.aio.Channel, seed: int) -> None:
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        inputs = model.preprocessing
        self.shape = (1, inputs.channels, inputs.height, inputs.width)
        self.variants = len(model.variants)
        self.rng = random.Random(seed)
        self.png = _png(self.shape, "PNG")
        self.jpeg = _png(self.shape, "JPEG")
        self.makers: list[Callable[[], Case]] = [
            self.wrong_shape,
            self.wrong_size,
            self.wrong_type,
            self.not_finite,
            self.truncated_file,
            self.garbage_file,
            self.huge_picture,
            self.lying_header,
            self.no_input,
            self.budget,
            self.metadata_budget,
            self.tight_hard_budget,
            self.unknown_name,
            self.unknown_variant,
            self.quality,
            self.priority,
            self.long_id,
            self.empty_batch,
            self.large_batch,
        ]

    async def send(self, case: Case) -> None:
        await self._stub.Infer(case.request, metadata=case.metadata, timeout=30)

    async def send_good(self) -> None:
        await self._stub.Infer(self.good(), timeout=30)

    def good(self) -> pb.InferRequest:
        return self._request(np.zeros(self.shape, np.uint8))

    def case(self, index: int) -> Case:
        return self.makers[index % len(self.makers)]()

    def _request(self, array: np.ndarray, **fields: object) -> pb.InferRequest:
        kind = pb.DATA_TYPE_UINT8 if array.dtype == np.uint8 else pb.DATA_TYPE_FP32
        tensor = pb.Tensor(data_type=kind, shape=array.shape, data=array.tobytes())
        return pb.InferRequest(tensor=tensor, **fields)  # type: ignore[arg-type] # passed through

    def wrong_shape(self) -> Case:
        _, c, h, w = self.shape
        shape = self.rng.choice(
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
        request = self.good()
        request.tensor.shape[:] = shape
        return Case("wrong shape", request, BAD_INPUT)

    def wrong_size(self) -> Case:
        request = self.good()
        data = request.tensor.data
        request.tensor.data = self.rng.choice([b"", data[:-1], data + b"\0", data * 2, b"x"])
        return Case("wrong size", request, BAD_INPUT)

    def wrong_type(self) -> Case:
        request = self.good()
        request.tensor.data_type = self.rng.choice([0, 2, 77, -1])  # type: ignore[assignment] # wrong
        return Case("wrong type", request, BAD_INPUT)

    def not_finite(self) -> Case:
        values = np.zeros(self.shape, np.float32)
        values.flat[self.rng.randrange(values.size)] = self.rng.choice([np.nan, np.inf, -np.inf])
        return Case("NaN or infinity", self._request(values), BAD_INPUT)

    def truncated_file(self) -> Case:
        file = self.rng.choice([self.png, self.jpeg])
        cut = file[: self.rng.randrange(1, len(file) - 20)]
        return Case("truncated file", pb.InferRequest(encoded_image=cut), BAD_INPUT)

    def garbage_file(self) -> Case:
        junk = self.rng.choice([b"", self.rng.randbytes(200), b"GIF89a" + bytes(64), b"<svg/>"])
        return Case("not a picture", pb.InferRequest(encoded_image=junk), BAD_INPUT)

    def huge_picture(self) -> Case:
        width, height = self.rng.choice([(60_000, 60_000), (2**31 - 1, 2**31 - 1), (10**8, 1)])
        file = _png_header(width, height) + self.png[33:]
        return Case("huge picture", pb.InferRequest(encoded_image=file), BAD_INPUT)

    def lying_header(self) -> Case:
        """Large but allowed dimensions without the data for them."""
        file = _png_header(3000, 3000) + self.png[33:]
        return Case("lying header", pb.InferRequest(encoded_image=file), BAD_INPUT)

    def no_input(self) -> Case:
        return Case("no input", pb.InferRequest(), BAD_INPUT)

    def budget(self) -> Case:
        value = self.rng.choice([0, -1, -(2**63), 2**63 - 1, 3_600_000_001])
        request = self.good()
        request.latency_budget_us = value
        request.hard_deadline = self.rng.random() < 0.5
        return Case("absurd budget", request, BAD_INPUT)

    def metadata_budget(self) -> Case:
        text = self.rng.choice(["nan", "inf", "-5", "0", "1e300", "soon", ""])
        return Case("absurd metadata", self.good(), BAD_INPUT, (("x-latency-budget-ms", text),))

    def tight_hard_budget(self) -> Case:
        request = self.good()
        request.latency_budget_us, request.hard_deadline = self.rng.randint(1, 20), True
        return Case("hard budget of microseconds", request, INFEASIBLE)

    def unknown_name(self) -> Case:
        request = self.good()
        if self.rng.random() < 0.5:
            request.model_name = self.rng.choice(["nobody", "x" * 5000, "../../etc", "\0"])
        else:
            request.model_version = self.rng.choice(["0", "2", "latest", "-1"])
        return Case("unknown model", request, NO_MODEL)

    def unknown_variant(self) -> Case:
        variant = self.rng.choice([-1, self.variants, 2**31 - 1, -(2**31)])
        request = self.good()
        request.variant_id = variant
        return Case("unknown variant", request, NO_VARIANT)

    def quality(self) -> Case:
        value = self.rng.choice([-0.1, 1.1, float("nan"), float("inf"), 1.0])
        request = self.good()
        request.min_quality = value
        return Case("absurd quality", request, NO_QUALITY if value == 1.0 else BAD_INPUT)

    def priority(self) -> Case:
        request = self.good()
        request.priority = self.rng.choice([256, 2**32 - 1])
        return Case("absurd priority", request, BAD_INPUT)

    def long_id(self) -> Case:
        request = self.good()
        request.request_id = "i" * self.rng.choice([129, 100_000])
        return Case("long id", request, BAD_INPUT)

    def empty_batch(self) -> Case:
        return Case(
            "empty batch", self._request(np.zeros((0, *self.shape[1:]), np.uint8)), BAD_INPUT
        )

    def large_batch(self) -> Case:
        rows = self.rng.choice([33, 1000])
        return Case(
            "large batch", self._request(np.zeros((rows, *self.shape[1:]), np.uint8)), BAD_INPUT
        )


def _png(shape: tuple[int, ...], kind: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (shape[2], shape[3])).astype(np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def _png_header(width: int, height: int) -> bytes:
    """Signature and header chunk of an 8-bit grey picture of this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    check = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + check
