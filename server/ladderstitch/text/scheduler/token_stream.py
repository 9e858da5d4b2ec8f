"""The stream of an answer's tokens that its caller reads."""

from __future__ import annotations

import asyncio
import math
import time
from collections import abc
from dataclasses import replace

from ladderstitch.errors import ExpiredInCompute, ExpiredInQueue, RequestError
from ladderstitch.scheduling.generation import GenerationUsage, TokenChunk
from ladderstitch.telemetry.statistics import Statistics
from ladderstitch.telemetry.text_observer import NullObserver, TextObserver
from ladderstitch.text.scheduler.sequence import Sequence


class TokenStream:
    """The chunks of one sequence, as an asynchronous iterator for one caller.

    The stream ends after the chunk that has a finish reason, and when it raises. A caller that
    stops earlier closes it, e.g. through `contextlib.aclosing`, which frees the sequence's blocks
    at once. Every stream is counted once: as complete, or with the status of its error.
    """

    def __init__(
        self,
        sequence: Sequence,
        remove: abc.Callable[[Sequence], None],
        observer: TextObserver | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        """`remove` takes the sequence out of its queue; removing it again changes nothing."""
        self._sequence, self._remove = sequence, remove
        self._observer = observer or NullObserver()
        self._statistics = statistics or Statistics()
        self._closed = False
        self._first_at = self._last_at = 0.0

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TokenChunk:
        """Return the next chunk.

        Raises `ExpiredInQueue` or `ExpiredInCompute` once the request's hard deadline has passed,
        and the error that the sequence ended with.
        """
        if self._closed:
            raise StopAsyncIteration
        try:
            chunk = await self._chunk_before_deadline()
        except RequestError as error:
            self._fail(error.code)
            raise
        except BaseException:  # cancellation, too, ends the stream
            await self.aclose()
            raise
        if self._closed:  # by another task, while this one waited
            raise StopAsyncIteration
        self._observe(chunk)
        return chunk if chunk.finish is None else self._complete(chunk)

    async def aclose(self) -> None:
        """Stop computing the sequence and free its blocks; closing it again changes nothing."""
        self._fail("CANCELLED")

    async def _chunk_before_deadline(self) -> TokenChunk:
        deadline = self._sequence.request.hard_deadline
        left_s = None if math.isinf(deadline) else max(0.0, deadline - time.monotonic())
        try:
            async with asyncio.timeout(left_s):
                return await self._sequence.next_chunk()
        except TimeoutError:
            if self._sequence.started:
                raise ExpiredInCompute(
                    "the hard deadline passed before the answer was complete"
                ) from None
            raise ExpiredInQueue("the hard deadline passed before the answer started") from None

    def _observe(self, chunk: TokenChunk) -> None:
        now, arrival = time.monotonic(), self._sequence.request.arrival
        if chunk.index == 0:
            self._first_at = now
            self._observer.observe_first_token(chunk.answer.queue_s, now - arrival)
        elif not self._last_at:  # another replica sent the first token
            self._first_at = self._sequence.pace.first_token_at or now
        else:
            self._observer.observe_next_token(now - self._last_at)
        self._last_at = now

    def _complete(self, last: TokenChunk) -> TokenChunk:
        """Return the last chunk with the usage of the answer."""
        self._close()
        request = self._sequence.request
        usage = GenerationUsage.measure(request, last, self._first_at, self._last_at)
        self._observer.observe_completion(last.answer, usage)
        self._statistics.add_generation(usage.queue_s, usage.total_s)
        return replace(last, usage=usage)

    def _fail(self, code: str) -> None:
        """Close the stream with a status, unless it is closed: every stream is counted once."""
        if self._closed:
            return
        self._close()
        had_budget = self._sequence.request.budget.is_set
        self._observer.observe_rejection(code, had_budget=had_budget)
        if code != "CANCELLED":  # the caller left: neither a success nor a failure
            self._statistics.fail.add(time.monotonic() - self._sequence.request.arrival)

    def _close(self) -> None:
        self._closed = True
        self._remove(self._sequence)
