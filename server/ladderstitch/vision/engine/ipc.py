"""How a replica and its worker process talk: a socket for commands, shared memory for tensors.

The worker has a process of its own because eager torch holds the interpreter lock between its many
small operators, which would stall the event loop that answers callers.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from dataclasses import asdict, dataclass

import numpy as np

from ladderstitch.scheduling.requests import Logits, Pixels

COMMAND = struct.Struct("<ii")
"""rows in the input buffer, stitch id."""

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
    max_rows: int
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
    """Shared memory for one batch: `images` [max_rows, C, H, W] in, `logits` [max_rows, K] out."""

    images: Pixels
    logits: Logits

    @classmethod
    def create(cls, config: WorkerConfig) -> tuple[Buffers, int]:
        """New anonymous memory and the descriptor that the worker maps; the caller closes it."""
        descriptor = os.memfd_create("ladderstitch")
        os.ftruncate(descriptor, _image_bytes(config) + config.max_rows * config.classes * 4)
        return cls.map(config, descriptor), descriptor

    @classmethod
    def map(cls, config: WorkerConfig, descriptor: int) -> Buffers:
        memory = mmap.mmap(descriptor, 0)
        split = _image_bytes(config)
        images = np.frombuffer(memory, np.float32, split // 4)
        logits = np.frombuffer(memory, np.float32, offset=split)
        return cls(
            images.reshape(config.max_rows, *config.image_shape),
            logits.reshape(config.max_rows, config.classes),
        )


def _image_bytes(config: WorkerConfig) -> int:
    return config.max_rows * int(np.prod(config.image_shape)) * 4
