"""Answers many callers with one group of ranks: step after step, whoever is there takes part.

Continuous batching (Orca, OSDI'22): answers join and leave between steps. A rank that dies costs
time, not tokens: what was computed is computed again, and every answer goes on where it was.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from ladderstitch.errors import (
    Draining,
    EngineRestarting,
    ExpiredInCompute,
    ExpiredInQueue,
    InternalError,
    InvalidArgument,
    RequestError,
)
from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.load_report import HORIZONS_S, LoadReport
from ladderstitch.scheduling.profiles import QualityTable
from ladderstitch.scheduling.requests import GenerationRequest, TokenChunk
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.text_metrics import Occupancy, StepReport
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.engine.rank_handle import RankLost
from ladderstitch.text.scheduler.block_manager import BlockManager
from ladderstitch.text.scheduler.planner import IDLE, StepPlan, choose_path, forecast, plan_step
from ladderstitch.text.scheduler.queue import SequenceQueue
from ladderstitch.text.scheduler.sequence import Sequence_
from ladderstitch.text.scheduler.step_times import StepTimes, measure_steps, placeholder_profile
from ladderstitch.text.step import LogitsMode, Step, StepOutput
from ladderstitch.text.tokenizer import TextTokenizer

log = logging.getLogger(__name__)

MAX_LOSSES = 8
"""Lost ranks that one answer survives: more is no accident."""
SHORT_TOKENS = 32
"""Of a prompt, and of an answer, by which a load is told."""


class StepObserver(Protocol):
    """Who counts what happens between the steps."""

    def stepped(self, step: StepReport, load: Occupancy) -> None:
        """A step is done."""

    def preempted(self, sequences: int) -> None:
        """So many had to give their blocks to others."""


class NullObserver:
    """Nobody counts."""

    def stepped(self, step: StepReport, load: Occupancy) -> None:
        pass

    def preempted(self, sequences: int) -> None:
        pass


class TextScheduler:
    """The answers of one group of ranks, of at most `max_sequences` at a time."""

    def __init__(
        self,
        group: RankGroup,
        tokenizer: TextTokenizer,
        end_tokens: Sequence[int] = (),
        quality: QualityTable | None = None,
        path_names: Sequence[str] = (),
        max_sequences: int = 32,
        observer: StepObserver | None = None,
        make_roster: Callable[[BlockManager, int], SequenceQueue] = SequenceQueue,
    ) -> None:
        job = group.job
        self.group, self.tokenizer = group, tokenizer
        self.end_tokens = frozenset(end_tokens)
        self.path_names = tuple(path_names) or tuple(path.scheme for path in job.paths)
        self.pool = BlockManager(job.blocks, job.block_tokens)
        self._roster = make_roster(self.pool, max_sequences)
        self.times = StepTimes(placeholder_profile(len(job.paths), job.max_batched_tokens), 0.0)
        self.draining = False
        self._quality, self._observer = quality, observer or NullObserver()
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop: asyncio.Task[None] | None = None
        self.apply(SchedulerSettings())

    @property
    def max_tokens(self) -> int:
        """Of a prompt and its answer together."""
        return min(self.group.job.max_model_len, self.pool.blocks * self.pool.block_tokens)

    @property
    def waiting(self) -> int:
        """Requests that are not computed on."""
        return len(self._roster.waiting)

    @property
    def running(self) -> int:
        return len(self._roster.active)

    @property
    def cache_share(self) -> float:
        """Share of the cache's blocks that answers hold."""
        return self.pool.used / self.pool.blocks

    def load_report(self) -> LoadReport:
        """How much longer than alone a short answer would take, if it were asked for now."""
        path, load = self.candidates.for_quality()[0], self._roster.load()
        busy, alone = (
            forecast(path, SHORT_TOKENS, there, self.times).answer_s(SHORT_TOKENS)
            for there in (load, IDLE)
        )
        request_s = self.times.prefill_s(path, SHORT_TOKENS)
        return LoadReport((busy - alone,) * len(HORIZONS_S), request_s)

    async def measure(self) -> None:
        """Learn what steps take; before the first request. Raises `RankLost`."""
        self.times = await measure_steps(self.group, self.group.job.max_batched_tokens)
        self.apply(self.settings)

    def apply(self, settings: SchedulerSettings) -> None:
        """Choose paths by these from now on; raises `InvalidArgument` for a path that is not there."""
        paths = range(len(self.group.job.paths))
        for field in ("fixed_variant", "pinned_variant"):
            if getattr(settings, field) not in (None, *paths):
                raise InvalidArgument(field, f"expected 0 to {len(paths) - 1}")
        self.settings = settings
        self.times.table.set_probability(settings.attainment_probability)
        quality = {p: self._quality.value(p) if self._quality else 0.0 for p in paths}
        self.candidates = CandidateFilter.from_settings(quality, self.times.table.profile, settings)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk]:
        """The answer's pieces as they are made; closing the iterator ends the work at once.

        Raises `InvalidArgument`, what `choose_path` raises, `Draining`, `ExpiredInQueue` or
        `ExpiredInCompute` past the limit, `EngineRestarting` if the ranks do not come back.
        """
        sequence = self._accept(request)
        try:
            async with aclosing(self._pieces(sequence)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self._leave(sequence)

    async def drain(self) -> None:
        """Refuse what is new; returns when what was accepted is answered."""
        self.draining = True
        await self._idle.wait()

    async def close(self) -> None:
        """Stop computing; answers that are on their way end with `Draining`."""
        self.draining = True
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        self._fail_all(Draining("the replica is shutting down"))

    def _accept(self, request: GenerationRequest) -> Sequence_:
        """Raises a `RequestError` for what cannot be answered, or not now."""
        if self.draining:
            raise Draining("the replica is shutting down")
        request.check(self.group.job.config.vocab_size, self.max_tokens)
        reusable = {
            path: self._roster.reusable(path, request.tenant, request.tokens)
            for path in range(len(self.group.job.paths))
        }
        path = choose_path(
            request,
            self.candidates,
            self.settings,
            self.times,
            self._roster.load(),
            reusable,
            time.monotonic(),
        )
        quality = self._quality.variants[path] if self._quality else None
        sequence = Sequence_(
            request, path, self.path_names[path], quality, self.tokenizer, self.end_tokens
        )
        self._roster.waiting.append(sequence)
        self._idle.clear()
        self._changed.set()
        if self._loop is None:
            self._loop = asyncio.create_task(self._work(), name="generate")
        return sequence

    @staticmethod
    async def _pieces(sequence: Sequence_) -> AsyncGenerator[TokenChunk]:
        limit = sequence.request.hard_deadline
        while True:
            left = None if math.isinf(limit) else max(0.0, limit - time.monotonic())
            try:
                async with asyncio.timeout(left):
                    piece = await sequence.next_piece()
            except TimeoutError:
                if sequence.begun:
                    raise ExpiredInCompute(
                        "the limit passed before the answer was complete"
                    ) from None
                raise ExpiredInQueue("the limit passed before the answer was begun") from None
            yield piece
            if piece.finish is not None:
                return

    def _leave(self, sequence: Sequence_) -> None:
        self._roster.leave(sequence)
        self._changed.set()
        if self._roster.empty:
            self._idle.set()

    async def _work(self) -> None:
        """Step after step; whatever goes wrong ends in an answer or an error for every caller."""
        while True:
            now = time.monotonic()
            self._roster.admit(self.times, now)
            plan = plan_step(self._roster.active, self.times, now)
            if plan is None:
                self._changed.clear()
                await self._changed.wait()
                continue
            try:
                await self._step(plan)
            except RankLost as error:
                await self._start_again(error)
            except RequestError as error:
                self._fail([part.sequence for part in plan.parts], error)
            except Exception as error:
                self._fail_all(InternalError.logged("a step failed", error))

    async def _step(self, wanted: StepPlan) -> None:
        plan, preempted = self._roster.make_room(wanted, self.times)
        if preempted:
            self._observer.preempted(preempted)
        if not plan.parts:
            return
        step = Step(tuple(part.sequence.run(part.count) for part in plan.parts), plan.path)
        started = time.monotonic()
        outcome = await self.group.run(step)
        now = time.monotonic()
        count = len(plan.parts)
        error = self.times.observe(plan.path, plan.tokens, count, now - started)
        self._deliver(plan, step, outcome, now)
        view = self.times.table.view
        self._observer.stepped(
            StepReport(plan.path, count, now - started, error, view.slowdown, view.tail),
            Occupancy(self.waiting, self.running, self.cache_share),
        )

    def _deliver(self, plan: StepPlan, step: Step, outcome: StepOutput, now: float) -> None:
        best, logits = iter(outcome.best.tolist()), iter(outcome.logits)
        for part, run in zip(plan.parts, step.runs, strict=True):
            token = next(best) if run.want == LogitsMode.BEST else None
            row = next(logits) if run.want == LogitsMode.LAST else None
            sequence = part.sequence
            if sequence.ended:  # its caller left meanwhile
                continue
            sequence.advance(part.count, self.pool)
            if run.want != LogitsMode.NONE:
                sequence.accept(token, row, now)
            if sequence.ended:
                self._leave(sequence)

    async def _start_again(self, error: RankLost) -> None:
        """The caches are lost: wait for the ranks, then compute everything anew."""
        log.warning("a rank was lost under %d answers: %s", len(self._roster.active), error)
        self._roster.start_again()
        weary = [s for s in self._roster.waiting if s.losses > MAX_LOSSES]
        self._fail(weary, EngineRestarting(f"too many ranks were lost: {error}"))
        try:
            await self.group.ready()
        except EngineRestarting as given_up:
            self._fail_all(given_up)

    def _fail(self, sequences: Sequence[Sequence_], error: RequestError) -> None:
        for sequence in sequences:
            if not sequence.ended:
                sequence.fail(error)
            self._leave(sequence)

    def _fail_all(self, error: RequestError) -> None:
        self._fail([*self._roster.active, *self._roster.waiting], error)
