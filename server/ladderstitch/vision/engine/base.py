"""The engine protocol (one batch in, logits out) and the worker's messages and buffers."""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ladderstitch.scheduling.requests import Logits, Mask, Pixels


class EngineDied(Exception):
    """The error of an engine whose worker died during a batch; the batch can be retried."""


@dataclass(frozen=True, slots=True)
class EngineResult:
    """Logits [B, K] in the order of the images, and seconds of compute.

    `finite` [B] says which rows hold finite numbers only, if the engine has checked them.
    """

    logits: Logits
    compute_s: float
    finite: Mask | None = None


def finite_rows(logits: Logits) -> Mask:
    """Return which rows of [B, K] hold finite numbers only."""
    return np.asarray(np.isfinite(logits).all(axis=1))


class Engine(Protocol):
    """The seam to the compute: runs one batch at a time; callers never overlap calls."""

    async def forward(self, images: Sequence[Pixels], stitch: int) -> EngineResult:
        """Return the logits of one batch; `images` holds each request's images [B, C, H, W].

        Raises `EngineDied` if the worker died and `InternalError` if this batch failed in it.
        """
        ...

    async def join(self, stitches: Sequence[int]) -> None:
        """Spend memory on these stitches, the most important first, so that they run faster."""
        ...


Rows = NDArray[np.intp]
"""Numbers of images in a batch, ascending."""

SelectRows = Callable[[EngineResult], Rows]
"""Returns the images that go on after the first variant of a cascade; may run in any thread."""


@dataclass(frozen=True, slots=True)
class CascadeResult:
    """The result of the first variant for all images, and of the last one for `rows` of them."""

    first: EngineResult
    rows: Rows
    last: EngineResult | None


@runtime_checkable
class ContinuingEngine(Protocol):
    """An engine that goes on with the activations of the first variant, not with the images."""

    async def forward_cascade(
        self, images: Sequence[Pixels], first: int, last: int, select: SelectRows
    ) -> CascadeResult:
        """Run `first` on a batch, and `last` on the images that `select` returns.

        Raises like `Engine.forward`.
        """
        ...

    async def join_cascades(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Spend memory on these cascades, so that they run faster."""
        ...


async def run_cascade(
    engine: Engine, images: Sequence[Pixels], first: int, last: int, select: SelectRows
) -> CascadeResult:
    """Run a cascade on any engine: one that keeps no activations starts again from the images."""
    if isinstance(engine, ContinuingEngine):
        return await engine.forward_cascade(images, first, last, select)
    result = await engine.forward(images, first)
    rows = select(result)
    if not len(rows):
        return CascadeResult(result, rows, None)
    chosen = np.ascontiguousarray(np.concatenate(images)[rows])
    return CascadeResult(result, rows, await engine.forward([chosen], last))


COMMAND = struct.Struct("<iii")
"""Message to the worker: number of the batch, images in the input buffer, stitch id."""

REPLY = struct.Struct("<iBq")
"""Message from the worker: number of the batch, status (0 the logits are in the output buffer, 1 an
error text follows), nanoseconds of compute."""

READY = b"ready"
BEAT = b"beat"
"""Message of a worker every `BEAT_S` seconds, also while it computes: it is not stopped."""
BEAT_S = 0.5
MAX_MESSAGE_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The configuration of an engine; a worker process gets it on its command line, as JSON."""

    bundle: str
    runtime: Literal["onnx", "torch"]
    device: str
    dtype: str
    threads: int
    max_batch_size: int
    image_shape: tuple[int, ...]
    row_size: int

    def to_json(self) -> str:
        """Return the fields as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EngineConfig:
        """Return the configuration that `to_json` wrote."""
        fields = json.loads(text)
        fields["image_shape"] = tuple(fields["image_shape"])
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Buffers:
    """Shared memory for one batch of at most N = `max_batch_size` images.

    `images` [N, C, H, W] is the input, `logits` [N, K] of rows of K values the output.
    """

    images: Pixels
    logits: Logits

    @classmethod
    def create(cls, config: EngineConfig) -> tuple[Buffers, int]:
        """Return buffers in new anonymous memory, and the descriptor for the worker to map.

        The caller closes the descriptor.
        """
        descriptor = _anonymous_file()
        os.ftruncate(descriptor, _image_bytes(config) + config.max_batch_size * config.row_size * 4)
        return cls.map(config, descriptor), descriptor

    @classmethod
    def map(cls, config: EngineConfig, descriptor: int) -> Buffers:
        """Return buffers in the memory behind the descriptor."""
        memory = mmap.mmap(descriptor, 0)
        split = _image_bytes(config)
        images = np.frombuffer(memory, np.float32, split // 4)
        logits = np.frombuffer(memory, np.float32, offset=split)
        return cls(
            images.reshape(config.max_batch_size, *config.image_shape),
            logits.reshape(config.max_batch_size, config.row_size),
        )


def _image_bytes(config: EngineConfig) -> int:
    return config.max_batch_size * int(np.prod(config.image_shape)) * 4


def _anonymous_file() -> int:
    """Return the descriptor of an empty file without a name: in memory, where the system has it."""
    if sys.platform == "linux":
        return os.memfd_create("ladderstitch")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
