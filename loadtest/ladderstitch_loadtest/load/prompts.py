"""Requests for text: lengths of prompt and answer, and token budgets."""

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
    """Streams that share their budgets, in seconds to the first token and per token after it.

    `share` is the relative frequency with which the class is drawn.
    """

    name: str
    first_s: float
    per_token_s: float
    share: float = 1.0

    @classmethod
    def parse(cls, text: str) -> TokenClass:
        """Return the class that NAME:FIRST_MS:TOKEN_MS[:SHARE] describes.

        Raises `ValueError` for any other text, and for numbers that are not positive.
        """
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
    """A plan of N streams: arrival times, class indices, tokens of prompts and of answers."""

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
        """Return a trace in which every arrival gets a class at random, independently."""
        shares = np.array([one.share for one in classes])
        picks = rng.choice(len(classes), size=len(arrivals_s), p=shares / shares.sum())
        return cls(name, arrivals_s, picks, tuple(classes), prompt_tokens, answer_tokens)

    def split(self, processes: int, index: int) -> StreamTrace:
        """Return the streams of process `index`: every `processes`-th one."""
        part = slice(index, None, processes)
        return StreamTrace(
            self.name,
            self.arrivals_s[part],
            self.picks[part],
            self.classes,
            self.prompt_tokens[part],
            self.answer_tokens[part],
        )


def draw_lengths(text: str, count: int, rng: np.random.Generator) -> Lengths:
    """Return `count` lengths: N for the text `N`, uniform in A to B for the text `A-B`.

    Raises `ValueError` for any other text, and for lengths below 1.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high:
        raise ValueError(f"expected tokens as N or A-B, got {text!r}")
    return rng.integers(low, high + 1, count)


def fit_context(prompt: Lengths, answer: Lengths, max_model_len: int) -> tuple[Lengths, Lengths]:
    """Return lengths of prompt and answer, cut to a context of `max_model_len` tokens.

    Answers are cut to half of the context, then prompts to the rest.
    """
    answer = np.minimum(answer, max(1, max_model_len // 2))
    return np.minimum(prompt, max_model_len - answer), answer
