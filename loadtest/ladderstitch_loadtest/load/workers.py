"""Worker processes that send the load of `image_load` and `text_load`, and start together.

Each worker receives its share of the load pickled, connects to the server, reports that it is
ready, receives the start time, and returns the result of each of its requests.
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
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import grpc

T = TypeVar("T")
START_DELAY_S = 0.5
"""Time between the last worker's report and the first request."""
SPIN_S = 0.0012
"""Time that a worker spins before each request is due, as in `pacing.due_times`."""
CONNECT_TIMEOUT_S = 30.0
READY = b"ready\n"

WaitForStart = Callable[[], float]
"""Reports that the worker is ready, and returns the start time by `time.monotonic`."""


class WorkerLoad(Protocol):
    """The share of the load that one worker sends."""

    @property
    def cpu(self) -> int | None:
        """The CPU that the worker stays on; None: any."""

    async def send(self, wait_for_start: WaitForStart) -> list[Any]:
        """Connect, wait for the start, send, and return the results in order of the requests."""


def run_workers(loads: Sequence[WorkerLoad]) -> list[list[Any]]:
    """Run one worker for each load and return the results of each.

    Raises `RuntimeError` if a worker does not connect to the server.
    """
    workers = [_start_worker(load) for load in loads]
    try:
        for worker in workers:
            assert worker.stdout is not None
            if worker.stdout.readline() != READY:
                raise RuntimeError("a generator did not connect to the server; see its error above")
        start = time.monotonic() + START_DELAY_S
        for worker in workers:
            _write(worker, f"{start}\n".encode())
        return [_read_results(worker) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def merge_in_turn(parts: Sequence[list[T]]) -> list[T]:
    """Return the results of a load that was dealt to workers in turn, in its own order."""
    count = sum(len(part) for part in parts)
    return [parts[i % len(parts)][i // len(parts)] for i in range(count)]


def _start_worker(load: WorkerLoad) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ladderstitch_loadtest.load.workers"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    _write(worker, pickle.dumps(load))
    return worker


def _write(worker: subprocess.Popen[bytes], message: bytes) -> None:
    assert worker.stdin is not None
    worker.stdin.write(message)
    worker.stdin.flush()


def _read_results(worker: subprocess.Popen[bytes]) -> list[Any]:
    assert worker.stdout is not None
    results: list[Any] = pickle.load(worker.stdout)
    return results


async def wait_until_connected(channel: grpc.aio.Channel) -> None:
    """Wait for the connection; raise `TimeoutError` if no server answers within 30 s."""
    await asyncio.wait_for(channel.channel_ready(), CONNECT_TIMEOUT_S)


def main() -> None:
    """Run a worker: read its load from standard input, write the results to standard output."""
    load: WorkerLoad = pickle.load(sys.stdin.buffer)
    if load.cpu is not None:
        os.sched_setaffinity(0, {load.cpu})
    gc.freeze()

    def wait_for_start() -> float:
        sys.stdout.buffer.write(READY)
        sys.stdout.buffer.flush()
        return float(sys.stdin.buffer.readline())

    results = asyncio.run(load.send(wait_for_start))
    sys.stdout.buffer.write(pickle.dumps(results))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    # The module runs under its importable name, so that the parent can read what is pickled here.
    importlib.import_module("ladderstitch_loadtest.load.workers").main()
