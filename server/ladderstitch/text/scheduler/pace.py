"""The instants at which an answer needs its tokens, by its budgets and by those it has."""

from __future__ import annotations

import math

from ladderstitch.scheduling.generation import GenerationRequest

DEFAULT_TTFT_S = 10.0
"""Time to first token that an answer without a budget is scheduled for."""
DEFAULT_TPOT_S = 0.25
"""Time per output token that an answer without a budget is scheduled for."""
PACE_TOKENS = 16
"""Tokens in which an answer catches up with its budget per token, or uses up its lead."""


class Pace:
    """The tokens that one answer has, and the time that its budgets leave for the next ones.

    All instants are on the clock of the request's arrival.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self._budget, self._arrival = request.budget, request.arrival
        self._max_tokens = request.max_tokens
        self.num_tokens = len(request.answered)
        """The number of tokens of the answer so far."""
        self.first_token_at: float | None = None
        if request.first_token_s is not None:
            self.first_token_at = request.arrival + request.first_token_s

    @property
    def has_token_budget(self) -> bool:
        """Whether some budget limits the time of the tokens after the first."""
        return not math.isinf(min(self._budget.per_token_s, self._budget.answer_s))

    @property
    def num_left(self) -> int:
        """The largest number of tokens that may follow."""
        return self._max_tokens - self.num_tokens

    def add_token(self, now: float) -> None:
        """Count a token that was computed at the instant `now`."""
        if self.first_token_at is None:
            self.first_token_at = now
        self.num_tokens += 1

    def deadline(self, token_s: float) -> float:
        """Return the instant until which the answer needs its next token.

        `token_s` is the shortest time of one token. An answer that is ahead of its budget keeps
        that time: it may fall behind for a while and still meet its mean time per token.
        """
        budget, first_at = self._budget, self.first_token_at
        end = self._arrival + budget.answer_s
        if first_at is None:
            first = self._arrival + min(budget.first_token_s, DEFAULT_TTFT_S)
            return min(first, end - token_s * (self._max_tokens - 1))
        paced = first_at + self.num_tokens * min(budget.per_token_s, DEFAULT_TPOT_S)
        if math.isinf(end) or self._max_tokens < 2:
            return paced
        return min(paced, first_at + (end - first_at) * self.num_tokens / (self._max_tokens - 1))

    def affordable_token_s(self, now: float) -> float:
        """Return the seconds that each of the next tokens may take within the budgets.

        Time that the answer is behind or ahead of its budget per token is spread over
        `PACE_TOKENS` tokens. Infinite without a budget, negative if it can no longer be met.
        """
        left = max(1, self.num_left)
        token_s = (self._arrival + self._budget.answer_s - now) / left
        if (ahead_s := self._ahead_s(now)) is None:
            return token_s
        return min(token_s, self._budget.per_token_s + ahead_s / min(left, PACE_TOKENS))

    def period_s(self, now: float, token_s: float) -> float:
        """Return the seconds in which the answer needs each of its next tokens.

        `token_s` is the shortest time of one token; the period is not shorter.
        """
        affordable_s = self.affordable_token_s(now)
        return DEFAULT_TPOT_S if math.isinf(affordable_s) else max(affordable_s, token_s)

    def _ahead_s(self, now: float) -> float | None:
        """Return the seconds that the answer is ahead of its budget per token; None without one."""
        if self.first_token_at is None or math.isinf(self._budget.per_token_s):
            return None
        return self.first_token_at + (self.num_tokens - 1) * self._budget.per_token_s - now
