"""Tests of the processes that decode: time limits, deaths, cancellation, lanes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ladderstitch.errors import Draining, InvalidArgument, Overloaded
from ladderstitch.vision.bundle import Preprocessing
from ladderstitch.vision.images import pool as pool_module
from ladderstitch.vision.images.formats import read_headers
from ladderstitch.vision.images.pool import LANE_COSTS
from ladderstitch.vision.preprocessing import MAX_INLINE_COST, ImageReader
from tests.support.pictures import colourful, encode, many_scans

SHAPE = {"channels": 3, "height": 8, "width": 8, "mean": (0.0,) * 3, "std": (1.0,) * 3}
MAX_PIXELS = 60_000_000
SMALL = encode(colourful(300, 300), "JPEG")
MEDIUM = encode(colourful(1000, 1000))
LARGE = encode(Image.new("RGB", (3500, 3500)))
LIMIT_S = 300.0


@pytest.fixture
async def reader(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ImageReader]:
    """Return a reader whose processes have all been reaped when the test has ended."""
    processes: list[asyncio.subprocess.Process] = []
    spawn = asyncio.create_subprocess_exec

    async def record(*command: str, **options: Any) -> asyncio.subprocess.Process:
        processes.append(await spawn(*command, **options))
        return processes[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", record)
    monkeypatch.setattr(pool_module, "STOPPED_S", LIMIT_S)  # stopped ones stand for slow ones
    preprocessing = Preprocessing.model_validate(SHAPE)
    reader = ImageReader(preprocessing, MAX_PIXELS, decoders=1, decode_timeout_s=LIMIT_S)
    yield reader
    reader.close()
    for process in processes:
        await process.wait()
    await asyncio.sleep(0)  # closes their transports


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


def process_state(pid: int) -> str:
    """Return the state of a process as one letter, empty if it has ended and has been reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


async def wait_gone(pids: Iterable[int]) -> None:
    """Wait until the processes have ended and have been reaped."""
    await wait_until(lambda: not any(process_state(pid) for pid in pids))


async def stop_worker(reader: ImageReader, lane: int) -> int:
    """Stop the idle process of a lane; returns its id when it stands."""
    (worker,) = reader._pool.lanes[lane].idle
    pid = worker.process.pid
    os.kill(pid, signal.SIGSTOP)
    await wait_until(lambda: process_state(pid) == "T")
    return pid


def test_files_of_these_tests_belong_to_the_lanes() -> None:
    small, medium, large = (read_headers(file, MAX_PIXELS).cost for file in (SMALL, MEDIUM, LARGE))
    assert MAX_INLINE_COST < small <= LANE_COSTS[0] < medium <= LANE_COSTS[1] < large


async def test_cheap_image_starts_no_process(reader: ImageReader) -> None:
    for file in (encode(colourful(28, 28)), encode(colourful(64, 64), "JPEG")):
        assert (await reader.read_encoded("image", file)).shape == (1, 3, 8, 8)
    assert reader._pool.worker_pids == ()


async def test_process_and_event_loop_decode_alike(
    reader: ImageReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [encode(colourful(30, 20)), encode(colourful(64, 64), "JPEG", progressive=True)]
    inline = [await reader.read_encoded("image", file) for file in files]
    monkeypatch.setattr("ladderstitch.vision.preprocessing.MAX_INLINE_COST", 0)
    for file, expected in zip(files, inline, strict=True):
        np.testing.assert_array_equal(await reader.read_encoded("image", file), expected)
    assert len(reader._pool.worker_pids) == 1


async def test_one_process_decodes_many_images(reader: ImageReader) -> None:
    await asyncio.gather(*(reader.read_encoded("image", SMALL) for _ in range(10)))
    assert len(reader._pool.worker_pids) == 1


async def test_stopped_process_delays_its_own_lane_only(reader: ImageReader) -> None:
    """While a large image is not decoded, small and medium ones are, and it is decoded at last."""
    await reader.read_encoded("image", LARGE)
    pid = await stop_worker(reader, 2)
    large = asyncio.create_task(reader.read_encoded("image", LARGE))
    waiting = asyncio.create_task(reader.read_encoded("image", LARGE))
    for file in (SMALL, MEDIUM, encode(colourful(8, 8))):
        assert (await reader.read_encoded("image", file)).shape == (1, 3, 8, 8)
    assert not large.done()
    assert not waiting.done()
    os.kill(pid, signal.SIGCONT)
    np.testing.assert_array_equal(await large, await waiting)


async def test_late_image_is_rejected_and_its_process_killed(reader: ImageReader) -> None:
    await reader.read_encoded("image", SMALL)
    pid = await stop_worker(reader, 0)
    reader._pool.timeout_s = 0.05
    with pytest.raises(InvalidArgument, match="image: expected an image that is decoded within"):
        await reader.read_encoded("image", SMALL)
    await wait_gone((pid,))
    reader._pool.timeout_s = LIMIT_S
    assert (await reader.read_encoded("image", SMALL)).shape == (1, 3, 8, 8)


async def test_killed_process_loses_no_image(reader: ImageReader) -> None:
    """The process dies while idle, and while it decodes; both times another one takes over."""
    await reader.read_encoded("image", SMALL)
    (pid,) = reader._pool.worker_pids
    os.kill(pid, signal.SIGKILL)
    expected = await reader.read_encoded("image", SMALL)
    pid = await stop_worker(reader, 0)
    busy = asyncio.create_task(reader.read_encoded("image", SMALL))
    await wait_until(lambda: bool(reader._pool.lanes[0].busy))
    os.kill(pid, signal.SIGKILL)
    np.testing.assert_array_equal(await busy, expected)


async def test_image_that_ends_processes_is_rejected(
    reader: ImageReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def decode(worker: pool_module._Worker, data: bytes, max_cost: int) -> tuple[int, bytes]:
        worker.process.kill()
        return await worker.read_reply()

    with monkeypatch.context() as patch:
        patch.setattr(pool_module._Worker, "decode", decode)
        with pytest.raises(InvalidArgument, match="got one that ended 2 processes"):
            await reader.read_encoded("image", SMALL)
    assert (await reader.read_encoded("image", SMALL)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("num_stopped", [1, 3])
async def test_stopped_processes_are_replaced_and_lose_no_image(
    reader: ImageReader, monkeypatch: pytest.MonkeyPatch, num_stopped: int
) -> None:
    expected = await reader.read_encoded("image", SMALL)
    monkeypatch.setattr(pool_module, "STOPPED_S", 0.05)
    take = pool_module._Lane._take_worker
    stopped: list[int] = []

    async def take_and_stop(lane: pool_module._Lane) -> pool_module._Worker:
        worker = await take(lane)
        if len(stopped) < num_stopped:
            stopped.append(worker.process.pid)
            os.kill(worker.process.pid, signal.SIGSTOP)
        return worker

    monkeypatch.setattr(pool_module._Lane, "_take_worker", take_and_stop)
    np.testing.assert_array_equal(await reader.read_encoded("image", SMALL), expected)
    await wait_gone(stopped)
    assert len(stopped) == num_stopped


async def test_cancelled_caller_ends_the_decoding(reader: ImageReader) -> None:
    await reader.read_encoded("image", SMALL)
    pid = await stop_worker(reader, 0)
    leaving = asyncio.create_task(reader.read_encoded("image", SMALL))
    await wait_until(lambda: bool(reader._pool.lanes[0].busy))
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await wait_gone((pid,))
    assert (await reader.read_encoded("image", SMALL)).shape == (1, 3, 8, 8)


async def test_no_room_for_a_process_is_overload(
    reader: ImageReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "create_subprocess_exec", fail)
        with pytest.raises(Overloaded, match="no process for decoding images starts"):
            await reader.read_encoded("image", SMALL)
    assert (await reader.read_encoded("image", SMALL)).shape == (1, 3, 8, 8)


async def test_close_ends_decoding_and_starts_no_process(reader: ImageReader) -> None:
    await reader.read_encoded("image", SMALL)
    pid = await stop_worker(reader, 0)
    busy = asyncio.create_task(reader.read_encoded("image", SMALL))
    await wait_until(lambda: bool(reader._pool.lanes[0].busy))
    starting = asyncio.create_task(reader.read_encoded("image", MEDIUM))
    await asyncio.sleep(0)
    reader.close()
    for task in (busy, starting):
        with pytest.raises(Draining):
            await task
    await wait_gone((pid, *reader._pool.worker_pids))


async def test_too_many_waiting_images_are_overload(
    reader: ImageReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "MAX_WAITING", 2)
    calls = [reader.read_encoded("image", SMALL) for _ in range(8)]
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(answer, np.ndarray) for answer in found) >= 2
    assert any(isinstance(answer, Overloaded) for answer in found)


def test_image_larger_than_the_memory_is_rejected() -> None:
    code = (
        "import resource, sys; from ladderstitch.vision.images.decode import *;"
        "from ladderstitch.vision.images.formats import *;"
        "image = read_headers(sys.stdin.buffer.read(), 10**8);"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 26, 1 << 26));"
        "decode(image, InputFormat(3, 8, 8, 'bilinear', None, (0, 0, 0)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], input=LARGE, capture_output=True)
    assert b"fits the memory for decoding, got 3500 x 3500 pixels" in ended.stderr


async def test_processes_die_with_their_parent() -> None:
    """The parent is killed while one process is idle and another one is busy, which is stopped."""
    script = (
        "import asyncio, os, signal, sys\n"
        "from ladderstitch.vision.images.pool import *\n"
        "target = InputFormat(3, 8, 8, 'bilinear', None, (0, 0, 0))\n"
        "async def main():\n"
        "    pool, file = DecoderPool(target, 10**8, 1, 300), sys.stdin.buffer.read()\n"
        "    await asyncio.gather(*(pool.decode(file, cost) for cost in (0, 1 << 40)))\n"
        "    os.kill(pool.lanes[-1].idle[0].process.pid, signal.SIGSTOP)\n"
        "    task = asyncio.create_task(pool.decode(file, 1 << 40))\n"
        "    print(*pool.worker_pids, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(SMALL)
    parent.stdin.close()
    pids = tuple(int(pid) for pid in (await parent.stdout.readline()).split())
    assert len(pids) == 2
    parent.kill()
    await parent.wait()
    await wait_gone(pids)


@pytest.mark.parametrize("scans", [65, 20_000])
async def test_many_scans_are_rejected_without_decoding(reader: ImageReader, scans: int) -> None:
    with pytest.raises(InvalidArgument, match=f"expected at most 64 scans .*, got {scans}"):
        await reader.read_encoded("image", many_scans((256, 256), scans))


async def test_most_scans_are_decoded_off_the_event_loop(reader: ImageReader) -> None:
    """The event loop runs a step of another task between any two of its steps for the image."""
    steps = 0

    async def count() -> None:
        nonlocal steps
        while True:
            steps += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await reader.read_encoded("image", many_scans((700, 700), 64))
    counting.cancel()
    assert steps > 100
    assert len(reader._pool.worker_pids) >= 1
