"""What a stream asks for: how long prompt and answer are, and how soon tokens are wanted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ladderstitch_loadtest.load.traces import Times

Lengths = NDArray[np.int64]
"""[N] tokens."""


@dataclass(frozen=True, slots=True)
class TokenClass:
    """Streams that share their budgets; `share` is how often it is drawn, relative to others."""

    name: str
    first_s: float
    per_token_s: float
    share: float = 1.0

    @classmethod
    def parse(cls, text: str) -> TokenClass:
        """NAME:FIRST_MS:TOKEN_MS[:SHARE]; raises `ValueError`."""
        name, *numbers = text.split(":")
        try:
            first_ms, token_ms, share = map(float, (*numbers, "1")[:3])
        except ValueError as error:
            raise ValueError(f"expected NAME:FIRST_MS:TOKEN_MS[:SHARE], got {text!r}") from error
        if len(numbers) > 3 or min(first_ms, token_ms, share) <= 0:
            raise ValueError(f"expected positive milliseconds and share, got {text!r}")
        return cls(name, first_ms / 1e3, token_ms / 1e3, share)


@dataclass(frozen=True, slots=True)
class StreamTrace:
    """Streams to come: times of arrival, index of each one's class, tokens of prompt and answer."""

    name: str
    arrivals_s: Times
    picks: NDArray[np.int64]
    classes: tuple[TokenClass, ...]
    prompt_tokens: Lengths
    answer_tokens: Lengths

    def __len__(self) -> int:
        return len(self.arrivals_s)

    @classmethod
    def draw(
        cls,
        name: str,
        arrivals_s: Times,
        classes: Sequence[TokenClass],
        prompt_tokens: Lengths,
        answer_tokens: Lengths,
        rng: np.random.Generator,
    ) -> StreamTrace:
        """Give every arrival a class, independently."""
        shares = np.array([one.share for one in classes])
        picks = rng.choice(len(classes), size=len(arrivals_s), p=shares / shares.sum())
        return cls(name, arrivals_s, picks, tuple(classes), prompt_tokens, answer_tokens)

    def every(self, processes: int, offset: int) -> StreamTrace:
        """One process's part."""
        part = slice(offset, None, processes)
        return StreamTrace(
            self.name,
            self.arrivals_s[part],
            self.picks[part],
            self.classes,
            self.prompt_tokens[part],
            self.answer_tokens[part],
        )


def draw_lengths(text: str, count: int, rng: np.random.Generator) -> Lengths:
    """`N` for all, or `A-B`: each as likely. Raises `ValueError`."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high:
        raise ValueError(f"expected tokens as N or A-B, got {text!r}")
    return rng.integers(low, high + 1, count)


def fitted(prompt: Lengths, answer: Lengths, max_model_len: int) -> tuple[Lengths, Lengths]:
    """Cut to what a model's context holds: the answer first to half of it, then the prompt."""
    answer = np.minimum(answer, max(1, max_model_len // 2))
    return np.minimum(prompt, max_model_len - answer), answer
