"""One answer in progress: its tokens and cache blocks, and the stream that its caller reads."""

from __future__ import annotations

import asyncio
import math
import time
from collections import abc
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ladderstitch.errors import (
    ExpiredInCompute,
    ExpiredInQueue,
    NonFiniteOutput,
    RequestError,
)
from ladderstitch.scheduling.profiles import Quality, QualityTable
from ladderstitch.scheduling.requests import (
    CacheUse,
    FinishReason,
    GenerationInfo,
    GenerationRequest,
    GenerationUsage,
    Sampling,
    TokenChunk,
    TokenSpan,
)
from ladderstitch.telemetry.model_metrics import NullObserver, TextObserver
from ladderstitch.telemetry.statistics import Statistics
from ladderstitch.text.messages import Logits, LogitsMode, SequenceInput, Translation
from ladderstitch.text.scheduler.block_manager import BlockManager, BlockTable
from ladderstitch.text.scheduler.cache_history import CacheHistory
from ladderstitch.text.scheduler.cache_rules import CacheRules
from ladderstitch.text.scheduler.step_times import token_deadline
from ladderstitch.text.tokenizer import StoppableText, TextStream, TextTokenizer

PACE_TOKENS = 16
"""Tokens in which an answer catches up with its budget per token, or uses up its lead."""


class Sequence:
    """A request with the tokens of its prompt and of its answer so far.

    A sequence that lost its blocks, to another sequence or because a rank died, is computed again
    from its tokens and resumes. `variant` computes its next tokens and may change between them.
    """

    def __init__(
        self,
        request: GenerationRequest,
        variant: int,
        names: abc.Sequence[str],
        quality: QualityTable | None,
        tokenizer: TextTokenizer,
        end_tokens: abc.Collection[int],
        cache_rules: CacheRules,
    ) -> None:
        self.request, self.variant = request, variant
        self.history = CacheHistory()
        self._rules, self._span_start = cache_rules, TokenSpan(variant, names[variant], 0)
        self.tokens = list(request.tokens)
        self.block_table = BlockTable()
        self.num_rank_losses = 0
        self.first_token_at: float | None = None
        self.ended = False
        self._names, self._quality = names, quality
        self._spans: tuple[TokenSpan, ...] = ()
        self._end_tokens = end_tokens
        self._sampler = Sampler(request.sampling)
        self._text = StoppableText(TextStream(tokenizer, request.tokens), request.stop)
        self._started_at: float | None = None
        self._num_reused = 0
        self._chunks: asyncio.Queue[TokenChunk | RequestError] = asyncio.Queue()

    @property
    def num_pending(self) -> int:
        """The number of tokens that are still to be computed; 1 while decoding."""
        return len(self.tokens) - self.block_table.num_computed

    @property
    def num_generated(self) -> int:
        """The number of tokens of the answer so far."""
        return len(self.tokens) - len(self.request.tokens)

    @property
    def started(self) -> bool:
        """Whether it has ever held blocks."""
        return self._started_at is not None

    def token_deadline(self, token_s: float) -> float:
        """Return the instant until which the next token is needed; one takes `token_s` or more."""
        request = self.request
        return token_deadline(
            request.budget,
            request.arrival,
            self.first_token_at,
            self.num_generated,
            request.max_tokens,
            token_s,
        )

    def affordable_token_s(self, now: float) -> float:
        """Return the seconds that each of the next tokens may take within the budgets.

        Time that the answer is behind or ahead of its budget per token is spread over
        `PACE_TOKENS` tokens. Infinite without a budget, negative if it can no longer be met.
        """
        budget, left = self.request.budget, self.request.max_tokens - self.num_generated
        token_s = (self.request.arrival + budget.answer_s - now) / max(1, left)
        if self.first_token_at is not None and not math.isinf(budget.per_token_s):
            ahead_s = self.first_token_at + (self.num_generated - 1) * budget.per_token_s - now
            token_s = min(token_s, budget.per_token_s + ahead_s / min(max(1, left), PACE_TOKENS))
        return token_s

    @property
    def kind(self) -> int:
        """The kind of its variant (`CacheRules`)."""
        return self._rules.kinds[self.variant]

    def change_variant(self, variant: int, cache: CacheUse) -> None:
        """Compute the next tokens on another variant; `cache` says how the cache is made to fit.

        Blocks that are filled from now on hold a mixture, and are not cached for others.
        """
        is_exact = cache in ("caught-up", "recomputed")
        penalty = 0.0 if is_exact else self._rules.penalty_nats(self.variant, variant)
        self._span_start = TokenSpan(variant, self._names[variant], 0, cache, penalty)
        self.variant = variant
        self.block_table.stop_caching()

    def allocate_blocks(self, block_manager: BlockManager, now: float) -> bool:
        """Allocate blocks for all tokens, cached ones first; return False if too few are free."""
        namespace_id = block_manager.namespace((self.variant, self.request.tenant))
        if not self.block_table.allocate(block_manager, namespace_id, self.tokens):
            return False
        self.history.clear()
        self.history.append(self.kind, self.block_table.num_computed)
        if self._started_at is None:
            self._started_at, self._num_reused = now, self.block_table.num_computed
        return True

    def next_input(self, num_tokens: int) -> SequenceInput:
        """Return the next `num_tokens` pending tokens as an input of a step."""
        start = self.block_table.num_computed
        end = start + num_tokens
        mode = self._logits_mode() if end == len(self.tokens) else LogitsMode.NONE
        return SequenceInput(self.tokens[start:end], start, self.block_table.blocks, mode)

    def next_translations(self) -> list[Translation]:
        """Return the cached tokens that its variant lacks, for the next step to translate."""
        return [
            Translation(
                self.tokens[span.start : span.end],
                span.start,
                self.block_table.blocks,
                span.path,
                self.variant,
            )
            for span in self.history.missing(self.kind)
            if self._rules.num_missing[span.path][self.variant]
        ]

    def mark_computed(
        self, block_manager: BlockManager, num_tokens: int, write_through: abc.Sequence[int]
    ) -> None:
        """Record a step that computed `num_tokens` more tokens, after its translations.

        `write_through` are the other kinds for which it translated the new tokens.
        """
        self.history.complete(self.kind)
        self.history.append(self.kind, num_tokens, write_through)
        self.block_table.mark_computed(block_manager, self.tokens, num_tokens)

    def next_repair(self, num_tokens: int) -> SequenceInput | None:
        """Return up to `num_tokens` tokens for its variant to compute again; None: none.

        They are the first ones whose keys and values are not those of the variant alone.
        """
        begin = self.history.num_exact(self.kind)
        end = min(begin + num_tokens, self.history.num_tokens)
        if begin >= end:
            return None
        return SequenceInput(
            self.tokens[begin:end], begin, self.block_table.blocks, LogitsMode.NONE
        )

    def mark_repaired(self, repaired: SequenceInput) -> None:
        """Record that a step computed the tokens of `next_repair`."""
        sharing = self._rules.sharing[self.variant]
        self.history.repair(self.kind, len(repaired.tokens), sharing)

    def rewind(self, num_tokens: int) -> None:
        """Forget all cached tokens from number `num_tokens` on, which are then computed again."""
        self.history.truncate(num_tokens)
        self.block_table.num_computed = num_tokens

    def append_token(self, best: int | None, logits: Logits | None, now: float) -> None:
        """Append `best`, or a token sampled from logits [V], and hand its chunk to the caller.

        The sequence ends if the token is an end token, completes a stop string or is the last one
        that the request allows. Raises `NonFiniteOutput` if a logit is infinite or NaN.
        """
        token = best if best is not None else self._sample(logits)
        if self.first_token_at is None:
            self.first_token_at = now
        index = self.num_generated
        self.tokens.append(token)
        self._count_token()
        is_end_token = token in self._end_tokens
        text = "" if is_end_token else self._text.add(token)
        finish: FinishReason | None = None
        if is_end_token or self._text.stopped:
            finish = "stop"
        elif index + 1 == self.request.max_tokens:
            finish = "length"
        if finish is not None:
            text += self._text.finish()
            self.ended = True
        logprob, alternatives = self._log_probabilities(token, logits)
        self._chunks.put_nowait(
            TokenChunk(index, token, text, self._info(), finish, logprob, alternatives)
        )

    def fail(self, error: RequestError) -> None:
        """End the answer with an error."""
        self.ended = True
        self._chunks.put_nowait(error)

    async def next_chunk(self) -> TokenChunk:
        """Return the next chunk; raise the `RequestError` that the answer ended with."""
        chunk = await self._chunks.get()
        if isinstance(chunk, RequestError):
            raise chunk
        return chunk

    def _logits_mode(self) -> LogitsMode:
        greedy = self.request.sampling.temperature == 0 and self.request.logprobs is None
        return LogitsMode.BEST if greedy else LogitsMode.LAST

    def _info(self) -> GenerationInfo:
        assert self._started_at is not None, "set when its blocks were allocated"
        queue_s = self._started_at - self.request.arrival
        quality = None
        if (table := self._quality) is not None:
            counts = [(table.variants[span.variant], span.num_tokens) for span in self._spans]
            quality = Quality.mean(counts)
        return GenerationInfo(self._spans, quality, queue_s, self._num_reused)

    def _count_token(self) -> None:
        """Add a token to the last span, or begin a span if the variant has changed."""
        *earlier, last = self._spans or (self._span_start,)
        if last.variant != self.variant:
            earlier, last = list(self._spans), self._span_start
        self._spans = (*earlier, replace(last, num_tokens=last.num_tokens + 1))

    def _sample(self, logits: Logits | None) -> int:
        assert logits is not None, "the logits mode is LAST"
        return self._sampler.pick(logits)

    def _log_probabilities(
        self, token: int, logits: Logits | None
    ) -> tuple[float | None, tuple[tuple[int, float], ...]]:
        """Return the token's natural log probability, and the likeliest (token, value) pairs."""
        if self.request.logprobs is None or logits is None:
            return None, ()
        shifted = logits.astype(np.float64) - logits.max()
        values = shifted - np.log(np.exp(shifted).sum())
        k = min(self.request.logprobs, len(values))
        top = np.argpartition(-values, k - 1)[:k] if k else np.array([], np.int64)
        top = top[np.argsort(-values[top], kind="stable")]
        return float(values[token]), tuple((int(t), float(values[t])) for t in top)


def non_finite_output() -> NonFiniteOutput:
    """Return the error of a sequence whose keys, values or logits are not finite."""
    return NonFiniteOutput(
        "the model's logits or cached values for this request are infinite or NaN: the prompt or "
        "the weights exceed the range of its number format"
    )


class Sampler:
    """The token source of one answer; two samplers with the same seed pick the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def pick(self, logits: NDArray[np.float32]) -> int:
        """Return a token id, picked from logits [V].

        Raises `NonFiniteOutput` if a logit is infinite or NaN.
        """
        if not np.isfinite(logits).all():
            raise non_finite_output()
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        # The largest is 0, so that no temperature, however low, makes NaN: others become -inf.
        shifted = logits.astype(np.float64) - float(logits.max())
        with np.errstate(over="ignore", under="ignore"):
            scaled = shifted / self.sampling.temperature
            kept = self._candidates(scaled)
            powers = np.exp(scaled[kept])
        return int(self._random.choice(kept, p=powers / powers.sum()))

    def _candidates(self, scaled: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the `top_k` most likely tokens, cut off at `top_p` of their probability mass.

        The largest of `scaled` is 0. The tokens are in order of falling probability unless all of
        them are kept.
        """
        k = min(self.sampling.top_k or len(scaled), len(scaled))
        if k == len(scaled) and self.sampling.top_p == 1:
            return np.arange(len(scaled))
        best = np.argpartition(-scaled, k - 1)[:k]
        best = best[np.argsort(-scaled[best], kind="stable")]
        powers = np.exp(scaled[best])
        mass_before = np.cumsum(powers) - powers
        return best[mass_before < self.sampling.top_p * powers.sum()]


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
