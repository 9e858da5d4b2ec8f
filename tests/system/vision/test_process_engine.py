"""Tests of the worker process: its logits, failed batches, and recovery after its death."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator

import numpy as np
import pytest
import torch

from ladderstitch.errors import ConfigError, InternalError
from ladderstitch.runtime.device import resolve_device, resolve_dtype
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine import process
from ladderstitch.vision.engine.base import EngineConfig, EngineDied
from ladderstitch.vision.engine.process import ProcessEngine

LIMIT_S = 300.0
"""Guards against hanging only."""


def worker_config(bundle: VisionBundle, **changes: object) -> EngineConfig:
    """Return the configuration of a CPU worker for the tiny bundle."""
    fields = {
        "bundle": str(bundle.path),
        "runtime": "torch",
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "max_batch_size": 8,
        "image_shape": (1, 8, 8),
        "row_size": 4,
    }
    return EngineConfig(**(fields | changes))  # type: ignore[arg-type] # fields of mixed type


@pytest.fixture
async def engine(tiny_bundle: VisionBundle) -> AsyncIterator[ProcessEngine]:
    """Yield a started engine."""
    engine = ProcessEngine(worker_config(tiny_bundle))
    await engine.start()
    yield engine
    engine.close()


def images(n: int, seed: int = 0) -> np.ndarray:
    """Return n random model inputs."""
    return np.random.default_rng(seed).normal(size=(n, 1, 8, 8)).astype(np.float32)


async def test_forward_equals_model(engine: ProcessEngine, tiny_bundle: VisionBundle) -> None:
    model = tiny_bundle.load_model()
    for stitch in (0, 5, 16):
        parts = [images(1, 1), images(3, 2), images(2, 3)]
        result = await engine.forward(parts, stitch)
        with torch.inference_mode():
            expected = model(torch.from_numpy(np.concatenate(parts)), stitch).numpy()
        np.testing.assert_allclose(result.logits, expected, atol=1e-5)
        assert result.compute_s > 0


async def test_forward_next_batch_keeps_earlier_logits(engine: ProcessEngine) -> None:
    first = await engine.forward([images(2, 1)], 0)
    kept = first.logits.copy()
    await engine.forward([images(2, 9)], 0)
    np.testing.assert_array_equal(first.logits, kept)


async def test_forward_failed_batch_keeps_worker_alive(engine: ProcessEngine) -> None:
    pid = engine.worker_pid
    with pytest.raises(InternalError, match="KeyError: 99"):
        await engine.forward([images(1)], 99)
    assert (await engine.forward([images(1)], 0)).logits.shape == (1, 4)
    assert engine.worker_pid == pid


async def test_killed_worker_is_respawned(engine: ProcessEngine) -> None:
    pid = engine.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # guarantees that the batch is in flight
    batch = asyncio.create_task(engine.forward([images(1)], 0))
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineDied):
        await batch
    assert not engine.ready
    assert (await engine.forward([images(1)], 0)).logits.shape == (1, 4)
    assert engine.ready
    assert engine.worker_pid != pid
    assert engine.restarts == 1


async def test_stopped_worker_is_replaced(
    engine: ProcessEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "LOST_BEATS", 6)
    pid = engine.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    batch = asyncio.create_task(engine.forward([images(1)], 0))
    async with asyncio.timeout(LIMIT_S):
        while engine.ready:  # noqa: ASYNC110 # the engine has no event for it
            await asyncio.sleep(0.05)
        with pytest.raises(EngineDied):
            await batch
        assert (await engine.forward([images(1)], 0)).logits.shape == (1, 4)
    assert engine.worker_pid != pid
    assert engine.restarts == 1


async def test_respawn_that_fails_is_tried_again(
    engine: ProcessEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "FIRST_BACKOFF_S", 0.01)
    start, failures = subprocess.Popen, iter([OSError(24, "Too many open files"), MemoryError()])

    def start_later(*args: object, **fields: object) -> object:
        if error := next(failures, None):
            raise error
        return start(*args, **fields)  # type: ignore[call-overload] # passed through

    monkeypatch.setattr(process.subprocess, "Popen", start_later)
    assert engine.worker_pid is not None
    os.kill(engine.worker_pid, signal.SIGKILL)
    async with asyncio.timeout(LIMIT_S):
        while engine.ready:  # noqa: ASYNC110 # the engine has no event for it
            await asyncio.sleep(0.01)
        assert (await engine.forward([images(1)], 0)).logits.shape == (1, 4)
    assert caplog.text.count("no worker can be started") == 2


async def test_cancelled_batch_does_not_answer_the_next(
    engine: ProcessEngine, tiny_bundle: VisionBundle
) -> None:
    assert engine.worker_pid is not None
    os.kill(engine.worker_pid, signal.SIGSTOP)  # guarantees that the batch is in flight
    given_up = asyncio.create_task(engine.forward([images(2, 1)], 0))
    await asyncio.sleep(0)
    given_up.cancel()
    later = asyncio.create_task(engine.forward([images(2, 2)], 5))
    await asyncio.sleep(0.05)
    os.kill(engine.worker_pid, signal.SIGCONT)
    result = await asyncio.wait_for(later, LIMIT_S)
    with torch.inference_mode():
        expected = tiny_bundle.load_model()(torch.from_numpy(images(2, 2)), 5).numpy()
    np.testing.assert_allclose(result.logits, expected, atol=1e-5)


async def test_close_stops_worker_process(tiny_bundle: VisionBundle) -> None:
    engine = ProcessEngine(worker_config(tiny_bundle))
    await engine.start()
    pid = engine.worker_pid
    assert pid is not None
    engine.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_start_without_weights_raises_engine_died(tiny_bundle: VisionBundle) -> None:
    config = worker_config(tiny_bundle)
    (tiny_bundle.path / "weights.safetensors").unlink()
    engine = ProcessEngine(config)
    with pytest.raises(EngineDied, match="loading the model"):
        await engine.start()
    engine.close()


def test_resolve_device_and_dtype_wrong_names_raise() -> None:
    assert resolve_dtype("auto", "cpu") is torch.float32
    assert resolve_dtype("auto", "cuda:1") is torch.bfloat16
    with pytest.raises(ConfigError, match="dtype: expected auto or one of"):
        resolve_dtype("int8", "cpu")
    with pytest.raises(ConfigError, match="device: expected auto"):
        resolve_device("toaster")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            resolve_device("cuda")
