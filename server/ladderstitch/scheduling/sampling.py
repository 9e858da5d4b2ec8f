"""The options by which the next token of an answer is drawn, and what an answer must match."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ladderstitch.errors import InvalidArgument

MAX_PENALTY = 2.0
"""Largest absolute value of the presence and the frequency penalty."""
MAX_REPETITION_PENALTY = 10.0
MAX_BIAS = 100.0
"""Largest absolute value that a caller may add to the logit of a token."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling options: `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 exclude no token.

    The penalties and the bias change the logits before the temperature does. `presence_penalty`
    and `frequency_penalty` count tokens of the answer, `repetition_penalty` those of the prompt,
    too.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    """Excludes tokens with less than this share of the probability of the likeliest one."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of the tokens that the answer has."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token for each time that the answer has it."""
    repetition_penalty: float = 1.0
    """Divides positive logits of the tokens so far, and multiplies negative ones."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, and what is added to the logit of each."""

    @property
    def changes_logits(self) -> bool:
        """Whether a penalty or a bias changes the logits."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1
            or self.logit_bias
        )

    def check(self) -> None:
        """Raise `InvalidArgument`, which names the field, if a field is out of range."""
        check_range("temperature", self.temperature, 0, 100)
        if self.top_k < 0:
            raise InvalidArgument("top_k", f"expected 0 or more, got {self.top_k}")
        if self.seed is not None and self.seed < 0:
            raise InvalidArgument("seed", f"expected 0 or more, got {self.seed}")
        if not 0 < self.top_p <= 1:  # NaN fails too
            raise InvalidArgument("top_p", f"expected above 0 and at most 1, got {self.top_p}")
        check_range("min_p", self.min_p, 0, 1)
        for field in ("presence_penalty", "frequency_penalty"):
            check_range(field, getattr(self, field), -MAX_PENALTY, MAX_PENALTY)
        if not 0 < self.repetition_penalty <= MAX_REPETITION_PENALTY:
            raise InvalidArgument(
                "repetition_penalty",
                f"expected above 0 and at most {MAX_REPETITION_PENALTY:g}, "
                f"got {self.repetition_penalty}",
            )
        for _, bias in self.logit_bias:
            check_range("logit_bias", bias, -MAX_BIAS, MAX_BIAS)


def check_range(field: str, value: float, least: float, most: float) -> None:
    """Raise `InvalidArgument`, which names the field, if a value is not in a range, or is NaN."""
    if not least <= value <= most:
        raise InvalidArgument(field, f"expected {least:g} to {most:g}, got {value}")


GREEDY = Sampling()


class AnswerMatcher(Protocol):
    """The state of one answer that must match a grammar."""

    @property
    def complete(self) -> bool:
        """Whether the answer matches and no further token may follow."""

    def allowed(self, num_tokens: int) -> NDArray[np.bool_]:
        """Return [V], V = `num_tokens`: whether each token, or the end, may come next."""

    def add(self, token: int) -> None:
        """Append a token that `allowed` permits."""


class Grammar(Protocol):
    """A compiled grammar; each answer gets a matcher of its own."""

    def matcher(self) -> AnswerMatcher:
        """Return the state of an answer without tokens."""
