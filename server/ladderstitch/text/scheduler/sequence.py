"""One answer in progress: its tokens and its cache blocks."""

from __future__ import annotations

import asyncio
from collections import abc
from dataclasses import replace

from ladderstitch.errors import RequestError
from ladderstitch.scheduling.generation import (
    CacheUse,
    FinishReason,
    GenerationInfo,
    GenerationRequest,
    PromptToken,
    TokenChunk,
    TokenSpan,
)
from ladderstitch.scheduling.profiles import Quality, QualityTable
from ladderstitch.text.messages import Logits, LogitsMode, SequenceInput, Translation
from ladderstitch.text.scheduler.block_manager import BlockManager, BlockTable
from ladderstitch.text.scheduler.cache_history import CacheHistory
from ladderstitch.text.scheduler.cache_rules import CacheRules
from ladderstitch.text.scheduler.pace import Pace
from ladderstitch.text.scheduler.sampler import TokenChooser, log_probabilities
from ladderstitch.text.tokenizer import StoppableText, TextStream, TextTokenizer

PROMPT_LOGPROB_TOKENS = 32
"""Tokens of a prompt whose log probabilities are computed between two steps."""


class Sequence:
    """A request with the tokens of its prompt and of its answer so far.

    A sequence that lost its blocks, to another sequence or because a rank died, is computed again
    from its tokens and resumes, as one does that another replica began (`answered`). `variant`
    computes its next tokens and may change between them.
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
        self.tokens = [*request.tokens, *request.answered]
        self.block_table = BlockTable()
        self.num_rank_losses = 0
        self.pace = Pace(request)
        self.ended = False
        self._names, self._quality = names, quality
        self._spans: tuple[TokenSpan, ...] = ()
        self._chooser = TokenChooser(request, end_tokens)
        self._text = answer_text(request, tokenizer)
        for token in request.answered:
            self._text.add(token)
        self._prompt: list[PromptToken] = []
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
        return self.pace.num_tokens

    @property
    def max_chunk_tokens(self) -> int:
        """The largest number of tokens that a step computes of it."""
        return PROMPT_LOGPROB_TOKENS if self._reports_prompt else len(self.tokens)

    @property
    def _reports_prompt(self) -> bool:
        """Whether log probabilities of tokens of the prompt are still to be computed."""
        return (
            self.request.prompt_logprobs is not None
            and len(self._prompt) < len(self.request.tokens)
            and not self.request.answered
        )

    @property
    def started(self) -> bool:
        """Whether it has ever held blocks."""
        return self._started_at is not None

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
        reuse = not self._reports_prompt
        if not self.block_table.allocate(block_manager, namespace_id, self.tokens, reuse=reuse):
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
        if self._reports_prompt:
            mode = LogitsMode.ALL
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
        """Append `best`, or a token chosen from logits [T, V], and hand its chunk to the caller.

        The logits are those after each of the T tokens that the step computed. Those of a prompt
        are recorded if its log probabilities were requested; no token follows unless the step
        computed the last one. The sequence ends if the token is an end token, completes a stop
        string or the grammar, or is the last one that the request allows. Raises `NonFiniteOutput`
        if a logit is infinite or NaN.
        """
        if self._reports_prompt and logits is not None:
            self._record_prompt(logits)
            if self.num_pending:
                return
        last = None if logits is None else logits[-1]
        token = best if best is not None else self._choose(last)
        index = self.num_generated
        self.tokens.append(token)
        self.pace.add_token(now)
        self._count_token()
        self._chooser.add(token)
        is_end_token = token in self._chooser.end_tokens
        text = "" if is_end_token else self._text.add(token)
        finish: FinishReason | None = None
        if is_end_token or self._text.stopped or self._chooser.complete:
            finish = "stop"
        elif index + 1 == self.request.max_tokens:
            finish = "length"
        if finish is not None:
            text += self._text.finish()
            self.ended = True
        logprob, alternatives = self._log_probabilities(token, last)
        prompt = tuple(self._prompt) if index == 0 else ()
        self._chunks.put_nowait(
            TokenChunk(
                index, token, text, self._info(), finish, logprob, alternatives, prompt=prompt
            )
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
        needs_logits = self._chooser.needs_logits or self.request.logprobs is not None
        return LogitsMode.LAST if needs_logits else LogitsMode.BEST

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

    def _choose(self, logits: Logits | None) -> int:
        assert logits is not None, "the logits mode is LAST or ALL"
        return self._chooser.choose(logits)

    def _log_probabilities(
        self, token: int, logits: Logits | None
    ) -> tuple[float | None, tuple[tuple[int, float], ...]]:
        """Return the token's natural log probability, and the likeliest (token, value) pairs."""
        if self.request.logprobs is None or logits is None:
            return None, ()
        return log_probabilities(logits[None], [token], self.request.logprobs)[0]

    def _record_prompt(self, logits: Logits) -> None:
        """Record the log probabilities of the tokens after those with logits [T, V]."""
        tokens, count = self.request.tokens, self.request.prompt_logprobs
        assert count is not None, "checked by the caller"
        end = self.block_table.num_computed
        begin = end - len(logits)
        if not self._prompt:
            self._prompt.append(PromptToken(tokens[0]))
        rows = range(max(begin, len(self._prompt) - 1), min(end, len(tokens) - 1))
        following = [tokens[row + 1] for row in rows]
        if rows:
            chosen = logits[rows[0] - begin : rows[-1] + 1 - begin]
            for token, (value, top) in zip(
                following, log_probabilities(chosen, following, count), strict=True
            ):
                self._prompt.append(PromptToken(token, value, top))


def answer_text(request: GenerationRequest, tokenizer: TextTokenizer) -> StoppableText:
    """Return the text of an answer before its first token."""
    stream = TextStream(tokenizer, request.tokens)
    return StoppableText(stream, request.stop, request.min_tokens)
