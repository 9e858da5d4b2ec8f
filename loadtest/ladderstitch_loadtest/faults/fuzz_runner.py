"""Runs thousands of malformed requests and compares each status with the expected one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc

from ladderstitch.client import RequestFailed

INVALID_ARGUMENT = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
NO_MODEL = (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
NO_VARIANT = (grpc.StatusCode.NOT_FOUND, "VARIANT_NOT_FOUND")
INFEASIBLE = (grpc.StatusCode.FAILED_PRECONDITION, "BUDGET_INFEASIBLE")
NO_QUALITY = (grpc.StatusCode.FAILED_PRECONDITION, "QUALITY_UNAVAILABLE")
Expected = tuple[grpc.StatusCode, str]
"""A gRPC status and the reason in its details."""
ANSWERED: Expected = (grpc.StatusCode.OK, "")
CONCURRENT = 16
WARM_UP_CASES = 400


@dataclass(frozen=True, slots=True)
class FuzzCase:
    """One request, and the status or statuses with which it may end.

    `cancel_after` is the number of chunks after which the caller cancels; None: never.
    """

    kind: str
    request: Any
    expected: Expected | frozenset[Expected]
    metadata: tuple[tuple[str, str], ...] = ()
    timeout_s: float = 30.0
    cancel_after: int | None = None

    def allows(self, got: Expected) -> bool:
        """Return whether the request may end with this status."""
        return got in (self.expected if isinstance(self.expected, frozenset) else (self.expected,))


class FuzzCases(Protocol):
    """A seeded generator and sender of cases for one model."""

    def case(self, index: int) -> FuzzCase:
        """Return case number `index`; kinds take turns."""

    async def send(self, case: FuzzCase) -> None:
        """Send a case; raise `grpc.aio.AioRpcError` if the server answers with an error."""

    async def send_good(self) -> None:
        """Send a well-formed request and raise if it is not answered."""


@dataclass(slots=True)
class FuzzOutcome:
    """The result of a run; `wrong` holds a line for each request with an unexpected status."""

    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    good_answers: int = 0
    memory_before_mb: float = 0.0
    memory_after_mb: float = 0.0

    @property
    def requests(self) -> int:
        """The number of malformed requests that were sent."""
        return sum(self.kinds.values())

    def to_dict(self) -> dict[str, object]:
        """Return the fields for a result file."""
        return {
            "requests": self.requests,
            "kinds": dict(self.kinds),
            "wrong": self.wrong,
            "good_answers": self.good_answers,
            "memory_before_mb": round(self.memory_before_mb, 1),
            "memory_after_mb": round(self.memory_after_mb, 1),
        }


async def run(
    cases: FuzzCases, pids: list[int], requests: int, advance: Callable[[], None]
) -> FuzzOutcome:
    """Send malformed requests, 16 at a time, and a good one after every tenth.

    `pids` are the processes whose memory is measured, before and after. `advance` is called after
    each malformed request.
    """
    outcome = FuzzOutcome()
    await _send_batch(cases, range(WARM_UP_CASES), FuzzOutcome(), lambda: None)  # fills caches
    outcome.memory_before_mb = memory_mb(pids)
    for start in range(0, requests, CONCURRENT):
        indices = range(start, min(requests, start + CONCURRENT))
        await _send_batch(cases, indices, outcome, advance)
    await asyncio.sleep(1.0)
    outcome.memory_after_mb = memory_mb(pids)
    return outcome


async def _send_batch(
    cases: FuzzCases, indices: range, outcome: FuzzOutcome, advance: Callable[[], None]
) -> None:
    async def send_one(index: int) -> None:
        case = cases.case(index)
        outcome.kinds[case.kind] += 1
        got = ANSWERED
        try:
            await cases.send(case)
        except grpc.aio.AioRpcError as error:
            got = (error.code(), RequestFailed(error).reason)
        if not case.allows(got):
            outcome.wrong.append(f"{case.kind}: expected {case.expected}, got {got}")
        advance()
        if index % 10 == 0:
            await cases.send_good()
            outcome.good_answers += 1

    await asyncio.gather(*(send_one(index) for index in indices))


def memory_mb(pids: list[int]) -> float:
    """Return the unshared resident memory of processes in MiB."""
    kilobytes = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                kilobytes += int(line.split()[1])
    return kilobytes / 1024


def process_tree(pid: int) -> list[int]:
    """Return the ids of a process and all its descendants, whichever of its threads started them.

    Processes that end meanwhile are left out.
    """
    found = [pid]
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has just ended
            for child in map(int, file.read_text().split()):
                found += process_tree(child)
    return found
