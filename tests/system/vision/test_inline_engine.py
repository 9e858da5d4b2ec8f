"""The engine of light models: where a batch runs, and that it makes no difference to the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from ladderstitch.vision.bundle import Bundle
from ladderstitch.vision.engine.process import IDLE_BEFORE_INLINE_S, InlineEngine, ProcessEngine
from tests.system.vision.test_process_engine import images, worker_config

LONG_S = 60.0


@pytest.fixture
async def engine(tiny_bundle: Bundle) -> AsyncIterator[InlineEngine]:
    """Every batch counts as short."""
    engine = InlineEngine(ProcessEngine(worker_config(tiny_bundle)), LONG_S)
    await engine.start()
    yield engine
    engine.close()


async def quiet() -> None:
    await asyncio.sleep(2 * IDLE_BEFORE_INLINE_S)


async def test_both_places_give_the_same_answer(engine: InlineEngine) -> None:
    worker = await engine.forward([images(2)], 5)  # never ran before: the worker's
    await quiet()
    inline = await engine.forward([images(2)], 5)
    assert engine.inline_batches == 1
    np.testing.assert_allclose(inline.logits, worker.logits, atol=1e-6)
    assert inline.compute_s > 0


async def test_a_busy_moment_or_company_sends_a_batch_to_the_worker(engine: InlineEngine) -> None:
    for _ in range(2):
        await quiet()
        await engine.forward([images(1)], 0)
    assert engine.inline_batches == 1
    await engine.forward([images(1), images(1)], 0)  # company
    await quiet()
    await engine.forward([images(1)], 0)  # the last batch had company
    assert engine.inline_batches == 1
    await quiet()
    await engine.forward([images(1)], 0)
    assert engine.inline_batches == 2


async def test_a_long_batch_is_the_workers(tiny_bundle: Bundle) -> None:
    engine = InlineEngine(ProcessEngine(worker_config(tiny_bundle)), limit_s=1e-9)
    await engine.start()
    for _ in range(3):
        await quiet()
        await engine.forward([images(1)], 0)
    engine.close()
    assert engine.inline_batches == 0
