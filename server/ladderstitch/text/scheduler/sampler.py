"""The next token of an answer: drawn from logits, after penalties, bias, end rules and grammar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from ladderstitch.errors import NonFiniteOutput
from ladderstitch.scheduling.generation import GenerationRequest
from ladderstitch.scheduling.sampling import Sampling
from ladderstitch.text.messages import Logits

FLOAT32 = np.finfo(np.float32)


def non_finite_output() -> NonFiniteOutput:
    """Return the error of a sequence whose keys, values or logits are not finite."""
    return NonFiniteOutput(
        "the model's logits or cached values for this request are infinite or NaN: the prompt or "
        "the weights exceed the range of its number format"
    )


class Sampler:
    """The token source of one answer; two samplers with the same seed pick the same tokens."""

    def __init__(self, sampling: Sampling, num_drawn: int = 0) -> None:
        """`num_drawn` tokens were drawn before, by another sampler with the same seed."""
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        if num_drawn and sampling.temperature:
            self._random.random(num_drawn)  # `choice` draws one number for each token

    def pick(self, logits: NDArray[np.float32]) -> int:
        """Return a token id, picked from logits [V]; those of -inf are never picked.

        Raises `NonFiniteOutput` if no logit is finite.
        """
        most = float(logits.max())
        if not np.isfinite(most):
            raise non_finite_output()
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        # The largest is 0, so that no temperature, however low, makes NaN: others become -inf.
        shifted = logits.astype(np.float64) - most
        with np.errstate(over="ignore", under="ignore"):
            scaled = shifted / self.sampling.temperature
            kept = self._candidates(scaled)
            powers = np.exp(scaled[kept])
        return int(self._random.choice(kept, p=powers / powers.sum()))

    def _candidates(self, scaled: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the `top_k` most likely tokens, cut off at `top_p` of their probability mass.

        The largest of `scaled` is 0; those below the logarithm of `min_p` are not kept. The tokens
        are in order of falling probability unless all of them are kept.
        """
        if self.sampling.min_p:
            scaled = np.where(scaled >= np.log(self.sampling.min_p), scaled, -np.inf)
        k = min(self.sampling.top_k or len(scaled), len(scaled))
        if k == len(scaled) and self.sampling.top_p == 1:
            return (
                np.arange(len(scaled))
                if not self.sampling.min_p
                else np.nonzero(scaled > -np.inf)[0]
            )
        best = np.argpartition(-scaled, k - 1)[:k]
        best = best[np.argsort(-scaled[best], kind="stable")]
        powers = np.exp(scaled[best])
        mass_before = np.cumsum(powers) - powers
        return best[mass_before < self.sampling.top_p * powers.sum()]


class TokenChooser:
    """The choice of the tokens of one answer, by all options of its request.

    Penalties and bias come first, then `min_tokens`, which excludes what would end the answer, and
    at last the grammar.
    """

    def __init__(self, request: GenerationRequest, end_tokens: Collection[int]) -> None:
        """`end_tokens` are the model's own; tokens that were answered before are taken over."""
        ends = () if request.ignore_end_tokens else end_tokens
        self.end_tokens = frozenset((*ends, *request.stop_tokens))
        self._request = request
        self._sampler = Sampler(request.sampling, len(request.answered))
        self._matcher = None if request.grammar is None else request.grammar.matcher()
        self._prompt = set(request.tokens)
        self._biased, self._biases = _sum_biases(request.sampling.logit_bias)
        self._counts: Counter[int] = Counter()
        for token in request.answered:
            self.add(token)

    @property
    def needs_logits(self) -> bool:
        """Whether the next token cannot be chosen from the number of the likeliest one alone."""
        sampling = self._request.sampling
        return (
            sampling.temperature != 0
            or sampling.changes_logits
            or self._matcher is not None
            or self._delays_end
        )

    @property
    def complete(self) -> bool:
        """Whether the answer matches its grammar and no further token may follow."""
        return self._matcher is not None and self._matcher.complete

    @property
    def _delays_end(self) -> bool:
        return bool(self.end_tokens) and self._counts.total() < self._request.min_tokens

    def choose(self, logits: Logits) -> int:
        """Return the next token from logits [V]; `add` must follow.

        Raises `NonFiniteOutput` if a logit is infinite or NaN.
        """
        if not np.isfinite(logits).all():
            raise non_finite_output()
        if not self._request.sampling.changes_logits and not self._delays_end:
            return self._sampler.pick(self._match(logits))
        changed = logits.copy()
        if self._request.sampling.changes_logits:
            self._penalise(changed)
        if self._delays_end:
            changed[list(self.end_tokens)] = -np.inf
        return self._sampler.pick(self._match(changed))

    def add(self, token: int) -> None:
        """Append a token to the answer."""
        self._counts[token] += 1
        if self._matcher is not None:
            self._matcher.add(token)

    def _penalise(self, logits: Logits) -> None:
        """Apply penalties and bias in place: repetition first, as in transformers."""
        sampling = self._request.sampling
        if sampling.repetition_penalty != 1:
            seen = _index(self._prompt | self._counts.keys())
            values, by = logits[seen], max(np.float32(sampling.repetition_penalty), FLOAT32.tiny)
            with np.errstate(over="ignore"):
                changed = np.where(values < 0, values * by, values / by)
            logits[seen] = np.clip(changed, FLOAT32.min, FLOAT32.max)
        if self._counts and (sampling.presence_penalty or sampling.frequency_penalty):
            answered = _index(list(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[answered] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        logits[self._biased] += self._biases

    def _match(self, logits: Logits) -> Logits:
        """Return the logits with -inf for all tokens that the grammar does not permit."""
        if self._matcher is None:
            return logits
        allowed = self._matcher.allowed(len(logits))
        matching = np.where(allowed, logits, np.float32(-np.inf))
        if np.isneginf(matching).all():  # only the end matches, which `min_tokens` delays
            matching[allowed] = 0.0
        return matching


def _sum_biases(
    entries: Sequence[tuple[int, float]],
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the different tokens of entries, and the sum of the biases of each."""
    tokens, places = np.unique(_index([token for token, _ in entries]), return_inverse=True)
    biases = np.array([bias for _, bias in entries], np.float32)
    sums = np.zeros(len(tokens), np.float32)
    np.add.at(sums, places, biases)
    return tokens, sums


def _index(tokens: Collection[int]) -> NDArray[np.int64]:
    return np.fromiter(tokens, np.int64, len(tokens))


def log_probabilities(
    logits: NDArray[np.float32], tokens: Sequence[int], count: int
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """Return the natural log probability of a token in each row of logits [T, V].

    Each comes with the `count` likeliest tokens of its row and their values.
    """
    rows = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    k = min(count, rows.shape[1])
    found = []
    for row, token in zip(rows, tokens, strict=True):
        top = np.argpartition(-row, k - 1)[:k] if k else np.array([], np.int64)
        top = top[np.argsort(-row[top], kind="stable")]
        found.append((float(row[token]), tuple((int(t), float(row[t])) for t in top)))
    return found
