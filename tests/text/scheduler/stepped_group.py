"""A text scheduler on a group without ranks, whose steps end when the test releases them."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import cast

import numpy as np

from ladderstitch.errors import RequestError
from ladderstitch.telemetry.text_observer import NullObserver
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.messages import LogitsMode, Step, StepOutput
from ladderstitch.text.scheduler.scheduler import TextScheduler

TOKEN = 65
"""The token of every greedy step, which is the letter A."""


class SteppedGroup:
    """A group that answers `TOKEN` to every step; `release` permits a number of steps to end."""

    def __init__(self, rank_config: RankConfig) -> None:
        self.rank_config = rank_config
        self.step_running = asyncio.Event()
        self.step_error: Exception | None = None
        """Raised by the next step that is released."""
        self.ready_error: RequestError | None = None
        """Raised by `wait_ready`; None: the ranks are ready at once."""
        self._permits = asyncio.Semaphore(0)

    def release(self, num_steps: int = 1_000_000) -> None:
        """Permit steps to end."""
        self._permits._value += num_steps - 1  # `release` of a semaphore wakes one waiter
        self._permits.release()

    async def run(self, step: Step) -> StepOutput:
        """Return the output of a step once it is released."""
        self.step_running.set()
        await self._permits.acquire()
        self.step_running.clear()
        await asyncio.sleep(0)  # as a real step, which lets other tasks run
        if (error := self.step_error) is not None:
            self.step_error = None
            raise error
        modes = [sequence.logits_mode for sequence in step.inputs]
        logits = np.zeros((modes.count(LogitsMode.LAST), 257), np.float32)
        return StepOutput(np.full(modes.count(LogitsMode.BEST), TOKEN), logits)

    async def wait_ready(self) -> None:
        """Return at once, or raise `ready_error`."""
        if self.ready_error is not None:
            raise self.ready_error


class RequestCounter(NullObserver):
    """An observer that counts the ends of requests by status."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()

    def observe_completion(self, answer: object, usage: object) -> None:
        """Count a complete answer as OK."""
        self.ends["OK"] += 1

    def observe_rejection(self, code: str, *, had_budget: bool) -> None:
        """Count a request that ended with a status."""
        self.ends[code] += 1


class SteppedScheduler(TextScheduler):
    """A text scheduler on a `SteppedGroup`, with a cache of 64 blocks of 4 tokens."""

    def __init__(self, bundle: TextBundle, max_sequences: int = 32) -> None:
        rank_config = RankConfig.of(
            bundle,
            max_model_len=128,
            kv_cache_tokens=256,
            block_tokens=4,
            max_batched_tokens=48,
        )
        self.steps, self.counter = SteppedGroup(rank_config), RequestCounter()
        names = [variant.name for variant in bundle.manifest.variants]
        super().__init__(
            cast("RankGroup", self.steps),
            bundle.tokenizer(),
            quality=bundle.quality,
            variant_names=names,
            max_sequences=max_sequences,
            observer=self.counter,
        )

    def assert_empty(self) -> None:
        """Assert that no sequence is in progress and that every block was freed once."""
        assert (self.num_running, self.num_waiting) == (0, 0)
        assert self.block_manager.num_used == 0
        assert set(self.block_manager._ref_counts) == {0}
