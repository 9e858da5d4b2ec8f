"""The engine of GPUs and of eager torch: a worker process that is respawned when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
from collections.abc import Sequence

from ladderstitch.errors import InternalError
from ladderstitch.scheduling.requests import Pixels
from ladderstitch.vision.engine.base import (
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
RESPAWN_BACKOFF_S = 1.0
"""Delay of a respawn after a worker that died before its model was loaded."""


class ProcessEngine:
    """The engine that runs batches in a worker process; `forward` calls must not overlap.

    When the worker dies, the batch in flight fails with `EngineDied` and a new worker is spawned
    immediately. Calls in the meantime wait for the new worker, at most `RESPAWN_TIMEOUT_S`.
    `restarts` counts the respawns.
    """

    def __init__(self, config: EngineConfig) -> None:
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
        """Whether a worker is running and has loaded its model."""
        return self._ready.is_set()

    @property
    def worker_pid(self) -> int | None:
        """Process id of the current worker; None before `start`."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Spawn the worker and wait until its model is loaded.

        Raises `EngineDied` if the worker ends before that.
        """
        self._started = self._loop.create_future()
        self._spawn()
        await self._started

    async def forward(self, images: Sequence[Pixels], stitch: int) -> EngineResult:
        """Return the logits [B, K] of one batch, where B counts the images of all requests.

        Raises `EngineDied` if the worker dies during the batch, or if no worker is ready within
        `RESPAWN_TIMEOUT_S`; raises `InternalError` if the batch failed in the worker.
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
            raise EngineDied(f"the worker died: {error}") from error
        message = await self._reply
        failed, compute_ns = REPLY.unpack_from(message)
        if failed:
            raise InternalError(
                f"the batch failed: {message[REPLY.size :].decode(errors='replace')}"
            )
        logits = self.buffers.logits[:batch_size].copy()
        return EngineResult(logits, compute_ns / 1e9)

    async def join(self, stitches: Sequence[int]) -> None:
        """Do nothing: the worker runs all stitches from the same weights."""

    def close(self) -> None:
        """Stop the worker; no batch may be in flight."""
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
            self._reply.set_exception(EngineDied("the worker died during a batch"))
        if not self._started.done():
            self._started.set_exception(EngineDied("the worker died while loading the model"))
            return
        if self._closed:
            return
        log.error("worker died pid=%s; respawning", self.worker_pid)
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
            raise EngineDied(f"no worker was ready within {RESPAWN_TIMEOUT_S:.0f} s") from None

    def _disconnect(self) -> None:
        self._ready.clear()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
