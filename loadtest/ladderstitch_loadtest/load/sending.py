"""Sending when due, from several processes that begin together.

Each process gets its part pickled, connects, says that it is ready, is told when to begin, and
gives back how each of its requests ended.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Protocol

import grpc

START_S = 0.5
"""Time for the processes to connect before the first request is due."""
SPIN_S = 0.0012
"""The event loop sleeps in whole milliseconds; the rest of a wait is spent turning it."""
CONNECT_S = 30.0
READY = b"ready\n"

Begin = Callable[[], float]
"""Says that the process is ready; returns when to begin, by `time.monotonic`."""


class Part(Protocol):
    """What one process sends; `cpu` is the one to stay on, if any."""

    @property
    def cpu(self) -> int | None: ...
    async def send(self, begin: Begin) -> list[Any]:
        """The ends, in order of the part's requests."""


def send_parts(parts: Sequence[Part]) -> list[list[Any]]:
    """A process for each part; the ends of each. Raises `RuntimeError` if one does not connect."""
    workers = [_start(part) for part in parts]
    try:
        for worker in workers:
            assert worker.stdout is not None
            if worker.stdout.readline() != READY:
                raise RuntimeError("a generator did not reach the server; its message is above")
        start = time.monotonic() + START_S
        for worker in workers:
            _tell(worker, f"{start}\n".encode())
        return [_ends_of(worker) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def _start(part: Part) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ladderstitch_loadtest.load.sending"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    _tell(worker, pickle.dumps(part))
    return worker


def _tell(worker: subprocess.Popen[bytes], message: bytes) -> None:
    assert worker.stdin is not None
    worker.stdin.write(message)
    worker.stdin.flush()


def _ends_of(worker: subprocess.Popen[bytes]) -> list[Any]:
    assert worker.stdout is not None
    ends: list[Any] = pickle.load(worker.stdout)
    return ends


async def connected(channel: grpc.aio.Channel) -> None:
    """Raises `TimeoutError` if nobody answers there."""
    await asyncio.wait_for(channel.channel_ready(), CONNECT_S)


async def when_due(start: float, due_s: Iterable[float]) -> AsyncIterator[float]:
    """The times, `start` added, each as soon as it has come."""
    for at in due_s:
        due = start + at
        while (delay := due - time.monotonic()) > 0:  # noqa: ASYNC110 # time is the event
            await asyncio.sleep(max(0.0, delay - SPIN_S))
        yield due


def main() -> None:
    """A worker: a part on standard input, its ends on standard output."""
    part: Part = pickle.load(sys.stdin.buffer)
    if part.cpu is not None:
        os.sched_setaffinity(0, {part.cpu})
    gc.freeze()

    def begin() -> float:
        sys.stdout.buffer.write(READY)
        sys.stdout.buffer.flush()
        return float(sys.stdin.buffer.readline())

    ends = asyncio.run(part.send(begin))
    sys.stdout.buffer.write(pickle.dumps(ends))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    # Under its importable name, so that what is pickled here can be read by the one who asked.
    importlib.import_module("ladderstitch_loadtest.load.sending").main()
