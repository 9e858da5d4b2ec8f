"""The seam to whatever computes: one batch in, logits out."""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

from ladderstitch.scheduling.requests import Logits, Pixels


class EngineDied(Exception):
    """The engine lost its worker in the middle of a batch; the batch may be run again."""


@dataclass(frozen=True, slots=True)
class EngineResult:
    """Logits of all batch_size in order, and seconds of compute."""

    logits: Logits
    compute_s: float


class Engine(Protocol):
    """Runs one batch at a time; the scheduler never overlaps calls."""

    async def forward(self, images: Sequence[Pixels], stitch: int) -> EngineResult:
        """`images` holds each request's [n, C, H, W].

        Raises `EngineDied` if the worker is lost and `InternalError` if this batch failed in it.
        """
        ...


COMMAND = struct.Struct("<ii")
"""batch_size in the input buffer, stitch id."""

REPLY = struct.Struct("<Bq")
"""0 = logits are in the output buffer, 1 = an error's text follows; compute ns."""

READY = b"ready"
MAX_MESSAGE_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What a worker process is told on its command line, as JSON."""

    bundle: str
    device: str
    dtype: str
    threads: int
    max_batch_size: int
    image_shape: tuple[int, int, int]
    classes: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerConfig:
        fields = json.loads(text)
        fields["image_shape"] = tuple(fields["image_shape"])
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Buffers:
    """Shared memory for one batch: `images` [max_batch_size, C, H, W] in, `logits` [max_batch_size, K] out."""

    images: Pixels
    logits: Logits

    @classmethod
    def create(cls, config: WorkerConfig) -> tuple[Buffers, int]:
        """New anonymous memory and the descriptor that the worker maps; the caller closes it."""
        descriptor = os.memfd_create("ladderstitch")
        os.ftruncate(descriptor, _image_bytes(config) + config.max_batch_size * config.classes * 4)
        return cls.map(config, descriptor), descriptor

    @classmethod
    def map(cls, config: WorkerConfig, descriptor: int) -> Buffers:
        memory = mmap.mmap(descriptor, 0)
        split = _image_bytes(config)
        images = np.frombuffer(memory, np.float32, split // 4)
        logits = np.frombuffer(memory, np.float32, offset=split)
        return cls(
            images.reshape(config.max_batch_size, *config.image_shape),
            logits.reshape(config.max_batch_size, config.classes),
        )


def _image_bytes(config: WorkerConfig) -> int:
    return config.max_batch_size * int(np.prod(config.image_shape)) * 4
