"""Ranks as threads of one process: for checking outputs, not for speed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from ladderstitch.text.comm.base import Link, LinkBroken, Ticket, sum_in_rank_order

WAIT_S = 60.0

Result = TypeVar("Result")


class _Meeting:
    """Where the threads leave their partial results, by number of the reduction."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.parts: dict[int, dict[int, Tensor]] = {}
        self.readers: dict[int, int] = {}
        self.broken = False
        self.changed = threading.Condition()

    def leave(self, number: int, rank: int, partial: Tensor) -> None:
        with self.changed:
            self.parts.setdefault(number, {})[rank] = partial
            self.changed.notify_all()

    def collect(self, number: int) -> list[Tensor]:
        with self.changed:
            self.changed.wait_for(
                lambda: self.broken or len(self.parts.get(number, {})) == self.ranks, WAIT_S
            )
            if self.broken or len(self.parts.get(number, {})) < self.ranks:
                raise LinkBroken("another rank failed")
            parts = self.parts[number]
            self.readers[number] = self.readers.get(number, 0) + 1
            if self.readers[number] == self.ranks:
                del self.parts[number], self.readers[number]
        return [parts[rank] for rank in range(self.ranks)]

    def give_up(self) -> None:
        with self.changed:
            self.broken = True
            self.changed.notify_all()


class ThreadLink:
    """One thread's end."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self.rank, self.ranks = rank, meeting.ranks
        self._meeting = meeting
        self._posted = 0

    def post(self, partial: Tensor) -> Ticket:
        self._posted += 1
        self._meeting.leave(self._posted, self.rank, partial)
        return self._posted

    def wait(self, ticket: Ticket) -> Tensor:
        return sum_in_rank_order(self._meeting.collect(ticket))

    def close(self) -> None:
        self._meeting.give_up()


def run_ranks(ranks: int, work: Callable[[Link], Result]) -> list[Result]:
    """The results of `work(link)` of every rank, in order; the first rank to fail raises."""
    meeting = _Meeting(ranks)

    def run(rank: int) -> Result:
        try:
            return work(ThreadLink(meeting, rank))
        except BaseException:
            meeting.give_up()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(run, rank) for rank in range(ranks)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((e for e in errors if not isinstance(e, LinkBroken)), errors[0])
    return [future.result() for future in futures]
