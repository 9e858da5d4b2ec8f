"""The engine of CPUs: ONNX Runtime in the process of the replica."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar, cast

import numpy as np
import onnxruntime

from ladderstitch.errors import InternalError
from ladderstitch.runtime.sessions import open_session
from ladderstitch.scheduling.requests import Logits, Pixels
from ladderstitch.vision.engine.base import EngineResult, finite_rows
from ladderstitch.vision.models.graphs import INPUT, OUTPUT, join_runs

log = logging.getLogger(__name__)

Result = TypeVar("Result")
CLOSE_LIMIT_S = 5.0
"""Seconds that `close` waits for a function that runs."""
MIN_CHECKED = 1 << 16
"""Values of a batch above which the thread of the batch looks for those that are not finite."""
MIN_JOINED_BYTES = 96 << 20
MAX_JOINED_SHARE = 0.2
"""Memory of joined networks: this share of the family's weights, and at least 96 MiB."""


class CompiledExecutor:
    """The networks of a family as sessions of ONNX Runtime.

    Every unit of the family has one session, so a network needs no memory of its own. `join` turns
    networks into one session each, which takes a tenth less time for small networks but has a copy
    of its weights. Calls may run concurrently in any threads; they hold no lock of the interpreter
    while they compute.
    """

    def __init__(self, routes: Mapping[int, Sequence[Path]], threads: int) -> None:
        """Open the sessions of all units, each computing on `threads` threads.

        `routes` has the files of each stitch's units in order, by the stitch's id.
        """
        self._routes, self._threads = routes, threads
        paths = {path for route in routes.values() for path in route}
        units = {path: open_session(str(path), threads) for path in paths}
        self._sessions: dict[int, tuple[onnxruntime.InferenceSession, ...]] = {
            stitch: tuple(units[path] for path in route) for stitch, route in routes.items()
        }
        self.weight_bytes = sum(path.stat().st_size for path in paths)

    def __call__(self, images: Pixels, stitch: int) -> Logits:
        """Return float32 logits [B, K] of images [B, C, H, W] on a stitch.

        Raises `KeyError` for an id that the family does not have.
        """
        return _run(self._sessions[stitch], images)

    def open_whole(self, stitch: int) -> Callable[[Pixels], Logits]:
        """Return a function that runs a stitch as one graph with its own copy of the weights."""
        sessions = self._open_whole(stitch)
        return lambda images: _run(sessions, images)

    def join(self, stitches: Iterable[int]) -> list[int]:
        """Join the networks, in this order, while the memory for copies lasts; return which."""
        left = max(MIN_JOINED_BYTES, MAX_JOINED_SHARE * self.weight_bytes)
        joined = []
        for stitch in stitches:
            left -= self.copied_bytes(stitch)
            if left < 0:
                break
            self._sessions[stitch] = self._open_whole(stitch)
            joined.append(stitch)
        return joined

    def copied_bytes(self, stitch: int) -> int:
        """Return the bytes of a stitch's weights, which its own session would copy."""
        return sum(path.stat().st_size for path in self._routes[stitch])

    def close(self) -> None:
        """Free the sessions now, although the garbage collector may not find this object soon."""
        self._sessions.clear()

    def _open_whole(self, stitch: int) -> tuple[onnxruntime.InferenceSession, ...]:
        """Return one session, or a few if the units use different versions of operators."""
        graphs = join_runs(self._routes[stitch])
        return tuple(open_session(graph.SerializeToString(), self._threads) for graph in graphs)


def _run(sessions: Iterable[onnxruntime.InferenceSession], images: Pixels) -> Logits:
    """Return the logits of images that pass the sessions in order."""
    x = images
    for session in sessions:
        (x,) = session.run((OUTPUT,), {INPUT: x})
    return x


class ComputeThread:
    """A thread that runs functions one after another for coroutines of one event loop.

    `loop.run_in_executor` does the same with two futures that are chained, and takes 18 us more of
    the event loop and 50 us longer for each call.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    async def run(self, function: Callable[[], Result]) -> Result:
        """Return what `function` returns in the thread; raises what it raises."""
        future: asyncio.Future[Result] = self._loop.create_future()

        def settle(result: Result | None, error: BaseException | None) -> None:
            if future.done():  # the coroutine was cancelled
                return
            if error is None:
                future.set_result(cast(Result, result))
            else:
                future.set_exception(error)

        def job() -> None:
            result, error = None, None
            try:
                result = function()
            except BaseException as raised:  # whatever it is, the thread goes on
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                self._loop.call_soon_threadsafe(settle, result, error)

        self._jobs.put(job)
        return await future

    def close(self) -> bool:
        """End the thread after the functions that it already has.

        Return whether it has ended; one of them may hang.
        """
        self._jobs.put(None)
        self._thread.join(CLOSE_LIMIT_S)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


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
        if self._is_inline(images, stitch):
            self.inline_batches += 1
            result = self._run(batch, stitch)
        else:
            result = await self._compute.run(partial(self._run, batch, stitch))
        self._last_compute_s[stitch, len(batch)] = result.compute_s
        self._idle_since = self._loop.time()
        return result

    async def join(self, stitches: Sequence[int]) -> None:
        """Turn these stitches into one session each, while the memory for copies lasts."""
        await self._compute.run(partial(self.executor.join, stitches))

    def close(self) -> None:
        """End the thread and free the sessions, unless a batch hangs in them."""
        if self._compute.close():
            self.executor.close()
        else:
            log.error("a batch does not return; its sessions stay in memory")

    async def stop(self) -> None:
        """Do what `close` does, without holding the event loop until a batch has ended."""
        await asyncio.to_thread(self.close)

    def _is_inline(self, images: Sequence[Pixels], stitch: int) -> bool:
        single = len(images) == 1
        previous, self._previous_single = self._previous_single, single
        idle = self._loop.time() - self._idle_since > IDLE_BEFORE_INLINE_S
        if not (single and previous and idle):
            return False
        last_s = self._last_compute_s.get((stitch, len(images[0])), self.inline_limit_s)
        return last_s < self.inline_limit_s

    def _run(self, batch: Pixels, stitch: int) -> EngineResult:
        started = time.perf_counter_ns()
        try:
            logits = self.executor(batch, stitch)
        except Exception as error:
            raise InternalError(f"the batch failed: {type(error).__name__}: {error}") from error
        compute_s = (time.perf_counter_ns() - started) / 1e9
        # Large outputs are checked here, because the event loop would stand still for it.
        finite = finite_rows(logits) if logits.size > MIN_CHECKED else None
        return EngineResult(logits, compute_s, finite)
