"""An engine for light models: short batches run where the request is, long ones in the worker."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from ladderstitch.scheduling.requests import Pixels
from ladderstitch.vision.engine.base import EngineResult
from ladderstitch.vision.engine.ipc import Buffers
from ladderstitch.vision.engine.process import ProcessEngine
from ladderstitch.vision.engine.worker import Worker

IDLE_BEFORE_INLINE_S = 0.0003
"""Idle time that tells a lone caller's round trip from a queue's next batch."""


class InlineEngine:
    """A `ProcessEngine`, and a second copy of the weights in the replica's own process.

    Two changes of process cost 0.2 ms at one caller, half of what a small stitch takes. After a
    quiet moment a batch that took less than `limit_s` the last time runs on the event loop itself.
    Any other goes to the worker: while the loop is held up no request can join the next batch, and
    throughput would fall by a third. `inline_batches` counts the batches that ran here.
    """

    def __init__(self, process: ProcessEngine, limit_s: float) -> None:
        config = process.config
        shape = (config.max_rows, *config.image_shape)
        self.process, self.limit_s = process, limit_s
        self.inline_batches = 0
        self._buffers = Buffers(
            np.zeros(shape, np.float32), np.zeros((config.max_rows, config.classes), np.float32)
        )
        self._model = Worker(config, self._buffers)
        self._loop = asyncio.get_running_loop()
        self._took: dict[tuple[int, int], float] = {}
        self._free_since = 0.0
        self._lone = True

    @property
    def ready(self) -> bool:
        """Whether the worker is up."""
        return self.process.ready

    async def start(self) -> None:
        """Start the worker; raises `EngineDied` if it cannot load the model."""
        await self.process.start()

    async def forward(self, images: Sequence[Pixels], stitch: int) -> EngineResult:
        """As `ProcessEngine.forward`; raises what the model raises if the batch ran inline."""
        rows = sum(len(request) for request in images)
        quiet = self._loop.time() - self._free_since > IDLE_BEFORE_INLINE_S
        lone, self._lone = self._lone and len(images) == 1, len(images) == 1
        if quiet and lone and self._took.get((stitch, rows), self.limit_s) < self.limit_s:
            result = self._run_here(images, rows, stitch)
        else:
            result = await self.process.forward(images, stitch)
        self._took[stitch, rows] = result.compute_s
        self._free_since = self._loop.time()
        return result

    def close(self) -> None:
        """End the worker; nothing may be in flight."""
        self.process.close()

    def _run_here(self, images: Sequence[Pixels], rows: int, stitch: int) -> EngineResult:
        self.inline_batches += 1
        np.concatenate(images, out=self._buffers.images[:rows])
        compute_ns = self._model.run(rows, stitch)
        return EngineResult(self._buffers.logits[:rows].copy(), compute_ns / 1e9)
