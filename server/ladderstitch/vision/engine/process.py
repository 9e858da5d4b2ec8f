"""The engine of GPUs and of eager torch: a worker process, replaced when it dies or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

from ladderstitch.errors import InternalError
from ladderstitch.scheduling.requests import Pixels
from ladderstitch.vision.engine.base import (
    BEAT,
    BEAT_S,
    COMMAND,
    MAX_MESSAGE_BYTES,
    READY,
    REPLY,
    Buffers,
    EngineConfig,
    EngineDied,
    EngineResult,
)

log = logging.getLogger(__name__)

RESPAWN_TIMEOUT_S = 30.0
"""Longest wait of a batch for a new worker."""
FIRST_BACKOFF_S, LAST_BACKOFF_S = 1.0, 10.0
"""Delay of a respawn after one that failed; it doubles with each failure in a row."""
SILENT_BEATS = 2
"""Beats of a loaded worker that may be missing before it is not `ready`."""
LOST_BEATS = 20
"""Beats of a loaded worker that may be missing before it is killed."""
LOADING_BEATS = round(600 / BEAT_S)
"""Beats within which a worker must have loaded its model."""
BATCH_BEATS = round(60 / BEAT_S)
"""Beats for which a batch may always run; some compile kernels."""
SLOWEST_RATIO = 20
"""Time of a batch, as a multiple of the slowest one so far, after which its worker is killed."""
STOP_S = 2.0
"""Seconds in which a worker ends by itself after its socket was closed."""


class ProcessEngine:
    """The engine that runs batches in a worker process; `forward` calls must not overlap.

    When the worker dies, the batch in flight fails with `EngineDied` and a new worker is spawned
    immediately, or as soon as the system allows it. Calls in the meantime wait for the new worker,
    at most `RESPAWN_TIMEOUT_S`. A worker that is stopped or hangs, so that it sends no beats, or
    that computes a batch for far too long, is killed. `restarts` counts the respawns.

    Time is counted in beats of the engine's own timer: if this process is stopped, too, the worker
    is not blamed for it.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.buffers, self._memory = Buffers.create(config)
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._reply: asyncio.Future[bytes] | None = None
        self._ready, self._loaded_or_dead = asyncio.Event(), asyncio.Event()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._respawning: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._closed = False
        self._batch = 0
        self._silent = self._batch_beats = self._loading_beats = 0
        self._slowest_s = 0.0
        self.restarts = 0

    @property
    def ready(self) -> bool:
        """Whether a worker is running, has loaded its model and reacts."""
        return self._ready.is_set() and self._silent <= SILENT_BEATS

    @property
    def worker_pid(self) -> int | None:
        """Process id of the current worker; None before `start`."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Spawn the worker and wait until its model is loaded.

        Raises `EngineDied` if the worker ends before that or cannot be spawned.
        """
        self._started = self._loop.create_future()
        try:
            self._spawn()
        except (OSError, MemoryError) as error:
            raise EngineDied(f"no worker can be started: {error}") from error
        self._watching = asyncio.create_task(self._watch(), name="watch-worker")
        await self._started

    async def forward(self, images: Sequence[Pixels], stitch: int) -> EngineResult:
        """Return the logits [B, K] of one batch, where B counts the images of all requests.

        Raises `EngineDied` if the worker dies or hangs during the batch, or if no worker is ready
        within `RESPAWN_TIMEOUT_S`; raises `InternalError` if the batch failed in the worker.
        """
        await self._wait_ready()
        batch_size = 0
        for request in images:
            self.buffers.images[batch_size : batch_size + len(request)] = request
            batch_size += len(request)
        self._batch = (self._batch + 1) % (1 << 31)
        reply = self._reply = self._loop.create_future()
        self._batch_beats = 0
        try:
            assert self._socket is not None
            self._socket.send(COMMAND.pack(self._batch, batch_size, stitch))
            message = await asyncio.shield(reply)  # the next call waits for it in any case
        except OSError as error:
            reply.cancel()
            raise EngineDied(f"the worker died: {error}") from error
        _, failed, compute_ns = REPLY.unpack_from(message)
        if failed:
            raise InternalError(
                f"the batch failed: {message[REPLY.size :].decode(errors='replace')}"
            )
        self._slowest_s = max(self._slowest_s, compute_ns / 1e9)
        logits = self.buffers.logits[:batch_size].copy()
        return EngineResult(logits, compute_ns / 1e9)

    async def join(self, stitches: Sequence[int]) -> None:
        """Do nothing: the worker runs all stitches from the same weights."""

    def close(self) -> None:
        """Stop the worker and wait for its end; no batch may be in flight."""
        self._end()
        self._reap()

    async def stop(self) -> None:
        """Do what `close` does, without holding the event loop until the worker has ended."""
        self._end()
        if self._respawning is not None:
            await asyncio.gather(self._respawning, return_exceptions=True)
        await asyncio.to_thread(self._reap)

    def _end(self) -> None:
        """Close the worker's socket, at which it ends, and the shared memory."""
        if self._closed:
            return
        self._closed = True
        for task in (self._respawning, self._watching):
            if task is not None:
                task.cancel()
        self._disconnect()
        os.close(self._memory)
        del self.buffers  # their mapping has a descriptor of its own

    def _reap(self) -> None:
        if self._process is not None:
            try:
                self._process.wait(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _spawn(self) -> None:
        """Start a worker; raises `OSError` or `MemoryError` if the system cannot."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "ladderstitch.vision.engine.worker"]
        command += [str(theirs.fileno()), str(self._memory), self.config.to_json()]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command, pass_fds=(theirs.fileno(), self._memory), stdin=subprocess.DEVNULL
                )
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        self._socket, self._loading_beats = ours, 0
        self._loop.add_reader(ours.fileno(), self._on_message)

    def _on_message(self) -> None:
        assert self._socket is not None
        try:
            message = self._socket.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        self._silent = 0
        if not message:
            self._on_death()
        elif message == READY:
            self._ready.set()
            self._loaded_or_dead.set()
            if not self._started.done():
                self._started.set_result(None)
        elif message != BEAT and self._reply is not None and not self._reply.done():
            self._reply.set_result(message)  # one batch at a time: a cancelled one is waited for

    def _on_death(self) -> None:
        self._disconnect()
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(EngineDied("the worker died during a batch"))
            self._reply.exception()  # its caller may have been cancelled
        if not self._started.done():
            self._started.set_exception(EngineDied("the worker died while loading the model"))
            return
        if not self._closed and (self._respawning is None or self._respawning.done()):
            self._respawning = asyncio.create_task(self._respawn(), name="respawn-worker")

    async def _respawn(self) -> None:
        """Start workers until one has loaded its model, however often that fails."""
        delay_s = FIRST_BACKOFF_S
        while not self._closed:
            log.error("worker died pid=%s; respawning", self.worker_pid)
            self.restarts += 1
            await asyncio.to_thread(self._reap)
            try:
                self._spawn()
                self._loaded_or_dead.clear()
                await self._loaded_or_dead.wait()
                if self._ready.is_set():
                    log.warning("worker ready pid=%s restarts=%d", self.worker_pid, self.restarts)
                    return
                log.error("worker died while loading pid=%s", self.worker_pid)
            except (OSError, MemoryError) as error:
                log.error("no worker can be started, trying again: %s", error)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, LAST_BACKOFF_S)

    async def _watch(self) -> None:
        """Kill a worker that is stopped, hangs or computes for too long."""
        while True:
            await asyncio.sleep(BEAT_S)
            if self._socket is None or self._process is None:
                continue
            self._silent += 1
            if reason := self._find_hang():
                log.error("worker hangs pid=%s: %s; killing it", self.worker_pid, reason)
                self._process.kill()

    def _find_hang(self) -> str:
        """Return why the worker has to be killed, or an empty text."""
        if not self._ready.is_set():
            self._loading_beats += 1
            slow = self._loading_beats > LOADING_BEATS
            return "it has not loaded the model" if slow else ""
        if self._silent > LOST_BEATS:
            return f"no beat for {self._silent * BEAT_S:.0f} s"
        if self._reply is None or self._reply.done():
            return ""
        self._batch_beats += 1
        limit = max(BATCH_BEATS, SLOWEST_RATIO * self._slowest_s / BEAT_S)
        late = self._batch_beats > limit
        return f"a batch runs for {self._batch_beats * BEAT_S:.0f} s" if late else ""

    async def _wait_ready(self) -> None:
        """Wait until a worker is ready and has ended the batch of a caller that was cancelled."""
        if self._reply is not None and not self._reply.done():
            await asyncio.wait([self._reply])
        try:
            await asyncio.wait_for(self._ready.wait(), RESPAWN_TIMEOUT_S)
        except TimeoutError:
            raise EngineDied(f"no worker was ready within {RESPAWN_TIMEOUT_S:.0f} s") from None

    def _disconnect(self) -> None:
        self._ready.clear()
        self._loaded_or_dead.set()
        self._silent = 0
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
