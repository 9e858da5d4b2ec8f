"""Every stream of a scheduler is counted once, and its blocks are freed once, however it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest

from ladderstitch.errors import (
    Draining,
    EngineRestarting,
    ExpiredInCompute,
    ExpiredInQueue,
    InternalError,
    InvalidArgument,
    RequestError,
)
from ladderstitch.scheduling.generation import GenerationRequest, TokenChunk
from ladderstitch.scheduling.sampling import Sampling
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_handle import RankLost
from ladderstitch.text.scheduler import token_stream as stream_module
from ladderstitch.text.scheduler.failure_recovery import MAX_RANK_LOSSES
from ladderstitch.text.scheduler.token_stream import TokenStream
from tests.text.scheduler.stepped_group import TOKEN, SteppedScheduler

LIMIT_S = 300.0


@pytest.fixture
async def scheduler(tiny_language_bundle: TextBundle) -> AsyncIterator[SteppedScheduler]:
    """Return a scheduler with room for one active sequence; other ones wait."""
    scheduler = SteppedScheduler(tiny_language_bundle, max_sequences=1)
    yield scheduler
    await scheduler.close()


def make_request(max_tokens: int = 4, **fields: Any) -> GenerationRequest:
    return GenerationRequest((1, 2, 3, 4, 5), time.monotonic(), max_tokens, **fields)


async def read_all(stream: TokenStream) -> list[TokenChunk]:
    async with asyncio.timeout(LIMIT_S):
        return [chunk async for chunk in stream]


async def wait_for_step(scheduler: SteppedScheduler) -> None:
    await asyncio.wait_for(scheduler.steps.step_running.wait(), LIMIT_S)


async def assert_ended_once(scheduler: SteppedScheduler, stream: TokenStream, code: str) -> None:
    """Assert that a stream has ended with a status, and that using it again changes nothing."""
    for _ in range(2):
        assert scheduler.counter.ends == {code: 1}
        scheduler.assert_empty()
        await stream.aclose()
        assert await read_all(stream) == []
    scheduler.steps.release()
    await scheduler.drain()
    assert scheduler.counter.ends == {code: 1}
    scheduler.assert_empty()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=1)])
async def test_complete_answer_is_counted_once(
    scheduler: SteppedScheduler, sampling: Sampling
) -> None:
    scheduler.steps.release()
    stream = scheduler.generate(make_request(sampling=sampling))
    chunks = await read_all(stream)
    assert [chunk.finish for chunk in chunks] == [None, None, None, "length"]
    await assert_ended_once(scheduler, stream, "OK")


async def test_answer_with_stop_text_is_counted_once(scheduler: SteppedScheduler) -> None:
    scheduler.steps.release()
    letter = scheduler.tokenizer.decode([TOKEN])
    stream = scheduler.generate(make_request(stop=(2 * letter,)))
    chunks = await read_all(stream)
    assert [chunk.finish for chunk in chunks] == [None, "stop"]
    await assert_ended_once(scheduler, stream, "OK")


async def test_answer_with_end_token_is_counted_once(scheduler: SteppedScheduler) -> None:
    scheduler.end_tokens = frozenset({TOKEN})
    scheduler.steps.release()
    stream = scheduler.generate(make_request())
    assert [chunk.finish for chunk in await read_all(stream)] == ["stop"]
    await assert_ended_once(scheduler, stream, "OK")


async def test_rejected_request_is_counted_once(scheduler: SteppedScheduler) -> None:
    with pytest.raises(InvalidArgument):
        scheduler.generate(make_request(max_tokens=0))
    assert scheduler.counter.ends == {"INVALID_ARGUMENT": 1}
    scheduler.assert_empty()


async def test_stream_closed_before_it_is_read_is_cancelled_once(
    scheduler: SteppedScheduler,
) -> None:
    stream = scheduler.generate(make_request())
    await stream.aclose()
    await assert_ended_once(scheduler, stream, "CANCELLED")


async def test_stream_closed_in_its_first_step_is_cancelled_once(
    scheduler: SteppedScheduler,
) -> None:
    stream = scheduler.generate(make_request())
    await wait_for_step(scheduler)
    assert scheduler.block_manager.num_used > 0
    await stream.aclose()
    await assert_ended_once(scheduler, stream, "CANCELLED")


async def test_stream_closed_between_tokens_is_cancelled_once(scheduler: SteppedScheduler) -> None:
    scheduler.steps.release(1)
    async with aclosing(scheduler.generate(make_request())) as stream:
        await anext(stream)
        await wait_for_step(scheduler)
    await assert_ended_once(scheduler, stream, "CANCELLED")


async def test_stream_closed_with_unread_tokens_is_cancelled_once(
    scheduler: SteppedScheduler,
) -> None:
    scheduler.steps.release()
    stream = scheduler.generate(make_request())
    await anext(stream)
    await scheduler.drain()  # the sequence is complete, but its caller has not read the end
    scheduler.draining = False
    await stream.aclose()
    await assert_ended_once(scheduler, stream, "CANCELLED")


async def test_stream_of_cancelled_reader_is_cancelled_once(scheduler: SteppedScheduler) -> None:
    stream = scheduler.generate(make_request())
    reader = asyncio.create_task(read_all(stream))
    await wait_for_step(scheduler)
    reader.cancel()
    await asyncio.wait({reader}, timeout=LIMIT_S)
    assert reader.cancelled()
    await assert_ended_once(scheduler, stream, "CANCELLED")


async def test_stream_closed_while_it_is_read_is_cancelled_once(
    scheduler: SteppedScheduler,
) -> None:
    """The reader's last token is ready, but the stream is closed before the reader runs."""
    stream = scheduler.generate(make_request(max_tokens=1))
    reader = asyncio.create_task(read_all(stream))
    await wait_for_step(scheduler)
    stream._sequence.append_token(TOKEN, None, time.monotonic())
    await stream.aclose()
    assert await reader == []
    await assert_ended_once(scheduler, stream, "CANCELLED")


async def test_error_after_close_is_not_counted(scheduler: SteppedScheduler) -> None:
    stream = scheduler.generate(make_request())
    reader = asyncio.create_task(read_all(stream))
    await wait_for_step(scheduler)
    await stream.aclose()
    stream._sequence.fail(Draining("stopping"))
    with pytest.raises(Draining):
        await reader
    await assert_ended_once(scheduler, stream, "CANCELLED")


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (InternalError("the forward pass failed"), InternalError),
        (ValueError("a bug"), InternalError),
    ],
)
@pytest.mark.parametrize("num_tokens", [0, 2])
async def test_failed_step_is_counted_once(
    scheduler: SteppedScheduler, failure: Exception, error: type[RequestError], num_tokens: int
) -> None:
    stream = scheduler.generate(make_request())
    if num_tokens:
        scheduler.steps.release(num_tokens)
        for _ in range(num_tokens):
            await anext(stream)
    scheduler.steps.step_error = failure
    scheduler.steps.release(1)
    with pytest.raises(error):
        await read_all(stream)
    await assert_ended_once(scheduler, stream, "INTERNAL")


@pytest.mark.parametrize("waiting", [False, True])
async def test_hard_deadline_is_counted_once(
    scheduler: SteppedScheduler, monkeypatch: pytest.MonkeyPatch, waiting: bool
) -> None:
    other = scheduler.generate(make_request()) if waiting else None
    if waiting:
        await wait_for_step(scheduler)
    stream = scheduler.generate(make_request(hard_deadline=time.monotonic() + 5000))
    await wait_for_step(scheduler)
    assert scheduler.num_waiting == int(waiting)
    late = SimpleNamespace(monotonic=lambda: time.monotonic() + 10_000)
    monkeypatch.setattr(stream_module, "time", late)
    with pytest.raises(ExpiredInQueue if waiting else ExpiredInCompute):
        await anext(stream)
    assert scheduler.counter.ends == {"DEADLINE_EXCEEDED": 1}
    if other is not None:
        await other.aclose()
        assert scheduler.counter.ends.pop("CANCELLED") == 1
    await assert_ended_once(scheduler, stream, "DEADLINE_EXCEEDED")


@pytest.mark.parametrize("num_tokens", [0, 2])
async def test_closed_scheduler_is_counted_once(
    scheduler: SteppedScheduler, num_tokens: int
) -> None:
    stream = scheduler.generate(make_request())
    if num_tokens:
        scheduler.steps.release(num_tokens)
        for _ in range(num_tokens):
            await anext(stream)
    await wait_for_step(scheduler)
    await scheduler.close()
    await scheduler.close()
    with pytest.raises(Draining):
        await read_all(stream)
    await assert_ended_once(scheduler, stream, "UNAVAILABLE")


async def test_stream_closed_after_its_scheduler_is_cancelled_once(
    scheduler: SteppedScheduler,
) -> None:
    stream = scheduler.generate(make_request())
    await wait_for_step(scheduler)
    await scheduler.close()
    await stream.aclose()
    await assert_ended_once(scheduler, stream, "CANCELLED")


@pytest.mark.parametrize("num_tokens", [0, 2])
async def test_answer_that_survives_a_lost_rank_is_counted_once(
    scheduler: SteppedScheduler, num_tokens: int
) -> None:
    stream = scheduler.generate(make_request())
    if num_tokens:
        scheduler.steps.release(num_tokens)
        for _ in range(num_tokens):
            await anext(stream)
    scheduler.steps.step_error = RankLost("rank 1 died")
    scheduler.steps.release()
    chunks = await read_all(stream)
    assert [chunk.index for chunk in chunks] == list(range(num_tokens, 4))
    await assert_ended_once(scheduler, stream, "OK")


async def test_ranks_that_do_not_return_are_counted_once(scheduler: SteppedScheduler) -> None:
    stream = scheduler.generate(make_request())
    scheduler.steps.step_error = RankLost("rank 1 died")
    scheduler.steps.ready_error = EngineRestarting("the ranks did not start again")
    scheduler.steps.release()
    with pytest.raises(EngineRestarting):
        await read_all(stream)
    await assert_ended_once(scheduler, stream, "UNAVAILABLE")


async def test_too_many_lost_ranks_are_counted_once(scheduler: SteppedScheduler) -> None:
    stream = scheduler.generate(make_request())
    for _ in range(MAX_RANK_LOSSES + 1):
        await wait_for_step(scheduler)
        scheduler.steps.step_running.clear()
        scheduler.steps.step_error = RankLost("rank 1 died")
        scheduler.steps.release(1)
    with pytest.raises(EngineRestarting, match="too many ranks"):
        await read_all(stream)
    await assert_ended_once(scheduler, stream, "UNAVAILABLE")


async def test_stream_closed_while_ranks_restart_is_cancelled_once(
    scheduler: SteppedScheduler,
) -> None:
    stream = scheduler.generate(make_request())
    await wait_for_step(scheduler)
    scheduler._queue.reset_all()  # as when a rank died: the sequence waits without blocks
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 1)
    await stream.aclose()
    await assert_ended_once(scheduler, stream, "CANCELLED")
