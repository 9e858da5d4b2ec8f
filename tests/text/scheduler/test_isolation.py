"""What fails in one sequence, in the observer or in the loop of steps hurts no other sequence."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, cast

import numpy as np
import pytest

from ladderstitch.errors import InternalError, NonFiniteOutput, RequestError
from ladderstitch.scheduling.generation import GenerationRequest, TokenChunk
from ladderstitch.scheduling.sampling import Sampling
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.text_metrics import TextMetrics
from ladderstitch.telemetry.text_observer import NullObserver
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.messages import Step, StepOutput
from ladderstitch.text.scheduler.sampler import Sampler, TokenChooser
from ladderstitch.text.scheduler.scheduler import TextScheduler
from ladderstitch.text.scheduler.sequence import Sequence
from ladderstitch.text.scheduler.token_stream import TokenStream
from tests.text.scheduler.stepped_group import SteppedGroup, SteppedScheduler

LIMIT_S = 300.0
BAD = 7
"""The first token of the prompt of a sequence that is to fail."""


def make_request(first: int = 1, max_tokens: int = 4, **fields: Any) -> GenerationRequest:
    return GenerationRequest((first, 2, 3, 4, 5), time.monotonic(), max_tokens, **fields)


async def read_all(stream: TokenStream) -> list[TokenChunk]:
    async with asyncio.timeout(LIMIT_S), aclosing(stream):
        return [chunk async for chunk in stream]


async def run_together(
    scheduler: TextScheduler, bad: GenerationRequest, **fields: Any
) -> tuple[BaseException | list[TokenChunk], list[list[TokenChunk]]]:
    """Return the end of a request that fails, and the answers of three others in its steps."""
    good = [make_request(first, **fields) for first in (1, 2, 3)]
    streams = [scheduler.generate(request) for request in (good[0], bad, *good[1:])]
    ends = await asyncio.gather(*map(read_all, streams), return_exceptions=True)
    failed = ends.pop(1)
    for end in ends:
        assert not isinstance(end, BaseException), end
        assert len(end) == 4
        assert end[-1].finish == "length"
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert scheduler.block_manager.num_used == 0
    return failed, cast("list[list[TokenChunk]]", ends)


@pytest.fixture
async def scheduler(tiny_language_bundle: TextBundle) -> AsyncIterator[SteppedScheduler]:
    """Return a scheduler whose steps end at once."""
    scheduler = SteppedScheduler(tiny_language_bundle)
    scheduler.steps.release()
    yield scheduler
    await scheduler.close()


LOGITS = np.array([1.0, 3.0, 2.0, -4.0], np.float32)


@pytest.mark.parametrize("temperature", [1e-308, 5e-324, 1e-300, 1e-45, 1e-12, 1e-3])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9}, {"top_p": 5e-324}])
def test_sampler_with_tiny_temperature_is_greedy(
    temperature: float, options: dict[str, Any]
) -> None:
    sampler = Sampler(Sampling(temperature=temperature, seed=1, **options))
    assert {sampler.pick(LOGITS) for _ in range(20)} == {1}


@pytest.mark.parametrize("scale", [1e-38, 1.0, 1e30, 8e37])
@pytest.mark.parametrize("temperature", [0.0, 1e-308, 1e-3, 1.0, 100.0])
def test_sampler_with_finite_logits_of_any_size_picks(scale: float, temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, seed=1, top_p=0.99))
    token = sampler.pick(LOGITS * np.float32(scale))
    assert token == 1 or (temperature > 0 and scale <= 1.0 and 0 <= token < 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1e-308, 1.0])
@pytest.mark.parametrize("options", [{}, {"top_k": 2, "top_p": 0.5}])
def test_sampler_with_non_finite_logits_raises(
    value: float, temperature: float, options: dict[str, Any]
) -> None:
    logits = LOGITS.copy()
    logits[3] = value
    sampling = Sampling(temperature=temperature, seed=1, **options)
    chooser = TokenChooser(GenerationRequest((1,), 0.0, sampling=sampling), ())
    with pytest.raises(NonFiniteOutput, match="infinite or NaN"):
        chooser.choose(logits)


@pytest.mark.parametrize("temperature", [1e-308, 5e-324])
async def test_tiny_temperature_hurts_nobody(
    scheduler: SteppedScheduler, temperature: float
) -> None:
    bad = make_request(BAD, sampling=Sampling(temperature=temperature), logprobs=2)
    end, _ = await run_together(scheduler, bad, sampling=Sampling(temperature=1.0, seed=1))
    assert isinstance(end, list)
    assert len(end) == 4


def sequences_of(step: Step) -> list[bool]:
    """Return for every input of a step whether it is the prompt of a sequence that is to fail."""
    return [list(s.tokens[:1]) == [BAD] and s.start == 0 for s in step.inputs]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=1)])
async def test_non_finite_logits_end_their_sequence_only(
    scheduler: SteppedScheduler,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    sampling: Sampling,
) -> None:
    run = scheduler.steps.run

    async def poison(step: Step) -> StepOutput:
        output = await run(step)
        if True in (bad := sequences_of(step)):
            output.logits[bad.index(True), 5] = value
        return output

    monkeypatch.setattr(scheduler.steps, "run", poison)
    others = {"sampling": sampling, "logprobs": 1}
    end, _ = await run_together(scheduler, make_request(BAD, **others), **others)
    assert isinstance(end, NonFiniteOutput)
    assert scheduler.counter.ends == {"OK": 3, "OUT_OF_RANGE": 1}


async def test_non_finite_sequence_leaves_no_cached_block(
    scheduler: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = scheduler.steps.run
    spoil = True

    async def poison(step: Step) -> StepOutput:
        output = await run(step)
        numbers = frozenset(n for n, bad in enumerate(sequences_of(step)) if bad and spoil)
        return StepOutput(output.best, output.logits, numbers)

    monkeypatch.setattr(scheduler.steps, "run", poison)
    end, _ = await run_together(scheduler, make_request(BAD))
    assert isinstance(end, NonFiniteOutput)
    spoil = False
    chunks = await read_all(scheduler.generate(make_request(BAD)))
    assert chunks[-1].answer.reused_tokens == 0
    again = await read_all(scheduler.generate(make_request(BAD)))
    assert again[-1].answer.reused_tokens == 4


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (Sequence, "append_token"),
        (Sequence, "next_input"),
        (Sequence, "_log_probabilities"),
        (Sequence, "_count_token"),
        (Sequence, "_info"),
    ],
)
@pytest.mark.parametrize("error", [ValueError("a bug"), MemoryError(), RecursionError()])
async def test_failure_of_a_sequence_ends_that_one_only(
    scheduler: SteppedScheduler,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
    error: Exception,
) -> None:
    original = getattr(owner, method)

    def fail(sequence: Sequence, *args: Any) -> Any:
        if sequence.request.tokens[0] == BAD:
            raise error
        return original(sequence, *args)

    monkeypatch.setattr(owner, method, fail)
    end, _ = await run_together(scheduler, make_request(BAD))
    assert isinstance(end, InternalError)
    assert "error_id=" in str(end)


@pytest.mark.parametrize("method", ["add", "finish"])
async def test_failure_of_text_ends_that_sequence_only(
    scheduler: SteppedScheduler, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*_: object) -> str:
        raise OverflowError("the detokeniser failed")

    submit = scheduler._submit

    def submit_broken(request: GenerationRequest) -> Sequence:
        sequence = submit(request)
        if request.tokens[0] == BAD:
            monkeypatch.setattr(sequence._text, method, fail)
        return sequence

    monkeypatch.setattr(scheduler, "_submit", submit_broken)
    end, _ = await run_together(scheduler, make_request(BAD, stop=("never",)))
    assert isinstance(end, InternalError)


@pytest.mark.parametrize("error", [InternalError("the forward pass failed"), ValueError("a bug")])
async def test_step_that_one_sequence_fails_is_repeated_for_others(
    scheduler: SteppedScheduler, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run = scheduler.steps.run

    async def fail(step: Step) -> StepOutput:
        output = await run(step)
        if any(sequences_of(step)):
            raise error
        return output

    monkeypatch.setattr(scheduler.steps, "run", fail)
    end, _ = await run_together(scheduler, make_request(BAD))
    assert isinstance(end, InternalError)


class BrokenObserver(NullObserver):
    """An observer all of whose methods fail."""

    def __getattribute__(self, name: str) -> Callable[..., None]:
        def fail(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        return fail


def make_scheduler(
    bundle: TextBundle, observer: NullObserver | TextMetrics
) -> tuple[TextScheduler, SteppedGroup]:
    group = SteppedScheduler(bundle).steps
    group.release()
    scheduler = TextScheduler(
        cast("RankGroup", group), bundle.tokenizer(), quality=bundle.quality, observer=observer
    )
    return scheduler, group


async def test_observer_that_fails_harms_no_answer(
    tiny_language_bundle: TextBundle, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler, _ = make_scheduler(tiny_language_bundle, BrokenObserver())
    await run_together(scheduler, make_request(2))
    with pytest.raises(RequestError):
        scheduler.generate(make_request(max_tokens=0))
    await asyncio.wait_for(scheduler.drain(), LIMIT_S)
    assert scheduler.healthy
    assert "an observer failed" in caplog.text
    await scheduler.close()


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"ladderstitch_{name}", {"model": "m"} | labels)


async def test_failures_are_counted_and_gauges_return_to_zero(
    tiny_language_bundle: TextBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics()
    scheduler, group = make_scheduler(tiny_language_bundle, TextMetrics(metrics, "m", range(1)))
    run = group.run

    async def poison(step: Step) -> StepOutput:
        assert (value(metrics, "running_requests") or 0) + (
            value(metrics, "queue_requests") or 0
        ) == scheduler.num_running + scheduler.num_waiting
        output = await run(step)
        bad = frozenset(n for n, is_bad in enumerate(sequences_of(step)) if is_bad)
        return StepOutput(output.best, output.logits, bad)

    monkeypatch.setattr(group, "run", poison)
    monkeypatch.setattr(scheduler._runner, "observe", lambda *_: 1 / 0)
    ends = await asyncio.gather(
        *(read_all(scheduler.generate(make_request(first))) for first in (1, BAD, 2)),
        return_exceptions=True,
    )
    assert isinstance(ends[1], NonFiniteOutput)
    for gauge in ("running_requests", "queue_requests", "kv_cache_usage_ratio"):
        assert value(metrics, gauge) == 0
    assert value(metrics, "non_finite_outputs_total") == 1
    assert value(metrics, "requests_total", variant="none", code="OUT_OF_RANGE") == 1
    await scheduler.close()


LOOP_FAULTS: dict[str, Exception | asyncio.CancelledError] = {
    "cancelled": asyncio.CancelledError(),
    "error": OSError(24, "Too many open files"),
}


@pytest.mark.parametrize("fault", LOOP_FAULTS)
@pytest.mark.parametrize("num_faults", [1, 2])
async def test_loop_that_ends_is_started_again(
    tiny_language_bundle: TextBundle, monkeypatch: pytest.MonkeyPatch, fault: str, num_faults: int
) -> None:
    """One end loses nothing; after two in a row the requests end with an error, not by hanging."""
    metrics = Metrics()
    scheduler, _ = make_scheduler(tiny_language_bundle, TextMetrics(metrics, "m", range(1)))
    ends = iter([LOOP_FAULTS[fault]] * num_faults)
    step = scheduler.step

    async def die() -> bool:
        if (error := next(ends, None)) is None:
            return await step()
        scheduler._runner.plan = None
        monkeypatch.setattr(scheduler._recovery, "fail_step", raise_(error))
        raise ValueError if isinstance(error, Exception) else error

    monkeypatch.setattr(scheduler, "step", die)
    reading = asyncio.gather(
        *(read_all(scheduler.generate(make_request(n))) for n in range(3)), return_exceptions=True
    )
    for end in await asyncio.wait_for(reading, LIMIT_S):
        assert isinstance(end, InternalError if num_faults == 2 else list)
    assert len(await read_all(scheduler.generate(make_request()))) == 4
    assert scheduler.healthy
    assert value(metrics, "dispatch_restarts_total") == num_faults
    await asyncio.wait_for(scheduler.drain(), LIMIT_S)
    await scheduler.close()


def raise_(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


async def test_loop_that_always_ends_is_neither_healthy_nor_alive(
    scheduler: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "step", raise_(asyncio.CancelledError()))
        for _ in range(3):
            with pytest.raises(InternalError):
                await read_all(scheduler.generate(make_request()))
            assert not scheduler.healthy
        async with asyncio.timeout(LIMIT_S):
            while scheduler.alive:  # noqa: ASYNC110  # it has no event
                await asyncio.sleep(0)
    assert len(await read_all(scheduler.generate(make_request()))) == 4  # it works again
    assert scheduler.healthy
    assert scheduler.alive


async def test_sequences_that_cannot_be_resumed_end(
    scheduler: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop ends, and the state of the queue is such that it cannot be resumed, either."""
    step, ends = scheduler.step, iter([True])

    async def die() -> bool:
        await step()
        if next(ends, False):
            scheduler.block_manager._ref_counts = []
            raise asyncio.CancelledError
        return True

    monkeypatch.setattr(scheduler, "step", die)
    with pytest.raises(InternalError):
        await read_all(scheduler.generate(make_request()))
    monkeypatch.setattr(scheduler, "step", step)
    assert len(await read_all(scheduler.generate(make_request()))) == 4
    scheduler.assert_empty()


@pytest.mark.parametrize("name", ["time_to_first_token_seconds", "inter_token_latency_seconds"])
def test_histogram_of_token_times_tells_budgets_apart(name: str) -> None:
    """Times that differ by a factor of two are in different buckets, up to 10 minutes."""
    for seconds in (0.004, 0.02, 0.08, 0.25, 1.0, 9.0, 20.0, 75.0, 200.0, 500.0):
        metrics = Metrics()
        observer = TextMetrics(metrics, "m", range(1))
        if name == "time_to_first_token_seconds":
            observer.observe_first_token(0.0, seconds)
        else:
            observer.observe_next_token(seconds)
        (family,) = [f for f in metrics.registry.collect() if f.name == f"ladderstitch_{name}"]
        counts = {
            float(sample.labels["le"]): sample.value
            for sample in family.samples
            if sample.name.endswith("_bucket")
        }
        above = min(bound for bound, count in counts.items() if count)
        below = max([0.0, *(bound for bound, count in counts.items() if not count)])
        assert below < seconds <= above <= 600.0
        assert above <= 2.5 * below
