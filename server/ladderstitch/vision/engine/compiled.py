"""The engine of CPUs: ONNX Runtime in the process of the replica."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ladderstitch.errors import InternalError
from ladderstitch.scheduling.requests import Logits, Pixels
from ladderstitch.vision.engine.base import CascadeResult, EngineResult, SelectRows, finite_rows
from ladderstitch.vision.engine.compiled_executor import CompiledExecutor
from ladderstitch.vision.engine.compute_thread import ComputeThread

log = logging.getLogger(__name__)

MIN_CHECKED = 1 << 16
"""Values of a batch above which the thread of the batch looks for those that are not finite."""


IDLE_BEFORE_INLINE_S = 0.0003
"""Engine idle time above which the next batch comes from a single caller, not from a queue."""


class CompiledEngine:
    """The engine that runs batches in a thread of this process; `forward` calls must not overlap.

    A change of threads takes 0.1 ms, half of the time of a small stitch. A batch of one request
    therefore runs on the event loop itself if the engine was idle before it, the previous batch had
    one request, too, and this stitch and batch size took less than `inline_limit_s` the last time.
    While the event loop computes, no request can join the next batch, so all other batches run in
    the thread. `inline_batches` counts the batches that ran on the event loop.
    """

    def __init__(self, executor: CompiledExecutor, inline_limit_s: float) -> None:
        self.executor, self.inline_limit_s = executor, inline_limit_s
        self.inline_batches = 0
        self._loop = asyncio.get_running_loop()
        self._compute = ComputeThread(self._loop)
        self._last_compute_s: dict[tuple[int, int], float] = {}
        self._last_cascade_s: dict[tuple[int, int, int], float] = {}
        self._idle_since = 0.0
        self._previous_single = True

    @property
    def ready(self) -> bool:
        """Whether batches can run: always, because the sessions are open."""
        return True

    async def forward(self, images: Sequence[Pixels], stitch: int) -> EngineResult:
        """Return the logits [B, K] of one batch, where B counts the images of all requests.

        Raises `InternalError` if the batch failed.
        """
        batch = images[0] if len(images) == 1 else np.concatenate(images)
        if self._is_inline(images, self._last_compute_s.get((stitch, len(batch)))):
            self.inline_batches += 1
            result = self._run(batch, stitch)
        else:
            result = await self._compute.run(partial(self._run, batch, stitch))
        self._last_compute_s[stitch, len(batch)] = result.compute_s
        self._idle_since = self._loop.time()
        return result

    async def forward_cascade(
        self, images: Sequence[Pixels], first: int, last: int, select: SelectRows
    ) -> CascadeResult:
        """Run `first` on a batch, and `last` from the stitch on for the rows that `select` returns.

        Both and `select` run in one turn of the thread. Raises `InternalError` if the batch failed.
        """
        batch = images[0] if len(images) == 1 else np.concatenate(images)
        route = (first, last, len(batch))
        if self._is_inline(images, self._last_cascade_s.get(route)):
            self.inline_batches += 1
            result = self._run_cascade(batch, first, last, select)
        else:
            job = partial(self._run_cascade, batch, first, last, select)
            result = await self._compute.run(job)
        if result.last is not None:  # the limit holds for both variants
            seconds = result.first.compute_s + result.last.compute_s
            self._last_cascade_s[route] = seconds
        self._idle_since = self._loop.time()
        return result

    async def join(self, stitches: Sequence[int]) -> None:
        """Turn these stitches into one session each, while the memory for copies lasts."""
        await self._compute.run(partial(self.executor.join, stitches))

    async def join_cascades(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Turn the parts of these cascades into sessions, while the memory for copies lasts."""
        await self._compute.run(partial(self.executor.join_cascades, pairs))

    def close(self) -> None:
        """End the thread and free the sessions, unless a batch hangs in them."""
        if self._compute.close():
            self.executor.close()
        else:
            log.error("a batch does not return; its sessions stay in memory")

    async def stop(self) -> None:
        """Do what `close` does, without holding the event loop until a batch has ended."""
        await asyncio.to_thread(self.close)

    def _is_inline(self, images: Sequence[Pixels], last_s: float | None) -> bool:
        """Return whether a batch, which took `last_s` seconds the last time, runs here."""
        single = len(images) == 1
        previous, self._previous_single = self._previous_single, single
        idle = self._loop.time() - self._idle_since > IDLE_BEFORE_INLINE_S
        if not (single and previous and idle):
            return False
        return last_s is not None and last_s < self.inline_limit_s

    def _run(self, batch: Pixels, stitch: int) -> EngineResult:
        return _timed(lambda: self.executor(batch, stitch))

    def _run_cascade(
        self, batch: Pixels, first: int, last: int, select: SelectRows
    ) -> CascadeResult:
        kept = batch

        def run_first() -> Logits:
            nonlocal kept
            logits, kept = self.executor.run_first(batch, first, last)
            return logits

        result = _timed(run_first)
        rows = select(result)
        if not len(rows):
            return CascadeResult(result, rows, None)
        going = kept if len(rows) == len(kept) else np.ascontiguousarray(kept[rows])
        return CascadeResult(
            result, rows, _timed(lambda: self.executor.run_last(going, first, last))
        )


def _timed(run: Callable[[], Logits]) -> EngineResult:
    """Return the logits of `run` and its seconds; raises `InternalError` if it fails."""
    started = time.perf_counter_ns()
    try:
        logits = run()
    except Exception as error:
        raise InternalError(f"the batch failed: {type(error).__name__}: {error}") from error
    compute_s = (time.perf_counter_ns() - started) / 1e9
    # Large outputs are checked here, because the event loop would stand still for it.
    finite = finite_rows(logits) if logits.size > MIN_CHECKED else None
    return EngineResult(logits, compute_s, finite)
