"""The engine of CPUs: ONNX Runtime in the process of the replica."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar, cast

import numpy as np
import onnxruntime

from ladderstitch.errors import InternalError
from ladderstitch.runtime.sessions import open_session
from ladderstitch.scheduling.requests import Logits, Pixels
from ladderstitch.vision.engine.base import CascadeResult, EngineResult, SelectRows, finite_rows
from ladderstitch.vision.models.graphs import INPUT, OUTPUT, join_runs

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Sessions = tuple[onnxruntime.InferenceSession, ...]
CLOSE_LIMIT_S = 5.0
"""Seconds that `close` waits for a function that runs."""
MIN_CHECKED = 1 << 16
"""Values of a batch above which the thread of the batch looks for those that are not finite."""
MIN_JOINED_BYTES = 96 << 20
MAX_JOINED_SHARE = 0.2
"""Memory of joined networks: this share of the family's weights, and at least 96 MiB."""


@dataclass(frozen=True, slots=True)
class CascadeParts:
    """The sessions of two routes: what both begin with, and what each runs after it."""

    shared: Sessions
    first: Sessions
    last: Sessions


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
        self._units: dict[Path, onnxruntime.InferenceSession] = units
        self._sessions: dict[int, Sessions] = {
            stitch: tuple(units[path] for path in route) for stitch, route in routes.items()
        }
        self._parts: dict[tuple[int, int], CascadeParts] = {}
        self.weight_bytes = sum(path.stat().st_size for path in paths)
        self._copies_left = max(MIN_JOINED_BYTES, MAX_JOINED_SHARE * self.weight_bytes)

    def __call__(self, images: Pixels, stitch: int) -> Logits:
        """Return float32 logits [B, K] of images [B, C, H, W] on a stitch.

        Raises `KeyError` for an id that the family does not have.
        """
        return _run(self._sessions[stitch], images)

    def run_first(self, images: Pixels, first: int, last: int) -> tuple[Logits, Pixels]:
        """Return the logits of the first variant of a cascade, and what `run_last` goes on with.

        That are the activations where the routes part, or the images if they share no unit.
        """
        parts = self._parts_of(first, last)
        if not parts.shared:
            return self(images, first), images
        kept = _run(parts.shared, images)
        return _run(parts.first, kept), kept

    def run_last(self, kept: Pixels, first: int, last: int) -> Logits:
        """Return the logits of the last variant; `kept` has rows of what `run_first` returned."""
        parts = self._parts_of(first, last)
        return _run(parts.last, kept) if parts.shared else self(kept, last)

    def num_shared(self, first: int, last: int) -> int:
        """Return the number of units that two routes begin with."""
        routes = zip(self._routes[first], self._routes[last], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], routes))

    def _parts_of(self, first: int, last: int) -> CascadeParts:
        """Return the parts of a cascade, unit by unit unless they have been joined."""
        if (first, last) not in self._parts:
            shared = self.num_shared(first, last)
            one, other = (
                tuple(self._units[path] for path in self._routes[variant])
                for variant in (first, last)
            )
            self._parts[first, last] = CascadeParts(one[:shared], one[shared:], other[shared:])
        return self._parts[first, last]

    def join_cascades(self, pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Join the parts of cascades, in this order, while the memory for copies lasts.

        Return which; a cascade without shared units runs whole networks and needs no parts.
        """
        left, joined = self._copies_left, []
        for first, last in pairs:
            shared = self.num_shared(first, last)
            one, other = self._routes[first], self._routes[last]
            left -= sum(path.stat().st_size for path in (*one, *other[shared:]))
            if not shared:
                continue
            if left < 0:
                break
            parts = (one[:shared], one[shared:], other[shared:])
            self._parts[first, last] = CascadeParts(*(self._open_joined(part) for part in parts))
            joined.append((first, last))
        return joined

    def open_whole(self, stitch: int) -> Callable[[Pixels], Logits]:
        """Return a function that runs a stitch as one graph with its own copy of the weights."""
        sessions = self._open_whole(stitch)
        return lambda images: _run(sessions, images)

    def join(self, stitches: Iterable[int]) -> list[int]:
        """Join the networks, in this order, while the memory for copies lasts; return which."""
        left = max(MIN_JOINED_BYTES, MAX_JOINED_SHARE * self.weight_bytes)
        joined: list[int] = []
        for stitch in stitches:
            left -= self.copied_bytes(stitch)
            if left < 0:
                break
            self._sessions[stitch] = self._open_whole(stitch)
            joined.append(stitch)
            self._copies_left = left
        return joined

    def copied_bytes(self, stitch: int) -> int:
        """Return the bytes of a stitch's weights, which its own session would copy."""
        return sum(path.stat().st_size for path in self._routes[stitch])

    def close(self) -> None:
        """Free the sessions now, although the garbage collector may not find this object soon."""
        self._sessions.clear()
        self._units.clear()
        self._parts.clear()

    def _open_whole(self, stitch: int) -> tuple[onnxruntime.InferenceSession, ...]:
        """Return one session, or a few if the units use different versions of operators."""
        return self._open_joined(self._routes[stitch])

    def _open_joined(self, paths: Sequence[Path]) -> Sessions:
        """Return sessions that run these units with their own copy of the weights."""
        graphs = join_runs(paths)
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
