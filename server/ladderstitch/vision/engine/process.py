"""The engine of a replica: one worker process, respawned when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
from collections.abc import Sequence

import numpy as np

from ladderstitch.errors import InternalError
from ladderstitch.scheduling.requests import Pixels
from ladderstitch.vision.engine.base import (
    COMMAND,
    MAX_MESSAGE_BYTES,
    READY,
    REPLY,
    Buffers,
    EngineDied,
    EngineResult,
    WorkerConfig,
)
from ladderstitch.vision.engine.worker import Worker

log = logging.getLogger(__name__)

RESPAWN_TIMEOUT_S = 30.0
RESPAWN_BACKOFF_S = 1.0


class ProcessEngine:
    """Runs batches in a worker process; `forward` calls must not overlap (the scheduler's rule).

    A worker that dies fails the batch in flight with `EngineDied` and is respawned at once; calls
    made meanwhile wait for the new one, up to `RESPAWN_TIMEOUT_S`.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.buffers, self._memory = Buffers.create(config)
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._reply: asyncio.Future[bytes] | None = None
        self._ready = asyncio.Event()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._closed = False
        self.restarts = 0

    @property
    def ready(self) -> bool:
        return self._ready.is_set()

    @property
    def worker_pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Spawn the worker and wait until its model is loaded; raises `EngineDied` if it is not."""
        self._started = self._loop.create_future()
        self._spawn()
        await self._started

    async def forward(self, images: Sequence[Pixels], stitch: int) -> EngineResult:
        """Logits [sum of batch_size, classes] of one batch.

        Raises `EngineDied` if the worker dies meanwhile, `InternalError` if the batch failed in it.
        """
        await self._wait_ready()
        batch_size = 0
        for request in images:
            self.buffers.images[batch_size : batch_size + len(request)] = request
            batch_size += len(request)
        self._reply = self._loop.create_future()
        try:
            assert self._socket is not None
            self._socket.send(COMMAND.pack(batch_size, stitch))
        except OSError as error:
            raise EngineDied(f"the worker is gone: {error}") from error
        message = await self._reply
        failed, compute_ns = REPLY.unpack_from(message)
        if failed:
            raise InternalError(
                f"the batch failed: {message[REPLY.size :].decode(errors='replace')}"
            )
        logits = self.buffers.logits[:batch_size].copy()
        return EngineResult(logits, compute_ns / 1e9)

    def close(self) -> None:
        """End the worker; nothing may be in flight."""
        self._closed = True
        self._disconnect()
        if self._process is not None:
            try:
                self._process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "ladderstitch.vision.engine.worker"]
        command += [str(theirs.fileno()), str(self._memory), self.config.to_json()]
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(), self._memory), stdin=subprocess.DEVNULL
            )
        ours.setblocking(False)
        self._socket = ours
        self._loop.add_reader(ours.fileno(), self._on_message)

    def _on_message(self) -> None:
        assert self._socket is not None
        try:
            message = self._socket.recv(MAX_MESSAGE_BYTES)
        except OSError:
            message = b""
        if not message:
            self._on_death()
        elif message == READY:
            self._ready.set()
            if not self._started.done():
                self._started.set_result(None)
        elif self._reply is not None and not self._reply.done():
            self._reply.set_result(message)

    def _on_death(self) -> None:
        loaded = self._ready.is_set()
        self._disconnect()
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(EngineDied("the worker died in the middle of a batch"))
        if not self._started.done():
            self._started.set_exception(EngineDied("the worker ended while loading the model"))
            return
        if self._closed:
            return
        log.error("worker %s died; respawning", self.worker_pid)
        self.restarts += 1
        self._loop.call_later(0.0 if loaded else RESPAWN_BACKOFF_S, self._respawn)

    def _respawn(self) -> None:
        if self._process is not None:
            self._process.wait()
        if not self._closed:
            self._spawn()

    async def _wait_ready(self) -> None:
        if self._ready.is_set():
            return
        try:
            await asyncio.wait_for(self._ready.wait(), RESPAWN_TIMEOUT_S)
        except TimeoutError:
            raise EngineDied(f"no worker for {RESPAWN_TIMEOUT_S:.0f} s") from None

    def _disconnect(self) -> None:
        self._ready.clear()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None


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
        shape = (config.max_batch_size, *config.image_shape)
        self.process, self.limit_s = process, limit_s
        self.inline_batches = 0
        self._buffers = Buffers(
            np.zeros(shape, np.float32),
            np.zeros((config.max_batch_size, config.classes), np.float32),
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
        batch_size = sum(len(request) for request in images)
        quiet = self._loop.time() - self._free_since > IDLE_BEFORE_INLINE_S
        lone, self._lone = self._lone and len(images) == 1, len(images) == 1
        if quiet and lone and self._took.get((stitch, batch_size), self.limit_s) < self.limit_s:
            result = self._run_here(images, batch_size, stitch)
        else:
            result = await self.process.forward(images, stitch)
        self._took[stitch, batch_size] = result.compute_s
        self._free_since = self._loop.time()
        return result

    def close(self) -> None:
        """End the worker; nothing may be in flight."""
        self.process.close()

    def _run_here(self, images: Sequence[Pixels], batch_size: int, stitch: int) -> EngineResult:
        self.inline_batches += 1
        np.concatenate(images, out=self._buffers.images[:batch_size])
        compute_ns = self._model.run(batch_size, stitch)
        return EngineResult(self._buffers.logits[:batch_size].copy(), compute_ns / 1e9)
