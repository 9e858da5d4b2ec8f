"""An engine for light models: short batches run where the request is, long ones in the worker."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ladderstitch.core import Pixels
from ladderstitch.engine.channel import Buffers, WorkerConfig
from ladderstitch.engine.process import ProcessEngine
from ladderstitch.engine.worker import Worker
from ladderstitch.scheduling.engine import EngineResult

QUIET_S = 0.0003
"""Idle time that tells a lone caller's round trip from a queue's next batch."""


class HybridEngine(ProcessEngine):
    """Keeps a second copy of the weights in the replica's own process.

    Two changes of process cost 0.2 ms at one caller, half of what a small stitch takes. After a
    quiet moment a batch that took less than `inline_limit_s` the last time runs on the event loop
    itself. Any other goes to the worker: while the loop is held up no request can join the next
    batch, and throughput would fall by a third.
    """

    def __init__(self, config: WorkerConfig, inline_limit_s: float) -> None:
        super().__init__(config)
        self.inline_limit_s = inline_limit_s
        shape = (config.max_rows, *config.image_shape)
        self._local_buffers = Buffers(
            np.zeros(shape, np.float32), np.zeros((config.max_rows, config.classes), np.float32)
        )
        self._local = Worker(config, self._local_buffers)
        self._took: dict[tuple[int, int], float] = {}
        self._free_since = 0.0
        self._lone = True

    async def forward(self, images: Sequence[Pixels], stitch: int) -> EngineResult:
        """As `ProcessEngine.forward`; raises what the model raises if the batch ran inline."""
        rows = sum(len(request) for request in images)
        quiet = self._loop.time() - self._free_since > QUIET_S
        lone, self._lone = self._lone and len(images) == 1, len(images) == 1
        if (
            quiet
            and lone
            and self._took.get((stitch, rows), self.inline_limit_s) < self.inline_limit_s
        ):
            result = self._run_here(images, rows, stitch)
        else:
            result = await super().forward(images, stitch)
        self._took[stitch, rows] = result.compute_s
        self._free_since = self._loop.time()
        return result

    def _run_here(self, images: Sequence[Pixels], rows: int, stitch: int) -> EngineResult:
        np.concatenate(images, out=self._local_buffers.images[:rows])
        compute_ns, switch_ns = self._local.run(rows, stitch)
        logits = self._local_buffers.logits[:rows].copy()
        return EngineResult(logits, compute_ns / 1e9, switch_ns / 1e9)
