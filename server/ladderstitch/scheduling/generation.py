"""The nouns of text generation: token budgets, requests, and the parts of an answer.

All times are seconds on the clock of `time.monotonic`; `inf` means that there is no such deadline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ladderstitch.errors import InvalidArgument
from ladderstitch.scheduling.profiles import Quality
from ladderstitch.scheduling.requests import check_quality
from ladderstitch.scheduling.sampling import GREEDY, Grammar, Sampling, check_range

FinishReason = Literal["stop", "length"]

MAX_LOGPROBS = 20
"""Largest number of alternative tokens that a caller may request for each token."""


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """The soft latency budget of a generation in seconds; `inf` means no budget.

    `first_token_s` and `answer_s` are counted from the arrival. `per_token_s` is the mean time
    between tokens after the first.
    """

    first_token_s: float = math.inf
    per_token_s: float = math.inf
    answer_s: float = math.inf

    @property
    def is_set(self) -> bool:
        """Whether there is any budget."""
        return not all(map(math.isinf, (self.first_token_s, self.per_token_s, self.answer_s)))


NO_BUDGET = TokenBudget()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One call for up to `max_tokens` tokens that continue a prompt of `tokens`.

    No work is done after `hard_deadline`. `variant` pins a variant (a path) of the model. Only
    requests of the same `tenant` share prefixes of prompts in the cache. `logprobs` is the number
    of alternatives to report for each token; None reports no log probabilities.
    """

    tokens: tuple[int, ...]
    arrival: float
    max_tokens: int = 128
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    hard_deadline: float = math.inf
    budget: TokenBudget = NO_BUDGET
    min_quality: float = 0.0
    variant: int | None = None
    logprobs: int | None = None
    tenant: str = ""
    prompt_logprobs: int | None = None
    """As `logprobs`, for the tokens of the prompt; the first chunk has them."""
    min_tokens: int = 0
    """The answer does not end before it has this number of tokens."""
    stop_tokens: tuple[int, ...] = ()
    """Tokens that end the answer, as the model's end tokens do."""
    ignore_end_tokens: bool = False
    """Whether the model's end tokens do not end the answer."""
    grammar: Grammar | None = None
    """The answer matches it, unless it is cut off at `max_tokens`."""
    answered: tuple[int, ...] = ()
    """Tokens of an answer that another replica began, and that goes on here."""
    first_token_s: float | None = None
    """Seconds from the arrival to the first token of `answered`."""

    def check(self, vocab_size: int, max_model_len: int) -> None:
        """Raise `InvalidArgument`, which names the field, if a field is not valid.

        `max_model_len` is the largest number of tokens of prompt and answer together.
        """
        self.sampling.check()
        check_quality(self.min_quality)
        if not self.tokens:
            raise InvalidArgument("prompt", "expected at least one token, got none")
        _check_tokens("prompt", self.tokens, vocab_size)
        _check_tokens("stop_token_ids", self.stop_tokens, vocab_size)
        _check_tokens("answer_so_far", self.answered, vocab_size)
        biased = [token for token, _ in self.sampling.logit_bias]
        _check_tokens("logit_bias", biased, vocab_size)
        self._check_lengths(max_model_len)
        if any(not text for text in self.stop):
            raise InvalidArgument("stop", "expected texts that are not empty, got an empty one")
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                check_range(name, count, 0, MAX_LOGPROBS)
        for name in ("first_token_s", "per_token_s"):
            if not getattr(self.budget, name) > 0:  # NaN fails too
                raise InvalidArgument(name, f"expected above 0, got {getattr(self.budget, name)}")
        if math.isnan(self.budget.answer_s):  # the rest of a deadline may be 0 or less
            raise InvalidArgument("answer_s", "expected a number, got nan")

    def _check_lengths(self, max_model_len: int) -> None:
        if self.max_tokens < 1:
            raise InvalidArgument("max_tokens", f"expected at least 1, got {self.max_tokens}")
        if len(self.tokens) + self.max_tokens > max_model_len:
            raise InvalidArgument(
                "max_tokens",
                f"expected at most {max_model_len} tokens of prompt and answer together, got "
                f"{len(self.tokens)} + {self.max_tokens}",
            )
        check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        if len(self.answered) >= self.max_tokens:
            raise InvalidArgument(
                "answer_so_far",
                f"expected fewer than max_tokens ({self.max_tokens}), got {len(self.answered)}",
            )


def _check_tokens(field: str, tokens: Sequence[int], vocab_size: int) -> None:
    if wrong := [t for t in tokens if not 0 <= t < vocab_size]:
        raise InvalidArgument(field, f"expected tokens 0 to {vocab_size - 1}, got {wrong[:5]}")


CacheUse = Literal["", "shared", "projected", "written-through", "caught-up", "recomputed"]
"""The origin of the keys and values that a span of an answer found: its own variant (empty), a
variant that writes the same planes, a translation at the change or of every token, or computed
again, from the first token of another variant on or from the start."""


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Consecutive tokens of an answer that one variant computed.

    After a change of variant, `cache` says how the cache was made to fit (`CacheUse`), and
    `penalty_nats` what the change costs in quality, nats per token, if that was measured.
    """

    variant: int
    name: str
    num_tokens: int
    cache: CacheUse = ""
    penalty_nats: float | None = None


@dataclass(frozen=True, slots=True)
class GenerationInfo:
    """The facts about one generation: its variants, its quality, and what it reused.

    `queue_s` is the time from the arrival to the start of the prefill. `quality` is the mean over
    all tokens so far.
    """

    spans: tuple[TokenSpan, ...]
    """All tokens so far, in order; an answer that keeps its variant has one span."""
    quality: Quality | None
    queue_s: float
    reused_tokens: int
    """Tokens of the prompt whose keys and values were already in the cache."""

    @property
    def variant(self) -> int:
        """The id of the variant that computed the last token."""
        return self.spans[-1].variant

    @property
    def name(self) -> str:
        """The name of the variant that computed the last token."""
        return self.spans[-1].name


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """One token of an answer, numbered from 0; `finish` of the last one is the reason of the end.

    `text` is empty while a character is incomplete or a stop text may have begun. Log probabilities
    are natural logarithms of the model's own distribution, before temperature.
    """

    index: int
    token: int
    text: str
    answer: GenerationInfo
    finish: FinishReason | None = None
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    usage: GenerationUsage | None = None
    """The cost of the answer; only in its last chunk."""
    prompt: tuple[PromptToken, ...] = ()
    """The tokens of the prompt; only in the first chunk, if their probabilities were requested."""


@dataclass(frozen=True, slots=True)
class PromptToken:
    """A token of a prompt; the first one has no log probability."""

    token: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationUsage:
    """The cost of a complete answer, in tokens and in seconds from its arrival.

    `first_token_met`, `token_met` and `answer_met` are None if the request has no such budget.
    """

    prompt_tokens: int
    generated_tokens: int
    queue_s: float
    first_token_s: float
    total_s: float
    first_token_met: bool | None
    token_met: bool | None
    answer_met: bool | None

    @classmethod
    def measure(
        cls, request: GenerationRequest, last: TokenChunk, first_at: float, now: float
    ) -> GenerationUsage:
        """Return the usage of an answer whose first token came at `first_at` and its last now."""
        budget, num_tokens = request.budget, last.index + 1
        first_s, total_s = first_at - request.arrival, now - request.arrival
        token_s = (now - first_at) / max(1, num_tokens - 1)
        return cls(
            prompt_tokens=len(request.tokens),
            generated_tokens=num_tokens,
            queue_s=last.answer.queue_s,
            first_token_s=first_s,
            total_s=total_s,
            first_token_met=_met(first_s, budget.first_token_s),
            token_met=_met(token_s, budget.per_token_s) if num_tokens > 1 else None,
            answer_met=_met(total_s, budget.answer_s),
        )

    @property
    def mean_token_s(self) -> float:
        """The mean seconds between tokens after the first; 0 for a single token."""
        return (self.total_s - self.first_token_s) / max(1, self.generated_tokens - 1)

    @property
    def met(self) -> bool | None:
        """Whether all budgets of the request were met; None if it has none."""
        known = [
            m for m in (self.first_token_met, self.token_met, self.answer_met) if m is not None
        ]
        return all(known) if known else None


def _met(seconds: float, budget_s: float) -> bool | None:
    return None if math.isinf(budget_s) else seconds <= budget_s
