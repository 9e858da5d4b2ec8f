"""The cached tokens of a sequence: which path computed them, and for which paths they are whole.

Paths of a family write different planes of the cache (`text.model.family`). Pure: no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CachedSpan:
    """Tokens `start` to `end` (excluded), whose keys and values a path computed."""

    path: int
    start: int
    end: int


class CacheHistory:
    """The cached tokens of one sequence, 0 to `num_tokens` - 1.

    The cache is *complete* for a path up to the first token of which it lacks keys or values, and
    *exact* up to the first token whose keys and values are not those of that path alone.
    """

    def __init__(self) -> None:
        self._spans: list[CachedSpan] = []
        self._complete: dict[int, int] = {}
        self._exact: dict[int, int] = {}

    @property
    def num_tokens(self) -> int:
        """The number of cached tokens."""
        return self._spans[-1].end if self._spans else 0

    def num_complete(self, path: int) -> int:
        """Return the number of leading tokens of which a path has all keys and values."""
        return self._complete.get(path, 0)

    def num_exact(self, path: int) -> int:
        """Return the number of leading tokens with the keys and values of a path alone."""
        return self._exact.get(path, 0)

    def append(self, path: int, num_tokens: int, write_through: Sequence[int] = ()) -> None:
        """Add tokens that a path has computed; `write_through` has the other paths that got them.

        The cache must be complete for the path.
        """
        before, after = self.num_tokens, self.num_tokens + num_tokens
        if not num_tokens:
            return
        for other in (path, *write_through):
            if self.num_complete(other) == before:
                self._complete[other] = after
        if self.num_exact(path) == before:
            self._exact[path] = after
        if self._spans and self._spans[-1].path == path:
            self._spans[-1] = CachedSpan(path, self._spans[-1].start, after)
        else:
            self._spans.append(CachedSpan(path, before, after))

    def missing(self, path: int) -> list[CachedSpan]:
        """Return the spans of other paths that have to be translated before a path can go on."""
        first = self.num_complete(path)
        return [
            CachedSpan(span.path, max(span.start, first), span.end)
            for span in self._spans
            if span.end > first and span.path != path
        ]

    def complete(self, path: int) -> None:
        """Record that all missing spans of a path have been translated."""
        self._complete[path] = self.num_tokens

    def repair(self, path: int, num_tokens: int, sharing: Sequence[int]) -> None:
        """Record that a path has computed the tokens after its exact ones, `num_tokens` of them.

        `sharing` are the other paths some of whose keys and values were overwritten.
        """
        begin = self.num_exact(path)
        self._exact[path] = end = begin + num_tokens
        for other in sharing:
            self._exact[other] = min(self.num_exact(other), begin)
        rest = [CachedSpan(s.path, max(s.start, end), s.end) for s in self._spans if s.end > end]
        self._spans = [CachedSpan(path, 0, end), *rest]
        if rest and rest[0].path == path:
            self._spans[:2] = [CachedSpan(path, 0, rest[0].end)]

    def truncate(self, num_tokens: int) -> None:
        """Forget all tokens from number `num_tokens` on."""
        self._spans = [
            CachedSpan(s.path, s.start, min(s.end, num_tokens))
            for s in self._spans
            if s.start < num_tokens
        ]
        for counts in (self._complete, self._exact):
            for path, count in counts.items():
                counts[path] = min(count, num_tokens)

    def clear(self) -> None:
        """Forget all tokens."""
        self.truncate(0)
