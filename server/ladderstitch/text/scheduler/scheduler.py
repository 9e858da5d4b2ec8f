"""The text scheduler: continuous batching of many callers on one group of ranks.

Sequences join and leave between steps (continuous batching, Orca, OSDI'22). If a rank dies, every
active sequence is computed again from its tokens and resumes: callers lose time, but no token.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import abc

from ladderstitch.errors import (
    Draining,
    EngineRestarting,
    InternalError,
    InvalidArgument,
    RequestError,
)
from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.load_report import HORIZONS_S, LoadReport
from ladderstitch.scheduling.profiles import QualityTable
from ladderstitch.scheduling.requests import GenerationRequest
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.model_metrics import (
    NullObserver,
    Occupancy,
    StepReport,
    TextObserver,
)
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.engine.rank_handle import RankLost
from ladderstitch.text.messages import LogitsMode, Step
from ladderstitch.text.scheduler.block_manager import BlockManager
from ladderstitch.text.scheduler.planner import (
    NO_LOAD,
    ExecutedStep,
    StepPlan,
    choose_variant,
    estimate_token_times,
    plan_step,
)
from ladderstitch.text.scheduler.queue import SequenceQueue
from ladderstitch.text.scheduler.sequence import Sequence, TokenStream
from ladderstitch.text.scheduler.step_times import StepTimes, measure_steps, placeholder_profile
from ladderstitch.text.scheduler.variant_changes import ChangeRules
from ladderstitch.text.tokenizer import TextTokenizer

log = logging.getLogger(__name__)

MAX_RANK_LOSSES = 8
"""Rank losses that one sequence survives; more than these are not a coincidence."""
LOAD_REPORT_TOKENS = 32
"""Prompt and answer length assumed when reporting load."""


class TextScheduler:
    """The scheduler of one group of ranks, with at most `max_sequences` active sequences."""

    def __init__(
        self,
        group: RankGroup,
        tokenizer: TextTokenizer,
        end_tokens: abc.Sequence[int] = (),
        quality: QualityTable | None = None,
        variant_names: abc.Sequence[str] = (),
        max_sequences: int = 32,
        observer: TextObserver | None = None,
        make_queue: abc.Callable[[BlockManager, int], SequenceQueue] = SequenceQueue,
    ) -> None:
        config = group.rank_config
        self.group, self.tokenizer = group, tokenizer
        self.end_tokens = frozenset(end_tokens)
        self.variant_names = tuple(variant_names) or tuple(path.scheme for path in config.paths)
        self.block_manager = BlockManager(config.blocks, config.block_tokens)
        self.times = StepTimes(
            placeholder_profile(len(config.paths), config.max_batched_tokens), 0.0
        )
        self.draining = False
        self._queue = make_queue(self.block_manager, max_sequences)
        self._plan: StepPlan | None = None
        self._quality, self._observer = quality, observer or NullObserver()
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop: asyncio.Task[None] | None = None
        self.apply_settings(SchedulerSettings())

    @property
    def max_tokens(self) -> int:
        """The largest number of tokens of a prompt and its answer together."""
        cached_tokens = self.block_manager.num_blocks * self.block_manager.block_tokens
        return min(self.group.rank_config.max_model_len, cached_tokens)

    @property
    def num_waiting(self) -> int:
        """The number of requests without blocks."""
        return len(self._queue.waiting)

    @property
    def num_running(self) -> int:
        """The number of requests that hold blocks."""
        return len(self._queue.active)

    @property
    def kv_cache_usage(self) -> float:
        """The share of the cache's blocks that sequences hold, 0 to 1."""
        return self.block_manager.num_used / self.block_manager.num_blocks

    def load_report(self) -> LoadReport:
        """Return the seconds that a short answer takes longer now than without load."""
        variant = self.candidates.for_quality()[0]
        shared_s, alone_s = (
            estimate_token_times(variant, LOAD_REPORT_TOKENS, load, self.times).answer_s(
                LOAD_REPORT_TOKENS
            )
            for load in (self._queue.load(), NO_LOAD)
        )
        request_s = self.times.prefill_s(variant, LOAD_REPORT_TOKENS)
        return LoadReport((shared_s - alone_s,) * len(HORIZONS_S), request_s)

    async def measure(self) -> None:
        """Measure the duration of steps; must be called before the first request.

        Raises `RankLost` if a rank died.
        """
        self.times = await measure_steps(self.group, self.group.rank_config.max_batched_tokens)
        self.apply_settings(self.settings)

    def apply_settings(self, settings: SchedulerSettings) -> None:
        """Choose variants by these settings from now on.

        Raises `InvalidArgument` if the model lacks a variant or the floor that they name.
        """
        variants = range(len(self.group.rank_config.paths))
        quality = {v: self._quality.value(v) if self._quality else 0.0 for v in variants}
        for field in ("fixed_variant", "pinned_variant"):
            variant = getattr(settings, field)
            if variant not in (None, *variants):
                raise InvalidArgument(field, f"expected 0 to {len(variants) - 1}, got {variant}")
        best = max(quality.values())
        if settings.min_quality > best:
            raise InvalidArgument(
                "min_quality",
                f"expected at most {best:.4f}, the best variant's, got {settings.min_quality}",
            )
        self.settings = settings
        latency = self.times.latency
        latency.set_probability(settings.attainment_probability)
        self.candidates = CandidateFilter.from_settings(quality, latency.profile, settings)
        alternatives = self.group.rank_config.alternatives
        self._change_rules = ChangeRules(alternatives, self.candidates, settings)

    def generate(self, request: GenerationRequest) -> TokenStream:
        """Submit a request and return the stream of its chunks; the caller must close the stream.

        Raises `InvalidArgument` if the request is malformed, `Draining` after `drain` or `close`,
        and what `choose_variant` raises. The stream raises `ExpiredInQueue` or `ExpiredInCompute`
        once the hard deadline has passed, and `EngineRestarting` if the ranks do not come back. All
        of these are counted.
        """
        try:
            sequence = self._submit(request)
        except RequestError as error:
            self._observer.observe_rejection(error.code, had_budget=request.budget.is_set)
            raise
        return TokenStream(sequence, self._remove, self._observer)

    async def drain(self) -> None:
        """Reject new requests, and return when all accepted ones have ended."""
        self.draining = True
        await self._idle.wait()

    async def close(self) -> None:
        """Stop computing; answers in progress end with `Draining`."""
        self.draining = True
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        self._fail_all(Draining("the replica is shutting down"))

    async def step(self) -> bool:
        """Run one step: admit, change variants, plan, make room, execute, deliver, observe.

        Return False, without a step, if no sequence is active. Raises `RankLost` if a rank died,
        and `InternalError` if the forward pass failed.
        """
        now = time.monotonic()
        self._queue.admit(self.times, now)
        self._change_variants(now)
        self._plan = plan_step(self._queue.active, self.times, now)
        if self._plan is None:
            return False
        plan = self._make_room(self._plan)
        if plan.chunks:
            executed = await self._execute(plan)
            self._deliver(executed)
            self._observe(executed)
        return True

    async def _run_steps(self) -> None:
        """Run steps forever; if one fails, its sequences resume or end with an error."""
        while True:
            try:
                if not await self.step():
                    self._changed.clear()
                    await self._changed.wait()
            except RankLost as error:
                await self._recover(error)
            except RequestError as error:
                self._fail(self._plan.sequences if self._plan else [], error)
            except Exception as error:
                self._fail_all(InternalError.logged("a step failed", error))

    def _change_variants(self, now: float) -> None:
        """Move decoding sequences to the variants that their budgets allow from now on."""
        changes = self._change_rules.plan(self._queue.active, self.times, now)
        for change in changes:
            change.sequence.change_variant(change.variant)
        if changes:
            self._observer.observe_variant_changes(len(changes))

    def _make_room(self, wanted: StepPlan) -> StepPlan:
        plan, num_preempted = self._queue.make_room(wanted, self.times)
        if num_preempted:
            self._observer.observe_preemptions(num_preempted)
        return plan

    async def _execute(self, plan: StepPlan) -> ExecutedStep:
        inputs = tuple(chunk.sequence.next_input(chunk.num_tokens) for chunk in plan.chunks)
        step = Step(inputs, plan.variant)
        started_at = time.monotonic()
        output = await self.group.run(step)
        return ExecutedStep(plan, step, output, started_at, time.monotonic())

    def _deliver(self, executed: ExecutedStep) -> None:
        """Append the new tokens to their sequences; remove the sequences that end."""
        best, logits = iter(executed.output.best.tolist()), iter(executed.output.logits)
        for chunk, step_input in zip(executed.plan.chunks, executed.step.inputs, strict=True):
            token = next(best) if step_input.logits_mode == LogitsMode.BEST else None
            row = next(logits) if step_input.logits_mode == LogitsMode.LAST else None
            sequence = chunk.sequence
            if sequence.ended:  # its caller left during the step
                continue
            sequence.block_table.mark_computed(
                self.block_manager, sequence.tokens, chunk.num_tokens
            )
            if step_input.logits_mode != LogitsMode.NONE:
                sequence.append_token(token, row, executed.ended_at)
            if sequence.ended:
                self._remove(sequence)

    def _observe(self, executed: ExecutedStep) -> None:
        plan, seconds = executed.plan, executed.ended_at - executed.started_at
        num_sequences = len(plan.chunks)
        error = self.times.observe(plan.variant, plan.num_tokens, num_sequences, seconds)
        view = self.times.latency.view
        self._observer.observe_step(
            StepReport(plan.variant, num_sequences, seconds, error, view.slowdown, view.tail),
            Occupancy(self.num_waiting, self.num_running, self.kv_cache_usage),
        )

    async def _recover(self, error: RankLost) -> None:
        """Wait until all ranks are ready; the caches are lost, so all sequences start over."""
        log.warning("rank lost, active_sequences=%d: %s", self.num_running, error)
        self._queue.reset_all()
        exhausted = [s for s in self._queue.waiting if s.num_rank_losses > MAX_RANK_LOSSES]
        self._fail(exhausted, EngineRestarting(f"too many ranks were lost: {error}"))
        try:
            await self.group.wait_ready()
        except EngineRestarting as failure:
            self._fail_all(failure)

    def _submit(self, request: GenerationRequest) -> Sequence:
        """Add a request to the queue; raise a `RequestError` if it cannot be accepted."""
        if self.draining:
            raise Draining("the replica is shutting down")
        request.check(self.group.rank_config.model.vocab_size, self.max_tokens)
        variant = choose_variant(
            request,
            self.candidates,
            self.settings,
            self.times,
            self._queue.load(),
            self._queue.cached_tokens(request, len(self.variant_names)),
            time.monotonic(),
        )
        sequence = Sequence(
            request,
            variant,
            self.variant_names,
            self._quality,
            self.tokenizer,
            self.end_tokens,
        )
        self._queue.add(sequence)
        self._idle.clear()
        self._changed.set()
        if self._loop is None:
            self._loop = asyncio.create_task(self._run_steps(), name="text-scheduler")
        return sequence

    def _remove(self, sequence: Sequence) -> None:
        self._queue.remove(sequence)
        self._changed.set()
        if self._queue.empty:
            self._idle.set()

    def _fail(self, sequences: abc.Iterable[Sequence], error: RequestError) -> None:
        for sequence in sequences:
            if not sequence.ended:
                sequence.fail(error)
            self._remove(sequence)

    def _fail_all(self, error: RequestError) -> None:
        self._fail([*self._queue.active, *self._queue.waiting], error)
