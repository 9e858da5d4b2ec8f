"""Answers token by token: prefill, then one token a step, one answer after another.

A rank that dies costs time, not tokens: the tokens so far are fed to the new group again and the
answer goes on where it was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ladderstitch.errors import (
    BadInput,
    Draining,
    EngineRestarting,
    ExpiredInCompute,
    ExpiredInQueue,
)
from ladderstitch.language.group import RankGroup
from ladderstitch.language.member import RankLost
from ladderstitch.language.sampling import GREEDY, Sampler, Sampling
from ladderstitch.language.step import Logits
from ladderstitch.language.tokens import TextStream, TextTokenizer

MAX_LOSSES = 8
"""Lost ranks that one answer survives: more is no accident."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What is asked for; `limit` is on the clock of `time.monotonic`, `arrival` too."""

    tokens: tuple[int, ...]
    arrival: float
    max_tokens: int = 128
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    limit: float = float("inf")


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of an answer, numbered from 0; the last one says why the answer ended.

    `text` may be empty, when a character is not whole or a stop text may have begun.
    """

    index: int
    token: int
    text: str
    queue_s: float
    finish: FinishReason | None = None


class Generator:
    """The answers of one group of ranks."""

    def __init__(
        self, group: RankGroup, tokenizer: TextTokenizer, end_tokens: Sequence[int]
    ) -> None:
        self.group, self.tokenizer = group, tokenizer
        self.end_tokens = frozenset(end_tokens)
        self.waiting = 0
        self.draining = False
        self._turn = asyncio.Lock()

    @property
    def max_tokens(self) -> int:
        """Of a prompt and its answer together."""
        return self.group.job.cache_tokens

    def check(self, request: GenerationRequest) -> None:
        """Raises `BadInput` naming the field that is wrong."""
        request.sampling.check()
        vocabulary = self.group.job.config.vocab_size
        if not request.tokens:
            raise BadInput("prompt", "expected at least one token")
        if wrong := [t for t in request.tokens if not 0 <= t < vocabulary]:
            raise BadInput("prompt", f"expected tokens 0 to {vocabulary - 1}, got {wrong[:5]}")
        if request.max_tokens < 1:
            raise BadInput("max_tokens", f"expected at least 1, got {request.max_tokens}")
        if len(request.tokens) + request.max_tokens > self.max_tokens:
            raise BadInput(
                "max_tokens",
                f"expected at most {self.max_tokens} tokens of prompt and answer together, got "
                f"{len(request.tokens)} + {request.max_tokens}",
            )
        if any(not text for text in request.stop):
            raise BadInput("stop", "expected texts that are not empty")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Piece]:
        """The answer's pieces as they are made; closing the iterator ends the work.

        Raises `BadInput`, `Draining`, `ExpiredInQueue` or `ExpiredInCompute` past the limit,
        `EngineRestarting` if the ranks do not come back.
        """
        if self.draining:
            raise Draining("the replica is shutting down")
        self.check(request)
        self.waiting += 1
        try:
            await self._wait_turn(request.limit)
        finally:
            self.waiting -= 1
        try:
            queue_s = time.monotonic() - request.arrival
            text = _StoppableText(TextStream(self.tokenizer), request.stop)
            sampler, answer = Sampler(request.sampling), _Answer(self.group, request.tokens)
            for index in range(request.max_tokens):
                logits = await answer.next_logits(request.limit)
                token = sampler.pick(logits)
                answer.tokens.append(token)
                ended = token in self.end_tokens
                piece = "" if ended else text.add(token)
                if ended or text.stopped or index + 1 == request.max_tokens:
                    finish: FinishReason = "stop" if ended or text.stopped else "length"
                    yield Piece(index, token, piece + text.finish(), queue_s, finish)
                    return
                yield Piece(index, token, piece, queue_s)
        finally:
            self._turn.release()

    async def drain(self) -> None:
        """Refuse what is new; returns when what was accepted is answered."""
        self.draining = True
        async with self._turn:  # a lock lets waiters in by order of arrival
            pass

    async def _wait_turn(self, limit: float) -> None:
        try:
            async with asyncio.timeout(_remaining(limit)):
                await self._turn.acquire()
        except TimeoutError:
            raise ExpiredInQueue("the limit passed before the answer was begun") from None


class _Answer:
    """The tokens of one sequence, and how many of them the ranks' caches hold."""

    def __init__(self, group: RankGroup, prompt: Sequence[int]) -> None:
        self.tokens = list(prompt)
        self._group = group
        self._cached = 0
        self._losses = 0

    async def next_logits(self, limit: float) -> Logits:
        """Logits [V] after the last token, whatever it takes; raises `ExpiredInCompute`."""
        while True:
            try:
                return await self._feed(limit)
            except RankLost as error:
                self._cached = 0
                self._losses += 1
                if self._losses > MAX_LOSSES:
                    raise EngineRestarting(f"too many ranks were lost: {error}") from error
                async with _before(limit):
                    await self._group.ready()

    async def _feed(self, limit: float) -> Logits:
        """Run all tokens that the caches lack, in chunks."""
        chunk = self._group.job.chunk_tokens
        while True:
            fresh = self.tokens[self._cached : self._cached + chunk]
            async with _before(limit):
                logits = await self._group.forward(np.array([fresh], np.int64), self._cached)
            self._cached += len(fresh)
            if self._cached == len(self.tokens):
                return logits[0]


class _StoppableText:
    """Text that ends before a stop text; what may be the beginning of one is held back."""

    def __init__(self, stream: TextStream, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stream, self._stop, self._held = stream, stop, ""

    def add(self, token: int) -> str:
        return self._release(self._stream.add(token))

    def finish(self) -> str:
        """What was held back, when no more will come; nothing after a stop."""
        if self.stopped:
            return ""
        out = self._release(self._stream.finish())
        rest, self._held = ("" if self.stopped else self._held), ""
        return out + rest

    def _release(self, fresh: str) -> str:
        self._held += fresh
        found = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max((_overlap(self._held, text) for text in self._stop), default=0)
        split = len(self._held) - keep
        out, self._held = self._held[:split], self._held[split:]
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _remaining(limit: float) -> float | None:
    return None if limit == float("inf") else max(0.0, limit - time.monotonic())


@asynccontextmanager
async def _before(limit: float) -> AsyncIterator[None]:
    """Raise `ExpiredInCompute` once the limit has passed."""
    try:
        async with asyncio.timeout(_remaining(limit)):
            yield
    except TimeoutError:
        raise ExpiredInCompute("the limit passed before the answer was complete") from None
