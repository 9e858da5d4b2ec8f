"""The run of a planned step: input from its sequences, tokens to them, and its observation."""

from __future__ import annotations

import time

from ladderstitch.scheduling.settings import CacheMode
from ladderstitch.telemetry.text_observer import StepReport
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.messages import LogitsMode, SequenceInput, Step
from ladderstitch.text.scheduler.cache_changes import CacheChanges
from ladderstitch.text.scheduler.guarded_observer import GuardedObserver
from ladderstitch.text.scheduler.in_flight import InFlightSequences
from ladderstitch.text.scheduler.planner import ExecutedStep, ScheduledChunk, StepPlan
from ladderstitch.text.scheduler.sampler import non_finite_output
from ladderstitch.text.scheduler.step_times import StepTimes


class StepRunner:
    """The steps of a text scheduler on its group of ranks.

    `plan` is the plan of the step or repair in progress; None before one is planned.
    """

    def __init__(
        self,
        group: RankGroup,
        in_flight: InFlightSequences,
        cache_changes: CacheChanges,
        observer: GuardedObserver,
    ) -> None:
        self._group, self._in_flight, self._observer = group, in_flight, observer
        self.cache_changes = cache_changes
        self.plan: StepPlan | None = None
        self._last_step: tuple[int, float] | None = None
        """Sequences and end of the step just before; None after a pause without work."""

    def mark_pause(self) -> None:
        """Do not count the time until the next step as a gap between steps."""
        self._last_step = None

    async def execute(
        self, plan: StepPlan, times: StepTimes, cache_mode: CacheMode
    ) -> ExecutedStep | None:
        """Run a step and return its output; None if none of its sequences can take part.

        Raises what `RankGroup.run` raises.
        """
        chunks, inputs = self._take_inputs(plan)
        if not chunks:
            return None
        plan = StepPlan(plan.variant, tuple(chunks))
        num_cached = sum(chunk.sequence.history.num_tokens for chunk in chunks)
        planned_s = times.expected(plan.variant, plan.num_tokens, len(chunks), num_cached)
        translations = tuple(t for c in chunks for t in c.sequence.next_translations())
        planned_s += self.cache_changes.translation_s(translations, times)
        step = Step(
            tuple(inputs),
            plan.variant,
            planned_s,
            translations,
            cache_mode == "write-through" and self.cache_changes.rules.translates,
        )
        started_at = time.monotonic()
        output = await self._group.run(step)
        return ExecutedStep(plan, step, num_cached, output, started_at, time.monotonic())

    def _take_inputs(self, plan: StepPlan) -> tuple[list[ScheduledChunk], list[SequenceInput]]:
        """Return the chunks of a plan with their inputs; sequences without an input end."""
        chunks: list[ScheduledChunk] = []
        inputs: list[SequenceInput] = []
        for chunk in plan.chunks:
            try:
                inputs.append(chunk.sequence.next_input(chunk.num_tokens))
                chunks.append(chunk)
            except Exception as error:
                self._in_flight.fail_by(error, [chunk.sequence], "a sequence has no input")
        return chunks, inputs

    def deliver(self, executed: ExecutedStep) -> None:
        """Append the new tokens to their sequences; remove the sequences that end or fail."""
        best, logits, num_rows = iter(executed.output.best.tolist()), executed.output.logits, 0
        both = zip(executed.plan.chunks, executed.step.inputs, strict=True)
        write_through: list[int] = []
        if executed.step.write_through:
            write_through = self.cache_changes.rules.other_kinds(executed.plan.variant)
        for number, (chunk, step_input) in enumerate(both):
            token = next(best) if step_input.logits_mode == LogitsMode.BEST else None
            rows = logits[num_rows : num_rows + step_input.num_logits]
            num_rows += step_input.num_logits
            sequence, blocks = chunk.sequence, self._in_flight.queue.block_manager
            if sequence.ended:  # its caller left during the step
                continue
            try:
                if number in executed.output.non_finite:
                    raise non_finite_output()  # its blocks are not cached for others
                sequence.mark_computed(blocks, chunk.num_tokens, write_through)
                if step_input.logits_mode != LogitsMode.NONE:
                    sequence.append_token(token, rows if len(rows) else None, executed.ended_at)
            except Exception as error:
                self._in_flight.fail_by(error, [sequence], "a sequence failed")
            if sequence.ended:
                self._in_flight.remove(sequence)

    def observe(self, executed: ExecutedStep, times: StepTimes) -> None:
        """Let `times` learn from a step, and report it."""
        plan, seconds = executed.plan, executed.ended_at - executed.started_at
        num_sequences = len(plan.chunks)
        translations = executed.step.translations
        self._observer.observe_translation(sum(len(t.tokens) for t in translations))
        translation_s = self.cache_changes.translation_s(translations, times)
        if any(part.logits_mode == LogitsMode.ALL for part in executed.step.inputs):
            self._in_flight.report()
            return  # logits of all tokens take longer than other steps do
        seconds = max(seconds - translation_s, 0.1 * seconds)
        if self._last_step is not None:
            before, ended_at = self._last_step
            times.observe_gap(before, executed.started_at - ended_at)
        self._last_step = num_sequences, executed.ended_at
        error = times.observe(
            plan.variant, plan.num_tokens, num_sequences, executed.num_cached, seconds
        )
        view = times.latency.view
        self._observer.observe_step(
            StepReport(plan.variant, num_sequences, seconds, error, view.slowdown, view.tail),
            self._in_flight.occupancy,
        )

    async def repair(self, times: StepTimes) -> None:
        """Compute translated keys and values again if every sequence can afford to wait.

        Raises what `RankGroup.run` raises.
        """
        repair = self.cache_changes.next_repair(times, time.monotonic())
        if repair is None:
            return
        sequence, tokens = repair.sequence, repair.tokens
        self.plan = StepPlan(sequence.variant, (ScheduledChunk(sequence, len(tokens.tokens)),))
        self._last_step, started_at = None, time.monotonic()
        output = await self._group.run(Step((tokens,), sequence.variant, repair.planned_s))
        self._observer.observe_repair(len(tokens.tokens), time.monotonic() - started_at)
        if output.non_finite:
            self._in_flight.fail([sequence], non_finite_output())
        elif not sequence.ended:
            sequence.mark_repaired(tokens)
