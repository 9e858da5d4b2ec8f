"""A run of many cases, some at the same time, with a verdict on each answer."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol as TypingProtocol

from ladderstitch_loadtest.faults.fuzzing.cases import Answer, Case, Entrance, Protocol, draw_case
from ladderstitch_loadtest.faults.fuzzing.verdict import judge

CONCURRENT = 24
MAX_SIMILAR = 20
"""Wrong answers of a kind that a result describes; all of them are counted."""
SIMILAR_LENGTH = 48
"""Leading characters of a fault by which similar ones are recognised."""


class Sender(TypingProtocol):
    """Sends cases of one or several protocols."""

    async def send(self, case: Case) -> Answer:
        """Send a case and return how it ended."""


@dataclass(frozen=True, slots=True)
class WrongAnswer:
    """An answer that is wrong: the seed and index of its case, what is wrong, and the case."""

    seed: int
    index: int
    entrance: str
    fault: str
    case: str

    @property
    def similarity(self) -> str:
        """The text that faults of one kind share."""
        return f"{self.entrance}: {self.fault[:SIMILAR_LENGTH]}"


@dataclass(slots=True)
class CampaignResult:
    """The ends of all cases: counts by entrance and kind, by entrance and status, by fault."""

    kinds: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    wrong: list[WrongAnswer] = field(default_factory=list)
    slowest_s: float = 0.0

    @property
    def requests(self) -> int:
        """The number of cases that ended."""
        return sum(self.kinds.values())

    @property
    def num_wrong(self) -> int:
        """The number of wrong answers."""
        return sum(self.faults.values())

    def add(self, seed: int, case: Case, answer: Answer) -> None:
        """Count an answer and judge it."""
        name = case.entrance.name
        self.kinds[f"{name}: {case.kind}"] += 1
        self.ends[f"{name}: {answer.status} {answer.reason}".rstrip()] += 1
        self.slowest_s = max(self.slowest_s, answer.seconds)
        if fault := judge(case, answer):
            wrong = WrongAnswer(seed, case.index, name, fault, case.describe())
            self.faults[wrong.similarity] += 1
            if self.faults[wrong.similarity] <= MAX_SIMILAR:
                self.wrong.append(wrong)


class AllSenders:
    """Sends a case by the sender of its protocol."""

    def __init__(self, rpc: Sender, http: Sender) -> None:
        self._rpc, self._http = rpc, http

    async def send(self, case: Case) -> Answer:
        """Send a case and return how it ended."""
        is_http = case.entrance.protocol in (Protocol.HTTP, Protocol.SOCKET)
        return await (self._http if is_http else self._rpc).send(case)


async def run_campaign(
    sender: Sender,
    entrances: Sequence[Entrance],
    seed: int,
    indices: Iterable[int],
    advance: Callable[[], None] = lambda: None,
    rate: float = math.inf,
) -> CampaignResult:
    """Send the cases with these indices, at most 24 at a time and `rate` in a second.

    `advance` is called after each of them.
    """
    result, remaining = CampaignResult(), _paced(indices, rate)
    callers = [
        _send_cases(sender, entrances, seed, remaining, result, advance) for _ in range(CONCURRENT)
    ]
    await asyncio.gather(*callers)
    return result


def _paced(indices: Iterable[int], rate: float) -> Iterator[tuple[float, int]]:
    """Yield each index after the instant from which it may be sent."""
    start = time.monotonic()
    for number, index in enumerate(indices):
        yield start + number / rate, index


async def _send_cases(
    sender: Sender,
    entrances: Sequence[Entrance],
    seed: int,
    remaining: Iterator[tuple[float, int]],
    result: CampaignResult,
    advance: Callable[[], None],
) -> None:
    for due, index in remaining:
        case = draw_case(entrances, seed, index)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        started = time.monotonic()
        answer = await sender.send(case)
        answer.seconds = time.monotonic() - started
        result.add(seed, case, answer)
        advance()
