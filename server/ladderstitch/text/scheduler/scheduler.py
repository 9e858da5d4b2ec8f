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
    NonFiniteOutput,
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
from ladderstitch.telemetry.statistics import Statistics
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.engine.rank_handle import RankLost
from ladderstitch.text.grammars import GrammarCompiler
from ladderstitch.text.messages import LogitsMode, SequenceInput, Step
from ladderstitch.text.scheduler.block_manager import BlockManager
from ladderstitch.text.scheduler.cache_changes import CacheChanges
from ladderstitch.text.scheduler.cache_rules import CacheRules
from ladderstitch.text.scheduler.decode_load import NO_LOAD, DecodeLoad, first_token_s
from ladderstitch.text.scheduler.guarded_observer import GuardedObserver
from ladderstitch.text.scheduler.planner import (
    ExecutedStep,
    ScheduledChunk,
    StepPlan,
    choose_variant,
    plan_step,
)
from ladderstitch.text.scheduler.queue import SequenceQueue
from ladderstitch.text.scheduler.sampler import non_finite_output
from ladderstitch.text.scheduler.sequence import Sequence
from ladderstitch.text.scheduler.step_times import StepTimes, measure_steps, placeholder_profile
from ladderstitch.text.scheduler.supervised_loop import SupervisedLoop
from ladderstitch.text.scheduler.token_stream import TokenStream
from ladderstitch.text.scheduler.variant_changes import ChangeRules
from ladderstitch.text.switches import SwitchTable
from ladderstitch.text.tokenizer import TextTokenizer

log = logging.getLogger(__name__)

MAX_RANK_LOSSES = 8
"""Rank losses that one sequence survives; more than these are not a coincidence."""
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
        self._last_step: tuple[int, float] | None = None
        """Sequences and end of the step just before; None after a pause without work."""
        self._by_name, self.draining = frozenset(by_name), False
        self.statistics = Statistics()
        self._queue = make_queue(self.block_manager, max_sequences)
        self._cache_changes = CacheChanges(self.cache_rules, self._queue)
        self._plan: StepPlan | None = None
        self._apart: list[Sequence] = []
        """Sequences of a step that failed, which run one by one until one of them fails alone."""
        self._quality, self._observer = quality, observer or NullObserver()
        self._guarded = GuardedObserver(self._observer)
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
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
        return len(self._queue.waiting)

    @property
    def num_running(self) -> int:
        """The number of requests that hold blocks."""
        return len(self._queue.active)

    @property
    def kv_cache_usage(self) -> float:
        """The share of the cache's blocks that sequences hold, 0 to 1."""
        return self.block_manager.num_used / self.block_manager.num_blocks

    @property
    def occupancy(self) -> Occupancy:
        """The numbers of requests, and the share of the cache in use."""
        return Occupancy(self.num_waiting, self.num_running, self.kv_cache_usage)

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
        return TokenStream(sequence, self._remove, self._guarded, self.statistics)

    async def drain(self) -> None:
        """Reject new requests, and return when all accepted ones have ended."""
        self.draining = True
        await self._idle.wait()

    async def close(self) -> None:
        """Stop computing; answers in progress end with `Draining`."""
        self.draining = True
        await self._loop.stop()
        self._fail_all(Draining("the replica is shutting down"))

    async def step(self) -> bool:
        """Run one step: change variants, admit, plan, make room, execute, deliver, observe, repair.

        Return False, without a step, if no sequence is active. Raises `RankLost` if a rank died,
        and `InternalError` if the forward pass failed.
        """
        self._plan = None
        now = time.monotonic()
        self._change_variants(now)
        self._queue.admit(self.times, now)
        wanted = plan_step(self._next_sequences(), self.times, now)
        if wanted is None:
            return False
        self._plan = self._make_room(wanted)
        executed = await self._execute(self._plan)
        if executed is not None:
            self._deliver(executed)
            self._observe(executed)
            await self._repair()
        return True

    async def _run_steps(self) -> None:
        """Run steps forever; if one fails, its sequences resume or end with an error."""
        while True:
            try:
                is_idle = not await self.step()
                self._loop.report_progress()
                if is_idle:
                    self._last_step = None
                    self._changed.clear()
                    await self._changed.wait()
            except RankLost as error:
                await self._recover(error)
            except Exception as error:
                self._fail_step(error)

    def _next_sequences(self) -> list[Sequence]:
        """Return the sequences of which the next step takes some: all active ones.

        After a step of several sequences failed, each of them runs alone, so that one of them
        cannot make the others fail.
        """
        self._apart = [sequence for sequence in self._apart if not sequence.ended]
        apart = [sequence for sequence in self._apart if sequence in self._queue.active]
        return apart[:1] or self._queue.active

    def _fail_step(self, error: Exception) -> None:
        """End the sequence of a step that failed; several ones run again, each of them alone."""
        if self._plan is None:
            sequences = [*self._queue.active, *self._queue.waiting]
        else:
            sequences = [s for s in self._plan.sequences if not s.ended]
        if self._plan is not None and len(sequences) > 1:
            log.warning("a step of sequences=%d failed; each runs alone: %s", len(sequences), error)
            self._apart = sequences
        else:
            self._fail(sequences, _request_error("a step failed", error))

    def _change_variants(self, now: float) -> None:
        """Move decoding sequences to the variants that their budgets allow from now on."""
        changes = self._change_rules.plan(self._queue.active, self.times, now)
        for change in changes:
            self._cache_changes.change(change.sequence, change.variant, self.settings.cache_mode)
        if changes:
            self._guarded.observe_variant_changes(len(changes))

    async def _repair(self) -> None:
        """Compute translated keys and values again while every sequence can afford to wait."""
        if self.settings.cache_mode != "anytime":
            return
        repair = self._cache_changes.next_repair(self.times, time.monotonic())
        if repair is None:
            return
        sequence, tokens = repair.sequence, repair.tokens
        self._plan = StepPlan(sequence.variant, (ScheduledChunk(sequence, len(tokens.tokens)),))
        self._last_step, started_at = None, time.monotonic()
        output = await self.group.run(Step((tokens,), sequence.variant, repair.planned_s))
        self._guarded.observe_repair(len(tokens.tokens), time.monotonic() - started_at)
        if output.non_finite:
            self._fail([sequence], non_finite_output())
        elif not sequence.ended:
            sequence.mark_repaired(tokens)

    def _make_room(self, wanted: StepPlan) -> StepPlan:
        plan, num_preempted = self._queue.make_room(wanted, self.times)
        if num_preempted:
            self._guarded.observe_preemptions(num_preempted)
        return plan

    async def _execute(self, plan: StepPlan) -> ExecutedStep | None:
        """Run a step and return its output; None if none of its sequences can take part."""
        chunks: list[ScheduledChunk] = []
        inputs: list[SequenceInput] = []
        for chunk in plan.chunks:
            try:
                inputs.append(chunk.sequence.next_input(chunk.num_tokens))
                chunks.append(chunk)
            except Exception as error:
                self._fail([chunk.sequence], _request_error("a sequence has no input", error))
        if not chunks:
            return None
        plan = StepPlan(plan.variant, tuple(chunks))
        num_cached = sum(chunk.sequence.history.num_tokens for chunk in chunks)
        planned_s = self.times.expected(plan.variant, plan.num_tokens, len(chunks), num_cached)
        translations = tuple(t for c in chunks for t in c.sequence.next_translations())
        planned_s += self._cache_changes.translation_s(translations, self.times)
        step = Step(
            tuple(inputs),
            plan.variant,
            planned_s,
            translations,
            self.settings.cache_mode == "write-through" and self.cache_rules.translates,
        )
        started_at = time.monotonic()
        output = await self.group.run(step)
        return ExecutedStep(plan, step, num_cached, output, started_at, time.monotonic())

    def _deliver(self, executed: ExecutedStep) -> None:
        """Append the new tokens to their sequences; remove the sequences that end or fail."""
        best, logits, num_rows = iter(executed.output.best.tolist()), executed.output.logits, 0
        both = zip(executed.plan.chunks, executed.step.inputs, strict=True)
        write_through: list[int] = []
        if executed.step.write_through:
            write_through = self.cache_rules.other_kinds(executed.plan.variant)
        for number, (chunk, step_input) in enumerate(both):
            token = next(best) if step_input.logits_mode == LogitsMode.BEST else None
            rows = logits[num_rows : num_rows + step_input.num_logits]
            num_rows += step_input.num_logits
            sequence = chunk.sequence
            if sequence in self._apart:
                self._apart.remove(sequence)
            if sequence.ended:  # its caller left during the step
                continue
            try:
                if number in executed.output.non_finite:
                    raise non_finite_output()  # its blocks are not cached for others
                sequence.mark_computed(self.block_manager, chunk.num_tokens, write_through)
                if step_input.logits_mode != LogitsMode.NONE:
                    sequence.append_token(token, rows if len(rows) else None, executed.ended_at)
            except Exception as error:
                self._fail([sequence], _request_error("a sequence failed", error))
            if sequence.ended:
                self._remove(sequence)

    def _observe(self, executed: ExecutedStep) -> None:
        plan, seconds = executed.plan, executed.ended_at - executed.started_at
        num_sequences = len(plan.chunks)
        translations = executed.step.translations
        self._guarded.observe_translation(sum(len(t.tokens) for t in translations))
        translation_s = self._cache_changes.translation_s(translations, self.times)
        if any(part.logits_mode == LogitsMode.ALL for part in executed.step.inputs):
            self._guarded.observe_occupancy(self.occupancy)
            return  # logits of all tokens take longer than other steps do
        seconds = max(seconds - translation_s, 0.1 * seconds)
        if self._last_step is not None:
            before, ended_at = self._last_step
            self.times.observe_gap(before, executed.started_at - ended_at)
        self._last_step = num_sequences, executed.ended_at
        error = self.times.observe(
            plan.variant, plan.num_tokens, num_sequences, executed.num_cached, seconds
        )
        view = self.times.latency.view
        self._guarded.observe_step(
            StepReport(plan.variant, num_sequences, seconds, error, view.slowdown, view.tail),
            self.occupancy,
        )

    async def _recover(self, error: RankLost) -> None:
        """Wait until all ranks are ready; the caches are lost, so all sequences start over."""
        log.warning("rank lost, active_sequences=%d: %s", self.num_running, error)
        self._queue.reset_all()
        exhausted = [s for s in self._queue.waiting if s.num_rank_losses > MAX_RANK_LOSSES]
        self._fail(exhausted, EngineRestarting(f"too many ranks were lost: {error}"))
        self._guarded.observe_occupancy(self.occupancy)
        try:
            await self.group.wait_ready()
        except EngineRestarting as failure:
            self._fail_all(failure)

    def _resume(self, error: BaseException) -> None:
        """Prepare all sequences for a loop that starts again after an unexpected end."""
        failure = InternalError.logged("the scheduler's loop ended and is started again", error)
        self._guarded.observe_restart()
        self._apart = []
        try:
            self._queue.reset_all()
            if self._loop.ends_in_row > 1:
                self._fail_all(failure)
        except Exception:
            log.exception("the sequences cannot be resumed")
            for sequence in self._queue.abandon_all():
                if not sequence.ended:
                    sequence.fail(failure)
            self._idle.set()
        self._guarded.observe_occupancy(self.occupancy)

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
        self._queue.add(sequence)
        self._idle.clear()
        self._changed.set()
        self._guarded.observe_occupancy(self.occupancy)
        self._loop.start()
        return sequence

    def _remove(self, sequence: Sequence) -> None:
        self._queue.remove(sequence)
        self._changed.set()
        if self._queue.empty:
            self._idle.set()
        self._guarded.observe_occupancy(self.occupancy)

    def _fail(self, sequences: abc.Iterable[Sequence], error: RequestError) -> None:
        for sequence in sequences:
            if not sequence.ended:
                sequence.fail(error)
                if isinstance(error, NonFiniteOutput):
                    self._guarded.observe_non_finite()
            self._remove(sequence)

    def _fail_all(self, error: RequestError) -> None:
        self._fail([*self._queue.active, *self._queue.waiting], error)


def _request_error(what: str, error: Exception) -> RequestError:
    """Return the error for the caller; log one that no caller is meant to see."""
    return error if isinstance(error, RequestError) else InternalError.logged(what, error)
