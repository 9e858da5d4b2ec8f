"""The serving nouns: a request, its budget, the completion that answers it.

All times are seconds on the clock of `time.monotonic`; `inf` stands for "no such deadline".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ladderstitch.errors import InvalidArgument
from ladderstitch.scheduling.profiles import Quality

Pixels = NDArray[np.float32]
"""[N, C, H, W], preprocessed, contiguous."""

Logits = NDArray[np.float32]
"""[N, classes]."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """When an answer is due, and what the caller named to say so.

    `soft` is the earliest of all deadlines: what policies plan for. `hard` is the earliest of the
    hard ones: no work starts, or continues, past it. `inf` stands for "no such deadline".
    """

    soft: float = float("inf")
    hard: float = float("inf")
    soft_source: str = "none"
    hard_source: str = "none"


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One accepted call for `images.shape[0]` answers from one variant."""

    id: str
    images: Pixels
    arrival: float
    deadlines: Deadlines
    min_quality: float = 0.0
    variant: int | None = None
    priority: int = 0

    @property
    def num_images(self) -> int:
        return int(self.images.shape[0])


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one request, and what it cost; the answer's rows are the request's."""

    logits: Logits
    variant: int
    quality: float
    queue_s: float
    compute_s: float
    batch_size: int


FinishReason = Literal["stop", "length"]

MAX_LOGPROBS = 20
"""Alternatives of each token that a caller may ask for."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """`temperature` 0 is greedy; `top_k` 0 and `top_p` 1 leave everything in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def check(self) -> None:
        """Raises `InvalidArgument` naming the field that is out of range."""
        if not 0 <= self.temperature <= 100:  # NaN fails too
            raise InvalidArgument("temperature", f"expected 0 to 100, got {self.temperature}")
        if self.top_k < 0:
            raise InvalidArgument("top_k", f"expected 0 or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InvalidArgument("top_p", f"expected above 0 and at most 1, got {self.top_p}")


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """Seconds that are wanted: targets, not limits; `inf` is no wish.

    `first_token_s` and `answer_s` run from the arrival; `per_token_s` is the mean time between
    tokens after the first.
    """

    first_token_s: float = math.inf
    per_token_s: float = math.inf
    answer_s: float = math.inf


NO_BUDGET = TokenBudget()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What is asked for; `arrival` and `limit` are on the clock of `time.monotonic`.

    Past the `limit` no work is done. `variant` pins a path of the model. Prefixes of prompts are
    shared between requests of one `tenant` only. `logprobs` counts the alternatives to report for
    each token; None reports none at all.
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

    def check(self, vocabulary: int, most_tokens: int) -> None:
        """Raises `InvalidArgument` naming the field that is wrong."""
        self.sampling.check()
        if not self.tokens:
            raise InvalidArgument("prompt", "expected at least one token")
        if wrong := [t for t in self.tokens if not 0 <= t < vocabulary]:
            raise InvalidArgument(
                "prompt", f"expected tokens 0 to {vocabulary - 1}, got {wrong[:5]}"
            )
        if self.max_tokens < 1:
            raise InvalidArgument("max_tokens", f"expected at least 1, got {self.max_tokens}")
        if len(self.tokens) + self.max_tokens > most_tokens:
            raise InvalidArgument(
                "max_tokens",
                f"expected at most {most_tokens} tokens of prompt and answer together, got "
                f"{len(self.tokens)} + {self.max_tokens}",
            )
        if any(not text for text in self.stop):
            raise InvalidArgument("stop", "expected texts that are not empty")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise InvalidArgument("logprobs", f"expected 0 to {MAX_LOGPROBS}, got {self.logprobs}")
        for name in ("first_token_s", "per_token_s"):
            if not getattr(self.budget, name) > 0:  # NaN fails too
                raise InvalidArgument(name, f"expected above 0, got {getattr(self.budget, name)}")
        if math.isnan(self.budget.answer_s):  # what is left of a deadline may be nothing
            raise InvalidArgument("answer_s", "expected a number, got nan")


@dataclass(frozen=True, slots=True)
class GenerationInfo:
    """How an answer was made; `queue_s` from the arrival to the start of the prefill."""

    path: int
    name: str
    quality: Quality | None
    queue_s: float
    reused_tokens: int
    """Tokens of the prompt whose keys and values were in the cache already."""


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """One token of an answer, numbered from 0; the last one says why the answer ended.

    `text` may be empty, when a character is not whole or a stop text may have begun. Log
    probabilities are natural, of the model's own distribution, before temperature.
    """

    index: int
    token: int
    text: str
    answer: GenerationInfo
    finish: FinishReason | None = None
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
