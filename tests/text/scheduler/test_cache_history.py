"""Tests of the record of what a sequence has in the cache."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ladderstitch.text.scheduler.cache_history import CachedSpan, CacheHistory

PATHS = range(3)


class SlowHistory:
    """The same record, with one entry per token: who computed it, who has it, for whom exactly."""

    def __init__(self) -> None:
        self.computed_by: list[int] = []
        self.has: list[set[int]] = []
        self.exact: list[set[int]] = []

    def append(self, path: int, write_through: list[int]) -> None:
        before = self.exact[-1] if self.exact else set(PATHS)
        self.computed_by.append(path)
        self.has.append({path, *write_through})
        self.exact.append({path} & before)

    def complete(self, path: int) -> None:
        for paths in self.has:
            paths.add(path)

    def missing(self, path: int) -> list[int]:
        first = self.leading(self.has, path)
        return [n for n in range(first, len(self.has)) if self.computed_by[n] != path]

    def repair(self, path: int, begin: int, count: int, sharing: list[int]) -> None:
        for n in range(begin, begin + count):
            self.computed_by[n] = path
            self.exact[n].add(path)
            self.exact[n] -= set(sharing)
        for n in range(begin):
            self.computed_by[n] = path

    def leading(self, sets: list[set[int]], path: int) -> int:
        return next((n for n, paths in enumerate(sets) if path not in paths), len(sets))


@given(st.data())
def test_history_equals_a_record_of_every_token(data: st.DataObject) -> None:
    history, slow, overwritten = CacheHistory(), SlowHistory(), False
    for _ in range(data.draw(st.integers(1, 12))):
        path = data.draw(st.sampled_from(PATHS))
        action = data.draw(st.sampled_from(["append", "repair", "truncate"]))
        if action == "append":
            found = [n for span in history.missing(path) for n in range(span.start, span.end)]
            assert found == slow.missing(path)
            history.complete(path)
            slow.complete(path)
            others = data.draw(st.sets(st.sampled_from(PATHS))) - {path}
            count = data.draw(st.integers(1, 4))
            history.append(path, count, sorted(others))
            for _ in range(count):
                slow.append(path, sorted(others))
        elif action == "repair" and history.num_complete(path) == history.num_tokens:
            left = history.num_tokens - history.num_exact(path)
            count = data.draw(st.integers(0, left))
            sharing = sorted(data.draw(st.sets(st.sampled_from(PATHS))) - {path})
            if count:
                overwritten |= bool(sharing)
                slow.repair(path, history.num_exact(path), count, sharing)
                history.repair(path, count, sharing)
        elif action == "truncate":
            length = data.draw(st.integers(0, history.num_tokens))
            history.truncate(length)
            for entries in (slow.computed_by, slow.has, slow.exact):
                del entries[length:]  # type: ignore[attr-defined] # lists of different elements
        assert history.num_tokens == len(slow.computed_by)
        for other in PATHS:
            assert history.num_complete(other) == slow.leading(slow.has, other)
            exact, most = history.num_exact(other), slow.leading(slow.exact, other)
            assert exact <= most if overwritten else exact == most  # may forget, never invent


def test_spans_of_one_path_are_joined() -> None:
    history = CacheHistory()
    history.append(0, 3)
    history.append(0, 2)
    history.complete(1)
    history.append(1, 4)
    assert history.missing(0) == [CachedSpan(1, 5, 9)]
    assert history.missing(2) == [CachedSpan(0, 0, 5), CachedSpan(1, 5, 9)]
    history.repair(1, 5, [])
    assert history.missing(2) == [CachedSpan(1, 0, 9)]
    assert (history.num_exact(1), history.num_exact(0)) == (5, 5)
