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
    InvalidArgument,
    RequestError,
)
from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.generation import GenerationRequest
from ladderstitch.scheduling.load_report import HORIZONS_S, LoadReport
from ladderstitch.scheduling.profiles import QualityTable
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.statistics import Statistics
from ladderstitch.telemetry.text_observer import NullObserver, Occupancy, TextObserver
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.engine.rank_handle import RankLost
from ladderstitch.text.grammars import GrammarCompiler
from ladderstitch.text.scheduler.block_manager import BlockManager
from ladderstitch.text.scheduler.cache_changes import CacheChanges
from ladderstitch.text.scheduler.cache_rules import CacheRules
from ladderstitch.text.scheduler.decode_load import NO_LOAD, DecodeLoad, first_token_s
from ladderstitch.text.scheduler.failure_recovery import FailureRecovery
from ladderstitch.text.scheduler.guarded_observer import GuardedObserver
from ladderstitch.text.scheduler.in_flight import InFlightSequences
from ladderstitch.text.scheduler.planner import (
    StepPlan,
    choose_variant,
    plan_step,
)
from ladderstitch.text.scheduler.queue import SequenceQueue
from ladderstitch.text.scheduler.sequence import Sequence
from ladderstitch.text.scheduler.step_runner import StepRunner
from ladderstitch.text.scheduler.step_times import StepTimes, measure_steps, placeholder_profile
from ladderstitch.text.scheduler.supervised_loop import SupervisedLoop
from ladderstitch.text.scheduler.token_stream import TokenStream
from ladderstitch.text.scheduler.variant_changes import ChangeRules
from ladderstitch.text.switches import SwitchTable
from ladderstitch.text.tokenizer import TextTokenizer

log = logging.getLogger(__name__)

MAX_ENDS_IN_ROW = 5
"""Unexpected ends of the loop, with no progress in between, after which the model is not alive."""
LOAD_REPORT_TOKENS = 32
"""Prompt and answer length assumed when reporting load."""


class TextScheduler:
    """The scheduler of one group of ranks, with at most `max_sequences` active sequences.

    What fails in one sequence ends that sequence only. If the loop of steps ends for another
    reason, it is started again, and the sequences are computed again from their tokens. If it ends
    again before it has made progress, they end with an error.
    """

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
        switches: SwitchTable | None = None,
        by_name: abc.Collection[int] = (),
    ) -> None:
        """Only requests that name a variant in `by_name` are answered with it."""
        config = group.rank_config
        self.cache_rules = CacheRules.of(config, switches, quality)
        self.group, self.tokenizer = group, tokenizer
        self.end_tokens = frozenset(end_tokens)
        self.grammars = GrammarCompiler(tokenizer, self.end_tokens)
        self.variant_names = tuple(variant_names) or tuple(path.scheme for path in config.paths)
        self.block_manager = BlockManager(config.blocks, config.block_tokens)
        self.times = StepTimes(placeholder_profile(len(config.paths), config.max_batched_tokens))
        self._by_name, self.draining = frozenset(by_name), False
        self.statistics = Statistics()
        self._queue = make_queue(self.block_manager, max_sequences)
        self._quality, self._observer = quality, observer or NullObserver()
        self._guarded = GuardedObserver(self._observer)
        self._in_flight = InFlightSequences(self._queue, self._guarded)
        changes = CacheChanges(self.cache_rules, self._queue)
        self._runner = StepRunner(group, self._in_flight, changes, self._guarded)
        self._recovery = FailureRecovery(group, self._in_flight, self._guarded)
        self._loop = SupervisedLoop(self._run_steps, self._resume, "text-scheduler")
        self.apply_settings(SchedulerSettings())

    @property
    def max_tokens(self) -> int:
        """The largest number of tokens of a prompt and its answer together."""
        cached_tokens = self.block_manager.num_blocks * self.block_manager.block_tokens
        return min(self.group.rank_config.max_model_len, cached_tokens)

    @property
    def num_waiting(self) -> int:
        """The number of requests without blocks."""
        return self._in_flight.num_waiting

    @property
    def num_running(self) -> int:
        """The number of requests that hold blocks."""
        return self._in_flight.num_running

    @property
    def occupancy(self) -> Occupancy:
        """The numbers of requests, and the share of the cache's blocks in use."""
        return self._in_flight.occupancy

    @property
    def healthy(self) -> bool:
        """Whether the loop runs; false from an unexpected end until it has made progress."""
        return not self._loop.failing

    @property
    def alive(self) -> bool:
        """Whether the loop makes progress, or has not failed to for long."""
        return self._loop.ends_in_row < MAX_ENDS_IN_ROW

    def load_report(self) -> LoadReport:
        """Return the seconds that a short answer takes longer now than without load."""
        variant = self.candidates.for_quality()[0]
        load = self._queue.load(self.times, time.monotonic())
        shared_s, alone_s = (
            first_token_s(variant, LOAD_REPORT_TOKENS, others, self.times)
            + DecodeLoad(others, self.times).token_s_with(variant) * (LOAD_REPORT_TOKENS - 1)
            for others in (load, NO_LOAD)
        )
        request_s = self.times.prefill_s(variant, LOAD_REPORT_TOKENS)
        return LoadReport((shared_s - alone_s,) * len(HORIZONS_S), request_s)

    async def measure(self) -> None:
        """Measure the duration of steps, and prepare grammars, before the first request.

        Raises `RankLost` if a rank died.
        """
        self.times = await measure_steps(self.group, self.group.rank_config.max_batched_tokens)
        self.apply_settings(self.settings)
        await asyncio.to_thread(self.grammars.prepare)

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
        best = max(quality[variant] for variant in variants if variant not in self._by_name)
        if settings.min_quality > best:
            raise InvalidArgument(
                "min_quality",
                f"expected at most {best:.4f}, the best variant's, got {settings.min_quality}",
            )
        self.settings = settings
        latency = self.times.latency
        latency.set_probability(settings.attainment_probability)
        self.candidates = CandidateFilter.from_settings(
            quality, latency.profile, settings, self._by_name
        )
        self._change_rules = ChangeRules(self.cache_rules, self.candidates, settings)

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
            self._guarded.observe_rejection(error.code, had_budget=request.budget.is_set)
            raise
        return TokenStream(sequence, self._in_flight.remove, self._guarded, self.statistics)

    async def drain(self) -> None:
        """Reject new requests, and return when all accepted ones have ended."""
        self.draining = True
        await self._in_flight.wait_idle()

    async def close(self) -> None:
        """Stop computing; answers in progress end with `Draining`."""
        self.draining = True
        await self._loop.stop()
        self._in_flight.fail_all(Draining("the replica is shutting down"))

    async def step(self) -> bool:
        """Run one step: change variants, admit, plan, make room, execute, deliver, observe, repair.

        Return False, without a step, if no sequence is active. Raises `RankLost` if a rank died,
        and `InternalError` if the forward pass failed.
        """
        self._runner.plan = None
        now = time.monotonic()
        self._change_variants(now)
        self._queue.admit(self.times, now)
        wanted = plan_step(self._recovery.next_sequences(), self.times, now)
        if wanted is None:
            return False
        plan = self._runner.plan = self._make_room(wanted)
        executed = await self._runner.execute(plan, self.times, self.settings.cache_mode)
        if executed is not None:
            self._recovery.mark_executed(executed.plan.sequences)
            self._runner.deliver(executed)
            self._runner.observe(executed, self.times)
            if self.settings.cache_mode == "anytime":
                await self._runner.repair(self.times)
        return True

    async def _run_steps(self) -> None:
        """Run steps forever; if one fails, its sequences resume or end with an error."""
        while True:
            try:
                is_idle = not await self.step()
                self._loop.report_progress()
                if is_idle:
                    self._runner.mark_pause()
                    self._in_flight.changed.clear()
                    await self._in_flight.changed.wait()
            except RankLost as error:
                await self._recovery.wait_for_ranks(error)
            except Exception as error:
                self._recovery.fail_step(error, self._runner.plan)

    def _resume(self, error: BaseException) -> None:
        self._recovery.resume(error, self._loop.ends_in_row)

    def _change_variants(self, now: float) -> None:
        """Move decoding sequences to the variants that their budgets allow from now on."""
        changes = self._change_rules.plan(self._queue.active, self.times, now)
        for change in changes:
            self._runner.cache_changes.change(
                change.sequence, change.variant, self.settings.cache_mode
            )
        if changes:
            self._guarded.observe_variant_changes(len(changes))

    def _make_room(self, wanted: StepPlan) -> StepPlan:
        plan, num_preempted = self._queue.make_room(wanted, self.times)
        if num_preempted:
            self._guarded.observe_preemptions(num_preempted)
        return plan

    def _submit(self, request: GenerationRequest) -> Sequence:
        """Add a request to the queue; raise a `RequestError` if it cannot be accepted."""
        if self.draining:
            raise Draining("the replica is shutting down")
        request.check(self.group.rank_config.model.vocab_size, self.max_tokens)
        now = time.monotonic()
        variant = choose_variant(
            request,
            self.candidates,
            self.settings,
            self.times,
            self._queue.load(self.times, now),
            self._queue.cached_tokens(request, len(self.variant_names)),
            now,
        )
        sequence = Sequence(
            request,
            variant,
            self.variant_names,
            self._quality,
            self.tokenizer,
            self.end_tokens,
            self.cache_rules,
        )
        self._in_flight.add(sequence)
        self._loop.start()
        return sequence
