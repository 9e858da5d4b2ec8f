"""The processes that decode images, each of which is killed if an image takes too long."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Sequence

from ladderstitch.errors import Draining, InternalError, Overloaded
from ladderstitch.runtime.process import is_stopped
from ladderstitch.vision.images.decode import InputFormat
from ladderstitch.vision.images.formats import ImageRejected
from ladderstitch.vision.images.worker import (
    COSTLY,
    DECODED,
    READY,
    REJECTED,
    REPLY,
    REQUEST,
    WorkerConfig,
)

log = logging.getLogger(__name__)

LANE_COSTS = (1 << 21, 1 << 25, 1 << 28, 1 << 63)
"""The largest cost of an image in each lane: about 10 ms, 0.2 s, 1 s, any that is allowed."""
LANE_NICENESS = (0, 5, 10, 10)
MAX_WAITING = 256
"""Maximum number of images that wait for a process of one lane."""
START_TIMEOUT_S = 60.0
CHUNK_BYTES = 256 * 1024
"""Bytes of a file that are passed at once, so that the event loop is not held."""
ATTEMPTS = 2
"""An image is decoded again if its process died, which another process may have caused."""


STOPPED_S = 1.0
"""Seconds without a reply after which a process that is stopped is replaced."""


class WorkerDied(Exception):
    """The error of a process that ended while it started or while it decoded."""


class WorkerStopped(Exception):
    """The error of a process that is stopped, of which the image is not the cause."""


class _Worker:
    """One process and the socket to it."""

    def __init__(
        self, process: Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process, self.reader, self.writer = process, reader, writer

    @classmethod
    async def start(cls, config: WorkerConfig) -> _Worker:
        """Start a process and wait until it has imported what it needs.

        Raises `OSError` if the system has no room for it, and `WorkerDied`.
        """
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "ladderstitch.vision.images.worker"]
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    str(theirs.fileno()),
                    config.to_json(),
                    pass_fds=(theirs.fileno(),),
                    stdin=DEVNULL,
                )
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        worker = cls(process, reader, writer)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                kind, _ = await worker.read_reply()
            assert kind == READY
        except BaseException as error:
            worker.kill()
            if isinstance(error, TimeoutError):
                raise WorkerDied(f"it did not start within {START_TIMEOUT_S:.0f} s") from error
            raise
        return worker

    async def decode(self, data: bytes, max_cost: int) -> tuple[int, bytes]:
        """Return the kind and the content of the reply to a file; raises `WorkerDied`."""
        try:
            self.writer.write(REQUEST.pack(max_cost, len(data)))
            for start in range(0, len(data), CHUNK_BYTES):
                self.writer.write(data[start : start + CHUNK_BYTES])
                await self.writer.drain()
        except OSError as error:
            raise WorkerDied(f"it does not read: {error}") from error
        return await self.read_reply()

    async def read_reply(self) -> tuple[int, bytes]:
        """Return the kind and the content of the next reply; raises `WorkerDied`."""
        try:
            kind, num_bytes = REPLY.unpack(await self.reader.readexactly(REPLY.size))
            return kind, await self.reader.readexactly(num_bytes)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise WorkerDied("it ended without a reply") from error

    def kill(self) -> None:
        """End the process at once; the event loop reaps it.

        `Process.kill` could reap the process itself, and the event loop would then warn of it.
        """
        self.writer.transport.abort()
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has just been reaped
                os.kill(self.process.pid, signal.SIGKILL)


class _Lane:
    """The processes for images of one range of costs; they start when they are first needed."""

    def __init__(self, config: WorkerConfig, max_cost: int, num_workers: int) -> None:
        self.config, self.max_cost = config, max_cost
        self.slots = asyncio.Semaphore(num_workers)
        self.idle: list[_Worker] = []
        self.busy: set[_Worker] = set()
        self.num_waiting = 0
        self.closed = False

    async def decode(self, data: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Return the kind and the content of the reply to a file.

        Raises `Overloaded` if too many images wait or no process starts, `ImageRejected` if
        decoding takes longer than `timeout_s` or ends the process `ATTEMPTS` times, and `Draining`
        after `close`.
        """
        if self.num_waiting >= MAX_WAITING:
            raise Overloaded(
                f"expected at most {MAX_WAITING} images that wait to be decoded, got more", 1.0
            )
        self.num_waiting += 1
        try:
            await self.slots.acquire()
        finally:
            self.num_waiting -= 1
        try:
            num_deaths = 0
            while num_deaths < ATTEMPTS:
                worker = await self._take_worker()
                try:
                    return await self._use_worker(worker, data, timeout_s)
                except WorkerStopped:
                    log.warning("image decoder is stopped pid=%s; replaced", worker.process.pid)
                except WorkerDied as error:
                    num_deaths += 1
                    log.warning(
                        "image decoder died pid=%s attempt=%d: %s",
                        worker.process.pid,
                        num_deaths,
                        error,
                    )
        finally:
            self.slots.release()
        raise ImageRejected(
            f"expected an image that can be decoded, got one that ended {ATTEMPTS} processes"
        )

    async def _take_worker(self) -> _Worker:
        if self.closed:
            raise Draining("the model is being unloaded")
        while self.idle:
            worker = self.idle.pop()
            if worker.process.returncode is None:
                return worker
            worker.kill()
        try:
            worker = await _Worker.start(self.config)
        except (OSError, WorkerDied) as error:
            log.error("image decoder did not start: %s", error)
            raise Overloaded(f"no process for decoding images starts: {error}", 1.0) from error
        if self.closed:  # in the meantime
            worker.kill()
            raise Draining("the model is being unloaded")
        return worker

    async def _use_worker(
        self, worker: _Worker, data: bytes, timeout_s: float
    ) -> tuple[int, bytes]:
        """Return the worker's reply; it is killed if the reply is late, or if the caller leaves."""
        self.busy.add(worker)
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._await_reply(worker, data)
            self.idle.append(worker)
            return reply
        except TimeoutError as error:
            worker.kill()
            log.warning("image decoder killed pid=%s: over %g s", worker.process.pid, timeout_s)
            raise ImageRejected(
                f"expected an image that is decoded within {timeout_s:g} s, got a more costly one"
            ) from error
        except BaseException:
            worker.kill()
            raise
        finally:
            self.busy.discard(worker)

    async def _await_reply(self, worker: _Worker, data: bytes) -> tuple[int, bytes]:
        """Return the worker's reply; raises `WorkerDied`, and `WorkerStopped` if it is stopped."""
        replying = asyncio.create_task(worker.decode(data, self.max_cost), name="decode")
        try:
            while not (await asyncio.wait({replying}, timeout=STOPPED_S))[0]:
                if is_stopped(worker.process.pid):
                    raise WorkerStopped
            return replying.result()
        finally:
            replying.cancel()

    def close(self) -> None:
        """Kill all processes, and start no further ones."""
        self.closed = True
        for worker in (*self.idle, *self.busy):
            worker.kill()
        self.idle.clear()


class DecoderPool:
    """The processes that decode for one model, in lanes by cost: an image waits for its like only.

    Each lane has at most `num_workers` processes, that of the most costly images one, which needs
    the most memory. `timeout_s` is the limit of one image.
    """

    def __init__(
        self, target: InputFormat, max_pixels: int, num_workers: int, timeout_s: float
    ) -> None:
        self.timeout_s = timeout_s
        self.lanes: Sequence[_Lane] = [
            _Lane(
                WorkerConfig(target, max_pixels, niceness, os.getpid()),
                max_cost,
                1 if max_cost == LANE_COSTS[-1] else num_workers,
            )
            for max_cost, niceness in zip(LANE_COSTS, LANE_NICENESS, strict=True)
        ]

    async def decode(self, data: bytes, cost: int) -> bytes:
        """Return the pixels [height, width, channels] in uint8 of an image file.

        `cost` is the least that the file may cost; a file that turns out to be more costly moves to
        another lane. Raises `ImageRejected`, `Overloaded`, and `InternalError` for a fault of the
        decoder itself.
        """
        for lane in self.lanes:
            if cost > lane.max_cost:
                continue
            kind, content = await lane.decode(data, self.timeout_s)
            if kind == DECODED:
                return content
            if kind == REJECTED:
                raise ImageRejected(content.decode())
            if kind != COSTLY:
                fault = RuntimeError(content.decode(errors="replace"))
                raise InternalError.logged("decoding an image", fault)
            cost = int(content)
        raise InternalError.logged("decoding an image", RuntimeError(f"no lane for cost {cost}"))

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """The process ids of all processes."""
        workers = [worker for lane in self.lanes for worker in (*lane.idle, *lane.busy)]
        return tuple(worker.process.pid for worker in workers)

    def close(self) -> None:
        """Kill all processes; no image may be decoded afterwards."""
        for lane in self.lanes:
            lane.close()
