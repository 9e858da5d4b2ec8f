"""Tests of the inline engine: where a batch runs, and that the logits do not depend on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine.process import IDLE_BEFORE_INLINE_S, InlineEngine, ProcessEngine
from tests.system.vision.test_process_engine import images, worker_config

LONG_S = 60.0


@pytest.fixture
async def engine(tiny_bundle: VisionBundle) -> AsyncIterator[InlineEngine]:
    """Yield a started engine with a limit that every batch meets."""
    engine = InlineEngine(ProcessEngine(worker_config(tiny_bundle)), LONG_S)
    await engine.start()
    yield engine
    engine.close()


async def wait_until_idle() -> None:
    """Wait until the engine counts as idle."""
    await asyncio.sleep(2 * IDLE_BEFORE_INLINE_S)


async def test_inline_logits_equal_worker_logits(engine: InlineEngine) -> None:
    worker = await engine.forward([images(2)], 5)  # the first run goes to the worker
    await wait_until_idle()
    inline = await engine.forward([images(2)], 5)
    assert engine.inline_batches == 1
    np.testing.assert_allclose(inline.logits, worker.logits, atol=1e-6)
    assert inline.compute_s > 0


async def test_two_requests_in_a_batch_run_in_worker(engine: InlineEngine) -> None:
    for _ in range(2):
        await wait_until_idle()
        await engine.forward([images(1)], 0)
    assert engine.inline_batches == 1
    await engine.forward([images(1), images(1)], 0)  # two requests
    await wait_until_idle()
    await engine.forward([images(1)], 0)  # the previous batch had two requests
    assert engine.inline_batches == 1
    await wait_until_idle()
    await engine.forward([images(1)], 0)
    assert engine.inline_batches == 2


async def test_batch_over_limit_runs_in_worker(tiny_bundle: VisionBundle) -> None:
    engine = InlineEngine(ProcessEngine(worker_config(tiny_bundle)), limit_s=1e-9)
    await engine.start()
    for _ in range(3):
        await wait_until_idle()
        await engine.forward([images(1)], 0)
    engine.close()
    assert engine.inline_batches == 0
